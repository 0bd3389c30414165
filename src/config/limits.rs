//! Limits, as they are configured.

use std::sync::Arc;
use std::time::Duration;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

use crate::expression::Expression;
use crate::names::NameList;

/// One limit: so much of something in a time, for each of what it is counted by.
#[derive(Clone, Debug, PartialEq)]
pub struct LimitSpec {
    /// What it is called, in refusals, logs and status. Counts go on through a reload by it.
    pub name: Arc<str>,
    /// What has a count of its own.
    pub per: Per,
    /// Keys that it holds for, by name or id; none: all clients.
    pub keys: Option<NameList>,
    /// Models that it holds for, by their own name or as `service/model`; none: all.
    pub models: Option<NameList>,
    /// Services that it holds for; none: all.
    pub services: Option<NameList>,
    /// What is limited.
    pub quantity: Quantity,
    /// How much of it there may be: money in billionths.
    pub max: u64,
    /// Whether it only counts and refuses nothing.
    pub shadow: bool,
    /// For which requests it holds; none: all.
    pub when: Option<Expression>,
}

/// What has a count of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Per {
    /// Each key.
    Key,
    /// Each key; clients that have none of their own by their address.
    Client,
    /// Each address.
    Address,
    /// Each model.
    Model,
    /// Each service.
    Service,
    /// Each model of each key.
    KeyAndModel,
    /// All together.
    All,
}

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// Requests in a window.
    Requests(Duration),
    /// Tokens in a window.
    Tokens(Tokens, Duration),
    /// Exchanges at the same time.
    Concurrent,
    /// What exchanges cost in a day or month (UTC).
    Money(Calendar),
}

/// Which tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tokens {
    /// Those of prompts.
    Input,
    /// Those of answers.
    Output,
    /// Both.
    Total,
}

/// A time of the calendar (UTC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calendar {
    /// From midnight to midnight.
    Day,
    /// From the first of a month to that of the next one.
    Month,
}

/// The shares that money is counted in for a limit.
pub const MONEY_UNITS: u64 = 1_000_000_000;

impl Calendar {
    /// When the time of the calendar began that a moment is in; both in milliseconds since 1970.
    #[must_use]
    pub fn begin(self, millis: i64) -> i64 {
        start(self.first(millis))
    }

    /// When it is over, in milliseconds since 1970.
    #[must_use]
    pub fn end(self, millis: i64) -> i64 {
        let first = self.first(millis);
        let next = match self {
            Self::Day => first.checked_add(1.day()),
            Self::Month => first.checked_add(1.month()),
        };
        next.map_or(i64::MAX, start)
    }

    fn first(self, millis: i64) -> Date {
        let time = Timestamp::from_millisecond(millis).unwrap_or_default();
        let day = time.to_zoned(TimeZone::UTC).date();
        match self {
            Self::Day => day,
            Self::Month => day.first_of_month(),
        }
    }
}

fn start(day: Date) -> i64 {
    day.to_zoned(TimeZone::UTC).map_or(0, |day| day.timestamp().as_millisecond())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_and_months_begin_and_end_at_midnight_utc() {
        let now: i64 = "2026-02-28T23:59:59.500Z".parse::<Timestamp>().unwrap().as_millisecond();
        let shown = |millis| Timestamp::from_millisecond(millis).unwrap().to_string();
        assert_eq!(shown(Calendar::Day.begin(now)), "2026-02-28T00:00:00Z");
        assert_eq!(shown(Calendar::Month.begin(now)), "2026-02-01T00:00:00Z");
        for calendar in [Calendar::Day, Calendar::Month] {
            assert_eq!(shown(calendar.end(now)), "2026-03-01T00:00:00Z");
            assert_eq!(calendar.begin(now + 500), now + 500);
        }
    }
}
