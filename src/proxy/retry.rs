//! After a failed attempt: is there another one, and what is a client told if not.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::StatusCode;
use pingora::http::ResponseHeader;
use pingora_core::{Error, ErrorSource, ErrorType, Result};
use pingora_proxy::Session;

use super::exchange::{Attempt, Exchange};
use super::watch::Stop;
use super::{account, body, receive};
use crate::llm;
use crate::pool::{CONNECT_DEADLINE, Outcome};
use crate::refusal::Refusal;
use crate::telemetry::{Phase, advice};

/// A kept connection that breaks within this time of being used was dead before. One that breaks
/// later may have carried the request to a backend that is at work on it, or died of it.
const STALE_WITHIN: Duration = Duration::from_secs(1);

/// For how long a backend is left alone that answers 429 and does not say.
const COOL_DOWN: Duration = Duration::from_secs(1);

/// The longest that it is left alone, whatever it says: a limit a day long is better asked again.
const COOL_DOWN_MAX: Duration = Duration::from_secs(60);

/// No connection: nothing was sent, so another address or backend is tried, whatever the method.
/// Whether one is left, the selection finds out.
pub(super) fn after_connect_failure(exchange: &mut Exchange, mut error: Box<Error>) -> Box<Error> {
    exchange.turn(Phase::Own);
    exchange.watch.attempt_over();
    exchange.attempts.failure = failure(exchange, &error);
    note_failure(exchange, &error);
    exchange.attempts.unreachable();
    // No descriptor or port left: that is our own trouble.
    let is_ours = matches!(error.etype, ErrorType::SocketError | ErrorType::BindError);
    let attempts = &exchange.attempts;
    if let Some(attempt) = &attempts.current
        && let Some(admitted) = &exchange.admitted
        && !is_ours
    {
        admitted.pool().suspect(attempt.backend());
        // Another address of its name may do better.
        if !attempts.may_ask(attempt.backend()) {
            tell(exchange, Outcome::Failure);
        }
    }
    error.as_up();
    error.set_retry(exchange.watch.stopped().is_none());
    error
}

/// The connection broke after the request, or a part of it, was sent; or the answer was one that
/// another backend may do better.
pub(super) fn after_broken_exchange(
    session: &Session,
    exchange: &mut Exchange,
    mut error: Box<Error>,
    connection_was_kept: bool,
) -> Box<Error> {
    exchange.turn(Phase::Own);
    exchange.watch.attempt_over();
    if session.was_upgraded() {
        error.set_retry(false);
        return error;
    }
    let is_over = exchange.watch.stopped().is_some_and(Stop::is_final);
    let retry = if exchange.attempts.is_granted && !is_over {
        // Decided with the response head, see `judge`.
        true
    } else if error.esource == ErrorSource::Upstream {
        exchange.attempts.failure = failure(exchange, &error);
        if is_over {
            if exchange.watch.stopped() == Some(Stop::Exchange) {
                note_failure(exchange, &error);
            }
            false
        } else if is_stale(session, exchange, &error, connection_was_kept) {
            exchange.attempts.needs_new_connection = true;
            account::end_attempt(exchange, "the kept connection was closed");
            true
        } else {
            // A status that is a failure was one failure, whatever then becomes of its body.
            if exchange.observed.is_judged {
                let why = words(exchange, &error);
                log_attempt(exchange, why);
            } else {
                note_failure(exchange, &error);
            }
            tell(exchange, Outcome::Failure);
            may_retry(session, exchange, Work::Begun, None)
        }
    } else {
        false
    };
    if exchange.attempts.is_granted {
        exchange.attempts.give_up();
    }
    if retry {
        exchange.watch.go_on();
    }
    error.set_retry(retry);
    error
}

/// Whether the backend had closed a kept connection in the meantime, so that it did not see the
/// request. The same one is asked again, on a new connection.
fn is_stale(
    session: &Session,
    exchange: &Exchange,
    error: &Error,
    connection_was_kept: bool,
) -> bool {
    let broke = matches!(
        error.etype,
        ErrorType::ConnectionClosed | ErrorType::ReadError | ErrorType::WriteError
    );
    let at_once = |attempt: &Attempt| attempt.began.elapsed() < STALE_WITHIN;
    connection_was_kept
        && broke
        && exchange.watch.stopped().is_none()
        && exchange.attempts.current.as_ref().is_some_and(at_once)
        && !exchange.observed.has_head()
        && exchange.body.is_kept(session)
}

/// A final response head has come. What it says about the backend is noted.
///
/// # Errors
/// With a retryable error, when another attempt is made instead of passing the response on.
pub(super) fn judge(
    session: &Session,
    response: &ResponseHeader,
    exchange: &mut Exchange,
) -> Result<()> {
    if exchange.watch.stopped_sharing().is_some() {
        return Err(receive::stopped());
    }
    let Some(admitted) = &exchange.admitted else { return Ok(()) };
    let Some(attempt) = &exchange.attempts.current else { return Ok(()) };
    let backend = attempt.backend();
    let pool = admitted.pool();
    let status = response.status;
    let spec = &pool.spec().retry;
    let is_refused = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
    if backend.spec.credential.is_some() && (is_refused || status.is_success()) {
        pool.note_credential(backend, is_refused.then(|| status.as_u16()));
    }
    let is_limited = status == StatusCode::TOO_MANY_REQUESTS;
    let asked = if status.is_client_error() || status.is_server_error() {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        llm::pause(&response.headers, is_limited, since_1970)
    } else {
        None
    };
    if is_limited || status == StatusCode::SERVICE_UNAVAILABLE && asked.is_some() {
        pool.cool_down(backend, asked.unwrap_or(COOL_DOWN).min(COOL_DOWN_MAX));
    }
    let is_fast_500 =
        status == StatusCode::INTERNAL_SERVER_ERROR && attempt.began.elapsed() < spec.fast_500;
    let is_tried_again = is_fast_500 || spec.statuses.contains(&status.as_u16());
    let is_failure = status.is_server_error()
        && !matches!(status, StatusCode::NOT_IMPLEMENTED | StatusCode::HTTP_VERSION_NOT_SUPPORTED);
    let is_probe = attempt.permit.is_probe();
    if is_failure {
        backend.note_failure(Instant::now(), &format!("status {}", status.as_u16()));
        tell(exchange, Outcome::Failure);
    } else if is_probe && !is_limited && !is_refused {
        tell(exchange, Outcome::Success);
    }
    exchange.observed.is_judged = is_failure || is_limited || is_refused;
    let work = if is_limited || status == StatusCode::SERVICE_UNAVAILABLE {
        Work::Refused
    } else {
        Work::Begun
    };
    if !is_tried_again || !may_retry(session, exchange, work, asked) {
        return Ok(());
    }
    let error = Error::explain(ErrorType::HTTPStatus(status.as_u16()), "tried again elsewhere");
    let why = words(exchange, &error);
    log_attempt(exchange, why);
    exchange.attempts.failure =
        Some(Refusal::BackendFailed { pool: exchange.pool_name().to_owned() });
    Err(error.into_up())
}

/// What the backend did with the request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// It may have begun to work on it.
    Begun,
    /// It said that it has not.
    Refused,
}

/// Whether there is another attempt after one that was sent; if so, it is counted. `asked` is what
/// the backend wants to be waited for: another one is asked at once.
fn may_retry(
    session: &Session,
    exchange: &mut Exchange,
    work: Work,
    asked: Option<Duration>,
) -> bool {
    let Some(admitted) = &exchange.admitted else { return false };
    let pool = admitted.pool();
    let spec = &pool.spec().retry;
    let attempts = &exchange.attempts;
    let is_safe = spec.non_idempotent || work == Work::Refused || body::is_idempotent(session);
    let current = attempts.current.as_ref().map(|attempt| attempt.backend().identity);
    let has_other = || {
        pool.has_other(|backend| {
            Some(backend.identity) != current
                && attempts.may_ask(backend)
                && !backend.is_avoided(Instant::now())
        })
    };
    let is_in_time = || {
        let pause = asked.filter(|_| !has_other()).unwrap_or_default();
        let next = Instant::now().checked_add(pause);
        exchange.watch.exchange_by().is_none_or(|by| next.is_some_and(|next| next < by))
    };
    let is_possible = !exchange.observed.has_head() && is_safe && exchange.body.is_replayable();
    let is_granted = is_possible
        && is_in_time()
        && (pool.spec().breaker.fail_open || pool.has_other(|_| true))
        && attempts.retries < spec.retries_max
        && (asked.is_none_or(|asked| asked <= spec.retry_after_max) || has_other())
        && pool.may_retry();
    if is_granted {
        exchange.attempts.retries += 1;
        exchange.attempts.is_granted = true;
        // A longer one was granted because another backend is asked meanwhile.
        exchange.attempts.pause = asked.filter(|asked| *asked <= spec.retry_after_max);
    } else if is_possible && admitted.can_fall_back(attempts.is_for_tunnel) {
        exchange.attempts.is_granted = true;
        exchange.attempts.falls_back = true;
    }
    exchange.attempts.is_granted
}

/// Tells the pool how the current attempt's backend did.
pub(super) fn tell(exchange: &mut Exchange, outcome: Outcome) {
    if let Some(admitted) = &exchange.admitted
        && let Some(attempt) = &mut exchange.attempts.current
    {
        admitted.pool().tell(&mut attempt.permit, outcome);
    }
}

/// What the client is told if this was the last attempt; none: that no backend can be reached.
fn failure(exchange: &Exchange, error: &Error) -> Option<Refusal> {
    let attempt = exchange.attempts.current.as_ref()?;
    let pool = exchange.pool_name().to_owned();
    let deadlines = &attempt.backend().spec.deadlines;
    let slow = |deadline, limit| Some(Refusal::BackendSlow { pool: pool.clone(), deadline, limit });
    if let Some(stop) = exchange.watch.stopped() {
        return Some(exchange.stop_refusal(stop));
    }
    match error.etype {
        CONNECT_DEADLINE => slow("connect", deadlines.connect),
        // Of a backend with TLS it is the handshake that Pingora has timed.
        ErrorType::ConnectTimedout if attempt.backend().spec.url.tls => slow("tls", deadlines.tls),
        ErrorType::ConnectTimedout => slow("connect", deadlines.connect),
        ErrorType::ReadTimedout if !exchange.observed.has_head() => {
            slow("first_byte", deadlines.first_byte)
        }
        ErrorType::ReadTimedout | ErrorType::WriteTimedout => slow("silence", deadlines.silence),
        ErrorType::ConnectError
        | ErrorType::ConnectRefused
        | ErrorType::ConnectNoRoute
        | ErrorType::SocketError
        | ErrorType::BindError => None,
        _ => Some(Refusal::BackendFailed { pool }),
    }
}

/// Notes that the current attempt failed, and logs it.
fn note_failure(exchange: &mut Exchange, error: &Error) {
    let why = words(exchange, error);
    if let Some(attempt) = &exchange.attempts.current {
        attempt.backend().note_failure(Instant::now(), &why);
    }
    log_attempt(exchange, why);
}

/// Why an attempt failed, for an operator.
fn words(exchange: &Exchange, error: &Error) -> String {
    let why = failure(exchange, error).and_then(|refusal| overdue(&refusal));
    why.unwrap_or_else(|| advice(error))
}

fn log_attempt(exchange: &mut Exchange, why: String) {
    account::end_attempt(exchange, &why);
    let Some(attempt) = &exchange.attempts.current else { return };
    let backend = attempt.backend();
    log::warn!(
        "backend {} of {} ({} at {}) failed: {why}; request {}",
        backend.spec.id,
        exchange.pool_name(),
        backend.spec.url.shown,
        attempt.address,
        exchange.request_id(),
    );
    exchange.why = Some(why);
}

/// Which deadline is over, if that is what a refusal says.
pub(super) fn overdue(refusal: &Refusal) -> Option<String> {
    match refusal {
        Refusal::BackendSlow { deadline, limit, .. } => {
            Some(format!("deadline {deadline} of {} s is over", limit.as_secs_f64()))
        }
        _ => None,
    }
}
