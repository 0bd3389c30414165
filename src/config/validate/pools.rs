//! Services, models and what holds for a pool as a whole.

use std::collections::HashSet;

use indexmap::IndexMap;

use super::super::defaults;
use super::super::file::{
    FileBackend, FileBalance, FileConfig, FileHealthCheck, FileModel, FileService,
};
use super::super::problem::{KeyPath, Problems};
use super::super::snapshot::{BackendSpec, Balance, HealthSpec, PoolSpec, Service};
use super::policy::{Policies, Written};
use super::{Context, backend, cors, keys, names, positive};

/// The services, and whether any backend has a key of its own.
pub(super) struct Services {
    pub(super) by_name: IndexMap<String, Service>,
    pub(super) any_key: bool,
}

/// What a service or model leaves to its models.
#[derive(Clone)]
struct Inherited {
    balance: Balance,
    health: FileHealthCheck,
    policies: Policies,
}

impl Inherited {
    fn under(
        &self,
        balance: Option<FileBalance>,
        health: Option<&FileHealthCheck>,
        policies: Policies,
    ) -> Self {
        Self {
            policies,
            balance: balance.map_or(self.balance, read_balance),
            health: match health {
                Some(own) => merged(own, &self.health),
                None => self.health.clone(),
            },
        }
    }
}

fn read_balance(written: FileBalance) -> Balance {
    match written {
        FileBalance::Sticky => Balance::Sticky,
        FileBalance::RoundRobin => Balance::RoundRobin,
        FileBalance::LeastInflight => Balance::LeastInflight,
    }
}

/// The health check with the keys of `own`, and of `outer` where it has none.
fn merged(own: &FileHealthCheck, outer: &FileHealthCheck) -> FileHealthCheck {
    FileHealthCheck {
        interval: own.interval.or(outer.interval),
        jitter: own.jitter.or(outer.jitter),
        healthy_after: own.healthy_after.or(outer.healthy_after),
        unhealthy_after: own.unhealthy_after.or(outer.unhealthy_after),
        timeout: own.timeout.or(outer.timeout),
        method: own.method.clone().or_else(|| outer.method.clone()),
        path: own.path.clone().or_else(|| outer.path.clone()),
        expect_status: own.expect_status.clone().or_else(|| outer.expect_status.clone()),
        headers: own.headers.clone().or_else(|| outer.headers.clone()),
    }
}

pub(super) fn services(
    file: &FileConfig,
    context: &Context<'_>,
    problems: &mut Problems,
) -> Services {
    let root = KeyPath::default();
    let path = root.key("services");
    let mut services = Services { by_name: IndexMap::new(), any_key: false };
    if let Some(health) = &file.health_check {
        check_health(health, &root.key("health_check"), problems);
    }
    let none = Inherited {
        balance: Balance::Sticky,
        health: FileHealthCheck::default(),
        policies: Policies::default(),
    };
    let written = Written {
        deadlines: file.deadlines.as_ref(),
        retry: file.retry.as_ref(),
        breaker: file.breaker.as_ref(),
        queue: file.queue.as_ref(),
    };
    let policies = none.policies.under(written, &root, problems);
    let inherited = none.under(file.balance, file.health_check.as_ref(), policies);
    let Some(written) = &file.services else {
        if !problems.has_below(&path) {
            problems.value(&root, "\"services\" is missing; it says which backends there are");
        }
        return services;
    };
    if written.is_empty() {
        problems.value(&path, "needs at least one service");
    }
    for (name, service) in written {
        let at = path.key(name);
        check_service_name(name, &at, problems);
        let models = service_models(service, &at, &inherited, context, &mut services, problems);
        let addresses = keys::addresses(service.addresses.as_ref(), &at.key("addresses"), problems);
        let cors = cors(service.cors.as_ref(), &at.key("cors"), problems);
        services.by_name.insert(name.clone(), Service { addresses, cors, models });
    }
    services
}

fn check_service_name(name: &str, at: &KeyPath, problems: &mut Problems) {
    if defaults::RESERVED_SERVICES.contains(&name) {
        problems.key(at, "a reserved name; the gateway has a path of its own under it");
    } else if name.is_empty() || name.contains('/') {
        problems.key(at, "a service's name cannot be empty or hold a slash");
    } else if name == "." || name == ".." {
        problems.key(at, "a service's name cannot be a dot segment");
    }
}

fn service_models(
    service: &FileService,
    at: &KeyPath,
    outer: &Inherited,
    context: &Context<'_>,
    services: &mut Services,
    problems: &mut Problems,
) -> IndexMap<String, PoolSpec> {
    if let Some(health) = &service.health_check {
        check_health(health, &at.key("health_check"), problems);
    }
    let written = Written {
        deadlines: service.deadlines.as_ref(),
        retry: service.retry.as_ref(),
        breaker: service.breaker.as_ref(),
        queue: service.queue.as_ref(),
    };
    let policies = outer.policies.under(written, at, problems);
    let inherited = outer.under(service.balance, service.health_check.as_ref(), policies);
    let mut models = IndexMap::new();
    let spellings = [("models", &service.models), ("model", &service.model)];
    for (key, written) in spellings {
        for (name, model) in written.iter().flatten() {
            let at = at.key(key).key(name);
            names::check_name(name, &at, problems);
            let pool = pool(model, &at, &inherited, context, services, problems);
            if models.insert(name.clone(), pool).is_some() {
                problems.key(&at, "this model stands under \"models\" too");
            }
        }
    }
    if models.is_empty() && !problems.has_below(at) {
        problems.value(at, "needs at least one model under \"models\"");
    }
    models
}

fn pool(
    model: &FileModel,
    at: &KeyPath,
    outer: &Inherited,
    context: &Context<'_>,
    services: &mut Services,
    problems: &mut Problems,
) -> PoolSpec {
    if let Some(health) = &model.health_check {
        check_health(health, &at.key("health_check"), problems);
    }
    let written = Written {
        deadlines: model.deadlines.as_ref(),
        retry: model.retry.as_ref(),
        breaker: model.breaker.as_ref(),
        queue: model.queue.as_ref(),
    };
    let policies = outer.policies.under(written, at, problems);
    let inherited = outer.under(model.balance, model.health_check.as_ref(), policies);
    let deadlines = inherited.policies.deadlines(context.defaults);
    let mut backends: Vec<BackendSpec> = Vec::new();
    let mut ids = HashSet::new();
    let written: &[Option<FileBackend>] = model.backends.as_deref().unwrap_or_default();
    for (index, backend) in written.iter().enumerate() {
        let at = at.key("backends").index(index);
        let Some(backend) = backend else {
            if !problems.has_below(&at) {
                problems.value(&at, "expected a backend, found nothing");
            }
            continue;
        };
        if let Some(id) = &backend.id
            && !ids.insert(id.as_str())
        {
            problems.value(&at.key("id"), format!("{id:?} is the id of another backend here"));
        }
        let pool = backend::OfPool { health: &inherited.health, deadlines };
        let (backend, own_key) = backend::backend(backend, &at, &pool, context, problems);
        services.any_key |= own_key;
        backends.extend(backend);
    }
    if written.is_empty() && !problems.has_below(at) {
        problems.value(at, "needs at least one backend under \"backends\"");
    }
    let complete = backends.len() == written.len() && !backends.is_empty();
    if complete && backends.iter().all(|backend| backend.weight == 0.0) {
        problems.value(
            &at.key("backends"),
            "every weight is 0, so nothing can serve; give one backend a weight",
        );
    }
    PoolSpec {
        balance: inherited.balance,
        health: health_spec(&inherited.health),
        retry: inherited.policies.retry(context.defaults),
        breaker: inherited.policies.breaker(context.defaults),
        queue: inherited.policies.queue(),
        backends,
    }
}

/// Checks the numbers where they are written, so that the problem shows the right line.
fn check_health(health: &FileHealthCheck, at: &KeyPath, problems: &mut Problems) {
    positive(health.interval, &at.key("interval"), defaults::HEALTH_INTERVAL, problems);
    positive(health.timeout, &at.key("timeout"), defaults::HEALTH_TIMEOUT, problems);
    if health.jitter.is_some_and(|jitter| !(0.0..=1.0).contains(&jitter)) {
        problems.value(&at.key("jitter"), "expected a share from 0 to 1");
    }
    for (key, count) in
        [("healthy_after", health.healthy_after), ("unhealthy_after", health.unhealthy_after)]
    {
        if count.is_some_and(|count| !(1..=100).contains(&count)) {
            problems.value(&at.key(key), "expected a number of checks from 1 to 100");
        }
    }
    backend::check_probe(
        (health.method.as_deref(), health.path.as_deref(), health.expect_status.as_ref()),
        health.headers.as_ref(),
        at,
        problems,
    );
}

fn health_spec(health: &FileHealthCheck) -> HealthSpec {
    HealthSpec {
        interval: health.interval.map_or(defaults::HEALTH_INTERVAL, |span| span.0),
        jitter: health.jitter.unwrap_or(defaults::HEALTH_JITTER),
        healthy_after: health.healthy_after.unwrap_or(defaults::HEALTHY_AFTER) as usize,
        unhealthy_after: health.unhealthy_after.unwrap_or(defaults::UNHEALTHY_AFTER) as usize,
    }
}
