//! Answers of the gateway's own: pages and refusals.

use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, CACHE_CONTROL, CONTENT_LENGTH,
    CONTENT_TYPE, TRANSFER_ENCODING, VARY,
};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use pingora::http::ResponseHeader;
use pingora_core::{Error, Result};
use pingora_proxy::Session;
use tokio::sync::mpsc;

use super::exchange::Exchange;
use super::limit;
use super::watch::Stop;
use crate::config::CorsOrigins;
use crate::limits::Reservation;
use crate::llm::Dialect;
use crate::refusal::Refusal;
use crate::telemetry::{self, Phase, REQUEST_ID};

/// How long a refused client may go on sending before its connection is cut. Closing at once would
/// reset the connection, and the client could lose the answer (RFC 9112, section 9.6).
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// What the last frame of an HTTP/2 stream has to be sent before the stream is reset: h2 drops what
/// it has not sent by then, and does not tell when it has.
const RESET_DELAY: Duration = Duration::from_millis(50);

/// So many headers are added to a page's own at most; or little more.
const HEADERS_ADDED: usize = 12;

/// How much of a refused request's body is read and thrown away, in bytes.
const LINGER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Sends a refusal and remembers it for the log.
pub(super) async fn refuse(
    session: &mut Session,
    exchange: &mut Exchange,
    refusal: Refusal,
) -> Result<()> {
    let mut headers = refusal.headers();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let body = refusal.body(exchange.arrived.dialect, exchange.request_id());
    let status = refusal.status();
    if refusal == Refusal::Draining {
        session.set_keepalive(None);
    }
    exchange.observed.refusal = Some(refusal);
    exchange.observed.status = status.as_u16();
    // What was reserved and not charged is free before the client hears of it.
    exchange.held = None;
    exchange.reservation = Reservation::default();
    exchange.turn(Phase::Answer);
    send(session, exchange, status, &headers, body.into()).await
}

/// Sends one of the gateway's own pages.
pub(super) async fn page(
    session: &mut Session,
    exchange: &Exchange,
    page: Response<Bytes>,
) -> Result<()> {
    let (head, body) = page.into_parts();
    send(session, exchange, head.status, &head.headers, body).await
}

/// Sends server-sent events of the gateway's own as they come, until there are no more or the client is gone.
pub(super) async fn live(
    session: &mut Session,
    exchange: &Exchange,
    mut pieces: mpsc::Receiver<Bytes>,
) -> Result<()> {
    let mut head = ResponseHeader::build(StatusCode::OK, Some(6))?;
    head.insert_header(CONTENT_TYPE, "text/event-stream")?;
    head.insert_header(CACHE_CONTROL, "no-store")?;
    // Otherwise nginx would hold it back.
    head.insert_header("x-accel-buffering", "no")?;
    head.insert_header(REQUEST_ID, exchange.arrived.request_id.clone())?;
    if exchange.arrived.is_http_10 {
        // It knows no chunks: the events end with the connection.
        session.set_keepalive(None);
    } else if !exchange.arrived.is_http_2 {
        head.insert_header(TRANSFER_ENCODING, "chunked")?;
    }
    let write = async {
        session.write_response_header(Box::new(head), false).await?;
        while let Some(piece) = pieces.recv().await {
            session.write_response_body(Some(piece), false).await?;
        }
        session.write_response_body(None, true).await
    };
    write.await.map_err(Error::into_down)
}

async fn send(
    session: &mut Session,
    exchange: &Exchange,
    status: StatusCode,
    headers: &HeaderMap,
    body: Bytes,
) -> Result<()> {
    let unread = !session.as_mut().is_body_done();
    if unread {
        session.set_keepalive(None);
    }
    let (mut head, ()) = Response::new(()).into_parts();
    head.status = status;
    head.headers.reserve(headers.len() + HEADERS_ADDED);
    head.headers.extend(headers.iter().map(|(name, value)| (name.clone(), value.clone())));
    head.headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    head.headers.insert(REQUEST_ID, exchange.arrived.request_id.clone());
    limit::tell(&mut head.headers, &exchange.shown);
    if !headers.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
        allow_origin(&mut head.headers, exchange);
    }
    let is_head = session.req_header().method == Method::HEAD;
    if status != StatusCode::NO_CONTENT {
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    }
    let head = ResponseHeader::from(head);
    let no_body = is_head || body.is_empty();
    let write = async {
        session.write_response_header(Box::new(head), no_body).await?;
        if no_body { Ok(()) } else { session.write_response_body(Some(body), true).await }
    };
    // Who cannot be written to is gone; that is not a failure of ours.
    write.await.map_err(Error::into_down)?;
    if unread {
        linger(session, exchange).await;
    }
    Ok(())
}

/// A refusal as bytes of HTTP/1.1, for a connection that has no session yet.
#[must_use]
pub fn raw_refusal(refusal: &Refusal) -> Vec<u8> {
    let request_id = telemetry::request_id(&HeaderMap::new());
    let request_id = request_id.to_str().unwrap_or_default();
    let body = refusal.body(Dialect::OpenAi, request_id);
    let status = refusal.status();
    let mut head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Cache-Control: no-store\r\nX-Request-ID: {request_id}\r\nConnection: close\r\n",
        body.len()
    )
    .into_bytes();
    for (name, value) in &refusal.headers() {
        head.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
    }
    [&head, &b"\r\n"[..], body.as_bytes()].concat()
}

/// Tells the client of a broken event stream, in the stream; what follows is an unclean end.
pub(super) async fn interrupt(session: &mut Session, exchange: &mut Exchange) {
    let why = match exchange.watch.stopped() {
        Some(Stop::Silence) => "the backend was silent for too long",
        Some(Stop::Exchange) => "it took too long",
        Some(Stop::Drain) => "the gateway is shutting down",
        Some(Stop::Upload) => "the rest of the request's body did not come",
        // A WebSocket is no event stream, and has nothing to be told in.
        Some(Stop::FirstByte | Stop::WebsocketIdle | Stop::WebsocketTotal) | None => {
            "the backend broke off"
        }
    };
    let refusal = exchange.hooks.cut.take().map(|cut| *cut);
    let pool = || exchange.pool_name().to_owned();
    let refusal = refusal.unwrap_or_else(|| Refusal::Interrupted { pool: pool(), why });
    if let Some(events) = &exchange.observed.events {
        // Half an event is ended first, else ours would be a part of it. Of what has passed, Pingora may
        // not have written the end.
        let is_all_written = session.body_bytes_sent() == events.passed;
        let is_between = is_all_written && events.tail.is_between_events();
        let end = if is_between { "" } else { "\n\n" };
        let event = refusal.event(exchange.arrived.dialect, exchange.request_id());
        let told = session.write_response_body(Some(format!("{end}{event}").into()), false).await;
        if told.is_ok() && exchange.arrived.is_http_2 {
            // The reset that follows would overtake it.
            tokio::time::sleep(RESET_DELAY).await;
        }
    }
    exchange.observed.refusal = Some(refusal);
}

/// Sends what Pingora has not written of an event stream that its backend cut.
///
/// # Errors
/// When the client takes it no more: a piece may be sent by half.
pub(super) async fn catch_up(session: &mut Session, exchange: &mut Exchange) -> Result<()> {
    let events = exchange.observed.events.as_mut();
    let Some(mut unwritten) = events.and_then(|events| events.unwritten.take()) else {
        return Ok(());
    };
    unwritten.written(session.body_bytes_sent());
    if !is_answered(session) {
        session.write_response_header(unwritten.head, false).await?;
    }
    for piece in unwritten.pieces {
        session.write_response_body(Some(piece), false).await?;
    }
    Ok(())
}

/// Whether a final response has begun: nothing else can be told to the client.
pub(super) fn is_answered(session: &Session) -> bool {
    status(session) != 0
}

/// The status that the client was sent; 0: none that is final.
pub(super) fn status(session: &Session) -> u16 {
    let is_final = |head: &&ResponseHeader| {
        !head.status.is_informational() || head.status == StatusCode::SWITCHING_PROTOCOLS
    };
    session.response_written().filter(is_final).map_or(0, |head| head.status.as_u16())
}

/// Lets a browser on an allowed origin read the answer, and caches know what it depends on.
pub(super) fn allow_origin(headers: &mut HeaderMap, exchange: &Exchange) {
    if let CorsOrigins::Listed(_) = exchange.arrived.cors() {
        headers.append(VARY, HeaderValue::from_static("Origin"));
    }
    if let Some(origin) = &exchange.arrived.cors_origin {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("*"));
    }
}

/// Reads on, bounded in time and bytes, so that the client gets to read its answer.
async fn linger(session: &mut Session, exchange: &Exchange) {
    if waits_for_continue(session, exchange) {
        return;
    }
    let _ = tokio::time::timeout(LINGER, async {
        let mut bytes = 0;
        while bytes < LINGER_BYTES_MAX {
            match session.read_request_body().await {
                Ok(Some(chunk)) => bytes += chunk.len(),
                Ok(None) | Err(_) => return,
            }
        }
    })
    .await;
}

/// Whether the client holds its body back until it is told to go on.
pub(super) fn waits_for_continue(session: &Session, exchange: &Exchange) -> bool {
    let head = session.req_header();
    !exchange.arrived.continued
        && head.version == http::Version::HTTP_11
        && head
            .headers
            .get(http::header::EXPECT)
            .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}
