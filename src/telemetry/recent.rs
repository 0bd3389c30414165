//! How often something happened in the last minute, without a lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The parts that the minute moves by.
const PART: Duration = Duration::from_secs(5);

/// The minute, and the part that it is in.
const PARTS: u64 = 13;

/// A count over the last minute, and one over all time.
#[derive(Debug)]
pub struct Recent {
    began: Instant,
    total: AtomicU64,
    /// In each the number of its part of time, and below it the count.
    parts: [AtomicU64; PARTS as usize],
}

const COUNT_BITS: u32 = 32;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;

impl Default for Recent {
    fn default() -> Self {
        Self::new(Instant::now())
    }
}

impl Recent {
    fn new(began: Instant) -> Self {
        Self { began, total: AtomicU64::new(0), parts: Default::default() }
    }

    /// The part of time: never 0, which is what no part has counted in.
    fn part(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.began).as_secs() / PART.as_secs() + 1
    }

    /// It happened.
    pub fn count(&self, now: Instant) {
        self.total.fetch_add(1, Ordering::Relaxed);
        let part = self.part(now);
        let slot = &self.parts[(part % PARTS) as usize];
        let next = |known: u64| {
            let is_same = known >> COUNT_BITS == part;
            Some(if is_same { known + 1 } else { part << COUNT_BITS | 1 })
        };
        let _ = slot.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    }

    /// How often it happened in the last minute, and at most 5 s before.
    #[must_use]
    pub fn last_minute(&self, now: Instant) -> u64 {
        let part = self.part(now);
        let parts = self.parts.iter().map(|slot| slot.load(Ordering::Relaxed));
        let recent = parts.filter(|slot| (slot >> COUNT_BITS) + PARTS > part);
        recent.map(|slot| slot & COUNT_MASK).sum()
    }

    /// How often it happened at all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_older_than_a_minute_does_not_count() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let recent = Recent::new(began);
        for second in 0..120 {
            recent.count(at(second));
        }
        assert_eq!(recent.total(), 120);
        // 55 to 119: twelve parts, and the one that goes on.
        assert_eq!(recent.last_minute(at(119)), 65);
        assert_eq!(recent.last_minute(at(150)), 30);
        assert_eq!(recent.last_minute(at(184)), 0);
        recent.count(at(1000));
        assert_eq!(recent.last_minute(at(1000)), 1);
        assert_eq!(Recent::new(began).last_minute(at(3)), 0);
    }
}
