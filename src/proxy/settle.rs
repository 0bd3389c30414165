//! The end of an exchange, always: a failure becomes a refusal, and the log gets its line.

use std::time::{Duration, Instant};

use pingora_core::{Error, ErrorSource, ErrorType};
use pingora_proxy::{FailToProxy, Session};

use super::exchange::{Events, Exchange};
use super::watch::Stop;
use super::{Proxy, account, detached, meter, respond, retry};
use crate::pool::Outcome;
use crate::refusal::Refusal;
use crate::telemetry::{Phase, brief};

/// Tells the client why there is no answer, if one can still be told.
pub(super) async fn fail(
    proxy: &Proxy,
    session: &mut Session,
    exchange: &mut Exchange,
    error: &Error,
) -> FailToProxy {
    let mut error_code = 0;
    match error.esource {
        ErrorSource::Downstream => exchange.cached.give_up(),
        _ => exchange.cached.unfit(),
    }
    if !respond::is_answered(session) {
        // It is told by the gateway itself.
        detached::attach(session, exchange).await;
    }
    session.set_keepalive(None);
    // What is still written takes as long as the client lets it.
    exchange.turn(Phase::Answer);
    if error.esource == ErrorSource::Upstream
        && let Err(error) = respond::catch_up(session, exchange).await
    {
        log::debug!("request {}: the client is gone: {error}", exchange.request_id());
        return FailToProxy { error_code, can_reuse_downstream: false };
    }
    let status = respond::status(session);
    if status != 0 {
        meter::charge(&proxy.months, session, exchange, status, Some(error));
        let is_cut = error.esource == ErrorSource::Upstream || exchange.hooks.cut.is_some();
        if is_cut && !session.was_upgraded() {
            respond::interrupt(session, exchange).await;
        }
    } else if let Some(refusal) = refusal(exchange, error) {
        error_code = refusal.status().as_u16();
        meter::charge(&proxy.months, session, exchange, error_code, Some(error));
        leave(exchange);
        if let Err(error) = respond::refuse(session, exchange, refusal).await {
            log::debug!("request {}: the refusal was not sent: {error}", exchange.request_id());
        }
    }
    FailToProxy { error_code, can_reuse_downstream: false }
}

/// The refusal that a failure means; none when the client is gone.
fn refusal(exchange: &mut Exchange, error: &Error) -> Option<Refusal> {
    if exchange.observed.client_fault.is_some() {
        return exchange.observed.client_fault.take();
    }
    if let Some(cut) = exchange.hooks.cut.take() {
        return Some(*cut);
    }
    if error.esource == ErrorSource::Downstream {
        return match error.etype {
            ErrorType::ConnectionClosed | ErrorType::ReadError | ErrorType::WriteError => None,
            ErrorType::ReadTimedout => Some(Refusal::BodySlow),
            ErrorType::H2Error => None,
            _ => Some(Refusal::BadRequest { reason: "the request is not well-formed HTTP" }),
        };
    }
    Some(exchange.attempts.failure.take().unwrap_or(Refusal::Internal))
}

/// The whole answer has come from its backend. What the exchange has taken of limits and of the backend's room is given
/// back before the client hears of the end: its next request finds it so.
pub(super) fn answered(proxy: &Proxy, session: &Session, exchange: &mut Exchange) {
    meter::charge(&proxy.months, session, exchange, exchange.observed.status, None);
    // Of a request that is still sent, the backend has not seen the end.
    if exchange.watch.is_over() {
        judge(exchange, None);
        leave(exchange);
    }
}

/// The backend has no more to do.
fn leave(exchange: &mut Exchange) {
    if let Some(attempt) = &mut exchange.attempts.current {
        attempt.permit.leave();
    }
}

/// What a whole answer says about its backend. A broken one, or one that never came, has been told
/// already.
pub(super) fn judge(exchange: &mut Exchange, error: Option<&Error>) {
    if error.is_some() || exchange.observed.is_judged || exchange.attempts.current.is_none() {
        return;
    }
    exchange.observed.is_judged = true;
    let is_cut = exchange.observed.events.as_ref().is_some_and(Events::is_cut);
    if is_cut && let Some(attempt) = &exchange.attempts.current {
        log::warn!(
            "backend {} of {} ended a stream without its last event; request {}",
            attempt.backend().spec.id,
            exchange.pool_name(),
            exchange.request_id(),
        );
    }
    if is_cut && let Some(attempt) = &exchange.attempts.current {
        attempt.backend().note_failure(Instant::now(), account::NO_LAST_EVENT);
    }
    retry::tell(exchange, if is_cut { Outcome::Failure } else { Outcome::Success });
}

/// Whether a tunnel ended as tunnels do: by a deadline, or by a side that closed without a word about it in
/// TLS. Inside, both may have said all.
pub(super) fn is_plain_end(exchange: &Exchange, error: &Error) -> bool {
    let cause = error.cause.as_ref().and_then(|cause| cause.downcast_ref::<std::io::Error>());
    let is_unannounced =
        cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::UnexpectedEof);
    exchange.watch.stopped().is_some() || is_unannounced
}

/// What the log says of a refusal: its code, and which limit it was.
fn refused(refusal: &Refusal) -> String {
    match refusal {
        Refusal::Limited { name, .. } => format!(" ({}: {name:?})", refusal.code()),
        _ => format!(" ({})", refusal.code()),
    }
}

/// Why an exchange came to its end, where that was not the answer's; for an operator.
pub(super) fn why(session: &Session, exchange: &Exchange, error: Option<&Error>) -> Option<String> {
    let stop = exchange.watch.stopped();
    let overdue = stop.and_then(|stop| retry::overdue(&exchange.stop_refusal(stop)));
    if overdue.is_some() {
        return overdue;
    }
    let is_refused = exchange.observed.refusal.is_some();
    let known = exchange.why.as_ref().filter(|_| is_refused && !exchange.observed.has_head());
    known.cloned().or_else(|| match error? {
        error if error.esource == ErrorSource::Upstream => Some(brief(error)),
        error if is_refused || session.was_upgraded() || !is_gone(error) => Some(brief(error)),
        _ => Some("the client left".to_owned()),
    })
}

/// Whether a client's connection is gone, and not just slow.
fn is_gone(error: &Error) -> bool {
    matches!(
        error.etype,
        ErrorType::ConnectionClosed
            | ErrorType::ReadError
            | ErrorType::WriteError
            | ErrorType::H2Error
    )
}

/// The id of its key, for the log.
fn key(exchange: &Exchange) -> &str {
    let grant = exchange.arrived.grant.as_ref();
    grant.map(|grant| &*grant.key_id).filter(|key| !key.is_empty()).unwrap_or("-")
}

/// Logs the exchange. Queries stay out: they may hold a key.
pub(super) fn log(session: &Session, exchange: &Exchange, error: Option<&Error>) {
    let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
    let status = respond::status(session);
    let refusal = exchange.observed.refusal.as_ref();
    let level = match (refusal, error) {
        _ if exchange.watch.stopped() == Some(Stop::Exchange) => log::Level::Warn,
        (_, Some(error)) if session.was_upgraded() && is_plain_end(exchange, error) => {
            log::Level::Debug
        }
        (Some(refusal), _) if refusal.status().is_server_error() => log::Level::Warn,
        (None, Some(error)) if error.esource == ErrorSource::Upstream => log::Level::Warn,
        _ => log::Level::Debug,
    };
    if !log::log_enabled!(level) {
        return;
    }
    let attempt = exchange.attempts.current.as_ref();
    // That no backend is left is all there is to say; each attempt has its own line.
    let is_told = matches!(refusal, Some(Refusal::NoBackend { .. }));
    let why = why(session, exchange, error).filter(|_| !is_told);
    let first_byte = exchange.observed.first_piece.or(exchange.observed.first_byte);
    let first_byte = first_byte.map(|time| format!("{:.1} ms", milliseconds(time)));
    log::log!(
        level,
        "{} {} -> {status}{}{}; key {}, pool {}, backend {}, first byte {}, {:.1} ms in all, request {}",
        session.req_header().method,
        String::from_utf8_lossy(super::admit::split_target(session.req_header()).0).escape_debug(),
        refusal.map(refused).unwrap_or_default(),
        why.map(|why| format!(", {why}")).unwrap_or_default(),
        key(exchange),
        exchange.pool_name(),
        attempt.map_or("-", |attempt| attempt.backend().spec.id.as_str()),
        first_byte.as_deref().unwrap_or("-"),
        milliseconds(exchange.arrived.at.elapsed()),
        exchange.request_id(),
    );
}
