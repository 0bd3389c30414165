//! The gateway's own pages: health, status, dashboard.

mod cache;
mod change;
mod dashboard;
mod metrics;
mod models;
mod reload;
mod stats;
mod status;
mod usage;
mod view;

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use http::header::{
    ACCEPT, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ALLOW, CONTENT_TYPE,
};
use http::{HeaderValue, Method, Response, StatusCode};
use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use crate::ledger::Ledger;
use crate::lifecycle::{Lifecycle, Phase};
use crate::llm::Dialect;
use crate::refusal::Refusal;
use crate::runtime::{Current, PageAnswer, PageRequest, Pages, Reloads, Runtime};
use crate::telemetry::Telemetry;

use dashboard::Dashboard;
use usage::Reports;
use view::Views;

/// Which pages an address serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of them, on an address that takes traffic too.
    Everything,
    /// All of them and what changes the gateway, on an address of their own.
    Admin,
    /// `/health` and `/ready`: the others have an address of their own.
    Probes,
}

/// What pages are made of, beside the runtime.
#[derive(Clone)]
pub struct Sources {
    /// The runtime of the moment.
    pub current: Arc<Current>,
    /// The process's phase, and what is in flight.
    pub lifecycle: Arc<Lifecycle>,
    /// How reloads went, and who does them.
    pub reloads: Arc<Reloads>,
    /// Where usage is kept, if it is.
    pub ledger: Option<Arc<Ledger>>,
    /// What was counted.
    pub telemetry: Arc<Telemetry>,
}

/// The pages.
pub struct Admin {
    scope: Scope,
    sources: Sources,
    reports: Reports,
    views: Arc<Views>,
    dashboard: Dashboard,
}

/// A page's methods, for `Allow`.
const METHODS: &str = "GET, HEAD, OPTIONS";

const STATUS: &str = "/api/health/status";

impl Admin {
    /// The pages of `scope`.
    #[must_use]
    pub fn new(scope: Scope, sources: Sources) -> Self {
        let reports = Reports::new(sources.ledger.clone());
        let views = Views::new(scope, sources.clone());
        Self { scope, sources, reports, views, dashboard: Dashboard::new() }
    }

    /// The page at a path, if there is one.
    fn page(&self, runtime: &Runtime, request: &PageRequest<'_>) -> Option<Result<Page, Refusal>> {
        let page = match (request.path, self.scope) {
            ("/health", _) => Ok(Page::Small(health())),
            ("/ready", _) => Ok(Page::Small(self.ready())),
            (_, Scope::Probes) => return None,
            // Who has one upstream has clients that ask here whether it is well, whatever they accept.
            ("/", _) if wants(request, runtime.catalog.everything.is_some()) == Wants::Json => {
                Ok(Page::Small(health()))
            }
            ("/", _) => Ok(Page::Small(self.dashboard.page())),
            ("/metrics" | "/stats", _) if !runtime.snapshot.observed.metrics => {
                Err(Refusal::MetricsOff)
            }
            ("/metrics", _) => Ok(Page::Large(metrics_page)),
            ("/stats", _) => Ok(Page::Large(|runtime, sources| {
                own_json(stats::all(runtime, sources).to_string())
            })),
            (STATUS, Scope::Everything) => {
                Ok(Page::Large(|runtime, _| json_page(&status::all(runtime))))
            }
            (STATUS, Scope::Admin) => Ok(Page::Large(admins_status)),
            (path, Scope::Everything | Scope::Admin) => {
                service_status(runtime, request, path.strip_prefix(STATUS)?.strip_prefix('/')?)
                    .map(Page::Small)
            }
        };
        Some(page)
    }

    fn ready(&self) -> Response<Bytes> {
        let (status, word) = match self.sources.lifecycle.phase() {
            Phase::Starting => (StatusCode::SERVICE_UNAVAILABLE, "starting"),
            Phase::Ready => (StatusCode::OK, "ready"),
            Phase::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        };
        let inflight = self.sources.lifecycle.inflight();
        let mut page = json_page(&json!({"status": word, "in_flight": inflight}));
        *page.status_mut() = status;
        page
    }
}

impl Pages for Admin {
    fn answer(&self, runtime: &Runtime, request: &PageRequest<'_>) -> Option<PageAnswer> {
        match (request.path, self.scope) {
            (reload::PATH, Scope::Admin) => {
                return Some(reload::answer(&self.sources.reloads, runtime, request));
            }
            (cache::PURGE, Scope::Admin) => return Some(cache::purge(runtime, request)),
            (change::DRAIN, Scope::Admin) => return Some(change::drain(runtime, request, true)),
            (change::UNDRAIN, Scope::Admin) => return Some(change::drain(runtime, request, false)),
            (view::PATH, Scope::Admin | Scope::Everything) => {
                return Some(self.views.page(runtime, request));
            }
            (view::LIVE, Scope::Admin | Scope::Everything) => {
                return Some(self.views.live(runtime, request));
            }
            _ => {}
        }
        if self.scope != Scope::Admin
            && let Some(page) = models::answer(runtime, request)
        {
            return Some(page.map_or_else(PageAnswer::Refused, PageAnswer::Now));
        }
        if request.path == usage::PATH && matches!(*request.method, Method::GET) {
            let sees_all = self.scope != Scope::Probes;
            return Some(self.reports.answer(runtime, request, sees_all));
        }
        let page = self.page(runtime, request)?;
        let page = match (request.method, page) {
            (&Method::GET | &Method::HEAD, Ok(Page::Large(make))) => {
                return Some(PageAnswer::Later(Box::pin(made(self.sources.clone(), make))));
            }
            (&Method::GET | &Method::HEAD, Ok(Page::Small(page))) => page,
            (&Method::GET | &Method::HEAD, Err(refusal)) => refusal_page(&refusal),
            (&Method::OPTIONS, _) => preflight(),
            _ => refusal_page(&Refusal::MethodNotAllowed { allow: METHODS }),
        };
        Some(PageAnswer::Now(page))
    }
}

/// One of the pages.
enum Page {
    Small(Response<Bytes>),
    /// It grows with the configuration: making it would keep the traffic of a thread waiting.
    Large(Make),
}

type Make = fn(&Runtime, &Sources) -> Response<Bytes>;

/// Makes a page beside the traffic's threads.
async fn made(sources: Sources, make: Make) -> Response<Bytes> {
    let made = move || make(&sources.current.load_full(), &sources);
    let made = tokio::task::spawn_blocking(made).await;
    made.unwrap_or_else(|_| refusal_page(&Refusal::Internal))
}

fn metrics_page(runtime: &Runtime, sources: &Sources) -> Response<Bytes> {
    metrics::page(runtime, sources).unwrap_or_else(|error| {
        log::error!("the metrics cannot be shown: {error}");
        refusal_page(&Refusal::Internal)
    })
}

/// The status of everything, for who runs the gateway.
fn admins_status(runtime: &Runtime, sources: &Sources) -> Response<Bytes> {
    let mut page = status::all(runtime);
    page["configuration"] = reload::state(&sources.reloads.state());
    page["ledger"] = sources.ledger.as_deref().map_or(Value::Null, ledger_state);
    page["cache"] = runtime.cache.as_ref().map_or(Value::Null, |it| cache::state(&it.state()));
    page["redis"] = runtime.limits.shared().map_or(Value::Null, redis_state);
    json_page(&page)
}

/// How the ledger does.
fn ledger_state(ledger: &Ledger) -> Value {
    let [spooled, stored, dropped] = ledger.state().counts();
    let [spool, database] = ledger.state().failures();
    json!({
        "rows_spooled": spooled,
        "rows_stored": stored,
        "rows_dropped": dropped,
        "spool_bytes": ledger.spool_bytes(),
        "spool_failure": spool,
        "database_failure": database,
    })
}

/// How it is with the server that gateways share.
fn redis_state((gateways, failures, away): (usize, u64, Option<String>)) -> Value {
    let status = if away.is_none() { "up" } else { "away" };
    json!({"status": status, "failure": away, "failures": failures, "gateways": gateways})
}

fn health() -> Response<Bytes> {
    let version = env!("CARGO_PKG_VERSION");
    json_page(&json!({"status": "ok", "service": "tollgate", "version": version}))
}

/// What a client wants to see at `/`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wants {
    Html,
    Json,
}

/// Browsers want a page, and so does who does not say, unless `programs_ask`; programs may want JSON.
fn wants(request: &PageRequest<'_>, programs_ask: bool) -> Wants {
    let accepted = request.headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let mut weights = [0.0, 0.0];
    for range in accepted.flat_map(|value| value.split(',')) {
        let (kind, parameters) = range.split_once(';').unwrap_or((range, ""));
        let weight = parameters.split(';').find_map(|it| it.trim().strip_prefix("q="));
        let weight = weight.map_or(1.0, |weight| weight.trim().parse::<f32>().unwrap_or(0.0));
        let kinds = ["text/html", "application/json"];
        if let Some(at) = kinds.iter().position(|it| kind.trim().eq_ignore_ascii_case(it)) {
            weights[at] = weight;
        }
    }
    let [html, json] = weights;
    let is_page = if html == json { html > 0.0 || !programs_ask } else { html > json };
    if is_page { Wants::Html } else { Wants::Json }
}

fn service_status(
    runtime: &Runtime,
    request: &PageRequest<'_>,
    service: &str,
) -> Result<Response<Bytes>, Refusal> {
    let grant = runtime.grant(request.headers, request.client)?;
    let service = percent_decode_str(service).decode_utf8_lossy();
    status::one(runtime, &service, &grant)
        .map(|page| json_page(&page))
        .ok_or_else(|| Refusal::NoService { service: service.into_owned() })
}

/// JSON that pages of any origin may read: a team's own dashboard is one.
fn json_page(body: &Value) -> Response<Bytes> {
    json_text(body.to_string())
}

/// JSON for no other page: what passes through the gateway is not for whoever a browser shows besides.
fn own_json(body: impl Into<Bytes>) -> Response<Bytes> {
    let mut page = Response::new(body.into());
    page.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    page
}

fn json_text(body: String) -> Response<Bytes> {
    let mut page = Response::new(Bytes::from(body));
    let headers = page.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    page
}

fn preflight() -> Response<Bytes> {
    let mut page = Response::new(Bytes::new());
    *page.status_mut() = StatusCode::NO_CONTENT;
    let headers = page.headers_mut();
    headers.insert(ALLOW, HeaderValue::from_static(METHODS));
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(METHODS));
    let credentials = "Authorization, X-API-Key, Content-Type";
    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(credentials));
    page
}

fn refusal_page(refusal: &Refusal) -> Response<Bytes> {
    let mut page = json_text(refusal.body(Dialect::OpenAi, ""));
    *page.status_mut() = refusal.status();
    page.headers_mut().extend(refusal.headers());
    page
}

/// To the millisecond, in UTC.
fn time(at: SystemTime) -> Option<String> {
    Timestamp::try_from(at).ok().map(|time| format!("{time:.3}"))
}
