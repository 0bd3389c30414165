//! Clients as people use them: SDKs of Python and Node, LangChain, a WebSocket client, curl, and the demo's
//! own curl lines.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{Gateway, Reply, Seen, Upstream};

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

/// A file of the clients that `make clients` installs.
fn installed(file: &str) -> PathBuf {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    assert!(file.exists(), "{} is missing; `make clients` makes it", file.display());
    file
}

fn python(script: &str) -> Command {
    let mut command = Command::new(installed(".venv/bin/python"));
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(script));
    command
}

#[test]
fn openai_python_works_whole_and_streamed_by_path() {
    let demo = Demo::start();
    let text = output(python("demo.py").arg(demo.url()));
    assert!(text.ends_with("all fine\n"), "{text}");
}

/// A backend of all that the SDKs ask for, as small as they can be.
fn llm(seen: &Seen, reply: &mut Reply) {
    let json = |reply: &mut Reply, body: Value| {
        reply.send(200, &[("Content-Type", "application/json")], body.to_string().as_bytes());
    };
    assert_eq!(seen.header("authorization"), "Bearer sk-backend");
    let target = seen.target();
    let asked: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
    let user = asked["user"].as_str().unwrap_or_default();
    if let Some(status) = user.strip_prefix("status-") {
        let body =
            json!({"error": {"message": "scripted", "type": "x", "code": "y", "param": null}});
        return reply.send(status.parse().unwrap(), &[], body.to_string().as_bytes());
    }
    if user == "hang" {
        reply.wait_closed();
        return;
    }
    match target.split('?').next().unwrap_or_default() {
        "/v1/messages" => message(&asked, reply),
        "/v1/messages/count_tokens" => json(reply, json!({"input_tokens": 2})),
        "/v1/embeddings" => json(reply, embeddings(&asked)),
        "/v1/responses" => json(
            reply,
            json!({"id": "r", "object": "response", "created_at": 1,
            "model": "chat", "status": "completed", "parallel_tool_calls": false, "tools": [],
            "tool_choice": "auto", "output": [{"type": "message", "id": "m", "role": "assistant",
            "status": "completed", "content": [{"type": "output_text", "text": asked["input"],
            "annotations": []}]}]}),
        ),
        "/v1/moderations" => json(
            reply,
            json!({"id": "m", "model": "chat", "results": [
            {"flagged": false, "categories": {}, "category_scores": {}}]}),
        ),
        "/v1/audio/speech" => {
            let sound: Vec<u8> = (0..=255).collect();
            reply.send(200, &[("Content-Type", "audio/mpeg")], &sound);
        }
        "/v1/audio/transcriptions" => {
            let text = String::from_utf8_lossy(&seen.body).into_owned();
            let value = |name: &str| {
                let part = text.split(&format!("name=\"{name}\"")).nth(1).unwrap_or_default();
                let value = part.split("\r\n\r\n").nth(1).unwrap_or_default();
                value.split("\r\n--").next().unwrap_or_default().to_owned()
            };
            let text = format!("model={} file={}", value("model"), value("file").len());
            json(reply, json!({"text": text}));
        }
        "/v1/files" => {
            let text = String::from_utf8_lossy(&seen.body).into_owned();
            let file = text.split("name=\"file\"").nth(1).unwrap_or_default();
            let file = file.split_once("\r\n\r\n").unwrap_or_default().1;
            let bytes = file.split("\r\n--").next().unwrap_or_default().len();
            json(
                reply,
                json!({"id": "f", "object": "file", "bytes": bytes, "created_at": 1,
                "filename": "d", "purpose": "batch", "status": "processed"}),
            );
        }
        "/v1/files/f/content" => reply.text("content"),
        "/v1/files/f" => json(reply, json!({"id": "f", "object": "file", "deleted": true})),
        path if path.ends_with("/chat/completions") => chat(seen, &asked, reply),
        path => panic!("{path}"),
    }
}

/// 0.5 and 0.25, as floats in base64 where they are asked for so.
fn embeddings(asked: &Value) -> Value {
    let is_base64 = asked["encoding_format"] == "base64";
    let vector = if is_base64 { json!("AAAAPwAAgD4=") } else { json!([0.5, 0.25]) };
    let data = |index| json!({"object": "embedding", "index": index, "embedding": vector});
    json!({"object": "list", "model": "embed", "data": [data(0), data(1)],
        "usage": {"prompt_tokens": 2, "total_tokens": 2}})
}

fn chat(seen: &Seen, asked: &Value, reply: &mut Reply) {
    let content = &asked["messages"][0]["content"];
    let answer =
        if content.is_string() { content.clone() } else { json!(seen.body_bytes.to_string()) };
    let whole = |choice: Value| {
        json!({"id": "c", "object": "chat.completion", "created": 1, "model": asked["model"],
            "choices": [choice]})
    };
    if asked["stream"] == true {
        reply.begin("text/event-stream");
        for piece in ["Say", " hello"] {
            let delta = json!({"index": 0, "delta": {"content": piece}});
            let mut chunk = whole(delta);
            chunk["object"] = json!("chat.completion.chunk");
            reply.chunk(format!("data: {chunk}\n\n").as_bytes());
            if asked["user"] == "cut" {
                return reply.cut();
            }
        }
        reply.chunk(b"data: [DONE]\n\n");
        return reply.end();
    }
    let message = if asked["tools"].is_array() {
        json!({"role": "assistant", "content": null, "tool_calls": [{"id": "t", "type": "function",
            "function": {"name": asked["tools"][0]["function"]["name"], "arguments": "{}"}}]})
    } else {
        json!({"role": "assistant", "content": answer})
    };
    let body = whole(json!({"index": 0, "finish_reason": "stop", "message": message}));
    reply.send(200, &[("Content-Type", "application/json")], body.to_string().as_bytes());
}

fn message(asked: &Value, reply: &mut Reply) {
    let mut whole = json!({"id": "m", "type": "message", "role": "assistant", "model": "chat",
        "content": [{"type": "text", "text": "Say hello"}], "stop_reason": "end_turn",
        "stop_sequence": null, "usage": {"input_tokens": 1, "output_tokens": 2}});
    if asked["stream"] != true {
        return reply.send(
            200,
            &[("Content-Type", "application/json")],
            whole.to_string().as_bytes(),
        );
    }
    whole["content"] = json!([]);
    reply.begin("text/event-stream");
    for event in [
        json!({"type": "message_start", "message": whole}),
        json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
        json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Say "}}),
        json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello"}}),
        json!({"type": "content_block_stop", "index": 0}),
        json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}}),
        json!({"type": "message_stop"}),
    ] {
        let kind = event["type"].as_str().unwrap();
        reply.chunk(format!("event: {kind}\ndata: {event}\n\n").as_bytes());
    }
    reply.end();
}

/// A gateway in front of [`llm`], as its clients know it.
fn gateway(upstream: &Upstream) -> Gateway {
    let url = upstream.url();
    let backends = format!("{{backends: [{{id: a, url: \"{url}\", api_key: sk-backend}}]}}");
    Gateway::start(&format!(
        "listen: 127.0.0.1:0\napi_key: sk-clients\naliases: {{gpt-4o: chat}}\ndefault_service: svc\n\
         cache: {{enabled: true}}\ndeadlines: {{first_byte: 2s}}\nretry: {{retries_max: 0}}\nbreaker: {{enabled: false}}\n\
         services: {{svc: {{models: {{chat: {backends}, embed: {backends}}}}}}}\n"
    ))
}

#[test]
fn the_python_sdks_work_by_changing_only_the_base_url() {
    let upstream = Upstream::start(llm);
    let gateway = gateway(&upstream);
    let text = output(python("sdks.py").arg(format!("http://{}", gateway.address())));
    assert!(text.ends_with("all fine\n"), "{text}");
}

#[test]
fn the_node_sdk_works_by_changing_only_the_base_url() {
    let upstream = Upstream::start(llm);
    let gateway = gateway(&upstream);
    let folder = installed(".node/node_modules");
    // From there it finds what was installed.
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/sdk.mjs");
    let script = std::fs::read_to_string(script).unwrap();
    let mut node = Command::new("node");
    node.args(["--input-type=module", "--eval", &script, "--", "node"])
        .arg(format!("http://{}", gateway.address()))
        .current_dir(folder.parent().unwrap());
    let text = output(&mut node);
    assert!(text.ends_with("all fine\n"), "{text}");
}

#[test]
fn a_websocket_client_and_server_talk_through_the_gateway() {
    let mut server = python("websocket.py").arg("serve").stdout(Stdio::piped()).spawn().unwrap();
    let mut port = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut port).unwrap();
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\napi_key: sk-clients\naliases: {{rt: gpt-realtime}}\n\
         services: {{svc: {{models: {{gpt-realtime: {{backends: [{{id: a, api_key: sk-backend, \
         url: \"http://127.0.0.1:{}\", health_check: {{expect_status: [200, 426]}}}}]}}}}}}}}\n",
        port.trim()
    ));
    let text = output(python("websocket.py").arg("ask").arg(gateway.address().to_string()));
    assert!(text.ends_with("all fine\n"), "{text}");
    server.kill().unwrap();
    server.wait().unwrap();
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
