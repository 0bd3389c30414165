//! Hooks at work: those of a model, one after the other, and how it went.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderMap;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    AnswerBody, AnswerHead, At, Cut, Elsewhere, Found, Notes, RequestBody, RequestHead, Settled,
    Stop,
};
use crate::expression::{Expression, Facts, Moment, Request};

/// That a condition cannot be told is logged once in this time, for each hook.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// What became of a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Its condition did not hold.
    Skipped,
    /// The exchange went on.
    Passed,
    /// What it looks for was there, and the exchange went on.
    Found,
    /// The client was refused.
    Refused,
    /// The client was answered.
    Answered,
    /// Its condition could not be told.
    Failed,
}

impl Outcome {
    /// As metrics call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Skipped => "skipped",
            Self::Passed => "passed",
            Self::Found => "found",
            Self::Refused => "refused",
            Self::Answered => "answered",
            Self::Failed => "failed",
        }
    }
}

/// A time that a hook ran.
#[derive(Clone, Debug)]
pub struct Run {
    /// What it is called.
    pub hook: Arc<str>,
    /// What became of it.
    pub outcome: Outcome,
    /// How long it took.
    pub took: Duration,
}

/// The hooks that ran for an exchange.
pub type Runs = Vec<Run>;

/// A hook.
pub struct Hook {
    name: Arc<str>,
    when: Option<Expression>,
    at: Vec<At>,
    /// What is the same for two hooks that were made of the same. What they were made of may hold secrets.
    print: u64,
    /// When it was last logged that its condition could not be told, in seconds since [`Hook::made`]; 0: never.
    logged: AtomicU64,
    made: Instant,
}

impl Hook {
    /// One that acts where `when` holds. `written` is what it was made of, in any form.
    #[must_use]
    pub fn new(name: &str, when: Option<Expression>, at: Vec<At>, written: &str) -> Self {
        let (logged, made) = (AtomicU64::new(0), Instant::now());
        let print = xxh3_64(written.as_bytes());
        Self { name: name.into(), when, at, print, logged, made }
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it acts on this exchange; `Err`: that cannot be told.
    fn acts(&self, facts: &Facts<'_>) -> Result<bool, ()> {
        let Some(when) = &self.when else { return Ok(true) };
        when.holds(facts).map_err(|why| {
            let seconds = self.made.elapsed().as_secs() + 1;
            let last = self.logged.load(Ordering::Relaxed);
            if last == 0 || seconds >= last + LOG_EVERY.as_secs() {
                self.logged.store(seconds, Ordering::Relaxed);
                log::warn!(
                    "hook {:?} is passed over: its \"when\" gives no answer: {why}",
                    self.name
                );
            }
        })
    }
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:x})", self.name, self.print)
    }
}

impl PartialEq for Hook {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.when == other.when && self.print == other.print
    }
}

/// The hooks of one model, in their order: those for everything, of its service, and its own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chain(Vec<Arc<Hook>>);

impl Chain {
    /// These.
    #[must_use]
    pub fn new(hooks: Vec<Arc<Hook>>) -> Self {
        Self(hooks)
    }

    fn has(&self, is_it: impl Fn(&At) -> bool) -> bool {
        self.0.iter().any(|hook| hook.at.iter().any(&is_it))
    }

    /// Whether one may send requests elsewhere.
    #[must_use]
    pub fn routes(&self) -> bool {
        self.has(|at| matches!(at, At::Route(_) | At::Mirror(_)))
    }

    /// Whether one acts on bodies of requests.
    #[must_use]
    pub fn wants_body(&self) -> bool {
        self.has(|at| matches!(at, At::RequestBody(_)))
    }

    /// Whether one that acts on this request acts on its body.
    #[must_use]
    pub fn needs_body(&self, request: &Request<'_>, headers: &HeaderMap) -> bool {
        let facts = Facts { request, headers, answer: None };
        let of_body = |at: &At| matches!(at, At::RequestBody(_));
        let needs =
            |hook: &Arc<Hook>| hook.at.iter().any(of_body) && hook.acts(&facts) != Ok(false);
        self.0.iter().any(needs)
    }

    /// Whether one can do with a body, where it is held.
    #[must_use]
    pub fn takes_body(&self) -> bool {
        self.has(|at| matches!(at, At::RequestBody(_) | At::Mirror(_)))
    }

    /// Whether one acts on heads of answers.
    #[must_use]
    pub fn wants_answer(&self) -> bool {
        self.has(|at| matches!(at, At::AnswerHead(_)))
    }

    /// Whether one acts on bodies of answers.
    #[must_use]
    pub fn wants_answer_body(&self) -> bool {
        self.has(|at| matches!(at, At::AnswerBody(_)))
    }

    /// Whether one is told of the end.
    #[must_use]
    pub fn wants_end(&self) -> bool {
        self.has(|at| matches!(at, At::Settled(_)))
    }

    /// A request may pass. `body` is there where one is, and is held. Where it goes besides.
    ///
    /// # Errors
    /// With what the client is told instead of passing it on.
    pub fn request(
        &self,
        request: &Request<'_>,
        headers: &mut HeaderMap,
        mut body: Option<&mut Bytes>,
        (runs, notes): (&mut Runs, &mut Notes),
    ) -> Result<Elsewhere, Stop> {
        let mut clock = Clock::start();
        let mut elsewhere = Elsewhere::default();
        for hook in &self.0 {
            let is_of_request = |at: &At| at.moment() == Moment::Request;
            if !hook.at.iter().any(is_of_request) {
                continue;
            }
            let facts = Facts { request, headers, answer: None };
            let Some(hook) = clock.begin(hook, &facts, runs) else { continue };
            let mut found = false;
            for at in &hook.at {
                let done = match (at, body.as_deref_mut()) {
                    (At::Route(hook), _) if elsewhere.route.is_none() => {
                        elsewhere.route = hook.route(&RequestHead { request, headers });
                        Ok(())
                    }
                    (At::Mirror(hook), _) => {
                        elsewhere.mirrors.extend(hook.route(&RequestHead { request, headers }));
                        Ok(())
                    }
                    (At::RequestHead(hook), _) => {
                        hook.request_head(&mut RequestHead { request, headers })
                    }
                    (At::RequestBody(hook), Some(bytes)) => {
                        let found = &mut found;
                        let notes = &mut *notes;
                        hook.request_body(&mut RequestBody {
                            request,
                            headers,
                            bytes,
                            found,
                            notes,
                        })
                    }
                    _ => Ok(()),
                };
                if let Err(stop) = done {
                    let outcome = match stop {
                        Stop::Refuse { .. } => Outcome::Refused,
                        Stop::Answer(_) => Outcome::Answered,
                    };
                    clock.end(hook, outcome, runs);
                    return Err(stop);
                }
            }
            clock.end(hook, if found { Outcome::Found } else { Outcome::Passed }, runs);
        }
        Ok(elsewhere)
    }

    /// The head of an answer has come.
    pub fn answer(&self, head: &mut AnswerHead<'_>, runs: &mut Runs) {
        let mut clock = Clock::start();
        for hook in &self.0 {
            if !hook.at.iter().any(|at| matches!(at, At::AnswerHead(_))) {
                continue;
            }
            let Some(hook) = clock.begin(hook, &head.facts(), runs) else { continue };
            for at in &hook.at {
                if let At::AnswerHead(hook) = at {
                    hook.answer_head(head);
                }
            }
            clock.end(hook, Outcome::Passed, runs);
        }
    }

    /// What the body of an answer goes through, whose head has come.
    #[must_use]
    pub fn answer_body(&self, head: &AnswerHead<'_>, runs: &mut Runs) -> Bodies {
        let mut bodies = Bodies::default();
        let mut clock = Clock::start();
        for hook in &self.0 {
            let mut of_bodies = hook.at.iter().filter_map(|at| match at {
                At::AnswerBody(hook) => Some(hook),
                _ => None,
            });
            let Some(first) = of_bodies.next() else { continue };
            let Some(hook) = clock.begin(hook, &head.facts(), runs) else { continue };
            for one in std::iter::once(first).chain(of_bodies) {
                let Some(body) = one.begin(head) else { continue };
                let (hook, took) = (Arc::clone(&hook.name), Duration::ZERO);
                bodies.0.push(Passing { hook, body, took, is_stopped: false });
            }
        }
        bodies
    }

    /// The exchange is over.
    pub fn settled(&self, end: &Settled<'_>, runs: &mut Runs) {
        let mut clock = Clock::start();
        for hook in &self.0 {
            if !hook.at.iter().any(|at| matches!(at, At::Settled(_))) {
                continue;
            }
            let Some(hook) = clock.begin(hook, &end.facts(), runs) else { continue };
            for at in &hook.at {
                if let At::Settled(hook) = at {
                    hook.settled(end);
                }
            }
            clock.end(hook, Outcome::Passed, runs);
        }
    }
}

/// Where time goes, from one hook to the next.
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    /// The hook, if it acts on this exchange.
    fn begin<'h>(
        &mut self,
        hook: &'h Hook,
        facts: &Facts<'_>,
        runs: &mut Runs,
    ) -> Option<&'h Hook> {
        match hook.acts(facts) {
            Ok(true) => return Some(hook),
            Ok(false) => self.end(hook, Outcome::Skipped, runs),
            Err(()) => self.end(hook, Outcome::Failed, runs),
        }
        None
    }

    fn end(&mut self, hook: &Hook, outcome: Outcome, runs: &mut Runs) {
        let now = Instant::now();
        let took = now - std::mem::replace(&mut self.0, now);
        runs.push(Run { hook: Arc::clone(&hook.name), outcome, took });
    }
}

/// What the body of an answer goes through, one after the other.
#[derive(Default)]
pub struct Bodies(Vec<Passing>);

/// What one hook does with the body of an answer.
struct Passing {
    hook: Arc<str>,
    body: Box<dyn AnswerBody>,
    took: Duration,
    /// Whether it has ended the answer.
    is_stopped: bool,
}

impl Bodies {
    /// Whether it passes as it is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A piece of the body has come, or its end.
    ///
    /// # Errors
    /// With why the answer ends here.
    pub fn pass(&mut self, piece: &mut Option<Bytes>, is_end: bool) -> Result<(), Cut> {
        let mut last = Instant::now();
        for Passing { body, took, is_stopped, .. } in &mut self.0 {
            let done = body.pass(piece, is_end);
            let now = Instant::now();
            *took += now - std::mem::replace(&mut last, now);
            *is_stopped = done.is_err();
            done?;
        }
        Ok(())
    }

    /// It is over.
    pub fn end(&mut self, runs: &mut Runs, notes: &mut Notes) {
        for Passing { hook, mut body, took, is_stopped } in self.0.drain(..) {
            notes.extend(body.note());
            let outcome = match body.found() {
                Found { is_refused: true, .. } => Outcome::Refused,
                _ if is_stopped => Outcome::Refused,
                Found { something: true, .. } => Outcome::Found,
                Found { .. } => Outcome::Passed,
            };
            runs.push(Run { hook, outcome, took });
        }
    }
}
