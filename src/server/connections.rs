//! Open connections, counted in all and by address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config::ClientBounds;

/// Refused connections are logged once in this time: a flood must not fill the log.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The connections of all clients.
#[derive(Debug, Default)]
pub(super) struct Connections {
    all: AtomicUsize,
    by_address: Mutex<HashMap<IpAddr, usize>>,
    refused: Mutex<Refused>,
}

#[derive(Debug, Default)]
struct Refused {
    count: usize,
    logged_at: Option<Instant>,
}

/// One open connection, counted out when dropped.
#[derive(Debug)]
pub(super) struct Open {
    of: Arc<Connections>,
    /// The address that it is counted under.
    address: Option<IpAddr>,
}

impl Connections {
    /// Counts a connection in, unless there are too many.
    pub(super) fn enter(
        self: &Arc<Self>,
        address: Option<IpAddr>,
        bounds: &ClientBounds,
    ) -> Option<Open> {
        let before = self.all.fetch_add(1, Ordering::Relaxed);
        let mut open = Open { of: Arc::clone(self), address: None };
        if bounds.connections_max > 0 && before >= bounds.connections_max {
            self.log_refused("client.connections_max", bounds.connections_max);
            return None;
        }
        if let Some(address) = address
            && bounds.connections_per_address_max > 0
        {
            let address = address.to_canonical();
            let mut counts = locked(&self.by_address);
            let count = counts.entry(address).or_default();
            if *count >= bounds.connections_per_address_max {
                drop(counts);
                let name = "client.connections_per_address_max";
                self.log_refused(name, bounds.connections_per_address_max);
                return None;
            }
            *count += 1;
            open.address = Some(address);
        }
        Some(open)
    }

    fn log_refused(&self, bound: &str, max: usize) {
        let mut refused = locked(&self.refused);
        refused.count += 1;
        if refused.logged_at.is_none_or(|at| at.elapsed() >= LOG_EVERY) {
            log::warn!("connections refused: {}; {bound} is {max}", refused.count);
            *refused = Refused { count: 0, logged_at: Some(Instant::now()) };
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.of.all.fetch_sub(1, Ordering::Relaxed);
        if let Some(address) = self.address {
            let mut counts = locked(&self.of.by_address);
            if let Some(count) = counts.get_mut(&address) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(&address);
                }
            }
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Counts are changed in one step each: a panic cannot leave them wrong.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
