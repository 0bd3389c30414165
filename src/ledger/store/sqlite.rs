//! The ledger in an SQLite file.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rusqlite::functions::{Aggregate, Context as FunctionContext, FunctionFlags};
use rusqlite::{Connection, OpenFlags, params};
use rust_decimal::Decimal;

use super::super::report::{Line, Query, Sql};
use super::super::row::Row;
use super::Store;
use crate::writing::Times;

/// How long another process's write is waited for.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Rows lie in the order in which they come, so that a new one is put behind the others and no index is kept beside
/// them; a row that is put in again has the same time.
///
/// Each brings the schema from one version to the next one; how many were applied is SQLite's `user_version`.
const MIGRATIONS: [&str; 1] = ["
CREATE TABLE api_usage (
    id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    model TEXT NOT NULL,
    tokens_input INTEGER NOT NULL,
    tokens_output INTEGER NOT NULL,
    cost TEXT,
    timestamp TEXT NOT NULL,
    request_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    service TEXT NOT NULL,
    backend TEXT NOT NULL,
    tokens_cached INTEGER NOT NULL,
    tokens_reasoning INTEGER NOT NULL,
    tokens_reserved INTEGER NOT NULL,
    currency TEXT NOT NULL,
    status INTEGER NOT NULL,
    aborted INTEGER NOT NULL,
    estimated INTEGER NOT NULL,
    latency_ms INTEGER NOT NULL,
    ttft_ms INTEGER,
    PRIMARY KEY (timestamp, id)
) WITHOUT ROWID;
"];

/// An open file.
pub(super) struct Sqlite {
    connection: Connection,
}

impl Sqlite {
    pub(super) fn open(path: &Path) -> Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        if !path.exists() {
            log::info!("a new ledger begins in {}", path.display());
        }
        let connection = Connection::open(path)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // A row leaves the spool when it is here: so it must be on the disk by then.
        connection.pragma_update(None, "synchronous", "FULL")?;
        let mut sqlite = Self { connection };
        sqlite.prepare()?;
        Ok(sqlite)
    }

    /// To read only, beside who writes.
    pub(super) fn open_to_read(path: &Path) -> Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)
            .with_context(|| format!("cannot open {}", path.display()))?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "query_only", "on")?;
        let sqlite = Self { connection };
        sqlite.add_functions()?;
        Ok(sqlite)
    }

    fn prepare(&mut self) -> Result<()> {
        self.add_functions()?;
        let transaction =
            self.connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let version: i64 =
            transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let applied = usize::try_from(version).unwrap_or_default();
        for migration in MIGRATIONS.iter().skip(applied) {
            transaction.execute_batch(migration)?;
        }
        let version = i64::try_from(MIGRATIONS.len().max(applied))?;
        transaction.pragma_update(None, "user_version", version)?;
        transaction.commit()?;
        Ok(())
    }

    /// SQLite has no decimal numbers: sums are made here.
    fn add_functions(&self) -> Result<()> {
        let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_DETERMINISTIC;
        self.connection.create_aggregate_function("decimal_sum", 1, flags, DecimalSum)?;
        Ok(())
    }
}

struct DecimalSum;

impl Aggregate<Decimal, String> for DecimalSum {
    fn init(&self, _: &mut FunctionContext<'_>) -> rusqlite::Result<Decimal> {
        Ok(Decimal::ZERO)
    }

    fn step(&self, context: &mut FunctionContext<'_>, sum: &mut Decimal) -> rusqlite::Result<()> {
        let value: Option<String> = context.get(0)?;
        let value = value.and_then(|text| text.parse::<Decimal>().ok()).unwrap_or_default();
        *sum = sum.saturating_add(value);
        Ok(())
    }

    fn finalize(
        &self,
        _: &mut FunctionContext<'_>,
        sum: Option<Decimal>,
    ) -> rusqlite::Result<String> {
        Ok(sum.unwrap_or_default().normalize().to_string())
    }
}

/// As it is written: of equal length, so that texts are in the order of time.
fn time(times: &mut Times, millis: i64) -> String {
    let mut text = Vec::with_capacity("2026-01-01T00:00:00.000Z".len());
    times.push_millis(&mut text, millis);
    String::from_utf8(text).expect("a time is digits and letters")
}

impl Store for Sqlite {
    fn insert(&mut self, rows: &[Row<'_>]) -> Result<()> {
        let transaction = self.connection.transaction()?;
        {
            let mut insert = transaction.prepare(
                "INSERT OR IGNORE INTO api_usage (id, user_id, model, tokens_input, tokens_output, \
                 cost, timestamp, request_id, key_id, service, backend, tokens_cached, \
                 tokens_reasoning, tokens_reserved, currency, status, aborted, estimated, \
                 latency_ms, ttft_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, \
                 ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20)",
            )?;
            let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
            let mut times = Times::default();
            for row in rows {
                insert.execute(params![
                    row.id,
                    row.user_id,
                    row.model,
                    number(row.tokens_input),
                    number(row.tokens_output),
                    row.cost,
                    time(&mut times, number(row.timestamp)),
                    row.request_id,
                    row.key_id,
                    row.service,
                    row.backend,
                    number(row.tokens_cached),
                    number(row.tokens_reasoning),
                    number(row.tokens_reserved),
                    row.currency,
                    row.status,
                    row.aborted,
                    row.estimated,
                    number(row.latency_ms),
                    row.ttft_ms.map(number),
                ])?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    fn prune(&mut self, before: i64, rows_max: usize) -> Result<usize> {
        let removed = self.connection.execute(
            "DELETE FROM api_usage WHERE (timestamp, id) IN \
             (SELECT timestamp, id FROM api_usage WHERE timestamp < ?1 LIMIT ?2)",
            params![time(&mut Times::default(), before), i64::try_from(rows_max)?],
        )?;
        Ok(removed)
    }

    fn report(&mut self, query: &Query) -> Result<Vec<Line>> {
        let sql = query.sql(&Sql::SQLITE);
        let mut statement = self.connection.prepare(&sql)?;
        let columns = query.columns().len();
        let key = query.key_id.as_deref();
        let time = |millis| time(&mut Times::default(), millis);
        let rows = statement.query_map(
            params![time(query.since), time(query.until), key, &*query.currency],
            |row| {
                let number = |at: usize| -> rusqlite::Result<u64> {
                    Ok(row.get::<_, i64>(columns + at)?.max(0).cast_unsigned())
                };
                let names = (0..columns).map(|at| row.get(at)).collect::<Result<_, _>>()?;
                let cost: String = row.get(columns + 5)?;
                Ok(Line {
                    names,
                    exchanges: number(0)?,
                    tokens_input: number(1)?,
                    tokens_output: number(2)?,
                    tokens_cached: number(3)?,
                    tokens_reserved: number(4)?,
                    cost: cost.parse().unwrap_or_default(),
                    unpriced: number(6)?,
                    estimated: number(7)?,
                })
            },
        )?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}
