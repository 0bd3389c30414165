//! A pool: the backends of one service/model behind one Pingora `LoadBalancer`, with our selection,
//! our health checks and our notion of a backend. A pool does not know HTTP exchanges.

mod backend;
mod balance;
mod health;
mod resolve;
mod stickiness;

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use pingora_load_balancing::discovery::Static;
use pingora_load_balancing::{Backend as LbBackend, Backends, HealthRegistry, LoadBalancer};
use tokio::sync::Notify;
use tokio::time::Instant;

pub use backend::{Backend, BackendInFlight, Health, HealthState, Live};
pub use health::Prober;
pub use resolve::Addresses;

use balance::{BalanceConfig, Balancer};
use health::{CheckedPool, PoolCheck};
use stickiness::Clients;

use crate::config::{Host, PoolSpec};

/// Shortest time between two rounds of checks, however many exchanges ask for one.
const SUSPICION_GAP: Duration = Duration::from_secs(1);

/// Time between two look-ups of a name that is not known, besides those of the checks.
const UNKNOWN_NAME_GAP: Duration = Duration::from_secs(2);

/// Names that are looked up, by host and port: backends on one host share the answer.
pub type Names = HashMap<(Host, u16), Arc<Addresses>>;

/// The backends of one service/model.
pub struct Pool {
    name: String,
    spec: PoolSpec,
    backends: Vec<Arc<Backend>>,
    by_identity: HashMap<SocketAddr, Arc<Backend>>,
    balancer: LoadBalancer<Balancer>,
    checks: Arc<Checks>,
    clients: Arc<Clients>,
}

/// The part of a pool that outlives a configuration: Pingora's health registry and what it checks.
pub struct Checks {
    registry: Arc<HealthRegistry>,
    pool: Arc<ArcSwap<CheckedPool>>,
    spread: Arc<AtomicBool>,
    suspected: Notify,
}

impl Pool {
    /// Builds the pool `service/model`. From `previous`, the pool of that name in the configuration
    /// before, the state of backends that stay is carried over.
    ///
    /// # Errors
    /// When Pingora refuses a backend's synthetic address; that it does not is tested.
    pub fn new(
        name: String,
        spec: PoolSpec,
        names: &mut Names,
        prober: &Arc<Prober>,
        previous: Option<&Pool>,
    ) -> pingora_core::Result<Self> {
        let backends: Vec<Arc<Backend>> = spec
            .backends
            .iter()
            .map(|spec| {
                let host = (spec.url.host.clone(), spec.url.port);
                let addresses = names.entry(host).or_insert_with_key(|(host, port)| {
                    Arc::new(Addresses::new(host.clone(), *port))
                });
                let known =
                    previous.and_then(|pool| pool.by_identity.get(&backend::identity(&name, spec)));
                let live = known.map(|backend| Arc::clone(&backend.live)).unwrap_or_default();
                Arc::new(Backend::new(&name, spec.clone(), Arc::clone(addresses), live))
            })
            .collect();
        let by_identity: HashMap<SocketAddr, Arc<Backend>> =
            backends.iter().map(|backend| (backend.identity, Arc::clone(backend))).collect();
        let checked = CheckedPool {
            name: name.clone(),
            spec: spec.health.clone(),
            backends: by_identity.clone(),
        };
        let checks = match previous {
            Some(previous) => {
                previous.checks.pool.store(Arc::new(checked));
                // What is new is checked soon, whatever the old interval was.
                previous.checks.suspected.notify_one();
                Arc::clone(&previous.checks)
            }
            None => Arc::new(Checks::new(checked, Arc::clone(prober))),
        };
        let clients = previous.map(|previous| Arc::clone(&previous.clients)).unwrap_or_default();
        let balancer = load_balancer(&spec, &backends, &checks.registry, &clients)?;
        Ok(Self { name, spec, backends, by_identity, balancer, checks, clients })
    }

    /// `service/model`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What was configured.
    #[must_use]
    pub fn spec(&self) -> &PoolSpec {
        &self.spec
    }

    /// The backends in the order of the configuration.
    #[must_use]
    pub fn backends(&self) -> &[Arc<Backend>] {
        &self.backends
    }

    /// The backend for a client (by `key`, the bytes of its address) that `accept` takes, or none
    /// when no usable one is left.
    pub fn select(&self, key: &[u8], accept: impl Fn(&Backend) -> bool) -> Option<&Arc<Backend>> {
        let chosen = self.balancer.select_with(key, self.backends.len(), |entry, healthy| {
            healthy && self.of(entry).is_some_and(|backend| accept(backend))
        })?;
        self.of(&chosen)
    }

    fn of(&self, entry: &LbBackend) -> Option<&Arc<Backend>> {
        self.by_identity.get(&identity_of(entry)?)
    }

    /// An exchange could not reach the backend: it is checked soon, and till then asked last.
    pub fn suspect(&self, backend: &Backend) {
        backend.suspect();
        self.checks.suspected.notify_one();
    }

    /// The pool's health checks, shared with its next version.
    #[must_use]
    pub fn checks(&self) -> &Arc<Checks> {
        &self.checks
    }
}

impl Checks {
    fn new(checked: CheckedPool, prober: Arc<Prober>) -> Self {
        let registry = Arc::new(HealthRegistry::with_equivalence(|entry: &LbBackend| {
            identity_of(entry).map_or(0, |identity| match identity {
                SocketAddr::V6(address) => {
                    let bits = address.ip().to_bits();
                    #[allow(clippy::cast_possible_truncation, reason = "64 of 120 hash bits")]
                    let low = bits as u64;
                    low
                }
                SocketAddr::V4(_) => 0,
            })
        }));
        let pool = Arc::new(ArcSwap::from_pointee(checked));
        let spread = Arc::new(AtomicBool::new(false));
        let check = PoolCheck { pool: Arc::clone(&pool), spread: Arc::clone(&spread), prober };
        registry.set_health_check(Box::new(check));
        Self { registry, pool, spread, suspected: Notify::new() }
    }

    /// Returns when the name of a backend that was not known has been found.
    async fn name_found(&self) {
        loop {
            tokio::time::sleep(UNKNOWN_NAME_GAP).await;
            let pool = self.pool.load_full();
            let is_unknown = |addresses: &&Arc<Addresses>| addresses.count() == 0;
            let addresses = pool.backends.values().map(|backend| &backend.addresses);
            for unknown in addresses.filter(is_unknown) {
                if unknown.refresh().await.is_ok() {
                    return;
                }
            }
        }
    }

    /// Checks the backends for as long as it is polled: a first round at once, then one an interval,
    /// or when an exchange raised a suspicion, or when the name of a backend has been found.
    pub async fn run(&self) {
        loop {
            let started = Instant::now();
            self.registry.run_health_check(true).await;
            let interval = self.pool.load().spec.interval;
            let soon = tokio::select! {
                () = tokio::time::sleep_until(started + interval) => false,
                () = self.suspected.notified() => true,
                () = self.name_found() => true,
            };
            self.spread.store(!soon, Ordering::Relaxed);
            if soon {
                tokio::time::sleep_until(started + SUSPICION_GAP.min(interval)).await;
            }
        }
    }
}

/// Pingora's load balancer over the backends' synthetic addresses.
fn load_balancer(
    spec: &PoolSpec,
    backends: &[Arc<Backend>],
    registry: &Arc<HealthRegistry>,
    clients: &Arc<Clients>,
) -> pingora_core::Result<LoadBalancer<Balancer>> {
    let entries: BTreeSet<LbBackend> = backends
        .iter()
        .map(|backend| LbBackend::new(&backend.identity.to_string()))
        .collect::<pingora_core::Result<_>>()?;
    let view = Backends::new_with_health_registry(Static::new(entries), Arc::clone(registry));
    let config = BalanceConfig {
        balance: spec.balance,
        backends: backends.to_vec(),
        clients: Arc::clone(clients),
    };
    let balancer = LoadBalancer::from_backends_with_config(view, Some(Arc::new(config)));
    // The discovery is static: the update is ready at its first poll.
    futures_ready(balancer.update())?;
    Ok(balancer)
}

/// Polls a future that never waits.
fn futures_ready<T>(future: impl Future<Output = T>) -> T {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(future).poll(&mut context) {
        std::task::Poll::Ready(value) => value,
        std::task::Poll::Pending => unreachable!("a static discovery does not wait"),
    }
}

/// The synthetic address in an entry of Pingora's.
fn identity_of(entry: &LbBackend) -> Option<SocketAddr> {
    entry.addr.as_inet().copied()
}

/// A pool of one backend, `http://two:PORT`, whose name has these addresses.
#[cfg(test)]
pub(crate) fn pool_of_name(known: &[SocketAddr]) -> Pool {
    let port = known[0].port();
    let host = (Host::Name("two".to_owned()), port);
    let names = Names::from([(host, Arc::new(Addresses::of_name("two", known)))]);
    pool_at(&format!("http://two:{port}"), names)
}

#[cfg(test)]
fn pool_at(url: &str, mut names: Names) -> Pool {
    let text =
        format!("services: {{s: {{models: {{m: {{backends: [{{id: a, url: \"{url}\"}}]}}}}}}}}");
    let source = crate::config::Source::File("test.yaml".into());
    let environment = crate::config::Environment::default();
    let snapshot = crate::config::read(text.as_bytes(), &source, &environment).unwrap();
    let spec = snapshot.pools().next().unwrap().2.clone();
    Pool::new("s/m".to_owned(), spec, &mut names, &Arc::default(), None).unwrap()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_check_tries_every_address_of_a_name() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let live = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        });
        // Nobody listens on that one.
        let dead = SocketAddr::from(([127, 0, 0, 2], live.port()));
        let pool = pool_of_name(&[dead, live]);
        let backend = &pool.backends()[0];
        let healthy = async {
            while backend.live.health.state() != HealthState::Healthy {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = pool.checks().run() => unreachable!("checks have no end"),
            () = healthy => {}
            () = tokio::time::sleep(Duration::from_secs(10)) => {
                panic!("{:?}: {:?}", backend.live.health.state(), backend.live.health.failure());
            }
        }
        assert_eq!(backend.addresses.current(), Some(live));
    }

    #[tokio::test]
    async fn a_name_that_was_not_known_is_found_without_a_check() {
        let pool = pool_at("http://localhost:1", Names::new());
        assert!(pool.select(b"client", |_| true).is_none(), "its address is not known");
        let found = tokio::time::timeout(UNKNOWN_NAME_GAP * 5, pool.checks().name_found());
        found.await.expect("localhost has an address");
        assert!(pool.select(b"client", |_| true).is_some());
        assert_eq!(pool.backends()[0].live.health.state(), HealthState::Unknown);
    }

    #[test]
    fn a_selection_gives_each_usable_backend_once() {
        let pool = pool_of_name(&[SocketAddr::from(([127, 0, 0, 1], 1))]);
        assert!(pool.select(b"client", |_| true).is_some());
        assert!(pool.select(b"client", |_| false).is_none());
        pool.backends()[0].live.health.turn(false);
        assert!(pool.select(b"client", |_| true).is_none());
    }
}
