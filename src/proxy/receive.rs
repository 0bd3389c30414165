//! The response head as a client gets it.

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_LOCATION, CONTENT_TYPE, LOCATION,
    TRANSFER_ENCODING, UPGRADE,
};
use http::response::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version};
use pingora::http::ResponseHeader;
use pingora_core::{Error, ErrorType, Result};
use pingora_proxy::Session;
use smallvec::SmallVec;

use super::course::X_TOLLGATE_MODEL;
use super::exchange::{Events, Exchange, Unwritten};
use super::send::repeated;
use super::{Proxy, body, cached, heads, hooks, limit, meter, respond, retry};
use crate::config::{BackendUrl, CorsOrigins, Deadlines};
use crate::llm::{EndMarker, Kind, Tail};
use crate::pool::Outcome;
use crate::refusal::Refusal;
use crate::telemetry::REQUEST_ID;

/// Headers that speak of the connection to the backend (RFC 9110, section 7.6.1). `Connection` and
/// `Transfer-Encoding` are Pingora's to write.
const HOP_BY_HOP: [HeaderName; 2] =
    [HeaderName::from_static("keep-alive"), HeaderName::from_static("proxy-connection")];

/// The content type of event streams.
const EVENTS: &[u8] = b"text/event-stream";

/// Rewrites a backend's response head for the client.
pub(super) fn receive(
    proxy: &Proxy,
    session: &mut Session,
    response: &mut ResponseHeader,
    exchange: &mut Exchange,
) -> Result<()> {
    if response.status.is_informational() && response.status != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(());
    }
    exchange.observed.first_byte.get_or_insert_with(|| exchange.arrived.at.elapsed());
    exchange.observed.status = response.status.as_u16();
    exchange.body.let_go();
    heads::change_answer(response, |answer| rewrite(session, answer, exchange))?;
    if hooks::is_unreadable(&response.headers, exchange) {
        let pool = exchange.pool_name().to_owned();
        exchange.why = Some("it compressed what it was asked not to, and a hook has to see".into());
        exchange.attempts.failure = Some(Refusal::BackendFailed { pool });
        return Err(Error::explain(ErrorType::InternalError, "an answer that cannot be read"));
    }
    if !proxy.lifecycle.keeps_connections() {
        session.set_keepalive(None);
    }
    if exchange.observed.ends_by_close
        && let Some(events) = &mut exchange.observed.events
    {
        events.unwritten = Some(Unwritten::of(response));
    }
    Ok(())
}

fn rewrite(session: &mut Session, answer: &mut Parts, exchange: &mut Exchange) {
    cached::begin(exchange, answer);
    meter::answers(exchange, answer);
    expect_body(session, answer, exchange);
    hop_by_hop(answer);
    let headers = &mut answer.headers;
    headers.insert(REQUEST_ID, exchange.arrived.request_id.clone());
    limit::tell(headers, &exchange.shown);
    cached::tell(headers, exchange);
    cors(headers, exchange);
    location(headers, exchange);
    if let Some(admitted) = exchange.admitted.as_ref().filter(|admitted| admitted.tells_model()) {
        headers.insert(X_TOLLGATE_MODEL, admitted.to().shown.clone());
    }
    hooks::answer(session, answer, exchange);
    let headers = &mut answer.headers;
    // The backend's own version is the business of its connection.
    answer.version = Version::HTTP_11;
    if exchange.arrived.is_http_10 {
        // HTTP/1.0 knows no chunks: the body ends with the connection.
        if headers.remove(TRANSFER_ENCODING).is_some() {
            session.set_keepalive(None);
        }
        answer.version = Version::HTTP_10;
    }
}

/// From here on the backend's silence is bounded, and the end of an event stream looked at.
fn expect_body(session: &Session, response: &Parts, exchange: &mut Exchange) {
    if response.status == StatusCode::SWITCHING_PROTOCOLS {
        if let Some(Deadlines { websocket_idle, websocket_total, .. }) = exchange.deadlines() {
            exchange.watch.tunnels(exchange.arrived.at, websocket_idle, websocket_total);
        }
        // It has done what it was asked for, however long the two then talk and whoever ends it.
        retry::tell(exchange, Outcome::Success);
        exchange.observed.is_judged = true;
        return;
    }
    let has_none = session.req_header().method == Method::HEAD
        || matches!(response.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        || response.headers.get(CONTENT_LENGTH).is_some_and(|length| length == "0");
    if has_none {
        exchange.watch.answered();
        return;
    }
    exchange.watch.answers();
    exchange.observed.is_stream = response
        .headers
        .get(CONTENT_TYPE)
        .is_some_and(|kind| matches!(Kind::of(kind.as_bytes()), Some(Kind::Events | Kind::Lines)));
    let is_events = response.headers.get(CONTENT_TYPE).is_some_and(|kind| {
        let kind = kind.as_bytes();
        kind.len() >= EVENTS.len() && kind[..EVENTS.len()].eq_ignore_ascii_case(EVENTS)
    });
    // What is compressed cannot be looked into, and nothing can be said after a promised length.
    let is_plain = !response.headers.contains_key(CONTENT_ENCODING)
        && !response.headers.contains_key(CONTENT_LENGTH);
    if is_events && is_plain && response.status.is_success() {
        let end = EndMarker::of_path(super::admit::split_target(session.req_header()).0);
        exchange.observed.events =
            Some(Events { tail: Tail::default(), passed: 0, end, unwritten: None });
    }
}

/// A piece of the answer passes, or its end.
///
/// # Errors
/// When the end is one that the gateway brought about, or that a backend which broke off: it must not
/// look like the end of the answer.
pub(super) fn pass(
    session: &Session,
    exchange: &mut Exchange,
    chunk: Option<&Bytes>,
    end_of_stream: bool,
) -> Result<()> {
    let events = &mut exchange.observed.events;
    if let (Some(events), Some(chunk)) = (&mut *events, chunk) {
        events.pass(chunk, session.body_bytes_sent());
    }
    let watch = &exchange.watch;
    if watch.stopped_sharing().is_some() {
        return Err(stopped());
    }
    if !end_of_stream {
        watch.heard();
        return Ok(());
    }
    // Where the end has a mark of its own, it is there.
    let ends_by_close = exchange.observed.ends_by_close || session.was_upgraded();
    if ends_by_close && watch.stopped().is_some() {
        return Err(stopped());
    }
    if events.as_ref().is_some_and(|events| events.unwritten.is_some() && events.is_cut()) {
        let error = Error::explain(ErrorType::ConnectionClosed, "closed before the last event");
        return Err(error.into_up());
    }
    watch.answered();
    Ok(())
}

/// The watch has stopped the exchange.
pub(super) fn stopped() -> Box<Error> {
    Error::explain(ErrorType::ConnectionClosed, "stopped by a deadline").into_up()
}

/// Notes how the backend's body ends. Later Pingora has put its own framing in the place of none.
pub(super) fn note_framing(response: &ResponseHeader, exchange: &mut Exchange) {
    let headers = &response.headers;
    exchange.observed.ends_by_close =
        // The end of an HTTP/2 stream is its own.
        response.version != Version::HTTP_2
            && !headers.contains_key(CONTENT_LENGTH)
            && !headers.contains_key(TRANSFER_ENCODING);
}

/// A switch of protocols that the client did not ask for would be a tunnel past every rule.
pub(super) fn check_switch(session: &Session, response: &ResponseHeader) -> Result<()> {
    if response.status == StatusCode::SWITCHING_PROTOCOLS && !body::is_tunnel_request(session) {
        let error = Error::explain(ErrorType::InvalidHTTPHeader, "101 that nobody asked for");
        return Err(error.into_up());
    }
    Ok(())
}

/// Where the gateway answers for CORS, a backend's own answer would overrule it.
fn cors(headers: &mut HeaderMap, exchange: &Exchange) {
    if *exchange.arrived.cors() == CorsOrigins::Off {
        return;
    }
    let is_cors = |name: &&HeaderName| name.as_str().starts_with("access-control-");
    let own: SmallVec<[HeaderName; 4]> = headers.keys().filter(is_cors).cloned().collect();
    for header in &own {
        headers.remove(header);
    }
    respond::allow_origin(headers, exchange);
}

/// A redirect to the backend itself is turned into one to its pool: clients may not be able to
/// reach the backend, and need not know its address.
fn location(headers: &mut HeaderMap, exchange: &Exchange) {
    let (Some(admitted), Some(attempt)) = (&exchange.admitted, &exchange.attempts.current) else {
        return;
    };
    for header in [LOCATION, CONTENT_LOCATION] {
        let Some(value) = headers.get(&header) else { continue };
        let url = &attempt.backend().spec.url;
        if let Some(path) = path_at_backend(value.as_bytes(), url) {
            let repeated = if admitted.is_front {
                repeated(&admitted.target, url.base_path.as_bytes())
            } else {
                0
            };
            let moved = [&admitted.prefix, &admitted.target[..repeated], path].concat();
            // One that cannot be told is better not there than with the backend's address in it.
            match HeaderValue::from_bytes(&moved) {
                Ok(moved) => headers.insert(header, moved),
                Err(_) => headers.remove(header),
            };
        }
    }
}

/// The path below the base path, if a location names the backend or is a path of it.
fn path_at_backend<'l>(location: &'l [u8], url: &BackendUrl) -> Option<&'l [u8]> {
    let path = match location.strip_prefix(b"/") {
        Some(rest) if !rest.starts_with(b"/") => location,
        _ => {
            let rest = location.strip_prefix(b"http")?;
            let rest = rest.strip_prefix(b"s").unwrap_or(rest).strip_prefix(b"://")?;
            rest.strip_prefix(url.authority.as_bytes())?
        }
    };
    let below = path.strip_prefix(url.base_path.as_bytes())?;
    (below.is_empty() || matches!(below[0], b'/' | b'?' | b'#')).then_some(below)
}

fn hop_by_hop(response: &mut Parts) {
    let nominated: Vec<HeaderName> = heads::nominated(&response.headers)
        .into_iter()
        .filter(|name| !matches!(*name, CONNECTION | UPGRADE | TRANSFER_ENCODING))
        .filter(|name| *name != CONTENT_LENGTH)
        .collect();
    for name in nominated.iter().chain(&HOP_BY_HOP) {
        response.headers.remove(name);
    }
    if response.status != StatusCode::SWITCHING_PROTOCOLS {
        response.headers.remove(UPGRADE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Host;

    #[test]
    fn a_location_at_the_backend_is_told_from_others() {
        let url = BackendUrl {
            tls: false,
            host: Host::Name("h".into()),
            port: 5000,
            base_path: "/base".into(),
            authority: HeaderValue::from_static("h:5000"),
            shown: String::new(),
        };
        let below = |location: &'static str| {
            path_at_backend(location.as_bytes(), &url).map(|path| String::from_utf8_lossy(path))
        };
        assert_eq!(below("http://h:5000/base/v1/x/?a=1").as_deref(), Some("/v1/x/?a=1"));
        assert_eq!(below("https://h:5000/base").as_deref(), Some(""));
        assert_eq!(below("/base/v1/x/").as_deref(), Some("/v1/x/"));
        for other in [
            "http://h:50001/base/x",
            "http://other/base/x",
            "//h:5000/base",
            "x/y",
            "",
            "http://h:5000/basement",
            "/elsewhere",
            "ftp://h:5000/base",
        ] {
            assert_eq!(below(other), None, "{other}");
        }
    }
}
