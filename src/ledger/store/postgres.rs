//! The ledger in PostgreSQL.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustls::{ClientConfig, RootCertStore};
use tokio::runtime::Runtime;
use tokio_postgres::config::SslMode;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Config, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::super::report::{Line, Query, Sql};
use super::super::row::Row;
use super::{Refused, Store};
use crate::secret::Secret;

/// How long a connection may take, and how long a statement.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Any number that others are unlikely to have chosen: who holds this lock migrates.
const MIGRATION_LOCK: i64 = 0x746f_6c6c_6761_7465;

/// Each brings the schema from one version to the next one.
const MIGRATIONS: [&str; 1] = ["
CREATE TABLE IF NOT EXISTS api_usage (
    id uuid PRIMARY KEY,
    user_id text NOT NULL,
    model text NOT NULL,
    tokens_input bigint NOT NULL,
    tokens_output bigint NOT NULL,
    cost numeric,
    timestamp timestamptz NOT NULL,
    request_id text NOT NULL,
    key_id text NOT NULL,
    service text NOT NULL,
    backend text NOT NULL,
    tokens_cached bigint NOT NULL,
    tokens_reasoning bigint NOT NULL,
    tokens_reserved bigint NOT NULL,
    currency text NOT NULL,
    status integer NOT NULL,
    aborted boolean NOT NULL,
    estimated boolean NOT NULL,
    latency_ms bigint NOT NULL,
    ttft_ms bigint
);
CREATE INDEX IF NOT EXISTS api_usage_timestamp ON api_usage (timestamp);
"];

const INSERT: &str = "
INSERT INTO api_usage (id, user_id, model, tokens_input, tokens_output, cost, timestamp, request_id,
    key_id, service, backend, tokens_cached, tokens_reasoning, tokens_reserved, currency, status,
    aborted, estimated, latency_ms, ttft_ms)
SELECT id::uuid, user_id, model, tokens_input, tokens_output, cost::numeric,
    to_timestamp(time / 1000.0), request_id, key_id, service, backend, tokens_cached,
    tokens_reasoning, tokens_reserved, currency, status, aborted, estimated, latency_ms, ttft_ms
FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::text[], $7::float8[],
    $8::text[], $9::text[], $10::text[], $11::text[], $12::bigint[], $13::bigint[], $14::bigint[],
    $15::text[], $16::integer[], $17::boolean[], $18::boolean[], $19::bigint[], $20::bigint[])
    AS rows (id, user_id, model, tokens_input, tokens_output, cost, time, request_id, key_id, service,
    backend, tokens_cached, tokens_reasoning, tokens_reserved, currency, status, aborted, estimated,
    latency_ms, ttft_ms)
ON CONFLICT (id) DO NOTHING";

/// A connection.
pub(super) struct Postgres {
    executor: Runtime,
    client: Client,
    /// Whether the table is there: who only reads does not make it.
    has_table: bool,
}

impl Postgres {
    /// Connects, and makes the table if it is not there.
    pub(super) fn open(url: &Secret) -> Result<Self> {
        let mut postgres = Self::connect(url)?;
        postgres.migrate()?;
        Ok(postgres)
    }

    /// Connects to read only.
    pub(super) fn open_to_read(url: &Secret) -> Result<Self> {
        let mut postgres = Self::connect(url)?;
        postgres.has_table = timed(&postgres.executor, async {
            let only_read = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY";
            postgres.client.batch_execute(only_read).await?;
            let is_there = "SELECT to_regclass('api_usage') IS NOT NULL";
            Ok(postgres.client.query_one(is_there, &[]).await?.get(0))
        })?;
        Ok(postgres)
    }

    fn connect(url: &Secret) -> Result<Self> {
        let executor = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // Its own message would repeat the URL, and with it the password.
        let mut config: Config =
            url.expose().parse().map_err(|_| anyhow!("ledger.database is not a PostgreSQL URL"))?;
        config.connect_timeout(CONNECT_TIMEOUT);
        if config.get_application_name().is_none() {
            config.application_name("tollgate");
        }
        let client = executor.block_on(async {
            let connecting = async {
                if config.get_ssl_mode() == SslMode::Disable {
                    let (client, connection) = config.connect(NoTls).await?;
                    tokio::spawn(connection);
                    return Ok::<_, anyhow::Error>(client);
                }
                let (client, connection) = config.connect(tls()?).await?;
                tokio::spawn(connection);
                Ok(client)
            };
            tokio::time::timeout(CONNECT_TIMEOUT, connecting)
                .await
                .context("no connection in time")?
        })?;
        Ok(Self { executor, client, has_table: true })
    }

    fn migrate(&mut self) -> Result<()> {
        let client = &mut self.client;
        timed(&self.executor, async {
            let transaction = client.transaction().await?;
            transaction.execute("SELECT pg_advisory_xact_lock($1)", &[&MIGRATION_LOCK]).await?;
            transaction
                .batch_execute(
                    "CREATE TABLE IF NOT EXISTS tollgate_schema (version integer NOT NULL)",
                )
                .await?;
            let row = transaction
                .query_one("SELECT coalesce(max(version), 0) FROM tollgate_schema", &[])
                .await?;
            let applied = usize::try_from(row.get::<_, i32>(0)).unwrap_or_default();
            for (index, migration) in MIGRATIONS.iter().enumerate().skip(applied) {
                transaction.batch_execute(migration).await?;
                let version = i32::try_from(index + 1).unwrap_or(i32::MAX);
                transaction.execute("INSERT INTO tollgate_schema VALUES ($1)", &[&version]).await?;
            }
            transaction.commit().await?;
            if applied == 0 {
                log::info!("a new ledger begins in the database");
            }
            Ok(())
        })
    }
}

/// Does something on the connection, in bounded time.
fn timed<T>(
    executor: &Runtime,
    work: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T> {
    let done = executor.block_on(async { tokio::time::timeout(STATEMENT_TIMEOUT, work).await });
    done.context("no answer in time")?.map_err(|error| match error.as_db_error() {
        Some(error) if is_of_data(error.code()) => anyhow!(Refused(error.message().to_owned())),
        Some(error) => anyhow!("{}", error.message()),
        None => anyhow!(error),
    })
}

/// Whether a statement failed for the values in it: data exceptions, violated constraints, and limits of the program
/// (<https://www.postgresql.org/docs/current/errcodes-appendix.html>).
fn is_of_data(code: &SqlState) -> bool {
    ["22", "23", "54"].iter().any(|class| code.code().starts_with(class))
}

/// TLS, with the authorities of the system.
fn tls() -> Result<MakeRustlsConnect> {
    let mut roots = RootCertStore::empty();
    pingora_core::tls::load_platform_certs_incl_env_into_store(&mut roots)
        .map_err(|_| anyhow!("cannot read the system's certificates"))?;
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}

impl Store for Postgres {
    fn insert(&mut self, rows: &[Row<'_>]) -> Result<()> {
        fn all<'r, T>(rows: &[Row<'r>], of: impl Fn(&Row<'r>) -> T) -> Vec<T> {
            rows.iter().map(of).collect()
        }
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        #[allow(clippy::cast_precision_loss, reason = "milliseconds are below 2^52")]
        let times = all(rows, |row| row.timestamp as f64);
        // A column each: one statement however many rows there are.
        let columns: [&(dyn ToSql + Sync); 20] = [
            &all(rows, |row| row.id),
            &all(rows, |row| row.user_id),
            &all(rows, |row| row.model),
            &all(rows, |row| number(row.tokens_input)),
            &all(rows, |row| number(row.tokens_output)),
            &all(rows, |row| row.cost),
            &times,
            &all(rows, |row| row.request_id),
            &all(rows, |row| row.key_id),
            &all(rows, |row| row.service),
            &all(rows, |row| row.backend),
            &all(rows, |row| number(row.tokens_cached)),
            &all(rows, |row| number(row.tokens_reasoning)),
            &all(rows, |row| number(row.tokens_reserved)),
            &all(rows, |row| row.currency),
            &all(rows, |row| i32::from(row.status)),
            &all(rows, |row| row.aborted),
            &all(rows, |row| row.estimated),
            &all(rows, |row| number(row.latency_ms)),
            &all(rows, |row| row.ttft_ms.map(number)),
        ];
        let client = &mut self.client;
        timed(&self.executor, async {
            let insert = client.prepare(INSERT).await?;
            client.execute(&insert, &columns).await
        })?;
        Ok(())
    }

    fn prune(&mut self, before: i64, rows_max: usize) -> Result<usize> {
        let removed = timed(&self.executor, async {
            let rows_max = i64::try_from(rows_max).unwrap_or(i64::MAX);
            #[allow(clippy::cast_precision_loss, reason = "milliseconds are below 2^52")]
            let before = before as f64;
            self.client
                .execute(
                    "DELETE FROM api_usage WHERE id IN (SELECT id FROM api_usage WHERE timestamp < \
                     to_timestamp($1::float8 / 1000.0) LIMIT $2)",
                    &[&before, &rows_max],
                )
                .await
        })?;
        Ok(usize::try_from(removed)?)
    }

    #[allow(clippy::cast_precision_loss, reason = "milliseconds are below 2^52")]
    fn report(&mut self, query: &Query) -> Result<Vec<Line>> {
        if !self.has_table {
            return Ok(Vec::new());
        }
        let sql = query.sql(&Sql::POSTGRES);
        let key = query.key_id.as_deref();
        let (since, until) = (query.since as f64, query.until as f64);
        let columns = query.columns().len();
        let rows = timed(&self.executor, async {
            let types = [Type::FLOAT8, Type::FLOAT8, Type::TEXT, Type::TEXT];
            let statement = self.client.prepare_typed(&sql, &types).await?;
            self.client.query(&statement, &[&since, &until, &key, &&*query.currency]).await
        })?;
        let lines = rows.iter().map(|row| {
            let number = |at: usize| row.get::<_, i64>(columns + at).max(0).cast_unsigned();
            Line {
                names: (0..columns).map(|at| row.get(at)).collect(),
                exchanges: number(0),
                tokens_input: number(1),
                tokens_output: number(2),
                tokens_cached: number(3),
                tokens_reserved: number(4),
                cost: row.get::<_, String>(columns + 5).parse().unwrap_or_default(),
                unpriced: number(6),
                estimated: number(7),
            }
        });
        Ok(lines.collect())
    }
}
