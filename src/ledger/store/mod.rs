//! Where the rows end up.

mod postgres;
mod sqlite;

use anyhow::Result;

/// That a database does not take rows for what is in them: it would not later either.
#[derive(Debug)]
pub(super) struct Refused(pub(super) String);

impl std::fmt::Display for Refused {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

use super::report::{Line, Query};
use super::row::Row;
use crate::config::Database;

/// A database that is connected to.
pub(super) trait Store {
    /// Puts rows in that are not there yet. All of them or none.
    ///
    /// # Errors
    /// [`Refused`], or that the database cannot be asked.
    fn insert(&mut self, rows: &[Row<'_>]) -> Result<()>;

    /// Removes some of the rows that are older; how many.
    fn prune(&mut self, before: i64, rows_max: usize) -> Result<usize>;

    /// Sums over rows.
    fn report(&mut self, query: &Query) -> Result<Vec<Line>>;
}

/// Connects, and makes the tables where they are not there.
pub(super) fn open(database: &Database) -> Result<Box<dyn Store>> {
    Ok(match database {
        Database::Sqlite(path) => Box::new(sqlite::Sqlite::open(path)?),
        Database::Postgres(url) => Box::new(postgres::Postgres::open(url)?),
    })
}

/// Connects to read, beside who writes.
pub(super) fn open_to_read(database: &Database) -> Result<Box<dyn Store>> {
    Ok(match database {
        Database::Sqlite(path) => Box::new(sqlite::Sqlite::open_to_read(path)?),
        Database::Postgres(url) => Box::new(postgres::Postgres::open_to_read(url)?),
    })
}
