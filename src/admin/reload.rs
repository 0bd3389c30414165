//! `POST /admin/reload`, and how the last reload went.

use std::sync::Arc;

use bytes::Bytes;
use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::{change, json_text, refusal_page, time};
use crate::refusal::Refusal;
use crate::runtime::{PageAnswer, PageRequest, ReloadState, Reloaded, Reloads, Runtime};

pub(super) const PATH: &str = "/admin/reload";

/// Reloads for whoever may.
pub(super) fn answer(
    reloads: &Arc<Reloads>,
    runtime: &Runtime,
    request: &PageRequest<'_>,
) -> PageAnswer {
    match change::check(runtime, request) {
        Ok(asker) => log::info!("the configuration is read again, as asked for by {asker}"),
        Err(refusal) => return PageAnswer::Now(refusal_page(&refusal)),
    }
    let reloads = Arc::clone(reloads);
    PageAnswer::Later(Box::pin(async move {
        match reloads.ask().await {
            Some(reloaded) => page(&reloaded),
            None => refusal_page(&Refusal::Draining),
        }
    }))
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
