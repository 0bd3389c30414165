//! After a failed attempt: is there another one, and what is a client told if not.

use pingora_core::{Error, ErrorSource, ErrorType};
use pingora_proxy::Session;

use super::exchange::Exchange;
use crate::refusal::Refusal;
use crate::telemetry::brief;

/// Times that a kept connection may turn out to be dead before the backend is given up: after its
/// restart every kept one is, and each try finds the next.
const STALE_CONNECTIONS_MAX: u8 = 3;

/// No connection: nothing was sent, so another address or backend is tried, whatever the method.
/// Whether one is left, the selection finds out.
pub(super) fn after_connect_failure(exchange: &mut Exchange, mut error: Box<Error>) -> Box<Error> {
    note_failure(exchange, &error);
    log_attempt(exchange, &error);
    exchange.attempts.unreachable();
    if let Some(admitted) = &exchange.admitted {
        admitted.pool.suspect();
    }
    error.as_up();
    error.set_retry(true);
    error
}

/// The connection broke after the request, or a part of it, was sent. Only a kept connection that
/// the backend had closed in the meantime is tried again: it never saw the request.
pub(super) fn after_broken_exchange(
    session: &Session,
    exchange: &mut Exchange,
    mut error: Box<Error>,
    connection_was_kept: bool,
) -> Box<Error> {
    let nothing_came_back = session.response_written().is_none();
    let is_stale = connection_was_kept
        && nothing_came_back
        && error.esource == ErrorSource::Upstream
        && matches!(
            error.etype,
            ErrorType::ConnectionClosed | ErrorType::ReadError | ErrorType::WriteError
        )
        && !session.as_ref().retry_buffer_truncated();
    if error.esource == ErrorSource::Upstream {
        note_failure(exchange, &error);
        if is_stale {
            exchange.attempts.stale_connections += 1;
            if exchange.attempts.stale_connections >= STALE_CONNECTIONS_MAX {
                exchange.attempts.give_up();
            }
        } else {
            log_attempt(exchange, &error);
        }
    }
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
