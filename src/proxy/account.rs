//! What there is to tell of an exchange at its end: put together once, and told to all who want to know.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::Method;
use pingora_core::{Error, ErrorSource};
use pingora_proxy::Session;

use super::exchange::{Admitted, Events, Exchange};
use super::watch::Stop;
use super::{admit, cached, hooks, meter, respond, settle};
use crate::refusal::Refusal;
use crate::runtime::Target;
use crate::telemetry::{OTHER, Phase, Record, Taken, Telemetry, Try};

/// A backend's own 5xx, passed on.
const UPSTREAM_5XX: &str = "upstream_5xx";

/// A stream that its backend ended without its last event, or any answer that it broke off.
const CUT: &str = "stream_cut";

/// Why such a stream is one.
pub(super) const NO_LAST_EVENT: &str = "the stream ended without its last event";

/// What has to be known of a request so that its exchange can be told of, whatever becomes of it.
pub(super) struct Untold {
    telemetry: Arc<Telemetry>,
    method: &'static str,
    path: Box<[u8]>,
}

/// From here on the exchange is told of: at its end, or where its client left while nobody looked, when it is dropped.
pub(super) fn begin(telemetry: &Arc<Telemetry>, session: &Session, exchange: &mut Exchange) {
    let observed = &exchange.arrived.runtime.snapshot.observed;
    if !observed.metrics && observed.request_log.is_none() && !exchange.arrived.is_traced() {
        return;
    }
    let head = session.req_header();
    exchange.untold = Some(Untold {
        telemetry: Arc::clone(telemetry),
        method: method(&head.method),
        path: admit::split_target(head).0.into(),
    });
}

/// It asks for one of the gateway's own pages: there is nothing to tell.
pub(super) fn is_page(exchange: &mut Exchange) {
    exchange.untold = None;
}

/// Tells of the exchange, which took this much.
pub(super) fn tell(
    session: &Session,
    exchange: &mut Exchange,
    error: Option<&Error>,
    taken: Option<Taken>,
) {
    let Some(untold) = exchange.untold.take() else { return };
    let status = respond::status(session);
    let is_aborted = is_aborted(session, exchange, error);
    let fault = fault(session, exchange, error, status, is_aborted);
    let refusal = exchange.observed.refusal.as_ref();
    let why = (fault.is_some() || is_aborted)
        .then(|| settle::why(session, exchange, error))
        .flatten()
        .or_else(|| fault.and_then(|_| refusal.map(Refusal::message)))
        .or_else(|| fault.map(|kind| words(kind, status)));
    let bytes = [session.body_bytes_read() as u64, session.body_bytes_sent() as u64];
    let is_tunnel = session.was_upgraded();
    let end = End { status, fault, why, bytes, taken, is_aborted, is_tunnel };
    untold.tell(exchange, end);
}

impl Drop for Exchange {
    /// Of clients over HTTP/1 that leave while nothing is read from them, nothing but this tells. One whose answer is
    /// complete waits only to be closed.
    fn drop(&mut self) {
        let Some(untold) = self.untold.take() else { return };
        // A panic of ours ends it too.
        let panicked = std::thread::panicking().then_some(&Refusal::Internal);
        let refusal = panicked.or(self.observed.refusal.as_ref());
        let is_meant = self.hooks.has_answered;
        let failed = refusal.filter(|it| it.status().is_server_error() && !is_meant);
        let is_aborted = refusal.is_none() && !self.watch.is_answered();
        let left = is_aborted.then(|| "the client left".to_owned());
        let end = End {
            status: self.observed.status,
            fault: failed.map(Refusal::code),
            why: failed.map(Refusal::message).or(left),
            is_aborted,
            ..End::default()
        };
        untold.tell(self, end);
    }
}

/// How an exchange ended.
#[derive(Default)]
struct End {
    status: u16,
    fault: Option<&'static str>,
    why: Option<String>,
    /// Of the request's body and of the answer's.
    bytes: [u64; 2],
    taken: Option<Taken>,
    is_aborted: bool,
    /// Whether it was a WebSocket.
    is_tunnel: bool,
}

impl Untold {
    fn tell(self, exchange: &mut Exchange, end: End) {
        hooks::settled(exchange, end.status, end.taken.as_ref(), end.is_aborted);
        let now = Instant::now();
        exchange.phases.turn(Phase::Own, now);
        let duration = now.saturating_duration_since(exchange.arrived.at);
        let (service, model) = names(exchange);
        let backend = exchange.attempts.current.as_ref();
        let grant = exchange.arrived.grant.as_ref();
        let refusal = exchange.observed.refusal.as_ref();
        // What is said first in a WebSocket is no answer's first byte.
        let first_piece = exchange.observed.first_piece.filter(|_| !end.is_tunnel);
        let record = Record {
            began: SystemTime::now().checked_sub(duration).unwrap_or(SystemTime::UNIX_EPOCH),
            request_id: exchange.request_id(),
            trace: &exchange.arrived.trace,
            key: grant.map(|grant| (&grant.key_id, &grant.name)),
            address: exchange.arrived.address,
            method: self.method,
            path: &self.path,
            service,
            model,
            backend: backend.map_or("", |attempt| attempt.backend().spec.id.as_str()),
            attempts: exchange.tried,
            status: end.status,
            refusal: refusal.filter(|_| end.fault.is_none()).map(Refusal::code),
            limit: refusal.and_then(Refusal::limit),
            fault: end.fault,
            why: end.why,
            bytes_in: end.bytes[0],
            bytes_out: end.bytes[1],
            taken: end.taken,
            phases: &exchange.phases,
            first_byte: first_piece.or(exchange.observed.first_byte),
            is_stream: exchange.observed.is_stream,
            is_tunnel: end.is_tunnel,
            is_aborted: end.is_aborted,
            is_logged: {
                let backend = backend.map_or("", |attempt| attempt.backend().spec.id.as_str());
                let log = exchange.arrived.runtime.snapshot.observed.request_log.as_ref();
                let when = log.and_then(|log| log.when.as_ref());
                when.is_none_or(|when| exchange.hooks.held(when, (backend, end.status)))
            },
            cache: exchange.cached.outcome.map(cached::Outcome::name),
            saved: cached::saved(exchange),
            hooks: &exchange.hooks.runs,
            notes: &exchange.hooks.notes,
        };
        let observed = &exchange.arrived.runtime.snapshot.observed;
        if observed.metrics {
            self.count(exchange, &record, now);
        }
        self.telemetry.write(observed, &record);
        if exchange.arrived.is_traced() && grant.is_some() {
            self.telemetry.trace(observed, &record, (&exchange.tries, exchange.arrived.at));
        }
    }

    fn count(&self, exchange: &Exchange, record: &Record<'_>, now: Instant) {
        let counters = &self.telemetry.counters;
        for pool in &exchange.fallen_from {
            let (service, model) = pool.name().split_once('/').unwrap_or_default();
            counters.series(service, model, false).count_fallback();
        }
        let target = target(exchange);
        if let Some(target) = target.filter(|_| record.fault.is_some()) {
            target.pool.errors.count(now);
        }
        let Some(target) = target else { return counters.count(&counters.unrouted, record) };
        if target.names().1 == record.model {
            let own = || counters.series(record.service, record.model, false);
            return counters.count(target.pool.series.get_or_init(own), record);
        }
        counters.count(&counters.series(record.service, record.model, true), record);
    }
}

/// Where the exchange goes; where it was refused before it was let in, as far as its path tells.
fn target(exchange: &Exchange) -> Option<&Target> {
    let toward = || exchange.arrived.toward.as_ref().map(|way| &way.targets[0]);
    exchange.admitted.as_ref().map(Admitted::to).or_else(toward)
}

/// Its service and its model, as far as they are known.
fn names(exchange: &Exchange) -> (&str, &str) {
    match &exchange.admitted {
        Some(admitted) => meter::model(admitted),
        None => target(exchange).map(Target::names).unwrap_or_default(),
    }
}

/// Why an exchange failed that ended by itself.
fn words(kind: &'static str, status: u16) -> String {
    match kind {
        UPSTREAM_5XX => format!("the backend answered {status}"),
        _ => NO_LAST_EVENT.to_owned(),
    }
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
        && (exchange.observed.client_left || !is_complete(exchange))
}

/// What failed, where that was not the client's fault.
fn fault(
    session: &Session,
    exchange: &Exchange,
    error: Option<&Error>,
    status: u16,
    is_aborted: bool,
) -> Option<&'static str> {
    // What the configuration says is meant.
    if exchange.hooks.has_answered {
        return None;
    }
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
    if exchange.attempts.made > 0
        && let Some(admitted) = &exchange.admitted
    {
        admitted.pool().retries.count(at);
    }
    exchange.attempts.made += 1;
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
