//! Trying again, elsewhere: what a client is spared when a backend fails.

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::harness::{
    Answer, Connection, Gateway, Upstream, config, eventually, get, http2, post, send_from,
};

/// An upstream that answers every request with a status.
fn answering(status: u16, headers: &'static [(&'static str, &'static str)]) -> Upstream {
    Upstream::start(move |_, reply| reply.send(status, headers, b"{\"from\":\"failing\"}"))
}

/// Sends from several addresses, so that each backend is somebody's first choice.
fn from_many(gateway: &Gateway, request: &str) -> Vec<Answer> {
    let clients = (1..=20).map(|last| IpAddr::from([127, 0, 7, last]));
    clients.map(|client| send_from(client, gateway.address(), request)).collect()
}

const POST: &str =
    "POST /svc/mdl/v1/x HTTP/1.1\r\nHost: g\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody";

/// Breakers and budgets out of the way.
const ALONE: &str = "breaker: {enabled: false}\nretry: {budget_min: 1000}";

#[test]
fn a_status_that_another_backend_may_do_better_is_not_passed_on() {
    for status in [429, 500, 502, 503, 504] {
        let failing = answering(status, &[]);
        let good = Upstream::named("good");
        let gateway = Gateway::start(&config(ALONE, &[&failing, &good]));
        for answer in from_many(&gateway, POST) {
            assert_eq!((answer.status, answer.text().as_str()), (200, "good"), "{status}");
        }
        assert!(!failing.seen().is_empty(), "{status}: it was asked");
        assert!(good.seen().iter().all(|seen| seen.body == b"body"), "{status}");
    }
}

#[test]
fn other_statuses_pass_at_once() {
    for status in [400, 401, 403, 404, 409, 422, 501] {
        let failing = answering(status, &[]);
        let good = Upstream::named("good");
        let gateway = Gateway::start(&config(ALONE, &[&failing, &good]));
        let answers = from_many(&gateway, POST);
        let passed = answers.iter().filter(|answer| answer.status == status).count();
        assert_eq!(passed, failing.seen().len(), "{status}");
        assert_eq!(answers.len() - passed, good.seen().len(), "{status}");
    }
}

#[test]
fn a_slow_500_is_not_tried_again() {
    let failing = Upstream::start(|_, reply| {
        std::thread::park_timeout(Duration::from_millis(150));
        reply.send(500, &[], b"late");
    });
    let settings = "breaker: {enabled: false}\nretry: {fast_500: 100ms}";
    let gateway = Gateway::start(&config(settings, &[&failing]));
    let answer = post(gateway.address(), "/svc/mdl/x", &[], "body");
    assert_eq!((answer.status, answer.text().as_str()), (500, "late"));
    assert_eq!(failing.seen().len(), 1);
}

#[test]
fn the_last_answer_passes_as_it_came_after_as_many_attempts_as_allowed() {
    let failing = answering(503, &[("X-Own", "yes")]);
    let gateway = Gateway::start(&config("", &[&failing]));
    let started = Instant::now();
    let answer = post(gateway.address(), "/svc/mdl/x", &[], "body");
    assert_eq!((answer.status, answer.header("x-own").as_str()), (503, "yes"));
    assert_eq!(answer.text(), "{\"from\":\"failing\"}");
    assert_eq!(failing.seen().len(), 3);
    // 25 ms and 50 ms, each a fifth shorter at least.
    assert!(started.elapsed() >= Duration::from_millis(60), "{:?}", started.elapsed());
}

#[test]
fn the_variables_of_the_replaced_tools_say_how_often_and_how_soon() {
    let failing = answering(503, &[]);
    let text = config("", &[&failing]);
    let variables = [("MAX_RETRIES", "1"), ("RETRY_DELAY", "0.3")];
    let gateway = Gateway::start_with(&text, &variables, &[]);
    let started = Instant::now();
    assert_eq!(post(gateway.address(), "/svc/mdl/x", &[], "body").status, 503);
    assert_eq!(failing.seen().len(), 2);
    assert!(started.elapsed() >= Duration::from_millis(240), "{:?}", started.elapsed());
}

#[test]
fn a_backend_is_waited_for_as_it_asks_up_to_a_bound() {
    let calls = AtomicUsize::new(0);
    let limited = Upstream::start(move |_, reply| match calls.fetch_add(1, Ordering::SeqCst) {
        0 => reply.send(429, &[("Retry-After", "1")], b"slow down"),
        1 => reply.text("now"),
        _ => reply.send(429, &[("Retry-After", "60")], b"much slower"),
    });
    let gateway = Gateway::start(&config("", &[&limited]));
    let started = Instant::now();
    assert_eq!(post(gateway.address(), "/svc/mdl/x", &[], "body").text(), "now");
    assert!(started.elapsed() >= Duration::from_secs(1));
    let started = Instant::now();
    let answer = post(gateway.address(), "/svc/mdl/x", &[], "body");
    assert_eq!((answer.status, answer.header("retry-after").as_str()), (429, "60"));
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_limited_backend_is_left_alone_for_as_long_as_it_asks() {
    let limited = answering(429, &[("Retry-After", "30")]);
    let good = Upstream::named("good");
    let gateway = Gateway::start(&config("balance: round_robin", &[&limited, &good]));
    for _ in 0..20 {
        assert_eq!(post(gateway.address(), "/svc/mdl/x", &[], "body").status, 200);
    }
    assert_eq!(limited.seen().len(), 1);
    assert_eq!(gateway.backend("svc/mdl", "a")["breaker"], "closed");
}

#[test]
fn a_budget_keeps_retries_from_multiplying_the_load() {
    let failing = answering(503, &[]);
    let settings = "breaker: {enabled: false}\nretry: {budget: 0.2, budget_min: 3, delay: 1ms}";
    let gateway = Gateway::start(&config(settings, &[&failing]));
    for _ in 0..50 {
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 503);
    }
    let attempts = failing.seen().len();
    assert!((53..=63).contains(&attempts), "{attempts} attempts for 50 requests");
}

#[test]
fn a_reset_and_a_first_byte_too_late_go_elsewhere() {
    let resetting = Upstream::start(|_, reply| reply.cut());
    let silent = Upstream::start(|_, reply| {
        reply.wait_closed();
    });
    let good = Upstream::named("good");
    let settings = format!("{ALONE}\ndeadlines: {{first_byte: 200ms}}");
    let gateway = Gateway::start(&config(&settings, &[&resetting, &silent, &good]));
    for answer in from_many(&gateway, POST) {
        assert_eq!((answer.status, answer.text().as_str()), (200, "good"));
    }
    assert!(!resetting.seen().is_empty() && !silent.seen().is_empty());
}

/// 5 MiB that are different everywhere.
fn large_body() -> Vec<u8> {
    (0..5 * 1024 * 1024u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// One that resets in the middle of the body, one that answers 503, one that works; the first two
/// come first.
struct ThreeUpstreams {
    resetting: std::net::SocketAddr,
    resets: std::sync::Arc<AtomicUsize>,
    failing: Upstream,
    good: Upstream,
}

impl ThreeUpstreams {
    fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let resetting = listener.local_addr().unwrap();
        let resets = std::sync::Arc::new(AtomicUsize::new(0));
        std::thread::spawn({
            let resets = std::sync::Arc::clone(&resets);
            move || {
                use std::io::Read;
                for mut stream in listener.incoming().map_while(Result::ok) {
                    // Part of the body, then gone with bytes unread, which resets.
                    let mut part = vec![0; 1024 * 1024];
                    if stream.read_exact(&mut part).is_ok() {
                        resets.fetch_add(1, Ordering::SeqCst);
                    }
                }
            }
        });
        Self { resetting, resets, failing: answering(503, &[]), good: Upstream::named("good") }
    }

    fn config(&self) -> String {
        let (failing, good) = (self.failing.url(), self.good.url());
        let resetting = self.resetting;
        format!(
            "listen: 127.0.0.1:0\nhealth_check: {{interval: 1h, unhealthy_after: 100}}\n\
             services: {{svc: {{models: {{mdl: {{balance: round_robin, backends: [\n\
             {{id: a, url: \"http://{resetting}\", weight: 1000}},\n\
             {{id: b, url: \"{failing}\", weight: 10}},\n\
             {{id: c, url: \"{good}\", weight: 0.01}}]}}}}}}}}\n"
        )
    }

    fn assert_all_were_asked(&self, body: &[u8]) {
        assert_eq!(self.resets.load(Ordering::SeqCst), 1, "the first reset in mid-body");
        assert_eq!(self.failing.seen().len(), 1, "the second answered 503");
        assert_eq!(self.failing.last().body_bytes, body.len());
        let seen = self.good.last();
        assert_eq!((seen.body_bytes, seen.hash), (body.len(), xxhash_rust::xxh3::xxh3_64(body)));
    }
}

#[test]
fn a_large_body_is_replayed_byte_for_byte_over_http_1() {
    let upstreams = ThreeUpstreams::start();
    let gateway = Gateway::start(&upstreams.config());
    let body = large_body();
    let mut connection = Connection::open(gateway.address());
    let head =
        format!("POST /svc/mdl/v1/x HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n", body.len());
    connection.write(head.as_bytes()).unwrap();
    connection.write(&body).unwrap();
    let answer = connection.read(false).unwrap();
    assert_eq!((answer.status, answer.text().as_str()), (200, "good"));
    upstreams.assert_all_were_asked(&body);
}

#[tokio::test]
async fn a_large_body_is_replayed_byte_for_byte_over_http_2() {
    let upstreams = ThreeUpstreams::start();
    let gateway = Gateway::start(&upstreams.config());
    let body = large_body();
    let mut client = http2(gateway.address()).await;
    let request = http::Request::post("http://g/svc/mdl/v1/x")
        .header("content-length", body.len())
        .body(())
        .unwrap();
    let (response, mut stream) = client.send_request(request, false).unwrap();
    let mut rest = Bytes::from(body.clone());
    while !rest.is_empty() {
        stream.reserve_capacity(rest.len());
        let capacity = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await.unwrap().unwrap();
        let piece = rest.split_to(capacity.min(rest.len()));
        stream.send_data(piece, rest.is_empty()).unwrap();
    }
    let response = response.await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.into_body().data().await.unwrap().unwrap(), "good");
    upstreams.assert_all_were_asked(&body);
}

#[test]
fn a_body_without_a_length_is_replayed_while_it_is_small_and_passes_whole_when_it_is_not() {
    let failing = answering(503, &[]);
    let good = Upstream::named("good");
    let settings = format!("{ALONE}\nbalance: round_robin");
    let gateway = Gateway::start(&config(&settings, &[&failing, &good]));
    for size in [10_usize, 20_000, 48 * 1024, 60_000, 70_000, 300_000] {
        let body: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
        for _ in 0..2 {
            let mut connection = Connection::open(gateway.address());
            let head = "POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n";
            connection.write(head.as_bytes()).unwrap();
            for piece in body.chunks(16_000) {
                connection.write(format!("{:x}\r\n", piece.len()).as_bytes()).unwrap();
                connection.write(piece).unwrap();
                connection.write(b"\r\n").unwrap();
            }
            connection.write(b"0\r\n\r\n").unwrap();
            let answer = connection.read(false).unwrap();
            assert!(size >= 48 * 1024 || answer.status == 200, "{size}: {}", answer.status);
            for upstream in [&failing, &good] {
                if let Some(seen) = upstream.seen().last().filter(|seen| seen.body_bytes == size) {
                    assert_eq!(seen.hash, xxhash_rust::xxh3::xxh3_64(&body), "{size}");
                }
            }
        }
        let whole = good.seen().iter().any(|seen| seen.body_bytes == size);
        assert!(whole, "{size}: {:?}", good.last().body_bytes);
    }
}

#[test]
fn beyond_the_bounds_a_body_passes_unheld_and_only_connect_failures_are_tried_again() {
    let mut dead = Upstream::named("dead");
    let failing = answering(503, &[]);
    for bound in ["body_bytes_max: 1000", "total_bytes_max: 1000"] {
        let settings = format!(
            "{ALONE}\nbalance: round_robin\nreplay: {{{bound}}}\nhealth_check: {{interval: 1h, unhealthy_after: 100}}"
        );
        let gateway = Gateway::start(&config(&settings, &[&dead, &failing]));
        eventually("both were checked", || {
            ["a", "b"].iter().all(|id| gateway.backend("svc/mdl", id)["status"] == "healthy")
        });
        dead.kill();
        let before = failing.seen().len();
        let body = "x".repeat(100_000);
        for _ in 0..4 {
            assert_eq!(post(gateway.address(), "/svc/mdl/x", &[], &body).status, 503, "{bound}");
        }
        let seen = failing.seen();
        assert_eq!(seen.len() - before, 4, "{bound}: each was sent once");
        assert!(seen[before..].iter().all(|seen| seen.body_bytes == body.len()), "{bound}");
        dead.restart();
    }
}

#[test]
fn what_was_held_of_a_body_is_given_back_when_its_answer_begins() {
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let upstream = Upstream::start(move |_, reply| {
        reply.begin("text/event-stream");
        reply.chunk(b"data: first\n\n");
        let _ = released.lock().unwrap().recv();
        reply.end();
    });
    let gateway = Gateway::start(&config("", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    let body = large_body();
    let head =
        format!("POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n", body.len());
    connection.write(&[head.as_bytes(), &body].concat()).unwrap();
    assert_eq!(connection.read_head().unwrap().status, 200);
    assert_eq!(connection.read_chunk().unwrap(), b"data: first\n\n");
    let metrics = get(gateway.address(), "/metrics", &[]).text();
    assert!(metrics.contains("\nproxy_buffered_bytes 0\n"), "{metrics}");
    assert!(metrics.contains("\nproxy_inflight 1\n"), "{metrics}");
    release.send(()).unwrap();
}

#[test]
fn a_backend_that_asks_for_an_endless_pause_is_not_waited_for() {
    let limited = answering(429, &[("Retry-After", "10000000000000000000")]);
    let gateway = Gateway::start(&config("", &[&limited]));
    let answer = get(gateway.address(), "/svc/mdl/x", &[]);
    assert_eq!(
        (answer.status, answer.header("retry-after").as_str()),
        (429, "10000000000000000000")
    );
    assert!(gateway.log().iter().all(|line| !line.contains("panic")), "{:?}", gateway.log());
}

#[test]
fn an_answer_is_not_given_up_for_an_attempt_that_cannot_happen() {
    for (settings, headers) in [
        // Its breaker opens, and there is nobody else.
        ("breaker: {consecutive_failures: 1, fail_open: false}", &[][..]),
        // The whole exchange would be over before it may be asked again.
        ("deadlines: {exchange: 1s}", &[("Retry-After", "5")][..]),
    ] {
        let failing = answering(503, headers);
        let gateway = Gateway::start(&config(settings, &[&failing]));
        let started = Instant::now();
        let answer = post(gateway.address(), "/svc/mdl/x", &[], "body");
        assert_eq!((answer.status, &answer.json()["from"]), (503, &"failing".into()), "{settings}");
        assert!(started.elapsed() < Duration::from_millis(900), "{settings}");
        assert_eq!(failing.seen().len(), 1);
    }
}
