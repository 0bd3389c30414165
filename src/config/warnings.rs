//! What is allowed and should not stay so.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indexmap::IndexMap;

use super::clients::{ClientKeys, KeySpec};
use super::limits::{LimitSpec, Quantity};
use super::snapshot::{PoolSpec, Snapshot};
use crate::names::{NameList, Names};

/// A certificate that ends sooner is told of: tools renew theirs 30 days before.
const CERTIFICATE_LEFT_MIN: Duration = Duration::from_secs(14 * 86_400);

/// So many names of nothing are told one by one.
const STRAYS_SHOWN: usize = 10;

/// A line for each thing that an operator had better change.
#[must_use]
pub fn warnings(snapshot: &Snapshot) -> Vec<String> {
    let mut lines = Vec::new();
    for (service, model, pool) in snapshot.pools() {
        for backend in pool.backends.iter().filter(|backend| backend.url.tls) {
            if !backend.tls.verify {
                lines.push(format!(
                    "backend {} of {service}/{model}: tls.verify is false, so anybody on the way can \
                     pose as {}, read what is sent and take its key",
                    backend.id, backend.url.shown
                ));
            }
        }
    }
    clients(snapshot, &mut lines);
    strays(snapshot, &mut lines);
    if snapshot.tls.is_some()
        && !snapshot.listen.iter().chain(&snapshot.admin_listen).any(|it| it.tls)
    {
        lines.push("tls is not used: no listen address is an https one".to_owned());
    }
    let replay = snapshot.replay;
    if replay.body_bytes_max > replay.total_bytes_max {
        lines.push(
            "replay.body_bytes_max is larger than replay.total_bytes_max, which holds".to_owned(),
        );
    }
    let now = now();
    let certificates = snapshot.tls.iter().flat_map(|tls| tls.certificates.iter().enumerate());
    for (index, certificate) in certificates {
        let left = certificate.not_after.saturating_sub_unsigned(now);
        let names = certificate.names.join(", ");
        if left <= 0 {
            lines.push(format!("tls.certificates[{index}] ({names}) has expired: renew it"));
        } else if left.unsigned_abs() < CERTIFICATE_LEFT_MIN.as_secs() {
            let days = left / 86_400;
            lines.push(format!("tls.certificates[{index}] ({names}) expires in {days} days"));
        }
    }
    lines
}

/// Keys that nobody has or can use, and budgets that count nothing.
fn clients(snapshot: &Snapshot, lines: &mut Vec<String>) {
    let mut limits: Vec<&LimitSpec> = snapshot.limits.iter().collect();
    if let ClientKeys::Required(specs) = &snapshot.clients {
        if specs.keys.is_empty() && specs.issuers.is_empty() {
            lines.push("clients need a key, and there is none: `tollgate key new NAME`".to_owned());
        }
        let now = now().cast_signed();
        let is_over = |key: &&KeySpec| key.expires.is_some_and(|end| end <= now);
        let mut over = specs.keys.iter().filter(is_over).map(|key| &*key.id);
        if let Some(first) = over.next() {
            lines.push(format!(
                "expired and of no use any more: key {}",
                and_others(first, over.count())
            ));
        }
        limits.extend(specs.keys.iter().flat_map(|key| &key.limits));
        limits.extend(specs.issuers.iter().flat_map(|issuer| &issuer.grant.limits));
    }
    if !limits.iter().any(|limit| matches!(limit.quantity, Quantity::Money(_))) {
        return;
    }
    let mut prices = Names::default();
    for (name, _) in &snapshot.prices.models {
        prices.add(name, ());
    }
    let has_no_price = |(service, model, pool): &(&str, &str, &PoolSpec)| {
        prices.find(model).or_else(|| prices.find(&format!("{service}/{model}"))).is_none()
            && pool.backends.iter().any(|backend| backend.tariff.is_none())
    };
    let mut free = snapshot.pools().filter(has_no_price);
    if let Some((service, model, _)) = free.next() {
        let models = and_others(&format!("{service}/{model}"), free.count());
        lines.push(format!("no price, so nothing of it counts against budgets: {models}"));
    }
    if snapshot.ledger.is_none() && snapshot.redis.is_none() {
        lines.push("there are budgets and no ledger: a restart forgets what was spent".to_owned());
    }
}

/// Names in lists that are names of nothing: a rule that holds for them does nothing.
fn strays(snapshot: &Snapshot, lines: &mut Vec<String>) {
    let (mut models, mut services, mut keys) =
        (Names::default(), Names::default(), Names::default());
    for (service, model, _) in snapshot.pools() {
        services.add(service, ());
        for name in [model.to_owned(), format!("{service}/{model}"), format!("{service}/*")] {
            models.add(&name, ());
        }
    }
    for (alias, _) in &snapshot.naming.aliases {
        models.add(alias, ());
    }
    let mut found = Strays::default();
    if let ClientKeys::Required(specs) = &snapshot.clients {
        let issuers = specs.issuers.iter().map(|issuer| &*issuer.grant);
        for key in specs.keys.iter().chain(issuers) {
            let place = || format!("key {}", key.id);
            found.note("model", key.models.as_ref(), &models, &place);
            found.note("service", key.services.as_ref(), &services, &place);
            for limit in &key.limits {
                found.limit(limit, (&models, &services), &place);
            }
            keys.add(&key.id, ());
            keys.add(&key.name, ());
        }
        // Tokens have names that are not known before.
        let are_known = specs.issuers.is_empty();
        for limit in snapshot.limits.iter().filter(|_| are_known) {
            found.note("key", limit.keys.as_ref(), &keys, &|| format!("limit {:?}", &*limit.name));
        }
    }
    for limit in &snapshot.limits {
        found.limit(limit, (&models, &services), &|| format!("limit {:?}", &*limit.name));
    }
    let count = found.0.len();
    for ((kind, name), (place, others)) in found.0.into_iter().take(STRAYS_SHOWN) {
        lines.push(format!("no {kind} is called {name:?}, as in {}", and_others(&place, others)));
    }
    if let Some(more @ 1..) = count.checked_sub(STRAYS_SHOWN) {
        lines.push(format!("{more} more names are names of nothing"));
    }
}

/// Names of nothing, what they should be names of, where they stand first and how often besides.
#[derive(Default)]
struct Strays(IndexMap<(&'static str, String), (String, usize)>);

impl Strays {
    fn note(
        &mut self,
        kind: &'static str,
        list: Option<&NameList>,
        known: &Names<()>,
        place: &dyn Fn() -> String,
    ) {
        for name in list.into_iter().flat_map(|list| list.strays(known)) {
            let seen = self.0.get_mut(&(kind, name.clone()));
            match seen {
                Some((_, others)) => *others += 1,
                None => drop(self.0.insert((kind, name), (place(), 0))),
            }
        }
    }

    fn limit(
        &mut self,
        limit: &LimitSpec,
        (models, services): (&Names<()>, &Names<()>),
        place: &dyn Fn() -> String,
    ) {
        self.note("model", limit.models.as_ref(), models, place);
        self.note("service", limit.services.as_ref(), services, place);
    }
}

fn and_others(first: &str, others: usize) -> String {
    match others {
        0 => first.to_owned(),
        others => format!("{first} and {others} more"),
    }
}

/// In seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
