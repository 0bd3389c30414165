//! A limit at work: for which exchanges it holds, what it counts them by, and how it stands.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use smallvec::SmallVec;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::Ask;
use super::local::{Estimate, Standing, Subject};
use crate::config::{LimitSpec, Per, Quantity, Tokens};

pub(super) type Tallies = BTreeMap<Arc<str>, Arc<Tally>>;

/// What the limits of one name have done.
#[derive(Debug, Default)]
pub struct Tally {
    pub(super) refused: AtomicU64,
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
pub(super) struct Rule {
    pub(super) tally: Arc<Tally>,
    pub(super) spec: LimitSpec,
    pub(super) id: u64,
    /// For addresses.
    pub(super) estimate: Option<Arc<Estimate>>,
}

/// Where a limit comes from: what differs in it is counted apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin<'a> {
    /// Whether it is a key's own: one of everybody's may have the same name.
    pub(super) is_own: bool,
    /// What money is counted in.
    pub(super) currency: &'a str,
}

impl Rule {
    /// One that goes on counting where `before` did.
    pub(super) fn new(
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
    pub(super) fn id(spec: &LimitSpec, origin: Origin<'_>) -> u64 {
        let LimitSpec { name, per, quantity, .. } = spec;
        let Origin { is_own, currency } = origin;
        let currency = if matches!(quantity, Quantity::Money(_)) { currency } else { "" };
        xxh3_64(format!("{is_own} {currency:?} {name} {per:?} {quantity:?}").as_bytes())
    }

    pub(super) fn holds_for(&self, ask: &Ask<'_>) -> bool {
        let LimitSpec { keys, models, services, when, .. } = &self.spec;
        keys.as_ref().is_none_or(|keys| keys.holds(ask.key) || keys.holds(ask.name))
            && services.as_ref().is_none_or(|services| services.holds(ask.service))
            && models.as_ref().is_none_or(|models| {
                models.holds(ask.model) || models.holds(&format!("{}/{}", ask.service, ask.model))
            })
            && when.as_ref().is_none_or(|when| (ask.holds)(when))
    }

    /// Which of its counts an exchange is counted in; none: it is not counted.
    pub(super) fn counted_in<'a>(
        &self,
        ask: &Ask<'a>,
        model: impl FnOnce() -> &'a str,
    ) -> Option<In> {
        let exact = |parts: &[&str]| {
            let mut bytes: SmallVec<[u8; 128]> = SmallVec::new();
            bytes.extend_from_slice(&self.id.to_le_bytes());
            for part in parts {
                bytes.extend_from_slice(part.as_bytes());
                bytes.push(0);
            }
            Some(In::Count(xxh3_128(&bytes)))
        };
        let by_address = || ask.address.map(|address| In::Address(network(address)));
        match self.spec.per {
            Per::Key if ask.key.is_empty() => None,
            Per::Key => exact(&[ask.key]),
            Per::Client if ask.is_shared => by_address(),
            Per::Client => exact(&[ask.key]),
            Per::Address => by_address(),
            Per::Model => exact(&[ask.service, model()]),
            Per::Service => exact(&[ask.service]),
            Per::KeyAndModel if ask.key.is_empty() => None,
            Per::KeyAndModel => exact(&[ask.key, ask.service, model()]),
            Per::All => exact(&[]),
        }
    }

    /// It allows an exchange.
    pub(super) fn passes(&self, max: u64, standing: Standing, shown: &mut Shown) {
        if !self.spec.shadow {
            shown.note(self, max, standing);
        } else if standing.used > self.spec.max {
            self.tally.shadowed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How much of its quantity an exchange takes, as far as is known before.
    pub(super) fn amount(&self, ask: &Ask<'_>) -> u64 {
        match self.spec.quantity {
            Quantity::Requests(_) | Quantity::Concurrent => 1,
            Quantity::Tokens(tokens, _) => {
                // One that may take more than all of it passes when nothing else is there.
                self.spec.max.min(count(tokens, ask.input, ask.output))
            }
            Quantity::Money(_) => (ask.cost)(),
        }
    }
}

/// Who an address stands for: of IPv6, whoever has one has all that begin with the same 64 bits (RFC 6177).
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

pub(super) fn count(tokens: Tokens, input: u64, output: u64) -> u64 {
    match tokens {
        Tokens::Input => input,
        Tokens::Output => output,
        Tokens::Total => input.saturating_add(output),
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum In {
    Count(Subject),
    Address(IpAddr),
}

/// What is asked of a limit.
pub(super) struct Asked {
    pub(super) rule: Arc<Rule>,
    pub(super) at: In,
    pub(super) amount: u64,
}

impl Asked {
    /// Which count it is among gateways: there, addresses have exact ones too.
    pub(super) fn subject(&self) -> Subject {
        match self.at {
            In::Count(subject) => subject,
            In::Address(address) => xxh3_128(format!("{:x} {address}", self.rule.id).as_bytes()),
        }
    }
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
    pub(super) fn note(&mut self, rule: &Rule, limit: u64, standing: Standing) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_one_client_has_are_one() {
        let one = |text: &str| network(text.parse().unwrap()).to_string();
        assert_eq!(one("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(one("192.0.2.7"), "192.0.2.7");
        assert_eq!(one("::ffff:192.0.2.7"), "192.0.2.7");
    }
}
