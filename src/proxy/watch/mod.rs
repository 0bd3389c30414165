//! The watch over an exchange: its deadlines, and its client while Pingora does not look at it.
//!
//! Pingora knows one timeout for reading from a backend, the same before the first byte and between
//! two, and none for a whole exchange or a whole request head. While it connects, and while hooks
//! wait, it does not see that a client leaves. So the future that is an exchange is polled inside
//! [`watched`], which polls a timer beside it. When a deadline is over it closes the connection to
//! the backend from outside; Pingora then reports a broken backend, and [`Watch::stopped`] tells
//! what really happened. All of this is one task, so that the connection is still the exchange's own.

mod poller;
mod socket;
mod stop;

use std::os::fd::RawFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Context;
use std::time::{Duration, Instant};

use nix::sys::socket::{Shutdown, shutdown};
use tokio::sync::Notify;

pub use poller::{ClientSide, watched};
pub(super) use stop::Stop;

use crate::config::{ClientBounds, Deadlines};
use socket::{Peek, peek, takes_more};
use stop::STOPS;

/// How often it is looked, while nothing of a body passes, whether that is because the backend takes
/// nothing.
const STALL_LOOK: Duration = Duration::from_secs(5);

tokio::task_local! {
    static WATCH: Arc<Watch>;
}

/// What the hooks of an exchange and the poller around it share. One task uses it: its atomics are
/// cells that may be sent between threads.
#[derive(Debug)]
pub(super) struct Watch {
    base: Instant,
    phase: AtomicU8,
    /// Nanoseconds after `base`; [`NEVER`]: no such deadline.
    exchange_by: AtomicU64,
    quiet_since: AtomicU64,
    quiet_limit: AtomicU64,
    /// How long each phase may be quiet, in nanoseconds.
    upload_limit: AtomicU64,
    rest_limit: AtomicU64,
    first_byte_limit: AtomicU64,
    silence_limit: AtomicU64,
    /// Whether the client has not sent all of its request.
    is_uploading: AtomicBool,
    /// Whether the backend took nothing of a body for a while.
    has_stalled: AtomicBool,
    /// The connection to the backend; below 0: none.
    upstream: AtomicI32,
    /// Whether that is not this exchange's alone.
    is_shared: AtomicBool,
    /// Whether the connection is closed for writing: the backend took no more of the request.
    is_request_ended: AtomicBool,
    stopped: AtomicU8,
    ended: Notify,
    beside: Mutex<Beside>,
}

/// What is done for an exchange beside it, in the same task: what a task writes to a connection is sent by that task.
#[derive(Default)]
struct Beside(Option<Pin<Box<dyn Future<Output = ()> + Send>>>);

impl std::fmt::Debug for Beside {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Beside").field(&self.0.is_some()).finish()
    }
}

const NEVER: u64 = u64::MAX;
const NO_CONNECTION: RawFd = -1;

/// Where an exchange is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Its head has not been read.
    Head,
    /// In hooks or connecting: Pingora does not look at the client.
    Inside,
    /// The client sends.
    Upload,
    /// The backend takes what there is of the request, or does not.
    Writing,
    /// The backend has the request.
    FirstByte,
    /// The backend answers.
    Answer,
    /// Both sides of a WebSocket talk as they like.
    Tunnel,
    /// The backend has answered, and the client still sends.
    Rest,
    /// The backend has answered.
    Over,
}

const PHASES: [Phase; 9] = [
    Phase::Head,
    Phase::Inside,
    Phase::Upload,
    Phase::Writing,
    Phase::FirstByte,
    Phase::Answer,
    Phase::Tunnel,
    Phase::Rest,
    Phase::Over,
];

/// What there is of a request when there is a connection to the backend.
pub(super) enum Request<'a> {
    /// All of it, and no more than is written at once.
    Little,
    /// All of it.
    Much,
    /// The body comes from the client, who has these bounds.
    Comes(&'a ClientBounds),
}

impl Watch {
    fn new() -> Self {
        Self {
            base: Instant::now(),
            phase: AtomicU8::new(Phase::Head as u8),
            exchange_by: AtomicU64::new(NEVER),
            quiet_since: AtomicU64::new(0),
            quiet_limit: AtomicU64::new(NEVER),
            upload_limit: AtomicU64::new(NEVER),
            rest_limit: AtomicU64::new(NEVER),
            first_byte_limit: AtomicU64::new(NEVER),
            silence_limit: AtomicU64::new(NEVER),
            is_uploading: AtomicBool::new(false),
            has_stalled: AtomicBool::new(false),
            upstream: AtomicI32::new(NO_CONNECTION),
            is_shared: AtomicBool::new(false),
            is_request_ended: AtomicBool::new(false),
            stopped: AtomicU8::new(0),
            ended: Notify::new(),
            beside: Mutex::default(),
        }
    }

    /// Has something done beside the exchange, as long as that goes on.
    pub(super) fn beside(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.lock_beside().0 = Some(Box::pin(work));
    }

    fn lock_beside(&self) -> MutexGuard<'_, Beside> {
        self.beside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on with what is done beside the exchange.
    fn poll_beside(&self, context: &mut Context<'_>) {
        let mut beside = self.lock_beside();
        if let Some(work) = &mut beside.0
            && work.as_mut().poll(context).is_ready()
        {
            beside.0 = None;
        }
    }

    /// The watch of this task. Where there is none, one that nobody looks at.
    pub(super) fn of_task() -> Arc<Self> {
        WATCH.try_with(Arc::clone).unwrap_or_else(|_| Arc::new(Self::new()))
    }

    /// The request head has been read.
    pub(super) fn arrived(&self) {
        self.enter(Phase::Inside);
    }

    /// The whole exchange has this long.
    pub(super) fn limit_exchange(&self, began: Instant, limit: Duration) {
        self.exchange_by.store(self.nanos(began + limit), Ordering::Relaxed);
    }

    /// When the exchange is stopped, whatever it does.
    pub(super) fn exchange_by(&self) -> Option<Instant> {
        self.instant(self.exchange_by.load(Ordering::Relaxed))
    }

    /// There is a connection to the backend.
    pub(super) fn connected(&self, upstream: RawFd, request: &Request<'_>, deadlines: &Deadlines) {
        self.upstream.store(upstream, Ordering::Relaxed);
        self.is_shared.store(false, Ordering::Relaxed);
        self.is_request_ended.store(false, Ordering::Relaxed);
        let store = |limit: &AtomicU64, time| limit.store(nanos(time), Ordering::Relaxed);
        if let Request::Comes(client) = request {
            store(&self.upload_limit, client.body_timeout);
            // The end of the answer may still be written, and nothing read meanwhile.
            store(&self.rest_limit, client.write_timeout + client.body_timeout);
        }
        store(&self.first_byte_limit, deadlines.first_byte);
        store(&self.silence_limit, deadlines.silence);
        self.is_uploading.store(matches!(request, Request::Comes(_)), Ordering::Relaxed);
        self.expect(match request {
            Request::Little => Phase::FirstByte,
            Request::Much => Phase::Writing,
            Request::Comes(_) => Phase::Upload,
        });
    }

    /// The connection carries other exchanges too (HTTP/2): it is not closed for this one. That it was
    /// stopped it is told with the next piece that comes, or when Pingora's own timeout for reading is over.
    pub(super) fn share(&self) {
        self.upstream.store(NO_CONNECTION, Ordering::Relaxed);
        self.is_shared.store(true, Ordering::Relaxed);
    }

    /// Why this exchange was stopped on a connection that it shares.
    pub(super) fn stopped_sharing(&self) -> Option<Stop> {
        self.stopped().filter(|_| self.is_shared.load(Ordering::Relaxed))
    }

    /// Both sides talk as they like from here on (WebSocket): `idle` is the longest that both are silent,
    /// `total` the longest for all.
    pub(super) fn tunnels(&self, began: Instant, idle: Duration, total: Duration) {
        self.limit_exchange(began, total);
        self.silence_limit.store(nanos(idle), Ordering::Relaxed);
        self.is_uploading.store(false, Ordering::Relaxed);
        self.expect(Phase::Tunnel);
    }

    /// A piece of the client's body has come.
    pub(super) fn uploading(&self) {
        match self.phase() {
            Phase::Upload | Phase::Writing => self.expect(Phase::Upload),
            _ => self.heard(),
        }
    }

    /// The client has sent all.
    pub(super) fn uploaded(&self) {
        if !self.is_uploading.swap(false, Ordering::Relaxed) {
            return;
        }
        match self.phase() {
            Phase::Upload => self.expect(Phase::FirstByte),
            Phase::Rest => self.answered(),
            _ => self.heard(),
        }
    }

    /// Whether the backend took nothing of the body for a while, so that no more of it was read; asked
    /// once for each time.
    pub(super) fn take_stall(&self) -> bool {
        self.has_stalled.load(Ordering::Relaxed) && self.has_stalled.swap(false, Ordering::Relaxed)
    }

    /// The backend answers.
    pub(super) fn answers(&self) {
        self.expect(Phase::Answer);
    }

    /// Who is waited for was heard.
    pub(super) fn heard(&self) {
        self.quiet_since.store(self.nanos(Instant::now()), Ordering::Relaxed);
    }

    /// The backend has sent all of its answer.
    pub(super) fn answered(&self) {
        if self.is_uploading.load(Ordering::Relaxed) {
            self.expect(Phase::Rest);
            return;
        }
        self.upstream.store(NO_CONNECTION, Ordering::Relaxed);
        self.enter(Phase::Over);
    }

    /// Whether all of the answer has been taken from the backend.
    pub(super) fn is_answered(&self) -> bool {
        matches!(self.phase(), Phase::Rest | Phase::Over)
    }

    /// Whether, besides, the backend has been sent all of the request.
    pub(super) fn is_over(&self) -> bool {
        self.phase() == Phase::Over
    }

    /// The attempt is over; there may be another one.
    pub(super) fn attempt_over(&self) {
        self.upstream.store(NO_CONNECTION, Ordering::Relaxed);
        self.enter(Phase::Inside);
    }

    /// There is another attempt: what stopped the one before is over.
    pub(super) fn go_on(&self) {
        if self.stopped().is_some_and(|stop| !stop.is_final()) {
            self.stopped.store(0, Ordering::Relaxed);
        }
    }

    /// Returns when the exchange is stopped: for who waits for something that the watch cannot end.
    pub(super) async fn ended(&self) -> Stop {
        loop {
            if let Some(stop) = self.stopped() {
                return stop;
            }
            self.ended.notified().await;
        }
    }

    /// Why the exchange was stopped, if it was.
    pub(super) fn stopped(&self) -> Option<Stop> {
        let number = usize::from(self.stopped.load(Ordering::Relaxed));
        number.checked_sub(1).map(|at| STOPS[at])
    }

    fn phase(&self) -> Phase {
        PHASES[usize::from(self.phase.load(Ordering::Relaxed))]
    }

    fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// The phase begins, and is quiet from now on.
    fn expect(&self, phase: Phase) {
        let limit = match phase {
            Phase::Upload => self.limit(&self.upload_limit).min(nanos(STALL_LOOK)),
            Phase::Rest => self.limit(&self.rest_limit).min(nanos(STALL_LOOK)),
            Phase::FirstByte => self.limit(&self.first_byte_limit),
            Phase::Writing => {
                let first_byte = self.limit(&self.first_byte_limit);
                self.limit(&self.silence_limit).min(first_byte).min(nanos(STALL_LOOK))
            }
            _ => self.limit(&self.silence_limit),
        };
        self.quiet_limit.store(limit, Ordering::Relaxed);
        self.heard();
        self.enter(phase);
    }

    fn limit(&self, of: &AtomicU64) -> u64 {
        of.load(Ordering::Relaxed)
    }

    /// The next deadline of the phase, in nanoseconds.
    fn next(&self) -> (u64, Stop) {
        let exchange = self.exchange_by.load(Ordering::Relaxed);
        let since = self.quiet_since.load(Ordering::Relaxed);
        let quiet_by = since.saturating_add(self.quiet_limit.load(Ordering::Relaxed));
        let quiet = match self.phase() {
            // The answer is there: nothing is left that a deadline for all could save.
            Phase::Rest => return (quiet_by, Stop::Upload),
            Phase::Tunnel if quiet_by < exchange => return (quiet_by, Stop::WebsocketIdle),
            Phase::Tunnel => return (exchange, Stop::WebsocketTotal),
            Phase::Upload => Stop::Upload,
            Phase::FirstByte => Stop::FirstByte,
            Phase::Answer | Phase::Writing => Stop::Silence,
            Phase::Head | Phase::Inside | Phase::Over => return (exchange, Stop::Exchange),
        };
        // On a connection that is shared, Pingora's own timeout sees who is silent.
        let is_own = !self.is_shared.load(Ordering::Relaxed);
        if is_own && quiet_by < exchange { (quiet_by, quiet) } else { (exchange, Stop::Exchange) }
    }

    /// The next deadline is over, or it is time to look; why that ends the exchange, if it does.
    /// `is_stirred`: something has happened to the exchange since it was asked last.
    fn overdue(
        &self,
        now: Instant,
        why: Stop,
        is_stirred: bool,
        client: Option<RawFd>,
    ) -> Option<Stop> {
        match (self.phase(), why) {
            (Phase::Rest, _) => self.late_rest(now, is_stirred, client).then_some(why),
            (Phase::Tunnel, Stop::WebsocketIdle) if self.has_bytes() => {
                // It is the client that takes nothing.
                self.heard();
                None
            }
            (_, Stop::Exchange | Stop::Drain) => Some(why),
            (Phase::Upload | Phase::Writing | Phase::FirstByte, _) => {
                self.late_request(now, is_stirred)
            }
            (Phase::Answer, _) => self.late_answer(),
            _ => Some(why),
        }
    }

    /// Whether the backend has the whole request, or takes what there is of it, can be seen by whether
    /// it lets more be written to it. What it has not taken is its own fault.
    fn late_request(&self, now: Instant, is_stirred: bool) -> Option<Stop> {
        let phase = self.phase();
        if self.takes_more() {
            return match phase {
                Phase::Upload => self.look_on(now, &self.upload_limit).then_some(Stop::Upload),
                Phase::Writing => {
                    let is_uploading = self.is_uploading.load(Ordering::Relaxed);
                    self.expect(if is_uploading { Phase::Upload } else { Phase::FirstByte });
                    None
                }
                _ => Some(Stop::FirstByte),
            };
        }
        if is_stirred {
            // While Pingora writes, that can only be room for more of the request.
            self.heard();
        }
        if phase == Phase::Upload {
            self.has_stalled.store(true, Ordering::Relaxed);
        }
        self.enter(Phase::Writing);
        if !self.look_on(now, &self.silence_limit) {
            return None;
        }
        if !self.has_bytes() {
            return Some(Stop::Silence);
        }
        // It wants no more of the request, and has said why.
        self.end_request();
        self.expect(Phase::FirstByte);
        let soon = self.limit(&self.first_byte_limit).min(nanos(STALL_LOOK));
        self.quiet_limit.store(soon, Ordering::Relaxed);
        None
    }

    /// The backend was silent in the middle of its answer, as it seems.
    fn late_answer(&self) -> Option<Stop> {
        let is_uploading = self.is_uploading.load(Ordering::Relaxed);
        let is_stuck = is_uploading && self.takes_nothing();
        if self.has_bytes() {
            if is_stuck {
                self.end_request();
            }
            // Else it is the client that takes nothing.
            self.heard();
            return None;
        }
        Some(if is_uploading && !is_stuck { Stop::Upload } else { Stop::Silence })
    }

    /// Whether nothing more comes of a request whose answer is complete: for too long a time, or since the
    /// backend takes no more of it. As long as the client does not take all of the answer, that is why.
    fn late_rest(&self, now: Instant, is_stirred: bool, client: Option<RawFd>) -> bool {
        let is_written = client.is_some_and(|client| takes_more(client).unwrap_or(true));
        let is_stuck = is_written && !is_stirred && self.takes_nothing();
        self.look_on(now, &self.rest_limit) || is_stuck
    }

    /// Nothing more of the request is sent: Pingora, which writes it, comes to read the answer.
    fn end_request(&self) {
        self.is_request_ended.store(true, Ordering::Relaxed);
        let upstream = self.upstream.load(Ordering::Relaxed);
        if upstream >= 0 {
            let _ = shutdown(upstream, Shutdown::Write);
        }
    }

    /// Notes when to look again; true when it has been quiet for longer than `limit`.
    fn look_on(&self, now: Instant, limit: &AtomicU64) -> bool {
        let limit = self.limit(limit);
        let quiet = self.nanos(now).saturating_sub(self.quiet_since.load(Ordering::Relaxed));
        let next = quiet.saturating_add(nanos(STALL_LOOK)).min(limit);
        self.quiet_limit.store(next, Ordering::Relaxed);
        quiet >= limit
    }

    /// Ends the exchange, once.
    fn stop(&self, why: Stop) {
        let number = STOPS.iter().position(|stop| *stop == why).map_or(0, |at| at + 1);
        self.stopped.store(u8::try_from(number).unwrap_or(0), Ordering::Relaxed);
        self.ended.notify_one();
        let upstream = self.upstream.load(Ordering::Relaxed);
        if upstream >= 0 {
            // It may be closed already by the other side; then Pingora knows.
            let _ = shutdown(upstream, Shutdown::Both);
        }
    }

    /// Whether the backend takes no more of the request.
    fn takes_nothing(&self) -> bool {
        self.is_request_ended.load(Ordering::Relaxed) || !self.takes_more()
    }

    /// Whether the backend lets more be written to it. The system says so of a connection too on which
    /// nothing more is sent.
    fn takes_more(&self) -> bool {
        let upstream = self.upstream.load(Ordering::Relaxed);
        upstream < 0 || takes_more(upstream).unwrap_or(true)
    }

    /// Whether bytes of the backend wait to be read.
    fn has_bytes(&self) -> bool {
        let upstream = self.upstream.load(Ordering::Relaxed);
        upstream >= 0 && peek(upstream) == Peek::Bytes
    }

    fn nanos(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.base))
    }

    fn instant(&self, nanos: u64) -> Option<Instant> {
        (nanos != NEVER).then(|| self.base + Duration::from_nanos(nanos))
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(NEVER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_deadline_is_the_one_that_counts() {
        let watch = Watch::new();
        assert_eq!(watch.next(), (NEVER, Stop::Exchange));
        watch.limit_exchange(watch.base, Duration::from_secs(60));
        assert_eq!(watch.next().1, Stop::Exchange);
        let deadlines = |first_byte, silence| Deadlines {
            connect: Duration::from_secs(1),
            tls: Duration::from_secs(1),
            first_byte: Duration::from_secs(first_byte),
            silence: Duration::from_secs(silence),
            exchange: Duration::from_secs(60),
            websocket_idle: Duration::from_secs(1),
            websocket_total: Duration::from_secs(1),
        };
        watch.connected(NO_CONNECTION, &Request::Little, &deadlines(5, 500));
        assert_eq!(watch.next().1, Stop::FirstByte);
        watch.answers();
        assert_eq!(watch.next().1, Stop::Exchange);
        let text = "services: {s: {models: {m: {backends: [{id: a, url: http://127.0.0.1:1}]}}}}";
        let source = crate::config::Source::File("test.yaml".into());
        let environment = crate::config::Environment::default();
        let snapshot = crate::config::read(text.as_bytes(), &source, &environment).unwrap();
        let comes = Request::Comes(&snapshot.client);
        watch.connected(NO_CONNECTION, &comes, &deadlines(5, 50));
        assert_eq!(watch.next().1, Stop::Upload);
        watch.answers();
        assert_eq!(watch.next().1, Stop::Silence);
        watch.uploading();
        assert_eq!(watch.next().1, Stop::Silence, "a piece of the request does not end the answer");
        watch.limit_exchange(watch.base, Duration::from_secs(3600));
        watch.answered();
        assert_eq!(watch.next().1, Stop::Upload, "the client still sends");
        watch.uploaded();
        assert_eq!((watch.phase(), watch.next().1), (Phase::Over, Stop::Exchange));
    }

    #[test]
    fn another_attempt_is_not_stopped_by_what_stopped_the_one_before_but_by_what_ends_all() {
        let watch = Watch::new();
        for (stop, after) in [
            (Stop::FirstByte, None),
            (Stop::Silence, None),
            (Stop::Exchange, Some(Stop::Exchange)),
            (Stop::Drain, Some(Stop::Drain)),
        ] {
            watch.stop(stop);
            watch.go_on();
            assert_eq!(watch.stopped(), after);
        }
    }
}
