//! What is told of exchanges, and where, as it is configured.

use std::path::PathBuf;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use url::{Position, Url};

use crate::expression::Expression;

/// What is told of exchanges.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// Whether they are counted, and counts shown.
    pub metrics: bool,
    /// How the application log writes.
    pub log_format: LogFormat,
    /// Where each has a line, if it has.
    pub request_log: Option<RequestLogSpec>,
    /// Where their spans go, if they do.
    pub traces: Option<TraceSpec>,
}

impl Observed {
    /// Where exchanges are told of, for the first lines of the application log.
    #[must_use]
    pub fn places(&self) -> Vec<String> {
        let log = self.request_log.as_ref().map(|spec| match &spec.target {
            LogTarget::Stdout => "request log on standard output".to_owned(),
            LogTarget::File { path, .. } => format!("request log in {}", path.display()),
        });
        // Without a query, which may hold a key.
        let traces = self.traces.as_ref();
        let traces = traces.map(|spec| format!("spans go to {}", &spec.url[..Position::AfterPath]));
        log.into_iter().chain(traces).collect()
    }
}

/// How the application log writes a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// A JSON object.
    Json,
}

/// The request log.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestLogSpec {
    /// Where lines go.
    pub target: LogTarget,
    /// Whether somebody asked for it: one that is just the default does not keep the gateway from starting.
    pub is_asked_for: bool,
    /// Share of the exchanges that went well which have a line, 0 to 1; the others all have one.
    pub sample: f64,
    /// Which exchanges have one at all, of those whose model was known; none: all.
    pub when: Option<Expression>,
    /// Most bytes of lines that wait for the disk.
    pub queue_bytes_max: usize,
}

/// Where lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogTarget {
    /// Standard output.
    Stdout,
    /// A file.
    File {
        /// Its path.
        path: PathBuf,
        /// It is put aside when it is this large, in bytes; 0: never.
        rotate_bytes: u64,
        /// It is put aside when it is this old; zero: never.
        rotate_after: Duration,
        /// As many that were put aside are kept.
        keep: u32,
    },
}

/// Where spans go.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceSpec {
    /// Takes them as OTLP/HTTP with JSON.
    pub url: Url,
    /// What is sent along, marked sensitive.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Share of the traces begun here that are sent, 0 to 1. Of others their beginners have decided.
    pub sample: f64,
    /// Most spans that wait to be sent.
    pub queue_max: usize,
    /// What this service is called in them.
    pub service_name: String,
}
