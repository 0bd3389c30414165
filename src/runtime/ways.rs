//! Where the names of models lead: to pools, in the order in which they are asked.

use std::collections::HashMap;
use std::sync::Arc;

use http::HeaderValue;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use crate::config::{Caching, Listed, ModelRef, Snapshot, by_model};
use crate::hooks::Chain;
use crate::names::{Names, Pattern};
use crate::networks::AddressRules;
use crate::pool::Pool;

/// What cannot stand in a header as it is; the percent sign, so that it can be told what was encoded.
const NOT_IN_HEADERS: &AsciiSet = &CONTROLS.add(b'%');

/// The pools that can serve a name, in the order in which they are asked: the first one, and those that
/// are asked when it cannot.
pub struct Way {
    /// At least one.
    pub targets: Box<[Target]>,
    /// Whether the name in a request may have to be changed for a backend.
    pub renames: bool,
    /// Whether it is the one way that there is, of one upstream whose models are not known.
    pub is_everything: bool,
}

/// One pool of a [`Way`].
#[derive(Clone)]
pub struct Target {
    /// The pool.
    pub pool: Arc<Pool>,
    /// What the model is called there.
    pub called: Called,
    /// Its `service/model` as a header.
    pub shown: HeaderValue,
    /// Whether a request may have to name another model there.
    pub renames: bool,
    /// Whether every backend is told a name of our own, whatever a request names.
    pub forces_name: bool,
    /// Whether it stands in for another model.
    pub is_fallback: bool,
    /// Where the clients of its service may come from.
    pub addresses: Arc<AddressRules>,
    /// What the configuration has done with its exchanges, where it has.
    pub hooks: Option<Arc<Chain>>,
    /// How its answers are kept, where they are.
    pub caching: Option<Arc<Caching>>,
}

impl Target {
    /// Its service and its model.
    #[must_use]
    pub fn names(&self) -> (&str, &str) {
        self.pool.name().split_once('/').unwrap_or_default()
    }
}

/// What a model is called at a pool, where its backends have no name of their own for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Called {
    /// As the client called it.
    AsAsked,
    /// As the client called it, without this many bytes at the beginning: `service/`.
    AfterBytes(usize),
    /// This.
    Name(Arc<str>),
}

impl Called {
    /// The name for a model that a client called `asked`; none: that one.
    #[must_use]
    pub fn name<'a>(&'a self, asked: Option<&'a str>) -> Option<&'a str> {
        match self {
            Self::AsAsked => None,
            Self::AfterBytes(bytes) => asked?.get(*bytes..),
            Self::Name(name) => Some(name),
        }
    }
}

/// All names at the front door.
#[derive(Default)]
pub struct Catalog {
    names: Names<Arc<Way>>,
    /// For a body that names no model.
    pub default_model: Option<Arc<Way>>,
    /// For what belongs to no model.
    pub default_service: Option<Arc<Way>>,
    /// For whatever is asked for, where there is one upstream and no models are known.
    pub everything: Option<Arc<Way>>,
    /// Names without a wildcard, in the order of the configuration.
    listed: Vec<String>,
    lists: Listed,
}

impl Catalog {
    /// The way of a name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Arc<Way>> {
        self.names.find(name)
    }

    /// The names to show, each with the way behind it.
    pub fn listed(&self) -> impl Iterator<Item = (&str, &Way)> {
        let only_healthy = self.lists == Listed::Healthy;
        let can_serve = |way: &Way| way.targets.iter().any(|it| it.pool.has_other(|_| true));
        let listed =
            self.listed.iter().filter_map(|name| Some((name.as_str(), self.find(name)?.as_ref())));
        listed.filter(move |(_, way)| !only_healthy || can_serve(way))
    }
}

/// Builds ways over the pools of a configuration.
pub(super) struct Ways<'a> {
    pools: &'a HashMap<String, Arc<Pool>>,
    fallbacks: Names<&'a [ModelRef]>,
    addresses: HashMap<&'a str, Arc<AddressRules>>,
    hooks: &'a HashMap<String, Arc<Chain>>,
    caching: &'a HashMap<String, Arc<Caching>>,
}

impl<'a> Ways<'a> {
    pub(super) fn new(snapshot: &'a Snapshot, pools: &'a HashMap<String, Arc<Pool>>) -> Self {
        let mut fallbacks = Names::default();
        for (name, refs) in &snapshot.naming.fallbacks {
            fallbacks.add(name, refs.as_slice());
        }
        let addresses = snapshot
            .services
            .iter()
            .map(|(name, service)| (name.as_str(), Arc::new(service.addresses.clone())))
            .collect();
        let (hooks, caching) = (&snapshot.hooks, &snapshot.caching);
        Self { pools, fallbacks, addresses, hooks, caching }
    }

    /// The ways by the path that names service and model. There is none where one upstream takes everything.
    pub(super) fn of_paths(&self, snapshot: &Snapshot) -> Vec<(String, String, Arc<Way>)> {
        let mut ways = Vec::new();
        if snapshot.naming.everything.is_some() {
            return ways;
        }
        for (service, models) in &snapshot.services {
            let mut models_by_name = Names::default();
            let mut add = |name: &str, model: &str| {
                let way = self.way(&[ModelRef::new(service, model)], &[name, model]);
                ways.push((service.clone(), name.to_owned(), way));
            };
            for model in models.models.keys() {
                models_by_name.add(model, model);
                add(model, model);
            }
            let whole = format!("{service}/");
            for key in plain_keys(snapshot) {
                let name = key.strip_prefix(&whole).unwrap_or(key);
                if let Some(model) = only_by_pattern(&models_by_name, name) {
                    add(name, model);
                }
            }
        }
        ways
    }

    /// The ways of models that hooks may send requests to, by `service/model`: all of them, where there are hooks.
    pub(super) fn of_hooks(&self, snapshot: &Snapshot) -> HashMap<String, Arc<Way>> {
        if !snapshot.hooks.values().any(|chain| chain.routes()) {
            return HashMap::new();
        }
        let way = |(service, model, _): (&str, &str, _)| {
            let to = ModelRef::new(service, model);
            // Whatever the request names; a wildcard is no name.
            let to = if Pattern::parse(model).is_none() { to.renamed() } else { to };
            (format!("{service}/{model}"), self.way(&[to], &[model]))
        };
        snapshot.pools().map(way).collect()
    }

    pub(super) fn catalog(&self, snapshot: &Snapshot) -> Catalog {
        let naming = &snapshot.naming;
        let mut catalog = Catalog { lists: naming.listed, ..Catalog::default() };
        let default_service = naming.default_service.as_ref();
        let default_name = default_service.map(|one| one.service.as_str());
        let mut named = Named { ways: self, all: Names::default(), own: Names::default() };
        for (model, refs) in by_model(&snapshot.services, default_name) {
            if Pattern::parse(model).is_none() {
                catalog.listed.push(model.to_owned());
            }
            named.add(model, self.targets(&refs), &[model]);
        }
        // A model's own name goes before one that is put together.
        for (service, model, _) in snapshot.pools() {
            let whole = format!("{service}/{model}");
            named.add(&whole, self.whole(service, model), &[&whole, model]);
        }
        for (alias, refs) in &naming.aliases {
            let Some(first) = refs.first() else { continue };
            if Pattern::parse(alias).is_none() {
                catalog.listed.push(alias.clone());
            }
            named.add(alias, self.targets(refs), &[alias, first.called(), &first.model]);
        }
        for key in plain_keys(snapshot) {
            named.add_one_of_pattern(key, &[key]);
            for service in snapshot.services.keys() {
                let whole = format!("{service}/{key}");
                named.add_one_of_pattern(&whole, &[&whole, key]);
                if let Some(name) = key.strip_prefix(&format!("{service}/")) {
                    named.add_one_of_pattern(name, &[name]);
                }
            }
        }
        catalog.names = named.all;
        let default_model = &naming.default_model;
        catalog.default_model = default_model
            .first()
            .map(|first| self.way(default_model, &[first.called(), &first.model]));
        catalog.default_service =
            default_service.map(|one| self.way(std::slice::from_ref(one), &[&one.model]));
        let everything = naming.everything.as_ref();
        catalog.everything = everything.map(|one| {
            let targets = self.targets(std::slice::from_ref(one));
            Arc::new(Way { targets: targets.into(), renames: false, is_everything: true })
        });
        catalog
    }

    /// The pool of a model that is called `service/model`.
    fn whole(&self, service: &str, model: &str) -> Vec<Target> {
        let mut targets = self.targets(&[ModelRef::new(service, model)]);
        for target in &mut targets {
            target.called = Called::AfterBytes(service.len() + 1);
            target.renames = true;
        }
        targets
    }

    fn way(&self, refs: &[ModelRef], names: &[&str]) -> Arc<Way> {
        Arc::new(self.with_fallbacks(self.targets(refs), names))
    }

    /// Adds the fallbacks of the first of `names` that has any, by itself or with its service.
    fn with_fallbacks(&self, mut targets: Vec<Target>, names: &[&str]) -> Way {
        let pool = targets.first().map(|target| target.pool.name().to_owned()).unwrap_or_default();
        let service = pool.split_once('/').map_or("", |(service, _)| service);
        let mut keys = vec![pool.clone()];
        for name in names {
            keys.extend([format!("{service}/{name}"), (*name).to_owned()]);
        }
        let exact = keys.iter().find_map(|name| self.fallbacks.exact(name));
        let fallbacks = exact.or_else(|| self.fallbacks.pattern_of_any(&keys));
        for mut target in self.targets(fallbacks.copied().unwrap_or_default()) {
            target.is_fallback = true;
            if targets.iter().all(|known| known.pool.name() != target.pool.name()) {
                targets.push(target);
            }
        }
        let renames = targets.iter().any(|target| target.renames);
        Way { targets: targets.into(), renames, is_everything: false }
    }

    fn targets(&self, refs: &[ModelRef]) -> Vec<Target> {
        let target = |one: &ModelRef| {
            let pool = Arc::clone(self.pools.get(&format!("{}/{}", one.service, one.model))?);
            let called = match &one.name {
                Some(name) => Called::Name(name.as_str().into()),
                None => Called::AsAsked,
            };
            let shown = utf8_percent_encode(pool.name(), NOT_IN_HEADERS).to_string();
            let shown = HeaderValue::try_from(shown).ok()?;
            let has_own_name = pool.backends().iter().any(|backend| backend.spec.model.is_some());
            let all_have = pool.backends().iter().all(|backend| backend.spec.model.is_some());
            Some(Target {
                renames: has_own_name || called != Called::AsAsked,
                forces_name: all_have || matches!(called, Called::Name(_)),
                is_fallback: false,
                addresses: Arc::clone(self.addresses.get(one.service.as_str())?),
                hooks: self.hooks.get(pool.name()).cloned(),
                caching: self.caching.get(pool.name()).cloned(),
                pool,
                called,
                shown,
            })
        };
        refs.iter().filter_map(target).collect()
    }
}

/// The names of a [`Catalog`] while it is built.
struct Named<'a> {
    ways: &'a Ways<'a>,
    all: Names<Arc<Way>>,
    /// Without fallbacks; and the other names that those are looked for by.
    own: Names<(Vec<Target>, Vec<String>)>,
}

impl Named<'_> {
    fn add(&mut self, name: &str, targets: Vec<Target>, names: &[&str]) {
        self.all.add(name, Arc::new(self.ways.with_fallbacks(targets.clone(), names)));
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        self.own.add(name, (targets, names));
    }

    /// Adds a name that stands behind a wildcard only, because it has fallbacks of its own.
    fn add_one_of_pattern(&mut self, name: &str, names: &[&str]) {
        if let Some((targets, others)) = only_by_pattern(&self.own, name) {
            let names = names.iter().copied().chain(others.iter().map(String::as_str));
            let names: Vec<&str> = names.collect();
            self.all.add(name, Arc::new(self.ways.with_fallbacks(targets.clone(), &names)));
        }
    }
}

/// Names without a wildcard that have fallbacks of their own.
fn plain_keys(snapshot: &Snapshot) -> impl Iterator<Item = &str> {
    let keys = snapshot.naming.fallbacks.iter().map(|(name, _)| name.as_str());
    keys.filter(|name| Pattern::parse(name).is_none())
}

/// What stands behind a name by a wildcard only.
fn only_by_pattern<'n, T>(names: &'n Names<T>, name: &str) -> Option<&'n T> {
    if names.has(name) { None } else { names.pattern(name) }
}
