//! `/stats`: totals and rates as JSON.

use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::{Sources, view};
use crate::runtime::Runtime;

/// Totals since the start and rates of the last minute.
pub(super) fn all(runtime: &Runtime, sources: &Sources) -> Value {
    let telemetry = &sources.telemetry;
    let counters = &telemetry.counters;
    let totals = counters.totals();
    let uptime = SystemTime::now().duration_since(counters.started).unwrap_or_default();
    let queued: usize = runtime.pools().map(|pool| pool.queue().length()).sum();
    json!({
        "service": "tollgate",
        "version": env!("CARGO_PKG_VERSION"),
        "started": view::time(counters.started),
        "uptime_seconds": uptime.as_secs(),
        "in_flight": sources.lifecycle.inflight(),
        "queued": queued,
        "connections": sources.lifecycle.connections.count(),
        "requests": totals.requests,
        "errors": totals.errors,
        "client_aborts": totals.aborts,
        "tokens_input": totals.tokens_input,
        "tokens_output": totals.tokens_output,
        "last_minute": view::minute(&telemetry.history.minute(counters)),
        "services": services(runtime),
    })
}

/// What went to each model of the configuration.
fn services(runtime: &Runtime) -> Value {
    let mut services: Map<String, Value> = Map::new();
    for (service, model, _) in runtime.snapshot.pools() {
        let Some(pool) = runtime.pool(service, model) else { continue };
        let totals = pool.series.get().map(|series| series.totals()).unwrap_or_default();
        let backends: Map<String, Value> = pool
            .backends()
            .iter()
            .map(|backend| (backend.spec.id.clone(), json!(backend.live.attempts.total())))
            .collect();
        let models = services.entry(service).or_insert_with(|| json!({}));
        models[model] = json!({
            "requests": totals.requests,
            "errors": totals.errors,
            "client_aborts": totals.aborts,
            "tokens_input": totals.tokens_input,
            "tokens_output": totals.tokens_output,
            "queued": pool.queue().length(),
            "backends": backends,
        });
    }
    Value::Object(services)
}
