//! Counts that gateways share, in Redis: one round trip an exchange, and none while the server is away.

mod errand;
mod keeper;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use redis::Script;
use tokio::sync::{Notify, mpsc};

use super::local::{Counts, Exceeded, Standing, Subject};
use super::window::{Length, PARTS};
use super::{Clock, until_end};
use crate::config::{Quantity, RedisSpec, WhenDown};
use crate::link::Link;
pub(super) use errand::Settlement;

/// How often a gateway says that it is there, and looks for a server that was away.
const BEAT: Duration = Duration::from_secs(1);

/// Places at a time are forgotten so long after they were last heard of.
const PLACES_KEPT: u64 = 120;

/// Money is kept so long after the end of the time that it is counted in.
const MONEY_KEPT: u64 = 86_400;

/// Most that waits to be settled. Beyond it, what was reserved in a window stays until it is out of it; what is held and
/// spent is told anew.
const SETTLING_MAX: usize = 100_000;

/// As many are settled with one round trip.
const SETTLED_AT_ONCE: usize = 256;

/// The server, as one gateway has it.
pub(super) struct Shared {
    pub(super) spec: RedisSpec,
    /// Who we are among gateways.
    gateway: String,
    /// Who holds something there. Another one after a reload that changes the server: what goes on then ends here.
    me: String,
    links: Vec<ArcSwapOption<Link>>,
    next: AtomicUsize,
    gateways: AtomicUsize,
    scripts: Scripts,
    settling: mpsc::Sender<Settlement>,
    /// What exchanges hold as long as they go on, by the keys of the counts. What changes it is also sent to be settled
    /// under its lock: so both are known at any moment.
    held: Mutex<HashMap<String, Place>>,
    /// How many takes are waiting for an answer.
    taking: AtomicUsize,
    clock: Clock,
    /// What the server's clock is ahead of ours, in microseconds.
    ahead: AtomicI64,
    /// How often the links were lost: what was sent before may not be taken after the server was told what is held.
    epoch: AtomicU64,
    /// Woken when the server gave no answer.
    failed: Notify,
    /// Round trips that failed.
    failures: AtomicU64,
    health: Mutex<Health>,
    /// What was taken while the server was away.
    pub(super) unshared: Arc<Counts>,
    /// The mark of the memory that the server had when it was last heard of.
    mark: Mutex<Option<String>>,
    /// Whether more money is known to be spent than was heard of from the server.
    pub(super) wants_totals: AtomicBool,
    /// The number of the next errand.
    errands: AtomicU64,
    /// Counts of which the server may hold something of ours that is not held, by their keys.
    doubtful: Mutex<HashMap<String, Place>>,
}

struct Health {
    /// Why there is no answer, if there is none.
    why: Option<String>,
    /// Whether the log says so.
    told: bool,
}

struct Scripts {
    take: Script,
    settle: Script,
    seed: Script,
    beat: Script,
}

/// An amount of one count.
pub(super) struct Claim {
    pub(super) subject: Subject,
    pub(super) quantity: Quantity,
    pub(super) amount: u64,
    pub(super) max: u64,
}

/// What exchanges hold of a count.
struct Place {
    /// Of the scripts.
    extra: u64,
    held: u64,
}

/// A take that is waited for.
struct Taking<'a>(&'a AtomicUsize);

impl<'a> Taking<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What was taken.
pub(super) struct Given {
    pub(super) standing: Standing,
    /// The part of a window that it counts in; of money, when its time began.
    pub(super) spot: i64,
    /// How much all have taken; of money, how much is spent.
    pub(super) used: u64,
}

/// That the server gives no answer.
pub(super) struct Away;

/// The largest number that scripts can count with; and that they can compare with one.
const NUMBER_MAX: u64 = 1 << 53;
const COMPARED_MAX: u64 = 1 << 62;

impl Shared {
    /// Connects in the background, from a thread of its own. What `previous` knows of a server goes on.
    pub(super) fn start(
        spec: &RedisSpec,
        counts: &Arc<Counts>,
        clock: Clock,
        previous: Option<&Arc<Self>>,
    ) -> Arc<Self> {
        let (settling, settlements) = mpsc::channel(SETTLING_MAX);
        let shared = Arc::new(Self {
            spec: spec.clone(),
            gateway: previous.map_or_else(name, |it| it.gateway.clone()),
            me: name(),
            links: (0..spec.connections).map(|_| ArcSwapOption::empty()).collect(),
            next: AtomicUsize::new(0),
            gateways: AtomicUsize::new(previous.map_or(1, |it| it.gateways())),
            scripts: Scripts {
                take: Script::new(include_str!("take.lua")),
                settle: Script::new(include_str!("settle.lua")),
                seed: Script::new(include_str!("seed.lua")),
                beat: Script::new(include_str!("beat.lua")),
            },
            settling,
            held: Mutex::default(),
            taking: AtomicUsize::new(0),
            clock,
            ahead: AtomicI64::new(0),
            epoch: AtomicU64::new(0),
            failed: Notify::new(),
            failures: AtomicU64::new(0),
            health: Mutex::new(Health { why: Some("not connected yet".to_owned()), told: false }),
            unshared: previous.map(|it| Arc::clone(&it.unshared)).unwrap_or_default(),
            mark: Mutex::new(previous.and_then(|it| it.mark())),
            wants_totals: AtomicBool::new(false),
            errands: AtomicU64::new(1),
            doubtful: Mutex::default(),
        });
        let (weak, counts) = (Arc::downgrade(&shared), Arc::clone(counts));
        let keeper = keeper::Keeper::new(weak, counts, clock, settlements);
        let thread = std::thread::Builder::new().name("redis".to_owned());
        if let Err(error) = thread.spawn(move || keeper.run()) {
            log::error!("cannot start the thread for Redis: {error}");
        }
        shared
    }

    fn mark(&self) -> Option<String> {
        self.mark.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes the mark of the server's memory; whether it is another one than before.
    fn remember(&self, mark: String) -> bool {
        let mut known = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        let has_forgotten = known.as_ref() != Some(&mark);
        *known = Some(mark);
        has_forgotten
    }

    fn held(&self) -> MutexGuard<'_, HashMap<String, Place>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn doubtful(&self) -> MutexGuard<'_, HashMap<String, Place>> {
        self.doubtful.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on nothing is taken there, and what is being taken has had its answer or will have none.
    async fn unlink(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        for link in &self.links {
            link.store(None);
        }
        let until = tokio::time::Instant::now() + 2 * self.spec.timeout;
        while self.taking.load(Ordering::SeqCst) > 0 && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn connect(&self) -> Result<Link, String> {
        Link::open(&self.spec).await.map_err(|error| {
            self.failures.fetch_add(1, Ordering::Relaxed);
            error.to_string()
        })
    }

    fn micros(&self) -> i64 {
        i64::try_from(self.clock.now().micros).unwrap_or(i64::MAX / 2)
    }

    /// How many gateways there were when last heard of.
    pub(super) fn gateways(&self) -> usize {
        self.gateways.load(Ordering::Relaxed).max(1)
    }

    /// Why there is no answer, if there is none.
    pub(super) fn why_away(&self) -> Option<String> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner).why.clone()
    }

    /// Round trips that failed since the start.
    pub(super) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    fn link(&self) -> Option<Arc<Link>> {
        let first = self.next.fetch_add(1, Ordering::Relaxed) % self.links.len();
        let (before, from) = self.links.split_at(first);
        from.iter().chain(before).find_map(ArcSwapOption::load_full)
    }

    /// Takes each of the amounts, or none of them: then which one did not fit.
    pub(super) async fn take(
        &self,
        claims: &[Claim],
        now_millis: i64,
    ) -> Result<Result<Vec<Given>, (usize, Exceeded)>, Away> {
        let _taking = Taking::new(&self.taking);
        let epoch = self.epoch.load(Ordering::SeqCst);
        let link = self.link().ok_or(Away)?;
        let mut call = self.scripts.take.prepare_invoke();
        call.key(self.own_key("epoch"));
        // Later nobody waits for it.
        let until = self.micros() + self.ahead.load(Ordering::Relaxed) + micros(self.spec.timeout);
        call.arg(&self.me).arg(epoch).arg(until);
        for claim in claims {
            call.key(self.key(claim.subject, claim.quantity, now_millis));
            call.arg(kind(claim.quantity))
                .arg(claim.amount.min(NUMBER_MAX))
                .arg(claim.max.min(COMPARED_MAX))
                .arg(extra(claim.quantity, now_millis));
        }
        let answer: Vec<i64> = match link.call(&call, self.spec.timeout).await {
            Ok(answer) => answer,
            Err(why) => {
                self.doubt(claims, now_millis);
                self.lost(&link, &why);
                return Err(Away);
            }
        };
        let millis = |number: i64| Duration::from_millis(number.max(0).cast_unsigned());
        let standing = |used: i64, reset: i64, quantity: Quantity| Standing {
            used: used.max(0).cast_unsigned(),
            reset: match quantity {
                Quantity::Money(_) => until_end(quantity, now_millis),
                _ => millis(reset),
            },
        };
        match &answer[..] {
            [0, at, used, reset, wait] => {
                let at = usize::try_from(*at - 1).unwrap_or_default().min(claims.len() - 1);
                let quantity = claims[at].quantity;
                let standing = standing(*used, *reset, quantity);
                let is_money = matches!(quantity, Quantity::Money(_));
                let wait = if is_money { standing.reset } else { millis(*wait) };
                Ok(Err((at, Exceeded { standing, wait })))
            }
            [1, rest @ ..] if rest.len() == 3 * claims.len() => {
                let parts = rest.chunks(3).zip(claims);
                let taken = parts.map(|(part, claim)| {
                    self.hold(claim, now_millis);
                    let standing = standing(part[0], part[1], claim.quantity);
                    match claim.quantity {
                        Quantity::Money(calendar) => {
                            let spot = calendar.begin(now_millis);
                            Given { standing, spot, used: part[2].max(0).cast_unsigned() }
                        }
                        _ => Given { standing, spot: part[2], used: standing.used },
                    }
                });
                Ok(Ok(taken.collect()))
            }
            [2] => {
                self.lost(&link, "it is too slow");
                Err(Away)
            }
            _ => {
                self.doubt(claims, now_millis);
                self.lost(&link, "an answer that is none");
                Err(Away)
            }
        }
    }

    fn doubt(&self, claims: &[Claim], millis: i64) {
        let mut doubtful = self.doubtful();
        for claim in claims.iter().filter(|claim| !is_of_window(claim.quantity)) {
            let key = self.key(claim.subject, claim.quantity, millis);
            doubtful.insert(key, Place { extra: extra(claim.quantity, millis), held: 0 });
        }
    }

    /// Notes what the server holds for an exchange.
    fn hold(&self, claim: &Claim, millis: i64) {
        if !is_of_window(claim.quantity) && claim.amount > 0 {
            self.held_more(&mut self.held(), claim, millis);
        }
    }

    /// Holds what was taken here while the server was away: it is told.
    pub(super) fn hold_here(&self, claim: &Claim, millis: i64) {
        let Claim { subject, quantity, amount, .. } = *claim;
        if is_of_window(quantity) || amount == 0 {
            return;
        }
        let spot = match quantity {
            Quantity::Money(calendar) => calendar.begin(millis),
            _ => 0,
        };
        let mut held = self.held();
        self.held_more(&mut held, claim, millis);
        self.send(Settlement { subject, quantity, spot, back: 0, more: 0, hold: amount });
    }

    fn held_more(&self, held: &mut HashMap<String, Place>, claim: &Claim, millis: i64) {
        let key = self.key(claim.subject, claim.quantity, millis);
        let new = || Place { extra: extra(claim.quantity, millis), held: 0 };
        held.entry(key).or_insert_with(new).held += claim.amount;
    }

    /// Settles an amount that was taken, soon.
    pub(super) fn settle(&self, settlement: Settlement) {
        let Settlement { subject, quantity, spot, back, .. } = settlement;
        if is_of_window(quantity) {
            return self.send(settlement);
        }
        let key = self.key(subject, quantity, spot);
        let mut held = self.held();
        if back > 0
            && let Entry::Occupied(mut place) = held.entry(key)
        {
            let left = place.get().held.saturating_sub(back);
            if left == 0 {
                place.remove();
            } else {
                place.get_mut().held = left;
            }
        }
        self.send(settlement);
    }

    /// As many wait as may: then the server is told all that is held and spent when it answers again.
    fn send(&self, settlement: Settlement) {
        let Err(settlement) = self.settling.try_send(settlement) else { return };
        let Settlement { subject, quantity, spot, .. } = settlement.into_inner();
        self.wants_totals.store(true, Ordering::SeqCst);
        self.doubt(&[Claim { subject, quantity, amount: 0, max: 0 }], spot);
    }

    /// A key that is about us.
    fn own_key(&self, what: &str) -> String {
        format!("{{{}}}:{what}:{}", self.spec.prefix, self.me)
    }

    /// The key of a count. All are in one slot of a cluster, so that a script can take several.
    fn key(&self, subject: Subject, quantity: Quantity, millis: i64) -> String {
        let prefix = &self.spec.prefix;
        match quantity {
            Quantity::Money(calendar) => {
                let begin = calendar.begin(millis);
                format!("{{{prefix}}}:limit:{subject:032x}:{begin}")
            }
            _ => format!("{{{prefix}}}:limit:{subject:032x}"),
        }
    }

    /// A link gave no answer: none is used until there is one again, for the server may have taken what is not known here.
    fn lost(&self, link: &Arc<Link>, why: &str) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let mut is_news = false;
        for known in &self.links {
            is_news |= known.load().as_ref().is_some_and(|known| Arc::ptr_eq(known, link));
        }
        if is_news {
            for known in &self.links {
                known.store(None);
            }
            self.note(Some(why.to_owned()));
            self.failed.notify_one();
        }
    }

    /// Notes whether there is an answer; tells when that changes.
    fn note(&self, why: Option<String>) {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        match &why {
            Some(why) if !health.told => {
                let meanwhile = match (self.spec.when_down, self.gateways()) {
                    (WhenDown::Refuse, _) => "what has a limit is refused".to_owned(),
                    (WhenDown::Local, 1) => "limits hold in this gateway alone".to_owned(),
                    (WhenDown::Local, count) => {
                        format!("each of {count} gateways gives its share of the limits")
                    }
                };
                log::error!("Redis gives no answer: {why}; until it does, {meanwhile}");
            }
            None if health.why.is_some() => {
                log::info!("Redis answers; gateways: {}", self.gateways());
            }
            _ => {}
        }
        *health = Health { told: why.is_some(), why };
    }

    /// Says that we are there; how many gateways are, and the mark of the server's memory.
    async fn beat(&self, link: &Link) -> Result<(usize, String), String> {
        let held: Vec<String> = self.held().keys().cloned().collect();
        let prefix = &self.spec.prefix;
        let mut call = self.scripts.beat.prepare_invoke();
        call.key(format!("{{{prefix}}}:gateways")).key(format!("{{{prefix}}}:memory"));
        for key in held {
            call.key(key);
        }
        call.arg(&self.gateway).arg(&self.me).arg(name());
        let before = self.micros();
        let (gateways, mark, time): (usize, String, i64) =
            link.call(&call, self.spec.timeout).await?;
        self.ahead.store(time - before, Ordering::Relaxed);
        Ok((gateways.max(1), mark))
    }
}

fn micros(time: Duration) -> i64 {
    i64::try_from(time.as_micros()).unwrap_or(i64::MAX / 4)
}

/// A name that nobody else has.
fn name() -> String {
    format!("{:016x}", fastrand::u64(..))
}

fn is_of_window(quantity: Quantity) -> bool {
    matches!(quantity, Quantity::Requests(_) | Quantity::Tokens(..))
}

/// What a count is, for the scripts.
fn kind(quantity: Quantity) -> &'static str {
    match quantity {
        Quantity::Requests(_) | Quantity::Tokens(..) => "w",
        Quantity::Concurrent => "c",
        Quantity::Money(_) => "m",
    }
}

/// What the scripts have to know of it besides.
fn extra(quantity: Quantity, millis: i64) -> u64 {
    match quantity {
        Quantity::Requests(window) | Quantity::Tokens(_, window) => Length::of(window).part(),
        Quantity::Concurrent => PLACES_KEPT,
        Quantity::Money(_) => until_end(quantity, millis).as_secs() + MONEY_KEPT,
    }
}

/// The parts of a window are counted in the scripts, too.
const _: () = assert!(PARTS == 256);
