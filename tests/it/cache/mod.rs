//! Answers that are given again, and one answer for all who ask for the same at a time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use serde_json::{Value, json};

use crate::harness::{
    Answer, Connection, Gateway, Metrics, Model, Upstream, config, eventually, get, hash_of, http2,
    post, run_program, services,
};

const CHAT: &str = "/svc/mdl/v1/chat/completions";

/// Keeps what has to be the same each time.
const CACHE: &str = "cache: {enabled: true}";

/// Says how often it was asked: a document, or a word an event.
fn counting() -> Upstream {
    let count = AtomicUsize::new(0);
    Upstream::start(move |seen, reply| {
        let asked: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
        let number = count.fetch_add(1, Ordering::SeqCst) + 1;
        let usage = json!({"prompt_tokens": 100, "completion_tokens": 50});
        if asked["stream"] != true {
            let message = json!({"role": "assistant", "content": format!("answer {number}")});
            let answer = json!({"choices": [{"message": message}], "usage": usage});
            let headers = [("content-type", "application/json"), ("x-own", "1"), ("age", "7")];
            return reply.send(200, &headers, answer.to_string().as_bytes());
        }
        reply.begin("text/event-stream");
        for word in ["answer ", &number.to_string()] {
            let event = json!({"choices": [{"delta": {"content": word}}]});
            reply.chunk(format!("data: {event}\n\n").as_bytes());
        }
        if asked["stream_options"]["include_usage"] == true {
            let event = json!({"choices": [], "usage": usage});
            reply.chunk(format!("data: {event}\n\n").as_bytes());
        }
        reply.chunk(b"data: [DONE]\n\n");
        reply.end();
    })
}

fn prompt(text: &str, more: &str) -> String {
    format!(
        r#"{{"model":"mdl","temperature":0,"messages":[{{"role":"user","content":"{text}"}}]{more}}}"#
    )
}

fn ask(gateway: &Gateway, body: &str, headers: &[&str]) -> Answer {
    post(gateway.address(), CHAT, headers, body)
}

/// What came of the cache, and what was answered.
fn told(answer: &Answer) -> (String, String) {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let said = match answer.text() {
        text if text.starts_with('{') => answer.json()["choices"][0]["message"]["content"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        text => {
            assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
            let events = text.split("\n\n").filter_map(|event| event.strip_prefix("data: {"));
            let words = events.map(|rest| {
                let event: Value = serde_json::from_str(&format!("{{{rest}")).unwrap();
                event["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()
            });
            words.collect()
        }
    };
    (answer.header("x-cache"), said)
}

fn pair(outcome: &str, said: &str) -> (String, String) {
    (outcome.to_owned(), said.to_owned())
}

#[test]
fn the_same_request_is_answered_by_the_same_answer() {
    let upstream = counting();
    let gateway = Gateway::start(&config(CACHE, &[&upstream]));
    let first = ask(&gateway, &prompt("a", ""), &[]);
    assert_eq!(told(&first), pair("miss", "answer 1"));
    assert_eq!((first.header("age"), first.header("x-own")), (String::new(), "1".to_owned()));
    // In other words.
    let body = r#"{ "messages": [ { "content": "\u0061", "role": "user" } ], "temperature":0, "model":"mdl" }"#;
    let second = ask(&gateway, body, &[]);
    assert_eq!(told(&second), pair("hit", "answer 1"));
    assert_eq!(second.body, first.body);
    let age: u64 = second.header("age").parse().unwrap();
    assert!(age < 60, "{age}");
    assert_eq!(second.header("content-type"), "application/json");
    assert_ne!(second.header("x-request-id"), first.header("x-request-id"));
    assert_eq!(told(&ask(&gateway, &prompt("b", ""), &[])), pair("miss", "answer 2"));

    let stream = prompt("a", r#","stream":true"#);
    let first = ask(&gateway, &stream, &[]);
    assert_eq!(told(&first), pair("miss", "answer 3"));
    let second = ask(&gateway, &stream, &["Accept-Encoding: gzip"]);
    assert_eq!(told(&second), pair("hit", "answer 3"));
    assert_eq!(second.body, first.body);
    assert_eq!(second.header("content-type"), "text/event-stream");
    assert_eq!(upstream.seen().len(), 3);
    assert_eq!(upstream.last().header("accept-encoding"), "identity");
}

#[test]
fn what_may_differ_each_time_is_asked_for_each_time() {
    let upstream = counting();
    let gateway = Gateway::start(&config(CACHE, &[&upstream]));
    for (at, body) in [
        r#"{"model":"mdl"}"#.to_owned(),
        r#"{"model":"mdl","temperature":0.1}"#.to_owned(),
        prompt("a", r#","temperature":0"#),
        prompt("a", r#","store":true"#),
        "no JSON".to_owned(),
    ]
    .iter()
    .enumerate()
    {
        for again in 1..=2 {
            let answer = ask(&gateway, body, &[]);
            let said = format!("answer {}", 2 * at + again);
            assert_eq!(told(&answer), pair("bypass", &said), "{body}");
        }
    }
    // What is no question to a model has nothing to do with it.
    assert_eq!(get(gateway.address(), "/svc/mdl/v1/models", &[]).header("x-cache"), "");
    // Off where nobody wants it, and for all requests where somebody does.
    let gateway = Gateway::start(&config("", &[&upstream]));
    assert_eq!(ask(&gateway, &prompt("a", ""), &[]).header("x-cache"), "");
    let gateway = Gateway::start(&config("cache: {enabled: true, requests: all}", &[&upstream]));
    let body = r#"{"model":"mdl","temperature":1}"#;
    let outcomes = [0, 1].map(|_| ask(&gateway, body, &[]).header("x-cache"));
    assert_eq!(outcomes, ["miss", "hit"]);
}

#[test]
fn clients_say_how_old_an_answer_may_be() {
    let upstream = counting();
    let gateway = Gateway::start(&config(CACHE, &[&upstream]));
    let body = prompt("a", "");
    let with = |wish: &str| {
        let header = format!("Cache-Control: {wish}");
        told(&ask(&gateway, &body, &[&header]))
    };
    assert_eq!(with("no-store"), pair("bypass", "answer 1"));
    assert_eq!(with("max-age=60"), pair("miss", "answer 2"));
    assert_eq!(with("max-age=60"), pair("hit", "answer 2"));
    assert_eq!(with("no-store"), pair("bypass", "answer 3"));
    // What is new is for the others, too.
    assert_eq!(with("no-cache"), pair("bypass", "answer 4"));
    assert_eq!(with("max-age=60"), pair("hit", "answer 4"));
    eventually("it is older than a second", || with("max-age=1") != pair("hit", "answer 4"));
    assert_eq!(told(&ask(&gateway, &body, &[])), pair("hit", "answer 5"));
}

#[test]
fn an_answer_is_kept_as_long_as_configured() {
    let upstream = counting();
    let top = "cache: {enabled: true}";
    let variables = [("CACHE_EXPIRE", "1")];
    let gateway = Gateway::start_with(&config(top, &[&upstream]), &variables, &[]);
    let body = prompt("a", "");
    let outcome = || ask(&gateway, &body, &[]).header("x-cache");
    assert_eq!([outcome(), outcome()], ["miss", "hit"]);
    eventually("it has expired", || outcome() == "miss");
    let gateway = Gateway::start_with(&config(top, &[&upstream]), &[("CACHE_EXPIRE", "0")], &[]);
    assert_eq!(ask(&gateway, &body, &[]).header("x-cache"), "");
}

/// Two keys, with models whose answers are kept.
fn two_keys(top: &str, upstream: &Upstream) -> Gateway {
    let keys: Vec<Value> = ["one", "two"]
        .iter()
        .map(|name| json!({"id": format!("key-{name}"), "name": name, "hash": hash_of(name)}))
        .collect();
    Gateway::start(&config(&format!("keys: {}\n{top}", json!(keys)), &[upstream]))
}

#[test]
fn keys_do_not_share_answers_unless_they_are_told_to() {
    let upstream = counting();
    let body = prompt("a", "");
    let ask = |gateway: &Gateway, key: &str| {
        told(&ask(gateway, &body, &[&format!("Authorization: Bearer {key}")]))
    };
    let gateway = two_keys(CACHE, &upstream);
    assert_eq!(ask(&gateway, "one"), pair("miss", "answer 1"));
    assert_eq!(ask(&gateway, "two"), pair("miss", "answer 2"));
    assert_eq!(ask(&gateway, "one"), pair("hit", "answer 1"));
    assert_eq!(ask(&gateway, "two"), pair("hit", "answer 2"));
    let gateway = two_keys("cache: {enabled: true, per: all}", &upstream);
    assert_eq!(ask(&gateway, "one"), pair("miss", "answer 3"));
    assert_eq!(ask(&gateway, "two"), pair("hit", "answer 3"));
    // Whose keys are the backend's business share nothing, whatever is configured.
    let gateway = Gateway::start(&config("cache: {enabled: true, per: all}", &[&upstream]));
    assert_eq!(ask(&gateway, "one"), pair("miss", "answer 4"));
    assert_eq!(ask(&gateway, "two"), pair("miss", "answer 5"));
    assert_eq!(ask(&gateway, "one"), pair("hit", "answer 4"));
}

/// Answers when it is told to: `stream` in two pieces, the second one when it is told again.
fn held_back() -> (Upstream, Sender<()>, Receiver<()>) {
    let (go, wait) = channel::<()>();
    let (begins, begun) = channel();
    let (wait, begins) = (Mutex::new(wait), Mutex::new(begins));
    let upstream = Upstream::start(move |seen, reply| {
        let asked: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
        begins.lock().unwrap().send(()).unwrap();
        let wait = || wait.lock().unwrap().recv().unwrap();
        if asked["stream"] != true {
            wait();
            let body = br#"{"choices":[{"message":{"content":"late"}}],"usage":{"prompt_tokens":2,"completion_tokens":1}}"#;
            return reply.send(200, &[("content-type", "application/json")], body);
        }
        reply.begin("text/event-stream");
        reply.chunk(b"data: {\"choices\":[{\"delta\":{\"content\":\"la\"}}]}\n\n");
        wait();
        reply.chunk(b"data: {\"choices\":[{\"delta\":{\"content\":\"te\"}}]}\n\ndata: [DONE]\n\n");
        reply.end();
    });
    (upstream, go, begun)
}

fn open(gateway: &Gateway, body: &str) -> Connection {
    let mut client = Connection::open(gateway.address());
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: g\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    client.write((head + body).as_bytes()).unwrap();
    client
}

#[test]
fn a_thousand_who_ask_the_same_at_once_make_one_request() {
    for stream in ["", r#","stream":true"#] {
        let (upstream, go, begun) = held_back();
        let gateway = Gateway::start(&config(CACHE, &[&upstream]));
        let body = prompt("a", stream);
        let mut clients: Vec<Connection> = (0..1000).map(|_| open(&gateway, &body)).collect();
        begun.recv().unwrap();
        eventually("all have asked", || gateway.inflight() == 1000);
        go.send(()).unwrap();
        let mut outcomes = [0, 0];
        for client in &mut clients {
            let answer = client.read(false).expect("an answer");
            let (outcome, said) = told(&answer);
            assert_eq!(said, "late");
            outcomes[usize::from(outcome == "hit")] += 1;
        }
        assert_eq!((outcomes, upstream.seen().len()), ([1, 999], 1));
        assert_eq!(told(&ask(&gateway, &body, &[])), pair("hit", "late"));
    }
}

#[test]
fn those_who_follow_a_stream_get_each_event_as_it_comes() {
    let (upstream, go, begun) = held_back();
    let gateway = Gateway::start(&config(CACHE, &[&upstream]));
    let body = prompt("a", r#","stream":true"#);
    let mut first = open(&gateway, &body);
    begun.recv().unwrap();
    let mut second = open(&gateway, &body);
    for (client, outcome) in [(&mut first, "miss"), (&mut second, "hit")] {
        assert_eq!(client.read_head().unwrap().header("x-cache"), outcome);
        let piece = client.read_chunk().unwrap();
        assert!(String::from_utf8(piece).unwrap().contains("\"la\""));
    }
    go.send(()).unwrap();
    for client in [&mut first, &mut second] {
        let mut rest = Vec::new();
        while let Some(piece) = client.read_chunk().filter(|piece| !piece.is_empty()) {
            rest.extend(piece);
        }
        assert!(rest.ends_with(b"data: [DONE]\n\n"), "{}", String::from_utf8_lossy(&rest));
    }
    assert_eq!(upstream.seen().len(), 1);
}

/// Reads the rest of a stream; whether it has its last event and a clean end.
fn rest(client: &mut Connection) -> (String, bool) {
    let mut rest = Vec::new();
    while let Some(piece) = client.read_chunk() {
        if piece.is_empty() {
            return (String::from_utf8(rest).unwrap(), true);
        }
        rest.extend(piece);
    }
    (String::from_utf8(rest).unwrap(), false)
}

#[test]
fn a_stream_goes_on_for_those_who_follow_when_its_first_client_leaves() {
    let (upstream, go, begun) = held_back();
    let gateway = Gateway::start(&config(CACHE, &[&upstream]));
    let body = prompt("a", r#","stream":true"#);
    let mut first = open(&gateway, &body);
    begun.recv().unwrap();
    assert_eq!(first.read_head().unwrap().header("x-cache"), "miss");
    let mut second = open(&gateway, &body);
    assert_eq!(second.read_head().unwrap().header("x-cache"), "hit");
    second.read_chunk().unwrap();
    drop(first);
    let mut third = open(&gateway, &body);
    assert_eq!(third.read_head().unwrap().header("x-cache"), "hit");
    third.read_chunk().unwrap();
    go.send(()).unwrap();
    for client in [&mut second, &mut third] {
        let (rest, is_whole) = rest(client);
        assert!(is_whole && rest.ends_with("data: [DONE]\n\n"), "{rest}");
    }
    assert_eq!(told(&ask(&gateway, &body, &[])), pair("hit", "late"));
    assert_eq!(upstream.seen().len(), 1);
    let aborts = || Metrics::of(gateway.address()).sum("proxy_client_aborts_total", &[]);
    eventually("it is told that one has left", || aborts() == 1.0);
}

#[test]
fn a_stream_that_nobody_waits_for_ends_at_its_backend() {
    let (begins, begun) = channel();
    let (ends, ended) = channel();
    let (begins, ends) = (Mutex::new(begins), Mutex::new(ends));
    let upstream = Upstream::start(move |_, reply| {
        reply.begin("text/event-stream");
        reply.chunk(b"data: {}\n\n");
        begins.lock().unwrap().send(()).unwrap();
        ends.lock().unwrap().send(reply.wait_closed()).unwrap();
    });
    let gateway = Gateway::start(&config(CACHE, &[&upstream]));
    let body = prompt("a", r#","stream":true"#);
    let mut first = open(&gateway, &body);
    begun.recv().unwrap();
    let mut second = open(&gateway, &body);
    for client in [&mut first, &mut second] {
        client.read_head().unwrap();
        client.read_chunk().unwrap();
    }
    drop(first);
    drop(second);
    assert!(ended.recv().unwrap());
    eventually("both are over", || gateway.inflight() == 0);
    // Who comes next begins anew.
    let mut next = open(&gateway, &body);
    begun.recv().unwrap();
    assert_eq!(next.read_head().unwrap().header("x-cache"), "miss");
}

#[test]
fn who_leaves_before_there_is_an_answer_takes_nobody_along() {
    for stream in ["", r#","stream":true"#] {
        let (upstream, go, begun) = held_back();
        let gateway = Gateway::start(&config(CACHE, &[&upstream]));
        let body = prompt("a", stream);
        let first = open(&gateway, &body);
        begun.recv().unwrap();
        let mut others: Vec<Connection> = (0..10).map(|_| open(&gateway, &body)).collect();
        eventually("all have asked", || gateway.inflight() == 11);
        drop(first);
        go.send(()).unwrap();
        for client in &mut others {
            assert_eq!(told(&client.read(false).expect("an answer")), pair("hit", "late"));
        }
        assert_eq!(upstream.seen().len(), 1);
    }
}

#[test]
fn a_connection_is_kept_behind_an_answer_that_others_shared() {
    let upstream = counting();
    let gateway = Gateway::start(&config(CACHE, &[&upstream]));
    let mut client = open(&gateway, &prompt("a", ""));
    assert_eq!(told(&client.read(false).unwrap()), pair("miss", "answer 1"));
    for (text, more, outcome, said) in [
        ("a", "", "hit", "answer 1"),
        ("b", r#","stream":true"#, "miss", "answer 2"),
        ("b", r#","stream":true"#, "hit", "answer 2"),
        ("c", "", "miss", "answer 3"),
    ] {
        let body = prompt(text, more);
        let head =
            format!("POST {CHAT} HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n", body.len());
        client.write((head + &body).as_bytes()).unwrap();
        assert_eq!(told(&client.read(false).unwrap()), pair(outcome, said));
    }
}

#[test]
fn a_failure_is_for_who_asked_and_not_for_those_who_wait() {
    for (status, stream) in [(503, ""), (400, r#","stream":true"#)] {
        let (begins, begun) = channel();
        let (go, wait) = channel::<()>();
        let (begins, wait) = (Mutex::new(begins), Mutex::new(wait));
        let count = AtomicUsize::new(0);
        let upstream = Upstream::start(move |_, reply| {
            let number = count.fetch_add(1, Ordering::SeqCst) + 1;
            if number == 1 {
                begins.lock().unwrap().send(()).unwrap();
                wait.lock().unwrap().recv().unwrap();
                return reply.send(status, &[("content-type", "application/json")], b"{}");
            }
            reply.send(200, &[("content-type", "application/json")], br#"{"choices":[]}"#);
        });
        let top = format!("{CACHE}\nretry: {{retries_max: 0}}\nbreaker: {{enabled: false}}");
        let gateway = Gateway::start(&config(&top, &[&upstream]));
        let body = prompt("a", stream);
        let mut first = open(&gateway, &body);
        begun.recv().unwrap();
        let mut others: Vec<Connection> = (0..5).map(|_| open(&gateway, &body)).collect();
        eventually("all have asked", || gateway.inflight() == 6);
        go.send(()).unwrap();
        assert_eq!(first.read(false).unwrap().status, status);
        for client in &mut others {
            let answer = client.read(false).unwrap();
            assert_eq!((answer.status, answer.header("x-cache")), (200, "miss".to_owned()));
        }
        assert_eq!(upstream.seen().len(), 6);
    }
}

#[test]
fn what_is_not_whole_is_not_kept() {
    let (sse, json) = ("text/event-stream", "application/json");
    let cases: [(&str, &str, bool); 9] = [
        (json, r#"{"choices":["#, false),
        (json, r#"{"error":{"message":"overloaded"}}"#, false),
        (json, r#"{"choices":[]}"#, true),
        (sse, "data: {\"choices\":[]}\n\n", false),
        (sse, "data: {\"error\":{\"message\":\"x\"}}\n\ndata: [DONE]\n\n", false),
        (sse, "event: error\ndata: {}\n\ndata: [DONE]\n\n", false),
        (sse, "data: {\"choices\":[]}\n\ndata: [DONE]\n\n", true),
        ("text/html", "<html>", false),
        ("", r#"{"choices":[]}"#, false),
    ];
    // Ended as said, broken off, and by the end of the connection.
    for how in 0..3 {
        let upstream = Upstream::start(move |seen, reply| {
            let asked: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
            let at = asked["seed"].as_u64().unwrap() as usize;
            let (kind, body, _) = cases[at];
            let kind =
                if kind.is_empty() { String::new() } else { format!("Content-Type: {kind}\r\n") };
            let head = match how {
                0 => format!("HTTP/1.1 200 OK\r\n{kind}Content-Length: {}\r\n\r\n", body.len()),
                1 => format!("HTTP/1.1 200 OK\r\n{kind}Content-Length: {}\r\n\r\n", body.len() + 1),
                _ => format!("HTTP/1.1 200 OK\r\n{kind}Connection: close\r\n\r\n"),
            };
            reply.raw((head + body).as_bytes());
            if how > 0 {
                reply.cut();
            }
        });
        let top = format!("{CACHE}\nretry: {{retries_max: 0}}\nbreaker: {{enabled: false}}");
        let gateway = Gateway::start(&config(&top, &[&upstream]));
        for (at, (_, body, is_kept)) in cases.iter().enumerate() {
            let ask = || {
                let mut client = open(&gateway, &prompt("a", &format!(",\"seed\":{at}")));
                client.read_head().unwrap().header("x-cache")
            };
            assert_eq!(ask(), "miss");
            let expected = if *is_kept && how != 1 { "hit" } else { "miss" };
            // It is kept when the client has it.
            if expected == "hit" {
                eventually(&format!("{how} {body:?} is kept"), || ask() == "hit");
            } else {
                assert_eq!(ask(), "miss", "{how} {body:?}");
            }
        }
    }
}

#[test]
fn a_stream_that_breaks_breaks_for_all_and_is_asked_for_anew() {
    let (begins, begun) = channel();
    let (go, wait) = channel::<()>();
    let (begins, wait) = (Mutex::new(begins), Mutex::new(wait));
    let upstream = Upstream::start(move |_, reply| {
        reply.begin("text/event-stream");
        reply.chunk(b"data: {\"choices\":[]}\n\n");
        begins.lock().unwrap().send(()).unwrap();
        wait.lock().unwrap().recv().unwrap();
        reply.cut();
    });
    let mut gateway = Gateway::start(&config(CACHE, &[&upstream]));
    let body = prompt("a", r#","stream":true"#);
    let mut first = open(&gateway, &body);
    begun.recv().unwrap();
    let mut second = open(&gateway, &body);
    for client in [&mut first, &mut second] {
        client.read_head().unwrap();
        client.read_chunk().unwrap();
    }
    go.send(()).unwrap();
    for client in [&mut first, &mut second] {
        let (rest, is_whole) = rest(client);
        assert!(rest.contains("\"error\"") && !rest.contains("[DONE]"), "{rest}");
        assert!(!is_whole, "it looks whole");
    }
    let mut third = open(&gateway, &body);
    begun.recv().unwrap();
    assert_eq!(third.read_head().unwrap().header("x-cache"), "miss");
    gateway.wait_log("the answer that it was given a share of was cut");
}

#[test]
fn http_2_clients_share_and_leave_as_others_do() {
    let (upstream, go, begun) = held_back();
    let gateway = Gateway::start(&config(CACHE, &[&upstream]));
    let body = prompt("a", r#","stream":true"#);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = http2(gateway.address()).await;
        let ask = async || {
            let mut client = client.clone().ready().await.unwrap();
            let request = http::Request::post(format!("http://g{CHAT}")).body(()).unwrap();
            let (response, mut sending) = client.send_request(request, false).unwrap();
            sending.send_data(body.clone().into(), true).unwrap();
            (response, sending)
        };
        let (first, mut reset) = ask().await;
        let first = first.await.unwrap();
        begun.recv().unwrap();
        assert_eq!(first.headers()["x-cache"], "miss");
        let second = ask().await.0.await.unwrap();
        assert_eq!(second.headers()["x-cache"], "hit");
        assert!(!second.headers().contains_key("transfer-encoding"));
        reset.send_reset(h2::Reason::CANCEL);
        drop(first);
        let mut third = open(&gateway, &body);
        assert_eq!(third.read_head().unwrap().header("x-cache"), "hit");
        go.send(()).unwrap();
        let (text, is_whole) = rest(&mut third);
        assert!(is_whole && text.ends_with("[DONE]\n\n"), "{text}");
        let mut body = second.into_body();
        let mut all = Vec::new();
        while let Some(data) = body.data().await {
            all.extend_from_slice(&data.expect("a clean end"));
        }
        assert!(all.ends_with(b"[DONE]\n\n"));
        let (again, _) = ask().await;
        let again = again.await.unwrap();
        assert_eq!(again.headers()["x-cache"], "hit");
    });
    assert_eq!(upstream.seen().len(), 1);
}

#[test]
fn a_slow_client_keeps_nobody_waiting() {
    // Much more than sockets and gateway hold for one that takes nothing.
    let pieces = 3000;
    let (begins, begun) = channel();
    let (go, wait) = channel::<()>();
    let (begins, wait) = (Mutex::new(begins), Mutex::new(wait));
    let upstream = Upstream::start(move |_, reply| {
        reply.begin("text/event-stream");
        begins.lock().unwrap().send(()).unwrap();
        wait.lock().unwrap().recv().unwrap();
        let event = format!("data: {{\"text\":\"{}\"}}\n\n", "x".repeat(10_000));
        for _ in 0..pieces {
            reply.chunk(event.as_bytes());
        }
        reply.chunk(b"data: [DONE]\n\n");
        reply.end();
    });
    let gateway = Gateway::start(&config(CACHE, &[&upstream]));
    let body = prompt("a", r#","stream":true"#);
    let mut first = open(&gateway, &body);
    begun.recv().unwrap();
    assert_eq!(first.read_head().unwrap().header("x-cache"), "miss");
    let mut second = open(&gateway, &body);
    assert_eq!(second.read_head().unwrap().header("x-cache"), "hit");
    go.send(()).unwrap();
    let (text, is_whole) = rest(&mut second);
    assert!(is_whole && text.len() > pieces * 10_000);
    // It is too large to be kept, and whole for who takes it at last.
    let (late, is_whole) = rest(&mut first);
    assert!(is_whole && late == text);
    go.send(()).unwrap();
    assert_eq!(open(&gateway, &body).read_head().unwrap().header("x-cache"), "miss");
}

#[test]
fn what_another_model_answers_is_not_kept_for_the_one_that_was_asked() {
    let other = counting();
    let down = Upstream::start(|_, reply| reply.send(503, &[], b""));
    let top = format!("{CACHE}\nretry: {{retries_max: 0}}\nfallbacks: {{mdl: other}}");
    let models = [Model("mdl", &[&down]), Model("other", &[&other])];
    let gateway = Gateway::start(&services(&top, &[("svc", &models)]));
    let ask = |model: &str| {
        let body = format!(r#"{{"model":"{model}","temperature":0}}"#);
        let answer = post(gateway.address(), "/v1/chat/completions", &[], body);
        (answer.header("x-tollgate-model"), told(&answer))
    };
    for number in 1..=2 {
        let said = format!("answer {number}");
        assert_eq!(ask("mdl"), ("svc/other".to_owned(), pair("miss", &said)));
    }
    assert_eq!(ask("other"), ("svc/other".to_owned(), pair("miss", "answer 3")));
    assert_eq!(ask("other"), ("svc/other".to_owned(), pair("hit", "answer 3")));
}

#[test]
fn who_follows_a_client_that_takes_nothing_waits_for_nobody() {
    let (go, wait) = channel::<()>();
    let wait = Mutex::new(wait);
    let upstream = Upstream::start(move |_, reply| {
        reply.begin("text/event-stream");
        // What sockets and gateway hold is full with less.
        let event = format!("data: {{\"text\":\"{}\"}}\n\n", "x".repeat(10_000));
        for at in 0..3000 {
            if at == 10 {
                wait.lock().unwrap().recv().unwrap();
            }
            reply.chunk(event.as_bytes());
        }
        reply.chunk(b"data: [DONE]\n\n");
        reply.end();
    });
    let top = "cache: {enabled: true, memory_bytes_max: 400MiB, answer_bytes_max: 50MiB}\n\
               client: {write_timeout: 2s}";
    let gateway = Gateway::start(&config(top, &[&upstream]));
    let body = prompt("a", r#","stream":true"#);
    let mut first = open(&gateway, &body);
    assert_eq!(first.read_head().unwrap().header("x-cache"), "miss");
    go.send(()).unwrap();
    let held = || Metrics::of(gateway.address()).sum("proxy_buffered_bytes", &[]);
    eventually("much of it waits for the first one", || held() > 1_000_000.0);
    let mut second = open(&gateway, &body);
    assert_eq!(second.read_head().unwrap().header("x-cache"), "hit");
    let (text, is_whole) = rest(&mut second);
    assert!(is_whole && text.ends_with("[DONE]\n\n"));
    // Who takes nothing for too long is parted from, and not told that it has all.
    eventually("it is parted from", || gateway.inflight() == 0);
    let (late, is_whole) = rest(&mut first);
    assert!(!is_whole && late.len() < text.len());
    assert_eq!(ask(&gateway, &body, &[]).header("x-cache"), "hit");
}

#[test]
fn who_leads_is_refused_as_others_are() {
    let models = "{models: {mdl: {backends: [{id: a, url: \"http://127.0.0.1:9\"}]}}}";
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\n{CACHE}\nretry: {{retries_max: 0}}\nservices: {{svc: {models}}}"
    ));
    let mut client = open(&gateway, &prompt("a", ""));
    let refused = client.read(false).unwrap();
    assert_eq!((refused.status, refused.header("connection")), (503, "close".to_owned()));
    assert_eq!(refused.json()["error"]["code"], "no_backend");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut client = http2(gateway.address()).await;
        let request = http::Request::post(format!("http://g{CHAT}")).body(()).unwrap();
        let (response, mut sending) = client.send_request(request, false).unwrap();
        sending.send_data(prompt("b", "").into(), true).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), 503);
        let mut body = response.into_body();
        let mut all = Vec::new();
        while let Some(data) = body.data().await {
            all.extend_from_slice(&data.expect("it ends as it should"));
        }
        let refused: Value = serde_json::from_slice(&all).unwrap();
        assert_eq!(refused["error"]["code"], "no_backend");
    });
}

#[test]
fn requests_that_backends_can_tell_apart_are_told_apart() {
    let upstream = counting();
    let gateway = Gateway::start(&services(CACHE, &[("svc", &[Model("gpt-*", &[&upstream])])]));
    let ask = |headers: &[&str]| {
        let body = r#"{"model":"x","temperature":0}"#;
        told(&post(gateway.address(), "/v1/chat/completions", headers, body))
    };
    let four = "X-Tollgate-Model: svc/gpt-4";
    assert_eq!(ask(&[four]), pair("miss", "answer 1"));
    assert_eq!(ask(&["X-Tollgate-Model: svc/gpt-3"]), pair("miss", "answer 2"));
    assert_eq!(ask(&[four]), pair("hit", "answer 1"));
    // Who they are their backend may also be told so.
    for (at, header) in
        ["Cookie: who=a", "Cookie: who=b", "X_API_KEY: a", "X_API_KEY: b", "Proxy-Authorization: a"]
            .iter()
            .enumerate()
    {
        assert_eq!(ask(&[four, header]), pair("miss", &format!("answer {}", at + 3)));
    }
    // Not a question, but something that is kept.
    let gateway = Gateway::start(&config("cache: {enabled: true, requests: all}", &[&upstream]));
    let path = "/svc/mdl/v1/threads/t/messages";
    assert_eq!(post(gateway.address(), path, &[], r#"{"content":"a"}"#).header("x-cache"), "");
}

#[test]
fn a_stream_whose_end_is_not_known_passes_and_is_not_kept() {
    let (begins, begun) = channel();
    let (go, wait) = channel::<()>();
    let (begins, wait) = (Mutex::new(begins), Mutex::new(wait));
    let upstream = Upstream::start(move |_, reply| {
        reply.begin("text/event-stream");
        reply.chunk(b"data: {\"type\":\"response.created\"}\n\n");
        begins.lock().unwrap().send(()).unwrap();
        wait.lock().unwrap().recv().unwrap();
        reply.chunk(b"data: {\"type\":\"response.incomplete\"}\n\n");
        reply.end();
    });
    let gateway = Gateway::start(&config(CACHE, &[&upstream]));
    let open = || {
        let mut client = Connection::open(gateway.address());
        let body = r#"{"model":"mdl","temperature":0,"store":false,"stream":true}"#;
        let head = format!(
            "POST /svc/mdl/v1/responses HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        client.write(head.as_bytes()).unwrap();
        client
    };
    let mut first = open();
    begun.recv().unwrap();
    let mut second = open();
    for (client, outcome) in [(&mut first, "miss"), (&mut second, "hit")] {
        assert_eq!(client.read_head().unwrap().header("x-cache"), outcome);
    }
    go.send(()).unwrap();
    for client in [&mut first, &mut second] {
        let (text, is_whole) = rest(client);
        assert!(is_whole && text.ends_with("response.incomplete\"}\n\n"), "{text}");
    }
    let mut third = open();
    assert_eq!(third.read_head().unwrap().header("x-cache"), "miss");
}

mod money;
mod redis;
