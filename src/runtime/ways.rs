//! Where the names of models lead: to pools, in the order in which they are asked.

use std::collections::HashMap;
use std::sync::Arc;

use http::HeaderValue;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use crate::config::{Listed, ModelRef, Snapshot, by_model};
use crate::names::{Names, Pattern};
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
    /// Names without a wildcard, each with its service, in the order of the configuration.
    listed: Vec<(String, String)>,
    lists: Listed,
}

impl Catalog {
    /// The way of a name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Arc<Way>> {
        self.names.find(name)
    }

    /// The names to show, each with the service that has it.
    pub fn listed(&self) -> impl Iterator<Item = (&str, &str)> {
        let only_healthy = self.lists == Listed::Healthy;
        let can_serve = |name: &str| {
            let way = self.find(name);
            way.is_some_and(|way| way.targets.iter().any(|target| target.pool.has_other(|_| true)))
        };
        let listed = self.listed.iter().filter(move |(name, _)| !only_healthy || can_serve(name));
        listed.map(|(name, service)| (name.as_str(), service.as_str()))
    }

    /// The service of a name that may be asked for, by whatever rule.
    #[must_use]
    pub fn service_of(&self, name: &str) -> Option<&str> {
        let pool = self.find(name)?.targets.first()?.pool.name();
        pool.split_once('/').map(|(service, _)| service)
    }
}

/// Builds ways over the pools of a configuration.
pub(super) struct Ways<'a> {
    pools: &'a HashMap<String, Arc<Pool>>,
    fallbacks: Names<&'a [ModelRef]>,
}

impl<'a> Ways<'a> {
    pub(super) fn new(snapshot: &'a Snapshot, pools: &'a HashMap<String, Arc<Pool>>) -> Self {
        let mut fallbacks = Names::default();
        for (name, refs) in &snapshot.naming.fallbacks {
            fallbacks.add(name, refs.as_slice());
        }
        Self { pools, fallbacks }
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
            for (name, model) in only_by_pattern(snapshot, &models_by_name) {
                add(name, model);
            }
        }
        ways
    }

    pub(super) fn catalog(&self, snapshot: &Snapshot) -> Catalog {
        let naming = &snapshot.naming;
        let mut catalog = Catalog { lists: naming.listed, ..Catalog::default() };
        let default_service = naming.default_service.as_ref();
        let default_name = default_service.map(|one| one.service.as_str());
        let mut refs_by_name = Names::default();
        for (model, refs) in by_model(&snapshot.services, default_name) {
            if Pattern::parse(model).is_none() {
                catalog.listed.push((model.to_owned(), refs[0].service.clone()));
            }
            catalog.names.add(model, self.way(&refs, &[model]));
            refs_by_name.add(model, refs);
        }
        // A model's own name goes before one that is put together.
        for (service, model, _) in snapshot.pools() {
            let whole = format!("{service}/{model}");
            catalog.names.add(&whole, self.whole(service, model, &whole));
        }
        for (alias, refs) in &naming.aliases {
            let Some(first) = refs.first() else { continue };
            if Pattern::parse(alias).is_none() {
                catalog.listed.push((alias.clone(), first.service.clone()));
            }
            catalog.names.add(alias, self.way(refs, &[alias, &first.model]));
            refs_by_name.add(alias, refs.clone());
        }
        for (name, refs) in only_by_pattern(snapshot, &refs_by_name) {
            catalog.names.add(name, self.way(refs, &[name, &refs[0].model]));
        }
        let default_model = &naming.default_model;
        catalog.default_model =
            default_model.first().map(|first| self.way(default_model, &[&first.model]));
        catalog.default_service =
            default_service.map(|one| self.way(std::slice::from_ref(one), &[&one.model]));
        let everything = naming.everything.as_ref();
        catalog.everything = everything.map(|one| {
            let targets = self.targets(std::slice::from_ref(one));
            Arc::new(Way { targets: targets.into(), renames: false, is_everything: true })
        });
        catalog
    }

    /// The way of a model that is called `service/model`.
    fn whole(&self, service: &str, model: &str, whole: &str) -> Arc<Way> {
        let mut targets = self.targets(&[ModelRef::new(service, model)]);
        for target in &mut targets {
            target.called = Called::AfterBytes(service.len() + 1);
            target.renames = true;
        }
        Arc::new(self.with_fallbacks(targets, &[whole, model]))
    }

    fn way(&self, refs: &[ModelRef], names: &[&str]) -> Arc<Way> {
        Arc::new(self.with_fallbacks(self.targets(refs), names))
    }

    /// Adds the fallbacks of the first of `names` that has any.
    fn with_fallbacks(&self, mut targets: Vec<Target>, names: &[&str]) -> Way {
        let first = targets.first().map(|target| target.pool.name().to_owned());
        let exact = first.as_deref().into_iter().chain(names.iter().copied());
        let fallbacks = exact
            .clone()
            .find_map(|name| self.fallbacks.exact(name))
            .or_else(|| exact.clone().find_map(|name| self.fallbacks.pattern(name)));
        for target in self.targets(fallbacks.copied().unwrap_or_default()) {
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
            let renames = has_own_name || called != Called::AsAsked;
            Some(Target { pool, called, shown, renames })
        };
        refs.iter().filter_map(target).collect()
    }
}

/// Names that have fallbacks of their own, and are those of a model only by a wildcard.
fn only_by_pattern<'a, T>(
    snapshot: &'a Snapshot,
    names: &'a Names<T>,
) -> impl Iterator<Item = (&'a str, &'a T)> {
    let keys = snapshot.naming.fallbacks.iter().map(|(name, _)| name.as_str());
    let is_only = |name: &&str| Pattern::parse(name).is_none() && !names.has(name);
    keys.filter(is_only).filter_map(|name| Some((name, names.pattern(name)?)))
}
