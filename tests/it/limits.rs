//! How much clients may take, and what they are told of it.

use std::net::IpAddr;
use std::sync::mpsc;

use crate::harness::{
    Answer, Connection, Gateway, Model, Reply, Upstream, config, eventually, get, hash_of, post,
    send_from, services,
};

const CHAT: &str = "/v1/chat/completions";

const KEYS: [&str; 2] = ["tg-a", "tg-b"];

/// The configuration of the keys `tg-a` and `tg-b`, which have these lines too.
fn keys(lines: [&str; 2]) -> String {
    let mut text = "keys:\n".to_owned();
    for (key, lines) in KEYS.iter().zip(lines) {
        text.push_str(&format!("  - {{name: {key}, hash: \"{}\"{lines}}}\n", hash_of(key)));
    }
    text
}

fn as_key(key: &str) -> String {
    format!("Authorization: Bearer {key}")
}

fn ask(gateway: &Gateway, key: &str, path: &str, body: &str) -> Answer {
    post(gateway.address(), path, &[&as_key(key), "Content-Type: application/json"], body)
}

fn statuses(gateway: &Gateway, key: &str, path: &str, count: usize) -> Vec<u16> {
    (0..count).map(|_| ask(gateway, key, path, "{}").status).collect()
}

/// Waits until so many exchanges are settled, which have a row in the ledger then.
#[track_caller]
fn wait_settled(gateway: &Gateway, exchanges: usize) {
    let rows = format!("proxy_ledger_rows_total{{stage=\"spooled\"}} {exchanges}\n");
    eventually("it is settled", || get(gateway.address(), "/metrics", &[]).text().contains(&rows));
}

#[test]
fn a_limit_with_a_condition_holds_where_that_does() {
    let upstream = Upstream::metered();
    let text = format!(
        "{}limits: [{{per: key, requests: 2, window: 1h, when: 'request.stream || request.headers[\"x-batch\"] == \"1\"'}}]",
        keys(["", ""])
    );
    let gateway = Gateway::start(&config(&text, &[&upstream]));
    let path = &format!("/svc/mdl{CHAT}");
    assert_eq!(statuses(&gateway, "tg-a", path, 4), [200; 4]);
    let streams = || ask(&gateway, "tg-a", path, r#"{"model":"mdl","stream":true}"#).status;
    assert_eq!([streams(), streams(), streams()], [200, 200, 429]);
    let headers = [as_key("tg-b"), "X-Batch: 1".to_owned()];
    let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
    let batch = || post(gateway.address(), path, &headers, "{}").status;
    assert_eq!([batch(), batch(), batch()], [200, 200, 429]);
    assert_eq!(statuses(&gateway, "tg-b", path, 1), [200]);
}

#[test]
fn a_key_that_has_used_up_its_requests_gets_429_and_is_told_when_to_come_again() {
    let upstream = Upstream::start(|_, reply| {
        reply.send(
            200,
            &[("x-ratelimit-remaining-requests", "9999"), ("x-ratelimit-x", "y")],
            b"x",
        );
    });
    let limit = "{name: hourly, per: key, requests: 3, window: 1h}";
    let top = format!("limits: [{limit}]\n{}", keys(["", ""]));
    let mut gateway =
        Gateway::start_with(&config(&top, &[&upstream]), &[("LOG_LEVEL", "DEBUG")], &[]);
    for remaining in ["2", "1", "0"] {
        let answer = ask(&gateway, "tg-a", "/svc/mdl/x", "{}");
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("x-ratelimit-limit-requests"), "3");
        assert_eq!(answer.header("x-ratelimit-remaining-requests"), remaining);
        let reset = answer.header("x-ratelimit-reset-requests");
        assert!(reset.starts_with("1h0m") || reset.starts_with("59m"), "{reset}");
        // What the backend says of its own limits is not for this client.
        assert_eq!(answer.header("x-ratelimit-x"), "");
        assert_eq!(answer.header("x-ratelimit-limit-tokens"), "");
    }
    let refused = ask(&gateway, "tg-a", "/svc/mdl/x", "{}");
    assert_eq!(refused.status, 429);
    let error = &refused.json()["error"];
    assert_eq!(error["code"], "rate_limit_exceeded");
    assert_eq!(error["type"], "rate_limit_error");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("3 requests in 3600 s; try again in 36"), "{message}");
    let seconds: u64 = refused.header("retry-after").parse().unwrap();
    let millis: u64 = refused.header("retry-after-ms").parse().unwrap();
    assert!((3580..=3615).contains(&seconds), "{seconds}");
    assert_eq!(seconds, millis.div_ceil(1000));
    assert_eq!(refused.header("x-ratelimit-remaining-requests"), "0");
    gateway.wait_log("POST /svc/mdl/x -> 429 (rate_limit_exceeded: \"hourly\"); key tg-a,");
    let anthropic = ask(&gateway, "tg-a", "/svc/mdl/v1/messages", "{}");
    assert_eq!(anthropic.json()["error"]["type"], "rate_limit_error");
    // Another key has its own.
    assert_eq!(statuses(&gateway, "tg-b", "/svc/mdl/x", 4), [200, 200, 200, 429]);
    assert_eq!(upstream.seen().len(), 6);
}

#[test]
fn a_limit_counts_by_what_it_is_per() {
    let upstream = Upstream::named("x");
    let url = upstream.url();
    let services = format!(
        "services: {{s: {{models: {{m: {{backends: [{{id: a, url: \"{url}\"}}]}}, n: {{backends: [{{id: a, url: \"{url}\"}}]}}}}}}, \
         t: {{models: {{m: {{backends: [{{id: a, url: \"{url}\"}}]}}}}}}}}"
    );
    // For each kind, the second request of each of these, when the first was by key a for s/m.
    let asks = [
        ("tg-a", "/s/m/x"),
        ("tg-a", "/s/n/x"),
        ("tg-a", "/t/m/x"),
        ("tg-b", "/s/m/x"),
        ("tg-b", "/t/m/x"),
    ];
    for (limit, expected) in [
        ("per: key", [429, 429, 429, 200, 429]),
        ("per: model", [429, 200, 200, 429, 429]),
        ("per: service", [429, 429, 200, 429, 429]),
        ("per: key+model", [429, 200, 200, 200, 200]),
        ("per: all", [429, 429, 429, 429, 429]),
        ("per: address", [429, 429, 429, 429, 429]),
        ("per: key, models: [s/n]", [200, 200, 200, 200, 200]),
        ("per: key, services: [t]", [200, 200, 200, 200, 200]),
        ("per: key, keys: [tg-b]", [200, 200, 200, 200, 429]),
    ] {
        let gateway = Gateway::start(&format!(
            "listen: 127.0.0.1:0\nlimits: [{{{limit}, requests: 1, window: 1h}}]\n{}{services}",
            keys(["", ""])
        ));
        assert_eq!(ask(&gateway, "tg-a", "/s/m/x", "{}").status, 200);
        let statuses = asks.map(|(key, path)| ask(&gateway, key, path, "{}").status);
        assert_eq!(statuses, expected, "{limit}");
    }
}

#[test]
fn the_tightest_of_several_limits_is_told() {
    let upstream = Upstream::named("x");
    let top = format!(
        "limits: [{{name: wide, per: key, requests: 1000}}, {{name: narrow, per: all, requests: 2, window: 1h}}]\n{}",
        keys([", limits: [{requests: 5, window: 2h}]", ""])
    );
    let gateway = Gateway::start(&config(&top, &[&upstream]));
    let answer = ask(&gateway, "tg-a", "/svc/mdl/x", "{}");
    assert_eq!(answer.header("x-ratelimit-limit-requests"), "2");
    assert_eq!(statuses(&gateway, "tg-b", "/svc/mdl/x", 2), [200, 429]);
    let refused = ask(&gateway, "tg-a", "/svc/mdl/x", "{}");
    assert!(refused.text().contains("\\\"narrow\\\""), "{}", refused.text());
}

#[test]
fn clients_without_a_key_of_their_own_are_limited_by_address_as_the_variables_say() {
    let upstream = Upstream::named("x");
    let from = |gateway: &Gateway, last: u8| {
        let request = "GET /v1/x HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n";
        send_from(IpAddr::from([127, 0, 0, last]), gateway.address(), request).status
    };
    let url = upstream.url();
    // One upstream: the limit is on.
    let variables = [("UPSTREAM_URL", url.as_str()), ("HOST", "127.0.0.1"), ("PORT", "0")];
    let gateway = Gateway::start_with("", &variables, &[]);
    for _ in 0..100 {
        assert_eq!(from(&gateway, 1), 200);
    }
    assert_eq!(from(&gateway, 1), 429);
    assert_eq!(from(&gateway, 2), 200);
    for (more, limit) in [
        ([("RATE_LIMIT_REQUESTS", "2"), ("RATE_LIMIT_WINDOW", "3600")], Some(2)),
        ([("RATE_LIMIT_ENABLED", "false"), ("RATE_LIMIT_REQUESTS", "2")], None),
    ] {
        let gateway = Gateway::start_with("", &[&variables[..], &more[..]].concat(), &[]);
        let passed = (0..5).take_while(|_| from(&gateway, 1) == 200).count();
        assert_eq!(passed, limit.unwrap_or(5), "{more:?}");
    }
    // A file: there is one only if a variable says so.
    let by_path = |gateway: &Gateway| get(gateway.address(), "/svc/mdl/x", &[]).status;
    let config = config("", &[&upstream]);
    let gateway = Gateway::start(&config);
    assert!((0..150).all(|_| by_path(&gateway) == 200));
    let gateway = Gateway::start_with(&config, &[("RATE_LIMIT_REQUESTS", "1")], &[]);
    assert_eq!([by_path(&gateway), by_path(&gateway)], [200, 429]);
}

#[test]
fn tokens_are_reserved_before_and_settled_after() {
    let upstream = Upstream::metered();
    let limit = "{per: key, tokens: 1000, window: 1h}";
    let top = format!("ledger: {{}}\nlimits: [{limit}]\n{}", keys(["", ""]));
    let gateway = Gateway::start(&config(&top, &[&upstream]));
    let body = |max: u64| format!(r#"{{"model":"mdl","messages":[],"max_tokens":{max}}}"#);
    let remaining = |answer: &Answer| answer.header("x-ratelimit-remaining-tokens");
    let first = ask(&gateway, "tg-a", CHAT, &body(800));
    // Told before it is known what the answer takes.
    assert_eq!((first.status, remaining(&first)), (200, "199".to_owned()));
    wait_settled(&gateway, 1);
    // It took 150 of them, so that this fits.
    let second = ask(&gateway, "tg-a", CHAT, &body(700));
    assert_eq!((second.status, remaining(&second)), (200, "149".to_owned()));
    wait_settled(&gateway, 2);
    let third = ask(&gateway, "tg-a", CHAT, &body(701));
    assert_eq!(third.status, 429);
    let message = third.text();
    assert!(message.contains("1000 tokens in 3600 s, 300 used, 702 asked for"), "{message}");
    // One that may take more than all there is passes when nothing else is there.
    assert_eq!(ask(&gateway, "tg-b", CHAT, &body(5000)).status, 200);
    wait_settled(&gateway, 3);
    // What is not said is assumed, what is asked for several times counts so often.
    let several = r#"{"model":"mdl","n":4,"max_tokens":200}"#;
    assert_eq!(ask(&gateway, "tg-b", CHAT, several).status, 200);
    wait_settled(&gateway, 4);
    assert_eq!(ask(&gateway, "tg-b", CHAT, r#"{"model":"mdl"}"#).status, 429);
}

#[test]
fn input_and_output_can_be_limited_by_themselves() {
    let upstream = Upstream::metered();
    for (limit, passed) in [("tokens_input: 250", 3), ("tokens_output: 120", 3), ("tokens: 302", 3)]
    {
        let limit = format!("{{per: key, {limit}, window: 1h}}");
        let top = format!("ledger: {{}}\nlimits: [{limit}]\n{}", keys(["", ""]));
        let gateway = Gateway::start(&config(&top, &[&upstream]));
        let body = r#"{"model":"mdl","max_tokens":1}"#;
        let passes = |at: &usize| {
            wait_settled(&gateway, *at);
            ask(&gateway, "tg-a", CHAT, body).status == 200
        };
        assert_eq!((0..9).take_while(passes).count(), passed, "{limit}");
    }
}

#[test]
fn what_an_exchange_that_ends_early_did_not_take_is_given_back() {
    let (sender, started) = mpsc::channel();
    let upstream = Upstream::start(move |seen, reply: &mut Reply| {
        if seen.body.windows(4).any(|window| window == b"fail") {
            return reply.send(500, &[], b"no");
        }
        reply.begin("text/event-stream");
        reply.chunk(b"data: {\"choices\":[{\"delta\":{}}]}\n\n");
        sender.send(()).unwrap();
        reply.wait_closed();
    });
    let top = format!(
        "retry: {{retries_max: 0}}\nlimits: [{{per: key, tokens: 1000, concurrent: 1, window: 1h}}]\n{}",
        keys(["", ""])
    );
    let gateway = Gateway::start(&config(&top, &[&upstream]));
    let failing = r#"{"model":"mdl","messages":["fail"],"max_tokens":900}"#;
    for _ in 0..3 {
        eventually("the place is free", || ask(&gateway, "tg-a", CHAT, failing).status == 500);
    }
    let body = r#"{"model":"mdl","stream":true,"max_tokens":900}"#;
    for _ in 0..3 {
        let mut client = Connection::open(gateway.address());
        let key = as_key("tg-a");
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nHost: g\r\n{key}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        client.write(format!("{head}{body}").as_bytes()).unwrap();
        assert_eq!(client.read_head().unwrap().status, 200);
        started.recv().unwrap();
        let refused = ask(&gateway, "tg-a", CHAT, r#"{"model":"mdl","max_tokens":1}"#);
        assert_eq!(refused.status, 429, "{}", refused.text());
        drop(client);
        eventually("it is over", || gateway.inflight() == 0);
    }
}

#[test]
fn no_more_exchanges_go_on_at_a_time_than_allowed() {
    let (sender, started) = mpsc::channel();
    let upstream = Upstream::start(move |_, reply: &mut Reply| {
        reply.begin("text/plain");
        sender.send(()).unwrap();
        reply.wait_closed();
    });
    for per in ["key", "address"] {
        let top = format!("limits: [{{per: {per}, concurrent: 2}}]\n{}", keys(["", ""]));
        let gateway = Gateway::start(&config(&top, &[&upstream]));
        let open = || {
            let mut client = Connection::open(gateway.address());
            let request =
                format!("GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n{}\r\n\r\n", as_key("tg-a"));
            client.write(request.as_bytes()).unwrap();
            started.recv().unwrap();
            client
        };
        let (first, second) = (open(), open());
        let refused = ask(&gateway, "tg-a", "/svc/mdl/x", "{}");
        assert_eq!((refused.status, refused.header("retry-after").as_str()), (429, "1"));
        assert!(refused.text().contains("2 requests at a time"), "{}", refused.text());
        drop(first);
        eventually("a place is free", || gateway.inflight() == 1);
        let third = open();
        drop((second, third));
    }
}

#[test]
fn what_an_exchange_held_is_free_when_its_client_has_the_answer() {
    let upstream = Upstream::start(|seen, reply: &mut Reply| match seen.target().as_str() {
        "/cut" => reply.cut(),
        "/stream" => {
            reply.begin("text/event-stream");
            reply.chunk(b"data: one\n\n");
            reply.chunk(b"data: [DONE]\n\n");
            reply.end();
        }
        _ => reply.text("fine"),
    });
    let top = format!(
        "threads: 4\nlimits: [{{per: key, concurrent: 1}}]\nupstream: {{inflight_max: 1}}\n\
         queue: {{length_max: 0}}\nretry: {{retries_max: 0}}\nbreaker: {{enabled: false}}\n{}",
        keys(["", ""])
    );
    let gateway = Gateway::start(&config(&top, &[&upstream]));
    let key = as_key("tg-a");
    for at in 0..100 {
        // Each on a connection of its own, which another thread may serve.
        for (method, path, status) in [
            ("GET", "json", 200),
            ("GET", "stream", 200),
            ("HEAD", "json", 200),
            ("GET", "cut", 502),
        ] {
            let head = format!("{method} /svc/mdl/{path} HTTP/1.1\r\nHost: g\r\n{key}\r\n\r\n");
            let mut client = Connection::open(gateway.address());
            client.write(head.as_bytes()).unwrap();
            let answer = client.read(method == "HEAD").unwrap();
            assert_eq!(answer.status, status, "{path}, the {at}th time: {}", answer.text());
        }
    }
}

const PRICES: &str = "prices: {per: 1, models: {mdl: {input: 0.01, output: 0.02}}}";

#[test]
fn a_budget_that_is_used_up_refuses_until_the_month_is_over_and_survives_a_restart() {
    let upstream = Upstream::metered();
    let top = format!(
        "ledger: {{}}\n{PRICES}\n{}",
        keys([", limits: [{name: wallet, budget_monthly: 5}]", ""])
    );
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tollgate.yaml"), config(&top, &[&upstream])).unwrap();
    let path = folder.path().to_owned();
    let mut gateway = Gateway::start_in(folder, &[], &[]);
    // Each costs 2.
    let body = r#"{"model":"mdl","max_tokens":50}"#;
    for count in [1, 2] {
        assert_eq!(ask(&gateway, "tg-a", CHAT, body).status, 200);
        wait_settled(&gateway, count);
    }
    // This one may cost more than is left.
    let dear = r#"{"model":"mdl","max_tokens":51}"#;
    let refused = ask(&gateway, "tg-a", CHAT, dear);
    let message = refused.json()["error"]["message"].clone();
    assert_eq!(
        message,
        "the budget \"wallet\" of 5 USD a month has 1 left, and this may cost 1.03: a lower max_tokens may fit"
    );
    let cheap = r#"{"model":"mdl","max_tokens":1}"#;
    assert_eq!(ask(&gateway, "tg-a", CHAT, cheap).status, 200);
    wait_settled(&gateway, 3);
    let refused = ask(&gateway, "tg-a", CHAT, cheap);
    assert_eq!(refused.status, 429);
    assert_eq!(refused.json()["error"]["code"], "insufficient_quota");
    assert_eq!(
        refused.json()["error"]["message"],
        "the budget \"wallet\" of 5 USD a month is used up"
    );
    assert_eq!(refused.header("x-should-retry"), "false");
    assert_eq!(ask(&gateway, "tg-b", CHAT, body).status, 200);
    gateway.signal(nix::sys::signal::Signal::SIGTERM);
    gateway.wait_end();
    let config = config(&format!("state_directory: {}/state\n{top}", path.display()), &[&upstream]);
    let after = Gateway::start(&config);
    assert_eq!(ask(&after, "tg-a", CHAT, cheap).status, 429);
    assert_eq!(ask(&after, "tg-b", CHAT, body).status, 200);
}

#[test]
fn a_budget_holds_for_what_costs_something() {
    let upstream = Upstream::metered();
    let prices = "prices: {per: 1, models: {free: {input: 0}, dear: {input: 0.01, output: 0.02}}}";
    let top = format!(
        "ledger: {{}}\n{prices}\n{}",
        keys([
            ", limits: [{budget_monthly: 1.5}]",
            ", reserved_tokens: 450, limits: [{budget_monthly: 0}]"
        ])
    );
    let upstreams = [&upstream];
    let [free, dear, unpriced] = ["free", "dear", "unpriced"].map(|name| Model(name, &upstreams));
    let gateway = Gateway::start(&services(&top, &[("svc", &[free, dear, unpriced])]));
    let mut settled = 0;
    let mut status = |key: &str, model: &str| {
        let body = format!("{{\"model\":\"{model}\",\"max_tokens\":1}}");
        let status = ask(&gateway, key, CHAT, &body).status;
        settled += usize::from(status == 200);
        wait_settled(&gateway, settled);
        status
    };
    // 100 tokens of input and 50 of output are 2: more than there was, and more than was asked for.
    let paying = ["dear", "dear", "free", "unpriced"].map(|model| status("tg-a", model));
    assert_eq!(paying, [200, 429, 200, 429]);
    // Who has paid before needs no money until that is used up.
    let prepaid = ["dear", "unpriced", "dear", "dear", "free"].map(|model| status("tg-b", model));
    assert_eq!(prepaid, [200, 200, 200, 429, 200]);
}

#[test]
fn a_keys_own_limits_are_counted_beside_those_of_everybody() {
    let upstream = Upstream::metered();
    let own = ", limits: [{requests: 3, window: 1h}, {concurrent: 1}]";
    let top = format!(
        "limits: [{{per: key, requests: 5, window: 1h}}, {{per: key, concurrent: 8}}]\n{}",
        keys([own, ""])
    );
    let gateway = Gateway::start(&config(&top, &[&upstream]));
    assert_eq!(statuses(&gateway, "tg-a", "/svc/mdl/x", 4), [200, 200, 200, 429]);
    assert_eq!(statuses(&gateway, "tg-b", "/svc/mdl/x", 6), [200, 200, 200, 200, 200, 429]);
}

#[test]
fn a_limit_in_shadow_only_counts() {
    let upstream = Upstream::named("x");
    let top = format!(
        "limits: [{{name: trial, per: key, requests: 2, window: 1h, shadow: true}}]\n{}",
        keys(["", ""])
    );
    let gateway = Gateway::start(&config(&top, &[&upstream]));
    assert_eq!(statuses(&gateway, "tg-a", "/svc/mdl/x", 5), [200; 5]);
    let metrics = get(gateway.address(), "/metrics", &[]).text();
    let line = |name: &str| metrics.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    assert!(line("proxy_limits_shadowed_total{limit=\"trial\"}").ends_with(" 3"), "{metrics}");
    // What only counts is not told to clients.
    let answer = ask(&gateway, "tg-a", "/svc/mdl/x", "{}");
    assert_eq!(answer.header("x-ratelimit-limit-requests"), "");
}

#[test]
fn counts_go_on_through_a_reload() {
    let upstream = Upstream::named("x");
    let top = |requests: u32| {
        format!("limits: [{{per: key, requests: {requests}, window: 1h}}]\n{}", keys(["", ""]))
    };
    let gateway = Gateway::start(&config(&top(2), &[&upstream]));
    assert_eq!(statuses(&gateway, "tg-a", "/svc/mdl/x", 3), [200, 200, 429]);
    std::fs::write(gateway.folder().join("tollgate.yaml"), config(&top(4), &[&upstream])).unwrap();
    eventually("there are two more", || {
        ask(&gateway, "tg-a", "/svc/mdl/x", "{}").header("x-ratelimit-limit-requests") == "4"
    });
    assert_eq!(statuses(&gateway, "tg-a", "/svc/mdl/x", 2), [200, 429]);
    let metrics = get(gateway.address(), "/metrics", &[]).text();
    assert!(metrics.contains("proxy_rate_limited_total{limit=\"per key\"}"), "{metrics}");
}
