//! Who took how much since the start: what keys are shown by.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use rust_decimal::Decimal;

use super::record::Taken;

/// Keys are spread over so many locks.
const PARTS: usize = 16;

/// Keys of one part, at most: tokens of others may name any number of people. Further ones are not shown.
const KEYS_MAX: usize = 1024;

/// What keys have taken.
#[derive(Debug, Default)]
pub struct Takers([Mutex<HashMap<Arc<str>, Taker>>; PARTS]);

/// What one key has taken.
#[derive(Clone, Debug)]
pub struct Taker {
    /// Its id.
    pub id: Arc<str>,
    /// Who has it.
    pub name: Arc<str>,
    /// Exchanges.
    pub requests: u64,
    /// Tokens of prompts.
    pub tokens_input: u64,
    /// Tokens of answers.
    pub tokens_output: u64,
    /// What is known to have been paid.
    pub cost: Decimal,
    /// In this currency.
    pub currency: Arc<str>,
}

impl Takers {
    /// A key has taken something.
    pub fn count(&self, id: &Arc<str>, name: &Arc<str>, taken: &Taken) {
        let part = xxhash_rust::xxh3::xxh3_64(id.as_bytes()) as usize % PARTS;
        let mut keys = self.0[part].lock().unwrap_or_else(PoisonError::into_inner);
        if keys.len() >= KEYS_MAX && !keys.contains_key(id) {
            return;
        }
        let taker = keys.entry(Arc::clone(id)).or_insert_with(|| Taker {
            id: Arc::clone(id),
            name: Arc::clone(name),
            requests: 0,
            tokens_input: 0,
            tokens_output: 0,
            cost: Decimal::ZERO,
            currency: Arc::clone(&taken.currency),
        });
        if taker.currency != taken.currency {
            // Amounts of two currencies make no sum.
            taker.cost = Decimal::ZERO;
            taker.currency = Arc::clone(&taken.currency);
        }
        taker.requests += 1;
        taker.tokens_input += taken.input;
        taker.tokens_output += taken.output;
        taker.cost = taker.cost.saturating_add(taken.cost.unwrap_or_default());
    }

    /// Those who have taken the most: by tokens, and by cost.
    #[must_use]
    pub fn top(&self, most: usize) -> Vec<Taker> {
        let part = |part: &Mutex<HashMap<Arc<str>, Taker>>| {
            let keys = part.lock().unwrap_or_else(PoisonError::into_inner);
            keys.values().cloned().collect::<Vec<_>>()
        };
        let mut all: Vec<Taker> = self.0.iter().flat_map(part).collect();
        let by_tokens = |taker: &Taker| taker.tokens_input + taker.tokens_output;
        all.sort_by(|a, b| {
            b.cost.cmp(&a.cost).then(by_tokens(b).cmp(&by_tokens(a))).then(a.id.cmp(&b.id))
        });
        all.truncate(most);
        all
    }
}
