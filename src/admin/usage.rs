//! `GET /api/usage`: sums over the ledger. Who may see what concerns all sees all; every key sees its own.

use std::sync::Arc;

use bytes::Bytes;
use http::Response;
use percent_encoding::percent_decode_str;
use rust_decimal::Decimal;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::{own_json, refusal_page};
use crate::auth::Grant;
use crate::config::{Calendar, ClientKeys, LedgerSpec, MONEY_UNITS};
use crate::ledger::{self, Dimension, Ledger, Line, Query};
use crate::refusal::Refusal;
use crate::runtime::{PageAnswer, PageRequest, Runtime};

pub(super) const PATH: &str = "/api/usage";

/// Reports that are made at the same time: each keeps a thread and the database busy.
const AT_ONCE: usize = 2;

/// Makes reports.
pub(super) struct Reports {
    ledger: Option<Arc<Ledger>>,
    room: Arc<Semaphore>,
}

impl Reports {
    pub(super) fn new(ledger: Option<Arc<Ledger>>) -> Self {
        Self { ledger, room: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// The report that is asked for; `sees_all`: also of others, for who may.
    pub(super) fn answer(
        &self,
        runtime: &Runtime,
        request: &PageRequest<'_>,
        sees_all: bool,
    ) -> PageAnswer {
        let refused = |refusal: &Refusal| PageAnswer::Now(refusal_page(refusal));
        let grant = match runtime.grant(request.headers, request.client) {
            Ok(grant) => grant,
            Err(refusal) => return refused(&refusal),
        };
        let Some(ledger) = &self.ledger else { return refused(&Refusal::NoLedger) };
        let now = ledger::now();
        let currency = &runtime.snapshot.prices.currency;
        let query = match query(request.query, now, &grant, currency, sees_all) {
            Ok(query) => query,
            Err(reason) => return refused(&Refusal::BadRequest { reason }),
        };
        let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() else {
            return refused(&Refusal::TooManyReports);
        };
        let (spec, clients) = (ledger.spec().clone(), runtime.snapshot.clients.clone());
        let budgets = match &query.key_id {
            Some(key) => runtime.budgets(key),
            None => runtime.budgets(&grant.key_id),
        };
        PageAnswer::Later(Box::pin(async move {
            let made = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                page(&spec, &query, (&grant, &clients), &budgets, now)
            });
            match made.await {
                Ok(Ok(page)) => page,
                Ok(Err(error)) => {
                    log::error!("the ledger cannot be read: {error:#}");
                    refusal_page(&Refusal::LedgerAway)
                }
                Err(_) => refusal_page(&Refusal::Internal),
            }
        }))
    }
}

/// A budget that holds for a key: its name, of which time it is, and how much it is.
pub(super) type Budget = (String, Calendar, u64);

fn page(
    spec: &LedgerSpec,
    query: &Query,
    (grant, clients): (&Grant, &ClientKeys),
    budgets: &[Budget],
    now: i64,
) -> anyhow::Result<Response<Bytes>> {
    let lines = if ledger::exists(spec) { ledger::report(spec, query)? } else { Vec::new() };
    let mut report = ledger::as_json(query, &lines, clients);
    if !budgets.is_empty() {
        let states: anyhow::Result<Vec<Value>> =
            budgets.iter().map(|budget| state(spec, budget, query, grant, now)).collect();
        report["budgets"] = Value::from(states?);
    }
    Ok(own_json(report.to_string()))
}

/// How a budget of a key stands.
fn state(
    spec: &LedgerSpec,
    (name, calendar, max): &Budget,
    asked: &Query,
    grant: &Grant,
    now: i64,
) -> anyhow::Result<Value> {
    let key_id = asked.key_id.clone().unwrap_or_else(|| grant.key_id.to_string());
    let query = Query {
        since: calendar.begin(now),
        until: now + 1,
        by: Vec::new(),
        key_id: Some(key_id),
        currency: Arc::clone(&asked.currency),
    };
    let spent = Line::total(&ledger::report(spec, &query)?, 0).cost;
    let limit = Decimal::from(*max) / Decimal::from(MONEY_UNITS);
    Ok(json!({
        "name": name,
        "per": match calendar { Calendar::Day => "day", Calendar::Month => "month" },
        "limit": limit.normalize().to_string(),
        "spent": spent.to_string(),
        "remaining": (limit - spent).max(Decimal::ZERO).normalize().to_string(),
    }))
}

/// What is asked for.
fn query(
    raw: &str,
    now: i64,
    grant: &Grant,
    currency: &Arc<str>,
    sees_all: bool,
) -> Result<Query, &'static str> {
    const WHEN: &str =
        "since and until take 7d, 24h, today, month, 2026-01-31 or 2026-01-31T12:00:00Z";
    let sees_all = sees_all && grant.is_admin;
    let mut query = Query {
        since: Calendar::Month.begin(now),
        until: now + 1,
        by: if sees_all { vec![Dimension::Key] } else { Vec::new() },
        key_id: (!sees_all).then(|| grant.key_id.to_string()),
        currency: Arc::clone(currency),
    };
    for pair in raw.trim_start_matches('?').split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = percent_decode_str(value).decode_utf8_lossy();
        match name {
            "since" => query.since = ledger::moment(&value, now).ok_or(WHEN)?,
            "until" => query.until = ledger::moment(&value, now).ok_or(WHEN)?,
            "by" => {
                query.by = Dimension::parse_list(&value).map_err(
                    |_| "by takes key, user, service, model, backend, day, month and status",
                )?;
            }
            "key" if sees_all => query.key_id = Some(value.into_owned()),
            "key" if *value == *grant.key_id => {}
            "key" => return Err("a key may ask for its own usage only"),
            "currency" => query.currency = value.into(),
            _ => return Err("the query takes by, since, until, key and currency"),
        }
    }
    Ok(query)
}
