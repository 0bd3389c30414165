//! Bad input: a clear status each, never a crash, never a wrong backend.

use crate::harness::{Connection, Gateway, Upstream, config, get, send};

/// The statuses and what the other upstream saw of a raw request.
#[track_caller]
fn refused(gateway: &Gateway, request: impl AsRef<[u8]>, statuses: &[u16]) {
    let request = request.as_ref();
    let answer = send(gateway.address(), request);
    let shown = String::from_utf8_lossy(&request[..request.len().min(120)]).into_owned();
    assert!(statuses.contains(&answer.status), "{} for {shown:?}", answer.status);
}

#[test]
fn bad_input_gets_a_clear_status_and_reaches_no_backend() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("", &[&upstream]));
    let get_with = |line: &str| format!("GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n{line}\r\n\r\n");
    let post_with = |line: &str, body: &str| {
        format!("POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\n{line}\r\n\r\n{body}")
    };
    // Not HTTP at all.
    refused(&gateway, b"\x00\x01\x02\x03\xff\xfe garbage \r\n\r\n", &[400]);
    refused(&gateway, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", &[400]);
    refused(&gateway, "GET\r\n\r\n", &[400]);
    refused(&gateway, "GET /svc/mdl/x HTTP/9.9\r\nHost: g\r\n\r\n", &[400]);
    refused(&gateway, "TRACE /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n", &[405]);
    refused(&gateway, "CONNECT g:443 HTTP/1.1\r\nHost: g\r\n\r\n", &[405]);
    // Headers.
    refused(&gateway, get_with("No-Colon"), &[400]);
    refused(&gateway, get_with("Na me: x"), &[400]);
    refused(&gateway, get_with("X: a\0b"), &[400]);
    refused(&gateway, get_with("Host: two"), &[400]);
    refused(&gateway, "GET /svc/mdl/x HTTP/1.1\r\n\r\n", &[400]);
    refused(&gateway, "GET /svc/mdl/x HTTP/1.1\r\nHost: a b/../?\r\n\r\n", &[400]);
    refused(&gateway, get_with(&format!("X: {}", "a".repeat(70 * 1024))), &[431]);
    refused(&gateway, get_with(&format!("X: {}", "a".repeat(1024 * 1024))), &[400, 431]);
    refused(&gateway, get_with(&"X: 1\r\n".repeat(400)), &[400, 431]);
    // Targets.
    refused(
        &gateway,
        format!("GET /svc/mdl/{} HTTP/1.1\r\nHost: g\r\n\r\n", "a".repeat(9000)),
        &[414],
    );
    for path in [
        "/svc/mdl/../x",
        "/svc/../svc/mdl",
        "/svc/mdl/%2e%2E/x",
        "/svc/mdl/..%5cx",
        "/svc/mdl/%00",
        "/svc/mdl/./x",
    ] {
        refused(&gateway, format!("GET {path} HTTP/1.1\r\nHost: g\r\n\r\n"), &[400]);
    }
    refused(&gateway, b"GET /svc/mdl/\x00 HTTP/1.1\r\nHost: g\r\n\r\n", &[400]);
    refused(&gateway, b"GET /svc/mdl/\xff\xfe HTTP/1.1\r\nHost: g\r\n\r\n", &[400]);
    refused(&gateway, "GET //svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n", &[404]);
    refused(&gateway, "OPTIONS * HTTP/1.1\r\nHost: g\r\n\r\n", &[404]);
    refused(&gateway, "GET svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n", &[400, 404]);
    // Framing.
    refused(&gateway, post_with("Content-Length: -1", "x"), &[400]);
    refused(&gateway, post_with("Content-Length: 1, 2", "x"), &[400]);
    refused(&gateway, post_with("Content-Length: 1\r\nContent-Length: 2", "x"), &[400]);
    refused(&gateway, post_with("Transfer-Encoding: gzip, chunked", "0\r\n\r\n"), &[400]);
    refused(&gateway, post_with("Transfer-Encoding: chunked, gzip", "0\r\n\r\n"), &[400]);
    refused(&gateway, post_with("Transfer-Encoding: xchunked", "0\r\n\r\n"), &[400]);
    refused(
        &gateway,
        "POST /svc/mdl/x HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        &[400],
    );
    assert!(upstream.seen().is_empty(), "the backend saw {:?}", upstream.seen());
    // And it still serves.
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
}

#[test]
fn a_body_with_bad_chunks_is_a_400() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("", &[&upstream]));
    let head = "POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n";
    for chunks in ["zz\r\nabc\r\n0\r\n\r\n", "-1\r\n\r\n", "ffffffffffffffffff\r\nabc\r\n"] {
        refused(&gateway, format!("{head}{chunks}"), &[400]);
    }
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
}

#[test]
fn of_length_and_chunks_in_one_request_the_chunks_count_and_nothing_is_smuggled() {
    let upstream =
        Upstream::start(|seen, reply| reply.text(&format!("{} {}", seen.method, seen.target())));
    let gateway = Gateway::start(&config("", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection
        .write(b"POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /svc/mdl/smuggled HTTP/1.1\r\nHost: g\r\n\r\n")
        .unwrap();
    let answer = connection.read(false).unwrap_or_default();
    assert!(matches!(answer.status, 200 | 400), "{}", answer.status);
    // RFC 9112, section 6.1: the connection ends after such a request.
    assert!(connection.is_closed());
    for seen in upstream.seen() {
        assert_ne!(seen.target(), "/smuggled");
        assert!(!(seen.has("content-length") && seen.has("transfer-encoding")), "{seen:?}");
    }
}

#[test]
fn an_absolute_target_is_routed_by_its_path_and_its_authority_chooses_nothing() {
    let upstream = Upstream::named("here");
    let other = Upstream::named("there");
    let gateway = Gateway::start(&config("", &[&upstream]));
    let there = other.address();
    let answer = send(
        gateway.address(),
        format!("GET http://{there}/svc/mdl/v1/x?a=1 HTTP/1.1\r\nHost: {there}\r\n\r\n"),
    );
    assert_eq!((answer.status, answer.text().as_str()), (200, "here"));
    let seen = upstream.last();
    assert_eq!(
        (seen.target(), seen.header("host")),
        ("/v1/x?a=1".into(), upstream.address().to_string())
    );
    assert!(other.seen().is_empty());
}

#[test]
fn names_that_no_service_has_are_404_and_say_how_paths_look() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("", &[&upstream]));
    for (path, code) in [
        ("/nope/mdl/x", "service_not_found"),
        ("/svc/nope/x", "model_not_found"),
        ("/SVC/mdl/x", "service_not_found"),
        ("/svc", "not_found"),
        ("/favicon.ico", "service_not_found"),
    ] {
        let answer = get(gateway.address(), path, &[]);
        assert_eq!(
            (answer.status, answer.json()["error"]["code"].as_str()),
            (404, Some(code)),
            "{path}"
        );
    }
    assert!(upstream.seen().is_empty());
}

#[test]
fn a_client_that_stalls_in_its_body_gets_a_408() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("client: {body_timeout: 300ms}", &[&upstream]));
    let answer = send(
        gateway.address(),
        "POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nhalf",
    );
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].as_str()),
        (408, Some("body_timeout"))
    );
    assert!(upstream.seen().is_empty(), "the backend took half a request for a whole one");
}

#[test]
fn a_slow_answer_is_not_taken_for_a_slow_body() {
    let upstream = Upstream::start(|_, reply| {
        std::thread::park_timeout(std::time::Duration::from_millis(700));
        reply.text("late");
    });
    let gateway = Gateway::start(&config("client: {body_timeout: 200ms}", &[&upstream]));
    let answer = crate::harness::post(gateway.address(), "/svc/mdl/x", &[], "body");
    assert_eq!((answer.status, answer.text().as_str()), (200, "late"));
}

#[test]
fn a_connection_that_says_nothing_is_closed() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("client: {idle_timeout: 1s}", &[&upstream]));
    assert!(Connection::open(gateway.address()).is_closed(), "without a first byte");
    let mut beginning = Connection::open(gateway.address());
    beginning.write(b"P").unwrap();
    assert!(beginning.is_closed(), "after what may become HTTP/2");
    let mut kept = Connection::open(gateway.address());
    kept.write(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    assert_eq!(kept.read(false).unwrap().status, 200);
    assert!(kept.is_closed(), "between two requests");
}

#[test]
fn a_request_shorter_than_an_http_2_preface_is_answered() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("", &[&upstream]));
    let answer = send(gateway.address(), "GET /health HTTP/1.0\r\n\r\n");
    assert_eq!(answer.status, 200);
    for method in ["PUT", "PRI", "PROPFIND"] {
        let answer = send(gateway.address(), format!("{method} / HTTP/1.0\r\n\r\n"));
        assert!(matches!(answer.status, 400 | 405), "{method}: {}", answer.status);
    }
}

#[test]
fn an_http_2_client_that_takes_nothing_of_its_answer_is_let_go() {
    let upstream = Upstream::start(move |_, reply| {
        reply.begin("application/octet-stream");
        let piece = vec![b'x'; 64 * 1024];
        while reply.chunk(&piece) {}
    });
    let settings = "client: {write_timeout: 500ms}\ndeadlines: {exchange: 1h}";
    let gateway = Gateway::start(&config(settings, &[&upstream]));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = crate::harness::http2(gateway.address()).await;
        let request = http::Request::get("http://g/svc/mdl/x").body(()).unwrap();
        let (answer, _stream) = client.send_request(request, true).unwrap();
        // Its window is full, and stays so.
        let _answer = answer.await.unwrap();
        let noticed = async {
            while gateway.inflight() > 0 {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(crate::harness::PATIENCE, noticed).await.expect("it is let go");
    });
}

#[test]
fn a_client_that_takes_nothing_of_its_answer_is_let_go() {
    let (gone, is_gone) = std::sync::mpsc::channel();
    let gone = std::sync::Mutex::new(gone);
    let upstream = Upstream::start(move |_, reply| {
        reply.begin("application/octet-stream");
        let piece = vec![b'x'; 64 * 1024];
        while reply.chunk(&piece) {}
        let _ = gone.lock().unwrap().send(());
    });
    let gateway = Gateway::start(&config("client: {write_timeout: 500ms}", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    // The client reads nothing; the backend has endlessly much to say.
    is_gone.recv_timeout(crate::harness::PATIENCE).expect("the backend is let go");
    crate::harness::eventually("nothing is in flight", || {
        get(gateway.address(), "/ready", &[]).json()["in_flight"] == 0
    });
}
