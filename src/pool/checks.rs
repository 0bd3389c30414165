//! The checks of a pool's backends over time: when a round begins.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use pingora_load_balancing::{Backend as LbBackend, HealthRegistry};
use tokio::sync::Notify;

use super::health::{CheckedPool, PoolCheck, Prober};
use super::identity_of;
use super::resolve::Addresses;

/// Shortest time between two rounds of checks, however many exchanges ask for one.
const SUSPICION_GAP: Duration = Duration::from_secs(1);

/// Time between two look-ups of a name that is not known, besides those of the checks.
pub(super) const UNKNOWN_NAME_GAP: Duration = Duration::from_secs(2);

/// The part of a pool that outlives a configuration: Pingora's health registry and what it checks.
pub struct Checks {
    pub(super) registry: Arc<HealthRegistry>,
    /// What is checked now: replaced by each configuration.
    pub(super) pool: Arc<ArcSwap<CheckedPool>>,
    spread: Arc<AtomicBool>,
    /// Raised for a round of checks that is not to wait for the interval.
    pub(super) suspected: Notify,
}

impl Checks {
    pub(super) fn new(checked: CheckedPool, prober: Arc<Prober>) -> Self {
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
    pub(super) async fn name_found(&self) {
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
    /// or soon when an exchange raised a suspicion or found nobody to ask, or when the name of a backend has been found.
    pub async fn run(&self) {
        loop {
            let started = tokio::time::Instant::now();
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
