//! How much of its limits an exchange takes, and what its client is told of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderName, HeaderValue};
use smallvec::SmallVec;

use super::exchange::{Admitted, Exchange};
use super::meter;
use crate::config::KeySpec;
use crate::ledger::{self, Month, Months};
use crate::limits::{Ask, Shown, Tightest};
use crate::llm::Usage;
use crate::refusal::Refusal;
use crate::telemetry::Phase;
use crate::writing::push_decimal;

/// What clients are told in, in OpenAI's words.
const PREFIX: &str = "x-ratelimit-";

const REQUESTS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];

const TOKENS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// Reserves what the exchange may take.
///
/// # Errors
/// When a limit does not allow it.
pub(super) async fn reserve(
    months: &Arc<Months>,
    exchange: &mut Exchange,
    admitted: &Admitted,
) -> Result<(), Refusal> {
    let runtime = &exchange.arrived.runtime;
    let grant = &admitted.rights.grant;
    let (service, model) = meter::model(admitted);
    let (input, output) = match &exchange.metering {
        Some(metering) => metering.estimate(runtime.snapshot.output_tokens_assumed),
        None => (0, 0),
    };
    let month = || Month::of(ledger::now());
    let paid = grant.reserved_tokens;
    let held = (paid > 0).then(|| months.hold(month(), &grant.key_id, input + output, paid));
    let usage = Usage { input, output, ..Usage::default() };
    let usage = ledger::without_reserved(usage, held.as_ref().map_or(0, |held| held.tokens));
    exchange.held = held;
    let cost = || meter::cost_before((months, month()), runtime, admitted, usage);
    let ask = Ask {
        key: &grant.key_id,
        limits_of: &grant.limits_of,
        name: &grant.name,
        is_shared: grant.key_id.is_empty() || *grant.key_id == *KeySpec::GLOBAL,
        address: admitted.client.address,
        service,
        model,
        own_model: admitted.to().names().1,
        input,
        output,
        cost: &cost,
        holds: &|when| exchange.hooks.holds(when),
    };
    // Without Redis nothing is waited for.
    if runtime.snapshot.redis.is_some() {
        exchange.phases.turn(Phase::Limits, Instant::now());
    }
    let reserved = runtime.limits.reserve(&ask, &mut exchange.shown).await;
    exchange.phases.turn(Phase::Own, Instant::now());
    exchange.reservation = reserved?;
    Ok(())
}

/// Tells the client how its tightest limits stand. What a backend says of its own is not the client's business then.
pub(super) fn tell(headers: &mut HeaderMap, shown: &Shown) {
    if *shown == Shown::default() {
        return;
    }
    let is_own = |name: &&HeaderName| name.as_str().starts_with(PREFIX);
    let own: SmallVec<[HeaderName; 8]> = headers.keys().filter(is_own).cloned().collect();
    for name in &own {
        headers.remove(name);
    }
    for (names, tightest) in [(REQUESTS, shown.requests), (TOKENS, shown.tokens)] {
        let Some(Tightest { limit, remaining, reset }) = tightest else { continue };
        let [of_limit, of_remaining, of_reset] = names;
        headers.insert(of_limit, HeaderValue::from(limit));
        headers.insert(of_remaining, HeaderValue::from(remaining));
        headers.insert(of_reset, duration(reset));
    }
}

/// A time as OpenAI's API writes it: `12ms`, `1s`, `6m0s`.
fn duration(time: Duration) -> HeaderValue {
    let millis = u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
    let mut text = SmallVec::<[u8; 32]>::new();
    let (minutes, rest) = (millis / 60_000, millis % 60_000);
    let (hours, minutes) = (minutes / 60, minutes % 60);
    if hours > 0 {
        push_decimal(&mut text, hours, 1);
        text.push(b'h');
    }
    if hours > 0 || minutes > 0 {
        push_decimal(&mut text, minutes, 1);
        text.push(b'm');
    }
    if millis < 1000 {
        push_decimal(&mut text, millis, 1);
        text.push(b'm');
    } else {
        push_decimal(&mut text, rest / 1000, 1);
        if rest % 1000 > 0 {
            text.push(b'.');
            push_decimal(&mut text, rest % 1000, 3);
        }
    }
    text.push(b's');
    HeaderValue::from_bytes(&text).expect("digits and letters can stand in a header")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_clients_read_them() {
        for (millis, text) in [
            (0, "0ms"),
            (12, "12ms"),
            (1000, "1s"),
            (1250, "1.250s"),
            (60_000, "1m0s"),
            (360_001, "6m0.001s"),
            (3_600_000, "1h0m0s"),
        ] {
            assert_eq!(duration(Duration::from_millis(millis)), text);
        }
        assert_eq!(duration(Duration::from_nanos(1)), "1ms");
    }
}
