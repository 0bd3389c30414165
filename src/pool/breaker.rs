//! The circuit breaker of one backend. The machine is told what happened and when; it has no clock.
//!
//! `closed` -> `open` after failures in a row, or too large a share of them; `open` -> `half_open`
//! when its time is over and one exchange probes; `half_open` -> `closed` when that succeeds, else
//! `open` again, for twice as long.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::moment::Moment;
use super::window::Window;
use crate::config::BreakerSpec;

/// A breaker's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// The backend takes exchanges.
    Closed,
    /// It is left alone.
    Open,
    /// Its time is over: one exchange probes it.
    HalfOpen,
}

impl BreakerState {
    /// The word for it in status, metrics and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// What an exchange says about a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did its work.
    Success,
    /// It did not.
    Failure,
}

/// How an exchange may enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// As any other.
    Normal,
    /// As the one that finds out whether the backend is well again.
    Probe,
}

/// What changed with an outcome.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Change {
    None,
    Opened { until: Instant },
    Closed,
}

/// The machine behind a lock, and what everybody asks of it without one.
#[derive(Debug)]
pub(super) struct Breaker {
    machine: Mutex<Machine>,
    is_closed: AtomicBool,
    /// When the slow start is over.
    ramp_until: Moment,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            machine: Mutex::new(Machine::new(Instant::now())),
            is_closed: AtomicBool::new(true),
            ramp_until: Moment::default(),
        }
    }
}

impl Breaker {
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Relaxed)
    }

    pub(super) fn state(&self, now: Instant) -> BreakerState {
        if self.is_closed() { BreakerState::Closed } else { self.locked().state(now) }
    }

    /// Whether an exchange may enter.
    pub(super) fn may_enter(&self, now: Instant) -> bool {
        self.is_closed() || self.locked().may_enter(now)
    }

    /// When it is half open; none while it is closed.
    pub(super) fn open_until(&self) -> Option<Instant> {
        if self.is_closed() { None } else { self.locked().open_until() }
    }

    /// See [`Machine::enter`].
    pub(super) fn enter(&self, now: Instant) -> Option<Entry> {
        if self.is_closed() { Some(Entry::Normal) } else { self.locked().enter(now) }
    }

    /// See [`Machine::tell`].
    pub(super) fn tell(
        &self,
        entry: Entry,
        entered: Instant,
        outcome: Outcome,
        now: Instant,
        spec: &BreakerSpec,
        may_open: impl FnOnce() -> bool,
    ) -> Change {
        let mut machine = self.locked();
        let change = machine.tell(entry, entered, outcome, now, spec, may_open);
        if change != Change::None {
            self.is_closed.store(change == Change::Closed, Ordering::Relaxed);
        }
        if change == Change::Closed {
            self.ramp_until.extend(now + spec.slow_start);
        }
        change
    }

    /// A probe ended without an outcome: the next exchange may probe.
    pub(super) fn abandon(&self) {
        self.locked().abandon();
    }

    /// The share of its weight that a backend has back after a recovery, above 0 and at most 1.
    pub(super) fn ramp(&self, now: Instant, slow_start: Duration) -> f64 {
        let Some(left) = self.ramp_until.left(now) else { return 1.0 };
        if slow_start.is_zero() {
            return 1.0;
        }
        // It begins with a tenth, as Envoy's does: with nothing there would be nothing to learn.
        (1.0 - left.as_secs_f64() / slow_start.as_secs_f64()).clamp(0.1, 1.0)
    }

    fn locked(&self) -> MutexGuard<'_, Machine> {
        // A panic while it was held cannot leave a state that is not one.
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state machine.
#[derive(Debug)]
struct Machine {
    state: State,
    /// Failures in a row.
    consecutive: u32,
    window: Window,
    /// How often in a row it opened.
    openings: u32,
    closed_at: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Closed,
    Open { since: Instant, until: Instant },
    HalfOpen { since: Instant, is_probed: bool },
}

impl Machine {
    fn new(now: Instant) -> Self {
        Self {
            state: State::Closed,
            consecutive: 0,
            window: Window::new(now),
            openings: 0,
            closed_at: now,
        }
    }

    fn state(&self, now: Instant) -> BreakerState {
        match self.state {
            State::Closed => BreakerState::Closed,
            State::Open { until, .. } if now < until => BreakerState::Open,
            State::Open { .. } | State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    fn open_until(&self) -> Option<Instant> {
        match self.state {
            State::Closed => None,
            State::Open { until, .. } => Some(until),
            State::HalfOpen { since, .. } => Some(since),
        }
    }

    fn may_enter(&self, now: Instant) -> bool {
        match self.state {
            State::Closed => true,
            State::Open { until, .. } => now >= until,
            State::HalfOpen { is_probed, .. } => !is_probed,
        }
    }

    /// An exchange goes to the backend, if it may. Only one at a time is a probe.
    fn enter(&mut self, now: Instant) -> Option<Entry> {
        match self.state {
            State::Closed => Some(Entry::Normal),
            State::Open { since, until } if now >= until => {
                self.state = State::HalfOpen { since, is_probed: true };
                Some(Entry::Probe)
            }
            State::HalfOpen { since, is_probed: false } => {
                self.state = State::HalfOpen { since, is_probed: true };
                Some(Entry::Probe)
            }
            State::Open { .. } | State::HalfOpen { .. } => None,
        }
    }

    /// A probe's place is free again.
    fn abandon(&mut self) {
        if let State::HalfOpen { since, .. } = self.state {
            self.state = State::HalfOpen { since, is_probed: false };
        }
    }

    /// An exchange says how the backend is. `may_open` is asked before the backend is left alone.
    fn tell(
        &mut self,
        entry: Entry,
        entered: Instant,
        outcome: Outcome,
        now: Instant,
        spec: &BreakerSpec,
        may_open: impl FnOnce() -> bool,
    ) -> Change {
        match (self.state, entry, outcome) {
            (State::HalfOpen { .. }, Entry::Probe, Outcome::Failure) => self.open(now, spec),
            (State::HalfOpen { .. }, Entry::Probe, Outcome::Success) => self.close(now),
            // Sent for want of another backend, and it worked.
            (
                State::Open { since, .. } | State::HalfOpen { since, .. },
                Entry::Normal,
                Outcome::Success,
            ) if entered >= since => self.close(now),
            (State::Closed, _, Outcome::Success) => {
                self.success(now, spec);
                Change::None
            }
            (State::Closed, _, Outcome::Failure) => self.failure(now, spec, may_open),
            _ => Change::None,
        }
    }

    fn success(&mut self, now: Instant, spec: &BreakerSpec) {
        self.consecutive = 0;
        self.window.add(now, spec.window, Outcome::Success);
        if now.saturating_duration_since(self.closed_at) >= spec.open_max {
            self.openings = 0;
        }
    }

    fn failure(
        &mut self,
        now: Instant,
        spec: &BreakerSpec,
        may_open: impl FnOnce() -> bool,
    ) -> Change {
        self.consecutive = self.consecutive.saturating_add(1);
        self.window.add(now, spec.window, Outcome::Failure);
        let (total, failed) = self.window.counts();
        let rate = f64::from(failed) / f64::from(total.max(1));
        let is_too_much = self.consecutive >= spec.consecutive_failures
            || total >= spec.failure_rate_exchanges && rate >= spec.failure_rate;
        if spec.enabled && is_too_much && may_open() { self.open(now, spec) } else { Change::None }
    }

    fn open(&mut self, now: Instant, spec: &BreakerSpec) -> Change {
        let doubled = spec.open.saturating_mul(1 << self.openings.min(16));
        let until = now + doubled.min(spec.open_max);
        self.openings = self.openings.saturating_add(1);
        self.state = State::Open { since: now, until };
        Change::Opened { until }
    }

    fn close(&mut self, now: Instant) -> Change {
        self.state = State::Closed;
        self.consecutive = 0;
        self.window = Window::new(now);
        self.closed_at = now;
        Change::Closed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec() -> BreakerSpec {
        BreakerSpec {
            enabled: true,
            consecutive_failures: 3,
            failure_rate: 0.5,
            failure_rate_exchanges: 10,
            window: Duration::from_secs(30),
            open: Duration::from_secs(10),
            open_max: Duration::from_secs(35),
            slow_start: Duration::from_secs(30),
            ejected_max: 0.5,
            fail_open: true,
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    struct Trial {
        machine: Machine,
        now: Instant,
    }

    impl Trial {
        fn new() -> Self {
            let now = Instant::now();
            Self { machine: Machine::new(now), now }
        }

        fn exchange(&mut self, outcome: Option<Outcome>) -> Change {
            let entry = self.machine.enter(self.now).unwrap_or(Entry::Normal);
            match outcome {
                Some(outcome) => {
                    self.machine.tell(entry, self.now, outcome, self.now, &spec(), || true)
                }
                None => {
                    if entry == Entry::Probe {
                        self.machine.abandon();
                    }
                    Change::None
                }
            }
        }

        fn pass(&mut self, time: Duration) -> BreakerState {
            self.now += time;
            self.machine.state(self.now)
        }
    }

    #[test]
    fn failures_in_a_row_open_it_and_a_success_between_does_not_let_them_add_up() {
        let mut trial = Trial::new();
        for _ in 0..2 {
            trial.exchange(Some(Outcome::Failure));
            trial.exchange(Some(Outcome::Success));
        }
        assert_eq!(trial.machine.state, State::Closed);
        for _ in 0..2 {
            assert_eq!(trial.exchange(Some(Outcome::Failure)), Change::None);
        }
        assert!(matches!(trial.exchange(Some(Outcome::Failure)), Change::Opened { .. }));
        assert!(!trial.machine.may_enter(trial.now));
    }

    #[test]
    fn half_of_the_last_exchanges_failing_opens_it_and_old_ones_are_forgotten() {
        let mut trial = Trial::new();
        let fail_every_second = |trial: &mut Trial, count| {
            for number in 0..count {
                let outcome = if number % 2 == 0 { Outcome::Success } else { Outcome::Failure };
                trial.exchange(Some(outcome));
            }
        };
        fail_every_second(&mut trial, 9);
        trial.pass(40 * SECOND);
        fail_every_second(&mut trial, 9);
        assert_eq!(trial.machine.state, State::Closed, "18 in all, but 9 in the window");
        trial.exchange(Some(Outcome::Failure));
        assert!(matches!(trial.machine.state, State::Open { .. }));
    }

    #[test]
    fn it_is_open_for_twice_as_long_each_time_up_to_the_cap_and_one_probe_closes_it() {
        let mut trial = Trial::new();
        for _ in 0..3 {
            trial.exchange(Some(Outcome::Failure));
        }
        for seconds in [10, 20, 35, 35] {
            assert_eq!(trial.pass((seconds - 1) * SECOND), BreakerState::Open);
            assert_eq!(trial.pass(SECOND), BreakerState::HalfOpen);
            trial.exchange(Some(Outcome::Failure));
        }
        trial.pass(35 * SECOND);
        assert_eq!(trial.exchange(None), Change::None, "a client that left says nothing");
        assert!(trial.machine.may_enter(trial.now), "so the next one probes");
        assert_eq!(trial.exchange(Some(Outcome::Success)), Change::Closed);
        // After a while without trouble the first opening is a short one again.
        trial.pass(36 * SECOND);
        trial.exchange(Some(Outcome::Success));
        for _ in 0..3 {
            trial.exchange(Some(Outcome::Failure));
        }
        assert_eq!(trial.pass(10 * SECOND), BreakerState::HalfOpen);
    }

    #[test]
    fn one_probe_at_a_time_and_exchanges_from_before_do_not_decide() {
        let mut trial = Trial::new();
        let before = trial.now;
        trial.pass(SECOND);
        for _ in 0..3 {
            trial.exchange(Some(Outcome::Failure));
        }
        let late =
            trial
                .machine
                .tell(Entry::Normal, before, Outcome::Success, trial.now, &spec(), || true);
        assert_eq!(late, Change::None);
        trial.pass(10 * SECOND);
        assert_eq!(trial.machine.enter(trial.now), Some(Entry::Probe));
        assert!(!trial.machine.may_enter(trial.now));
        assert_eq!(trial.machine.enter(trial.now), None);
    }

    #[test]
    fn a_recovered_backend_comes_back_slowly() {
        let breaker = Breaker::default();
        let now = Instant::now();
        let tell = |entry, outcome, now| {
            breaker.tell(entry, now, outcome, now, &spec(), || true);
        };
        assert_eq!(breaker.ramp(now, spec().slow_start), 1.0);
        for _ in 0..3 {
            tell(Entry::Normal, Outcome::Failure, now);
        }
        let later = now + 10 * SECOND;
        assert_eq!(breaker.enter(later), Some(Entry::Probe));
        tell(Entry::Probe, Outcome::Success, later);
        let ramp = |seconds| breaker.ramp(later + seconds * SECOND, spec().slow_start);
        assert_eq!(ramp(0), 0.1);
        assert!((ramp(15) - 0.5).abs() < 0.01);
        assert_eq!(ramp(30), 1.0);
    }

    proptest! {
        /// Whatever happens, there is at most one probe, an open breaker lets nobody in before its
        /// time and everybody's time comes, and nothing but failures opens it.
        #[test]
        fn it_keeps_its_promises(events in prop::collection::vec((0u8..5, 0u64..20), 1..200)) {
            let mut trial = Trial::new();
            let mut probes = Vec::new();
            for (event, seconds) in events {
                trial.now += Duration::from_secs(seconds);
                let closed_before = trial.machine.state == State::Closed;
                let outcome = match event {
                    0 => Some(Outcome::Success),
                    1 | 2 => Some(Outcome::Failure),
                    3 => None,
                    // A probe that is still on its way when others come.
                    _ => {
                        if trial.machine.may_enter(trial.now)
                            && trial.machine.enter(trial.now) == Some(Entry::Probe)
                        {
                            probes.push(trial.now);
                        }
                        prop_assert!(probes.len() <= 1, "two probes at once");
                        continue;
                    }
                };
                if let Some(entered) = probes.pop() {
                    let now = trial.now;
                    match outcome {
                        Some(outcome) => {
                            let machine = &mut trial.machine;
                            machine.tell(Entry::Probe, entered, outcome, now, &spec(), || true);
                        }
                        None => trial.machine.abandon(),
                    }
                    let left = outcome.is_none();
                    prop_assert!(!left || trial.machine.may_enter(now));
                    continue;
                }
                if let State::Open { until, .. } = trial.machine.state {
                    prop_assert_eq!(trial.machine.may_enter(trial.now), trial.now >= until);
                    prop_assert!(until <= trial.now + spec().open_max);
                }
                if !trial.machine.may_enter(trial.now) {
                    continue;
                }
                let change = trial.exchange(outcome);
                if let Change::Opened { .. } = change {
                    prop_assert_eq!(outcome, Some(Outcome::Failure));
                }
                if closed_before && outcome != Some(Outcome::Failure) {
                    prop_assert_eq!(trial.machine.state, State::Closed);
                }
            }
        }
    }
}
