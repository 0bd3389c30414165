//! WebSockets: a tunnel once both sides have agreed, with a backend's own credential.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::harness::{
    Authority, Connection, Gateway, PATIENCE, TlsFront, Upstream, eventually, get, raw_upstream,
    read_head,
};

const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
    Upgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\
    Sec-WebSocket-Protocol: realtime\r\n\r\n";

/// A request for a WebSocket, with more header lines.
fn request(target: &str, lines: &str) -> String {
    format!(
        "GET {target} HTTP/1.1\r\nHost: g\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{lines}\r\n"
    )
}

/// An upstream that agrees, tells the head that it got, and sends back what comes.
fn echo(heads: Sender<String>) -> String {
    let heads = Mutex::new(heads);
    raw_upstream(move |mut stream: TcpStream| {
        let head = String::from_utf8_lossy(&read_head(&mut stream)).into_owned();
        if head.contains("/health") {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
            return;
        }
        let _ = heads.lock().unwrap().send(head);
        let _ = stream.write_all(SWITCHED.as_bytes());
        let mut buffer = [0; 64 * 1024];
        while let Ok(read @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..read]).is_err() {
                return;
            }
        }
    })
}

fn config(top: &str, url: &str) -> String {
    format!(
        "listen: 127.0.0.1:0\n{top}\nservices: {{svc: {{models: {{rt-1: {{backends: [\
         {{id: a, url: \"{url}\", api_key: sk-backend, model: rt-there}}]}}}}}}}}\n"
    )
}

/// A tunnel.
#[track_caller]
fn opened(gateway: &Gateway, target: &str) -> Connection {
    let mut connection = Connection::open(gateway.address());
    connection.write(request(target, "").as_bytes()).unwrap();
    assert_eq!(connection.read_head().unwrap().status, 101);
    connection
}

/// What comes in answer to `bytes`, as many of them.
fn echoed(connection: &mut Connection, bytes: &[u8]) -> Vec<u8> {
    connection.write(bytes).unwrap();
    connection.read_bytes(bytes.len())
}

#[test]
fn both_sides_talk_as_they_like_once_they_have_agreed() {
    let (heads, told) = channel();
    let url = echo(heads);
    let gateway = Gateway::start(&config("api_key: sk-1", &url));
    let key = "Authorization: Bearer sk-1\r\n";
    let browser = "Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.sk-1\r\n";
    for (target, lines, at_backend) in [
        ("/svc/rt-1/v1/realtime?x=1", key, "GET /v1/realtime?x=1 "),
        ("/v1/realtime?model=rt-1&x=1", key, "GET /v1/realtime?model=rt-there&x=1 "),
        ("/v1/realtime?model=rt-1", browser, "GET /v1/realtime?model=rt-there "),
    ] {
        let mut connection = Connection::open(gateway.address());
        connection.write(request(target, lines).as_bytes()).unwrap();
        let answer = connection.read_head().unwrap();
        assert_eq!(answer.status, 101, "{target}");
        assert_eq!(answer.header("upgrade").to_lowercase(), "websocket");
        assert_eq!(answer.header("sec-websocket-accept"), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(answer.header("sec-websocket-protocol"), "realtime");
        let head = told.recv_timeout(PATIENCE).unwrap();
        assert!(head.starts_with(at_backend), "{head}");
        assert!(
            head.contains("authorization: Bearer sk-backend")
                || head.contains("Authorization: Bearer sk-backend"),
            "{head}"
        );
        assert!(!head.contains("sk-1"), "{head}");
        assert!(head.to_lowercase().contains("upgrade: websocket"), "{head}");
        for length in [1, 100, 200_000] {
            let bytes: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
            assert!(echoed(&mut connection, &bytes) == bytes, "{length}");
        }
        assert_eq!(gateway.inflight(), 1);
        drop(connection);
        eventually("it is over", || gateway.inflight() == 0);
    }
    let refused = get(gateway.address(), "/v1/realtime?model=rt-1", &[]);
    assert_eq!(refused.status, 401);
}

#[test]
fn a_backend_that_does_not_agree_answers_as_it_likes() {
    let upstream = Upstream::start(|_, reply| reply.send(403, &[], b"no"));
    let gateway = Gateway::start(&config("", &upstream.url()));
    let mut connection = Connection::open(gateway.address());
    connection.write(request("/v1/realtime?model=rt-1", "").as_bytes()).unwrap();
    let answer = connection.read(false).unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (403, "no"));
    connection.write(request("/v1/realtime?model=nope", "").as_bytes()).unwrap();
    assert_eq!(connection.read(false).unwrap().status, 404);
}

#[test]
fn a_websocket_has_deadlines_of_its_own() {
    let (heads, _told) = channel();
    let url = echo(heads);
    let quick =
        "deadlines: {silence: 200ms, exchange: 300ms, websocket_idle: 600ms, websocket_total: 1h}";
    let gateway = Gateway::start(&config(quick, &url));
    let mut connection = opened(&gateway, "/v1/realtime?model=rt-1");
    // Longer than the deadlines of an exchange, and never idle.
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_millis(1500) {
        assert_eq!(echoed(&mut connection, b"ping"), b"ping");
        std::thread::park_timeout(Duration::from_millis(50));
    }
    let idle = std::time::Instant::now();
    assert!(connection.is_closed(), "idle for too long");
    assert!(idle.elapsed() > Duration::from_millis(400), "{:?}", idle.elapsed());
    let gateway = Gateway::start(&config("deadlines: {websocket_total: 700ms}", &url));
    let mut connection = opened(&gateway, "/v1/realtime?model=rt-1");
    let began = std::time::Instant::now();
    assert_eq!(echoed(&mut connection, b"ping"), b"ping");
    assert!(connection.is_closed(), "its time is up");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    eventually("nothing is left", || gateway.inflight() == 0);
}

#[test]
fn how_a_tunnel_ends_says_nothing_about_its_backend() {
    let (heads, _told) = channel();
    let top = "breaker: {consecutive_failures: 1}\ndeadlines: {websocket_idle: 100ms}";
    let mut gateway =
        Gateway::start(&format!("log: {{level: debug}}\n{}", config(top, &echo(heads))));
    for _ in 0..3 {
        let mut connection = opened(&gateway, "/v1/realtime?model=rt-1");
        assert!(connection.is_closed(), "idle for too long");
    }
    gateway.wait_log("/v1/realtime -> 101, deadline websocket_idle of 0.1 s is over");
    assert_eq!(gateway.backend("svc/rt-1", "a")["breaker"], "closed");
    // Over TLS, with an end that the backend does not announce.
    let url = raw_upstream(|mut stream: TcpStream| {
        let head = String::from_utf8_lossy(&read_head(&mut stream)).into_owned();
        let is_check = head.contains("/health");
        let answer =
            if is_check { "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" } else { SWITCHED };
        let _ = stream.write_all(answer.as_bytes());
    });
    let authority = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    let ca = authority.write(folder.path());
    let pair = authority.sign(&["localhost"]);
    let front = TlsFront::abrupt(&pair, url.trim_start_matches("http://").parse().unwrap());
    let url = format!("https://localhost:{}", front.address().port());
    let text = config("log: {level: debug}\nbreaker: {consecutive_failures: 1}", &url);
    let tls = format!("tls: {{ca_file: \"{}\"}}, api_key", ca.display());
    let mut gateway = Gateway::start(&text.replace("api_key", &tls));
    for _ in 0..3 {
        let mut connection = opened(&gateway, "/v1/realtime?model=rt-1");
        assert!(connection.is_closed(), "the backend has closed");
    }
    gateway.wait_log("/v1/realtime -> 101");
    assert!(gateway.log().iter().all(|line| !line.contains("WARN")), "{:?}", gateway.log());
    assert_eq!(gateway.backend("svc/rt-1", "a")["breaker"], "closed");
}

#[test]
fn backends_that_speak_http2_only_are_not_asked_for_a_websocket() {
    let (heads, _told) = channel();
    let two = crate::harness::Http2Upstream::start();
    let one = echo(heads);
    let backend = |id: &str, url: &str, protocol: &str| {
        format!("{{id: {id}, url: \"{url}\", protocol: {protocol}}}")
    };
    let text = format!(
        "listen: 127.0.0.1:0\nbalance: round_robin\nservices: {{svc: {{models: {{\
         only: {{backends: [{}]}}, both: {{backends: [{}, {}]}}}}}}}}\n",
        backend("a", &two.url(), "http2"),
        backend("a", &two.url(), "http2"),
        backend("b", &one, "http1"),
    );
    let gateway = Gateway::start(&text);
    let mut connection = Connection::open(gateway.address());
    connection.write(request("/v1/realtime?model=only", "").as_bytes()).unwrap();
    let answer = connection.read(false).unwrap();
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].as_str()),
        (400, Some("websocket_unsupported"))
    );
    for _ in 0..4 {
        let mut connection = opened(&gateway, "/v1/realtime?model=both");
        assert_eq!(echoed(&mut connection, b"hello"), b"hello");
    }
    assert_eq!(gateway.backend("svc/only", "a")["breaker"], "closed");
    // Nor is it what is wrong with a model that is down.
    let gateway = Gateway::start(
        &text
            .replace(&one, "http://127.0.0.1:1")
            .replace("services", "fallbacks: {both: only}\nservices"),
    );
    let mut connection = Connection::open(gateway.address());
    connection.write(request("/v1/realtime?model=both", "").as_bytes()).unwrap();
    assert_eq!(connection.read(false).unwrap().status, 503);
}

#[test]
fn a_tunnel_passes_what_only_one_side_sends() {
    let done = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&done);
    let url = raw_upstream(move |mut stream: TcpStream| {
        if String::from_utf8_lossy(&read_head(&mut stream)).contains("/health") {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
            return;
        }
        let _ = stream.write_all(SWITCHED.as_bytes());
        let mut buffer = [0; 64 * 1024];
        while let Ok(read @ 1..) = stream.read(&mut buffer) {
            *counted.lock().unwrap() += read;
        }
    });
    let gateway = Gateway::start(&config("deadlines: {websocket_idle: 500ms}", &url));
    let mut connection = opened(&gateway, "/v1/realtime?model=rt-1");
    // Audio goes up for longer than both may be silent, and nothing comes back.
    for _ in 0..20 {
        connection.write(&[7; 1000]).unwrap();
        std::thread::park_timeout(Duration::from_millis(60));
    }
    eventually("all of it has come", || *done.lock().unwrap() == 20_000);
}

#[test]
fn a_backend_over_tls_and_http2_is_asked_in_http1() {
    let (heads, told) = channel();
    let url = echo(heads);
    let to = url.trim_start_matches("http://").parse().unwrap();
    let authority = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    let ca = authority.write(folder.path());
    let front = TlsFront::start(&authority.sign(&["localhost"]), None, &["h2", "http/1.1"], to);
    let text = format!(
        "listen: 127.0.0.1:0\nservices: {{svc: {{models: {{rt-1: {{backends: [{{id: a, \
         url: \"https://localhost:{}\", protocol: auto, tls: {{ca_file: \"{}\"}}}}]}}}}}}}}\n",
        front.address().port(),
        ca.display()
    );
    let gateway = Gateway::start(&text);
    let mut connection = opened(&gateway, "/v1/realtime?model=rt-1");
    assert_eq!(echoed(&mut connection, b"hello"), b"hello");
    // The checks speak what was agreed on, which is not what this upstream speaks.
    eventually("it has the request", || {
        told.recv_timeout(PATIENCE).unwrap().starts_with("GET /v1/realtime")
    });
}

#[test]
fn a_backend_that_agrees_at_once_keeps_its_tunnel() {
    let is_checked = AtomicBool::new(false);
    let url = raw_upstream(move |mut stream: TcpStream| {
        if !is_checked.swap(true, Ordering::SeqCst) {
            let _ = read_head(&mut stream);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
            return;
        }
        // The answer is there before the request is.
        let _ = stream.write_all(SWITCHED.as_bytes());
        let head = read_head(&mut stream);
        let end = head.windows(4).position(|bytes| bytes == b"\r\n\r\n");
        let _ = stream.write_all(&head[end.map_or(head.len(), |end| end + 4)..]);
        let mut buffer = [0; 1024];
        while let Ok(read @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..read]).is_err() {
                return;
            }
        }
    });
    let gateway = Gateway::start(&config("health_check: {interval: 1h}", &url));
    gateway.wait_backend("svc/rt-1", "a", "healthy");
    for round in 0..50 {
        let mut connection = opened(&gateway, "/v1/realtime?model=rt-1");
        assert_eq!(echoed(&mut connection, b"hello"), b"hello", "{round}");
    }
}
