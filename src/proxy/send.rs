//! The request as a backend gets it: target, `Host`, credential, forwarded headers.

use std::os::fd::RawFd;

use http::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HOST,
    SEC_WEBSOCKET_PROTOCOL,
};
use http::{HeaderMap, HeaderName, HeaderValue, Version};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use pingora::http::RequestHeader;
use pingora_core::{Error, ErrorType, Result};
use pingora_proxy::Session;
use smallvec::SmallVec;

use super::body::{self, Resized};
use super::course::X_TOLLGATE_MODEL;
use super::exchange::{Admitted, Exchange};
use super::meter::Metering;
use super::{X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO, heads, hooks};
use crate::auth::{CREDENTIAL_HEADERS, is_key_subprotocol};
use crate::config::{BackendSpec, BackendUrl, ClientKeys};
use crate::telemetry::{REQUEST_ID, TRACEPARENT, TRACESTATE};
use crate::writing::push_address;

/// What is escaped in a path's segment: all but what RFC 3986 leaves unreserved, and the colons of
/// model names.
const NOT_IN_A_SEGMENT: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b':');

const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");

/// There is a connection to the backend: from here on its deadlines run.
///
/// # Errors
/// When the time for the whole exchange is up already.
pub(super) fn connected(exchange: &mut Exchange, socket: RawFd) -> Result<()> {
    if exchange.watch.stopped().is_some() {
        return Err(Error::explain(ErrorType::ReadTimedout, "out of time").into_up());
    }
    let gate = exchange.attempts.current.as_ref().and_then(|attempt| attempt.gate.as_ref());
    let socket = gate.map_or(socket, |gate| gate.socket());
    if let Some(gate) = gate {
        gate.close();
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
    exchange: &mut Exchange,
) -> Result<()> {
    let shares = exchange.attempts.current.as_ref().is_some_and(|attempt| attempt.shares);
    if shares && request.version == Version::HTTP_2 {
        exchange.watch.share();
    }
    if let Some(attempt) = &exchange.attempts.current
        && attempt.gate.is_none()
    {
        attempt.backend().check_version(request.version == Version::HTTP_2)?;
    }
    let model = exchange.upstream_model().map(str::to_owned);
    heads::change_request(request, |headers| {
        rewrite_body(session, headers, exchange, model.as_deref())?;
        rewrite_head(session, headers, exchange);
        Ok::<(), Box<Error>>(())
    })??;
    let admitted = exchange.admitted.as_ref().expect("only admitted exchanges reach a backend");
    let attempt = exchange.attempts.current.as_ref().expect("an attempt has a backend");
    target(request, admitted, &attempt.backend().spec.url, model.as_deref())
}

fn rewrite_head(session: &Session, headers: &mut HeaderMap, exchange: &mut Exchange) {
    if let Some(metering) = &mut exchange.metering {
        metering.is_sent = true;
    }
    let is_read = |it: &Metering| it.reads() && exchange.arrived.runtime.snapshot.charges;
    if exchange.metering.as_ref().is_some_and(is_read)
        || hooks::wants_answer_body(exchange)
        || exchange.cached.leads()
    {
        // What is compressed cannot be read as it passes.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    }
    let admitted = exchange.admitted.as_ref().expect("only admitted exchanges reach a backend");
    let attempt = exchange.attempts.current.as_ref().expect("an attempt has a backend");
    address(session, headers, exchange, (admitted, &attempt.backend().spec));
}

/// Whom it goes to, who asks, and with what credential.
pub(super) fn address(
    session: &Session,
    headers: &mut HeaderMap,
    exchange: &Exchange,
    (admitted, spec): (&Admitted, &BackendSpec),
) {
    forward_headers(session, headers, admitted);
    headers.insert(HOST, spec.url.authority.clone());
    headers.insert(REQUEST_ID, exchange.arrived.request_id.clone());
    trace(headers, exchange);
    headers.remove(X_TOLLGATE_MODEL);
    // Answered already, see `admit`.
    headers.remove(EXPECT);
    join_pieces(headers);
    credential(headers, &exchange.arrived.runtime.snapshot.clients, spec);
}

/// A client's trace goes on; where it sent none, one is begun. Who keeps spans here stands between the two.
fn trace(headers: &mut HeaderMap, exchange: &Exchange) {
    let trace = &exchange.arrived.trace;
    if trace.parent.is_none() {
        headers.remove(TRACESTATE);
    } else if !exchange.arrived.is_traced() {
        return;
    }
    let span = exchange.tries.last().map_or(trace.span, |attempt| attempt.span);
    headers.insert(TRACEPARENT, trace.header(span));
}

/// Puts the name that the model has at this backend in the place of the one that came, has usage told where it
/// is needed, and corrects what the head says about the body. Nothing else changes.
fn rewrite_body(
    session: &Session,
    headers: &mut HeaderMap,
    exchange: &mut Exchange,
    model: Option<&str>,
) -> Result<()> {
    let coding = session
        .req_header()
        .headers
        .get(CONTENT_ENCODING)
        .map(HeaderValue::as_bytes)
        .unwrap_or_default();
    let replay = exchange.arrived.runtime.snapshot.replay;
    let asks = exchange.metering.as_ref().is_some_and(|metering| metering.asks);
    let resized = exchange.body.rewrite(model, asks, coding, &replay).map_err(|refusal| {
        exchange.observed.client_fault = Some(refusal);
        Error::explain(ErrorType::InternalError, "the body cannot be renamed").into_down()
    })?;
    match resized {
        Resized::No => {}
        Resized::To(length) => {
            headers.remove(CONTENT_ENCODING);
            headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        Resized::By(longer, shorter) => {
            if let Some(length) = body::length(session) {
                let length = (length + longer).saturating_sub(shorter);
                headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
            }
        }
    }
    Ok(())
}

/// `{base path}{tail}{query}`, the client's part byte for byte but for the model's name in it.
pub(super) fn target(
    request: &mut RequestHeader,
    admitted: &Admitted,
    url: &BackendUrl,
    model: Option<&str>,
) -> Result<()> {
    let base = url.base_path.as_bytes();
    let renamed;
    let at = admitted.asked.as_ref().and_then(|asked| asked.at.clone());
    let own = match (at, model) {
        (Some(at), Some(model)) if admitted.asked.as_ref().is_some_and(|it| it.name != model) => {
            let target = &admitted.target;
            let model = utf8_percent_encode(model, NOT_IN_A_SEGMENT).to_string();
            renamed = [&target[..at.start], model.as_bytes(), &target[at.end..]].concat();
            &renamed[..]
        }
        _ => &admitted.target,
    };
    let own = if admitted.is_front { &own[repeated(own, base)..] } else { own };
    let needs_slash = base.is_empty() && !own.starts_with(b"/");
    if base.is_empty() && !needs_slash {
        return request.set_raw_path(own);
    }
    let slash: &[u8] = if needs_slash { b"/" } else { b"" };
    request.set_raw_path(&[base, slash, own].concat())
}

/// The length of what a path as SDKs send it has in common with a base path that such SDKs are given:
/// its version (`/v1`), or Azure's `/openai`.
pub(super) fn repeated(target: &[u8], base: &[u8]) -> usize {
    let is_version = |segment: &[u8]| {
        let digits = segment.strip_prefix(b"v").unwrap_or_default();
        digits.first().is_some_and(u8::is_ascii_digit)
            && digits.iter().all(u8::is_ascii_alphanumeric)
    };
    let length = 1 + target.iter().skip(1).take_while(|byte| !b"/?".contains(byte)).count();
    let first = target.get(1..length).unwrap_or_default();
    let mut segments = base.split(|byte| *byte == b'/');
    let is_last = base.ends_with(&target[..length.min(target.len())]) && !first.is_empty();
    let is_there = is_last || is_version(first) && segments.any(is_version);
    if is_there { length } else { 0 }
}

/// The client's credential goes no further once the gateway has keys; the backend's own is set.
fn credential(headers: &mut HeaderMap, keys: &ClientKeys, spec: &BackendSpec) {
    if *keys != ClientKeys::Untouched {
        remove_where(headers, |name| CREDENTIAL_HEADERS.iter().any(|known| is_same(name, known)));
        subprotocols(headers);
    }
    if let Some(credential) = &spec.credential {
        headers.insert(credential.header.clone(), credential.value.clone());
    }
}

/// Takes a key out of the subprotocols that a WebSocket's client offers.
fn subprotocols(headers: &mut HeaderMap) {
    let values = headers.get_all(SEC_WEBSOCKET_PROTOCOL);
    let entries: SmallVec<[&[u8]; 4]> = values
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .collect();
    if !entries.iter().any(|entry| is_key_subprotocol(entry)) {
        return;
    }
    let others: SmallVec<[&[u8]; 4]> =
        entries.into_iter().filter(|entry| !is_key_subprotocol(entry)).collect();
    let all = others.join(&b", "[..]);
    drop(others);
    headers.remove(SEC_WEBSOCKET_PROTOCOL);
    if !all.is_empty() {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, value(&all));
    }
}

/// A value that is made of parts of others.
fn value(bytes: &[u8]) -> HeaderValue {
    HeaderValue::from_bytes(bytes).expect("what was in headers can be in one")
}

/// Tells the backend who asked and how. What the client says itself is believed only from a trusted
/// proxy.
fn forward_headers(session: &Session, headers: &mut HeaderMap, admitted: &Admitted) {
    let client = &admitted.client;
    if !client.peer_is_trusted {
        remove_where(headers, is_claim);
    }
    if let Some(peer) = client.peer {
        let mut chain = Vec::with_capacity(64);
        for seen in headers.get_all(X_FORWARDED_FOR).iter().filter(|it| it.to_str().is_ok()) {
            chain.extend_from_slice(seen.as_bytes());
            chain.extend_from_slice(b", ");
        }
        push_address(&mut chain, peer);
        headers.insert(X_FORWARDED_FOR, value(&chain));
    }
    if !headers.contains_key(X_FORWARDED_HOST)
        && let Some(host) = host(session.req_header())
    {
        headers.insert(X_FORWARDED_HOST, value(host));
    }
    if !headers.contains_key(X_FORWARDED_PROTO) {
        let is_tls = session.digest().is_some_and(|digest| digest.ssl_digest.is_some());
        let scheme = if is_tls { "https" } else { "http" };
        headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(scheme));
    }
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

fn remove_where(headers: &mut HeaderMap, is_it: impl Fn(&HeaderName) -> bool) {
    let names: SmallVec<[HeaderName; 4]> =
        headers.keys().filter(|name| is_it(name)).cloned().collect();
    for name in &names {
        headers.remove(name);
    }
}

/// Puts headers that came in several pieces together, as HTTP/1.1 has them: one length (equal ones
/// were checked by Pingora; RFC 9110, section 8.6), one line of cookies (RFC 9113, section 8.2.3).
fn join_pieces(headers: &mut HeaderMap) {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let first = lengths.next().map(HeaderValue::as_bytes).unwrap_or_default();
    if lengths.next().is_some() || first.contains(&b',') {
        let length = first.split(|byte| *byte == b',').next().unwrap_or_default();
        let length = value(length.trim_ascii());
        headers.insert(CONTENT_LENGTH, length);
    }
    let mut cookies = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes);
    if let (Some(first), Some(second)) = (cookies.next(), cookies.next()) {
        let all: Vec<&[u8]> = [first, second].into_iter().chain(cookies).collect();
        let joined = value(&all.join(&b"; "[..]));
        headers.insert(COOKIE, joined);
    }
}

/// The host that the client asked: the authority of HTTP/2, else the `Host` header.
pub(super) fn host(head: &RequestHeader) -> Option<&[u8]> {
    match head.uri.authority() {
        Some(authority) => Some(authority.as_str().as_bytes()),
        None => head.headers.get(HOST).map(HeaderValue::as_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_base_path_has_already_is_not_repeated() {
        for (base, target, rest) in [
            ("", "/v1/chat/completions", "/v1/chat/completions"),
            ("/v1", "/v1/chat/completions", "/chat/completions"),
            ("/openai/v1", "/v1/models?x=1", "/models?x=1"),
            ("/api/paas/v4", "/v1/chat/completions", "/chat/completions"),
            ("/v1beta/openai", "/v1/chat/completions", "/chat/completions"),
            ("/v1beta", "/v1beta/models/m:generateContent", "/models/m:generateContent"),
            ("/openai", "/openai/deployments/d/chat", "/deployments/d/chat"),
            ("/team-a", "/v1/chat/completions", "/v1/chat/completions"),
            ("/vllm", "/v1/chat/completions", "/v1/chat/completions"),
        ] {
            let dropped = repeated(target.as_bytes(), base.as_bytes());
            assert_eq!(&target[dropped..], rest, "{base} {target}");
        }
    }
}
