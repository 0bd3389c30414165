//! Limits, as they are configured.

use std::sync::Arc;
use std::time::Duration;

use crate::names::NameList;

/// One limit: so much of something in a time, for each of what it is counted by.
#[derive(Clone, Debug, PartialEq)]
pub struct LimitSpec {
    /// What it is called, in refusals, logs and status. Counts go on through a reload by it.
    pub name: Arc<str>,
    /// What has a count of its own.
    pub per: Per,
    /// Keys that it holds for, by name or id; none: all clients.
    pub keys: Option<NameList>,
    /// Models that it holds for, by their own name or as `service/model`; none: all.
    pub models: Option<NameList>,
    /// Services that it holds for; none: all.
    pub services: Option<NameList>,
    /// What is limited.
    pub quantity: Quantity,
    /// How much of it there may be: money in billionths.
    pub max: u64,
    /// Whether it only counts and refuses nothing.
    pub shadow: bool,
}

/// What has a count of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Per {
    /// Each key.
    Key,
    /// Each key; clients that have none of their own by their address.
    Client,
    /// Each address.
    Address,
    /// Each model.
    Model,
    /// Each service.
    Service,
    /// Each model of each key.
    KeyAndModel,
    /// All together.
    All,
}

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// Requests in a window.
    Requests(Duration),
    /// Tokens in a window.
    Tokens(Tokens, Duration),
    /// Exchanges at the same time.
    Concurrent,
    /// What exchanges cost in a day or month (UTC).
    Money(Calendar),
}

/// Which tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tokens {
    /// Those of prompts.
    Input,
    /// Those of answers.
    Output,
    /// Both.
    Total,
}

/// A time of the calendar (UTC).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calendar {
    /// From midnight to midnight.
    Day,
    /// From the first of a month to that of the next one.
    Month,
}

/// The shares that money is counted in for a limit.
pub const MONEY_UNITS: u64 = 1_000_000_000;
