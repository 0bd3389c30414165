//! What runs beside the traffic: health checks and name look-ups, for the runtime of the moment.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use async_trait::async_trait;
use pingora_core::connectors::http::Connector;
use pingora_core::server::ShutdownWatch;
use pingora_core::services::background::{
    BackgroundService, GenBackgroundService, background_service,
};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::{export, fetch};
use crate::admin::Sources;
use crate::auth::PublicKeys;
use crate::config::JwksSource;
use crate::pool::{Addresses, Checks};
use crate::runtime::{Current, Runtime};
use crate::telemetry::history;

/// Longest that a start or reload waits for names; what is not known by then is looked up meanwhile.
const FIRST_LOOKUP_WAIT: Duration = Duration::from_secs(1);

/// Looks up the names that are not known yet, so that the first request finds its backend's address.
pub(super) async fn resolve(runtime: &Runtime) {
    let mut lookups = JoinSet::new();
    for addresses in runtime.names().filter(|addresses| addresses.count() == 0) {
        let addresses = Arc::clone(addresses);
        lookups.spawn(async move { addresses.refresh().await });
    }
    let all = async { while lookups.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(FIRST_LOOKUP_WAIT, all).await;
}

/// [`resolve`], before there is a runtime to do it on.
pub(super) fn resolve_at_start(runtime: &Runtime) -> Result<()> {
    let executor = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start looking up names")?;
    executor.block_on(resolve(runtime));
    // A look-up that hangs keeps its thread; it must not keep the start.
    executor.shutdown_background();
    Ok(())
}

/// The background service.
pub(super) struct Background {
    current: Arc<Current>,
    changed: Arc<Notify>,
    sources: Sources,
}

/// The tasks at work, by what they work on.
#[derive(Default)]
struct Tasks {
    tasks: JoinSet<()>,
    checks: HashMap<usize, tokio::task::AbortHandle>,
    names: HashMap<usize, tokio::task::AbortHandle>,
    keys: HashMap<usize, tokio::task::AbortHandle>,
}

/// It, on a thread of its own.
pub(super) fn service(
    current: &Arc<Current>,
    changed: &Arc<Notify>,
    sources: Sources,
) -> GenBackgroundService<Background> {
    let (current, changed) = (Arc::clone(current), Arc::clone(changed));
    let mut service = background_service("background", Background { current, changed, sources });
    service.threads = Some(1);
    service
}

#[async_trait]
impl BackgroundService for Background {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let mut tasks = Tasks::default();
        let (current, sources) = (&self.current, &self.sources);
        tasks.tasks.spawn(keep_history(Arc::clone(current), sources.clone()));
        tasks
            .tasks
            .spawn(export::keep_sending(Arc::clone(current), Arc::clone(&sources.telemetry)));
        loop {
            tasks.follow(&self.current);
            tokio::select! {
                () = self.changed.notified() => {}
                _ = shutdown.changed() => return,
            }
        }
    }
}

impl Tasks {
    /// Starts what the runtime brings and ends what it no longer has.
    fn follow(&mut self, current: &Arc<Current>) {
        let runtime = current.load_full();
        let checks: HashMap<usize, &Arc<Checks>> = runtime
            .pools()
            .map(|pool| (Arc::as_ptr(pool.checks()) as usize, pool.checks()))
            .collect();
        end_missing(&mut self.checks, |id| checks.contains_key(id));
        for (id, checks) in checks {
            let tasks = &mut self.tasks;
            self.checks.entry(id).or_insert_with(|| {
                let checks = Arc::clone(checks);
                tasks.spawn(async move { checks.run().await })
            });
        }
        let names: HashMap<usize, &Arc<Addresses>> =
            runtime.names().map(|name| (Arc::as_ptr(name) as usize, name)).collect();
        end_missing(&mut self.names, |id| names.contains_key(id));
        for (id, addresses) in names {
            let tasks = &mut self.tasks;
            let current = Arc::clone(current);
            self.names
                .entry(id)
                .or_insert_with(|| tasks.spawn(keep_resolved(Arc::clone(addresses), current)));
        }
        let is_at_url = |keys: &&Arc<PublicKeys>| matches!(keys.source, JwksSource::Url(_));
        let fetched = runtime.keys.public_keys().filter(is_at_url);
        let keys: HashMap<usize, &Arc<PublicKeys>> =
            fetched.map(|keys| (Arc::as_ptr(keys) as usize, keys)).collect();
        end_missing(&mut self.keys, |id| keys.contains_key(id));
        for (id, keys) in keys {
            let tasks = &mut self.tasks;
            self.keys.entry(id).or_insert_with(|| tasks.spawn(keep_fetched(Arc::clone(keys))));
        }
        while self.tasks.try_join_next().is_some() {}
    }
}

fn end_missing(
    tasks: &mut HashMap<usize, tokio::task::AbortHandle>,
    stays: impl Fn(&usize) -> bool,
) {
    tasks.retain(|id, task| {
        let stays = stays(id);
        if !stays {
            task.abort();
        }
        stays
    });
}

/// How often public keys are fetched, though none is missing; and how soon again where that failed.
const FETCH_EVERY: Duration = Duration::from_secs(15 * 60);
const FETCH_AGAIN: Duration = Duration::from_secs(5);

/// Fetches the public keys of one who issues tokens, again and again. The last good ones are kept. A failure is
/// logged when it begins and when it ends.
async fn keep_fetched(keys: Arc<PublicKeys>) {
    let JwksSource::Url(url) = &keys.source else { return };
    let connector = Connector::new(None);
    let mut failing = false;
    loop {
        let taken = fetch::get(&connector, url).await.and_then(|text| keys.take(&text));
        match &taken {
            Ok(count) if failing => log::info!("{url}: public keys are here again: {count}"),
            Err(why) if !failing => log::error!("{url}: cannot fetch public keys: {why}"),
            Ok(_) | Err(_) => {}
        }
        failing = taken.is_err();
        tokio::select! {
            () = tokio::time::sleep(if failing { FETCH_AGAIN } else { FETCH_EVERY }) => {}
            () = keys.wanted.notified() => {}
        }
    }
}

/// Notes, step by step, what goes on.
async fn keep_history(current: Arc<Current>, sources: Sources) {
    let mut steps = tokio::time::interval(history::STEP);
    steps.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first one is over at once.
    steps.tick().await;
    loop {
        steps.tick().await;
        let queued = current.load().pools().map(|pool| pool.queue().length()).sum();
        let telemetry = &sources.telemetry;
        telemetry.history.step(&telemetry.counters, sources.lifecycle.inflight(), queued);
        telemetry.request_log.tell_lost();
    }
}

/// Looks one name up again and again. A failure is logged when it begins and when it ends.
async fn keep_resolved(addresses: Arc<Addresses>, current: Arc<Current>) {
    let name = addresses.name().unwrap_or_default().to_owned();
    let mut failing = false;
    loop {
        let interval = current.load().snapshot.dns_refresh;
        tokio::time::sleep(interval).await;
        match addresses.refresh().await {
            Ok(()) if failing => {
                failing = false;
                log::info!("{name}: its address is known again");
            }
            Ok(()) => {}
            Err(error) if !failing => {
                failing = true;
                let kept =
                    if addresses.count() > 0 { "; the last good answer is kept" } else { "" };
                log::warn!("{name}: cannot look up its address: {error}{kept}");
            }
            Err(_) => {}
        }
    }
}
