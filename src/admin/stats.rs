//! `/stats`: totals and rates as JSON.

use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::{Sources, view};
use crate::runtime::Runtime;
use crate::telemetry::{Counters, Totals};

/// Totals since the start and rates of the last minute.
pub(super) fn all(runtime: &Runtime, sources: &Sources) -> Value {
    let telemetry = &sources.telemetry;
    let counters = &telemetry.counters;
    let uptime = SystemTime::now().duration_since(counters.started).unwrap_or_default();
    let queued: usize = runtime.pools().map(|pool| pool.queue().length()).sum();
    let mut page = json!({
        "service": "tollgate",
        "version": env!("CARGO_PKG_VERSION"),
        "started": super::time(counters.started),
        "uptime_seconds": uptime.as_secs(),
        "in_flight": sources.lifecycle.inflight(),
        "queued": queued,
        "connections": sources.lifecycle.connections.count(),
        "last_minute": view::minute(&telemetry.history.minute(counters)),
        "services": services(runtime, counters),
    });
    merge(&mut page, totals(&counters.totals()));
    if let Some(cache) = &runtime.cache {
        page["cache"] = super::cache::stats(&cache.state(), &counters.cached());
    }
    page
}

/// Adds the fields of one object to another.
fn merge(to: &mut Value, from: Value) {
    match (to.as_object_mut(), from) {
        (Some(to), Value::Object(from)) => to.extend(from),
        (_, from) => *to = from,
    }
}

/// What went to each model, and to the backends of those of the configuration.
fn services(runtime: &Runtime, counters: &Counters) -> Value {
    let mut services: Map<String, Value> = Map::new();
    let mut at = |service: &str, model: &str, told: Value| {
        let models = services.entry(service).or_insert_with(|| json!({}));
        merge(&mut models[model], told);
    };
    for (service, model, _) in runtime.snapshot.pools() {
        let Some(pool) = runtime.pool(service, model) else { continue };
        let backends: Map<String, Value> = pool
            .backends()
            .iter()
            .map(|backend| (backend.spec.id.clone(), json!(backend.live.attempts.total())))
            .collect();
        let (none, queued) = (totals(&Totals::default()), pool.queue().length());
        at(service, model, none);
        at(service, model, json!({"queued": queued, "backends": backends}));
    }
    for (service, model, told) in counters.by_model() {
        at(&service, &model, totals(&told));
    }
    for (service, model, told) in counters.cached() {
        at(&service, &model, json!({"cache": super::cache::totals(&told)}));
    }
    Value::Object(services)
}

fn totals(totals: &Totals) -> Value {
    json!({
        "requests": totals.requests,
        "errors": totals.errors,
        "refused": totals.refused,
        "client_aborts": totals.aborts,
        "tokens_input": totals.tokens_input,
        "tokens_output": totals.tokens_output,
    })
}
