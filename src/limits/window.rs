//! A sliding window: how much there was in the last so many seconds.

use std::collections::VecDeque;
use std::time::Duration;

/// Parts of a window that are counted as one. An amount counts until all of its part is out of the window: so a
/// limit is never passed, in whatever window one looks, and what is admitted falls short of it by at most the
/// 256th part.
pub(super) const PARTS: u64 = 256;

/// A moment, in microseconds since some beginning.
pub(super) type Micros = u64;

/// Amounts of the last time, by the parts of it that they came in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Window {
    /// In the order of time; none of them empty.
    parts: VecDeque<(u64, u64)>,
    sum: u64,
}

/// The length of a window in parts of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Length {
    part: Micros,
}

impl Length {
    pub(super) fn of(window: Duration) -> Self {
        let micros = u64::try_from(window.as_micros()).unwrap_or(u64::MAX / 4);
        Self { part: micros.div_ceil(PARTS).max(1) }
    }

    /// The part that a moment is in.
    pub(super) fn part_of(self, now: Micros) -> u64 {
        now / self.part
    }

    /// The length of a part.
    pub(super) fn part(self) -> Micros {
        self.part
    }

    /// When nothing of a part counts any more.
    fn over(self, part: u64) -> Micros {
        (part + 1 + PARTS).saturating_mul(self.part)
    }
}

impl Window {
    /// Forgets what is out of the window.
    fn turn(&mut self, length: Length, now: Micros) {
        let first = length.part_of(now).saturating_sub(PARTS);
        while let Some((part, amount)) = self.parts.front()
            && *part < first
        {
            self.sum = self.sum.saturating_sub(*amount);
            self.parts.pop_front();
        }
    }

    /// How much there is now.
    pub(super) fn sum(&mut self, length: Length, now: Micros) -> u64 {
        self.turn(length, now);
        self.sum
    }

    /// Takes an amount if the sum then is at most `max`, and tells the part that it counts in; else how long it
    /// takes until it would be.
    pub(super) fn take(
        &mut self,
        length: Length,
        now: Micros,
        amount: u64,
        max: u64,
    ) -> Result<u64, Duration> {
        self.turn(length, now);
        let excess = self.sum.saturating_add(amount).saturating_sub(max);
        // What takes nothing always fits.
        if excess == 0 || amount == 0 {
            return Ok(self.add(length, now, amount));
        }
        let mut freed = 0;
        for (part, amount) in &self.parts {
            freed += amount;
            if freed >= excess {
                return Err(Duration::from_micros(length.over(*part).saturating_sub(now)));
            }
        }
        // More than ever fits: as long as the window is.
        Err(Duration::from_micros(length.part.saturating_mul(PARTS)))
    }

    /// Takes an amount, whatever the sum then is; tells the part that it counts in.
    pub(super) fn add(&mut self, length: Length, now: Micros, amount: u64) -> u64 {
        let part = length.part_of(now);
        self.sum = self.sum.saturating_add(amount);
        match self.parts.back_mut() {
            // Two threads may come in the other order than they looked at the clock.
            Some((last, sum)) if *last >= part => {
                *sum = sum.saturating_add(amount);
                *last
            }
            _ if amount == 0 => part,
            _ => {
                self.parts.push_back((part, amount));
                part
            }
        }
    }

    /// Gives back some of what was taken in a part, as far as that still counts; how much that is.
    pub(super) fn give_back(&mut self, part: u64, amount: u64) -> u64 {
        let Ok(at) = self.parts.binary_search_by_key(&part, |(part, _)| *part) else { return 0 };
        let sum = &mut self.parts[at].1;
        let given = amount.min(*sum);
        *sum -= given;
        self.sum = self.sum.saturating_sub(given);
        if *sum == 0 {
            self.parts.remove(at);
        }
        given
    }

    /// What there is, by how many parts ago it was.
    pub(super) fn ages(&mut self, length: Length, now: Micros) -> Vec<(u64, u64)> {
        self.turn(length, now);
        let current = length.part_of(now);
        let age = |(part, amount): &(u64, u64)| (current.saturating_sub(*part), *amount);
        self.parts.iter().map(age).collect()
    }

    /// How long until there is nothing.
    pub(super) fn reset(&self, length: Length, now: Micros) -> Duration {
        let last = self.parts.back().map_or(0, |(part, _)| length.over(*part));
        Duration::from_micros(last.saturating_sub(now))
    }

    /// Whether nothing is left to be known of it.
    pub(super) fn is_empty(&mut self, length: Length, now: Micros) -> bool {
        self.sum(length, now) == 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Micros = 1_000_000;

    #[test]
    fn what_was_taken_comes_back_when_it_is_out_of_the_window() {
        let length = Length::of(Duration::from_secs(60));
        let mut window = Window::default();
        let mut take =
            |second: u64, amount| window.take(length, second * SECOND, amount, 10).map(|_| ());
        assert_eq!(take(0, 6), Ok(()));
        assert_eq!(take(30, 4), Ok(()));
        let wait = take(40, 1).unwrap_err();
        assert!((20..=21).contains(&wait.as_secs()), "{wait:?}");
        let wait = take(40, 7).unwrap_err();
        assert!((50..=51).contains(&wait.as_secs()), "{wait:?}");
        assert_eq!(take(61, 6), Ok(()));
        assert_eq!(take(61, 11).unwrap_err().as_secs(), 60);
        assert_eq!(window.sum(length, 61 * SECOND), 10);
        assert!(window.is_empty(length, 200 * SECOND));
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let length = Length::of(Duration::from_secs(60));
        let mut window = Window::default();
        let part = window.take(length, 0, 10, 10).unwrap();
        window.give_back(part, 4);
        assert!(window.take(length, SECOND, 4, 10).is_ok());
        // What is out of the window already is not given back.
        assert_eq!(window.sum(length, 61 * SECOND), 4);
        window.give_back(part, 6);
        assert_eq!(window.sum(length, 61 * SECOND), 4);
    }

    proptest! {
        #[test]
        fn no_window_ever_holds_more_than_the_limit_and_not_much_is_wasted(
            millis in 1..100_u64,
            max in 1..500_u64,
            asks in prop::collection::vec((0..40_000_u64, 1..9_u64), 1..400),
        ) {
            let length = Length::of(Duration::from_millis(millis));
            let span = millis * 1000;
            // What is in a part counts until all of the part is out of the window: nothing stands in the way for
            // longer than this. Rounding a part up to whole microseconds makes the window longer by that much.
            let longer = (PARTS + 1) * length.part;
            prop_assert!(longer <= span + PARTS + length.part);
            let mut limiter = Window::default();
            let (mut now, mut taken) = (0, Vec::new());
            for (pause, amount) in asks {
                now += pause;
                let amount = amount.min(max);
                let in_longer: u64 = taken
                    .iter()
                    .filter(|(at, _)| *at + longer > now)
                    .map(|(_, amount)| amount)
                    .sum();
                let done = limiter.take(length, now, amount, max);
                match done {
                    Ok(_) => taken.push((now, amount)),
                    Err(wait) => {
                        prop_assert!(in_longer + amount > max);
                        let wait = u64::try_from(wait.as_micros()).unwrap();
                        prop_assert!(wait <= longer);
                        let mut later = limiter.clone();
                        let then = now + wait;
                        prop_assert!(later.take(length, then, amount, max).is_ok());
                    }
                }
            }
            for (at, _) in &taken {
                let held: u64 = taken
                    .iter()
                    .filter(|(other, _)| other >= at && *other < at + span)
                    .map(|(_, amount)| amount)
                    .sum();
                prop_assert!(held <= max, "{held} > {max}");
            }
        }
    }
}
