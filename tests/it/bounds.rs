//! Bounds on what a client may send, hold and keep open.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use crate::harness::{
    BlackHole, Connection, Gateway, Upstream, config, config_of, eventually, get, http2, post,
    raw_upstream, read_head, send,
};

#[test]
fn a_request_head_that_takes_too_long_in_all_is_a_408_however_it_is_dripped() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("client: {head_timeout: 500ms}", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    let started = Instant::now();
    for byte in b"GET /svc/mdl/x HTTP/1.1\r\nX-Slow: ".iter().chain(&[b'x'; 1000]) {
        // Well beyond its time the client still sends: that must not cost it its answer.
        if connection.write(&[*byte]).is_err() || started.elapsed() > Duration::from_secs(1) {
            break;
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let answer = connection.read(false).unwrap();
    assert_eq!(answer.status, 408);
    assert_eq!(answer.json()["error"]["code"], "head_timeout");
    assert!(connection.is_closed());
}

#[test]
fn a_later_head_on_a_kept_connection_is_bounded_too() {
    let upstream = Upstream::named("x");
    let settings = "client: {head_timeout: 300ms, idle_timeout: 1s}";
    let gateway = Gateway::start(&config(settings, &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    assert_eq!(connection.read(false).unwrap().status, 200);
    let started = Instant::now();
    while connection.write(b"G").is_ok() && started.elapsed() < Duration::from_secs(2) {
        std::thread::park_timeout(Duration::from_millis(50));
    }
    assert_eq!(connection.read(false).unwrap().status, 408);
}

#[test]
fn a_body_that_is_too_large_is_a_413_whether_it_says_so_or_not() {
    let upstream = Upstream::named("x");
    // One that is held whatever it says is as large as it is, too.
    let gateway = Gateway::start(&config("client: {body_bytes_max: 4KiB}", &[&upstream]));
    let chunk = format!("2710\r\n{}\r\n0\r\n\r\n", "y".repeat(10_000));
    let request =
        format!("POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}");
    assert_eq!(send(gateway.address(), request).status, 413);
    let settings = "client: {body_bytes_max: 100KiB}";
    for replay in ["", "replay: {body_bytes_max: 0}"] {
        let gateway = Gateway::start(&config(&format!("{settings}\n{replay}"), &[&upstream]));
        let body = "x".repeat(100 * 1024);
        assert_eq!(post(gateway.address(), "/svc/mdl/x", &[], &body).status, 200);
        let answer = post(gateway.address(), "/svc/mdl/x", &[], format!("{body}x"));
        assert_eq!(
            (answer.status, &answer.json()["error"]["code"]),
            (413, &"body_too_large".into())
        );
        let mut connection = Connection::open(gateway.address());
        let head = "POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n";
        connection.write(head.as_bytes()).unwrap();
        for _ in 0..30 {
            let piece = "y".repeat(10_000);
            if connection.write(format!("2710\r\n{piece}\r\n").as_bytes()).is_err() {
                break;
            }
        }
        assert_eq!(connection.read(false).unwrap().status, 413, "{replay:?}");
    }
}

#[test]
fn a_body_that_drips_or_stops_is_a_408_over_http_1() {
    let upstream = Upstream::named("x");
    for (settings, gap) in
        [("client: {body_timeout: 300ms}", 2000), ("client: {body_deadline: 500ms}", 50)]
    {
        for replay in ["", "replay: {body_bytes_max: 0}"] {
            let gateway = Gateway::start(&config(&format!("{settings}\n{replay}"), &[&upstream]));
            let mut connection = Connection::open(gateway.address());
            connection
                .write(b"POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: 1000\r\n\r\n")
                .unwrap();
            let started = Instant::now();
            while started.elapsed() < Duration::from_millis(700) {
                if connection.write(b"x").is_err() {
                    break;
                }
                std::thread::park_timeout(Duration::from_millis(gap));
            }
            let answer = connection.read(false).unwrap();
            assert_eq!(answer.status, 408, "{settings} {replay}");
            assert_eq!(answer.json()["error"]["code"], "body_timeout");
        }
    }
}

#[tokio::test]
async fn a_body_that_stops_is_a_408_over_http_2() {
    let upstream = Upstream::named("x");
    for replay in ["", "replay: {body_bytes_max: 0}"] {
        let settings = format!("client: {{body_timeout: 300ms}}\n{replay}");
        let gateway = Gateway::start(&config(&settings, &[&upstream]));
        let mut client = http2(gateway.address()).await;
        let request = http::Request::post("http://g/svc/mdl/x").body(()).unwrap();
        let (response, mut stream) = client.send_request(request, false).unwrap();
        stream.send_data("begun".into(), false).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), 408, "{replay}");
    }
}

#[test]
fn connections_are_bounded_in_all_and_per_address() {
    let upstream = Upstream::named("x");
    let request = b"GET /health HTTP/1.1\r\nHost: g\r\n\r\n";
    for (settings, other_address_passes) in
        [("connections_max: 5", false), ("connections_per_address_max: 5", true)]
    {
        let mut gateway = Gateway::start(&config(&format!("client: {{{settings}}}"), &[&upstream]));
        let mut open: Vec<Connection> = (0..5)
            .map(|_| {
                let mut connection = Connection::open(gateway.address());
                connection.write(request).unwrap();
                assert_eq!(connection.read(false).unwrap().status, 200);
                connection
            })
            .collect();
        let mut refused = Connection::open(gateway.address());
        let _ = refused.write(request);
        let answer = refused.read(false).unwrap();
        assert_eq!(
            (answer.status, &answer.json()["error"]["code"]),
            (503, &"too_many_connections".into())
        );
        assert!(!answer.header("retry-after").is_empty());
        let other = std::net::IpAddr::from([127, 0, 9, 9]);
        let mut other = Connection::open_from(other, gateway.address());
        let _ = other.write(request);
        assert_eq!(other.read(false).unwrap().status == 200, other_address_passes, "{settings}");
        drop(other);
        gateway.wait_log("connections");
        // A place that becomes free can be taken.
        open.pop();
        eventually("there is room again", || {
            let mut connection = Connection::open(gateway.address());
            let _ = connection.write(request);
            connection.read(false).is_some_and(|answer| answer.status == 200)
        });
    }
}

#[test]
fn a_client_may_close_its_sending_side_where_that_is_allowed() {
    for (half_close, status) in [(false, None), (true, Some(200))] {
        let upstream = Upstream::start(|_, reply| {
            std::thread::park_timeout(Duration::from_millis(300));
            reply.text("late");
        });
        let settings = format!("client: {{half_close: {half_close}}}");
        let gateway = Gateway::start(&config(&settings, &[&upstream]));
        let mut connection = Connection::open(gateway.address());
        connection.write(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
        connection.close_sending();
        assert_eq!(connection.read(false).map(|answer| answer.status), status, "{half_close}");
    }
}

#[test]
fn a_client_that_leaves_ends_a_retry_and_a_connection_in_the_making() {
    let failing = Upstream::start(|_, reply| reply.send(503, &[], b""));
    let settings = "retry: {delay: 1s, retries_max: 5}\nbreaker: {enabled: false}";
    let gateway = Gateway::start(&config(settings, &[&failing]));
    let mut connection = Connection::open(gateway.address());
    connection
        .write(b"POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n\r\n{}")
        .unwrap();
    eventually("the first attempt failed", || failing.seen().len() == 1);
    drop(connection);
    let noticed =
        eventually("it is over", || get(gateway.address(), "/ready", &[]).json()["in_flight"] == 0);
    assert!(noticed < Duration::from_millis(300), "{noticed:?}");
    assert_eq!(failing.seen().len(), 1);
}

#[test]
fn a_client_that_leaves_while_a_connection_is_made_is_noticed_also_in_its_second_request() {
    let hole = BlackHole::open();
    let upstream = Upstream::named("x");
    let settings = "health_check: {interval: 1h, unhealthy_after: 100}\ndeadlines: {connect: 10s}";
    let text = format!(
        "listen: 127.0.0.1:0\n{settings}\nservices: {{svc: {{models: {{mdl: {{backends: [{{id: a, url: \"{}\"}}]}}, hole: {{backends: [{{id: a, url: \"http://{}\"}}]}}}}}}}}",
        upstream.url(),
        hole.address
    );
    let gateway = Gateway::start(&text);
    let mut connection = Connection::open(gateway.address());
    connection.write(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    assert_eq!(connection.read(false).unwrap().status, 200);
    connection.write(b"GET /svc/hole/x HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    eventually("it is connecting", || gateway.inflight() == 1);
    drop(connection);
    let noticed = eventually("it is over", || gateway.inflight() == 0);
    assert!(noticed < Duration::from_millis(300), "{noticed:?}");
}

#[tokio::test]
async fn an_http_2_body_that_stops_after_the_whole_answer_is_let_go() {
    let url = raw_upstream(|mut stream| {
        read_head(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        // It stays open until the other side closes it.
        while matches!(stream.read(&mut [0; 1024]), Ok(1..)) {}
    });
    let settings = "client: {body_timeout: 500ms, write_timeout: 500ms}\nreplay: {body_bytes_max: 0}\n\
        health_check: {interval: 1h, unhealthy_after: 100}";
    let gateway = Gateway::start(&config_of(settings, &[&url]));
    let mut client = http2(gateway.address()).await;
    let request = http::Request::post("http://g/svc/mdl/x").body(()).unwrap();
    let (response, mut body) = client.send_request(request, false).unwrap();
    body.send_data("begun".into(), false).unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.status(), 200);
    let mut answer = response.into_body();
    assert_eq!(answer.data().await.unwrap().unwrap(), "ok");
    // The answer was complete: the client is told that the rest is not wanted (RFC 9113, section 8.1).
    let reset = std::future::poll_fn(|context| body.poll_reset(context));
    let reset = tokio::time::timeout(Duration::from_secs(10), reset).await;
    assert_eq!(reset.expect("it is let go").unwrap(), h2::Reason::NO_ERROR);
    eventually("its place is free", || gateway.inflight() == 0);
}
