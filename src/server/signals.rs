//! Signals: SIGHUP reloads; SIGTERM and SIGINT drain, and a second one ends at once.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::server::{ShutdownSignal, ShutdownSignalWatch};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

use super::{Reload, background};
use crate::config::Snapshot;
use crate::lifecycle::Lifecycle;
use crate::runtime::{Current, Runtime};

/// Watches for signals in Pingora's stead: its own watch would sleep a fixed time on SIGTERM, and
/// die of SIGHUP.
pub(super) struct Signals<F> {
    pub(super) lifecycle: Arc<Lifecycle>,
    pub(super) current: Arc<Current>,
    pub(super) changed: Arc<Notify>,
    pub(super) shutdown_timeout: Duration,
    pub(super) reload: Option<Reload>,
    pub(super) started: F,
}

impl<F: Fn() + Send + Sync> Signals<F> {
    fn start(&self) {
        self.lifecycle.ready();
        notify_supervisor(NotifyState::Ready);
        (self.started)();
    }

    /// All or nothing: a configuration with problems leaves the old one at work.
    async fn reload(&self) {
        let Some(reload) = self.reload.clone() else { return };
        let before = self.current.load_full();
        // Files are read and a large configuration is checked: not on this thread.
        let next = match tokio::task::spawn_blocking(move || reload()).await {
            Ok(Ok(snapshot)) => snapshot,
            Ok(Err(error)) => return not_used(&error.lines().join("\n  ")),
            Err(error) => return not_used(&error.to_string()),
        };
        let restart = needs_restart(&before.snapshot, &next);
        let level = next.log_level;
        let models = next.pools().count();
        let backends: usize = next.pools().map(|(_, _, pool)| pool.backends.len()).sum();
        let runtime = match Runtime::new(next, Some(&before)) {
            Ok(runtime) => runtime,
            Err(error) => return not_used(&error.to_string()),
        };
        background::resolve(&runtime).await;
        self.current.store(Arc::new(runtime));
        self.changed.notify_one();
        log::set_max_level(level);
        log::info!("the new configuration is at work (models: {models}, backends: {backends})");
        if !restart.is_empty() {
            log::warn!("these changes take a restart: {}", restart.join(", "));
        }
    }

    /// Returns when nothing is in flight, when time is up, or never: a second signal ends the process.
    async fn drain(&self, terminate: &mut Signal, interrupt: &mut Signal) {
        self.lifecycle.drain();
        notify_supervisor(NotifyState::Stopping);
        let inflight = self.lifecycle.inflight();
        if inflight > 0 {
            let seconds = self.shutdown_timeout.as_secs_f64();
            log::info!("draining for at most {seconds} s; exchanges in flight: {inflight}");
        }
        tokio::select! {
            biased;
            () = self.lifecycle.wait_idle() => log::info!("drained, nothing was cut"),
            () = tokio::time::sleep(self.shutdown_timeout) => {
                log::warn!("the drain took too long; exchanges cut: {}", self.lifecycle.inflight());
            }
            _ = terminate.recv() => self.end_at_once(),
            _ = interrupt.recv() => self.end_at_once(),
        }
    }

    fn end_at_once(&self) {
        log::warn!("second signal; exchanges cut: {}", self.lifecycle.inflight());
        std::process::exit(1);
    }
}

fn not_used(why: &str) {
    log::error!("the new configuration is not used, the old one stays:\n  {why}");
}

/// Keys whose change has no effect until the process starts anew.
fn needs_restart(before: &Snapshot, next: &Snapshot) -> Vec<&'static str> {
    let keys = [
        ("listen", before.listen != next.listen),
        ("admin.listen", before.admin_listen != next.admin_listen),
        ("threads", before.threads != next.threads),
        ("upstream.idle_connections", before.idle_connections != next.idle_connections),
        ("client.idle_timeout", before.client.idle_timeout != next.client.idle_timeout),
        ("shutdown_timeout", before.shutdown_timeout != next.shutdown_timeout),
    ];
    keys.into_iter().filter(|(_, changed)| *changed).map(|(key, _)| key).collect()
}

/// Tells systemd, where it supervises us.
fn notify_supervisor(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(false, &[state]) {
        log::warn!("systemd could not be told about the state: {error}");
    }
}

#[async_trait]
impl<F: Fn() + Send + Sync> ShutdownSignalWatch for Signals<F> {
    async fn recv(&self) -> ShutdownSignal {
        let watch = |kind| signal(kind).expect("a signal can be watched inside a tokio runtime");
        let mut terminate = watch(SignalKind::terminate());
        let mut interrupt = watch(SignalKind::interrupt());
        let mut hangup = watch(SignalKind::hangup());
        self.start();
        // A reload may wait for a slow disk; a signal to end does not wait for it.
        let reloads = async {
            while hangup.recv().await.is_some() {
                self.reload().await;
            }
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = reloads => {}
        }
        self.drain(&mut terminate, &mut interrupt).await;
        ShutdownSignal::GracefulTerminate
    }
}
