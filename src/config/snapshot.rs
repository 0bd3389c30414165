//! The validated configuration: immutable, complete, no "not written" left in it.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method};
use indexmap::IndexMap;
use ipnet::IpNet;

use super::cache::{CacheSpec, Caching};
use super::clients::ClientKeys;
use super::ledger::LedgerSpec;
use super::limits::{LimitSpec, Quantity};
use super::listen::Listen;
use super::naming::Naming;
use super::observed::Observed;
use super::prices::{Prices, Tariff};
use super::redis::RedisSpec;
use super::seen::SeenFile;
use crate::hooks::Chain;
use crate::networks::AddressRules;
use crate::secret::{Secret, SecretBytes};

/// What an exchange can rely on. Nothing in it changes.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Whose defaults hold where nothing is written.
    pub defaults_of: DefaultsOf,
    /// Addresses that take traffic.
    pub listen: Vec<Listen>,
    /// Addresses for status, dashboard and metrics; empty: the traffic addresses serve them.
    pub admin_listen: Vec<Listen>,
    /// What is needed to speak TLS on them.
    pub tls: Option<ListenerTls>,
    /// Who may pass.
    pub clients: ClientKeys,
    /// Where clients may come from.
    pub addresses: AddressRules,
    /// Where usage is kept, if it is.
    pub ledger: Option<LedgerSpec>,
    /// What tokens cost.
    pub prices: Prices,
    /// How much clients may take.
    pub limits: Vec<LimitSpec>,
    /// Where gateways share what they have taken.
    pub redis: Option<RedisSpec>,
    /// How long an answer gets, in tokens, where the request does not say how long it may: as much is reserved.
    pub output_tokens_assumed: u64,
    /// Whether what exchanges take is counted: their answers are read.
    pub meters: bool,
    /// Whether somebody pays or is held to it: then requests are read too, and backends asked to tell.
    pub charges: bool,
    /// Whether backends are asked to tell usage in streams whose clients did not ask for it.
    pub include_usage: bool,
    /// Addresses whose forwarded headers are believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Whether those of the peers of a Unix socket are, which have no address.
    pub trusts_unix: bool,
    /// Origins whose browsers may send traffic.
    pub cors: CorsOrigins,
    /// Level of the application log.
    pub log_level: log::LevelFilter,
    /// What is told of exchanges, and where.
    pub observed: Observed,
    /// Worker threads for traffic.
    pub threads: usize,
    /// Longest drain.
    pub shutdown_timeout: Duration,
    /// Bounds on clients.
    pub client: ClientBounds,
    /// Idle connections kept to one backend.
    pub idle_connections: usize,
    /// What is held of request bodies, so that they can be sent again.
    pub replay: ReplayBounds,
    /// Whether a change of the files below is taken up by itself.
    pub reload_on_change: bool,
    /// The files that this was read from: the configuration itself and those with secrets.
    pub files: Vec<SeenFile>,
    /// How often backends' names are looked up again.
    pub dns_refresh: Duration,
    /// What models are called besides their own names.
    pub naming: Naming,
    /// Whether anything but hooks asks for conditions.
    pub has_conditions: bool,
    /// The hooks of models that have any, by `service/model`.
    pub hooks: HashMap<String, Arc<Chain>>,
    /// Where answers are kept.
    pub cache: CacheSpec,
    /// How those of models are kept whose answers are, by `service/model`.
    pub caching: HashMap<String, Arc<Caching>>,
    /// Services by name, in the order of the file.
    pub services: IndexMap<String, Service>,
}

impl Snapshot {
    /// Origins whose browsers may send traffic to the service of this number.
    #[must_use]
    pub fn cors_of(&self, service: Option<usize>) -> &CorsOrigins {
        let service = service.and_then(|at| self.services.get_index(at));
        service.and_then(|(_, service)| service.cors.as_ref()).unwrap_or(&self.cors)
    }

    /// Whether there is a limit of tokens or money, of all or of a key.
    #[must_use]
    pub fn limits_tokens(&self) -> bool {
        let takes =
            |limit: &LimitSpec| matches!(limit.quantity, Quantity::Tokens(..) | Quantity::Money(_));
        self.limits_where(takes)
    }

    /// Whether there is such a limit, of all or of a key.
    fn limits_where(&self, is_it: impl Fn(&LimitSpec) -> bool) -> bool {
        let of_keys = match &self.clients {
            ClientKeys::Required(specs) => {
                let issuers = specs.issuers.iter().map(|issuer| issuer.grant.as_ref());
                specs.keys.iter().chain(issuers).any(|key| key.limits.iter().any(&is_it))
            }
            ClientKeys::Untouched | ClientKeys::Dropped => false,
        };
        of_keys || self.limits.iter().any(&is_it)
    }

    /// Whether a limit or the request log has a condition.
    pub(super) fn asks_for_conditions(&self) -> bool {
        let has = |limit: &LimitSpec| limit.when.is_some();
        let of_log = self.observed.request_log.as_ref().is_some_and(|log| log.when.is_some());
        of_log || self.limits_where(has)
    }

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

/// TLS towards clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerTls {
    /// At least one; the first is for clients that ask for no name, or for one that none is for.
    pub certificates: Vec<Certificate>,
    /// Whether clients have to show certificates.
    pub client_auth: ClientAuth,
    /// The oldest version that is spoken.
    pub min_version: TlsVersion,
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    /// 1.2 (RFC 5246).
    Tls12,
    /// 1.3 (RFC 8446).
    Tls13,
}

/// A certificate with its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// It and those that it is signed with, in DER.
    pub chain: Vec<Vec<u8>>,
    /// Its private key, in DER.
    pub key: SecretBytes,
    /// Host names that it is for, in lower case; one may begin with `*.`.
    pub names: Vec<String>,
    /// When it ends, in seconds since 1970.
    pub not_after: i64,
}

/// Whether clients have to show certificates, and of which authorities (in DER).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// They are not asked.
    Off,
    /// Who shows one must show a good one.
    Optional(Vec<Vec<u8>>),
    /// Without a good one there is no connection.
    Required(Vec<Vec<u8>>),
}

/// TLS towards a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendTls {
    /// Authorities that are believed, in DER; none: those of the system.
    pub ca: Option<Vec<Vec<u8>>>,
    /// What it is shown.
    pub client: Option<Certificate>,
    /// The name or address that its certificate must be for, and that is asked for (SNI).
    pub server_name: String,
    /// Whether its certificate is verified.
    pub verify: bool,
}

/// What a backend is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2; without TLS by prior knowledge.
    Http2,
    /// What the two of them agree on (ALPN); without TLS HTTP/1.1.
    Auto,
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
    /// How long a client may take for a whole request head, from its first byte.
    pub head_timeout: Duration,
    /// How long a client may be silent while it sends a body.
    pub body_timeout: Duration,
    /// How long it may take for a whole body.
    pub body_deadline: Duration,
    /// Slowest body, in bytes a second, on average; 0: any.
    pub body_rate_min: usize,
    /// Largest body, in bytes; 0: any.
    pub body_bytes_max: usize,
    /// How long a client may take for a piece of its answer (at most 64 KiB).
    pub write_timeout: Duration,
    /// Whether a client may close its sending side and still wait for its answer.
    pub half_close: bool,
    /// Open connections of all clients; 0: any number.
    pub connections_max: usize,
    /// Open connections of one address; 0: any number.
    pub connections_per_address_max: usize,
    /// Open streams of one HTTP/2 connection.
    pub http2_streams_max: u32,
    /// Largest request target, in bytes.
    pub url_bytes_max: usize,
    /// Largest request head (names and values of all headers), in bytes.
    pub head_bytes_max: usize,
}

/// What is held of request bodies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplayBounds {
    /// Largest body that is held, in bytes.
    pub body_bytes_max: usize,
    /// Most that is held of all bodies together, in bytes.
    pub total_bytes_max: usize,
}

impl ReplayBounds {
    /// As far a body is read, and decoded, to find which model it names. There is a little room also where
    /// nothing is held to be sent again.
    #[must_use]
    pub fn looked_bytes_max(&self) -> usize {
        self.body_bytes_max.max(64 * 1024)
    }
}

/// How long each part of an exchange with a backend may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// For a connection.
    pub connect: Duration,
    /// For its TLS handshake.
    pub tls: Duration,
    /// From the whole request to the head of its answer.
    pub first_byte: Duration,
    /// Between two bytes of the answer.
    pub silence: Duration,
    /// For the whole exchange, all attempts and waiting included.
    pub exchange: Duration,
    /// Of a WebSocket: in which both sides are silent.
    pub websocket_idle: Duration,
    /// Of a WebSocket: for all of it, in the place of the others.
    pub websocket_total: Duration,
}

/// When a failed attempt is followed by another one.
#[derive(Clone, Debug, PartialEq)]
pub struct RetrySpec {
    /// Most further attempts; those that found no connection while others were left do not count.
    pub retries_max: usize,
    /// Before a backend is asked a second time; it doubles with each.
    pub delay: Duration,
    /// Longest wait that a backend may ask for.
    pub retry_after_max: Duration,
    /// Statuses after which another backend is asked.
    pub statuses: Vec<u16>,
    /// A 500 is tried again if it came within this time.
    pub fast_500: Duration,
    /// Whether requests that are not idempotent (POST, PATCH) are tried again when a backend may
    /// have begun to work on them.
    pub non_idempotent: bool,
    /// Largest share of recent exchanges that may be further attempts.
    pub budget: f64,
    /// Further attempts within the budget's window that are always allowed.
    pub budget_min: usize,
}

/// When a backend's circuit opens, and for how long.
#[derive(Clone, Debug, PartialEq)]
pub struct BreakerSpec {
    /// Whether there is one.
    pub enabled: bool,
    /// Failures in a row that open it.
    pub consecutive_failures: u32,
    /// Share of failures within the window that opens it; above 1: never.
    pub failure_rate: f64,
    /// Exchanges within the window that a rate needs.
    pub failure_rate_exchanges: u32,
    /// What the rate is of.
    pub window: Duration,
    /// How long it is open at first; twice as long with each opening in a row.
    pub open: Duration,
    /// The longest that it is open.
    pub open_max: Duration,
    /// After a recovery, the time in which a backend comes back to its full share.
    pub slow_start: Duration,
    /// Largest share of a pool that is ejected; always at least one backend.
    pub ejected_max: f64,
    /// Whether ejected backends are asked when there is no other.
    pub fail_open: bool,
}

/// Where exchanges wait while every backend is full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueSpec {
    /// Most that wait; 0: nobody does.
    pub length_max: usize,
    /// The longest wait.
    pub timeout: Duration,
}

/// One service.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Where its clients may come from.
    pub addresses: AddressRules,
    /// Origins whose browsers may send it traffic; none: those of all.
    pub cors: Option<CorsOrigins>,
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
    /// When another attempt is made.
    pub retry: RetrySpec,
    /// When a backend is left alone.
    pub breaker: BreakerSpec,
    /// Where exchanges wait.
    pub queue: QueueSpec,
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
    /// What it is spoken to.
    pub protocol: Protocol,
    /// How, where it speaks TLS.
    pub tls: BackendTls,
    /// Share of exchanges in proportion to the other backends; 0: drained.
    pub weight: f64,
    /// Its group: it serves only when no backend of a lower number can.
    pub priority: u8,
    /// What the model is called there; none: as the client called it.
    pub model: Option<String>,
    /// What it is sent as credential, ready-made.
    pub credential: Option<Credential>,
    /// What its tokens cost, where that is not what the model's do.
    pub tariff: Option<Arc<Tariff>>,
    /// How it is checked.
    pub probe: ProbeSpec,
    /// Most exchanges in flight towards it; 0: any number.
    pub inflight_max: usize,
    /// How long the parts of an exchange with it may take.
    pub deadlines: Deadlines,
    /// How long an idle connection to it is kept.
    pub idle_timeout: Duration,
}

/// A backend's URL, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendUrl {
    /// Whether it speaks TLS.
    pub tls: bool,
    /// Name, address or path.
    pub host: Host,
    /// TCP port; 0 of a Unix socket.
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
    /// The path of a Unix socket.
    Unix(PathBuf),
}

/// A header that carries a credential.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    /// The header.
    pub header: HeaderName,
    /// Its value, marked sensitive.
    pub value: HeaderValue,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
