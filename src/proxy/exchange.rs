//! The state of one exchange, grouped by when it is learnt.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderValue;
use pingora::http::ResponseHeader;
use smallvec::SmallVec;

use super::account::Untold;
use super::body::Body;
use super::cached::Cached;
use super::course::{Asked, Course};
use super::detached::Detached;
use super::hooks::Hooks;
use super::meter::Metering;
use super::rights::Rights;
use super::watch::{Stop, Watch};
use crate::auth::Grant;
use crate::config::{CorsOrigins, Deadlines};
use crate::ledger::Held;
use crate::lifecycle::Counted;
use crate::limits::{Reservation, Shown};
use crate::llm::{Dialect, EndMarker, Tail};
use crate::pool::{Address, Avoided, Backend, Gate, Permit, Pool};
use crate::refusal::Refusal;
use crate::runtime::{Runtime, Target, Way};
use crate::telemetry::{Phase, Phases, Trace, Try};

/// One exchange.
pub struct Exchange {
    pub(super) arrived: Arrived,
    pub(super) admitted: Option<Admitted>,
    pub(super) body: Body,
    pub(super) attempts: Attempts,
    pub(super) observed: Observed,
    /// What it takes, where that is counted.
    pub(super) metering: Option<Metering>,
    /// What it may take of its limits, and how those stand.
    pub(super) reservation: Reservation,
    pub(super) shown: Shown,
    /// Tokens that were paid for before and that it may use up.
    pub(super) held: Option<Held>,
    /// Its deadlines.
    pub(super) watch: Arc<Watch>,
    /// Why its last attempt failed, or none was made; for an operator.
    pub(super) why: Option<String>,
    /// What the configuration has done with it.
    pub(super) hooks: Hooks,
    /// What it has to do with answers that are kept.
    pub(super) cached: Cached,
    /// Its client, where another one stands in.
    pub(super) detached: Option<Detached>,
    /// What is to be told of it, until it is.
    pub(super) untold: Option<Untold>,
    /// Where its time goes.
    pub(super) phases: Phases,
    /// Pools that could not serve, so that another one was asked.
    pub(super) fallen_from: SmallVec<[Arc<Pool>; 1]>,
    /// How often backends were asked, of all models.
    pub(super) tried: u32,
    /// Those times, where somebody keeps the trace.
    pub(super) tries: Vec<Try>,
}

/// What is known when the head has been read.
pub(super) struct Arrived {
    /// The configuration that the exchange lives by, to its end.
    pub(super) runtime: Arc<Runtime>,
    pub(super) at: Instant,
    pub(super) request_id: HeaderValue,
    pub(super) dialect: Dialect,
    /// The number of the service that its path names, where services have origins of their own.
    pub(super) service: Option<usize>,
    /// The `Access-Control-Allow-Origin` to send, where the client's origin may talk to us.
    pub(super) cors_origin: Option<HeaderValue>,
    pub(super) is_http_10: bool,
    pub(super) is_http_2: bool,
    /// Whether the client was told to go on with its body.
    pub(super) continued: bool,
    /// What its key is good for, once that is known.
    pub(super) grant: Option<Arc<Grant>>,
    /// Where the client is, once that is known.
    pub(super) address: Option<IpAddr>,
    /// The trace that it belongs to.
    pub(super) trace: Trace,
    /// Where its path leads, whether it may go there or not.
    pub(super) toward: Option<Arc<Way>>,
}

impl Arrived {
    /// Origins whose browsers may send it.
    pub(super) fn cors(&self) -> &CorsOrigins {
        self.runtime.snapshot.cors_of(self.service)
    }

    /// Whether spans of it are sent.
    pub(super) fn is_traced(&self) -> bool {
        self.trace.is_sampled && self.runtime.snapshot.observed.traces.is_some()
    }
}

/// What is known when the exchange may pass.
pub(super) struct Admitted {
    pub(super) way: Arc<Way>,
    /// Which of the way's targets is asked.
    at: usize,
    /// Which of them may be asked.
    pub(super) rights: Rights,
    /// The model that the client asks for, where it has told.
    pub(super) asked: Option<Asked>,
    pub(super) client: Client,
    /// The request target for a backend without a base path: tail and query, raw.
    pub(super) target: Box<[u8]>,
    /// The client's raw path up to the tail: what stands for the backend's base path.
    pub(super) prefix: Box<[u8]>,
    /// Whether the target is a whole path as SDKs send it, with its version.
    pub(super) is_front: bool,
    /// Whether another model may be asked in its place.
    pub(super) may_fall_back: bool,
    /// Whether a name in its body can be changed.
    pub(super) can_rename: bool,
    /// Whether a hook has sent it to another model.
    is_elsewhere: bool,
    pub(super) _inflight: Counted,
}

impl Admitted {
    /// To a target of a way, with a body in which a name can be changed.
    pub(super) fn new(
        (way, at, asked): (Arc<Way>, usize, Option<Asked>),
        course: Course,
        rights: Rights,
        client: Client,
        inflight: Counted,
    ) -> Self {
        let Course { target, prefix, is_front, may_fall_back, .. } = course;
        Self {
            way,
            at,
            rights,
            asked,
            client,
            target,
            prefix,
            is_front,
            may_fall_back,
            can_rename: true,
            is_elsewhere: false,
            _inflight: inflight,
        }
    }

    /// It goes another way, whatever the client may ask for itself.
    pub(super) fn go(&mut self, way: Arc<Way>) {
        self.way = way;
        self.at = 0;
        self.is_elsewhere = true;
    }

    /// What the client calls the model, where that name is what led here.
    pub(super) fn called(&self) -> Option<&str> {
        self.asked.as_ref().filter(|_| self.is_front).map(|asked| asked.name.as_str())
    }

    /// Where it is sent now.
    pub(super) fn to(&self) -> &Target {
        &self.way.targets[self.at]
    }

    /// The pool that is asked now.
    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.to().pool
    }

    /// The next model that can serve now, as far as is known.
    fn next(&self, is_for_tunnel: bool) -> Option<usize> {
        let takes = |backend: &Backend| !is_for_tunnel || backend.takes_tunnels();
        let can_serve = |at: &usize| {
            let target = &self.way.targets[*at];
            (self.can_rename || !target.renames)
                && self.rights.permit(target, self.called())
                && target.pool.has_other(takes)
        };
        let next = || (self.at + 1..self.way.targets.len()).find(can_serve);
        self.may_fall_back.then(next).flatten()
    }

    /// Whether another model can be asked in place of this one.
    pub(super) fn can_fall_back(&self, is_for_tunnel: bool) -> bool {
        self.next(is_for_tunnel).is_some()
    }

    /// Turns to the next model; whether there is one.
    pub(super) fn fall_back(&mut self, is_for_tunnel: bool) -> bool {
        let next = self.next(is_for_tunnel);
        self.at = next.unwrap_or(self.at);
        next.is_some()
    }

    /// Whether an answer tells which model gave it: the path does not, or it was not that one.
    pub(super) fn tells_model(&self) -> bool {
        self.is_front && !self.way.is_everything || self.to().is_fallback || self.is_elsewhere
    }
}

/// Where a request comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Client {
    /// The other end of the connection; none on a Unix socket.
    pub(super) peer: Option<IpAddr>,
    /// The client behind trusted proxies.
    pub(super) address: Option<IpAddr>,
    /// Whether the peer's forwarded headers are believed.
    pub(super) peer_is_trusted: bool,
}

/// The attempts so far.
#[derive(Default)]
pub(super) struct Attempts {
    /// The one that is going on.
    pub(super) current: Option<Attempt>,
    /// Whether it takes a backend that WebSockets can be spoken with.
    pub(super) is_for_tunnel: bool,
    /// Connections that could not be made in this round, by backend identity.
    unreachable: SmallVec<[(SocketAddr, usize); 2]>,
    /// Backends that are not asked again in this round.
    pub(super) given_up: Avoided,
    /// Whether a kept connection turned out to be dead: the next attempt makes a new one.
    pub(super) needs_new_connection: bool,
    /// How often backends of this pool were asked.
    pub(super) made: u32,
    /// Further attempts that count, so far.
    pub(super) retries: usize,
    /// Whether the next attempt has been allowed, and counted.
    pub(super) is_granted: bool,
    /// Whether the next attempt is one of another model.
    pub(super) falls_back: bool,
    /// How often all backends were asked.
    pub(super) rounds: u32,
    /// What the last backend wants to be waited for.
    pub(super) pause: Option<Duration>,
    /// What a client is told if no backend is left.
    pub(super) failure: Option<Refusal>,
}

/// One attempt.
pub(super) struct Attempt {
    pub(super) permit: Permit,
    pub(super) address: Address,
    /// What the connection is behind, where it is for a WebSocket.
    pub(super) gate: Option<Arc<Gate>>,
    /// Whether other exchanges may use the connection at the same time.
    pub(super) shares: bool,
    pub(super) began: Instant,
}

impl Attempt {
    pub(super) fn backend(&self) -> &Arc<Backend> {
        &self.permit.backend
    }
}

/// What was seen of the answer.
#[derive(Default)]
pub(super) struct Observed {
    /// What the client was sent; 0: nothing yet.
    pub(super) status: u16,
    pub(super) refusal: Option<Refusal>,
    pub(super) first_byte: Option<Duration>,
    /// The first bytes of the answer's body.
    pub(super) first_piece: Option<Duration>,
    /// Whether the answer comes in events or lines.
    pub(super) is_stream: bool,
    /// Whether the client left while the answer went on for others.
    pub(super) client_left: bool,
    /// Whether the response's status has said all about the backend that it can.
    pub(super) is_judged: bool,
    /// Whether the end of the answer's body is the end of the backend's connection.
    pub(super) ends_by_close: bool,
    /// What the client did wrong, where Pingora's error does not tell.
    pub(super) client_fault: Option<Refusal>,
    /// The end of the answer so far, where it is an event stream.
    pub(super) events: Option<Events>,
}

/// An event stream that passes.
pub(super) struct Events {
    pub(super) tail: Tail,
    /// Bytes of it.
    pub(super) passed: usize,
    pub(super) end: Option<EndMarker>,
    /// What the client may not have been sent of it, where the backend ends it by closing its
    /// connection, as it also does when it breaks off.
    pub(super) unwritten: Option<Unwritten>,
}

/// The last pieces of an answer. Pingora shows us several at once before it writes them, and writes
/// none of them if one is refused.
pub(super) struct Unwritten {
    pub(super) head: Box<ResponseHeader>,
    pub(super) pieces: VecDeque<Bytes>,
    /// Bytes of the body before them.
    pub(super) before: usize,
}

impl Observed {
    /// Whether a final response head was taken, so that there is no other attempt.
    pub(super) fn has_head(&self) -> bool {
        self.first_byte.is_some()
    }
}

impl Events {
    /// Whether the event is missing that this family of answers ends with.
    pub(super) fn is_cut(&self) -> bool {
        self.end.is_some_and(|end| !self.tail.is_complete(end))
    }

    /// A piece passes, when so many bytes of the body were written.
    pub(super) fn pass(&mut self, piece: &Bytes, written: usize) {
        self.tail.pass(piece);
        self.passed += piece.len();
        if let Some(unwritten) = &mut self.unwritten {
            unwritten.written(written);
            unwritten.pieces.push_back(piece.clone());
        }
    }
}

impl Unwritten {
    /// Of an answer with this head, as the client gets it.
    pub(super) fn of(head: &ResponseHeader) -> Self {
        Self { head: Box::new(head.clone()), pieces: VecDeque::new(), before: 0 }
    }

    /// So many bytes of the body were written.
    pub(super) fn written(&mut self, bytes: usize) {
        while let Some(piece) = self.pieces.front() {
            let end = self.before + piece.len();
            if end > bytes {
                return;
            }
            self.before = end;
            self.pieces.pop_front();
        }
    }
}

impl Exchange {
    pub(super) fn new(runtime: Arc<Runtime>) -> Self {
        let watch = Watch::of_task();
        watch.arrived();
        let at = Instant::now();
        Self {
            arrived: Arrived {
                runtime,
                at,
                request_id: HeaderValue::from_static(""),
                dialect: Dialect::OpenAi,
                service: None,
                cors_origin: None,
                is_http_10: false,
                is_http_2: false,
                continued: false,
                grant: None,
                address: None,
                trace: Trace::NONE,
                toward: None,
            },
            admitted: None,
            body: Body::default(),
            attempts: Attempts::default(),
            observed: Observed::default(),
            metering: None,
            reservation: Reservation::default(),
            held: None,
            shown: Shown::default(),
            watch,
            why: None,
            hooks: Hooks::default(),
            cached: Cached::default(),
            detached: None,
            untold: None,
            phases: Phases::begin(at),
            fallen_from: SmallVec::new(),
            tried: 0,
            tries: Vec::new(),
        }
    }

    /// From now on its time is spent on something else.
    pub(super) fn turn(&mut self, phase: Phase) {
        self.phases.turn(phase, Instant::now());
    }

    /// The request id as text.
    pub(super) fn request_id(&self) -> &str {
        self.arrived.request_id.to_str().unwrap_or_default()
    }

    /// What the model is called at the backend of the current attempt, if that may not be what the client
    /// called it.
    pub(super) fn upstream_model(&self) -> Option<&str> {
        let admitted = self.admitted.as_ref().filter(|admitted| admitted.way.renames)?;
        let backend = self.attempts.current.as_ref()?.backend();
        let asked = admitted.asked.as_ref().map(|asked| asked.name.as_str());
        match (&backend.spec.model, &admitted.to().called) {
            (Some(name), _) => Some(name),
            (None, called) => called.name(asked),
        }
    }

    /// The deadlines of the current attempt, else those of the pool's first backend.
    pub(super) fn deadlines(&self) -> Option<Deadlines> {
        let admitted = self.admitted.as_ref()?;
        Some(match &self.attempts.current {
            Some(attempt) => attempt.backend().spec.deadlines,
            None => admitted.pool().backends().first()?.spec.deadlines,
        })
    }

    /// What the client is told when the exchange was stopped.
    pub(super) fn stop_refusal(&self, stop: Stop) -> Refusal {
        let deadlines = self.deadlines();
        let slow = |deadline, limit: fn(Deadlines) -> Duration| Refusal::BackendSlow {
            pool: self.pool_name().to_owned(),
            deadline,
            limit: deadlines.map(limit).unwrap_or_default(),
        };
        match stop {
            Stop::Upload => Refusal::BodySlow,
            Stop::FirstByte => slow("first_byte", |deadlines| deadlines.first_byte),
            Stop::Silence => slow("silence", |deadlines| deadlines.silence),
            Stop::Exchange => slow("exchange", |deadlines| deadlines.exchange),
            Stop::WebsocketIdle => slow("websocket_idle", |deadlines| deadlines.websocket_idle),
            Stop::WebsocketTotal => slow("websocket_total", |deadlines| deadlines.websocket_total),
            Stop::Drain => Refusal::Draining,
        }
    }

    /// `service/model`, once known.
    pub(super) fn pool_name(&self) -> &str {
        self.admitted.as_ref().map_or("-", |admitted| admitted.pool().name())
    }
}

impl Attempts {
    /// Whether the backend may still be asked.
    pub(super) fn may_ask(&self, backend: &Backend) -> bool {
        !self.given_up.contains(&backend.identity)
            && (!self.is_for_tunnel || backend.takes_tunnels())
    }

    /// The current attempt found nobody at its address. The backend is given up when that is so for
    /// each address of its name.
    pub(super) fn unreachable(&mut self) {
        let Some(attempt) = &self.current else { return };
        let backend = attempt.backend();
        let identity = backend.identity;
        backend.addresses.pass_over(&attempt.address);
        let failures = match self.unreachable.iter_mut().find(|(known, _)| *known == identity) {
            Some((_, failures)) => {
                *failures += 1;
                *failures
            }
            None => {
                self.unreachable.push((identity, 1));
                1
            }
        };
        if failures >= backend.addresses.count() {
            self.give_up();
        }
    }

    /// The current attempt's backend is not asked again before all others were.
    pub(super) fn give_up(&mut self) {
        if let Some(attempt) = &self.current {
            self.given_up.push(attempt.backend().identity);
        }
    }

    /// Whether any backend was asked in this round.
    pub(super) fn is_round_begun(&self) -> bool {
        !self.given_up.is_empty()
    }

    /// Another pool is asked.
    pub(super) fn begin_again(&mut self) {
        let failure = self.failure.take();
        *self = Self { failure, is_for_tunnel: self.is_for_tunnel, ..Self::default() };
    }

    /// All were asked: each may be asked again.
    pub(super) fn next_round(&mut self) {
        self.given_up.clear();
        self.unreachable.clear();
        self.rounds += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Choice;

    #[test]
    fn a_backend_is_given_up_when_no_address_of_its_name_can_be_reached() {
        let [one, two] = [1, 2].map(|last| SocketAddr::from(([127, 0, 0, last], 80)));
        let pool = crate::pool::pool_of_name(&[one, two]);
        let backend = &pool.backends()[0];
        let mut attempts = Attempts::default();
        for (address, may_ask_then) in [(one, true), (two, false)] {
            assert!(attempts.may_ask(backend));
            let address = Address::Tcp(address);
            assert_eq!(backend.addresses.current().as_ref(), Some(&address));
            let Choice::Taken(permit) = pool.choose(&[], false, |_| true) else {
                panic!("there is a backend");
            };
            let began = Instant::now();
            attempts.current = Some(Attempt { permit, address, gate: None, shares: false, began });
            attempts.unreachable();
            assert_eq!(attempts.may_ask(backend), may_ask_then);
        }
        attempts.current = None;
        assert_eq!(backend.inflight(), 0);
    }
}
