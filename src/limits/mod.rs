//! How much clients may take: requests and tokens in a window, exchanges at a time, money in a day or month.
//!
//! What an exchange may take is reserved before, and settled after it for what it took: so many exchanges at
//! once do not take more than one after the other. What is not settled is given back.

mod local;
mod reserve;
mod rule;
mod shared;
mod window;
mod words;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rust_decimal::Decimal;
use rust_decimal::prelude::ToPrimitive;
use xxhash_rust::xxh3::xxh3_64;

use crate::config::{Calendar, ClientKeys, LimitSpec, MONEY_UNITS, Per, Quantity, Snapshot};
use crate::expression::Expression;
use local::Counts;
pub use reserve::Reservation;
use rule::{In, Origin, Rule, Tallies};
pub use rule::{Shown, Tally, Tightest};
use shared::Shared;

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
    /// Names by which models were called that have a wildcard for a name, by their hashes.
    called: Mutex<HashSet<u64>>,
}

/// So many names that clients call models by are counted each by itself; then those of a wildcard together: who
/// makes up names fills no memory, and has no limit of its own for each.
const CALLED_MAX: usize = 10_000;

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
    /// The model, by its own name; where that is a wildcard, as it was called.
    pub model: &'a str,
    /// By its own name in any case.
    pub own_model: &'a str,
    /// Tokens of the prompt, about.
    pub input: u64,
    /// Tokens of the answer at most, as far as is known.
    pub output: u64,
    /// What it costs at most, in shares of money.
    pub cost: &'a (dyn Fn() -> u64 + Sync),
    /// Whether a condition holds for it.
    pub holds: &'a (dyn Fn(&Expression) -> bool + Sync),
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
        let names: HashSet<&str> =
            rules.iter().chain(own.values().flatten()).map(|rule| &*rule.spec.name).collect();
        tallies.retain(|name, _| names.contains(&**name));
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
            called: Mutex::default(),
        }
    }

    /// By which name a model is counted.
    fn counted_as<'a>(&self, ask: &Ask<'a>) -> &'a str {
        if ask.model == ask.own_model {
            return ask.model;
        }
        let name = xxh3_64(format!("{} {}", ask.service, ask.model).as_bytes());
        let mut called = self.called.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = called.contains(&name) || called.len() < CALLED_MAX && called.insert(name);
        if is_known { ask.model } else { ask.own_model }
    }

    /// The limits that hold for an exchange.
    fn rules_for<'r>(&'r self, ask: &'r Ask<'_>) -> impl Iterator<Item = &'r Arc<Rule>> {
        let own = if self.own.is_empty() { None } else { self.own.get(ask.limits_of) };
        self.rules.iter().chain(own.into_iter().flatten()).filter(|rule| rule.holds_for(ask))
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
            own_model: model,
            input: 0,
            output: 0,
            cost: &|| 0,
            // What has a condition has no money.
            holds: &|_| false,
        };
        let now = self.clock.now();
        let spent = shares(spent);
        for rule in self.rules_for(ask) {
            if rule.spec.quantity == Quantity::Money(calendar)
                && let Some(In::Count(subject)) = rule.counted_in(ask, || ask.model)
            {
                self.counts.restore(subject, rule.spec.quantity, spent, now);
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

/// How long until the time of the calendar is over that a quantity is counted in.
fn until_end(quantity: Quantity, millis: i64) -> Duration {
    let Quantity::Money(calendar) = quantity else { return Duration::ZERO };
    let left = calendar.end(millis).saturating_sub(millis);
    Duration::from_millis(u64::try_from(left).unwrap_or_default())
}

/// Money in the shares that it is counted in; rounded up.
#[must_use]
pub fn shares(amount: Decimal) -> u64 {
    let shares = amount.checked_mul(Decimal::from(MONEY_UNITS)).map(|shares| shares.ceil());
    shares.and_then(|shares| shares.to_u64()).unwrap_or(u64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Environment, Source, read};

    #[test]
    fn made_up_names_are_counted_together_when_there_are_too_many() {
        let text = b"{services: {s: {models: {\"*\": {backends: [{id: a, url: \"http://h\"}]}}}}}";
        let source = Source::File("test.yaml".into());
        let snapshot = read(text, &source, &Environment::default()).unwrap();
        let limits = Limits::new(&snapshot, None);
        let counted = |model: &str| {
            let ask = Ask {
                key: "",
                limits_of: "",
                name: "",
                is_shared: false,
                address: None,
                service: "s",
                model,
                own_model: "*",
                input: 0,
                output: 0,
                cost: &|| 0,
                holds: &|_| true,
            };
            limits.counted_as(&ask) == model
        };
        let names: Vec<String> = (0..=CALLED_MAX).map(|at| format!("m-{at}")).collect();
        let (last, first) = names.split_last().unwrap();
        assert!(first.iter().all(|name| counted(name)));
        assert!(!counted(last) && counted("m-7") && counted("*"));
    }
}
