//! Which backend is asked first, second, ...: the selection behind Pingora's `LoadBalancer`.
//!
//! Candidates come each exactly once, the groups of the pool one after the other. Drained backends (weight 0) never
//! come, and neither do those that are not usable.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

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
    pub(super) slow_start: Duration,
}

/// The selection of one pool.
pub(super) struct Balancer {
    balance: Balance,
    members: Vec<Member>,
    clients: Arc<Clients>,
    slow_start: Duration,
    /// Smooth round robin's credit of each member; unused by the other policies.
    credits: Mutex<Vec<f64>>,
}

struct Member {
    /// As Pingora knows it.
    entry: LbBackend,
    backend: Arc<Backend>,
}

impl Member {
    fn candidate(&self, weight: f64) -> Candidate {
        Candidate { seed: self.backend.stickiness_seed, weight }
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
            let first = members.iter().map(|member| member.backend.spec.priority).min();
            let candidates = members.iter().map(|member| {
                let spec = &member.backend.spec;
                member.candidate(if Some(spec.priority) == first { spec.weight } else { 0.0 })
            });
            config.clients.change_candidates(candidates.collect());
        }
        let credits = Mutex::new(vec![0.0; members.len()]);
        let clients = Arc::clone(&config.clients);
        Self { balance: config.balance, members, clients, slow_start: config.slow_start, credits }
    }

    fn build(_: &BTreeSet<LbBackend>) -> Self {
        unreachable!("a pool's load balancer always has a configuration")
    }

    fn iter(self: &Arc<Self>, key: &[u8]) -> Candidates {
        let client = client_number(key);
        let now = Instant::now();
        let home = match self.balance {
            Balance::Sticky if self.members.len() > 1 => self.home(client, now),
            _ => None,
        };
        let next = home.map_or(Next::WorkOut, Next::Home);
        Candidates { balancer: Arc::clone(self), client, now, home, next }
    }
}

/// What it costs to choose a member; the cheapest is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cost {
    tier: Tier,
    cost: f64,
}

/// Members of a higher tier come after all of a lower one: each group after those before it, and those
/// that are avoided after all groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Tier {
    avoided: bool,
    priority: u8,
}

impl Cost {
    fn order(&self, other: &Self) -> Ordering {
        self.tier.cmp(&other.tier).then(self.cost.total_cmp(&other.cost))
    }
}

/// Members with their costs.
type Costs = SmallVec<[(usize, Cost); 16]>;

impl Balancer {
    /// The client's home, where that is one of ours and as good as ever.
    fn home(&self, client: u64, now: Instant) -> Option<usize> {
        let seed = self.clients.home(client)?;
        let is_home = |member: &Member| member.backend.stickiness_seed == seed;
        let home = self.members.iter().position(is_home)?;
        let backend = &self.members[home].backend;
        let is_whole = backend.weight(now, self.slow_start) >= backend.spec.weight;
        (backend.is_usable() && is_whole && !backend.is_avoided(now)).then_some(home)
    }

    fn costs(&self, client: u64, now: Instant) -> Costs {
        let usable: SmallVec<[usize; 16]> =
            (0..self.members.len()).filter(|at| self.members[*at].backend.is_usable()).collect();
        if usable.len() < 2 {
            return usable.iter().map(|at| (*at, self.cost(*at, 0.0, now))).collect();
        }
        match self.balance {
            Balance::Sticky => self.nearest(&usable, client, now),
            Balance::RoundRobin => self.round_robin(&usable, now),
            Balance::LeastInflight => self.least_inflight(&usable, now),
        }
    }

    fn cost(&self, at: usize, cost: f64, now: Instant) -> Cost {
        Cost { tier: self.tier(at, now), cost }
    }

    fn tier(&self, at: usize, now: Instant) -> Tier {
        let backend = &self.members[at].backend;
        Tier { avoided: backend.is_avoided(now), priority: backend.spec.priority }
    }

    fn weight(&self, at: usize, now: Instant) -> f64 {
        self.members[at].backend.weight(now, self.slow_start)
    }

    /// By rendezvous hash: clients of a backend that is down stick to their next choice.
    fn nearest(&self, usable: &[usize], client: u64, now: Instant) -> Costs {
        let candidate = |at: usize| self.members[at].candidate(self.weight(at, now));
        let cost = |at: usize| self.cost(at, distance(client, candidate(at)), now);
        usable.iter().map(|at| (*at, cost(*at))).collect()
    }

    /// Smooth weighted round robin as nginx has it: each usable member earns its weight, the richest
    /// is chosen and pays the sum. A lock, because a pick changes all credits at once; it is held
    /// for a few additions.
    fn round_robin(&self, usable: &[usize], now: Instant) -> Costs {
        let mut credits = self.credits.lock().unwrap_or_else(PoisonError::into_inner);
        let tiers: SmallVec<[Tier; 16]> = usable.iter().map(|at| self.tier(*at, now)).collect();
        let first_tier = tiers.iter().min();
        let mut total = 0.0;
        for (at, _) in usable.iter().zip(&tiers).filter(|(_, tier)| Some(*tier) == first_tier) {
            let weight = self.weight(*at, now);
            credits[*at] += weight;
            total += weight;
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
    fn least_inflight(&self, usable: &[usize], now: Instant) -> Costs {
        // Exponential keys order a weighted sample without replacement (Efraimidis and Spirakis).
        let draw = |at: usize| {
            let luck = fastrand::f64().max(f64::MIN_POSITIVE);
            self.cost(at, -luck.ln() / self.weight(at, now), now)
        };
        let mut drawn: Costs = usable.iter().map(|at| (*at, draw(*at))).collect();
        drawn.sort_unstable_by(|left, right| left.1.order(&right.1));
        let (first, second) = (drawn[0], drawn[1]);
        let same_tier = first.1.tier == second.1.tier;
        if same_tier && self.load(second.0, now) < self.load(first.0, now) {
            drawn[0].0 = second.0;
            drawn[1].0 = first.0;
        }
        drawn
    }

    #[allow(clippy::cast_precision_loss, reason = "exchanges in flight are far below 2^52")]
    fn load(&self, at: usize, now: Instant) -> f64 {
        (self.members[at].backend.inflight() + 1) as f64 / self.weight(at, now)
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
    now: Instant,
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
            let mut rest = self.balancer.costs(self.client, self.now);
            rest.retain(|(member, _)| Some(*member) != self.home);
            self.next = Next::Rest(rest);
        }
        let Next::Rest(rest) = &mut self.next else { return None };
        let (position, member) = cheapest(rest)?;
        rest.swap_remove(position);
        Some(&self.balancer.members[member].entry)
    }
}
