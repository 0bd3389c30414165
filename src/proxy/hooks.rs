//! What the configuration has done with an exchange: hooks of the model that it was first for, at each moment.

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, TRANSFER_ENCODING};
use http::response::Parts;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use percent_encoding::percent_decode;
use pingora::http::RequestHeader;
use pingora_core::{Error, ErrorType, Result};
use pingora_proxy::Session;

use super::admit::split_target;
use super::cached::Served;
use super::course::Look;
use super::exchange::{Admitted, Exchange};
use super::{Proxy, body, heads, meter, send};
use crate::auth::Grant;
use crate::expression::{Expression, Facts, Request};
use crate::hooks::{AnswerHead, Bodies, Chain, Cut, Elsewhere, Notes, Runs, Settled, Stop};
use crate::lifecycle::HeldShare;
use crate::refusal::Refusal;
use crate::runtime::Way;
use crate::telemetry::Taken;

/// What is held of an answer is counted in steps of this.
const COUNTED_BYTES: usize = 64 * 1024;

/// The hooks of an exchange.
#[derive(Default)]
pub(super) struct Hooks {
    /// None: it has none, or is not that far yet.
    chain: Option<Arc<Chain>>,
    /// What they and other conditions are told, where there are any.
    known: Option<Box<Known>>,
    /// Those that ran.
    pub(super) runs: Runs,
    /// What the request log is told.
    pub(super) notes: Notes,
    /// Whether one of them has answered.
    pub(super) has_answered: bool,
    /// What the answer's body goes through.
    bodies: Bodies,
    /// Bytes of the answer that have come and not passed, about; and what is counted of them.
    held_bytes: usize,
    share: Option<HeldShare>,
    /// Who gets a copy of the request, as `service/model`.
    pub(super) mirrors: Vec<Arc<str>>,
    /// Why one of them has ended the answer.
    pub(super) cut: Option<Box<Refusal>>,
}

impl Hooks {
    /// Whether a condition holds for the request; what cannot be told counts as if it did.
    pub(super) fn holds(&self, when: &Expression) -> bool {
        let Some(known) = &self.known else { return true };
        let request = &known.request();
        when.holds(&Facts { request, headers: &known.headers, answer: None }).unwrap_or(true)
    }

    /// As [`Hooks::holds`], now that all is over: the last backend, and what the client was sent.
    pub(super) fn held(&self, when: &Expression, end: (&str, u16)) -> bool {
        let Some(known) = &self.known else { return true };
        when.holds(&Facts::at_end(&known.request(), &known.headers, end)).unwrap_or(true)
    }
}

/// Why a request does not go on.
pub(super) enum Halt {
    /// The client may not have what it asks for.
    Refused(Refusal),
    /// The client is told this.
    Answered(Box<Response<Bytes>>),
    /// There is an answer that another request was given.
    Served(Box<Served>),
}

impl From<Refusal> for Halt {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Stop> for Halt {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Answer(answer) => Self::Answered(answer),
            Stop::Refuse { status, code, message } => {
                Self::Refused(Refusal::Hook { status, code, message })
            }
        }
    }
}

/// What is known of a request, of its own: its headers are changed meanwhile.
struct Known {
    /// As they were changed; where they are needed after that.
    headers: HeaderMap,
    method: Method,
    path: String,
    host: String,
    body_bytes: Option<usize>,
    stream: bool,
    address: Option<IpAddr>,
    grant: Arc<Grant>,
    service: String,
    model: String,
    asked: String,
}

/// A path as it is meant: decoded, and without empty segments. Those that no two servers read alike were refused.
fn plain(path: &[u8]) -> String {
    let path = percent_decode(path).decode_utf8_lossy();
    let mut plain = String::with_capacity(path.len());
    for letter in path.chars() {
        if letter != '/' || !plain.ends_with('/') {
            plain.push(letter);
        }
    }
    plain
}

impl Known {
    fn of(session: &Session, exchange: &Exchange, admitted: &Admitted) -> Self {
        let head: &RequestHeader = session.req_header();
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).unwrap_or_default().to_owned();
        let (service, model) = meter::model(admitted);
        let asked = admitted.asked.as_ref();
        Self {
            headers: HeaderMap::new(),
            method: head.method.clone(),
            path: plain(split_target(head).0),
            host: text(send::host(head).unwrap_or_default()),
            body_bytes: exchange.body.held_bytes().or_else(|| body::length(session)),
            // Of a body that is not here as a whole, it may say so further on.
            stream: match exchange.body.facts().and_then(|facts| facts.stream) {
                Some(stream) => stream,
                None => exchange.body.is_passing(),
            },
            address: admitted.client.address,
            grant: Arc::clone(&admitted.rights.grant),
            service: service.to_owned(),
            model: model.to_owned(),
            asked: asked.map(|asked| asked.name.clone()).unwrap_or_default(),
        }
    }

    fn request(&self) -> Request<'_> {
        Request {
            method: self.method.as_str(),
            path: &self.path,
            host: &self.host,
            body_bytes: self.body_bytes,
            stream: self.stream,
            address: self.address,
            key_id: &self.grant.key_id,
            key_name: &self.grant.name,
            labels: &self.grant.labels,
            service: &self.service,
            model: &self.model,
            asked: &self.asked,
        }
    }
}

/// A request may pass: its hooks have their say. The way that it goes, if not its own.
///
/// # Errors
/// When its head cannot be put together again; it was read as one.
pub(super) fn request(
    session: &mut Session,
    exchange: &mut Exchange,
    admitted: &Admitted,
    look: Option<Look>,
) -> Result<Result<Option<Arc<Way>>, Halt>> {
    let has_conditions = exchange.arrived.runtime.snapshot.has_conditions;
    let Some(chain) = admitted.to().hooks.clone() else {
        if has_conditions {
            let mut known = Known::of(session, exchange, admitted);
            known.headers = session.req_header().headers.clone();
            exchange.hooks.known = Some(Box::new(known));
        }
        return Ok(Ok(None));
    };
    let is_blind = chain.wants_body() || chain.wants_answer_body();
    if is_blind && body::is_tunnel_request(session) {
        let message = "what passes over a WebSocket cannot be looked at, and here it has to be";
        let (status, code) = (StatusCode::BAD_REQUEST, "websocket_unsupported");
        let message = message.to_owned();
        return Ok(Err(Refusal::Hook { status, code, message }.into()));
    }
    let replay = exchange.arrived.runtime.snapshot.replay;
    let (mut held, mut is_unheld) = (None, false);
    if chain.wants_body() {
        let coding = session.req_header().headers.get(CONTENT_ENCODING);
        let coding = coding.map(HeaderValue::as_bytes).unwrap_or_default();
        held = match exchange.body.decoded(coding, &replay) {
            Ok(held) => held,
            Err(why) if is_needed(&chain, session, exchange, admitted) => {
                let refusal = why.unwrap_or_else(|| body::why_not_held(session, &replay));
                return Ok(Err(refusal.into()));
            }
            Err(_) => {
                is_unheld = true;
                None
            }
        };
    }
    let before = held.clone();
    let mut known = Known::of(session, exchange, admitted);
    let Hooks { runs, notes, .. } = &mut exchange.hooks;
    let done = heads::change_request(session.req_header_mut(), |headers| {
        chain.request(&known.request(), headers, held.as_mut(), (runs, notes))
    })?;
    if has_conditions || chain.wants_end() {
        known.headers = session.req_header().headers.clone();
    }
    exchange.hooks.known = Some(Box::new(known));
    exchange.hooks.chain = Some(Arc::clone(&chain));
    let Elsewhere { route, mirrors } = match done {
        Ok(elsewhere) => elsewhere,
        Err(stop) => {
            exchange.hooks.has_answered = true;
            return Ok(Err(stop.into()));
        }
    };
    // What one hook changes in the head may be what another one acts by.
    if is_unheld && is_needed(&chain, session, exchange, admitted) {
        return Ok(Err(body::why_not_held(session, &replay).into()));
    }
    // What takes its place has a place of its own.
    let place = |bytes: &Bytes| (bytes.as_ptr(), bytes.len());
    if let Some(bytes) = held
        && before.is_some_and(|before| place(&before) != place(&bytes))
    {
        let headers = &session.req_header().headers;
        if let Err(refusal) = exchange.body.edit(bytes, look, headers, &replay) {
            return Ok(Err(refusal.into()));
        }
    }
    exchange.hooks.mirrors = mirrors;
    let routes = &exchange.arrived.runtime.routes;
    Ok(Ok(route.and_then(|to| routes.get(&*to).cloned())))
}

/// Whether a hook that acts on this request acts on its body.
fn is_needed(chain: &Chain, session: &Session, exchange: &Exchange, admitted: &Admitted) -> bool {
    let known = Known::of(session, exchange, admitted);
    chain.needs_body(&known.request(), &session.req_header().headers)
}

/// Whether bodies of answers are looked at: then they may not be compressed.
pub(super) fn wants_answer_body(exchange: &Exchange) -> bool {
    exchange.hooks.chain.as_ref().is_some_and(|chain| chain.wants_answer_body())
}

/// The head of an answer goes to the client.
pub(super) fn answer(session: &Session, answer: &mut Parts, exchange: &mut Exchange) {
    let (Some(chain), Some(known)) = (&exchange.hooks.chain, &exchange.hooks.known) else { return };
    let backend = exchange.attempts.current.as_ref();
    let (wants_head, wants_body) = (chain.wants_answer(), chain.wants_answer_body());
    if !wants_head && !wants_body {
        return;
    }
    let mut head = AnswerHead {
        request: &known.request(),
        request_headers: &session.req_header().headers,
        backend: backend.map_or("", |attempt| attempt.backend().spec.id.as_str()),
        status: answer.status.as_u16(),
        headers: &mut answer.headers,
    };
    let runs = &mut exchange.hooks.runs;
    if wants_head {
        chain.answer(&mut head, runs);
    }
    if wants_body && session.req_header().method != Method::HEAD {
        exchange.hooks.bodies = chain.answer_body(&head, runs);
    }
    if !exchange.hooks.bodies.is_empty() && answer.headers.remove(CONTENT_LENGTH).is_some() {
        answer.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
}

/// Whether the body of an answer cannot be looked at, though it has to be.
pub(super) fn is_unreadable(answer: &HeaderMap, exchange: &Exchange) -> bool {
    let coding = answer.get(CONTENT_ENCODING).map(HeaderValue::as_bytes).unwrap_or_default();
    !exchange.hooks.bodies.is_empty() && !body::is_plain(coding)
}

/// A piece of the answer passes, or its end.
///
/// # Errors
/// When the answer ends here.
pub(super) fn pass(
    proxy: &Proxy,
    exchange: &mut Exchange,
    piece: &mut Option<Bytes>,
    is_end: bool,
) -> Result<()> {
    if exchange.hooks.bodies.is_empty() {
        return Ok(());
    }
    let came = piece.as_ref().map_or(0, Bytes::len);
    match exchange.hooks.bodies.pass(piece, is_end) {
        Ok(()) => {
            let passes = piece.as_ref().map_or(0, Bytes::len);
            hold(proxy, exchange, came, if is_end { usize::MAX } else { passes })
        }
        Err(Cut { code, message }) => {
            let status = StatusCode::BAD_GATEWAY;
            exchange.hooks.has_answered = true;
            exchange.hooks.cut = Some(Box::new(Refusal::Hook { status, code, message }));
            Err(Error::explain(ErrorType::InternalError, "ended by a hook"))
        }
    }
}

/// Counts what hooks hold of an answer, as far as it is much.
///
/// # Errors
/// When there is no room for it.
fn hold(proxy: &Proxy, exchange: &mut Exchange, came: usize, passes: usize) -> Result<()> {
    let total_max = exchange.arrived.runtime.snapshot.replay.total_bytes_max;
    let Hooks { held_bytes, share, cut, .. } = &mut exchange.hooks;
    *held_bytes = (*held_bytes + came).saturating_sub(passes);
    let counted = *held_bytes / COUNTED_BYTES * COUNTED_BYTES;
    if counted == 0 && share.is_none() {
        return Ok(());
    }
    let share = share.get_or_insert_with(|| HeldShare::none(&proxy.lifecycle.held));
    let more = counted.saturating_sub(share.bytes());
    share.shrink(counted);
    if more == 0 || share.grow(more, total_max) {
        return Ok(());
    }
    *cut = Some(Box::new(Refusal::TooManyBodies));
    Err(Error::explain(ErrorType::InternalError, "no room for what a hook has to look at"))
}

/// The exchange is over, and this is what became of it.
pub(super) fn settled(
    exchange: &mut Exchange,
    status: u16,
    taken: Option<&Taken>,
    is_aborted: bool,
) {
    let Hooks { bodies, runs, notes, .. } = &mut exchange.hooks;
    bodies.end(runs, notes);
    let Some(chain) = exchange.hooks.chain.take().filter(|chain| chain.wants_end()) else { return };
    let Some(known) = &exchange.hooks.known else { return };
    let backend = exchange.attempts.current.as_ref();
    let end = Settled {
        request: &known.request(),
        headers: &known.headers,
        backend: backend.map_or("", |attempt| attempt.backend().spec.id.as_str()),
        status,
        duration: exchange.arrived.at.elapsed(),
        first_byte: exchange.observed.first_piece,
        tokens: taken.map(|taken| (taken.input, taken.output)),
        is_aborted,
    };
    chain.settled(&end, &mut exchange.hooks.runs);
}
