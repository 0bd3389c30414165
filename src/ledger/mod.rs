//! Who used what: a row for each exchange that a backend was asked for.
//!
//! A row goes from the exchange into a queue, from there to files on disk (the spool), and from those into a
//! database. An exchange never waits for it. What is in the spool is not lost: not when the process or the machine
//! dies, not while the disk is full or the database down; and it is in the database once.

mod month;
mod price;
mod report;
mod row;
mod spool;
mod store;

use std::cell::RefCell;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

pub use month::{Held, Month, Months, Taken};
pub use price::{cost, price_after, without_reserved};
pub use report::{Dimension, Line, Query, as_json, moment};
pub use row::{Row, new_id, now};

use crate::config::{Calendar, LedgerSpec};
use spool::{Spool, SpoolReader, SpoolWriter};
use store::{Refused, Store};

/// As much memory is kept for the next rows.
const SPARE_BYTES_MAX: usize = 256 * 1024;

/// How long each part waits for more rows before it takes what is there: few wake-ups and waits for the disk carry
/// many rows. What is only in the queue is lost with a process that is killed; so that wait is short.
const GATHER_IN_QUEUE: Duration = Duration::from_millis(2);
const GATHER_FOR_SYNC: Duration = Duration::from_millis(20);
const GATHER_FOR_DATABASE: Duration = Duration::from_millis(100);

/// How often a full disk is tried again, and a database at first.
const RETRY: Duration = Duration::from_millis(500);

/// The longest pause before a database is tried again.
const RETRY_MAX: Duration = Duration::from_secs(15);

/// How often rows are removed that are too old, and how many at once.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);
const PRUNE_ROWS: usize = 10_000;

/// How often it is looked for rows of processes that ended since: one that hands over to its successor ends last.
const TAKE_OVER_EVERY: Duration = Duration::from_secs(30);

/// How often it is told that rows are lost.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// The file of rows that the database refuses, beside those that wait for it.
const ASIDE: &str = "refused.jsonl";

const MILLIS_A_DAY: i64 = 86_400_000;

/// The ledger of this process.
pub struct Ledger {
    spec: LedgerSpec,
    queue: Arc<Queue>,
    state: Arc<State>,
    spool: Arc<Spool>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Rows that wait for the disk, each as its line in the spool.
#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

#[derive(Default)]
struct Waiting {
    lines: Vec<u8>,
    /// Rows in them, and those that were taken and are not on the disk yet.
    rows: usize,
    is_finished: bool,
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for rows and some more, or the end. The lines that there are then, and whether it is the end.
    fn take(&self, empty: Vec<u8>) -> (Vec<u8>, bool) {
        let is_idle = |waiting: &mut Waiting| waiting.lines.is_empty() && !waiting.is_finished;
        let waiting = self.more.wait_while(self.waiting(), is_idle);
        let waiting = waiting.unwrap_or_else(PoisonError::into_inner);
        let goes_on = |waiting: &mut Waiting| !waiting.is_finished;
        let gathered = self.more.wait_timeout_while(waiting, GATHER_IN_QUEUE, goes_on);
        let mut waiting = gathered.unwrap_or_else(PoisonError::into_inner).0;
        (std::mem::replace(&mut waiting.lines, empty), waiting.is_finished)
    }

    /// The rows of lines that were taken are gone, one way or the other; how many those were.
    fn let_go(&self, lines: &[u8]) -> usize {
        let rows = memchr::memchr_iter(b'\n', lines).count();
        self.waiting().rows -= rows;
        rows
    }
}

thread_local! {
    /// A row's line, before it is in the queue.
    static LINE: RefCell<Vec<u8>> = RefCell::default();
}

/// How the ledger does.
#[derive(Debug, Default)]
pub struct State {
    /// Rows that are on disk, whatever happens to the process or the machine.
    spooled: AtomicU64,
    /// Rows that the database has.
    stored: AtomicU64,
    /// Rows that are lost: there was no room for them.
    dropped: AtomicU64,
    /// Rows without a price.
    unpriced: AtomicU64,
    /// Whether the process is about to end.
    is_ending: AtomicBool,
    /// Why the spool or the database does not take rows now.
    failures: Mutex<[Option<String>; 2]>,
}

/// Which of the two does not take rows.
#[derive(Clone, Copy)]
enum Part {
    Spool,
    Database,
}

impl State {
    /// Rows that are safe on disk, that the database has, and that are lost; since the start.
    #[must_use]
    pub fn counts(&self) -> [u64; 3] {
        [&self.spooled, &self.stored, &self.dropped].map(|count| count.load(Ordering::SeqCst))
    }

    /// Rows that have no price, since the start.
    #[must_use]
    pub fn unpriced(&self) -> u64 {
        self.unpriced.load(Ordering::SeqCst)
    }

    /// Why rows are not taken now: by the disk, by the database.
    #[must_use]
    pub fn failures(&self) -> [Option<String>; 2] {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes how it went; tells when that changes.
    fn note(&self, part: Part, failure: Option<String>) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let known = &mut failures[part as usize];
        let what = match part {
            Part::Spool => "the ledger's spool",
            Part::Database => "the ledger's database",
        };
        match (&known, &failure) {
            (None, Some(why)) => {
                log::error!("{what} takes no rows: {why}; they wait, and it is tried again");
            }
            (Some(_), None) => log::info!("{what} takes rows again"),
            _ => {}
        }
        *known = failure;
    }
}

impl Ledger {
    /// Begins to keep rows. A database that is down is waited for; when it has all that earlier processes left,
    /// `known` is told what it has of this month.
    ///
    /// # Errors
    /// When the spool's folder cannot be used.
    pub fn start(
        spec: &LedgerSpec,
        currency: &Arc<str>,
        known: impl FnOnce(&Known) + Send + 'static,
    ) -> Result<Self> {
        let folder = spec.spool.display();
        let spool = Spool::open(&spec.spool, spec.spool_bytes_max)
            .with_context(|| format!("cannot use {folder} for the ledger (state_directory)"))?;
        let queue = Arc::new(Queue::default());
        let state = Arc::new(State::default());
        let writer = std::thread::Builder::new().name("ledger-spool".to_owned()).spawn({
            let (queue, state, spool) =
                (Arc::clone(&queue), Arc::clone(&state), Arc::clone(&spool));
            move || write_spool(&queue, &spool, &state)
        })?;
        let reader = std::thread::Builder::new().name("ledger-store".to_owned()).spawn({
            let (state, spool, spec) = (Arc::clone(&state), Arc::clone(&spool), spec.clone());
            let currency = Arc::clone(currency);
            move || {
                let reader = SpoolReader::new(&spool);
                let known: Option<Tell> = Some(Box::new(known));
                let (pruned, taken_over) = (None, Instant::now());
                let filler =
                    Filler { spec, currency, reader, store: None, pruned, taken_over, known };
                filler.fill(&spool, &state);
            }
        })?;
        let syncer = std::thread::Builder::new().name("ledger-sync".to_owned()).spawn({
            let (state, spool) = (Arc::clone(&state), Arc::clone(&spool));
            move || sync_spool(&spool, &state)
        })?;
        let threads = Mutex::new(vec![writer, reader, syncer]);
        Ok(Self { spec: spec.clone(), queue, state, spool, threads })
    }

    /// Keeps a row. Returns at once, whatever the disk does.
    pub fn write(&self, row: &Row<'_>) {
        if row.cost.is_none() {
            self.state.unpriced.fetch_add(1, Ordering::SeqCst);
        }
        LINE.with_borrow_mut(|line| {
            line.clear();
            row.write_line(line);
            let mut waiting = self.queue.waiting();
            if waiting.rows >= self.spec.queue_rows_max || waiting.is_finished {
                drop(waiting);
                self.state.dropped.fetch_add(1, Ordering::SeqCst);
                return;
            }
            let is_first = waiting.lines.is_empty();
            waiting.lines.extend_from_slice(line);
            waiting.rows += 1;
            drop(waiting);
            if is_first {
                self.queue.more.notify_one();
            }
        });
    }

    /// Where it is.
    #[must_use]
    pub fn spec(&self) -> &LedgerSpec {
        &self.spec
    }

    /// How it does.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Bytes of rows that the database does not have yet.
    #[must_use]
    pub fn spool_bytes(&self) -> u64 {
        self.spool.bytes()
    }

    /// Writes down what is there, and gives the database at most `longest` to take it. What it does not take stays
    /// in the spool for the next process.
    pub fn finish(&self, longest: Duration) {
        let until = Instant::now() + longest;
        self.queue.waiting().is_finished = true;
        self.queue.more.notify_one();
        self.state.is_ending.store(true, Ordering::SeqCst);
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            while !thread.is_finished() && Instant::now() < until {
                std::thread::park_timeout(Duration::from_millis(5));
            }
        }
    }
}

/// What a database has of a time.
///
/// # Errors
/// When it cannot be asked.
pub fn report(spec: &LedgerSpec, query: &Query) -> Result<Vec<Line>> {
    store::open_to_read(&spec.database)?.report(query)
}

/// Whether there is a ledger file to read; a server is there or not.
#[must_use]
pub fn exists(spec: &LedgerSpec) -> bool {
    match &spec.database {
        crate::config::Database::Sqlite(path) => Path::new(path).exists(),
        crate::config::Database::Postgres(_) => true,
    }
}

/// From the queue to the disk.
fn write_spool(queue: &Queue, spool: &Arc<Spool>, state: &State) {
    let mut writer = SpoolWriter::new(spool);
    let mut spare = Vec::new();
    let mut told = (0, Instant::now());
    let mut is_finished = false;
    while !is_finished {
        let lines;
        (lines, is_finished) = queue.take(spare);
        let mut written = 0;
        while written < lines.len() {
            let rest = &lines[written..];
            match writer.append(rest) {
                Ok(bytes) => {
                    state.note(Part::Spool, None);
                    queue.let_go(&rest[..bytes]);
                    written += bytes;
                }
                Err(error) => {
                    state.note(Part::Spool, Some(error.to_string()));
                    if is_finished || state.is_ending.load(Ordering::SeqCst) {
                        let lost = queue.let_go(rest);
                        state.dropped.fetch_add(lost as u64, Ordering::SeqCst);
                        log::error!("rows of the ledger lost: {lost}");
                        break;
                    }
                    std::thread::park_timeout(RETRY);
                }
            }
        }
        spare = lines;
        spare.clear();
        // What a burst has taken is given back.
        spare.shrink_to(SPARE_BYTES_MAX);
        told = tell_dropped(state, told);
    }
    spool.finish();
}

/// Sees to it that what is written outlives the machine. Rows that come meanwhile wait for the next time.
fn sync_spool(spool: &Spool, state: &State) {
    let mut synced = 0;
    loop {
        match spool.sync(synced) {
            Ok(Some(rows)) => {
                synced = rows;
                state.spooled.store(rows, Ordering::SeqCst);
                std::thread::park_timeout(GATHER_FOR_SYNC);
            }
            Ok(None) => return,
            Err(error) => {
                log::error!("rows of the ledger may not be on the disk: {error}");
                std::thread::park_timeout(RETRY);
            }
        }
    }
}

/// Says, now and then, how many rows were lost.
fn tell_dropped(state: &State, (told, at): (u64, Instant)) -> (u64, Instant) {
    let dropped = state.dropped.load(Ordering::SeqCst);
    if dropped == told || at.elapsed() < TELL_EVERY && told > 0 {
        return (told, at);
    }
    log::error!("rows of the ledger lost since the start: {dropped}; its queue was full");
    (dropped, Instant::now())
}

/// What the database had of this month when the process started: sums by key, service and model.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// When it was looked up, in milliseconds since 1970.
    pub at: i64,
    /// Of the month so far.
    pub month: Vec<Line>,
    /// Of the day so far.
    pub day: Vec<Line>,
}

type Tell = Box<dyn FnOnce(&Known) + Send>;

/// Brings rows from the disk to the database.
struct Filler {
    spec: LedgerSpec,
    /// What is known of earlier processes is in.
    currency: Arc<str>,
    reader: SpoolReader,
    store: Option<Box<dyn Store>>,
    pruned: Option<Instant>,
    taken_over: Instant,
    known: Option<Tell>,
}

impl Filler {
    fn fill(mut self, spool: &Arc<Spool>, state: &State) {
        let mut pause = RETRY;
        loop {
            if self.taken_over.elapsed() >= TAKE_OVER_EVERY {
                self.taken_over = Instant::now();
                if let Err(error) = spool.take_over(false) {
                    log::error!("the ledger's spool cannot be read: {error}");
                }
            }
            // Looked at before: nothing is written after it.
            let is_finished = spool.is_finished();
            match self.step(state) {
                Ok(true) => {
                    state.note(Part::Database, None);
                    pause = RETRY;
                }
                Ok(false) if is_finished => return,
                Ok(false) => {
                    state.note(Part::Database, None);
                    spool.wait(self.reader.changes, TAKE_OVER_EVERY);
                    spool.wait_for_end(GATHER_FOR_DATABASE);
                }
                Err(error) => {
                    self.store = None;
                    state.note(Part::Database, Some(format!("{error:#}")));
                    let until = Instant::now() + pause;
                    while Instant::now() < until {
                        if state.is_ending.load(Ordering::SeqCst) {
                            return;
                        }
                        std::thread::park_timeout(Duration::from_millis(100));
                    }
                    pause = (pause * 2).min(RETRY_MAX);
                }
            }
        }
    }

    /// Puts the next rows into the database, connecting to it if need be; whether there were any.
    fn step(&mut self, state: &State) -> Result<bool> {
        let store = match &mut self.store {
            Some(store) => store,
            None => self.store.insert(store::open(&self.spec.database)?),
        };
        if let Some(keep) = self.spec.keep_days
            && self.pruned.is_none_or(|at| at.elapsed() >= PRUNE_EVERY)
        {
            // Budgets and tiers count by what there is of this month.
            let month = Calendar::Month.begin(now());
            let before = month.min(now() - i64::from(keep) * MILLIS_A_DAY);
            if store.prune(before, PRUNE_ROWS)? == PRUNE_ROWS {
                return Ok(true);
            }
            self.pruned = Some(Instant::now());
        }
        // Before the first row of this process is there, which counts its own.
        if self.known.is_some() && self.reader.is_past_left() {
            let known = known(store.as_mut(), &self.currency)?;
            if let Some(tell) = self.known.take() {
                tell(&known);
            }
        }
        let Some(batch) = self.reader.read()? else {
            return Ok(self.known.is_some() && self.reader.is_past_left());
        };
        let (rows, broken) = batch.rows();
        if broken > 0 {
            log::error!("rows of the ledger that cannot be read in its spool: {broken}");
        }
        put(store.as_mut(), &rows, &self.spec.spool, state)?;
        self.reader.done();
        Ok(true)
    }
}

/// Puts rows into the database. Those that it refuses for what is in them are put aside, so that the others pass.
fn put(store: &mut dyn Store, rows: &[Row<'_>], folder: &Path, state: &State) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let Err(error) = store.insert(rows) else {
        state.stored.fetch_add(rows.len() as u64, Ordering::SeqCst);
        return Ok(());
    };
    if error.downcast_ref::<Refused>().is_none() {
        return Err(error);
    }
    if let [row] = rows {
        let path = folder.join(ASIDE);
        spool::put_aside(&path, row).with_context(|| format!("cannot write {}", path.display()))?;
        log::error!(
            "the ledger's database refuses the row of request {}: {error}; it is in {} now",
            row.request_id,
            path.display()
        );
        return Ok(());
    }
    let (first, second) = rows.split_at(rows.len() / 2);
    put(store, first, folder, state)?;
    put(store, second, folder, state)
}

fn known(store: &mut dyn Store, currency: &Arc<str>) -> Result<Known> {
    let at = now();
    let mut since = |since| {
        let by = vec![Dimension::Key, Dimension::Service, Dimension::Model];
        let (until, currency) = (at + MILLIS_A_DAY, Arc::clone(currency));
        store.report(&Query { since, until, by, key_id: None, currency })
    };
    Ok(Known { at, month: since(Calendar::Month.begin(at))?, day: since(Calendar::Day.begin(at))? })
}
