//! Fetches what is public from somewhere else: the keys of those who issue tokens.

use std::time::Duration;

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
    let got = tokio::time::timeout(TIMEOUT, ask(connector, url)).await;
    got.map_err(|_| format!("no answer in {} s", TIMEOUT.as_secs()))?
}

async fn ask(connector: &Connector, url: &Url) -> Result<String, String> {
    let host = url.host_str().unwrap_or_default();
    let port = url.port_or_known_default().unwrap_or(443);
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let mut found = tokio::net::lookup_host((bare, port)).await.map_err(|it| it.to_string())?;
    let address = found.next().ok_or("its name has no address")?;
    let is_tls = url.scheme() == "https";
    let mut peer = HttpPeer::new(address, is_tls, bare.to_owned());
    peer.options.total_connection_timeout = Some(TIMEOUT);
    let words = |error: Box<pingora_core::Error>| advice(&error);
    let (mut session, _) = connector.get_http_session(&peer).await.map_err(words)?;
    session.set_read_timeout(Some(TIMEOUT));
    let target = match url.query() {
        Some(query) => format!("{}?{query}", url.path()),
        None => url.path().to_owned(),
    };
    let mut request = RequestHeader::build("GET", target.as_bytes(), Some(4)).map_err(words)?;
    let authority = match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    };
    for (name, value) in [
        ("Host", authority.as_str()),
        ("Accept", "application/json"),
        ("User-Agent", concat!("tollgate/", env!("CARGO_PKG_VERSION"))),
    ] {
        request.insert_header(name, value).map_err(words)?;
    }
    if matches!(session, HttpSession::H1(_)) {
        request.insert_header("Connection", "close").map_err(words)?;
    }
    session.write_request_header(Box::new(request)).await.map_err(words)?;
    session.finish_request_body().await.map_err(words)?;
    session.read_response_header().await.map_err(words)?;
    let status = session.response_header().map_or(0, |head| head.status.as_u16());
    if status != 200 {
        return Err(format!("it answered {status}"));
    }
    let mut body = Vec::new();
    while let Some(chunk) = session.read_response_body().await.map_err(words)? {
        body.extend_from_slice(&chunk);
        if body.len() > BYTES_MAX {
            return Err(format!("more than {BYTES_MAX} bytes"));
        }
    }
    String::from_utf8(body).map_err(|_| "it is no text".to_owned())
}
