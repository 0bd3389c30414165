//! Which backend is asked first, second, ...: the selection behind Pingora's `LoadBalancer`.
//!
//! Candidates come each exactly once, backups after all others. Drained backends (weight 0) never
//! come, and neither do those that are not usable.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use pingora_load_balancing::Backend as LbBackend;
use pingora_load_balancing::selection::{BackendIter, BackendSelection};
use smallvec::SmallVec;

use super::backend::Backend;
use super::stickiness::{Candidate, Clients, client_number, distance};
use crate::config::Balance;

/// What a selection is built from.
pub(super) struct BalanceConfig {
    pub(super) balance: Balance,
    pub(super) backends: Vec<Arc<Backend>>,
    pub(super) clients: Arc<Clients>,
}

/// The selection of one pool.
pub(super) struct Balancer {
    balance: Balance,
    members: Vec<Member>,
    clients: Arc<Clients>,
    /// Smooth round robin's credit of each member; unused by the other policies.
    credits: Mutex<Vec<f64>>,
}

struct Member {
    /// As Pingora knows it.
    entry: LbBackend,
    backend: Arc<Backend>,
}

impl Member {
    fn candidate(&self) -> Candidate {
        Candidate { seed: self.backend.stickiness_seed, weight: self.backend.spec.weight }
    }
}

impl BackendSelection for Balancer {
    type Iter = Candidates;
    type Config = Arc<BalanceConfig>;

    fn build_with_config(entries: &BTreeSet<LbBackend>, config: &Self::Config) -> Self {
        let entry_of = |backend: &Backend| {
            entries.iter().find(|entry| super::identity_of(entry) == Some(backend.identity))
        };
        let members: Vec<Member> = config
            .backends
            .iter()
            .filter(|backend| backend.spec.weight > 0.0)
            .filter_map(|backend| {
                let entry = entry_of(backend)?.clone();
                Some(Member { entry, backend: Arc::clone(backend) })
            })
            .collect();
        // Pingora builds an empty selection before it knows the backends.
        if config.balance == Balance::Sticky && !members.is_empty() {
            let candidates = members.iter().map(|member| {
                let is_home = !member.backend.spec.backup;
                Candidate {
                    weight: if is_home { member.backend.spec.weight } else { 0.0 },
                    ..member.candidate()
                }
            });
            config.clients.change_candidates(candidates.collect());
        }
        let credits = Mutex::new(vec![0.0; members.len()]);
        let clients = Arc::clone(&config.clients);
        Self { balance: config.balance, members, clients, credits }
    }

    fn build(_: &BTreeSet<LbBackend>) -> Self {
        unreachable!("a pool's load balancer always has a configuration")
    }

    fn iter(self: &Arc<Self>, key: &[u8]) -> Candidates {
        let client = client_number(key);
        let home = match self.balance {
            Balance::Sticky if self.members.len() > 1 => self.home(client),
            _ => None,
        };
        let next = home.map_or(Next::WorkOut, Next::Home);
        Candidates { balancer: Arc::clone(self), client, home, next }
    }
}

/// What it costs to choose a member; the cheapest is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cost {
    tier: Tier,
    cost: f64,
}

/// Members of a higher tier come after all of a lower one: backups after the others, and suspects
/// after backups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Tier {
    suspected: bool,
    backup: bool,
}

impl Cost {
    fn order(&self, other: &Self) -> Ordering {
        self.tier.cmp(&other.tier).then(self.cost.total_cmp(&other.cost))
    }
}

/// Members with their costs.
type Costs = SmallVec<[(usize, Cost); 16]>;

impl Balancer {
    /// The client's home, where that is one of ours and usable.
    fn home(&self, client: u64) -> Option<usize> {
        let seed = self.clients.home(client)?;
        let is_home = |member: &Member| member.backend.stickiness_seed == seed;
        let home = self.members.iter().position(is_home)?;
        let backend = &self.members[home].backend;
        (backend.is_usable() && !backend.is_suspected()).then_some(home)
    }

    fn costs(&self, client: u64) -> Costs {
        let usable: SmallVec<[usize; 16]> =
            (0..self.members.len()).filter(|at| self.members[*at].backend.is_usable()).collect();
        if usable.len() < 2 {
            return usable.iter().map(|at| (*at, self.cost(*at, 0.0))).collect();
        }
        match self.balance {
            Balance::Sticky => self.nearest(&usable, client),
            Balance::RoundRobin => self.round_robin(&usable),
            Balance::LeastInflight => self.least_inflight(&usable),
        }
    }

    fn cost(&self, at: usize, cost: f64) -> Cost {
        Cost { tier: self.tier(at), cost }
    }

    fn tier(&self, at: usize) -> Tier {
        let backend = &self.members[at].backend;
        Tier { suspected: backend.is_suspected(), backup: backend.spec.backup }
    }

    /// By rendezvous hash: clients of a backend that is down stick to their next choice.
    fn nearest(&self, usable: &[usize], client: u64) -> Costs {
        let cost = |at: usize| self.cost(at, distance(client, self.members[at].candidate()));
        usable.iter().map(|at| (*at, cost(*at))).collect()
    }

    /// Smooth weighted round robin as nginx has it: each usable member earns its weight, the richest
    /// is chosen and pays the sum. A lock, because a pick changes all credits at once; it is held
    /// for a few additions.
    fn round_robin(&self, usable: &[usize]) -> Costs {
        let mut credits = self.credits.lock().unwrap_or_else(PoisonError::into_inner);
        let spec = |at: usize| &self.members[at].backend.spec;
        let tiers: SmallVec<[Tier; 16]> = usable.iter().map(|at| self.tier(*at)).collect();
        let first_tier = tiers.iter().min();
        let mut total = 0.0;
        for (at, _) in usable.iter().zip(&tiers).filter(|(_, tier)| Some(*tier) == first_tier) {
            credits[*at] += spec(*at).weight;
            total += spec(*at).weight;
        }
        let with_cost =
            |(at, tier): (&usize, &Tier)| (*at, Cost { tier: *tier, cost: -credits[*at] });
        let costs: Costs = usable.iter().zip(&tiers).map(with_cost).collect();
        if let Some((_, chosen)) = cheapest(&costs) {
            credits[chosen] -= total;
        }
        costs
    }

    /// Power of two choices: of two drawn by weight, the one with less in flight for its weight.
    /// Drawing by weight keeps an idle pool's shares right; comparing spreads a busy one's load.
    fn least_inflight(&self, usable: &[usize]) -> Costs {
        // Exponential keys order a weighted sample without replacement (Efraimidis and Spirakis).
        let draw = |at: usize| {
            let luck = fastrand::f64().max(f64::MIN_POSITIVE);
            self.cost(at, -luck.ln() / self.members[at].backend.spec.weight)
        };
        let mut drawn: Costs = usable.iter().map(|at| (*at, draw(*at))).collect();
        drawn.sort_unstable_by(|left, right| left.1.order(&right.1));
        let (first, second) = (drawn[0], drawn[1]);
        let same_tier = first.1.tier == second.1.tier;
        if same_tier && self.load(second.0) < self.load(first.0) {
            drawn[0].0 = second.0;
            drawn[1].0 = first.0;
        }
        drawn
    }

    #[allow(clippy::cast_precision_loss, reason = "exchanges in flight are far below 2^52")]
    fn load(&self, at: usize) -> f64 {
        let backend = &self.members[at].backend;
        (backend.inflight() + 1) as f64 / backend.spec.weight
    }
}

/// Position and member of the smallest cost.
fn cheapest(costs: &Costs) -> Option<(usize, usize)> {
    let (position, (member, _)) =
        costs.iter().enumerate().min_by(|(_, left), (_, right)| left.1.order(&right.1))?;
    Some((position, *member))
}

/// The candidates of one selection: a client's home, then the rest by their costs, which are
/// worked out only when they are asked for.
pub(super) struct Candidates {
    balancer: Arc<Balancer>,
    client: u64,
    home: Option<usize>,
    next: Next,
}

#[allow(clippy::large_enum_variant, reason = "lives on the stack for one selection")]
enum Next {
    Home(usize),
    WorkOut,
    Rest(Costs),
}

impl BackendIter for Candidates {
    fn next(&mut self) -> Option<&LbBackend> {
        if let Next::Home(home) = self.next {
            self.next = Next::WorkOut;
            return Some(&self.balancer.members[home].entry);
        }
        if let Next::WorkOut = self.next {
            let mut rest = self.balancer.costs(self.client);
            rest.retain(|(member, _)| Some(*member) != self.home);
            self.next = Next::Rest(rest);
        }
        let Next::Rest(rest) = &mut self.next else { return None };
        let (position, member) = cheapest(rest)?;
        rest.swap_remove(position);
        Some(&self.balancer.members[member].entry)
    }
}
