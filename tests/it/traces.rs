//! Traces: what clients send goes on, and spans of exchanges are sent to who keeps them.

use std::collections::HashMap;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::harness::{Connection, Gateway, Metrics, Upstream, config, eventually, get, post};

const SENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn is_traceparent(header: &str) -> bool {
    let parts: Vec<usize> = header.split('-').map(str::len).collect();
    parts == [2, 32, 16, 2]
}

#[test]
fn a_clients_trace_goes_on_and_where_there_is_none_one_begins() {
    let upstream = Upstream::named("x");
    let gateway = Gateway::start(&config("", &[&upstream]));
    let sent = format!("traceparent: {SENT}");
    get(gateway.address(), "/svc/mdl/x", &[&sent, "tracestate: vendor=1"]);
    let seen = upstream.last();
    assert_eq!(
        (seen.header("traceparent").as_str(), seen.header("tracestate").as_str()),
        (SENT, "vendor=1")
    );
    // None, and one that is none: what belonged to it does not go on.
    for header in ["X: y", "traceparent: 00-nonsense"] {
        get(gateway.address(), "/svc/mdl/x", &[header, "tracestate: vendor=1"]);
        let begun = upstream.last();
        assert!(is_traceparent(&begun.header("traceparent")), "{begun:?}");
        assert!(begun.header("traceparent").ends_with("-01") && !begun.has("tracestate"));
    }
}

/// A collector, and a gateway that sends it spans.
fn traced(top: &str, upstreams: &[&Upstream]) -> (Upstream, Gateway) {
    let collector = Upstream::start(|_, reply| reply.send(200, &[], b"{}"));
    let url = collector.url();
    let top = format!(
        "{top}\ntraces: {{otlp_url: \"{url}/v1/traces\", headers: {{X-Token: otlp-secret}}}}"
    );
    (collector, Gateway::start(&config(&top, upstreams)))
}

/// All spans that a collector has been sent, by their names.
fn spans(collector: &Upstream) -> Vec<Value> {
    let spans = |body: &[u8]| -> Vec<Value> {
        let json: Value = serde_json::from_slice(body).unwrap();
        json["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap().clone()
    };
    collector.seen().iter().flat_map(|seen| spans(&seen.body)).collect()
}

fn attributes(span: &Value) -> HashMap<String, Value> {
    let attributes = span["attributes"].as_array().unwrap().iter();
    let value = |value: &Value| value.as_object().unwrap().values().next().unwrap().clone();
    attributes.map(|it| (it["key"].as_str().unwrap().to_owned(), value(&it["value"]))).collect()
}

#[test]
fn an_exchange_its_attempts_and_its_waits_are_spans_of_the_clients_trace() {
    let failing = Upstream::start(|_, reply| reply.send(503, &[], b""));
    let metered = Upstream::metered();
    let (collector, gateway) = traced("balance: round_robin", &[&failing, &metered]);
    let sent = format!("traceparent: {SENT}");
    // Until both have been asked by one exchange.
    eventually("a request is tried again", || {
        let answer = post(gateway.address(), "/svc/mdl/v1/chat/completions", &[&sent], "{}");
        assert_eq!(answer.status, 200);
        !failing.seen().is_empty()
    });
    eventually("a failed attempt is told", || {
        spans(&collector).iter().any(|span| span["name"] == "attempt a")
    });
    let spans = spans(&collector);
    let failed = spans.iter().find(|span| span["name"] == "attempt a").unwrap();
    let of = |span: &Value| {
        spans.iter().filter(|it| it["parentSpanId"] == span["spanId"]).collect::<Vec<_>>()
    };
    let whole = spans.iter().find(|span| span["spanId"] == failed["parentSpanId"]).unwrap();
    assert_eq!((&whole["name"], &whole["kind"]), (&json!("chat mdl"), &json!(2)));
    assert_eq!(whole["parentSpanId"], "00f067aa0ba902b7");
    for span in &spans {
        assert_eq!(span["traceId"], "4bf92f3577b34da6a3ce929d0e0e4736");
        let nanos = |key: &str| span[key].as_str().unwrap().parse::<u128>().unwrap();
        assert!(nanos("startTimeUnixNano") <= nanos("endTimeUnixNano"), "{span:#}");
    }
    let children = of(whole);
    let names: Vec<&str> = children.iter().map(|span| span["name"].as_str().unwrap()).collect();
    for name in ["attempt a", "attempt b", "connect", "backend", "answer"] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert_eq!(failed["status"]["code"], 2);
    let told = attributes(whole);
    for (key, value) in [
        ("http.response.status_code", json!("200")),
        ("gen_ai.operation.name", json!("chat")),
        ("gen_ai.provider.name", json!("openai")),
        ("gen_ai.request.model", json!("mdl")),
        ("gen_ai.usage.input_tokens", json!("100")),
        ("gen_ai.usage.output_tokens", json!("50")),
        ("tollgate.attempts", json!("2")),
    ] {
        assert_eq!(told[key], value, "{key}");
    }
    // Each backend sees the span of the attempt at it.
    let seen = failing.last().header("traceparent");
    assert_eq!(
        seen,
        format!("00-4bf92f3577b34da6a3ce929d0e0e4736-{}-01", failed["spanId"].as_str().unwrap())
    );
    let request = collector.last();
    assert_eq!(
        (
            request.method.as_str(),
            request.target().as_str(),
            request.header("content-type").as_str()
        ),
        ("POST", "/v1/traces", "application/json")
    );
    assert_eq!(request.header("x-token"), "otlp-secret");
    // As the protocol's own definition has it.
    let mut check = Command::new(".venv/bin/python")
        .arg("tests/clients/otlp.py")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("make clients has been run");
    std::io::Write::write_all(&mut check.stdin.take().unwrap(), &request.body).unwrap();
    let told = check.wait_with_output().unwrap();
    assert!(told.status.success());
    assert!(String::from_utf8_lossy(&told.stdout).contains("chat mdl"));
}

#[test]
fn traces_that_their_beginners_do_not_keep_are_not_sent() {
    let upstream = Upstream::named("x");
    let (collector, gateway) = traced("", &[&upstream]);
    let unkept = SENT.replace("-01", "-00");
    get(gateway.address(), "/svc/mdl/x", &[&format!("traceparent: {unkept}")]);
    assert_eq!(upstream.last().header("traceparent"), unkept);
    get(gateway.address(), "/svc/mdl/x", &[]);
    eventually("a span comes", || !spans(&collector).is_empty());
    let id = upstream.last().header("traceparent")[3..35].to_owned();
    assert!(spans(&collector).iter().all(|span| span["traceId"] == json!(id)));
}

#[test]
fn the_last_spans_are_sent_before_the_process_ends() {
    let upstream = Upstream::named("x");
    let (collector, mut gateway) = traced("", &[&upstream]);
    get(gateway.address(), "/svc/mdl/x", &[]);
    gateway.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(gateway.wait_end().success());
    assert!(!spans(&collector).is_empty());
}

#[test]
fn a_second_signal_ends_it_at_once_with_spans_that_wait() {
    let upstream = Upstream::start(|seen, reply| {
        if seen.target().ends_with("hang") {
            reply.wait_closed();
        }
    });
    let (collector, mut gateway) = traced("", &[&upstream]);
    let mut hanging = Connection::open(gateway.address());
    hanging.write(b"GET /svc/mdl/hang HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    eventually("one hangs", || gateway.inflight() == 1);
    get(gateway.address(), "/svc/mdl/x", &[]);
    gateway.signal(nix::sys::signal::Signal::SIGTERM);
    gateway.wait_log("draining for at most");
    gateway.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(gateway.wait_end().code(), Some(1));
    assert!(!gateway.log().iter().any(|line| line.contains("panicked")), "{:#?}", gateway.log());
    assert!(!spans(&collector).is_empty());
}

#[test]
fn a_collector_that_is_away_costs_spans_and_nothing_else() {
    let upstream = Upstream::named("x");
    let (mut collector, mut gateway) = traced("", &[&upstream]);
    collector.kill();
    for _ in 0..50 {
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 200);
    }
    gateway.wait_log("spans go to http://");
    let line = gateway.wait_log("takes no spans, they are lost");
    assert!(!line.contains("secret"), "{line}");
    let dropped = || {
        let metrics = Metrics::of(gateway.address());
        metrics.sum("proxy_spans_total", &["outcome=\"dropped\""])
    };
    eventually("the loss is counted", || dropped() >= 50.0);
    collector.restart();
    get(gateway.address(), "/svc/mdl/x", &[]);
    eventually("spans come again", || !spans(&collector).is_empty());
}
