//! The response head as a client gets it.

use http::header::{CONNECTION, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderName, StatusCode, Version};
use pingora::http::ResponseHeader;
use pingora_core::Result;
use pingora_proxy::Session;

use super::exchange::Exchange;
use super::{Proxy, respond};
use crate::lifecycle::Phase;
use crate::telemetry::REQUEST_ID;

/// Headers that speak of the connection to the backend (RFC 9110, section 7.6.1). `Connection` and
/// `Transfer-Encoding` are Pingora's to write.
const HOP_BY_HOP: [HeaderName; 2] =
    [HeaderName::from_static("keep-alive"), HeaderName::from_static("proxy-connection")];

/// Headers by which a backend would overrule the gateway's own CORS answer.
const CORS: [HeaderName; 3] = [
    http::header::ACCESS_CONTROL_ALLOW_ORIGIN,
    http::header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
    http::header::ACCESS_CONTROL_EXPOSE_HEADERS,
];

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
    hop_by_hop(response);
    response.insert_header(REQUEST_ID, exchange.arrived.request_id.clone())?;
    if exchange.arrived.cors_origin.is_some() {
        for header in &CORS {
            response.remove_header(header);
        }
        respond::allow_origin(response, exchange)?;
    }
    if exchange.arrived.is_http_10 {
        // HTTP/1.0 knows no chunks: the body ends with the connection.
        if response.remove_header(&TRANSFER_ENCODING).is_some() {
            session.set_keepalive(None);
        }
        response.set_version(Version::HTTP_10);
    }
    if proxy.lifecycle.phase() == Phase::Draining {
        session.set_keepalive(None);
    }
    Ok(())
}

fn hop_by_hop(response: &mut ResponseHeader) {
    let nominated: Vec<HeaderName> = response
        .headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .filter(|name| !matches!(*name, CONNECTION | UPGRADE | TRANSFER_ENCODING))
        .filter(|name| *name != http::header::CONTENT_LENGTH)
        .collect();
    for name in nominated.iter().chain(&HOP_BY_HOP) {
        response.remove_header(name);
    }
    if response.status != StatusCode::SWITCHING_PROTOCOLS {
        response.remove_header(&UPGRADE);
    }
}
