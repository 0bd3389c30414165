//! The gateway's own pages.

use serde_json::json;

use crate::harness::{Gateway, Upstream, config, eventually, get, post, send};

#[test]
fn health_and_ready_answer_without_a_key() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("api_key: sk-1", &[&upstream]));
    let answer = get(gateway.address(), "/health", &[]);
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(answer.json(), json!({"status": "ok", "service": "tollgate", "version": version}));
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(get(gateway.address(), "/ready", &[]).status, 200);
    let head =
        send(gateway.address(), "HEAD /health HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n");
    assert_eq!((head.status, head.header("content-length")), (200, answer.body.len().to_string()));
    let refused = post(gateway.address(), "/health", &[], "");
    assert_eq!((refused.status, refused.header("allow").as_str()), (405, "GET, HEAD, OPTIONS"));
}

#[test]
fn status_shows_every_backend_without_a_key_and_one_service_with_it() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("api_key: sk-1", &[&upstream]));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    let all = get(gateway.address(), "/api/health/status", &[]);
    let body = all.json();
    assert_eq!((&body["service"], &body["type"]), (&json!("tollgate"), &json!("health_status")));
    let backend = &body["data"]["svc"]["mdl"][0];
    let keys: Vec<&String> = backend.as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        [
            "id",
            "name",
            "url",
            "status",
            "response_time_ms",
            "last_check",
            "breaker",
            "alert",
            "drained"
        ]
    );
    assert_eq!(all.header("access-control-allow-origin"), "*");
    let refused = get(gateway.address(), "/api/health/status/svc", &[]);
    assert_eq!((refused.status, refused.header("www-authenticate").as_str()), (401, "Bearer"));
    assert_eq!(refused.header("access-control-allow-origin"), "*");
    let one = get(gateway.address(), "/api/health/status/svc", &["X-API-Key: sk-1"]);
    assert_eq!(one.json(), get(gateway.address(), "/api/health/status", &[]).json());
    let none = get(gateway.address(), "/api/health/status/nope", &["X-API-Key: sk-1"]);
    assert_eq!((none.status, &none.json()["error"]["code"]), (404, &json!("service_not_found")));
    let preflight = send(
        gateway.address(),
        "OPTIONS /api/health/status/svc HTTP/1.1\r\nHost: g\r\nOrigin: https://a\r\nAccess-Control-Request-Method: GET\r\nConnection: close\r\n\r\n",
    );
    assert_eq!(
        (preflight.status, preflight.header("access-control-allow-origin").as_str()),
        (204, "*")
    );
    assert!(preflight.header("access-control-allow-headers").contains("Authorization"));
}

#[test]
fn the_dashboard_is_one_page_that_may_load_nothing_from_elsewhere() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("", &[&upstream]));
    let page = get(gateway.address(), "/", &[]);
    assert_eq!(
        (page.status, page.header("content-type").as_str()),
        (200, "text/html; charset=utf-8")
    );
    let policy = page.header("content-security-policy");
    assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    let html = page.text();
    for outside in ["src=", "@import", "<link rel=\"stylesheet\"", "url("] {
        assert!(!html.contains(outside), "{outside}");
    }
    assert!(html.contains("/api/health/status"));
}

#[test]
fn with_an_admin_address_the_traffic_address_shows_health_and_ready_only() {
    let upstream = Upstream::named("x");
    let mut gateway = Gateway::start(&config("admin: {listen: 127.0.0.1:0}", &[&upstream]));
    let admin = gateway.admin();
    for (path, traffic, own) in [
        ("/health", 200, 200),
        ("/ready", 200, 200),
        ("/api/health/status", 404, 200),
        ("/api/health/status/svc", 404, 200),
        ("/", 404, 200),
        ("/svc/mdl/x", 200, 404),
    ] {
        assert_eq!(get(gateway.address(), path, &[]).status, traffic, "traffic {path}");
        assert_eq!(get(admin, path, &[]).status, own, "admin {path}");
    }
    assert_eq!(post(admin, "/health", &[], "").status, 405);
    // The same guards as for traffic.
    assert_eq!(send(admin, "garbage\r\n\r\n").status, 400);
    let large = format!("GET /health HTTP/1.1\r\nHost: g\r\nX: {}\r\n\r\n", "a".repeat(70_000));
    assert_eq!(send(admin, large).status, 431);
}

#[test]
fn cors_for_traffic_is_off_unless_configured() {
    let upstream = Upstream::start(|_, reply| {
        reply.send(200, &[("Access-Control-Allow-Origin", "https://own")], b"x")
    });
    let origin = ["Origin: https://chat.example.com"];
    let preflight = |gateway: &Gateway, origin: &str| {
        send(
            gateway.address(),
            format!(
                "OPTIONS /svc/mdl/x HTTP/1.1\r\nHost: g\r\nOrigin: {origin}\r\nAccess-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization, x-stainless-os\r\nConnection: close\r\n\r\n"
            ),
        )
    };
    // Off: the backend's own headers pass, and OPTIONS is traffic.
    let off = Gateway::start(&config("", &[&upstream]));
    assert_eq!(
        get(off.address(), "/svc/mdl/x", &origin).header("access-control-allow-origin"),
        "https://own"
    );
    assert_eq!(preflight(&off, "https://chat.example.com").status, 200);
    assert_eq!(upstream.last().method, "OPTIONS");
    // Listed: just these, on answers, refusals and preflights, which need no key.
    let listed = Gateway::start(&config(
        "api_key: sk-1\ncors: {origins: [\"https://chat.example.com\"]}",
        &[&upstream],
    ));
    let with_key = ["Origin: https://chat.example.com", "X-API-Key: sk-1"];
    let answer = get(listed.address(), "/svc/mdl/x", &with_key);
    assert_eq!(answer.header("access-control-allow-origin"), "https://chat.example.com");
    assert_eq!(answer.header("vary"), "Origin");
    let refused = get(listed.address(), "/svc/mdl/x", &origin);
    assert_eq!(
        (refused.status, refused.header("access-control-allow-origin").as_str()),
        (401, "https://chat.example.com")
    );
    let asked = preflight(&listed, "https://chat.example.com");
    assert_eq!(
        (asked.status, asked.header("access-control-allow-headers").as_str()),
        (204, "authorization, x-stainless-os")
    );
    assert_eq!(
        preflight(&listed, "https://evil.example").header("access-control-allow-origin"),
        ""
    );
}

#[test]
fn a_service_may_have_origins_of_its_own() {
    let upstream = Upstream::named("x");
    let backends = format!("{{backends: [{{id: a, url: \"{}\"}}]}}", upstream.url());
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\ncors: {{origins: [\"https://all.example\"]}}\nservices:\n\
         \x20 own: {{cors: {{origins: [\"https://own.example\"]}}, models: {{mdl: {backends}}}}}\n\
         \x20 none: {{cors: {{origins: []}}, models: {{mdl: {backends}}}}}\n\
         \x20 other: {{models: {{mdl: {backends}}}}}\n"
    ));
    let allowed = |path: &str, origin: &str| {
        let header = format!("Origin: https://{origin}.example");
        get(gateway.address(), path, &[&header]).header("access-control-allow-origin")
    };
    for (path, own, all) in [
        ("/own/mdl/x", "https://own.example", ""),
        ("/%6fwn/mdl/x", "https://own.example", ""),
        ("/none/mdl/x", "", ""),
        ("/other/mdl/x", "", "https://all.example"),
        ("/v1/models", "", "https://all.example"),
    ] {
        assert_eq!([allowed(path, "own"), allowed(path, "all")], [own, all], "{path}");
    }
}

#[test]
fn a_malformed_request_to_the_admin_address_leaves_no_credential_in_the_log() {
    let upstream = Upstream::named("x");
    let mut gateway = Gateway::start(&config(
        "api_key: sk-1\nlog: {level: debug}\nadmin: {listen: 127.0.0.1:0}",
        &[&upstream],
    ));
    let admin = gateway.admin();
    let bad = "GET /api/health/status/svc?key=sk-query HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer sk-1\r\nBroken Line\r\n\r\n";
    assert!(matches!(send(admin, bad).status, 0 | 400));
    assert!(matches!(send(gateway.address(), bad).status, 400));
    let answer = get(admin, "/api/health/status/svc", &["X-API-Key: sk-1", "X-Request-ID: r-1"]);
    assert_eq!((answer.status, answer.header("x-request-id").as_str()), (200, "r-1"));
    get(gateway.address(), "/svc/mdl/x", &["X-API-Key: sk-1"]);
    gateway.wait_log("/svc/mdl/x -> 200");
    let log = gateway.log().join("\n");
    assert!(!log.contains("sk-"), "{log}");
}

#[test]
fn metrics_show_pools_backends_and_reloads() {
    let upstream = Upstream::start(|_, reply| reply.send(503, &[], b""));
    let settings =
        "breaker: {consecutive_failures: 1, open: 1h, open_max: 1h}\nretry: {delay: 1ms}";
    let gateway = Gateway::start(&config(settings, &[&upstream]));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 503);
    // A client may have its answer before the exchange is counted out.
    eventually("it is over", || gateway.inflight() == 0);
    let page = get(gateway.address(), "/metrics", &[]);
    assert_eq!(
        (page.status, page.header("content-type").as_str()),
        (200, "text/plain; version=0.0.4")
    );
    let text = page.text();
    for line in [
        "proxy_inflight 0",
        "proxy_buffered_bytes 0",
        "proxy_reloads_total{outcome=\"ok\"} 0",
        "proxy_queue_length{model=\"mdl\",service=\"svc\"} 0",
        "proxy_retries_total{model=\"mdl\",service=\"svc\"} 2",
        "proxy_backend_up{backend=\"a\",model=\"mdl\",service=\"svc\"} 1",
        "proxy_backend_breaker_state{backend=\"a\",model=\"mdl\",service=\"svc\"} 2",
        "proxy_backend_misconfigured{backend=\"a\",model=\"mdl\",service=\"svc\"} 0",
        "proxy_backend_inflight{backend=\"a\",model=\"mdl\",service=\"svc\"} 0",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
    }
    assert!(text.contains("# HELP proxy_backend_response_time_seconds"), "{text}");
}
