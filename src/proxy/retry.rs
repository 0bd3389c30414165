//! After a failed attempt: is there another one, and what is a client told if not.

use std::time::Duration;

use pingora_core::{Error, ErrorSource, ErrorType};
use pingora_proxy::Session;

use super::exchange::{Attempt, Exchange};
use super::respond;
use crate::refusal::Refusal;
use crate::telemetry::brief;

/// A kept connection that breaks within this time of being used was dead before. One that breaks
/// later may have carried the request to a backend that is at work on it, or died of it.
const STALE_WITHIN: Duration = Duration::from_secs(1);

/// No connection: nothing was sent, so another address or backend is tried, whatever the method.
/// Whether one is left, the selection finds out.
pub(super) fn after_connect_failure(exchange: &mut Exchange, mut error: Box<Error>) -> Box<Error> {
    note_failure(exchange, &error);
    log_attempt(exchange, &error);
    if let (Some(admitted), Some(attempt)) = (&exchange.admitted, &exchange.attempts.current) {
        admitted.pool.suspect(&attempt.backend);
    }
    exchange.attempts.unreachable();
    error.as_up();
    error.set_retry(true);
    error
}

/// The connection broke after the request, or a part of it, was sent. Tried again only where the
/// backend had closed a kept connection in the meantime, so that it did not see the request; that
/// try makes a new connection.
pub(super) fn after_broken_exchange(
    session: &Session,
    exchange: &mut Exchange,
    mut error: Box<Error>,
    connection_was_kept: bool,
) -> Box<Error> {
    let broke = matches!(
        error.etype,
        ErrorType::ConnectionClosed | ErrorType::ReadError | ErrorType::WriteError
    );
    let at_once = |attempt: &Attempt| attempt.began.elapsed() < STALE_WITHIN;
    let is_stale = error.esource == ErrorSource::Upstream
        && connection_was_kept
        && broke
        && exchange.attempts.current.as_ref().is_some_and(at_once)
        && !respond::is_answered(session)
        && !session.as_ref().retry_buffer_truncated();
    if error.esource == ErrorSource::Upstream {
        note_failure(exchange, &error);
        if !is_stale {
            log_attempt(exchange, &error);
        }
    }
    exchange.attempts.needs_new_connection |= is_stale;
    error.set_retry(is_stale);
    error
}

/// What the client is told if this was the last attempt.
fn note_failure(exchange: &mut Exchange, error: &Error) {
    let Some(attempt) = &exchange.attempts.current else { return };
    let pool = exchange.pool_name().to_owned();
    let spec = &attempt.backend.spec;
    let failure = match error.etype {
        ErrorType::ConnectTimedout | ErrorType::TLSHandshakeTimedout => {
            let limit = spec.connect_deadline;
            Some(Refusal::BackendSlow { pool, deadline: "connect", limit })
        }
        ErrorType::ReadTimedout | ErrorType::WriteTimedout => {
            let limit = spec.silence_deadline;
            Some(Refusal::BackendSlow { pool, deadline: "silence", limit })
        }
        ErrorType::ConnectError
        | ErrorType::ConnectRefused
        | ErrorType::ConnectNoRoute
        | ErrorType::SocketError
        | ErrorType::BindError => None,
        _ => Some(Refusal::BackendFailed { pool }),
    };
    exchange.attempts.failure = failure;
}

fn log_attempt(exchange: &Exchange, error: &Error) {
    let Some(attempt) = &exchange.attempts.current else { return };
    log::warn!(
        "backend {} of {} ({} at {}) failed: {}; request {}",
        attempt.backend.spec.id,
        exchange.pool_name(),
        attempt.backend.spec.url.shown,
        attempt.address,
        brief(error),
        exchange.request_id(),
    );
}
