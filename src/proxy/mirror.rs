//! Copies of requests that other models get, too: their answers go nowhere, and nothing of them is waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, COOKIE, EXPECT, PROXY_AUTHORIZATION, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Version};
use pingora::http::RequestHeader;
use pingora_core::Result;
use pingora_core::connectors::http::Connector;
use pingora_core::protocols::http::client::HttpSession;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_proxy::Session;

use super::exchange::{Admitted, Exchange};
use super::{Proxy, heads, send};
use crate::auth::CREDENTIAL_HEADERS;
use crate::lifecycle::HeldShare;
use crate::pool::{Choice, Permit, Pool};
use crate::runtime::Target;
use crate::telemetry::Telemetry;

/// The most copies that one thread has on their way.
const COPIES_MAX: usize = 64;

/// Headers that speak of the client's connection (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [HeaderName; 8] = [
    CONNECTION,
    EXPECT,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// What sends copies, of one thread.
pub struct Mirror {
    connector: Connector,
    copies: AtomicUsize,
}

impl Default for Mirror {
    fn default() -> Self {
        Self { connector: Connector::new(None), copies: AtomicUsize::new(0) }
    }
}

/// A copy on its way.
struct Copy {
    of: Arc<Mirror>,
    pool: Arc<Pool>,
    permit: Permit,
    peer: HttpPeer,
    head: RequestHeader,
    body: Bytes,
    _share: HeldShare,
    telemetry: Arc<Telemetry>,
}

impl Drop for Copy {
    fn drop(&mut self) {
        self.of.copies.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Sends the copies of a request that hooks ask for. What there is no room for is dropped, and counted.
pub(super) fn send(proxy: &Proxy, session: &Session, exchange: &mut Exchange, admitted: &Admitted) {
    for to in std::mem::take(&mut exchange.hooks.mirrors) {
        let Some(way) = exchange.arrived.runtime.routes.get(&*to).cloned() else { continue };
        let target = &way.targets[0];
        match copy(proxy, session, exchange, admitted, target) {
            Some(copy) => {
                tokio::spawn(go(copy));
            }
            None => proxy.telemetry.counters.count_mirrored(target.names(), "dropped"),
        }
    }
}

fn copy(
    proxy: &Proxy,
    session: &Session,
    exchange: &mut Exchange,
    admitted: &Admitted,
    target: &Target,
) -> Option<Copy> {
    let Choice::Taken(permit) = target.pool.choose(&[], false, |_| true) else { return None };
    // Whether a backend is well again, its own requests find out.
    if permit.is_probe() {
        return None;
    }
    let spec = &permit.backend.spec;
    let peer = permit.backend.peer_at(&permit.backend.addresses.current()?).ok()?;
    let asked = admitted.asked.as_ref().map(|asked| asked.name.as_str());
    let name = spec.model.as_deref().or_else(|| target.called.name(asked)).map(str::to_owned);
    let replay = exchange.arrived.runtime.snapshot.replay;
    let coding = session.req_header().headers.get(CONTENT_ENCODING);
    let coding = coding.map(HeaderValue::as_bytes).unwrap_or_default();
    let (body, is_changed) = exchange.body.copy(name.as_deref(), coding, &replay)?;
    let mut share = HeldShare::none(&proxy.lifecycle.held);
    if !share.grow(body.len(), replay.total_bytes_max) {
        return None;
    }
    let mut head = session.req_header().clone();
    head.set_version(Version::HTTP_11);
    heads::change_request(&mut head, |headers| {
        end_to_end(headers);
        // The client has shown them to the model that it asked, and to no other.
        for name in CREDENTIAL_HEADERS.iter().chain(&[COOKIE, PROXY_AUTHORIZATION]) {
            headers.remove(name);
        }
        send::address(session, headers, exchange, (admitted, spec));
        if is_changed {
            headers.remove(CONTENT_ENCODING);
        }
        if !body.is_empty() || headers.contains_key(CONTENT_LENGTH) {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        }
    })
    .ok()?;
    send::target(&mut head, admitted, &spec.url, name.as_deref()).ok()?;
    let of = Arc::clone(&proxy.mirror);
    if of.copies.fetch_add(1, Ordering::Relaxed) >= COPIES_MAX {
        of.copies.fetch_sub(1, Ordering::Relaxed);
        return None;
    }
    let (pool, telemetry) = (Arc::clone(&target.pool), Arc::clone(&proxy.telemetry));
    Some(Copy { of, pool, permit, peer, head, body, _share: share, telemetry })
}

fn end_to_end(headers: &mut HeaderMap) {
    for name in heads::nominated(headers).iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// Sends a copy and reads its answer to the end, as long as that may take.
async fn go(copy: Copy) {
    let within = copy.permit.backend.spec.deadlines.exchange;
    let outcome = match tokio::time::timeout(within, exchange(&copy)).await {
        Ok(Ok(())) => "answered",
        Ok(Err(error)) => {
            log::debug!("a copy for {} failed: {error}", copy.pool.name());
            "failed"
        }
        Err(_) => "failed",
    };
    let (service, model) = copy.pool.name().split_once('/').unwrap_or_default();
    copy.telemetry.counters.count_mirrored((service, model), outcome);
}

async fn exchange(copy: &Copy) -> Result<()> {
    let deadlines = &copy.permit.backend.spec.deadlines;
    let (mut session, _) = copy.of.connector.get_http_session(&copy.peer).await?;
    let silence: Duration = deadlines.silence.max(deadlines.first_byte);
    session.set_read_timeout(Some(silence));
    session.set_write_timeout(Some(silence));
    let mut head = copy.head.clone();
    if matches!(session, HttpSession::H2(_)) {
        head.set_version(Version::HTTP_2);
    }
    session.write_request_header(Box::new(head)).await?;
    if !copy.body.is_empty() {
        session.write_request_body(copy.body.clone(), true).await?;
    }
    session.finish_request_body().await?;
    session.read_response_header().await?;
    while session.read_response_body().await?.is_some() {}
    let idle = copy.permit.backend.spec.idle_timeout;
    copy.of.connector.release_http_session(session, &copy.peer, Some(idle)).await;
    Ok(())
}
