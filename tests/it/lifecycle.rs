//! Starting, reloading and stopping.

use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::{
    Connection, Gateway, Upstream, config, eventually, get, http2, post, run_program, send_from,
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
    let mut client = http2(gateway.address()).await;
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

#[tokio::test]
async fn a_drain_tells_http_2_clients_to_go_away_and_finishes_their_streams() {
    let (upstream, release) = held();
    let gateway = Gateway::start(&config("", &[&upstream]));
    let socket = tokio::net::TcpStream::connect(gateway.address()).await.unwrap();
    let (client, connection) = h2::client::handshake(socket).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut client: h2::client::SendRequest<bytes::Bytes> = client.ready().await.unwrap();
    let request =
        |path: &str| http::Request::get(format!("http://g/svc/mdl{path}")).body(()).unwrap();
    let (response, _) = client.send_request(request("/stream"), true).unwrap();
    let mut body = response.await.unwrap().into_body();
    assert_eq!(body.data().await.unwrap().unwrap(), "data: first\n\n");
    gateway.signal(Signal::SIGTERM);
    let began = Instant::now();
    // A request that is too late is not lost: it was not taken, so the client may send it elsewhere.
    let refused = loop {
        let sent = match client.clone().ready().await {
            Ok(mut ready) => ready.send_request(request("/fast"), true),
            Err(error) => break error,
        };
        match sent {
            // Before and after the signal is heard, and where the client had not sent it yet when it was told to go away.
            Ok((response, _)) => match response.await {
                Ok(answer) => assert!(matches!(answer.status().as_u16(), 200 | 503)),
                Err(error) => break error,
            },
            Err(error) => break error,
        }
        assert!(began.elapsed() < Duration::from_secs(5), "nobody told the client to go away");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert!(refused.is_go_away() && refused.is_remote(), "{refused:?}");
    assert_eq!(refused.reason(), Some(h2::Reason::NO_ERROR));
    release.send(()).unwrap();
    assert_eq!(body.data().await.unwrap().unwrap(), "data: last\n\n");
    while let Some(rest) = body.data().await {
        assert_eq!(rest.unwrap(), "", "it ends without an error");
    }
    assert!(connection.await.unwrap().is_ok());
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

/// Writes a file as editors and deployment tools do: beside it, then renamed over it.
fn replace(file: &std::path::Path, text: &str) {
    let beside = file.with_extension("new");
    std::fs::write(&beside, text).unwrap();
    std::fs::rename(&beside, file).unwrap();
}

#[test]
fn a_changed_file_is_taken_up_by_itself_whether_written_renamed_or_linked() {
    let one = Upstream::named("one");
    let two = Upstream::named("two");
    let mut gateway = Gateway::start(&config("", &[&one]));
    let file = gateway.folder().join("tollgate.yaml");
    let serves = |gateway: &Gateway, name: &str| {
        eventually(name, || get(gateway.address(), "/svc/mdl/x", &[]).text() == name);
    };
    std::fs::write(&file, config("", &[&two])).unwrap();
    serves(&gateway, "two");
    replace(&file, &config("", &[&one]));
    serves(&gateway, "one");
    // As Kubernetes does: the file is a link through a link to a folder that is swapped.
    let folder = gateway.folder().to_owned();
    for (version, upstream) in [("v1", &one), ("v2", &two)] {
        std::fs::create_dir(folder.join(version)).unwrap();
        std::fs::write(folder.join(version).join("tollgate.yaml"), config("", &[upstream]))
            .unwrap();
    }
    let link = |to: &str, at: &str| {
        let _ = std::fs::remove_file(folder.join("link"));
        std::os::unix::fs::symlink(to, folder.join("link")).unwrap();
        std::fs::rename(folder.join("link"), folder.join(at)).unwrap();
    };
    link("v1", "current");
    link("current/tollgate.yaml", "tollgate.yaml");
    serves(&gateway, "one");
    link("v2", "current");
    serves(&gateway, "two");
    // A mistake changes nothing and is told; the next good one is taken.
    std::fs::write(folder.join("v2/tollgate.yaml"), "services: {svc: {modles: {}}}").unwrap();
    gateway.wait_log("did you mean");
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).text(), "two");
    std::fs::write(folder.join("v2/tollgate.yaml"), config("", &[&one])).unwrap();
    serves(&gateway, "one");
}

#[test]
fn a_rotated_key_file_takes_effect_by_itself() {
    let upstream = Upstream::named("x");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("key"), "sk-old\n").unwrap();
    let text = config("api_key_file: key", &[&upstream]);
    std::fs::write(folder.path().join("tollgate.yaml"), text).unwrap();
    let gateway = Gateway::start_in(folder, &[], &[]);
    let status = |key: &str| {
        get(gateway.address(), "/svc/mdl/x", &[&format!("Authorization: Bearer {key}")]).status
    };
    assert_eq!((status("sk-old"), status("sk-new")), (200, 401));
    replace(&gateway.folder().join("key"), "sk-new\n");
    eventually("the new key is valid", || status("sk-new") == 200);
    assert_eq!(status("sk-old"), 401);
    assert_eq!(upstream.last().header("authorization"), "Bearer sk-new");
}

#[test]
fn a_configuration_whose_key_file_comes_later_is_taken_up_then() {
    let upstream = Upstream::named("x");
    let mut gateway = Gateway::start(&config("", &[&upstream]));
    let folder = gateway.folder().to_owned();
    replace(&folder.join("tollgate.yaml"), &config("api_key_file: key", &[&upstream]));
    gateway.wait_log("the new configuration is not used");
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
    std::fs::write(folder.join("key"), "sk-late").unwrap();
    gateway.wait_log("the new configuration is at work");
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 401);
    let failures = gateway.log().iter().filter(|line| line.contains("is not used")).count();
    assert_eq!(failures, 1, "it says so once");
}

#[test]
fn with_watching_off_a_changed_file_waits_for_a_signal() {
    let one = Upstream::named("one");
    let two = Upstream::named("two");
    let mut gateway = Gateway::start(&config("reload: {watch: false}", &[&one]));
    let file = gateway.folder().join("tollgate.yaml");
    std::fs::write(&file, config("reload: {watch: false}", &[&two])).unwrap();
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(1700) {
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).text(), "one");
    }
    gateway.signal(Signal::SIGHUP);
    gateway.wait_log("the new configuration is at work");
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).text(), "two");
}

#[test]
fn the_admin_address_reloads_and_shows_how_it_went() {
    let upstream = Upstream::named("x");
    let text =
        config("admin: {listen: 127.0.0.1:0}\napi_key: sk\nreload: {watch: false}", &[&upstream]);
    let mut gateway = Gateway::start(&text);
    let admin = gateway.admin();
    let key = "Authorization: Bearer sk";
    assert_eq!(post(gateway.address(), "/admin/reload", &[key], "").status, 404, "not for traffic");
    assert_eq!(get(admin, "/admin/reload", &[key]).status, 405);
    assert_eq!(post(admin, "/admin/reload", &[], "").status, 401);
    let foreign = post(admin, "/admin/reload", &[key, "Origin: https://evil.example"], "");
    assert_eq!(foreign.status, 403);
    let reloaded = post(admin, "/admin/reload", &[key], "");
    assert_eq!((reloaded.status, &reloaded.json()["status"]), (200, &"ok".into()));
    assert_eq!(reloaded.json()["backends"], 1);
    let file = gateway.folder().join("tollgate.yaml");
    std::fs::write(&file, text.replace("listen: 127.0.0.1:0\nadmin", "listen: 127.0.0.1:1\nadmin"))
        .unwrap();
    let reloaded = post(admin, "/admin/reload", &[key], "").json();
    assert_eq!(reloaded["needs_restart"], serde_json::json!(["listen"]));
    // As long as it is not what the process was started with, whatever else changes.
    let reloaded = post(admin, "/admin/reload", &[key], "").json();
    assert_eq!(reloaded["needs_restart"], serde_json::json!(["listen"]), "{reloaded}");
    std::fs::write(&file, "services: {svc: {modles: {}}}").unwrap();
    let failed = post(admin, "/admin/reload", &[key], "");
    assert_eq!((failed.status, &failed.json()["status"]), (422, &"failed".into()));
    let state = get(admin, "/api/health/status", &[]).json()["configuration"].clone();
    assert_eq!((&state["generation"], &state["reloads_failed"]), (&4.into(), &1.into()));
    assert!(state["last_reload"]["problems"][0].as_str().unwrap().contains("modles"), "{state}");
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[key]).status, 200);
}

#[test]
fn check_against_prints_what_a_reload_would_change() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("old.yaml", "services: {s: {models: {m: {backends: [{id: a, url: http://h}]}}}}");
    write(
        "new.yaml",
        "services: {s: {models: {m: {backends: [{id: a, url: http://h, weight: 3, api_key: sk-x}]}}}}",
    );
    let output =
        run_program(folder.path(), &[], &["check", "-c", "new.yaml", "--against", "old.yaml"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("services.s.models.m.backends[a].weight: 1.0 -> 3.0"), "{text}");
    assert!(text.contains("backends[a].api_key: changed") && !text.contains("sk-x"), "{text}");
    let output =
        run_program(folder.path(), &[], &["check", "-c", "new.yaml", "--against", "none.yaml"]);
    assert_eq!(output.status.code(), Some(78));
}

#[test]
fn a_drain_that_takes_too_long_ends_streams_with_an_error_event() {
    let (upstream, _release) = held();
    let mut gateway = Gateway::start(&config("shutdown_timeout: 500ms", &[&upstream]));
    let mut stream = open_stream(&gateway);
    gateway.signal(Signal::SIGTERM);
    let event = String::from_utf8(stream.read_chunk().unwrap()).unwrap();
    assert!(event.contains("stream_interrupted") && event.contains("shutting down"), "{event}");
    assert!(stream.read_chunk().is_none(), "it does not look complete");
    assert_eq!(gateway.wait_end().code(), Some(0));
}

#[test]
fn an_upgrade_hands_over_without_refusing_a_connection_or_cutting_a_stream() {
    let (upstream, release) = held();
    let mut gateway = Gateway::start(&config("", &[&upstream]));
    let address = gateway.address();
    let mut stream = open_stream(&gateway);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let clients: Vec<_> = (0..2)
        .map(|_| {
            let stop = std::sync::Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut count = 0;
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    let answer = get(address, "/svc/mdl/fast", &[]);
                    assert_eq!(answer.text(), "fast", "{answer:?}");
                    count += 1;
                }
                count
            })
        })
        .collect();
    gateway.signal(Signal::SIGUSR2);
    let process = gateway.wait_successor();
    assert_ne!(process, gateway.process());
    // The old one takes no more connections, and ends its stream.
    eventually("the new process answers everything", || {
        (0..20).all(|_| get(address, "/ready", &[]).json()["in_flight"].as_u64() <= Some(2))
    });
    release.send(()).unwrap();
    assert_eq!(stream.read_chunk().unwrap(), b"data: last\n\n");
    assert_eq!(stream.read_chunk().unwrap(), b"");
    assert_eq!(gateway.wait_end().code(), Some(0));
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    for client in clients {
        assert!(client.join().expect("no request failed") > 0);
    }
    assert_eq!(get(address, "/svc/mdl/fast", &[]).text(), "fast");
    gateway.adopt_successor();
    gateway.signal(Signal::SIGTERM);
    eventually("the new process ends", || std::net::TcpStream::connect(address).is_err());
}

#[test]
fn an_upgrade_that_fails_leaves_the_old_process_serving() {
    let upstream = Upstream::named("x");
    let mut gateway = Gateway::start(&config("reload: {watch: false}", &[&upstream]));
    std::fs::write(gateway.folder().join("tollgate.yaml"), "services: 1").unwrap();
    gateway.signal(Signal::SIGUSR2);
    gateway.wait_log("the new process does not take over: it ended");
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
}

struct KilledAtEnd(nix::unistd::Pid);

impl Drop for KilledAtEnd {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(self.0, Signal::SIGKILL);
    }
}

#[test]
fn systemds_sockets_are_used_and_it_is_told_what_happens() {
    let upstream = Upstream::named("x");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let notify = std::os::unix::net::UnixDatagram::bind(folder.path().join("notify")).unwrap();
    notify.set_read_timeout(Some(crate::harness::PATIENCE)).unwrap();
    let text = config("", &[&upstream]).replace("listen: 127.0.0.1:0", "listen: 127.0.0.1:1");
    std::fs::write(folder.path().join("tollgate.yaml"), text).unwrap();
    // The shell puts the socket where systemd does and takes the process id that it asks for.
    let script = format!(
        "exec 3<&0; LISTEN_FDS=1 LISTEN_PID=$$ NOTIFY_SOCKET=$PWD/notify WATCHDOG_USEC=300000 exec {} serve",
        env!("CARGO_BIN_EXE_tollgate")
    );
    let log = std::fs::File::create(folder.path().join("log")).unwrap();
    let mut child = std::process::Command::new("timeout")
        .args(["-s", "KILL", "60", "sh", "-c", &script])
        .current_dir(folder.path())
        .stdin(std::os::fd::OwnedFd::from(listener))
        .stdout(std::process::Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let next = |wanted: &str| {
        let mut text = String::new();
        while !text.contains(wanted) {
            let mut buffer = [0; 256];
            let read = notify.recv(&mut buffer).expect("it says so");
            text = String::from_utf8_lossy(&buffer[..read]).into_owned();
        }
        text
    };
    let ready = next("READY=1");
    let process = ready.split("MAINPID=").nth(1).unwrap().lines().next().unwrap();
    let pid = nix::unistd::Pid::from_raw(process.parse().unwrap());
    assert_eq!(get(address, "/svc/mdl/x", &[]).status, 200);
    next("WATCHDOG=1");
    nix::sys::signal::kill(pid, Signal::SIGHUP).unwrap();
    assert!(next("RELOADING=1").contains("MONOTONIC_USEC="));
    next("READY=1");
    // An upgrade hands its sockets on too, and tells systemd which process it is from now on.
    nix::sys::signal::kill(pid, Signal::SIGUSR2).unwrap();
    let ready = next("READY=1");
    let process = ready.split("MAINPID=").nth(1).unwrap().lines().next().unwrap();
    let successor = nix::unistd::Pid::from_raw(process.parse().unwrap());
    assert_ne!(successor, pid);
    let _ends = KilledAtEnd(successor);
    assert_eq!(child.wait().unwrap().code(), Some(0), "the old one ends by itself");
    assert_eq!(get(address, "/svc/mdl/x", &[]).status, 200);
    nix::sys::signal::kill(successor, Signal::SIGTERM).unwrap();
    next("STOPPING=1");
    eventually("nobody listens", || std::net::TcpStream::connect(address).is_err());
}

#[test]
fn a_drain_that_takes_too_long_tells_those_who_wait() {
    let (upstream, _release) = held();
    let refusing = Upstream::start(|_, reply| reply.send(503, &[], b"no"));
    let text = format!(
        "listen: 127.0.0.1:0\nshutdown_timeout: 1200ms\nupstream: {{inflight_max: 1}}\n\
         retry: {{delay: 30s, non_idempotent: true}}\nbreaker: {{enabled: false}}\n\
         services: {{svc: {{models: {{mdl: {{backends: [{{id: a, url: \"{}\"}}]}}, \
         pausing: {{backends: [{{id: a, url: \"{}\"}}]}}}}}}}}\n",
        upstream.url(),
        refusing.url()
    );
    let mut gateway = Gateway::start(&text);
    let mut stream = open_stream(&gateway);
    let address = gateway.address();
    let waiting = ["/svc/mdl/waits", "/svc/pausing/waits"]
        .map(|path| std::thread::spawn(move || get(address, path, &[])));
    let mut sending = Connection::open(address);
    sending
        .write(b"POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nhalf")
        .unwrap();
    eventually("all are in", || gateway.inflight() == 4);
    gateway.signal(Signal::SIGTERM);
    for answer in waiting {
        let answer = answer.join().unwrap();
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &"draining".into()));
    }
    let answer = sending.read(false).unwrap();
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &"draining".into()));
    assert!(stream.read_chunk().is_some(), "the stream has its error event");
    assert_eq!(gateway.wait_end().code(), Some(0));
}

#[test]
fn a_process_that_has_handed_over_finishes_its_streams_whatever_systemd_sends() {
    let (upstream, release) = held();
    let mut gateway = Gateway::start(&config("", &[&upstream]));
    let mut stream = open_stream(&gateway);
    gateway.signal(Signal::SIGUSR2);
    gateway.wait_successor();
    eventually("it is asked to end, and more than once", || {
        gateway.signal(Signal::SIGTERM);
        let told = gateway.log().iter().filter(|line| line.contains("another process")).count();
        told >= 2
    });
    release.send(()).unwrap();
    assert_eq!(stream.read_chunk().unwrap(), b"data: last\n\n");
    assert_eq!(stream.read_chunk().unwrap(), b"");
    assert_eq!(gateway.wait_end().code(), Some(0));
}

#[test]
fn a_process_whose_successor_crashed_makes_room_for_another() {
    let (upstream, _release) = held();
    let mut gateway = Gateway::start(&config("", &[&upstream]));
    let mut stream = open_stream(&gateway);
    gateway.signal(Signal::SIGUSR2);
    let successor = nix::unistd::Pid::from_raw(gateway.wait_successor().cast_signed());
    nix::sys::signal::kill(successor, Signal::SIGKILL).unwrap();
    eventually("nobody listens", || std::net::TcpStream::connect(gateway.address()).is_err());
    // systemd starts a unit anew when all of its processes have ended, and asks them to.
    eventually("it hears it", || {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(gateway.process().cast_signed()),
            Signal::SIGTERM,
        );
        gateway.log().iter().any(|line| line.contains("crashed; exchanges cut: 1"))
    });
    let event = String::from_utf8(stream.read_chunk().unwrap()).unwrap();
    assert!(event.contains("stream_interrupted"), "{event}");
    drop(stream);
    assert_eq!(gateway.wait_end().code(), Some(0));
}

#[test]
fn a_process_that_has_handed_over_ends_at_once_on_sigint() {
    let (upstream, _release) = held();
    let mut gateway = Gateway::start(&config("", &[&upstream]));
    let mut stream = open_stream(&gateway);
    gateway.signal(Signal::SIGUSR2);
    gateway.wait_successor();
    eventually("it hears it", || {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(gateway.process().cast_signed()),
            Signal::SIGINT,
        );
        gateway.log().iter().any(|line| line.contains("ending at once"))
    });
    assert_eq!(gateway.wait_end().code(), Some(1));
    assert!(stream.read_chunk().is_none());
}

#[test]
fn a_signal_to_end_in_the_middle_of_an_upgrade_ends_both() {
    let upstream = Upstream::named("x");
    let mut gateway = Gateway::start(&config("reload: {watch: false}", &[&upstream]));
    // The new process waits for ever to read its key.
    let pipe = gateway.folder().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let text = config("api_key_file: pipe", &[&upstream]);
    std::fs::write(gateway.folder().join("tollgate.yaml"), text).unwrap();
    gateway.signal(Signal::SIGUSR2);
    let mut open = std::fs::OpenOptions::new();
    open.write(true).custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits());
    let mut writer = None;
    eventually("the new process reads the pipe", || {
        writer = open.open(&pipe).ok();
        writer.is_some()
    });
    gateway.signal(Signal::SIGTERM);
    assert_eq!(gateway.wait_end().code(), Some(0));
    let mut writer = writer.unwrap();
    eventually("nobody reads the pipe any more", || {
        std::io::Write::write(&mut writer, b"").is_err()
            || std::io::Write::write(&mut writer, b"x").is_err()
    });
    eventually("nobody listens", || std::net::TcpStream::connect(gateway.address()).is_err());
}
