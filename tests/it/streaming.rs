//! Streams leave as they come, event by event, and end at the backend when the client goes.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::harness::{Connection, Gateway, Reply, Upstream, config, eventually, http2};

/// How soon a backend must learn that its client is gone.
const ABORT_SEEN_WITHIN: Duration = Duration::from_millis(100);

const REQUEST: &str =
    "POST /svc/mdl/v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n\r\n{}";

/// An upstream that sends event N + 1 only when the test says that it has event N.
fn lock_step(
    content_type: &'static str,
    events: &'static [&'static str],
) -> (Upstream, Sender<()>) {
    let (got_it, received) = channel();
    let received: Mutex<Receiver<()>> = Mutex::new(received);
    let upstream = Upstream::start(move |_, reply| {
        reply.begin(content_type);
        for event in events {
            reply.chunk(event.as_bytes());
            received.lock().unwrap().recv().unwrap();
        }
        reply.end();
    });
    (upstream, got_it)
}

#[test]
fn each_sse_event_leaves_before_the_next_one_comes() {
    let events = &[
        "data: {\"n\":1}\n\n",
        ": ping\n\n",
        "data: half of",
        " an event\n\n",
        "data: [DONE]\n\n",
    ];
    let (upstream, got_it) = lock_step("text/event-stream", events);
    let gateway = Gateway::start(&config("", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(REQUEST.as_bytes()).unwrap();
    assert_eq!(connection.read_head().unwrap().header("content-type"), "text/event-stream");
    for event in events {
        assert_eq!(connection.read_chunk().unwrap(), event.as_bytes());
        got_it.send(()).unwrap();
    }
    assert_eq!(connection.read_chunk().unwrap(), b"");
}

#[test]
fn each_ndjson_line_leaves_before_the_next_one_comes() {
    let lines = &["{\"done\":false}\n", "{\"done\":false}\n", "{\"done\":true}\n"];
    let (upstream, got_it) = lock_step("application/x-ndjson", lines);
    let gateway = Gateway::start(&config("", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(REQUEST.as_bytes()).unwrap();
    connection.read_head().unwrap();
    for line in lines {
        assert_eq!(connection.read_chunk().unwrap(), line.as_bytes());
        got_it.send(()).unwrap();
    }
    assert_eq!(connection.read_chunk().unwrap(), b"");
}

/// As many events as come at once; clients of HTTP/2 part from who sends many more before they have read them.
const CROWD: usize = 150;

/// An upstream that sends a crowd of events, three times, each when the test says that it has the one before.
fn crowds() -> (Upstream, Sender<()>) {
    let (got_it, received) = channel();
    let received: Mutex<Receiver<()>> = Mutex::new(received);
    let upstream = Upstream::start(move |_, reply| {
        reply.begin("text/event-stream");
        for _ in 0..3 {
            for number in 0..CROWD {
                reply.chunk(format!("data: {number:0100}\n\n").as_bytes());
            }
            received.lock().unwrap().recv().unwrap();
        }
        reply.end();
    });
    (upstream, got_it)
}

/// A crowd, as it has to arrive.
fn crowd() -> String {
    (0..CROWD).map(|number| format!("data: {number:0100}\n\n")).collect()
}

#[test]
fn of_events_that_come_at_once_none_waits_for_a_later_one() {
    let (upstream, got_it) = crowds();
    let gateway = Gateway::start(&config("", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(REQUEST.as_bytes()).unwrap();
    connection.read_head().unwrap();
    for _ in 0..3 {
        let mut seen = Vec::new();
        while seen.len() < crowd().len() {
            seen.extend(connection.read_chunk().unwrap());
        }
        assert_eq!(String::from_utf8(seen).unwrap(), crowd());
        got_it.send(()).unwrap();
    }
    assert_eq!(connection.read_chunk().unwrap(), b"");
}

#[tokio::test]
async fn of_events_that_come_at_once_none_waits_for_a_later_one_over_h2c_too() {
    let (upstream, got_it) = crowds();
    let gateway = Gateway::start(&config("", &[&upstream]));
    let (response, _client) = h2c_request(gateway.address(), vec![Bytes::from_static(b"{}")]).await;
    let mut body = response.await.unwrap().into_body();
    for _ in 0..3 {
        let mut seen = Vec::new();
        while seen.len() < crowd().len() {
            let piece = body.data().await.unwrap().unwrap();
            body.flow_control().release_capacity(piece.len()).unwrap();
            seen.extend_from_slice(&piece);
        }
        assert_eq!(String::from_utf8(seen).unwrap(), crowd());
        got_it.send(()).unwrap();
    }
}

#[test]
fn the_memory_of_streams_that_have_ended_is_given_back() {
    const STREAMS: u64 = 300;
    let is_over = Arc::new((Mutex::new(false), Condvar::new()));
    let upstream = Upstream::start({
        let is_over = Arc::clone(&is_over);
        move |_, reply| {
            reply.begin("text/event-stream");
            reply.chunk(b"data: 1\n\n");
            let (is_over, told) = &*is_over;
            drop(told.wait_while(is_over.lock().unwrap(), |is_over| !*is_over).unwrap());
            reply.end();
        }
    });
    let gateway = Gateway::start(&config("", &[&upstream]));
    let before = gateway.resident_kib();
    let mut streams: Vec<Connection> = (0..STREAMS)
        .map(|_| {
            let mut stream = Connection::open(gateway.address());
            stream.write(REQUEST.as_bytes()).unwrap();
            stream.read_head().unwrap();
            assert_eq!(stream.read_chunk().unwrap(), b"data: 1\n\n");
            stream
        })
        .collect();
    let during = gateway.resident_kib();
    assert!(during > before + STREAMS * 10, "{before} KiB before, {during} meanwhile");
    *is_over.0.lock().unwrap() = true;
    is_over.1.notify_all();
    for stream in &mut streams {
        assert_eq!(stream.read_chunk().unwrap(), b"");
    }
    drop(streams);
    // Nothing else is asked for meanwhile. What the first exchanges of a process have set up stays.
    eventually("most of it is given back", || {
        gateway.resident_kib().saturating_sub(before) < (during - before) / 2
    });
}

/// 20 events, one every 50 ms, each with the time since `started` at which it left.
fn paced(started: Instant) -> Upstream {
    Upstream::start(move |_, reply| {
        reply.begin("text/event-stream");
        for number in 0..20u32 {
            let due = Duration::from_millis(50) * number;
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(50) && due > Duration::ZERO {
                std::thread::park_timeout(Duration::from_millis(50) - begun.elapsed());
            }
            reply.chunk(format!("data: {}\n\n", started.elapsed().as_micros()).as_bytes());
        }
        reply.end();
    })
}

#[test]
fn an_event_every_50_ms_is_delayed_by_less_than_10_ms() {
    let started = Instant::now();
    let upstream = paced(started);
    let gateway = Gateway::start(&config("", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(REQUEST.as_bytes()).unwrap();
    connection.read_head().unwrap();
    let mut delays = Vec::new();
    loop {
        let chunk = connection.read_chunk().unwrap();
        if chunk.is_empty() {
            break;
        }
        let arrived = started.elapsed().as_micros();
        let text = String::from_utf8(chunk).unwrap();
        let sent: u128 = text.trim_start_matches("data: ").trim().parse().unwrap();
        delays.push(arrived - sent);
    }
    delays.sort_unstable();
    println!("delays of 20 events in microseconds: {delays:?}");
    assert_eq!(delays.len(), 20, "two events came as one chunk");
    // The machine may pause any of us for once; a proxy that buffers would delay them all.
    assert!(delays[17] < 10_000, "{delays:?}");
}

/// An upstream that runs `script` and then reports how long after the test's signal its client was
/// gone.
fn aborted(
    script: impl Fn(&mut Reply) + Send + Sync + 'static,
) -> (Upstream, Receiver<()>, Receiver<Instant>) {
    let (waiting, is_waiting) = channel();
    let (closed, is_closed) = channel();
    let senders = Mutex::new((waiting, closed));
    let upstream = Upstream::start(move |_, reply| {
        let (waiting, closed) = senders.lock().unwrap().clone();
        script(reply);
        waiting.send(()).unwrap();
        if reply.wait_closed() {
            let _ = closed.send(Instant::now());
        }
    });
    (upstream, is_waiting, is_closed)
}

/// Sends a request, waits until the backend waits, goes away, and returns how soon the backend knew.
fn time_to_abort(
    script: impl Fn(&mut Reply) + Send + Sync + 'static,
    read: impl Fn(&mut Connection),
) -> Duration {
    let (upstream, is_waiting, is_closed) = aborted(script);
    let gateway = Gateway::start(&config("", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(REQUEST.as_bytes()).unwrap();
    read(&mut connection);
    is_waiting.recv().unwrap();
    let gone = Instant::now();
    drop(connection);
    let delay = is_closed.recv().unwrap() - gone;
    println!("the backend saw it after {delay:?}");
    delay
}

#[test]
fn a_client_that_goes_before_the_first_byte_ends_the_request_at_the_backend() {
    let delay = time_to_abort(|_| {}, |_| {});
    assert!(delay < ABORT_SEEN_WITHIN, "{delay:?}");
}

#[test]
fn a_client_that_goes_in_mid_stream_ends_the_request_at_the_backend() {
    let script = |reply: &mut Reply| {
        reply.begin("text/event-stream");
        reply.chunk(b"data: 1\n\n");
    };
    let delay = time_to_abort(script, |connection| {
        connection.read_head().unwrap();
        assert_eq!(connection.read_chunk().unwrap(), b"data: 1\n\n");
    });
    assert!(delay < ABORT_SEEN_WITHIN, "{delay:?}");
}

#[test]
fn a_sized_body_that_the_backend_cuts_never_looks_complete() {
    let upstream = Upstream::start(|_, reply| {
        reply.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf");
        reply.cut();
    });
    let gateway = Gateway::start(&config("", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(REQUEST.as_bytes()).unwrap();
    assert!(!connection.read(false).unwrap().complete);
}

/// Opens an HTTP/2 connection without TLS and sends `POST /svc/mdl/v1/x`.
async fn h2c_request(
    address: std::net::SocketAddr,
    body: Vec<Bytes>,
) -> (h2::client::ResponseFuture, h2::client::SendRequest<Bytes>) {
    let mut client = http2(address).await;
    let request = http::Request::post("http://gateway/svc/mdl/v1/x").body(()).unwrap();
    let (response, mut sender) = client.send_request(request, body.is_empty()).unwrap();
    let last = body.len().saturating_sub(1);
    for (number, piece) in body.into_iter().enumerate() {
        sender.send_data(piece, number == last).unwrap();
    }
    (response, client)
}

#[tokio::test]
async fn each_event_leaves_at_once_over_h2c_too() {
    let events = &["data: 1\n\n", "data: 2\n\n", "data: [DONE]\n\n"];
    let (upstream, got_it) = lock_step("text/event-stream", events);
    let gateway = Gateway::start(&config("", &[&upstream]));
    // The body ends with an empty frame, which some proxies pass on as a second end of body.
    let body = vec![Bytes::from_static(b"{\"a\":1}"), Bytes::new()];
    let (response, _client) = h2c_request(gateway.address(), body).await;
    let response = response.await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.headers().contains_key("x-request-id"));
    let mut body = response.into_body();
    for event in events {
        assert_eq!(body.data().await.unwrap().unwrap(), event.as_bytes());
        got_it.send(()).unwrap();
    }
    let end = body.data().await;
    assert!(end.as_ref().is_none_or(|data| data.as_ref().is_ok_and(Bytes::is_empty)), "{end:?}");
    let seen = upstream.last();
    assert_eq!(
        (seen.body.as_slice(), seen.header("host")),
        (&b"{\"a\":1}"[..], upstream.address().to_string())
    );
    assert_eq!(seen.header("x-forwarded-host"), "gateway");
}

#[tokio::test]
async fn an_h2c_client_that_resets_its_stream_ends_the_request_at_the_backend() {
    let (upstream, is_waiting, is_closed) = aborted(|_| {});
    let gateway = Gateway::start(&config("", &[&upstream]));
    let body = vec![Bytes::from_static(b"{}")];
    let (response, _client) = h2c_request(gateway.address(), body).await;
    let is_waiting = Arc::new(Mutex::new(is_waiting));
    tokio::task::spawn_blocking(move || is_waiting.lock().unwrap().recv().unwrap()).await.unwrap();
    let gone = Instant::now();
    drop(response);
    let closed = tokio::task::spawn_blocking(move || is_closed.recv().unwrap()).await.unwrap();
    let delay = closed - gone;
    assert!(delay < ABORT_SEEN_WITHIN, "{delay:?}");
}
