//! The request log: JSON Lines, a line an exchange.
//!
//! Lines are put together in memory and written by a thread of its own, some milliseconds' worth at a time. A disk that
//! is slow keeps that thread and nobody else: beyond a bound lines are dropped, and counted.

mod file;
mod line;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use xxhash_rust::xxh3::xxh3_64;

use super::record::Record;
use crate::config::{LogTarget, RequestLogSpec};
use file::LogFile;

/// How long lines are gathered: few wake-ups and writes carry many of them.
const GATHER: Duration = Duration::from_millis(20);

/// How often the age of a file is looked at while nothing is written.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// How long a start waits to hear whether the file can be written; a disk that hangs is not waited for.
const OPENED_WITHIN: Duration = Duration::from_secs(1);

/// How often it is told that lines are lost.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// The request log of this process.
pub struct RequestLog {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    more: Condvar,
    written: AtomicU64,
    dropped: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Lines that wait for the thread.
    lines: Vec<u8>,
    /// How many those are.
    count: u64,
    errands: Vec<Errand>,
}

/// What the thread is asked to do after the lines before it.
enum Errand {
    /// Open the file again: the one that there was has been put aside.
    Reopen,
    /// Write there from now on; tell how that went.
    Turn(Option<LogTarget>, Option<Sender<Result<(), String>>>),
    Finish,
}

impl RequestLog {
    /// Begins to write as configured, if it is.
    ///
    /// # Errors
    /// When the file cannot be written, and somebody asked for it.
    pub fn start(spec: Option<&RequestLogSpec>) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let thread = std::thread::Builder::new().name("request-log".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || Writer { shared, target: None, told: 0, told_at: None }.run()
        })?;
        let log = Self { shared, thread: Mutex::new(Some(thread)) };
        if let Some(spec) = spec {
            let opened = log.turn(Some(spec.target.clone()));
            match opened.map_err(|why| anyhow!(why)).with_context(|| at(&spec.target)) {
                Err(error) if spec.is_asked_for => return Err(error),
                Err(error) => log::warn!("there is no request log: {error:#}"),
                Ok(()) => {}
            }
        }
        Ok(log)
    }

    /// Another configuration is at work: writes as that one says. What cannot be opened is told in the log, and tried
    /// again with every line.
    pub fn configure(&self, spec: Option<&RequestLogSpec>) {
        let target = spec.map(|spec| spec.target.clone());
        if let Err(why) = self.turn(target)
            && let Some(spec) = spec
        {
            log::error!("{}: {why}", at(&spec.target));
        }
    }

    fn turn(&self, target: Option<LogTarget>) -> Result<(), String> {
        let (told, opened) = channel();
        self.shared.ask(Errand::Turn(target, Some(told)));
        opened.recv_timeout(OPENED_WITHIN).unwrap_or(Ok(()))
    }

    /// Opens the file again.
    pub fn reopen(&self) {
        self.shared.ask(Errand::Reopen);
    }

    /// Writes the line of an exchange, unless it is one of those that the configuration leaves out. Returns at once,
    /// whatever the disk does.
    pub fn write(&self, record: &Record<'_>, spec: &RequestLogSpec) {
        if !is_told(record, spec.sample) {
            return;
        }
        let line = line::of(record);
        let mut state = self.shared.state();
        if state.lines.len() + line.len() > spec.queue_bytes_max {
            drop(state);
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let is_first = state.lines.is_empty();
        state.lines.extend_from_slice(&line);
        state.count += 1;
        drop(state);
        if is_first {
            self.shared.more.notify_one();
        }
    }

    /// Lines that are written, and that are lost, since the start.
    #[must_use]
    pub fn counts(&self) -> [u64; 2] {
        [&self.shared.written, &self.shared.dropped].map(|count| count.load(Ordering::Relaxed))
    }

    /// Writes what waits; takes at most `longest`.
    pub fn finish(&self, longest: Duration) {
        let until = Instant::now() + longest;
        self.shared.ask(Errand::Finish);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        while thread.as_ref().is_some_and(|thread| !thread.is_finished()) && Instant::now() < until
        {
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }
}

/// For an error.
fn at(target: &LogTarget) -> String {
    match target {
        LogTarget::Stdout => "cannot write the request log to standard output".to_owned(),
        LogTarget::File { path, .. } => {
            format!("cannot write the request log {} (request_log.file)", path.display())
        }
    }
}

/// Whether an exchange has a line: all that did not go well, and a share of the others, by their ids, so that
/// gateways behind one another tell the same.
fn is_told(record: &Record<'_>, sample: f64) -> bool {
    let is_well = (100..400).contains(&record.status) && record.fault.is_none();
    #[allow(clippy::cast_precision_loss, reason = "a share")]
    let number = || xxh3_64(record.request_id.as_bytes()) as f64 / u64::MAX as f64;
    !is_well || record.is_aborted || sample >= 1.0 || number() < sample
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, errand: Errand) {
        self.state().errands.push(errand);
        self.more.notify_one();
    }
}

/// What the thread works with.
struct Writer {
    shared: Arc<Shared>,
    target: Option<Target>,
    /// Lost lines that the log has told of, and when.
    told: u64,
    told_at: Option<Instant>,
}

enum Target {
    Stdout,
    File(LogFile),
}

impl Writer {
    fn run(mut self) {
        let mut spare = Vec::new();
        loop {
            let (lines, count, errands) = self.wait(std::mem::take(&mut spare));
            if count > 0 {
                self.write(&lines, count);
            }
            spare = lines;
            spare.clear();
            for errand in errands {
                match errand {
                    Errand::Reopen => self.reopen(),
                    Errand::Turn(target, told) => {
                        let turned = self.turn(target);
                        if let Some(told) = told {
                            // Who asked may have gone.
                            let _ = told.send(turned);
                        }
                    }
                    Errand::Finish => return,
                }
            }
            if let Some(Target::File(file)) = &mut self.target {
                file.look();
            }
            self.tell();
        }
    }

    /// Waits for lines or errands, and takes them.
    fn wait(&self, empty: Vec<u8>) -> (Vec<u8>, u64, Vec<Errand>) {
        let state = self.shared.state();
        let is_idle = |state: &mut State| state.lines.is_empty() && state.errands.is_empty();
        let waited = self.shared.more.wait_timeout_while(state, LOOK_EVERY, is_idle);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let mut state = if state.errands.is_empty() && !state.lines.is_empty() {
            let has_none = |state: &mut State| state.errands.is_empty();
            let waited = self.shared.more.wait_timeout_while(state, GATHER, has_none);
            waited.unwrap_or_else(PoisonError::into_inner).0
        } else {
            state
        };
        let lines = std::mem::replace(&mut state.lines, empty);
        (lines, std::mem::take(&mut state.count), std::mem::take(&mut state.errands))
    }

    fn write(&mut self, lines: &[u8], count: u64) {
        let written = match &mut self.target {
            None => Ok(()),
            Some(Target::Stdout) => file::write_stdout(lines),
            Some(Target::File(file)) => file.write(lines),
        };
        match written {
            Ok(()) => self.shared.written.fetch_add(count, Ordering::Relaxed),
            Err(error) => {
                log::debug!("the request log cannot be written: {error}");
                self.shared.dropped.fetch_add(count, Ordering::Relaxed)
            }
        };
    }

    fn reopen(&mut self) {
        if let Some(Target::File(file)) = &mut self.target {
            match file.reopen() {
                Ok(()) => log::info!("the request log was opened again"),
                Err(error) => log::error!("the request log cannot be opened again: {error}"),
            }
        }
    }

    fn turn(&mut self, target: Option<LogTarget>) -> Result<(), String> {
        match target {
            None => self.target = None,
            Some(LogTarget::Stdout) => self.target = Some(Target::Stdout),
            Some(LogTarget::File { path, rotate_bytes, rotate_after, keep }) => {
                let mut file = LogFile::new(path, rotate_bytes, rotate_after, keep);
                let opened = file.reopen();
                self.target = Some(Target::File(file));
                return opened.map_err(|error| error.to_string());
            }
        }
        Ok(())
    }

    /// Says, now and then, how many lines were lost.
    fn tell(&mut self) {
        let dropped = self.shared.dropped.load(Ordering::Relaxed);
        let is_time = self.told_at.is_none_or(|at| at.elapsed() >= TELL_EVERY);
        if dropped > self.told && is_time {
            log::error!(
                "lines of the request log lost since the start: {dropped}; its disk is slow, full or away"
            );
            self.told = dropped;
            self.told_at = Some(Instant::now());
        }
    }
}
