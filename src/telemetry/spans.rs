//! Spans of exchanges, as OpenTelemetry's protocol has them in JSON (OTLP 1.5, `ExportTraceServiceRequest`): one of the
//! exchange, below it one of each attempt and of each phase that it waited in.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::sync::Notify;

use super::millis;
use super::phases::Phase;
use super::record::Record;
use crate::config::TraceSpec;

/// As many are sent at once.
const AT_ONCE: usize = 512;

/// The longest path that is told, in bytes.
const PATH_BYTES_MAX: usize = 1024;

/// Kinds of spans: what is inside a service, what answers, what asks.
const INTERNAL: u8 = 1;
const SERVER: u8 = 2;
const CLIENT: u8 = 3;

/// The status of a span that failed.
const FAILED: u8 = 2;

/// Spans that wait to be sent.
#[derive(Debug, Default)]
pub struct Spans {
    waiting: Mutex<VecDeque<Value>>,
    more: Notify,
    sent: AtomicU64,
    dropped: AtomicU64,
}

/// An attempt, as far as a trace tells of it.
#[derive(Clone, Debug)]
pub struct Try {
    /// Its span.
    pub span: u64,
    /// The backend's id.
    pub backend: String,
    /// Where that is: host and port.
    pub authority: String,
    /// When it was chosen.
    pub began: Instant,
    /// When the attempt was over; none: with the exchange.
    pub ended: Option<Instant>,
    /// Why it failed, if it did.
    pub why: Option<String>,
}

impl Spans {
    /// An exchange is over, which began at `began`.
    pub fn add(&self, record: &Record<'_>, tries: &[Try], began: Instant, spec: &TraceSpec) {
        // About as many: what there is no room for is not made.
        let about = 1 + tries.len() + record.phases.turns().len();
        if self.count() + about > spec.queue_max {
            return self.dropped(about);
        }
        let clock = Clock { began, at: record.began };
        let end = began + record.duration();
        let mut spans = vec![exchange(record, &clock, end)];
        spans.extend(tries.iter().map(|it| attempt(record, it, &clock, end)));
        let turns = record.phases.turns();
        for (at, (phase, from)) in turns.iter().enumerate() {
            let until = turns.get(at + 1).map_or(end, |(_, until)| *until);
            // What it does itself is the rest.
            if *phase != Phase::Own && until > *from {
                spans.push(self::phase(record, *phase, clock.nanos(*from), clock.nanos(until)));
            }
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() + spans.len() > spec.queue_max {
            drop(waiting);
            self.dropped(spans.len());
            return;
        }
        waiting.extend(spans);
        if waiting.len() >= AT_ONCE {
            self.more.notify_one();
        }
    }

    fn count(&self) -> usize {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Returns when there are many to send.
    pub async fn many(&self) {
        self.more.notified().await;
    }

    /// The next ones to send, and how many they are; none: nothing waits.
    #[must_use]
    pub fn take(&self, spec: &TraceSpec) -> Option<(String, usize)> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let count = waiting.len().min(AT_ONCE);
        let spans: Vec<Value> = waiting.drain(..count).collect();
        drop(waiting);
        if count == 0 {
            return None;
        }
        let resource = attributes([
            ("service.name", json!(spec.service_name)),
            ("service.version", json!(env!("CARGO_PKG_VERSION"))),
        ]);
        let body = json!({"resourceSpans": [{
            "resource": {"attributes": resource},
            "scopeSpans": [{"scope": {"name": "tollgate"}, "spans": spans}],
        }]});
        Some((body.to_string(), count))
    }

    /// So many were sent.
    pub fn sent(&self, count: usize) {
        self.sent.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// So many are lost.
    pub fn dropped(&self, count: usize) {
        self.dropped.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Spans that were sent, and that are lost, since the start.
    #[must_use]
    pub fn counts(&self) -> [u64; 2] {
        [&self.sent, &self.dropped].map(|count| count.load(Ordering::Relaxed))
    }
}

/// From moments of an exchange to times of the day.
struct Clock {
    began: Instant,
    at: SystemTime,
}

impl Clock {
    /// Nanoseconds since 1970, in text: JSON's numbers end before.
    fn nanos(&self, at: Instant) -> String {
        let at = self.at + at.saturating_duration_since(self.began);
        at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string()
    }
}

fn exchange(record: &Record<'_>, clock: &Clock, end: Instant) -> Value {
    let path = String::from_utf8_lossy(&record.path[..record.path.len().min(PATH_BYTES_MAX)]);
    let mut known = vec![
        ("http.request.method", json!(record.method)),
        ("url.path", json!(path)),
        ("http.response.status_code", json!(record.status)),
        ("tollgate.request_id", json!(record.request_id)),
        ("tollgate.attempts", json!(record.attempts)),
        ("tollgate.overhead_ms", json!(millis(record.phases.spent(Phase::Own)))),
    ];
    if let Some(address) = record.address {
        known.push(("client.address", json!(address.to_string())));
    }
    if !record.key_id().is_empty() {
        known.push(("tollgate.key", json!(record.key_id())));
    }
    if !record.service.is_empty() {
        known.push(("tollgate.service", json!(record.service)));
        known.push(("gen_ai.request.model", json!(record.model)));
    }
    let error = record.fault.or(record.refusal).or(record.is_aborted.then_some("client_left"));
    if let Some(error) = error {
        known.push(("error.type", json!(error)));
    }
    if record.is_aborted {
        known.push(("tollgate.aborted", json!(true)));
    }
    if let Some(first_byte) = record.first_byte {
        known.push(("gen_ai.response.time_to_first_chunk", json!(first_byte.as_secs_f64())));
    }
    if let Some(taken) = &record.taken {
        known.push(("gen_ai.usage.input_tokens", json!(taken.input)));
        known.push(("gen_ai.usage.output_tokens", json!(taken.output)));
        known.push(("gen_ai.usage.cache_read.input_tokens", json!(taken.cached)));
    }
    let operation = operation(&path);
    if let Some((operation, provider)) = operation {
        known.push(("gen_ai.operation.name", json!(operation)));
        known.push(("gen_ai.provider.name", json!(provider)));
    }
    let name = match operation {
        Some((operation, _)) if !record.model.is_empty() => format!("{operation} {}", record.model),
        _ => record.method.to_owned(),
    };
    let why = record.fault.map(|_| record.why.as_deref().unwrap_or_default());
    let times = [clock.nanos(clock.began), clock.nanos(end)];
    let span = Span { kind: SERVER, name, id: record.trace.span, parent: record.trace.parent };
    span.json(record, times, attributes(known), why)
}

fn attempt(record: &Record<'_>, attempt: &Try, clock: &Clock, end: Instant) -> Value {
    let (host, port) = attempt.authority.rsplit_once(':').unwrap_or((&attempt.authority, ""));
    let mut known = vec![
        ("tollgate.backend", json!(attempt.backend)),
        ("server.address", json!(host)),
        ("gen_ai.request.model", json!(record.model)),
    ];
    if let Ok(port) = port.parse::<u16>() {
        known.push(("server.port", json!(port)));
    }
    let times = [clock.nanos(attempt.began), clock.nanos(attempt.ended.unwrap_or(end))];
    let name = format!("attempt {}", attempt.backend);
    let span = Span { kind: CLIENT, name, id: attempt.span, parent: Some(record.trace.span) };
    span.json(record, times, attributes(known), attempt.why.as_deref())
}

fn phase(record: &Record<'_>, phase: Phase, from: String, until: String) -> Value {
    let id = fastrand::u64(1..);
    let name = phase.as_str().to_owned();
    let span = Span { kind: INTERNAL, name, id, parent: Some(record.trace.span) };
    span.json(record, [from, until], attributes([]), None)
}

struct Span {
    kind: u8,
    name: String,
    id: u64,
    parent: Option<u64>,
}

impl Span {
    fn json(
        self,
        record: &Record<'_>,
        [from, until]: [String; 2],
        attributes: Value,
        failed: Option<&str>,
    ) -> Value {
        let mut span = json!({
            "traceId": format!("{:032x}", record.trace.id),
            "spanId": format!("{:016x}", self.id),
            "name": self.name,
            "kind": self.kind,
            "startTimeUnixNano": from,
            "endTimeUnixNano": until,
            "attributes": attributes,
        });
        if let Some(parent) = self.parent {
            span["parentSpanId"] = json!(format!("{parent:016x}"));
        }
        if let Some(why) = failed {
            span["status"] = json!({"code": FAILED, "message": why});
        }
        span
    }
}

/// As the protocol has attributes: each value with its type, integers in text.
fn attributes<'a>(known: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
    let attribute = |(key, value): (&str, Value)| {
        let value = match value {
            Value::Number(number) if number.is_f64() => json!({"doubleValue": number}),
            Value::Number(number) => json!({"intValue": number.to_string()}),
            Value::Bool(is) => json!({"boolValue": is}),
            Value::String(text) => json!({"stringValue": text}),
            other => json!({"stringValue": other.to_string()}),
        };
        json!({"key": key, "value": value})
    };
    known.into_iter().map(attribute).collect()
}

/// What is asked for by a path, and in whose API, in the words of OpenTelemetry's conventions.
fn operation(path: &str) -> Option<(&'static str, &'static str)> {
    let last = path.rsplit(['/', ':']).next()?;
    Some(match last {
        "completions" if path.ends_with("/chat/completions") => ("chat", "openai"),
        "completions" => ("text_completion", "openai"),
        "responses" => ("chat", "openai"),
        "embeddings" => ("embeddings", "openai"),
        "messages" => ("chat", "anthropic"),
        "generateContent" | "streamGenerateContent" => ("generate_content", "gcp.gemini"),
        "embedContent" | "batchEmbedContents" => ("embeddings", "gcp.gemini"),
        _ => return None,
    })
}
