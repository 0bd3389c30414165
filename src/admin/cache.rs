//! Answers that are kept: how many, what they saved, and how they are forgotten.

use std::sync::Arc;

use http::{Response, StatusCode};
use percent_encoding::percent_decode_str;
use rust_decimal::Decimal;
use serde_json::{Map, Value, json};

use super::change::check;
use super::{json_text, refusal_page};
use crate::cache::{Cache, CacheState, Purge};
use crate::refusal::Refusal;
use crate::runtime::{PageAnswer, PageRequest, Runtime};
use crate::telemetry::CacheTotals;

/// Forgets answers.
pub(super) const PURGE: &str = "/admin/cache/purge";

/// What the query takes.
const QUERY: &str =
    "the query takes one of all, service with model, and key: all=true, service=S&model=M, key=ID";

/// Forgets the answers that the query names.
pub(super) fn purge(runtime: &Runtime, request: &PageRequest<'_>) -> PageAnswer {
    let what = check(runtime, request).and_then(|asker| Ok((read(request.query)?, asker)));
    let what = what.and_then(|(purge, asker)| match &purge {
        Purge::Model(pool) if !runtime.pools().any(|known| known.name() == pool) => {
            Err(Refusal::BadRequest { reason: "there is no such service and model" })
        }
        _ => Ok((purge, asker)),
    });
    let (purge, asker) = match what {
        Ok(what) => what,
        Err(refusal) => return PageAnswer::Now(refusal_page(&refusal)),
    };
    let Some(cache) = runtime.cache.as_ref().map(Arc::clone) else {
        let reason = "no model's answers are kept; see \"cache\" in the configuration";
        return PageAnswer::Now(refusal_page(&Refusal::BadRequest { reason }));
    };
    PageAnswer::Later(Box::pin(async move { purged(&cache, &purge, &asker).await }))
}

async fn purged(cache: &Cache, purge: &Purge, asker: &str) -> Response<bytes::Bytes> {
    let what = match purge {
        Purge::All => json!({"all": true}),
        Purge::Model(pool) => json!({"model": pool}),
        Purge::Key(key) => json!({"key": key}),
    };
    match cache.purge(purge).await {
        Ok(()) => {
            log::info!("answers that were kept are purged: {what} ({asker})");
            json_text(json!({"purged": what}).to_string())
        }
        Err(why) => {
            log::error!("answers in Redis cannot be purged: {why} ({asker})");
            let message = "Redis gives no answer, so that what it has is not purged; ask again";
            let mut page = json_text(json!({"error": {"message": message}}).to_string());
            *page.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            page
        }
    }
}

fn read(query: &str) -> Result<Purge, Refusal> {
    let bad = Refusal::BadRequest { reason: QUERY };
    let mut named: [Option<String>; 4] = Default::default();
    for pair in query.trim_start_matches('?').split('&').filter(|pair| !pair.is_empty()) {
        let known = ["all", "service", "model", "key"];
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let at = known.iter().position(|known| *known == name).ok_or_else(|| bad.clone())?;
        let value = percent_decode_str(value).decode_utf8().map_err(|_| bad.clone())?;
        named[at] = Some(value.into_owned());
    }
    match named {
        [Some(all), None, None, None] if all == "true" => Ok(Purge::All),
        [None, Some(service), Some(model), None] => Ok(Purge::Model(format!("{service}/{model}"))),
        [None, None, None, Some(key)] if !key.is_empty() => Ok(Purge::Key(key)),
        _ => Err(bad),
    }
}

/// How the cache does.
pub(super) fn state(state: &CacheState) -> Value {
    let (answers, bytes) = state.held;
    match &state.shared {
        None => json!({"store": "memory", "answers": answers, "bytes": bytes}),
        Some((away, failures)) => {
            let status = if away.is_none() { "up" } else { "away" };
            json!({"store": "redis", "status": status, "failure": away, "failures": failures})
        }
    }
}

/// How it does, and what came of it for all models.
pub(super) fn stats(now: &CacheState, models: &[(String, String, CacheTotals)]) -> Value {
    let mut sum = CacheTotals::default();
    for (.., model) in models {
        for (sum, count) in sum.answers.iter_mut().zip(model.answers) {
            *sum += count;
        }
        for (sum, count) in sum.tokens.iter_mut().zip(model.tokens) {
            *sum += count;
        }
        for (currency, cost) in &model.cost {
            let sum = sum.cost.entry(currency.clone()).or_default();
            *sum = sum.saturating_add(*cost);
        }
    }
    let mut page = state(now);
    if let (Some(page), Value::Object(sums)) = (page.as_object_mut(), totals(&sum)) {
        page.extend(sums);
    }
    page
}

/// What came of it.
pub(super) fn totals(totals: &CacheTotals) -> Value {
    let [hits, misses, bypasses] = totals.answers;
    let [input, output] = totals.tokens;
    let cost = |(currency, cost): (&String, &Decimal)| (currency.clone(), json!(cost.normalize()));
    let cost: Map<String, Value> = totals.cost.iter().map(cost).collect();
    json!({
        "hits": hits,
        "misses": misses,
        "bypasses": bypasses,
        "saved_tokens_input": input,
        "saved_tokens_output": output,
        "saved_cost": cost,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_says_what_is_forgotten() {
        let read = |query| read(query).ok();
        assert_eq!(read("?all=true"), Some(Purge::All));
        assert_eq!(read("?service=a&model=b%2Fc"), Some(Purge::Model("a/b/c".to_owned())));
        assert_eq!(read("?key=key-1"), Some(Purge::Key("key-1".to_owned())));
        for query in ["", "?all", "?all=false", "?model=b", "?key=", "?key=a&all=true", "?x=1"] {
            assert_eq!(read(query), None, "{query}");
        }
    }
}
