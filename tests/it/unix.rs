//! Unix sockets: as listener and as backend.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::Signal;

use crate::harness::{Gateway, Upstream, eventually, get};

/// One request over a Unix socket, and all that comes.
fn ask(socket: &Path, lines: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    let head = format!("GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\nConnection: close\r\n{lines}\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A folder, a socket in it, and an address list with it.
fn listens() -> (tempfile::TempDir, PathBuf, String) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("t.sock");
    let listen = format!("[\"127.0.0.1:0\", \"unix:{}\"]", socket.display());
    (folder, socket, listen)
}

fn gateway(folder: tempfile::TempDir, listen: &str, top: &str, url: &str) -> Gateway {
    let text = format!(
        "listen: {listen}\n{top}\nservices: {{svc: {{models: {{mdl: {{backends: [{{id: a, url: \"{url}\"}}]}}}}}}}}\n"
    );
    std::fs::write(folder.path().join("tollgate.yaml"), text).unwrap();
    Gateway::start_in(folder, &[], &["serve"])
}

#[test]
fn a_gateway_listens_on_a_unix_socket() {
    let upstream = Upstream::start(|seen, reply| reply.text(&seen.header("x-forwarded-for")));
    let (folder, socket, _) = listens();
    let listen = format!("[\"unix:{}\", \"127.0.0.1:0\"]", socket.display());
    // What an earlier process left is no hindrance.
    drop(UnixListener::bind(&socket).unwrap());
    let gateway = gateway(folder, &listen, "trusted_proxies: [unix]", &upstream.url());
    let mode = socket.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let answer = ask(&socket, "X-Forwarded-For: 203.0.113.7\r\n");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("203.0.113.7"), "{answer}");
    assert!(ask(&socket, "").starts_with("HTTP/1.1 200"));
    // Two cannot listen there.
    let output = crate::harness::run_program(gateway.folder(), &[], &["serve"]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("another process listens there"), "{told}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn forwarded_headers_are_believed_from_a_unix_socket_only_where_that_is_said() {
    let upstream = Upstream::start(|seen, reply| reply.text(&seen.header("x-forwarded-for")));
    let (folder, socket, listen) = listens();
    let _gateway = gateway(folder, &listen, "", &upstream.url());
    eventually("it listens", || socket.exists());
    let answer = ask(&socket, "X-Forwarded-For: 203.0.113.7\r\n");
    assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains("203.0.113.7"), "{answer}");
}

#[test]
fn clients_behind_a_unix_socket_do_not_all_stick_to_one_backend() {
    let (one, two) = (Upstream::named("one"), Upstream::named("two"));
    let (folder, socket, listen) = listens();
    let two_backends = format!("{}\"}}, {{id: b, url: \"{}", one.url(), two.url());
    let _gateway = gateway(folder, &listen, "balance: sticky", &two_backends);
    eventually("it listens", || socket.exists());
    let answers: Vec<String> = (0..60).map(|_| ask(&socket, "")).collect();
    for name in ["one", "two"] {
        assert!(answers.iter().any(|answer| answer.ends_with(name)), "{name}: {answers:?}");
    }
}

#[test]
fn a_unix_socket_is_handed_over_in_an_upgrade() {
    let upstream = Upstream::named("x");
    let (folder, socket, listen) = listens();
    let mut gateway = gateway(folder, &listen, "", &upstream.url());
    eventually("it listens", || socket.exists());
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asks = || {
            let mut answers = 0;
            while !is_over.load(Ordering::Relaxed) {
                assert!(ask(&socket, "").ends_with('x'));
                answers += 1;
            }
            answers
        };
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(asks)).collect();
        gateway.signal(Signal::SIGUSR2);
        gateway.wait_successor();
        let before = upstream.seen().len();
        eventually("the new process answers", || upstream.seen().len() > before + 200);
        is_over.store(true, Ordering::Relaxed);
        let answers: usize = clients.into_iter().map(|client| client.join().unwrap()).sum();
        assert!(answers > 200, "{answers}");
    });
    gateway.adopt_successor();
}

#[test]
fn a_backend_is_asked_over_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vllm.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut head = Vec::new();
                let mut byte = [0];
                while let Ok(1) = stream.read(&mut byte) {
                    head.push(byte[0]);
                    if head.ends_with(b"\r\n\r\n") {
                        let text = String::from_utf8_lossy(&head);
                        let line = text.lines().next().unwrap_or_default().to_owned();
                        let length = line.len();
                        let _ = stream.write_all(
                            format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{line}")
                                .as_bytes(),
                        );
                        head.clear();
                    }
                }
            });
        }
    });
    let url = format!("unix:{}:/base", path.display());
    let gateway = gateway(folder, "127.0.0.1:0", "", &url);
    gateway.wait_backend("svc/mdl", "a", "healthy");
    for _ in 0..3 {
        let answer = get(gateway.address(), "/svc/mdl/v1/models?a=b", &[]);
        assert_eq!(
            (answer.status, answer.text().as_str()),
            (200, "GET /base/v1/models?a=b HTTP/1.1")
        );
    }
    assert_eq!(gateway.backend("svc/mdl", "a")["url"], url.as_str());
    std::fs::remove_file(&path).unwrap();
    let gone = gateway.folder().join("nobody.sock");
    let text = format!(
        "listen: 127.0.0.1:0\nservices: {{svc: {{models: {{mdl: {{backends: [{{id: a, url: \"unix:{}\"}}]}}}}}}}}\n",
        gone.display()
    );
    let gateway = Gateway::start(&text);
    let answer = get(gateway.address(), "/svc/mdl/x", &[]);
    assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (503, Some("no_backend")));
}
