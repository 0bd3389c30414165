//! What a refusal is on the wire, apart from its words: status, type and code.

use http::StatusCode;

use super::{LimitKind, Refusal};

/// Status and code; the types of both API families follow from them.
pub(super) struct Shape {
    pub(super) status: StatusCode,
    pub(super) code: &'static str,
}

impl Shape {
    /// As OpenAI's API has it.
    pub(super) fn openai_type(&self) -> &'static str {
        match self.status.as_u16() {
            429 if self.code == "insufficient_quota" => "insufficient_quota",
            429 => "rate_limit_error",
            502 if self.code == "stream_interrupted" => "upstream_error",
            500..=599 => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// As Anthropic's API has it.
    pub(super) fn anthropic_type(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            408 | 504 => "timeout_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            500..=599 => "api_error",
            _ => "invalid_request_error",
        }
    }
}

impl Refusal {
    pub(super) fn shape(&self) -> Shape {
        let (status, code) = match self {
            Self::BadRequest { .. } => (400, "bad_request"),
            Self::BodyMalformed { .. } => (400, "invalid_body"),
            Self::NeedsTls | Self::NeedsPlain => (400, "wrong_scheme"),
            Self::ModelMissing => (400, "model_required"),
            Self::ModelAmbiguous => (400, "model_ambiguous"),
            Self::NoWebSocket { .. } => (400, "websocket_unsupported"),
            Self::KeyInUrl => (400, "api_key_in_url"),
            Self::KeyMissing => (401, "missing_api_key"),
            Self::KeyWrong | Self::KeysDiffer => (401, "invalid_api_key"),
            Self::KeyDisabled => (401, "disabled_api_key"),
            Self::KeyExpired => (401, "expired_api_key"),
            Self::AddressDenied => (403, "address_not_allowed"),
            Self::ModelDenied { .. } => (403, "model_not_allowed"),
            Self::NotAllowed => (403, "not_allowed"),
            Self::OtherOrigin => (403, "other_origin"),
            Self::NoRoute { .. } => (404, "not_found"),
            Self::NoService { .. } => (404, "service_not_found"),
            Self::NoModel { .. } | Self::ModelUnknown { .. } => (404, "model_not_found"),
            Self::NoLedger => (404, "no_ledger"),
            Self::MetricsOff => (404, "metrics_off"),
            Self::MethodNotAllowed { .. } => (405, "method_not_allowed"),
            Self::HeadSlow => (408, "head_timeout"),
            Self::BodySlow => (408, "body_timeout"),
            Self::LengthRequired => (411, "length_required"),
            Self::BodyTooLarge { .. } | Self::ModelTooLate { .. } => (413, "body_too_large"),
            Self::UrlTooLong { .. } => (414, "url_too_long"),
            Self::CodingUnknown => (415, "unsupported_encoding"),
            Self::Limited { kind: LimitKind::Budget, .. } => (429, "insufficient_quota"),
            Self::Limited { .. } => (429, "rate_limit_exceeded"),
            Self::HeadTooLarge { .. } => (431, "headers_too_large"),
            Self::Internal => (500, "internal_error"),
            Self::BackendFailed { .. } => (502, "backend_failed"),
            Self::Interrupted { .. } => (502, "stream_interrupted"),
            Self::NoBackend { .. } => (503, "no_backend"),
            Self::Busy { .. }
            | Self::TooManyBodies
            | Self::TooManyReports
            | Self::TooManyViewers => (503, "busy"),
            Self::LedgerAway => (503, "ledger_unavailable"),
            Self::TokensUnknown => (503, "tokens_unavailable"),
            Self::LimitsUnknown => (503, "limits_unavailable"),
            Self::TooManyConnections => (503, "too_many_connections"),
            Self::Draining => (503, "draining"),
            Self::BackendSlow { .. } => (504, "backend_timeout"),
            Self::Hook { status, code, .. } => (status.as_u16(), *code),
        };
        let status = StatusCode::from_u16(status).expect("every status above is a valid one");
        Shape { status, code }
    }
}
