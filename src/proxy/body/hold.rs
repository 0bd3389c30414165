//! Reading a body before a backend is chosen: to send it again if need be, and to see which model it
//! names.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use pingora_core::{Error, ErrorType, Result};
use pingora_proxy::Session;

use super::super::Proxy;
use super::super::course::{Aim, Look, refusal_of_body};
use super::super::exchange::Exchange;
use super::super::watch::Stop;
use super::{
    Content, Looking, Passed, Place, REPLAY_BUFFER_BYTES, UNSIZED_BYTES_MAX, is_slow, length,
    patience, too_slow,
};
use crate::config::ClientBounds;
use crate::lifecycle::HeldShare;
use crate::llm::{Found, Peek};
use crate::refusal::Refusal;
use crate::telemetry::Phase;

/// Reads the body if it can be held, or as far as it takes to find what `look` is about. What was found,
/// or why the body is refused.
///
/// # Errors
/// When the client breaks off or breaks the protocol; [`Exchange::observed`] says if it was too slow.
pub(in super::super) async fn hold(
    proxy: &Proxy,
    session: &mut Session,
    exchange: &mut Exchange,
    look: Option<Look>,
    wants_whole: bool,
) -> Result<Result<Option<Found>, Refusal>> {
    if session.as_mut().is_body_empty() {
        return Ok(Ok(None));
    }
    let runtime = Arc::clone(&exchange.arrived.runtime);
    let replay = runtime.snapshot.replay;
    let headers = &session.req_header().headers;
    let share = HeldShare::none(&proxy.lifecycle.held);
    let looking = match Looking::new(look, headers, &replay, share.another()) {
        Ok(looking) => looking,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let length = length(session);
    let mut reader = Reader {
        bytes: BytesMut::new(),
        first: Bytes::new(),
        share,
        total_max: replay.total_bytes_max,
        began: Instant::now(),
        length,
        read_max: match length {
            Some(length) if length <= replay.body_bytes_max => length,
            Some(_) => 0,
            None => UNSIZED_BYTES_MAX.min(replay.body_bytes_max),
        },
        looking,
        kept_from: None,
    };
    let wants_any = reader.looking.peek.is_some() || wants_whole && reader.read_max > 0;
    let end = if wants_any {
        match reader.read(session, &runtime.snapshot.client, exchange).await? {
            Ok(end) => end,
            Err(refusal) => return Ok(Err(refusal)),
        }
    } else {
        End::More
    };
    let is_whole = end == End::Whole && !session.as_ref().retry_buffer_truncated();
    if !is_whole && session.as_mut().is_body_done() && !is_kept(session) {
        // Pingora would wait for more of it, and has nothing to begin with.
        return Ok(Err(Refusal::LengthRequired));
    }
    Ok(Ok(reader.finish(session, exchange, is_whole)))
}

/// Whether Pingora has kept all that was read since it was told to.
fn is_kept(session: &Session) -> bool {
    session.as_ref().get_retry_buffer().is_some()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Whole,
    More,
}

struct Reader {
    /// What came after the first chunk; with it, once there is a second one.
    bytes: BytesMut,
    /// The first chunk: most bodies have just one, which then is not copied.
    first: Bytes,
    share: HeldShare,
    total_max: usize,
    began: Instant,
    /// As the client says.
    length: Option<usize>,
    /// As much is read for the sake of sending it again.
    read_max: usize,
    looking: Looking,
    /// After how many bytes Pingora began to keep what is read.
    kept_from: Option<usize>,
}

impl Reader {
    async fn read(
        &mut self,
        session: &mut Session,
        bounds: &ClientBounds,
        exchange: &mut Exchange,
    ) -> Result<Result<End, Refusal>> {
        let mut is_last_part = false;
        loop {
            let left = self.length.map(|length| length.saturating_sub(self.length_read()));
            let next = left.unwrap_or(REPLAY_BUFFER_BYTES);
            if !is_last_part && next <= REPLAY_BUFFER_BYTES {
                // There is no way back from here: room for all of the rest is needed.
                if !self.share.grow(next, self.total_max) {
                    return Ok(self.no_room());
                }
                session.as_mut().enable_retry_buffering();
                self.kept_from = Some(self.length_read());
                is_last_part = true;
            }
            let mut reading = pin!(session.as_mut().read_request_body());
            // Most bodies have come with their heads: no clock is asked for those.
            let (chunk, has_waited) =
                match poll_fn(|context| Poll::Ready(reading.as_mut().poll(context))).await {
                    Poll::Ready(chunk) => (chunk, false),
                    Poll::Pending => (self.wait(reading, bounds, exchange).await?, true),
                };
            let Some(chunk) = chunk.map_err(Error::into_down)? else { return Ok(self.whole()) };
            if has_waited && is_slow(self.length_read() + chunk.len(), self.began, bounds) {
                return Err(too_slow(exchange));
            }
            let bytes_max = bounds.body_bytes_max;
            if bytes_max > 0 && self.length_read() + chunk.len() > bytes_max {
                return Ok(Err(Refusal::BodyTooLarge { bytes_max }));
            }
            if let Err(refusal) = self.looking.look(&chunk).await {
                return Ok(Err(refusal));
            }
            let is_counted = is_last_part && self.length.is_some();
            let has_room = is_counted || self.share.grow(chunk.len(), self.total_max);
            self.push(chunk);
            if !has_room {
                return Ok(self.no_room());
            }
            if let Some(end) = self.is_enough() {
                return Ok(end);
            }
        }
    }

    /// Waits for the next piece, as long as a client may take for it.
    async fn wait<T>(
        &self,
        reading: impl Future<Output = T>,
        bounds: &ClientBounds,
        exchange: &mut Exchange,
    ) -> Result<T> {
        exchange.turn(Phase::Body);
        let read = tokio::select! {
            biased;
            read = tokio::time::timeout(patience(self.began, bounds), reading) => read,
            stop = exchange.watch.ended() => return Err(ended(exchange, stop)),
        };
        exchange.turn(Phase::Own);
        read.map_err(|_| too_slow(exchange))
    }

    fn length_read(&self) -> usize {
        if self.bytes.is_empty() { self.first.len() } else { self.bytes.len() }
    }

    /// Whether no more is to be read: of a body that is too large to be held, or does not say how large it is.
    fn is_enough(&self) -> Option<Result<End, Refusal>> {
        let is_sized = self.length.is_some_and(|length| length <= self.read_max);
        if is_sized || self.length_read() < self.read_max {
            return None;
        }
        let bytes_max = self.looking.bytes_max;
        if !self.looking.is_searching() || matches!(self.looking.aim, Aim::Fallback | Aim::Note) {
            return Some(Ok(End::More));
        }
        if self.length_read() < bytes_max {
            return None;
        }
        let is_strict = self.looking.aim.is_strict();
        Some(if is_strict { Err(Refusal::ModelTooLate { bytes_max }) } else { Ok(End::More) })
    }

    /// There is no more room for bodies.
    fn no_room(&self) -> Result<End, Refusal> {
        let is_missing = self.looking.aim.is_strict() && self.looking.is_searching();
        if is_missing { Err(Refusal::TooManyBodies) } else { Ok(End::More) }
    }

    fn whole(&self) -> Result<End, Refusal> {
        let Some(peek) = self.looking.peek.as_deref() else { return Ok(End::Whole) };
        let may_pass = match self.looking.aim {
            // An empty body names nothing, and that is all that is wrong with it.
            Aim::Way => self.length_read() == 0,
            Aim::Name => !peek.is_begun(),
            Aim::Fallback | Aim::Choice | Aim::Note => true,
        };
        match peek.finish() {
            Err(fault) if !may_pass => Err(refusal_of_body(fault, self.looking.bytes_max)),
            _ => Ok(End::Whole),
        }
    }

    fn push(&mut self, chunk: Bytes) {
        if self.length_read() == 0 {
            self.first = chunk;
            return;
        }
        if self.bytes.is_empty() {
            // Not all that the client says: memory is taken for what has come.
            let likely = self.length.unwrap_or(0).min(1024 * 1024);
            self.bytes.reserve(likely.max(self.first.len() + chunk.len()));
            self.bytes.extend_from_slice(&self.first);
        }
        self.bytes.extend_from_slice(&chunk);
    }

    fn take(&mut self) -> Bytes {
        if self.bytes.is_empty() {
            std::mem::take(&mut self.first)
        } else {
            std::mem::take(&mut self.bytes).freeze()
        }
    }

    /// Whether there may be a name that would have to be changed.
    fn is_unclear(&self, is_whole: bool) -> bool {
        let looking = &self.looking;
        let is_blank = is_whole && looking.peek.as_deref().is_some_and(|peek| !peek.is_begun());
        !matches!(looking.aim, Aim::Choice | Aim::Note)
            && (looking.is_unclear || looking.is_searching() && !is_blank)
    }

    /// What was read becomes the exchange's body.
    fn finish(
        mut self,
        session: &Session,
        exchange: &mut Exchange,
        is_whole: bool,
    ) -> Option<Found> {
        let read = self.length_read();
        let bytes = self.take();
        self.share.shrink(bytes.len());
        let found = self.looking.found().cloned();
        let peek = self.looking.peek.as_deref();
        exchange.body.place = peek.and_then(|peek| Place::of(peek, self.looking.fills));
        exchange.body.is_unclear = self.is_unclear(is_whole);
        let facts = peek.and_then(Peek::facts);
        exchange.body.facts = facts.cloned().map(Box::new);
        exchange.body.content = if is_whole {
            Content::Held { bytes, share: self.share, is_sent: false }
        } else {
            // What Pingora has kept it begins with by itself.
            let is_truncated = session.as_ref().retry_buffer_truncated();
            let kept_from = self.kept_from.filter(|_| !is_truncated).unwrap_or(read);
            let passed = Passed::new(read, kept_from, self.began);
            let prefix = bytes.slice(..kept_from);
            Content::Passing { prefix, share: self.share, passed, looking: self.looking }
        };
        found
    }
}

fn ended(exchange: &mut Exchange, stop: Stop) -> Box<Error> {
    exchange.attempts.failure = Some(exchange.stop_refusal(stop));
    Error::explain(ErrorType::ReadTimedout, "stopped while the body came").into_up()
}
