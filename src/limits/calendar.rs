//! Days and months (UTC).

use std::time::Duration;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

use crate::config::{Calendar, Quantity};

/// When the time of the calendar began that a moment is in; both in milliseconds since 1970.
pub(super) fn begin(calendar: Calendar, millis: i64) -> i64 {
    start(first(calendar, millis))
}

/// How long until the time of the calendar is over that a quantity is counted in.
pub(super) fn end(quantity: Quantity, millis: i64) -> Duration {
    let Quantity::Money(calendar) = quantity else { return Duration::ZERO };
    let first = first(calendar, millis);
    let next = match calendar {
        Calendar::Day => first.checked_add(1.day()),
        Calendar::Month => first.checked_add(1.month()),
    };
    let left = next.map_or(0, start) - millis;
    Duration::from_millis(u64::try_from(left).unwrap_or_default())
}

fn first(calendar: Calendar, millis: i64) -> Date {
    let time = Timestamp::from_millisecond(millis).unwrap_or_default();
    let day = time.to_zoned(TimeZone::UTC).date();
    match calendar {
        Calendar::Day => day,
        Calendar::Month => day.first_of_month(),
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
        assert_eq!(shown(begin(Calendar::Day, now)), "2026-02-28T00:00:00Z");
        assert_eq!(shown(begin(Calendar::Month, now)), "2026-02-01T00:00:00Z");
        for calendar in [Calendar::Day, Calendar::Month] {
            assert_eq!(end(Quantity::Money(calendar), now), Duration::from_millis(500));
            assert_eq!(begin(calendar, now + 500), now + 500);
        }
    }
}
