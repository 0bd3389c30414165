//! How long an LLM server asks to be left alone: `Retry-After` and what providers send beside it.

use std::time::Duration;

use http::HeaderMap;

/// Larger numbers in `x-ratelimit-reset` are times since 1970, not seconds from now.
const EPOCH_FROM_SECONDS: f64 = 30.0 * 86_400.0;

/// Headers that hold milliseconds: OpenAI's and Azure's.
const MILLISECONDS: [&str; 2] = ["retry-after-ms", "x-ms-retry-after-ms"];

/// When each of a provider's limits is whole again; the first of them is what a client waits for.
const RESETS: [&str; 4] = [
    "x-ratelimit-reset-requests",
    "x-ratelimit-reset-tokens",
    "x-ratelimit-reset-requests-day",
    "x-ratelimit-reset-tokens-minute",
];

/// The pause that a response asks for, at `now`, the time since 1970. The most exact word wins:
/// `Retry-After` in seconds or as a date, then milliseconds, then the limits' resets. Those stand in
/// every answer; they are a wish only in one that `is_limited`.
#[must_use]
pub fn pause(headers: &HeaderMap, is_limited: bool, now: Duration) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let seconds = |text: &str| text.parse::<f64>().ok().and_then(of_seconds);
    if let Some(retry_after) = text("retry-after") {
        let pause = seconds(retry_after).or_else(|| until_date(retry_after, now));
        if pause.is_some() {
            return pause;
        }
    }
    let milliseconds =
        MILLISECONDS.iter().find_map(|name| of_seconds(text(name)?.parse::<f64>().ok()? / 1000.0));
    if milliseconds.is_some() || !is_limited {
        return milliseconds;
    }
    if let Some(reset) = text("x-ratelimit-reset").and_then(|reset| reset.parse::<f64>().ok()) {
        let from_now = if reset > EPOCH_FROM_SECONDS { reset - now.as_secs_f64() } else { reset };
        return of_seconds(from_now.max(0.0));
    }
    RESETS.iter().filter_map(|name| go_duration(text(name)?)).min()
}

fn of_seconds(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds).ok()
}

/// The time to an HTTP date (RFC 9110, section 5.6.7).
fn until_date(text: &str, now: Duration) -> Option<Duration> {
    let at = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok()?;
    let at = Duration::from_secs(u64::try_from(at.as_second()).ok()?);
    Some(at.saturating_sub(now))
}

/// Reads a duration as Go writes it, which OpenAI's headers hold: `1s`, `6m0s`, `20ms`, `1h2m3.5s`.
fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|byte: char| !byte.is_ascii_digit() && byte != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|byte: char| byte.is_ascii_digit()).unwrap_or(rest.len());
        total += number
            * match &rest[..unit] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 0.001,
                "us" | "µs" => 0.000_001,
                "ns" => 0.000_000_001,
                _ => return None,
            };
        rest = &rest[unit..];
    }
    (!text.is_empty()).then(|| of_seconds(total))?
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn of(headers: &[(&'static str, &'static str)]) -> Option<f64> {
        asked(headers, true)
    }

    fn asked(headers: &[(&'static str, &'static str)], is_limited: bool) -> Option<f64> {
        let now = Duration::from_secs(1_800_000_000);
        let map = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        pause(&map, is_limited, now).map(|pause| pause.as_secs_f64())
    }

    #[test]
    fn every_way_of_asking_is_understood() {
        for (headers, seconds) in [
            (&[("retry-after", "7")][..], Some(7.0)),
            (&[("retry-after", "0.5")], Some(0.5)),
            (&[("retry-after", "Fri, 15 Jan 2027 08:00:09 GMT")], Some(9.0)),
            (&[("retry-after", "Fri, 15 Jan 2016 08:00:09 GMT")], Some(0.0)),
            (&[("retry-after", "soon"), ("retry-after-ms", "250")], Some(0.25)),
            (&[("retry-after", "2"), ("retry-after-ms", "250")], Some(2.0)),
            (&[("x-ms-retry-after-ms", "1500")], Some(1.5)),
            (&[("x-ratelimit-reset", "30")], Some(30.0)),
            (&[("x-ratelimit-reset", "1800000012")], Some(12.0)),
            (
                &[("x-ratelimit-reset-tokens", "6m0s"), ("x-ratelimit-reset-requests", "1.5s")],
                Some(1.5),
            ),
            (&[("x-ratelimit-reset-tokens", "120ms")], Some(0.12)),
            (&[("x-ratelimit-reset-tokens", "1h2m3s")], Some(3723.0)),
            (&[("retry-after", "-1")], None),
            (&[("retry-after", "1e300")], None),
            (&[("x-ratelimit-reset-tokens", "6 minutes")], None),
            (&[("x-ratelimit-reset-tokens", "")], None),
            (&[], None),
        ] {
            assert_eq!(of(headers), seconds, "{headers:?}");
        }
    }

    #[test]
    fn the_limits_of_an_answer_that_is_not_limited_ask_for_nothing() {
        assert_eq!(asked(&[("x-ratelimit-reset-requests", "12s")], false), None);
        assert_eq!(asked(&[("x-ratelimit-reset", "30")], false), None);
        assert_eq!(asked(&[("retry-after", "7"), ("x-ratelimit-reset", "30")], false), Some(7.0));
        assert_eq!(asked(&[("retry-after-ms", "250")], false), Some(0.25));
    }

    #[test]
    fn no_text_makes_it_panic() {
        proptest::proptest!(|(text in "[ -~]{0,20}|([0-9.]{0,3}(h|m|s|ms|us)){0,4}")| {
            let value = HeaderValue::from_str(&text).unwrap();
            for name in ["retry-after", "x-ratelimit-reset", "x-ratelimit-reset-tokens"] {
                let mut headers = HeaderMap::new();
                headers.insert(name, value.clone());
                let _ = pause(&headers, true, Duration::from_secs(1));
            }
        });
    }
}
