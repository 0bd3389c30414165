//! Counts in this process: exact ones for what is known by name, and estimates of bounded size for addresses.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pingora_limits::inflight::{Guard, Inflight};
use pingora_limits::rate::Rate;

use super::window::{Length, Micros, PARTS, Window};
use super::{Moment, until_end};
use crate::config::{Calendar, Quantity};

/// So many locks share all counts.
const SHARDS: usize = 64;

/// A shard with more counts than this is looked through for those that are over, as often as it has doubled.
const COUNTS_MIN: usize = 1024;

/// Rows and columns of an estimate: 4 MB, and of 100,000 addresses with ten requests each, each looks like one with
/// 15 more at most.
const ESTIMATE_ROWS: usize = 4;
const ESTIMATE_COLUMNS: usize = 64 * 1024;

/// What a limit counts for one of those that it counts by. Half of the hash would do to tell them apart.
pub(super) type Subject = u128;

/// The exact counts.
pub(super) struct Counts {
    shards: Vec<Mutex<Shard>>,
}

#[derive(Default)]
struct Shard {
    counts: HashMap<Subject, Entry>,
    /// It is looked through when it has so many.
    full: usize,
}

struct Entry {
    quantity: Quantity,
    count: Count,
}

/// A count of one thing.
#[derive(Debug)]
enum Count {
    Window(Window, Length, Others),
    Concurrent(u64),
    /// Of a time of the calendar, which began then: spent, and reserved by what goes on.
    Money {
        calendar: Calendar,
        begin: i64,
        spent: u64,
        reserved: u64,
        /// The most that is known to be spent here and elsewhere.
        total: u64,
    },
}

/// How much others had taken in a window when last heard of.
#[derive(Clone, Copy, Debug, Default)]
struct Others {
    amount: u64,
    at: Micros,
}

impl Others {
    /// How much of it still counts, if they took it evenly.
    fn left(self, length: Length, now: Micros) -> u64 {
        let whole = length.part() * PARTS;
        let left = whole.saturating_sub(now.saturating_sub(self.at));
        let amount = u128::from(self.amount) * u128::from(left) / u128::from(whole);
        u64::try_from(amount).unwrap_or(u64::MAX)
    }
}

/// How a limit stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) used: u64,
    /// Until nothing of it is used.
    pub(super) reset: Duration,
}

/// What there is of a count.
pub(super) struct Known {
    pub(super) subject: Subject,
    pub(super) quantity: Quantity,
    pub(super) amounts: Amounts,
}

pub(super) enum Amounts {
    /// By how many parts ago it was.
    Window(Vec<(u64, u64)>),
    Places,
    Money {
        total: u64,
        spent: u64,
    },
}

/// That an amount does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exceeded {
    pub(super) standing: Standing,
    /// Until it would.
    pub(super) wait: Duration,
}

/// Where an amount was counted, so that it can be given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spot {
    Part(u64),
    Place,
    Since(i64),
}

impl Default for Counts {
    fn default() -> Self {
        let shard = || Mutex::new(Shard { counts: HashMap::new(), full: COUNTS_MIN });
        Self { shards: (0..SHARDS).map(|_| shard()).collect() }
    }
}

impl Counts {
    fn shard(&self, subject: Subject) -> MutexGuard<'_, Shard> {
        #[allow(clippy::cast_possible_truncation, reason = "only its last bits are of interest")]
        let at = subject as usize % SHARDS;
        self.shards[at].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an amount, if it fits.
    pub(super) fn take(
        &self,
        subject: Subject,
        quantity: Quantity,
        (amount, max): (u64, u64),
        now: Moment,
    ) -> Result<(Spot, Standing), Exceeded> {
        let mut shard = self.shard(subject);
        shard.make_room(now);
        let count = shard.count(subject, quantity, now);
        let taken = match count {
            Count::Window(window, length, _) => {
                window.take(*length, now.micros, amount, max).map(Spot::Part)
            }
            // What takes nothing always fits.
            Count::Concurrent(count) if amount > 0 && *count + amount > max => {
                Err(Duration::from_secs(1))
            }
            Count::Concurrent(count) => {
                *count += amount;
                Ok(Spot::Place)
            }
            Count::Money { begin, spent, reserved, .. } => {
                if amount > 0 && spent.saturating_add(*reserved).saturating_add(amount) > max {
                    Err(until_end(quantity, now.millis))
                } else {
                    *reserved = reserved.saturating_add(amount);
                    Ok(Spot::Since(*begin))
                }
            }
        };
        let standing = count.standing(quantity, now);
        taken.map(|spot| (spot, standing)).map_err(|wait| Exceeded { standing, wait })
    }

    /// Counts an amount, whether it fits or not.
    pub(super) fn add(&self, subject: Subject, quantity: Quantity, amount: u64, now: Moment) {
        let mut shard = self.shard(subject);
        match shard.count(subject, quantity, now) {
            Count::Window(window, length, _) => {
                window.add(*length, now.micros, amount);
            }
            Count::Concurrent(count) => *count += amount,
            Count::Money { spent, total, .. } => {
                *spent = spent.saturating_add(amount);
                *total = total.saturating_add(amount);
            }
        }
    }

    /// Adds what was spent before the start. What others have heard of may have it in it.
    pub(super) fn restore(&self, subject: Subject, quantity: Quantity, amount: u64, now: Moment) {
        if let Count::Money { spent, total, .. } = self.shard(subject).count(subject, quantity, now)
        {
            *spent = spent.saturating_add(amount);
            *total = (*total).max(*spent);
        }
    }

    /// So much money is spent here and elsewhere, or was taken in a window, as was heard of.
    pub(super) fn heard(&self, subject: Subject, quantity: Quantity, used: u64, now: Moment) {
        match self.shard(subject).count(subject, quantity, now) {
            Count::Money { total, .. } => *total = used.max(*total),
            Count::Window(window, length, others) => {
                let amount = used.saturating_sub(window.sum(*length, now.micros));
                *others = Others { amount, at: now.micros };
            }
            Count::Concurrent(_) => {}
        }
    }

    /// How much others have taken that still counts, as far as is known.
    pub(super) fn of_others(&self, subject: Subject, quantity: Quantity, now: Moment) -> u64 {
        match self.shard(subject).count(subject, quantity, now) {
            Count::Window(_, length, others) => others.left(*length, now.micros),
            Count::Concurrent(_) | Count::Money { .. } => 0,
        }
    }

    /// How much money is spent here, how much is known to be spent here and elsewhere, and how much is reserved here.
    pub(super) fn money(&self, subject: Subject, quantity: Quantity, now: Moment) -> [u64; 3] {
        match self.shard(subject).count(subject, quantity, now) {
            Count::Money { spent, total, reserved, .. } => [*spent, *total, *reserved],
            Count::Window(..) | Count::Concurrent(_) => [0; 3],
        }
    }

    /// What there is of each count.
    pub(super) fn known(&self, now: Moment) -> Vec<Known> {
        let mut known = Vec::new();
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for (subject, Entry { quantity, count }) in &mut shard.counts {
                if !count.is_over(now) {
                    let amounts = count.amounts(now);
                    known.push(Known { subject: *subject, quantity: *quantity, amounts });
                }
            }
        }
        known
    }

    /// Takes out what there is of each count, but what goes on.
    pub(super) fn drain(&self, now: Moment) -> Vec<Known> {
        let mut known = Vec::new();
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.counts.retain(|subject, Entry { quantity, count }| {
                if count.is_over(now) {
                    return false;
                }
                let amounts = count.amounts(now);
                known.push(Known { subject: *subject, quantity: *quantity, amounts });
                match count {
                    Count::Window(..) => false,
                    Count::Concurrent(_) => true,
                    Count::Money { spent, reserved, total, .. } => {
                        (*spent, *total) = (0, 0);
                        *reserved > 0
                    }
                }
            });
        }
        known
    }

    /// Gives back what was taken there; how much of it is there no more.
    pub(super) fn give_back(&self, subject: Subject, spot: Spot, amount: u64) -> u64 {
        let mut shard = self.shard(subject);
        match (shard.counts.get_mut(&subject).map(|entry| &mut entry.count), spot) {
            (Some(Count::Window(window, ..)), Spot::Part(part)) => {
                return amount - window.give_back(part, amount);
            }
            (Some(Count::Concurrent(count)), Spot::Place) => *count = count.saturating_sub(amount),
            (Some(Count::Money { begin, reserved, .. }), Spot::Since(since)) if *begin == since => {
                *reserved = reserved.saturating_sub(amount);
            }
            (_, Spot::Part(_)) => return amount,
            _ => {}
        }
        0
    }
}

impl Shard {
    /// Forgets counts of nothing, now and then.
    fn make_room(&mut self, now: Moment) {
        if self.counts.len() >= self.full {
            self.counts.retain(|_, entry| !entry.count.is_over(now));
            self.full = (2 * self.counts.len()).max(COUNTS_MIN);
        }
    }

    fn count(&mut self, subject: Subject, quantity: Quantity, now: Moment) -> &mut Count {
        let new = || Entry { quantity, count: Count::new(quantity, now) };
        let count = &mut self.counts.entry(subject).or_insert_with(new).count;
        count.turn(now);
        count
    }
}

impl Count {
    fn new(quantity: Quantity, now: Moment) -> Self {
        match quantity {
            Quantity::Requests(window) | Quantity::Tokens(_, window) => {
                Self::Window(Window::default(), Length::of(window), Others::default())
            }
            Quantity::Concurrent => Self::Concurrent(0),
            Quantity::Money(calendar) => {
                let begin = calendar.begin(now.millis);
                Self::Money { calendar, begin, spent: 0, reserved: 0, total: 0 }
            }
        }
    }

    /// Begins anew with a new time of the calendar. The clock may be set back: then nothing changes.
    fn turn(&mut self, now: Moment) {
        let Self::Money { calendar, begin, spent, reserved, total } = self else { return };
        let current = calendar.begin(now.millis);
        if current > *begin {
            (*begin, *spent, *reserved, *total) = (current, 0, 0, 0);
        }
    }

    fn standing(&mut self, quantity: Quantity, now: Moment) -> Standing {
        match self {
            Self::Window(window, length, _) => Standing {
                used: window.sum(*length, now.micros),
                reset: window.reset(*length, now.micros),
            },
            Self::Concurrent(count) => Standing { used: *count, reset: Duration::ZERO },
            Self::Money { spent, reserved, .. } => Standing {
                used: spent.saturating_add(*reserved),
                reset: until_end(quantity, now.millis),
            },
        }
    }

    fn is_over(&mut self, now: Moment) -> bool {
        self.turn(now);
        match self {
            Self::Window(window, length, others) => {
                window.is_empty(*length, now.micros) && others.left(*length, now.micros) == 0
            }
            Self::Concurrent(count) => *count == 0,
            Self::Money { reserved, total, .. } => *total == 0 && *reserved == 0,
        }
    }

    fn amounts(&mut self, now: Moment) -> Amounts {
        match self {
            Self::Window(window, length, _) => Amounts::Window(window.ages(*length, now.micros)),
            Self::Concurrent(_) => Amounts::Places,
            Self::Money { spent, total, .. } => Amounts::Money { total: *total, spent: *spent },
        }
    }
}

/// Estimates for addresses: there may be any number of them, and nobody knows them before.
pub(super) enum Estimate {
    Rate(Rate),
    Inflight(Inflight),
}

impl Estimate {
    /// Of a quantity; none of money, which nobody owes who has no name.
    pub(super) fn new(quantity: Quantity) -> Option<Self> {
        match quantity {
            Quantity::Requests(window) | Quantity::Tokens(_, window) => Some(Self::Rate(
                Rate::new_with_estimator_config(window, ESTIMATE_ROWS, ESTIMATE_COLUMNS),
            )),
            Quantity::Concurrent => Some(Self::Inflight(Inflight::new())),
            Quantity::Money(_) => None,
        }
    }

    /// Takes an amount, if it fits. What is held as long as it goes on is given back by dropping it.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "estimates of counts that are far below 2^52"
    )]
    pub(super) fn take(
        &self,
        address: IpAddr,
        amount: u64,
        max: u64,
    ) -> Result<(Option<Arc<Guard>>, Standing), Exceeded> {
        let signed = isize::try_from(amount).unwrap_or(isize::MAX);
        match self {
            Self::Inflight(inflight) => {
                let (guard, count) = inflight.incr(address, signed);
                let used = u64::try_from(count).unwrap_or_default();
                let standing = Standing { used: used.min(max), reset: Duration::ZERO };
                if used > max {
                    return Err(Exceeded { standing, wait: Duration::from_secs(1) });
                }
                Ok((Some(Arc::new(guard)), standing))
            }
            Self::Rate(rate) => {
                let mut left = Duration::ZERO;
                let used = rate.rate_with(&address, |it| {
                    left =
                        it.interval.mul_f64((1.0 - it.current_interval_fraction).clamp(0.0, 1.0));
                    let before = it.prev_samples as f64 * (1.0 - it.current_interval_fraction);
                    before + it.curr_samples as f64
                });
                let used = used.max(0.0).round() as u64;
                let fits = amount == 0 || used.saturating_add(amount) <= max;
                if fits {
                    rate.observe(&address, signed);
                }
                let used = if fits { used + amount } else { used };
                let standing = Standing { used, reset: left };
                if fits { Ok((None, standing)) } else { Err(Exceeded { standing, wait: left }) }
            }
        }
    }

    /// Counts what was not known before.
    pub(super) fn add(&self, address: IpAddr, amount: u64) {
        if let Self::Rate(rate) = self {
            rate.observe(&address, isize::try_from(amount).unwrap_or(isize::MAX));
        }
    }

    /// Gives back what was taken `ago`: only in the time that it counts in, and never more than there is.
    pub(super) fn give_back(&self, address: IpAddr, amount: u64, ago: Duration) {
        let Self::Rate(rate) = self else { return };
        let known = rate.rate_with(&address, |it| {
            let counts =
                ago.as_secs_f64() <= it.interval.as_secs_f64() * it.current_interval_fraction;
            if counts { it.curr_samples as f64 } else { 0.0 }
        });
        #[allow(clippy::cast_possible_truncation, reason = "estimates that are far below 2^52")]
        let known = known.max(0.0) as isize;
        rate.observe(&address, -isize::try_from(amount).unwrap_or(isize::MAX).min(known));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Tokens;

    #[test]
    fn what_an_address_gives_back_is_no_credit() {
        let window = Duration::from_secs(600);
        let estimate = Estimate::new(Quantity::Tokens(Tokens::Total, window)).unwrap();
        let address = IpAddr::from([127, 0, 0, 1]);
        let take = |amount| estimate.take(address, amount, 1000).is_ok();
        assert!(take(1000));
        assert!(!take(1));
        // Of a time that is over nothing is given back.
        estimate.give_back(address, 1000, 3 * window);
        assert!(!take(1));
        // Given back at once it can be taken again; never more than that.
        estimate.give_back(address, 900, Duration::ZERO);
        assert!(take(900));
        assert!(!take(1));
        estimate.give_back(address, 5000, Duration::ZERO);
        assert!(take(1000));
        assert!(!take(1));
    }

    #[test]
    fn what_was_spent_before_the_start_is_not_added_to_what_others_have_heard_of() {
        let (counts, quantity) = (Counts::default(), Quantity::Money(Calendar::Month));
        let now = Moment { micros: 0, millis: 1_760_000_000_000 };
        counts.heard(1, quantity, 80, now);
        counts.restore(1, quantity, 80, now);
        assert_eq!(counts.money(1, quantity, now), [80, 80, 0]);
        counts.restore(1, quantity, 10, now);
        counts.add(1, quantity, 5, now);
        assert_eq!(counts.money(1, quantity, now), [95, 95, 0]);
    }

    #[test]
    fn what_others_took_counts_less_as_its_window_passes() {
        let (counts, quantity) = (Counts::default(), Quantity::Requests(Duration::from_secs(256)));
        let at = |seconds: u64| Moment { micros: seconds * 1_000_000, millis: 0 };
        assert!(counts.take(1, quantity, (30, 100), at(0)).is_ok());
        counts.heard(1, quantity, 90, at(0));
        let left = [0, 64, 128, 256, 999].map(|now| counts.of_others(1, quantity, at(now)));
        assert_eq!(left, [60, 45, 30, 0, 0]);
    }
}
