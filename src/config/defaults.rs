//! What holds where nothing is written, with the reason for each number.

use std::time::Duration;

use super::snapshot::DefaultsOf;

/// Services cannot have these names: they are paths of our own.
pub(super) const RESERVED_SERVICES: [&str; 6] =
    ["v1", "health", "ready", "api", "metrics", "stats"];

/// Defaults that depend on where the configuration comes from.
pub(super) struct Defaults {
    pub(super) of: DefaultsOf,
    /// Whether every origin may send traffic.
    pub(super) cors_any: bool,
    pub(super) connect_deadline: Duration,
    pub(super) silence_deadline: Duration,
    pub(super) shutdown_timeout: Duration,
    pub(super) idle_connections: u32,
}

/// For a file written for Tollgate.
pub(super) const FILE: Defaults = Defaults {
    of: DefaultsOf::Tollgate,
    cors_any: false,
    // A LAN or a nearby region answers a SYN within 1 s even when one is lost.
    connect_deadline: Duration::from_secs(3),
    // A 100,000 token prompt can take a minute of prefill before its first byte.
    silence_deadline: Duration::from_secs(120),
    // Streams of several minutes are common; a drain that ends early costs nothing.
    shutdown_timeout: Duration::from_secs(15 * 60),
    idle_connections: 128,
};

/// For a `backends.json` or variables written for the tools that Tollgate replaces: their defaults.
pub(super) const ENVIRONMENT: Defaults = Defaults {
    of: DefaultsOf::BackendsJson,
    cors_any: true,
    connect_deadline: Duration::from_secs(30),
    silence_deadline: Duration::from_secs(30),
    shutdown_timeout: Duration::from_secs(30),
    idle_connections: 20,
};

pub(super) const LISTEN_HOST: &str = "0.0.0.0";
pub(super) const LISTEN_PORT: u16 = 8000;

/// Browsers and SDK pools keep connections for about a minute; nginx's default is 75 s.
pub(super) const CLIENT_IDLE_TIMEOUT: Duration = Duration::from_secs(75);

/// A client that sends nothing for a minute in the middle of a body is gone; nginx's default.
pub(super) const CLIENT_BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// A client that takes less than 64 KiB a minute is slower than any text is read; nginx's default
/// for a stalled one is 60 s too.
pub(super) const CLIENT_WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// What most servers take as a request line.
pub(super) const URL_BYTES_MAX: usize = 8 * 1024;

/// Twice what the largest cookie jar or token needs; the HTTP/2 limit of Pingora too.
pub(super) const HEAD_BYTES_MAX: usize = 64 * 1024;

/// uvicorn, under most Python LLM servers, closes idle connections after 5 s: shorter than that
/// and no request meets a connection that is being closed.
pub(super) const UPSTREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// The usual TTL of service records in Kubernetes and cloud zones.
pub(super) const DNS_REFRESH: Duration = Duration::from_secs(30);

pub(super) const HEALTH_INTERVAL: Duration = Duration::from_secs(30);
pub(super) const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);
pub(super) const HEALTH_JITTER: f64 = 0.1;
pub(super) const HEALTHY_AFTER: u32 = 1;
pub(super) const UNHEALTHY_AFTER: u32 = 1;
pub(super) const HEALTH_METHOD: &str = "GET";
pub(super) const HEALTH_PATH: &str = "/health";
pub(super) const HEALTH_STATUS: u16 = 200;

pub(super) const WEIGHT: f64 = 1.0;

/// Larger weights than this are typing mistakes, and sums stay exact.
pub(super) const WEIGHT_MAX: f64 = 1_000_000.0;
