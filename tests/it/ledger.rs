//! Who used what: rows in the ledger, their tokens and their costs.

use std::path::Path;

use rusqlite::Connection as Database;
use rusqlite::types::Value;
use serde_json::json;

use crate::harness::{
    Answer, Connection, Gateway, Reply, Seen, Upstream, config, eventually, get, post, send,
};

const CHAT: &str = "/v1/chat/completions";

/// A row of the ledger, by column.
#[derive(Clone, Debug, PartialEq)]
struct Row(Vec<(String, Value)>);

impl Row {
    fn text(&self, column: &str) -> String {
        match self.get(column) {
            Value::Text(text) => text.clone(),
            Value::Integer(number) => number.to_string(),
            Value::Null => "null".to_owned(),
            other => format!("{other:?}"),
        }
    }

    #[track_caller]
    fn get(&self, column: &str) -> &Value {
        let found = self.0.iter().find(|(name, _)| name == column);
        &found.unwrap_or_else(|| panic!("no column {column}")).1
    }

    /// Tokens of input and output, and whether those are an estimate.
    fn tokens(&self) -> (String, String, String) {
        (self.text("tokens_input"), self.text("tokens_output"), self.text("estimated"))
    }
}

/// The rows of a ledger file, in the order of time.
fn rows(file: &Path) -> Vec<Row> {
    let Ok(database) = Database::open(file) else { return Vec::new() };
    let Ok(mut select) = database.prepare("SELECT * FROM api_usage ORDER BY id") else {
        return Vec::new();
    };
    let columns: Vec<String> = select.column_names().map(str::to_owned).collect();
    let rows = select.query_map([], |row| {
        let value = |(at, name): (usize, &String)| Ok((name.clone(), row.get::<_, Value>(at)?));
        columns.iter().enumerate().map(value).collect::<Result<_, _>>().map(Row)
    });
    rows.unwrap().map(Result::unwrap).collect()
}

/// Waits until so many rows are there.
#[track_caller]
fn wait_rows(gateway: &Gateway, count: usize) -> Vec<Row> {
    let file = gateway.folder().join("state/ledger.db");
    eventually(&format!("{count} rows in the ledger"), || rows(&file).len() >= count);
    let rows = rows(&file);
    assert_eq!(rows.len(), count);
    rows
}

const LEDGER: &str = "ledger: {}";

fn ask(gateway: &Gateway, path: &str, body: &str) -> Answer {
    post(gateway.address(), path, &["Content-Type: application/json"], body)
}

fn json_answer(body: &'static str) -> Upstream {
    Upstream::start(move |_, reply| {
        reply.send(200, &[("Content-Type", "application/json")], body.as_bytes());
    })
}

/// An upstream as OpenAI's: it tells usage in a stream only when it is asked to.
fn openai() -> Upstream {
    Upstream::start(|seen: &Seen, reply: &mut Reply| {
        let body: serde_json::Value = serde_json::from_slice(&seen.body).unwrap_or_default();
        reply.begin("text/event-stream");
        for word in ["One", " two", " three"] {
            reply.chunk(format!("data: {}\n\n", delta(word)).as_bytes());
        }
        if body["stream_options"]["include_usage"] == true {
            reply.chunk(format!("data: {}\n\n", usage()).as_bytes());
        }
        reply.chunk(b"data: [DONE]\n\n");
        reply.end();
    })
}

fn delta(word: &str) -> serde_json::Value {
    json!({"id": "c", "choices": [{"index": 0, "delta": {"content": word}}]})
}

fn usage() -> serde_json::Value {
    json!({"id": "c", "choices": [], "usage": {"prompt_tokens": 21, "completion_tokens": 3, "total_tokens": 24}})
}

#[test]
fn an_exchange_has_a_row_with_all_that_is_known_of_it() {
    let upstream = json_answer(
        r#"{"choices":[{"message":{"content":"Hi"}}],"usage":{"prompt_tokens":1000003,"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":999999},"completion_tokens_details":{"reasoning_tokens":2}}}"#,
    );
    let top = format!(
        "{LEDGER}\nprices: {{currency: EUR, models: {{mdl: {{input: 2.50, output: 10, cached: 1.25}}}}}}"
    );
    let gateway =
        Gateway::start_with(&config(&top, &[&upstream]), &[("BACKEND_API_KEY", "sk")], &[]);
    let headers = ["Authorization: Bearer sk", "X-Request-ID: r-1"];
    let answer = post(gateway.address(), CHAT, &headers, r#"{"model":"mdl","messages":[]}"#);
    assert_eq!(answer.status, 200);
    let rows = wait_rows(&gateway, 1);
    for (column, expected) in [
        ("user_id", "global"),
        ("key_id", "global"),
        ("request_id", "r-1"),
        ("service", "svc"),
        ("model", "mdl"),
        ("backend", "a"),
        ("tokens_input", "1000003"),
        ("tokens_output", "7"),
        ("tokens_cached", "999999"),
        ("tokens_reasoning", "2"),
        ("tokens_reserved", "0"),
        ("cost", "1.25007875"),
        ("currency", "EUR"),
        ("status", "200"),
        ("aborted", "0"),
        ("estimated", "0"),
    ] {
        assert_eq!(rows[0].text(column), expected, "{column}");
    }
    assert_eq!(rows[0].text("timestamp").len(), "2026-01-01T00:00:00.000Z".len());
    assert!(matches!(rows[0].get("ttft_ms"), Value::Integer(0..20_000)));
}

#[test]
fn a_stream_is_metered_and_its_client_sees_what_it_asked_for() {
    let upstream = openai();
    let gateway = Gateway::start(&config(LEDGER, &[&upstream]));
    let plain = format!(
        "data: {}\n\ndata: {}\n\ndata: {}\n\n",
        delta("One"),
        delta(" two"),
        delta(" three")
    );
    let done = "data: [DONE]\n\n";
    let with_usage = format!("data: {}\n\n", usage());
    for (body, expected, sent) in [
        (
            r#"{"model":"mdl","messages":[],"stream":true}"#,
            format!("{plain}{done}"),
            r#"{"stream_options":{"include_usage":true},"model":"mdl","messages":[],"stream":true}"#,
        ),
        (
            r#"{"model":"mdl","stream_options":{"include_usage":false},"stream":true}"#,
            format!("{plain}{done}"),
            r#"{"model":"mdl","stream_options":{"include_usage":true},"stream":true}"#,
        ),
        (
            r#"{"model":"mdl","stream_options":{"include_usage":true},"stream":true}"#,
            format!("{plain}{with_usage}{done}"),
            r#"{"model":"mdl","stream_options":{"include_usage":true},"stream":true}"#,
        ),
    ] {
        let answer = ask(&gateway, CHAT, body);
        assert!(answer.complete);
        assert_eq!(answer.text(), expected, "{body}");
        assert_eq!(String::from_utf8(upstream.last().body).unwrap(), sent);
        assert_eq!(upstream.last().header("accept-encoding"), "identity");
    }
    for row in wait_rows(&gateway, 3) {
        assert_eq!(row.tokens(), ("21".into(), "3".into(), "0".into()));
    }
}

#[test]
fn without_leave_to_ask_for_usage_a_stream_is_counted_and_marked() {
    let upstream = openai();
    let gateway = Gateway::start(&config("ledger: {include_usage: false}", &[&upstream]));
    let body = r#"{"model":"mdl","messages":[{"content":"forty bytes of text are about ten tokens."}],"stream":true}"#;
    assert_eq!(ask(&gateway, CHAT, body).status, 200);
    assert_eq!(String::from_utf8(upstream.last().body).unwrap(), body);
    let row = &wait_rows(&gateway, 1)[0];
    assert_eq!(row.tokens(), ("11".into(), "3".into(), "1".into()));
    assert_eq!(row.text("cost"), "null");
}

#[test]
fn each_familys_answers_are_read() {
    let answers: [(&str, &str, &str, (u32, u32)); 6] = [
        (
            "/svc/mdl/v1/messages",
            "text/event-stream",
            "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":25,\"cache_read_input_tokens\":5,\"output_tokens\":1}}}\n\nevent: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{},\"usage\":{\"output_tokens\":15}}\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
            (30, 15),
        ),
        (
            "/svc/mdl/v1/responses",
            "text/event-stream; charset=utf-8",
            "event: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{\"usage\":{\"input_tokens\":36,\"output_tokens\":87}}}\n\n",
            (36, 87),
        ),
        (
            "/svc/mdl/v1beta/models/mdl:streamGenerateContent?alt=sse",
            "text/event-stream",
            "data: {\"candidates\":[{}],\"usageMetadata\":{\"promptTokenCount\":10,\"candidatesTokenCount\":5,\"thoughtsTokenCount\":6}}\r\n\r\n",
            (10, 11),
        ),
        (
            "/svc/mdl/api/chat",
            "application/x-ndjson",
            "{\"message\":{\"content\":\"a\"},\"done\":false}\n{\"done\":true,\"prompt_eval_count\":26,\"eval_count\":298}\n",
            (26, 298),
        ),
        (
            "/svc/mdl/v1/embeddings",
            "application/json",
            r#"{"data":[{"embedding":[0.5]}],"usage":{"prompt_tokens":8,"total_tokens":8}}"#,
            (8, 0),
        ),
        ("/svc/mdl/v1/messages/count_tokens", "application/json", r#"{"input_tokens":99}"#, (0, 0)),
    ];
    let upstream = Upstream::start(move |seen, reply| {
        let target = seen.target();
        let answer = answers.iter().find(|answer| answer.0.ends_with(&target)).unwrap();
        reply.send(200, &[("Content-Type", answer.1)], answer.2.as_bytes());
    });
    let gateway = Gateway::start(&config(LEDGER, &[&upstream]));
    for (path, _, expected, _) in answers {
        assert_eq!(ask(&gateway, path, "{}").text(), expected, "{path}");
    }
    for ((path, .., (input, output)), row) in answers.iter().zip(wait_rows(&gateway, 6)) {
        assert_eq!(row.tokens(), (input.to_string(), output.to_string(), "0".into()), "{path}");
    }
}

#[test]
fn a_stream_that_is_cut_is_metered_by_what_passed_and_marked() {
    let upstream = Upstream::start(|_, reply| {
        reply.begin("text/event-stream");
        for word in ["One", " two"] {
            reply.chunk(format!("data: {}\n\n", delta(word)).as_bytes());
        }
        // Half an event, and then it dies.
        reply.chunk(b"data: {\"id\":\"c\",\"cho");
        reply.cut();
    });
    let gateway = Gateway::start(&config(LEDGER, &[&upstream]));
    let body = r#"{"model":"mdl","messages":[{"content":"12345678"}],"stream":true}"#;
    let answer = ask(&gateway, CHAT, body);
    assert!(!answer.complete && answer.text().contains("stream_interrupted"), "{}", answer.text());
    let row = &wait_rows(&gateway, 1)[0];
    assert_eq!(row.tokens(), ("2".into(), "2".into(), "1".into()));
    assert_eq!(row.text("aborted"), "1");
}

#[test]
fn a_client_that_leaves_is_metered_by_what_it_was_sent() {
    let upstream = Upstream::start(|_, reply| {
        reply.begin("text/event-stream");
        for word in ["One", " two", " three"] {
            reply.chunk(format!("data: {}\n\n", delta(word)).as_bytes());
        }
        reply.wait_closed();
    });
    let gateway = Gateway::start(&config(LEDGER, &[&upstream]));
    let body = r#"{"model":"mdl","messages":[],"stream":true}"#;
    let mut client = Connection::open(gateway.address());
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n", body.len());
    client.write(format!("{head}{body}").as_bytes()).unwrap();
    client.read_head().unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("three") {
        seen.extend(client.read_chunk().unwrap());
    }
    drop(client);
    let row = &wait_rows(&gateway, 1)[0];
    assert_eq!((row.text("tokens_output"), row.text("aborted")), ("3".into(), "1".into()));
    assert_eq!(row.text("estimated"), "1");
}

#[test]
fn what_costs_nothing_and_what_nobody_answered_cost_nothing() {
    let upstream = Upstream::start(|seen, reply| match seen.method.as_str() {
        "GET" => reply.text("x"),
        _ => reply.send(400, &[("Content-Type", "application/json")], br#"{"error":{}}"#),
    });
    let gateway = Gateway::start(&config(LEDGER, &[&upstream]));
    assert_eq!(get(gateway.address(), "/svc/mdl/v1/files", &[]).status, 200);
    assert_eq!(ask(&gateway, CHAT, r#"{"model":"mdl"}"#).status, 400);
    let zero = ("0".to_owned(), "0".to_owned(), "0".to_owned());
    let rows = wait_rows(&gateway, 2);
    assert!(rows.iter().all(|row| row.tokens() == zero && row.text("cost") == "0"), "{rows:?}");
    // What never reached a backend has no row.
    assert_eq!(ask(&gateway, CHAT, r#"{"model":"other"}"#).status, 404);
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
    assert_eq!(wait_rows(&gateway, 3)[2].text("status"), "200");
}

#[test]
fn requests_of_any_form_are_metered() {
    let upstream = openai();
    let mut gateway = Gateway::start(&config(LEDGER, &[&upstream]));
    let stream = r#"{"stream":true,"messages":[{"content":"Say three"}]}"#;
    for (at, path) in ["/openai/deployments/mdl/chat/completions", CHAT].into_iter().enumerate() {
        let body = stream.replace("{\"str", "{\"model\":\"mdl\",\"str");
        let answer = ask(&gateway, path, &body);
        assert!(!answer.text().contains("usage"), "{}", answer.text());
        let row = &wait_rows(&gateway, at + 1)[at];
        assert_eq!(
            (row.tokens().0.as_str(), row.text("estimated").as_str()),
            ("21", "0"),
            "{path}"
        );
    }
    // One that does not say its length passes as it comes; what it has of text is counted all the same.
    let words = "word ".repeat(40_000);
    let body = format!(r#"{{"model":"mdl","messages":[{{"content":"{words}"}}],"stream":true}}"#);
    let answer = post_chunked(&gateway, CHAT, body.as_bytes());
    assert_eq!(answer.status, 200);
    let row = &wait_rows(&gateway, 3)[2];
    assert_eq!((row.tokens().0.as_str(), row.tokens().1.as_str()), ("50000", "3"), "{row:?}");
    assert_eq!(row.text("estimated"), "1");
    gateway.signal(nix::sys::signal::Signal::SIGTERM);
    gateway.wait_end();
}

/// Sends a body in chunks.
fn post_chunked(gateway: &Gateway, path: &str, body: &[u8]) -> Answer {
    let mut request = format!(
        "POST {path} HTTP/1.1\r\nHost: g\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    .into_bytes();
    for chunk in body.chunks(16_000) {
        request.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        request.extend_from_slice(chunk);
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"0\r\n\r\n");
    send(gateway.address(), request)
}

#[test]
fn only_a_models_text_is_counted_where_nothing_is_told() {
    let text = format!(r#"{{"data":[{{"b64_json":"{}"}}]}}"#, "QUJD".repeat(1000));
    let upstream = Upstream::start(move |seen, reply| {
        let json = [("Content-Type", "application/json")];
        let target = String::from_utf8_lossy(&seen.target).into_owned();
        match target.rsplit('/').next().unwrap() {
            "embed" => {
                reply.send(200, &json, br#"{"embeddings":[[0.1,0.2]],"prompt_eval_count":8}"#)
            }
            "generations" => reply.send(200, &json, text.as_bytes()),
            "completions" if seen.method == "PUT" => reply.send(
                200,
                &[("Content-Type", "text/plain")],
                br#"{"usage":{"prompt_tokens":5,"completion_tokens":7}}"#,
            ),
            _ => reply.send(200, &[("Content-Encoding", "br")], &[b'x'; 400]),
        }
    });
    let gateway = Gateway::start(&config(LEDGER, &[&upstream]));
    let put = "PUT /svc/mdl/v1/chat/completions HTTP/1.1\r\nHost: g\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}";
    for (at, (path, tokens, estimated)) in [
        ("/svc/mdl/api/embed", ("8", "0"), "0"),
        ("/svc/mdl/v1/images/generations", ("0", "0"), "1"),
        ("PUT", ("5", "7"), "0"),
        ("/svc/mdl/v1/chat/completions", ("0", "100"), "1"),
        ("/svc/mdl/v1/responses/r1/cancel", ("0", "0"), "0"),
        ("/svc/mdl/v1/chat/completions/c1", ("0", "0"), "0"),
    ]
    .into_iter()
    .enumerate()
    {
        let answer = match path {
            "PUT" => send(gateway.address(), put),
            path => ask(&gateway, path, "{}"),
        };
        assert_eq!(answer.status, 200, "{path}");
        let row = &wait_rows(&gateway, at + 1)[at];
        let (input, output, _) = row.tokens();
        assert_eq!((input.as_str(), output.as_str()), tokens, "{path}");
        assert_eq!(row.text("estimated"), estimated, "{path}");
    }
}

#[test]
fn counts_that_no_answer_has_are_not_believed() {
    let absurd = "{\"usage\":{\"prompt_tokens\":99999999999999999999999,\"completion_tokens\":9223372036854775807}}";
    let upstream = json_answer(absurd);
    let gateway = Gateway::start(&config(LEDGER, &[&upstream]));
    for _ in 0..3 {
        ask(&gateway, CHAT, r#"{"model":"mdl","max_tokens":9223372036854775807,"n":4000000000}"#);
    }
    for row in wait_rows(&gateway, 3) {
        let output: u64 = row.tokens().1.parse().unwrap();
        assert!(output <= absurd.len() as u64 && row.text("estimated") == "1", "{row:?}");
    }
    assert_eq!(get(gateway.address(), "/api/usage", &[]).json()["total"]["exchanges"], 3);
}

#[test]
fn prices_depend_on_backend_tier_and_what_was_paid_for_before() {
    let upstream = json_answer(r#"{"usage":{"prompt_tokens":100,"completion_tokens":50}}"#);
    let url = upstream.url();
    let hash = "sha256:6003e85b34c208b5b6f014b9cea342454acb0270ce95313698bfcd6dafa066c9";
    let config = format!(
        "listen: 127.0.0.1:0\n{LEDGER}\nkeys: [{{name: team, hash: \"{hash}\", reserved_tokens: 130}}]\napi_key: sk\n\
         prices_file: prices.yaml\n\
         services: {{s: {{models: {{tiered: {{backends: [{{id: a, url: \"{url}\"}}]}}, own: {{backends: \
         [{{id: a, url: \"{url}\", price: {{input: 7, output: 0}}}}]}}, free: {{backends: [{{id: a, url: \"{url}\"}}]}}}}}}}}\n"
    );
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tollgate.yaml"), config).unwrap();
    let prices = |input: &str| {
        format!(
            "per: 1\nmodels: {{\"s/t*\": {{input: {input}, output: 0.2, tiers: [{{from: 300, input: 0.05}}]}}}}\n"
        )
    };
    std::fs::write(folder.path().join("prices.yaml"), prices("0.1")).unwrap();
    let gateway = Gateway::start_in(folder, &[], &[]);
    let ask = |model: &str| {
        let body = format!(r#"{{"model":"{model}"}}"#);
        assert_eq!(post(gateway.address(), CHAT, &["X-API-Key: sk"], body).status, 200);
    };
    for model in ["tiered", "tiered", "tiered", "own", "free"] {
        ask(model);
    }
    let costs = |rows: &[Row]| rows.iter().map(|row| row.text("cost")).collect::<Vec<_>>();
    // The third one begins at 300 tokens. A backend's own price is for a million tokens.
    assert_eq!(costs(&wait_rows(&gateway, 5)), ["20", "20", "15", "0.0007", "null"]);
    std::fs::write(gateway.folder().join("prices.yaml"), prices("9")).unwrap();
    std::fs::write(
        gateway.folder().join("prices.yaml"),
        prices("9").replace("from: 300", "from: 999999999"),
    )
    .unwrap();
    eventually("the new prices are at work", || {
        let before = rows(&gateway.folder().join("state/ledger.db")).len();
        ask("tiered");
        costs(&wait_rows(&gateway, before + 1))[before] == "910"
    });
}

#[test]
fn the_ledger_survives_a_restart_and_tiers_go_on_from_it() {
    let upstream = json_answer(r#"{"usage":{"prompt_tokens":100,"completion_tokens":0}}"#);
    let top =
        "ledger: {}\nprices: {per: 1, models: {mdl: {input: 3, tiers: [{from: 100, input: 2}]}}}";
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tollgate.yaml"), config(top, &[&upstream])).unwrap();
    let path = folder.path().to_owned();
    let mut first = Gateway::start_in(folder, &[], &[]);
    ask(&first, CHAT, r#"{"model":"mdl"}"#);
    first.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(first.wait_end().success());
    // All of it is in the database when the process has ended, and nothing waits.
    assert_eq!(rows(&path.join("state/ledger.db")).len(), 1);
    assert_eq!(std::fs::read_dir(path.join("state/spool")).unwrap().count(), 0);
    let second = tempfile::tempdir().unwrap();
    let config = config(&format!("state_directory: {}/state\n{top}", path.display()), &[&upstream]);
    std::fs::write(second.path().join("tollgate.yaml"), config).unwrap();
    let second = Gateway::start_in(second, &[], &[]);
    ask(&second, CHAT, r#"{"model":"mdl"}"#);
    let file = path.join("state/ledger.db");
    eventually("there are two", || rows(&file).len() == 2);
    assert_eq!(rows(&file)[1].text("cost"), "200");
    drop(first);
}
