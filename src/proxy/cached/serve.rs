//! Giving a client an answer that another request was given.

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use http::response::Parts;
use http::{HeaderValue, Response, StatusCode};
use pingora::http::ResponseHeader;
use pingora_core::{Error, ErrorType, Result};
use pingora_proxy::Session;

use super::super::course::X_TOLLGATE_MODEL;
use super::super::exchange::{Events, Exchange};
use super::super::select::gone;
use super::super::{Proxy, admit, body, hooks, limit, receive, respond, settle};
use super::{Served, tell};
use crate::cache::{End, Flight, Next};
use crate::llm::{EndMarker, Kind, Tail, Usage};
use crate::refusal::Refusal;
use crate::telemetry::{Phase, REQUEST_ID};

/// Answers with what another request was answered with. Hooks have their say about it, as about any answer.
///
/// # Errors
/// When the client is gone; or the answer was cut, which then must not look whole.
pub(in super::super) async fn serve(
    proxy: &Proxy,
    session: &mut Session,
    exchange: &mut Exchange,
    served: Served,
) -> Result<()> {
    exchange.turn(Phase::Answer);
    exchange.observed.status = StatusCode::OK.as_u16();
    let elapsed = exchange.arrived.at.elapsed();
    exchange.observed.first_byte.get_or_insert(elapsed);
    if let Some(metering) = &mut exchange.metering {
        metering.is_sent = true;
    }
    match served {
        Served::Kept(answer) => {
            let is_stream = answer.kind() != Kind::Json;
            exchange.observed.first_piece.get_or_insert(elapsed);
            exchange.cached.saved = Some(answer.usage());
            let length = (!is_stream).then(|| answer.body().len());
            let head = head(session, exchange, answer.content_type(), length);
            let mut body = Some(answer.body().clone());
            hooks::pass(proxy, exchange, &mut body, true)?;
            write_head(session, exchange, head).await?;
            finish(proxy, session, exchange, body).await
        }
        Served::Coming(flight, listener, head) => {
            let head = self::head(session, exchange, &head.content_type, None);
            write_head(session, exchange, head).await?;
            let followed = follow(proxy, session, exchange, &flight).await;
            drop(listener);
            exchange.cached.saved = Some(followed?);
            let mut rest = None;
            hooks::pass(proxy, exchange, &mut rest, true)?;
            finish(proxy, session, exchange, rest).await
        }
    }
}

/// The head of an answer that no backend gave to this request.
fn head(
    session: &mut Session,
    exchange: &mut Exchange,
    content_type: &HeaderValue,
    length: Option<usize>,
) -> Parts {
    let (mut head, ()) = Response::new(()).into_parts();
    let headers = &mut head.headers;
    headers.insert(CONTENT_TYPE, content_type.clone());
    match length {
        Some(length) => {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        None => {
            headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            exchange.observed.is_stream = true;
            let kind = Kind::of(content_type.as_bytes());
            let path = admit::split_target(session.req_header()).0;
            let events = Events {
                tail: Tail::default(),
                passed: 0,
                end: EndMarker::of_path(path),
                unwritten: None,
            };
            exchange.observed.events = (kind == Some(Kind::Events)).then_some(events);
        }
    }
    headers.insert(REQUEST_ID, exchange.arrived.request_id.clone());
    limit::tell(headers, &exchange.shown);
    respond::allow_origin(headers, exchange);
    if let Some(admitted) = exchange.admitted.as_ref().filter(|admitted| admitted.tells_model()) {
        headers.insert(X_TOLLGATE_MODEL, admitted.to().shown.clone());
    }
    tell(headers, exchange);
    hooks::answer(session, &mut head, exchange);
    head
}

async fn write_head(session: &mut Session, exchange: &Exchange, mut head: Parts) -> Result<()> {
    let has_chunks = head.headers.contains_key(TRANSFER_ENCODING);
    if has_chunks && (exchange.arrived.is_http_2 || exchange.arrived.is_http_10) {
        head.headers.remove(TRANSFER_ENCODING);
        if exchange.arrived.is_http_10 {
            // It knows no chunks: the body ends with the connection.
            session.set_keepalive(None);
        }
    }
    let head = Box::new(ResponseHeader::from(head));
    session.write_response_header(head, false).await.map_err(Error::into_down)
}

/// Passes a stream on as it comes, to its end; what a backend took for it.
async fn follow(
    proxy: &Proxy,
    session: &mut Session,
    exchange: &mut Exchange,
    flight: &Flight,
) -> Result<Usage> {
    let mut passed = 0;
    loop {
        let next = tokio::select! {
            biased;
            next = flight.next(passed) => next,
            stop = exchange.watch.ended() => {
                exchange.attempts.failure = Some(exchange.stop_refusal(stop));
                return Err(receive::stopped());
            }
            () = body::taken_back(session) => return gone(),
        };
        let pieces = match next {
            Next::Pieces(pieces) => pieces,
            Next::End(End::Whole(usage)) => return Ok(usage),
            Next::End(_) => {
                let pool = exchange.pool_name().to_owned();
                exchange.attempts.failure = Some(Refusal::BackendFailed { pool });
                let why = "the answer that it was given a share of was cut";
                let error = Error::explain(ErrorType::ConnectionClosed, why);
                return Err(error.into_up());
            }
        };
        let at = exchange.arrived.at;
        exchange.observed.first_piece.get_or_insert_with(|| at.elapsed());
        for piece in pieces {
            passed += 1;
            let mut piece = Some(piece);
            hooks::pass(proxy, exchange, &mut piece, false)?;
            let Some(piece) = piece.filter(|piece| !piece.is_empty()) else { continue };
            if let Some(events) = &mut exchange.observed.events {
                events.pass(&piece, session.body_bytes_sent());
            }
            let written = session.write_response_body(Some(piece), false).await;
            written.map_err(Error::into_down)?;
        }
    }
}

/// Writes the last of an answer. What was taken is given back before the client hears of the end.
async fn finish(
    proxy: &Proxy,
    session: &mut Session,
    exchange: &mut Exchange,
    rest: Option<Bytes>,
) -> Result<()> {
    if let (Some(events), Some(rest)) = (&mut exchange.observed.events, &rest) {
        events.pass(rest, session.body_bytes_sent());
    }
    exchange.watch.answered();
    settle::answered(proxy, session, exchange);
    session.write_response_body(rest, true).await.map_err(Error::into_down)
}
