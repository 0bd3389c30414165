//! Who keeps up the connections to Redis, and brings it what has to be known there.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::mpsc;

use super::super::local::{Amounts, Counts, Known, Subject};
use super::super::{Clock, Moment};
use super::errand::{Errand, Seed};
use super::{BEAT, Place, SETTLED_AT_ONCE, Settlement, Shared, extra, is_of_window};
use crate::config::{Quantity, WhenDown};
use crate::link::Link;

/// Errands that wait for the server, beyond which settlements are given up: it stays away for long, and is told all
/// of it anew then.
const ERRANDS_MAX: usize = 4096;

/// How often it is looked whether other gateways are back.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// So many amounts are told with one round trip.
const TOLD_AT_ONCE: usize = 1000;

/// An errand that the server refuses so often, while it answers otherwise, is given up.
const TRIES_MAX: usize = 10;

/// The keeper of one gateway's connections.
pub(super) struct Keeper {
    shared: Weak<Shared>,
    counts: Arc<Counts>,
    clock: Clock,
    settlements: mpsc::Receiver<Settlement>,
    /// What the server has to be brought, in this order. Each has a number, by which it knows what it has seen.
    errands: VecDeque<(u64, Errand)>,
    /// How often the first of them was refused.
    tries: usize,
}

impl Keeper {
    pub(super) fn new(
        shared: Weak<Shared>,
        counts: Arc<Counts>,
        clock: Clock,
        settlements: mpsc::Receiver<Settlement>,
    ) -> Self {
        Self { shared, counts, clock, settlements, errands: VecDeque::new(), tries: 0 }
    }

    /// Runs until nobody shares anything any more.
    pub(super) fn run(mut self) {
        let executor = tokio::runtime::Builder::new_current_thread().enable_all().build();
        match executor {
            Ok(executor) => executor.block_on(async { while self.step().await {} }),
            Err(error) => log::error!("cannot keep the connection to Redis: {error}"),
        }
    }

    /// Looks after the connections, and settles for a while. False: nobody needs them any more.
    async fn step(&mut self) -> bool {
        let Some(shared) = self.shared.upgrade() else { return false };
        let looked = self.look_after(&shared).await;
        shared.note(looked.err());
        let until = tokio::time::Instant::now() + BEAT;
        drop(shared);
        loop {
            let mut batch = Vec::new();
            let failed = async {
                match self.shared.upgrade() {
                    Some(shared) => shared.failed.notified().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                count = self.settlements.recv_many(&mut batch, SETTLED_AT_ONCE) => {
                    if count == 0 {
                        return false;
                    }
                }
                () = failed => return true,
                () = tokio::time::sleep_until(until) => return true,
            }
            let Some(shared) = self.shared.upgrade() else { return false };
            self.take_up(&shared, Errand::Settle(batch));
            if let Some(link) = shared.link()
                && let Err(why) = self.deliver(&shared, &link).await
            {
                shared.lost(&link, &why);
            }
            // However much there is to settle.
            if tokio::time::Instant::now() >= until {
                return true;
            }
        }
    }

    fn take_up(&mut self, shared: &Shared, errand: Errand) {
        if matches!(errand, Errand::Settle(_)) && self.errands.len() >= ERRANDS_MAX {
            shared.wants_totals.store(true, Ordering::SeqCst);
            return;
        }
        let number = shared.errands.fetch_add(1, Ordering::Relaxed);
        self.errands.push_back((number, errand));
    }

    /// Brings the server all that waits.
    async fn deliver(&mut self, shared: &Shared, link: &Link) -> Result<(), String> {
        while let Some((number, errand)) = self.errands.front() {
            let now = self.clock.now();
            match (shared.run(link, *number, errand, now).await, errand) {
                (Ok(spent), Errand::Settle(settlements)) => {
                    for (settlement, spent) in settlements.iter().zip(spent) {
                        let Settlement { subject, quantity, .. } = settlement;
                        let spent = spent.max(0).cast_unsigned();
                        // The day or month may have ended meanwhile.
                        if let Quantity::Money(calendar) = quantity
                            && calendar.begin(now.millis) == settlement.spot
                        {
                            self.counts.heard(*subject, *quantity, spent, now);
                        }
                    }
                }
                (Ok(_), Errand::Seed(_)) => {}
                (Err(why), _) => {
                    self.tries += 1;
                    if self.tries < TRIES_MAX {
                        return Err(why);
                    }
                    log::error!("Redis does not take what was counted here: {why}; it is left out");
                    shared.wants_totals.store(true, Ordering::SeqCst);
                }
            }
            self.tries = 0;
            self.errands.pop_front();
        }
        Ok(())
    }

    /// Connects what is not connected; and says that we are there.
    async fn look_after(&mut self, shared: &Shared) -> Result<(), String> {
        let Some(first) = shared.links.first() else { return Ok(()) };
        let (link, is_new) = match first.load_full() {
            Some(link) => (link, false),
            None => (Arc::new(shared.connect().await?), true),
        };
        let told = self.tell(shared, &link, is_new).await;
        if let Err(why) = told {
            shared.lost(&link, &why);
            return Err(why);
        }
        first.store(Some(link));
        for other in &shared.links[1..] {
            if other.load().is_none() {
                other.store(Some(Arc::new(shared.connect().await?)));
            }
        }
        Ok(())
    }

    /// Tells the server what it does not know: what it has forgotten, and what it has missed.
    async fn tell(&mut self, shared: &Shared, link: &Link, is_new: bool) -> Result<(), String> {
        let (mut gateways, mark) = shared.beat(link).await?;
        let has_forgotten = shared.remember(mark);
        let is_anew = is_new || has_forgotten || !shared.doubtful().is_empty();
        if is_anew {
            shared.unlink().await;
        }
        // A server may also come back as it was some time ago.
        if shared.wants_totals.swap(false, Ordering::SeqCst) || is_anew {
            self.plan_totals(shared, has_forgotten);
        }
        if is_anew {
            self.plan_places(shared);
        }
        let until = tokio::time::Instant::now() + 2 * BEAT;
        // More may be taken here until the connection is there for all.
        loop {
            self.plan_missed(shared);
            let is_told = self.errands.is_empty();
            self.deliver(shared, link).await?;
            // The others come back, too: until they have told what they took, each gives its share. Where that is refused
            // meanwhile, they took nothing.
            let gives_share = shared.spec.when_down == WhenDown::Local;
            let are_fewer = is_anew && gives_share && gateways < shared.gateways();
            if are_fewer && tokio::time::Instant::now() < until {
                tokio::time::sleep(LOOK_AGAIN).await;
                (gateways, _) = shared.beat(link).await?;
            } else if is_told {
                shared.gateways.store(gateways, Ordering::Relaxed);
                return Ok(());
            }
        }
    }

    /// Takes up what waits to be settled.
    fn take_up_settlements(&mut self, shared: &Shared) {
        let mut batch = Vec::new();
        while let Ok(settlement) = self.settlements.try_recv() {
            batch.push(settlement);
            if batch.len() == SETTLED_AT_ONCE {
                self.take_up(shared, Errand::Settle(std::mem::take(&mut batch)));
            }
        }
        if !batch.is_empty() {
            self.take_up(shared, Errand::Settle(batch));
        }
    }

    /// What is known here of windows, if the server has forgotten them; and of money, as much as has been heard of.
    fn plan_totals(&mut self, shared: &Shared, has_forgotten: bool) {
        self.take_up_settlements(shared);
        let now = self.clock.now();
        let known = self.counts.known(now);
        let missed = shared.unshared.drain(now);
        let mut seeds = Seeds::new(shared, now);
        let mut missed_money = HashMap::new();
        for Known { subject, quantity, amounts } in missed {
            match amounts {
                Amounts::Money { spent, .. } if spent > 0 => {
                    missed_money.insert(subject, (quantity, spent));
                }
                // Of windows it is in what is known; or it goes on waiting.
                Amounts::Window(parts) if !has_forgotten => {
                    seeds.add(subject, quantity, Seed::Parts(parts));
                }
                _ => {}
            }
        }
        if has_forgotten {
            // It is in what is known here.
            self.errands.clear();
        }
        for Known { subject, quantity, amounts } in known {
            let seed = match amounts {
                // One may be known for what others took in it.
                Amounts::Window(parts) if has_forgotten && !parts.is_empty() => Seed::Parts(parts),
                Amounts::Money { total, .. } if total > 0 => {
                    let missed = missed_money.get(&subject).map_or(0, |(_, missed)| *missed);
                    Seed::AtLeast(total.saturating_sub(missed))
                }
                _ => continue,
            };
            seeds.add(subject, quantity, seed);
        }
        for (subject, (quantity, spent)) in missed_money {
            seeds.add(subject, quantity, Seed::More(spent));
        }
        self.take_up_seeds(shared, seeds.seeds);
    }

    /// What exchanges hold here: the server may have heard of their beginning and not of their end, or the other way
    /// round.
    fn plan_places(&mut self, shared: &Shared) {
        let held = shared.held();
        // What is sent later comes on top of what is told now.
        self.take_up_settlements(shared);
        let mut places = std::mem::take(&mut *shared.doubtful());
        for (key, Place { extra, held }) in held.iter() {
            places.insert(key.clone(), Place { extra: *extra, held: *held });
        }
        drop(held);
        for (_, errand) in &mut self.errands {
            let Errand::Settle(settlements) = errand else { continue };
            for settlement in settlements.iter_mut().filter(|it| !is_of_window(it.quantity)) {
                let Settlement { subject, quantity, spot, .. } = *settlement;
                // It is in what is told: also where nothing is held any more.
                let none = || Place { extra: extra(quantity, spot), held: 0 };
                places.entry(shared.key(subject, quantity, spot)).or_insert_with(none);
                (settlement.back, settlement.hold) = (0, 0);
            }
        }
        let seed = |(key, Place { extra, held })| (key, extra, Seed::Held(held));
        self.take_up_seeds(shared, places.into_iter().map(seed).collect());
    }

    /// What was taken while the server was away.
    fn plan_missed(&mut self, shared: &Shared) {
        let now = self.clock.now();
        let mut seeds = Seeds::new(shared, now);
        for Known { subject, quantity, amounts } in shared.unshared.drain(now) {
            let seed = match amounts {
                Amounts::Window(parts) => Seed::Parts(parts),
                Amounts::Money { spent, .. } if spent > 0 => Seed::More(spent),
                Amounts::Money { .. } | Amounts::Places => continue,
            };
            seeds.add(subject, quantity, seed);
        }
        self.take_up_seeds(shared, seeds.seeds);
    }

    /// Takes up what the server is to be told, in pieces that do not keep it long.
    fn take_up_seeds(&mut self, shared: &Shared, seeds: Vec<(String, u64, Seed)>) {
        let (mut piece, mut amounts) = (Vec::new(), 0);
        for seed in seeds {
            amounts += match &seed.2 {
                Seed::Parts(parts) => parts.len(),
                Seed::AtLeast(_) | Seed::More(_) | Seed::Held(_) => 1,
            };
            piece.push(seed);
            if amounts >= TOLD_AT_ONCE {
                self.take_up(shared, Errand::Seed(std::mem::take(&mut piece)));
                amounts = 0;
            }
        }
        if !piece.is_empty() {
            self.take_up(shared, Errand::Seed(piece));
        }
    }
}

/// What the server is to be told now.
struct Seeds<'a> {
    shared: &'a Shared,
    millis: i64,
    seeds: Vec<(String, u64, Seed)>,
}

impl<'a> Seeds<'a> {
    fn new(shared: &'a Shared, now: Moment) -> Self {
        Self { shared, millis: now.millis, seeds: Vec::new() }
    }

    fn add(&mut self, subject: Subject, quantity: Quantity, seed: Seed) {
        let key = self.shared.key(subject, quantity, self.millis);
        self.seeds.push((key, extra(quantity, self.millis), seed));
    }
}
