//! Successes and failures of the last while, for a failure rate.

use std::time::{Duration, Instant};

use super::breaker::Outcome;

/// Parts that the window moves by.
const BUCKETS: usize = 10;

/// Successes and failures of the last while.
#[derive(Clone, Debug)]
pub(super) struct Window {
    buckets: [(u32, u32); BUCKETS],
    at: usize,
    began: Instant,
}

impl Window {
    pub(super) fn new(now: Instant) -> Self {
        Self { buckets: [(0, 0); BUCKETS], at: 0, began: now }
    }

    pub(super) fn add(&mut self, now: Instant, window: Duration, outcome: Outcome) {
        let bucket = (window / BUCKETS as u32).max(Duration::from_nanos(1));
        let elapsed = now.saturating_duration_since(self.began).as_nanos() / bucket.as_nanos();
        let steps = usize::try_from(elapsed).unwrap_or(usize::MAX);
        for _ in 0..steps.min(BUCKETS) {
            self.at = (self.at + 1) % BUCKETS;
            self.buckets[self.at] = (0, 0);
        }
        if steps > 0 {
            self.began = now;
        }
        let (success, failure) = &mut self.buckets[self.at];
        match outcome {
            Outcome::Success => *success = success.saturating_add(1),
            Outcome::Failure => *failure = failure.saturating_add(1),
        }
    }

    /// All of them, and the failures among them.
    pub(super) fn counts(&self) -> (u32, u32) {
        self.buckets.iter().fold((0u32, 0u32), |(total, failed), (success, failure)| {
            (total.saturating_add(success + failure), failed.saturating_add(*failure))
        })
    }
}
