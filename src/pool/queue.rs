//! Where exchanges wait while every backend of a pool is full: bounded, and fair between clients.
//! A client with a hundred exchanges waiting and one with a single one take turns.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use tokio::sync::oneshot;

use super::stickiness::client_number;

/// How much the newest time between two free places counts in the average of them.
const GAP_SHARE: f64 = 0.2;

/// The queue of one pool. It outlives a configuration.
#[derive(Debug, Default)]
pub struct Queue {
    /// Exchanges that wait, with those that were called and have no place yet. It changes with `line`
    /// held, as does the next.
    waiting: AtomicUsize,
    /// Those of them that avoid a backend.
    choosy: AtomicUsize,
    line: Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    /// Clients with somebody in line, in the order of their turns.
    turns: VecDeque<u64>,
    waiters: HashMap<u64, VecDeque<Standing>>,
    /// How many avoid a backend.
    avoided: HashMap<SocketAddr, usize>,
    /// When the last waiter was called, and the average time between two calls in seconds.
    called_at: Option<Instant>,
    gap_seconds: Option<f64>,
}

/// One who stands in line.
#[derive(Debug)]
struct Standing {
    call: oneshot::Sender<()>,
    /// Backends where it will not go.
    avoids: Avoided,
}

/// Identities of backends.
pub type Avoided = SmallVec<[SocketAddr; 2]>;

/// A place in line, left when dropped.
#[derive(Debug)]
pub struct Waiter {
    queue: Arc<Queue>,
    client: u64,
    avoids: Avoided,
    /// Whether nobody else waited when it came who goes to any backend.
    pub is_first: bool,
    /// Whether it may have been called for a place that it does not take.
    owes_call: bool,
}

impl Queue {
    /// Joins the line unless it is full. `client` is whom the others take turns with, `avoids` are the
    /// backends where it will not go.
    #[must_use]
    pub fn join(
        self: &Arc<Self>,
        client: &[u8],
        avoids: Avoided,
        length_max: usize,
    ) -> Option<Waiter> {
        let mut line = self.locked();
        let before = self.waiting.fetch_add(1, Ordering::SeqCst);
        let is_first = before <= self.choosy.load(Ordering::SeqCst);
        if !avoids.is_empty() {
            self.choosy.fetch_add(1, Ordering::SeqCst);
            for backend in &avoids {
                *line.avoided.entry(*backend).or_default() += 1;
            }
        }
        drop(line);
        let waiter = Waiter {
            queue: Arc::clone(self),
            client: client_number(client),
            avoids,
            is_first,
            owes_call: false,
        };
        // Dropped, it is counted out again.
        (before < length_max).then_some(waiter)
    }

    /// Whether somebody waits who goes to this backend: others do not go there before.
    #[must_use]
    pub fn goes_to(&self, backend: SocketAddr) -> bool {
        let waiting = self.length();
        if waiting == 0 {
            return false;
        }
        let choosy = self.choosy.load(Ordering::SeqCst);
        waiting > choosy || self.locked().avoided.get(&backend).is_none_or(|avoid| *avoid < choosy)
    }

    /// How many wait.
    #[must_use]
    pub fn length(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// A place is free at the backend `free`: the next in line who goes there is called.
    pub fn call(&self, free: SocketAddr) {
        if self.length() > 0 {
            let mut line = self.locked();
            line.note_call(Instant::now());
            line.call(|avoids| !avoids.contains(&free));
        }
    }

    /// How long one who comes now would wait, judged by how fast places became free; none as long as
    /// that is not known.
    #[must_use]
    pub fn expected_wait(&self) -> Option<Duration> {
        let gap = self.locked().gap_seconds?;
        #[allow(clippy::cast_precision_loss, reason = "a few thousand waiters")]
        let seconds = gap * (self.length() + 1) as f64;
        Some(Duration::from_secs_f64(seconds.min(86_400.0)))
    }

    fn locked(&self) -> MutexGuard<'_, Line> {
        // A panic while it was held leaves at worst a waiter who waits for the next call.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter {
    /// The signal that a place is free, at a backend that it does not avoid. `again`: it was called
    /// before and found none, so it stands at the head of the line.
    #[must_use]
    pub fn stand(&mut self, again: bool) -> oneshot::Receiver<()> {
        let (call, receiver) = oneshot::channel();
        let standing = Standing { call, avoids: self.avoids.clone() };
        self.queue.locked().stand(self.client, standing, again);
        self.owes_call = true;
        receiver
    }

    /// It was called, stood again with this signal, and has taken the place that it was called for.
    pub fn served(mut self, mut signal: oneshot::Receiver<()>) {
        signal.close();
        self.owes_call = signal.try_recv().is_ok();
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut line = self.queue.locked();
        if !self.avoids.is_empty() {
            for backend in &self.avoids {
                if let Entry::Occupied(mut avoid) = line.avoided.entry(*backend) {
                    *avoid.get_mut() -= 1;
                    if *avoid.get() == 0 {
                        avoid.remove();
                    }
                }
            }
            self.queue.choosy.fetch_sub(1, Ordering::SeqCst);
        }
        let is_last = self.queue.waiting.fetch_sub(1, Ordering::SeqCst) == 1;
        if is_last {
            // A quiet time is none between two calls.
            line.called_at = None;
        } else if self.owes_call {
            // It may have left before it heard the call, or found a place that nobody was called for,
            // and there may be another one: the next one looks who goes anywhere.
            let _ = line.call(Avoided::is_empty) || line.call(|_| true);
        }
    }
}

impl Line {
    fn stand(&mut self, client: u64, waiter: Standing, at_head: bool) {
        let line = self.waiters.entry(client).or_default();
        // Who left is still in line; a line is never longer than those in it who wait, twice over.
        let waits = |one: &&Standing| !one.call.is_closed();
        if line.len() > 64 && line.len() > 2 * line.iter().filter(waits).count() {
            line.retain(|one| waits(&one));
        }
        if at_head {
            line.push_front(waiter);
            // The turn that it did not use is still its client's.
            self.turns.retain(|other| *other != client);
            self.turns.push_front(client);
        } else {
            line.push_back(waiter);
            if line.len() == 1 {
                self.turns.push_back(client);
            }
        }
    }

    fn note_call(&mut self, now: Instant) {
        if let Some(before) = self.called_at.replace(now) {
            let gap = now.saturating_duration_since(before).as_secs_f64();
            let average = self.gap_seconds.unwrap_or(gap);
            self.gap_seconds = Some(average + GAP_SHARE * (gap - average));
        }
    }

    /// Calls the first in line who `goes` there, judged by what it avoids; false: there is nobody.
    fn call(&mut self, goes: impl Fn(&Avoided) -> bool) -> bool {
        let mut at = 0;
        while let Some(&client) = self.turns.get(at) {
            let Some(line) = self.waiters.get_mut(&client) else {
                self.turns.remove(at);
                continue;
            };
            // Who has left, or found a place without being called, has had its client's turn.
            let found = line.iter().position(|one| one.call.is_closed() || goes(&one.avoids));
            let Some(called) = found.and_then(|found| line.remove(found)) else {
                at += 1;
                continue;
            };
            self.turns.remove(at);
            if line.is_empty() {
                self.waiters.remove(&client);
            } else {
                self.turns.push_back(client);
            }
            if called.call.send(()).is_ok() {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn backend(number: u16) -> SocketAddr {
        SocketAddr::from(([0; 8], number))
    }

    #[test]
    fn clients_take_turns_and_each_ones_exchanges_keep_their_order() {
        let queue = Arc::new(Queue::default());
        let mut waiting = Vec::new();
        for (client, name) in [(1, "1a"), (1, "1b"), (1, "1c"), (2, "2a"), (3, "3a"), (2, "2b")] {
            let mut waiter = queue.join(&[client], Avoided::new(), 10).unwrap();
            waiting.push((name, waiter.stand(false), waiter));
        }
        let mut order = Vec::new();
        for _ in 0..6 {
            queue.call(backend(1));
            let at = waiting.iter_mut().position(|(_, signal, _)| signal.try_recv().is_ok());
            let (name, _, waiter) = waiting.remove(at.unwrap());
            drop(waiter);
            // Who is called in its stead finds nothing and stands again.
            for (_, signal, waiter) in &mut waiting {
                if signal.try_recv().is_ok() {
                    *signal = waiter.stand(true);
                }
            }
            order.push(name);
        }
        assert_eq!(order, ["1a", "2a", "3a", "1b", "2b", "1c"]);
        assert_eq!(queue.length(), 0);
    }

    #[test]
    fn it_is_bounded_and_who_left_is_not_called() {
        let queue = Arc::new(Queue::default());
        let mut one = queue.join(b"1", Avoided::new(), 2).unwrap();
        let mut two = queue.join(b"1", Avoided::new(), 2).unwrap();
        assert!(one.is_first && !two.is_first);
        assert!(queue.join(b"2", Avoided::new(), 2).is_none());
        assert_eq!(queue.length(), 2);
        let mut gone = one.stand(false);
        let mut stays = two.stand(false);
        assert!(queue.join(b"2", Avoided::new(), 2).is_none());
        assert!(gone.try_recv().is_err(), "who is sent away calls nobody");
        drop((gone, one));
        queue.call(backend(1));
        assert!(stays.try_recv().is_ok());
        // It found no place after all and keeps its turn.
        let mut other = queue.join(b"2", Avoided::new(), 2).unwrap();
        let mut later = other.stand(false);
        let mut again = two.stand(true);
        queue.call(backend(1));
        assert!(again.try_recv().is_ok() && later.try_recv().is_err());
    }

    #[test]
    fn who_avoids_a_backend_is_passed_over_when_it_is_free_and_keeps_its_place() {
        let queue = Arc::new(Queue::default());
        let avoiding = |client, backends: &[SocketAddr]| {
            queue.join(&[client], Avoided::from_slice(backends), 9).unwrap()
        };
        let mut one = avoiding(1, &[backend(1)]);
        let mut avoids = one.stand(false);
        assert!(queue.goes_to(backend(2)) && !queue.goes_to(backend(1)));
        let mut two = avoiding(2, &[]);
        assert!(two.is_first, "of those who go anywhere");
        let mut goes_anywhere = two.stand(false);
        assert!(queue.goes_to(backend(2)) && queue.goes_to(backend(1)));
        let mut three = avoiding(1, &[backend(2)]);
        assert!(!three.is_first);
        let mut behind = three.stand(false);
        queue.call(backend(1));
        assert!(avoids.try_recv().is_err() && goes_anywhere.try_recv().is_err());
        assert!(behind.try_recv().is_ok(), "it was its client's turn");
        queue.call(backend(1));
        assert!(avoids.try_recv().is_err() && goes_anywhere.try_recv().is_ok());
        queue.call(backend(1));
        assert!(avoids.try_recv().is_err(), "nobody is left who goes there");
        queue.call(backend(2));
        assert!(avoids.try_recv().is_ok());
    }

    #[test]
    fn a_call_that_is_not_heard_goes_to_the_next() {
        let queue = Arc::new(Queue::default());
        let join = |client, avoids| queue.join(&[client], avoids, 9).unwrap();
        let mut one = join(1, Avoided::new());
        let mut two = join(2, Avoided::from_slice(&[backend(1)]));
        let mut three = join(3, Avoided::new());
        let called = one.stand(false);
        let (mut second, mut third) = (two.stand(false), three.stand(false));
        queue.call(backend(1));
        drop((called, one));
        assert!(second.try_recv().is_err() && third.try_recv().is_ok());
        drop((third, three));
        assert!(second.try_recv().is_ok(), "for want of another");
        drop(two);
        assert!(queue.locked().avoided.is_empty() && queue.length() == 0);
    }

    #[test]
    fn the_expected_wait_grows_with_the_line_and_forgets_quiet_times() {
        let queue = Arc::new(Queue::default());
        assert_eq!(queue.expected_wait(), None);
        let call = |at| queue.locked().note_call(at);
        let start = Instant::now();
        call(start);
        call(start + Duration::from_secs(2));
        assert_eq!(queue.expected_wait(), Some(Duration::from_secs(2)));
        let waiter = queue.join(b"1", Avoided::new(), 9).unwrap();
        assert_eq!(queue.expected_wait(), Some(Duration::from_secs(4)));
        // The line is empty for an hour.
        drop(waiter);
        call(start + Duration::from_secs(3600));
        assert_eq!(queue.expected_wait(), Some(Duration::from_secs(2)));
    }

    /// Who was called in another's stead finds nothing and stands again.
    fn stand_again(waiting: &mut [(oneshot::Receiver<()>, Waiter)]) {
        for (signal, waiter) in waiting {
            if signal.try_recv().is_ok() {
                *signal = waiter.stand(true);
            }
        }
    }

    proptest! {
        /// As many are called as places became free, as long as somebody waits; nobody is forgotten.
        #[test]
        fn nobody_is_forgotten(events in prop::collection::vec((0u8..3, 0u8..4), 1..200)) {
            let queue = Arc::new(Queue::default());
            let mut waiting = Vec::new();
            let mut called = 0;
            for (event, client) in events {
                match event {
                    0 => {
                        let mut waiter = queue.join(&[client], Avoided::new(), 1000).unwrap();
                        waiting.push((waiter.stand(false), waiter));
                    }
                    1 => {
                        queue.call(backend(1));
                        let at = waiting.iter_mut().position(|(signal, _)| signal.try_recv().is_ok());
                        prop_assert_eq!(at.is_some(), !waiting.is_empty());
                        if let Some(at) = at {
                            drop(waiting.remove(at));
                            called += 1;
                            stand_again(&mut waiting);
                        }
                    }
                    _ => {
                        if let Some((signal, waiter)) = waiting.pop() {
                            drop(signal);
                            drop(waiter);
                            stand_again(&mut waiting);
                        }
                    }
                }
                prop_assert_eq!(queue.length(), waiting.len());
            }
            prop_assert!(called <= 200);
            let lines: usize = queue.locked().waiters.values().map(VecDeque::len).sum();
            prop_assert!(lines <= 200);
        }
    }
}
