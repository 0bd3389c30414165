//! One backend at run time: its identity, its live state, and the peer that is dialled.

use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::unix::net::SocketAddr as UnixAddress;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use pingora_core::connectors::L4Connect;
use pingora_core::protocols::l4::socket::SocketAddr as L4Address;
use pingora_core::protocols::l4::stream::Stream as L4Stream;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::utils::tls::{CertKey, WrappedX509, parse_x509};
use pingora_core::{Error, ErrorType, OrErr, Result};
use tokio::net::{TcpStream, UnixStream};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::breaker::{Breaker, BreakerState, Entry};
use super::health::{Health, HealthState};
use super::moment::Moment;
use super::queue::Queue;
use super::resolve::{Address, Addresses};
use super::tunnel::{Gate, Socket, gated};
use crate::config::{BackendSpec, Deadlines, Protocol};
use crate::telemetry::Recent;

/// A backend as its pool knows it.
#[derive(Debug)]
pub struct Backend {
    /// What was configured.
    pub spec: BackendSpec,
    /// What outlives a configuration.
    pub live: Arc<Live>,
    /// Where its host leads.
    pub addresses: Arc<Addresses>,
    /// Stands for it inside Pingora; see [`identity`].
    pub identity: SocketAddr,
    /// Its number in the hash that clients stick by. Only the id counts: a backend that moves to
    /// another address keeps its clients.
    pub(super) stickiness_seed: u64,
    /// The peer to dial, but for its address.
    peer: HttpPeer,
}

/// State that is carried over when the configuration changes.
#[derive(Debug, Default)]
pub struct Live {
    /// What the health checks found.
    pub health: Health,
    /// Attempts that went to it.
    pub attempts: Recent,
    /// Those that failed.
    pub failures: Recent,
    last_failure: Mutex<Option<(SystemTime, String)>>,
    is_drained: AtomicBool,
    inflight: AtomicUsize,
    suspected: AtomicBool,
    pub(super) breaker: Breaker,
    cooling: Moment,
    misconfigured: AtomicU16,
}

impl Backend {
    pub(super) fn new(
        pool: &str,
        spec: BackendSpec,
        addresses: Arc<Addresses>,
        live: Arc<Live>,
    ) -> Self {
        Self {
            identity: identity(pool, &spec),
            stickiness_seed: xxh3_64(spec.id.as_bytes()),
            peer: peer(&spec),
            spec,
            live,
            addresses,
        }
    }

    /// Whether it may be given exchanges: not known to be unhealthy, not drained, and its address is known.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.live.health.state() != HealthState::Unhealthy
            && !self.is_drained()
            && self.addresses.count() > 0
    }

    /// Whether an operator has taken it out of service.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.live.is_drained.load(Ordering::Relaxed)
    }

    /// When an attempt failed last, and why.
    #[must_use]
    pub fn last_failure(&self) -> Option<(SystemTime, String)> {
        self.live.last_failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// An attempt failed.
    pub fn note_failure(&self, now: Instant, why: &str) {
        self.live.failures.count(now);
        let failure = Some((SystemTime::now(), why.to_owned()));
        *self.live.last_failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }

    /// How long its breaker still leaves it alone.
    #[must_use]
    pub fn left_alone_for(&self, now: Instant) -> Option<Duration> {
        let until = self.live.breaker.open_until()?;
        until.checked_duration_since(now)
    }

    /// An operator takes it out of service, until that is taken back or the process ends: what it is at goes on, and
    /// nothing new comes. Whether that is news.
    pub fn drain(&self, is_drained: bool) -> bool {
        self.live.is_drained.swap(is_drained, Ordering::Relaxed) != is_drained
    }

    /// An exchange could not reach it: until its next check it is asked after all others.
    pub(super) fn suspect(&self) {
        self.live.suspected.store(true, Ordering::Relaxed);
    }

    /// Whether it is asked after all others.
    #[must_use]
    pub fn is_suspected(&self) -> bool {
        self.live.suspected.load(Ordering::Relaxed)
    }

    /// Its check is done, whatever came out.
    pub(super) fn clear_suspicion(&self) {
        self.live.suspected.store(false, Ordering::Relaxed);
    }

    /// Whether it is asked after all others: it could not be reached, or asked for a pause.
    #[must_use]
    pub fn is_avoided(&self, now: Instant) -> bool {
        self.is_suspected() || self.cooling(now).is_some()
    }

    /// It is overloaded (429): till then it is asked after all others.
    pub(super) fn cool_down(&self, until: Instant) {
        self.live.cooling.extend(until);
    }

    /// How long it still wants to be left alone.
    #[must_use]
    pub fn cooling(&self, now: Instant) -> Option<Duration> {
        self.live.cooling.left(now)
    }

    /// Its circuit breaker's state.
    #[must_use]
    pub fn breaker(&self, now: Instant) -> BreakerState {
        self.live.breaker.state(now)
    }

    /// The status with which it refuses the credential that it is sent (401 or 403), if it does.
    #[must_use]
    pub fn refuses_credential(&self) -> Option<u16> {
        Some(self.live.misconfigured.load(Ordering::Relaxed)).filter(|status| *status != 0)
    }

    /// Notes whether it takes the credential; whether that is news.
    pub(super) fn note_credential(&self, refused_with: Option<u16>) -> bool {
        let status = refused_with.unwrap_or(0);
        // Read first: what never changes is not written by every exchange.
        self.live.misconfigured.load(Ordering::Relaxed) != status
            && self.live.misconfigured.swap(status, Ordering::Relaxed) != status
    }

    /// Its weight now: less than configured for a while after a recovery.
    pub(super) fn weight(&self, now: Instant, slow_start: Duration) -> f64 {
        self.spec.weight * self.live.breaker.ramp(now, slow_start)
    }

    /// The peer at `address`.
    ///
    /// # Errors
    /// When the path of a Unix socket is none; validation has looked at its length.
    pub fn peer_at(&self, address: &Address) -> Result<HttpPeer> {
        let mut peer = self.peer.clone();
        peer._address = match address {
            Address::Tcp(address) => L4Address::Inet(*address),
            Address::Unix(path) => {
                let address = UnixAddress::from_pathname(path);
                L4Address::Unix(address.or_err(ErrorType::SocketError, "not a socket's path")?)
            }
        };
        Ok(peer)
    }

    /// As [`Backend::peer_at`], for a WebSocket: the connection is new, HTTP/1.1, and behind the gate.
    ///
    /// # Errors
    /// As [`Backend::peer_at`].
    pub fn tunnel_peer_at(&self, address: &Address, gate: &Arc<Gate>) -> Result<HttpPeer> {
        let mut peer = self.peer_at(address)?;
        peer.options.set_http_version(1, 1);
        let deadline = self.spec.deadlines.connect;
        peer.options.custom_l4 = Some(Arc::new(Dial { deadline, gate: Some(Arc::clone(gate)) }));
        peer.group_key = fastrand::u64(1..);
        Ok(peer)
    }

    /// Whether a connection to it speaks what it has to. A backend that knows no ALPN agrees to nothing,
    /// and Pingora then speaks HTTP/1.1 to it.
    ///
    /// # Errors
    /// When it is configured for HTTP/2 only.
    pub fn check_version(&self, is_http_2: bool) -> Result<()> {
        if is_http_2 || self.spec.protocol != Protocol::Http2 {
            return Ok(());
        }
        let why = "it does not agree to HTTP/2: set protocol to http1 or auto";
        Err(Error::because(ErrorType::TLSHandshakeFailure, "protocol", why).into_up())
    }

    /// Whether it speaks HTTP/1.1, which a WebSocket takes; with TLS, it can be agreed on.
    #[must_use]
    pub fn takes_tunnels(&self) -> bool {
        self.spec.url.tls || self.spec.protocol != Protocol::Http2
    }

    /// Exchanges in flight towards it.
    #[must_use]
    pub fn inflight(&self) -> usize {
        self.live.inflight.load(Ordering::Relaxed)
    }

    /// Whether another exchange may go to it.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.spec.inflight_max == 0 || self.inflight() < self.spec.inflight_max
    }

    /// Takes a place, unless it is full or, meanwhile, left alone.
    pub(super) fn enter(
        self: &Arc<Self>,
        queue: &Arc<Queue>,
        now: Instant,
        terms: Terms,
    ) -> Option<Permit> {
        let inflight = &self.live.inflight;
        if self.spec.inflight_max == 0 {
            inflight.fetch_add(1, Ordering::SeqCst);
        } else {
            let one_more = |count| (count < self.spec.inflight_max).then_some(count + 1);
            inflight.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).ok()?;
        }
        let entry = match (self.live.breaker.enter(now), terms) {
            (Some(entry), _) => entry,
            (None, Terms::LastResort) => Entry::Normal,
            (None, Terms::Regular) => {
                inflight.fetch_sub(1, Ordering::SeqCst);
                return None;
            }
        };
        self.live.attempts.count(now);
        Some(Permit {
            backend: Arc::clone(self),
            queue: Arc::clone(queue),
            entry,
            entered: now,
            is_told: false,
            is_inside: true,
        })
    }
}

/// Why an exchange comes to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Terms {
    /// Its breaker lets it.
    Regular,
    /// There is no other backend: whatever its breaker says.
    LastResort,
}

/// An exchange's place at a backend, given back when dropped, or before.
#[derive(Debug)]
pub struct Permit {
    /// The backend.
    pub backend: Arc<Backend>,
    queue: Arc<Queue>,
    pub(super) entry: Entry,
    pub(super) entered: Instant,
    /// Whether the breaker has heard how it went.
    pub(super) is_told: bool,
    /// Whether the place is still taken.
    is_inside: bool,
}

impl Permit {
    /// Whether it finds out if the backend is well again.
    #[must_use]
    pub fn is_probe(&self) -> bool {
        self.entry == Entry::Probe
    }

    /// The backend has no more to do: its place is another one's.
    pub fn leave(&mut self) {
        if !std::mem::take(&mut self.is_inside) {
            return;
        }
        self.backend.live.inflight.fetch_sub(1, Ordering::SeqCst);
        if self.is_probe() && !self.is_told {
            self.backend.live.breaker.abandon();
        }
        self.queue.call(self.backend.identity);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.leave();
    }
}

/// An address that is never dialled and stands for the backend inside Pingora, whose own notion of
/// a backend is its address and weight: two keys on one address would be one backend to it. An IPv6
/// unique local address (RFC 4193) from a hash of all that makes it another server.
pub(super) fn identity(pool: &str, spec: &BackendSpec) -> SocketAddr {
    let text = format!("{pool}\0{}\0{}", spec.id, spec.url.shown);
    let bits = xxh3_128(text.as_bytes()) >> 8 | 0xfd << 120;
    SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from_bits(bits), 1, 0, 0))
}

fn peer(spec: &BackendSpec) -> HttpPeer {
    let sni = if spec.url.tls { spec.tls.server_name.clone() } else { String::new() };
    // A literal address: `new` would look a name up, blocking, and panic when that fails.
    let placeholder = SocketAddr::from(([0, 0, 0, 0], 0));
    let mut peer = HttpPeer::new(placeholder, spec.url.tls, sni);
    let Deadlines { connect, tls, .. } = spec.deadlines;
    let options = &mut peer.options;
    // Reading and writing have no timeouts of their own: the exchange's watch sees to that.
    if spec.url.tls {
        // Pingora has one timeout for both: it is the handshake's, and ours dials.
        options.connection_timeout = Some(tls);
        options.custom_l4 = Some(Arc::new(Dial { deadline: connect, gate: None }));
    } else {
        options.connection_timeout = Some(connect);
    }
    options.idle_timeout = Some(spec.idle_timeout);
    match (spec.protocol, spec.url.tls) {
        (Protocol::Http1, _) | (Protocol::Auto, false) => options.set_http_version(1, 1),
        (Protocol::Http2, _) => options.set_http_version(2, 2),
        (Protocol::Auto, true) => options.set_http_version(2, 1),
    }
    if spec.url.tls {
        secure(&mut peer, spec);
    }
    peer
}

/// Whom the backend is taken for, and what it is shown.
fn secure(peer: &mut HttpPeer, spec: &BackendSpec) {
    let options = &mut peer.options;
    options.verify_cert = spec.tls.verify;
    options.verify_hostname = spec.tls.verify;
    let authorities = spec.tls.ca.as_ref().map(|ca| {
        let authority = |der: &Vec<u8>| WrappedX509::new(der.clone(), parse_x509);
        ca.iter().map(authority).collect::<Arc<[_]>>()
    });
    options.ca = authorities;
    peer.client_cert_key =
        spec.tls.client.as_ref().map(|client| {
            Arc::new(CertKey::new(client.chain.clone(), client.key.expose().to_vec()))
        });
    // Connections are shared by those who would have made the same. Of these Pingora compares nothing, or
    // of a certificate its serial number.
    let chain = spec.tls.client.as_ref().map(|client| &client.chain);
    let profile = (&spec.tls.ca, chain, spec.protocol);
    peer.group_key = xxh3_64(format!("{profile:?}").as_bytes());
}

/// The deadline for a connection to a backend with TLS is over: Pingora's own word for that also
/// stands for the handshake.
pub const CONNECT_DEADLINE: ErrorType = ErrorType::Custom("ConnectDeadline");

/// Makes connections within a deadline, behind a gate if there is one.
#[derive(Debug)]
struct Dial {
    deadline: Duration,
    gate: Option<Arc<Gate>>,
}

#[async_trait]
impl L4Connect for Dial {
    async fn connect(&self, to: &L4Address) -> Result<L4Stream> {
        let connect = async {
            match to {
                L4Address::Inet(to) => {
                    TcpStream::connect(to).await.map(|stream| behind(stream, self.gate.as_ref()))
                }
                L4Address::Unix(to) => {
                    let path = to.as_pathname().unwrap_or(Path::new(""));
                    UnixStream::connect(path).await.map(|stream| behind(stream, self.gate.as_ref()))
                }
            }
        };
        tokio::time::timeout(self.deadline, connect)
            .await
            .or_err(CONNECT_DEADLINE, "connecting")?
            .map_err(|error| {
                let kind = match error.kind() {
                    std::io::ErrorKind::ConnectionRefused => ErrorType::ConnectRefused,
                    _ => ErrorType::ConnectError,
                };
                Error::because(kind, "connecting", error)
            })
    }
}

fn behind<S: Socket + Into<L4Stream>>(stream: S, gate: Option<&Arc<Gate>>) -> L4Stream {
    match gate {
        Some(gate) => gated(stream, gate),
        None => stream.into(),
    }
}
