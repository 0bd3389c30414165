//! The watch over an exchange: its deadlines, and its client while Pingora does not look at it.
//!
//! Pingora knows one timeout for reading from a backend, the same before the first byte and between
//! two, and none for a whole exchange or a whole request head. While it connects, and while hooks
//! wait, it does not see that a client leaves. So the future that is an exchange is polled inside
//! [`watched`], which polls a timer beside it. When a deadline is over it closes the connection to
//! the backend from outside; Pingora then reports a broken backend, and [`Watch::stopped`] tells
//! what really happened. All of this is one task, so that the connection is still the exchange's own.

use std::os::fd::RawFd;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};
use tokio::sync::watch::Receiver;

use super::respond::{LINGER, raw_refusal};
use crate::refusal::Refusal;

/// Tells when the drain is over.
type CutSignal = Receiver<bool>;

/// How often it is looked whether the client is still there, while Pingora does not.
const LOOK: Duration = Duration::from_millis(50);

/// After this time an exchange is a long one: from then on it is told when the drain is over.
/// Shorter ones are spared the registration.
const LONG: Duration = Duration::from_secs(1);

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
    /// The connection to the backend; below 0: none.
    upstream: AtomicI32,
    stopped: AtomicU8,
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
    /// The backend has the request.
    FirstByte,
    /// The backend answers.
    Answer,
    /// The backend has answered.
    Over,
}

const PHASES: [Phase; 6] =
    [Phase::Head, Phase::Inside, Phase::Upload, Phase::FirstByte, Phase::Answer, Phase::Over];

/// Why an exchange was stopped from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// `client.body_timeout` is over.
    Upload,
    /// `deadlines.first_byte` is over.
    FirstByte,
    /// `deadlines.silence` is over.
    Silence,
    /// `deadlines.exchange` is over.
    Exchange,
    /// The drain is over.
    Drain,
}

const STOPS: [Stop; 5] =
    [Stop::Upload, Stop::FirstByte, Stop::Silence, Stop::Exchange, Stop::Drain];

/// The client's side of a connection.
#[derive(Clone, Copy, Debug)]
pub struct ClientSide {
    /// Its descriptor, where the whole connection is this exchange's: not with HTTP/2.
    pub socket: Option<RawFd>,
    /// Whether the client may close its sending side and still wait.
    pub half_close: bool,
    /// When its request head must be there.
    pub head_within: Duration,
}

impl Watch {
    fn new() -> Self {
        Self {
            base: Instant::now(),
            phase: AtomicU8::new(Phase::Head as u8),
            exchange_by: AtomicU64::new(NEVER),
            quiet_since: AtomicU64::new(0),
            quiet_limit: AtomicU64::new(NEVER),
            upstream: AtomicI32::new(NO_CONNECTION),
            stopped: AtomicU8::new(0),
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

    /// There is a connection to the backend, and the client sends, at least so often.
    pub(super) fn connected(&self, upstream: RawFd, limit: Duration) {
        self.upstream.store(upstream, Ordering::Relaxed);
        self.expect(Phase::Upload, limit);
    }

    /// The backend has the whole request.
    pub(super) fn expect_first_byte(&self, limit: Duration) {
        self.expect(Phase::FirstByte, limit);
    }

    /// The backend answers.
    pub(super) fn expect_more(&self, limit: Duration) {
        self.expect(Phase::Answer, limit);
    }

    /// Who is waited for was heard.
    pub(super) fn heard(&self) {
        self.quiet_since.store(self.nanos(Instant::now()), Ordering::Relaxed);
    }

    /// The backend has sent all of its answer.
    pub(super) fn answered(&self) {
        self.upstream.store(NO_CONNECTION, Ordering::Relaxed);
        self.enter(Phase::Over);
    }

    /// The attempt is over; there may be another one.
    pub(super) fn attempt_over(&self) {
        self.upstream.store(NO_CONNECTION, Ordering::Relaxed);
        self.enter(Phase::Inside);
    }

    /// There is another attempt: what stopped the one before is over.
    pub(super) fn go_on(&self) {
        self.stopped.store(0, Ordering::Relaxed);
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

    fn expect(&self, phase: Phase, limit: Duration) {
        let nanos = u64::try_from(limit.as_nanos()).unwrap_or(NEVER);
        self.quiet_limit.store(nanos, Ordering::Relaxed);
        self.heard();
        self.enter(phase);
    }

    /// The next deadline of the phase, in nanoseconds.
    fn next(&self) -> (u64, Stop) {
        let exchange = self.exchange_by.load(Ordering::Relaxed);
        let quiet = match self.phase() {
            Phase::Upload => Stop::Upload,
            Phase::FirstByte => Stop::FirstByte,
            Phase::Answer => Stop::Silence,
            _ => return (exchange, Stop::Exchange),
        };
        let since = self.quiet_since.load(Ordering::Relaxed);
        let quiet_by = since.saturating_add(self.quiet_limit.load(Ordering::Relaxed));
        if quiet_by < exchange { (quiet_by, quiet) } else { (exchange, Stop::Exchange) }
    }

    /// Ends the exchange, once.
    fn stop(&self, why: Stop) {
        let number = STOPS.iter().position(|stop| *stop == why).map_or(0, |at| at + 1);
        self.stopped.store(u8::try_from(number).unwrap_or(0), Ordering::Relaxed);
        let upstream = self.upstream.load(Ordering::Relaxed);
        if upstream >= 0 {
            // It may be closed already by the other side; then Pingora knows.
            let _ = shutdown(upstream, Shutdown::Both);
        }
    }

    /// A backend whose bytes wait to be read, since the client takes none, is not silent.
    fn is_held_up(&self) -> bool {
        let upstream = self.upstream.load(Ordering::Relaxed);
        upstream >= 0 && peek(upstream) == Peek::Bytes
    }

    fn nanos(&self, at: Instant) -> u64 {
        let nanos = at.saturating_duration_since(self.base).as_nanos();
        u64::try_from(nanos).unwrap_or(NEVER)
    }

    fn instant(&self, nanos: u64) -> Option<Instant> {
        (nanos != NEVER).then(|| self.base + Duration::from_nanos(nanos))
    }
}

/// Polls an exchange, from its head to its end, under watch. None: it was given up, because its
/// client is gone or did not send a head.
pub async fn watched<F: Future>(
    client: ClientSide,
    drain_over: &Receiver<bool>,
    exchange: F,
) -> Option<F::Output> {
    let watch = Arc::new(Watch::new());
    WATCH.scope(Arc::clone(&watch), poll_watched(&watch, client, drain_over, exchange)).await
}

async fn poll_watched<F: Future>(
    watch: &Watch,
    client: ClientSide,
    drain_over: &CutSignal,
    exchange: F,
) -> Option<F::Output> {
    let mut exchange = pin!(exchange);
    let mut timer = pin!(tokio::time::sleep(Duration::ZERO));
    let mut poller = Poller { watch, client, armed: None, told: Told::NotYet, refused_at: None };
    std::future::poll_fn(|context| {
        if poller.refused_at.is_none()
            && let Poll::Ready(end) = exchange.as_mut().poll(context)
        {
            return Poll::Ready(Some(end));
        }
        loop {
            if let Some(earlier) = poller.arm() {
                timer.as_mut().reset(earlier.into());
            }
            if poller.armed.is_some() && timer.as_mut().poll(context).is_ready() {
                if poller.ring(drain_over) == Ring::GiveUp {
                    return Poll::Ready(None);
                }
                continue;
            }
            if poller.told.poll(context) {
                watch.stop(Stop::Drain);
            }
            return Poll::Pending;
        }
    })
    .await
}

struct Poller<'a> {
    watch: &'a Watch,
    client: ClientSide,
    /// What the timer is set to.
    armed: Option<Instant>,
    told: Told,
    /// When the client was told that its head came too slowly.
    refused_at: Option<Instant>,
}

/// Whether the exchange is told when the drain is over.
enum Told {
    NotYet,
    Listens(std::pin::Pin<Box<dyn Future<Output = ()> + Send>>),
    Heard,
}

impl Told {
    /// Whether the drain is over, once.
    fn poll(&mut self, context: &mut std::task::Context<'_>) -> bool {
        let Self::Listens(listens) = self else { return false };
        let is_over = listens.as_mut().poll(context).is_ready();
        if is_over {
            *self = Self::Heard;
        }
        is_over
    }
}

#[derive(PartialEq, Eq)]
enum Ring {
    GoOn,
    GiveUp,
}

impl Poller<'_> {
    /// Notes the time to set the timer to, if that is earlier than it is set to.
    fn arm(&mut self) -> Option<Instant> {
        let watch = self.watch;
        let mut next = match watch.phase() {
            Phase::Head if self.refused_at.is_some() => {
                Some(self.armed.unwrap_or_else(|| Instant::now() + LOOK))
            }
            Phase::Head => Some(self.head_by()),
            // The first look is not before long: most exchanges are never looked at.
            Phase::Inside => {
                let look = Instant::now() + LOOK;
                Some(self.armed.map_or(look, |armed| armed.min(look)))
            }
            _ => watch.instant(watch.next().0).filter(|_| watch.stopped().is_none()),
        };
        // The first that is armed for, so that a short exchange sets the timer once.
        if matches!(self.told, Told::NotYet) {
            next = Some(next.map_or(watch.base + LONG, |next| next.min(watch.base + LONG)));
        }
        let next = next?;
        if self.armed.is_some_and(|armed| armed <= next) {
            return None;
        }
        self.armed = Some(next);
        Some(next)
    }

    /// When the head must be there.
    fn head_by(&self) -> Instant {
        self.watch.base + self.client.head_within
    }

    /// The timer rang.
    fn ring(&mut self, drain_over: &CutSignal) -> Ring {
        self.armed = None;
        let watch = self.watch;
        let now = Instant::now();
        if matches!(self.told, Told::NotYet) && now >= watch.base + LONG {
            let mut drain_over = drain_over.clone();
            self.told = Told::Listens(Box::pin(async move {
                let told = drain_over.wait_for(|is_over| *is_over).await.is_ok();
                if !told {
                    std::future::pending::<()>().await;
                }
            }));
        }
        match watch.phase() {
            Phase::Head if now >= self.head_by() => {
                return self.refuse_head(now);
            }
            Phase::Inside => {
                let is_gone = |socket| match peek(socket) {
                    Peek::Gone => true,
                    Peek::End => !self.client.half_close,
                    Peek::Bytes | Peek::Nothing => false,
                };
                if self.client.socket.is_some_and(is_gone) {
                    return Ring::GiveUp;
                }
            }
            _ => {}
        }
        let (by, why) = watch.next();
        if watch.nanos(now) >= by && watch.stopped().is_none() {
            if why == Stop::Silence && watch.is_held_up() {
                watch.heard();
            } else {
                watch.stop(why);
            }
        }
        Ring::GoOn
    }
}

impl Poller<'_> {
    /// Tells the client, and reads what it still sends for a while. There is no session yet to do it
    /// by.
    fn refuse_head(&mut self, now: Instant) -> Ring {
        let Some(socket) = self.client.socket else { return Ring::GiveUp };
        let refused_at = *self.refused_at.get_or_insert_with(|| {
            let answer = raw_refusal(&Refusal::HeadSlow);
            let _ = send(socket, &answer, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
            let _ = shutdown(socket, Shutdown::Write);
            now
        });
        let mut rest = [0; 4096];
        let is_over = now >= refused_at + LINGER;
        match recv(socket, &mut rest, MsgFlags::MSG_DONTWAIT) {
            Ok(1..) | Err(nix::errno::Errno::EAGAIN) if !is_over => Ring::GoOn,
            _ => Ring::GiveUp,
        }
    }
}

/// What is to be read from a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peek {
    Bytes,
    Nothing,
    End,
    Gone,
}

fn peek(socket: RawFd) -> Peek {
    match recv(socket, &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(0) => Peek::End,
        Ok(_) => Peek::Bytes,
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => Peek::Nothing,
        Err(_) => Peek::Gone,
    }
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
        watch.expect_first_byte(Duration::from_secs(5));
        assert_eq!(watch.next().1, Stop::FirstByte);
        watch.expect_more(Duration::from_secs(500));
        assert_eq!(watch.next().1, Stop::Exchange);
        watch.expect_more(Duration::from_secs(50));
        assert_eq!(watch.next().1, Stop::Silence);
        watch.answered();
        assert_eq!(watch.next().1, Stop::Exchange);
    }
}
