//! Answers that are kept and given again, and one answer for all who ask for the same at a time.
//!
//! A request that may be answered so has a [`Key`]. Who comes first with one leads: it asks a backend, and what that
//! answers is [`Lead`]'s to keep once it is whole; who comes meanwhile follows its [`Flight`]. Nothing else puts an
//! answer in, and [`Answer`] is made of whole ones only.

mod answer;
mod flight;
mod lead;
mod memory;
mod remote;
mod request;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

pub use answer::Answer;
pub use flight::{End, Flight, Head, Listener, Next};
pub use lead::Lead;
pub use request::{Asked, Key, key, may_be_kept};

use crate::config::{CacheSpec, RedisSpec};
use crate::lifecycle::{HeldBytes, HeldShare};
use memory::Memory;
use remote::Remote;

/// How often something was purged: all, a model's, a key's.
type Purges = [u64; 3];

/// Whose answer it is, of which model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Of {
    /// `service/model`.
    pub pool: Arc<str>,
    /// The id of a key; empty: of all.
    pub tenant: Arc<str>,
}

impl Of {
    /// The purges that concern it.
    fn purges(&self) -> [Purge; 3] {
        let (pool, tenant) = (self.pool.to_string(), self.tenant.to_string());
        [Purge::All, Purge::Model(pool), Purge::Key(tenant)]
    }
}

/// What is to be forgotten.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Purge {
    /// Everything.
    All,
    /// The answers of a `service/model`.
    Model(String),
    /// Those that are of the key with this id.
    Key(String),
}

impl Purge {
    fn concerns(&self, of: &Of) -> bool {
        match self {
            Self::All => true,
            Self::Model(pool) => **pool == *of.pool,
            Self::Key(tenant) => **tenant == *of.tenant,
        }
    }
}

/// A request that may be answered by an answer that is kept.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// What tells it from others.
    pub key: Key,
    /// Whose answer it wants.
    pub of: Of,
    /// How long answers to it are kept.
    pub ttl: Duration,
    /// How old an answer may be at most.
    pub age_max: Duration,
}

impl Wanted {
    /// Whether an answer is young enough.
    fn takes(&self, answer: &Answer) -> bool {
        let age = answer.age(SystemTime::now());
        age < self.ttl && age <= self.age_max
    }
}

/// What becomes of a request.
pub enum Turn {
    /// There is an answer.
    Hit(Arc<Answer>),
    /// It asks a backend.
    Lead(Box<Lead>),
    /// There is one on its way.
    Follow(Arc<Flight>, Listener),
}

/// How the cache does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheState {
    /// Answers in this process, and how many bytes they take.
    pub held: (u64, u64),
    /// Bytes of answers on their way.
    pub coming: usize,
    /// Whether answers are kept in Redis; why it gives no answer, if so, and round trips that failed.
    pub shared: Option<(Option<String>, u64)>,
}

/// How often what this is of was purged.
fn count(purges: &HashMap<Purge, u64>, of: &Of) -> Purges {
    of.purges().map(|purge| purges.get(&purge).copied().unwrap_or_default())
}

/// All answers that are kept.
pub struct Cache {
    spec: CacheSpec,
    redis: Option<RedisSpec>,
    memory: Memory,
    remote: Option<Arc<Remote>>,
    flights: Mutex<HashMap<Key, Arc<Flight>>>,
    /// What is held of answers on their way.
    coming: Arc<HeldBytes>,
    /// How often what was purged, in this process.
    purges: Mutex<HashMap<Purge, u64>>,
}

impl Cache {
    /// An empty one; or `previous`, where nothing about it is different.
    #[must_use]
    pub fn new(
        spec: CacheSpec,
        redis: Option<&RedisSpec>,
        previous: Option<&Arc<Self>>,
    ) -> Arc<Self> {
        let redis = redis.filter(|_| spec.is_shared);
        if let Some(same) = previous.filter(|it| it.spec == spec && it.redis.as_ref() == redis) {
            return Arc::clone(same);
        }
        Arc::new(Self {
            spec,
            redis: redis.cloned(),
            memory: Memory::new(&spec),
            remote: redis.map(|redis| Remote::start(redis, spec.answer_bytes_max)),
            flights: Mutex::default(),
            coming: Arc::default(),
            purges: Mutex::default(),
        })
    }

    /// What becomes of a request. `joins`: it may follow another one, and others may follow it.
    pub async fn turn(self: &Arc<Self>, wanted: &Wanted, joins: bool) -> Turn {
        if let Some(answer) = self.held(wanted) {
            return Turn::Hit(answer);
        }
        let mut lead = if joins {
            let mut flights = self.flights();
            let known = flights.get(&wanted.key);
            if let Some((flight, listener)) = known.and_then(|it| Some((it, it.follow()?))) {
                return Turn::Follow(Arc::clone(flight), listener);
            }
            // It may have come to its end a moment ago.
            if let Some(answer) = self.held(wanted) {
                return Turn::Hit(answer);
            }
            let flight = self.flight(wanted);
            flights.insert(wanted.key, Arc::clone(&flight));
            let mut lead = Lead::new(self, flight, wanted);
            lead.is_public();
            lead
        } else {
            Lead::new(self, self.flight(wanted), wanted)
        };
        if let Some(remote) = &self.remote {
            let (found, purges) = remote.get(&wanted.key, &wanted.of).await.unzip();
            if let Some(answer) = found.flatten().filter(|answer| wanted.takes(answer)) {
                lead.found(&answer);
                return Turn::Hit(answer);
            }
            lead.is_of(purges);
        }
        Turn::Lead(lead)
    }

    /// For a request that takes no answer but its own, which others may have later.
    pub async fn refresh(self: &Arc<Self>, wanted: &Wanted) -> Box<Lead> {
        let mut lead = Lead::new(self, self.flight(wanted), wanted);
        if let Some(remote) = &self.remote {
            let known = remote.get(&wanted.key, &wanted.of).await;
            lead.is_of(known.map(|(_, purges)| purges));
        }
        lead
    }

    /// Whether others than this process are asked.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.remote.is_some()
    }

    fn flight(&self, wanted: &Wanted) -> Arc<Flight> {
        Flight::new(&wanted.of, HeldShare::none(&self.coming))
    }

    /// Forgets what is kept, also of what is on its way.
    ///
    /// # Errors
    /// When Redis, which has it, gives no answer; in its words.
    pub async fn purge(&self, purge: &Purge) -> Result<(), String> {
        *self.purges().entry(purge.clone()).or_default() += 1;
        {
            let mut flights = self.flights();
            flights.retain(|_, flight| !purge.concerns(flight.of()));
        }
        self.memory.purge(purge);
        match &self.remote {
            Some(remote) => remote.purge(purge).await,
            None => Ok(()),
        }
    }

    /// How it does.
    #[must_use]
    pub fn state(&self) -> CacheState {
        let shared = self.remote.as_ref().map(|remote| (remote.why(), remote.failures()));
        CacheState { held: self.memory.size(), coming: self.coming.count(), shared }
    }

    /// An answer of this process's own.
    fn held(&self, wanted: &Wanted) -> Option<Arc<Answer>> {
        self.memory.get(&wanted.key).filter(|answer| wanted.takes(answer))
    }

    /// Keeps an answer here; not if it was purged since it was asked for, when that was so often.
    fn put(&self, wanted: &Wanted, answer: &Arc<Answer>, purged: Purges) {
        let purges = self.purges();
        if count(&purges, &wanted.of) == purged {
            self.memory.put(wanted.key, &wanted.of, answer);
        }
    }

    /// How often what this is of was purged in this process.
    fn purged(&self, of: &Of) -> Purges {
        count(&self.purges(), of)
    }

    fn purges(&self) -> MutexGuard<'_, HashMap<Purge, u64>> {
        self.purges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody joins a flight any more.
    fn forget(&self, key: &Key, flight: &Arc<Flight>) {
        let mut flights = self.flights();
        if flights.get(key).is_some_and(|known| Arc::ptr_eq(known, flight)) {
            flights.remove(key);
        }
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<Key, Arc<Flight>>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
