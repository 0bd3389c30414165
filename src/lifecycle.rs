//! Starting, ready, draining; and how many exchanges are in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Where the process is in its life. It only ever moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not serving yet.
    Starting,
    /// Serving.
    Ready,
    /// Finishing what is in flight; new exchanges are refused.
    Draining,
}

/// The process's phase and its exchanges in flight.
#[derive(Debug, Default)]
pub struct Lifecycle {
    phase: AtomicU8,
    inflight: AtomicUsize,
    idle: Notify,
}

const STARTING: u8 = 0;
const READY: u8 = 1;
const DRAINING: u8 = 2;

impl Lifecycle {
    /// The phase now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::SeqCst) {
            STARTING => Phase::Starting,
            READY => Phase::Ready,
            _ => Phase::Draining,
        }
    }

    /// Starting is over.
    pub fn ready(&self) {
        self.phase.fetch_max(READY, Ordering::SeqCst);
    }

    /// From now on no exchange is admitted.
    pub fn drain(&self) {
        self.phase.fetch_max(DRAINING, Ordering::SeqCst);
    }

    /// Counts one exchange in, unless the process is draining.
    #[must_use]
    pub fn admit(self: &Arc<Self>) -> Option<InFlight> {
        // Counted first and looked at second: a drain that begins in between sees the count.
        self.inflight.fetch_add(1, Ordering::SeqCst);
        let admitted = InFlight(Arc::clone(self));
        (self.phase() != Phase::Draining).then_some(admitted)
    }

    /// Exchanges in flight.
    #[must_use]
    pub fn inflight(&self) -> usize {
        self.inflight.load(Ordering::SeqCst)
    }

    /// Returns once nothing is in flight.
    pub async fn wait_idle(&self) {
        loop {
            let notified = self.idle.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.inflight() == 0 {
                return;
            }
            notified.await;
        }
    }
}

/// One exchange in flight, counted out when dropped.
#[derive(Debug)]
pub struct InFlight(Arc<Lifecycle>);

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.0.inflight.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_phase_never_goes_back() {
        let lifecycle = Lifecycle::default();
        assert_eq!(lifecycle.phase(), Phase::Starting);
        lifecycle.drain();
        lifecycle.ready();
        assert_eq!(lifecycle.phase(), Phase::Draining);
    }

    #[tokio::test]
    async fn a_drain_waits_for_what_is_in_flight_and_admits_nothing_more() {
        let lifecycle = Arc::new(Lifecycle::default());
        lifecycle.ready();
        let exchange = lifecycle.admit().expect("ready");
        lifecycle.drain();
        assert!(lifecycle.admit().is_none());
        assert_eq!(lifecycle.inflight(), 1);
        let waiting = tokio::spawn({
            let lifecycle = Arc::clone(&lifecycle);
            async move { lifecycle.wait_idle().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(exchange);
        waiting.await.unwrap();
    }
}
