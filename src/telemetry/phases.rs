//! Where the time of an exchange goes: each moment of it belongs to one phase.

use std::time::{Duration, Instant};

/// What an exchange is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The gateway itself is at work.
    Own,
    /// The client sends its body, which is read before a backend is chosen.
    Body,
    /// An answer is looked for in Redis, or is on its way for another request.
    Cache,
    /// Limits are asked for in Redis.
    Limits,
    /// Waiting for a place at a backend, or before backends are asked again.
    Queue,
    /// A connection to a backend is made.
    Connect,
    /// The backend has the request, or gets it; its answer has not begun.
    Backend,
    /// The answer passes.
    Answer,
}

impl Phase {
    /// All of them, in the order in which an exchange meets them first.
    pub const ALL: [Self; 8] = [
        Self::Own,
        Self::Body,
        Self::Cache,
        Self::Limits,
        Self::Queue,
        Self::Connect,
        Self::Backend,
        Self::Answer,
    ];

    /// As logs and spans name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Body => "body",
            Self::Cache => "cache",
            Self::Limits => "limits",
            Self::Queue => "queue",
            Self::Connect => "connect",
            Self::Backend => "backend",
            Self::Answer => "answer",
        }
    }
}

/// The clock of one exchange. What it has spent in all phases makes up its whole time.
#[derive(Clone, Debug)]
pub struct Phases {
    now: Phase,
    since: Instant,
    spent: [Duration; Phase::ALL.len()],
    /// Each turn, where they are kept.
    turns: Option<Vec<(Phase, Instant)>>,
}

/// Turns that are kept: an exchange whose body comes in ever so many pieces has no end of them.
const TURNS_MAX: usize = 64;

impl Phases {
    /// What time is spent on now.
    #[must_use]
    pub fn now(&self) -> Phase {
        self.now
    }

    /// Begins with [`Phase::Own`].
    #[must_use]
    pub fn begin(at: Instant) -> Self {
        Self { now: Phase::Own, since: at, spent: Default::default(), turns: None }
    }

    /// From now on, each turn is kept.
    pub fn keep_turns(&mut self) {
        self.turns = Some(vec![(self.now, self.since)]);
    }

    /// The turns, if they were kept: to what, and when. Each lasts until the next.
    #[must_use]
    pub fn turns(&self) -> &[(Phase, Instant)] {
        self.turns.as_deref().unwrap_or_default()
    }

    /// Another phase begins, or the same goes on.
    pub fn turn(&mut self, phase: Phase, at: Instant) {
        self.spent[self.now as usize] += at.saturating_duration_since(self.since);
        if let Some(turns) = self.turns.as_mut().filter(|_| phase != self.now)
            && turns.len() < TURNS_MAX
        {
            turns.push((phase, at));
        }
        self.now = phase;
        self.since = at;
    }

    /// What was spent in a phase, up to the last turn.
    #[must_use]
    pub fn spent(&self, phase: Phase) -> Duration {
        self.spent[phase as usize]
    }

    /// What was spent in all, up to the last turn.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.spent.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_make_up_the_whole_time() {
        let began = Instant::now();
        let at = |millis| began + Duration::from_millis(millis);
        let mut phases = Phases::begin(began);
        phases.turn(Phase::Queue, at(2));
        phases.turn(Phase::Own, at(12));
        phases.turn(Phase::Own, at(13));
        phases.turn(Phase::Answer, at(20));
        phases.turn(Phase::Own, at(50));
        let spent = Phase::ALL.map(|phase| phases.spent(phase).as_millis());
        assert_eq!(spent, [10, 0, 0, 0, 10, 0, 0, 30]);
        assert_eq!(phases.total(), Duration::from_millis(50));
        // A clock that went back takes nothing away.
        phases.turn(Phase::Own, at(40));
        assert_eq!(phases.total(), Duration::from_millis(50));
    }
}
