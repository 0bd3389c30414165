//! What changes between two configurations, for people, and which changes take a restart.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;

use super::clients::{ClientKeys, KeySpec};
use super::ledger::LedgerSpec;
use super::listen::Listen;
use super::snapshot::{BackendSpec, PoolSpec, Snapshot};

/// What a process keeps from its start to its end, by key.
#[derive(Clone, Debug)]
pub struct Fixed {
    shown: [(&'static str, String); 6],
    ledger: Option<LedgerSpec>,
}

impl Fixed {
    /// Of a configuration.
    #[must_use]
    pub fn of(snapshot: &Snapshot) -> Self {
        let shown = [
            ("listen", format!("{:?}", snapshot.listen)),
            ("admin.listen", format!("{:?}", snapshot.admin_listen)),
            ("threads", format!("{:?}", snapshot.threads)),
            ("upstream.idle_connections", format!("{:?}", snapshot.idle_connections)),
            ("client.idle_timeout", format!("{:?}", snapshot.client.idle_timeout)),
            ("shutdown_timeout", format!("{:?}", snapshot.shutdown_timeout)),
        ];
        Self { shown, ledger: snapshot.ledger.clone() }
    }

    /// Keys whose change has no effect until the process starts anew.
    #[must_use]
    pub fn needs_restart(&self, next: &Snapshot) -> Vec<&'static str> {
        let next = Self::of(next);
        let changed = self.shown.iter().zip(&next.shown).filter(|(before, next)| before != next);
        let ledger = (self.ledger != next.ledger).then_some("ledger");
        changed.map(|((key, _), _)| *key).chain(ledger).collect()
    }
}

/// A line for every difference, with its key path. Secrets show as changed, never themselves.
#[must_use]
pub fn differences(before: &Snapshot, next: &Snapshot) -> Vec<String> {
    let mut lines = Lines::default();
    top(before, next, &mut lines);
    for (name, service) in &next.services {
        if let Some(known) = before.services.get(name) {
            let at = format!("services.{name}.addresses");
            lines.changed(&at, &known.addresses, &service.addresses);
            lines.changed(&format!("services.{name}.cors"), &known.cors, &service.cors);
        }
    }
    for (service, model, pool) in next.pools() {
        let at = format!("services.{service}.models.{model}");
        match before.services.get(service).and_then(|known| known.models.get(model)) {
            Some(known) => pools(&at, known, pool, &mut lines),
            None => lines.add(&at, &format!("added, backends: {}", pool.backends.len())),
        }
    }
    for (service, model, pool) in before.pools() {
        if next.services.get(service).is_none_or(|known| !known.models.contains_key(model)) {
            let at = format!("services.{service}.models.{model}");
            lines.add(&at, &format!("removed, backends: {}", pool.backends.len()));
        }
    }
    let restart = Fixed::of(before).needs_restart(next);
    for line in &mut lines.0 {
        if restart.iter().any(|key| line.split_once(": ").is_some_and(|(at, _)| at == *key)) {
            line.push_str(" (takes a restart)");
        }
    }
    lines.0
}

/// The fields of a structure, as they are shown; none where it is none.
fn fields(of: &impl Debug) -> Vec<(String, String)> {
    const INDENT: &str = "    ";
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in format!("{of:#?}").lines() {
        let Some(line) = line.strip_prefix(INDENT) else { continue };
        let inner = line.trim().trim_end_matches(',');
        match (line.starts_with([' ', ']', '}', ')']), line.split_once(": "), fields.last_mut()) {
            (false, Some((key, value)), _) => {
                fields.push((key.to_owned(), value.trim_end_matches(',').to_owned()));
            }
            (_, _, Some((_, value))) => {
                let is_edge =
                    value.ends_with(['[', '(', '{']) || inner.starts_with([']', ')', '}']);
                *value = format!("{value}{}{inner}", if is_edge { "" } else { ", " });
            }
            _ => {}
        }
    }
    fields
}

#[derive(Default)]
struct Lines(Vec<String>);

impl Lines {
    fn add(&mut self, at: &str, what: &str) {
        self.0.push(format!("{at}: {what}"));
    }

    fn compare<T: Debug + PartialEq>(&mut self, at: &str, before: &T, next: &T) {
        if before == next {
            return;
        }
        let (known, new) = (fields(before), fields(next));
        let has_same_keys = known.iter().map(|it| &it.0).eq(new.iter().map(|it| &it.0));
        if known.is_empty() || !has_same_keys {
            self.add(at, &format!("{before:?} -> {next:?}"));
            return;
        }
        for ((key, old), (_, new)) in known.iter().zip(&new).filter(|(old, new)| old != new) {
            self.add(&format!("{at}.{key}"), &format!("{old} -> {new}"));
        }
    }

    /// As [`Lines::compare`], for what is made of many parts or is not to be shown.
    fn changed<T: PartialEq>(&mut self, at: &str, before: &T, next: &T) {
        if before != next {
            self.add(at, "changed");
        }
    }
}

/// Models that have something else under a key now, of those that stay; what one has may be that of all.
fn models<T: PartialEq>(
    key: &str,
    [before, new]: [&HashMap<String, Arc<T>>; 2],
    next: &Snapshot,
    lines: &mut Lines,
) {
    let is_changed = |name: &String| before.get(name) != new.get(name);
    let both = next.pools().map(|(service, model, _)| format!("{service}/{model}"));
    let changed: Vec<String> = both.filter(is_changed).collect();
    match &changed[..] {
        [] => {}
        [one] => lines.add(key, &format!("changed for {one}")),
        several => lines.add(key, &format!("changed for {} models", several.len())),
    }
}

fn top(before: &Snapshot, next: &Snapshot, lines: &mut Lines) {
    let shown = |listen: &[Listen]| listen.iter().map(Listen::to_string).collect::<Vec<_>>();
    lines.compare("listen", &shown(&before.listen), &shown(&next.listen));
    lines.compare("admin.listen", &shown(&before.admin_listen), &shown(&next.admin_listen));
    lines.changed("tls", &before.tls, &next.tls);
    keys(&before.clients, &next.clients, lines);
    lines.changed("addresses", &before.addresses, &next.addresses);
    lines.changed("limits", &before.limits, &next.limits);
    models("hooks", [&before.hooks, &next.hooks], next, lines);
    lines.changed("cache", &before.cache, &next.cache);
    models("cache", [&before.caching, &next.caching], next, lines);
    let assumed = (before.output_tokens_assumed, next.output_tokens_assumed);
    lines.compare("output_tokens_assumed", &assumed.0, &assumed.1);
    lines.changed("redis", &before.redis, &next.redis);
    lines.changed("ledger", &before.ledger, &next.ledger);
    lines.compare("ledger.include_usage", &before.include_usage, &next.include_usage);
    lines.changed("prices", &before.prices, &next.prices);
    lines.compare("trusted_proxies", &before.trusted_proxies, &next.trusted_proxies);
    lines.compare("cors.origins", &before.cors, &next.cors);
    lines.compare("log.level", &before.log_level, &next.log_level);
    let (known, new) = (&before.observed, &next.observed);
    lines.compare("log.format", &known.log_format, &new.log_format);
    lines.compare("metrics.enabled", &known.metrics, &new.metrics);
    lines.compare("request_log", &known.request_log, &new.request_log);
    lines.changed("traces", &known.traces, &new.traces);
    lines.compare("threads", &before.threads, &next.threads);
    lines.compare("shutdown_timeout", &before.shutdown_timeout, &next.shutdown_timeout);
    let (mut known, idle_timeout) = (before.client.clone(), next.client.idle_timeout);
    lines.compare("client.idle_timeout", &known.idle_timeout, &idle_timeout);
    known.idle_timeout = idle_timeout;
    lines.changed("client", &known, &next.client);
    let idle = (before.idle_connections, next.idle_connections);
    lines.compare("upstream.idle_connections", &idle.0, &idle.1);
    lines.compare("replay", &before.replay, &next.replay);
    lines.compare("reload.watch", &before.reload_on_change, &next.reload_on_change);
    lines.compare("dns.refresh", &before.dns_refresh, &next.dns_refresh);
    let (known, naming) = (&before.naming, &next.naming);
    lines.changed("aliases", &known.aliases, &naming.aliases);
    lines.changed("fallbacks", &known.fallbacks, &naming.fallbacks);
    lines.changed("default_model", &known.default_model, &naming.default_model);
    lines.changed("default_service", &known.default_service, &naming.default_service);
    lines.compare("models_listed", &known.listed, &naming.listed);
}

/// Keys that are added, removed and changed; there may be too many to name them.
fn keys(before: &ClientKeys, next: &ClientKeys, lines: &mut Lines) {
    let by_id = |clients: &ClientKeys| -> HashMap<Arc<str>, KeySpec> {
        let ClientKeys::Required(specs) = clients else { return HashMap::new() };
        specs.keys.iter().map(|key| (Arc::clone(&key.id), key.clone())).collect()
    };
    let (known, new) = (by_id(before), by_id(next));
    let global = KeySpec::GLOBAL;
    lines.changed("api_key", &known.get(global), &new.get(global));
    let others = |keys: &HashMap<Arc<str>, KeySpec>, is_it: &dyn Fn(&KeySpec) -> bool| {
        keys.values().filter(|key| *key.id != *global && is_it(key)).count()
    };
    let added = others(&new, &|key| !known.contains_key(&key.id));
    let removed = others(&known, &|key| !new.contains_key(&key.id));
    let changed = others(&new, &|key| known.get(&key.id).is_some_and(|old| old != key));
    if added + removed + changed > 0 {
        lines.add("keys", &format!("{added} added, {removed} removed, {changed} changed"));
    }
    let is_asked = |clients: &ClientKeys| matches!(clients, ClientKeys::Required(_));
    if is_asked(before) != is_asked(next) {
        let words =
            if is_asked(next) { "clients now need one" } else { "clients need none any more" };
        lines.add("keys", words);
    }
    let secret = |clients: &ClientKeys| match clients {
        ClientKeys::Required(specs) => specs.secret.clone(),
        ClientKeys::Untouched | ClientKeys::Dropped => None,
    };
    lines.changed("keys_secret", &secret(before), &secret(next));
}

fn pools(at: &str, before: &PoolSpec, next: &PoolSpec, lines: &mut Lines) {
    lines.compare(&format!("{at}.balance"), &before.balance, &next.balance);
    lines.compare(&format!("{at}.health_check"), &before.health, &next.health);
    lines.compare(&format!("{at}.retry"), &before.retry, &next.retry);
    lines.compare(&format!("{at}.breaker"), &before.breaker, &next.breaker);
    lines.compare(&format!("{at}.queue"), &before.queue, &next.queue);
    let find = |pool: &PoolSpec, id: &str| -> Option<BackendSpec> {
        pool.backends.iter().find(|backend| backend.id == id).cloned()
    };
    for backend in &next.backends {
        let at = format!("{at}.backends[{}]", backend.id);
        match find(before, &backend.id) {
            Some(known) => backends(&at, &known, backend, lines),
            None => lines.add(&at, &format!("added, {}", backend.url.shown)),
        }
    }
    for backend in &before.backends {
        if find(next, &backend.id).is_none() {
            lines.add(&format!("{at}.backends[{}]", backend.id), "removed");
        }
    }
}

fn backends(at: &str, before: &BackendSpec, next: &BackendSpec, lines: &mut Lines) {
    lines.compare(&format!("{at}.name"), &before.name, &next.name);
    lines.compare(&format!("{at}.url"), &before.url.shown, &next.url.shown);
    lines.compare(&format!("{at}.weight"), &before.weight, &next.weight);
    lines.compare(&format!("{at}.priority"), &before.priority, &next.priority);
    lines.compare(&format!("{at}.model"), &before.model, &next.model);
    lines.changed(&format!("{at}.price"), &before.tariff, &next.tariff);
    lines.compare(&format!("{at}.protocol"), &before.protocol, &next.protocol);
    lines.changed(&format!("{at}.tls"), &before.tls, &next.tls);
    lines.compare(&format!("{at}.inflight_max"), &before.inflight_max, &next.inflight_max);
    lines.changed(&format!("{at}.api_key"), &before.credential, &next.credential);
    lines.changed(&format!("{at}.health_check"), &before.probe, &next.probe);
    lines.compare(&format!("{at}.deadlines"), &before.deadlines, &next.deadlines);
    lines.compare(&format!("{at}.idle_timeout"), &before.idle_timeout, &next.idle_timeout);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Environment, Source, read};

    fn snapshot(text: &str) -> Snapshot {
        let source = Source::File("test.yaml".into());
        read(text.as_bytes(), &source, &Environment::default()).unwrap()
    }

    #[test]
    fn every_difference_has_a_line_and_no_secret_is_in_one() {
        let before = snapshot(
            "{api_key: sk-old, services: {s: {models: {m: {backends: \
             [{id: a, url: \"http://h\", api_key: sk-a}, {id: b, url: \"http://h:1\"}]}, \
             gone: {backends: [{id: a, url: \"http://h\"}]}}}}}",
        );
        let next = snapshot(
            "{listen: 1.2.3.4:5, api_key: sk-new, retry: {retries_max: 5, statuses: [503]}, services: {s: {models: {m: {backends: \
             [{id: a, url: \"http://h\", api_key: sk-b, weight: 2}, {id: c, url: \"http://h:1\"}]}, \
             new: {backends: [{id: a, url: \"http://h\"}]}}}}}",
        );
        let lines = differences(&before, &next);
        let text = lines.join("\n");
        for expected in [
            "listen: [\"http://0.0.0.0:8000\"] -> [\"http://1.2.3.4:5\"] (takes a restart)",
            "api_key: changed",
            "services.s.models.m.backends[a].weight: 1.0 -> 2.0",
            "services.s.models.m.backends[a].api_key: changed",
            "services.s.models.m.backends[c]: added, http://h:1",
            "services.s.models.m.backends[b]: removed",
            "services.s.models.new: added, backends: 1",
            "services.s.models.gone: removed, backends: 1",
        ] {
            assert!(lines.iter().any(|line| line == expected), "{expected} in\n{text}");
        }
        assert!(text.contains("services.s.models.m.retry.retries_max: 2 -> 5"), "{text}");
        assert!(
            text.contains("services.s.models.m.retry.statuses: [429, 502, 503, 504] -> [503]"),
            "{text}"
        );
        assert!(!text.contains("RetrySpec"), "{text}");
        assert!(!text.contains("sk-"), "{text}");
        assert!(differences(&before, &before).is_empty());
    }
}
