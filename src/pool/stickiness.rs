//! Which backend is a client's home: weighted rendezvous hashing with bounded loads.
//!
//! Rendezvous hashing (Thaler and Ravishankar 1998) needs no memory, agrees between gateways and
//! moves no client that need not move; but with few clients, as a handful of application servers
//! are, its shares are those of thrown dice. So a pool remembers its clients, and one whose first
//! choice has its share already goes to its next choice (after Mirrokni, Thorup and Zadimoghaddam,
//! "Consistent hashing with bounded loads", 2016).

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// How far a backend's number of clients may be above its exact share: less would keep the shares
/// closer, and send more clients past their first choice.
const SLACK: f64 = 1.03;

/// Most clients remembered in a pool. With more of them, plain rendezvous hashing is within about a
/// per cent of the weights by itself.
const CLIENTS_MAX: usize = 2048;

/// A client that has not been seen for this long is forgotten, in seconds.
const IDLE_SECONDS: u64 = 3600;

/// How often forgotten clients are looked for, in seconds.
const SWEEP_SECONDS: u64 = 300;

/// A backend as the hash sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    /// Hash of its id.
    pub(super) seed: u64,
    /// Its weight; 0: nobody's home.
    pub(super) weight: f64,
}

/// The number of a client: a hash of its address.
pub(super) fn client_number(address: &[u8]) -> u64 {
    xxh3_64_with_seed(address, 0)
}

/// How little a client likes a backend: the smallest is its first choice. Shares are exactly
/// proportional to weights.
pub(super) fn distance(client: u64, candidate: Candidate) -> f64 {
    let hash = xxh3_64_with_seed(&client.to_le_bytes(), candidate.seed);
    // 53 bits, the most a double holds, as a number between 0 and 1.
    #[allow(clippy::cast_precision_loss, reason = "53 bits fit a double")]
    let share = ((hash >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -share.ln() / candidate.weight
}

/// The clients of a pool, for all selections that are at work; they outlive a configuration.
#[derive(Debug)]
pub(super) struct Clients {
    began: Instant,
    homes: Mutex<Homes>,
}

impl Default for Clients {
    fn default() -> Self {
        Self { began: Instant::now(), homes: Mutex::default() }
    }
}

impl Clients {
    /// The seed of the backend that is the client's home. A lock, since a new client changes the
    /// shares of all; it is held for one look-up.
    pub(super) fn home(&self, client: u64) -> Option<u64> {
        let mut homes = self.locked();
        let at = homes.of(client, self.began.elapsed().as_secs())?;
        Some(homes.candidates[at].seed)
    }

    /// See [`Homes::change_candidates`].
    pub(super) fn change_candidates(&self, candidates: Vec<Candidate>) {
        self.locked().change_candidates(candidates);
    }

    fn locked(&self) -> MutexGuard<'_, Homes> {
        // A panic while it was held cannot leave it in a state that is wrong for a selection.
        self.homes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The clients and their homes.
#[derive(Debug, Default)]
struct Homes {
    candidates: Vec<Candidate>,
    weight_total: f64,
    clients: HashMap<u64, Home>,
    /// Clients of each candidate.
    counts: Vec<usize>,
    swept_at: u64,
}

#[derive(Clone, Copy, Debug)]
struct Home {
    candidate: usize,
    seen_at: u64,
}

impl Homes {
    /// The home of `client`, as an index into the candidates; `now` in seconds of any clock that
    /// does not go back. None when there is no candidate, or no room to remember the client: then
    /// its first choice is as good.
    fn of(&mut self, client: u64, now: u64) -> Option<usize> {
        if let Some(home) = self.clients.get_mut(&client) {
            home.seen_at = now;
            return Some(home.candidate);
        }
        if now >= self.swept_at + SWEEP_SECONDS {
            self.sweep(now);
        }
        if self.clients.len() >= CLIENTS_MAX {
            return None;
        }
        self.settle(client, now, self.clients.len() + 1)
    }

    /// The candidates changed. Only those clients move whose home is gone or has too many now, or
    /// whose first choice is a candidate that is new and has room.
    fn change_candidates(&mut self, candidates: Vec<Candidate>) {
        if candidates == self.candidates {
            return;
        }
        let before = std::mem::replace(&mut self.candidates, candidates);
        self.weight_total = self.candidates.iter().map(|candidate| candidate.weight).sum();
        self.counts = vec![0; self.candidates.len()];
        let mut clients: Vec<(u64, Home)> = self.clients.drain().collect();
        // In an order that does not depend on the map's.
        clients.sort_unstable_by_key(|(client, _)| *client);
        let total = clients.len();
        let is_new = |seed: u64| before.iter().all(|candidate| candidate.seed != seed);
        let mut stay = Vec::new();
        let mut homeless = Vec::new();
        for (client, home) in clients {
            let seed = before[home.candidate].seed;
            let old = self.candidates.iter().position(|candidate| candidate.seed == seed);
            let drawn = self.choices(client).first().copied();
            let drawn = drawn.filter(|at| is_new(self.candidates[*at].seed));
            match (drawn, old) {
                (Some(new), _) if self.has_room(new, total) => {
                    self.house(client, new, home.seen_at)
                }
                (_, Some(old)) => stay.push((client, old, home.seen_at)),
                (_, None) => homeless.push((client, home.seen_at)),
            }
        }
        for (client, old, seen_at) in stay {
            if self.has_room(old, total) {
                self.house(client, old, seen_at);
            } else {
                homeless.push((client, seen_at));
            }
        }
        for (client, seen_at) in homeless {
            self.settle(client, seen_at, total);
        }
    }

    /// Gives a client the first of its choices that has room.
    fn settle(&mut self, client: u64, now: u64, clients: usize) -> Option<usize> {
        let choices = self.choices(client);
        let candidate = choices.into_iter().find(|at| self.has_room(*at, clients))?;
        self.house(client, candidate, now);
        Some(candidate)
    }

    fn house(&mut self, client: u64, candidate: usize, seen_at: u64) {
        self.counts[candidate] += 1;
        self.clients.insert(client, Home { candidate, seen_at });
    }

    fn has_room(&self, at: usize, clients: usize) -> bool {
        self.counts[at] < self.room(at, clients)
    }

    /// How many of `clients` a candidate may have. Never 0, and the sum is never below `clients`.
    fn room(&self, at: usize, clients: usize) -> usize {
        #[allow(clippy::cast_precision_loss, reason = "a few thousand clients")]
        let share = self.candidates[at].weight / self.weight_total * clients as f64 * SLACK;
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a few thousand clients, and never negative"
        )]
        let room = share.ceil() as usize;
        room
    }

    /// The candidates, the best liked first.
    fn choices(&self, client: u64) -> Vec<usize> {
        let mut choices: Vec<(usize, f64)> = self
            .candidates
            .iter()
            .enumerate()
            .filter(|(_, candidate)| candidate.weight > 0.0)
            .map(|(at, candidate)| (at, distance(client, *candidate)))
            .collect();
        choices.sort_unstable_by(|left, right| left.1.total_cmp(&right.1));
        choices.into_iter().map(|(at, _)| at).collect()
    }

    fn sweep(&mut self, now: u64) {
        self.swept_at = now;
        let counts = &mut self.counts;
        self.clients.retain(|_, home| {
            let stays = now < home.seen_at + IDLE_SECONDS;
            if !stays {
                counts[home.candidate] -= 1;
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(weights: &[(u64, f64)]) -> Vec<Candidate> {
        weights.iter().map(|(seed, weight)| Candidate { seed: *seed, weight: *weight }).collect()
    }

    fn homes(weights: &[(u64, f64)]) -> Homes {
        let mut homes = Homes::default();
        homes.change_candidates(candidates(weights));
        homes
    }

    fn settled(homes: &mut Homes, clients: u64) -> Vec<usize> {
        (0..clients)
            .map(|client| homes.of(client_number(&client.to_be_bytes()), 0).unwrap())
            .collect()
    }

    fn share(homes: &[usize], candidate: usize) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "small numbers")]
        let share =
            homes.iter().filter(|home| **home == candidate).count() as f64 / homes.len() as f64;
        share
    }

    #[test]
    fn few_clients_are_spread_within_a_few_per_cent_of_the_weights_whatever_the_hash() {
        proptest::proptest!(|(first: u64, second: u64, third: u64)| {
            proptest::prop_assume!(first != second && second != third && first != third);
            let mut homes = homes(&[(first, 1.0), (second, 2.0), (third, 3.0)]);
            let settled = settled(&mut homes, 200);
            for (candidate, expected) in [(0, 1.0 / 6.0), (1, 2.0 / 6.0), (2, 3.0 / 6.0)] {
                let share = share(&settled, candidate);
                proptest::prop_assert!((share - expected).abs() <= 0.04, "{candidate}: {share}");
            }
        });
    }

    #[test]
    fn a_client_stays_where_it_is_and_so_do_those_after_a_restart_nearly_all() {
        let weights = [(11, 1.0), (22, 1.0), (33, 1.0), (44, 1.0)];
        let mut first = homes(&weights);
        let before = settled(&mut first, 1000);
        assert_eq!(settled(&mut first, 1000), before);
        let mut other = homes(&weights);
        other.of(client_number(b"another client came first"), 0);
        let after = settled(&mut other, 1000);
        let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
        assert!(moved <= 100, "{moved} of 1000 moved");
    }

    #[test]
    fn a_new_backend_draws_its_share_and_moves_few_others() {
        let mut homes = homes(&[(11, 1.0), (22, 1.0), (33, 1.0)]);
        let before = settled(&mut homes, 900);
        let changed = candidates(&[(11, 1.0), (22, 1.0), (33, 1.0), (44, 1.0)]);
        homes.change_candidates(changed);
        let after = settled(&mut homes, 900);
        let drawn = after.iter().filter(|home| **home == 3).count();
        let others_moved = before
            .iter()
            .zip(&after)
            .filter(|(before, after)| **after != 3 && before != after)
            .count();
        assert!((190..=232).contains(&drawn), "{drawn}");
        assert!(others_moved <= 9, "{others_moved} of 900 moved without need");
    }

    #[test]
    fn when_a_backend_leaves_only_its_clients_move_but_for_a_few() {
        let mut homes = homes(&[(11, 1.0), (22, 1.0), (33, 1.0)]);
        let before = settled(&mut homes, 900);
        homes.change_candidates(candidates(&[(11, 1.0), (22, 1.0)]));
        let after = settled(&mut homes, 900);
        let moved = before
            .iter()
            .zip(&after)
            .filter(|(before, after)| **before != 2 && before != after)
            .count();
        assert_eq!(moved, 0, "{moved} moved without need");
    }

    #[test]
    fn memory_is_bounded_and_idle_clients_are_forgotten() {
        let mut homes = homes(&[(11, 1.0), (22, 1.0)]);
        settled(&mut homes, CLIENTS_MAX as u64);
        assert_eq!(homes.of(client_number(b"one too many"), 0), None);
        assert_eq!(homes.clients.len(), CLIENTS_MAX);
        homes.of(client_number(b"new"), IDLE_SECONDS + SWEEP_SECONDS);
        assert_eq!(homes.clients.len(), 1);
        assert_eq!(homes.counts.iter().sum::<usize>(), 1);
    }

    #[test]
    fn without_a_candidate_there_is_no_home() {
        assert_eq!(homes(&[]).of(1, 0), None);
        assert_eq!(homes(&[(11, 0.0)]).of(1, 0), None);
    }
}
