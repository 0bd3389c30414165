//! Which backend is asked first, second, ...: the selection behind Pingora's `LoadBalancer`.
//!
//! Every policy gives each usable backend a cost; candidates come in the order of their costs,
//! backups after all others, each exactly once. Drained backends (weight 0) never come.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use pingora_load_balancing::Backend as LbBackend;
use pingora_load_balancing::selection::{BackendIter, BackendSelection};
use smallvec::SmallVec;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::backend::Backend;
use crate::config::Balance;

/// What a selection is built from.
pub(super) struct BalanceConfig {
    pub(super) balance: Balance,
    pub(super) backends: Vec<Arc<Backend>>,
}

/// The selection of one pool.
pub(super) struct Balancer {
    balance: Balance,
    members: Vec<Member>,
    /// Smooth round robin's credit of each member; unused by the other policies.
    credits: Mutex<Vec<f64>>,
}

struct Member {
    /// As Pingora knows it.
    entry: LbBackend,
    backend: Arc<Backend>,
}

/// Backups cost more than any other candidate.
const BACKUP: f64 = 1e12;

impl BackendSelection for Balancer {
    type Iter = Candidates;
    type Config = Arc<BalanceConfig>;

    fn build_with_config(entries: &BTreeSet<LbBackend>, config: &Self::Config) -> Self {
        let members: Vec<Member> = config
            .backends
            .iter()
            .filter(|backend| backend.spec.weight > 0.0)
            .filter_map(|backend| {
                let entry = entries
                    .iter()
                    .find(|entry| super::identity_of(entry) == Some(backend.identity));
                Some(Member { entry: entry?.clone(), backend: Arc::clone(backend) })
            })
            .collect();
        let credits = Mutex::new(vec![0.0; members.len()]);
        Self { balance: config.balance, members, credits }
    }

    fn build(_: &BTreeSet<LbBackend>) -> Self {
        Self { balance: Balance::Sticky, members: Vec::new(), credits: Mutex::default() }
    }

    fn iter(self: &Arc<Self>, key: &[u8]) -> Candidates {
        let usable: SmallVec<[usize; 16]> =
            (0..self.members.len()).filter(|at| self.members[*at].backend.is_usable()).collect();
        let costs = if usable.len() < 2 {
            usable.iter().map(|at| (*at, 0.0)).collect()
        } else {
            match self.balance {
                Balance::Sticky => self.sticky(&usable, key),
                Balance::RoundRobin => self.round_robin(&usable),
                Balance::LeastInflight => self.least_inflight(&usable),
            }
        };
        Candidates { balancer: Arc::clone(self), costs }
    }
}

/// Members with their costs.
type Costs = SmallVec<[(usize, f64); 16]>;

impl Balancer {
    fn spec(&self, at: usize) -> &crate::config::BackendSpec {
        &self.members[at].backend.spec
    }

    fn tier(&self, at: usize) -> f64 {
        if self.spec(at).backup { BACKUP } else { 0.0 }
    }

    /// Weighted rendezvous hashing (Thaler and Ravishankar 1998; the logarithm makes shares exactly
    /// proportional to weights): a client's backend changes only if that backend goes or a better
    /// one comes, so a change moves no client that it need not move.
    fn sticky(&self, usable: &[usize], key: &[u8]) -> Costs {
        usable
            .iter()
            .map(|at| {
                let hash = xxh3_64_with_seed(key, self.members[*at].backend.stickiness_seed);
                // 53 bits, the most a double holds, as a number in (0, 1).
                #[allow(clippy::cast_precision_loss, reason = "53 bits fit a double")]
                let share = ((hash >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
                (*at, self.tier(*at) - share.ln() / self.spec(*at).weight)
            })
            .collect()
    }

    /// Smooth weighted round robin as nginx has it: each usable member earns its weight, the richest
    /// is chosen and pays the sum. A lock, because a pick changes all credits at once; it is held
    /// for a few additions.
    fn round_robin(&self, usable: &[usize]) -> Costs {
        let mut credits = self.credits.lock().unwrap_or_else(PoisonError::into_inner);
        let tier_of_first = usable.iter().map(|at| self.tier(*at)).fold(BACKUP, f64::min);
        let mut total = 0.0;
        for at in usable {
            if self.tier(*at) == tier_of_first {
                credits[*at] += self.spec(*at).weight;
                total += self.spec(*at).weight;
            }
        }
        let costs: Costs = usable.iter().map(|at| (*at, self.tier(*at) - credits[*at])).collect();
        if let Some((chosen, _)) = costs.iter().min_by(|left, right| left.1.total_cmp(&right.1)) {
            credits[*chosen] -= total;
        }
        costs
    }

    /// Power of two choices: of two drawn by weight, the one with less in flight for its weight.
    /// Drawing by weight keeps an idle pool's shares right; comparing spreads a busy one's load.
    fn least_inflight(&self, usable: &[usize]) -> Costs {
        // Exponential keys order a weighted sample without replacement (Efraimidis and Spirakis).
        let mut drawn: Costs = usable
            .iter()
            .map(|at| {
                let key = -fastrand::f64().max(f64::MIN_POSITIVE).ln() / self.spec(*at).weight;
                (*at, self.tier(*at) + key)
            })
            .collect();
        drawn.sort_unstable_by(|left, right| left.1.total_cmp(&right.1));
        if self.tier(drawn[0].0) == self.tier(drawn[1].0)
            && self.load(drawn[1].0) < self.load(drawn[0].0)
        {
            let second = drawn[1].0;
            drawn[1].0 = drawn[0].0;
            drawn[0].0 = second;
        }
        drawn
    }

    #[allow(clippy::cast_precision_loss, reason = "exchanges in flight are far below 2^52")]
    fn load(&self, at: usize) -> f64 {
        (self.members[at].backend.inflight() + 1) as f64 / self.spec(at).weight
    }
}

/// The candidates of one selection, cheapest first.
pub(super) struct Candidates {
    balancer: Arc<Balancer>,
    costs: Costs,
}

impl BackendIter for Candidates {
    fn next(&mut self) -> Option<&LbBackend> {
        let (position, _) = self
            .costs
            .iter()
            .enumerate()
            .min_by(|(_, left), (_, right)| left.1.total_cmp(&right.1))?;
        let (at, _) = self.costs.swap_remove(position);
        Some(&self.balancer.members[at].entry)
    }
}
