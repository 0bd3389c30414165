//! Signals: SIGHUP reloads, SIGUSR1 opens the request log again, SIGUSR2 hands over to a new process; SIGTERM and
//! SIGINT drain, and a second one ends at once. A process that has handed over ends at once on SIGINT only.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::server::{ShutdownSignal, ShutdownSignalWatch};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use super::listen::Bound;
use super::reload::Reloader;
use super::supervisor;
use super::upgrade::{self, TakeOver};
use crate::config::ListenAt;
use crate::lifecycle::Lifecycle;
use crate::runtime::{Current, Reloaded};
use crate::telemetry::Telemetry;

/// Watches for signals in Pingora's stead: its own watch would sleep a fixed time on SIGTERM, and
/// die of SIGHUP.
pub(super) struct Signals<F> {
    pub(super) lifecycle: Arc<Lifecycle>,
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) current: Arc<Current>,
    pub(super) reloader: Option<Reloader>,
    pub(super) asked: Mutex<Option<mpsc::Receiver<oneshot::Sender<Reloaded>>>>,
    pub(super) shutdown_timeout: Duration,
    /// What is accepted from, to be handed over.
    pub(super) sockets: Mutex<Vec<Bound>>,
    pub(super) take_over: TakeOver,
    pub(super) started: F,
}

/// What the ledger gets to write its last rows when the process ends at once.
const AT_ONCE: Duration = Duration::from_millis(500);

/// Why the watch is over.
enum End {
    Drain,
    HandedOver(u32),
}

impl<F: Fn() + Send + Sync> Signals<F> {
    fn start(&self) {
        self.lifecycle.ready();
        supervisor::ready();
        (self.started)();
        self.take_over.tell_ready();
    }

    /// Reloads for as long as it is polled.
    async fn reload(&self, hangup: &mut Signal) {
        let asked = locked(&self.asked).take();
        match (&self.reloader, asked) {
            (Some(reloader), Some(mut asked)) => reloader.run(hangup, &mut asked).await,
            _ => std::future::pending().await,
        }
    }

    /// Returns when a new process serves, with its id.
    async fn hand_over(&self, upgrade: &mut Signal) -> u32 {
        while upgrade.recv().await.is_some() {
            log::info!("starting the program anew, to take over");
            let sockets = locked(&self.sockets).clone();
            match upgrade::hand_over(&sockets, &self.current.load_full()).await {
                Ok(process) => {
                    let inflight = self.lifecycle.inflight();
                    log::info!("process {process} has taken over; exchanges left here: {inflight}");
                    return process;
                }
                Err(error) => log::error!("the new process does not take over: {error:#}"),
            }
        }
        std::future::pending().await
    }

    /// Returns when nothing is in flight, when time is up, or never: a second signal ends the process.
    async fn drain(&self, terminate: &mut Signal, interrupt: &mut Signal) {
        self.lifecycle.drain();
        supervisor::stopping();
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
                self.lifecycle.cut();
            }
            _ = terminate.recv() => end_at_once(&self.lifecycle),
            _ = interrupt.recv() => end_at_once(&self.lifecycle),
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What they hold is changed in one step each: a panic cannot leave it wrong.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the process, whatever it does.
pub(super) fn end_at_once(lifecycle: &Lifecycle) {
    log::warn!("ending at once; exchanges cut: {}", lifecycle.inflight());
    lifecycle.end(AT_ONCE);
    std::process::exit(1);
}

/// From now on signals that are not for ending end nobody: one may come while the process starts.
pub(super) fn outlive() -> std::io::Result<()> {
    let executor = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _within = executor.enter();
    for kind in [SignalKind::hangup(), SignalKind::user_defined1(), SignalKind::user_defined2()] {
        // What it does then is for the process's life.
        drop(signal(kind)?);
    }
    Ok(())
}

/// Opens the request log again at each signal, until the process ends.
fn reopen_on(mut reopen: Signal, telemetry: Arc<Telemetry>) {
    tokio::spawn(async move {
        while reopen.recv().await.is_some() {
            telemetry.request_log.reopen();
        }
    });
}

/// A signal of this kind, watched from now on.
pub(super) fn watch(kind: SignalKind) -> Signal {
    signal(kind).expect("a signal can be watched inside a tokio runtime")
}

#[async_trait]
impl<F: Fn() + Send + Sync> ShutdownSignalWatch for Signals<F> {
    async fn recv(&self) -> ShutdownSignal {
        let mut terminate = watch(SignalKind::terminate());
        let mut interrupt = watch(SignalKind::interrupt());
        let mut hangup = watch(SignalKind::hangup());
        let mut upgrade = watch(SignalKind::user_defined2());
        reopen_on(watch(SignalKind::user_defined1()), Arc::clone(&self.telemetry));
        self.start();
        let address = locked(&self.sockets).iter().find_map(|bound| match bound.listen().at {
            ListenAt::Tcp(address) => Some(address),
            ListenAt::Unix(_) => None,
        });
        let watchdog = async {
            supervisor::keep_watchdog(address).await;
            std::future::pending::<()>().await;
        };
        // A reload may wait for a slow disk; a signal to end does not wait for it.
        let end = tokio::select! {
            _ = terminate.recv() => End::Drain,
            _ = interrupt.recv() => End::Drain,
            () = self.reload(&mut hangup) => End::Drain,
            process = self.hand_over(&mut upgrade) => End::HandedOver(process),
            () = watchdog => End::Drain,
        };
        match end {
            End::Drain => self.drain(&mut terminate, &mut interrupt).await,
            End::HandedOver(process) => self.lifecycle.leave(process),
        }
        // Who connects from now on is refused, unless another process accepts.
        locked(&self.sockets).clear();
        ShutdownSignal::GracefulTerminate
    }
}
