//! What is written to a client's connection, until it is sent.
//!
//! Small pieces are gathered until they are flushed, so that a head and a short answer, or an event in its chunk,
//! are one system call and one packet; a larger piece goes out together with what was gathered before it.
//!
//! What a task flushes first after it has waited goes out at once. What it flushes after that goes out when it has
//! nothing more to do, or has gone on for a while: events that come faster than they are passed on leave many at a
//! time. (Pingora passes on four at a time: each time is a poll of the task, and was a packet.)

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use smallvec::SmallVec;
use tokio::io::AsyncWrite;
use tokio::net::{tcp, unix};
use tokio::task::unconstrained;
use tokio::time::Sleep;

/// As much is gathered as fits in a packet (an Ethernet frame's 1,500 bytes, less TCP's and IP's heads).
const GATHERED_BYTES_MAX: usize = 1460;

/// As much is gathered while what was flushed is put off.
const PUT_OFF_BYTES_MAX: usize = 16 * 1024;

/// So often a task is polled at the most before what was put off is sent.
const POLLS_MAX: u32 = 16;

/// How long a client may take for the rest of what it was sent, when its connection ends.
const REST_WITHIN: Duration = Duration::from_secs(10);

/// Pieces that are written at once at the most: a chunk has three, and one is what was gathered.
const PIECES: usize = 8;

/// The half of a connection that is written to.
#[derive(Debug)]
pub(super) enum WriteHalf {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
}

impl WriteHalf {
    fn poll_write(
        &mut self,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // The system takes one piece at less cost than a list of one.
        match (self, pieces) {
            (Self::Tcp(half), [piece]) => Pin::new(half).poll_write(context, piece),
            (Self::Tcp(half), _) => Pin::new(half).poll_write_vectored(context, pieces),
            (Self::Unix(half), _) => Pin::new(half).poll_write_vectored(context, pieces),
        }
    }

    fn poll_shutdown(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(half) => Pin::new(half).poll_shutdown(context),
            Self::Unix(half) => Pin::new(half).poll_shutdown(context),
        }
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(half) => half.try_write(bytes),
            Self::Unix(half) => half.try_write(bytes),
        }
    }
}

/// It is written to by who serves the connection, and sent from by who polls the task in which that is done.
#[derive(Debug)]
pub(super) struct Sending(Mutex<Out>);

#[derive(Debug)]
struct Out {
    /// None when nobody writes any more and all is sent: it is not kept open for us.
    socket: Option<WriteHalf>,
    /// Whether nobody writes any more.
    is_ended: bool,
    /// What was written and not sent.
    gathered: BytesMut,
    turn: Turn,
}

/// From when a task has waited until it waits again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// The task waits, or nobody tells when it does.
    Over,
    /// Nothing was flushed in it yet.
    Begun,
    /// Something was: what is flushed now is put off to the end of the turn.
    Sent,
    /// Something is put off.
    PutOff,
}

/// A task, and whether it was woken while it was polled: then it is polled again without having waited.
struct Task {
    waker: Waker,
    is_woken: AtomicBool,
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_woken.store(true, Ordering::Relaxed);
        self.waker.wake_by_ref();
    }
}

impl Sending {
    pub(super) fn over(socket: WriteHalf) -> Self {
        Self(Mutex::new(Out {
            socket: Some(socket),
            is_ended: false,
            gathered: BytesMut::new(),
            turn: Turn::Over,
        }))
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves the connection, in a task of its own; what that gives is held until all is sent. A client that does not
    /// take within this time what was put off has left; one that has not taken all at the end is waited for a little.
    pub(super) async fn in_turns<T>(&self, within: Duration, serving: impl Future<Output = T>) {
        let mut serving = pin!(serving);
        let known = poll_fn(|context| Poll::Ready(context.waker().clone())).await;
        let task = Arc::new(Task { waker: known, is_woken: AtomicBool::new(false) });
        let waker = Waker::from(Arc::clone(&task));
        let mut polls = 0;
        // As long as there was no room for what was put off.
        let mut late: Option<Pin<Box<Sleep>>> = None;
        let served = poll_fn(|context| {
            debug_assert!(task.waker.will_wake(context.waker()), "it is a task of its own");
            let mut out = self.out();
            // Before the connection is looked at by its socket alone.
            if late.is_some() && out.send_put_off(context, &mut late, within).is_err() {
                return Poll::Ready(None);
            }
            if out.turn == Turn::Over {
                out.turn = Turn::Begun;
                polls = 0;
            }
            drop(out);
            task.is_woken.store(false, Ordering::Relaxed);
            let served = serving.as_mut().poll(&mut Context::from_waker(&waker));
            polls += 1;
            if served.is_ready() || !task.is_woken.load(Ordering::Relaxed) || polls == POLLS_MAX {
                let mut out = self.out();
                let is_put_off = std::mem::replace(&mut out.turn, Turn::Over) == Turn::PutOff;
                if (is_put_off || late.is_some())
                    && out.send_put_off(context, &mut late, within).is_err()
                {
                    return Poll::Ready(None);
                }
            }
            served.map(Some)
        })
        .await;
        if served.is_some() && !self.out().gathered.is_empty() {
            let rest = poll_fn(|context| self.out().poll_send(context));
            if !matches!(tokio::time::timeout(REST_WITHIN, rest).await, Ok(Ok(()))) {
                log::debug!("a client did not take the end of what it was sent");
            }
        }
    }

    pub(super) fn poll_write(
        &self,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut out = self.out();
        let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
        let room = if out.turn == Turn::PutOff { PUT_OFF_BYTES_MAX } else { GATHERED_BYTES_MAX };
        if out.gathered.len() + bytes > room {
            return out.poll_send_with(context, pieces);
        }
        for piece in pieces {
            out.gathered.extend_from_slice(piece);
        }
        Poll::Ready(Ok(bytes))
    }

    pub(super) fn poll_flush(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut out = self.out();
        match out.turn {
            Turn::Sent | Turn::PutOff if !out.gathered.is_empty() => {
                out.turn = Turn::PutOff;
                return Poll::Ready(Ok(()));
            }
            _ => {}
        }
        let is_something = !out.gathered.is_empty();
        ready!(out.poll_send(context))?;
        if is_something && out.turn == Turn::Begun {
            out.turn = Turn::Sent;
        }
        Poll::Ready(Ok(()))
    }

    pub(super) fn poll_shutdown(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut out = self.out();
        ready!(out.poll_send(context))?;
        match &mut out.socket {
            Some(socket) => socket.poll_shutdown(context),
            None => Poll::Ready(Ok(())),
        }
    }

    /// Nobody writes any more: sends what is left, as far as there is room for it.
    pub(super) fn end(&self) {
        let mut out = self.out();
        out.is_ended = true;
        if let Out { socket: Some(socket), gathered, .. } = &mut *out
            && !gathered.is_empty()
        {
            let sent = socket.try_write(gathered).unwrap_or_default();
            gathered.advance(sent);
        }
        out.all_may_be_sent();
    }
}

impl Out {
    /// Sends what was gathered.
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.gathered.is_empty() {
            ready!(self.poll_send_some(context, &[]))?;
        }
        // A connection that is idle holds no memory for what it may write.
        self.gathered = BytesMut::new();
        self.all_may_be_sent();
        Poll::Ready(Ok(()))
    }

    fn all_may_be_sent(&mut self) {
        if self.is_ended && self.gathered.is_empty() {
            self.socket = None;
        }
    }

    /// Sends these pieces behind what was gathered; returns how many of their bytes were taken.
    fn poll_send_with(
        &mut self,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            let is_behind = !self.gathered.is_empty();
            let taken = ready!(self.poll_send_some(context, pieces))?;
            if taken > 0 || !is_behind {
                return Poll::Ready(Ok(taken));
            }
        }
    }

    /// Sends as much of what was gathered, and of these pieces behind it, as there is room for.
    fn poll_send_some(
        &mut self,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Self { socket: Some(socket), gathered, .. } = self else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        let mut all = SmallVec::<[IoSlice<'_>; PIECES]>::new();
        if !gathered.is_empty() {
            all.push(IoSlice::new(gathered));
        }
        all.extend(pieces.iter().take(PIECES - 1).copied());
        let sent = ready!(socket.poll_write(context, &all))?;
        drop(all);
        let of_gathered = sent.min(gathered.len());
        if sent == 0 && !gathered.is_empty() {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        gathered.advance(of_gathered);
        Poll::Ready(Ok(sent - of_gathered))
    }

    /// Sends what was put off, also where the task has used up what it may do at once. `late` waits for as long as there
    /// was no room for it.
    ///
    /// # Errors
    /// When the connection is broken, or there was no room for too long.
    fn send_put_off(
        &mut self,
        context: &mut Context<'_>,
        late: &mut Option<Pin<Box<Sleep>>>,
        within: Duration,
    ) -> io::Result<()> {
        let sent = pin!(unconstrained(poll_fn(|context| self.poll_send(context)))).poll(context);
        if let Poll::Ready(sent) = sent {
            *late = None;
            return sent;
        }
        let late = late.get_or_insert_with(|| Box::pin(tokio::time::sleep(within)));
        match late.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::pin::Pin;

    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio::task::yield_now;

    use super::super::stream::{Accepted, ClientStream};
    use super::{Duration, POLLS_MAX, Poll, REST_WITHIN, poll_fn};

    const LONG: Duration = Duration::from_secs(60);

    fn pair() -> (ClientStream, UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        for end in [&ours, &theirs] {
            end.set_nonblocking(true).unwrap();
        }
        let ours = ClientStream::new(Accepted::Unix(ours)).unwrap();
        (ours, UnixStream::from_std(theirs).unwrap())
    }

    /// What has come by now.
    fn come(theirs: &std::os::unix::net::UnixStream) -> String {
        let mut seen = [0; 64];
        let read = std::io::Read::read(&mut &*theirs, &mut seen).unwrap_or_default();
        String::from_utf8_lossy(&seen[..read]).into_owned()
    }

    #[tokio::test]
    async fn small_pieces_are_sent_together_when_they_are_flushed() {
        let (mut ours, theirs) = pair();
        let theirs = theirs.into_std().unwrap();
        ours.write_all(b"head ").await.unwrap();
        ours.write_all(b"body").await.unwrap();
        assert_eq!(come(&theirs), "", "nothing is sent before");
        ours.flush().await.unwrap();
        assert_eq!(come(&theirs), "head body");
        // Nobody tells when the task waits: so nothing is put off.
        ours.write_all(b"more").await.unwrap();
        ours.flush().await.unwrap();
        assert_eq!(come(&theirs), "more");
        // What is not flushed is sent when the connection ends.
        ours.write_all(b"end").await.unwrap();
        drop(ours);
        assert_eq!(come(&theirs), "end");
    }

    async fn poll_again() {
        let mut is_again = false;
        poll_fn(|context| {
            if std::mem::replace(&mut is_again, true) {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    #[tokio::test]
    async fn what_is_flushed_again_before_the_task_waits_is_sent_together() {
        let (mut ours, theirs) = pair();
        let theirs = theirs.into_std().unwrap();
        let sending = ours.sending();
        let serving = async {
            for round in 0..2 {
                for event in ["1", "2", "3"] {
                    ours.write_all(event.as_bytes()).await.unwrap();
                    ours.flush().await.unwrap();
                }
                assert_eq!(come(&theirs), "1", "round {round}: the first one does not wait");
                yield_now().await;
                assert_eq!(come(&theirs), "23", "round {round}");
            }
            // Who is polled again at once has not waited; but that does not go on for long.
            for event in ["a", "b", "c"] {
                ours.write_all(event.as_bytes()).await.unwrap();
                ours.flush().await.unwrap();
                poll_again().await;
                assert_eq!(come(&theirs), if event == "a" { "a" } else { "" });
            }
            for _ in 3..POLLS_MAX {
                assert_eq!(come(&theirs), "");
                poll_again().await;
            }
            assert_eq!(come(&theirs), "bc");
            // Ending is not put off.
            for event in ["4", "5"] {
                ours.write_all(event.as_bytes()).await.unwrap();
                ours.flush().await.unwrap();
            }
            ours.shutdown().await.unwrap();
            assert_eq!(come(&theirs), "45");
        };
        sending.in_turns(LONG, serving).await;
    }

    /// Fills the connection in one turn, and more than that; with how many bytes.
    async fn overfill(ours: &mut ClientStream) -> usize {
        ours.write_all(b"1").await.unwrap();
        ours.flush().await.unwrap();
        poll_fn(|context| {
            let mut bytes = 1;
            while let Poll::Ready(written) = Pin::new(&mut *ours).poll_write(context, &[0; 1000]) {
                bytes += written.unwrap();
                let _ = Pin::new(&mut *ours).poll_flush(context);
            }
            Poll::Ready(bytes)
        })
        .await
    }

    #[tokio::test]
    async fn what_there_was_no_room_for_is_sent_when_there_is() {
        let (mut ours, mut theirs) = pair();
        let sending = ours.sending();
        let (told_bytes, bytes) = tokio::sync::oneshot::channel();
        let (told_end, end) = tokio::sync::oneshot::channel::<()>();
        let serving = async {
            told_bytes.send(overfill(&mut ours).await).unwrap();
            // It has nothing more to write, and waits for something else.
            end.await.unwrap();
        };
        let reading = async {
            let mut all = vec![0; bytes.await.unwrap()];
            let read = tokio::time::timeout(LONG, theirs.read_exact(&mut all)).await;
            assert!(read.is_ok(), "some of it never came");
            told_end.send(()).unwrap();
        };
        tokio::join!(sending.in_turns(LONG, serving), reading);
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_take_what_was_put_off_is_not_waited_for_for_ever() {
        let (mut ours, _theirs) = pair();
        let sending = ours.sending();
        let serving = async move {
            overfill(&mut ours).await;
            std::future::pending::<()>().await;
        };
        let begun = tokio::time::Instant::now();
        sending.in_turns(LONG, serving).await;
        assert_eq!(begun.elapsed().as_secs(), LONG.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn what_counts_a_connection_is_held_while_its_end_is_waited_for() {
        let (mut ours, _theirs) = pair();
        let sending = ours.sending();
        let (counts, is_counted) = tokio::sync::oneshot::channel::<()>();
        let serving = async move {
            overfill(&mut ours).await;
            counts
        };
        let begun = tokio::time::Instant::now();
        let ended = async {
            is_counted.await.unwrap_err();
            assert_eq!(begun.elapsed().as_secs(), REST_WITHIN.as_secs());
        };
        tokio::join!(sending.in_turns(LONG, serving), ended);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Also where the other side takes little at a time.
        #[test]
        fn whatever_is_written_comes_in_its_order(
            pieces in prop::collection::vec((0_usize..200_000, any::<bool>()), 1..20),
        ) {
            let executor = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            executor.block_on(async {
                let (mut ours, mut theirs) = pair();
                let sending = ours.sending();
                let mut next = 0_u8;
                let mut expected = Vec::new();
                let pieces: Vec<(Vec<u8>, bool)> = pieces
                    .into_iter()
                    .map(|(length, is_flushed)| {
                        let length = if is_flushed { length % 700 } else { length };
                        let piece: Vec<u8> = (0..length)
                            .map(|_| {
                                next = next.wrapping_mul(31).wrapping_add(7);
                                next
                            })
                            .collect();
                        expected.extend_from_slice(&piece);
                        (piece, is_flushed)
                    })
                    .collect();
                let reading = async {
                    let mut all = Vec::new();
                    let mut buffer = [0; 5_000];
                    loop {
                        let read = theirs.read(&mut buffer).await.unwrap();
                        if read == 0 {
                            return all;
                        }
                        all.extend_from_slice(&buffer[..read]);
                    }
                };
                let writing = async move {
                    for (piece, is_flushed) in pieces {
                        let (one, two) = piece.split_at(piece.len() / 3);
                        let written =
                            ours.write_vectored(&[IoSlice::new(one), IoSlice::new(two)]).await.unwrap();
                        ours.write_all(&piece[written..]).await.unwrap();
                        if is_flushed {
                            ours.flush().await.unwrap();
                        }
                    }
                    ours.flush().await.unwrap();
                };
                let ((), all) = tokio::join!(sending.in_turns(LONG, writing), reading);
                assert!(all == expected);
            });
        }
    }
}
