//! Answers of the gateway's own: pages and refusals.

use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, CACHE_CONTROL, CONTENT_LENGTH,
    CONTENT_TYPE, VARY,
};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use pingora::http::ResponseHeader;
use pingora_core::{Error, Result};
use pingora_proxy::Session;

use super::exchange::Exchange;
use crate::config::CorsOrigins;
use crate::refusal::Refusal;
use crate::telemetry::REQUEST_ID;

/// How long a refused client may go on sending before its connection is cut. Closing at once would
/// reset the connection, and the client could lose the answer (RFC 9112, section 9.6).
const LINGER: Duration = Duration::from_secs(2);

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
    let mut head = ResponseHeader::build(status, Some(headers.len() + 6))?;
    for (name, value) in headers {
        head.append_header(name.clone(), value.clone())?;
    }
    head.insert_header(CACHE_CONTROL, "no-store")?;
    head.insert_header(REQUEST_ID, exchange.arrived.request_id.clone())?;
    if !headers.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
        allow_origin(&mut head, exchange)?;
    }
    let is_head = session.req_header().method == Method::HEAD;
    if status != StatusCode::NO_CONTENT {
        head.insert_header(CONTENT_LENGTH, body.len())?;
    }
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

/// Whether a final response has begun: nothing else can be told to the client.
pub(super) fn is_answered(session: &Session) -> bool {
    let is_final = |head: &ResponseHeader| {
        !head.status.is_informational() || head.status == StatusCode::SWITCHING_PROTOCOLS
    };
    session.response_written().is_some_and(is_final)
}

/// Lets a browser on an allowed origin read the answer, and caches know what it depends on.
pub(super) fn allow_origin(head: &mut ResponseHeader, exchange: &Exchange) -> Result<()> {
    if let CorsOrigins::Listed(_) = exchange.arrived.runtime.snapshot.cors {
        head.append_header(VARY, "Origin")?;
    }
    if let Some(origin) = &exchange.arrived.cors_origin {
        head.insert_header(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone())?;
        head.insert_header(ACCESS_CONTROL_EXPOSE_HEADERS, "*")?;
    }
    Ok(())
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
