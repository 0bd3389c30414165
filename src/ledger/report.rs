//! What the ledger is asked, and what it answers.

use rust_decimal::Decimal;

/// Sums over the rows of a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// From here on, in milliseconds since 1970.
    pub since: i64,
    /// Up to here, this moment not included.
    pub until: i64,
    /// What has a line of its own.
    pub by: Vec<Dimension>,
    /// Of this key alone.
    pub key_id: Option<String>,
}

/// What sums can be told apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dimension {
    /// The key, with who has it.
    Key,
    /// Who has the key, whichever of theirs it is.
    User,
    /// The service.
    Service,
    /// The model.
    Model,
    /// The backend.
    Backend,
    /// The day (UTC).
    Day,
    /// The month (UTC).
    Month,
    /// The status that clients were sent.
    Status,
}

impl Dimension {
    /// All of them by name.
    pub const ALL: [(&str, Self); 8] = [
        ("key", Self::Key),
        ("user", Self::User),
        ("service", Self::Service),
        ("model", Self::Model),
        ("backend", Self::Backend),
        ("day", Self::Day),
        ("month", Self::Month),
        ("status", Self::Status),
    ];

    /// Reads names separated by commas.
    ///
    /// # Errors
    /// What is no name of one.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, String> {
        let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
        let mut list = Vec::new();
        for name in names {
            let known = Self::ALL.iter().find(|(known, _)| *known == name);
            let Some((_, dimension)) = known else {
                let known: Vec<&str> = Self::ALL.iter().map(|(name, _)| *name).collect();
                return Err(format!("{name:?} is none of {}", known.join(", ")));
            };
            if !list.contains(dimension) {
                list.push(*dimension);
            }
        }
        Ok(list)
    }
}

/// A line of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What it is for, a text for each of [`Query::columns`].
    pub names: Vec<String>,
    /// How many.
    pub exchanges: u64,
    /// Tokens of prompts.
    pub tokens_input: u64,
    /// Tokens of answers.
    pub tokens_output: u64,
    /// Of those of prompts, read from a cache.
    pub tokens_cached: u64,
    /// Tokens that were paid for before.
    pub tokens_reserved: u64,
    /// What those cost that have a price.
    pub cost: Decimal,
    /// How many have no price.
    pub unpriced: u64,
    /// How many were counted here, because the backend did not tell.
    pub estimated: u64,
}

/// How a database says what others say otherwise.
pub(super) struct Sql {
    day: &'static str,
    month: &'static str,
    status: &'static str,
    cost: &'static str,
    number: &'static str,
    parameters: [&'static str; 3],
    is_true: &'static str,
}

impl Sql {
    pub(super) const SQLITE: Self = Self {
        day: "substr(timestamp, 1, 10)",
        month: "substr(timestamp, 1, 7)",
        status: "CAST(status AS TEXT)",
        cost: "decimal_sum(cost)",
        number: "",
        parameters: ["?1", "?2", "?3"],
        is_true: "estimated = 1",
    };

    pub(super) const POSTGRES: Self = Self {
        day: "to_char(timestamp AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
        month: "to_char(timestamp AT TIME ZONE 'UTC', 'YYYY-MM')",
        status: "status::text",
        cost: "coalesce(sum(cost), 0)::text",
        number: "::bigint",
        parameters: ["to_timestamp($1 / 1000.0)", "to_timestamp($2 / 1000.0)", "$3"],
        is_true: "estimated",
    };
}

impl Query {
    /// What the names of a line are.
    #[must_use]
    pub fn columns(&self) -> Vec<&'static str> {
        let mut columns = Vec::new();
        for dimension in &self.by {
            let name = Dimension::ALL.iter().find(|(_, known)| known == dimension);
            let name = name.map_or("", |(name, _)| *name);
            columns.push(name);
            if *dimension == Dimension::Key && !self.by.contains(&Dimension::User) {
                columns.push("user");
            }
        }
        columns
    }

    pub(super) fn sql(&self, sql: &Sql) -> String {
        let columns: Vec<&str> = self
            .columns()
            .iter()
            .map(|column| match *column {
                "key" => "key_id",
                "user" => "user_id",
                "day" => sql.day,
                "month" => sql.month,
                "status" => sql.status,
                column => column,
            })
            .collect();
        let columns: String = columns.iter().map(|column| format!("{column}, ")).collect();
        let number = sql.number;
        let sum = |column: &str| format!("coalesce(sum({column}), 0){number}");
        let [since, until, key] = sql.parameters;
        let count: Vec<String> = (1..=self.columns().len()).map(|at| at.to_string()).collect();
        let group = if count.is_empty() {
            String::new()
        } else {
            let count = count.join(", ");
            format!(" GROUP BY {count} ORDER BY {count}")
        };
        format!(
            "SELECT {columns}count(*){number}, {}, {}, {}, {}, {}, {}, {} FROM api_usage \
             WHERE timestamp >= {since} AND timestamp < {until} AND ({key} = '' OR key_id = {key}){group}",
            sum("tokens_input"),
            sum("tokens_output"),
            sum("tokens_cached"),
            sum("tokens_reserved"),
            sql.cost,
            sum("CASE WHEN cost IS NULL THEN 1 ELSE 0 END"),
            sum(&format!("CASE WHEN {} THEN 1 ELSE 0 END", sql.is_true)),
        )
    }
}
