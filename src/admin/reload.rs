//! `POST /admin/reload`, and how the last reload went.

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use http::header::{HOST, ORIGIN};
use http::{Method, Response, StatusCode};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{json_text, refusal_page};
use crate::refusal::Refusal;
use crate::runtime::{PageAnswer, PageRequest, ReloadState, Reloaded, Reloads, Runtime};

pub(super) const PATH: &str = "/admin/reload";

/// Reloads for whoever may: the key is needed where there is one, and a page of another origin
/// cannot make a browser ask.
pub(super) fn answer(
    reloads: &Arc<Reloads>,
    runtime: &Runtime,
    request: &PageRequest<'_>,
) -> PageAnswer {
    let refused = |refusal: &Refusal| PageAnswer::Now(refusal_page(refusal));
    if *request.method != Method::POST {
        return refused(&Refusal::MethodNotAllowed { allow: "POST" });
    }
    match runtime.grant(request.headers, request.client) {
        Ok(grant) if grant.is_admin => {}
        Ok(_) => return refused(&Refusal::NotAllowed),
        Err(refusal) => return refused(&refusal),
    }
    if is_foreign(request) {
        return refused(&Refusal::OtherOrigin);
    }
    let reloads = Arc::clone(reloads);
    PageAnswer::Later(Box::pin(async move {
        match reloads.ask().await {
            Some(reloaded) => page(&reloaded),
            None => refusal_page(&Refusal::Draining),
        }
    }))
}

/// Whether a browser sends it for a page that is not ours.
fn is_foreign(request: &PageRequest<'_>) -> bool {
    let Some(origin) = request.headers.get(ORIGIN) else { return false };
    let host = request.headers.get(HOST).map(http::HeaderValue::as_bytes).unwrap_or_default();
    let origin = origin.as_bytes();
    let origin_host = origin.windows(3).position(|window| window == b"://");
    origin_host.is_none_or(|at| &origin[at + 3..] != host)
}

fn page(reloaded: &Reloaded) -> Response<Bytes> {
    let mut page = json_text(outcome(reloaded).to_string());
    if reloaded.outcome.is_err() {
        *page.status_mut() = StatusCode::UNPROCESSABLE_ENTITY;
    }
    page
}

/// The configuration at work and the last reload.
pub(super) fn state(state: &ReloadState) -> Value {
    json!({
        "generation": state.generation,
        "since": time(state.since),
        "reloads_failed": state.failed,
        "last_reload": state.last.as_ref().map(outcome),
    })
}

fn outcome(reloaded: &Reloaded) -> Value {
    let at = time(reloaded.at);
    match &reloaded.outcome {
        Ok(report) => json!({
            "at": at,
            "status": "ok",
            "models": report.summary.models,
            "backends": report.summary.backends,
            "keys": report.summary.keys,
            "limits": report.summary.limits,
            "needs_restart": report.needs_restart,
        }),
        Err(problems) => json!({"at": at, "status": "failed", "problems": problems}),
    }
}

fn time(at: SystemTime) -> Option<String> {
    Timestamp::try_from(at).ok().map(|time| time.to_string())
}
