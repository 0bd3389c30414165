//! Taking up a new configuration: on SIGHUP, on a change of its files, or when asked to.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::Signal;
use tokio::sync::{Notify, mpsc, oneshot};

use super::{Reload, background, supervisor};
use crate::config::{SeenFile, Snapshot, needs_restart};
use crate::runtime::{Current, ReloadReport, Reloaded, Reloads, Runtime};

/// How often the files are looked at. Looking sees every way of changing a file, also on network
/// file systems and where Kubernetes swaps a link, and costs a `stat` a file.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Takes up configurations, one at a time.
pub(super) struct Reloader {
    current: Arc<Current>,
    /// Woken when there is a new runtime.
    changed: Arc<Notify>,
    read: Reload,
    reloads: Arc<Reloads>,
}

impl Reloader {
    pub(super) fn new(
        current: Arc<Current>,
        changed: Arc<Notify>,
        read: Reload,
        reloads: Arc<Reloads>,
    ) -> Self {
        Self { current, changed, read, reloads }
    }

    /// Reloads whenever there is a reason to, without end.
    pub(super) async fn run(
        &self,
        hangup: &mut Signal,
        asked: &mut mpsc::Receiver<oneshot::Sender<Reloaded>>,
    ) {
        // What was seen last, and what was tried in vain.
        let mut pending = None;
        let mut failed = None;
        loop {
            let answer = tokio::select! {
                _ = hangup.recv() => None,
                Some(answer) = asked.recv() => Some(answer),
                () = tokio::time::sleep(LOOK_EVERY) => {
                    let now = self.look().await;
                    let is_news = now != self.current.load().snapshot.files && failed.as_ref() != Some(&now);
                    // An editor may still be writing: only what is the same twice is taken.
                    let is_settled = pending.as_ref() == Some(&now);
                    pending = Some(now);
                    if !is_news || !is_settled || !self.current.load().snapshot.reload_on_change {
                        continue;
                    }
                    log::info!("the configuration's files changed");
                    None
                }
            };
            let tried = self.look().await;
            let reloaded = self.reload().await;
            failed = reloaded.outcome.is_err().then_some(tried);
            if let Some(answer) = answer {
                let _ = answer.send(reloaded);
            }
        }
    }

    async fn reload(&self) -> Reloaded {
        supervisor::reloading();
        let outcome = self.take_up().await;
        match &outcome {
            Ok(report) => {
                let ReloadReport { models, backends, needs_restart } = report;
                log::info!(
                    "the new configuration is at work (models: {models}, backends: {backends})"
                );
                if !needs_restart.is_empty() {
                    log::warn!("these changes take a restart: {}", needs_restart.join(", "));
                }
            }
            Err(problems) => log::error!(
                "the new configuration is not used, the old one stays:\n  {}",
                problems.join("\n  ")
            ),
        }
        supervisor::ready();
        let reloaded = Reloaded { at: SystemTime::now(), outcome };
        self.reloads.note(&reloaded);
        reloaded
    }

    /// All or nothing: a configuration with problems leaves the old one at work.
    async fn take_up(&self) -> Result<ReloadReport, Vec<String>> {
        let before = self.current.load_full();
        let read = Arc::clone(&self.read);
        // Files are read and a large configuration is checked: not on this thread.
        let next: Snapshot = match tokio::task::spawn_blocking(move || read()).await {
            Ok(Ok(snapshot)) => snapshot,
            Ok(Err(error)) => return Err(error.lines().to_vec()),
            Err(error) => return Err(vec![error.to_string()]),
        };
        let report = ReloadReport {
            models: next.pools().count(),
            backends: next.pools().map(|(_, _, pool)| pool.backends.len()).sum(),
            needs_restart: needs_restart(&before.snapshot, &next),
        };
        let level = next.log_level;
        let runtime = Runtime::new(next, Some(&before)).map_err(|error| vec![error.to_string()])?;
        background::resolve(&runtime).await;
        self.current.store(Arc::new(runtime));
        self.changed.notify_one();
        log::set_max_level(level);
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
