//! What tokens cost, as it is configured.

use std::sync::Arc;

use rust_decimal::Decimal;

/// What models cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prices {
    /// What the prices are in: a word for people and for the ledger.
    pub currency: Arc<str>,
    /// By a model's own name, `service/model`, also with a wildcard.
    pub models: Vec<(String, Arc<Tariff>)>,
}

/// What a model's tokens cost, the more of them there are in a month.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tariff {
    /// At least one, in the order of `from`; the first one is from 0 on.
    pub tiers: Vec<Tier>,
}

/// Prices that hold from so many tokens on that a key has taken of a model in a month.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tier {
    /// Tokens of that month before the exchange.
    pub from: u64,
    /// What a token costs then.
    pub price: Price,
}

/// What one token costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Price {
    /// Of a prompt.
    pub input: Decimal,
    /// Of an answer.
    pub output: Decimal,
    /// Of a prompt, read from a cache.
    pub cached: Decimal,
    /// Of a prompt, written to a cache.
    pub cache_written: Decimal,
}
