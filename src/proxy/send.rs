//! The request as a backend gets it: target, `Host`, credential, forwarded headers.

use std::os::fd::RawFd;

use http::header::{CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HOST};
use http::{HeaderName, HeaderValue};
use pingora::http::RequestHeader;
use pingora_core::{Error, ErrorType, Result};
use pingora_proxy::Session;
use smallvec::SmallVec;

use super::exchange::{Admitted, Exchange};
use super::{X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO};
use crate::auth::CREDENTIAL_HEADERS;
use crate::config::{BackendSpec, ClientKeys};
use crate::telemetry::REQUEST_ID;

const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");

/// There is a connection to the backend: from here on its deadlines run.
///
/// # Errors
/// When the time for the whole exchange is up already.
pub(super) fn connected(exchange: &mut Exchange, socket: RawFd) -> Result<()> {
    if exchange.watch.stopped().is_some() {
        return Err(Error::explain(ErrorType::ReadTimedout, "out of time").into_up());
    }
    exchange.body.begin_attempt();
    if let Some(deadlines) = exchange.deadlines() {
        let request = exchange.body.request(&exchange.arrived.runtime.snapshot.client);
        exchange.watch.connected(socket, &request, &deadlines);
    }
    Ok(())
}

/// Rewrites the request for the backend of the current attempt. Hop-by-hop headers are gone by now.
pub(super) fn send(
    session: &Session,
    request: &mut RequestHeader,
    exchange: &Exchange,
) -> Result<()> {
    let admitted = exchange.admitted.as_ref().expect("only admitted exchanges reach a backend");
    let attempt = exchange.attempts.current.as_ref().expect("an attempt has a backend");
    let spec = &attempt.backend().spec;
    forward_headers(session, request, admitted)?;
    target(request, admitted, spec)?;
    request.insert_header(HOST, spec.url.authority.clone())?;
    request.insert_header(REQUEST_ID, exchange.arrived.request_id.clone())?;
    // Answered already, see `admit`.
    request.remove_header(&EXPECT);
    join_pieces(request)?;
    credential(request, &exchange.arrived.runtime.snapshot.clients, spec)
}

/// `{base path}{tail}{query}`, the client's part byte for byte.
fn target(request: &mut RequestHeader, admitted: &Admitted, spec: &BackendSpec) -> Result<()> {
    let base = spec.url.base_path.as_bytes();
    let own = &admitted.target;
    let needs_slash = base.is_empty() && !own.starts_with(b"/");
    if base.is_empty() && !needs_slash {
        return request.set_raw_path(own);
    }
    let slash: &[u8] = if needs_slash { b"/" } else { b"" };
    request.set_raw_path(&[base, slash, own].concat())
}

/// The client's credential goes no further once the gateway has keys; the backend's own is set.
fn credential(request: &mut RequestHeader, keys: &ClientKeys, spec: &BackendSpec) -> Result<()> {
    if *keys != ClientKeys::Untouched {
        remove_where(request, |name| CREDENTIAL_HEADERS.iter().any(|known| is_same(name, known)));
    }
    if let Some(credential) = &spec.credential {
        request.insert_header(credential.header.clone(), credential.value.clone())?;
    }
    Ok(())
}

/// Tells the backend who asked and how. What the client says itself is believed only from a trusted
/// proxy.
fn forward_headers(
    session: &Session,
    request: &mut RequestHeader,
    admitted: &Admitted,
) -> Result<()> {
    let client = &admitted.client;
    if !client.peer_is_trusted {
        remove_where(request, is_claim);
    }
    if let Some(peer) = client.peer {
        let seen: Vec<&str> = request
            .headers
            .get_all(X_FORWARDED_FOR)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .collect();
        let chain =
            if seen.is_empty() { peer.to_string() } else { format!("{}, {peer}", seen.join(", ")) };
        request.insert_header(X_FORWARDED_FOR, chain)?;
    }
    if !request.headers.contains_key(X_FORWARDED_HOST)
        && let Some(host) = host(session.req_header())
    {
        request.insert_header(X_FORWARDED_HOST, host)?;
    }
    if !request.headers.contains_key(X_FORWARDED_PROTO) {
        let is_tls = session.digest().is_some_and(|digest| digest.ssl_digest.is_some());
        request.insert_header(X_FORWARDED_PROTO, if is_tls { "https" } else { "http" })?;
    }
    Ok(())
}

/// Whether a header says where a request came from.
fn is_claim(name: &HeaderName) -> bool {
    begins_like(name, "x-forwarded-") || *name == FORWARDED || is_same(name, &X_REAL_IP)
}

/// Whether a backend could take one header for the other.
fn is_same(name: &HeaderName, known: &HeaderName) -> bool {
    name.as_str().len() == known.as_str().len() && begins_like(name, known.as_str())
}

/// Whether a name has a beginning, dashes or underscores: CGI and WSGI do not tell them apart.
fn begins_like(name: &HeaderName, beginning: &str) -> bool {
    let same = |(own, known): (u8, u8)| own == known || (own == b'_' && known == b'-');
    let name = name.as_str();
    name.len() >= beginning.len() && name.bytes().zip(beginning.bytes()).all(same)
}

fn remove_where(request: &mut RequestHeader, is_it: impl Fn(&HeaderName) -> bool) {
    let names: SmallVec<[HeaderName; 4]> =
        request.headers.keys().filter(|name| is_it(name)).cloned().collect();
    for name in &names {
        request.remove_header(name);
    }
}

/// Puts headers that came in several pieces together, as HTTP/1.1 has them: one length (equal ones
/// were checked by Pingora; RFC 9110, section 8.6), one line of cookies (RFC 9113, section 8.2.3).
fn join_pieces(request: &mut RequestHeader) -> Result<()> {
    let mut lengths = request.headers.get_all(CONTENT_LENGTH).iter();
    let first = lengths.next().map(HeaderValue::as_bytes).unwrap_or_default();
    if lengths.next().is_some() || first.contains(&b',') {
        let length = first.split(|byte| *byte == b',').next().unwrap_or_default();
        let length = length.trim_ascii().to_vec();
        request.insert_header(CONTENT_LENGTH, length)?;
    }
    let mut cookies = request.headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes);
    if let (Some(first), Some(second)) = (cookies.next(), cookies.next()) {
        let all: Vec<&[u8]> = [first, second].into_iter().chain(cookies).collect();
        let joined = all.join(&b"; "[..]);
        request.insert_header(COOKIE, joined)?;
    }
    Ok(())
}

/// The host that the client asked: the authority of HTTP/2, else the `Host` header.
fn host(head: &RequestHeader) -> Option<HeaderValue> {
    match head.uri.authority() {
        Some(authority) => HeaderValue::from_str(authority.as_str()).ok(),
        None => head.headers.get(HOST).cloned(),
    }
}
