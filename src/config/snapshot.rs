//! The validated configuration: immutable, complete, no "not written" left in it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method};
use indexmap::IndexMap;
use ipnet::IpNet;

use crate::secret::{KeyHash, Secret};

/// What an exchange can rely on. Nothing in it changes.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Whose defaults hold where nothing is written.
    pub defaults_of: DefaultsOf,
    /// Addresses that take traffic.
    pub listen: Vec<SocketAddr>,
    /// Addresses for status, dashboard and metrics; empty: the traffic addresses serve them.
    pub admin_listen: Vec<SocketAddr>,
    /// Who may pass.
    pub clients: ClientKeys,
    /// Addresses whose forwarded headers are believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Origins whose browsers may send traffic.
    pub cors: CorsOrigins,
    /// Level of the application log.
    pub log_level: log::LevelFilter,
    /// Worker threads for traffic.
    pub threads: usize,
    /// Longest drain.
    pub shutdown_timeout: Duration,
    /// Bounds on clients.
    pub client: ClientBounds,
    /// Idle connections kept to one backend.
    pub idle_connections: usize,
    /// How often backends' names are looked up again.
    pub dns_refresh: Duration,
    /// Services by name, in the order of the file.
    pub services: IndexMap<String, Service>,
}

impl Snapshot {
    /// All pools with their service's and model's name.
    pub fn pools(&self) -> impl Iterator<Item = (&str, &str, &PoolSpec)> {
        self.services.iter().flat_map(|(service, models)| {
            models.models.iter().map(move |(model, pool)| (service.as_str(), model.as_str(), pool))
        })
    }
}

/// Whose defaults hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultsOf {
    /// Tollgate's own.
    Tollgate,
    /// Those of the tools that a `backends.json` comes from.
    BackendsJson,
}

/// Whose credentials are accepted.
#[derive(Clone, Debug, PartialEq)]
pub enum ClientKeys {
    /// No key is configured anywhere: everybody passes, with the credential they brought.
    Untouched,
    /// Only backends have keys: everybody passes, and their credential goes no further.
    Dropped,
    /// This key is needed.
    Required(KeyHash),
}

/// Origins of browsers that may send traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CorsOrigins {
    /// Cross-origin requests get no headers of ours.
    Off,
    /// Every origin.
    Any,
    /// Just these, as in an `Origin` header.
    Listed(Vec<HeaderValue>),
}

/// What a client may send and for how long it may be silent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientBounds {
    /// How long a connection may be idle between requests.
    pub idle_timeout: Duration,
    /// How long a client may be silent while it sends a body.
    pub body_timeout: Duration,
    /// How long a client may take for a piece of its answer (at most 64 KiB).
    pub write_timeout: Duration,
    /// Largest request target, in bytes.
    pub url_bytes_max: usize,
    /// Largest request head (names and values of all headers), in bytes.
    pub head_bytes_max: usize,
}

/// One service.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Models by name, in the order of the file.
    pub models: IndexMap<String, PoolSpec>,
}

/// How exchanges are spread over the backends of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// A client address keeps its backend while that is usable; weighted.
    Sticky,
    /// In turn, smoothly weighted.
    RoundRobin,
    /// The less busy of two drawn by weight.
    LeastInflight,
}

/// One pool.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolSpec {
    /// How a backend is chosen.
    pub balance: Balance,
    /// When backends are checked.
    pub health: HealthSpec,
    /// The backends, at least one, ids unique.
    pub backends: Vec<BackendSpec>,
}

/// When the backends of a pool are checked, and what turns their state.
#[derive(Clone, Debug, PartialEq)]
pub struct HealthSpec {
    /// Time between two rounds, above 0.
    pub interval: Duration,
    /// Share of the interval, 0 to 1, by which checks are spread.
    pub jitter: f64,
    /// Consecutive passes that make an unhealthy backend healthy.
    pub healthy_after: usize,
    /// Consecutive failures that make a backend unhealthy.
    pub unhealthy_after: usize,
}

/// One backend.
#[derive(Clone, Debug, PartialEq)]
pub struct BackendSpec {
    /// Unique within its pool.
    pub id: String,
    /// For people.
    pub name: String,
    /// Where it is.
    pub url: BackendUrl,
    /// Share of exchanges in proportion to the other backends; 0: drained.
    pub weight: f64,
    /// Serves only when no backend without this mark can.
    pub backup: bool,
    /// What it is sent as credential, ready-made.
    pub credential: Option<Credential>,
    /// How it is checked.
    pub probe: ProbeSpec,
    /// Longest wait for its connection, TLS included.
    pub connect_deadline: Duration,
    /// Longest silence before and between its bytes.
    pub silence_deadline: Duration,
    /// How long an idle connection to it is kept.
    pub idle_timeout: Duration,
}

/// A backend's URL, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendUrl {
    /// Whether it speaks TLS.
    pub tls: bool,
    /// Name or address.
    pub host: Host,
    /// TCP port.
    pub port: u16,
    /// Path before the client's path: empty, or `/...` without a slash at its end.
    pub base_path: String,
    /// `Host` header: the host, with the port where it is not the scheme's.
    pub authority: HeaderValue,
    /// As written, without credentials.
    pub shown: String,
}

/// Where a name or address leads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// An address.
    Address(IpAddr),
    /// A name to look up.
    Name(String),
}

/// A header that carries a credential.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    /// The header.
    pub header: HeaderName,
    /// Its value, marked sensitive.
    pub value: HeaderValue,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: [secret]", self.header)
    }
}

impl Credential {
    /// The header for `key` in a given mode; an error when the key cannot stand in a header.
    pub(super) fn new(mode: AuthMode, key: &Secret) -> Result<Option<Self>, &'static str> {
        let (header, text) = match mode {
            AuthMode::None => return Ok(None),
            AuthMode::Authorization => {
                (http::header::AUTHORIZATION, format!("Bearer {}", key.expose()))
            }
            AuthMode::Header(name) => (HeaderName::from_static(name), key.expose().to_owned()),
        };
        Self::raw(header, &text).map(Some)
    }

    /// A header with a value that is already in its final form.
    pub(super) fn raw(header: HeaderName, text: &str) -> Result<Self, &'static str> {
        let mut value = HeaderValue::from_str(text)
            .map_err(|_| "the key has characters that cannot stand in a header")?;
        value.set_sensitive(true);
        Ok(Self { header, value })
    }
}

/// How a credential is sent to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AuthMode {
    /// `Authorization: Bearer KEY`.
    Authorization,
    /// The key alone, in this header.
    Header(&'static str),
    /// Not at all.
    None,
}

/// How one backend is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeSpec {
    /// Hard limit for the whole check.
    pub timeout: Duration,
    /// Request method.
    pub method: Method,
    /// Request target below the backend's base path, beginning with a slash.
    pub path: String,
    /// Statuses that pass.
    pub expect_status: Vec<u16>,
    /// Headers sent besides `Host` and the credential.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}
