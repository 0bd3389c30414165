//! What exchanges reserve of their limits, and how that is settled.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pingora_limits::inflight::Guard;
use smallvec::SmallVec;

use super::local::{Counts, Exceeded, Spot, Standing};
use super::rule::{Asked, In, Rule, Shown, count};
use super::shared::{Away, Claim, Given, Settlement, Shared};
use super::{Ask, Clock, Limits, Moment, words};
use crate::config::{LimitSpec, Quantity, WhenDown};
use crate::refusal::Refusal;

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

impl Limits {
    /// Reserves what an exchange may take; `shown` is how the limits then stand.
    ///
    /// # Errors
    /// A 429 refusal, when one of the limits does not allow it; or 503, when it is not known and may not be guessed.
    pub async fn reserve(&self, ask: &Ask<'_>, shown: &mut Shown) -> Result<Reservation, Refusal> {
        let counted = |rule: &Arc<Rule>| {
            let at = rule.counted_in(ask, || self.counted_as(ask))?;
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
        let gateways = shared.gateways() as u64;
        let spent_before = match (asked.at, quantity) {
            // What others took before does not come on top.
            (In::Count(subject), Quantity::Requests(_) | Quantity::Tokens(..)) => {
                let others = self.counts.of_others(subject, quantity, now);
                return max.div_ceil(gateways).min(max.saturating_sub(others));
            }
            (In::Count(subject), Quantity::Money(_)) => {
                let [_, total, reserved] = self.counts.money(subject, quantity, now);
                let [missed, _, of_missed] = shared.unshared.money(subject, quantity, now);
                // What goes on since then, too.
                total.saturating_sub(missed) + reserved.saturating_sub(of_missed)
            }
            _ => 0,
        };
        max.saturating_sub(spent_before).div_ceil(gateways)
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
                shared.hold_here(&Claim { subject, quantity, amount, max }, now.millis);
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
                let Asked { rule, amount, at } = &asked[at];
                let quantity = rule.spec.quantity;
                // Of money it has in it what is reserved, which may be given back.
                if let In::Count(subject) = at
                    && !matches!(quantity, Quantity::Money(_))
                {
                    self.counts.heard(*subject, quantity, exceeded.standing.used, now);
                }
                let amounts = (*amount, rule.spec.max);
                return Ok(Err(self.exceeded(rule, amounts, exceeded, shown)));
            }
        };
        let mut reservation = self.reservation();
        for (Asked { rule, at, amount }, Given { standing, spot, used }) in asked.iter().zip(taken)
        {
            rule.passes(rule.spec.max, standing, shown);
            let quantity = rule.spec.quantity;
            let here = match at {
                In::Count(subject) => {
                    let taken = self.counts.take(*subject, quantity, (*amount, u64::MAX), now);
                    self.counts.heard(*subject, quantity, used, now);
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
        words::refusal(rule, &self.currency, (amount, max), exceeded)
    }
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
        // Of what the server has missed, what it was told since.
        let mut told = 0;
        match taken.at {
            In::Count(subject) => {
                let now = self.clock.now();
                let missed = self.shared.as_ref().map(|it| (it.unshared.as_ref(), taken.missed));
                for (counts, spot) in
                    std::iter::once((self.counts.as_ref(), taken.spot)).chain(missed)
                {
                    let Some(spot) = spot else { continue };
                    told = counts.give_back(subject, spot, back);
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
        let settle = |spot, back, more| {
            shared.settle(Settlement { subject, quantity, spot, back, more, hold: 0 });
        };
        match (taken.shared, taken.missed) {
            (Some(spot), _) => settle(spot, back, more),
            // The server was away then, and has been told since what is held here.
            (None, Some(Spot::Since(spot))) => settle(spot, back, 0),
            (None, Some(Spot::Place)) => settle(0, back, 0),
            (None, Some(Spot::Part(_))) if told > 0 => {
                let micros = self.clock.now().micros.saturating_sub(taken.since.micros);
                settle(-1 - i64::try_from(micros).unwrap_or(i64::MAX - 1), told, 0);
            }
            (None, _) => {}
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
