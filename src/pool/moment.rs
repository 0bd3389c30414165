//! A time that is read without a lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A time, or none.
#[derive(Debug)]
pub(super) struct Moment {
    base: Instant,
    /// After `base`; 0: none.
    nanos: AtomicU64,
}

impl Default for Moment {
    fn default() -> Self {
        Self { base: Instant::now(), nanos: AtomicU64::new(0) }
    }
}

impl Moment {
    /// Sets it, unless it is later already.
    pub(super) fn extend(&self, at: Instant) {
        let nanos = at.saturating_duration_since(self.base).as_nanos();
        self.nanos.fetch_max(u64::try_from(nanos).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How long it is until then; none once it has passed.
    pub(super) fn left(&self, now: Instant) -> Option<Duration> {
        let nanos = self.nanos.load(Ordering::Relaxed);
        let left =
            Duration::from_nanos(nanos).saturating_sub(now.saturating_duration_since(self.base));
        (!left.is_zero()).then_some(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_time_counts_until_it_has_passed() {
        let moment = Moment::default();
        let now = moment.base;
        let second = Duration::from_secs(1);
        assert_eq!(moment.left(now), None);
        moment.extend(now + 3 * second);
        moment.extend(now + second);
        assert_eq!(moment.left(now + second), Some(2 * second));
        assert_eq!(moment.left(now + 3 * second), None);
    }
}
