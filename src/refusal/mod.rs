//! Every "no" a client can be told, with its status, its code and its words.

mod shape;
mod words;

use std::time::Duration;

use http::header::{ACCEPT_ENCODING, ALLOW, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde_json::json;

use crate::llm::{CODINGS, Dialect};

/// As [`RETRY_AFTER`], in milliseconds; OpenAI's and Anthropic's SDKs read it.
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");

/// Tells the same SDKs whether to try again at all.
const X_SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

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
    /// The key came in the URL, too.
    KeyInUrl,
    /// The key is one that was switched off.
    KeyDisabled,
    /// The key is one whose time is over.
    KeyExpired,
    /// The public keys are not there that a token could be verified with.
    TokensUnknown,
    /// Nobody from this address may do this, or not with this key.
    AddressDenied,
    /// The key is not for this model, whether there is one of this name or not.
    ModelDenied {
        /// The name asked for.
        model: String,
    },
    /// The key is not for what belongs to no model, or not for what concerns all.
    NotAllowed,
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
    /// The client has taken as much as it may.
    Limited {
        /// What the limit is called.
        name: String,
        /// What is limited.
        kind: LimitKind,
        /// How much there may be of it.
        what: String,
        /// When it allows this.
        retry_after: Duration,
    },
    /// There is no ledger to ask.
    NoLedger,
    /// Nothing is counted.
    MetricsOff,
    /// As many reports are being made as there is room for.
    TooManyReports,
    /// As many pages are told by themselves as there is room for.
    TooManyViewers,
    /// The ledger's database cannot be read now.
    LedgerAway,
    /// How much of its limits the client has taken is not known, because Redis gives no answer.
    LimitsUnknown,
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
    /// A hook of the configuration says so.
    Hook {
        /// Its status: 400 to 599.
        status: StatusCode,
        /// Its code.
        code: &'static str,
        /// What the client is told.
        message: String,
    },
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

/// What a limit is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitKind {
    /// Requests in a window.
    Requests,
    /// Tokens in a window.
    Tokens,
    /// Exchanges at the same time.
    Concurrent,
    /// Money in a day or month.
    Budget,
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

    /// Which limit was reached, if that is what it says.
    #[must_use]
    pub fn limit(&self) -> Option<&str> {
        match self {
            Self::Limited { name, .. } => Some(name),
            _ => None,
        }
    }

    /// Seconds for a `Retry-After` header, where a later try can succeed.
    fn retry_after_seconds(&self) -> Option<u64> {
        match self {
            Self::NoBackend { retry_after, .. }
            | Self::Busy { retry_after, .. }
            | Self::Limited { retry_after, .. } => {
                // Rounded up: who comes at that time shall find it true.
                Some(retry_after.as_secs_f64().ceil().max(1.0) as u64)
            }
            Self::Draining
            | Self::TooManyConnections
            | Self::TooManyBodies
            | Self::TooManyReports
            | Self::TooManyViewers
            | Self::LedgerAway
            | Self::TokensUnknown
            | Self::LimitsUnknown => Some(1),
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
        if let Self::Limited { kind, retry_after, .. } = self {
            // Rounded up, as in seconds.
            let millis = retry_after.as_secs_f64().mul_add(1000.0, 0.999).max(1.0) as u64;
            headers.insert(RETRY_AFTER_MS, HeaderValue::from(millis));
            if *kind == LimitKind::Budget {
                // Otherwise SDKs try twice more.
                headers.insert(X_SHOULD_RETRY, HeaderValue::from_static("false"));
            }
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
                "message": message, "type": shape.openai_type(), "param": null, "code": shape.code,
            }}),
            Dialect::Anthropic => json!({
                "type": "error",
                "error": {"type": shape.anthropic_type(), "message": message},
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
