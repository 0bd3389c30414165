//! What do hooks cost an exchange: a condition, ten cheap ones, and a guard with 100,000 words or with patterns, for a prompt
//! of 300 KB and for an event of a stream?
//!
//! `cargo bench --bench hooks`: time each. Those that act on an event go through a stream of 200 of them, so that what is
//! held back of one passes with the next.

use std::fmt::Write;
use std::hint::black_box;
use std::sync::Arc;

use bytes::Bytes;
use criterion::{Criterion, Throughput};
use http::{HeaderMap, HeaderValue};
use tollgate::config::{Environment, Source, load};
use tollgate::hooks::{AnswerHead, Chain, HookKinds, Notes, Runs};

const EVENTS: usize = 200;

/// Words that none of the texts has.
const WORDS: usize = 100_000;

/// The hooks of one model.
fn chain(hooks: &str) -> Arc<Chain> {
    let folder = tempfile::tempdir().expect("a folder");
    let mut words = String::new();
    for number in 0..WORDS {
        let word = ["token", "secret", "密码", "the"][number % 4];
        writeln!(words, "{word}{number}zq").expect("there is memory");
    }
    std::fs::write(folder.path().join("words.txt"), words).expect("a file");
    let file = folder.path().join("tollgate.yaml");
    let text = format!(
        "hooks:\n{hooks}\nservices: {{s: {{models: {{m: {{backends: [{{id: a, url: \"http://127.0.0.1:1\"}}]}}}}}}}}\n"
    );
    std::fs::write(&file, text).expect("a file");
    let snapshot = load(&Source::File(file), &Environment::default(), &HookKinds::default());
    let snapshot = snapshot.expect("it is well-formed");
    Arc::clone(&snapshot.hooks["s/m"])
}

fn request() -> tollgate::expression::Request<'static> {
    tollgate::expression::Request {
        method: "POST",
        path: "/v1/chat/completions",
        host: "llm.example.com",
        body_bytes: Some(2048),
        stream: true,
        address: None,
        key_id: "key-1",
        key_name: "team-1",
        labels: &[],
        service: "s",
        model: "m",
        asked: "m",
    }
}

fn headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("content-type", "application/json"),
        ("accept", "application/json"),
        ("user-agent", "OpenAI/Python 2.54.0"),
        ("x-team", "web"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers
}

/// Prose of about so many bytes in a chat.
fn prompt(bytes: usize) -> Bytes {
    let prose =
        "The quick brown fox tells the token of its secret, and the lazy dog does not listen. ";
    let text = prose.repeat(bytes / prose.len());
    let body = serde_json::json!({"model": "m", "messages": [{"role": "user", "content": text}]});
    body.to_string().into()
}

fn requests(criterion: &mut Criterion) {
    let ten = "  - request_headers: {set: {x-a: b}}\n".repeat(6)
        + &"  - {when: 'key.name == \"nobody\" && request.stream', refuse: {message: x}}\n"
            .repeat(4);
    let condition =
        "  - {when: 'request.stream && key.name in [\"a\", \"b\"]', refuse: {message: x}}";
    let mut group = criterion.benchmark_group("requests");
    for (name, hooks, bytes) in [
        ("one condition", condition, 100),
        ("ten cheap hooks", &ten, 100),
        ("a member bounded in 2 KB", "  - request_fields: {max: {max_tokens: 5}}", 2_000),
        ("a member bounded in 300 KB", "  - request_fields: {max: {max_tokens: 5}}", 300_000),
        ("100,000 words in 300 KB", "  - guard: {words_file: words.txt}", 300_000),
        (
            "two patterns in 300 KB",
            r"  - guard: {patterns: ['\bsk-[a-z0-9]{20}', '\b\d{4}-\d{4}']}",
            300_000,
        ),
    ] {
        let (chain, body, request) = (chain(hooks), prompt(bytes), request());
        if bytes > 100 {
            group.throughput(Throughput::Bytes(body.len() as u64));
        }
        let mut headers = headers();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let (mut runs, mut notes) = (Runs::new(), Notes::new());
                let mut body = body.clone();
                let kept = (&mut runs, &mut notes);
                let done = chain.request(&request, &mut headers, Some(&mut body), kept);
                assert!(done.is_ok());
                black_box(body)
            });
        });
    }
    group.finish();
}

fn answers(criterion: &mut Criterion) {
    let stream: Vec<Bytes> = (0..EVENTS)
        .map(|number| {
            let word = [" the", " token", " of", " its", " secret"][number % 5];
            Bytes::from(format!(
                "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{word}\"}},\"finish_reason\":null}}]}}\n\n"
            ))
        })
        .collect();
    let mut group = criterion.benchmark_group("an event of an answer");
    group.throughput(Throughput::Elements(EVENTS as u64));
    for (name, hooks) in [
        ("100,000 words", "  - guard: {words_file: words.txt, action: redact}"),
        (
            "two patterns",
            r"  - guard: {patterns: ['\bsk-[a-z0-9]{20}', '\b\d{4}-\d{4}'], action: redact}",
        ),
    ] {
        let (chain, request, asked) = (chain(hooks), request(), headers());
        let mut headers = HeaderMap::new();
        headers.insert("content-type", HeaderValue::from_static("text/event-stream"));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let head = AnswerHead {
                    request: &request,
                    request_headers: &asked,
                    backend: "a",
                    status: 200,
                    headers: &mut headers,
                };
                let mut bodies = chain.answer_body(&head, &mut Runs::new());
                for (at, event) in stream.iter().enumerate() {
                    let mut piece = Some(event.clone());
                    assert!(bodies.pass(&mut piece, at + 1 == EVENTS).is_ok());
                    black_box(piece);
                }
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    requests(&mut criterion);
    answers(&mut criterion);
    criterion.final_summary();
}
