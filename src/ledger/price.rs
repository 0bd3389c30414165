//! What an exchange costs, to the last digit.

use rust_decimal::Decimal;

use crate::config::{Price, Tariff};
use crate::llm::Usage;

/// The price that holds for a key which has taken so many tokens of the model in this month.
#[must_use]
pub fn price_after(tariff: &Tariff, month_tokens: u64) -> Price {
    let tier = tariff.tiers.iter().rev().find(|tier| tier.from <= month_tokens);
    tier.unwrap_or(&tariff.tiers[0]).price
}

/// What is left to be paid when so many tokens were paid for before: those of the prompt are taken first.
#[must_use]
pub fn without_reserved(usage: Usage, reserved: u64) -> Usage {
    let mut left = reserved;
    let mut take = |tokens: u64| {
        let taken = tokens.min(left);
        left -= taken;
        tokens - taken
    };
    let plain = take(usage.input.saturating_sub(usage.cached).saturating_sub(usage.cache_written));
    let cache_written = take(usage.cache_written);
    let cached = take(usage.cached);
    let output = take(usage.output);
    Usage { input: plain + cache_written + cached, output, cached, cache_written, ..usage }
}

/// What tokens cost. Exact as long as prices have at most 18 digits.
#[must_use]
pub fn cost(price: &Price, usage: Usage) -> Decimal {
    let plain = usage.input.saturating_sub(usage.cached).saturating_sub(usage.cache_written);
    let parts = [
        (plain, price.input),
        (usage.cached, price.cached),
        (usage.cache_written, price.cache_written),
        (usage.output, price.output),
    ];
    parts
        .iter()
        .map(|(tokens, price)| Decimal::from(*tokens).saturating_mul(*price))
        .fold(Decimal::ZERO, Decimal::saturating_add)
        .normalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Tier;

    fn decimal(text: &str) -> Decimal {
        text.parse().unwrap()
    }

    fn price(input: &str, output: &str, cached: &str) -> Price {
        let [input, output, cached] = [input, output, cached].map(decimal);
        Price { input, output, cached, cache_written: input }
    }

    #[test]
    fn a_cost_is_exact_to_the_last_digit() {
        // 2.50, 10 and 1.25 for a million.
        let price = price("0.0000025", "0.00001", "0.00000125");
        let usage = Usage { input: 1_000_003, output: 7, cached: 999_999, ..Usage::default() };
        assert_eq!(cost(&price, usage), decimal("1.25007875"));
        assert_eq!(cost(&price, Usage::default()), Decimal::ZERO);
        let written = Usage { input: 10, cache_written: 10, ..Usage::default() };
        let price = Price { cache_written: decimal("0.5"), ..price };
        assert_eq!(cost(&price, written), decimal("5"));
    }

    #[test]
    fn the_tier_that_a_key_has_reached_counts() {
        let tier = |from, input| Tier { from, price: price(input, "0", "0") };
        let tariff = Tariff { tiers: vec![tier(0, "3"), tier(100, "2"), tier(200, "1")] };
        for (tokens, input) in
            [(0, "3"), (99, "3"), (100, "2"), (199, "2"), (200, "1"), (9999, "1")]
        {
            assert_eq!(price_after(&tariff, tokens).input, decimal(input), "{tokens}");
        }
    }

    #[test]
    fn what_was_paid_for_before_is_used_up_first() {
        let usage = Usage { input: 100, output: 50, cached: 30, cache_written: 10, reasoning: 5 };
        assert_eq!(without_reserved(usage, 0), usage);
        let rest = without_reserved(usage, 65);
        assert_eq!((rest.input, rest.cache_written, rest.cached, rest.output), (35, 5, 30, 50));
        let rest = without_reserved(usage, 110);
        assert_eq!((rest.input, rest.output), (0, 40));
        assert_eq!(without_reserved(usage, 1000).total(), 0);
    }
}
