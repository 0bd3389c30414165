//! Everything one exchange needs, behind one `Arc`: the snapshot, the routes and the pools with
//! their live state.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderMap, Method, Response};

use crate::config::Snapshot;
use crate::pool::{Addresses, Names, Pool, Prober};
use crate::routing::Router;

/// The runtime that new exchanges take. Swapped as a whole; an exchange keeps the one it began with.
pub type Current = ArcSwap<Runtime>;

/// One configuration at work.
pub struct Runtime {
    /// The configuration.
    pub snapshot: Snapshot,
    /// From path to pool.
    pub router: Router<Arc<Pool>>,
    /// All pools by `service/model`, in no order.
    pools: HashMap<String, Arc<Pool>>,
    /// The names that are looked up again and again.
    names: Names,
    prober: Arc<Prober>,
}

impl Runtime {
    /// Puts a configuration to work. From `previous`, the live state of what stays is carried over.
    ///
    /// # Errors
    /// When a pool cannot be built; see [`Pool::new`].
    pub fn new(snapshot: Snapshot, previous: Option<&Runtime>) -> pingora_core::Result<Self> {
        let mut names: Names = HashMap::new();
        if let Some(previous) = previous {
            for (_, _, spec) in snapshot.pools() {
                for backend in &spec.backends {
                    let host = (backend.url.host.clone(), backend.url.port);
                    if let Some(known) = previous.names.get(&host) {
                        names.insert(host, Arc::clone(known));
                    }
                }
            }
        }
        let prober = previous.map(|previous| Arc::clone(&previous.prober)).unwrap_or_default();
        let mut pools = HashMap::new();
        let mut routes = Vec::new();
        for (service, model, spec) in snapshot.pools() {
            let name = format!("{service}/{model}");
            let before = previous.and_then(|previous| previous.pools.get(&name));
            let pool = match before {
                Some(same) if same.spec() == spec => Arc::clone(same),
                _ => {
                    let before = before.map(Arc::as_ref);
                    Arc::new(Pool::new(name.clone(), spec.clone(), &mut names, &prober, before)?)
                }
            };
            routes.push((service.to_owned(), model.to_owned(), Arc::clone(&pool)));
            pools.insert(name, pool);
        }
        Ok(Self { router: Router::new(routes), pools, names, prober, snapshot })
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
        self.names.values().filter(|addresses| addresses.name().is_some())
    }
}

/// A request for one of the gateway's own pages.
pub struct PageRequest<'a> {
    /// The method.
    pub method: &'a Method,
    /// The raw path.
    pub path: &'a str,
    /// The headers.
    pub headers: &'a HeaderMap,
}

/// The pages that the gateway answers itself: health, status, dashboard.
pub trait Pages: Send + Sync {
    /// The answer, or none when the path is not one of the gateway's own.
    fn answer(&self, runtime: &Runtime, request: &PageRequest<'_>) -> Option<Response<Bytes>>;
}
