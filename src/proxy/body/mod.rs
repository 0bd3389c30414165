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

mod change;
mod hold;
mod look;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderValue, Method};
use pingora_core::protocols::http::ServerSession;
use pingora_core::{Error, ErrorType, Result};
use pingora_proxy::Session;

pub(super) use change::Resized;
pub(super) use hold::hold;
use look::Looking;

use super::exchange::Exchange;
use super::watch::Request;
use crate::config::{ClientBounds, ReplayBounds};
use crate::lifecycle::HeldShare;
use crate::llm::{self, Facts, Found, Peek};
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

/// A request's body.
#[derive(Debug, Default)]
pub(super) struct Body {
    content: Content,
    /// Where it names the model, if that was looked for.
    place: Option<Place>,
    /// Whether it was looked for, and may be where it was not seen.
    is_unclear: bool,
    /// What else it says of the answer that it wants, if that was looked for.
    facts: Option<Box<Facts>>,
    /// What goes to the backend of the current attempt in that place.
    splice: Option<Splice>,
    /// Whether that backend is asked for usage which the client did not ask for.
    asks_for_usage: bool,
    /// Whether it is not what the client sent any more, and not compressed.
    is_edited: bool,
}

/// What becomes of a body.
#[derive(Debug, Default)]
enum Content {
    /// There is none.
    #[default]
    Empty,
    /// All of it is here.
    Held { bytes: Bytes, share: HeldShare, is_sent: bool },
    /// It passes as it comes, after what was read of it already and Pingora has not kept. It is looked
    /// at for a second name.
    Passing { prefix: Bytes, share: HeldShare, passed: Passed, looking: Looking },
}

/// Where a body names the model.
#[derive(Clone, Debug)]
struct Place {
    /// The name that came; empty if none did.
    name: String,
    /// Its bytes, decoded if the body is compressed.
    at: Range<usize>,
    /// What goes before and behind one that is put where none was.
    around: (Vec<u8>, &'static [u8]),
    is_form: bool,
    is_coded: bool,
}

/// Other bytes in the place of some that came.
#[derive(Debug)]
enum Splice {
    /// All of the body. The one that came is held too: the next backend may have yet another name.
    Whole { bytes: Bytes, _share: HeldShare },
    /// In the chunk that holds the place.
    At(Range<usize>, Bytes),
}

/// How much of a body has passed, and since when.
#[derive(Debug)]
struct Passed {
    bytes: usize,
    /// What of it was looked into.
    looked_bytes: usize,
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

impl Passed {
    /// Of a body of which so many bytes were read; those that Pingora has kept, behind the prefix, come
    /// again.
    fn new(bytes: usize, prefix_bytes: usize, began: Instant) -> Self {
        Self {
            bytes: prefix_bytes,
            looked_bytes: bytes,
            rated_bytes: prefix_bytes,
            began,
            paused: None,
            is_begun: false,
            is_buffered: prefix_bytes == 0,
        }
    }
}

impl Place {
    /// Where the name is that was looked for, or could be put.
    fn of(peek: &Peek, fills: bool) -> Option<Self> {
        let (is_form, is_coded) = (peek.is_form(), peek.is_coded());
        if let Some(Found { text, at }) = peek.found() {
            let (name, at) = (text.clone(), at.clone());
            return Some(Self { name, at, around: (Vec::new(), b""), is_form, is_coded });
        }
        // Of a complete body, which what was read of it then is.
        let gap = peek.gap().filter(|_| peek.is_done() && fills)?;
        let around = (gap.before, gap.after);
        Some(Self { name: String::new(), at: gap.at, around, is_form, is_coded })
    }
}

impl Body {
    /// Whether another backend can be sent all of it.
    pub(super) fn is_replayable(&self) -> bool {
        match &self.content {
            Content::Empty | Content::Held { .. } => true,
            Content::Passing { passed, .. } => !passed.is_begun,
        }
    }

    /// Whether more of it has to come from the client.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self.content, Content::Passing { .. })
    }

    /// Whether the backend that closed a kept connection can be sent it on another one.
    pub(super) fn is_kept(&self, session: &Session) -> bool {
        match &self.content {
            Content::Passing { passed, .. } if passed.is_begun => {
                passed.is_buffered && !session.as_ref().retry_buffer_truncated()
            }
            _ => true,
        }
    }

    /// How long it is, where it is held.
    pub(super) fn held_bytes(&self) -> Option<usize> {
        match &self.content {
            Content::Held { bytes, .. } => Some(bytes.len()),
            Content::Empty | Content::Passing { .. } => None,
        }
    }

    /// A backend is looked for: nothing of it is read meanwhile.
    pub(super) fn pause(&mut self) {
        if let Content::Passing { passed, .. } = &mut self.content {
            passed.paused.get_or_insert_with(Instant::now);
        }
    }

    /// A backend is about to be sent it.
    pub(super) fn begin_attempt(&mut self) {
        match &mut self.content {
            Content::Empty => {}
            Content::Held { is_sent, .. } => *is_sent = false,
            Content::Passing { passed, .. } => {
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
        if matches!(self.content, Content::Held { is_sent: true, .. }) {
            self.content = Content::Empty;
            self.splice = None;
        }
    }

    /// All of it has been looked at.
    fn looked_at(&mut self) {
        if let Content::Passing { looking, .. } = &mut self.content {
            if let Some(facts) = looking.peek.as_deref().and_then(Peek::facts) {
                self.facts = Some(Box::new(facts.clone()));
            }
            looking.stop();
        }
    }

    /// What there is of the request for the backend that was connected to.
    pub(super) fn request<'a>(&self, client: &'a ClientBounds) -> Request<'a> {
        match &self.content {
            Content::Held { bytes, .. } if bytes.len() > LITTLE_BYTES_MAX => Request::Much,
            Content::Empty | Content::Held { .. } => Request::Little,
            Content::Passing { .. } => Request::Comes(client),
        }
    }

    /// Whether the name in it can be changed, if it names a model at all.
    pub(super) fn can_rename(&self) -> bool {
        let is_coded = self.place.as_ref().is_some_and(|place| place.is_coded);
        let is_stuck = is_coded && matches!(self.content, Content::Passing { .. });
        !is_stuck && !self.is_unclear
    }

    /// What it says of the answer that it wants, if that was looked for, as far as it has come.
    pub(super) fn facts(&self) -> Option<&Facts> {
        let passing = match &self.content {
            Content::Passing { looking, .. } => looking.peek.as_deref().and_then(Peek::facts),
            Content::Empty | Content::Held { .. } => None,
        };
        passing.or(self.facts.as_deref())
    }

    /// How much of it has been looked at, where more is to come.
    pub(super) fn looked_bytes(&self) -> Option<usize> {
        match &self.content {
            Content::Passing { passed, .. } => Some(passed.looked_bytes),
            Content::Empty | Content::Held { .. } => None,
        }
    }

    /// Whether the backend was asked for usage which the client did not ask for.
    pub(super) fn asks_for_usage(&self) -> bool {
        self.asks_for_usage
    }
}

/// Whether a `Content-Encoding` is none.
pub(super) fn is_plain(coding: &[u8]) -> bool {
    matches!(coding.trim_ascii(), b"" | b"identity")
}

/// Whether a request asks for a WebSocket (RFC 6455, section 4.1). Others may offer an upgrade that nobody
/// takes: some clients do so with every request.
pub(super) fn is_tunnel_request(session: &Session) -> bool {
    let head = session.req_header();
    let upgrade = head.headers.get(UPGRADE).map(HeaderValue::as_bytes).unwrap_or_default();
    session.is_upgrade_req()
        && head.method == Method::GET
        && upgrade.trim_ascii().eq_ignore_ascii_case(b"websocket")
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

/// The body's length, as the client says.
pub(super) fn length(session: &Session) -> Option<usize> {
    let length = session.req_header().headers.get(CONTENT_LENGTH)?.to_str().ok()?;
    // Pingora has checked that several of them are the same.
    length.split(',').next()?.trim().parse().ok()
}

/// Why a body is not here as a whole, though it would have to be.
pub(super) fn why_not_held(session: &Session, replay: &ReplayBounds) -> Refusal {
    let bytes_max = replay.body_bytes_max;
    match length(session) {
        None => Refusal::LengthRequired,
        Some(length) if length > bytes_max => Refusal::BodyTooLarge { bytes_max },
        Some(_) => Refusal::TooManyBodies,
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

/// A chunk goes to a backend; of a held body, all of it.
///
/// # Errors
/// When the body is larger or slower than allowed, or names a second model.
pub(super) async fn send(
    exchange: &mut Exchange,
    chunk: &mut Option<Bytes>,
    end_of_stream: bool,
    is_tunnel: bool,
) -> Result<()> {
    let runtime = Arc::clone(&exchange.arrived.runtime);
    let bounds = &runtime.snapshot.client;
    if is_tunnel {
        exchange.watch.heard();
        return Ok(());
    }
    let attempt = exchange.attempts.current.as_ref();
    if let Some(gate) = attempt.and_then(|attempt| attempt.gate.as_ref())
        && end_of_stream
    {
        gate.request_ended();
    }
    let Body { content, splice, .. } = &mut exchange.body;
    match content {
        Content::Empty => {}
        Content::Held { bytes, is_sent, .. } => {
            *chunk = Some(match splice {
                Some(Splice::Whole { bytes, .. }) => bytes.clone(),
                _ => bytes.clone(),
            });
            *is_sent = true;
        }
        Content::Passing { prefix, share, passed, looking } => {
            let chunk_bytes = chunk.as_ref().map_or(0, Bytes::len);
            let before = passed.bytes;
            let known = passed.looked_bytes.saturating_sub(before).min(chunk_bytes);
            passed.looked_bytes += chunk_bytes - known;
            passed.is_begun = true;
            passed.bytes += chunk_bytes;
            passed.rated_bytes += chunk_bytes;
            let looked = looking.look(&chunk.as_deref().unwrap_or_default()[known..]).await;
            put_before(std::mem::take(prefix), before, splice.as_ref(), chunk);
            share.shrink(0);
            if let Err(refusal) = looked {
                exchange.observed.client_fault = Some(refusal);
                return Err(Error::explain(ErrorType::ReadError, "the body is refused").into_down());
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
        exchange.body.looked_at();
    } else {
        exchange.watch.uploading();
    }
    Ok(())
}

/// Puts what was read ahead, if anything, before a chunk that begins after `before` bytes; and another name in
/// its place, where that is in it.
fn put_before(prefix: Bytes, before: usize, splice: Option<&Splice>, chunk: &mut Option<Bytes>) {
    let begins = before - prefix.len();
    if !prefix.is_empty() {
        *chunk = Some(match chunk.take() {
            Some(next) => [prefix, next].concat().into(),
            None => prefix,
        });
    }
    if let (Some(Splice::At(at, raw)), Some(whole)) = (splice, &chunk)
        && at.start >= begins
        && at.start < begins + whole.len()
        && at.end <= begins + whole.len()
    {
        let at = at.start - begins..at.end - begins;
        *chunk = Some(llm::spliced(whole, at, raw).into());
    }
}

/// Whether a request may be sent twice without harm (RFC 9110, section 9.2.2), or its client says so.
pub(super) fn is_idempotent(session: &Session) -> bool {
    let head = session.req_header();
    !matches!(head.method, Method::POST | Method::PATCH)
        || head.headers.contains_key("idempotency-key")
}

/// Returns when an HTTP/2 client takes its request back, or nobody waits for its answer. The watch looks after those of
/// HTTP/1.
pub(super) async fn taken_back(session: &mut Session) {
    let _ = match session.as_mut() {
        ServerSession::H2(session) => session.idle().await.map(|_| ()),
        ServerSession::Subrequest(session) => session.idle().await.map(|_| ()),
        _ => std::future::pending().await,
    };
}
