//! What keys have taken of models in this month: tiers of prices and tokens paid for before go by it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::Calendar;

/// A month (UTC), by when it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Month(i64);

impl Month {
    /// That of a time, in milliseconds since 1970.
    #[must_use]
    pub fn of(millis: i64) -> Self {
        Self(Calendar::Month.begin(millis))
    }
}

/// Keys and models of a month that are counted, at most: who calls a model by ever new names fills no memory.
const PAIRS_MAX: usize = 1_000_000;

/// Tokens that keys have taken in a month.
#[derive(Debug, Default)]
pub struct Months {
    tokens: Mutex<Tokens>,
}

#[derive(Debug, Default)]
struct Tokens {
    month: Month,
    of_model: HashMap<(Arc<str>, String), u64>,
    reserved: HashMap<Arc<str>, Reserved>,
}

/// Of the tokens that a key has paid for before.
#[derive(Debug, Default)]
struct Reserved {
    /// Those that are used up.
    used: u64,
    /// Those that exchanges may use up that go on.
    held: u64,
}

/// Tokens that were paid for before and are kept for an exchange, until it is dropped.
#[derive(Debug)]
pub struct Held {
    months: Arc<Months>,
    month: Month,
    key: Arc<str>,
    /// How many.
    pub tokens: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut all = self.months.tokens();
        // With a new month nothing was held.
        if all.month == self.month
            && let Some(reserved) = all.reserved.get_mut(&self.key)
        {
            reserved.held = reserved.held.saturating_sub(self.tokens);
        }
    }
}

/// What an exchange takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Tokens that its key had taken of the model before, in this month.
    pub before: u64,
    /// How many of its own were paid for before.
    pub reserved: u64,
}

impl Months {
    /// A key takes tokens of a model, if that is counted; `reserved_max` of a month's were paid for before.
    pub fn take(
        &self,
        month: Month,
        key: &Arc<str>,
        model: Option<&str>,
        tokens: u64,
        reserved_max: u64,
    ) -> Taken {
        let mut all = self.tokens();
        all.turn(month);
        let before = model.map_or(0, |model| all.add(key, model, tokens));
        let mut reserved = 0;
        if reserved_max > 0 {
            let known = all.reserved.entry(Arc::clone(key)).or_default();
            reserved = tokens.min(reserved_max.saturating_sub(known.used));
            known.used += reserved;
        }
        Taken { before, reserved }
    }

    /// Keeps tokens for an exchange that may take so many, as far as there are some of a month's that were paid for
    /// before and that no other one may use up.
    pub fn hold(
        self: &Arc<Self>,
        month: Month,
        key: &Arc<str>,
        tokens: u64,
        reserved_max: u64,
    ) -> Held {
        let mut all = self.tokens();
        all.turn(month);
        let known = all.reserved.entry(Arc::clone(key)).or_default();
        let left = reserved_max.saturating_sub(known.used).saturating_sub(known.held);
        let tokens = tokens.min(left);
        known.held += tokens;
        // Another one may have begun meanwhile.
        let month = all.month;
        drop(all);
        Held { months: Arc::clone(self), month, key: Arc::clone(key), tokens }
    }

    /// Tokens that a key has taken of a model in this month.
    #[must_use]
    pub fn before(&self, month: Month, key: &Arc<str>, model: &str) -> u64 {
        let mut all = self.tokens();
        all.turn(month);
        all.of_model.get(&(Arc::clone(key), model.to_owned())).copied().unwrap_or_default()
    }

    fn tokens(&self) -> MutexGuard<'_, Tokens> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what the ledger has of this month from before the start.
    pub fn restore(&self, month: Month, key: &Arc<str>, model: &str, tokens: u64, reserved: u64) {
        let mut all = self.tokens();
        all.turn(month);
        if all.month == month {
            all.add(key, model, tokens);
            all.reserved.entry(Arc::clone(key)).or_default().used += reserved;
        }
    }

    /// Tokens paid for before that a key has taken in this month.
    #[must_use]
    pub fn reserved_used(&self, month: Month, key: &Arc<str>) -> u64 {
        let mut all = self.tokens();
        all.turn(month);
        all.reserved.get(key).map_or(0, |reserved| reserved.used)
    }
}

impl Tokens {
    /// Adds tokens of a model; how many there were before.
    fn add(&mut self, key: &Arc<str>, model: &str, tokens: u64) -> u64 {
        let is_full = self.of_model.len() >= PAIRS_MAX;
        match self.of_model.entry((Arc::clone(key), model.to_owned())) {
            Entry::Vacant(_) if is_full => 0,
            entry => {
                let of_model = entry.or_default();
                let before = *of_model;
                *of_model = before.saturating_add(tokens);
                before
            }
        }
    }

    /// A month that has begun begins with nothing. One that is over does not come back: the clock may be set back.
    fn turn(&mut self, month: Month) {
        if month > self.month {
            *self = Self { month, ..Self::default() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_paid_for_before_is_taken_first_and_comes_anew_each_month() {
        let months = Months::default();
        let key: Arc<str> = "k".into();
        let october = Month::of(1_760_000_000_000);
        let november = Month::of(1_762_000_000_000);
        assert!(october < november);
        let take = |month, tokens| months.take(month, &key, Some("m"), tokens, 100);
        assert_eq!(take(october, 60), Taken { before: 0, reserved: 60 });
        assert_eq!(take(october, 60), Taken { before: 60, reserved: 40 });
        assert_eq!(take(october, 60), Taken { before: 120, reserved: 0 });
        assert_eq!(
            months.take(october, &key, Some("other"), 5, 100),
            Taken { before: 0, reserved: 0 }
        );
        assert_eq!(take(november, 60), Taken { before: 0, reserved: 60 });
        assert_eq!(months.reserved_used(november, &key), 60);
        months.restore(november, &key, "m", 1000, 30);
        assert_eq!(take(november, 60), Taken { before: 1060, reserved: 10 });
        assert_eq!(months.before(november, &key, "m"), 1120);
    }

    #[test]
    fn what_was_paid_for_before_is_kept_for_one_exchange_at_a_time() {
        let months = Arc::new(Months::default());
        let key: Arc<str> = "k".into();
        let october = Month::of(1_760_000_000_000);
        let hold = |tokens| months.hold(october, &key, tokens, 100);
        let first = hold(70);
        let second = hold(70);
        assert_eq!((first.tokens, second.tokens, hold(1).tokens), (70, 30, 0));
        // It took less than it might have.
        assert_eq!(months.take(october, &key, Some("m"), 10, 100).reserved, 10);
        drop(first);
        assert_eq!(hold(70).tokens, 60);
        drop(second);
        assert_eq!(hold(100).tokens, 90);
    }
}
