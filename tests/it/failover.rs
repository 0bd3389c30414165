//! Backends that cannot be reached, and what a client is told when none is left.

use std::net::TcpListener;

use crate::harness::{Gateway, Upstream, config, get, post};

#[test]
fn a_backend_that_refuses_connections_is_passed_over_for_every_method() {
    let mut dead = Upstream::named("dead");
    let live = Upstream::named("live");
    let gateway = Gateway::start(&config("balance: round_robin", &[&dead, &live]));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    gateway.wait_backend("svc/mdl", "b", "healthy");
    dead.kill();
    for _ in 0..20 {
        let answer = post(gateway.address(), "/svc/mdl/x", &[], "body");
        assert_eq!((answer.status, answer.text().as_str()), (200, "live"));
        assert_eq!(live.last().body, b"body");
    }
    // An exchange that finds nobody has the backend checked long before the interval of 30 s ends.
    gateway.wait_backend("svc/mdl", "a", "unhealthy");
}

#[test]
fn a_backend_that_could_not_be_reached_is_asked_last_until_its_next_check() {
    let mut dead = Upstream::named("dead");
    let live = Upstream::named("live");
    // Checks are an hour apart, and after a failure a second.
    let settings = "balance: round_robin\nhealth_check: {interval: 1h, unhealthy_after: 100}";
    let gateway = Gateway::start(&config(settings, &[&dead, &live]));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    gateway.wait_backend("svc/mdl", "b", "healthy");
    dead.kill();
    for _ in 0..10 {
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).text(), "live");
    }
    let failures = gateway.log().iter().filter(|line| line.contains("backend a of")).count();
    assert!((1..=3).contains(&failures), "{failures} of 10 requests tried the dead one first");
}

#[test]
fn with_no_backend_left_the_answer_is_503_with_retry_after_and_names_no_address() {
    let mut only = Upstream::named("x");
    let gateway = Gateway::start(&config("health_check: {interval: 7s}", &[&only]));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    only.kill();
    for state in ["healthy", "unhealthy"] {
        gateway.wait_backend("svc/mdl", "a", state);
        let answer = get(gateway.address(), "/svc/mdl/v1/x", &[]);
        assert_eq!((answer.status, answer.header("retry-after").as_str()), (503, "7"), "{state}");
        let error = &answer.json()["error"];
        assert_eq!(
            (error["type"].as_str(), error["code"].as_str()),
            (Some("server_error"), Some("no_backend"))
        );
        assert!(error["message"].as_str().unwrap().contains("svc/mdl"));
        assert!(!answer.text().contains("127.0.0.1"), "{}", answer.text());
    }
    // In Anthropic's shape where Anthropic's clients ask.
    let answer = get(gateway.address(), "/svc/mdl/v1/messages", &[]);
    let body = answer.json();
    assert_eq!(
        (body["type"].as_str(), body["error"]["type"].as_str()),
        (Some("error"), Some("overloaded_error"))
    );
    assert_eq!(body["request_id"].as_str(), Some(answer.header("x-request-id").as_str()));
}

#[test]
fn a_backend_that_dies_before_it_answers_is_a_502_and_one_that_talks_nonsense_too() {
    let upstream = Upstream::start(|seen, reply| {
        if seen.target == b"/nonsense" {
            reply.raw(b"\x00\x01 this is not HTTP\r\n\r\n");
        }
        reply.cut();
    });
    let mut gateway = Gateway::start(&config("", &[&upstream]));
    for path in ["/svc/mdl/dies", "/svc/mdl/nonsense"] {
        let answer = post(gateway.address(), path, &[], "x");
        assert_eq!(
            (answer.status, answer.json()["error"]["code"].as_str()),
            (502, Some("backend_failed")),
            "{path}"
        );
    }
    // What the client is not told is in the log.
    let line = gateway.wait_log("backend a of svc/mdl");
    assert!(line.contains(&upstream.address().to_string()), "{line}");
}

#[test]
fn a_kept_connection_that_the_backend_closed_is_not_an_error() {
    // Each connection serves one request and is then closed without a word.
    let upstream = Upstream::start(|_, reply| {
        reply.text("ok");
        reply.cut();
    });
    let gateway = Gateway::start(&config("", &[&upstream]));
    for _ in 0..50 {
        assert_eq!(post(gateway.address(), "/svc/mdl/x", &[], "body").status, 200);
    }
}

#[test]
fn every_address_of_a_name_is_tried() {
    // localhost is ::1 and 127.0.0.1; only the second one listens.
    let upstream = Upstream::named("found");
    let port = upstream.address().port();
    assert!(TcpListener::bind(("::1", port)).is_ok(), "nothing listens on ::1");
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\nservices: {{svc: {{models: {{mdl: {{backends: [{{id: a, url: \"http://localhost:{port}\"}}]}}}}}}}}"
    ));
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).text(), "found");
    assert_eq!(upstream.last().header("host"), format!("localhost:{port}"));
    gateway.wait_backend("svc/mdl", "a", "healthy");
}

#[test]
fn an_address_that_swallows_checks_does_not_hide_the_next_one() {
    let upstream = Upstream::named("found");
    let port = upstream.address().port();
    let hole = TcpListener::bind(("::1", port)).expect("the same port on ::1");
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\nhealth_check: {{timeout: 500ms, interval: 500ms}}\nservices: {{svc: {{models: {{mdl: {{backends: [{{id: a, url: \"http://localhost:{port}\"}}]}}}}}}}}"
    ));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).text(), "found");
    drop(hole);
}

#[test]
fn a_request_that_is_not_idempotent_is_sent_again_only_if_that_is_allowed() {
    let upstream = Upstream::start(|seen, reply| {
        if seen.target == b"/crash" {
            std::thread::park_timeout(std::time::Duration::from_millis(1200));
            return reply.cut();
        }
        reply.text("ok");
    });
    let gateway = Gateway::start(&config("retry: {non_idempotent: false}", &[&upstream]));
    // The connection is kept, as it is under load.
    assert_eq!(get(gateway.address(), "/svc/mdl/warm", &[]).status, 200);
    let crashes = || upstream.seen().iter().filter(|seen| seen.target == b"/crash").count();
    assert_eq!(post(gateway.address(), "/svc/mdl/crash", &[], "{}").status, 502);
    assert_eq!(crashes(), 1);
    // Who sends a key for that says that it is safe.
    let key = ["Idempotency-Key: 1"];
    assert_eq!(post(gateway.address(), "/svc/mdl/crash", &key, "{}").status, 502);
    assert_eq!(crashes(), 1 + 3);
}

#[test]
fn a_name_that_does_not_resolve_costs_its_backend_and_nothing_else() {
    let live = Upstream::named("live");
    let url = live.url();
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\nservices: {{svc: {{models: {{mdl: {{backends: [{{id: lost, url: \"http://no-such-host.invalid\"}}, {{id: live, url: \"{url}\"}}]}}}}}}}}"
    ));
    for _ in 0..10 {
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).text(), "live");
    }
    gateway.wait_backend("svc/mdl", "lost", "unhealthy");
}
