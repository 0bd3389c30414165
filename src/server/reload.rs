//! Taking up a new configuration: on SIGHUP, on a change of its files, or when asked to.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::signal::unix::Signal;
use tokio::sync::{Notify, mpsc, oneshot};

use super::{Reload, background, supervisor};
use crate::config::{self, ConfigError, Fixed, SeenFile};
use crate::runtime::{Current, ReloadReport, Reloaded, Reloads, Runtime};
use crate::telemetry::{AppLog, Telemetry};

/// How often the files are looked at. Looking sees every way of changing a file, also on network
/// file systems and where Kubernetes swaps a link, and costs a `stat` a file.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How soon one that was refused is tried again, though the files that are looked at are the same: it
/// may name one that was missing.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// A configuration that was refused.
struct Failed {
    files: Vec<SeenFile>,
    at: Instant,
}

/// Takes up configurations, one at a time.
pub(super) struct Reloader {
    current: Arc<Current>,
    /// What the process was started with.
    started: Fixed,
    /// Woken when there is a new runtime.
    changed: Arc<Notify>,
    read: Reload,
    told: Told,
}

/// Who is told of a new configuration, beside the exchanges.
pub(super) struct Told {
    pub(super) reloads: Arc<Reloads>,
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) app_log: AppLog,
}

impl Reloader {
    pub(super) fn new(
        current: Arc<Current>,
        changed: Arc<Notify>,
        read: Reload,
        told: Told,
    ) -> Self {
        let started = Fixed::of(&current.load().snapshot);
        Self { current, started, changed, read, told }
    }

    /// Reloads whenever there is a reason to, without end.
    pub(super) async fn run(
        &self,
        hangup: &mut Signal,
        asked: &mut mpsc::Receiver<oneshot::Sender<Reloaded>>,
    ) {
        // What was seen last, and what was tried in vain.
        let mut pending = None;
        let mut failed: Option<Failed> = None;
        loop {
            let answer = tokio::select! {
                _ = hangup.recv() => None,
                Some(answer) = asked.recv() => Some(answer),
                () = tokio::time::sleep(LOOK_EVERY) => {
                    let now = self.look().await;
                    let known = failed.as_ref().map(|failed| &failed.files);
                    let is_news = now != self.current.load().snapshot.files && known != Some(&now);
                    // An editor may still be writing: only what is the same twice is taken.
                    let is_settled = pending.as_ref() == Some(&now);
                    pending = Some(now);
                    if !self.current.load().snapshot.reload_on_change {
                        continue;
                    }
                    if !is_news {
                        self.try_again(&mut failed).await;
                        continue;
                    }
                    if !is_settled {
                        continue;
                    }
                    log::info!("the configuration's files changed");
                    None
                }
            };
            let files = self.look().await;
            let reloaded = self.reload().await;
            let is_err = reloaded.outcome.is_err();
            failed = is_err.then(|| Failed { files, at: Instant::now() });
            if let Some(answer) = answer {
                let _ = answer.send(reloaded);
            }
        }
    }

    /// Sees, without a word, whether what was refused is fine by now.
    async fn try_again(&self, failed: &mut Option<Failed>) {
        let Some(refused) = failed else { return };
        if refused.at.elapsed() < TRY_AGAIN_AFTER {
            return;
        }
        refused.at = Instant::now();
        if let Ok(report) = self.take_up().await {
            self.note(Ok(report));
            *failed = None;
        }
    }

    async fn reload(&self) -> Reloaded {
        supervisor::reloading();
        let outcome = self.take_up().await;
        let reloaded = self.note(outcome);
        supervisor::ready();
        reloaded
    }

    fn note(&self, outcome: Result<ReloadReport, Vec<String>>) -> Reloaded {
        match &outcome {
            Ok(report) => {
                let ReloadReport { summary, needs_restart } = report;
                log::info!("the new configuration is at work ({summary})");
                if !needs_restart.is_empty() {
                    log::warn!("these changes take a restart: {}", needs_restart.join(", "));
                }
            }
            Err(problems) => log::error!(
                "the new configuration is not used, the old one stays:\n  {}",
                problems.join("\n  ")
            ),
        }
        let reloaded = Reloaded { at: SystemTime::now(), outcome };
        self.told.reloads.note(&reloaded);
        reloaded
    }

    /// All or nothing: a configuration with problems leaves the old one at work.
    async fn take_up(&self) -> Result<ReloadReport, Vec<String>> {
        let before = self.current.load_full();
        let read = Arc::clone(&self.read);
        // Files are read and a large configuration is checked: not on this thread.
        let checked = move || -> Result<_, ConfigError> {
            let next = read()?;
            let warnings = config::warnings(&next);
            Ok((next, warnings))
        };
        let (next, warnings) = match tokio::task::spawn_blocking(checked).await {
            Ok(Ok(checked)) => checked,
            Ok(Err(error)) => return Err(error.lines().to_vec()),
            Err(error) => return Err(vec![error.to_string()]),
        };
        let report = ReloadReport {
            summary: next.summary(),
            needs_restart: self.started.needs_restart(&next),
        };
        let (level, observed) = (next.log_level, next.observed.clone());
        let runtime = Runtime::new(next, Some(&before)).map_err(|error| vec![error.to_string()])?;
        background::resolve(&runtime).await;
        self.told.app_log.configure(level, observed.log_format);
        // Exchanges of the new configuration find their log open.
        self.told.telemetry.configure(&before.snapshot.observed, observed).await;
        self.current.store(Arc::new(runtime));
        self.changed.notify_one();
        for warning in warnings {
            log::warn!("{warning}");
        }
        Ok(report)
    }

    /// What the files look like now.
    async fn look(&self) -> Vec<SeenFile> {
        let files = self.current.load().snapshot.files.clone();
        let look = move || files.iter().map(|file| SeenFile::look(&file.path)).collect();
        // A disk may be slow.
        tokio::task::spawn_blocking(look).await.unwrap_or_default()
    }
}
