//! The state of every backend as JSON.

use std::time::Instant;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::auth::{Grant, Wish};
use crate::pool::Backend;
use crate::runtime::Runtime;

/// Every service's backends.
pub(super) fn all(runtime: &Runtime) -> Value {
    envelope(
        runtime
            .snapshot
            .services
            .keys()
            .filter_map(|service| Some((service.clone(), models(runtime, service, |_| true)?))),
    )
}

/// One service's backends, if there is such a service for whoever asks.
pub(super) fn one(runtime: &Runtime, service: &str, grant: &Grant) -> Option<Value> {
    let may_have = |model: &str| grant.may_have(Wish { service, model: Some(model), asked: None });
    let models = models(runtime, service, may_have)?;
    let is_hidden = models.as_object().is_some_and(Map::is_empty);
    (!is_hidden).then(|| envelope([(service.to_owned(), models)]))
}

fn envelope(services: impl IntoIterator<Item = (String, Value)>) -> Value {
    let data: Map<String, Value> = services.into_iter().collect();
    json!({"service": "tollgate", "type": "health_status", "data": data})
}

fn models(runtime: &Runtime, service: &str, may_have: impl Fn(&str) -> bool) -> Option<Value> {
    let models = &runtime.snapshot.services.get(service)?.models;
    let models: Map<String, Value> = models
        .keys()
        .filter(|model| may_have(model))
        .filter_map(|model| {
            let pool = runtime.pool(service, model)?;
            let backends = pool.backends().iter().map(|backend| backend_status(backend)).collect();
            Some((model.clone(), Value::Array(backends)))
        })
        .collect();
    Some(Value::Object(models))
}

pub(super) fn backend_status(backend: &Backend) -> Value {
    let health = &backend.live.health;
    let response_time =
        health.response_time().map(|time| (time.as_secs_f64() * 100_000.0).round() / 100.0);
    let last_check = health
        .checked_at_millis()
        .and_then(|millis| Timestamp::from_millisecond(millis).ok())
        .map(|time| time.to_string());
    json!({
        "id": backend.spec.id,
        "name": backend.spec.name,
        "url": backend.spec.url.shown,
        "status": health.state().as_str(),
        "response_time_ms": response_time,
        "last_check": last_check,
        "breaker": backend.breaker(Instant::now()).as_str(),
        "alert": alert(backend),
        "drained": backend.is_drained(),
    })
}

/// What somebody should look at.
fn alert(backend: &Backend) -> Option<String> {
    let status = backend.refuses_credential()?;
    Some(format!("it answers {status}: check its api_key and auth_mode"))
}
