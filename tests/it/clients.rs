//! Clients as people use them: the OpenAI SDK for Python, curl, and the demo's own curl lines.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// `tollgate demo` on a free port.
struct Demo {
    child: Child,
    greeting: Vec<String>,
}

impl Demo {
    fn start() -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .args(["demo", "--port", "0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut greeting = Vec::new();
        for line in stdout.lines().map_while(Result::ok) {
            let is_last = line.starts_with("Ctrl-C");
            greeting.push(line);
            if is_last {
                break;
            }
        }
        Self { child, greeting }
    }

    fn url(&self) -> &str {
        let line =
            self.greeting.iter().find(|line| line.contains("Dashboard")).expect("an address");
        line.split_whitespace().last().expect("an address").trim_end_matches('/')
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn output(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().expect("the client runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{errors}");
    text
}

#[test]
fn every_curl_line_of_the_demo_works_when_pasted() {
    let demo = Demo::start();
    let lines: Vec<&String> =
        demo.greeting.iter().filter(|line| line.trim_start().starts_with("curl ")).collect();
    assert_eq!(lines.len(), 6, "{:#?}", demo.greeting);
    let expected = [
        r#""object":"list""#,
        "chat.completion",
        "data: [DONE]",
        r#""type":"message""#,
        r#""done":true"#,
        "HTTP/1.1 200",
    ];
    for (line, expected) in lines.iter().zip(expected) {
        let text = output(Command::new("sh").args(["-c", line]));
        assert!(text.contains(expected), "{line}: {text}");
    }
    let page = output(Command::new("curl").args(["-sS", demo.url()]));
    assert!(page.contains("<title>Tollgate</title>"));
}

#[test]
fn the_demo_ends_on_ctrl_c() {
    let mut demo = Demo::start();
    let pid = Pid::from_raw(i32::try_from(demo.child.id()).expect("a process id"));
    kill(pid, Signal::SIGINT).expect("it is there");
    assert_eq!(demo.child.wait().expect("it ends").code(), Some(0));
}

#[test]
fn openai_python_works_whole_and_streamed() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    assert!(python.exists(), "{} is missing; `make test` makes it", python.display());
    let demo = Demo::start();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/openai_client.py");
    let text = output(Command::new(python).arg(script).arg(demo.url()));
    assert!(text.ends_with("all fine\n"), "{text}");
}

#[test]
fn curl_speaks_http2_without_tls() {
    let demo = Demo::start();
    let url = format!("{}/demo/chat/v1/chat/completions", demo.url());
    let body = r#"{"model":"chat","stream":true,"messages":[{"role":"user","content":"Hi"}]}"#;
    let text = output(Command::new("curl").args([
        "-sSN",
        "--http2-prior-knowledge",
        "-w",
        "\nversion %{http_version}\n",
        "-d",
        body,
        &url,
    ]));
    assert!(text.contains("data: [DONE]") && text.ends_with("version 2\n"), "{text}");
}
