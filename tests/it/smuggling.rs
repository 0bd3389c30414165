//! Requests that two parsers would read differently: each is refused, or reaches the backend as exactly
//! one request that nobody can misread.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::harness::{Gateway, PATIENCE, Upstream, config, get};

/// What may become of a request.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// Refused with this status; with 400, the connection is closed.
    Refused(u16),
    /// It arrives with this body.
    Arrives(&'static str),
}
use Fate::{Arrives, Refused};

const HIDDEN: &str = "GET /svc/mdl/hidden HTTP/1.1\r\nHost: g\r\n\r\n";

/// Sends `request` on a connection of its own, and reads what comes until it is closed, or quiet.
fn answers(gateway: &Gateway, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(gateway.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = stream.write_all(request);
    let mut answers = Vec::new();
    let mut part = [0; 4096];
    loop {
        match stream.read(&mut part) {
            Ok(0) => answers.extend(b"(closed)"),
            Ok(count) => {
                answers.extend(&part[..count]);
                stream.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
                continue;
            }
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock) => {}
            Err(_) => answers.extend(b"(closed)"),
        }
        return String::from_utf8_lossy(&answers).into_owned();
    }
}

/// Each request, what stands after it on the connection, and its fate.
fn check(cases: &[(&str, String, Fate)]) {
    let upstream = Upstream::start(|seen, reply| {
        reply.text(&format!("{} {}", seen.target(), seen.body_bytes));
    });
    let gateway = Gateway::start(&config("", &[&upstream]));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    let mut wrong = Vec::new();
    for (name, request, fate) in cases {
        let before = upstream.seen().len();
        let answers = answers(&gateway, request.as_bytes());
        let seen = upstream.seen().split_off(before);
        let is_right = match fate {
            Refused(status) => {
                seen.is_empty()
                    && answers.starts_with(&format!("HTTP/1.1 {status} "))
                    && answers.matches("HTTP/1.1").count() == 1
                    && (*status != 400 || answers.ends_with("(closed)"))
            }
            Arrives(body) => {
                answers.starts_with("HTTP/1.1 200 ")
                    && answers.matches("HTTP/1.1").count() == 1
                    && seen.len() == 1
                    && matches!(seen[0].target().as_str(), "/x" | "/x%20y")
                    && seen[0].body == body.as_bytes()
                    && !(seen[0].has("content-length") && seen[0].has("transfer-encoding"))
                    && matches!(seen[0].header("transfer-encoding").as_str(), "" | "chunked")
            }
        };
        if !is_right {
            wrong.push(format!("{name}: not {fate:?} but\n{answers}\nthe backend saw {seen:?}\n"));
        }
        // Nothing of it is left on a connection to the backend.
        let next = get(gateway.address(), "/svc/mdl/next", &[]);
        assert_eq!((next.status, next.text().as_str()), (200, "/next 0"), "after {name}");
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

/// A POST to `/x` with these header lines, and what follows its head.
fn post(lines: &str, rest: &str) -> String {
    format!("POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\n{lines}\r\n\r\n{rest}")
}

#[test]
fn length_and_chunks_in_one_request() {
    let both = "Content-Length: 4\r\nTransfer-Encoding: chunked";
    let turned = "Transfer-Encoding: chunked\r\nContent-Length: 4";
    check(&[
        ("CL.TE", post(both, &format!("0\r\n\r\n{HIDDEN}")), Arrives("")),
        ("CL.TE, turned", post(turned, &format!("0\r\n\r\n{HIDDEN}")), Arrives("")),
        (
            "TE.CL",
            post(both, "1a\r\nGET /svc/mdl/hidden HTTP/1\r\n0\r\n\r\n"),
            Arrives("GET /svc/mdl/hidden HTTP/1"),
        ),
        (
            "CL.0",
            post("Content-Length: 0\r\nTransfer-Encoding: chunked", &format!("0\r\n\r\n{HIDDEN}")),
            Arrives(""),
        ),
        (
            "GET with chunks",
            format!(
                "GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n{HIDDEN}"
            ),
            Arrives(""),
        ),
    ]);
}

#[test]
fn transfer_encodings_in_disguise() {
    let chunks = format!("0\r\n\r\n{HIDDEN}");
    let of = |line: &str| post(&format!("{line}\r\nContent-Length: 4"), &chunks);
    check(&[
        (
            "TE.TE, identity last",
            of("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity"),
            Refused(400),
        ),
        (
            "TE.TE, identity first",
            of("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked"),
            Refused(400),
        ),
        (
            "TE.TE, twice",
            of("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
            Refused(400),
        ),
        ("list", of("Transfer-Encoding: chunked, chunked"), Refused(400)),
        ("identity", of("Transfer-Encoding: identity"), Refused(400)),
        ("quoted", of("Transfer-Encoding: \"chunked\""), Refused(400)),
        ("parameter", of("Transfer-Encoding: chunked;x=1"), Refused(400)),
        ("misspelled", of("Transfer-Encoding: cnuhked"), Refused(400)),
        ("empty", of("Transfer-Encoding:"), Refused(400)),
        ("vertical tab", of("Transfer-Encoding: \x0bchunked"), Refused(400)),
        ("null", of("Transfer-Encoding: chunked\0"), Refused(400)),
        ("space before colon", of("Transfer-Encoding : chunked"), Refused(400)),
        ("tab before colon", of("Transfer-Encoding\t: chunked"), Refused(400)),
        ("folded", of("Transfer-Encoding:\r\n chunked"), Refused(400)),
        ("folded into another", of("X: y\r\n Transfer-Encoding: chunked"), Refused(400)),
        ("after a bare CR", of("X: y\rTransfer-Encoding: chunked"), Refused(400)),
        ("capitals", post("TRANSFER-ENCODING: Chunked", "3\r\nabc\r\n0\r\n\r\n"), Arrives("abc")),
        (
            "tab after colon",
            post("Transfer-Encoding:\tchunked", "3\r\nabc\r\n0\r\n\r\n"),
            Arrives("abc"),
        ),
    ]);
}

#[test]
fn lengths_in_disguise() {
    let of = |line: &str| post(line, "abcd");
    check(&[
        ("plus", of("Content-Length: +4"), Refused(400)),
        ("minus", of("Content-Length: -4"), Refused(400)),
        ("hexadecimal", of("Content-Length: 0x4"), Refused(400)),
        ("exponent", of("Content-Length: 4e0"), Refused(400)),
        ("inner space", of("Content-Length: 4 4"), Refused(400)),
        ("empty", of("Content-Length:"), Refused(400)),
        ("too large", of("Content-Length: 18446744073709551616"), Refused(400)),
        ("list", of("Content-Length: 4, 5"), Refused(400)),
        ("list of equals", of("Content-Length: 4, 4"), Arrives("abcd")),
        ("two", of("Content-Length: 4\r\nContent-Length: 5"), Refused(400)),
        ("two that are zero first", of("Content-Length: 0\r\nContent-Length: 4"), Refused(400)),
        ("two equals", of("Content-Length: 4\r\nContent-Length: 4"), Arrives("abcd")),
        ("space before colon", of("Content-Length : 4"), Refused(400)),
        ("folded", of("Content-Length:\r\n 4"), Refused(400)),
        ("null", of("Content-Length: 4\0"), Refused(400)),
        ("form feed", of("Content-Length: \x0c4"), Refused(400)),
        ("other digits", of("Content-Length: \u{664}"), Refused(400)),
        ("leading zeros", of("Content-Length: 0004"), Arrives("abcd")),
        ("spaces around", of("Content-Length:   4  "), Arrives("abcd")),
    ]);
}

#[test]
fn chunks_in_disguise() {
    let of = |chunks: &str| post("Transfer-Encoding: chunked", chunks);
    check(&[
        ("extension", of("3;a=b\r\nabc\r\n0;c\r\n\r\n"), Arrives("abc")),
        ("quoted extension", of("3;a=\"b;\\\"c\"\r\nabc\r\n0\r\n\r\n"), Arrives("abc")),
        ("extension with a bare LF", of(&format!("3;\nabc\r\n0\r\n\r\n{HIDDEN}")), Refused(400)),
        ("extension with a bare CR", of("3;a\rb\r\nabc\r\n0\r\n\r\n"), Refused(400)),
        (
            "endless extension",
            of(&format!("3;{}\r\nabc\r\n0\r\n\r\n", "a".repeat(1 << 20))),
            Refused(400),
        ),
        ("size with bare LF", of("3\nabc\r\n0\r\n\r\n"), Refused(400)),
        ("data with bare LF", of("3\r\nabc\n0\r\n\r\n"), Refused(400)),
        ("hexadecimal prefix", of("0x3\r\nabc\r\n0\r\n\r\n"), Refused(400)),
        ("plus", of("+3\r\nabc\r\n0\r\n\r\n"), Refused(400)),
        ("minus", of("-3\r\nabc\r\n0\r\n\r\n"), Refused(400)),
        ("underscore", of("0_3\r\nabc\r\n0\r\n\r\n"), Refused(400)),
        ("space first", of(" 3\r\nabc\r\n0\r\n\r\n"), Refused(400)),
        ("no size", of(&format!("\r\n{HIDDEN}")), Arrives("")),
        ("no size, then a blank line", of(&format!("\r\n\r\n{HIDDEN}")), Arrives("")),
        ("no size after a chunk", of(&format!("3\r\nabc\r\n\r\n\r\n{HIDDEN}")), Arrives("abc")),
        ("no size but an extension", of(&format!(";a\r\n\r\n{HIDDEN}")), Arrives("")),
        ("too large", of("fffffffffffffffff\r\nabc\r\n0\r\n\r\n"), Refused(400)),
        ("more data than said", of("3\r\nabcde\r\n0\r\n\r\n"), Refused(400)),
        ("capitals", of("A\r\n0123456789\r\n0\r\n\r\n"), Arrives("0123456789")),
        ("zeros", of("003\r\nabc\r\n000\r\n\r\n"), Arrives("abc")),
        (
            "trailers",
            of("3\r\nabc\r\n0\r\nContent-Length: 9\r\nHost: evil\r\n\r\n"),
            Arrives("abc"),
        ),
    ]);
}

#[test]
fn lines_in_disguise() {
    let head = |head: &str| head.to_owned();
    check(&[
        ("bare LF everywhere", head("GET /svc/mdl/x HTTP/1.1\nHost: g\n\n"), Arrives("")),
        (
            "bare LF after a header",
            head("GET /svc/mdl/x HTTP/1.1\r\nHost: g\nX: y\r\n\r\n"),
            Arrives(""),
        ),
        ("bare LF at the end", head("GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\n"), Arrives("")),
        (
            "bare CR in a value",
            head("GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\nX: a\rb\r\n\r\n"),
            Refused(400),
        ),
        (
            "folded header",
            head("GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\nX: a\r\n b\r\n\r\n"),
            Refused(400),
        ),
        ("folded first header", head("GET /svc/mdl/x HTTP/1.1\r\n Host: g\r\n\r\n"), Refused(400)),
        ("folded host", head("GET /svc/mdl/x HTTP/1.1\r\nHost:\r\n g\r\n\r\n"), Refused(400)),
        ("two hosts", head("GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\nHost: g\r\n\r\n"), Refused(400)),
        ("two spaces", head("GET  /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n"), Refused(404)),
        ("tabs", head("GET\t/svc/mdl/x\tHTTP/1.1\r\nHost: g\r\n\r\n"), Refused(400)),
        ("space in the target", head("GET /svc/mdl/x y HTTP/1.1\r\nHost: g\r\n\r\n"), Arrives("")),
        ("no version", head("GET /svc/mdl/x\r\nHost: g\r\n\r\n"), Refused(400)),
        ("version 1.2", head("GET /svc/mdl/x HTTP/1.2\r\nHost: g\r\n\r\n"), Refused(400)),
        ("method with a colon", head("GE:T /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n"), Refused(400)),
        (
            "header without a name",
            head("GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n: y\r\n\r\n"),
            Refused(400),
        ),
        (
            "header name with bytes above 127",
            head("GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\nX\u{e9}: y\r\n\r\n"),
            Refused(400),
        ),
    ]);
}

#[test]
fn a_change_of_protocols_hides_nothing() {
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket";
    let http2 = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA";
    check(&[
        ("not changed", post(&format!("{upgrade}\r\nContent-Length: 3"), "abc"), Arrives("abc")),
        ("to HTTP/2", post(&format!("{http2}\r\nContent-Length: 3"), "abc"), Arrives("abc")),
        (
            "with chunks",
            post(&format!("{upgrade}\r\nTransfer-Encoding: chunked"), "3\r\nabc\r\n0\r\n\r\n"),
            Arrives("abc"),
        ),
        (
            "to TLS",
            post("Connection: Upgrade\r\nUpgrade: TLS/1.0\r\nContent-Length: 3", "abc"),
            Arrives("abc"),
        ),
    ]);
    // A backend that says it has changed, though nobody asked: the client is not left alone with it.
    let upstream = Upstream::start(|_, reply| {
        reply.raw(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhidden");
    });
    let gateway = Gateway::start(&config("", &[&upstream]));
    let answers = answers(&gateway, post("Content-Length: 3", "abc").as_bytes());
    assert!(answers.starts_with("HTTP/1.1 502 ") && !answers.contains("hidden"), "{answers}");
}

#[test]
fn a_client_cannot_nominate_our_own_headers() {
    let upstream = Upstream::named("x");
    let url = upstream.url();
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\napi_key: client\nservices: {{svc: {{models: {{mdl: {{backends: [{{id: a, url: \"{url}\", api_key: sk-backend}}]}}}}}}}}\n"
    ));
    let names = [
        "Host",
        "Content-Length",
        "Transfer-Encoding",
        "Authorization",
        "X-API-Key",
        "X-Request-ID",
        "X-Forwarded-For",
        "X-Forwarded-Host",
        "X-Forwarded-Proto",
    ];
    let mut arrived = 0;
    for name in names {
        for nominated in
            [name.to_owned(), format!("close, {name}"), format!("x\r\nConnection: {name}")]
        {
            let before = upstream.seen().len();
            let lines =
                format!("X-API-Key: client\r\nConnection: {nominated}\r\nContent-Length: 3");
            let answers = answers(&gateway, post(&lines, "abc").as_bytes());
            let seen = upstream.seen().split_off(before);
            // A nomination that would take away what the request stands on is refused.
            let is_refused = answers.starts_with("HTTP/1.1 400 ") && seen.is_empty();
            assert!(is_refused || answers.starts_with("HTTP/1.1 200 "), "{nominated}: {answers}");
            for seen in seen {
                arrived += 1;
                assert_eq!(seen.body, b"abc");
                assert_eq!(seen.header("authorization"), "Bearer sk-backend");
                assert_eq!(seen.header("host"), upstream.address().to_string());
                for ours in &names[5..] {
                    assert!(!seen.header(ours).is_empty(), "{ours} is gone with {nominated:?}");
                }
                assert!(!seen.has("x-api-key"), "{seen:?}");
            }
        }
    }
    assert!(arrived > 0, "all were refused");
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
}

/// A request over HTTP/2 whose header fields are written as they are, without any look at them.
fn http2(fields: &[(&str, &str)], data: Option<&str>) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        // A literal that is not indexed, with a new name (RFC 7541, section 6.2.2).
        block.push(0);
        block.push(u8::try_from(name.len()).unwrap());
        block.extend(name.as_bytes());
        block.push(u8::try_from(value.len()).unwrap());
        block.extend(value.as_bytes());
    }
    let ends = u8::from(data.is_none());
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    bytes.extend(frame(1, 4 | ends, 1, &block));
    if let Some(data) = data {
        bytes.extend(frame(0, 1, 1, data.as_bytes()));
    }
    bytes
}

/// A POST over HTTP/2 with these fields in place of, or beside, those of a plain one.
fn with(fields: &[(&str, &str)], data: Option<&str>) -> Vec<u8> {
    let plain =
        [(":method", "POST"), (":scheme", "http"), (":path", "/svc/mdl/x"), (":authority", "g")];
    let mut all = plain.to_vec();
    for field in fields {
        match all.iter_mut().find(|(known, _)| *known == field.0) {
            Some(known) => *known = *field,
            None => all.push(*field),
        }
    }
    http2(&all, data)
}

fn echo() -> (Upstream, Gateway) {
    let upstream = Upstream::start(|seen, reply| reply.text(&seen.target()));
    let gateway = Gateway::start(&config("", &[&upstream]));
    gateway.wait_backend("svc/mdl", "a", "healthy");
    (upstream, gateway)
}

#[test]
fn nothing_that_http_2_can_carry_becomes_two_requests_of_http_1() {
    let (upstream, gateway) = echo();
    let hidden = "y\r\n\r\nGET /hidden HTTP/1.1\r\nHost: g\r\n\r\n";
    let refused: [(&str, Vec<u8>); 17] = [
        ("another host beside the authority", with(&[("host", "evil")], Some("abc"))),
        ("line end in a value", with(&[("x", hidden)], None)),
        ("line end in a name", with(&[("x: y\r\nz", "y")], None)),
        ("line feed in a value", with(&[("x", "a\nTransfer-Encoding: chunked")], None)),
        ("null in a value", with(&[("x", "a\0b")], None)),
        ("colon in a name", with(&[("transfer-encoding: chunked", "")], None)),
        ("space in a name", with(&[("x y", "z")], None)),
        ("capitals in a name", with(&[("Content-Length", "3")], Some("abc"))),
        (
            "line end in the path",
            with(&[(":path", "/svc/mdl/x HTTP/1.1\r\nX: y\r\n\r\nGET /hidden")], None),
        ),
        (
            "space in the method",
            with(&[(":method", "GET /hidden HTTP/1.1\r\nHost: g\r\n\r\nGET")], None),
        ),
        ("line end in the authority", with(&[(":authority", "g\r\nX: y")], None)),
        (
            "chunks",
            with(
                &[("transfer-encoding", "chunked")],
                Some("0\r\n\r\nGET /hidden HTTP/1.1\r\n\r\n"),
            ),
        ),
        ("a connection header", with(&[("connection", "x-request-id")], None)),
        ("an upgrade", with(&[("upgrade", "websocket")], None)),
        ("a length that is too long", with(&[("content-length", "60")], Some("abc"))),
        ("a length that is none", with(&[("content-length", "+3")], Some("abc"))),
        ("no path", http2(&[(":method", "GET"), (":scheme", "http"), (":authority", "g")], None)),
    ];
    for (name, bytes) in &refused {
        answers(&gateway, bytes);
        let seen = upstream.seen();
        assert!(seen.is_empty(), "{name}: the backend saw {seen:?}");
    }
}

#[test]
fn what_only_looks_odd_over_http_2_arrives_as_one_request() {
    let (upstream, gateway) = echo();
    // What is more than was said never leaves.
    answers(
        &gateway,
        &with(&[("content-length", "0")], Some("GET /hidden HTTP/1.1\r\nHost: g\r\n\r\n")),
    );
    for seen in upstream.seen() {
        assert_eq!((seen.target().as_str(), seen.body_bytes), ("/x", 0));
    }
    for (name, bytes) in [
        ("a length", with(&[("content-length", "3")], Some("abc"))),
        ("a space in the path", with(&[(":path", "/svc/mdl/x%20y")], Some("abc"))),
    ] {
        let before = upstream.seen().len();
        answers(&gateway, &bytes);
        let seen = upstream.seen().split_off(before);
        assert_eq!(seen.len(), 1, "{name}: {seen:?}");
        assert_eq!(seen[0].body, b"abc", "{name}");
        assert_eq!(seen[0].header("host"), upstream.address().to_string(), "{name}");
        assert_eq!(get(gateway.address(), "/svc/mdl/next", &[]).text(), "/next", "after {name}");
    }
}
