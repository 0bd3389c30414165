//! Everything one exchange needs, behind one `Arc`: the snapshot, the routes and the pools with
//! their live state.

mod tls;
mod ways;

use std::collections::HashMap;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderMap, Method, Response};
use percent_encoding::percent_decode;
use pingora_core::ErrorType::InvalidCert;
use pingora_core::OrErr;
use rustls::ServerConfig;
use tokio::sync::{mpsc, oneshot};

use crate::auth::{Grant, Keys};
use crate::cache::Cache;
use crate::config::{Calendar, ClientKeys, Snapshot, Summary, Tariff};
use crate::limits::Limits;
use crate::names::Names;
use crate::pool::{Addresses, Hosts, Pool, Prober};
use crate::refusal::Refusal;
use crate::routing::Router;

pub use ways::{Called, Catalog, Target, Way};

use ways::Ways;

/// The runtime that new exchanges take. Swapped as a whole; an exchange keeps the one it began with.
pub type Current = ArcSwap<Runtime>;

/// One configuration at work.
pub struct Runtime {
    /// The configuration.
    pub snapshot: Snapshot,
    /// Since when it is at work.
    pub since: SystemTime,
    /// What is needed to speak TLS to clients, where that is configured.
    pub tls: Option<Arc<ServerConfig>>,
    /// Who may pass.
    pub keys: Arc<Keys>,
    /// How much clients may take.
    pub limits: Arc<Limits>,
    /// Answers that are kept, where any are.
    pub cache: Option<Arc<Cache>>,
    /// From `/{service}/{model}` to pools.
    pub router: Router<Arc<Way>>,
    /// From a model's name to pools.
    pub catalog: Catalog,
    /// Where hooks may send requests, by `service/model`.
    pub routes: HashMap<String, Arc<Way>>,
    /// Whether services have origins of their own.
    has_service_cors: bool,
    /// From a model's name to what it costs.
    tariffs: Names<Arc<Tariff>>,
    /// All pools by `service/model`, in no order.
    pools: HashMap<String, Arc<Pool>>,
    /// The names that are looked up again and again.
    hosts: Hosts,
    prober: Arc<Prober>,
}

impl Runtime {
    /// Puts a configuration to work. From `previous`, the live state of what stays is carried over.
    ///
    /// # Errors
    /// When a pool cannot be built; see [`Pool::new`]; or a certificate cannot be used.
    pub fn new(snapshot: Snapshot, previous: Option<&Runtime>) -> pingora_core::Result<Self> {
        let mut hosts: Hosts = HashMap::new();
        if let Some(previous) = previous {
            for (_, _, spec) in snapshot.pools() {
                for backend in &spec.backends {
                    let host = (backend.url.host.clone(), backend.url.port);
                    if let Some(known) = previous.hosts.get(&host) {
                        hosts.insert(host, Arc::clone(known));
                    }
                }
            }
        }
        let prober = previous.map(|previous| Arc::clone(&previous.prober)).unwrap_or_default();
        let mut pools = HashMap::new();
        for (service, model, spec) in snapshot.pools() {
            let name = format!("{service}/{model}");
            let before = previous.and_then(|previous| previous.pools.get(&name));
            let pool = match before {
                Some(same) if same.spec() == spec => Arc::clone(same),
                _ => {
                    let before = before.map(Arc::as_ref);
                    Arc::new(Pool::new(name.clone(), spec.clone(), &mut hosts, &prober, before)?)
                }
            };
            pools.insert(name, pool);
        }
        let tls = match (&snapshot.tls, previous) {
            // Kept as it is, so that sessions can be resumed.
            (same, Some(previous)) if *same == previous.snapshot.tls => previous.tls.clone(),
            (Some(tls), _) => Some(tls::server_config(tls).or_err(InvalidCert, "tls")?),
            // A socket may still be there for it, until the process starts anew.
            (None, previous) => previous.and_then(|previous| previous.tls.clone()),
        };
        let keys = match previous {
            Some(same) if same.snapshot.clients == snapshot.clients => Arc::clone(&same.keys),
            _ => {
                let previous = previous.map(|previous| previous.keys.as_ref());
                Arc::new(Keys::new(&snapshot.clients, previous))
            }
        };
        let ways = Ways::new(&snapshot, &pools);
        let router = Router::new(ways.of_paths(&snapshot));
        let catalog = ways.catalog(&snapshot);
        let routes = ways.of_hooks(&snapshot);
        let limits =
            Arc::new(Limits::new(&snapshot, previous.map(|previous| previous.limits.as_ref())));
        let cache = (!snapshot.caching.is_empty()).then(|| {
            let previous = previous.and_then(|previous| previous.cache.as_ref());
            Cache::new(snapshot.cache, snapshot.redis.as_ref(), previous)
        });
        let mut tariffs = Names::default();
        for (name, tariff) in &snapshot.prices.models {
            tariffs.add(name, Arc::clone(tariff));
        }
        let since = SystemTime::now();
        let has_service_cors = snapshot.services.values().any(|service| service.cors.is_some());
        Ok(Self {
            has_service_cors,
            since,
            tls,
            keys,
            limits,
            cache,
            router,
            catalog,
            routes,
            tariffs,
            pools,
            hosts,
            prober,
            snapshot,
        })
    }

    /// What the client may do that sent these headers from this address.
    ///
    /// # Errors
    /// As [`Keys::check`].
    pub fn grant(
        &self,
        headers: &HeaderMap,
        address: Option<IpAddr>,
    ) -> Result<Arc<Grant>, Refusal> {
        self.keys.check(headers, address, || {
            let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            since_1970.as_secs().cast_signed()
        })
    }

    /// The number of the service that a raw path names, where services have origins of their own.
    #[must_use]
    pub fn service_of(&self, path: &[u8]) -> Option<usize> {
        let path = path.strip_prefix(b"/").filter(|_| self.has_service_cors)?;
        let name = path.split(|byte| *byte == b'/').next()?;
        self.snapshot.services.get_index_of(&*percent_decode(name).decode_utf8().ok()?)
    }

    /// What a model costs: by its pool's name, else by its own.
    #[must_use]
    pub fn tariff(&self, pool: &str, model: &str) -> Option<&Tariff> {
        let exact = self.tariffs.exact(pool).or_else(|| self.tariffs.exact(model));
        exact.or_else(|| self.tariffs.pattern_of_any(&[pool, model])).map(Arc::as_ref)
    }

    /// The budgets of the key with this id, for all that it does: their names, of which time they are, and how much,
    /// in shares of money.
    #[must_use]
    pub fn budgets(&self, key: &str) -> Vec<(String, Calendar, u64)> {
        let keys = match &self.snapshot.clients {
            ClientKeys::Required(specs) => &specs.keys[..],
            ClientKeys::Untouched | ClientKeys::Dropped => &[],
        };
        let (limits_of, name) = match keys.iter().find(|known| *known.id == *key) {
            Some(known) => (key, &*known.name),
            // A token's: its issuer and its name.
            None => key.split_once(':').unwrap_or((key, key)),
        };
        self.limits.budgets(limits_of, key, name)
    }

    /// The pool of a service and model.
    #[must_use]
    pub fn pool(&self, service: &str, model: &str) -> Option<&Arc<Pool>> {
        self.pools.get(&format!("{service}/{model}"))
    }

    /// All pools, in no order.
    pub fn pools(&self) -> impl Iterator<Item = &Arc<Pool>> {
        self.pools.values()
    }

    /// The addresses behind names, each once.
    pub fn names(&self) -> impl Iterator<Item = &Arc<Addresses>> {
        self.hosts.values().filter(|addresses| addresses.name().is_some())
    }
}

/// A request for one of the gateway's own pages.
pub struct PageRequest<'a> {
    /// The method.
    pub method: &'a Method,
    /// The raw path.
    pub path: &'a str,
    /// The raw query, with its question mark.
    pub query: &'a str,
    /// The host that the client asked; empty where it named none.
    pub host: &'a [u8],
    /// The headers.
    pub headers: &'a HeaderMap,
    /// Where the client is.
    pub client: Option<IpAddr>,
}

/// An answer to a request for a page.
pub enum PageAnswer {
    /// It is here.
    Now(Response<Bytes>),
    /// It takes a while.
    Later(Pin<Box<dyn Future<Output = Response<Bytes>> + Send>>),
    /// It comes in pieces, until their sender is gone.
    Live(mpsc::Receiver<Bytes>),
    /// There is none, in the words of the client's API family.
    Refused(Refusal),
}

/// The pages that the gateway answers itself: health, status, dashboard.
pub trait Pages: Send + Sync {
    /// The answer, or none when the path is not one of the gateway's own.
    fn answer(&self, runtime: &Runtime, request: &PageRequest<'_>) -> Option<PageAnswer>;
}

/// What a reload came to.
#[derive(Clone, Debug)]
pub struct Reloaded {
    /// When.
    pub at: SystemTime,
    /// What is at work now; or the problems that left the old configuration at work, a line each.
    pub outcome: Result<ReloadReport, Vec<String>>,
}

/// A configuration that was taken up.
#[derive(Clone, Debug)]
pub struct ReloadReport {
    /// How much there is in it.
    pub summary: Summary,
    /// Keys that were changed and take a restart.
    pub needs_restart: Vec<&'static str>,
}

/// Who asks for a reload, who does it, and how the last one went.
#[derive(Debug)]
pub struct Reloads {
    requests: mpsc::Sender<oneshot::Sender<Reloaded>>,
    state: Mutex<ReloadState>,
}

/// The configuration at work, as an operator asks for it.
#[derive(Clone, Debug)]
pub struct ReloadState {
    /// 1 at the start, one more with each configuration that is taken up.
    pub generation: u64,
    /// Since when it is at work.
    pub since: SystemTime,
    /// Reloads that failed since the start.
    pub failed: u64,
    /// The last reload.
    pub last: Option<Reloaded>,
}

impl Reloads {
    /// With the end at which requests come out.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<oneshot::Sender<Reloaded>>) {
        let (requests, asked) = mpsc::channel(8);
        let state = ReloadState { generation: 1, since: SystemTime::now(), failed: 0, last: None };
        (Self { requests, state: Mutex::new(state) }, asked)
    }

    /// Asks for a reload and waits for what it comes to; none when nobody does any.
    pub async fn ask(&self) -> Option<Reloaded> {
        let (sender, receiver) = oneshot::channel();
        self.requests.send(sender).await.ok()?;
        receiver.await.ok()
    }

    /// A reload was done.
    pub fn note(&self, reloaded: &Reloaded) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match reloaded.outcome {
            Ok(_) => {
                state.generation += 1;
                state.since = reloaded.at;
            }
            Err(_) => state.failed += 1,
        }
        state.last = Some(reloaded.clone());
    }

    /// The state now.
    #[must_use]
    pub fn state(&self) -> ReloadState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
