//! May this request pass, and which way: bounds, the gateway's own pages, key, route.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, HOST, ORIGIN, TRANSFER_ENCODING,
};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Version};
use ipnet::IpNet;
use pingora::http::RequestHeader;
use pingora_core::Result;
use pingora_proxy::Session;

use super::cached::{self, Cached};
use super::course::{self, Course, Leads, Look};
use super::exchange::{Admitted, Client, Exchange};
use super::hooks::{self, Halt};
use super::rights::Rights;
use super::{
    Proxy, Serves, X_FORWARDED_FOR, account, body, detached, limit, meter, mirror, respond, send,
};
use crate::auth::{self, Grant};
use crate::config::{ClientBounds, ClientKeys, CorsOrigins};
use crate::lifecycle::Counted;
use crate::llm::{Dialect, Found};
use crate::refusal::Refusal;
use crate::routing::{self, Miss};
use crate::runtime::{PageAnswer, PageRequest, Runtime, Target, Way};
use crate::telemetry::{self, Phase, Trace};

/// The methods of LLM APIs. Others are forwarded too, but for two: Pingora refuses CONNECT, and the
/// answer to a TRACE would show the client the backend's credential (RFC 9110, section 9.3.8).
const METHODS: &str = "GET, HEAD, POST, PUT, DELETE, PATCH, OPTIONS";

/// What becomes of a request.
enum Decision {
    Forward(Passage),
    Page(PageAnswer),
}

/// A request that may pass.
struct Passage {
    course: Course,
    grant: Arc<Grant>,
    client: Client,
    inflight: Counted,
}

/// Decides on the request. `true`: it has been answered.
pub(super) async fn admit(
    proxy: &Proxy,
    session: &mut Session,
    exchange: &mut Exchange,
) -> Result<bool> {
    arrive(session, exchange);
    if proxy.serves == Serves::PagesAndTraffic {
        account::begin(&proxy.telemetry, session, exchange);
    }
    let refusal = match decide(proxy, session, exchange) {
        Ok(Decision::Forward(passage)) => match take_in(proxy, session, exchange, passage).await? {
            Ok(()) => return Ok(false),
            Err(Halt::Refused(refusal)) => refusal,
            Err(Halt::Answered(page)) => {
                exchange.observed.status = page.status().as_u16();
                exchange.turn(Phase::Answer);
                return respond::page(session, exchange, *page).await.map(|()| true);
            }
            Err(Halt::Served(served)) => {
                return cached::serve(proxy, session, exchange, *served).await.map(|()| true);
            }
        },
        Ok(Decision::Page(page)) => {
            let page = match page {
                PageAnswer::Now(page) => page,
                PageAnswer::Later(page) => page.await,
                PageAnswer::Live(pieces) => {
                    return respond::live(session, exchange, pieces).await.map(|()| true);
                }
                PageAnswer::Refused(refusal) => {
                    return respond::refuse(session, exchange, refusal).await.map(|()| true);
                }
            };
            return respond::page(session, exchange, page).await.map(|()| true);
        }
        Err(refusal) => refusal,
    };
    respond::refuse(session, exchange, refusal).await.map(|()| true)
}

/// Takes in what has to be known of the body, and with it finds the last of the way.
async fn take_in(
    proxy: &Proxy,
    session: &mut Session,
    exchange: &mut Exchange,
    passage: Passage,
) -> Result<Result<(), Halt>> {
    let Passage { mut course, grant, client, inflight } = passage;
    // HTTP/1.0 knows no interim responses (RFC 9110, section 15.2).
    session.set_ignore_info_resp(exchange.arrived.is_http_10);
    if respond::waits_for_continue(session, exchange) {
        let kept = session.get_keepalive().is_some();
        exchange.turn(Phase::Body);
        session.write_continue_response().await?;
        exchange.turn(Phase::Own);
        exchange.arrived.continued = true;
        if kept {
            // Pingora gives the connection up for any head that goes out before the body
            // has come in.
            body::keep_alive(session, &exchange.arrived.runtime.snapshot.client);
        }
    }
    let leads = std::mem::replace(&mut course.leads, Leads::ByBody(None));
    let wants_whole = wants_whole(session, exchange, leads.way(), &course);
    let look = course.look;
    let found = match body::hold(proxy, session, exchange, look, wants_whole).await? {
        Ok(found) => found,
        Err(refusal) => return Ok(Err(Rights::hide(&grant, refusal).into())),
    };
    let mut admitted = match admitted(
        &exchange.arrived.runtime,
        leads,
        found,
        course,
        (grant, client, inflight),
    ) {
        Ok(admitted) => admitted,
        Err(refusal) => return Ok(Err(refusal.into())),
    };
    if let Err(halt) = ask_hooks(session, exchange, &mut admitted, look)? {
        exchange.admitted = Some(admitted);
        return Ok(Err(halt));
    }
    admitted.can_rename = exchange.body.can_rename();
    if admitted.to().renames && !admitted.can_rename {
        let replay = &exchange.arrived.runtime.snapshot.replay;
        return Ok(Err(body::why_not_held(session, replay).into()));
    }
    if let Some(first) = admitted.pool().backends().first() {
        exchange.watch.limit_exchange(exchange.arrived.at, first.spec.deadlines.exchange);
    }
    exchange.admitted = Some(admitted);
    let served = match cached::turn(session, exchange).await? {
        Ok(served) => served,
        Err(halt) => return Ok(Err(halt)),
    };
    meter::begin(session, exchange);
    let Some(admitted) = exchange.admitted.take() else { return Ok(Err(Refusal::Internal.into())) };
    if let Err(refusal) = limit::reserve(&proxy.months, exchange, &admitted).await {
        exchange.cached = Cached::default();
        exchange.admitted = Some(admitted);
        return Ok(Err(refusal.into()));
    }
    if let Some(served) = served {
        exchange.admitted = Some(admitted);
        return Ok(Err(Halt::Served(Box::new(served))));
    }
    detached::detach(proxy, session, exchange).await?;
    mirror::send(proxy, session, exchange, &admitted);
    exchange.attempts.is_for_tunnel = body::is_tunnel_request(session);
    admitted.pool().count_exchange();
    exchange.admitted = Some(admitted);
    Ok(Ok(()))
}

/// Whether all of the body is wanted, as far as the way is known; it is bounded in time from now on, too.
fn wants_whole(session: &Session, exchange: &Exchange, way: Option<&Way>, course: &Course) -> bool {
    let Some(way) = way else { return true };
    let target = &way.targets[0];
    if let Some(first) = target.pool.backends().first() {
        exchange.watch.limit_exchange(exchange.arrived.at, first.spec.deadlines.exchange);
    }
    let retries = |target: &Target| target.pool.spec().retry.retries_max > 0;
    way.targets.iter().any(retries)
        || target.hooks.as_ref().is_some_and(|hooks| hooks.takes_body())
        || target.caching.is_some()
            && cached::concerns(session, &course.target, course.may_fall_back)
}

/// Hooks have their say, and may send the request elsewhere.
fn ask_hooks(
    session: &mut Session,
    exchange: &mut Exchange,
    admitted: &mut Admitted,
    look: Option<Look>,
) -> Result<Result<(), Halt>> {
    let way = match hooks::request(session, exchange, admitted, look)? {
        Ok(way) => way,
        Err(halt) => return Ok(Err(halt)),
    };
    let Some(way) = way else { return Ok(Ok(())) };
    if !way.targets[0].addresses.permit(admitted.client.address) {
        return Ok(Err(Refusal::AddressDenied.into()));
    }
    admitted.go(way);
    Ok(Ok(()))
}

/// Where a request goes, now that all is known that it says about that.
fn admitted(
    runtime: &Runtime,
    leads: Leads,
    found: Option<Found>,
    course: Course,
    (grant, client, inflight): (Arc<Grant>, Client, Counted),
) -> Result<Admitted, Refusal> {
    let is_by_body = leads.way().is_none();
    let in_body = found.as_ref().filter(|_| !is_by_body).map(|found| found.text.clone());
    let resolved = leads.resolve(runtime, found);
    let (way, asked, is_for_model) = resolved.map_err(|refusal| Rights::hide(&grant, refusal))?;
    let is_for_model = is_for_model && course.is_for_model;
    let rights = Rights { grant, address: client.address, is_for_model };
    let called = asked.as_ref().filter(|_| course.is_front).map(|asked| asked.name.as_str());
    if let Some(name) = in_body.as_deref().filter(|name| Some(*name) != called) {
        rights.check_name(&way, name)?;
    }
    let at = rights.first(&way, called)?;
    Ok(Admitted::new((way, at, asked), course, rights, client, inflight))
}

/// Notes what every answer needs, whatever it will be.
fn arrive(session: &Session, exchange: &mut Exchange) {
    let head = session.req_header();
    let arrived = &mut exchange.arrived;
    arrived.request_id = telemetry::request_id(&head.headers);
    let traces = arrived.runtime.snapshot.observed.traces.as_ref();
    // Where nobody here decides, those behind us may keep what they like.
    arrived.trace = Trace::of(&head.headers, traces.map_or(1.0, |traces| traces.sample));
    arrived.dialect = Dialect::of(split_target(head).0, &head.headers);
    arrived.is_http_10 = head.version == Version::HTTP_10;
    arrived.is_http_2 = head.version == Version::HTTP_2;
    arrived.service = arrived.runtime.service_of(split_target(head).0);
    arrived.cors_origin = cors_origin(arrived.cors(), &head.headers);
    if arrived.is_traced() {
        exchange.phases.keep_turns();
    }
}

fn decide(proxy: &Proxy, session: &Session, exchange: &mut Exchange) -> Result<Decision, Refusal> {
    let head = session.req_header();
    let runtime = &Arc::clone(&exchange.arrived.runtime);
    let snapshot = &runtime.snapshot;
    check_bounds(head, &snapshot.client)?;
    check_head(head)?;
    let (path, query) = split_target(head);
    let client = client(session, &snapshot.trusted_proxies, snapshot.trusts_unix);
    exchange.arrived.address = client.address;
    let is_traffic = proxy.serves == Serves::PagesAndTraffic;
    let is_probe = matches!(path, b"/health" | b"/ready");
    if is_traffic && !is_probe && !snapshot.addresses.permit(client.address) {
        return Err(Refusal::AddressDenied);
    }
    if let Ok(path) = std::str::from_utf8(path) {
        let (method, headers) = (&head.method, &head.headers);
        let query = std::str::from_utf8(query).unwrap_or_default();
        let host = send::host(head).unwrap_or_default();
        let request = PageRequest { method, path, query, host, headers, client: client.address };
        if let Some(page) = proxy.pages.answer(runtime, &request) {
            account::is_page(exchange);
            return Ok(Decision::Page(page));
        }
    }
    if !is_traffic {
        return Err(course::refusal_of(Miss::NoRoute, path));
    }
    if let Some(preflight) = preflight(head, exchange) {
        account::is_page(exchange);
        return Ok(Decision::Page(PageAnswer::Now(preflight)));
    }
    if head.method == Method::TRACE {
        return Err(Refusal::MethodNotAllowed { allow: METHODS });
    }
    let inflight = proxy.lifecycle.admit().ok_or(Refusal::Draining)?;
    let grant = runtime.grant(&head.headers, client.address)?;
    exchange.arrived.grant = Some(Arc::clone(&grant));
    if snapshot.clients != ClientKeys::Untouched && auth::is_in_url(&head.headers, path, query) {
        return Err(Refusal::KeyInUrl);
    }
    body::check_length(session, &snapshot.client)?;
    let found = course::find(runtime, head);
    let mut course = found.map_err(|refusal| Rights::hide(&grant, refusal))?;
    exchange.arrived.toward = course.leads.to().cloned();
    // What a body says is of interest to conditions, too.
    let has_conditions = snapshot.has_conditions || !snapshot.hooks.is_empty();
    let looks = snapshot.charges && meter::takes(head) || has_conditions;
    check_rights(head, &mut course, (&grant, client.address), looks)?;
    Ok(Decision::Forward(Passage { course, grant, client, inflight }))
}

/// Refuses, as far as the head tells, what the client may not have; and has its body looked into where that
/// may name it, or where else it says is of interest.
fn check_rights(
    head: &RequestHeader,
    course: &mut Course,
    (grant, address): (&Arc<Grant>, Option<IpAddr>),
    looks: bool,
) -> Result<(), Refusal> {
    if grant.is_restricted() {
        let path = course.target.split(|byte| *byte == b'?').next().unwrap_or_default();
        let reach = routing::reach(&head.method, path);
        course.is_for_model = !reach.is_of_account;
        course.names.target = course.names.target.take().or(reach.name);
    }
    let rights = Rights { grant: Arc::clone(grant), address, is_for_model: course.is_for_model };
    let way = course.leads.way();
    if let Some(way) = way {
        rights.first(way, course.leads.asked().filter(|_| course.is_front))?;
        if !course.is_front {
            if course.names.is_ambiguous && rights.needs_name(Some(way)) {
                return Err(Refusal::ModelAmbiguous);
            }
            if let Some(name) = &course.names.target {
                rights.check_name(way, name)?;
            }
        }
    }
    if let Some(keys) = course.names.body
        && rights.needs_name(way)
    {
        course.look = Some(Look::strict(course.look, keys));
    }
    if looks {
        course.look = Some(Look::metered(course.look));
    }
    Ok(())
}

/// The raw path and, with its question mark, the raw query of a request target. Of an absolute one
/// (RFC 9112, section 3.2.2) scheme and authority are passed over: they do not choose a backend.
pub(super) fn split_target(head: &RequestHeader) -> (&[u8], &[u8]) {
    let mut target = head.raw_path();
    if !target.starts_with(b"/")
        && let Some(at) = target.windows(3).position(|window| window == b"://")
    {
        let rest = &target[at + 3..];
        let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?'));
        target = &rest[end.unwrap_or(rest.len())..];
    }
    match target.iter().position(|byte| *byte == b'?') {
        Some(at) => target.split_at(at),
        None => (target, b""),
    }
}

fn check_bounds(head: &RequestHeader, bounds: &ClientBounds) -> Result<(), Refusal> {
    if head.raw_path().len() > bounds.url_bytes_max {
        return Err(Refusal::UrlTooLong { bytes_max: bounds.url_bytes_max });
    }
    let head_bytes: usize =
        head.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if head_bytes > bounds.head_bytes_max {
        return Err(Refusal::HeadTooLarge { bytes_max: bounds.head_bytes_max });
    }
    Ok(())
}

/// Refuses what Pingora lets pass and a server must not (RFC 9112, sections 3.2 and 6.1).
fn check_head(head: &RequestHeader) -> Result<(), Refusal> {
    let bad = |reason| Err(Refusal::BadRequest { reason });
    let is_host = |byte: &u8| byte.is_ascii_alphanumeric() || b".-_:[]%~".contains(byte);
    match head.headers.get(HOST) {
        None if head.version == Version::HTTP_11 => return bad("the Host header is missing"),
        Some(host) if !host.as_bytes().iter().all(is_host) => {
            return bad("the Host header is not a host");
        }
        _ => {}
    }
    let codings = head.headers.get_all(TRANSFER_ENCODING).iter().enumerate();
    for (at, coding) in codings {
        if at > 0 || !coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") {
            return bad("chunked, once, is the only transfer coding that is taken");
        }
    }
    Ok(())
}

/// The origin to allow, where the request comes from a browser on one that may talk to us.
fn cors_origin(origins: &CorsOrigins, headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(ORIGIN)?;
    match origins {
        CorsOrigins::Off => None,
        CorsOrigins::Any => Some(HeaderValue::from_static("*")),
        CorsOrigins::Listed(listed) => listed.contains(origin).then(|| origin.clone()),
    }
}

/// The answer to a browser that asks whether it may send a request of another origin. Other
/// `OPTIONS` requests are traffic.
fn preflight(head: &RequestHeader, exchange: &Exchange) -> Option<Response<Bytes>> {
    let asks = head.method == Method::OPTIONS
        && head.headers.contains_key(ORIGIN)
        && head.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    if !asks || *exchange.arrived.cors() == CorsOrigins::Off {
        return None;
    }
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::NO_CONTENT;
    if exchange.arrived.cors_origin.is_none() {
        // Without a word of permission the browser refuses.
        return Some(response);
    }
    let headers = response.headers_mut();
    let methods = HeaderValue::from_static(METHODS);
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
    // A wildcard would not cover Authorization (Fetch standard, 3.3.4): the wish is repeated.
    if let Some(wanted) = head.headers.get(ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
    }
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400"));
    Some(response)
}

/// Who sent the request: the peer, or behind trusted proxies the address that the last of them saw.
fn client(session: &Session, trusted: &[IpNet], trusts_unix: bool) -> Client {
    let peer = session.client_addr().and_then(|address| address.as_inet());
    let peer = peer.map(|address| address.ip().to_canonical());
    let peer_is_trusted = peer.map_or(trusts_unix, |peer| is_among(trusted, peer));
    let forwarded = if peer_is_trusted {
        forwarded_client(&session.req_header().headers, trusted)
    } else {
        None
    };
    Client { peer, address: forwarded.or(peer), peer_is_trusted }
}

/// The address that the last trusted proxy saw, by `X-Forwarded-For`: the first from the right that is
/// not itself trusted.
#[must_use]
pub fn forwarded_client(headers: &HeaderMap, trusted: &[IpNet]) -> Option<IpAddr> {
    let mut hops: Vec<IpAddr> = Vec::new();
    for value in headers.get_all(X_FORWARDED_FOR) {
        for hop in value.to_str().unwrap_or_default().split(',') {
            // What stands left of something unreadable cannot be believed.
            match forwarded_address(hop.trim()) {
                Some(address) => hops.push(address.to_canonical()),
                None => hops.clear(),
            }
        }
    }
    hops.iter().rev().find(|hop| !is_among(trusted, **hop)).or(hops.first()).copied()
}

fn is_among(networks: &[IpNet], address: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(&address))
}

/// Reads an address of `X-Forwarded-For`; some load balancers write the port too.
fn forwarded_address(hop: &str) -> Option<IpAddr> {
    let bare = hop.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(hop);
    let with_port = |_| hop.parse::<SocketAddr>().map(|address| address.ip());
    bare.parse().or_else(with_port).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarded_addresses_are_read_with_and_without_a_port() {
        let read = |hop| forwarded_address(hop).map(|address| address.to_string());
        for (hop, address) in [
            ("203.0.113.7", "203.0.113.7"),
            ("203.0.113.7:4711", "203.0.113.7"),
            ("2001:db8::1", "2001:db8::1"),
            ("[2001:db8::1]", "2001:db8::1"),
            ("[2001:db8::1]:4711", "2001:db8::1"),
        ] {
            assert_eq!(read(hop).as_deref(), Some(address), "{hop}");
        }
        for hop in ["", "unknown", "_hidden", "1.2.3", "203.0.113.7:http"] {
            assert_eq!(read(hop), None, "{hop}");
        }
    }
}
