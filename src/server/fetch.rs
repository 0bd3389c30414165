//! Asks others over HTTP, beside the traffic: for the keys of those who issue tokens, and to take spans.

use std::time::Duration;

use http::header::{ACCEPT, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, USER_AGENT};
use http::{HeaderName, HeaderValue};
use pingora::http::RequestHeader;
use pingora_core::connectors::http::Connector;
use pingora_core::protocols::http::client::HttpSession;
use pingora_core::upstreams::peer::HttpPeer;
use url::Url;

use crate::telemetry::advice;

/// How long it may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How much it may be.
const BYTES_MAX: usize = 1024 * 1024;

/// What is at a URL, as text.
///
/// # Errors
/// Why it cannot be had, for the log.
pub(super) async fn get(connector: &Connector, url: &Url) -> Result<String, String> {
    let body = within(ask(connector, url, "GET", &[], None)).await?;
    String::from_utf8(body).map_err(|_| "it is no text".to_owned())
}

/// Sends JSON to a URL, with these headers beside those that it takes.
///
/// # Errors
/// Why that cannot be done, for the log.
pub(super) async fn post(
    connector: &Connector,
    url: &Url,
    headers: &[(HeaderName, HeaderValue)],
    json: String,
) -> Result<(), String> {
    within(ask(connector, url, "POST", headers, Some(json))).await.map(|_| ())
}

async fn within<T>(ask: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let told = tokio::time::timeout(TIMEOUT, ask).await;
    told.map_err(|_| format!("no answer in {} s", TIMEOUT.as_secs()))?
}

async fn ask(
    connector: &Connector,
    url: &Url,
    method: &str,
    headers: &[(HeaderName, HeaderValue)],
    json: Option<String>,
) -> Result<Vec<u8>, String> {
    let words = |error: Box<pingora_core::Error>| advice(&error);
    let peer = peer(url).await?;
    let (mut session, _) = connector.get_http_session(&peer).await.map_err(words)?;
    session.set_read_timeout(Some(TIMEOUT));
    let target = match url.query() {
        Some(query) => format!("{}?{query}", url.path()),
        None => url.path().to_owned(),
    };
    let mut request = RequestHeader::build(method, target.as_bytes(), Some(8)).map_err(words)?;
    for (name, value) in [
        (HOST, authority(url)),
        (ACCEPT, "application/json".to_owned()),
        (USER_AGENT, concat!("tollgate/", env!("CARGO_PKG_VERSION")).to_owned()),
    ] {
        request.insert_header(name, value).map_err(words)?;
    }
    if let Some(json) = &json {
        request.insert_header(CONTENT_TYPE, "application/json").map_err(words)?;
        request.insert_header(CONTENT_LENGTH, json.len()).map_err(words)?;
    }
    for (name, value) in headers {
        request.insert_header(name.clone(), value.clone()).map_err(words)?;
    }
    if matches!(session, HttpSession::H1(_)) {
        request.insert_header(CONNECTION, "close").map_err(words)?;
    }
    session.write_request_header(Box::new(request)).await.map_err(words)?;
    if let Some(json) = json {
        session.write_request_body(json.into(), true).await.map_err(words)?;
    }
    session.finish_request_body().await.map_err(words)?;
    session.read_response_header().await.map_err(words)?;
    let status = session.response_header().map_or(0, |head| head.status.as_u16());
    if !(200..300).contains(&status) {
        return Err(format!("it answered {status}"));
    }
    let mut body = Vec::new();
    while let Some(chunk) = session.read_response_body().await.map_err(words)? {
        body.extend_from_slice(&chunk);
        if body.len() > BYTES_MAX {
            return Err(format!("more than {BYTES_MAX} bytes"));
        }
    }
    Ok(body)
}

async fn peer(url: &Url) -> Result<HttpPeer, String> {
    let host = url.host_str().unwrap_or_default();
    let port = url.port_or_known_default().unwrap_or(443);
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let mut found = tokio::net::lookup_host((bare, port)).await.map_err(|it| it.to_string())?;
    let address = found.next().ok_or("its name has no address")?;
    let mut peer = HttpPeer::new(address, url.scheme() == "https", bare.to_owned());
    peer.options.total_connection_timeout = Some(TIMEOUT);
    Ok(peer)
}

fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}
