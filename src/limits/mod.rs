//! How much clients may take: requests and tokens in a window, exchanges at a time, money in a day or month.
//!
//! What an exchange may take is reserved before, and settled after it for what it took: so many exchanges at
//! once do not take more than one after the other. What is not settled is given back.

mod calendar;
mod local;
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
    Calendar, ClientKeys, LimitSpec, MONEY_UNITS, Per, Quantity, Snapshot, Tokens,
};
use crate::refusal::{LimitKind, Refusal};
use local::{Counts, Estimate, Exceeded, Spot, Standing, Subject};

/// The limits of all clients.
pub struct Limits {
    rules: Vec<Arc<Rule>>,
    /// Of keys that have limits of their own, by their ids.
    own: HashMap<Arc<str>, Vec<Arc<Rule>>>,
    counts: Arc<Counts>,
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

/// What an exchange asks for.
pub struct Ask<'a> {
    /// The key's id; empty: none.
    pub key: &'a str,
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
    pub cost: &'a dyn Fn(u64, u64) -> u64,
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
    fn new(spec: &LimitSpec, before: Option<&Arc<Self>>, tallies: &mut Tallies) -> Arc<Self> {
        let id = Self::id(spec);
        let is_by_address = matches!(spec.per, Per::Address | Per::Client);
        let estimate = match before {
            Some(before) => before.estimate.clone(),
            None => is_by_address.then(|| Estimate::new(spec.quantity).map(Arc::new)).flatten(),
        };
        let tally = Arc::clone(tallies.entry(Arc::clone(&spec.name)).or_default());
        Arc::new(Self { tally, spec: spec.clone(), id, estimate })
    }

    /// The same for limits that count the same.
    fn id(spec: &LimitSpec) -> u64 {
        xxh3_64(format!("{} {:?} {:?}", spec.name, spec.per, spec.quantity).as_bytes())
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

/// What an exchange has reserved. What is not settled is given back when it is dropped.
#[derive(Default)]
pub struct Reservation {
    counts: Option<(Arc<Counts>, Clock)>,
    taken: SmallVec<[Taken; 4]>,
}

struct Taken {
    rule: Arc<Rule>,
    at: In,
    spot: Option<Spot>,
    amount: u64,
    _guard: Option<Arc<Guard>>,
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
    fn note(&mut self, rule: &Rule, standing: Standing) {
        let limit = rule.spec.max;
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
        let mut rules = Vec::new();
        for spec in &snapshot.limits {
            let before = known.get(&Rule::id(spec)).copied();
            rules.push(Rule::new(spec, before, &mut tallies));
        }
        Self {
            rules,
            own: own_rules(&snapshot.clients, &mut tallies),
            tallies,
            counts: previous.map(|it| Arc::clone(&it.counts)).unwrap_or_default(),
            clock: previous.map_or_else(|| Clock { start: Instant::now() }, |it| it.clock),
            currency: Arc::clone(&snapshot.prices.currency),
        }
    }

    /// The limits that hold for an exchange.
    fn rules_for<'r>(&'r self, ask: &'r Ask<'_>) -> impl Iterator<Item = &'r Arc<Rule>> {
        let own = if self.own.is_empty() { None } else { self.own.get(ask.key) };
        self.rules.iter().chain(own.into_iter().flatten()).filter(|rule| rule.holds_for(ask))
    }

    /// Reserves what an exchange may take; `shown` is how the limits then stand.
    ///
    /// # Errors
    /// A 429 refusal, when one of the limits does not allow it.
    pub fn reserve(&self, ask: &Ask<'_>, shown: &mut Shown) -> Result<Reservation, Refusal> {
        let mut reservation = Reservation::default();
        let mut rules = self.rules_for(ask);
        let Some(first) = rules.next() else { return Ok(reservation) };
        let now = self.clock.now();
        reservation.counts = Some((Arc::clone(&self.counts), self.clock));
        for rule in std::iter::once(first).chain(rules) {
            let Some(at) = rule.counted_in(ask) else { continue };
            let amount = rule.amount(ask);
            match self.take(rule, at, amount, now) {
                Ok((spot, guard, standing)) => {
                    if !rule.spec.shadow {
                        shown.note(rule, standing);
                    } else if standing.used > rule.spec.max {
                        rule.tally.shadowed.fetch_add(1, Ordering::Relaxed);
                    }
                    let rule = Arc::clone(rule);
                    reservation.taken.push(Taken { rule, at, spot, amount, _guard: guard });
                }
                Err(exceeded) => {
                    shown.note(rule, exceeded.standing);
                    rule.tally.refused.fetch_add(1, Ordering::Relaxed);
                    return Err(self.refusal(rule, amount, exceeded));
                }
            }
        }
        Ok(reservation)
    }

    #[allow(clippy::type_complexity, reason = "three things that a rule gives")]
    fn take(
        &self,
        rule: &Rule,
        at: In,
        amount: u64,
        now: Moment,
    ) -> Result<(Option<Spot>, Option<Arc<Guard>>, Standing), Exceeded> {
        let LimitSpec { quantity, max, shadow, .. } = rule.spec;
        let max = if shadow { u64::MAX } else { max };
        match (at, &rule.estimate) {
            (In::Count(subject), _) => {
                let taken = self.counts.take(subject, quantity, (amount, max), now);
                taken.map(|(spot, standing)| (Some(spot), None, standing))
            }
            (In::Address(address), Some(estimate)) => {
                let taken = estimate.take(address, amount, max);
                taken.map(|(guard, standing)| (None, guard, standing))
            }
            (In::Address(_), None) => Ok((None, None, Standing::default())),
        }
    }

    fn refusal(&self, rule: &Rule, amount: u64, exceeded: Exceeded) -> Refusal {
        let LimitSpec { name, quantity, max, .. } = &rule.spec;
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
                (LimitKind::Budget, format!("{} {currency} a {time}", money(*max)))
            }
        };
        Refusal::Limited { name: name.to_string(), kind, what, retry_after: exceeded.wait }
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
        let ask = &Ask {
            key,
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
            }
        }
    }
}

fn own_rules(clients: &ClientKeys, tallies: &mut Tallies) -> HashMap<Arc<str>, Vec<Arc<Rule>>> {
    let ClientKeys::Required(specs) = clients else { return HashMap::new() };
    let limited = specs.keys.iter().filter(|key| !key.limits.is_empty());
    let mut rules =
        |limits: &[LimitSpec]| limits.iter().map(|spec| Rule::new(spec, None, tallies)).collect();
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
        let Some((counts, clock)) = &self.counts else { return };
        let now = clock.now();
        for taken in &mut self.taken {
            let quantity = taken.rule.spec.quantity;
            let took = match quantity {
                Quantity::Requests(_) | Quantity::Concurrent => continue,
                Quantity::Tokens(tokens, _) => count(tokens, input, output),
                Quantity::Money(_) => cost,
            };
            match (taken.at, taken.spot, &taken.rule.estimate) {
                (In::Count(subject), Some(spot), _) => {
                    let kept = if matches!(quantity, Quantity::Money(_)) { 0 } else { took };
                    counts.give_back(subject, spot, taken.amount.saturating_sub(kept));
                    let beyond = took - kept + kept.saturating_sub(taken.amount);
                    if beyond > 0 {
                        counts.add(subject, quantity, beyond, now);
                    }
                }
                (In::Address(address), _, Some(estimate)) => {
                    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
                    estimate.correct(address, signed(took) - signed(taken.amount));
                }
                _ => {}
            }
            // There is nothing left to be given back.
            taken.amount = 0;
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some((counts, _)) = &self.counts else { return };
        for taken in &self.taken {
            let is_given_back = !matches!(taken.rule.spec.quantity, Quantity::Requests(_));
            if let (In::Count(subject), Some(spot)) = (taken.at, taken.spot)
                && is_given_back
            {
                counts.give_back(subject, spot, taken.amount);
            }
        }
    }
}
