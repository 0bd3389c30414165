//! A line of the request log.

use std::borrow::Cow;
use std::net::IpAddr;

use jiff::Timestamp;
use rust_decimal::Decimal;
use serde::{Serialize, Serializer};

use super::super::millis;
use super::super::phases::{Phase, Phases};
use super::super::record::Record;
use crate::digits;

/// The longest text from outside, in bytes: a path may be 8 KiB long.
const TEXT_BYTES_MAX: usize = 1024;

/// The names of all fields are for programs: they stay.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    request_id: &'a str,
    trace_id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    key: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<IpAddr>,
    method: &'a str,
    path: Cow<'a, str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    service: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    model: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    backend: &'a str,
    attempts: u32,
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<&'a str>,
    bytes_in: u64,
    bytes_out: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens_input: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens_output: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens_cached: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    estimated: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost: Option<Decimal>,
    #[serde(skip_serializing_if = "Option::is_none")]
    currency: Option<&'a str>,
    duration_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    ttfb_ms: Option<f64>,
    #[serde(serialize_with = "phases")]
    phases_ms: &'a Phases,
    stream: bool,
    aborted: bool,
}

/// The line of an exchange, with its end.
pub(super) fn of(record: &Record<'_>) -> Vec<u8> {
    let taken = record.taken.as_ref();
    let time = Timestamp::try_from(record.began).unwrap_or_default();
    let trace_id = digits::hex::<32>(record.trace.id);
    let line = Line {
        time: format!("{time:.6}"),
        request_id: record.request_id,
        trace_id: std::str::from_utf8(&trace_id).expect("digits are text"),
        key: record.key_id(),
        address: record.address,
        method: record.method,
        path: String::from_utf8_lossy(&record.path[..record.path.len().min(TEXT_BYTES_MAX)]),
        service: record.service,
        model: shortened(record.model),
        backend: record.backend,
        attempts: record.attempts,
        status: record.status,
        refusal: record.refusal,
        limit: record.limit,
        error: record.fault,
        why: record.why.as_deref(),
        bytes_in: record.bytes_in,
        bytes_out: record.bytes_out,
        tokens_input: taken.map(|taken| taken.input),
        tokens_output: taken.map(|taken| taken.output),
        tokens_cached: taken.map(|taken| taken.cached),
        estimated: taken.map(|taken| taken.is_estimated),
        cost: taken.and_then(|taken| taken.cost),
        currency: taken.filter(|taken| taken.cost.is_some()).map(|taken| &*taken.currency),
        duration_ms: millis(record.duration()),
        ttfb_ms: record.first_byte.map(millis),
        phases_ms: record.phases,
        stream: record.is_stream,
        aborted: record.is_aborted,
    };
    let mut bytes = Vec::with_capacity(768);
    serde_json::to_writer(&mut bytes, &line).expect("a line is made of texts and numbers");
    bytes.push(b'\n');
    bytes
}

fn shortened(text: &str) -> &str {
    let fits = |at: &usize| *at <= TEXT_BYTES_MAX;
    let ends = text.char_indices().map(|(at, letter)| at + letter.len_utf8());
    &text[..ends.take_while(fits).last().unwrap_or_default()]
}

/// Those in which any time was spent.
fn phases<S: Serializer>(phases: &Phases, serializer: S) -> Result<S::Ok, S::Error> {
    let spent = Phase::ALL.into_iter().filter(|phase| !phases.spent(*phase).is_zero());
    serializer.collect_map(spent.map(|phase| (phase.as_str(), millis(phases.spent(phase)))))
}
