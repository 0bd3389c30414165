//! Starting, reloading and stopping.

use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::{
    Connection, Gateway, Upstream, config, eventually, get, run_program, send_from,
};

/// An upstream that answers `/fast` at once and everything else when the test lets it.
fn held() -> (Upstream, std::sync::mpsc::Sender<()>) {
    let (release, released) = std::sync::mpsc::channel();
    let released = std::sync::Mutex::new(released);
    let upstream = Upstream::start(move |seen, reply| {
        if seen.target == b"/fast" {
            return reply.text("fast");
        }
        reply.begin("text/event-stream");
        reply.chunk(b"data: first\n\n");
        let _ = released.lock().unwrap().recv();
        reply.chunk(b"data: last\n\n");
        reply.end();
    });
    (upstream, release)
}

fn open_stream(gateway: &Gateway) -> Connection {
    let mut connection = Connection::open(gateway.address());
    connection.write(b"GET /svc/mdl/stream HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    assert_eq!(connection.read_head().unwrap().status, 200);
    assert_eq!(connection.read_chunk().unwrap(), b"data: first\n\n");
    connection
}

#[test]
fn a_drain_finishes_the_stream_refuses_new_traffic_and_says_so_on_ready() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (upstream, release) = held();
        let mut gateway = Gateway::start(&config("", &[&upstream]));
        assert_eq!(get(gateway.address(), "/ready", &[]).status, 200);
        let mut stream = open_stream(&gateway);
        gateway.signal(signal);
        gateway.wait_log("exchanges in flight: 1");
        let ready = get(gateway.address(), "/ready", &[]);
        assert_eq!((ready.status, &ready.json()["status"]), (503, &"draining".into()));
        assert_eq!(get(gateway.address(), "/health", &[]).status, 200);
        let refused = get(gateway.address(), "/svc/mdl/fast", &[]);
        assert_eq!((refused.status, refused.header("retry-after").as_str()), (503, "1"));
        assert_eq!(refused.json()["error"]["code"], "draining");
        release.send(()).unwrap();
        assert_eq!(stream.read_chunk().unwrap(), b"data: last\n\n");
        assert_eq!(stream.read_chunk().unwrap(), b"");
        assert_eq!(gateway.wait_end().code(), Some(0));
    }
}

#[test]
fn an_idle_gateway_stops_at_once() {
    let upstream = Upstream::named("x");
    let mut gateway = Gateway::start(&config("", &[&upstream]));
    // A connection that is kept open is not an exchange.
    let mut kept = Connection::open(gateway.address());
    kept.write(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    assert_eq!(kept.read(false).unwrap().status, 200);
    let started = Instant::now();
    gateway.signal(Signal::SIGTERM);
    assert_eq!(gateway.wait_end().code(), Some(0));
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(kept.is_closed());
}

#[test]
fn a_drain_ends_at_the_shutdown_timeout_and_the_cut_stream_does_not_look_complete() {
    let (upstream, _release) = held();
    let mut gateway =
        Gateway::start_with(&config("", &[&upstream]), &[("SHUTDOWN_TIMEOUT", "0.3")], &[]);
    let mut stream = open_stream(&gateway);
    gateway.signal(Signal::SIGTERM);
    assert_eq!(gateway.wait_end().code(), Some(0));
    gateway.wait_log("exchanges cut: 1");
    assert_eq!(stream.read_chunk(), None);
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let (upstream, _release) = held();
    let mut gateway = Gateway::start(&config("", &[&upstream]));
    let _stream = open_stream(&gateway);
    gateway.signal(Signal::SIGTERM);
    gateway.wait_log("exchanges in flight: 1");
    gateway.signal(Signal::SIGINT);
    assert_eq!(gateway.wait_end().code(), Some(1));
}

#[test]
fn a_busy_port_is_a_clear_error_at_once() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "listen: {address}\nservices: {{s: {{models: {{m: {{backends: [{{id: a, url: http://h}}]}}}}}}}}"
    );
    std::fs::write(folder.path().join("tollgate.yaml"), config).unwrap();
    let started = Instant::now();
    let output = run_program(folder.path(), &[], &["serve"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains(&format!("cannot listen on {address}")), "{message}");
    assert!(message.contains("Address already in use"), "{message}");
    assert!(started.elapsed() < Duration::from_secs(2));
    let port = address.port().to_string();
    let output = run_program(folder.path(), &[], &["demo", "--port", &port]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--port"));
}

#[test]
fn host_and_port_variables_override_the_file() {
    let upstream = Upstream::named("x");
    let text = config("", &[&upstream]).replace("127.0.0.1:0", "10.255.255.1:1");
    let gateway = Gateway::start_with(&text, &[("HOST", "127.0.0.1"), ("PORT", "0")], &[]);
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
}

#[test]
fn sighup_takes_the_new_configuration_and_keeps_what_stays() {
    let one = Upstream::named("one");
    let two = Upstream::named("two");
    let mut gateway = Gateway::start(&config("health_check: {interval: 1h}", &[&one]));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    let file = gateway.folder().join("tollgate.yaml");
    std::fs::write(&file, config("health_check: {interval: 1h}", &[&one, &two])).unwrap();
    gateway.signal(Signal::SIGHUP);
    gateway.wait_log("the new configuration is at work");
    assert_eq!(gateway.backend("svc/mdl", "a")["status"], "healthy", "its state was lost");
    // The interval is an hour: what is new is checked all the same.
    gateway.wait_backend("svc/mdl", "b", "healthy");
    let clients = (1..=40).map(|last| std::net::IpAddr::from([127, 0, 9, last]));
    for client in clients {
        let request = "GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n";
        assert_eq!(send_from(client, gateway.address(), request).status, 200);
    }
    assert!(!two.seen().is_empty(), "the new backend serves");
    // All or nothing: a file with a mistake changes nothing.
    std::fs::write(&file, "services: {svc: {modles: {}}}").unwrap();
    gateway.signal(Signal::SIGHUP);
    let line = gateway.wait_log("did you mean");
    assert!(line.contains("modles") && line.contains("models"), "{line}");
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
}

#[test]
fn a_reload_that_brings_a_name_serves_at_once() {
    let upstream = Upstream::named("named");
    let mut gateway = Gateway::start(&config("", &[&upstream]));
    let file = gateway.folder().join("tollgate.yaml");
    let text = config("", &[&upstream])
        .replace("127.0.0.1:", "localhost:")
        .replace("listen: localhost", "listen: 127.0.0.1");
    std::fs::write(&file, text).unwrap();
    gateway.signal(Signal::SIGHUP);
    gateway.wait_log("the new configuration is at work");
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
    assert!(upstream.last().header("host").starts_with("localhost:"));
}

#[tokio::test]
async fn a_drain_sends_an_http_2_answer_to_its_last_byte() {
    const BYTES: usize = 8 * 1024 * 1024;
    let upstream = Upstream::start(|_, reply| reply.send(200, &[], &vec![b'x'; BYTES]));
    let mut gateway = Gateway::start(&config("", &[&upstream]));
    let socket = tokio::net::TcpStream::connect(gateway.address()).await.unwrap();
    let (client, connection) = h2::client::handshake(socket).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    let mut client = client.ready().await.unwrap();
    let request = http::Request::get("http://g/svc/mdl/x").body(()).unwrap();
    let (response, _) = client.send_request(request, true).unwrap();
    let mut body = response.await.unwrap().into_body();
    gateway.signal(Signal::SIGTERM);
    let mut bytes = 0;
    while let Some(data) = body.data().await {
        let data = data.expect("it is not cut");
        bytes += data.len();
        let _ = body.flow_control().release_capacity(data.len());
        // A client that is slow to read.
        tokio::task::yield_now().await;
    }
    assert_eq!(bytes, BYTES);
    // The client keeps its connection; that is no reason to wait.
    let started = Instant::now();
    let end = tokio::task::spawn_blocking(move || gateway.wait_end().code()).await.unwrap();
    assert_eq!(end, Some(0));
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    drop(client);
}

#[test]
fn a_reload_that_hangs_does_not_hold_up_the_end() {
    let upstream = Upstream::named("x");
    let mut gateway = Gateway::start(&config("", &[&upstream]));
    // Reading a pipe that nobody writes to waits for ever.
    let pipe = gateway.folder().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let text = config("api_key_file: pipe\nlog: {level: debug}", &[&upstream]);
    std::fs::write(gateway.folder().join("tollgate.yaml"), text).unwrap();
    gateway.signal(Signal::SIGHUP);
    // A pipe can be opened for writing, without waiting, only once somebody reads it.
    let mut open = std::fs::OpenOptions::new();
    open.write(true).custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits());
    let mut writer = None;
    eventually("the reload reads the pipe", || {
        writer = open.open(&pipe).ok();
        writer.is_some()
    });
    gateway.signal(Signal::SIGTERM);
    assert_eq!(gateway.wait_end().code(), Some(0));
}
