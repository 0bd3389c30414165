//! The ledger and the prices.

use std::path::PathBuf;
use std::sync::Arc;

use rust_decimal::Decimal;

use super::super::beside::Beside;
use super::super::defaults;
use super::super::file::{FileConfig, FileDecimal, FilePrices, FileTariff, FileTier};
use super::super::ledger::{Database, LedgerSpec};
use super::super::prices::{Price, Prices, Tariff, Tier};
use super::super::problem::{KeyPath, Problems};
use super::{Context, secret};
use crate::names::Pattern;
use crate::secret::Secret;

/// The largest number of tokens that prices can be for, so that costs stay exact.
const PER_MAX: u64 = 1_000_000_000;

/// Decimal places of a price, so that costs stay exact.
const SCALE_MAX: u32 = 9;

/// Where usage is kept, if it is.
pub(super) fn ledger(
    file: &FileConfig,
    context: &Context<'_>,
    problems: &mut Problems,
) -> Option<LedgerSpec> {
    let at = KeyPath::default().key("ledger");
    let written = file.ledger.as_ref();
    let is_enabled = written.and_then(|ledger| ledger.enabled);
    if !is_enabled.unwrap_or(written.is_some() || context.state_directory.is_some()) {
        return None;
    }
    let state_directory = match (&file.state_directory, &context.state_directory) {
        (Some(written), _) => context.files.folder.join(written),
        (None, Some(given)) => given.clone(),
        (None, None) => context.files.folder.join(defaults::STATE_DIRECTORY),
    };
    let inline = written.and_then(|ledger| ledger.database.as_ref());
    let in_file = written.and_then(|ledger| ledger.database_file.as_deref());
    let database = match secret("database", (inline, in_file), &at, context.files, problems) {
        None => Database::Sqlite(state_directory.join(defaults::LEDGER_FILE)),
        Some(url) => database(&url, context).unwrap_or_else(|| {
            problems.value(
                &at.key(if in_file.is_some() { "database_file" } else { "database" }),
                "expected postgres://user:password@host/database or sqlite:/path/to/file",
            );
            Database::Sqlite(PathBuf::new())
        }),
    };
    if written.is_some_and(|ledger| ledger.keep_days == Some(0)) {
        problems.value(&at.key("keep_days"), "must be more than 0");
    }
    if written.is_some_and(|ledger| ledger.queue_rows_max == Some(0)) {
        problems.value(&at.key("queue_rows_max"), "must be more than 0");
    }
    let queue = written.and_then(|ledger| ledger.queue_rows_max);
    let spool_bytes = written.and_then(|ledger| ledger.spool_bytes_max).map(|size| size.0);
    Some(LedgerSpec {
        database,
        spool: state_directory.join("spool"),
        keep_days: written.and_then(|ledger| ledger.keep_days),
        queue_rows_max: queue.unwrap_or(defaults::LEDGER_QUEUE_ROWS_MAX) as usize,
        spool_bytes_max: spool_bytes.unwrap_or(defaults::LEDGER_SPOOL_BYTES_MAX) as u64,
    })
}

fn database(url: &Secret, context: &Context<'_>) -> Option<Database> {
    let text = url.expose();
    if let Some(path) = text.strip_prefix("sqlite:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        return (!path.is_empty()).then(|| Database::Sqlite(context.files.folder.join(path)));
    }
    let is_postgres = text.starts_with("postgres://") || text.starts_with("postgresql://");
    let is_readable = || text.parse::<tokio_postgres::Config>().is_ok();
    (is_postgres && is_readable()).then(|| Database::Postgres(url.clone()))
}

/// What models cost: as the file says, and beside it the file of prices.
pub(super) fn prices(file: &FileConfig, beside: &Beside, problems: &mut Problems) -> Prices {
    let none = FilePrices::default();
    let at = KeyPath::default();
    let mut prices = Prices { currency: defaults::CURRENCY.into(), models: Vec::new() };
    if let Some(part) = &beside.prices {
        let mut own = Problems::default();
        read(&part.content, &at, &mut prices, &mut own);
        part.tell(own, problems);
    }
    // What stands in the configuration itself goes before what is in the file.
    let mut own = Prices { currency: Arc::clone(&prices.currency), models: Vec::new() };
    read(file.prices.as_ref().unwrap_or(&none), &at.key("prices"), &mut own, problems);
    own.models.append(&mut prices.models);
    own
}

fn read(written: &FilePrices, at: &KeyPath, prices: &mut Prices, problems: &mut Problems) {
    if let Some(currency) = &written.currency {
        if currency.trim().is_empty() {
            problems.value(&at.key("currency"), "cannot be empty");
        }
        prices.currency = currency.trim().into();
    }
    let per = written.per.unwrap_or(defaults::PRICES_PER);
    if per == 0 || per > PER_MAX || !is_power_of_ten(per) {
        problems.value(&at.key("per"), "expected 1, 1000, 1000000 or another power of ten");
        return;
    }
    for (name, tariff) in written.models.iter().flatten() {
        let at = at.key("models").key(name);
        if !Pattern::is_name(name) {
            problems.key(&at, "expected a model's name with at most one *");
        }
        if let Some(tariff) = self::tariff(tariff, &at, per, problems) {
            prices.models.push((name.clone(), Arc::new(tariff)));
        }
    }
}

/// Otherwise the price of a token has no end.
fn is_power_of_ten(mut number: u64) -> bool {
    while number > 1 && number.is_multiple_of(10) {
        number /= 10;
    }
    number == 1
}

/// The prices of a model or a backend, which are for `per` tokens.
pub(super) fn tariff(
    written: &FileTariff,
    at: &KeyPath,
    per: u64,
    problems: &mut Problems,
) -> Option<Tariff> {
    let FileTariff { input, output, cached, cache_written, tiers } = written;
    let written = FileTier {
        from: None,
        input: *input,
        output: *output,
        cached: *cached,
        cache_written: *cache_written,
    };
    let mut read = vec![Tier { from: 0, price: price(&written, None, at, per, problems)? }];
    for (index, tier) in tiers.iter().flatten().enumerate() {
        let at = at.key("tiers").index(index);
        let before = read.last().map_or(0, |tier| tier.from);
        match tier {
            Some(FileTier { from: Some(from), .. }) if *from <= before => {
                problems.value(&at.key("from"), "must be more than in the tier before");
            }
            Some(tier @ FileTier { from: Some(from), .. }) => {
                let outer = read.last().map(|tier| tier.price);
                let price = price(tier, outer, &at, per, problems)?;
                read.push(Tier { from: *from, price });
            }
            _ => problems.value(&at, "\"from\" is missing: from how many tokens of a month on"),
        }
    }
    Some(Tariff { tiers: read })
}

fn price(
    written: &FileTier,
    outer: Option<Price>,
    at: &KeyPath,
    per: u64,
    problems: &mut Problems,
) -> Option<Price> {
    let mut of = |key: &str, amount: Option<FileDecimal>| {
        let FileDecimal(amount) = amount?;
        if amount.scale() > SCALE_MAX {
            problems.value(&at.key(key), format!("at most {SCALE_MAX} decimal places"));
        }
        Some((amount / Decimal::from(per)).normalize())
    };
    let input = of("input", written.input).or(outer.map(|outer| outer.input));
    let output = of("output", written.output).or(outer.map(|outer| outer.output));
    let cached = of("cached", written.cached).or(outer.map(|outer| outer.cached));
    let cache_written = of("cache_written", written.cache_written);
    let cache_written = cache_written.or(outer.map(|outer| outer.cache_written));
    let Some(input) = input else {
        if !problems.has_below(at) {
            problems.value(at, "\"input\" is missing: what tokens of prompts cost");
        }
        return None;
    };
    Some(Price {
        input,
        // Embeddings have none.
        output: output.unwrap_or_default(),
        cached: cached.unwrap_or(input),
        cache_written: cache_written.unwrap_or(input),
    })
}
