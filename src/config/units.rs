//! Values with units as people write them: durations and sizes.

use std::fmt;
use std::time::Duration;

use serde::de::{Deserialize, Deserializer, Error, Visitor};

/// Longest duration a configuration can hold: longer ones are typing mistakes.
const SECONDS_MAX: f64 = 30.0 * 86_400.0;

/// A duration: `500ms`, `30s`, `5m`, `1h`, or a plain number of seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Span(pub(super) Duration);

/// A size: `512`, `64KiB`, `32MiB`, `1GiB`, in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Size(pub(super) usize);

impl Span {
    /// Reads a duration, or says what would be one.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        const WRONG: &str = "expected a duration such as 500ms, 30s, 5m or 1h";
        let text = text.trim();
        let digits = text.trim_end_matches(|last: char| last.is_ascii_alphabetic());
        let factor = match &text[digits.len()..] {
            "" | "s" => 1.0,
            "ms" => 0.001,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(WRONG),
        };
        let number: f64 = digits.trim().parse().map_err(|_| WRONG)?;
        Self::of_seconds(number * factor)
    }

    /// A duration from a number of seconds.
    pub(super) fn of_seconds(seconds: f64) -> Result<Self, &'static str> {
        if !seconds.is_finite() || seconds < 0.0 {
            return Err("expected a duration of 0 or more");
        }
        if seconds > SECONDS_MAX {
            return Err("expected a duration of at most 30 days");
        }
        Ok(Self(Duration::from_secs_f64(seconds)))
    }
}

impl Size {
    fn parse(text: &str) -> Result<Self, &'static str> {
        const WRONG: &str = "expected a size such as 512, 64KiB, 32MiB or 1GiB";
        let text = text.trim();
        let digits = text.trim_end_matches(|last: char| last.is_ascii_alphabetic());
        let factor: usize = match &text[digits.len()..] {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return Err(WRONG),
        };
        let number: usize = digits.trim().parse().map_err(|_| WRONG)?;
        number.checked_mul(factor).map(Self).ok_or(WRONG)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SpanVisitor;
        #[allow(clippy::cast_precision_loss, reason = "durations are far below 2^52 seconds")]
        impl Visitor<'_> for SpanVisitor {
            type Value = Span;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration such as 30s")
            }

            fn visit_i64<E: Error>(self, seconds: i64) -> Result<Span, E> {
                Span::of_seconds(seconds as f64).map_err(E::custom)
            }

            fn visit_u64<E: Error>(self, seconds: u64) -> Result<Span, E> {
                Span::of_seconds(seconds as f64).map_err(E::custom)
            }

            fn visit_f64<E: Error>(self, seconds: f64) -> Result<Span, E> {
                Span::of_seconds(seconds).map_err(E::custom)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Span, E> {
                Span::parse(text).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(SpanVisitor)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as 64KiB")
            }

            fn visit_i64<E: Error>(self, bytes: i64) -> Result<Size, E> {
                usize::try_from(bytes)
                    .map(Size)
                    .map_err(|_| E::custom("expected a size of 0 or more"))
            }

            fn visit_u64<E: Error>(self, bytes: u64) -> Result<Size, E> {
                usize::try_from(bytes).map(Size).map_err(|_| E::custom("the size is too large"))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Size, E> {
                Size::parse(text).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_are_read_as_written() {
        let millis = |text| Span::parse(text).map(|span| span.0.as_millis());
        assert_eq!(millis("500ms"), Ok(500));
        assert_eq!(millis("30"), Ok(30_000));
        assert_eq!(millis("2.5s"), Ok(2_500));
        assert_eq!(millis("5m"), Ok(300_000));
        assert_eq!(millis("1 h"), Ok(3_600_000));
        for wrong in ["", "s", "-1s", "1d", "1e99", "NaN", "50000m", "1 s s"] {
            assert!(Span::parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!(Size::parse("64KiB"), Ok(Size(65_536)));
        for wrong in ["", "64KB", "-1", "1.5MiB", "99999999999GiB"] {
            assert!(Size::parse(wrong).is_err(), "{wrong}");
        }
    }
}
