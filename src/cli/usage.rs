//! `tollgate usage`: sums over the ledger, as a table, CSV or JSON.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use clap::{Args, ValueEnum};

use crate::config::ClientKeys;
use crate::hooks::HookKinds;
use crate::ledger::{self, Dimension, Line, Query};

#[derive(Args)]
pub(super) struct UsageArgs {
    /// What has a line of its own, separated by commas: key, user, service, model, backend, day, month, status
    #[arg(long, value_name = "WHAT,...", default_value = "user,model")]
    by: String,
    /// From when on: 7d, 24h, today, month, 2026-01-31 (from its beginning, UTC) or 2026-01-31T12:00:00Z
    #[arg(long, value_name = "WHEN", default_value = "month")]
    since: String,
    /// Until when, written likewise [default: now]
    #[arg(long, value_name = "WHEN")]
    until: Option<String>,
    /// Of the key with this id, or else of this name, alone
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// What costs are summed up in; what has no price in it counts as unpriced [default: that of the configuration]
    #[arg(long, value_name = "CURRENCY")]
    currency: Option<String>,
    /// How it is printed
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Table,
    Csv,
    Json,
}

pub(super) fn run(args: &UsageArgs, given: Option<&Path>, kinds: &HookKinds) -> Result<()> {
    let found = super::find(given, kinds)?;
    let Some(spec) = &found.snapshot.ledger else {
        bail!("the configuration has no ledger; write \"ledger: {{}}\" into it");
    };
    if !ledger::exists(spec) {
        bail!("there is no ledger yet: it begins with the first exchange (see state_directory)");
    }
    let now = ledger::now();
    let moment = |option: &str, text: &str| {
        ledger::moment(text, now).ok_or_else(|| {
            anyhow!("{option}: expected 7d, 24h, today, month, 2026-01-31 or 2026-01-31T12:00:00Z")
        })
    };
    let query = Query {
        since: moment("--since", &args.since)?,
        until: args.until.as_deref().map_or(Ok(now + 1), |until| moment("--until", until))?,
        by: Dimension::parse_list(&args.by).map_err(|why| anyhow!("--by: {why}"))?,
        key_id: args.key.as_deref().map(|key| key_id(key, &found.snapshot.clients)).transpose()?,
        currency: match &args.currency {
            Some(currency) => currency.as_str().into(),
            None => Arc::clone(&found.snapshot.prices.currency),
        },
    };
    let lines = ledger::report(spec, &query)?;
    let text = match args.format {
        Format::Table => table(&query, &lines),
        Format::Csv => csv(&query, &lines),
        Format::Json => {
            let report = ledger::as_json(&query, &lines, &found.snapshot.clients);
            format!("{}\n", serde_json::to_string_pretty(&report)?)
        }
    };
    print!("{text}");
    Ok(())
}

/// The columns of numbers.
const NUMBERS: [&str; 8] =
    ["exchanges", "input", "output", "cached", "reserved", "cost", "unpriced", "estimated"];

fn numbers(line: &Line) -> [String; 8] {
    [
        line.exchanges.to_string(),
        line.tokens_input.to_string(),
        line.tokens_output.to_string(),
        line.tokens_cached.to_string(),
        line.tokens_reserved.to_string(),
        line.cost.to_string(),
        line.unpriced.to_string(),
        line.estimated.to_string(),
    ]
}

/// The id of a key that is asked for by it or by its name. Those that are configured no more, and tokens, are
/// known by their ids alone.
fn key_id(asked: &str, clients: &ClientKeys) -> Result<String> {
    let keys = match clients {
        ClientKeys::Required(specs) => &specs.keys[..],
        ClientKeys::Untouched | ClientKeys::Dropped => &[],
    };
    if keys.iter().any(|key| *key.id == *asked) {
        return Ok(asked.to_owned());
    }
    let named: Vec<&str> =
        keys.iter().filter(|key| *key.name == *asked).map(|key| &*key.id).collect();
    match named[..] {
        [] => Ok(asked.to_owned()),
        [id] => Ok(id.to_owned()),
        _ => bail!("--key: {} have this name; take one of these ids", named.join(", ")),
    }
}

fn table(query: &Query, lines: &[Line]) -> String {
    let names = query.columns();
    let mut head: Vec<String> = names.iter().map(|name| name.to_uppercase()).collect();
    head.extend(NUMBERS.iter().map(|name| match *name {
        "cost" => format!("COST {}", query.currency),
        name => name.to_uppercase(),
    }));
    let mut rows = vec![head];
    let total = Line::total(lines, names.len());
    let has_total = !names.is_empty();
    for line in lines.iter().chain(has_total.then_some(&total)) {
        // What a name holds may not move the cursor.
        let name = |name: &String| name.chars().filter(|it| !it.is_control()).collect::<String>();
        let row = line.names.iter().map(name).chain(numbers(line));
        rows.push(row.collect());
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..rows[0].len()).filter_map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(at, (cell, width))| {
            let gap = " ".repeat(width - cell.chars().count());
            if at < names.len() { format!("{cell}{gap}") } else { format!("{gap}{cell}") }
        });
        let line: Vec<String> = cells.collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn csv(query: &Query, lines: &[Line]) -> String {
    // RFC 4180. What a spreadsheet would take for a formula begins with a quote there, which it shows as text.
    let quoted = |cell: &str| {
        let guard = if cell.starts_with(['=', '+', '-', '@', '\t', '\r']) { "'" } else { "" };
        match cell.contains(['"', ',', '\n', '\r']) {
            true => format!("\"{guard}{}\"", cell.replace('"', "\"\"")),
            false => format!("{guard}{cell}"),
        }
    };
    let head = query.columns().into_iter().chain(NUMBERS).map(quoted).collect::<Vec<_>>();
    let mut text = format!("{}\r\n", head.join(","));
    for line in lines {
        let names = line.names.iter().map(|name| quoted(name));
        let cells: Vec<String> = names.chain(numbers(line)).collect();
        text.push_str(&format!("{}\r\n", cells.join(",")));
    }
    text
}
