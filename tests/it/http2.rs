//! HTTP/2 on either side and on both: uploads, event streams, resets.

use std::time::Duration;

use bytes::Bytes;
use http::Request;

use crate::harness::{
    Authority, Connection, Gateway, Http2Upstream, PATIENCE, TlsFront, Upstream, eventually, get,
    http2, post,
};

/// A configuration with one backend that is spoken HTTP/2 to, with more keys for it.
fn config(top: &str, url: &str, more: &str) -> String {
    format!(
        "listen: 127.0.0.1:0\n{top}\nservices: {{svc: {{models: {{mdl: {{backends: [\
         {{id: a, url: \"{url}\", protocol: http2, {more}}}]}}}}}}}}\n"
    )
}

/// What became of a request over HTTP/2.
#[derive(Debug, Default)]
struct Outcome {
    status: u16,
    body: Vec<u8>,
    /// Whether the stream ended as it should.
    is_whole: bool,
}

impl Outcome {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Sends a request over HTTP/2; `ends` says whether the body's last frame is empty.
fn ask(gateway: &Gateway, path: &str, body: &[u8], has_length: bool, ends_empty: bool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = http2(gateway.address()).await;
        let mut request = Request::post(format!("http://g{path}"));
        if has_length {
            request = request.header("content-length", body.len());
        }
        let (answer, mut stream) = client.send_request(request.body(()).unwrap(), false).unwrap();
        let body = Bytes::copy_from_slice(body);
        stream.send_data(body, !ends_empty).unwrap();
        if ends_empty {
            stream.send_data(Bytes::new(), true).unwrap();
        }
        let Ok(answer) = answer.await else { return Outcome::default() };
        let mut outcome =
            Outcome { status: answer.status().as_u16(), is_whole: true, ..Outcome::default() };
        let mut body = answer.into_body();
        while let Some(chunk) = body.data().await {
            let Ok(chunk) = chunk else {
                outcome.is_whole = false;
                break;
            };
            body.flow_control().release_capacity(chunk.len()).unwrap();
            outcome.body.extend_from_slice(&chunk);
        }
        outcome
    })
}

#[test]
fn uploads_of_any_size_pass_from_each_version_to_each() {
    let (two, one) = (
        Http2Upstream::start(),
        Upstream::start(|seen, reply| {
            reply.text(&seen.body_bytes.to_string());
        }),
    );
    let to_two = Gateway::start(&config("", &two.url(), ""));
    let to_one = Gateway::start(&crate::harness::config("", &[&one]));
    for gateway in [&to_one, &to_two] {
        for length in [0, 1, 60_000, 70_000, 5_000_000, 40_000_000] {
            let body = vec![b'x'; length];
            let expected = length.to_string();
            for (has_length, ends_empty) in
                [(true, false), (true, true), (false, true), (false, false)]
            {
                let outcome = ask(gateway, "/svc/mdl/count", &body, has_length, ends_empty);
                let case = format!("{length} {has_length} {ends_empty}");
                assert_eq!((outcome.status, outcome.text()), (200, expected.clone()), "{case}");
            }
            let answer = post(gateway.address(), "/svc/mdl/count", &[], &body);
            assert_eq!((answer.status, answer.text()), (200, expected), "HTTP/1.1 {length}");
        }
    }
}

#[test]
fn a_request_keeps_its_path_host_and_body_over_http2() {
    let upstream = Http2Upstream::start();
    let gateway = Gateway::start(&config("", &format!("{}/base", upstream.url()), "model: n"));
    let body = "{\"model\":\"m\",\"input\":\"x\"}";
    let answer =
        post(gateway.address(), "/svc/mdl/echo", &["Content-Type: application/json"], body);
    assert_eq!(answer.text(), "{\"model\":\"n\",\"input\":\"x\"}");
    assert_eq!(answer.header("x-path"), "/base/echo");
    assert_eq!(answer.header("x-authority"), upstream.address().to_string());
    gateway.wait_backend("svc/mdl", "a", "healthy");
}

#[test]
fn event_streams_pass_and_a_cut_is_never_a_clean_end() {
    let (two, one) = (
        Http2Upstream::start(),
        Upstream::start(|seen, reply| {
            reply.begin("text/event-stream");
            reply.chunk(b"data: 0\n\n");
            if seen.target().ends_with("/cut") {
                reply.cut();
            } else {
                reply.chunk(b"data: 1\n\ndata: 2\n\ndata: 3\n\ndata: [DONE]\n\n");
                reply.end();
            }
        }),
    );
    let to_two = Gateway::start(&config("", &two.url(), ""));
    let to_one = Gateway::start(&crate::harness::config("", &[&one]));
    let all = "data: 0\n\ndata: 1\n\ndata: 2\n\ndata: 3\n\ndata: [DONE]\n\n";
    for gateway in [&to_one, &to_two] {
        let outcome = ask(gateway, "/svc/mdl/events", b"x", true, false);
        assert_eq!((outcome.text().as_str(), outcome.is_whole), (all, true));
        let answer = post(gateway.address(), "/svc/mdl/events", &[], "x");
        assert_eq!((answer.text().as_str(), answer.complete), (all, true));
        let outcome = ask(gateway, "/svc/mdl/cut", b"x", true, false);
        assert!(!outcome.is_whole, "{}", outcome.text());
        assert!(outcome.text().starts_with("data: 0\n\n"), "{}", outcome.text());
        assert!(outcome.text().contains("stream_interrupted"), "{}", outcome.text());
        let answer = post(gateway.address(), "/svc/mdl/cut", &[], "x");
        assert!(
            !answer.complete && answer.text().contains("stream_interrupted"),
            "{}",
            answer.text()
        );
    }
}

#[test]
fn a_reset_of_the_backend_is_a_502_and_is_tried_again_where_that_is_safe() {
    let upstream = Http2Upstream::start();
    let gateway = Gateway::start(&config("retry: {retries_max: 0}", &upstream.url(), ""));
    let answer = post(gateway.address(), "/svc/mdl/reset", &[], "x");
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].as_str()),
        (502, Some("backend_failed"))
    );
    // The connection is as good as before.
    assert_eq!(post(gateway.address(), "/svc/mdl/echo", &[], "x").text(), "x");
    let answer = get(gateway.address(), "/svc/mdl/echo", &[]);
    assert_eq!((answer.status, answer.text().as_str()), (200, ""));
}

#[test]
fn an_early_answer_passes_though_the_upload_goes_on() {
    let upstream = Http2Upstream::start();
    let gateway = Gateway::start(&config("replay: {body_bytes_max: 0}", &upstream.url(), ""));
    let outcome = ask(&gateway, "/svc/mdl/refuse", &vec![b'x'; 3_000_000], true, false);
    assert_eq!((outcome.status, outcome.text().as_str()), (400, "refused"));
    assert_eq!(post(gateway.address(), "/svc/mdl/echo", &[], "x").text(), "x");
}

#[test]
fn who_leaves_takes_the_request_back_from_the_backend() {
    let upstream = Http2Upstream::start();
    // A health check makes a connection of its own where none is idle, and so does each thread: the first has to be
    // over before they are counted, and of the others there is one.
    let settings = "threads: 1\nhealth_check: {interval: 1h}";
    let gateway = Gateway::start(&config(settings, &upstream.url(), ""));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    let mut connection = Connection::open(gateway.address());
    connection.write(b"GET /svc/mdl/hang HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    eventually("it is at work", || upstream.open() == 1);
    drop(connection);
    let connections = upstream.connections();
    eventually("HTTP/1.1: it is taken back", || upstream.resets() == 1 && upstream.open() == 0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = http2(gateway.address()).await;
        let request = Request::get("http://g/svc/mdl/hang").body(()).unwrap();
        let (answer, mut stream) = client.send_request(request, true).unwrap();
        let taken_back = async {
            while upstream.open() == 0 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            stream.send_reset(h2::Reason::CANCEL);
            while upstream.resets() < 2 || upstream.open() > 0 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let both = async { tokio::join!(answer, taken_back) };
        let (answer, ()) = tokio::time::timeout(PATIENCE, both).await.expect("it is taken back");
        assert!(answer.is_err());
    });
    assert_eq!(get(gateway.address(), "/svc/mdl/echo", &[]).status, 200);
    assert_eq!(upstream.connections(), connections, "a connection was lost to it");
}

#[test]
fn many_exchanges_share_one_connection() {
    let upstream = Http2Upstream::start();
    // Each thread has connections of its own.
    let settings = "threads: 1\nhealth_check: {interval: 1h}";
    let gateway = Gateway::start(&config(settings, &upstream.url(), ""));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    assert_eq!(get(gateway.address(), "/svc/mdl/echo", &[]).status, 200);
    let before = upstream.connections();
    // One after the other: of those that come at the same moment each may make a connection.
    let held: Vec<Connection> = (1..=40)
        .map(|number| {
            let mut connection = Connection::open(gateway.address());
            connection.write(b"GET /svc/mdl/hang HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
            eventually("it is at work", || upstream.open() == number);
            connection
        })
        .collect();
    assert_eq!(get(gateway.address(), "/svc/mdl/echo", &[]).status, 200);
    assert_eq!(upstream.connections(), before);
    drop(held);
    eventually("all are taken back", || (upstream.open(), upstream.resets()) == (0, 40));
}

#[test]
fn deadlines_hold_over_http2() {
    let upstream = Http2Upstream::start();
    // Where the two are the same, exchanges share a connection, and one that is late must not harm others.
    for (resets, deadlines) in
        ["{first_byte: 600ms}", "{first_byte: 600ms, silence: 600ms}"].iter().enumerate()
    {
        let top = format!("deadlines: {deadlines}\nretry: {{retries_max: 0}}");
        let gateway = Gateway::start(&config(&top, &upstream.url(), ""));
        let to = gateway.address();
        // Without a body: one that comes from the client has a connection of its own.
        assert_eq!(get(to, "/svc/mdl/echo", &[]).status, 200);
        std::thread::scope(|scope| {
            let late = scope.spawn(|| get(to, "/svc/mdl/hang", &[]));
            eventually("it is at work", || upstream.open() == 1);
            for _ in 0..5 {
                assert_eq!(get(to, "/svc/mdl/slow", &[]).status, 200);
            }
            let late = late.join().unwrap();
            let code = late.json()["error"]["code"].as_str().unwrap().to_owned();
            assert_eq!((late.status, code.as_str()), (504, "backend_timeout"));
            assert!(late.text().contains("first_byte: 0.6 s"), "{}", late.text());
        });
        eventually("it is taken back", || upstream.resets() == resets + 1);
    }
}

#[test]
fn the_version_is_agreed_on_over_tls() {
    let (two, one) = (Http2Upstream::start(), Upstream::named("one"));
    let authority = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    let ca = authority.write(folder.path());
    let tls = format!("tls: {{ca_file: \"{}\"}}", ca.display());
    let pair = authority.sign(&["localhost"]);
    let both = TlsFront::start(&pair, None, &["h2", "http/1.1"], two.address());
    let only_one = TlsFront::start(&pair, None, &["http/1.1"], one.address());
    let only_two = TlsFront::start(&pair, None, &["h2"], two.address());
    let mute = TlsFront::start(&pair, None, &[], one.address());
    for (front, protocol, expected) in [
        (&both, "auto", Some("x")),
        (&both, "http2", Some("x")),
        (&only_two, "auto", Some("x")),
        (&only_one, "auto", Some("one")),
        (&only_one, "http1", Some("one")),
        (&only_one, "http2", None),
        (&only_two, "http1", None),
        (&mute, "auto", Some("one")),
        (&mute, "http2", None),
    ] {
        let url = format!("https://localhost:{}", front.address().port());
        let text = config("retry: {retries_max: 0}", &url, &tls);
        let gateway =
            Gateway::start(&text.replace("protocol: http2", &format!("protocol: {protocol}")));
        let answer = post(gateway.address(), "/svc/mdl/echo", &[], "x");
        let text = Some(answer.text()).filter(|_| answer.status == 200);
        assert_eq!(text.as_deref(), expected, "{protocol}: {}", answer.text());
        // The checks speak as exchanges do.
        let state = if expected.is_some() { "healthy" } else { "unhealthy" };
        gateway.wait_backend("svc/mdl", "a", state);
    }
    assert!(both.connections() > 0);
}
