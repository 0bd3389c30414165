//! What there is to tell of an exchange at its end: put together once, and told to all who want to know.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::Method;
use pingora_core::{Error, ErrorSource};
use pingora_proxy::Session;

use super::exchange::{Admitted, Events, Exchange};
use super::watch::Stop;
use super::{Proxy, Serves};
use super::{admit, meter, settle};
use crate::telemetry::{OTHER, Phase, Record, Series, Taken, Try};

/// A backend's own 5xx, passed on.
const UPSTREAM_5XX: &str = "upstream_5xx";

/// A stream that its backend ended without its last event, or any answer that it broke off.
const CUT: &str = "stream_cut";

/// Tells of the exchange, which took this much.
pub(super) fn tell(
    proxy: &Proxy,
    session: &Session,
    exchange: &mut Exchange,
    error: Option<&Error>,
    taken: Option<Taken>,
) {
    if exchange.arrived.is_page || proxy.serves == Serves::Pages {
        return;
    }
    let now = Instant::now();
    exchange.phases.turn(Phase::Own, now);
    let duration = now.saturating_duration_since(exchange.arrived.at);
    let head = session.req_header();
    let status = session.response_written().map_or(0, |head| head.status.as_u16());
    let is_aborted = is_aborted(session, exchange, error);
    let fault = fault(session, exchange, error, status, is_aborted);
    let why = (fault.is_some() || is_aborted)
        .then(|| settle::why(session, exchange, error))
        .flatten()
        .or_else(|| fault.and_then(|_| exchange.observed.refusal.as_ref().map(|it| it.message())))
        .or_else(|| fault.map(|kind| words(kind, status)));
    let (service, model) = exchange.admitted.as_ref().map(meter::model).unwrap_or_default();
    let backend = exchange.attempts.current.as_ref();
    let grant = exchange.arrived.grant.as_ref();
    let record = Record {
        began: SystemTime::now().checked_sub(duration).unwrap_or(SystemTime::UNIX_EPOCH),
        request_id: exchange.request_id(),
        trace: &exchange.arrived.trace,
        key: grant.map(|grant| (&grant.key_id, &grant.name)),
        address: exchange.arrived.address,
        method: method(&head.method),
        path: admit::split_target(head).0,
        service,
        model,
        backend: backend.map_or("", |attempt| attempt.backend().spec.id.as_str()),
        attempts: exchange.tried,
        status,
        refusal: exchange.observed.refusal.as_ref().map(|refusal| refusal.code()),
        limit: exchange.observed.refusal.as_ref().and_then(|refusal| refusal.limit()),
        fault,
        why,
        bytes_in: session.body_bytes_read() as u64,
        bytes_out: session.body_bytes_sent() as u64,
        taken,
        phases: &exchange.phases,
        first_byte: exchange.observed.first_piece.or(exchange.observed.first_byte),
        is_stream: exchange.observed.is_stream,
        is_aborted,
    };
    let series = series(proxy, exchange.admitted.as_ref());
    for pool in &exchange.fallen_from {
        let (service, model) = pool.name().split_once('/').unwrap_or_default();
        proxy.telemetry.counters.series(service, model, false).count_fallback();
    }
    let observed = &exchange.arrived.runtime.snapshot.observed;
    let tries = (&exchange.tries[..], exchange.arrived.at);
    proxy.telemetry.tell(observed, &series, &record, tries);
}

/// Why an exchange failed that ended by itself.
fn words(kind: &'static str, status: u16) -> String {
    match kind {
        UPSTREAM_5XX => format!("the backend answered {status}"),
        _ => "the backend ended the stream without its last event".to_owned(),
    }
}

/// Where the exchange is counted.
fn series(proxy: &Proxy, admitted: Option<&Admitted>) -> Arc<Series> {
    let counters = &proxy.telemetry.counters;
    let Some(admitted) = admitted else { return Arc::clone(&counters.unrouted) };
    let (service, model) = meter::model(admitted);
    if admitted.to().names().1 == model {
        let own = || counters.series(service, model, false);
        return Arc::clone(admitted.pool().series.get_or_init(own));
    }
    counters.series(service, model, true)
}

/// Clients may make up methods; those that are known have their names.
fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => OTHER,
    }
}

/// Whether an event stream had its last event, whatever came after it.
pub(super) fn is_complete(exchange: &Exchange) -> bool {
    let events = exchange.observed.events.as_ref();
    events.is_some_and(|events| events.end.is_some() && !events.is_cut())
}

/// Whether the client left before the end. The two sides of a tunnel may end it.
fn is_aborted(session: &Session, exchange: &Exchange, error: Option<&Error>) -> bool {
    error.is_some_and(|error| error.esource == ErrorSource::Downstream)
        && exchange.observed.refusal.is_none()
        && !session.was_upgraded()
        && !is_complete(exchange)
}

/// What failed, where that was not the client's fault.
fn fault(
    session: &Session,
    exchange: &Exchange,
    error: Option<&Error>,
    status: u16,
    is_aborted: bool,
) -> Option<&'static str> {
    if let Some(refusal) = &exchange.observed.refusal {
        return refusal.status().is_server_error().then(|| refusal.code());
    }
    let broke = error.is_some_and(|error| {
        error.esource != ErrorSource::Downstream
            && !(session.was_upgraded() && settle::is_plain_end(exchange, error))
    });
    let is_cut = exchange.observed.events.as_ref().is_some_and(Events::is_cut);
    match () {
        () if is_aborted => None,
        () if broke || is_cut && error.is_none() => Some(CUT),
        () if status >= 500 => Some(UPSTREAM_5XX),
        () => None,
    }
}

/// What ended an answer that nobody got all of.
pub(super) fn ended_by(exchange: &Exchange, error: Option<&Error>) -> &'static str {
    match exchange.watch.stopped() {
        Some(Stop::Drain) => "shutdown",
        Some(_) => "deadline",
        None if error.is_some_and(|error| error.esource == ErrorSource::Downstream) => "client",
        None => "backend",
    }
}

/// An attempt begins: it has a span of its own where somebody keeps the trace.
pub(super) fn begin_attempt(exchange: &mut Exchange, at: Instant) {
    exchange.tried += 1;
    let is_kept = exchange.arrived.is_traced();
    let Some(attempt) = exchange.attempts.current.as_ref().filter(|_| is_kept) else { return };
    let spec = &attempt.backend().spec;
    let authority = spec.url.authority.to_str().unwrap_or_default().to_owned();
    exchange.tries.push(Try {
        span: fastrand::u64(1..),
        backend: spec.id.clone(),
        authority,
        began: at,
        ended: None,
        why: None,
    });
}

/// The attempt failed.
pub(super) fn end_attempt(exchange: &mut Exchange, why: &str) {
    if let Some(last) = exchange.tries.last_mut().filter(|last| last.ended.is_none()) {
        last.ended = Some(Instant::now());
        last.why = Some(why.to_owned());
    }
}
