//! Requests reach the right backend as they came, and responses come back.

use std::io::Read;

use crate::harness::{Connection, Gateway, Upstream, config, get, send};

#[test]
fn forwards_every_method_with_its_body_and_query_untouched() {
    let upstream = Upstream::named("hello");
    let gateway = Gateway::start(&config("", &[&upstream]));
    for method in ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
        let answer = send(
            gateway.address(),
            format!(
                "{method} /svc/mdl/v1/x?a=%20b&c=d%2Fe&&= HTTP/1.1\r\nHost: g\r\nContent-Length: 4\r\n\r\nbody"
            ),
        );
        assert_eq!((answer.status, answer.text().as_str()), (200, "hello"), "{method}");
        let seen = upstream.last();
        assert_eq!(seen.method, method);
        assert_eq!(seen.target(), "/v1/x?a=%20b&c=d%2Fe&&=");
        assert_eq!(seen.body, b"body");
    }
    let answer = send(gateway.address(), "HEAD /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n");
    assert_eq!((answer.status, answer.header("content-length").as_str()), (200, "5"));
    assert_eq!(upstream.last().method, "HEAD");
}

#[test]
fn the_longest_model_name_wins_and_slashes_may_be_escaped() {
    let short = Upstream::named("short");
    let long = Upstream::named("long");
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\nservices:\n  hf:\n    models:\n      meta-llama: {{backends: [{{id: a, url: \"{}\"}}]}}\n      meta-llama/Llama-3-8B: {{backends: [{{id: a, url: \"{}\"}}]}}\n",
        short.url(),
        long.url()
    ));
    for (path, name, target) in [
        ("/hf/meta-llama/v1/models", "short", "/v1/models"),
        ("/hf/meta-llama/Llama-3-8B/v1/models", "long", "/v1/models"),
        ("/hf/meta-llama%2FLlama-3-8B/v1/models", "long", "/v1/models"),
        ("/hf/meta-llama%2fLlama-3-8B", "long", "/"),
        ("/hf/meta-llama/Llama-3-8", "short", "/Llama-3-8"),
    ] {
        let answer = get(gateway.address(), path, &[]);
        assert_eq!((answer.status, answer.text().as_str()), (200, name), "{path}");
        let upstream = if name == "long" { &long } else { &short };
        assert_eq!(upstream.last().target(), target, "{path}");
    }
}

#[test]
fn a_backends_base_path_comes_before_the_clients_path_byte_for_byte() {
    let upstream = Upstream::named("x");
    let url = upstream.url();
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\nservices: {{svc: {{models: {{mdl: {{backends: [{{id: a, url: \"{url}/team/a/\"}}]}}}}}}}}"
    ));
    for (path, target) in [
        ("/svc/mdl", "/team/a"),
        ("/svc/mdl/", "/team/a/"),
        ("/svc/mdl?x=1", "/team/a?x=1"),
        ("/svc/mdl/v1//chat%2Fcompletions;p='(a)'/", "/team/a/v1//chat%2Fcompletions;p='(a)'/"),
        ("/svc/mdl/%E6%A8%A1%e5%9e%8b?q=%zz|", "/team/a/%E6%A8%A1%e5%9e%8b?q=%zz|"),
    ] {
        assert_eq!(get(gateway.address(), path, &[]).status, 200, "{path}");
        assert_eq!(upstream.last().target(), target, "{path}");
    }
}

#[test]
fn hop_by_hop_headers_end_at_the_gateway() {
    let upstream = Upstream::start(|_, reply| {
        reply.send(
            200,
            &[
                ("Connection", "keep-alive, X-Private"),
                ("Keep-Alive", "timeout=5"),
                ("X-Private", "1"),
                ("X-Own", "2"),
            ],
            b"",
        );
    });
    let gateway = Gateway::start(&config("", &[&upstream]));
    let answer = get(
        gateway.address(),
        "/svc/mdl/x",
        &["Proxy-Authorization: Basic x", "TE: trailers", "Keep-Alive: 5", "X-Kept: yes"],
    );
    let seen = upstream.last();
    for gone in ["connection", "proxy-authorization", "te", "keep-alive"] {
        assert!(!seen.has(gone), "{gone} reached the backend");
    }
    assert_eq!(seen.header("x-kept"), "yes");
    assert_eq!(seen.header("host"), upstream.address().to_string());
    assert_eq!(
        (answer.header("x-private"), answer.header("keep-alive")),
        (String::new(), String::new())
    );
    assert_eq!(answer.header("x-own"), "2");
}

#[test]
fn a_client_cannot_nominate_the_gateways_own_headers_away() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("api_key: sk-1", &[&upstream]));
    let answer = send(
        gateway.address(),
        "GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\nX-API-Key: sk-1\r\nConnection: close, authorization, x-request-id\r\n\r\n",
    );
    assert_eq!(answer.status, 200);
    let seen = upstream.last();
    assert_eq!(seen.header("authorization"), "Bearer sk-1");
    assert_eq!(seen.header("x-request-id"), answer.header("x-request-id"));
}

#[test]
fn every_response_has_a_request_id_and_the_backend_gets_it() {
    let upstream = Upstream::start(|_, reply| reply.send(200, &[("X-Request-ID", "own")], b""));
    let gateway = Gateway::start(&config("", &[&upstream]));
    let answer = get(gateway.address(), "/svc/mdl/x", &["X-Request-ID: req-1.A_b:c"]);
    assert_eq!(answer.header("x-request-id"), "req-1.A_b:c");
    assert_eq!(upstream.last().header("x-request-id"), "req-1.A_b:c");
    let too_long = format!("X-Request-ID: {}", "a".repeat(129));
    for insane in
        ["X-Request-ID: a b", "X-Request-ID: <script>", "X-Request-ID: ", too_long.as_str()]
    {
        let answer = get(gateway.address(), "/svc/mdl/x", &[insane]);
        let id = answer.header("x-request-id");
        assert_eq!(id.len(), 32, "{insane}: {id}");
        assert_eq!(upstream.last().header("x-request-id"), id);
    }
    for path in ["/health", "/nope/x", "/", "/svc/mdl/../x"] {
        assert!(!get(gateway.address(), path, &[]).header("x-request-id").is_empty(), "{path}");
    }
}

#[test]
fn forwarded_headers_are_believed_only_from_trusted_proxies() {
    let upstream = Upstream::named("x");
    let claims = [
        "X-Forwarded-For: 203.0.113.7",
        "X-Forwarded-Proto: https",
        "X-Forwarded-Host: public",
        "Forwarded: for=1.2.3.4",
        "X-Real-IP: 1.2.3.4",
    ];
    let gateway = Gateway::start(&config("", &[&upstream]));
    get(gateway.address(), "/svc/mdl/x", &claims);
    let seen = upstream.last();
    assert_eq!(seen.header("x-forwarded-for"), "127.0.0.1");
    assert_eq!(seen.header("x-forwarded-proto"), "http");
    assert_eq!(seen.header("x-forwarded-host"), "gateway");
    assert!(!seen.has("forwarded") && !seen.has("x-real-ip"));
    let gateway = Gateway::start(&config("trusted_proxies: [127.0.0.0/8]", &[&upstream]));
    get(gateway.address(), "/svc/mdl/x", &claims);
    let seen = upstream.last();
    assert_eq!(seen.header("x-forwarded-for"), "203.0.113.7, 127.0.0.1");
    assert_eq!(seen.header("x-forwarded-proto"), "https");
    assert_eq!(seen.header("x-forwarded-host"), "public");
    assert_eq!(seen.header("x-real-ip"), "1.2.3.4");
}

#[test]
fn an_http_1_0_client_gets_a_body_without_chunks() {
    let upstream = Upstream::start(|_, reply| {
        reply.begin("text/event-stream");
        reply.chunk(b"data: 1\n\n");
        reply.chunk(b"data: 2\n\n");
        reply.end();
    });
    let gateway = Gateway::start(&config("", &[&upstream]));
    let answer = send(gateway.address(), "GET /svc/mdl/x HTTP/1.0\r\n\r\n");
    assert_eq!((answer.version.as_str(), answer.status), ("HTTP/1.0", 200));
    assert_eq!(answer.header("transfer-encoding"), "");
    assert_eq!(answer.text(), "data: 1\n\ndata: 2\n\n");
    assert_eq!(upstream.last().header("host"), upstream.address().to_string());
}

#[test]
fn expect_100_continue_is_answered_once_the_request_is_admitted() {
    let upstream = Upstream::named("done");
    let gateway = Gateway::start(&config("api_key: sk-1", &[&upstream]));
    let head = |key: &str| {
        format!(
            "POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nX-API-Key: {key}\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
        )
    };
    let mut connection = Connection::open(gateway.address());
    connection.write(head("sk-1").as_bytes()).unwrap();
    assert_eq!(connection.read(true).unwrap().status, 100);
    connection.write(b"body").unwrap();
    let answer = connection.read(false).unwrap();
    assert_eq!(
        (answer.text().as_str(), answer.header("connection").as_str()),
        ("done", "keep-alive")
    );
    assert_eq!(upstream.last().body, b"body");
    assert!(!upstream.last().has("expect"));
    let mut connection = Connection::open(gateway.address());
    connection.write(head("wrong").as_bytes()).unwrap();
    assert_eq!(connection.read(false).unwrap().status, 401);
    assert!(connection.is_closed());
}

#[test]
fn one_connection_carries_many_exchanges_also_after_a_refusal() {
    let upstream = Upstream::named("ok");
    let gateway = Gateway::start(&config("", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    for (path, status) in
        [("/svc/mdl/a", 200), ("/nope/x", 404), ("/svc/mdl/b", 200), ("/health", 200)]
    {
        connection.write(format!("GET {path} HTTP/1.1\r\nHost: g\r\n\r\n").as_bytes()).unwrap();
        assert_eq!(connection.read(false).unwrap().status, status, "{path}");
    }
}

#[test]
fn a_refusal_reaches_a_client_that_is_still_sending() {
    let upstream = Upstream::named("ok");
    let gateway = Gateway::start(&config("api_key: sk-1", &[&upstream]));
    let length = 3 * 1024 * 1024;
    let mut connection = Connection::open(gateway.address());
    let head = format!("POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: {length}\r\n\r\n");
    connection.write(head.as_bytes()).unwrap();
    connection.write(&vec![b'x'; length]).expect("it may send all of it");
    let answer = connection.read(false).unwrap();
    assert_eq!((answer.status, answer.complete), (401, true));
    assert_eq!(answer.header("connection"), "close");
    // A reset could take the answer away from a client that is slower to read.
    assert_eq!(connection.into_body().read(&mut [0]).ok(), Some(0), "the end is not clean");
}

#[test]
fn requests_that_are_sent_ahead_are_answered_in_order() {
    let upstream = Upstream::start(|seen, reply| {
        if seen.target == b"/slow" {
            std::thread::park_timeout(std::time::Duration::from_millis(200));
        }
        reply.text(&seen.target());
    });
    let gateway = Gateway::start(&config("", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    let post = |path: &str| {
        format!("POST /svc/mdl{path} HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n\r\n{{}}")
    };
    connection.write(post("/slow").as_bytes()).unwrap();
    crate::harness::eventually("the first is at the backend", || !upstream.seen().is_empty());
    connection.write((post("/second") + &post("/third")).as_bytes()).unwrap();
    for path in ["/slow", "/second", "/third"] {
        assert_eq!(connection.read(false).unwrap().text(), path);
    }
}

#[test]
fn a_refusal_reaches_a_client_that_was_told_to_go_on() {
    let mut upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("health_check: {interval: 1h}", &[&upstream]));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    upstream.kill();
    let mut connection = Connection::open(gateway.address());
    let length = 3 * 1024 * 1024;
    let head = format!(
        "POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: {length}\r\nExpect: 100-continue\r\n\r\n"
    );
    connection.write(head.as_bytes()).unwrap();
    assert_eq!(connection.read(true).unwrap().status, 100);
    let _ = connection.write(&vec![b'x'; length]);
    let answer = connection.read(false).unwrap();
    assert_eq!((answer.status, answer.complete), (503, true));
}

#[test]
fn a_redirect_to_the_backend_becomes_one_to_its_pool() {
    let upstream = Upstream::start(|seen, reply| {
        let own = format!("http://{}/base/v1/models/", seen.header("host"));
        let location = match seen.target.ends_with(b"/away") {
            true => "https://elsewhere.example/x",
            false => own.as_str(),
        };
        reply.send(307, &[("Location", location)], b"");
    });
    let url = upstream.url();
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\nservices: {{svc: {{models: {{a/b: {{backends: [{{id: a, url: \"{url}/base\"}}]}}}}}}}}"
    ));
    let location = |path| get(gateway.address(), path, &[]).header("location");
    assert_eq!(location("/svc/a%2Fb/v1/models"), "/svc/a%2Fb/v1/models/");
    assert_eq!(location("/svc/a/b/away"), "https://elsewhere.example/x");
}

#[test]
fn a_switch_of_protocols_that_nobody_asked_for_is_a_502() {
    let upstream = Upstream::start(|_, reply| {
        reply.raw(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nRAW",
        );
    });
    let gateway = Gateway::start(&config("", &[&upstream]));
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 502);
}

#[test]
fn lengths_and_cookies_in_pieces_are_put_together() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("", &[&upstream]));
    let answer = send(
        gateway.address(),
        "POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nCookie: a=1\r\nCookie: b=2\r\nContent-Length: 3, 3\r\n\r\nabc",
    );
    assert_eq!(answer.status, 200);
    let seen = upstream.last();
    assert_eq!(
        (seen.header("content-length"), seen.header("cookie")),
        ("3".into(), "a=1; b=2".into())
    );
    assert_eq!(seen.body, b"abc");
}
