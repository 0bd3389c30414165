//! `/metrics`: the state of pools and backends in Prometheus' text format, read when it is asked for.

use std::time::Instant;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response};
use prometheus::{Encoder, GaugeVec, IntCounterVec, Opts, Registry, TEXT_FORMAT, TextEncoder};

use crate::ledger::Ledger;
use crate::lifecycle::Lifecycle;
use crate::pool::{BreakerState, HealthState};
use crate::runtime::{ReloadState, Runtime};
use crate::telemetry::metrics as names;

/// The page.
///
/// # Errors
/// When Prometheus' library does not take a name or label; a test scrapes all of them.
pub(super) fn page(
    runtime: &Runtime,
    lifecycle: &Lifecycle,
    reloads: &ReloadState,
    ledger: Option<&Ledger>,
) -> prometheus::Result<Response<Bytes>> {
    let registry = Registry::new();
    process(&registry, lifecycle, reloads)?;
    limits(&registry, runtime)?;
    if let Some(ledger) = ledger {
        self::ledger(&registry, ledger)?;
    }
    pools(&registry, runtime)?;
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    let mut page = Response::new(Bytes::from(text));
    page.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(TEXT_FORMAT));
    Ok(page)
}

#[allow(clippy::cast_precision_loss, reason = "counts of connections and bytes")]
fn process(
    registry: &Registry,
    lifecycle: &Lifecycle,
    reloads: &ReloadState,
) -> prometheus::Result<()> {
    let inflight = gauge(registry, names::INFLIGHT, &[])?;
    inflight.with_label_values::<&str>(&[]).set(lifecycle.inflight() as f64);
    let buffered = gauge(registry, names::BUFFERED_BYTES, &[])?;
    buffered.with_label_values::<&str>(&[]).set(lifecycle.held.count() as f64);
    let done = counter(registry, names::RELOADS, &["outcome"])?;
    // The first generation was no reload.
    done.with_label_values(&["ok"]).inc_by(reloads.generation - 1);
    done.with_label_values(&["failed"]).inc_by(reloads.failed);
    Ok(())
}

fn limits(registry: &Registry, runtime: &Runtime) -> prometheus::Result<()> {
    let refused = counter(registry, names::RATE_LIMITED, &["limit"])?;
    let shadowed = counter(registry, names::LIMITS_SHADOWED, &["limit"])?;
    for (name, tally) in runtime.limits.tallies() {
        refused.with_label_values(&[name]).inc_by(tally.refused());
        shadowed.with_label_values(&[name]).inc_by(tally.shadowed());
    }
    if let Some((gateways, failures, away)) = runtime.limits.shared() {
        let up = gauge(registry, names::REDIS_UP, &[])?;
        up.with_label_values::<&str>(&[]).set(f64::from(u8::from(away.is_none())));
        let failed = counter(registry, names::REDIS_FAILURES, &[])?;
        failed.with_label_values::<&str>(&[]).inc_by(failures);
        let count = gauge(registry, names::GATEWAYS, &[])?;
        #[allow(clippy::cast_precision_loss, reason = "a count of gateways")]
        count.with_label_values::<&str>(&[]).set(gateways as f64);
    }
    Ok(())
}

fn ledger(registry: &Registry, ledger: &Ledger) -> prometheus::Result<()> {
    let rows = counter(registry, names::LEDGER_ROWS, &["stage"])?;
    for (stage, count) in ["spooled", "stored", "dropped"].iter().zip(ledger.state().counts()) {
        rows.with_label_values(&[stage]).inc_by(count);
    }
    let up = gauge(registry, names::LEDGER_UP, &["part"])?;
    for (part, failure) in ["spool", "database"].iter().zip(ledger.state().failures()) {
        up.with_label_values(&[part]).set(f64::from(u8::from(failure.is_none())));
    }
    let bytes = gauge(registry, names::LEDGER_SPOOL_BYTES, &[])?;
    #[allow(clippy::cast_precision_loss, reason = "a count of bytes")]
    bytes.with_label_values::<&str>(&[]).set(ledger.spool_bytes() as f64);
    let unpriced = counter(registry, names::UNPRICED, &[])?;
    unpriced.with_label_values::<&str>(&[]).inc_by(ledger.state().unpriced());
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "counts of exchanges")]
fn pools(registry: &Registry, runtime: &Runtime) -> prometheus::Result<()> {
    let of_pool = &["service", "model"];
    let of_backend = &["service", "model", "backend"];
    let queue = gauge(registry, names::QUEUE_LENGTH, of_pool)?;
    let retries = counter(registry, names::RETRIES, of_pool)?;
    let up = gauge(registry, names::BACKEND_UP, of_backend)?;
    let breaker = gauge(registry, names::BREAKER_STATE, of_backend)?;
    let misconfigured = gauge(registry, names::BACKEND_MISCONFIGURED, of_backend)?;
    let inflight = gauge(registry, names::BACKEND_INFLIGHT, of_backend)?;
    let response_time = gauge(registry, names::BACKEND_RESPONSE_TIME, of_backend)?;
    let now = Instant::now();
    for (service, model, _) in runtime.snapshot.pools() {
        let Some(pool) = runtime.pool(service, model) else { continue };
        queue.with_label_values(&[service, model]).set(pool.queue().length() as f64);
        retries.with_label_values(&[service, model]).inc_by(pool.retries());
        for backend in pool.backends() {
            let labels = &[service, model, &backend.spec.id];
            let health = &backend.live.health;
            let is_up = health.state() != HealthState::Unhealthy;
            up.with_label_values(labels).set(f64::from(u8::from(is_up)));
            breaker.with_label_values(labels).set(match backend.breaker(now) {
                BreakerState::Closed => 0.0,
                BreakerState::HalfOpen => 1.0,
                BreakerState::Open => 2.0,
            });
            let refuses = backend.refuses_credential().is_some();
            misconfigured.with_label_values(labels).set(f64::from(u8::from(refuses)));
            inflight.with_label_values(labels).set(backend.inflight() as f64);
            if let Some(time) = health.response_time() {
                response_time.with_label_values(labels).set(time.as_secs_f64());
            }
        }
    }
    Ok(())
}

fn gauge(
    registry: &Registry,
    (name, help): (&str, &str),
    labels: &[&str],
) -> prometheus::Result<GaugeVec> {
    let gauge = GaugeVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(gauge.clone()))?;
    Ok(gauge)
}

fn counter(
    registry: &Registry,
    (name, help): (&str, &str),
    labels: &[&str],
) -> prometheus::Result<IntCounterVec> {
    let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(counter.clone()))?;
    Ok(counter)
}
