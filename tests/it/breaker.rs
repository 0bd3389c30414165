//! Circuit breakers: backends that fail are left alone, and come back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

use crate::harness::{Connection, Gateway, Upstream, config, eventually, get, post};

/// An upstream that answers with the status that the test sets.
fn switchable(status: u16) -> (Upstream, Arc<AtomicU16>) {
    let answers = Arc::new(AtomicU16::new(status));
    let upstream = Upstream::start({
        let answers = Arc::clone(&answers);
        move |_, reply| reply.send(answers.load(Ordering::SeqCst), &[], b"switchable")
    });
    (upstream, answers)
}

fn breaker(gateway: &Gateway, id: &str) -> String {
    gateway.backend("svc/mdl", id)["breaker"].as_str().unwrap_or_default().to_owned()
}

const QUICK: &str = "balance: round_robin\nretry: {budget_min: 1000}\n\
    breaker: {consecutive_failures: 3, open: 500ms, slow_start: 0s}";

#[test]
fn a_backend_that_fails_in_a_row_is_left_alone_probed_once_and_taken_back() {
    let (failing, answers) = switchable(502);
    let good = Upstream::named("good");
    let mut gateway = Gateway::start(&config(QUICK, &[&failing, &good]));
    eventually("it is open", || {
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
        breaker(&gateway, "a") == "open"
    });
    assert_eq!(failing.seen().len(), 3);
    gateway.wait_log("left alone for 0.5 s");
    // When its time is over one exchange finds out that it is not better, and is served elsewhere.
    eventually("it is probed", || {
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
        failing.seen().len() == 4
    });
    assert_eq!(breaker(&gateway, "a"), "open");
    answers.store(200, Ordering::SeqCst);
    eventually("it is back", || {
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
        breaker(&gateway, "a") == "closed"
    });
    gateway.wait_log("answers again");
    assert_eq!(breaker(&gateway, "b"), "closed");
}

#[test]
fn with_the_variables_of_the_replaced_tools_an_open_breaker_is_a_503_that_asks_nobody() {
    let (failing, answers) = switchable(500);
    let folder = tempfile::tempdir().unwrap();
    let backends = format!(
        "{{\"services\": {{\"svc\": {{\"models\": {{\"mdl\": {{\"backends\": [{{\"id\": \"a\", \"url\": \"{}\"}}]}}}}}}}}}}",
        failing.url()
    );
    std::fs::write(folder.path().join("backends.json"), backends).unwrap();
    let variables = [
        ("BACKENDS_CONFIG_PATH", "backends.json"),
        ("HOST", "127.0.0.1"),
        ("PORT", "0"),
        ("MAX_RETRIES", "0"),
        ("CIRCUIT_BREAKER_THRESHOLD", "2"),
        ("CIRCUIT_BREAKER_TIMEOUT", "1"),
    ];
    let gateway = Gateway::start_in(folder, &variables, &[]);
    for _ in 0..2 {
        assert_eq!(post(gateway.address(), "/svc/mdl/x", &[], "{}").status, 500);
    }
    let answer = post(gateway.address(), "/svc/mdl/x", &[], "{}");
    assert_eq!((answer.status, answer.header("retry-after").as_str()), (503, "1"));
    assert_eq!(answer.json()["error"]["code"], "no_backend");
    assert_eq!(failing.seen().len(), 2);
    answers.store(200, Ordering::SeqCst);
    eventually("it is closed", || post(gateway.address(), "/svc/mdl/x", &[], "{}").status == 200);
    assert_eq!(breaker(&gateway, "a"), "closed");
}

#[test]
fn when_all_are_left_alone_one_is_asked_all_the_same_and_not_all_are_left_alone() {
    let (one, one_answers) = switchable(502);
    let (two, two_answers) = switchable(502);
    let settings = "balance: round_robin\nretry: {retries_max: 0}\n\
        breaker: {consecutive_failures: 2, open: 1h, open_max: 1h, ejected_max: 1}";
    let gateway = Gateway::start(&config(settings, &[&one, &two]));
    eventually("both are open", || {
        get(gateway.address(), "/svc/mdl/x", &[]);
        ["a", "b"].iter().all(|id| breaker(&gateway, id) == "open")
    });
    let seen = || one.seen().len() + two.seen().len();
    let before = seen();
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 502, "the real answer");
    assert_eq!(seen(), before + 1);
    // It works again: so the breaker need not wait for an hour.
    one_answers.store(200, Ordering::SeqCst);
    two_answers.store(200, Ordering::SeqCst);
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
    assert!(["a", "b"].iter().any(|id| breaker(&gateway, id) == "closed"));

    // With half of the pool at most, the second one stays.
    let settings = settings.replace("ejected_max: 1", "ejected_max: 0.5");
    one_answers.store(502, Ordering::SeqCst);
    two_answers.store(502, Ordering::SeqCst);
    let gateway = Gateway::start(&config(&settings, &[&one, &two]));
    for _ in 0..20 {
        get(gateway.address(), "/svc/mdl/x", &[]);
    }
    let open = ["a", "b"].iter().filter(|id| breaker(&gateway, id) == "open").count();
    assert_eq!(open, 1);
}

#[test]
fn clients_that_leave_and_requests_that_are_wrong_say_nothing_about_a_backend() {
    let wrong = Arc::new(AtomicBool::new(true));
    let upstream = Upstream::start({
        let wrong = Arc::clone(&wrong);
        move |_, reply| {
            if wrong.load(Ordering::SeqCst) {
                return reply.send(400, &[], b"wrong");
            }
            reply.begin("text/event-stream");
            while reply.chunk(b"data: x\n\n") {
                std::thread::park_timeout(Duration::from_millis(5));
            }
        }
    });
    let settings = "breaker: {consecutive_failures: 1, failure_rate_exchanges: 1}";
    let gateway = Gateway::start(&config(settings, &[&upstream]));
    for _ in 0..5 {
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 400);
    }
    wrong.store(false, Ordering::SeqCst);
    for _ in 0..5 {
        let mut connection = Connection::open(gateway.address());
        connection.write(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
        connection.read_head().unwrap();
        connection.read_chunk().unwrap();
    }
    eventually("all are over", || get(gateway.address(), "/ready", &[]).json()["in_flight"] == 0);
    assert_eq!(breaker(&gateway, "a"), "closed");
}

#[test]
fn streams_without_their_last_event_count_as_failures() {
    let whole = Arc::new(AtomicBool::new(true));
    let upstream = Upstream::start({
        let whole = Arc::clone(&whole);
        move |_, reply| {
            reply.begin("text/event-stream");
            reply.chunk(b"data: {\"choices\":[]}\n\n");
            if whole.load(Ordering::SeqCst) {
                reply.chunk(b"data: [DO");
                reply.chunk(b"NE]\n\n");
            }
            reply.end();
        }
    });
    let settings = "breaker: {consecutive_failures: 2, failure_rate_exchanges: 100}";
    let mut gateway = Gateway::start(&config(settings, &[&upstream]));
    let path = "/svc/mdl/v1/chat/completions";
    for _ in 0..4 {
        assert_eq!(post(gateway.address(), path, &[], "{}").status, 200);
    }
    assert_eq!(breaker(&gateway, "a"), "closed");
    whole.store(false, Ordering::SeqCst);
    for _ in 0..2 {
        assert!(post(gateway.address(), path, &[], "{}").complete, "it passes as it came");
    }
    gateway.wait_log("ended a stream without its last event");
    eventually("it is open", || breaker(&gateway, "a") == "open");
}

#[test]
fn a_backend_that_refuses_its_key_is_shown_and_logged_and_not_left_alone() {
    let (upstream, answers) = switchable(401);
    let settings = "api_key: sk-global\nbreaker: {consecutive_failures: 1}";
    let mut gateway = Gateway::start(&config(settings, &[&upstream]));
    let key = ["Authorization: Bearer sk-global"];
    for _ in 0..3 {
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &key).status, 401);
    }
    let backend = gateway.backend("svc/mdl", "a");
    assert_eq!(backend["breaker"], "closed");
    assert_eq!(backend["alert"], "it answers 401: check its api_key and auth_mode");
    gateway.wait_log("answers 401: check its api_key");
    let lines = gateway.log().iter().filter(|line| line.contains("check its api_key")).count();
    assert_eq!(lines, 1, "once, not for every request");
    answers.store(200, Ordering::SeqCst);
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &key).status, 200);
    assert!(gateway.backend("svc/mdl", "a")["alert"].is_null());
}
