//! The OpenAI front door: the pool is found from the request itself.

use std::io::Write;

use crate::harness::{
    Answer, Connection, Gateway, Model, Reply, Seen, Upstream, eventually, get, http2, post,
    run_program, send, services,
};

/// A configuration with models of one service, with more top-level lines before it.
fn models(top: &str, models: &[Model<'_>]) -> String {
    services(top, &[("svc", models)])
}

const CHAT: &str = "/v1/chat/completions";
const JSON: &str = "Content-Type: application/json";
const FORM: &str = "Content-Type: multipart/form-data; boundary=XX";

fn code(answer: &Answer) -> (u16, String) {
    let code = answer.json()["error"]["code"].as_str().unwrap_or_default().to_owned();
    (answer.status, code)
}

fn chunked(path: &str, headers: &[&str], pieces: &[&[u8]]) -> Vec<u8> {
    let lines: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: g\r\n{lines}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    );
    let mut request = head.into_bytes();
    for piece in pieces {
        request.extend(format!("{:x}\r\n", piece.len()).bytes());
        request.extend(*piece);
        request.extend(b"\r\n");
    }
    request.extend(b"0\r\n\r\n");
    request
}

fn field(name: &str, value: &str) -> String {
    format!("--XX\r\nContent-Disposition: form-data; {name}\r\n\r\n{value}\r\n")
}

#[test]
fn the_pool_is_found_by_the_model_wherever_a_body_names_it() {
    let (one, two) = (Upstream::named("one"), Upstream::named("two"));
    let gateway = Gateway::start(&models("", &[Model("m1", &[&one]), Model("m2", &[&two])]));
    let to = gateway.address();
    let prompt = "lorem \\\"ipsum\\\" ".repeat(70_000);
    let last = format!(
        "{{\"messages\":[{{\"content\":\"{prompt}\",\"model\":\"m1\"}}],\"model\":\"m2\"}}"
    );
    let file = field("name=\"file\"; filename=\"a.wav\"", &"RIFF".repeat(50_000));
    for (path, kind, body) in [
        (CHAT, JSON, "{\"model\":\"m2\"}".to_owned()),
        (CHAT, JSON, "{\"mod\\u0065l\" : \"m\\u0032\"}".to_owned()),
        (CHAT, JSON, last),
        ("/v1/embeddings", "X: y", "{\"input\":[1,2],\"model\":\"m2\"}".to_owned()),
        ("/v1/messages", JSON, "{\"max_tokens\":1,\"messages\":[],\"model\":\"m2\"}".to_owned()),
        ("/v1/rerank", JSON, "{\"model\":\"m2\"}".to_owned()),
        ("/v1/realtime/client_secrets", JSON, "{\"session\":{\"model\":\"m2\"}}".to_owned()),
        (
            "/v1/audio/transcriptions",
            FORM,
            format!("{}{file}--XX--\r\n", field("name=\"model\"", "m2")),
        ),
        ("/v1/images/edits", FORM, format!("{file}{}--XX--\r\n", field("name=\"model\"", "m2"))),
    ] {
        let answer = post(to, path, &[kind], &body);
        assert_eq!((answer.status, answer.text().as_str()), (200, "two"), "{path} {body:.60}");
        assert_eq!(answer.header("x-tollgate-model"), "svc/m2");
        let seen = two.last();
        assert_eq!((seen.target().as_str(), seen.body_bytes), (path, body.len()));
        assert_eq!(seen.body, body.as_bytes());
        let pieces: Vec<&[u8]> = body.as_bytes().chunks(20_000).collect();
        let answer = send(to, chunked(path, &[kind], &pieces));
        assert_eq!((answer.status, answer.text().as_str()), (200, "two"), "{path} {body:.60}");
        assert_eq!(two.last().body, body.as_bytes());
    }
    for path in
        ["/v1beta/models/m2:generateContent?alt=sse", "/openai/deployments/m2/chat/completions"]
    {
        assert_eq!(post(to, path, &[JSON], "{\"model\":\"m1\"}").text(), "two", "{path}");
        assert_eq!(two.last().target(), path);
    }
    assert_eq!(post(to, "/openai/v1/responses", &[JSON], "{\"model\":\"m2\"}").text(), "two");
    assert_eq!(two.last().target(), "/v1/responses");
    assert!(one.seen().is_empty());
}

#[test]
fn a_body_that_names_no_one_model_is_refused_in_its_apis_form() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&models("", &[Model("m", &[&upstream])]));
    let to = gateway.address();
    for (body, status, error) in [
        ("{\"model\":\"m\",\"model\":\"m\"}", 400, "model_ambiguous"),
        ("{\"model\":\"m\",\"MODEL\":\"x\"}", 400, "model_ambiguous"),
        ("{\"model\":\"m\"", 400, "invalid_body"),
        ("{\"model\":\"m\"} x", 400, "invalid_body"),
        ("model=m", 400, "invalid_body"),
        ("[]", 400, "invalid_body"),
        ("{\"model\":7}", 400, "invalid_body"),
        ("{\"messages\":[]}", 400, "model_required"),
        ("{\"model\":null}", 400, "model_required"),
        ("{\"model\":\"\"}", 400, "model_required"),
        ("", 400, "model_required"),
        ("{\"model\":\"nope\"}", 404, "model_not_found"),
        ("{\"model\":\"svc/nope\"}", 404, "model_not_found"),
    ] {
        assert_eq!(code(&post(to, CHAT, &[JSON], body)), (status, error.to_owned()), "{body}");
        let answer =
            send(to, chunked(CHAT, &[JSON], &[body.as_bytes()][..usize::from(!body.is_empty())]));
        assert_eq!(code(&answer), (status, error.to_owned()), "chunked {body}");
    }
    let twice = format!("{0}{0}--XX--\r\n", field("name=\"model\"", "m"));
    let answer = post(to, "/v1/audio/transcriptions", &[FORM], twice);
    assert_eq!(code(&answer), (400, "model_ambiguous".to_owned()));
    let answer = post(to, "/v1/messages", &[JSON], "{\"model\":\"nope\"}");
    assert_eq!(answer.json()["error"]["type"], "not_found_error");
    assert_eq!(answer.json()["error"]["message"], "there is no model \"nope\"");
    let answer = get(to, "/v1/realtime?model=m&model=m", &[]);
    assert_eq!(code(&answer), (400, "model_ambiguous".to_owned()));
    assert_eq!(code(&get(to, "/v1/files", &[])), (400, "model_required".to_owned()));
    assert_eq!(code(&get(to, "/v9/files", &[])).0, 404);
    assert!(upstream.seen().is_empty());
}

#[test]
fn a_compressed_body_is_looked_into_and_passed_on_as_it_came() {
    let upstream = Upstream::named("x");
    let gateway =
        Gateway::start(&models("replay: {body_bytes_max: 1MiB}", &[Model("m", &[&upstream])]));
    let to = gateway.address();
    let body = format!("{{\"input\":\"{}\",\"model\":\"m\"}}", "text ".repeat(1000));
    let zstd = zstd::encode_all(body.as_bytes(), 3).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(body.as_bytes()).unwrap();
    let gzip = gzip.finish().unwrap();
    for (coding, bytes) in [("zstd", &zstd), ("gzip", &gzip)] {
        let answer =
            post(to, "/v1/responses", &[JSON, &format!("Content-Encoding: {coding}")], bytes);
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(upstream.last().header("content-encoding"), coding);
        assert_eq!(&upstream.last().body, bytes);
    }
    let answer = post(to, CHAT, &[JSON, "Content-Encoding: compress"], &gzip);
    assert_eq!(code(&answer), (415, "unsupported_encoding".to_owned()));
    assert_eq!(answer.header("accept-encoding"), "gzip, deflate, br, zstd");
    let answer = post(to, CHAT, &[JSON, "Content-Encoding: zstd"], &gzip);
    assert_eq!(code(&answer), (400, "invalid_body".to_owned()));
    let bomb = zstd::encode_all(&vec![b' '; 100 << 20][..], 3).unwrap();
    let answer = post(to, CHAT, &[JSON, "Content-Encoding: zstd"], bomb);
    assert_eq!(code(&answer), (413, "body_too_large".to_owned()));
    assert!(gateway.peak_memory_mib() < 60, "{} MiB", gateway.peak_memory_mib());
}

#[test]
fn a_body_too_large_to_be_held_passes_when_its_beginning_or_a_header_names_the_model() {
    let upstream = Upstream::start(|seen, reply| reply.text(&seen.body_bytes.to_string()));
    let top = "replay: {body_bytes_max: 64KiB}\naliases: {other: m}";
    let gateway = Gateway::start(&models(top, &[Model("m", &[&upstream])]));
    let to = gateway.address();
    let prompt = "x".repeat(300_000);
    let first = format!("{{\"model\":\"m\",\"messages\":\"{prompt}\"}}");
    let last = format!("{{\"messages\":\"{prompt}\",\"model\":\"m\"}}");
    let whole = (200, first.len().to_string());
    let pieces = |body: &'static str| body.as_bytes().chunks(10_000).collect::<Vec<_>>();
    let (first, last) = (&*first.leak(), &*last.leak());
    for request in [
        post(to, CHAT, &[JSON], first),
        send(to, chunked(CHAT, &[JSON], &pieces(first))),
        post(to, CHAT, &[JSON, "X-Tollgate-Model: m"], last),
        send(to, chunked(CHAT, &[JSON, "X-Tollgate-Model: m"], &pieces(last))),
    ] {
        assert_eq!((request.status, request.text()), whole);
        assert!(!upstream.last().has("x-tollgate-model"));
    }
    for request in [post(to, CHAT, &[JSON], last), send(to, chunked(CHAT, &[JSON], &pieces(last)))]
    {
        assert_eq!(code(&request), (413, "body_too_large".to_owned()), "{}", request.text());
    }
    // Another name is put in its place, with the length to it.
    let renamed = first.replacen("\"m\"", "\"other\"", 1);
    let answer = post(to, CHAT, &[JSON], &renamed);
    assert_eq!((answer.status, answer.text()), whole);
    assert_eq!(upstream.last().header("content-length"), first.len().to_string());
    assert_eq!(upstream.last().body, first.as_bytes());
    let renamed = renamed.leak();
    let answer = send(to, chunked(CHAT, &[JSON], &pieces(renamed)));
    assert_eq!((answer.status, answer.text()), whole);
    assert_eq!(upstream.last().body, first.as_bytes());
}

#[test]
fn a_second_model_in_the_part_that_is_not_held_stops_the_request() {
    let upstream = Upstream::start(|seen, reply| reply.text(&seen.body_bytes.to_string()));
    let top = "replay: {body_bytes_max: 64KiB}";
    let gateway = Gateway::start(&models(top, &[Model("m", &[&upstream])]));
    let prompt = "x".repeat(300_000);
    let body = format!("{{\"model\":\"m\",\"messages\":\"{prompt}\",\"model\":\"n\"}}");
    let answer = post(gateway.address(), CHAT, &[JSON], body);
    assert_eq!(code(&answer), (400, "model_ambiguous".to_owned()));
    eventually("the gateway is done with it", || gateway.inflight() == 0);
    assert!(upstream.seen().is_empty(), "the backend had the whole of it");
}

#[test]
fn what_names_no_model_goes_where_a_header_or_a_default_says() {
    let (one, two) = (Upstream::named("one"), Upstream::named("two"));
    let top = "default_model: m1\ndefault_service: files";
    let gateway = Gateway::start(&services(
        top,
        &[("svc", &[Model("m1", &[&one])]), ("files", &[Model("m2", &[&two])])],
    ));
    let to = gateway.address();
    let form = format!("{}--XX--\r\n", field("name=\"file\"; filename=\"f\"", "{}"));
    let with_model = format!("{}{form}", field("name=\"model\"", "m1"));
    for (answer, expected) in [
        (post(to, "/v1/moderations", &[JSON], "{\"input\":\"x\"}"), "one"),
        (get(to, "/v1/files", &[]), "two"),
        (get(to, "/v1/responses/r1?stream=true", &[]), "two"),
        (post(to, "/v1/responses/r1/cancel", &[], ""), "two"),
        (post(to, "/v1/files", &[FORM], &form), "two"),
        (post(to, "/v1/files", &[FORM], &with_model), "one"),
        (get(to, "/v1/files", &["X-Tollgate-Model: m1"]), "one"),
        (get(to, "/v1/files", &["X-Tollgate-Model: svc/m1"]), "one"),
        (send(to, "DELETE /v1/batches/b HTTP/1.1\r\nHost: g\r\n\r\n"), "two"),
    ] {
        assert_eq!((answer.status, answer.text().as_str()), (200, expected));
    }
    // The backend is told which model it is.
    assert_eq!(one.seen()[0].body, b"{\"model\":\"m1\",\"input\":\"x\"}");
    let zipped = zstd::encode_all(&b" {}"[..], 3).unwrap();
    for (body, headers, sent) in [
        (&b"{\"model\":null,\"a\":1}"[..], &[JSON][..], "{\"model\":\"m1\",\"a\":1}"),
        (b"{\"a\":1,\"model\":\"\"}", &[JSON], "{\"a\":1,\"model\":\"m1\"}"),
        (&zipped, &[JSON, "Content-Encoding: zstd"], " {\"model\":\"m1\"}"),
        (form.as_bytes(), &[FORM], &format!("{}{form}", field("name=\"model\"", "m1"))),
        (b"", &[JSON], ""),
    ] {
        assert_eq!(post(to, "/v1/audio/transcriptions", headers, body).text(), "one");
        let seen = one.last();
        assert_eq!(String::from_utf8_lossy(&seen.body), sent);
        assert_eq!(seen.header("content-length"), sent.len().to_string());
    }
    assert_eq!(code(&get(to, "/v1/files", &["X-Tollgate-Model: no"])).0, 404);
    // Also into one that is not held; a default service names no model.
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(60_000));
    let answer = send(to, chunked("/v1/moderations", &[JSON], &[large.as_bytes()]));
    assert_eq!(answer.text(), "one");
    assert_eq!(one.last().body, large.replacen('{', "{\"model\":\"m1\",", 1).as_bytes());
    let url = one.url();
    let text = services("default_service: svc", &[("svc", &[Model("m1", &[&one])])])
        .replace(&format!("url: \"{url}\""), &format!("url: \"{url}\", model: own"));
    let gateway = Gateway::start(&text);
    assert_eq!(post(gateway.address(), "/v1/moderations", &[JSON], "{}").text(), "one");
    assert_eq!(one.last().body, b"{}");
    // An upload of any kind and size goes there as it is.
    let file = "x".repeat(1_500_000);
    let file = format!("{}--XX--\r\n", field("name=\"file\"; filename=\"f\"", &file));
    let request = chunked("/v1/files", &[FORM], &[file.as_bytes()]);
    assert_eq!(send(gateway.address(), request).text(), "one");
    let odd = "--XX\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n--XX--\r\n";
    for headers in [&[FORM][..], &[FORM, "Content-Encoding: x"]] {
        assert_eq!(post(gateway.address(), "/v1/files", headers, odd).text(), "one");
    }
}

#[test]
fn a_model_is_called_at_a_backend_what_it_is_called_there() {
    let echo = |seen: &Seen, reply: &mut Reply| {
        reply.send(
            200,
            &[("X-Target", &seen.target()), ("X-Length", &seen.header("content-length"))],
            &seen.body,
        );
    };
    let (plain, own, wild) = (Upstream::start(echo), Upstream::start(echo), Upstream::start(echo));
    let top = "aliases: {gpt-4o: plain, \"claude-*\": own, Voll: \"gpt-3.5-turbo\"}";
    let mut text =
        models(top, &[Model("plain", &[&plain]), Model("own", &[&own]), Model("gpt-3*", &[&wild])]);
    let url = own.url();
    text = text.replace(
        &format!("{{id: a, url: \"{url}\"}}"),
        &format!("{{id: a, url: \"{url}/v1\", model: \"org/o\\\"n\"}}"),
    );
    let gateway = Gateway::start(&text);
    let to = gateway.address();
    let body =
        |model: &str| format!("{{ \"a\":1e0, \"model\" :\t{model} ,\"b\":\"\\u00e9 model\"}}");
    for (asked, sent, target) in [
        ("\"plain\"", "\"plain\"", CHAT),
        ("\"pl\\u0061in\"", "\"pl\\u0061in\"", CHAT),
        ("\"gpt-4o\"", "\"plain\"", CHAT),
        ("\"svc/plain\"", "\"plain\"", CHAT),
        ("\"own\"", "\"org/o\\\"n\"", "/v1/chat/completions"),
        ("\"claude-5-sonnet\"", "\"org/o\\\"n\"", "/v1/chat/completions"),
        ("\"gpt-3.5\"", "\"gpt-3.5\"", CHAT),
        ("\"svc/gpt-3.5\"", "\"gpt-3.5\"", CHAT),
        ("\"Voll\"", "\"gpt-3.5-turbo\"", CHAT),
    ] {
        let answer = post(to, CHAT, &[JSON], body(asked));
        assert_eq!(answer.text(), body(sent), "{asked}");
        assert_eq!(answer.header("x-target"), target);
        assert_eq!(answer.header("x-length"), body(sent).len().to_string());
    }
    // By path too, and where the name stands in the path or in a form.
    assert_eq!(
        post(to, "/svc/own/chat/completions", &[JSON], body("\"x\"")).text(),
        body("\"org/o\\\"n\"")
    );
    assert_eq!(post(to, "/svc/own/embeddings", &[JSON], "not json").text(), "not json");
    assert_eq!(post(to, "/svc/gpt-3.5/v1/x", &[JSON], body("\"x\"")).text(), body("\"x\""));
    let answer = post(to, "/v1beta/models/claude-1:generateContent?alt=sse", &[JSON], "{}");
    assert_eq!(answer.header("x-target"), "/v1/models/org%2Fo%22n:generateContent?alt=sse");
    let form = |model: &str| format!("{}--XX--\r\n", field("name=\"model\"", model));
    assert_eq!(post(to, "/v1/images/edits", &[FORM], form("gpt-4o")).text(), form("plain"));
    // A compressed body has to be sent plain then.
    let zstd = zstd::encode_all(body("\"gpt-4o\"").as_bytes(), 3).unwrap();
    let answer = post(to, CHAT, &[JSON, "Content-Encoding: zstd"], zstd);
    assert_eq!(answer.text(), body("\"plain\""));
    assert!(!plain.last().has("content-encoding"));
}

#[test]
fn another_model_is_asked_when_one_cannot_serve() {
    let (mut down, broken) =
        (Upstream::named("down"), Upstream::start(|_, reply| reply.send(503, &[], b"no")));
    let spare = Upstream::start(|seen, reply| reply.send(200, &[], &seen.body));
    let top =
        "retry: {retries_max: 1, delay: 1ms}\nfallbacks: {first: [second, third], \"*\": third}";
    let gateway = Gateway::start(&models(
        top,
        &[Model("first", &[&down]), Model("second", &[&broken]), Model("third", &[&spare])],
    ));
    let to = gateway.address();
    assert_eq!(
        post(to, CHAT, &[JSON], "{\"model\":\"first\"}").header("x-tollgate-model"),
        "svc/first"
    );
    down.kill();
    let answer = post(to, CHAT, &[JSON], "{\"model\":\"first\"}");
    assert_eq!((answer.status, answer.text().as_str()), (200, "{\"model\":\"third\"}"));
    assert_eq!(answer.header("x-tollgate-model"), "svc/third");
    assert_eq!(broken.last().body, b"{\"model\":\"second\"}");
    // By path as well; the body's own name is put in its place there too.
    let answer = post(to, "/svc/second/v1/embeddings", &[JSON], "{\"model\":\"s\"}");
    assert_eq!(
        (answer.text().as_str(), answer.header("x-tollgate-model").as_str()),
        ("{\"model\":\"third\"}", "svc/third")
    );
    // The last one's own answer is the answer. Its first check is over: the next one comes after the test.
    gateway.wait_backend("svc/third", "a", "healthy");
    drop(spare);
    let answer = post(to, CHAT, &[JSON], "{\"model\":\"second\"}");
    assert_eq!(code(&answer), (503, "no_backend".to_owned()), "{}", answer.text());
}

#[test]
fn a_name_that_a_wildcard_stands_for_can_have_fallbacks_of_its_own() {
    let mut down = Upstream::named("down");
    let (one, two) = (Upstream::named("one"), Upstream::named("two"));
    let top = "fallbacks: {\"*\": one, gpt-4o: one, \"gpt-4*\": two, claude-x: one}\naliases: {\"claude*\": gpt-4-a}";
    let pools = [Model("gpt-4*", &[&down]), Model("one", &[&one]), Model("two", &[&two])];
    let gateway = Gateway::start(&models(top, &pools));
    down.kill();
    for (name, answer) in
        [("gpt-4o", "one"), ("gpt-4-turbo", "two"), ("claude-x", "one"), ("claude", "two")]
    {
        let body = format!("{{\"model\":\"{name}\"}}");
        assert_eq!(post(gateway.address(), CHAT, &[JSON], body).text(), answer, "{name}");
    }
    for (name, answer) in [("gpt-4o", "one"), ("gpt-4-turbo", "two")] {
        let path = format!("/svc/{name}/v1/chat/completions");
        assert_eq!(post(gateway.address(), &path, &[JSON], "{}").text(), answer, "{name}");
    }
}

#[test]
fn fallbacks_by_service_and_name_reach_the_service_that_they_name() {
    let mut google = Upstream::start(|seen, reply| reply.send(200, &[], &seen.body));
    let (other, spare) = (Upstream::named("other"), Upstream::named("spare"));
    let top = "fallbacks: {google/gpt-4o: m2}\naliases: {fast: google/gpt-4o}\ndefault_model: google/gpt-4o";
    let text = services(
        top,
        &[
            ("google", &[Model("gpt-*", &[&google])]),
            ("other", &[Model("*", &[&other]), Model("m2", &[&spare])]),
        ],
    );
    let gateway = Gateway::start(&text);
    let ask = |path: &str, model: &str| post(gateway.address(), path, &[JSON], model).text();
    let named = |model: &str| format!("{{\"model\":\"{model}\"}}");
    let path = "/google/gpt-4o/v1/chat/completions";
    assert_eq!(ask(CHAT, &named("google/gpt-4o")), named("gpt-4o"));
    assert_eq!(ask(CHAT, &named("google/gpt-5")), named("gpt-5"));
    google.kill();
    for body in [&named("google/gpt-4o"), &named("gpt-4o"), &named("fast"), "{}"] {
        assert_eq!(ask(CHAT, body), "spare", "{body}");
    }
    assert_eq!(ask(path, "{}"), "spare");
    assert_ne!(ask(CHAT, &named("google/gpt-5")), "spare");
}

#[test]
fn a_body_that_only_a_fallback_would_have_changed_is_refused_by_nobody() {
    let (first, spare) =
        (Upstream::start(|seen, reply| reply.send(200, &[], &seen.body)), Upstream::named("spare"));
    let top = "fallbacks: {\"*\": m2}\nreplay: {body_bytes_max: 64KiB}";
    let gateway = Gateway::start(&models(top, &[Model("m1", &[&first]), Model("m2", &[&spare])]));
    let to = gateway.address();
    let header = "X-Tollgate-Model: m1";
    let late = format!("{{\"x\":\"{}\",\"model\":\"m1\"}}", "x".repeat(100_000));
    let zipped = zstd::encode_all(&late.as_bytes()[..40_000], 3).unwrap();
    let large = "x".repeat(100_000);
    let cases: [(&str, &[&str], &[u8]); 5] = [
        (CHAT, &[JSON, header], late.as_bytes()),
        ("/svc/m1/generate", &[JSON], late.as_bytes()),
        ("/svc/m1/generate", &[JSON, "Content-Encoding: x"], b"{}"),
        ("/svc/m1/v1/chat/completions", &[JSON, "Content-Encoding: zstd"], &zipped),
        ("/svc/m1/batch", &[], b"{\"a\":1}\n{\"a\":2}\n"),
    ];
    for (path, headers, body) in cases {
        let answer = post(to, path, headers, body);
        assert_eq!((answer.status, &answer.body[..]), (200, body), "{path}");
    }
    assert_eq!(post(to, "/svc/m1/blobs", &[], &large).text().len(), large.len());
    // A second service with the model needs no other name.
    let top = "fallbacks: {m: x}\nhealth_check: {interval: 1h, unhealthy_after: 100}";
    let text = services(
        top,
        &[("a", &[Model("m", &[&spare]), Model("x", &[&spare])]), ("b", &[Model("m", &[&first])])],
    );
    let text = text.replacen(&spare.url(), "http://127.0.0.1:1", 1);
    let second = Gateway::start(&text);
    let twice = "{\"a\":1}{\"b\":2}";
    assert_eq!(post(second.address(), CHAT, &[JSON, "X-Tollgate-Model: m"], twice).text(), twice);
    // The other one is not asked for what may name the first.
    drop(first);
    assert_eq!(post(to, "/svc/m1/generate", &[JSON], &late).status, 503);
    assert_eq!(post(to, "/svc/m1/generate", &[JSON], "{\"model\":\"m1\"}").text(), "spare");
}

#[test]
fn azures_paths_lead_to_the_front_door_also_where_a_service_has_their_name() {
    let (any, model) = (Upstream::named("any"), Upstream::named("model"));
    let text =
        services("", &[("openai", &[Model("*", &[&any])]), ("svc", &[Model("m", &[&model])])]);
    let gateway = Gateway::start(&text);
    let to = gateway.address();
    assert_eq!(
        post(to, "/openai/v1/chat/completions", &[JSON], "{\"model\":\"m\"}").text(),
        "model"
    );
    assert_eq!(post(to, "/openai/deployments/m/chat/completions", &[JSON], "{}").text(), "model");
    assert_eq!(post(to, "/openai/gpt-5/v1/chat/completions", &[JSON], "{}").text(), "any");
}

#[test]
fn a_model_that_cannot_serve_either_is_not_asked() {
    let (limited, mut down) = (
        Upstream::start(|_, reply| reply.send(429, &[("X-Own", "yes")], b"{}")),
        Upstream::named("down"),
    );
    down.kill();
    let spare = Upstream::named("spare");
    let top = "retry: {retries_max: 2, delay: 1ms}\nhealth_check: {unhealthy_after: 1}\n\
               breaker: {enabled: false}\nfallbacks: {limited: down, \"other\": [down, spare]}";
    let pools = [
        Model("limited", &[&limited]),
        Model("down", &[&down]),
        Model("other", &[&limited]),
        Model("spare", &[&spare]),
    ];
    let gateway = Gateway::start(&models(top, &pools));
    gateway.wait_backend("svc/down", "a", "unhealthy");
    let to = gateway.address();
    // It is tried as often as without fallbacks, and its own answer is the answer.
    let answer = post(to, CHAT, &[JSON], "{\"model\":\"limited\"}");
    assert_eq!((answer.status, answer.header("x-own").as_str()), (429, "yes"));
    assert_eq!(limited.seen().len(), 3);
    // The next one that can serve is.
    let answer = post(to, CHAT, &[JSON], "{\"model\":\"other\"}");
    assert_eq!(
        (answer.text().as_str(), answer.header("x-tollgate-model").as_str()),
        ("spare", "svc/spare")
    );
    // Nobody is there: the client is told about the model that it asked for.
    drop((limited, spare));
    let answer = post(to, CHAT, &[JSON], "{\"model\":\"other\"}");
    assert!(answer.status == 503 && answer.text().contains("svc/other"), "{}", answer.text());
}

#[test]
fn no_other_model_is_asked_for_what_the_first_has_answered() {
    let refuses = Upstream::start(|_, reply| reply.send(400, &[], b"{}"));
    let breaks = Upstream::start(|_, reply| {
        reply.begin("text/event-stream");
        reply.chunk(b"data: 1\n\n");
        reply.cut();
    });
    let spare = Upstream::named("spare");
    let top = "fallbacks: {\"*\": spare}";
    let gateway = Gateway::start(&models(
        top,
        &[Model("refuses", &[&refuses]), Model("breaks", &[&breaks]), Model("spare", &[&spare])],
    ));
    let to = gateway.address();
    assert_eq!(post(to, CHAT, &[JSON], "{\"model\":\"refuses\"}").status, 400);
    let answer = post(to, CHAT, &[JSON], "{\"model\":\"breaks\"}");
    assert!(answer.text().contains("data: 1") && answer.text().contains("stream_interrupted"));
    assert!(spare.seen().is_empty());
}

#[test]
fn of_two_services_with_a_model_the_second_serves_when_the_first_cannot() {
    let (one, two) = (Upstream::named("one"), Upstream::named("two"));
    let both = |top: &str| {
        services(top, &[("one", &[Model("m", &[&one])]), ("two", &[Model("m", &[&two])])])
    };
    let (first, default) = (both(""), both("default_service: two"));
    let body = "{\"model\":\"m\"}";
    let gateway = Gateway::start(&first);
    assert_eq!(post(gateway.address(), CHAT, &[JSON], body).text(), "one");
    let whole = "{\"model\":\"two/m\"}";
    assert_eq!(post(gateway.address(), CHAT, &[JSON], whole).text(), "two");
    let gateway = Gateway::start(&default);
    assert_eq!(post(gateway.address(), CHAT, &[JSON], body).text(), "two");
    drop(two);
    let answer = post(gateway.address(), CHAT, &[JSON], body);
    assert_eq!((answer.text().as_str(), &*answer.header("x-tollgate-model")), ("one", "one/m"));
}

#[test]
fn an_http2_body_without_a_length_finds_its_way() {
    let upstream = Upstream::start(|seen, reply| reply.text(&seen.body_bytes.to_string()));
    let gateway = Gateway::start(&models("", &[Model("m", &[&upstream])]));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ask = |body: Vec<u8>, pieces: usize| {
        runtime.block_on(async {
            let mut client = http2(gateway.address()).await;
            let request = http::Request::post(format!("http://g{CHAT}")).body(()).unwrap();
            let (answer, mut stream) = client.send_request(request, false).unwrap();
            let length = body.len();
            for (at, piece) in body.chunks(length.div_ceil(pieces)).enumerate() {
                stream.send_data(piece.to_vec().into(), at + 1 == pieces).unwrap();
            }
            let answer = answer.await.unwrap();
            let status = answer.status().as_u16();
            let mut body = answer.into_body();
            let mut text = Vec::new();
            while let Some(chunk) = body.data().await {
                let chunk = chunk.unwrap();
                body.flow_control().release_capacity(chunk.len()).unwrap();
                text.extend(chunk);
            }
            (status, String::from_utf8(text).unwrap())
        })
    };
    let first =
        |length| format!("{{\"model\":\"m\",\"x\":\"{}\"}}", "x".repeat(length)).into_bytes();
    for length in [10, 40_000, 60_000, 200_000, 3_000_000] {
        let body = first(length);
        let whole = (200, body.len().to_string());
        assert_eq!(ask(body, 3), whole, "{length}");
    }
    // Its end has come before its model was found, and is not kept.
    let last = format!("{{\"x\":\"{}\",\"model\":\"m\"}}", "x".repeat(200_000)).into_bytes();
    let (status, text) = ask(last, 1);
    assert!(status == 411 && text.contains("Content-Length"), "{status} {text}");
}

#[test]
fn models_are_listed_in_the_form_of_the_clients_api() {
    let mut upstream = Upstream::named("x");
    let other = Upstream::named("y");
    let top = "api_key: sk-1\naliases: {gpt-4o: a/b, \"claude-*\": m}";
    let text = services(
        top,
        &[
            (
                "one",
                &[Model("m", &[&upstream]), Model("a/b", &[&upstream]), Model("g*", &[&upstream])],
            ),
            ("two", &[Model("m", &[&other])]),
        ],
    );
    let gateway = Gateway::start(&text);
    let to = gateway.address();
    let key = "Authorization: Bearer sk-1";
    let list = get(to, "/v1/models", &[key]).json();
    assert_eq!(list["object"], "list");
    let ids = |list: &serde_json::Value, key: &str, id: &str| -> Vec<String> {
        let items = list[key].as_array().unwrap().iter();
        items.map(|model| model[id].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids(&list, "data", "id"), ["m", "a/b", "gpt-4o"]);
    let first = &list["data"][0];
    assert_eq!((&first["object"], &first["owned_by"]), (&"model".into(), &"one".into()));
    assert!(first["created"].as_u64().unwrap() > 1_700_000_000);
    for (path, id) in [
        ("/v1/models/m", "m"),
        ("/v1/models/a%2Fb", "a/b"),
        ("/openai/v1/models/a/b", "a/b"),
        ("/v1/models/claude-x", "claude-x"),
        ("/v1/models/g-1", "g-1"),
    ] {
        assert_eq!(get(to, path, &[key]).json()["id"], id, "{path}");
    }
    assert_eq!(code(&get(to, "/v1/models/nope", &[key])), (404, "model_not_found".to_owned()));
    assert_eq!(get(to, "/v1/models", &[]).status, 401);
    let anthropic = [key, "anthropic-version: 2023-06-01"];
    let list = get(to, "/v1/models", &anthropic).json();
    assert_eq!(ids(&list, "data", "id"), ["m", "a/b", "gpt-4o"]);
    assert_eq!((&list["first_id"], &list["has_more"]), (&"m".into(), &false.into()));
    assert_eq!(list["data"][0]["type"], "model");
    let answer = get(to, "/v1/models/nope", &anthropic).json();
    assert_eq!(
        (&answer["type"], &answer["error"]["type"]),
        (&"error".into(), &"not_found_error".into())
    );
    assert!(!answer["request_id"].as_str().unwrap().is_empty());
    let list = get(to, "/v1beta/models", &["x-goog-api-key: sk-1"]).json();
    assert_eq!(ids(&list, "models", "name")[0], "models/m");
    assert!(upstream.seen().is_empty());
    // Only what can be served, where that is wanted.
    let only_healthy = "models_listed: healthy\nhealth_check: {interval: 100ms}\napi_key";
    let gateway = Gateway::start(&text.replacen("api_key", only_healthy, 1));
    upstream.kill();
    eventually("only the second service has models", || {
        ids(&get(gateway.address(), "/v1/models", &[key]).json(), "data", "id") == ["m"]
    });
}

#[test]
fn an_upstream_url_alone_is_a_configuration() {
    let upstream = Upstream::start(|seen, reply| {
        if seen.target() == "/health" {
            reply.send(404, &[], b"");
        } else {
            reply.send(200, &[("X-Key", &seen.header("authorization"))], &seen.body);
        }
    });
    let url = format!("{}/v1", upstream.url());
    let folder = tempfile::tempdir().unwrap();
    let variables = [
        ("UPSTREAM_URL", url.as_str()),
        ("PORT", "0"),
        ("HOST", "127.0.0.1"),
        ("HEALTH_CHECK_INTERVAL", "0.1"),
    ];
    let gateway = Gateway::start_in(folder, &variables, &["serve"]);
    let to = gateway.address();
    for (path, target) in
        [("/v1/models", "/v1/models"), ("/v1/chat/completions?a=1", "/v1/chat/completions?a=1")]
    {
        let answer = post(to, path, &["Authorization: Bearer mine"], "whatever it is");
        assert_eq!((answer.status, answer.text().as_str()), (200, "whatever it is"), "{path}");
        assert_eq!(answer.header("x-key"), "Bearer mine");
        assert_eq!(upstream.last().target(), target);
    }
    assert_eq!(get(to, "/v1/models", &[]).text(), "");
    assert_eq!(upstream.last().target(), "/v1/models");
    assert_eq!(get(to, "/", &["Accept: */*"]).json()["service"], "tollgate");
    for json in ["Accept: application/json, text/html;q=0.1", "Accept: text/html;q=0"] {
        assert_eq!(get(to, "/", &[json]).json()["service"], "tollgate");
    }
    let page = get(to, "/", &["Accept: Text/HTML,application/xhtml+xml"]);
    assert!(page.header("content-type").starts_with("text/html"));
    let status = get(to, "/api/health/status", &[]).json();
    assert!(
        status["data"]["upstream"]["all"][0]["url"].as_str().unwrap().starts_with(&upstream.url())
    );
    eventually("its 404 passes for health", || {
        get(to, "/api/health/status", &[]).json()["data"]["upstream"]["all"][0]["status"]
            == "healthy"
    });
    let seen = upstream.seen().len();
    for path in ["/v2/x", "/upstream/all/admin", "/metrics/x"] {
        assert_eq!(get(to, path, &[]).status, 404, "{path}");
    }
    assert_eq!(upstream.seen().len(), seen, "only what is under /v1 goes there");
}

#[test]
fn with_an_upstream_url_the_other_variables_hold() {
    let upstream = Upstream::start(|seen, reply| reply.text(&seen.header("x-api-key")));
    let url = upstream.url();
    let variables = [
        ("UPSTREAM_URL", url.as_str()),
        ("PORT", "0"),
        ("HOST", "127.0.0.1"),
        ("BACKEND_API_KEY", "sk-1"),
        ("BACKEND_AUTH_MODE", "x-api-key"),
    ];
    let gateway = Gateway::start_in(tempfile::tempdir().unwrap(), &variables, &["serve"]);
    assert_eq!(get(gateway.address(), "/v1/models", &[]).status, 401);
    let answer = get(gateway.address(), "/v1/models", &["Authorization: Bearer sk-1"]);
    assert_eq!(answer.text(), "sk-1");
    let folder = tempfile::tempdir().unwrap();
    let run = |url| {
        let output = run_program(folder.path(), &[("UPSTREAM_URL", url)], &["check"]);
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, out, _) = run("http://user:pass@h/base");
    assert_eq!(
        (code, out.as_str()),
        (
            Some(0),
            "UPSTREAM_URL: fine (services: 1, models: 1, backends: 1, limits: 1; with the defaults of a backends.json)\n"
        )
    );
    let (code, _, err) = run("ftp://h");
    assert_eq!(code, Some(78));
    assert!(err.contains("UPSTREAM_URL: \"ftp\" is no scheme for a backend"), "{err}");
}

#[test]
fn no_byte_is_lost_of_a_body_just_over_what_is_held() {
    let upstream = Upstream::start(|seen, reply| reply.text(&format!("{:x}", seen.hash)));
    let top = "replay: {body_bytes_max: 128KiB}\ndefault_service: svc\naliases: {other: m}";
    let gateway = Gateway::start(&models(top, &[Model("m", &[&upstream])]));
    let to = gateway.address();
    let hash = |body: &str| format!("{:x}", xxhash_rust::xxh3::xxh3_64(body.as_bytes()));
    for over in [1, 100, 40_000, 65_535, 65_536, 65_537, 90_000] {
        // A form without a model goes by default; a model at the end is found with the last piece or not.
        let file = "x".repeat(128 * 1024 + over - 200);
        let form = format!("{}--XX--\r\n", field("name=\"file\"; filename=\"f\"", &file));
        let answer = post(to, "/v1/files", &[FORM], &form);
        assert_eq!((answer.status, answer.text()), (200, hash(&form)), "{over}");
        let first = format!("{{\"model\":\"m\",\"x\":\"{file}\"}}");
        let answer = post(to, CHAT, &[JSON], &first);
        assert_eq!((answer.status, answer.text()), (200, hash(&first)), "{over}");
        let renamed = first.replacen("\"m\"", "\"other\"", 1);
        let answer = post(to, CHAT, &[JSON], &renamed);
        assert_eq!((answer.status, answer.text()), (200, hash(&first)), "{over}");
        let last = format!("{{\"x\":\"{file}\",\"model\":\"m\"}}");
        let answer = post(to, CHAT, &[JSON], &last);
        let whole = answer.status == 200 && answer.text() == hash(&last);
        assert!(whole || answer.status == 413, "{over}: {} {}", answer.status, answer.text());
    }
}

#[test]
fn the_copy_of_a_renamed_body_counts_among_what_is_held() {
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let busy = Upstream::start(|_, reply| reply.send(503, &[], b""));
    let slow = Upstream::start(move |seen, reply| {
        let _ = released.lock().unwrap().recv();
        reply.text(&seen.body.len().to_string());
    });
    let top = "fallbacks: {first: [the-second-model]}\nretry: {retries_max: 0}\n\
               replay: {total_bytes_max: 250KiB}\naliases: {a: first}";
    let pools = [Model("first", &[&busy]), Model("the-second-model", &[&slow])];
    let gateway = Gateway::start(&models(top, &pools));
    let to = gateway.address();
    let body =
        |model: &str, bytes| format!("{{\"model\":\"{model}\",\"x\":\"{}\"}}", "x".repeat(bytes));
    let buffered = || {
        let metrics = get(to, "/metrics", &[]).text();
        let line = metrics.lines().find_map(|line| line.strip_prefix("proxy_buffered_bytes "));
        line.unwrap().parse::<usize>().unwrap()
    };
    // Of two copies made one after the other, only the one in use counts.
    let came = body("a", 100_000);
    let sent = body("the-second-model", 100_000).len();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| post(to, CHAT, &[JSON], &came));
        eventually("both are held", || buffered() == came.len() + sent);
        release.send(()).unwrap();
        assert_eq!(asked.join().unwrap().text(), sent.to_string());
    });
    eventually("none is held", || buffered() == 0);
    // No room for a copy: the backend is not to blame, and nothing stays behind.
    let answer = post(to, CHAT, &[JSON], body("a", 200_000));
    assert_eq!((answer.status, answer.header("retry-after").as_str()), (503, "1"));
    assert_eq!(code(&answer).1, "busy");
    eventually("none is held", || buffered() == 0);
    assert_eq!(gateway.backend("svc/first", "a")["breaker"], "closed");
}

#[test]
fn a_name_that_has_to_be_changed_is_changed_or_the_body_is_refused() {
    let upstream = Upstream::start(|seen, reply| reply.send(200, &[], &seen.body));
    let top = "replay: {body_bytes_max: 100KiB}\naliases: {other: m}\nretry: {retries_max: 0}";
    let url = upstream.url();
    let text = models(top, &[Model("m", &[&upstream])])
        .replace(&format!("url: \"{url}\""), &format!("url: \"{url}\", model: own"));
    let gateway = Gateway::start(&text);
    let to = gateway.address();
    let path = "/svc/m/v1/chat/completions";
    let late = format!("{{\"x\":\"{}\",\"model\":\"m\"}}", "x".repeat(200_000));
    for (path, header) in [(path, "X: y"), (CHAT, "X-Tollgate-Model: other")] {
        for body in [&late[..], &late.replace("model", "mode\\u006c")] {
            let answer = post(to, path, &[JSON, header], body);
            assert_eq!(code(&answer), (413, "body_too_large".to_owned()), "{path}");
            assert!(answer.text().contains("send it first"), "{}", answer.text());
            let answer = send(to, chunked(path, &[JSON, header], &[body.as_bytes()]));
            assert_eq!(answer.status, 413, "{path}");
        }
    }
    let form = |model: &str| {
        let file = field("name=\"file\"; filename=\"f\"", &"x".repeat(200_000));
        format!("{file}{}--XX--\r\n", field("name=\"model\"", model))
    };
    let speech = "/svc/m/v1/audio/transcriptions";
    assert_eq!(post(to, speech, &[FORM], form("m")).status, 413);
    // What is no JSON object has no name in it, of whatever size.
    let text = "x".repeat(300_000);
    assert_eq!(post(to, "/svc/m/api/blobs/1", &[], &text).text().len(), text.len());
    // What some servers read as an object with a name is not passed on with that one.
    for body in
        ["{\"model\":\"m\"} x", "{\"a\":NaN,\"model\":\"m\"}", "{\"model\":\"m\"", "{\"model\":7}"]
    {
        let answer = post(to, path, &[JSON], body);
        assert_eq!(code(&answer), (400, "invalid_body".to_owned()), "{body}");
    }
    for coding in ["Content-Encoding: gzip", "Content-Encoding: x"] {
        let answer = post(to, path, &[JSON, coding], "{\"model\":\"m\"}");
        assert!(matches!(answer.status, 400 | 415), "{coding}: {}", answer.status);
    }
    assert_eq!(post(to, path, &[JSON], " \n").text(), " \n");
    // A name is not changed in what has lost its checksum.
    let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    zipped.write_all(b"{\"model\":\"m\"}").unwrap();
    let zipped = zipped.finish().unwrap();
    let gzip = "Content-Encoding: gzip";
    assert_eq!(post(to, path, &[JSON, gzip], &zipped).text(), "{\"model\":\"own\"}");
    for wrong in [&zipped[..zipped.len() - 4], &[&zipped[..], b"more"].concat()] {
        assert_eq!(code(&post(to, path, &[JSON, gzip], wrong)), (400, "invalid_body".to_owned()));
    }
}

#[test]
fn what_decoding_takes_counts_among_what_is_held() {
    let upstream = Upstream::named("x");
    let top = "replay: {total_bytes_max: 20MiB}";
    let gateway = Gateway::start(&models(top, &[Model("m", &[&upstream])]));
    let buffered = || {
        let metrics = get(gateway.address(), "/metrics", &[]).text();
        let line = metrics.lines().find_map(|line| line.strip_prefix("proxy_buffered_bytes "));
        line.unwrap().parse::<usize>().unwrap()
    };
    // The window of 16 MiB is there with the first byte.
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: g\r\n{JSON}\r\nContent-Encoding: br\r\nContent-Length: 1000\r\n\r\n"
    );
    let begun = [head.as_bytes(), &[0x0f, 0x02]].concat();
    let mut first = Connection::open(gateway.address());
    first.write(&begun).unwrap();
    eventually("it counts", || buffered() > 16 << 20);
    let answer = send(gateway.address(), &begun);
    assert_eq!(code(&answer), (503, "busy".to_owned()));
    drop(first);
    eventually("it is given back", || buffered() == 0);
    let body = zstd::encode_all(&b"{\"model\":\"m\"}"[..], 3).unwrap();
    assert_eq!(post(gateway.address(), CHAT, &[JSON, "Content-Encoding: zstd"], body).text(), "x");
    // What decodes to thousands of times its size was made to do so.
    let bomb = format!("{{\"a\":\"{}\"}}", "0".repeat(8 << 20));
    let bomb = zstd::encode_all(bomb.as_bytes(), 3).unwrap();
    let answer = post(gateway.address(), CHAT, &[JSON, "Content-Encoding: zstd"], bomb);
    assert_eq!(code(&answer), (400, "invalid_body".to_owned()));
}

#[test]
fn what_was_read_ahead_of_a_body_is_held_until_it_is_sent() {
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    let upstream = Upstream::start(move |seen, reply| {
        let _ = released.lock().unwrap().recv();
        reply.text(&seen.body_bytes.to_string());
    });
    let top = "default_service: svc\nreplay: {body_bytes_max: 100KiB}";
    let gateway = Gateway::start(&models(top, &[Model("m", &[&upstream])]));
    let to = gateway.address();
    let form =
        format!("{}--XX--\r\n", field("name=\"file\"; filename=\"f\"", &"x".repeat(500_000)));
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| post(to, "/v1/files", &[FORM], &form));
        eventually("the backend has it", || upstream.seen().len() == 1);
        let metrics = get(to, "/metrics", &[]).text();
        assert!(metrics.contains("\nproxy_buffered_bytes 0\n"), "{metrics}");
        release.send(()).unwrap();
        assert_eq!(asked.join().unwrap().text(), form.len().to_string());
    });
}

#[test]
fn a_body_that_cannot_be_passed_on_is_refused_and_not_waited_for() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&models("default_service: svc", &[Model("m", &[&upstream])]));
    // It has no length, is too long for what Pingora keeps, and was read to its end in search of a name.
    let endless = field("name=\"file\"; filename=\"f\"", &"x".repeat(100_000));
    let answer = send(gateway.address(), chunked("/v1/files", &[FORM], &[endless.as_bytes()]));
    assert_eq!(code(&answer), (411, "length_required".to_owned()));
    assert_eq!(gateway.backend("svc/m", "a")["breaker"], "closed");
    assert_eq!(post(gateway.address(), "/v1/files", &[FORM], endless).text(), "x");
}

#[test]
fn nothing_that_is_kept_or_removed_goes_to_another_model() {
    let broken = Upstream::start(|_, reply| reply.send(503, &[], b"no"));
    let spare = Upstream::named("spare");
    let top = "default_service: one\nfallbacks: {\"*\": spare}\nretry: {retries_max: 0}";
    let gateway = Gateway::start(&services(
        top,
        &[("one", &[Model("m", &[&broken])]), ("two", &[Model("spare", &[&spare])])],
    ));
    let to = gateway.address();
    let form = format!("{}--XX--\r\n", field("name=\"file\"; filename=\"f\"", "x"));
    for answer in [
        send(to, "DELETE /v1/models/m HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n"),
        get(to, "/v1/responses/r1", &[]),
        get(to, "/one/m/v1/responses/r1", &[]),
        post(to, "/v1/files", &[FORM], &form),
        post(to, "/v1/fine_tuning/jobs", &[JSON], "{\"model\":\"m\"}"),
    ] {
        assert_eq!((answer.status, answer.text().as_str()), (503, "no"));
    }
    assert!(spare.seen().is_empty());
    assert_eq!(post(to, CHAT, &[JSON], "{\"model\":\"m\"}").text(), "spare");
    // Where nobody stands in, the answer stays what it was.
    drop(spare);
    let status = |answer: Answer| (answer.status, answer.text());
    eventually("the spare one is known to be gone", || {
        let answer = post(to, CHAT, &[JSON], "{\"model\":\"spare\"}");
        answer.status == 503 && gateway.backend("two/spare", "a")["status"] == "unhealthy"
    });
    assert_eq!(status(post(to, CHAT, &[JSON], "{\"model\":\"m\"}")), (503, "no".to_owned()));
}

#[test]
fn a_header_and_the_request_do_not_name_two_models() {
    let (one, two) =
        (Upstream::start(|seen, reply| reply.send(200, &[], &seen.body)), Upstream::named("two"));
    let mut text = models("", &[Model("m1", &[&one]), Model("m2", &[&two])]);
    let url = one.url();
    text = text.replace(&format!("url: \"{url}\""), &format!("url: \"{url}\", model: m1"));
    let gateway = Gateway::start(&text);
    let to = gateway.address();
    let path = "/v1beta/models/m1:generateContent";
    let answer = post(to, path, &[JSON, "X-Tollgate-Model: m2"], "{}");
    assert_eq!(code(&answer), (400, "model_ambiguous".to_owned()));
    let twice = ["X-Tollgate-Model: m1", "X-Tollgate-Model: m2"];
    assert_eq!(code(&post(to, CHAT, &twice, "{}")), (400, "model_ambiguous".to_owned()));
    // What stands in the body counts for what is sent, however the header spells it.
    let answer = post(to, CHAT, &[JSON, "X-Tollgate-Model: m1"], "{\"model\":\"foo\"}");
    assert_eq!(answer.text(), "{\"model\":\"m1\"}");
    let types = [JSON, "Content-Type: multipart/form-data; boundary=B"];
    assert_eq!(code(&post(to, CHAT, &types, "{\"model\":\"m1\"}")).0, 400);
}

#[test]
fn a_request_that_offers_an_upgrade_nobody_takes_is_one_like_others() {
    let upstream = Upstream::start(|seen, reply| reply.send(200, &[], &seen.body));
    let top = "aliases: {other: m}";
    let gateway = Gateway::start(&models(top, &[Model("m", &[&upstream])]));
    let h2c = [
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
    ];
    let answer = post(gateway.address(), CHAT, &h2c, "{\"model\":\"other\"}");
    assert_eq!((answer.status, answer.text().as_str()), (200, "{\"model\":\"m\"}"));
    assert!(!upstream.last().has("upgrade"));
}
