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
use arc_swap::ArcSwap;

use super::record::Record;
use crate::config::{LogTarget, RequestLogSpec};
use file::{Lines, LogFile};

/// How long lines are gathered: few wake-ups and writes carry many of them.
const GATHER: Duration = Duration::from_millis(20);

/// How often the age of a file is looked at while nothing is written.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// How long a start waits to hear whether the file can be written; a disk that hangs is not waited for.
const OPENED_WITHIN: Duration = Duration::from_secs(1);

/// As much memory is kept for the next lines.
const SPARE_BYTES_MAX: usize = 256 * 1024;

/// How often it is told that lines are lost.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// The request log of this process.
pub struct RequestLog {
    /// The thread at work, and what it is given.
    lane: ArcSwap<Lane>,
    counts: Arc<LineCounts>,
    told: Mutex<Told>,
}

/// A thread that writes, and what waits for it. One that a dead disk keeps is left to itself, and another one begun.
struct Lane {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct LineCounts {
    written: AtomicU64,
    dropped: AtomicU64,
    /// Why the last lines could not be written, if they could not.
    failure: Mutex<Option<String>>,
}

#[derive(Default)]
struct Told {
    /// Lost lines that the application log has told of, and when.
    dropped: u64,
    at: Option<Instant>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    more: Condvar,
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
    Turn(Option<LogTarget>, Sender<Result<(), String>>),
    Finish,
}

impl RequestLog {
    /// Begins to write as configured, if it is.
    ///
    /// # Errors
    /// When the file cannot be written, and somebody asked for it.
    pub fn start(spec: Option<&RequestLogSpec>) -> Result<Self> {
        let counts = Arc::new(LineCounts::default());
        let lane = ArcSwap::from_pointee(Lane::begin(&counts)?);
        let log = Self { lane, counts, told: Mutex::default() };
        if let Some(spec) = spec {
            match log.turn(Some(spec)).with_context(|| at(&spec.target)) {
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
        if let Err(error) = self.turn(spec)
            && let Some(spec) = spec
        {
            log::error!("{}: {error:#}", at(&spec.target));
        }
    }

    fn turn(&self, spec: Option<&RequestLogSpec>) -> Result<()> {
        if self.ask_to_turn(spec)? {
            return Ok(());
        }
        // What it was at, a disk keeps it from: those lines are written when that comes back, if it does.
        let old = self.lane.swap(Arc::new(Lane::begin(&self.counts)?));
        old.shared.ask(Errand::Finish);
        if !self.ask_to_turn(spec)?
            && let Some(spec) = spec
        {
            log::warn!("{} yet: its disk, or who should read it, gives no sign", at(&spec.target));
        }
        Ok(())
    }

    /// Whether the thread has done so in time.
    fn ask_to_turn(&self, spec: Option<&RequestLogSpec>) -> Result<bool> {
        let (told, opened) = channel();
        let target = spec.map(|spec| spec.target.clone());
        self.lane.load().shared.ask(Errand::Turn(target, told));
        match opened.recv_timeout(OPENED_WITHIN) {
            Ok(opened) => opened.map(|()| true).map_err(|why| anyhow!(why)),
            Err(_) => Ok(false),
        }
    }

    /// Opens the file again.
    pub fn reopen(&self) {
        self.lane.load().shared.ask(Errand::Reopen);
    }

    /// Writes the line of an exchange, unless it is one of those that the configuration leaves out. Returns at once,
    /// whatever the disk does.
    pub fn write(&self, record: &Record<'_>, spec: &RequestLogSpec) {
        if !is_told(record, spec.sample) {
            return;
        }
        let line = line::of(record);
        let lane = self.lane.load();
        let mut state = lane.shared.state();
        if state.lines.len() + line.len() > spec.queue_bytes_max {
            drop(state);
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let is_first = state.lines.is_empty();
        state.lines.extend_from_slice(&line);
        state.count += 1;
        drop(state);
        if is_first {
            lane.shared.more.notify_one();
        }
    }

    /// Lines that are written, and that are lost, since the start.
    #[must_use]
    pub fn counts(&self) -> [u64; 2] {
        let LineCounts { written, dropped, .. } = &*self.counts;
        [written, dropped].map(|count| count.load(Ordering::Relaxed))
    }

    /// Why the last lines could not be written, if they could not.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.counts.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says, now and then, how many lines were lost. Not for the thread that writes to do: a disk may keep it.
    pub fn tell_lost(&self) {
        let [_, dropped] = self.counts();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if dropped > told.dropped && told.at.is_none_or(|at| at.elapsed() >= TELL_EVERY) {
            let why =
                self.failure().unwrap_or_else(|| "what it is written to is too slow".to_owned());
            log::error!("lines of the request log lost since the start: {dropped}; {why}");
            *told = Told { dropped, at: Some(Instant::now()) };
        }
    }

    /// Writes what waits; takes at most `longest`.
    pub fn finish(&self, longest: Duration) {
        let until = Instant::now() + longest;
        let lane = self.lane.load();
        lane.shared.ask(Errand::Finish);
        let thread = lane.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        while thread.as_ref().is_some_and(|thread| !thread.is_finished()) && Instant::now() < until
        {
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }
}

impl Lane {
    fn begin(counts: &Arc<LineCounts>) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let thread = std::thread::Builder::new().name("request-log".to_owned()).spawn({
            let (shared, counts) = (Arc::clone(&shared), Arc::clone(counts));
            move || Writer { shared, counts, target: None }.run()
        })?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
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

/// Whether an exchange has a line: all that did not go well, and a share of the others. By nothing that a client sends:
/// it could keep out of the log.
fn is_told(record: &Record<'_>, sample: f64) -> bool {
    let is_well = (100..400).contains(&record.status) && record.fault.is_none();
    !is_well || record.is_aborted || sample >= 1.0 || fastrand::f64() < sample
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
    counts: Arc<LineCounts>,
    target: Option<Target>,
}

enum Target {
    Stdout(Lines),
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
            // What a burst has taken is given back.
            spare.shrink_to(SPARE_BYTES_MAX);
            for errand in errands {
                match errand {
                    Errand::Reopen => self.reopen(),
                    // Who asked may have gone.
                    Errand::Turn(target, told) => drop(told.send(self.turn(target))),
                    Errand::Finish => return,
                }
            }
            if let Some(Target::File(file)) = &mut self.target {
                file.rotate();
            }
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
        let (bytes, failure) = match &mut self.target {
            // Some last exchanges began with a configuration that had a request log: nobody wants it any more.
            None => return,
            Some(Target::Stdout(out)) => out.write(lines),
            Some(Target::File(file)) => file.write(lines),
        };
        let failure = failure.map(|failure| failure.to_string());
        *self.counts.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
        let written = memchr::memchr_iter(b'\n', &lines[..bytes]).count() as u64;
        self.counts.written.fetch_add(written, Ordering::Relaxed);
        self.counts.dropped.fetch_add(count.saturating_sub(written), Ordering::Relaxed);
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
            Some(LogTarget::Stdout) => self.target = Some(Target::Stdout(Lines::default())),
            Some(LogTarget::File { path, rotate_bytes, rotate_after, keep }) => {
                let mut file = LogFile::new(path, rotate_bytes, rotate_after, keep);
                let opened = file.reopen();
                self.target = Some(Target::File(file));
                return opened.map_err(|error| error.to_string());
            }
        }
        Ok(())
    }
}
