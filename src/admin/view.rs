//! What the dashboard shows, as JSON: `/api/dashboard` once, `/api/dashboard/live` again and again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc};

use super::{Scope, Sources, own_json, refusal_page, reload, status, time};
use crate::config::ClientKeys;
use crate::lifecycle::Phase;
use crate::pool::{Backend, BreakerState, HealthState, Pool};
use crate::refusal::Refusal;
use crate::runtime::{PageAnswer, PageRequest, Runtime};
use crate::telemetry::history::{self, Percentiles, Point, Rates};
use crate::telemetry::{Fault, Taker};

pub(super) const PATH: &str = "/api/dashboard";
pub(super) const LIVE: &str = "/api/dashboard/live";

/// How often a page that is open is told, where there is not very much to tell.
const INTERVAL: Duration = Duration::from_secs(2);

/// Bytes a second for each page that is open: with thousands of backends it is told less often.
const BYTES_A_SECOND: usize = 256 * 1024;

/// Pages that are told by themselves at the same time; others ask every few seconds.
const VIEWERS_MAX: usize = 32;

/// How old what is shown may be, so that many pages take little more than one.
const FRESH: Duration = Duration::from_millis(500);

/// Failures and keys that are shown.
const FAULTS_SHOWN: usize = 50;
const KEYS_SHOWN: usize = 20;

/// Makes views.
pub(super) struct Views {
    scope: Scope,
    sources: Sources,
    room: Arc<Semaphore>,
    /// The last one, for those who ask soon after.
    last: Mutex<Option<Shown>>,
}

/// What is shown at a moment.
#[derive(Clone)]
struct Shown {
    at: Instant,
    /// All but the history, with its closing brace.
    view: Bytes,
    /// The last half hour, and when its last point was.
    history: Bytes,
    end: SystemTime,
}

impl Shown {
    /// As JSON, with the history unless it ends as one that is known.
    fn json(&self, known: Option<SystemTime>) -> Bytes {
        if known == Some(self.end) {
            return self.view.clone();
        }
        let open = &self.view[..self.view.len() - 1];
        [open, b",\"history\":", &self.history, b"}"].concat().into()
    }
}

impl Views {
    pub(super) fn new(scope: Scope, sources: Sources) -> Arc<Self> {
        let room = Arc::new(Semaphore::new(VIEWERS_MAX));
        Arc::new(Self { scope, sources, room, last: Mutex::default() })
    }

    /// The view as it is now.
    pub(super) fn page(
        self: &Arc<Self>,
        runtime: &Runtime,
        request: &PageRequest<'_>,
    ) -> PageAnswer {
        if let Err(refusal) = self.check(runtime, request) {
            return PageAnswer::Now(refusal_page(&refusal));
        }
        let own = Arc::clone(self);
        PageAnswer::Later(Box::pin(async move {
            match own.look().await {
                Some(shown) => own_json(shown.json(None)),
                None => refusal_page(&Refusal::Internal),
            }
        }))
    }

    /// The view again and again, as server-sent events, for as long as the client stays and may see it.
    pub(super) fn live(
        self: &Arc<Self>,
        runtime: &Runtime,
        request: &PageRequest<'_>,
    ) -> PageAnswer {
        if let Err(refusal) = self.check(runtime, request) {
            return PageAnswer::Now(refusal_page(&refusal));
        }
        let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() else {
            return PageAnswer::Now(refusal_page(&Refusal::TooManyViewers));
        };
        let (events, received) = mpsc::channel(1);
        let (own, headers, client) = (Arc::clone(self), request.headers.clone(), request.client);
        tokio::spawn(async move {
            let _permit = permit;
            let mut known = None;
            loop {
                let runtime = own.sources.current.load_full();
                // The key may have been taken away meanwhile.
                if own.may_see(&runtime, &headers, client).is_err() {
                    return;
                }
                let Some(shown) = own.look().await else { return };
                let view = shown.json(known.replace(shown.end));
                let pause = INTERVAL.max(Duration::from_secs((view.len() / BYTES_A_SECOND) as u64));
                let event = [&b"data: "[..], &view, b"\n\n"].concat();
                tokio::select! {
                    sent = events.send(event.into()) => if sent.is_err() { return },
                    () = own.sources.lifecycle.parted() => return,
                }
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = own.sources.lifecycle.parted() => return,
                    () = events.closed() => return,
                }
            }
        });
        PageAnswer::Live(received)
    }

    fn check(&self, runtime: &Runtime, request: &PageRequest<'_>) -> Result<(), Refusal> {
        if !matches!(*request.method, http::Method::GET) {
            return Err(Refusal::MethodNotAllowed { allow: "GET" });
        }
        self.may_see(runtime, request.headers, request.client)
    }

    /// Who may see it: an admin, where there is one; on an address of its own, else whoever reaches that.
    fn may_see(
        &self,
        runtime: &Runtime,
        headers: &http::HeaderMap,
        client: Option<std::net::IpAddr>,
    ) -> Result<(), Refusal> {
        let ClientKeys::Required(specs) = &runtime.snapshot.clients else { return Ok(()) };
        let granted = runtime.grant(headers, client);
        if granted.as_ref().is_ok_and(|grant| grant.is_admin) {
            return Ok(());
        }
        let has_admin = || {
            let issuers = specs.issuers.iter().map(|issuer| issuer.grant.as_ref());
            specs.keys.iter().chain(issuers).any(|key| key.is_admin)
        };
        if self.scope == Scope::Admin && !has_admin() {
            return Ok(());
        }
        granted.and(Err(Refusal::NotAllowed))
    }

    /// What there is to see now; none where that cannot be made. Thousands of backends take a while, in which others on
    /// this thread would wait.
    async fn look(self: &Arc<Self>) -> Option<Shown> {
        let own = Arc::clone(self);
        let look = move || own.shown(&own.sources.current.load_full());
        tokio::task::spawn_blocking(look).await.ok()
    }

    fn shown(&self, runtime: &Runtime) -> Shown {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(shown) if shown.at.elapsed() < FRESH => shown.clone(),
            _ => {
                let (points, end) = self.sources.telemetry.history.points();
                let view = self.json(runtime).to_string().into();
                let history = history(&points, end).to_string().into();
                last.insert(Shown { at: Instant::now(), view, history, end }).clone()
            }
        }
    }

    fn json(&self, runtime: &Runtime) -> Value {
        let Sources { lifecycle, reloads, telemetry, .. } = &self.sources;
        let counters = &telemetry.counters;
        let totals = counters.totals();
        let can_change = self.scope == Scope::Admin;
        let queued: usize = runtime.pools().map(|pool| pool.queue().length()).sum();
        let faults = counters.faults();
        let keys = counters.takers.top(KEYS_SHOWN);
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "now": time(SystemTime::now()),
            "started": time(counters.started),
            "interval_ms": INTERVAL.as_millis() as u64,
            "phase": match lifecycle.phase() {
                Phase::Starting => "starting",
                Phase::Ready => "ready",
                Phase::Draining => "draining",
            },
            "can_change": can_change,
            "why_not": (!can_change).then_some("no_admin_listen"),
            // Without keys, what a page of any name could do is done by address only.
            "needs_address": !matches!(runtime.snapshot.clients, ClientKeys::Required(_)),
            "metrics": runtime.snapshot.observed.metrics,
            "configuration": reload::state(&reloads.state()),
            "notices": self.notices(runtime),
            "in_flight": lifecycle.inflight(),
            "queued": queued,
            "connections": lifecycle.connections.count(),
            "totals": {
                "requests": totals.requests,
                "errors": totals.errors,
                "refused": totals.refused,
                "aborts": totals.aborts,
                "tokens_input": totals.tokens_input,
                "tokens_output": totals.tokens_output,
            },
            "minute": minute(&telemetry.history.minute(counters)),
            "pools": pools(runtime),
            "errors": faults.iter().take(FAULTS_SHOWN).map(fault).collect::<Vec<_>>(),
            "keys": keys.iter().map(taker).collect::<Vec<_>>(),
            "keys_note": keys_note(runtime),
        })
    }

    /// What an operator should know of the gateway's own parts; the page has words for it.
    fn notices(&self, runtime: &Runtime) -> Vec<Value> {
        let mut notices = Vec::new();
        if let Some(ledger) = &self.sources.ledger {
            let [spool, database] = ledger.state().failures();
            for (what, why) in [("ledger_spool", spool), ("ledger_database", database)] {
                notices.extend(why.map(|why| json!({"what": what, "why": why})));
            }
            let [_, _, dropped] = ledger.state().counts();
            if dropped > 0 {
                notices.push(json!({"what": "ledger_lost", "count": dropped}));
            }
        }
        if let Some((_, _, Some(why))) = runtime.limits.shared() {
            notices.push(json!({"what": "redis", "why": why}));
        }
        let [_, dropped] = self.sources.telemetry.request_log.counts();
        if dropped > 0 {
            notices.push(json!({"what": "log_lost", "count": dropped}));
        }
        notices
    }
}

/// Why there are no keys to show, where that is not for want of traffic; the page has words for it.
fn keys_note(runtime: &Runtime) -> Option<&'static str> {
    let snapshot = &runtime.snapshot;
    if !matches!(snapshot.clients, ClientKeys::Required(_)) {
        return Some("no_keys");
    }
    (!snapshot.observed.metrics).then_some("metrics_off")
}

pub(super) fn minute(rates: &Rates) -> Value {
    json!({
        "requests_per_second": round(rates.requests),
        "errors_per_second": round(rates.errors),
        "refused_per_second": round(rates.refused),
        "tokens_input_per_second": round(rates.tokens_input),
        "tokens_output_per_second": round(rates.tokens_output),
        "error_rate": rates.error_rate,
        "ttfb_ms": rates.first_byte.as_ref().map(percentiles),
        "duration_ms": rates.duration.as_ref().map(percentiles),
    })
}

fn percentiles(of: &Percentiles) -> Value {
    json!({"p50": millis(of.p50), "p95": millis(of.p95), "p99": millis(of.p99)})
}

fn history(points: &[Point], end: SystemTime) -> Value {
    let of = |value: &dyn Fn(&Point) -> Value| -> Value { points.iter().map(value).collect() };
    let rate = |value: fn(&Rates) -> f64| of(&|point| json!(round(value(&point.rates))));
    let share = |of_what: fn(&Rates) -> Option<Percentiles>,
                 share: fn(&Percentiles) -> Duration| {
        of(&|point| json!(of_what(&point.rates).as_ref().map(|it| millis(share(it)))))
    };
    json!({
        "step_seconds": history::STEP.as_secs(),
        "end": time(end),
        "requests": rate(|rates| rates.requests),
        "errors": rate(|rates| rates.errors),
        "tokens_input": rate(|rates| rates.tokens_input),
        "tokens_output": rate(|rates| rates.tokens_output),
        "ttfb_p50": share(|rates| rates.first_byte, |it| it.p50),
        "ttfb_p95": share(|rates| rates.first_byte, |it| it.p95),
        "duration_p50": share(|rates| rates.duration, |it| it.p50),
        "duration_p95": share(|rates| rates.duration, |it| it.p95),
        "in_flight": of(&|point| json!(point.inflight)),
        "queued": of(&|point| json!(point.queued)),
    })
}

fn pools(runtime: &Runtime) -> Vec<Value> {
    let now = Instant::now();
    let pools = runtime.snapshot.pools().filter_map(|(service, model, _)| {
        let pool = runtime.pool(service, model)?;
        Some(self::pool(pool, (service, model), now))
    });
    pools.collect()
}

fn pool(pool: &Arc<Pool>, (service, model): (&str, &str), now: Instant) -> Value {
    let recent: HashMap<&str, u64> = pool
        .backends()
        .iter()
        .map(|it| (it.spec.id.as_str(), it.live.attempts.last_minute(now)))
        .collect();
    let backends = pool.backends().iter().map(|it| backend(it, recent[it.spec.id.as_str()], now));
    json!({
        "service": service,
        "model": model,
        "queued": pool.queue().length(),
        "requests_last_minute": recent.values().sum::<u64>(),
        "errors_last_minute": pool.errors.last_minute(now),
        "backends": backends.collect::<Vec<_>>(),
    })
}

fn backend(backend: &Backend, last_minute: u64, now: Instant) -> Value {
    let mut state = status::backend_status(backend);
    let health = &backend.live.health;
    let is_down = health.state() == HealthState::Unhealthy;
    let is_broken = backend.breaker(now) != BreakerState::Closed;
    let broke = || backend.last_failure().filter(|_| is_broken).map(|(_, why)| why);
    state["why"] = json!(health.failure().filter(|_| is_down).or_else(broke));
    let alone = backend.left_alone_for(now).filter(|_| is_broken);
    state["left_alone_seconds"] = json!(alone.map(|time| time.as_secs() + 1));
    state["errors_last_minute"] = json!(backend.live.failures.last_minute(now));
    state["last_failure"] =
        json!(backend.last_failure().map(|(at, why)| json!({"at": time(at), "why": why})));
    state["weight"] = json!(backend.spec.weight);
    state["in_flight"] = json!(backend.inflight());
    state["inflight_max"] = json!(backend.spec.inflight_max);
    state["requests"] = json!(backend.live.attempts.total());
    state["requests_last_minute"] = json!(last_minute);
    state
}

fn fault(fault: &Fault) -> Value {
    let [service, model] = &fault.pool;
    json!({
        "at": time(fault.at),
        "since": time(fault.since),
        "count": fault.count,
        "request_id": fault.request_id,
        "service": service,
        "model": model,
        "backend": fault.backend,
        "key": fault.key,
        "status": fault.status,
        "kind": fault.kind,
        "why": fault.why,
    })
}

fn taker(taker: &Taker) -> Value {
    json!({
        "id": *taker.id,
        "name": *taker.name,
        "requests": taker.requests,
        "tokens_input": taker.tokens_input,
        "tokens_output": taker.tokens_output,
        "cost": taker.cost.normalize().to_string(),
        "currency": *taker.currency,
    })
}

/// To the hundredth.
fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn millis(time: Duration) -> f64 {
    round(time.as_secs_f64() * 1000.0)
}
