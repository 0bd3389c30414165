//! Active health checks: one request a backend and round, with the backend's own Host, TLS and
//! credential, under a hard deadline; and what they found.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use pingora::http::RequestHeader;
use pingora_core::connectors::http::Connector;
use pingora_core::protocols::http::client::HttpSession;
use pingora_core::{Error, ErrorType, OrErr, Result};
use pingora_load_balancing::Backend as LbBackend;
use pingora_load_balancing::health_check::HealthCheck;

use super::backend::{Backend, CONNECT_DEADLINE};
use super::resolve::Address;
use crate::config::{BackendSpec, HealthSpec};
use crate::telemetry::advice;

/// Most of an answer's body that is read, so that the connection ends cleanly for the backend.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Most interim responses (1xx) before the final one.
const INTERIM_RESPONSES_MAX: usize = 8;

/// What is checked now. It outlives configurations: Pingora takes one check for a registry's life.
pub(super) struct CheckedPool {
    pub(super) name: String,
    pub(super) spec: HealthSpec,
    pub(super) backends: HashMap<SocketAddr, Arc<Backend>>,
}

/// The check of all backends of a pool.
pub(super) struct PoolCheck {
    pub(super) pool: Arc<ArcSwap<CheckedPool>>,
    /// Whether checks of a round are spread over the jitter; not so in the first round.
    pub(super) spread: Arc<AtomicBool>,
    pub(super) prober: Arc<Prober>,
}

impl PoolCheck {
    fn find(&self, target: &LbBackend) -> Option<Arc<Backend>> {
        self.pool.load().backends.get(&super::identity_of(target)?).cloned()
    }

    async fn wait_jitter(&self) {
        if self.spread.load(Ordering::Relaxed) {
            let spec = &self.pool.load_full().spec;
            tokio::time::sleep(spec.interval.mul_f64(spec.jitter * fastrand::f64())).await;
        }
    }
}

/// Sends the checks of all pools. One for the process: it holds the system's root certificates.
pub struct Prober {
    connector: Connector,
}

impl Default for Prober {
    fn default() -> Self {
        Self { connector: Connector::new(None) }
    }
}

impl Prober {
    /// Asks the backend, trying its host's other addresses when one does not answer.
    async fn probe(&self, backend: &Backend) -> Result<Duration> {
        let addresses = &backend.addresses;
        if addresses.count() == 0 {
            let name = addresses.name().unwrap_or_default();
            let looked_up = addresses.refresh().await;
            looked_up.or_err_with(ErrorType::ConnectError, || format!("looking up {name}"))?;
        }
        let count = u32::try_from(addresses.count().max(1)).unwrap_or(u32::MAX);
        // A share for each, so that one which swallows packets does not use up all the time.
        let connect = backend.spec.deadlines.connect.min(backend.spec.probe.timeout / count);
        let mut result = Error::e_explain(ErrorType::ConnectError, "no address is known");
        for _ in 0..count {
            let Some(address) = addresses.current() else { break };
            let started = Instant::now();
            result = self.ask(backend, &address, connect).await.map(|()| started.elapsed());
            match &result {
                Err(error) if is_connect_failure(&error.etype) => addresses.pass_over(&address),
                _ => break,
            }
        }
        result
    }

    async fn ask(&self, backend: &Backend, address: &Address, connect: Duration) -> Result<()> {
        let mut peer = backend.peer_at(address)?;
        peer.options.total_connection_timeout = Some(connect);
        let (mut session, _) = self.connector.get_http_session(&peer).await?;
        session.set_read_timeout(Some(backend.spec.probe.timeout));
        let mut request = request(backend)?;
        let is_http_2 = matches!(session, HttpSession::H2(_));
        backend.check_version(is_http_2)?;
        if !is_http_2 {
            request.insert_header("Connection", "close")?;
        }
        session.write_request_header(Box::new(request)).await?;
        session.finish_request_body().await?;
        let status = final_status(&mut session).await?;
        let mut body_bytes = 0;
        while body_bytes < BODY_BYTES_MAX {
            match session.read_response_body().await {
                Ok(Some(chunk)) => body_bytes += chunk.len(),
                // The status decides; a body that ends early does not.
                Ok(None) | Err(_) => break,
            }
        }
        if backend.spec.probe.expect_status.contains(&status) {
            Ok(())
        } else {
            Error::e_explain(ErrorType::HTTPStatus(status), "not the expected status")
        }
    }
}

/// Reads response heads up to the final one. 101 is none of ours: nobody asked for it.
async fn final_status(session: &mut HttpSession) -> Result<u16> {
    for _ in 0..=INTERIM_RESPONSES_MAX {
        session.read_response_header().await?;
        let status = session.response_header().map_or(0, |head| head.status.as_u16());
        match status {
            101 => return Error::e_explain(ErrorType::HTTPStatus(101), "not asked for"),
            100..=199 => {}
            status => return Ok(status),
        }
    }
    Error::e_explain(ErrorType::InvalidHTTPHeader, "interim responses without end")
}

fn is_connect_failure(error: &ErrorType) -> bool {
    use ErrorType::{ConnectError, ConnectNoRoute, ConnectRefused, ConnectTimedout};
    matches!(
        *error,
        ConnectError | ConnectNoRoute | ConnectRefused | ConnectTimedout | CONNECT_DEADLINE
    )
}

/// Why a check failed, in words that say what to do about it.
fn why(backend: &Backend, error: &Error) -> String {
    let ErrorType::HTTPStatus(status) = error.root_etype() else { return advice(error) };
    let probe = &backend.spec.probe;
    let expected: Vec<String> = probe.expect_status.iter().map(ToString::to_string).collect();
    let expected = expected.join(" or ");
    let hint = match status {
        401..=405 => "; health_check.path can name one that it answers, such as /v1/models",
        _ => "",
    };
    format!("{} {} answered {status}, expected {expected}{hint}", probe.method, target(backend))
}

/// Where a check goes: below the base path, as all requests do.
fn target(backend: &Backend) -> String {
    format!("{}{}", backend.spec.url.base_path, backend.spec.probe.path)
}

fn request(backend: &Backend) -> Result<RequestHeader> {
    let probe = &backend.spec.probe;
    let target = target(backend);
    let mut request = RequestHeader::build(probe.method.clone(), target.as_bytes(), Some(8))?;
    request.insert_header("Host", backend.spec.url.authority.clone())?;
    request.insert_header("User-Agent", concat!("tollgate/", env!("CARGO_PKG_VERSION")))?;
    request.insert_header("Accept", "*/*")?;
    if let Some(credential) = &backend.spec.credential {
        request.insert_header(credential.header.clone(), credential.value.clone())?;
    }
    for (name, value) in &probe.headers {
        request.insert_header(name.clone(), value.clone())?;
    }
    Ok(request)
}

#[async_trait]
impl HealthCheck for PoolCheck {
    async fn check(&self, target: &LbBackend) -> Result<()> {
        // Gone with a change of configuration: there is nothing to find out about it.
        let Some(backend) = self.find(target) else { return Ok(()) };
        self.wait_jitter().await;
        let timeout = backend.spec.probe.timeout;
        let result = match tokio::time::timeout(timeout, self.prober.probe(&backend)).await {
            Ok(result) => result,
            Err(_) => {
                // Another address of its name may do better in the next round.
                backend.addresses.current().inspect(|silent| backend.addresses.pass_over(silent));
                Error::e_explain(ErrorType::ReadTimedout, format!("no answer in {timeout:?}"))
            }
        };
        backend.live.health.checked(result.as_ref().copied().map_err(|error| why(&backend, error)));
        backend.clear_suspicion();
        if result.is_ok() {
            backend.live.health.first_pass();
        }
        result.map(|_| ())
    }

    async fn health_status_change(&self, target: &LbBackend, healthy: bool) {
        if let Some(backend) = self.find(target) {
            backend.live.health.turn(healthy);
            let BackendSpec { id, url, .. } = &backend.spec;
            let pool = &self.pool.load().name;
            if healthy {
                log::info!("backend {id} of {pool} ({}) is healthy again", url.shown);
            } else {
                let failure = backend.live.health.failure().unwrap_or_default();
                log::warn!("backend {id} of {pool} ({}) is unhealthy: {failure}", url.shown);
            }
        }
    }

    fn health_threshold(&self, success: bool) -> usize {
        let spec = &self.pool.load().spec;
        if success { spec.healthy_after } else { spec.unhealthy_after }
    }
}

/// A backend's health, as told by its checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthState {
    /// Not checked yet; usable.
    Unknown,
    /// Passed.
    Healthy,
    /// Failed, as often in a row as configured.
    Unhealthy,
}

impl HealthState {
    /// The word for it in status and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// State, response time and time of the last check, written by checks and read by everybody.
#[derive(Debug)]
pub struct Health {
    state: AtomicU8,
    response_micros: AtomicU64,
    checked_at_millis: AtomicI64,
    failure: Mutex<Option<String>>,
}

const UNKNOWN: u8 = 0;
const HEALTHY: u8 = 1;
const UNHEALTHY: u8 = 2;
const NO_RESPONSE: u64 = u64::MAX;
const NEVER_CHECKED: i64 = i64::MIN;

impl Default for Health {
    fn default() -> Self {
        Self {
            state: AtomicU8::new(UNKNOWN),
            response_micros: AtomicU64::new(NO_RESPONSE),
            checked_at_millis: AtomicI64::new(NEVER_CHECKED),
            failure: Mutex::default(),
        }
    }
}

impl Health {
    /// The state now.
    #[must_use]
    pub fn state(&self) -> HealthState {
        match self.state.load(Ordering::Relaxed) {
            HEALTHY => HealthState::Healthy,
            UNHEALTHY => HealthState::Unhealthy,
            _ => HealthState::Unknown,
        }
    }

    /// How long the last check waited for its answer, if it passed.
    #[must_use]
    pub fn response_time(&self) -> Option<Duration> {
        let micros = self.response_micros.load(Ordering::Relaxed);
        (micros != NO_RESPONSE).then(|| Duration::from_micros(micros))
    }

    /// When the last check ended, in milliseconds since 1970.
    #[must_use]
    pub fn checked_at_millis(&self) -> Option<i64> {
        let millis = self.checked_at_millis.load(Ordering::Relaxed);
        (millis != NEVER_CHECKED).then_some(millis)
    }

    /// Why the last check failed, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A check ended, with the time to its answer, or the reason why there is none.
    pub(super) fn checked(&self, outcome: Result<Duration, String>) {
        let (response_time, failure) = match outcome {
            Ok(time) => (Some(time), None),
            Err(reason) => (None, Some(reason)),
        };
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
        let micros = response_time
            .map_or(NO_RESPONSE, |time| u64::try_from(time.as_micros()).unwrap_or(NO_RESPONSE));
        self.response_micros.store(micros, Ordering::Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let millis = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
        self.checked_at_millis.store(millis, Ordering::Relaxed);
    }

    /// A first pass needs no threshold: a backend is taken for usable before it too.
    pub(super) fn first_pass(&self) {
        let _ = self.state.compare_exchange(UNKNOWN, HEALTHY, Ordering::Relaxed, Ordering::Relaxed);
    }

    pub(super) fn turn(&self, healthy: bool) {
        self.state.store(if healthy { HEALTHY } else { UNHEALTHY }, Ordering::Relaxed);
    }
}
