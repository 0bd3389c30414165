//! How much clients may take: requests and tokens in a window, exchanges at a time, money in a day or month.
//!
//! What an exchange may take is reserved before, and settled after it for what it took: so many exchanges at
//! once do not take more than one after the other. What is not settled is given back.

mod local;
mod shared;
mod window;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pingora_limits::inflight::Guard;
use rust_decimal::Decimal;
use rust_decimal::prelude::ToPrimitive;
use smallvec::SmallVec;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::config::{
    Calendar, ClientKeys, LimitSpec, MONEY_UNITS, Per, Quantity, Snapshot, Tokens, WhenDown,
};
use crate::refusal::{LimitKind, Refusal};
use local::{Counts, Estimate, Exceeded, Spot, Standing, Subject};
use shared::{Away, Claim, Given, Settlement, Shared};

/// The limits of all clients.
pub struct Limits {
    rules: Vec<Arc<Rule>>,
    /// Of keys that have limits of their own, by their ids.
    own: HashMap<Arc<str>, Vec<Arc<Rule>>>,
    counts: Arc<Counts>,
    /// Where gateways share what they have taken.
    shared: Option<Arc<Shared>>,
    /// What limits have done since the start, by their names.
    tallies: Tallies,
    clock: Clock,
    /// What money is counted in.
    currency: Arc<str>,
}

type Tallies = BTreeMap<Arc<str>, Arc<Tally>>;

/// What the limits of one name have done.
#[derive(Debug, Default)]
pub struct Tally {
    refused: AtomicU64,
    shadowed: AtomicU64,
}

impl Tally {
    /// Exchanges that were refused.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Exchanges that would have been, by limits that only count.
    #[must_use]
    pub fn shadowed(&self) -> u64 {
        self.shadowed.load(Ordering::Relaxed)
    }
}

/// A limit at work.
struct Rule {
    tally: Arc<Tally>,
    spec: LimitSpec,
    id: u64,
    /// For addresses.
    estimate: Option<Arc<Estimate>>,
}

/// Where a limit comes from: what differs in it is counted apart.
#[derive(Clone, Copy, Debug)]
struct Origin<'a> {
    /// Whether it is a key's own: one of everybody's may have the same name.
    is_own: bool,
    /// What money is counted in.
    currency: &'a str,
}

/// What an exchange asks for.
pub struct Ask<'a> {
    /// The key's id; empty: none.
    pub key: &'a str,
    /// Under which id it has limits of its own.
    pub limits_of: &'a str,
    /// Who has it.
    pub name: &'a str,
    /// Whether it is one that many may share.
    pub is_shared: bool,
    /// Where the client is.
    pub address: Option<IpAddr>,
    /// The service.
    pub service: &'a str,
    /// The model.
    pub model: &'a str,
    /// Tokens of the prompt, about.
    pub input: u64,
    /// Tokens of the answer at most, as far as is known.
    pub output: u64,
    /// What so many tokens of both cost, in shares of money.
    pub cost: &'a (dyn Fn(u64, u64) -> u64 + Sync),
}

/// A moment, by both clocks.
#[derive(Clone, Copy, Debug)]
struct Moment {
    /// Microseconds since the start, which never go back.
    micros: u64,
    /// Milliseconds since 1970.
    millis: i64,
}

#[derive(Clone, Copy, Debug)]
struct Clock {
    start: Instant,
}

impl Clock {
    fn now(self) -> Moment {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Moment {
            micros: u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX),
            millis: i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX),
        }
    }
}

impl Rule {
    /// One that goes on counting where `before` did.
    fn new(
        spec: &LimitSpec,
        origin: Origin<'_>,
        before: Option<&Arc<Self>>,
        tallies: &mut Tallies,
    ) -> Arc<Self> {
        let id = Self::id(spec, origin);
        let is_by_address = matches!(spec.per, Per::Address | Per::Client);
        let estimate = match before {
            Some(before) => before.estimate.clone(),
            None => is_by_address.then(|| Estimate::new(spec.quantity).map(Arc::new)).flatten(),
        };
        let tally = Arc::clone(tallies.entry(Arc::clone(&spec.name)).or_default());
        Arc::new(Self { tally, spec: spec.clone(), id, estimate })
    }

    /// The same for limits that count the same.
    fn id(spec: &LimitSpec, origin: Origin<'_>) -> u64 {
        let LimitSpec { name, per, quantity, .. } = spec;
        let Origin { is_own, currency } = origin;
        let currency = if matches!(quantity, Quantity::Money(_)) { currency } else { "" };
        xxh3_64(format!("{is_own} {currency:?} {name} {per:?} {quantity:?}").as_bytes())
    }

    fn holds_for(&self, ask: &Ask<'_>) -> bool {
        let LimitSpec { keys, models, services, .. } = &self.spec;
        keys.as_ref().is_none_or(|keys| keys.holds(ask.key) || keys.holds(ask.name))
            && services.as_ref().is_none_or(|services| services.holds(ask.service))
            && models.as_ref().is_none_or(|models| {
                models.holds(ask.model) || models.holds(&format!("{}/{}", ask.service, ask.model))
            })
    }

    /// Which of its counts an exchange is counted in; none: it is not counted.
    fn counted_in(&self, ask: &Ask<'_>) -> Option<In> {
        let exact = |parts: &[&str]| {
            let mut bytes: SmallVec<[u8; 128]> = SmallVec::new();
            bytes.extend_from_slice(&self.id.to_le_bytes());
            for part in parts {
                bytes.extend_from_slice(part.as_bytes());
                bytes.push(0);
            }
            Some(In::Count(xxh3_128(&bytes)))
        };
        let by_address = || ask.address.map(In::Address);
        match self.spec.per {
            Per::Key if ask.key.is_empty() => None,
            Per::Key => exact(&[ask.key]),
            Per::Client if ask.is_shared => by_address(),
            Per::Client => exact(&[ask.key]),
            Per::Address => by_address(),
            Per::Model => exact(&[ask.service, ask.model]),
            Per::Service => exact(&[ask.service]),
            Per::KeyAndModel if ask.key.is_empty() => None,
            Per::KeyAndModel => exact(&[ask.key, ask.service, ask.model]),
            Per::All => exact(&[]),
        }
    }

    /// It allows an exchange.
    fn passes(&self, max: u64, standing: Standing, shown: &mut Shown) {
        if !self.spec.shadow {
            shown.note(self, max, standing);
        } else if standing.used > self.spec.max {
            self.tally.shadowed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How much of its quantity an exchange takes, as far as is known before.
    fn amount(&self, ask: &Ask<'_>) -> u64 {
        match self.spec.quantity {
            Quantity::Requests(_) | Quantity::Concurrent => 1,
            Quantity::Tokens(tokens, _) => {
                // One that may take more than all of it passes when nothing else is there.
                self.spec.max.min(count(tokens, ask.input, ask.output))
            }
            Quantity::Money(_) => (ask.cost)(ask.input, ask.output),
        }
    }
}

/// How long until the time of the calendar is over that a quantity is counted in.
fn until_end(quantity: Quantity, millis: i64) -> Duration {
    let Quantity::Money(calendar) = quantity else { return Duration::ZERO };
    let left = calendar.end(millis).saturating_sub(millis);
    Duration::from_millis(u64::try_from(left).unwrap_or_default())
}

fn count(tokens: Tokens, input: u64, output: u64) -> u64 {
    match tokens {
        Tokens::Input => input,
        Tokens::Output => output,
        Tokens::Total => input.saturating_add(output),
    }
}

#[derive(Clone, Copy, Debug)]
enum In {
    Count(Subject),
    Address(IpAddr),
}

/// What is asked of a limit.
struct Asked {
    rule: Arc<Rule>,
    at: In,
    amount: u64,
}

impl Asked {
    /// Which count it is among gateways: there, addresses have exact ones too.
    fn subject(&self) -> Subject {
        match self.at {
            In::Count(subject) => subject,
            In::Address(address) => xxh3_128(format!("{:x} {address}", self.rule.id).as_bytes()),
        }
    }
}

/// What an exchange has reserved. What is not settled is given back when it is dropped.
#[derive(Default)]
pub struct Reservation {
    books: Option<Books>,
    taken: SmallVec<[Taken; 4]>,
}

/// Where it is written down.
struct Books {
    counts: Arc<Counts>,
    shared: Option<Arc<Shared>>,
    clock: Clock,
}

struct Taken {
    rule: Arc<Rule>,
    since: Moment,
    at: In,
    amount: u64,
    /// Where it is counted here.
    spot: Option<Spot>,
    /// Where it is counted as what the server has missed.
    missed: Option<Spot>,
    /// Where it is counted in the server.
    shared: Option<i64>,
    guard: Option<Arc<Guard>>,
}

/// How the tightest limits of requests and of tokens stand: what clients are told with each answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// Of requests.
    pub requests: Option<Tightest>,
    /// Of tokens.
    pub tokens: Option<Tightest>,
}

/// How a limit stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tightest {
    /// How much there may be.
    pub limit: u64,
    /// How much more there may be now.
    pub remaining: u64,
    /// Until all of it may be again.
    pub reset: Duration,
}

impl Shown {
    fn note(&mut self, rule: &Rule, limit: u64, standing: Standing) {
        let remaining = limit.saturating_sub(standing.used);
        let new = Tightest { limit, remaining, reset: standing.reset };
        let known = match rule.spec.quantity {
            Quantity::Requests(_) => &mut self.requests,
            Quantity::Tokens(..) => &mut self.tokens,
            Quantity::Concurrent | Quantity::Money(_) => return,
        };
        // By the share that is left.
        let is_tighter = known.is_none_or(|known| {
            u128::from(remaining) * u128::from(known.limit)
                < u128::from(known.remaining) * u128::from(limit)
        });
        if is_tighter {
            *known = Some(new);
        }
    }
}

impl Limits {
    /// Those that are configured. Counts go on from `previous`.
    #[must_use]
    pub fn new(snapshot: &Snapshot, previous: Option<&Self>) -> Self {
        let known: HashMap<u64, &Arc<Rule>> =
            previous.iter().flat_map(|it| &it.rules).map(|rule| (rule.id, rule)).collect();
        let mut tallies = previous.map(|it| it.tallies.clone()).unwrap_or_default();
        let currency = &snapshot.prices.currency;
        let origin = Origin { is_own: false, currency };
        let mut rules = Vec::new();
        for spec in &snapshot.limits {
            let before = known.get(&Rule::id(spec, origin)).copied();
            rules.push(Rule::new(spec, origin, before, &mut tallies));
        }
        let own = own_rules(&snapshot.clients, currency, &mut tallies);
        let counts = previous.map(|it| Arc::clone(&it.counts)).unwrap_or_default();
        let clock = previous.map_or_else(|| Clock { start: Instant::now() }, |it| it.clock);
        let known = previous.and_then(|it| it.shared.as_ref());
        // Without limits nobody is asked.
        let redis = snapshot.redis.as_ref().filter(|_| !rules.is_empty() || !own.is_empty());
        let shared = redis.map(|spec| match known {
            Some(known) if known.spec == *spec => Arc::clone(known),
            known => Shared::start(spec, &counts, clock, known),
        });
        Self {
            rules,
            own,
            tallies,
            counts,
            shared,
            clock,
            currency: Arc::clone(&snapshot.prices.currency),
        }
    }

    /// The limits that hold for an exchange.
    fn rules_for<'r>(&'r self, ask: &'r Ask<'_>) -> impl Iterator<Item = &'r Arc<Rule>> {
        let own = if self.own.is_empty() { None } else { self.own.get(ask.limits_of) };
        self.rules.iter().chain(own.into_iter().flatten()).filter(|rule| rule.holds_for(ask))
    }

    /// Reserves what an exchange may take; `shown` is how the limits then stand.
    ///
    /// # Errors
    /// A 429 refusal, when one of the limits does not allow it; or 503, when it is not known and may not be guessed.
    pub async fn reserve(&self, ask: &Ask<'_>, shown: &mut Shown) -> Result<Reservation, Refusal> {
        let counted = |rule: &Arc<Rule>| {
            let at = rule.counted_in(ask)?;
            Some(Asked { rule: Arc::clone(rule), at, amount: rule.amount(ask) })
        };
        let asked: SmallVec<[Asked; 4]> = self.rules_for(ask).filter_map(counted).collect();
        if asked.is_empty() {
            return Ok(Reservation::default());
        }
        let now = self.clock.now();
        if let Some(shared) = &self.shared {
            match self.reserve_shared(shared, &asked, now, shown).await {
                Ok(reserved) => return reserved,
                Err(Away) if shared.spec.when_down == WhenDown::Refuse => {
                    return Err(Refusal::LimitsUnknown);
                }
                Err(Away) => {}
            }
        }
        self.reserve_here(asked, now, shown)
    }

    /// In this process; where others share the limits, its share of them.
    fn reserve_here(
        &self,
        asked: SmallVec<[Asked; 4]>,
        now: Moment,
        shown: &mut Shown,
    ) -> Result<Reservation, Refusal> {
        let mut reservation = self.reservation();
        for asked in asked {
            let max = self.max_here(&asked, now);
            // One that may take more than all of it passes when nothing else is there.
            let is_of_tokens = matches!(asked.rule.spec.quantity, Quantity::Tokens(..));
            let amount = if is_of_tokens { asked.amount.min(max) } else { asked.amount };
            let rule = Arc::clone(&asked.rule);
            match self.take_here(asked, (amount, max), now) {
                Ok((taken, standing)) => {
                    rule.passes(max, standing, shown);
                    reservation.taken.push(taken);
                }
                Err(exceeded) => {
                    reservation.cancel();
                    return Err(self.exceeded(&rule, (amount, max), exceeded, shown));
                }
            }
        }
        Ok(reservation)
    }

    /// How much a rule allows here.
    fn max_here(&self, asked: &Asked, now: Moment) -> u64 {
        let LimitSpec { quantity, max, shadow, .. } = asked.rule.spec;
        if shadow {
            return u64::MAX;
        }
        let Some(shared) = &self.shared else { return max };
        let spent_before = match (asked.at, quantity) {
            (In::Count(subject), Quantity::Money(_)) => {
                let (_, total) = self.counts.money(subject, quantity, now);
                total.saturating_sub(shared.unshared.money(subject, quantity, now).0)
            }
            _ => 0,
        };
        max.saturating_sub(spent_before).div_ceil(shared.gateways() as u64)
    }

    fn take_here(
        &self,
        Asked { rule, at, .. }: Asked,
        (amount, max): (u64, u64),
        now: Moment,
    ) -> Result<(Taken, Standing), Exceeded> {
        let quantity = rule.spec.quantity;
        let mut taken = Taken {
            rule,
            since: now,
            at,
            amount,
            spot: None,
            missed: None,
            shared: None,
            guard: None,
        };
        let standing = match (at, &taken.rule.estimate, &self.shared) {
            (In::Count(subject), _, None) => {
                let (spot, standing) = self.counts.take(subject, quantity, (amount, max), now)?;
                taken.spot = Some(spot);
                standing
            }
            (In::Count(subject), _, Some(shared)) => {
                // Of money, all that others have spent is taken off before; of the rest, what was taken here before counts.
                let is_money = matches!(quantity, Quantity::Money(_));
                let (max_missed, max) = if is_money { (max, u64::MAX) } else { (u64::MAX, max) };
                let missed = shared.unshared.take(subject, quantity, (amount, max_missed), now)?;
                let known = self.counts.take(subject, quantity, (amount, max), now);
                let known = known.inspect_err(|_| {
                    shared.unshared.give_back(subject, missed.0, amount);
                })?;
                (taken.spot, taken.missed) = (Some(known.0), Some(missed.0));
                shared.hold(&Claim { subject, quantity, amount, max }, now.millis, true);
                if is_money { missed.1 } else { known.1 }
            }
            (In::Address(address), Some(estimate), _) => {
                let (guard, standing) = estimate.take(address, amount, max)?;
                taken.guard = guard;
                standing
            }
            (In::Address(_), None, _) => Standing::default(),
        };
        Ok((taken, standing))
    }

    /// In the server that gateways share. What is taken is noted here, too, for when it is away.
    async fn reserve_shared(
        &self,
        shared: &Arc<Shared>,
        asked: &[Asked],
        now: Moment,
        shown: &mut Shown,
    ) -> Result<Result<Reservation, Refusal>, Away> {
        let claim = |asked: &Asked| Claim {
            subject: asked.subject(),
            quantity: asked.rule.spec.quantity,
            amount: asked.amount,
            max: if asked.rule.spec.shadow { u64::MAX } else { asked.rule.spec.max },
        };
        let claims: SmallVec<[Claim; 4]> = asked.iter().map(claim).collect();
        let taken = match shared.take(&claims, now.millis).await? {
            Ok(taken) => taken,
            Err((at, exceeded)) => {
                let Asked { rule, amount, .. } = &asked[at];
                let amounts = (*amount, rule.spec.max);
                return Ok(Err(self.exceeded(rule, amounts, exceeded, shown)));
            }
        };
        let mut reservation = self.reservation();
        for (Asked { rule, at, amount }, Given { standing, spot, spent }) in asked.iter().zip(taken)
        {
            rule.passes(rule.spec.max, standing, shown);
            let quantity = rule.spec.quantity;
            let here = match at {
                In::Count(subject) => {
                    self.counts.heard(*subject, quantity, spent, now);
                    let taken = self.counts.take(*subject, quantity, (*amount, u64::MAX), now);
                    taken.ok().map(|(spot, _)| spot)
                }
                In::Address(_) => None,
            };
            reservation.taken.push(Taken {
                rule: Arc::clone(rule),
                since: now,
                at: *at,
                amount: *amount,
                spot: here,
                missed: None,
                shared: Some(spot),
                guard: None,
            });
        }
        Ok(Ok(reservation))
    }

    fn reservation(&self) -> Reservation {
        let (counts, shared, clock) = (Arc::clone(&self.counts), self.shared.clone(), self.clock);
        Reservation { books: Some(Books { counts, shared, clock }), taken: SmallVec::new() }
    }

    fn exceeded(
        &self,
        rule: &Rule,
        (amount, max): (u64, u64),
        exceeded: Exceeded,
        shown: &mut Shown,
    ) -> Refusal {
        shown.note(rule, max, exceeded.standing);
        rule.tally.refused.fetch_add(1, Ordering::Relaxed);
        self.refusal(rule, (amount, max), exceeded)
    }

    fn refusal(&self, rule: &Rule, (amount, max): (u64, u64), exceeded: Exceeded) -> Refusal {
        let LimitSpec { name, quantity, .. } = &rule.spec;
        let used = exceeded.standing.used;
        let (kind, what) = match quantity {
            Quantity::Requests(window) => {
                (LimitKind::Requests, format!("{max} requests in {}", seconds(*window)))
            }
            Quantity::Tokens(tokens, window) => {
                let which = match tokens {
                    Tokens::Input => "input tokens",
                    Tokens::Output => "output tokens",
                    Tokens::Total => "tokens",
                };
                let text = format!(
                    "{max} {which} in {}, {used} used, {amount} asked for",
                    seconds(*window)
                );
                (LimitKind::Tokens, text)
            }
            Quantity::Concurrent => (LimitKind::Concurrent, format!("{max} requests at a time")),
            Quantity::Money(calendar) => {
                let time = match calendar {
                    Calendar::Day => "day",
                    Calendar::Month => "month",
                };
                let currency = &self.currency;
                let left = max.saturating_sub(used);
                let rest = if left == 0 {
                    "is used up".to_owned()
                } else {
                    let (left, asked) = (money(left), money(amount));
                    format!(
                        "has {left} left, and this may cost {asked}: a lower max_tokens may fit"
                    )
                };
                (LimitKind::Budget, format!("{} {currency} a {time} {rest}", money(max)))
            }
        };
        Refusal::Limited { name: name.to_string(), kind, what, retry_after: exceeded.wait }
    }

    /// The budgets that a key has for all that it does: their names, of which time they are, and how much, in shares of
    /// money.
    #[must_use]
    pub fn budgets(&self, limits_of: &str, key: &str, name: &str) -> Vec<(String, Calendar, u64)> {
        let own = self.own.get(limits_of).into_iter().flatten();
        let budget = |rule: &Arc<Rule>| {
            let LimitSpec { name: limit, per, keys, models, services, quantity, max, .. } =
                &rule.spec;
            let is_its = *per == Per::Key && models.is_none() && services.is_none();
            let holds = keys.as_ref().is_none_or(|keys| keys.holds(key) || keys.holds(name));
            match quantity {
                Quantity::Money(calendar) if is_its && holds => {
                    Some((limit.to_string(), *calendar, *max))
                }
                _ => None,
            }
        };
        self.rules.iter().chain(own).filter_map(budget).collect()
    }

    /// How it is with the server that gateways share: none where there is none; how many gateways there are, how
    /// many round trips failed, and why there is no answer now.
    #[must_use]
    pub fn shared(&self) -> Option<(usize, u64, Option<String>)> {
        let shared = self.shared.as_ref()?;
        Some((shared.gateways(), shared.failures(), shared.why_away()))
    }

    /// What limits have done since the start, by their names.
    pub fn tallies(&self) -> impl Iterator<Item = (&str, &Tally)> {
        self.tallies.iter().map(|(name, tally)| (name.as_ref(), tally.as_ref()))
    }

    /// Adds what was spent before the start.
    pub fn restore(
        &self,
        calendar: Calendar,
        [key, name, service, model]: [&str; 4],
        spent: Decimal,
    ) {
        // Of a token, its issuer has them.
        let issuer = key.split(':').next().unwrap_or(key);
        let limits_of = if self.own.contains_key(key) { key } else { issuer };
        let ask = &Ask {
            key,
            limits_of,
            name,
            is_shared: true,
            address: None,
            service,
            model,
            input: 0,
            output: 0,
            cost: &|_, _| 0,
        };
        let now = self.clock.now();
        let spent = shares(spent);
        for rule in self.rules_for(ask) {
            if rule.spec.quantity == Quantity::Money(calendar)
                && let Some(In::Count(subject)) = rule.counted_in(ask)
            {
                self.counts.add(subject, rule.spec.quantity, spent, now);
                if let Some(shared) = &self.shared {
                    shared.wants_totals.store(true, Ordering::SeqCst);
                }
            }
        }
    }
}

fn own_rules(
    clients: &ClientKeys,
    currency: &str,
    tallies: &mut Tallies,
) -> HashMap<Arc<str>, Vec<Arc<Rule>>> {
    let origin = Origin { is_own: true, currency };
    let ClientKeys::Required(specs) = clients else { return HashMap::new() };
    let issuers = specs.issuers.iter().map(|issuer| issuer.grant.as_ref());
    let limited = specs.keys.iter().chain(issuers).filter(|key| !key.limits.is_empty());
    let mut rules = |limits: &[LimitSpec]| {
        limits.iter().map(|spec| Rule::new(spec, origin, None, tallies)).collect()
    };
    limited.map(|key| (Arc::clone(&key.id), rules(&key.limits))).collect()
}

fn seconds(window: Duration) -> String {
    format!("{} s", window.as_secs_f64())
}

/// Money in the shares that it is counted in; rounded up.
#[must_use]
pub fn shares(amount: Decimal) -> u64 {
    let shares = amount.checked_mul(Decimal::from(MONEY_UNITS)).map(|shares| shares.ceil());
    shares.and_then(|shares| shares.to_u64()).unwrap_or(u64::MAX / 4)
}

/// An amount in shares as one of money.
fn money(shares: u64) -> String {
    let (whole, part) = (shares / MONEY_UNITS, shares % MONEY_UNITS);
    let part = format!("{part:09}");
    let part = part.trim_end_matches('0');
    if part.is_empty() { whole.to_string() } else { format!("{whole}.{part}") }
}

impl Reservation {
    /// The exchange took so many tokens, which cost so much: the rest is given back, and what it took beyond what
    /// was reserved counts, too.
    pub fn settle(&mut self, input: u64, output: u64, cost: u64) {
        let Some(books) = &self.books else { return };
        for taken in &mut self.taken {
            match taken.rule.spec.quantity {
                Quantity::Requests(_) | Quantity::Concurrent => {}
                Quantity::Tokens(tokens, _) => {
                    let took = count(tokens, input, output);
                    let back = taken.amount.saturating_sub(took);
                    books.correct(taken, back, took.saturating_sub(taken.amount));
                    taken.amount = 0;
                }
                // What was reserved and what is spent are counted apart.
                Quantity::Money(_) => {
                    books.correct(taken, taken.amount, cost);
                    taken.amount = 0;
                }
            }
        }
    }

    /// Nothing of it was taken.
    fn cancel(&mut self) {
        let Some(books) = &self.books else { return };
        for taken in &mut self.taken {
            books.correct(taken, taken.amount, 0);
            taken.amount = 0;
        }
    }
}

impl Books {
    /// Gives back some of what was taken, and counts what was taken beyond it.
    fn correct(&self, taken: &Taken, back: u64, more: u64) {
        let quantity = taken.rule.spec.quantity;
        if back == 0 && more == 0 {
            return;
        }
        match taken.at {
            In::Count(subject) => {
                let now = self.clock.now();
                let missed = self.shared.as_ref().map(|it| (it.unshared.as_ref(), taken.missed));
                for (counts, spot) in
                    std::iter::once((self.counts.as_ref(), taken.spot)).chain(missed)
                {
                    let Some(spot) = spot else { continue };
                    counts.give_back(subject, spot, back);
                    if more > 0 {
                        counts.add(subject, quantity, more, now);
                    }
                }
            }
            In::Address(address) => {
                let estimate = taken.rule.estimate.as_ref().filter(|_| taken.shared.is_none());
                if let Some(estimate) = estimate {
                    let micros = self.clock.now().micros.saturating_sub(taken.since.micros);
                    estimate.give_back(address, back, Duration::from_micros(micros));
                    estimate.add(address, more);
                }
            }
        }
        let Some(shared) = &self.shared else { return };
        let asked = Asked { rule: Arc::clone(&taken.rule), at: taken.at, amount: 0 };
        let subject = asked.subject();
        match (taken.shared, taken.spot, quantity) {
            (Some(spot), ..) => shared.settle(Settlement { subject, quantity, spot, back, more }),
            // The server was away then, and has been told since what is held here.
            (None, Some(Spot::Since(spot)), Quantity::Money(_)) => {
                shared.settle(Settlement { subject, quantity, spot, back, more: 0 });
            }
            (None, Some(_), Quantity::Concurrent) => {
                shared.settle(Settlement { subject, quantity, spot: 0, back, more: 0 });
            }
            _ => {}
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some(books) = &self.books else { return };
        for taken in &self.taken {
            // A request that was made stays one.
            if !matches!(taken.rule.spec.quantity, Quantity::Requests(_)) {
                books.correct(taken, taken.amount, 0);
            }
        }
    }
}
