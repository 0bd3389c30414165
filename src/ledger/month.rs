//! What keys have taken of models in this month: tiers of prices and tokens paid for before go by it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

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

/// Tokens that keys have taken in a month.
#[derive(Debug, Default)]
pub struct Months {
    tokens: Mutex<Tokens>,
}

#[derive(Debug, Default)]
struct Tokens {
    month: Month,
    of_model: HashMap<(Arc<str>, String), u64>,
    reserved: HashMap<Arc<str>, u64>,
}

/// What an exchange takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Tokens that its key had taken of the model before, in this month.
    pub before: u64,
    /// How many of its own were paid for before.
    pub reserved: u64,
}

impl Months {
    /// A key takes tokens of a model; `reserved_max` of a month's were paid for before.
    pub fn take(
        &self,
        month: Month,
        key: &Arc<str>,
        model: &str,
        tokens: u64,
        reserved_max: u64,
    ) -> Taken {
        let mut all = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        all.turn(month);
        let of_model = all.of_model.entry((Arc::clone(key), model.to_owned())).or_default();
        let before = *of_model;
        *of_model = before.saturating_add(tokens);
        let mut reserved = 0;
        if reserved_max > 0 {
            let used = all.reserved.entry(Arc::clone(key)).or_default();
            reserved = tokens.min(reserved_max.saturating_sub(*used));
            *used += reserved;
        }
        Taken { before, reserved }
    }

    /// Adds what the ledger has of this month from before the start.
    pub fn restore(&self, month: Month, key: &Arc<str>, model: &str, tokens: u64, reserved: u64) {
        let mut all = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        all.turn(month);
        if all.month == month {
            *all.of_model.entry((Arc::clone(key), model.to_owned())).or_default() += tokens;
            *all.reserved.entry(Arc::clone(key)).or_default() += reserved;
        }
    }

    /// Tokens paid for before that a key has taken in this month.
    #[must_use]
    pub fn reserved_used(&self, month: Month, key: &Arc<str>) -> u64 {
        let mut all = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        all.turn(month);
        all.reserved.get(key).copied().unwrap_or_default()
    }
}

impl Tokens {
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
        let take = |month, tokens| months.take(month, &key, "m", tokens, 100);
        assert_eq!(take(october, 60), Taken { before: 0, reserved: 60 });
        assert_eq!(take(october, 60), Taken { before: 60, reserved: 40 });
        assert_eq!(take(october, 60), Taken { before: 120, reserved: 0 });
        assert_eq!(months.take(october, &key, "other", 5, 100), Taken { before: 0, reserved: 0 });
        assert_eq!(take(november, 60), Taken { before: 0, reserved: 60 });
        assert_eq!(months.reserved_used(november, &key), 60);
        months.restore(november, &key, "m", 1000, 30);
        assert_eq!(take(november, 60), Taken { before: 1060, reserved: 10 });
    }
}
