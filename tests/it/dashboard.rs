//! The dashboard in a real browser, and what it is made of.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::harness::{Connection, Gateway, Upstream, config, eventually, get, hash_of, post, send};

/// An upstream whose health is decided from outside, as it answers at `/state`.
fn controlled() -> Upstream {
    let is_up = Arc::new(AtomicBool::new(true));
    Upstream::start(move |seen, reply| match seen.target().as_str() {
        "/up" | "/down" => {
            is_up.store(seen.target() == "/up", Ordering::SeqCst);
            reply.send(200, &[], b"");
        }
        "/state" => reply.send(if is_up.load(Ordering::SeqCst) { 200 } else { 503 }, &[], b""),
        target if target.ends_with("/broken") => reply.send(500, &[], b""),
        _ => {
            let body = br#"{"choices":[{}],"usage":{"prompt_tokens":100,"completion_tokens":50}}"#;
            reply.send(200, &[("Content-Type", "application/json")], body);
        }
    })
}

/// Plays a scene of `tests/clients/dashboard.mjs`; its pictures are in `target/tmp/dashboard`.
fn play(scene: &str, page: SocketAddr, control: &Upstream, gateway: &Gateway) {
    let shots = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("dashboard");
    std::fs::create_dir_all(&shots).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/dashboard.mjs");
    let played = Command::new("node")
        .arg(script)
        .args([scene, &format!("http://{page}/"), &control.url()])
        .arg(gateway.folder().join("tollgate.yaml"))
        .arg(shots)
        .output()
        .expect("node is installed");
    let told = String::from_utf8_lossy(&played.stdout);
    assert!(
        played.status.success() && told.contains("all fine"),
        "{told}{}",
        String::from_utf8_lossy(&played.stderr)
    );
}

#[test]
fn in_a_browser_it_shows_what_happens_and_changes_what_it_is_told_to() {
    let [one, two, three] = [controlled(), controlled(), controlled()];
    let keys: Vec<String> = [("admin", true), ("user", false)]
        .iter()
        .map(|(name, is_admin)| {
            format!(
                "{{name: {name}, hash: \"{}\", admin: {is_admin}}}",
                hash_of(&format!("sk-{name}"))
            )
        })
        .collect();
    let backend = |at: usize, upstream: &Upstream| {
        format!("{{id: n{at}, name: Node {at}, url: \"{}\"}}", upstream.url())
    };
    let config = format!(
        "listen: 127.0.0.1:0\nadmin: {{listen: 127.0.0.1:0}}\nkeys: [{}]\nreload: {{watch: false}}\n\
         retry: {{fast_500: 0s}}\nhealth_check: {{path: /state, interval: 200ms}}\n\
         prices: {{models: {{\"*\": {{input: 1, output: 2}}}}}}\n\
         services: {{svc: {{models: {{mdl: {{backends: [{}, {}]}}, other: {{backends: [{}]}}}}}}}}\n",
        keys.join(", "),
        backend(1, &one),
        backend(2, &two),
        backend(3, &three),
    );
    let mut gateway = Gateway::start(&config);
    let admin = gateway.admin();
    for number in 0..40 {
        let (model, path) =
            if number == 7 { ("other", "broken") } else { ("mdl", "v1/chat/completions") };
        post(gateway.address(), &format!("/svc/{model}/{path}"), &["X-API-Key: sk-user"], "{}");
    }
    play("few", admin, &one, &gateway);
}

#[test]
fn in_a_browser_300_backends_are_filtered_and_sorted() {
    let upstream = controlled();
    let (up, down) = (upstream.url(), "http://127.0.0.1:9");
    let pool = |model: usize| {
        let backend = |at: usize| {
            let url = if at == 14 { down } else { &up };
            format!("{{id: node-{at}, url: \"{url}/{model}/{at}\"}}")
        };
        let backends: Vec<String> = (0..15).map(backend).collect();
        format!("model-{model}: {{backends: [{}]}}", backends.join(", "))
    };
    let pools: Vec<String> = (0..20).map(pool).collect();
    let config = format!(
        "listen: 127.0.0.1:0\nadmin: {{listen: 127.0.0.1:0}}\nservices: {{svc: {{models: {{{}}}}}}}\n",
        pools.join(", ")
    );
    let mut gateway = Gateway::start(&config);
    let admin = gateway.admin();
    play("many", admin, &upstream, &gateway);
}

/// The head of a live view, and its connection.
fn live(address: SocketAddr, header: &str) -> (u16, Connection) {
    let mut connection = Connection::open(address);
    let request = format!("GET /api/dashboard/live HTTP/1.1\r\nHost: g\r\n{header}\r\n");
    connection.write(request.as_bytes()).unwrap();
    (connection.read_head().unwrap().status, connection)
}

#[test]
fn in_a_browser_it_asks_again_and_again_where_it_cannot_be_told() {
    let upstream = controlled();
    let top = "metrics: {enabled: false}\nhealth_check: {path: /state, interval: 200ms}";
    let gateway = Gateway::start(&config(top, &[&upstream]));
    let viewers: Vec<_> = (0..32).map(|_| live(gateway.address(), "")).collect();
    assert!(viewers.iter().all(|(status, _)| *status == 200));
    assert_eq!(live(gateway.address(), "").0, 503);
    play("bare", gateway.address(), &upstream, &gateway);
    drop(viewers);
    eventually("there is room again", || live(gateway.address(), "").0 == 200);
}

#[test]
fn a_live_view_goes_on_and_ends_when_its_key_is_taken_away() {
    let upstream = Upstream::metered();
    let key = |enabled: bool| {
        let hash = hash_of("sk-admin");
        let keys =
            format!("keys: [{{name: a, hash: \"{hash}\", admin: true, enabled: {enabled}}}]");
        config(&format!("admin: {{listen: 127.0.0.1:0}}\n{keys}"), &[&upstream])
    };
    let mut gateway = Gateway::start(&key(true));
    let admin = gateway.admin();
    let (status, mut viewer) = live(admin, "Authorization: Bearer sk-admin\r\n");
    assert_eq!(status, 200);
    let event = |viewer: &mut Connection| -> Value {
        let text = String::from_utf8(viewer.read_chunk().unwrap()).unwrap();
        serde_json::from_str(text.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap())
            .unwrap()
    };
    let first = event(&mut viewer);
    assert_eq!(first["totals"]["requests"], 0);
    assert!(first["history"]["step_seconds"] == 5);
    post(gateway.address(), "/svc/mdl/v1/chat/completions", &["X-API-Key: sk-admin"], "{}");
    let mut seen = event(&mut viewer);
    while seen["totals"]["requests"] != 1 {
        seen = event(&mut viewer);
    }
    assert_eq!(seen["keys"][0]["tokens_input"], 100);
    std::fs::write(gateway.folder().join("tollgate.yaml"), key(false)).unwrap();
    while viewer.read_chunk().is_some_and(|chunk| !chunk.is_empty()) {}
    assert_eq!(live(admin, "Authorization: Bearer sk-admin\r\n").0, 401);
}

#[test]
fn what_it_shows_is_for_admins_where_there_are_keys() {
    let upstream = Upstream::named("x");
    let keys =
        |admin: bool| format!("keys: [{{name: a, hash: \"{}\", admin: {admin}}}]", hash_of("sk-a"));
    let status = |address: SocketAddr, key: &str| {
        let headers: &[&str] = if key.is_empty() { &[] } else { &[key] };
        get(address, "/api/dashboard", headers).status
    };
    // On the traffic address: never for those who are not.
    let open = Gateway::start(&config(&keys(false), &[&upstream]));
    assert_eq!(status(open.address(), ""), 401);
    assert_eq!(status(open.address(), "X-API-Key: sk-a"), 403);
    let own = Gateway::start(&config(&keys(true), &[&upstream]));
    assert_eq!(status(own.address(), "X-API-Key: sk-a"), 200);
    // On an address of its own: where nobody is an admin, for whoever reaches it.
    let mut bare = Gateway::start(&config(
        &format!("admin: {{listen: 127.0.0.1:0}}\n{}", keys(false)),
        &[&upstream],
    ));
    let admin = bare.admin();
    assert_eq!(status(admin, ""), 200);
    assert_eq!(status(bare.address(), "X-API-Key: sk-a"), 404);
}

#[test]
fn the_view_says_why_a_backend_is_left_alone_and_how_often_it_failed() {
    let (broken, fine) =
        (Upstream::start(|_, reply| reply.send(500, &[], b"")), Upstream::named("x"));
    let top = "balance: round_robin\nretry: {fast_500: 0s}\nbreaker: {consecutive_failures: 3}";
    let gateway = Gateway::start(&config(top, &[&broken, &fine]));
    let view = || get(gateway.address(), "/api/dashboard", &[]).json();
    let failing = |view: &Value| view["pools"][0]["backends"][0].clone();
    eventually("its breaker opens", || {
        get(gateway.address(), "/svc/mdl/x", &[]);
        failing(&view())["breaker"] == "open"
    });
    eventually("all are counted", || view()["errors"][0]["count"] == 3);
    let view = view();
    let backend = failing(&view);
    assert_eq!(
        (&backend["why"], &backend["errors_last_minute"]),
        (&json!("status 500"), &json!(3))
    );
    assert!((1..=11).contains(&backend["left_alone_seconds"].as_u64().unwrap()), "{backend:#}");
    // One line for failures that are alike.
    let errors = view["errors"].as_array().unwrap();
    assert_eq!(errors.len(), 1, "{errors:#?}");
    assert_eq!((&errors[0]["backend"], &errors[0]["kind"]), (&json!("a"), &json!("upstream_5xx")));
    assert_eq!(errors[0]["why"], "the backend answered 500");
    assert_eq!(view["pools"][0]["errors_last_minute"], 3);
}

#[test]
fn a_drained_backend_gets_nothing_new_until_it_is_taken_back() {
    let (one, two) = (Upstream::named("one"), Upstream::named("two"));
    let top = "admin: {listen: 127.0.0.1:0}\nbalance: round_robin\nreload: {watch: false}";
    let mut gateway = Gateway::start(&config(top, &[&one, &two]));
    let admin = gateway.admin();
    let ask = |gateway: &Gateway| get(gateway.address(), "/svc/mdl/x", &[]).text();
    let change = |what: &str, backend: &str| {
        post(admin, &format!("/admin/{what}?service=svc&model=mdl&backend={backend}"), &[], "")
    };
    let answer = change("drain", "a");
    assert_eq!(
        (answer.status, answer.json()),
        (200, json!({"id": "a", "drained": true, "in_flight": 0}))
    );
    gateway.wait_log("backend a of svc/mdl is drained");
    assert!((0..10).all(|_| ask(&gateway) == "two"));
    // A reload changes nothing about that.
    assert_eq!(post(admin, "/admin/reload", &[], "").status, 200);
    assert!((0..10).all(|_| ask(&gateway) == "two"));
    assert_eq!(change("drain", "b").status, 200);
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 503);
    assert_eq!((change("undrain", "a").status, change("undrain", "b").status), (200, 200));
    eventually("both are asked again", || ask(&gateway) == "one");
    for (query, status) in [
        ("service=svc&model=mdl&backend=none", 400),
        ("service=svc&model=mdl", 400),
        ("nonsense", 400),
    ] {
        assert_eq!(
            post(admin, &format!("/admin/drain?{query}"), &[], "").status,
            status,
            "{query}"
        );
    }
    assert_eq!(get(admin, "/admin/drain?service=svc&model=mdl&backend=a", &[]).status, 405);
    // Not from the traffic address.
    assert_eq!(
        post(gateway.address(), "/admin/drain?service=svc&model=mdl&backend=a", &[], "").status,
        404
    );
}

#[test]
fn a_process_that_takes_over_knows_what_is_drained() {
    let (one, two) = (Upstream::named("one"), Upstream::named("two"));
    let top = "admin: {listen: 127.0.0.1:0}\nbalance: round_robin";
    let mut gateway = Gateway::start(&config(top, &[&one, &two]));
    let admin = gateway.admin();
    let drain = "/admin/drain?service=svc&model=mdl&backend=a";
    assert_eq!(post(admin, drain, &[], "").status, 200);
    gateway.signal(nix::sys::signal::Signal::SIGUSR2);
    gateway.wait_successor();
    gateway.wait_log("backend a of svc/mdl is still drained");
    gateway.wait_end();
    let ask = || get(gateway.address(), "/svc/mdl/x", &[]).text();
    assert!((0..10).all(|_| ask() == "two"));
}

#[test]
fn over_http_2_the_page_changes_things_too() {
    let upstream = Upstream::named("x");
    let mut gateway = Gateway::start(&config("admin: {listen: 127.0.0.1:0}", &[&upstream]));
    let admin = gateway.admin();
    let ask = |origin: &str| {
        let told = Command::new("curl")
            .args(["-sS", "-o", "/dev/null", "-w", "%{http_code}", "--http2-prior-knowledge"])
            .args(["-X", "POST", "-H", &format!("Origin: {origin}")])
            .arg(format!("http://{admin}/admin/reload"))
            .output()
            .expect("curl is installed");
        String::from_utf8_lossy(&told.stdout).into_owned()
    };
    assert_eq!(ask(&format!("http://{admin}")), "200");
    assert_eq!(ask("http://evil.example.com"), "403");
}

#[test]
fn a_browser_and_a_program_get_what_they_accept_at_the_root() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("", &[&upstream]));
    for (accept, kind) in [
        ("application/json", "application/json"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html; charset=utf-8"),
        ("*/*", "text/html; charset=utf-8"),
        ("application/json;q=0.5, text/html", "text/html; charset=utf-8"),
    ] {
        let answer = get(gateway.address(), "/", &[&format!("Accept: {accept}")]);
        assert_eq!(answer.header("content-type"), kind, "{accept}");
    }
}

#[test]
fn pages_of_other_origins_change_nothing() {
    let upstream = Upstream::named("x");
    let mut gateway = Gateway::start(&config("admin: {listen: 127.0.0.1:0}", &[&upstream]));
    let admin = gateway.admin();
    let ask = |host: &str, origin: &str| {
        let target = "/admin/drain?service=svc&model=mdl&backend=a";
        let request = format!(
            "POST {target} HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        send(admin, request).status
    };
    let own = admin.to_string();
    assert_eq!(ask(&own, "https://evil.example.com"), 403);
    // A name that somebody has pointed here.
    assert_eq!(ask("evil.example.com", "http://evil.example.com"), 403);
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
    assert_eq!(ask(&own, &format!("http://{own}")), 200);
}

#[test]
fn stats_tells_totals_and_the_last_minute() {
    let upstream = Upstream::metered();
    let gateway = Gateway::start(&config("", &[&upstream]));
    for _ in 0..3 {
        post(gateway.address(), "/svc/mdl/v1/chat/completions", &[], "{}");
    }
    assert_eq!(get(gateway.address(), "/svc/none/x", &[]).status, 404);
    let stats = || get(gateway.address(), "/stats", &[]).json();
    eventually("all are counted", || stats()["requests"] == 4);
    let stats = stats();
    for (key, value) in [
        ("requests", 4),
        ("errors", 0),
        ("client_aborts", 0),
        ("tokens_input", 300),
        ("tokens_output", 150),
        ("in_flight", 0),
        ("queued", 0),
    ] {
        assert_eq!(stats[key], value, "{key}");
    }
    let model = &stats["services"]["svc"]["mdl"];
    assert_eq!((&model["requests"], &model["backends"]["a"]), (&json!(3), &json!(3)));
    assert!(stats["last_minute"]["requests_per_second"].as_f64().unwrap() > 0.0);
    assert!(stats["last_minute"]["ttfb_ms"]["p50"].as_f64().unwrap() > 0.0);
    assert_eq!(stats["last_minute"]["error_rate"], 0.0);
}
