//! From the pool to a backend to the peer that Pingora dials, waiting where that takes time.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorType, Result};
use pingora_proxy::Session;

use super::exchange::{Attempt, Attempts, Exchange};
use super::watch::Stop;
use super::{account, body};
use crate::config::{BackendSpec, Deadlines, Protocol};
use crate::pool::{Backend, Choice, Gate, Permit, Pool};
use crate::refusal::Refusal;
use crate::telemetry::Phase;

/// Longest `Retry-After`: SDKs give up on long waits, and the next check may bring a backend back.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);

/// How far a pause may be off, either way: clients that failed together come back apart.
const JITTER: f64 = 0.2;

/// Exchanges that share one HTTP/2 connection to a backend at most: what servers allow as a rule.
const HTTP2_STREAMS_MAX: usize = 100;

/// What a backend may send ahead on one stream of such a connection, and on all of them.
const HTTP2_STREAM_WINDOW: u32 = 1024 * 1024;
const HTTP2_CONNECTION_WINDOW: u32 = HTTP2_STREAM_WINDOW * HTTP2_STREAMS_MAX as u32;

/// How often who waits for a place looks by itself whether there is one, and a backend to wait for.
const QUEUE_LOOK: Duration = Duration::from_secs(1);

/// Chooses the backend of the next attempt.
pub(super) async fn select(
    session: &mut Session,
    exchange: &mut Exchange,
) -> Result<Box<HttpPeer>> {
    exchange.body.pause();
    let permit = match find(session, exchange).await? {
        Ok(permit) => permit,
        Err(refusal) => {
            exchange.attempts.failure = Some(refusal);
            return Error::e_explain(ErrorType::HTTPStatus(503), "no backend to ask");
        }
    };
    let attempts = &mut exchange.attempts;
    attempts.is_granted = false;
    let backend = &permit.backend;
    let address = backend.addresses.current();
    let address = address.expect("a backend is usable only while its address is known");
    let gate = attempts.is_for_tunnel.then(|| Arc::new(Gate::default()));
    let mut peer = Box::new(match &gate {
        Some(gate) => backend.tunnel_peer_at(&address, gate)?,
        None => backend.peer_at(&address)?,
    });
    let shares = gate.is_none() && share(&mut peer, &backend.spec, exchange.body.is_passing());
    if attempts.needs_new_connection {
        // Kept connections are shared within a group only.
        peer.group_key = fastrand::u64(1..);
    }
    let began = Instant::now();
    attempts.current = Some(Attempt { permit, address, gate, shares, began });
    account::begin_attempt(exchange, began);
    exchange.phases.turn(Phase::Connect, began);
    Ok(peer)
}

/// Whether the exchange may share an HTTP/2 connection with others. The watch ends an exchange by closing its
/// connection; where that is not its own, Pingora's timeout for reading has to do. It is one for all reads,
/// and runs while the request is sent.
fn share(peer: &mut HttpPeer, spec: &BackendSpec, body_comes: bool) -> bool {
    let Deadlines { first_byte, silence, .. } = spec.deadlines;
    let shares = spec.protocol != Protocol::Http1 && !body_comes && first_byte == silence;
    if shares {
        peer.options.read_timeout = Some(silence);
        peer.options.write_timeout = Some(silence);
        peer.options.max_h2_streams = HTTP2_STREAMS_MAX;
        // A client that reads nothing takes the room of its own stream, and not that of all.
        peer.options.h2_stream_window_size = Some(HTTP2_STREAM_WINDOW);
        peer.options.h2_connection_window_size = Some(HTTP2_CONNECTION_WINDOW);
    }
    shares
}

/// A place at a backend, or what the client is told. An error means that the client is gone.
async fn find(session: &mut Session, exchange: &mut Exchange) -> Result<Result<Permit, Refusal>> {
    let admitted = exchange.admitted.as_mut().expect("only admitted exchanges reach a backend");
    let key = AddressBytes::of(admitted.client.address);
    let key = key.as_slice();
    let falls_back = std::mem::take(&mut exchange.attempts.falls_back);
    if let Some(permit) = keep_place(&mut exchange.attempts, admitted.pool(), key) {
        return Ok(Ok(permit));
    }
    if falls_back {
        fall_back(exchange);
    }
    loop {
        match find_in_pool(session, exchange, key).await? {
            Found::Place(permit) => return Ok(Ok(permit)),
            Found::Stopped(refusal) => return Ok(Err(refusal)),
            Found::Nobody(refusal) => {
                if !fall_back(exchange) {
                    return Ok(Err(refusal));
                }
            }
        }
    }
}

/// Turns to the next model, if there is one and this one may be given up.
fn fall_back(exchange: &mut Exchange) -> bool {
    let Some(admitted) = &mut exchange.admitted else { return false };
    let before = Arc::clone(admitted.pool());
    if !exchange.body.is_replayable() || !admitted.fall_back(exchange.attempts.is_for_tunnel) {
        return false;
    }
    exchange.fallen_from.push(Arc::clone(&before));
    exchange.why = None;
    let pool = Arc::clone(admitted.pool());
    pool.count_exchange();
    exchange.attempts.begin_again();
    let id = exchange.request_id();
    log::warn!("{} cannot serve: asking {}; request {id}", before.name(), pool.name());
    true
}

/// What a search in one pool comes to.
enum Found {
    Place(Permit),
    /// None of its backends can serve.
    Nobody(Refusal),
    /// The exchange is over.
    Stopped(Refusal),
}

/// A place at a backend of the pool that is asked now.
async fn find_in_pool(session: &mut Session, exchange: &mut Exchange, key: &[u8]) -> Result<Found> {
    let admitted = exchange.admitted.as_ref().expect("only admitted exchanges reach a backend");
    let pool = Arc::clone(admitted.pool());
    loop {
        let attempts = &exchange.attempts;
        match pool.choose(key, false, |backend| attempts.may_ask(backend)) {
            Choice::Taken(permit) => return Ok(Found::Place(permit)),
            Choice::Full => {
                exchange.turn(Phase::Queue);
                let waited = wait_in_line(session, exchange, &pool, key).await?;
                exchange.turn(Phase::Own);
                match waited {
                    Waited::Place(permit) => return Ok(Found::Place(permit)),
                    Waited::Busy(refusal, why) => {
                        exchange.why = Some(why.to_owned());
                        return Ok(Found::Nobody(refusal));
                    }
                    Waited::Stopped(refusal) => return Ok(Found::Stopped(refusal)),
                    Waited::NobodyLeft => {}
                }
            }
            Choice::None => {}
        }
        let is_for_tunnel = exchange.attempts.is_for_tunnel;
        let admitted = exchange.admitted.as_ref();
        let can_fall_back = || admitted.is_some_and(|it| it.can_fall_back(is_for_tunnel));
        let is_over = !exchange.attempts.is_round_begun() || can_fall_back();
        let attempts = &mut exchange.attempts;
        if is_over || !another_round(attempts, &pool) {
            let refusal = attempts.failure.take();
            let refusal = refusal.unwrap_or_else(|| nobody_left(exchange, &pool));
            let why = "each backend is unhealthy, drained or left alone by its breaker";
            exchange.why.get_or_insert_with(|| why.to_owned());
            return Ok(Found::Nobody(refusal));
        }
        pool.check_soon();
        let pause = pause(attempts, pool.spec().retry.delay);
        attempts.next_round();
        exchange.turn(Phase::Queue);
        let stopped = wait(session, exchange, pause).await?;
        exchange.turn(Phase::Own);
        if let Some(refusal) = stopped {
            return Ok(Found::Stopped(refusal));
        }
    }
}

/// The attempt before is over. What it held is given back before the next one takes its own, but not
/// where the same backend is asked again: others may wait for that place.
fn keep_place(attempts: &mut Attempts, pool: &Pool, key: &[u8]) -> Option<Permit> {
    let before = attempts.current.take()?;
    if attempts.is_granted || !attempts.may_ask(before.backend()) {
        return None;
    }
    if !attempts.needs_new_connection {
        // An address of its name cannot be reached: another backend goes before its next address.
        let identity = before.backend().identity;
        let is_other =
            |backend: &Backend| backend.identity != identity && attempts.may_ask(backend);
        if let Choice::Taken(permit) = pool.choose(key, false, is_other) {
            return Some(permit);
        }
    }
    Some(before.permit)
}

/// Whether backends that were asked already may be asked again.
fn another_round(attempts: &mut Attempts, pool: &Pool) -> bool {
    if attempts.is_granted {
        return true;
    }
    let may = attempts.retries < pool.spec().retry.retries_max && pool.may_retry();
    attempts.retries += usize::from(may);
    may
}

/// The time before the next round: it doubles, and is never shorter than a backend asked for.
fn pause(attempts: &mut Attempts, delay: Duration) -> Duration {
    let asked = attempts.pause.take().unwrap_or_default();
    let delay = delay.saturating_mul(1 << attempts.rounds.min(16));
    let jitter = 1.0 + JITTER * (2.0 * fastrand::f64() - 1.0);
    delay.mul_f64(jitter).max(asked)
}

/// Waits; a refusal when the exchange's time is up before.
async fn wait(
    session: &mut Session,
    exchange: &Exchange,
    pause: Duration,
) -> Result<Option<Refusal>> {
    let until = Instant::now() + pause;
    let too_late = exchange.watch.exchange_by().is_some_and(|by| by < until);
    if too_late {
        return Ok(Some(exchange.stop_refusal(Stop::Exchange)));
    }
    tokio::select! {
        () = tokio::time::sleep(pause) => Ok(None),
        stop = exchange.watch.ended() => Ok(Some(exchange.stop_refusal(stop))),
        () = body::taken_back(session) => gone(),
    }
}

/// What a wait in line comes to.
enum Waited {
    Place(Permit),
    /// It took too long, or there is no room to wait: which of the two.
    Busy(Refusal, &'static str),
    /// The exchange is over.
    Stopped(Refusal),
    /// None of the backends that it could wait for can be asked any more.
    NobodyLeft,
}

/// Waits for a place while every backend that was not asked yet is full.
async fn wait_in_line(
    session: &mut Session,
    exchange: &Exchange,
    pool: &Pool,
    key: &[u8],
) -> Result<Waited> {
    let attempts = &exchange.attempts;
    let spec = &pool.spec().queue;
    let busy = |why| {
        let expected = pool.queue().expected_wait().unwrap_or(spec.timeout);
        let retry_after = expected.clamp(Duration::from_secs(1), RETRY_AFTER_MAX);
        Waited::Busy(Refusal::Busy { pool: pool.name().to_owned(), retry_after }, why)
    };
    let avoids = attempts.given_up.clone();
    let Some(mut waiter) = pool.queue().join(key, avoids, spec.length_max) else {
        return Ok(busy("every backend is full, and so is the queue"));
    };
    let choose = || pool.choose(key, true, |backend| attempts.may_ask(backend));
    let late = tokio::time::sleep(spec.timeout);
    tokio::pin!(late);
    let mut called = waiter.stand(false);
    // A place may have become free before it stood in line, with nobody there to be called.
    let mut looks = waiter.is_first;
    let mut is_called = false;
    loop {
        if looks {
            match choose() {
                Choice::Taken(permit) => {
                    if is_called {
                        waiter.served(called);
                    }
                    return Ok(Waited::Place(permit));
                }
                Choice::Full => {}
                Choice::None => return Ok(Waited::NobodyLeft),
            }
        }
        is_called = tokio::select! {
            biased;
            stop = exchange.watch.ended() => {
                return Ok(Waited::Stopped(exchange.stop_refusal(stop)));
            }
            _ = &mut called => true,
            () = &mut late => return Ok(busy("every backend was full for the whole wait in the queue")),
            // A backend may have come back, or have been given more room.
            () = tokio::time::sleep(QUEUE_LOOK) => false,
            () = body::taken_back(session) => return gone(),
        };
        if is_called {
            called = waiter.stand(true);
        }
        looks = true;
    }
}

/// The client is told about the model that it asked for.
fn nobody_left(exchange: &Exchange, pool: &Pool) -> Refusal {
    let asked = exchange.admitted.as_ref().map_or(pool, |admitted| &admitted.way.targets[0].pool);
    let takes_tunnels = || asked.backends().iter().any(|backend| backend.takes_tunnels());
    let asked_name = asked.name().to_owned();
    if exchange.attempts.is_for_tunnel && !takes_tunnels() {
        return Refusal::NoWebSocket { pool: asked_name };
    }
    pool.check_soon();
    let retry_after = pool.back_within().min(RETRY_AFTER_MAX);
    Refusal::NoBackend { pool: asked_name, retry_after }
}

/// An HTTP/2 client does not wait any more, or nobody does.
///
/// # Errors
/// Always.
pub(super) fn gone<T>() -> Result<T> {
    let error = Error::explain(ErrorType::ConnectionClosed, "the client took its request back");
    Err(error.into_down())
}

/// An address as the bytes that a client sticks by.
enum AddressBytes {
    /// Behind a Unix socket there may be many clients: each request is one of its own.
    Unknown([u8; 8]),
    V4([u8; 4]),
    V6([u8; 16]),
}

impl AddressBytes {
    fn of(address: Option<IpAddr>) -> Self {
        match address {
            None => Self::Unknown(fastrand::u64(..).to_ne_bytes()),
            Some(IpAddr::V4(address)) => Self::V4(address.octets()),
            Some(IpAddr::V6(address)) => Self::V6(address.octets()),
        }
    }

    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Unknown(bytes) => bytes,
            Self::V4(bytes) => bytes,
            Self::V6(bytes) => bytes,
        }
    }
}
