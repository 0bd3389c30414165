//! Where usage is kept, as it is configured.

use std::path::PathBuf;

use crate::secret::Secret;

/// The ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerSpec {
    /// Where rows end up.
    pub database: Database,
    /// The folder where they wait for it.
    pub spool: PathBuf,
    /// Rows that are older are removed; none: they stay.
    pub keep_days: Option<u32>,
    /// Most rows that wait for the disk.
    pub queue_rows_max: usize,
    /// Most bytes that wait for the database.
    pub spool_bytes_max: u64,
}

/// A database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Database {
    /// An SQLite file.
    Sqlite(PathBuf),
    /// A PostgreSQL server, by its URL.
    Postgres(Secret),
}
