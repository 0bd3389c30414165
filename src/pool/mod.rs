//! A pool: the backends of one service/model behind one Pingora `LoadBalancer`, with our selection,
//! our health checks and our notion of a backend. A pool does not know HTTP exchanges.

mod backend;
mod balance;
mod breaker;
mod budget;
mod checks;
mod health;
mod moment;
mod queue;
mod resolve;
mod stickiness;
mod tunnel;
mod window;

use std::cell::Cell;
use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use pingora_load_balancing::discovery::Static;
use pingora_load_balancing::{Backend as LbBackend, Backends, HealthRegistry, LoadBalancer};

pub use backend::{Backend, CONNECT_DEADLINE, Live, Permit};
pub use breaker::{BreakerState, Outcome};
pub use checks::Checks;
pub use health::{Health, HealthState, Prober};
pub use queue::{Avoided, Queue, Waiter};
pub use resolve::{Address, Addresses};
pub use tunnel::Gate;

use backend::Terms;
use balance::{BalanceConfig, Balancer};
use breaker::Change;
use budget::RetryBudget;
use health::CheckedPool;
use stickiness::Clients;

use crate::config::{BackendSpec, Host, PoolSpec};
use crate::telemetry::{Recent, Series};

/// Hosts that are looked up, by host and port: backends on one host share the answer.
pub type Hosts = HashMap<(Host, u16), Arc<Addresses>>;

/// The backends of one service/model.
pub struct Pool {
    name: String,
    spec: PoolSpec,
    backends: Vec<Arc<Backend>>,
    by_identity: HashMap<SocketAddr, Arc<Backend>>,
    balancer: LoadBalancer<Balancer>,
    checks: Arc<Checks>,
    clients: Arc<Clients>,
    queue: Arc<Queue>,
    budget: Arc<RetryBudget>,
    /// Held while it is decided whether one more backend is left alone.
    ejecting: Arc<Mutex<()>>,
    /// Where its exchanges are counted, once there was one.
    pub series: OnceLock<Arc<Series>>,
    /// Its exchanges that failed.
    pub errors: Arc<Recent>,
    /// Attempts after the first one of an exchange.
    pub retries: Arc<Recent>,
}

/// What a selection comes to.
#[derive(Debug)]
pub enum Choice {
    /// A place at a backend.
    Taken(Permit),
    /// Every backend that could be asked is full.
    Full,
    /// No backend can be asked.
    None,
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
        names: &mut Hosts,
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
        let queue = previous.map(|previous| Arc::clone(&previous.queue)).unwrap_or_default();
        let budget = previous.map(|previous| Arc::clone(&previous.budget)).unwrap_or_default();
        let ejecting = previous.map(|previous| Arc::clone(&previous.ejecting)).unwrap_or_default();
        Ok(Self {
            name,
            spec,
            backends,
            by_identity,
            balancer,
            checks,
            clients,
            queue,
            budget,
            ejecting,
            series: previous.map(|previous| previous.series.clone()).unwrap_or_default(),
            errors: previous.map(|previous| Arc::clone(&previous.errors)).unwrap_or_default(),
            retries: previous.map(|previous| Arc::clone(&previous.retries)).unwrap_or_default(),
        })
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

    /// A place for a client (by `key`, the bytes of its address) at the backend that suits it best
    /// among those that `accept` takes. Who was called from the queue is `called`; others do not go
    /// before those who wait.
    pub fn choose(&self, key: &[u8], called: bool, accept: impl Fn(&Backend) -> bool) -> Choice {
        let now = Instant::now();
        loop {
            let is_full = Cell::new(false);
            let has_room = |backend: &Backend| {
                let has_room =
                    backend.has_room() && (called || !self.queue.goes_to(backend.identity));
                is_full.set(is_full.get() || !has_room && backend.spec.inflight_max > 0);
                has_room || backend.spec.inflight_max == 0
            };
            let chosen = self.select(key, |backend| {
                accept(backend) && backend.live.breaker.may_enter(now) && has_room(backend)
            });
            let chosen = chosen.map(|backend| (backend, Terms::Regular)).or_else(|| {
                let fail_open = self.spec.breaker.fail_open && !is_full.get();
                let broken = || self.least_broken(|backend| accept(backend) && has_room(backend));
                fail_open.then(broken)?.map(|backend| (backend, Terms::LastResort))
            });
            match chosen {
                Some((backend, terms)) => {
                    // Without a place, another exchange was faster: the next one then.
                    if let Some(permit) = backend.enter(&self.queue, now, terms) {
                        return Choice::Taken(permit);
                    }
                }
                None if is_full.get() => return Choice::Full,
                None => return Choice::None,
            }
        }
    }

    /// Whether one of the backends that `accept` takes could be asked, with or without a wait.
    pub fn has_other(&self, accept: impl Fn(&Backend) -> bool) -> bool {
        let now = Instant::now();
        self.select(&[], |backend| accept(backend) && backend.live.breaker.may_enter(now)).is_some()
    }

    /// Of the ejected backends, the one whose time is over first.
    fn least_broken(&self, accept: impl Fn(&Backend) -> bool) -> Option<&Arc<Backend>> {
        self.backends
            .iter()
            .filter(|backend| backend.spec.weight > 0.0 && backend.is_usable() && accept(backend))
            .min_by_key(|backend| backend.live.breaker.open_until())
    }

    fn select(&self, key: &[u8], accept: impl Fn(&Backend) -> bool) -> Option<&Arc<Backend>> {
        let chosen = self.balancer.select_with(key, self.backends.len(), |entry, healthy| {
            healthy && self.of(entry).is_some_and(|backend| accept(backend))
        })?;
        self.of(&chosen)
    }

    /// Where exchanges wait.
    #[must_use]
    pub fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// An exchange begins.
    pub fn count_exchange(&self) {
        self.budget.count_exchange();
    }

    /// Takes a further attempt out of the budget; false: too many were made lately.
    #[must_use]
    pub fn may_retry(&self) -> bool {
        self.budget.take(Instant::now(), &self.spec.retry)
    }

    /// An exchange tells how its backend did. Only the first word of a probe counts, so that a long
    /// answer does not keep a backend out that has begun it well.
    pub fn tell(&self, permit: &mut Permit, outcome: Outcome) {
        if permit.is_probe() && permit.is_told {
            permit.entry = breaker::Entry::Normal;
        }
        permit.is_told = true;
        let now = Instant::now();
        let Permit { backend, entry, entered, .. } = &*permit;
        // One at a time: two that open in the same moment could both be the last that may.
        let _one_at_a_time = (outcome == Outcome::Failure)
            .then(|| self.ejecting.lock().unwrap_or_else(PoisonError::into_inner));
        let may_open = || self.ejected(now) < self.ejected_max();
        let change =
            backend.live.breaker.tell(*entry, *entered, outcome, now, &self.spec.breaker, may_open);
        let BackendSpec { id, url, .. } = &backend.spec;
        match change {
            Change::None => {}
            Change::Opened { until } => log::warn!(
                "backend {id} of {} ({}) fails too often: left alone for {:.1} s",
                self.name,
                url.shown,
                until.saturating_duration_since(now).as_secs_f64(),
            ),
            Change::Closed => {
                log::info!("backend {id} of {} ({}) answers again", self.name, url.shown);
            }
        }
    }

    /// A backend answered 429: for `pause` it is asked after all others.
    pub fn cool_down(&self, backend: &Backend, pause: Duration) {
        backend.cool_down(Instant::now() + pause);
    }

    /// A backend took the credential that it was sent, or refused it with a status.
    pub fn note_credential(&self, backend: &Backend, refused_with: Option<u16>) {
        if !backend.note_credential(refused_with) {
            return;
        }
        let BackendSpec { id, url, .. } = &backend.spec;
        match refused_with {
            Some(status) => log::error!(
                "backend {id} of {} ({}) answers {status}: check its api_key and auth_mode",
                self.name,
                url.shown,
            ),
            None => {
                log::info!("backend {id} of {} ({}) takes its key again", self.name, url.shown);
            }
        }
    }

    /// When a backend may take exchanges again, if none does now. One that is unhealthy is expected
    /// to need some time, though it is checked sooner.
    #[must_use]
    pub fn back_within(&self) -> Duration {
        let now = Instant::now();
        let soonest = |backend: &Arc<Backend>| {
            let open = backend.live.breaker.open_until();
            let open = open.map(|until| until.saturating_duration_since(now));
            open.filter(|_| backend.is_usable()).unwrap_or(self.spec.health.interval)
        };
        self.backends.iter().map(soonest).min().unwrap_or(self.spec.health.interval)
    }

    /// Backends that are left alone now.
    fn ejected(&self, now: Instant) -> usize {
        self.backends.iter().filter(|backend| backend.breaker(now) != BreakerState::Closed).count()
    }

    fn ejected_max(&self) -> usize {
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a few thousand backends"
        )]
        let share = (self.spec.breaker.ejected_max * self.backends.len() as f64) as usize;
        share.max(1)
    }

    fn of(&self, entry: &LbBackend) -> Option<&Arc<Backend>> {
        self.by_identity.get(&identity_of(entry)?)
    }

    /// An exchange could not reach the backend: it is checked soon, and till then asked last.
    pub fn suspect(&self, backend: &Backend) {
        backend.suspect();
        self.checks.suspected.notify_one();
    }

    /// An exchange found nobody to ask: those that are unhealthy may be well again.
    pub fn check_soon(&self) {
        self.checks.suspected.notify_one();
    }

    /// The pool's health checks, shared with its next version.
    #[must_use]
    pub fn checks(&self) -> &Arc<Checks> {
        &self.checks
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
        slow_start: spec.breaker.slow_start,
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
    let names = Hosts::from([(host, Arc::new(Addresses::of_name("two", known)))]);
    pool_at(&format!("http://two:{port}"), names)
}

#[cfg(test)]
fn pool_at(url: &str, names: Hosts) -> Pool {
    pool_of("", &[url], names)
}

/// A pool over these URLs, with more top-level lines in its configuration.
#[cfg(test)]
fn pool_of(top: &str, urls: &[&str], mut names: Hosts) -> Pool {
    let backend = |(number, url)| format!("{{id: b{number}, url: \"{url}\"}},");
    let backends: String = urls.iter().enumerate().map(backend).collect();
    let text = format!("{top}\nservices: {{s: {{models: {{m: {{backends: [{backends}]}}}}}}}}");
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

    use super::checks::UNKNOWN_NAME_GAP;
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
        assert_eq!(backend.addresses.current(), Some(Address::Tcp(live)));
    }

    #[tokio::test]
    async fn a_name_that_was_not_known_is_found_without_a_check() {
        let pool = pool_at("http://localhost:1", Hosts::new());
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

    /// Runs all at the same moment.
    fn at_once<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let ready = std::sync::Barrier::new(count);
        std::thread::scope(|scope| {
            let run = |number| {
                let (ready, work) = (&ready, &work);
                scope.spawn(move || {
                    ready.wait();
                    work(number)
                })
            };
            let threads: Vec<_> = (0..count).map(run).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn of_many_that_come_at_once_one_probes() {
        let breaker = "breaker: {consecutive_failures: 1, open: 1ms, open_max: 1ms}";
        let pool = pool_of(breaker, &["http://127.0.0.1:1", "http://127.0.0.1:2"], Hosts::new());
        let broken = pool.backends()[0].identity;
        let Choice::Taken(mut permit) = pool.choose(b"", false, |one| one.identity == broken)
        else {
            panic!("it has a place");
        };
        pool.tell(&mut permit, Outcome::Failure);
        for _ in 0..500 {
            while pool.backends()[0].breaker(Instant::now()) != BreakerState::HalfOpen {
                std::thread::yield_now();
            }
            let choices = at_once(4, |number| pool.choose(&[number as u8], false, |_| true));
            let mut probes: Vec<Permit> = choices
                .into_iter()
                .filter_map(|choice| match choice {
                    Choice::Taken(permit) => Some(permit),
                    Choice::Full | Choice::None => None,
                })
                .filter(|permit| permit.backend.identity == broken)
                .collect();
            assert!(probes.len() <= 1, "{} at once", probes.len());
            for probe in &mut probes {
                assert!(probe.is_probe());
                pool.tell(probe, Outcome::Failure);
            }
        }
    }

    #[test]
    fn of_many_that_fail_at_once_no_more_are_left_alone_than_may_be() {
        let breaker = "breaker: {consecutive_failures: 1, ejected_max: 0.25}";
        let urls = [1, 2, 3, 4].map(|port| format!("http://127.0.0.1:{port}"));
        let pool = pool_of(breaker, &urls.each_ref().map(String::as_str), Hosts::new());
        let tell = |number: usize, outcome| {
            let own = pool.backends()[number].identity;
            let choice = pool.choose(b"", false, |backend| backend.identity == own);
            if let Choice::Taken(mut permit) = choice {
                pool.tell(&mut permit, outcome);
            }
        };
        for _ in 0..300 {
            at_once(4, |number| tell(number, Outcome::Failure));
            assert_eq!(pool.ejected(Instant::now()), 1);
            // Asked for want of another, it does its work again.
            (0..4).for_each(|number| tell(number, Outcome::Success));
            assert_eq!(pool.ejected(Instant::now()), 0);
        }
    }
}
