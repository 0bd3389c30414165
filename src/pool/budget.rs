//! How many further attempts a pool allows: a share of its recent exchanges. Without it, backends
//! that are overloaded would be sent every exchange several times.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::config::RetrySpec;

/// What "recent" means: this time and as much before it.
const WINDOW: Duration = Duration::from_secs(10);

/// The budget of one pool.
#[derive(Debug)]
pub(super) struct RetryBudget {
    exchanges: AtomicUsize,
    spent: Mutex<Spent>,
}

#[derive(Debug)]
struct Spent {
    began: Instant,
    retries: usize,
    retries_before: usize,
    exchanges_before: usize,
}

impl Default for RetryBudget {
    fn default() -> Self {
        let spent =
            Spent { began: Instant::now(), retries: 0, retries_before: 0, exchanges_before: 0 };
        Self { exchanges: AtomicUsize::new(0), spent: Mutex::new(spent) }
    }
}

impl RetryBudget {
    /// An exchange began.
    pub(super) fn count_exchange(&self) {
        self.exchanges.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes one further attempt out of the budget; false: it is used up.
    pub(super) fn take(&self, now: Instant, spec: &RetrySpec) -> bool {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let windows = now.saturating_duration_since(spent.began).as_nanos() / WINDOW.as_nanos();
        if windows > 0 {
            let exchanges = self.exchanges.swap(0, Ordering::Relaxed);
            let is_next = windows == 1;
            spent.exchanges_before = if is_next { exchanges } else { 0 };
            spent.retries_before = if is_next { spent.retries } else { 0 };
            spent.retries = 0;
            spent.began = now;
        }
        let exchanges = spent.exchanges_before + self.exchanges.load(Ordering::Relaxed);
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "exchanges of 20 s are far below 2^52, and a share of them is not negative"
        )]
        let share = (spec.budget * exchanges as f64) as usize;
        let allowed = spent.retries + spent.retries_before < spec.budget_min + share;
        spent.retries += usize::from(allowed);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(budget: f64, budget_min: usize) -> RetrySpec {
        RetrySpec {
            retries_max: 2,
            delay: Duration::ZERO,
            retry_after_max: Duration::ZERO,
            statuses: Vec::new(),
            fast_500: Duration::ZERO,
            non_idempotent: true,
            budget,
            budget_min,
        }
    }

    #[test]
    fn retries_are_a_share_of_recent_exchanges_and_a_few() {
        let budget = RetryBudget::default();
        let spec = spec(0.2, 3);
        let now = Instant::now();
        for _ in 0..100 {
            budget.count_exchange();
        }
        let granted = (0..100).filter(|_| budget.take(now, &spec)).count();
        assert_eq!(granted, 23);
        // What was long ago does not count, neither as an exchange nor as a retry.
        let granted = (0..100).filter(|_| budget.take(now + 3 * WINDOW, &spec)).count();
        assert_eq!(granted, 3);
    }

    #[test]
    fn a_retry_storm_is_bounded_however_long_it_lasts() {
        proptest::proptest!(|(steps: Vec<u8>)| {
            let budget = RetryBudget::default();
            let spec = spec(0.2, 3);
            let began = Instant::now();
            let mut granted = 0usize;
            for (number, step) in steps.iter().enumerate() {
                budget.count_exchange();
                // Every exchange wants as many retries as it can get.
                let now = began + Duration::from_millis(number as u64 * u64::from(*step));
                granted += (0..10).filter(|_| budget.take(now, &spec)).count();
            }
            let last = steps.len() as u64 * 255;
            let windows = last / 10_000 + 2;
            let bound = windows as usize * 3 * 2 + steps.len() * 2 / 5 + 3;
            proptest::prop_assert!(granted <= bound, "{granted} > {bound}");
        });
    }
}
