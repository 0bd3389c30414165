//! Starting, ready, draining; and what there is in flight: exchanges, and bytes that are held.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

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

/// The process's phase, and what keeps it from ending.
#[derive(Debug)]
pub struct Lifecycle {
    phase: AtomicU8,
    successor: OnceLock<u32>,
    closing: watch::Sender<bool>,
    parted: watch::Sender<bool>,
    cut: watch::Sender<bool>,
    exchanges: Arc<Gauge>,
    /// What is held of request bodies.
    pub held: Arc<HeldBytes>,
    /// Connections that were refused because there were too many.
    pub refused: AtomicU64,
    /// What accepts connections.
    pub listeners: Arc<Gauge>,
    /// What has to be done before the process ends, in so much time.
    last: Mutex<Vec<LastAct>>,
    /// Open connections of clients. With HTTP/2, the end of an answer may still be in one's buffers
    /// when its exchange is over.
    pub connections: Arc<Gauge>,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            phase: AtomicU8::new(STARTING),
            successor: OnceLock::new(),
            closing: watch::Sender::new(false),
            parted: watch::Sender::new(false),
            cut: watch::Sender::new(false),
            exchanges: Arc::default(),
            held: Arc::default(),
            refused: AtomicU64::new(0),
            last: Mutex::default(),
            listeners: Arc::default(),
            connections: Arc::default(),
        }
    }
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
        self.closing.send_replace(true);
    }

    /// The process `successor` takes over: what comes on open connections is served, and then they
    /// close.
    pub fn leave(&self, successor: u32) {
        // There is one at most.
        let _ = self.successor.set(successor);
        self.closing.send_replace(true);
    }

    /// Tells connections that they are to close after what they have begun: the drain has begun, or
    /// another process has taken over.
    #[must_use]
    pub fn closing_signal(&self) -> watch::Receiver<bool> {
        self.closing.subscribe()
    }

    /// Whether another process has taken over.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.successor().is_some()
    }

    /// The process that has taken over.
    #[must_use]
    pub fn successor(&self) -> Option<u32> {
        self.successor.get().copied()
    }

    /// From now on nobody waits for a request on an open connection.
    pub fn part(&self) {
        self.parted.send_replace(true);
    }

    /// Returns once nobody waits for requests on open connections.
    pub async fn parted(&self) {
        // The sender lives as long as this does.
        let _ = self.parted.subscribe().wait_for(|parted| *parted).await;
    }

    /// Whether a connection is kept for another request.
    #[must_use]
    pub fn keeps_connections(&self) -> bool {
        self.phase() != Phase::Draining && !self.is_leaving()
    }

    /// The drain is over: what is still in flight is told, and cut.
    pub fn cut(&self) {
        self.cut.send_replace(true);
    }

    /// Tells when the drain is over.
    #[must_use]
    pub fn cut_signal(&self) -> watch::Receiver<bool> {
        self.cut.subscribe()
    }

    /// Counts one exchange in, unless the process is draining.
    #[must_use]
    pub fn admit(&self) -> Option<Counted> {
        // Counted first and looked at second: a drain that begins in between sees the count.
        let admitted = self.exchanges.enter();
        (self.phase() != Phase::Draining).then_some(admitted)
    }

    /// Exchanges in flight.
    #[must_use]
    pub fn inflight(&self) -> usize {
        self.exchanges.count()
    }

    /// From now on, this is done before the process ends; it is told how long it may take.
    pub fn do_at_last(&self, act: impl FnOnce(Duration) + Send + 'static) {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).push(LastAct(Box::new(act)));
    }

    /// Does what has to be done before the process ends, in so much time.
    pub fn end(&self, longest: Duration) {
        let until = Instant::now() + longest;
        let acts = std::mem::take(&mut *self.last.lock().unwrap_or_else(PoisonError::into_inner));
        for LastAct(act) in acts {
            act(until.saturating_duration_since(Instant::now()));
        }
    }

    /// Returns once nothing is in flight.
    pub async fn wait_idle(&self) {
        self.exchanges.wait_empty().await;
    }
}

/// What has to be done before the process ends.
struct LastAct(Box<dyn FnOnce(Duration) + Send>);

impl fmt::Debug for LastAct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[last act]")
    }
}

/// A count of things that are going on.
#[derive(Debug, Default)]
pub struct Gauge {
    count: AtomicUsize,
    empty: Notify,
}

impl Gauge {
    /// Counts one in.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> Counted {
        self.count.fetch_add(1, Ordering::SeqCst);
        Counted(Arc::clone(self))
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Returns once there are none.
    pub async fn wait_empty(&self) {
        loop {
            let notified = self.empty.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            notified.await;
        }
    }
}

/// One of a count, counted out when dropped.
#[derive(Debug)]
pub struct Counted(Arc<Gauge>);

impl Drop for Counted {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.empty.notify_waiters();
        }
    }
}

/// Bytes that are held for exchanges, of all of them: of request bodies, or of answers.
#[derive(Debug, Default)]
pub struct HeldBytes(AtomicUsize);

impl HeldBytes {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Bytes held for one exchange, given back when dropped.
#[derive(Debug)]
pub struct HeldShare {
    of: Arc<HeldBytes>,
    bytes: usize,
}

impl HeldShare {
    /// None of them yet.
    #[must_use]
    pub fn none(of: &Arc<HeldBytes>) -> Self {
        Self { of: Arc::clone(of), bytes: 0 }
    }

    /// For another copy of the body: none of them yet.
    #[must_use]
    pub fn another(&self) -> Self {
        Self::none(&self.of)
    }

    /// How many there are.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes more, if the sum of all stays within `total_max`.
    pub fn grow(&mut self, bytes: usize, total_max: usize) -> bool {
        let grown = |held: usize| held.checked_add(bytes).filter(|held| *held <= total_max);
        let taken = self.of.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grown).is_ok();
        self.bytes += if taken { bytes } else { 0 };
        taken
    }

    /// Gives back all but `bytes`.
    pub fn shrink(&mut self, bytes: usize) {
        let more = self.bytes.saturating_sub(bytes);
        if more == 0 {
            return;
        }
        self.of.0.fetch_sub(more, Ordering::Relaxed);
        self.bytes -= more;
    }
}

impl Drop for HeldShare {
    fn drop(&mut self) {
        self.of.0.fetch_sub(self.bytes, Ordering::Relaxed);
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

    #[test]
    fn what_is_held_of_all_bodies_has_a_bound_and_is_given_back() {
        let held = Arc::new(HeldBytes::default());
        let mut one = HeldShare::none(&held);
        let mut two = HeldShare::none(&held);
        assert!(one.grow(60, 100) && !two.grow(41, 100) && two.grow(40, 100));
        assert_eq!(held.count(), 100);
        drop(one);
        assert_eq!(held.count(), 40);
        drop(two);
        assert_eq!(held.count(), 0);
    }
}
