//! What the ledger is asked, and what it answers.

use std::sync::Arc;

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use rust_decimal::Decimal;
use serde_json::{Map, Value, json};

use crate::config::{Calendar, ClientKeys};

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
    /// What costs are in: amounts of different currencies make no sum.
    pub currency: Arc<str>,
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
    /// What those cost that have a price in the currency that was asked for.
    pub cost: Decimal,
    /// How many have none.
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
    parameters: [&'static str; 4],
    is_true: &'static str,
    zero: &'static str,
}

impl Sql {
    pub(super) const SQLITE: Self = Self {
        day: "substr(timestamp, 1, 10)",
        month: "substr(timestamp, 1, 7)",
        status: "CAST(status AS TEXT)",
        cost: "decimal_sum(CASE WHEN currency = ?4 THEN cost END)",
        number: "",
        parameters: ["?1", "?2", "?3", "?4"],
        is_true: "estimated = 1",
        zero: "'0'",
    };

    pub(super) const POSTGRES: Self = Self {
        day: "to_char(timestamp AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
        month: "to_char(timestamp AT TIME ZONE 'UTC', 'YYYY-MM')",
        status: "status::text",
        cost: "coalesce(sum(cost) FILTER (WHERE currency = $4), 0)::text",
        number: "::bigint",
        parameters: ["to_timestamp($1 / 1000.0)", "to_timestamp($2 / 1000.0)", "$3", "$4"],
        is_true: "estimated",
        zero: "0",
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
        let [since, until, key, currency] = sql.parameters;
        let count: Vec<String> = (1..=self.columns().len()).map(|at| at.to_string()).collect();
        let group = if count.is_empty() {
            String::new()
        } else {
            let count = count.join(", ");
            format!(" GROUP BY {count} ORDER BY {count}")
        };
        format!(
            "SELECT {columns}count(*){number}, {}, {}, {}, {}, {}, {}, {} FROM api_usage \
             WHERE timestamp >= {since} AND timestamp < {until} AND ({key} IS NULL OR key_id = {key}){group}",
            sum("tokens_input"),
            sum("tokens_output"),
            sum("tokens_cached"),
            sum("tokens_reserved"),
            sql.cost,
            // What is free is so in each currency.
            sum(&format!(
                "CASE WHEN cost IS NULL OR currency <> {currency} AND cost <> {} THEN 1 ELSE 0 END",
                sql.zero
            )),
            sum(&format!("CASE WHEN {} THEN 1 ELSE 0 END", sql.is_true)),
        )
    }
}

impl Line {
    /// The sum of lines, with `columns` names of which the first one says so.
    #[must_use]
    pub fn total(lines: &[Self], columns: usize) -> Self {
        let mut names = vec![String::new(); columns];
        if let Some(first) = names.first_mut() {
            "total".clone_into(first);
        }
        let mut total = Self {
            names,
            exchanges: 0,
            tokens_input: 0,
            tokens_output: 0,
            tokens_cached: 0,
            tokens_reserved: 0,
            cost: Decimal::ZERO,
            unpriced: 0,
            estimated: 0,
        };
        for line in lines {
            total.exchanges += line.exchanges;
            total.tokens_input += line.tokens_input;
            total.tokens_output += line.tokens_output;
            total.tokens_cached += line.tokens_cached;
            total.tokens_reserved += line.tokens_reserved;
            total.cost += line.cost;
            total.unpriced += line.unpriced;
            total.estimated += line.estimated;
        }
        total.cost = total.cost.normalize();
        total
    }

    fn as_json(&self, columns: &[&str]) -> Value {
        let mut object = Map::new();
        for (column, name) in columns.iter().zip(&self.names) {
            object.insert((*column).to_owned(), name.as_str().into());
        }
        for (key, number) in [
            ("exchanges", self.exchanges),
            ("tokens_input", self.tokens_input),
            ("tokens_output", self.tokens_output),
            ("tokens_cached", self.tokens_cached),
            ("tokens_reserved", self.tokens_reserved),
        ] {
            object.insert(key.to_owned(), number.into());
        }
        // As a text: a JSON number may be read as one that is not exact.
        object.insert("cost".to_owned(), self.cost.to_string().into());
        object.insert("unpriced".to_owned(), self.unpriced.into());
        object.insert("estimated".to_owned(), self.estimated.into());
        Value::Object(object)
    }
}

/// A report as JSON, with the labels of keys.
#[must_use]
pub fn as_json(query: &Query, lines: &[Line], clients: &ClientKeys) -> Value {
    let columns = query.columns();
    let labels = clients.labels();
    let of_key = columns.iter().position(|column| *column == "key");
    let time = |millis| Timestamp::from_millisecond(millis).unwrap_or_default().to_string();
    let as_json = |line: &Line| {
        let mut object = line.as_json(&columns);
        if let Some(labels) = of_key.and_then(|at| labels.get(line.names[at].as_str())) {
            let labels = labels.iter().map(|(name, text)| (name.clone(), text.as_str().into()));
            object["labels"] = Value::Object(labels.collect());
        }
        object
    };
    let data: Vec<Value> = lines.iter().map(as_json).collect();
    json!({
        "since": time(query.since),
        "until": time(query.until),
        "currency": &*query.currency,
        "data": data,
        "total": Line::total(lines, 0).as_json(&[]),
    })
}

/// Reads a moment, in milliseconds since 1970: so long before now (`7d`, `24h`, `90m`), `today`, `month`, a day
/// (its beginning, UTC) or a time.
#[must_use]
pub fn moment(text: &str, now: i64) -> Option<i64> {
    let text = text.trim();
    match text {
        "today" => return Some(Calendar::Day.begin(now)),
        "month" => return Some(Calendar::Month.begin(now)),
        "now" => return Some(now),
        _ => {}
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        return Some(time.as_millisecond()).filter(|at| *at >= 0);
    }
    if let Ok(day) = text.parse::<Date>() {
        return start(day).filter(|at| *at >= 0);
    }
    let digits = text.trim_end_matches(|last: char| last.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "d" => 86_400_000,
        "h" => 3_600_000,
        "m" => 60_000,
        _ => return None,
    };
    let ago = digits.parse::<u32>().ok()?;
    Some((now - i64::from(ago) * unit).max(0))
}

fn start(day: Date) -> Option<i64> {
    Some(day.to_zoned(TimeZone::UTC).ok()?.timestamp().as_millisecond())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read_as_people_write_them() {
        let now = "2026-02-28T12:34:56.789Z".parse::<Timestamp>().unwrap().as_millisecond();
        let shown =
            |text| moment(text, now).map(|at| Timestamp::from_millisecond(at).unwrap().to_string());
        for (text, expected) in [
            ("7d", "2026-02-21T12:34:56.789Z"),
            ("24h", "2026-02-27T12:34:56.789Z"),
            ("90m", "2026-02-28T11:04:56.789Z"),
            ("today", "2026-02-28T00:00:00Z"),
            ("month", "2026-02-01T00:00:00Z"),
            ("2026-01-31", "2026-01-31T00:00:00Z"),
            ("2026-01-31T12:00:00+02:00", "2026-01-31T10:00:00Z"),
        ] {
            assert_eq!(shown(text).as_deref(), Some(expected), "{text}");
        }
        assert_eq!(shown("999999d").as_deref(), Some("1970-01-01T00:00:00Z"));
        for wrong in ["", "7", "7w", "-1d", "yesterday", "2026-13-01", "9999-12-31", "1066-10-14"] {
            assert_eq!(moment(wrong, now), None, "{wrong}");
        }
    }

    #[test]
    fn dimensions_are_read_once_each() {
        assert_eq!(
            Dimension::parse_list("key, model,day,key"),
            Ok(vec![Dimension::Key, Dimension::Model, Dimension::Day])
        );
        assert!(Dimension::parse_list("key,colour").unwrap_err().contains("\"colour\" is none of"));
    }
}
