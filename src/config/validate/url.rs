//! A backend's URL, taken apart and checked.

use std::net::IpAddr;

use base64::Engine;
use base64::prelude::BASE64_STANDARD as BASE64;
use http::HeaderValue;
use percent_encoding::percent_decode_str;

use super::super::listen::UNIX_PATH_BYTES_MAX;
use super::super::snapshot::{BackendUrl, Host};

/// A URL, and the value of a Basic credential when it holds a user and password.
pub(super) struct ParsedUrl {
    pub(super) url: BackendUrl,
    pub(super) basic: Option<String>,
}

/// How a URL is written.
const AS: &str = "http://host:port, https://host or unix:/path";

/// Parses `http://host[:port][/base]` or `https://...`. An error never repeats the text: it may
/// hold a password.
pub(super) fn parse(text: &str) -> Result<ParsedUrl, String> {
    let text = text.trim();
    if let Some(rest) = text.strip_prefix("unix:") {
        return unix(rest);
    }
    let url = ::url::Url::parse(text)
        .map_err(|error| format!("not a URL ({error}); write it as {AS}"))?;
    let tls = match url.scheme() {
        "http" => false,
        "https" => true,
        // Of `host:port` too the part before the colon is taken for a scheme.
        other => return Err(format!("{other:?} is no scheme for a backend; write it as {AS}")),
    };
    if url.query().is_some() || url.fragment().is_some() {
        return Err("cannot hold a query or fragment; requests bring their own".to_owned());
    }
    let host = match url.host() {
        Some(::url::Host::Domain(name)) => Host::Name(name.to_owned()),
        Some(::url::Host::Ipv4(address)) => Host::Address(IpAddr::V4(address)),
        Some(::url::Host::Ipv6(address)) => Host::Address(IpAddr::V6(address)),
        None => return Err("has no host; write it as http://host:port".to_owned()),
    };
    let port = url.port_or_known_default().ok_or("has no port")?;
    if port == 0 {
        return Err("port 0 cannot be connected to".to_owned());
    }
    let host_text = url.host_str().unwrap_or_default();
    let authority = match url.port() {
        Some(port) => format!("{host_text}:{port}"),
        None => host_text.to_owned(),
    };
    let base_path = url.path().trim_end_matches('/').to_owned();
    let shown = format!("{}://{authority}{base_path}", url.scheme());
    let authority =
        HeaderValue::from_str(&authority).map_err(|_| "the host cannot stand in a header")?;
    Ok(ParsedUrl {
        basic: basic(&url),
        url: BackendUrl { tls, host, port, base_path, authority, shown },
    })
}

/// Parses what follows `unix:`: a socket's path and, behind another colon, a base path.
fn unix(text: &str) -> Result<ParsedUrl, String> {
    let (path, base_path) = text.split_once(':').unwrap_or((text, ""));
    let base_path = base_path.trim_end_matches('/');
    if !path.starts_with('/') || path.len() > UNIX_PATH_BYTES_MAX {
        let most = UNIX_PATH_BYTES_MAX;
        return Err(format!("expected unix:/path/to/socket, of {most} bytes at most"));
    }
    let is_base = |byte: u8| byte.is_ascii_graphic() && !b"?#".contains(&byte);
    if !(base_path.is_empty() || base_path.starts_with('/')) || !base_path.bytes().all(is_base) {
        return Err("expected a base path behind the socket's, as in unix:/run/x.sock:/v1".into());
    }
    Ok(ParsedUrl {
        basic: None,
        url: BackendUrl {
            tls: false,
            host: Host::Unix(path.into()),
            port: 0,
            base_path: base_path.to_owned(),
            authority: HeaderValue::from_static("localhost"),
            shown: format!("unix:{text}"),
        },
    })
}

fn basic(url: &::url::Url) -> Option<String> {
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    let decoded = |text: &str| percent_decode_str(text).collect::<Vec<u8>>();
    let mut pair = decoded(url.username());
    pair.push(b':');
    pair.extend(decoded(url.password().unwrap_or_default()));
    Some(BASE64.encode(pair))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_taken_apart() {
        let parsed = parse("https://user:p%40ss@api.example.com:8443/team/a/").unwrap();
        assert_eq!(parsed.url.host, Host::Name("api.example.com".into()));
        assert_eq!((parsed.url.tls, parsed.url.port), (true, 8443));
        assert_eq!(parsed.url.base_path, "/team/a");
        assert_eq!(parsed.url.authority, "api.example.com:8443");
        assert_eq!(parsed.url.shown, "https://api.example.com:8443/team/a");
        assert_eq!(parsed.basic.as_deref(), Some("dXNlcjpwQHNz"));
        let parsed = parse("unix:/run/vllm.sock:/base/").unwrap();
        assert_eq!(parsed.url.host, Host::Unix("/run/vllm.sock".into()));
        assert_eq!(parsed.url.base_path, "/base");
        let parsed = parse("http://[::1]:80/").unwrap();
        assert_eq!(parsed.url.base_path, "");
        assert_eq!(parsed.url.authority, "[::1]");
    }

    #[test]
    fn bad_urls_are_refused_without_repeating_them() {
        for text in [
            "",
            "localhost:5000",
            "ftp://h",
            "http://",
            "http://h:0",
            "http://h:99999",
            "http://user:hunter2@h/?x=1",
            "http://a b",
            "http://h/#x",
            "unix:run/x.sock",
            "unix:/run/x.sock:v1",
            "unix:",
        ] {
            let message = parse(text).err().unwrap_or_else(|| panic!("{text} was accepted"));
            assert!(!message.contains("hunter2"), "{message}");
        }
    }
}
