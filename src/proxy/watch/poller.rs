//! Polls an exchange with a timer beside it, and does what is due.

use std::os::fd::RawFd;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};
use tokio::sync::watch::Receiver;

use super::socket::{Peek, has_closed, peek, takes_more};
use super::{Phase, Stop, WATCH, Watch};
use crate::proxy::respond::{LINGER, raw_refusal};
use crate::refusal::Refusal;

/// Changes once, when the drain is over.
type CutSignal = Receiver<bool>;

/// How often it is looked whether the client is still there, while Pingora does not.
const LOOK: Duration = Duration::from_millis(50);

/// How long a client may take to read the end of what it was sent, when its exchange is over by a deadline for all.
const FLUSH: Duration = Duration::from_secs(5);

/// After this time an exchange is a long one: from then on it is told when the drain is over.
/// Shorter ones are spared the registration.
const LONG: Duration = Duration::from_secs(1);

/// How often a client that is parted from is read from at each look.
const PART_READS_MAX: usize = 16;

/// The client's side of a connection.
#[derive(Clone, Copy, Debug)]
pub struct ClientSide {
    /// Its descriptor, where the whole connection is this exchange's: not with HTTP/2.
    pub socket: Option<RawFd>,
    /// Whether TLS is spoken on it.
    pub is_tls: bool,
    /// Whether the client may close its sending side and still wait.
    pub half_close: bool,
    /// When its request head must be there.
    pub head_within: Duration,
}

/// Polls an exchange, from its head to its end, under watch. None: it was given up, because its
/// client is gone or did not send a head.
pub async fn watched<F: Future>(
    client: ClientSide,
    drain_over: &CutSignal,
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
    let mut poller = Poller {
        watch,
        client,
        armed: None,
        told: Told::NotYet,
        is_stirred: false,
        cut_by: None,
        parting_since: None,
    };
    std::future::poll_fn(|context| {
        // Before the exchange goes on: what is cut elsewhere must not make it begin something.
        if poller.hears_end(drain_over) && poller.end(Instant::now(), Stop::Drain) == Ring::GiveUp {
            return Poll::Ready(None);
        }
        poller.is_stirred |= !timer.is_elapsed();
        if poller.parting_since.is_none() {
            if let Poll::Ready(end) = exchange.as_mut().poll(context) {
                return Poll::Ready(Some(end));
            }
            watch.poll_beside(context);
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
            poller.told.listen(context);
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
    /// Whether the exchange was polled for another reason than the timer since a deadline was over.
    is_stirred: bool,
    /// When the client must have taken what it was sent.
    cut_by: Option<Instant>,
    /// Since when nothing more is told to the client, and what it still sends is thrown away.
    parting_since: Option<Instant>,
}

/// Whether the exchange is told when the drain is over.
enum Told {
    NotYet,
    Listens(std::pin::Pin<Box<dyn Future<Output = ()> + Send>>),
    Heard,
}

impl Told {
    /// Has the task polled when the drain is over.
    fn listen(&mut self, context: &mut std::task::Context<'_>) {
        if let Self::Listens(listens) = self
            && listens.as_mut().poll(context).is_ready()
        {
            context.waker().wake_by_ref();
        }
    }
}

#[derive(PartialEq, Eq)]
enum Ring {
    GoOn,
    GiveUp,
}

impl Poller<'_> {
    /// Whether the drain is over, once.
    fn hears_end(&mut self, drain_over: &CutSignal) -> bool {
        let is_over =
            !matches!(self.told, Told::Heard) && drain_over.has_changed().unwrap_or(false);
        if is_over {
            self.told = Told::Heard;
        }
        is_over
    }

    /// Notes the time to set the timer to, if that is earlier than it is set to.
    fn arm(&mut self) -> Option<Instant> {
        let watch = self.watch;
        let mut next = match watch.phase() {
            _ if self.parting_since.is_some() => {
                Some(self.armed.unwrap_or_else(|| Instant::now() + LOOK))
            }
            Phase::Head => Some(self.head_by()),
            // The first look is not before long: most exchanges are never looked at.
            Phase::Inside => {
                let look = Instant::now() + LOOK;
                Some(self.armed.map_or(look, |armed| armed.min(look)))
            }
            _ if watch.stopped().is_some() => self.cut_by,
            _ => watch.instant(watch.next().0),
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
                if drain_over.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }));
        }
        if self.cut_by.is_some_and(|by| now >= by) {
            self.cut_by = self.cut(now);
        }
        match watch.phase() {
            _ if self.parting_since.is_some() => return self.part(now),
            Phase::Head if now >= self.head_by() => return self.refuse_head(now),
            Phase::Inside => {
                let is_gone = |socket| match peek(socket) {
                    Peek::Gone => true,
                    Peek::End => !self.client.half_close,
                    Peek::Bytes if self.client.is_tls => {
                        !self.client.half_close && has_closed(socket).unwrap_or(false)
                    }
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
            let is_stirred = std::mem::take(&mut self.is_stirred);
            if let Some(why) = watch.overdue(now, why, is_stirred, self.client.socket) {
                return self.end(now, why);
            }
        }
        Ring::GoOn
    }

    /// Ends the exchange.
    fn end(&mut self, now: Instant, why: Stop) -> Ring {
        // A client whose answer is complete is told nothing more, and Pingora waits for nobody else.
        if self.watch.phase() == Phase::Rest && why == Stop::Upload {
            return self.part(now);
        }
        self.watch.stop(why);
        if why.ends_writing() {
            self.cut_by = Some(now + FLUSH);
        }
        Ring::GoOn
    }

    /// Parts from a client that takes nothing: Pingora would wait for as long as it may take to read. Whether it
    /// still waits for its answer is looked at again.
    fn cut(&self, now: Instant) -> Option<Instant> {
        let socket = self.client.socket?;
        if takes_more(socket).unwrap_or(true) {
            return Some(now + FLUSH);
        }
        let _ = shutdown(socket, Shutdown::Both);
        None
    }

    /// Tells the client. There is no session yet to do it by. One that has not taken all of its last answer is told
    /// nothing: it would be in the middle of that.
    fn refuse_head(&mut self, now: Instant) -> Ring {
        let is_told =
            |socket: &RawFd| !self.client.is_tls && takes_more(*socket).unwrap_or_default();
        if let Some(socket) = self.client.socket.filter(is_told) {
            let answer = raw_refusal(&Refusal::HeadSlow);
            let _ = send(socket, &answer, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
        }
        self.part(now)
    }

    /// Reads what the client still sends for a while: closing at once would reset the connection, and
    /// the client could lose the answer.
    fn part(&mut self, now: Instant) -> Ring {
        let Some(socket) = self.client.socket else { return Ring::GiveUp };
        let since = *self.parting_since.get_or_insert_with(|| {
            let _ = shutdown(socket, Shutdown::Write);
            now
        });
        if now >= since + LINGER {
            return Ring::GiveUp;
        }
        let mut rest = [0; 16 * 1024];
        for _ in 0..PART_READS_MAX {
            match recv(socket, &mut rest, MsgFlags::MSG_DONTWAIT) {
                Ok(1..) => {}
                Err(nix::errno::Errno::EAGAIN) => break,
                _ => return Ring::GiveUp,
            }
        }
        Ring::GoOn
    }
}
