//! What is told of exchanges: request ids and traces, words for the log, metrics, the request log, and what went on
//! in the last half hour.

mod app_log;
mod counters;
pub mod history;
pub mod metrics;
mod phases;
mod recent;
mod record;
mod request_log;
mod spans;
mod spread;
mod takers;
mod trace;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use http::{HeaderMap, HeaderName, HeaderValue};
use pingora_core::{Error, ErrorType};

pub use app_log::AppLog;
pub use counters::{CacheTotals, Counters, Fault, OTHER, Series, Totals};
pub use history::History;
pub use phases::{Phase, Phases};
pub use recent::Recent;
pub use record::{Record, Saved, Taken};
pub use request_log::RequestLog;
pub use spans::{Spans, Try};
pub use takers::Taker;
pub use trace::{TRACEPARENT, TRACESTATE, Trace};

use crate::config::Observed;
use crate::writing;

/// What this process tells of itself, and to whom.
pub struct Telemetry {
    /// Counts since the start.
    pub counters: Counters,
    /// The last half hour.
    pub history: History,
    /// A line an exchange.
    pub request_log: RequestLog,
    /// Traces.
    pub spans: Spans,
}

impl Telemetry {
    /// Begins to tell as configured.
    ///
    /// # Errors
    /// As [`RequestLog::start`] and [`Counters::new`].
    pub fn start(observed: &Observed) -> Result<Self> {
        let counters = Counters::new()?;
        let history = History::new(&counters);
        let request_log = RequestLog::start(observed.request_log.as_ref())?;
        Ok(Self { counters, history, request_log, spans: Spans::default() })
    }

    /// Another configuration is at work.
    pub async fn configure(self: &Arc<Self>, before: &Observed, next: Observed) {
        let target = |observed: &Observed| observed.request_log.clone().map(|spec| spec.target);
        if target(before) == target(&next) {
            return;
        }
        let own = Arc::clone(self);
        // A disk may be slow.
        let turn = move || own.request_log.configure(next.request_log.as_ref());
        let _ = tokio::task::spawn_blocking(turn).await;
    }

    /// An exchange is over: writes its line, where there is a request log.
    pub fn write(&self, observed: &Observed, record: &Record<'_>) {
        if let Some(spec) = observed.request_log.as_ref().filter(|_| record.is_logged) {
            self.request_log.write(record, spec);
        }
    }

    /// An exchange of a trace that is kept is over, which began at `began`: keeps its spans to be sent.
    pub fn trace(
        &self,
        observed: &Observed,
        record: &Record<'_>,
        (tries, began): (&[Try], Instant),
    ) {
        if let Some(spec) = &observed.traces {
            self.spans.add(record, tries, began, spec);
        }
    }
}

/// The header that carries a request's id, in both directions.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest request id of a client that is kept, in bytes.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// The client's request id, if it is sane, else a new one of 32 hexadecimal digits.
#[must_use]
pub fn request_id(headers: &HeaderMap) -> HeaderValue {
    let is_sane = |value: &HeaderValue| {
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:/+=@~".contains(byte);
        (1..=REQUEST_ID_BYTES_MAX).contains(&value.len()) && value.as_bytes().iter().all(is_plain)
    };
    if let Some(own) = headers.get(REQUEST_ID).filter(|value| is_sane(value)) {
        return own.clone();
    }
    HeaderValue::from_bytes(&writing::hex::<32>(fastrand::u128(..)))
        .expect("hexadecimal digits can stand in a header")
}

/// What Pingora attaches to a failed connection, as if it were a cause.
const NO_CAUSE: &str = "local address";

/// The deepest cause of a failure in a few words: Pingora's own text repeats every layer.
#[must_use]
pub fn brief(error: &Error) -> String {
    let mut innermost = error;
    let mut context = error.context.as_ref();
    while let Some(inner) =
        innermost.cause.as_ref().and_then(|cause| cause.downcast_ref::<Box<Error>>())
    {
        innermost = inner;
        context = inner.context.as_ref().or(context);
    }
    let cause = innermost.cause.as_ref().map(ToString::to_string);
    match (cause.filter(|cause| !cause.starts_with(NO_CAUSE)), &innermost.etype, context) {
        (Some(cause), _, _) => cause,
        (None, ErrorType::HTTPStatus(status), _) => format!("status {status}"),
        // Of TLS Pingora tells all layers as text.
        (None, ErrorType::TLSHandshakeFailure, Some(context)) => {
            let context = context.as_str();
            let cause = context.rsplit_once("cause: ").map_or(context, |(_, cause)| cause);
            format!("TLS: {}", cause.trim())
        }
        (None, kind, Some(context)) => format!("{} ({})", kind.as_str(), context.as_str()),
        (None, kind, None) => kind.as_str().to_owned(),
    }
}

/// As [`brief`], of a failure towards a backend: with what to do about it, where its words do not say it.
#[must_use]
pub fn advice(error: &Error) -> String {
    let text = brief(error);
    let hint = HINTS.iter().find(|(mark, _)| text.contains(mark)).map_or("", |(_, hint)| hint);
    format!("{text}{hint}")
}

/// What to do about failures whose own words do not say it.
const HINTS: [(&str, &str); 4] = [
    ("UnknownIssuer", ": set tls.ca_file to the certificate of its authority"),
    ("NotValidForName", ": set tls.server_name to a name that its certificate is for"),
    ("CertificateRequired", ": set tls.cert_file and tls.key_file"),
    ("tls handshake eof", ": does it speak https?"),
];

/// Milliseconds of an exchange, to the microsecond.
#[allow(clippy::cast_precision_loss, reason = "microseconds of an exchange")]
fn millis(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_cause_is_told() {
        let refused = std::io::Error::from_raw_os_error(111);
        let inner = Error::because(ErrorType::ConnectRefused, "to 10.0.0.1", refused);
        let outer = Error::because(ErrorType::ConnectError, "layer", inner);
        assert_eq!(brief(&outer), "Connection refused (os error 111)");
        let status = Error::explain(ErrorType::HTTPStatus(503), "not the expected status");
        assert_eq!(brief(&status), "status 503");
        let plain = Error::explain(ErrorType::ReadTimedout, "no answer in 5s");
        assert_eq!(brief(&plain), "ReadTimedout (no answer in 5s)");
        assert_eq!(brief(&Error::new(ErrorType::ConnectionClosed)), "ConnectionClosed");
        let mut tls = Error::explain(ErrorType::TLSHandshakeFailure, "unknown issuer");
        tls.set_cause("local address 127.0.0.1:1");
        let tls = tls.more_context("connecting");
        assert_eq!(brief(&tls), "TLS: unknown issuer");
        let layers = "TLS connect() failed:  TLSHandshakeFailure context: x cause: UnknownIssuer";
        let tls = Error::explain(ErrorType::TLSHandshakeFailure, layers);
        assert_eq!(brief(&tls), "TLS: UnknownIssuer");
        assert!(
            advice(&tls).starts_with("TLS: UnknownIssuer: set tls.ca_file"),
            "{}",
            advice(&tls)
        );
    }
}
