//! The client's connection and the body it sends.
//!
//! A body that is small enough, and has room in what the gateway holds altogether, is read before a
//! backend is chosen and held until the exchange has an answer: each attempt is sent the same bytes.
//! Any other body is passed on chunk by chunk as it comes, once.
//!
//! Pingora sends a body again only from its own buffer of 64 KiB, and waits for ever if a larger one
//! was read beforehand. But all it takes is that its buffer holds something and did not overflow:
//! then it calls the body filter once at the start of each attempt, and there the whole body is put
//! in the place of what it had. So its buffer is switched on for the last 64 KiB only.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::Method;
use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use pingora_core::protocols::http::ServerSession;
use pingora_core::{Error, ErrorType, Result};
use pingora_proxy::Session;

use super::Proxy;
use super::exchange::Exchange;
use super::watch::{Request, Stop};
use crate::config::ClientBounds;
use crate::lifecycle::HeldShare;
use crate::refusal::Refusal;

/// What Pingora's buffer holds.
const REPLAY_BUFFER_BYTES: usize = 64 * 1024;

/// Of a body that does not say its length, this much is read ahead: with one more read of at most
/// 16 KiB it still fits Pingora's buffer.
const UNSIZED_BYTES_MAX: usize = 48 * 1024;

/// As much as a socket takes at once, whoever reads at the other end.
const LITTLE_BYTES_MAX: usize = 64 * 1024;

/// From here on a body's rate is looked at; before, a slow start would be taken for a slow client.
const RATE_GRACE: Duration = Duration::from_secs(5);

/// What becomes of the body.
#[derive(Debug, Default)]
pub(super) enum Body {
    /// There is none.
    #[default]
    Empty,
    /// All of it is here.
    Held { bytes: Bytes, _share: HeldShare, is_sent: bool },
    /// It passes as it comes, after what was read of it already and Pingora has not kept.
    Passing { prefix: Bytes, _share: HeldShare, passed: Passed },
}

/// How much of a body has passed, and since when.
#[derive(Debug)]
pub(super) struct Passed {
    bytes: usize,
    /// What of it counts for its rate, and since when: not while a backend is looked for, or takes
    /// nothing.
    rated_bytes: usize,
    began: Instant,
    paused: Option<Instant>,
    /// Whether a backend was sent any of it.
    is_begun: bool,
    /// Whether Pingora keeps all of it, as long as it has room.
    is_buffered: bool,
}

impl Body {
    /// Whether another backend can be sent all of it.
    pub(super) fn is_replayable(&self) -> bool {
        match self {
            Self::Empty | Self::Held { .. } => true,
            Self::Passing { passed, .. } => !passed.is_begun,
        }
    }

    /// Whether the backend that closed a kept connection can be sent it on another one.
    pub(super) fn is_kept(&self, session: &Session) -> bool {
        match self {
            Self::Passing { passed, .. } if passed.is_begun => {
                passed.is_buffered && !session.as_ref().retry_buffer_truncated()
            }
            _ => true,
        }
    }

    /// A backend is looked for: nothing of it is read meanwhile.
    pub(super) fn pause(&mut self) {
        if let Self::Passing { passed, .. } = self {
            passed.paused.get_or_insert_with(Instant::now);
        }
    }

    /// A backend is about to be sent it.
    pub(super) fn begin_attempt(&mut self) {
        match self {
            Self::Empty => {}
            Self::Held { is_sent, .. } => *is_sent = false,
            Self::Passing { passed, .. } => {
                passed.began += passed.paused.take().map(|at| at.elapsed()).unwrap_or_default();
                if passed.is_begun {
                    // Pingora begins again with what it has kept, which is all.
                    passed.bytes = 0;
                    passed.rated_bytes = 0;
                }
            }
        }
    }

    /// The answer passes to the client: there is no other attempt, and nothing is held for one.
    pub(super) fn let_go(&mut self) {
        if matches!(self, Self::Held { is_sent: true, .. }) {
            *self = Self::Empty;
        }
    }

    /// What there is of the request for the backend that was connected to.
    pub(super) fn request<'a>(&self, client: &'a ClientBounds) -> Request<'a> {
        match self {
            Self::Held { bytes, .. } if bytes.len() > LITTLE_BYTES_MAX => Request::Much,
            Self::Empty | Self::Held { .. } => Request::Little,
            Self::Passing { .. } => Request::Comes(client),
        }
    }
}

/// Bounds how long a client may send or take nothing, and lets it send its next request while this one is answered.
/// Pingora's own bounds are: while a body is sent 60 s, between requests and on writing none.
pub(super) fn bound_client(session: &mut Session, exchange: &Exchange) {
    let bounds = &exchange.arrived.runtime.snapshot.client;
    session.set_read_timeout(Some(bounds.body_timeout));
    session.set_write_timeout(Some(bounds.write_timeout));
    // Pingora takes a chunk without a size for the last one: what follows chunks is not read on, in case
    // that somebody in front of us takes it for a part of the body.
    let has_chunks = session.req_header().headers.contains_key(TRANSFER_ENCODING);
    session.set_pipelining_enabled(!has_chunks);
    if bounds.half_close {
        session.set_abort_on_close(false);
    }
    if session.get_keepalive().is_some() {
        keep_alive(session, bounds);
    }
}

/// Keeps the connection for another request.
pub(super) fn keep_alive(session: &mut Session, bounds: &ClientBounds) {
    session.set_keepalive(Some(bounds.idle_timeout.as_secs().max(1)));
}

/// Refuses a body that says it is larger than allowed.
pub(super) fn check_length(session: &Session, bounds: &ClientBounds) -> Result<(), Refusal> {
    let bytes_max = bounds.body_bytes_max;
    match length(session) {
        Some(length) if bytes_max > 0 && length > bytes_max => {
            Err(Refusal::BodyTooLarge { bytes_max })
        }
        _ => Ok(()),
    }
}

fn length(session: &Session) -> Option<usize> {
    let length = session.req_header().headers.get(CONTENT_LENGTH)?.to_str().ok()?;
    // Pingora has checked that several of them are the same.
    length.split(',').next()?.trim().parse().ok()
}

/// Reads the body if it can be held.
///
/// # Errors
/// When the client breaks off or breaks the protocol; [`Exchange::observed`] says if it was too slow.
pub(super) async fn hold(
    proxy: &Proxy,
    session: &mut Session,
    exchange: &mut Exchange,
) -> Result<()> {
    if session.as_mut().is_body_empty() || session.is_upgrade_req() {
        return Ok(());
    }
    let runtime = Arc::clone(&exchange.arrived.runtime);
    let bounds = &runtime.snapshot.client;
    let replay = runtime.snapshot.replay;
    let length = length(session);
    let wants_retries =
        exchange.admitted.as_ref().is_some_and(|it| it.pool.spec().retry.retries_max > 0);
    let began = Instant::now();
    let mut reader = Reader {
        bytes: BytesMut::new(),
        first: Bytes::new(),
        share: HeldShare::none(&proxy.lifecycle.held),
        total_max: replay.total_bytes_max,
        began,
    };
    let read_max = match length {
        Some(length) if length <= replay.body_bytes_max => length,
        Some(_) => 0,
        None => UNSIZED_BYTES_MAX.min(replay.body_bytes_max),
    };
    let end = if wants_retries && read_max > 0 {
        reader.read(session, length, read_max, bounds, exchange).await?
    } else {
        End::More
    };
    let is_whole = end == End::Whole && !session.as_ref().retry_buffer_truncated();
    let bytes = reader.take();
    reader.share.shrink(bytes.len());
    exchange.body = if is_whole {
        Body::Held { bytes, _share: reader.share, is_sent: false }
    } else {
        let is_buffered = bytes.is_empty() || session.as_ref().get_retry_buffer().is_some();
        // What Pingora has kept it begins with by itself.
        let prefix = if is_buffered { Bytes::new() } else { bytes };
        let passed = Passed {
            bytes: prefix.len(),
            rated_bytes: prefix.len(),
            began,
            paused: None,
            is_begun: false,
            is_buffered,
        };
        Body::Passing { prefix, _share: reader.share, passed }
    };
    Ok(())
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
}

impl Reader {
    async fn read(
        &mut self,
        session: &mut Session,
        length: Option<usize>,
        read_max: usize,
        bounds: &ClientBounds,
        exchange: &mut Exchange,
    ) -> Result<End> {
        let mut is_last_part = false;
        loop {
            let left = length.map(|length| length.saturating_sub(self.length()));
            let next = left.unwrap_or(REPLAY_BUFFER_BYTES);
            if !is_last_part && next <= REPLAY_BUFFER_BYTES {
                // There is no way back from here: room for all of the rest is needed.
                if !self.share.grow(next, self.total_max) {
                    return Ok(End::More);
                }
                session.as_mut().enable_retry_buffering();
                is_last_part = true;
            }
            let patience = patience(self.began, bounds);
            let chunk = tokio::time::timeout(patience, session.as_mut().read_request_body());
            let chunk = tokio::select! {
                biased;
                chunk = chunk => chunk,
                stop = exchange.watch.ended() => return Err(ended(exchange, stop)),
            };
            let chunk = match chunk {
                Ok(chunk) => chunk.map_err(Error::into_down)?,
                Err(_) => return Err(too_slow(exchange)),
            };
            let Some(chunk) = chunk else { return Ok(End::Whole) };
            if is_slow(self.length() + chunk.len(), self.began, bounds) {
                return Err(too_slow(exchange));
            }
            let has_room = is_last_part || self.share.grow(chunk.len(), self.total_max);
            self.push(chunk, length);
            if !has_room || length.is_none() && self.length() >= read_max {
                return Ok(End::More);
            }
        }
    }

    fn length(&self) -> usize {
        if self.bytes.is_empty() { self.first.len() } else { self.bytes.len() }
    }

    fn push(&mut self, chunk: Bytes, length: Option<usize>) {
        if self.length() == 0 {
            self.first = chunk;
            return;
        }
        if self.bytes.is_empty() {
            // Not all that the client says: memory is taken for what has come.
            let likely = length.unwrap_or(0).min(1024 * 1024);
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
}

/// How long the next piece is waited for.
fn patience(began: Instant, bounds: &ClientBounds) -> Duration {
    bounds.body_timeout.min(bounds.body_deadline.saturating_sub(began.elapsed()))
}

/// Whether a body comes more slowly than allowed.
fn is_slow(bytes: usize, began: Instant, bounds: &ClientBounds) -> bool {
    let elapsed = began.elapsed();
    let seconds = elapsed.saturating_sub(RATE_GRACE).as_secs() as usize;
    let expected = seconds.saturating_mul(bounds.body_rate_min);
    bytes < expected || elapsed > bounds.body_deadline
}

fn too_slow(exchange: &mut Exchange) -> Box<Error> {
    exchange.observed.client_fault = Some(Refusal::BodySlow);
    Error::explain(ErrorType::ReadTimedout, "the body comes too slowly").into_down()
}

fn ended(exchange: &mut Exchange, stop: Stop) -> Box<Error> {
    exchange.attempts.failure = Some(exchange.stop_refusal(stop));
    Error::explain(ErrorType::ReadTimedout, "stopped while the body came").into_up()
}

/// A chunk goes to a backend; of a held body, all of it.
///
/// # Errors
/// When the body is larger or slower than allowed.
pub(super) fn send(
    exchange: &mut Exchange,
    chunk: &mut Option<Bytes>,
    end_of_stream: bool,
) -> Result<()> {
    let runtime = Arc::clone(&exchange.arrived.runtime);
    let bounds = &runtime.snapshot.client;
    match &mut exchange.body {
        Body::Empty => {}
        Body::Held { bytes, is_sent, .. } => {
            *chunk = Some(bytes.clone());
            *is_sent = true;
        }
        Body::Passing { prefix, passed, .. } => {
            let chunk_bytes = chunk.as_ref().map_or(0, Bytes::len);
            passed.is_begun = true;
            passed.bytes += chunk_bytes;
            passed.rated_bytes += chunk_bytes;
            if !prefix.is_empty() {
                let prefix = std::mem::take(prefix);
                *chunk = Some(match chunk.take() {
                    Some(next) => [prefix, next].concat().into(),
                    None => prefix,
                });
            }
            if bounds.body_bytes_max > 0 && passed.bytes > bounds.body_bytes_max {
                let bytes_max = bounds.body_bytes_max;
                exchange.observed.client_fault = Some(Refusal::BodyTooLarge { bytes_max });
                return Err(Error::explain(ErrorType::ReadError, "too large a body").into_down());
            }
            if exchange.watch.take_stall() {
                passed.rated_bytes = 0;
                passed.began = Instant::now();
            }
            if !end_of_stream && is_slow(passed.rated_bytes, passed.began, bounds) {
                return Err(too_slow(exchange));
            }
        }
    }
    if end_of_stream {
        // An HTTP/2 client may end its body with an empty frame. Passed on as a chunk, Pingora would
        // write the end of a chunked body twice (cloudflare/pingora issue 935).
        if chunk.as_ref().is_some_and(Bytes::is_empty) {
            *chunk = None;
        }
        exchange.watch.uploaded();
    } else {
        exchange.watch.uploading();
    }
    Ok(())
}

/// Whether a request may be sent twice without harm (RFC 9110, section 9.2.2), or its client says so.
pub(super) fn is_idempotent(session: &Session) -> bool {
    let head = session.req_header();
    !matches!(head.method, Method::POST | Method::PATCH)
        || head.headers.contains_key("idempotency-key")
}

/// Returns when an HTTP/2 client takes its request back. The watch looks after those of HTTP/1.
pub(super) async fn taken_back(session: &mut Session) {
    if let ServerSession::H2(session) = session.as_mut() {
        let _ = session.idle().await;
        return;
    }
    std::future::pending().await
}
