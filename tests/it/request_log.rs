//! The request log: what is in a line, and that no line is lost but where the disk does not take it.

use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};

use crate::harness::{
    Connection, Gateway, Metrics, Reply, Seen, Upstream, config, eventually, get, post, run_program,
};

/// The lines of all files in a folder whose names begin like this.
fn lines_in(folder: &Path, name: &str) -> Vec<Value> {
    let Ok(files) = std::fs::read_dir(folder) else { return Vec::new() };
    let is_it =
        |path: &Path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name));
    let paths = files.map(|file| file.unwrap().path()).filter(|path| is_it(path));
    paths.flat_map(|path| lines(&path)).collect()
}

/// The lines of a file, whole ones only.
fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    whole.map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect()
}

/// Waits until there are so many lines.
#[track_caller]
fn wait_lines(path: &Path, count: usize) -> Vec<Value> {
    eventually(&format!("{count} lines"), || lines(path).len() >= count);
    let lines = lines(path);
    assert_eq!(lines.len(), count, "{lines:#?}");
    lines
}

/// Sends `count` requests, each with an id of its own; on one connection, as long as that is kept.
fn send_numbered(gateway: &Gateway, from: usize, count: usize) {
    let mut connection = Connection::open(gateway.address());
    for number in from..from + count {
        let request =
            format!("GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\nX-Request-ID: n-{number}\r\n\r\n");
        connection.write(request.as_bytes()).unwrap();
        let answer = connection.read(false).unwrap();
        assert_eq!(answer.status, 200);
        if answer.header("connection") == "close" {
            connection = Connection::open(gateway.address());
        }
    }
}

/// Waits until the files whose names begin like this have each numbered line once. While one is put aside, it may be
/// seen twice or not at all.
#[track_caller]
fn wait_numbered(folder: &Path, name: &str, count: usize) {
    let numbers = || {
        let number = |line: &Value| -> usize {
            let id = line["request_id"].as_str().unwrap();
            id.strip_prefix("n-").unwrap_or_else(|| panic!("{line:#}")).parse().unwrap()
        };
        let mut numbers: Vec<usize> = lines_in(folder, name).iter().map(number).collect();
        numbers.sort_unstable();
        numbers
    };
    eventually("each line is there once", || numbers() == (0..count).collect::<Vec<_>>());
}

#[test]
fn a_line_tells_all_of_an_exchange_and_no_secret() {
    let upstream = Upstream::start(|_: &Seen, reply: &mut Reply| {
        let body = br#"{"choices":[{}],"usage":{"prompt_tokens":100,"completion_tokens":50}}"#;
        reply.send(200, &[("Content-Type", "application/json")], body);
    });
    let top = "api_key: sk-global-secret\nledger: {}\nrequest_log: {file: deep/log}\n\
               prices: {models: {mdl: {input: 1, output: 2}}}";
    let gateway = Gateway::start(&config(top, &[&upstream]));
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let answer = post(
        gateway.address(),
        "/svc/mdl/v1/chat/completions?token=query-secret",
        &["X-API-Key: sk-global-secret", "X-Request-ID: r-1", &format!("traceparent: {trace}")],
        r#"{"messages":[{"content":"prompt-secret"}]}"#,
    );
    assert_eq!(answer.status, 200);
    // Another thread may tell of the next one first.
    let path = gateway.folder().join("deep/log");
    let line = wait_lines(&path, 1).remove(0);
    let refused = post(gateway.address(), "/svc/mdl/x", &["X-API-Key: sk-wrong-secret"], "");
    assert_eq!(refused.status, 401);
    let lines = wait_lines(&path, 2);
    for (field, value) in [
        ("request_id", json!("r-1")),
        ("trace_id", json!("4bf92f3577b34da6a3ce929d0e0e4736")),
        ("key", json!("global")),
        ("address", json!("127.0.0.1")),
        ("method", json!("POST")),
        ("path", json!("/svc/mdl/v1/chat/completions")),
        ("service", json!("svc")),
        ("model", json!("mdl")),
        ("backend", json!("a")),
        ("attempts", json!(1)),
        ("status", json!(200)),
        ("bytes_in", json!(42)),
        ("bytes_out", json!(answer.body.len())),
        ("tokens_input", json!(100)),
        ("tokens_output", json!(50)),
        ("estimated", json!(false)),
        ("cost", json!("0.0002")),
        ("currency", json!("USD")),
        ("stream", json!(false)),
        ("aborted", json!(false)),
    ] {
        assert_eq!(line[field], value, "{field} of {line:#}");
    }
    // The phases make up the whole time.
    let phases = line["phases_ms"].as_object().unwrap();
    let sum: f64 = phases.values().map(|value| value.as_f64().unwrap()).sum();
    let whole = line["duration_ms"].as_f64().unwrap();
    assert!((sum - whole).abs() < 0.02 && phases.contains_key("backend"), "{line:#}");
    assert!(line["ttfb_ms"].as_f64().unwrap() <= whole);
    assert_eq!(
        (&lines[1]["refusal"], &lines[1]["status"]),
        (&json!("invalid_api_key"), &json!(401))
    );
    let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o640, "its group may read it");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains("secret"), "{text}");
}

#[test]
fn lines_are_of_exchanges_for_which_a_condition_holds() {
    let upstream = Upstream::start(|seen, reply| {
        let status = if seen.target().ends_with("bad") { 404 } else { 200 };
        reply.send(status, &[], b"x");
    });
    let top = r#"request_log: {file: log, when: 'response.status >= 400 || request.headers["x-log"] == "1" && backend == "a"'}"#;
    let gateway = Gateway::start(&config(top, &[&upstream]));
    let path = gateway.folder().join("log");
    for (target, header, status) in [
        ("/svc/mdl/one", "X-None: 1", 200),
        ("/svc/mdl/bad", "X-None: 1", 404),
        ("/svc/mdl/two", "X-Log: 1", 200),
        // What has no model yet has a line.
        ("/svc/none/x", "X-None: 1", 404),
    ] {
        assert_eq!(get(gateway.address(), target, &[header]).status, status, "{target}");
    }
    let lines = wait_lines(&path, 3);
    // Another thread may tell of the next one first.
    let mut paths: Vec<&str> = lines.iter().filter_map(|line| line["path"].as_str()).collect();
    paths.sort_unstable();
    assert_eq!(paths, ["/svc/mdl/bad", "/svc/mdl/two", "/svc/none/x"]);
}

#[test]
fn a_line_says_why_an_exchange_failed_and_who_left() {
    let upstream = Upstream::start(|seen, reply| {
        if seen.target().ends_with("stay") {
            reply.begin("text/event-stream");
            reply.chunk(b"data: x\n\n");
            reply.wait_closed();
        } else {
            reply.cut();
        }
    });
    let gateway =
        Gateway::start(&config("request_log: {file: log}\nretry: {retries_max: 1}", &[&upstream]));
    let path = gateway.folder().join("log");
    assert_eq!(get(gateway.address(), "/svc/mdl/cut", &[]).status, 502);
    let line = wait_lines(&path, 1).remove(0);
    assert_eq!((&line["attempts"], &line["error"]), (&json!(2), &json!("backend_failed")));
    assert!(line["why"].as_str().is_some_and(|why| !why.is_empty()), "{line:#}");
    assert!(line["phases_ms"]["queue"].as_f64().is_some(), "it waited between the two: {line:#}");
    let mut leaving = Connection::open(gateway.address());
    leaving.write(b"GET /svc/mdl/stay HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    assert_eq!(leaving.read_head().unwrap().status, 200);
    assert!(leaving.read_chunk().is_some());
    drop(leaving);
    let line = wait_lines(&path, 2).remove(1);
    assert_eq!((&line["aborted"], &line["stream"]), (&json!(true), &json!(true)), "{line:#}");
    assert_eq!(line.get("error"), None, "a client that leaves is no error: {line:#}");
}

/// What the last line says was wrong.
fn last_why(gateway: &Gateway, count: usize) -> (Value, String) {
    let line = wait_lines(&gateway.folder().join("log"), count).pop().unwrap();
    (line["error"].clone(), line["why"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn a_line_says_which_deadline_or_bound_it_was() {
    let upstream = Upstream::start(|seen, reply| {
        if seen.target().ends_with("slow") {
            reply.begin("text/event-stream");
            reply.chunk(b"data: x\n\n");
        }
        reply.wait_closed();
    });
    let top = "request_log: {file: log}\nretry: {retries_max: 0}\nqueue: {length_max: 1, timeout: 300ms}\n\
               deadlines: {first_byte: 200ms, silence: 300ms}";
    let config = config(top, &[&upstream]).replace("{id: a", "{inflight_max: 1, id: a");
    let gateway = Gateway::start(&config);
    assert_eq!(get(gateway.address(), "/svc/mdl/hang", &[]).status, 504);
    let (error, why) = last_why(&gateway, 1);
    assert_eq!(
        (error, why.as_str()),
        (json!("backend_timeout"), "deadline first_byte of 0.2 s is over")
    );
    assert_eq!(get(gateway.address(), "/svc/mdl/slow", &[]).status, 200);
    let (error, why) = last_why(&gateway, 2);
    assert_eq!(
        (error, why.as_str()),
        (json!("stream_interrupted"), "deadline silence of 0.3 s is over")
    );
}

#[test]
fn clients_that_leave_while_they_wait_have_a_line_and_are_counted() {
    let upstream = Upstream::start(|_, reply| {
        reply.wait_closed();
    });
    let config = config("request_log: {file: log}\nqueue: {timeout: 10s}", &[&upstream]);
    let gateway = Gateway::start(&config.replace("{id: a", "{inflight_max: 1, id: a"));
    let mut first = Connection::open(gateway.address());
    first.write(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    eventually("the backend is at it", || gateway.inflight() == 1 && !upstream.seen().is_empty());
    let mut waiting = Connection::open(gateway.address());
    waiting.write(b"GET /svc/mdl/wait HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    eventually("it waits in line", || {
        Metrics::of(gateway.address()).sum("proxy_queue_length", &[]) > 0.5
    });
    drop(waiting);
    let line = wait_lines(&gateway.folder().join("log"), 1).remove(0);
    assert_eq!((&line["path"], &line["status"]), (&json!("/svc/mdl/wait"), &json!(0)), "{line:#}");
    assert_eq!((&line["aborted"], &line["why"]), (&json!(true), &json!("the client left")));
    assert!(line["phases_ms"]["queue"].as_f64().is_some(), "{line:#}");
    let metrics = Metrics::of(gateway.address());
    assert_eq!(metrics.sum("proxy_client_aborts_total", &["model=\"mdl\""]), 1.0);
    assert_eq!(metrics.sum("proxy_requests_total", &["status=\"0\""]), 1.0);
}

#[test]
fn files_that_are_put_aside_lose_no_line() {
    let upstream = Upstream::named("x");
    let log = "request_log: {file: logs/log, rotate_bytes: 4096, keep: 1000}";
    let gateway = Gateway::start(&config(log, &[&upstream]));
    send_numbered(&gateway, 0, 400);
    let folder = gateway.folder().join("logs");
    wait_numbered(&folder, "log", 400);
    let files = std::fs::read_dir(&folder).unwrap().count();
    assert!(files > 2, "{files}");
}

#[test]
fn logrotate_puts_the_file_aside_and_no_line_is_lost() {
    let upstream = Upstream::named("x");
    let gateway =
        Gateway::start(&config("request_log: {file: log, rotate_bytes: 0}", &[&upstream]));
    let folder = gateway.folder();
    let (path, pid) = (folder.join("log"), gateway.process());
    let rules = format!(
        "{} {{\n su root root\n rotate 9\n missingok\n nocompress\n nodelaycompress\n create 0640 root root\n postrotate\n  kill -USR1 {pid}\n endscript\n}}\n",
        path.display()
    );
    let conf = folder.join("rotate.conf");
    std::fs::write(&conf, rules).unwrap();
    for round in 0..4 {
        send_numbered(&gateway, round * 50, 50);
        // Between lines and their file there are some milliseconds: those of one round may be in the next file.
        let done = Command::new("logrotate")
            .args(["--force", "--state"])
            .arg(folder.join("rotate.state"))
            .arg(&conf)
            .output()
            .expect("logrotate is installed");
        let is_root = nix::unistd::getuid().is_root();
        assert!(done.status.success() || !is_root, "{}", String::from_utf8_lossy(&done.stderr));
    }
    send_numbered(&gateway, 200, 50);
    wait_numbered(folder, "log", 250);
}

#[test]
fn the_file_is_opened_again_on_a_signal() {
    let upstream = Upstream::named("x");
    let mut gateway = Gateway::start(&config("request_log: {file: log}", &[&upstream]));
    let (path, aside) = (gateway.folder().join("log"), gateway.folder().join("mine"));
    gateway.wait_log("request log in /");
    send_numbered(&gateway, 0, 1);
    wait_lines(&path, 1);
    std::fs::rename(&path, &aside).unwrap();
    gateway.signal(Signal::SIGUSR1);
    gateway.wait_log("the request log was opened again");
    assert!(path.exists(), "before there is a line for it");
    send_numbered(&gateway, 1, 1);
    wait_lines(&path, 1);
    assert_eq!(lines(&aside).len(), 1);
}

#[test]
fn a_disk_that_hangs_delays_nobody_and_what_is_lost_is_counted() {
    let upstream = Upstream::named("x");
    let folder = tempfile::tempdir().unwrap();
    // Nobody reads from this pipe: after what fits into it, writing hangs.
    let pipe = folder.path().join("pipe");
    mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    let options = std::fs::OpenOptions::new().read(true).custom_flags(libc_nonblock()).open(&pipe);
    let reader = options.unwrap();
    let log = "request_log: {file: pipe, queue_bytes_max: 64KiB}";
    std::fs::write(folder.path().join("tollgate.yaml"), config(log, &[&upstream])).unwrap();
    let mut gateway = Gateway::start_in(folder, &[], &[]);
    // 64 KiB in the pipe, 64 KiB in the writer's hands, and 64 KiB that wait.
    send_numbered(&gateway, 0, 1000);
    let dropped = |gateway: &Gateway| {
        let metrics = Metrics::of(gateway.address());
        metrics.sum("proxy_request_log_lines_total", &["outcome=\"dropped\""])
    };
    assert!(dropped(&gateway) > 100.0, "{}", dropped(&gateway));
    // The disk is back: what waited is written, and the loss is told.
    let reading = std::thread::spawn(move || {
        use std::io::Read;
        let (mut reader, mut bytes) = (reader, 0);
        let mut buffer = [0; 65536];
        let mut wait = 0;
        while wait < 2000 {
            match reader.read(&mut buffer) {
                Ok(read @ 1..) => bytes += read,
                _ => {
                    wait += 1;
                    std::thread::park_timeout(std::time::Duration::from_millis(1));
                }
            }
        }
        bytes
    });
    gateway.wait_log("lines of the request log lost since the start");
    let written = || {
        let metrics = Metrics::of(gateway.address());
        metrics.sum("proxy_request_log_lines_total", &["outcome=\"written\""])
    };
    let lost = dropped(&gateway);
    eventually("what waited is written", || written() + lost >= 1000.0);
    assert!((written() + lost - 1000.0).abs() < 0.5, "{} and {lost}", written());
    assert!(reading.join().unwrap() > 64 * 1024);
}

/// `O_NONBLOCK`, so that a pipe can be opened before somebody writes into it.
fn libc_nonblock() -> i32 {
    nix::fcntl::OFlag::O_NONBLOCK.bits()
}

#[test]
fn of_what_goes_well_a_share_has_a_line_and_of_failures_each() {
    let upstream = Upstream::start(|seen, reply| {
        let status = if seen.target().ends_with("bad") { 501 } else { 200 };
        reply.send(status, &[], b"");
    });
    let gateway = Gateway::start(&config("request_log: {file: log, sample: 0}", &[&upstream]));
    send_numbered(&gateway, 0, 20);
    assert_eq!(get(gateway.address(), "/svc/mdl/bad", &[]).status, 501);
    assert_eq!(get(gateway.address(), "/svc/none/x", &[]).status, 404);
    let lines = wait_lines(&gateway.folder().join("log"), 2);
    let mut statuses: Vec<u64> =
        lines.iter().map(|line| line["status"].as_u64().unwrap()).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [404, 501]);
}

#[test]
fn a_reload_turns_to_another_file_and_off() {
    let upstream = Upstream::named("x");
    let mut gateway = Gateway::start(&config("request_log: {file: one}", &[&upstream]));
    let path = gateway.folder().join("tollgate.yaml");
    let reload = |gateway: &mut Gateway, log: &str, generation: usize| {
        std::fs::write(&path, config(log, &[&upstream])).unwrap();
        gateway.signal(Signal::SIGHUP);
        eventually("it is at work", || {
            gateway.log().iter().filter(|line| line.contains("is at work")).count() >= generation
        });
    };
    // A line is written soon after its answer, to the file that is at work then: so each is waited for.
    send_numbered(&gateway, 0, 1);
    let one = wait_lines(&gateway.folder().join("one"), 1);
    reload(&mut gateway, "request_log: {file: two}", 1);
    send_numbered(&gateway, 1, 1);
    wait_lines(&gateway.folder().join("two"), 1);
    reload(&mut gateway, "request_log: {enabled: false}", 2);
    send_numbered(&gateway, 2, 1);
    assert!(!gateway.log().iter().any(|line| line.contains("DEBUG")));
    reload(&mut gateway, "request_log: {file: two}\nlog: {format: json, level: debug}", 3);
    send_numbered(&gateway, 3, 1);
    gateway.wait_log("\"level\":\"debug\"");
    let id = |line: &Value| line["request_id"].clone();
    let two = wait_lines(&gateway.folder().join("two"), 2);
    assert_eq!([id(&one[0]), id(&two[0]), id(&two[1])], ["n-0", "n-1", "n-3"]);
    // The application log's way of writing changes too.
    gateway.signal(Signal::SIGUSR1);
    let line = gateway.wait_log("was opened again");
    let line: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&line["level"], line["time"].is_string()), (&json!("info"), true));
}

#[test]
fn two_processes_write_to_one_file_while_one_takes_over() {
    let upstream = Upstream::named("x");
    let log = "request_log: {file: log, rotate_bytes: 8192, keep: 1000}";
    let mut gateway = Gateway::start(&config(log, &[&upstream]));
    send_numbered(&gateway, 0, 100);
    gateway.signal(Signal::SIGUSR2);
    gateway.wait_successor();
    send_numbered(&gateway, 100, 100);
    gateway.wait_end();
    gateway.adopt_successor();
    send_numbered(&gateway, 200, 100);
    let folder = gateway.folder();
    wait_numbered(folder, "log", 300);
}

#[test]
fn the_last_lines_are_written_before_the_process_ends() {
    let upstream = Upstream::named("x");
    let mut gateway = Gateway::start(&config("request_log: {file: log}", &[&upstream]));
    send_numbered(&gateway, 0, 100);
    gateway.signal(Signal::SIGTERM);
    assert!(gateway.wait_end().success());
    wait_numbered(gateway.folder(), "log", 100);
}

#[test]
fn with_a_backends_json_it_is_on_and_where_it_cannot_be_written_the_gateway_serves_all_the_same() {
    let upstream = Upstream::named("x");
    for (log, file_at, expected) in [
        (&[][..], "", Some("logs/requests.log")),
        (&[("REQUEST_LOG_FILE", "other.log")][..], "", Some("other.log")),
        (&[("REQUEST_LOG_ENABLED", "false")][..], "", None),
        // A file stands where the folder should be.
        (&[][..], "logs", None),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let backend = json!({"id": "a", "url": upstream.url()});
        let json = json!({"services": {"svc": {"models": {"mdl": {"backends": [backend]}}}}});
        std::fs::create_dir(folder.path().join("config")).unwrap();
        std::fs::write(folder.path().join("config/backends.json"), json.to_string()).unwrap();
        if !file_at.is_empty() {
            std::fs::write(folder.path().join(file_at), "").unwrap();
        }
        let variables = [&[("HOST", "127.0.0.1"), ("PORT", "0")][..], log].concat();
        let mut gateway = Gateway::start_in(folder, &variables, &[]);
        send_numbered(&gateway, 0, 1);
        match expected {
            Some(path) => drop(wait_lines(&gateway.folder().join(path), 1)),
            None => assert!(!gateway.folder().join("logs/requests.log").exists()),
        }
        if !file_at.is_empty() {
            gateway.wait_log("there is no request log: cannot write the request log");
        }
    }
}

#[test]
fn one_that_was_asked_for_and_cannot_be_written_keeps_the_gateway_from_starting() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("taken"), "").unwrap();
    let upstream = Upstream::named("x");
    let config = config("request_log: {file: taken/log}", &[&upstream]);
    std::fs::write(folder.path().join("tollgate.yaml"), config).unwrap();
    let ended = run_program(folder.path(), &[], &[]);
    assert_eq!(ended.status.code(), Some(1));
    let words = String::from_utf8_lossy(&ended.stderr);
    assert!(words.contains("taken/log (request_log.file)"), "{words}");
}

#[test]
fn standard_output_takes_lines_too() {
    let upstream = Upstream::named("x");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let file = std::fs::File::create(&out).unwrap();
    let gateway = Gateway::start_with_output(
        folder,
        &config("", &[&upstream]),
        &[("REQUEST_LOG_FILE", "-")],
        file.into(),
    );
    send_numbered(&gateway, 0, 3);
    wait_numbered(out.parent().unwrap(), "out", 3);
}
