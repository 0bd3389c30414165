//! Health checks: what is asked, when, and what the answers mean.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::harness::{Gateway, Upstream, eventually, get};

fn pool(top: &str, backends: &str) -> String {
    format!(
        "listen: 127.0.0.1:0\n{top}\nservices: {{svc: {{models: {{mdl: {{backends: [{backends}]}}}}}}}}\n"
    )
}

#[test]
fn the_first_round_runs_at_once_and_its_outcome_is_shown() {
    let up = Upstream::named("up");
    let down = Upstream::named("down");
    down.set_healthy(false);
    let (up_url, down_url) = (up.url(), down.url());
    // The default interval is 30 s: only the first round can be what is seen.
    let gateway = Gateway::start(&pool(
        "",
        &format!("{{id: up, name: Node 1, url: \"{up_url}\"}}, {{id: down, url: \"{down_url}\"}}"),
    ));
    gateway.wait_backend("svc/mdl", "up", "healthy");
    gateway.wait_backend("svc/mdl", "down", "unhealthy");
    let shown = gateway.backend("svc/mdl", "up");
    assert_eq!(shown["name"], "Node 1");
    assert_eq!(shown["url"], up_url);
    assert!(shown["response_time_ms"].as_f64().unwrap() > 0.0, "{shown}");
    assert!(shown["last_check"].as_str().unwrap().ends_with('Z'), "{shown}");
    assert_eq!(gateway.backend("svc/mdl", "down")["response_time_ms"], serde_json::Value::Null);
    for _ in 0..10 {
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).text(), "up");
    }
}

#[test]
fn a_check_carries_the_backends_host_credential_and_headers() {
    let upstream = Upstream::named("x");
    let url = upstream.url();
    let gateway = Gateway::start(&pool(
        "",
        &format!(
            "{{id: a, url: \"{url}/base\", api_key: sk-backend, auth_mode: x-api-key, health_check: {{path: \"/v1/models?limit=1\", headers: {{X-Probe: \"yes\"}}}}}}"
        ),
    ));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    let seen = upstream.last();
    assert_eq!((seen.method.as_str(), seen.target().as_str()), ("GET", "/base/v1/models?limit=1"));
    assert_eq!(seen.header("host"), upstream.address().to_string());
    assert_eq!(seen.header("x-api-key"), "sk-backend");
    assert_eq!(seen.header("x-probe"), "yes");
    assert!(seen.header("user-agent").starts_with("tollgate/"));
}

#[test]
fn method_and_expected_status_are_configurable() {
    let upstream = Upstream::start(|seen, reply| {
        let status = if seen.method == "HEAD" { 204 } else { 500 };
        reply.raw(format!("HTTP/1.1 {status} x\r\nConnection: close\r\n\r\n").as_bytes());
    });
    let url = upstream.url();
    let gateway = Gateway::start(&pool(
        "health_check: {method: HEAD, path: /live, expect_status: [200, 204]}",
        &format!(
            "{{id: a, url: \"{url}\"}}, {{id: b, url: \"{url}\", health_check: {{expect_status: 200}}}}, {{id: c, url: \"{url}\", health_check: {{method: GET}}}}"
        ),
    ));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    gateway.wait_backend("svc/mdl", "b", "unhealthy");
    gateway.wait_backend("svc/mdl", "c", "unhealthy");
}

#[test]
fn a_backend_that_trickles_its_answer_fails_at_the_hard_timeout() {
    let upstream = Upstream::start(|_, reply| {
        // A byte now and then keeps every timeout for single reads from running out.
        for byte in b"HTTP/1.1 200 OK\r\nX-Slow: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy".iter()
        {
            reply.raw(&[*byte]);
            std::thread::park_timeout(Duration::from_millis(50));
        }
    });
    let url = upstream.url();
    let started = Instant::now();
    let gateway = Gateway::start(&pool(
        "health_check: {path: /trickle, timeout: 300ms}",
        &format!("{{id: a, url: \"{url}\"}}"),
    ));
    gateway.wait_backend("svc/mdl", "a", "unhealthy");
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
}

#[test]
fn thresholds_count_consecutive_checks() {
    let upstream = Upstream::named("x");
    let url = upstream.url();
    let gateway = Gateway::start(&pool(
        "health_check: {interval: 50ms, jitter: 0, unhealthy_after: 3, healthy_after: 2}",
        &format!("{{id: a, url: \"{url}\"}}"),
    ));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    let before = upstream.checks();
    upstream.set_healthy(false);
    gateway.wait_backend("svc/mdl", "a", "unhealthy");
    assert!(upstream.checks() - before >= 3);
    let before = upstream.checks();
    upstream.set_healthy(true);
    gateway.wait_backend("svc/mdl", "a", "healthy");
    assert!(upstream.checks() - before >= 2);
}

#[test]
fn an_unknown_backend_is_usable() {
    let answers = Arc::new(AtomicBool::new(false));
    let upstream = Upstream::start({
        let answers = Arc::clone(&answers);
        move |seen, reply| {
            if seen.target == b"/never" {
                while !answers.load(Ordering::SeqCst) {
                    std::thread::park_timeout(Duration::from_millis(5));
                }
            }
            reply.text("served");
        }
    });
    let url = upstream.url();
    let gateway = Gateway::start(&pool(
        "health_check: {path: /never}",
        &format!("{{id: a, url: \"{url}\"}}"),
    ));
    eventually("the check waits", || upstream.seen().iter().any(|seen| seen.target == b"/never"));
    let shown = gateway.backend("svc/mdl", "a");
    assert_eq!(
        (shown["status"].as_str(), &shown["last_check"]),
        (Some("unknown"), &serde_json::Value::Null)
    );
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).text(), "served");
    answers.store(true, Ordering::SeqCst);
    gateway.wait_backend("svc/mdl", "a", "healthy");
}

#[test]
fn two_backends_on_one_address_are_two_backends() {
    let upstream = Upstream::start(|seen, reply| {
        let key = seen.header("authorization");
        reply.send(if key == "Bearer good" { 200 } else { 401 }, &[], key.as_bytes());
    });
    let url = upstream.url();
    let gateway = Gateway::start(&pool(
        "health_check: {path: /v1/models}",
        &format!(
            "{{id: a, url: \"{url}\", api_key: bad}}, {{id: b, url: \"{url}\", api_key: good}}"
        ),
    ));
    gateway.wait_backend("svc/mdl", "a", "unhealthy");
    gateway.wait_backend("svc/mdl", "b", "healthy");
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).text(), "Bearer good");
}

#[test]
fn interim_responses_come_before_the_one_that_counts() {
    let upstream = Upstream::start(|seen, reply| match seen.target() {
        target if target == "/early" => {
            reply.raw(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n");
            reply.text("ok");
        }
        target if target == "/switch" => reply.raw(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
        _ => (0..20).for_each(|_| reply.raw(b"HTTP/1.1 102 Processing\r\n\r\n")),
    });
    let url = upstream.url();
    let backend = |id: &str| {
        format!("{{id: {id}, url: \"{url}\", health_check: {{path: /{id}, timeout: 1s}}}}")
    };
    let backends = [backend("early"), backend("switch"), backend("endless")].join(", ");
    let gateway = Gateway::start(&pool("", &backends));
    gateway.wait_backend("svc/mdl", "early", "healthy");
    gateway.wait_backend("svc/mdl", "switch", "unhealthy");
    gateway.wait_backend("svc/mdl", "endless", "unhealthy");
}

#[test]
fn an_exchange_that_finds_nobody_has_the_backends_checked_soon() {
    let upstream = Upstream::named("up");
    upstream.set_healthy(false);
    let url = upstream.url();
    let gateway = Gateway::start(&pool(
        "health_check: {interval: 1h}",
        &format!("{{id: a, url: \"{url}\"}}"),
    ));
    gateway.wait_backend("svc/mdl", "a", "unhealthy");
    upstream.set_healthy(true);
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 503);
    gateway.wait_backend("svc/mdl", "a", "healthy");
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).text(), "up");
}
