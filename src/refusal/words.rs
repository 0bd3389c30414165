//! The words of a refusal.

use std::time::Duration;

use super::{LimitKind, Refusal};
use crate::llm::CODINGS;

/// Longest piece of a client's own text that a message repeats, in characters.
const ECHO_CHARS_MAX: usize = 120;

/// What the paths of LLM APIs begin with behind their version.
const API_PATHS: [&str; 9] = [
    "audio",
    "chat",
    "completions",
    "embeddings",
    "images",
    "messages",
    "models",
    "realtime",
    "responses",
];

impl Refusal {
    /// What the client is told.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::BadRequest { reason } | Self::BodyMalformed { reason } => (*reason).to_owned(),
            Self::CodingUnknown => format!("the body's Content-Encoding is none of {CODINGS}"),
            Self::NeedsTls => "this port takes https: change the URL's http to https".into(),
            Self::NeedsPlain => "this port takes http: change the URL's https to http".into(),
            Self::ModelMissing => {
                "the request names no model: send \"model\", or the header X-Tollgate-Model".into()
            }
            Self::ModelAmbiguous => "the request names more than one \"model\": send one".into(),
            Self::ModelTooLate { bytes_max } => format!(
                "no \"model\" in the first {bytes_max} bytes of the body: send it first, or as the \
                 header X-Tollgate-Model"
            ),
            Self::NoWebSocket { pool } => {
                format!("the backends of {pool} speak HTTP/2 only, and take no WebSocket")
            }
            Self::ModelUnknown { model } => format!("there is no model \"{}\"", echo(model)),
            Self::LengthRequired => "send the body with a Content-Length".into(),
            Self::KeyMissing
            | Self::KeyWrong
            | Self::KeysDiffer
            | Self::KeyInUrl
            | Self::KeyDisabled
            | Self::KeyExpired
            | Self::AddressDenied
            | Self::OtherOrigin
            | Self::NotAllowed => self.about_rights().into(),
            Self::ModelDenied { model } => not_for(model),
            Self::NoRoute { path } => no_route(path),
            Self::NoService { service } => no_service(service),
            Self::NoModel { service, model } => {
                format!("service \"{}\" has no model for \"{}\"", echo(service), echo(model))
            }
            Self::MethodNotAllowed { allow } => format!("this path takes {allow}"),
            Self::HeadSlow => too_slow("head"),
            Self::BodySlow => too_slow("body"),
            Self::BodyTooLarge { bytes_max } => too_large("body is larger", *bytes_max),
            Self::UrlTooLong { bytes_max } => too_large("target is longer", *bytes_max),
            Self::HeadTooLarge { bytes_max } => too_large("headers are larger", *bytes_max),
            Self::Limited { name, kind: LimitKind::Budget, what, .. } => {
                format!("the budget \"{name}\" of {what}")
            }
            Self::Limited { name, what, retry_after, .. } => limited(name, what, *retry_after),
            Self::NoLedger => "usage is not kept here (no \"ledger\" is configured)".into(),
            Self::MetricsOff => "nothing is counted (metrics.enabled, METRICS_ENABLED)".into(),
            Self::Internal => "the gateway failed; its log has the reason".into(),
            Self::BackendFailed { pool } => {
                format!("the backend of {} failed before it answered", echo(pool))
            }
            Self::Hook { message, .. } => message.clone(),
            Self::NoBackend { pool, .. } => later("no backend of", pool, "available now"),
            Self::Busy { pool, .. } => later("every backend of", pool, "busy"),
            Self::Interrupted { pool, why } => {
                format!("the answer of {} was interrupted: {why}", echo(pool))
            }
            Self::TooManyBodies
            | Self::TooManyConnections
            | Self::TooManyReports
            | Self::TooManyViewers
            | Self::LedgerAway
            | Self::TokensUnknown
            | Self::LimitsUnknown
            | Self::Draining => try_again(self.about_now()),
            Self::BackendSlow { pool, deadline, limit } => format!(
                "the backend of {} took too long ({deadline}: {} s)",
                echo(pool),
                limit.as_secs_f64(),
            ),
        }
    }

    /// What passes by itself.
    fn about_now(&self) -> &'static str {
        match self {
            Self::TooManyBodies => "too many requests are being read",
            Self::TooManyConnections => "too many open connections",
            Self::TooManyReports => "other reports are being made",
            Self::TooManyViewers => "too many dashboards are open",
            Self::LedgerAway => "the ledger's database cannot be read now",
            Self::TokensUnknown => "tokens cannot be verified now",
            Self::LimitsUnknown => "rate limits cannot be looked up",
            _ => "the gateway is shutting down",
        }
    }

    /// Who may not pass, and why.
    fn about_rights(&self) -> &'static str {
        match self {
            Self::KeyMissing => {
                "no API key: send it as \"Authorization: Bearer KEY\" or \"X-API-Key: KEY\""
            }
            Self::KeysDiffer => "several different API keys in one request: send one",
            Self::KeyInUrl => {
                "the API key is in the URL, where logs show it: send it in a header alone"
            }
            Self::KeyDisabled => "the API key is switched off: ask for another one",
            Self::KeyExpired => "the API key has expired: ask for a new one",
            Self::AddressDenied => "this is not allowed from your address",
            Self::OtherOrigin => "pages of other origins may not do this",
            Self::NotAllowed => "the API key is not for this",
            _ => "the API key is not valid here",
        }
    }
}

fn no_route(path: &str) -> String {
    format!("nothing at {}: paths are /{{service}}/{{model}}/... or /v1/...", echo(path))
}

/// A client's own text, cut to a length that keeps messages readable.
fn echo(text: &str) -> String {
    let cut: String =
        text.chars().filter(|character| !character.is_control()).take(ECHO_CHARS_MAX).collect();
    if cut.len() < text.len() { format!("{cut}...") } else { cut }
}

fn no_service(service: &str) -> String {
    let is_api = API_PATHS.contains(&service);
    let hint = if is_api { "; an SDK's base URL ends in /v1, Anthropic's before it" } else { "" };
    format!("there is no service \"{}\"{hint}", echo(service))
}

/// Some clients read the time from the text.
fn limited(name: &str, what: &str, retry_after: Duration) -> String {
    let seconds = retry_after.as_secs_f64();
    format!("rate limit \"{name}\" reached: {what}; try again in {seconds:.1}s")
}

fn too_large(what: &str, bytes_max: usize) -> String {
    format!("the request {what} than {bytes_max} bytes")
}

fn not_for(model: &str) -> String {
    format!("the API key is not for model \"{}\"", echo(model))
}

fn try_again(why: &str) -> String {
    format!("{why}; try again")
}

fn too_slow(what: &str) -> String {
    format!("the request {what} did not arrive in time")
}

fn later(who: &str, pool: &str, how: &str) -> String {
    format!("{who} {} is {how}; try again later", echo(pool))
}
