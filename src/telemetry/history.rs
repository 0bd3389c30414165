//! What went on in the last half hour: a point every 5 s.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::counters::{Counters, Totals};
use super::spread;

/// The time between two points.
pub const STEP: Duration = Duration::from_secs(5);

/// Half an hour.
const POINTS_MAX: usize = 360;

/// Points that make a minute.
const MINUTE: usize = 12;

/// The last half hour.
#[derive(Debug)]
pub struct History {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    points: VecDeque<Point>,
    /// Counts at the points of the last minute, and before the first of them.
    counts: VecDeque<Known>,
    ended: SystemTime,
}

#[derive(Clone, Debug)]
struct Known {
    at: Instant,
    totals: Totals,
    first_byte: spread::Counts,
    duration: spread::Counts,
}

impl Known {
    fn of(counters: &Counters, at: Instant) -> Self {
        Self {
            at,
            totals: counters.totals(),
            first_byte: counters.first_byte.counts(),
            duration: counters.duration.counts(),
        }
    }

    fn since(&self, before: &Self) -> Rates {
        let seconds = (self.at - before.at).as_secs_f64().max(0.001);
        #[allow(clippy::cast_precision_loss, reason = "counts of some seconds")]
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        let (now, then) = (&self.totals, &before.totals);
        let requests = now.requests.saturating_sub(then.requests);
        let errors = now.errors.saturating_sub(then.errors);
        Rates {
            requests: rate(now.requests, then.requests),
            errors: rate(now.errors, then.errors),
            refused: rate(now.refused, then.refused),
            tokens_input: rate(now.tokens_input, then.tokens_input),
            tokens_output: rate(now.tokens_output, then.tokens_output),
            #[allow(clippy::cast_precision_loss, reason = "counts of some seconds")]
            error_rate: (requests > 0).then(|| errors as f64 / requests as f64),
            first_byte: percentiles(&self.first_byte.since(&before.first_byte)),
            duration: percentiles(&self.duration.since(&before.duration)),
        }
    }
}

fn percentiles(counts: &spread::Counts) -> Option<Percentiles> {
    let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|share| counts.percentile(share));
    Some(Percentiles { p50: p50?, p95: p95?, p99: p99? })
}

/// What went on over a while: a second, where it is a count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Exchanges.
    pub requests: f64,
    /// Those that failed.
    pub errors: f64,
    /// Those that were refused.
    pub refused: f64,
    /// Tokens of prompts.
    pub tokens_input: f64,
    /// Tokens of answers.
    pub tokens_output: f64,
    /// Share of the exchanges that failed; none where there were none.
    pub error_rate: Option<f64>,
    /// Of times to the first byte; none where there were none.
    pub first_byte: Option<Percentiles>,
    /// Of durations; none where there were none.
    pub duration: Option<Percentiles>,
}

/// Half, 95 and 99 of 100 took no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Percentiles {
    /// Half of them.
    pub p50: Duration,
    /// 95 of 100.
    pub p95: Duration,
    /// 99 of 100.
    pub p99: Duration,
}

/// A point of the history: the 5 s before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// What went on.
    pub rates: Rates,
    /// Exchanges in flight at its end.
    pub inflight: usize,
    /// Of those, waiting for a place.
    pub queued: usize,
}

impl History {
    /// Begins now.
    #[must_use]
    pub fn new(counters: &Counters) -> Self {
        let counts = VecDeque::from([Known::of(counters, Instant::now())]);
        let inner = Inner { points: VecDeque::new(), counts, ended: SystemTime::now() };
        Self { inner: Mutex::new(inner) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another [`STEP`] is over.
    pub fn step(&self, counters: &Counters, inflight: usize, queued: usize) {
        let known = Known::of(counters, Instant::now());
        let mut inner = self.inner();
        let before = inner.counts.back().expect("there always is the one before the first");
        let point = Point { rates: known.since(before), inflight, queued };
        inner.points.push_back(point);
        if inner.points.len() > POINTS_MAX {
            inner.points.pop_front();
        }
        inner.counts.push_back(known);
        if inner.counts.len() > MINUTE + 1 {
            inner.counts.pop_front();
        }
        inner.ended = SystemTime::now();
    }

    /// What went on in the last minute, or since the start.
    #[must_use]
    pub fn minute(&self, counters: &Counters) -> Rates {
        let now = Known::of(counters, Instant::now());
        let inner = self.inner();
        now.since(inner.counts.front().expect("there always is the one before the first"))
    }

    /// The points, the oldest first, and when the last one was.
    #[must_use]
    pub fn points(&self) -> (Vec<Point>, SystemTime) {
        let inner = self.inner();
        (inner.points.iter().copied().collect(), inner.ended)
    }
}
