//! An address to listen on, as it is written.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use super::defaults;

/// Longest path of a Unix socket (`sun_path` of Linux, with the zero that ends it).
pub(super) const UNIX_PATH_BYTES_MAX: usize = 107;

/// An address to listen on, and whether TLS is spoken there. As text: `0.0.0.0:8000`,
/// `https://0.0.0.0:8443`, `unix:/run/tollgate.sock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Where.
    pub at: ListenAt,
    /// Whether TLS is spoken.
    pub tls: bool,
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAt {
    /// A TCP port.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl Listen {
    /// A TCP port without TLS.
    #[must_use]
    pub fn tcp(address: SocketAddr) -> Self {
        Self { at: ListenAt::Tcp(address), tls: false }
    }

    /// Reads `host:port`, `:port`, `port` or a bare host, also behind `http://` or `https://`, or
    /// `unix:/path`; `*` and an empty host mean every address.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(path) = text.strip_prefix("unix:") {
            let fits = path.starts_with('/') && path.len() <= UNIX_PATH_BYTES_MAX;
            let is_plain = !path.contains(['\n', '=', '\0']);
            let at = ListenAt::Unix(path.into());
            return (fits && is_plain).then_some(Self { at, tls: false });
        }
        let (tls, rest) = match text.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            Some(_) => return None,
            None => (false, text),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        Some(Self { at: ListenAt::Tcp(address(rest)?), tls })
    }

    /// Whether two of them cannot both be listened on.
    #[must_use]
    pub fn collides(&self, other: &Self) -> bool {
        let is_chosen = matches!(self.at, ListenAt::Tcp(address) if address.port() == 0);
        self.at == other.at && !is_chosen
    }

    /// The address with another host or port; that of a Unix socket stays.
    pub(super) fn replace(&mut self, host: Option<IpAddr>, port: Option<u16>) {
        if let ListenAt::Tcp(address) = &mut self.at {
            address.set_ip(host.unwrap_or(address.ip()));
            address.set_port(port.unwrap_or(address.port()));
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.at {
            ListenAt::Tcp(address) if self.tls => write!(f, "https://{address}"),
            ListenAt::Tcp(address) => write!(f, "http://{address}"),
            ListenAt::Unix(_) => write!(f, "{}", self.at),
        }
    }
}

impl fmt::Display for ListenAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Listen {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text).ok_or("not an address to listen on")
    }
}

fn address(text: &str) -> Option<SocketAddr> {
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    if let Ok(port) = text.parse() {
        return Some(SocketAddr::new(host("")?, port));
    }
    if let Some(host) = host(text) {
        return Some(SocketAddr::new(host, defaults::LISTEN_PORT));
    }
    let (name, port) = text.rsplit_once(':')?;
    Some(SocketAddr::new(host(name)?, port.parse().ok()?))
}

/// Reads a listening host.
pub(super) fn host(text: &str) -> Option<IpAddr> {
    let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    match inner {
        "" | "*" => defaults::LISTEN_HOST.parse().ok(),
        "localhost" => Some(IpAddr::from([127, 0, 0, 1])),
        other => other.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_in_all_its_forms() {
        for (text, shown) in [
            ("8000", "http://0.0.0.0:8000"),
            (":81", "http://0.0.0.0:81"),
            ("*:81", "http://0.0.0.0:81"),
            ("localhost", "http://127.0.0.1:8000"),
            ("[::]:81", "http://[::]:81"),
            ("http://127.0.0.1:81/", "http://127.0.0.1:81"),
            ("https://0.0.0.0:8443", "https://0.0.0.0:8443"),
            ("unix:/run/t.sock", "unix:/run/t.sock"),
        ] {
            let listen = Listen::parse(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(listen.to_string(), shown);
            assert_eq!(Listen::parse(shown), Some(listen));
        }
        for wrong in ["", "x", "ftp://0.0.0.0:1", "unix:relative", "1.2.3.4:x", "https://"] {
            let is_default = wrong.is_empty() || wrong == "https://";
            assert_eq!(Listen::parse(wrong).is_some(), is_default, "{wrong}");
        }
    }
}
