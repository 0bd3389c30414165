//! How times are spread: counts by their size, from which percentiles are told.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Sizes a doubling: neighbours differ by 9 %, which is how far a percentile may be off.
const STEPS: f64 = 8.0;

/// The smallest size, in seconds.
const SMALLEST: f64 = 50e-6;

/// 27 doublings: beyond an hour and a half all are one.
const SIZES: usize = 216;

/// Counts of times by size; they only grow.
#[derive(Debug)]
pub struct Spread(Box<[AtomicU64]>);

impl Default for Spread {
    fn default() -> Self {
        Self((0..SIZES).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Spread {
    /// Counts one.
    pub fn count(&self, time: Duration) {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
        let size = ((time.as_secs_f64() / SMALLEST).log2() * STEPS).ceil() as usize;
        self.0[size.min(SIZES - 1)].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts(self.0.iter().map(|count| count.load(Ordering::Relaxed)).collect())
    }
}

/// Counts at a moment, or between two.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(Box<[u64]>);

impl Counts {
    /// What came since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let before = before.0.iter().copied().chain(std::iter::repeat(0));
        Self(self.0.iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect())
    }

    /// The time that this share of all, 0 to 1, is not above; none where nothing was counted.
    #[must_use]
    pub fn percentile(&self, share: f64) -> Option<Duration> {
        let total: u64 = self.0.iter().sum();
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "counts of exchanges"
        )]
        let rank = ((total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        let size = self.0.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        // The middle of what the size stands for.
        #[allow(clippy::cast_precision_loss, reason = "a few hundred")]
        let seconds = SMALLEST * ((size as f64 - 0.5) / STEPS).exp2();
        Some(Duration::from_secs_f64(seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_off_by_no_more_than_a_size() {
        let spread = Spread::default();
        assert_eq!(spread.counts().percentile(0.5), None);
        for millis in 1..=1000 {
            spread.count(Duration::from_millis(millis));
        }
        for (share, expected) in [(0.5, 0.5), (0.95, 0.95), (0.99, 0.99), (0.001, 0.001)] {
            let told = spread.counts().percentile(share).unwrap().as_secs_f64();
            assert!((told / expected - 1.0).abs() < 0.06, "{share}: {told} for {expected}");
        }
        let before = spread.counts();
        spread.count(Duration::ZERO);
        spread.count(Duration::from_secs(1_000_000));
        let since = spread.counts().since(&before);
        assert!(since.percentile(0.5).unwrap() < Duration::from_millis(1));
        assert!(since.percentile(1.0).unwrap() > Duration::from_secs(5000));
        assert_eq!(before.since(&before).percentile(0.5), None);
    }
}
