//! Deadlines: each ends what it is meant for, says so, and nothing else.

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use crate::harness::{
    Answer, BlackHole, Connection, Gateway, PATIENCE, Upstream, config, config_of, eventually, get,
    http2, post, raw_upstream, read_head,
};

const STREAM: &[u8] =
    b"POST /svc/mdl/v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n\r\n{}";

/// An upstream that begins after `first`, then sends an event every `gap`, `count` times.
fn paced(first: u64, gap: u64, count: usize) -> Upstream {
    Upstream::start(move |_, reply| {
        std::thread::park_timeout(Duration::from_millis(first));
        reply.begin("text/event-stream");
        for number in 0..count {
            std::thread::park_timeout(Duration::from_millis(gap));
            if !reply.chunk(format!("data: {number}\n\n").as_bytes()) {
                return;
            }
        }
        reply.chunk(b"data: [DONE]\n\n");
        reply.end();
    })
}

#[test]
fn each_deadline_before_the_first_byte_is_a_504_that_names_it() {
    let silent = Upstream::start(|_, reply| {
        reply.wait_closed();
    });
    for (settings, message) in [
        ("deadlines: {first_byte: 300ms}", "first_byte: 0.3 s"),
        ("deadlines: {exchange: 300ms}", "exchange: 0.3 s"),
    ] {
        let text = config(&format!("{settings}\nretry: {{retries_max: 0}}"), &[&silent]);
        let gateway = Gateway::start(&text);
        let started = Instant::now();
        let answer = get(gateway.address(), "/svc/mdl/x", &[]);
        assert_eq!(answer.status, 504, "{settings}");
        assert_eq!(answer.json()["error"]["code"], "backend_timeout");
        let told = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(told.contains(message), "{told}");
        let elapsed = started.elapsed();
        assert!(elapsed >= Duration::from_millis(300) && elapsed < Duration::from_secs(2));
    }
}

#[test]
fn a_connection_that_is_not_made_in_time_is_a_504_that_says_so() {
    let hole = BlackHole::open();
    let gateway = |scheme: &str, settings: &str| {
        Gateway::start(&format!(
            "listen: 127.0.0.1:0\nhealth_check: {{interval: 1h, unhealthy_after: 100}}\nretry: {{retries_max: 0}}\n{settings}\nservices: {{svc: {{models: {{mdl: {{backends: [{{id: a, url: \"{scheme}://localhost:{}\"}}]}}}}}}}}",
            hole.address.port()
        ))
    };
    for scheme in ["http", "https"] {
        let gateway = gateway(scheme, "deadlines: {connect: 300ms, tls: 10s}");
        let answer = get(gateway.address(), "/svc/mdl/x", &[]);
        assert_eq!(answer.status, 504, "{scheme}: {}", answer.text());
        assert!(answer.text().contains("connect: 0.3 s"), "{scheme}: {}", answer.text());
    }
    // One that takes connections and says nothing.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = mute.local_addr().unwrap().port();
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\nhealth_check: {{interval: 1h, unhealthy_after: 100}}\nretry: {{retries_max: 0}}\ndeadlines: {{connect: 10s, tls: 300ms}}\nservices: {{svc: {{models: {{mdl: {{backends: [{{id: a, url: \"https://localhost:{port}\"}}]}}}}}}}}"
    ));
    let answer = get(gateway.address(), "/svc/mdl/x", &[]);
    assert_eq!(answer.status, 504, "{}", answer.text());
    assert!(answer.text().contains("tls: 0.3 s"), "{}", answer.text());
}

#[test]
fn silence_and_the_whole_exchange_end_a_stream_with_an_error_event_and_uncleanly() {
    for (settings, upstream) in [
        ("deadlines: {silence: 300ms}", paced(0, 1000, 100)),
        ("deadlines: {exchange: 500ms}", paced(0, 50, 100)),
    ] {
        let mut gateway = Gateway::start(&config(settings, &[&upstream]));
        let mut connection = Connection::open(gateway.address());
        connection.write(STREAM).unwrap();
        let answer = connection.read(false).unwrap();
        assert!(!answer.complete, "{settings}");
        let text = answer.text();
        let last = text.trim_end().rsplit("\n\n").next().unwrap();
        let event = last.strip_prefix("data: ").unwrap_or_else(|| panic!("{settings}: {text}"));
        let event: serde_json::Value = serde_json::from_str(event).unwrap();
        assert_eq!(event["error"]["code"], "stream_interrupted", "{settings}");
        assert!(!text.contains("[DONE]"));
        gateway.wait_log("deadline ");
    }
}

#[test]
fn a_long_stream_is_cut_by_no_deadline_that_is_meant_for_something_else() {
    // Longer than every deadline but those for silence and the whole.
    let upstream = paced(100, 100, 15);
    let settings =
        "deadlines: {connect: 300ms, tls: 300ms, first_byte: 800ms, silence: 800ms, exchange: 1h}";
    let gateway = Gateway::start(&config(settings, &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(STREAM).unwrap();
    let answer = connection.read(false).unwrap();
    assert!(answer.complete && answer.text().ends_with("data: 14\n\ndata: [DONE]\n\n"));
}

#[test]
fn a_client_that_reads_slowly_does_not_make_its_backend_silent() {
    const BYTES: usize = 24 * 1024 * 1024;
    let upstream = Upstream::start(|_, reply| reply.send(200, &[], &vec![b'x'; BYTES]));
    let gateway = Gateway::start(&config("deadlines: {silence: 200ms}", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    // Nothing is read for much longer than the backend may be silent.
    std::thread::park_timeout(Duration::from_millis(1000));
    let answer = connection.read(false).unwrap();
    assert!(answer.complete && answer.body.len() == BYTES);
}

#[test]
fn a_service_and_a_model_have_deadlines_of_their_own() {
    let slow = paced(600, 0, 1);
    let url = slow.url();
    let pool = |own: &str| format!("{{{own} backends: [{{id: a, url: \"{url}\"}}]}}");
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\nretry: {{retries_max: 0}}\ndeadlines: {{first_byte: 200ms}}\n\
         services:\n  strict: {{models: {{m: {}}}}}\n  lax:\n    deadlines: {{first_byte: 5s}}\n    models: {{m: {}, own: {}}}\n",
        pool(""),
        pool(""),
        pool("deadlines: {first_byte: 300ms},"),
    ));
    for (path, status) in [("/strict/m/x", 504), ("/lax/m/x", 200), ("/lax/own/x", 504)] {
        assert_eq!(post(gateway.address(), path, &[], "{}").status, status, "{path}");
    }
}

#[test]
fn the_variables_of_the_replaced_tools_set_them() {
    let silent = Upstream::start(|_, reply| {
        reply.wait_closed();
    });
    let text = config("retry: {retries_max: 0}", &[&silent]);
    for (variable, name) in
        [("REQUEST_TIMEOUT", "first_byte: 0.2 s"), ("TIMEOUT", "exchange: 0.2 s")]
    {
        let gateway = Gateway::start_with(&text, &[(variable, "0.2")], &[]);
        let answer = get(gateway.address(), "/svc/mdl/x", &[]);
        assert_eq!(answer.status, 504);
        assert!(answer.text().contains(name), "{}", answer.text());
    }
}

#[test]
fn a_stream_that_the_backend_breaks_ends_with_an_error_event_in_its_familys_form() {
    for (path, piece, expected) in [
        ("/svc/mdl/v1/chat/completions", "data: 1\n\n", "data: 1\n\ndata: {\"error\":{"),
        // In the middle of an event: that one is ended first.
        ("/svc/mdl/v1/chat/completions", "data: {\"half", "data: {\"half\n\ndata: {\"error\":{"),
        (
            "/svc/mdl/v1/messages",
            "event: ping\ndata: {}\n\n",
            "event: ping\ndata: {}\n\nevent: error\ndata: {\"type\":\"error\",",
        ),
    ] {
        let upstream = Upstream::start(move |_, reply| {
            reply.begin("text/event-stream; charset=utf-8");
            reply.chunk(piece.as_bytes());
            reply.cut();
        });
        let gateway = Gateway::start(&config("", &[&upstream]));
        let mut connection = Connection::open(gateway.address());
        let request = format!("POST {path} HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n\r\n{{}}");
        connection.write(request.as_bytes()).unwrap();
        let answer = connection.read(false).unwrap();
        assert!(!answer.complete, "the client could take it for the whole answer");
        assert!(answer.text().starts_with(expected), "{path}: {}", answer.text());
        assert!(answer.text().ends_with("}\n\n"), "{path}: {}", answer.text());
        assert_eq!(upstream.seen().len(), 1, "nothing is tried again after the first byte");
    }
}

#[test]
fn what_is_not_an_event_stream_or_is_compressed_gets_no_event() {
    for head in [
        "Content-Type: application/json",
        "Content-Type: text/event-stream\r\nContent-Encoding: gzip",
    ] {
        let upstream = Upstream::start(move |_, reply| {
            reply.raw(
                format!("HTTP/1.1 200 OK\r\n{head}\r\nTransfer-Encoding: chunked\r\n\r\n")
                    .as_bytes(),
            );
            reply.chunk(b"half");
            reply.cut();
        });
        let gateway = Gateway::start(&config("", &[&upstream]));
        let mut connection = Connection::open(gateway.address());
        connection.write(STREAM).unwrap();
        let answer = connection.read(false).unwrap();
        assert_eq!((answer.complete, answer.text().as_str()), (false, "half"), "{head}");
    }
}

#[tokio::test]
async fn over_http_2_a_broken_stream_has_its_error_event_before_the_reset() {
    let upstream = Upstream::start(|_, reply| {
        reply.begin("text/event-stream");
        reply.chunk(b"data: 1\n\n");
        reply.cut();
    });
    let gateway = Gateway::start(&config("", &[&upstream]));
    for _ in 0..20 {
        let mut client = http2(gateway.address()).await;
        let request = http::Request::get("http://g/svc/mdl/v1/chat/completions").body(()).unwrap();
        let (response, _) = client.send_request(request, true).unwrap();
        let mut body = response.await.unwrap().into_body();
        let mut text = String::new();
        let end = loop {
            match body.data().await {
                Some(Ok(data)) => text.push_str(std::str::from_utf8(&data).unwrap()),
                Some(Err(error)) => break Some(error),
                None => break None,
            }
        };
        assert!(end.is_some_and(|error| error.is_reset()), "it ends uncleanly");
        assert!(text.contains("stream_interrupted"), "{text}");
    }
}

#[test]
fn interim_answers_do_not_put_off_the_first_byte() {
    let upstream = Upstream::start(|_, reply| {
        for _ in 0..40 {
            reply.raw(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n");
            std::thread::park_timeout(Duration::from_millis(50));
        }
        reply.text("late");
    });
    let settings = "deadlines: {first_byte: 400ms}\nretry: {retries_max: 0}";
    let gateway = Gateway::start(&config(settings, &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    let started = Instant::now();
    let last = loop {
        let answer = connection.read(false).unwrap();
        if answer.status >= 200 {
            break answer;
        }
    };
    assert_eq!(last.status, 504, "after {:?}: {}", started.elapsed(), last.text());
    assert!(last.text().contains("first_byte"), "{}", last.text());
}

/// `GET` health checks are not asked of an upstream that knows none.
const UNCHECKED: &str = "health_check: {interval: 1h, unhealthy_after: 100}";

/// Sends a body of 64 MiB, as fast as it is taken, and returns the answer.
fn upload(gateway: &Gateway) -> Answer {
    const BYTES: usize = 64 * 1024 * 1024;
    let mut connection = Connection::open(gateway.address());
    let head = format!("POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: {BYTES}\r\n\r\n");
    connection.write(head.as_bytes()).unwrap();
    let piece = vec![b'x'; 1024 * 1024];
    for _ in 0..BYTES / piece.len() {
        match connection.write(&piece).map_err(|error| error.kind()) {
            Ok(()) => {}
            Err(ErrorKind::WouldBlock) => panic!("nothing is taken, and nothing ended"),
            Err(_) => break,
        }
    }
    connection.read(false).unwrap()
}

#[test]
fn a_backend_that_takes_nothing_of_a_body_is_too_slow_and_not_the_client() {
    let url = raw_upstream(|mut stream| {
        read_head(&mut stream);
        std::thread::park_timeout(10 * PATIENCE);
    });
    let client = "client: {body_timeout: 300ms}\nretry: {retries_max: 1}";
    for replay in ["replay: {body_bytes_max: 0}", "replay: {body_bytes_max: 64MiB}"] {
        let settings = format!(
            "{UNCHECKED}\n{client}\n{replay}\ndeadlines: {{silence: 1s, first_byte: 500ms}}"
        );
        let gateway = Gateway::start(&config_of(&settings, &[&url]));
        let answer = upload(&gateway);
        assert_eq!(answer.status, 504, "{replay}: {}", answer.text());
        assert!(answer.text().contains("silence: 1 s"), "{replay}: {}", answer.text());
    }
}

#[test]
fn a_backend_that_begins_late_to_take_a_body_costs_its_client_nothing() {
    let url = raw_upstream(|mut stream| {
        let head = read_head(&mut stream);
        // Longer than a client may take; with what follows, longer than an answer may.
        std::thread::park_timeout(Duration::from_secs(4));
        let end = head.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
        let mut left = 64 * 1024 * 1024 - (head.len() - end);
        let mut buffer = vec![0; 1024 * 1024];
        while left > 0 {
            left -= stream.read(&mut buffer).unwrap();
        }
        // It may think for as long as one that took it at once.
        std::thread::park_timeout(Duration::from_millis(1200));
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nall").unwrap();
    });
    let settings = "client: {body_timeout: 1s, body_deadline: 3s}\nretry: {retries_max: 1}\n\
        deadlines: {silence: 20s, first_byte: 4500ms}";
    for replay in ["replay: {body_bytes_max: 0}", "replay: {body_bytes_max: 64MiB}"] {
        let settings = format!("{UNCHECKED}\n{settings}\n{replay}");
        let gateway = Gateway::start(&config_of(&settings, &[&url]));
        let answer = upload(&gateway);
        assert_eq!((answer.status, answer.text().as_str()), (200, "all"), "{replay}");
    }
}

#[test]
fn an_answer_that_comes_before_the_end_of_the_body_is_not_waited_for_again() {
    let upstream = raw_upstream(|mut stream| {
        read_head(&mut stream);
        let _ = stream
            .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nearly\r\n");
        let _ = stream.read(&mut [0; 1024]);
        std::thread::park_timeout(Duration::from_millis(800));
        let _ = stream.write_all(b"4\r\nlate\r\n0\r\n\r\n");
    });
    let settings =
        format!("{UNCHECKED}\nreplay: {{body_bytes_max: 0}}\ndeadlines: {{first_byte: 300ms}}");
    let gateway = Gateway::start(&config_of(&settings, &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(b"POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n\r\n{").unwrap();
    assert_eq!(connection.read_head().unwrap().status, 200);
    assert_eq!(connection.read_chunk().unwrap(), b"early");
    connection.write(b"}").unwrap();
    assert_eq!(connection.read_chunk().unwrap(), b"late");
    assert_eq!(connection.read_chunk().unwrap(), b"");
}

#[test]
fn an_event_stream_that_ends_by_close_is_whole_only_with_its_last_event() {
    for (path, last, is_whole) in [
        ("/svc/mdl/v1/chat/completions", "", false),
        ("/svc/mdl/v1/chat/completions", "data: [DONE]\n\n", true),
        ("/svc/mdl/v1/messages", "", false),
        // Nobody knows how that one ends.
        ("/svc/mdl/v1beta/models/x:streamGenerateContent", "", true),
    ] {
        let (got_it, got) = std::sync::mpsc::channel();
        let got = std::sync::Mutex::new(got);
        let upstream = Upstream::start(move |_, reply| {
            reply.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n");
            reply.raw(b"data: 1\n\n");
            got.lock().unwrap().recv().unwrap();
            reply.raw(last.as_bytes());
            reply.cut();
        });
        let gateway = Gateway::start(&config("", &[&upstream]));
        let mut connection = Connection::open(gateway.address());
        let request = format!("POST {path} HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n\r\n{{}}");
        connection.write(request.as_bytes()).unwrap();
        assert_eq!(connection.read_head().unwrap().status, 200);
        assert_eq!(connection.read_chunk().unwrap(), b"data: 1\n\n");
        got_it.send(()).unwrap();
        let mut rest = Vec::new();
        let is_complete = loop {
            match connection.read_chunk() {
                Some(chunk) if chunk.is_empty() => break true,
                Some(chunk) => rest.extend(chunk),
                None => break false,
            }
        };
        let rest = String::from_utf8(rest).unwrap();
        assert_eq!(is_complete, is_whole, "{path} {last}: {rest}");
        assert_eq!(rest.contains("was interrupted"), !is_whole, "{path} {last}: {rest}");
    }
}

#[test]
fn of_an_event_stream_that_is_cut_all_that_came_is_passed_on() {
    const CAME: &str = "data: 1\n\ndata: {\"error\":\"its own\"}\n\ndata: {\"half";
    let upstream = Upstream::start(|_, reply| {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
        reply.raw(format!("{head}{CAME}").as_bytes());
        reply.cut();
    });
    let gateway = Gateway::start(&config("", &[&upstream]));
    // A body that Pingora itself could not send again.
    let body = "x".repeat(100_000);
    let expected = format!("{CAME}\n\ndata: {{\"error\":{{");
    for number in 1..=20 {
        let mut connection = Connection::open(gateway.address());
        let length = body.len();
        let head = "POST /svc/mdl/v1/chat/completions HTTP/1.1\r\nHost: g\r\n";
        connection
            .write(format!("{head}Content-Length: {length}\r\n\r\n{body}").as_bytes())
            .unwrap();
        let answer = connection.read(false).unwrap();
        assert_eq!((answer.status, answer.complete), (200, false), "{}", answer.text());
        assert!(answer.text().starts_with(&expected), "{}", answer.text());
        assert_eq!(
            upstream.seen().len(),
            number,
            "an answer that has begun is not asked for again"
        );
    }
}

#[test]
fn what_a_backend_says_when_it_wants_no_more_of_a_body_is_passed_on() {
    let url = raw_upstream(|mut stream| {
        read_head(&mut stream);
        let answer = b"HTTP/1.1 413 Too Much\r\nContent-Length: 5\r\n\r\nwords";
        let (first, last) = answer.split_at(answer.len() - 2);
        std::thread::park_timeout(Duration::from_millis(1000));
        let _ = stream.write_all(first);
        std::thread::park_timeout(Duration::from_millis(2750));
        let _ = stream.write_all(last);
        // It stays open, and nothing more is read.
        std::thread::park_timeout(10 * PATIENCE);
    });
    for (replay, deadlines) in [
        ("0", "{silence: 2s}"),
        ("64MiB", "{silence: 2s, first_byte: 500ms}"),
        ("64MiB", "{silence: 2s, first_byte: 1s}"),
    ] {
        let settings =
            format!("{UNCHECKED}\ndeadlines: {deadlines}\nreplay: {{body_bytes_max: {replay}}}");
        let gateway = Gateway::start(&config_of(&settings, &[&url]));
        let answer = upload(&gateway);
        assert_eq!((answer.status, answer.text().as_str()), (413, "words"), "{settings}");
        eventually("it is over", || gateway.inflight() == 0);
    }
}

#[test]
fn a_body_that_the_backend_takes_no_more_of_ends_with_the_whole_answer() {
    let url = raw_upstream(|mut stream| {
        read_head(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 413 Too Much\r\nContent-Length: 5\r\n\r\nwords");
        std::thread::park_timeout(10 * PATIENCE);
    });
    let settings = format!("{UNCHECKED}\nreplay: {{body_bytes_max: 0}}");
    let gateway = Gateway::start(&config_of(&settings, &[&url]));
    let mut connection = Connection::open(gateway.address());
    let head = "POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: 100000000\r\n\r\n";
    connection.write(head.as_bytes()).unwrap();
    assert_eq!(connection.read(false).unwrap().status, 413);
    let piece = vec![b'x'; 1024 * 1024];
    while connection.write(&piece).is_ok() {}
    eventually("it is over", || gateway.inflight() == 0);
}

#[test]
fn a_backend_may_take_a_body_slowly_as_long_as_it_takes_it() {
    let url = raw_upstream(|mut stream| {
        let head = read_head(&mut stream);
        let end = head.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
        let mut left = 64 * 1024 * 1024 - (head.len() - end);
        let mut buffer = vec![0; 1024 * 1024];
        while left > 0 {
            let want = left.min(buffer.len());
            stream.read_exact(&mut buffer[..want]).unwrap();
            left -= want;
            std::thread::park_timeout(Duration::from_millis(80));
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nall").unwrap();
    });
    for replay in ["replay: {body_bytes_max: 0}", "replay: {body_bytes_max: 64MiB}"] {
        let deadlines = "deadlines: {silence: 1s, first_byte: 3s}";
        let settings = format!("{UNCHECKED}\n{deadlines}\nretry: {{retries_max: 1}}\n{replay}");
        let gateway = Gateway::start(&config_of(&settings, &[&url]));
        let answer = upload(&gateway);
        assert_eq!((answer.status, answer.text().as_str()), (200, "all"), "{replay}");
    }
}

#[test]
fn a_backend_that_answers_and_takes_no_more_of_the_body_is_heard_to_the_end() {
    let url = raw_upstream(|mut stream| {
        read_head(&mut stream);
        let _ = stream
            .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nearly\r\n");
        std::thread::park_timeout(Duration::from_millis(300));
        let _ = stream.write_all(b"4\r\nlate\r\n0\r\n\r\n");
        std::thread::park_timeout(10 * PATIENCE);
    });
    let settings =
        format!("{UNCHECKED}\nreplay: {{body_bytes_max: 0}}\ndeadlines: {{silence: 1s}}");
    let gateway = Gateway::start(&config_of(&settings, &[&url]));
    let answer = upload(&gateway);
    assert_eq!((answer.complete, answer.text().as_str()), (true, "earlylate"));
}

#[test]
fn a_client_that_waits_for_its_answer_is_told_of_the_deadline_for_all() {
    let silent = crate::harness::Http2Upstream::start();
    let text = config_of(
        &format!("{UNCHECKED}\ndeadlines: {{exchange: 1s, first_byte: 8s, silence: 8s}}"),
        &[&silent.url()],
    );
    // The connection is shared, so that the exchange hears of its end only with Pingora's own timeout.
    let gateway = Gateway::start(&text.replace("id: a,", "id: a, protocol: http2,"));
    let answer = get(gateway.address(), "/svc/mdl/hang", &[]);
    assert_eq!(answer.status, 504, "{}", answer.text());
    assert!(answer.text().contains("exchange: 1 s"), "{}", answer.text());
}

#[test]
fn the_deadline_for_all_ends_an_exchange_whose_client_takes_nothing() {
    let upstream = Upstream::start(|_, reply| {
        reply.begin("text/event-stream");
        let piece = format!("data: {}\n\n", "x".repeat(100_000));
        while reply.chunk(piece.as_bytes()) {}
    });
    let settings = "deadlines: {exchange: 1s}\nclient: {write_timeout: 1h}";
    let mut gateway = Gateway::start(&config(settings, &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    eventually("it is at work", || gateway.inflight() == 1);
    eventually("it is over", || gateway.inflight() == 0);
    gateway.wait_log("deadline exchange of 1 s is over");
}

#[test]
fn a_backend_that_begins_to_answer_and_then_does_nothing_is_the_one_that_is_silent() {
    // Before anything is stuck, and when the body is stuck already.
    for delay in [Duration::ZERO, Duration::from_secs(1)] {
        let url = raw_upstream(move |mut stream| {
            read_head(&mut stream);
            std::thread::park_timeout(delay);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
            std::thread::park_timeout(10 * PATIENCE);
        });
        let settings =
            format!("{UNCHECKED}\nreplay: {{body_bytes_max: 0}}\ndeadlines: {{silence: 2s}}");
        let mut gateway = Gateway::start(&config_of(&settings, &[&url]));
        let answer = upload(&gateway);
        assert_eq!((answer.status, answer.complete), (200, false), "{delay:?}");
        gateway.wait_log("deadline silence of 2 s is over");
    }
}
