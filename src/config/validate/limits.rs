//! Limits: for all, and of a key.

use std::collections::HashSet;
use std::time::Duration;

use rust_decimal::Decimal;
use rust_decimal::prelude::ToPrimitive;

use super::super::defaults;
use super::super::file::{FileDecimal, FileLimit, FilePer};
use super::super::limits::{Calendar, LimitSpec, MONEY_UNITS, Per, Quantity, Tokens};
use super::super::problem::{KeyPath, Problems};
use super::hooks::expression;
use super::keys::names;
use super::positive;
use crate::expression::{Gives, Moment};

/// The longest window: what is longer is a budget's.
const WINDOW_MAX: Duration = Duration::from_secs(86_400);

/// Why none of something is no limit.
const SHUT_OUT: &str = "must be more than 0; who may pass is for keys and addresses";

/// The limits of a list. Those of a key count by it.
pub(super) fn limits(
    written: &[Option<FileLimit>],
    at: &KeyPath,
    is_of_key: bool,
    problems: &mut Problems,
) -> Vec<LimitSpec> {
    let mut specs: Vec<LimitSpec> = Vec::new();
    for (index, limit) in written.iter().enumerate() {
        let at = at.index(index);
        match limit {
            Some(limit) => read(limit, &at, is_of_key, &mut specs, problems),
            None if problems.has_below(&at) => {}
            None => problems.value(&at, "expected a limit, found nothing"),
        }
    }
    let mut names = HashSet::new();
    for (index, limit) in written.iter().enumerate() {
        let name = limit.as_ref().and_then(|limit| limit.name.as_deref());
        if name.is_some_and(|name| !names.insert(name)) {
            problems.value(&at.index(index).key("name"), "another limit of the list has this name");
        }
    }
    // What counts differently is told apart by its name.
    let mut seen = HashSet::new();
    for spec in &mut specs {
        let mut name = spec.name.to_string();
        let mut count = 1;
        while !seen.insert((name.clone(), format!("{:?}", spec.quantity))) {
            count += 1;
            name = format!("{} {count}", spec.name);
        }
        spec.name = name.into();
    }
    specs
}

fn read(
    limit: &FileLimit,
    at: &KeyPath,
    is_of_key: bool,
    specs: &mut Vec<LimitSpec>,
    problems: &mut Problems,
) {
    let per = match (limit.per, is_of_key) {
        (Some(per), false) => read_per(per),
        (Some(FilePer::KeyModel), true) => Per::KeyAndModel,
        (None | Some(FilePer::Key), true) => Per::Key,
        (Some(_), true) => {
            problems.value(&at.key("per"), "a key's own limits are per key or key+model");
            Per::Key
        }
        (None, false) => {
            if !problems.has_below(&at.key("per")) {
                problems.value(
                    at,
                    "\"per\" is missing: key, client, address, model, service, key+model or all",
                );
            }
            return;
        }
    };
    if is_of_key && limit.keys.is_some() {
        problems.key(&at.key("keys"), "is for limits under \"limits\" at the top");
    }
    let window = positive(limit.window, &at.key("window"), defaults::LIMIT_WINDOW, problems);
    if window > WINDOW_MAX {
        problems.value(&at.key("window"), "at most 24h; for longer times there are budgets");
    }
    let before = specs.len();
    let spec = LimitSpec {
        name: limit.name.clone().unwrap_or_else(|| word(per).to_owned()).into(),
        per,
        keys: names(limit.keys.as_ref(), &at.key("keys"), problems),
        models: names(limit.models.as_ref(), &at.key("models"), problems),
        services: names(limit.services.as_ref(), &at.key("services"), problems),
        quantity: Quantity::Concurrent,
        max: 0,
        shadow: limit.shadow.unwrap_or(false),
        when: limit.when.as_ref().and_then(|text| {
            expression(text, &at.key("when"), Moment::Request, Gives::Condition, problems)
        }),
    };
    for (quantity, max) in amounts(limit, window, at, problems) {
        specs.push(LimitSpec { quantity, max, ..spec.clone() });
    }
    let budgets = [
        ("budget_daily", Calendar::Day, limit.budget_daily),
        ("budget_monthly", Calendar::Month, limit.budget_monthly),
    ];
    for (key, calendar, amount) in budgets {
        let Some(amount) = amount else { continue };
        if limit.when.is_some() {
            let message =
                "a budget is read from the ledger at the start, which knows no conditions";
            problems.key(&at.key("when"), message);
        }
        if matches!(per, Per::Address | Per::Client) {
            problems.key(&at.key(key), "a budget is for a key; write per: key");
        }
        match shares(amount) {
            Some(max) => {
                specs.push(LimitSpec { quantity: Quantity::Money(calendar), max, ..spec.clone() })
            }
            None => problems.value(&at.key(key), "more money than there is"),
        }
    }
    if specs.len() == before && !problems.has_below(at) {
        problems.value(at, "limits nothing; write requests, tokens, concurrent or budget_monthly");
    }
}

/// How much of what is limited, but money.
fn amounts(
    limit: &FileLimit,
    window: Duration,
    at: &KeyPath,
    problems: &mut Problems,
) -> Vec<(Quantity, u64)> {
    let written = [
        ("requests", Quantity::Requests(window), limit.requests),
        ("tokens", Quantity::Tokens(Tokens::Total, window), limit.tokens),
        ("tokens_input", Quantity::Tokens(Tokens::Input, window), limit.tokens_input),
        ("tokens_output", Quantity::Tokens(Tokens::Output, window), limit.tokens_output),
        ("concurrent", Quantity::Concurrent, limit.concurrent),
    ];
    let mut amounts = Vec::new();
    for (key, quantity, max) in written {
        let Some(max) = max else { continue };
        if max == 0 {
            problems.value(&at.key(key), SHUT_OUT);
        }
        amounts.push((quantity, max));
    }
    amounts
}

fn read_per(per: FilePer) -> Per {
    match per {
        FilePer::Key => Per::Key,
        FilePer::Client => Per::Client,
        FilePer::Address => Per::Address,
        FilePer::Model => Per::Model,
        FilePer::Service => Per::Service,
        FilePer::KeyModel => Per::KeyAndModel,
        FilePer::All => Per::All,
    }
}

fn word(per: Per) -> &'static str {
    match per {
        Per::Key => "per key",
        Per::Client => "per client",
        Per::Address => "per address",
        Per::Model => "per model",
        Per::Service => "per service",
        Per::KeyAndModel => "per key and model",
        Per::All => "of all",
    }
}

/// Money in the shares that it is counted in.
fn shares(FileDecimal(amount): FileDecimal) -> Option<u64> {
    let shares = amount.checked_mul(Decimal::from(MONEY_UNITS))?.ceil().to_u64()?;
    // With what exchanges in flight may add, it stays far from the largest number.
    (shares < u64::MAX / 4).then_some(shares)
}
