//! From the pool to a backend to the peer that Pingora dials.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorType, Result};
use pingora_proxy::Session;

use super::body;
use super::exchange::{Attempt, Exchange};
use crate::refusal::Refusal;

/// Longest `Retry-After` for a pool without a usable backend: its next health check may bring one
/// back sooner, and SDKs give up on long waits.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);

/// Chooses the backend of the next attempt.
pub(super) fn select(session: &mut Session, exchange: &mut Exchange) -> Result<Box<HttpPeer>> {
    let admitted = exchange.admitted.as_ref().expect("only admitted exchanges reach a backend");
    let pool = &admitted.pool;
    let attempts = &mut exchange.attempts;
    // What the attempt before held is given back before the next one takes its own.
    attempts.current = None;
    let key = AddressBytes::of(admitted.client.address);
    let chosen = pool.select(key.as_slice(), |backend| attempts.may_ask(backend));
    let Some((backend, address)) =
        chosen.and_then(|backend| Some((backend, backend.addresses.current()?)))
    else {
        let retry_after = pool.spec().health.interval.min(RETRY_AFTER_MAX);
        attempts
            .failure
            .get_or_insert(Refusal::NoBackend { pool: pool.name().to_owned(), retry_after });
        return Error::e_explain(ErrorType::HTTPStatus(503), "no usable backend");
    };
    let mut peer = Box::new(backend.peer_at(address));
    if attempts.needs_new_connection {
        // Kept connections are shared within a group only.
        peer.group_key = fastrand::u64(1..);
    }
    body::bound_upload(session, &exchange.arrived.runtime.snapshot.client, &backend.spec);
    let inflight = backend.begin();
    attempts.current = Some(Attempt {
        backend: Arc::clone(backend),
        address,
        began: Instant::now(),
        _inflight: inflight,
    });
    Ok(peer)
}

/// An address as the bytes that a client sticks by.
enum AddressBytes {
    None,
    V4([u8; 4]),
    V6([u8; 16]),
}

impl AddressBytes {
    fn of(address: Option<IpAddr>) -> Self {
        match address {
            None => Self::None,
            Some(IpAddr::V4(address)) => Self::V4(address.octets()),
            Some(IpAddr::V6(address)) => Self::V6(address.octets()),
        }
    }

    fn as_slice(&self) -> &[u8] {
        match self {
            Self::None => &[],
            Self::V4(bytes) => bytes,
            Self::V6(bytes) => bytes,
        }
    }
}
