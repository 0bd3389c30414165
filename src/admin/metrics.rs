//! `/metrics`: what was counted of exchanges, and the state of everything else, read when it is asked for, in Prometheus'
//! text format.

use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response};
use prometheus::process_collector::ProcessCollector;
use prometheus::{Encoder, GaugeVec, IntCounterVec, Opts, Registry, TEXT_FORMAT, TextEncoder};

use super::Sources;
use crate::cache::CacheState;
use crate::ledger::Ledger;
use crate::pool::{BreakerState, HealthState};
use crate::runtime::{ReloadState, Runtime};
use crate::telemetry::metrics::{self as names, Metric};

/// The page.
///
/// # Errors
/// When Prometheus' library does not take a name or label; a test scrapes all of them.
pub(super) fn page(runtime: &Runtime, sources: &Sources) -> prometheus::Result<Response<Bytes>> {
    let registry = Registry::new();
    registry.register(Box::new(ProcessCollector::for_self()))?;
    process(&registry, runtime, sources)?;
    configuration(&registry, runtime, &sources.reloads.state())?;
    limits(&registry, runtime)?;
    shared(&registry, runtime)?;
    if let Some(ledger) = &sources.ledger {
        self::ledger(&registry, ledger)?;
    }
    pools(&registry, runtime)?;
    let mut families = sources.telemetry.counters.gather();
    families.extend(registry.gather());
    families.sort_by(|a, b| a.name().cmp(b.name()));
    let mut text = Vec::new();
    TextEncoder::new().encode(&families, &mut text)?;
    let mut page = Response::new(Bytes::from(text));
    page.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(TEXT_FORMAT));
    Ok(page)
}

#[allow(clippy::cast_precision_loss, reason = "counts of connections and bytes")]
fn process(registry: &Registry, runtime: &Runtime, sources: &Sources) -> prometheus::Result<()> {
    let lifecycle = &sources.lifecycle;
    let coming = runtime.cache.as_ref().map_or(0, |cache| cache.state().coming);
    for (metric, count) in [
        (&names::INFLIGHT, lifecycle.inflight()),
        (&names::CONNECTIONS, lifecycle.connections.count()),
        (&names::BUFFERED_BYTES, lifecycle.held.count() + coming),
    ] {
        gauge(registry, metric)?.with_label_values::<&str>(&[]).set(count as f64);
    }
    let refused = counter(registry, &names::CONNECTIONS_REFUSED)?;
    refused.with_label_values::<&str>(&[]).inc_by(lifecycle.refused.load(Ordering::Relaxed));
    let lines = counter(registry, &names::LOG_LINES)?;
    for (outcome, count) in
        ["written", "dropped"].iter().zip(sources.telemetry.request_log.counts())
    {
        lines.with_label_values(&[outcome]).inc_by(count);
    }
    let spans = counter(registry, &names::SPANS)?;
    for (outcome, count) in ["sent", "dropped"].iter().zip(sources.telemetry.spans.counts()) {
        spans.with_label_values(&[outcome]).inc_by(count);
    }
    let build = gauge(registry, &names::BUILD)?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "times and counts of reloads")]
fn configuration(
    registry: &Registry,
    runtime: &Runtime,
    reloads: &ReloadState,
) -> prometheus::Result<()> {
    let done = counter(registry, &names::RELOADS)?;
    // The first generation was no reload.
    done.with_label_values(&["ok"]).inc_by(reloads.generation - 1);
    done.with_label_values(&["failed"]).inc_by(reloads.failed);
    let generation = gauge(registry, &names::GENERATION)?;
    generation.with_label_values::<&str>(&[]).set(reloads.generation as f64);
    let is_fine = reloads.last.as_ref().is_none_or(|last| last.outcome.is_ok());
    let last = gauge(registry, &names::LAST_RELOAD)?;
    last.with_label_values::<&str>(&[]).set(f64::from(u8::from(is_fine)));
    let ends = gauge(registry, &names::CERTIFICATE)?;
    let tls = runtime.snapshot.tls.as_ref();
    for (at, certificate) in tls.iter().flat_map(|tls| &tls.certificates).enumerate() {
        let number = format!("#{}", at + 1);
        let name = certificate.names.first().map_or(number.as_str(), String::as_str);
        ends.with_label_values(&[name]).set(certificate.not_after as f64);
    }
    Ok(())
}

fn limits(registry: &Registry, runtime: &Runtime) -> prometheus::Result<()> {
    let refused = counter(registry, &names::RATE_LIMITED)?;
    let shadowed = counter(registry, &names::LIMITS_SHADOWED)?;
    for (name, tally) in runtime.limits.tallies() {
        refused.with_label_values(&[name]).inc_by(tally.refused());
        shadowed.with_label_values(&[name]).inc_by(tally.shadowed());
    }
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "counts of answers, bytes and gateways")]
fn shared(registry: &Registry, runtime: &Runtime) -> prometheus::Result<()> {
    let cache = runtime.cache.as_ref().map(|cache| cache.state());
    if let Some(CacheState { held: (answers, bytes), shared: None, .. }) = cache {
        gauge(registry, &names::CACHE_ANSWERS)?.with_label_values::<&str>(&[]).set(answers as f64);
        gauge(registry, &names::CACHE_BYTES)?.with_label_values::<&str>(&[]).set(bytes as f64);
    }
    let limits = runtime.limits.shared();
    if let Some((gateways, ..)) = limits {
        gauge(registry, &names::GATEWAYS)?.with_label_values::<&str>(&[]).set(gateways as f64);
    }
    let users =
        [limits.map(|(_, failures, away)| (away, failures)), cache.and_then(|it| it.shared)];
    if users.iter().flatten().next().is_none() {
        return Ok(());
    }
    let is_up = users.iter().flatten().all(|(away, _)| away.is_none());
    let failures = users.iter().flatten().map(|(_, failures)| failures).sum();
    let up = gauge(registry, &names::REDIS_UP)?;
    up.with_label_values::<&str>(&[]).set(f64::from(u8::from(is_up)));
    let failed = counter(registry, &names::REDIS_FAILURES)?;
    failed.with_label_values::<&str>(&[]).inc_by(failures);
    Ok(())
}

fn ledger(registry: &Registry, ledger: &Ledger) -> prometheus::Result<()> {
    let rows = counter(registry, &names::LEDGER_ROWS)?;
    for (stage, count) in ["spooled", "stored", "dropped"].iter().zip(ledger.state().counts()) {
        rows.with_label_values(&[stage]).inc_by(count);
    }
    let up = gauge(registry, &names::LEDGER_UP)?;
    for (part, failure) in ["spool", "database"].iter().zip(ledger.state().failures()) {
        up.with_label_values(&[part]).set(f64::from(u8::from(failure.is_none())));
    }
    let bytes = gauge(registry, &names::LEDGER_SPOOL_BYTES)?;
    #[allow(clippy::cast_precision_loss, reason = "a count of bytes")]
    bytes.with_label_values::<&str>(&[]).set(ledger.spool_bytes() as f64);
    let unpriced = counter(registry, &names::UNPRICED)?;
    unpriced.with_label_values::<&str>(&[]).inc_by(ledger.state().unpriced());
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "counts of exchanges")]
fn pools(registry: &Registry, runtime: &Runtime) -> prometheus::Result<()> {
    let queue = gauge(registry, &names::QUEUE_LENGTH)?;
    let retries = counter(registry, &names::RETRIES)?;
    let attempts = counter(registry, &names::BACKEND_REQUESTS)?;
    let up = gauge(registry, &names::BACKEND_UP)?;
    let breaker = gauge(registry, &names::BREAKER_STATE)?;
    let misconfigured = gauge(registry, &names::BACKEND_MISCONFIGURED)?;
    let drained = gauge(registry, &names::BACKEND_DRAINED)?;
    let inflight = gauge(registry, &names::BACKEND_INFLIGHT)?;
    let response_time = gauge(registry, &names::BACKEND_RESPONSE_TIME)?;
    let now = Instant::now();
    let is = |fact: bool| f64::from(u8::from(fact));
    for (service, model, _) in runtime.snapshot.pools() {
        let Some(pool) = runtime.pool(service, model) else { continue };
        queue.with_label_values(&[service, model]).set(pool.queue().length() as f64);
        retries.with_label_values(&[service, model]).inc_by(pool.retries.total());
        for backend in pool.backends() {
            let labels = &[service, model, &backend.spec.id];
            let health = &backend.live.health;
            attempts.with_label_values(labels).inc_by(backend.live.attempts.total());
            up.with_label_values(labels).set(is(health.state() != HealthState::Unhealthy));
            breaker.with_label_values(labels).set(match backend.breaker(now) {
                BreakerState::Closed => 0.0,
                BreakerState::HalfOpen => 1.0,
                BreakerState::Open => 2.0,
            });
            misconfigured.with_label_values(labels).set(is(backend.refuses_credential().is_some()));
            drained.with_label_values(labels).set(is(backend.is_drained()));
            inflight.with_label_values(labels).set(backend.inflight() as f64);
            if let Some(time) = health.response_time() {
                response_time.with_label_values(labels).set(time.as_secs_f64());
            }
        }
    }
    Ok(())
}

fn gauge(registry: &Registry, metric: &Metric) -> prometheus::Result<GaugeVec> {
    let gauge = GaugeVec::new(Opts::new(metric.name, metric.help), metric.labels)?;
    registry.register(Box::new(gauge.clone()))?;
    Ok(gauge)
}

fn counter(registry: &Registry, metric: &Metric) -> prometheus::Result<IntCounterVec> {
    let counter = IntCounterVec::new(Opts::new(metric.name, metric.help), metric.labels)?;
    registry.register(Box::new(counter.clone()))?;
    Ok(counter)
}
