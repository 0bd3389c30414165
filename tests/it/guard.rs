//! The content guard: what may not pass, in what models are asked and what they say.

use serde_json::{Value, json};

use crate::harness::{
    Connection, Gateway, Metrics, Upstream, config, eventually, hash_of, http2, post, run_program,
};

const CHAT: &str = "/svc/mdl/v1/chat/completions";

/// Says what it is asked, a letter an event where a stream is asked for.
fn parrot() -> Upstream {
    Upstream::start(|seen, reply| {
        let asked: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
        let text = asked["messages"][0]["content"].as_str().unwrap_or_default();
        if asked["stream"] != true {
            let answer = json!({"choices": [{"index": 0, "finish_reason": "stop",
                "message": {"role": "assistant", "content": text}}]});
            return reply.send(
                200,
                &[("content-type", "application/json")],
                answer.to_string().as_bytes(),
            );
        }
        reply.begin("text/event-stream");
        for letter in text.chars() {
            let event = json!({"choices": [{"index": 0, "delta": {"content": letter}}]});
            if !reply.chunk(format!("data: {event}\n\n").as_bytes()) {
                return;
            }
        }
        reply.chunk(b"data: [DONE]\n\n");
        reply.end();
    })
}

fn ask(text: &str, stream: bool) -> String {
    json!({"model": "mdl", "stream": stream, "messages": [{"role": "user", "content": text}]})
        .to_string()
}

/// The text that the events of a body say.
fn said(body: &str) -> String {
    let events = body.split("\n\n").filter_map(|event| event.strip_prefix("data: {"));
    let events = events.map(|rest| serde_json::from_str::<Value>(&format!("{{{rest}")).unwrap());
    events
        .map(|event| {
            event["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()
        })
        .collect()
}

#[test]
fn a_request_with_something_forbidden_is_refused() {
    let upstream = parrot();
    let folder = tempfile::tempdir().unwrap();
    let words: Vec<String> = (0..100_000).map(|number| format!("word{number}x")).collect();
    std::fs::write(folder.path().join("words.txt"), words.join("\n")).unwrap();
    let text = config(
        r#"hooks: [{name: words, guard: {words: [密码], words_file: words.txt, patterns: ['\b\d{4} \d{4}\b'], on: [request]}}]"#,
        &[&upstream],
    );
    std::fs::write(folder.path().join("tollgate.yaml"), text).unwrap();
    let gateway = Gateway::start_in(folder, &[], &[]);
    for text in ["我的密码是", "a WORD99999X b", "ｗｏｒｄ７ｘ", "call 1234 5678 now"] {
        let refused = post(gateway.address(), CHAT, &[], ask(text, false));
        let error = &refused.json()["error"];
        assert_eq!((refused.status, &error["code"]), (400, &json!("content_filter")), "{text}");
        assert_eq!(error["message"], "the request has content that is not allowed here");
    }
    assert!(upstream.seen().is_empty());
    let long = "word ".repeat(60_000);
    assert_eq!(post(gateway.address(), CHAT, &[], ask(&long, false)).status, 200);
    let runs = |outcome: &str| {
        let labels = ["hook=\"words\"", &format!("outcome=\"{outcome}\"")];
        Metrics::of(gateway.address()).sum("proxy_hook_runs_total", &labels)
    };
    eventually("it is counted", || (runs("refused"), runs("passed")) == (4.0, 1.0));
}

#[test]
fn what_a_model_says_is_redacted_in_documents_and_streams() {
    let upstream = parrot();
    let gateway = Gateway::start(&config(
        "hooks: [{guard: {words: [secret], on: [answer], action: redact, replacement: '***'}}]",
        &[&upstream],
    ));
    let answer =
        post(gateway.address(), CHAT, &["Accept-Encoding: gzip"], ask("the SECRET is", false));
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "the *** is");
    assert_eq!(upstream.last().header("accept-encoding"), "identity");
    let answer = post(gateway.address(), CHAT, &[], ask("the SECRET is 密", true));
    assert_eq!(said(&answer.text()), "the *** is 密");
    assert!(answer.text().ends_with("data: [DONE]\n\n"), "{}", answer.text());
    let runs = || {
        let labels = ["hook=\"guard\"", "outcome=\"found\""];
        Metrics::of(gateway.address()).sum("proxy_hook_runs_total", &labels)
    };
    eventually("it is counted", || runs() == 2.0);
}

#[test]
fn a_stream_that_says_something_forbidden_is_cut_with_an_error() {
    let upstream = parrot();
    let gateway =
        Gateway::start(&config("hooks: [{guard: {words: [secret], on: [answer]}}]", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    let body = ask("the secret is", true);
    let head =
        format!("POST {CHAT} HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    connection.write(head.as_bytes()).unwrap();
    assert_eq!(connection.read_head().unwrap().status, 200);
    let mut all = Vec::new();
    while let Some(chunk) = connection.read_chunk().filter(|chunk| !chunk.is_empty()) {
        all.extend(chunk);
    }
    let text = String::from_utf8(all).unwrap();
    let (before, error) = text.split_at(text.find("data: {\"error\"").unwrap());
    assert!("the ".starts_with(&said(before)), "{text}");
    let error: Value = serde_json::from_str(error.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["code"], "content_filter");
    assert!(!text.contains("[DONE]"));
    // A document says so where its API has a place for it.
    let answer = post(gateway.address(), CHAT, &[], ask("the secret is", false)).json();
    assert_eq!(answer["choices"][0]["message"]["content"], "");
    assert_eq!(answer["choices"][0]["finish_reason"], "content_filter");
    // Nobody has failed.
    assert_eq!(Metrics::of(gateway.address()).bare("proxy_errors_total"), Some(0.0));
}

#[tokio::test]
async fn over_http_2_too() {
    let upstream = parrot();
    let gateway =
        Gateway::start(&config("hooks: [{guard: {words: [secret], on: [answer]}}]", &[&upstream]));
    let mut client = http2(gateway.address()).await.ready().await.unwrap();
    let request = http::Request::post(format!("http://g{CHAT}")).body(()).unwrap();
    let (response, mut body) = client.send_request(request, false).unwrap();
    body.send_data(ask("the secret is", true).into(), true).unwrap();
    let mut body = response.await.unwrap().into_body();
    let mut all = Vec::new();
    let end = loop {
        match body.data().await {
            Some(Ok(data)) => all.extend_from_slice(&data),
            Some(Err(error)) => break Some(error),
            None => break None,
        }
    };
    let text = String::from_utf8(all).unwrap();
    assert!(text.contains("content_filter") && !text.contains("secret"), "{text}");
    assert!(end.is_some(), "it ends with a reset");
}

#[test]
fn an_answer_that_cannot_be_read_does_not_pass() {
    let upstream = Upstream::start(|_, reply| {
        let headers = [("content-type", "application/json"), ("content-encoding", "br")];
        reply.send(200, &headers, b"?");
    });
    let gateway = Gateway::start(&config("hooks: [{guard: {words: [secret]}}]", &[&upstream]));
    let answer = post(gateway.address(), CHAT, &[], ask("x", false));
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (502, &json!("backend_failed")));
}

#[test]
fn the_request_log_tells_what_named_keys_ask_and_get() {
    let upstream = parrot();
    let top = format!(
        "keys: [{{name: debug-ada, hash: \"{}\"}}, {{name: bob, hash: \"{}\"}}]\nrequest_log: {{file: log}}\n\
         hooks: [{{capture: {{keys: [\"debug-*\"], prompt: true, answer: true, bytes_max: 40, \
         redact: {{words: [secret], patterns: ['sk-[a-z]+']}}}}}}]",
        hash_of("tg_ada"),
        hash_of("tg_bob"),
    );
    let gateway = Gateway::start(&config(&top, &[&upstream]));
    let said = "a Secret and sk-abc";
    let ask = |key: &str, text: &str, stream: bool| {
        let key = format!("Authorization: Bearer {key}");
        let answer = post(gateway.address(), CHAT, &[&key], ask(text, stream));
        assert_eq!(answer.status, 200);
        answer.text()
    };
    let path = gateway.folder().join("log");
    let lines = || -> Vec<Value> {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    };
    // One after the other: another thread may tell of the next one first.
    let asked = [
        ("tg_ada", said.to_owned(), false),
        ("tg_ada", said.to_owned(), true),
        ("tg_ada", "é".repeat(100), false),
        ("tg_bob", said.to_owned(), true),
    ];
    for (at, (key, text, stream)) in asked.iter().enumerate() {
        let answer = ask(key, text, *stream);
        assert!(*stream || answer.contains(text), "what passes is not changed");
        eventually("a line more", || lines().len() == at + 1);
    }
    let told: Vec<Value> =
        lines().iter().map(|line| json!([line["prompt"], line["answer"]])).collect();
    let kept = "a [removed] and [removed]";
    assert_eq!(told[0], json!([kept, kept]));
    assert_eq!(told[1], json!([kept, kept]));
    assert_eq!(told[2], json!(["é".repeat(20), "é".repeat(20)]));
    assert_eq!(told[3], json!([null, null]));
}

#[test]
fn what_is_wrong_with_a_guard_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let text = r#"hooks:
  - guard: {patterns: ["a", "("]}
  - guard: {words_file: nothing.txt}
  - guard: {}
  - guard: {words: [a], on: [], hold_back: 0, action: warn}
services: {svc: {models: {mdl: {backends: [{id: b, url: "http://127.0.0.1:1"}]}}}}
"#;
    std::fs::write(folder.path().join("tollgate.yaml"), text).unwrap();
    let output = run_program(folder.path(), &[], &["check"]);
    let told = String::from_utf8(output.stderr).unwrap();
    for line in [
        "hooks[0].guard.patterns[1]: cannot be looked for: unclosed group (tollgate.yaml:2:29)",
        "hooks[1].guard.words_file: cannot read nothing.txt",
        "hooks[2].guard: looks for nothing; write words, words_file or patterns (tollgate.yaml:4:12)",
        "hooks[3].guard.action: \"warn\" is not one of refuse, redact, count",
        "hooks[3].guard.on: looks at nothing",
        "hooks[3].guard.hold_back: expected a number of letters from 1 to 4096",
    ] {
        assert!(told.contains(line), "{line}\nis not in\n{told}");
    }
}

#[test]
fn nothing_gets_past_a_guard_by_its_form() {
    let upstream = parrot();
    let gateway = Gateway::start(&config(
        "hooks: [{name: g, guard: {words: [secret]}}, {name: s, when: request.stream, refuse: {message: no streams}}]",
        &[&upstream],
    ));
    let hidden = r#"{"messages":[{"content":"s\u0065cret"}]}"#;
    let form = ["Content-Type: multipart/form-data; boundary=x"];
    assert_eq!(post(gateway.address(), "/svc/mdl/api/chat", &form, hidden).status, 400);
    let upgrade = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"];
    let refused = crate::harness::get(gateway.address(), "/svc/mdl/v1/realtime", &upgrade);
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (400, &json!("websocket_unsupported"))
    );
    // What is too long to be held may say further on that it wants a stream.
    let long = format!(r#"{{"messages":[{{"content":"{}"}}],"stream":true}}"#, "x".repeat(60_000));
    let chunked = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{long}\r\n0\r\n\r\n",
        long.len()
    );
    assert!(matches!(crate::harness::send(gateway.address(), chunked).status, 403 | 411));
    assert!(upstream.seen().is_empty());
    let path = "/svc/mdl/v1//chat/c%6Fmpletions";
    assert_eq!(post(gateway.address(), path, &[], ask("fine", false)).status, 200);
}

#[test]
fn a_guard_that_another_hook_switches_on_takes_the_whole_body_too() {
    let upstream = parrot();
    let gateway = Gateway::start(&config(
        "hooks: [{request_headers: {set: {x-a: on}}}, {when: 'request.headers[\"x-a\"] == \"on\"', guard: {words: [secret]}}]",
        &[&upstream],
    ));
    let long = ask(&format!("{} secret", "x".repeat(60_000)), false);
    let chunked = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{long}\r\n0\r\n\r\n",
        long.len()
    );
    assert_eq!(crate::harness::send(gateway.address(), chunked).status, 411);
    assert_eq!(post(gateway.address(), CHAT, &[], &long).status, 400);
    assert!(upstream.seen().is_empty());
}

#[test]
fn what_guards_hold_of_answers_has_a_bound_for_all() {
    let (begins, begun) = std::sync::mpsc::channel();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let both = std::sync::Mutex::new((begins, wait));
    let text = "x".repeat(700_000);
    let upstream = Upstream::start(move |_, reply| {
        let body = json!({"choices": [{"message": {"content": text}}]}).to_string();
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        reply.raw((head + &body[..600_000]).as_bytes());
        let both = both.lock().unwrap();
        both.0.send(()).unwrap();
        both.1.recv().unwrap();
        reply.raw(&body.as_bytes()[600_000..]);
    });
    let top = "replay: {body_bytes_max: 64KiB, total_bytes_max: 1MiB}\n\
               hooks: [{guard: {words: [secret], on: [answer]}}]";
    let gateway = Gateway::start(&config(top, &[&upstream]));
    let open = || {
        let body = ask("x", false);
        let mut client = Connection::open(gateway.address());
        let head =
            format!("POST {CHAT} HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n", body.len());
        client.write((head + &body).as_bytes()).unwrap();
        client
    };
    let held = || Metrics::of(gateway.address()).sum("proxy_buffered_bytes", &[]);
    let mut first = open();
    begun.recv().unwrap();
    eventually("it is counted", || held() >= 500_000.0);
    let mut second = open();
    // There is no room for it: it ends without its end.
    assert_eq!(second.read_head().unwrap().status, 200);
    assert!(second.is_closed());
    go.send(()).unwrap();
    assert_eq!(
        first.read(false).unwrap().json()["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .len(),
        700_000
    );
    eventually("it is given back", || held() == 0.0);
}
