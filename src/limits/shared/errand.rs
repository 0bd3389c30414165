//! What the server that gateways share is brought, once, whatever becomes of the connection meanwhile.

use std::sync::atomic::Ordering;

use super::super::Moment;
use super::super::local::Subject;
use super::{COMPARED_MAX, NUMBER_MAX, Shared, extra, kind};
use crate::config::Quantity;
use crate::link::Link;

/// What is known of an amount afterwards.
pub(in super::super) struct Settlement {
    pub(in super::super) subject: Subject,
    pub(in super::super) quantity: Quantity,
    /// The part of a window that it was counted in, or as a negative number how many microseconds ago; of money, when its
    /// time began.
    pub(in super::super) spot: i64,
    /// What is held no longer, or was not taken.
    pub(in super::super) back: u64,
    /// What was taken beyond it.
    pub(in super::super) more: u64,
    /// What is held from now on.
    pub(in super::super) hold: u64,
}

/// What the server is brought, once.
pub(super) enum Errand {
    Settle(Vec<Settlement>),
    Seed(Vec<(String, u64, Seed)>),
}

/// What it is told of a count.
pub(super) enum Seed {
    /// Of a window: what was taken, by how many parts ago it was.
    Parts(Vec<(u64, u64)>),
    /// That so much money was spent, or more.
    AtLeast(u64),
    /// That so much more was spent.
    More(u64),
    /// How much exchanges of ours hold: places, or money that they may spend.
    Held(u64),
}

impl Shared {
    /// Runs an errand, if that was not done yet. How much money is spent then of each that is settled, or nothing.
    pub(super) async fn run(
        &self,
        link: &Link,
        number: u64,
        errand: &Errand,
        now: Moment,
    ) -> Result<Vec<i64>, String> {
        let script = match errand {
            Errand::Settle(_) => &self.scripts.settle,
            Errand::Seed(_) => &self.scripts.seed,
        };
        let mut call = script.prepare_invoke();
        call.key(self.own_key("done"));
        call.arg(&self.me).arg(number);
        match errand {
            Errand::Settle(settlements) => {
                for settlement in settlements {
                    let Settlement { subject, quantity, spot, back, more, hold } = settlement;
                    let is_money = matches!(quantity, Quantity::Money(_));
                    let millis = if is_money { *spot } else { now.millis };
                    call.key(self.key(*subject, *quantity, millis));
                    call.arg(kind(*quantity))
                        .arg((*back).min(NUMBER_MAX))
                        .arg((*more).min(NUMBER_MAX))
                        .arg(if is_money { 0 } else { *spot })
                        .arg(extra(*quantity, millis))
                        .arg((*hold).min(NUMBER_MAX));
                }
            }
            Errand::Seed(seeds) => {
                call.key(self.own_key("epoch"));
                call.arg(self.epoch.load(Ordering::SeqCst));
                for (key, extra, seed) in seeds {
                    call.key(key);
                    let (how, amounts) = match seed {
                        Seed::Parts(parts) => ("parts", &parts[..]),
                        Seed::AtLeast(spent) => ("at least", &[(0, *spent)][..]),
                        Seed::More(spent) => ("more", &[(0, *spent)][..]),
                        Seed::Held(held) => ("held", &[(0, *held)][..]),
                    };
                    call.arg(how).arg(*extra).arg(amounts.len());
                    for (ago, amount) in amounts {
                        call.arg(*ago).arg((*amount).min(COMPARED_MAX));
                    }
                }
            }
        }
        link.call(&call, self.spec.timeout).await
    }
}
