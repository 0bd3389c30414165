//! A line of the request log. The names of all fields are for programs: they stay.

use std::cell::RefCell;
use std::time::{Duration, UNIX_EPOCH};

use super::super::phases::Phase;
use super::super::record::Record;
use crate::writing::{self, Object, Times};

/// The longest text from outside, in bytes: a path may be 8 KiB long.
const TEXT_BYTES_MAX: usize = 1024;

/// What most lines are shorter than.
const LINE_BYTES: usize = 1024;

thread_local! {
    static TIMES: RefCell<Times> = RefCell::default();
}

/// The line of an exchange, with its end.
pub(super) fn of(record: &Record<'_>) -> Vec<u8> {
    let since_1970 = record.began.duration_since(UNIX_EPOCH).unwrap_or_default();
    let began = i64::try_from(since_1970.as_micros()).unwrap_or(i64::MAX);
    let trace_id = writing::hex::<32>(record.trace.id);
    let path = String::from_utf8_lossy(&record.path[..record.path.len().min(TEXT_BYTES_MAX)]);
    let mut bytes = Vec::with_capacity(LINE_BYTES);
    let mut line = Object::begin(&mut bytes);
    TIMES.with_borrow_mut(|times| {
        line.time("time", began, times);
    });
    line.text("request_id", record.request_id);
    line.text("trace_id", std::str::from_utf8(&trace_id).expect("digits are text"));
    text_if_any(&mut line, "key", record.key_id());
    if let Some(address) = record.address {
        line.address("address", address);
    }
    line.text("method", record.method).text("path", &path);
    text_if_any(&mut line, "service", record.service);
    text_if_any(&mut line, "model", shortened(record.model));
    text_if_any(&mut line, "backend", record.backend);
    line.number("attempts", record.attempts.into()).number("status", record.status.into());
    let why = record.why.as_deref();
    for (name, value) in [
        ("refusal", record.refusal),
        ("limit", record.limit),
        ("error", record.fault),
        ("why", why),
    ] {
        if let Some(value) = value {
            line.text(name, value);
        }
    }
    line.number("bytes_in", record.bytes_in).number("bytes_out", record.bytes_out);
    if let Some(outcome) = record.cache {
        line.text("cache", outcome);
    }
    if let Some(saved) = &record.saved {
        line.number("saved_input", saved.input).number("saved_output", saved.output);
        if let Some(cost) = saved.cost {
            line.shown("saved_cost", cost).text("currency", &saved.currency);
        }
    }
    if let Some(taken) = &record.taken {
        line.number("tokens_input", taken.input).number("tokens_output", taken.output);
        line.number("tokens_cached", taken.cached).truth("estimated", taken.is_estimated);
        if let Some(cost) = taken.cost {
            line.shown("cost", cost).text("currency", &taken.currency);
        }
    }
    line.thousandths("duration_ms", micros(record.duration()));
    if let Some(first_byte) = record.first_byte {
        line.thousandths("ttfb_ms", micros(first_byte));
    }
    phases(&mut line, record);
    line.truth("stream", record.is_stream).truth("aborted", record.is_aborted);
    for (name, text) in record.notes {
        line.text(name, text);
    }
    line.end();
    bytes.push(b'\n');
    bytes
}

fn text_if_any(line: &mut Object<'_>, name: &str, value: &str) {
    if !value.is_empty() {
        line.text(name, value);
    }
}

fn shortened(text: &str) -> &str {
    let fits = |at: &usize| *at <= TEXT_BYTES_MAX;
    let ends = text.char_indices().map(|(at, letter)| at + letter.len_utf8());
    &text[..ends.take_while(fits).last().unwrap_or_default()]
}

/// Those in which any time was spent.
fn phases(line: &mut Object<'_>, record: &Record<'_>) {
    let mut phases = line.object("phases_ms");
    for phase in Phase::ALL {
        let spent = record.phases.spent(phase);
        if !spent.is_zero() {
            phases.thousandths(phase.as_str(), micros(spent));
        }
    }
    phases.end();
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
