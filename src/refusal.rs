//! Every "no" a client can be told, with its status, its code and its words.

use std::time::Duration;

use http::header::{ACCEPT_ENCODING, ALLOW, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde_json::json;

use crate::llm::{CODINGS, Dialect};

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

/// Why an exchange is refused. A message names what the client asked for, never a backend's
/// address or key: those are for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The request's target or framing is not acceptable.
    BadRequest {
        /// What is wrong, for the client.
        reason: &'static str,
    },
    /// The body, which names the model, cannot be read.
    BodyMalformed {
        /// What is wrong, for the client.
        reason: &'static str,
    },
    /// The body is in a coding that is not known.
    CodingUnknown,
    /// The request names no model, and there is no default.
    ModelMissing,
    /// The request names several models, or one in a way that servers read differently.
    ModelAmbiguous,
    /// The body is larger than is held, and the part that is names no model.
    ModelTooLate {
        /// The bound, in bytes.
        bytes_max: usize,
    },
    /// No model has this name.
    ModelUnknown {
        /// The name asked for.
        model: String,
    },
    /// The body has no length, and its end cannot be waited for.
    LengthRequired,
    /// As many bodies are held as there is room for.
    TooManyBodies,
    /// Its backends take no WebSocket.
    NoWebSocket {
        /// `service/model`.
        pool: String,
    },
    /// No key came with the request.
    KeyMissing,
    /// The key is not one that may pass.
    KeyWrong,
    /// Several credentials came, and they differ.
    KeysDiffer,
    /// A browser sent it for a page of another origin.
    OtherOrigin,
    /// Nothing lives at this path.
    NoRoute {
        /// The path as the client sent it.
        path: String,
    },
    /// No service has this name.
    NoService {
        /// The name asked for.
        service: String,
    },
    /// The service has no such model.
    NoModel {
        /// The service asked for.
        service: String,
        /// What followed it in the path.
        model: String,
    },
    /// A path of our own does not take this method.
    MethodNotAllowed {
        /// The methods it takes, as in the `Allow` header.
        allow: &'static str,
    },
    /// The client took too long to send its request head.
    HeadSlow,
    /// The client took too long to send its body.
    BodySlow,
    /// The request target is longer than allowed.
    UrlTooLong {
        /// The bound, in bytes.
        bytes_max: usize,
    },
    /// The request head is larger than allowed.
    HeadTooLarge {
        /// The bound, in bytes.
        bytes_max: usize,
    },
    /// The request body is larger than allowed.
    BodyTooLarge {
        /// The bound, in bytes.
        bytes_max: usize,
    },
    /// Something went wrong in the gateway itself.
    Internal,
    /// The backend broke the protocol or died before it answered.
    BackendFailed {
        /// `service/model`, as asked for.
        pool: String,
    },
    /// No backend of the pool can take the exchange.
    NoBackend {
        /// `service/model`, as asked for.
        pool: String,
        /// When a new try makes sense.
        retry_after: Duration,
    },
    /// Every backend of the pool is full, and so is the queue; or the wait in it took too long.
    Busy {
        /// `service/model`, as asked for.
        pool: String,
        /// When a place can be expected.
        retry_after: Duration,
    },
    /// The address takes TLS, and the client spoke without.
    NeedsTls,
    /// The address takes no TLS, and the client spoke it.
    NeedsPlain,
    /// There are as many open connections as allowed.
    TooManyConnections,
    /// The gateway is shutting down.
    Draining,
    /// An answer broke off after it had begun.
    Interrupted {
        /// `service/model`, as asked for.
        pool: String,
        /// What happened.
        why: &'static str,
    },
    /// The backend was silent for too long.
    BackendSlow {
        /// `service/model`, as asked for.
        pool: String,
        /// What took too long, as the deadline is called: `connect`, `tls`, `first_byte`, `silence`
        /// or `exchange`.
        deadline: &'static str,
        /// How long the gateway waited.
        limit: Duration,
    },
}

/// What a refusal is on the wire, apart from its message.
struct Shape {
    status: StatusCode,
    openai_type: &'static str,
    code: &'static str,
    anthropic_type: &'static str,
}

impl Refusal {
    /// The HTTP status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.shape().status
    }

    /// The machine-readable code, also the word for logs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.shape().code
    }

    /// Seconds for a `Retry-After` header, where a later try can succeed.
    fn retry_after_seconds(&self) -> Option<u64> {
        match self {
            Self::NoBackend { retry_after, .. } | Self::Busy { retry_after, .. } => {
                // Rounded up: who comes at that time shall find it true.
                Some(retry_after.as_secs_f64().ceil().max(1.0) as u64)
            }
            Self::Draining | Self::TooManyConnections | Self::TooManyBodies => Some(1),
            _ => None,
        }
    }

    /// The headers that belong to the status: when to try again, what to do about it.
    #[must_use]
    pub fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if let Some(seconds) = self.retry_after_seconds() {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Self::MethodNotAllowed { allow } = self {
            headers.insert(ALLOW, HeaderValue::from_static(allow));
        }
        if *self == Self::CodingUnknown {
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static(CODINGS));
        }
        if self.status() == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        headers
    }

    /// The JSON body in the shape of the client's API family.
    #[must_use]
    pub fn body(&self, dialect: Dialect, request_id: &str) -> String {
        let shape = self.shape();
        let message = self.message();
        match dialect {
            Dialect::OpenAi => json!({"error": {
                "message": message, "type": shape.openai_type, "param": null, "code": shape.code,
            }}),
            Dialect::Anthropic => json!({
                "type": "error",
                "error": {"type": shape.anthropic_type, "message": message},
                "request_id": request_id,
            }),
        }
        .to_string()
    }

    /// The last event of an event stream that is cut, in the form of the client's API family. Its
    /// SDK raises it as an error; without one it may take the stream for complete.
    #[must_use]
    pub fn event(&self, dialect: Dialect, request_id: &str) -> String {
        let body = self.body(dialect, request_id);
        match dialect {
            Dialect::OpenAi => format!("data: {body}\n\n"),
            Dialect::Anthropic => format!("event: error\ndata: {body}\n\n"),
        }
    }

    fn shape(&self) -> Shape {
        let (status, openai_type, code, anthropic_type) = match self {
            Self::BadRequest { .. } => {
                (400, "invalid_request_error", "bad_request", "invalid_request_error")
            }
            Self::BodyMalformed { .. } => {
                (400, "invalid_request_error", "invalid_body", "invalid_request_error")
            }
            Self::NeedsTls | Self::NeedsPlain => {
                (400, "invalid_request_error", "wrong_scheme", "invalid_request_error")
            }
            Self::ModelMissing => {
                (400, "invalid_request_error", "model_required", "invalid_request_error")
            }
            Self::ModelAmbiguous => {
                (400, "invalid_request_error", "model_ambiguous", "invalid_request_error")
            }
            Self::NoWebSocket { .. } => {
                (400, "invalid_request_error", "websocket_unsupported", "invalid_request_error")
            }
            Self::KeyMissing => {
                (401, "invalid_request_error", "missing_api_key", "authentication_error")
            }
            Self::KeyWrong | Self::KeysDiffer => {
                (401, "invalid_request_error", "invalid_api_key", "authentication_error")
            }
            Self::OtherOrigin => (403, "invalid_request_error", "other_origin", "permission_error"),
            Self::NoRoute { .. } => (404, "invalid_request_error", "not_found", "not_found_error"),
            Self::NoService { .. } => {
                (404, "invalid_request_error", "service_not_found", "not_found_error")
            }
            Self::NoModel { .. } | Self::ModelUnknown { .. } => {
                (404, "invalid_request_error", "model_not_found", "not_found_error")
            }
            Self::MethodNotAllowed { .. } => {
                (405, "invalid_request_error", "method_not_allowed", "invalid_request_error")
            }
            Self::HeadSlow => (408, "invalid_request_error", "head_timeout", "timeout_error"),
            Self::BodySlow => (408, "invalid_request_error", "body_timeout", "timeout_error"),
            Self::LengthRequired => {
                (411, "invalid_request_error", "length_required", "invalid_request_error")
            }
            Self::BodyTooLarge { .. } | Self::ModelTooLate { .. } => {
                (413, "invalid_request_error", "body_too_large", "request_too_large")
            }
            Self::UrlTooLong { .. } => {
                (414, "invalid_request_error", "url_too_long", "invalid_request_error")
            }
            Self::CodingUnknown => {
                (415, "invalid_request_error", "unsupported_encoding", "invalid_request_error")
            }
            Self::HeadTooLarge { .. } => {
                (431, "invalid_request_error", "headers_too_large", "invalid_request_error")
            }
            Self::Internal => (500, "server_error", "internal_error", "api_error"),
            Self::BackendFailed { .. } => (502, "server_error", "backend_failed", "api_error"),
            Self::NoBackend { .. } => (503, "server_error", "no_backend", "overloaded_error"),
            Self::Busy { .. } | Self::TooManyBodies => {
                (503, "server_error", "busy", "overloaded_error")
            }
            Self::Interrupted { .. } => (502, "upstream_error", "stream_interrupted", "api_error"),
            Self::TooManyConnections => {
                (503, "server_error", "too_many_connections", "overloaded_error")
            }
            Self::Draining => (503, "server_error", "draining", "overloaded_error"),
            Self::BackendSlow { .. } => (504, "server_error", "backend_timeout", "timeout_error"),
        };
        let status = StatusCode::from_u16(status).expect("every status above is a valid one");
        Shape { status, openai_type, code, anthropic_type }
    }

    fn message(&self) -> String {
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
            Self::TooManyBodies => "too many requests are being read; try again".into(),
            Self::KeyMissing => {
                "no API key: send it as \"Authorization: Bearer KEY\" or \"X-API-Key: KEY\"".into()
            }
            Self::KeyWrong => "the API key is not valid here".into(),
            Self::KeysDiffer => "several different API keys in one request: send one".into(),
            Self::OtherOrigin => "pages of other origins may not do this".into(),
            Self::NoRoute { path } => {
                format!(
                    "nothing at {}: paths are /{{service}}/{{model}}/... or /v1/...",
                    echo(path)
                )
            }
            Self::NoService { service } => no_service(service),
            Self::NoModel { service, model } => {
                format!("service \"{}\" has no model for \"{}\"", echo(service), echo(model))
            }
            Self::MethodNotAllowed { allow } => format!("this path takes {allow}"),
            Self::HeadSlow => "the request head did not arrive in time".into(),
            Self::BodySlow => "the request body did not arrive in time".into(),
            Self::BodyTooLarge { bytes_max } => {
                format!("the request body is larger than {bytes_max} bytes")
            }
            Self::UrlTooLong { bytes_max } => {
                format!("the request target is longer than {bytes_max} bytes")
            }
            Self::HeadTooLarge { bytes_max } => {
                format!("the request headers are larger than {bytes_max} bytes")
            }
            Self::Internal => "the gateway failed; its log has the reason".into(),
            Self::BackendFailed { pool } => {
                format!("the backend of {} failed before it answered", echo(pool))
            }
            Self::NoBackend { pool, .. } => {
                format!("no backend of {} is available now; try again later", echo(pool))
            }
            Self::Busy { pool, .. } => {
                format!("every backend of {} is busy; try again later", echo(pool))
            }
            Self::Interrupted { pool, why } => {
                format!("the answer of {} was interrupted: {why}", echo(pool))
            }
            Self::TooManyConnections => "too many open connections; try again".into(),
            Self::Draining => "the gateway is shutting down; try again".into(),
            Self::BackendSlow { pool, deadline, limit } => format!(
                "the backend of {} took too long ({deadline}: {} s)",
                echo(pool),
                limit.as_secs_f64(),
            ),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_has_the_shape_of_the_clients_family() {
        let refusal = Refusal::NoService { service: "gogle".into() };
        assert_eq!(
            refusal.body(Dialect::OpenAi, "r-1"),
            r#"{"error":{"message":"there is no service \"gogle\"","type":"invalid_request_error","param":null,"code":"service_not_found"}}"#
        );
        assert_eq!(
            refusal.body(Dialect::Anthropic, "r-1"),
            r#"{"type":"error","error":{"type":"not_found_error","message":"there is no service \"gogle\""},"request_id":"r-1"}"#
        );
    }

    #[test]
    fn a_long_or_hostile_name_is_cut_and_cleaned() {
        let refusal = Refusal::NoService { service: "chat".into() };
        assert!(refusal.message().contains("ends in /v1"), "{}", refusal.message());
        let refusal = Refusal::NoService { service: format!("a\u{1b}[31m\n{}", "x".repeat(9999)) };
        let message = refusal.message();
        assert!(message.len() < 200 && !message.contains(['\u{1b}', '\n']), "{message}");
    }

    #[test]
    fn only_refusals_that_pass_by_themselves_say_when_to_try_again() {
        let pool = "s/m".to_owned();
        let retry_after = Duration::from_millis(200);
        assert_eq!(Refusal::NoBackend { pool, retry_after }.retry_after_seconds(), Some(1));
        assert_eq!(Refusal::Draining.retry_after_seconds(), Some(1));
        assert_eq!(Refusal::KeyWrong.retry_after_seconds(), None);
    }
}
