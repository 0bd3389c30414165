//! Answers that gateways share, in Redis. Where it gives no answer, there is none.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use redis::Cmd;
use tokio::sync::Notify;

use super::answer::Answer;
use super::request::Key;
use super::{Of, Purge, Purges};
use crate::config::RedisSpec;
use crate::link::{Link, Trouble};

/// How often it is looked for a server that was away.
const BEAT: Duration = Duration::from_secs(1);

/// The server.
pub(super) struct Remote {
    spec: RedisSpec,
    answer_bytes_max: usize,
    link: ArcSwapOption<Link>,
    /// Woken when the connection was lost.
    lost: Notify,
    failures: AtomicU64,
    /// Why there is no answer, if there is none.
    why: Mutex<Option<String>>,
    /// What it refused last, and how.
    refused: Mutex<Option<String>>,
}

impl Remote {
    /// Connects in the background, from a thread of its own.
    pub(super) fn start(spec: &RedisSpec, answer_bytes_max: usize) -> Arc<Self> {
        let remote = Arc::new(Self {
            spec: spec.clone(),
            answer_bytes_max,
            link: ArcSwapOption::empty(),
            lost: Notify::new(),
            failures: AtomicU64::new(0),
            why: Mutex::new(Some("not connected yet".to_owned())),
            refused: Mutex::default(),
        });
        let weak = Arc::downgrade(&remote);
        let thread = std::thread::Builder::new().name("redis-cache".to_owned());
        if let Err(error) = thread.spawn(move || keep(&weak)) {
            log::error!("cannot start the thread for the cache in Redis: {error}");
        }
        remote
    }

    /// What is kept for a request, and how often what it is of was purged; none while there is no answer.
    pub(super) async fn get(&self, key: &Key, of: &Of) -> Option<(Option<Arc<Answer>>, Purges)> {
        let link = self.link.load_full()?;
        let get = Cmd::get(self.name(key));
        let mut purged = redis::cmd("HMGET");
        purged.arg(self.purges()).arg(&of.purges().map(|purge| field(&purge)));
        let (written, purged) = tokio::join!(
            link.ask::<Option<Vec<u8>>>(&get, self.spec.timeout),
            link.ask::<[Option<u64>; 3]>(&purged, self.spec.timeout),
        );
        let purged = purged.map_err(|trouble| self.failed(&link, trouble)).ok()?;
        // What is there may be of another kind, and is written over.
        let written = match written {
            Ok(written) => written,
            Err(trouble @ Trouble::Away(_)) => {
                self.failed(&link, trouble);
                return None;
            }
            Err(Trouble::Refused(_)) => None,
        };
        let purged = purged.map(Option::unwrap_or_default);
        let answer = written.and_then(|written| self.read(&written, key, purged));
        Some((answer.map(Arc::new), purged))
    }

    /// Keeps an answer for a while.
    pub(super) async fn put(&self, key: Key, answer: Arc<Answer>, purges: Purges, ttl: Duration) {
        let Some(link) = self.link.load_full() else { return };
        // Compressing a large one would keep the traffic of a thread waiting.
        let written = tokio::task::spawn_blocking(move || answer.write(&key)).await;
        let written = match written {
            Ok(Ok(written)) => written,
            Ok(Err(error)) => return log::error!("an answer cannot be compressed: {error}"),
            Err(_) => return,
        };
        let mut value: Vec<u8> = purges.iter().flat_map(|count| count.to_le_bytes()).collect();
        value.extend_from_slice(&written);
        let ttl = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX / 2);
        let put = Cmd::pset_ex(self.name(&key), value, ttl.max(1));
        if let Err(trouble) = link.ask::<()>(&put, self.spec.timeout).await {
            self.failed(&link, trouble);
        }
    }

    /// Forgets what was kept.
    ///
    /// # Errors
    /// When there is no answer; in the words of the server.
    pub(super) async fn purge(&self, purge: &Purge) -> Result<(), String> {
        let Some(link) = self.link.load_full() else {
            return Err(self.why().unwrap_or_default());
        };
        let count = Cmd::hincr(self.purges(), field(purge), 1);
        let purged = link.ask::<()>(&count, self.spec.timeout).await;
        purged.map_err(|trouble| self.failed(&link, trouble))
    }

    /// Why there is no answer, if there is none.
    pub(super) fn why(&self) -> Option<String> {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Round trips that failed since the start.
    pub(super) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    fn read(&self, written: &[u8], key: &Key, purged: Purges) -> Option<Answer> {
        let mut rest = written;
        for count in purged {
            let (then, others) = rest.split_first_chunk::<8>()?;
            if u64::from_le_bytes(*then) != count {
                return None;
            }
            rest = others;
        }
        Answer::read(rest, key, self.answer_bytes_max)
    }

    /// Where an answer is kept. Answers are spread over a cluster, unlike what is counted.
    fn name(&self, key: &Key) -> String {
        let digits: String = key.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{}:answer:{digits}", self.spec.prefix)
    }

    /// Where it is counted how often what was purged.
    fn purges(&self) -> String {
        format!("{{{}}}:purges", self.spec.prefix)
    }

    /// There was no answer; why, in the words of the server.
    fn failed(&self, link: &Arc<Link>, trouble: Trouble) -> String {
        self.failures.fetch_add(1, Ordering::Relaxed);
        match trouble {
            Trouble::Away(why) => {
                let known = self.link.compare_and_swap(link, None);
                if known.as_ref().is_some_and(|known| Arc::ptr_eq(known, link)) {
                    self.note(Some(why.clone()));
                    self.lost.notify_one();
                }
                why
            }
            // It may do so for each answer that it is given: it has no room, say.
            Trouble::Refused(why) => {
                let mut known = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
                if known.as_ref() != Some(&why) {
                    log::warn!("the cache in Redis refuses: {why}");
                    *known = Some(why.clone());
                }
                why
            }
        }
    }

    /// Notes whether there is an answer; tells when that changes.
    fn note(&self, why: Option<String>) {
        let mut known = self.why.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*known, &why) {
            (None, Some(why)) => {
                log::warn!(
                    "the cache in Redis gives no answer: {why}; until it does, nothing is kept"
                );
            }
            (Some(_), None) => log::info!("the cache in Redis answers"),
            _ => {}
        }
        *known = why;
    }
}

/// Where it is counted how often this was purged.
fn field(purge: &Purge) -> String {
    match purge {
        Purge::All => "all".to_owned(),
        Purge::Model(pool) => format!("model {pool}"),
        Purge::Key(tenant) => format!("key {tenant}"),
    }
}

/// Keeps the connection up until nobody needs it any more.
fn keep(remote: &Weak<Remote>) {
    let executor = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match executor {
        Ok(executor) => executor.block_on(async { while step(remote).await {} }),
        Err(error) => log::error!("cannot keep the connection of the cache to Redis: {error}"),
    }
}

async fn step(weak: &Weak<Remote>) -> bool {
    let Some(remote) = weak.upgrade() else { return false };
    let known = remote.link.load_full();
    let looked = match &known {
        Some(link) => link.ask::<()>(&redis::cmd("PING"), remote.spec.timeout).await,
        None => match Link::open(&remote.spec).await {
            Ok(link) => {
                remote.link.store(Some(Arc::new(link)));
                remote.note(None);
                Ok(())
            }
            Err(error) => Err(Trouble::Away(error.to_string())),
        },
    };
    match (looked, known) {
        (Err(trouble), Some(link)) => {
            remote.failed(&link, trouble);
        }
        (Err(Trouble::Away(why) | Trouble::Refused(why)), None) => {
            remote.failures.fetch_add(1, Ordering::Relaxed);
            remote.note(Some(why));
        }
        (Ok(()), _) => {}
    }
    drop(remote);
    let lost = async {
        match weak.upgrade() {
            Some(remote) => remote.lost.notified().await,
            None => std::future::pending().await,
        }
    };
    // A server that has just failed is given some time, too.
    let _ = tokio::time::timeout(BEAT, lost).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    true
}
