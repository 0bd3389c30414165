//! What is told of exchanges: metrics, logs, traces.

use std::path::{Path, PathBuf};

use http::{HeaderName, HeaderValue};
use url::Url;

use super::super::defaults;
use super::super::file::{FileConfig, FileLogFormat, FileRequestLog, FileTraces};
use super::super::observed::{LogFormat, LogTarget, Observed, RequestLogSpec, TraceSpec};
use super::super::problem::{KeyPath, Problems};
use super::super::snapshot::DefaultsOf;
use super::Context;
use super::hooks::expression;
use crate::expression::{Gives, Moment};

/// The name of standard output.
const STDOUT: &str = "-";

/// What is told.
pub(super) fn observed(
    file: &FileConfig,
    context: &Context<'_>,
    problems: &mut Problems,
) -> Observed {
    let format = file.log.as_ref().and_then(|log| log.format);
    Observed {
        metrics: file.metrics.as_ref().and_then(|metrics| metrics.enabled).unwrap_or(true),
        log_format: match format {
            Some(FileLogFormat::Json) => LogFormat::Json,
            Some(FileLogFormat::Text) | None => LogFormat::Text,
        },
        request_log: request_log(file.request_log.as_ref(), context, problems),
        traces: file.traces.as_ref().and_then(|traces| self::traces(traces, problems)),
    }
}

/// The request log: on where it is asked for, and where the defaults are those of the tools that had one.
fn request_log(
    written: Option<&FileRequestLog>,
    context: &Context<'_>,
    problems: &mut Problems,
) -> Option<RequestLogSpec> {
    let at = KeyPath::default().key("request_log");
    let is_default = context.defaults.of == DefaultsOf::BackendsJson;
    let is_enabled = written.and_then(|log| log.enabled);
    if !is_enabled.unwrap_or(written.is_some() || is_default) {
        return None;
    }
    let none = FileRequestLog::default();
    let is_asked_for = written.is_some();
    let written = written.unwrap_or(&none);
    let path = match (written.file.as_deref(), &context.logs_directory) {
        (Some(path), _) => context.files.folder.join(path),
        (None, Some(folder)) => folder.join(defaults::REQUEST_LOG_NAME),
        // Who comes from those tools has it where they were started.
        (None, None) if is_default => PathBuf::from(defaults::REQUEST_LOG_FILE),
        (None, None) => context.files.folder.join(defaults::REQUEST_LOG_FILE),
    };
    if written.file.as_deref().is_some_and(|path| path.trim().is_empty() || path.ends_with('/')) {
        problems.value(&at.key("file"), "expected a path, or - for standard output");
    }
    let target = if written.file.as_deref() == Some(STDOUT) {
        LogTarget::Stdout
    } else {
        LogTarget::File {
            path: std::path::absolute(&path).unwrap_or(path),
            rotate_bytes: written.rotate_bytes.map_or(defaults::ROTATE_BYTES, |it| it.0 as u64),
            rotate_after: written.rotate_after.map_or(defaults::ROTATE_AFTER, |it| it.0),
            keep: written.keep.unwrap_or(defaults::ROTATE_KEEP),
        }
    };
    let queue = written.queue_bytes_max.map_or(defaults::REQUEST_LOG_QUEUE_BYTES_MAX, |it| it.0);
    if queue < QUEUE_BYTES_MIN {
        problems.value(&at.key("queue_bytes_max"), "expected 64KiB or more");
    }
    Some(RequestLogSpec {
        target,
        is_asked_for,
        sample: share(written.sample, &at.key("sample"), problems),
        when: written.when.as_ref().and_then(|text| {
            expression(text, &at.key("when"), Moment::End, Gives::Condition, problems)
        }),
        queue_bytes_max: queue,
    })
}

/// As little as makes sense: what comes within some milliseconds.
const QUEUE_BYTES_MIN: usize = 64 * 1024;

fn traces(written: &FileTraces, problems: &mut Problems) -> Option<TraceSpec> {
    let at = KeyPath::default().key("traces");
    let Some(url) = written.otlp_url.as_deref() else {
        problems.value(&at, "\"otlp_url\" is missing, such as http://127.0.0.1:4318/v1/traces");
        return None;
    };
    let parsed = Url::parse(url).ok();
    let is_web = |it: &Url| matches!(it.scheme(), "http" | "https") && it.has_host();
    // It is in the log: a credential belongs into a header.
    let is_bare = |it: &Url| it.username().is_empty() && it.password().is_none();
    let parsed = parsed.filter(|it| is_web(it) && is_bare(it));
    if parsed.is_none() {
        problems.value(
            &at.key("otlp_url"),
            "expected an address such as http://127.0.0.1:4318/v1/traces",
        );
    }
    let mut headers = Vec::new();
    for (name, value) in written.headers.iter().flatten() {
        let value = value.as_ref().map(|it| HeaderValue::from_str(it.0.expose()));
        match (HeaderName::from_bytes(name.as_bytes()), value) {
            (Ok(name), Some(Ok(mut value))) => {
                value.set_sensitive(true);
                headers.push((name, value));
            }
            _ => problems.value(&at.key("headers").key(name), "cannot be a header"),
        }
    }
    let queue_max = written.queue_max.unwrap_or(defaults::TRACES_QUEUE_MAX);
    if queue_max == 0 {
        problems.value(&at.key("queue_max"), "must be more than 0");
    }
    let sample = share(written.sample, &at.key("sample"), problems);
    Some(TraceSpec {
        url: parsed?,
        headers,
        sample,
        queue_max: queue_max as usize,
        service_name: written.service_name.clone().unwrap_or_else(|| "tollgate".to_owned()),
    })
}

fn share(written: Option<f64>, at: &KeyPath, problems: &mut Problems) -> f64 {
    let share = written.unwrap_or(1.0);
    if !(0.0..=1.0).contains(&share) {
        problems.value(at, "expected a share from 0 to 1");
    }
    share
}

/// The folder that systemd gives for logs, if it does.
pub(super) fn logs_directory(variable: Option<&str>) -> Option<PathBuf> {
    variable.and_then(|folders| folders.split(':').next()).map(|it| Path::new(it).to_owned())
}
