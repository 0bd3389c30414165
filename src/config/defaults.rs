//! What holds where nothing is written, with the reason for each number.

use std::time::Duration;

use super::snapshot::{Deadlines, DefaultsOf};

/// Services cannot have these names: they are paths of our own.
pub(super) const RESERVED_SERVICES: [&str; 6] =
    ["v1", "health", "ready", "api", "metrics", "stats"];

/// Clients and servers that mean to go on send a ping within a minute.
const WEBSOCKET_IDLE: Duration = Duration::from_secs(10 * 60);

/// OpenAI ends a Realtime session after one hour.
const WEBSOCKET_TOTAL: Duration = Duration::from_secs(2 * 60 * 60);

/// Defaults that depend on where the configuration comes from.
pub(super) struct Defaults {
    pub(super) of: DefaultsOf,
    /// Whether every origin may send traffic.
    pub(super) cors_any: bool,
    pub(super) deadlines: Deadlines,
    pub(super) retries_max: u32,
    pub(super) retry_delay: Duration,
    pub(super) retry_budget: f64,
    pub(super) breaker: BreakerDefaults,
    pub(super) inflight_max: u32,
    pub(super) shutdown_timeout: Duration,
    pub(super) idle_connections: u32,
}

/// The part of the breaker's defaults that depends on the source.
pub(super) struct BreakerDefaults {
    pub(super) open: Duration,
    pub(super) open_max: Duration,
    pub(super) failure_rate: f64,
    pub(super) slow_start: Duration,
    pub(super) ejected_max: f64,
    pub(super) fail_open: bool,
}

/// For a file written for Tollgate.
pub(super) const FILE: Defaults = Defaults {
    of: DefaultsOf::Tollgate,
    cors_any: false,
    deadlines: Deadlines {
        // A LAN or a nearby region answers a SYN within 1 s even when one is lost.
        connect: Duration::from_secs(3),
        // Two or three round trips and a signature.
        tls: Duration::from_secs(5),
        // A 100,000 token prompt can take a minute of prefill before its first byte.
        first_byte: Duration::from_secs(120),
        silence: Duration::from_secs(120),
        // Reasoning models think for a quarter of an hour.
        exchange: Duration::from_secs(30 * 60),
        websocket_idle: WEBSOCKET_IDLE,
        websocket_total: WEBSOCKET_TOTAL,
    },
    retries_max: 2,
    retry_delay: Duration::from_millis(25),
    // As Envoy and Linkerd have it: retries add a fifth to a backend's load at most.
    retry_budget: 0.2,
    breaker: BreakerDefaults {
        open: Duration::from_secs(10),
        open_max: Duration::from_secs(300),
        failure_rate: 0.5,
        slow_start: Duration::from_secs(30),
        ejected_max: 0.5,
        fail_open: true,
    },
    // Engines queue by themselves; a bound is for those that fall over.
    inflight_max: 0,
    // Streams of several minutes are common; a drain that ends early costs nothing.
    shutdown_timeout: Duration::from_secs(15 * 60),
    idle_connections: 128,
};

/// For a `backends.json` or variables written for the tools that Tollgate replaces: their defaults.
pub(super) const ENVIRONMENT: Defaults = Defaults {
    of: DefaultsOf::BackendsJson,
    cors_any: true,
    deadlines: Deadlines {
        connect: Duration::from_secs(30),
        tls: Duration::from_secs(30),
        first_byte: Duration::from_secs(30),
        silence: Duration::from_secs(30),
        exchange: Duration::from_secs(300),
        websocket_idle: WEBSOCKET_IDLE,
        websocket_total: WEBSOCKET_TOTAL,
    },
    retries_max: 3,
    retry_delay: Duration::from_secs(1),
    retry_budget: 1.0,
    breaker: BreakerDefaults {
        open: Duration::from_secs(60),
        open_max: Duration::from_secs(60),
        failure_rate: 1.0,
        slow_start: Duration::ZERO,
        ejected_max: 1.0,
        fail_open: false,
    },
    inflight_max: 100,
    shutdown_timeout: Duration::from_secs(30),
    idle_connections: 20,
};

/// As providers have theirs.
pub(super) const LIMIT_WINDOW: Duration = Duration::from_secs(60);

/// Most answers are shorter; what a longer one takes counts when it is known.
pub(super) const OUTPUT_TOKENS_ASSUMED: u64 = 1024;

/// The limit that RATE_LIMIT_REQUESTS and RATE_LIMIT_WINDOW are.
pub(super) const RATE_LIMIT_REQUESTS: u64 = 100;
pub(super) const RATE_LIMIT_WINDOW: Duration = Duration::from_secs(60);

/// Clocks that are kept by NTP are closer; laptops are not.
pub(super) const JWT_LEEWAY: Duration = Duration::from_secs(30);

/// A server near by answers within a millisecond; what takes longer is not well.
pub(super) const REDIS_TIMEOUT: Duration = Duration::from_millis(200);

/// Each takes some ten thousand requests a second.
pub(super) const REDIS_CONNECTIONS: u32 = 2;
pub(super) const REDIS_PREFIX: &str = "tollgate";

/// As in the tools that Tollgate replaces.
pub(super) const CACHE_TTL: Duration = Duration::from_secs(300);

/// Some 10,000 answers of a chat.
pub(super) const CACHE_MEMORY_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A stream of 4,000 tokens in events of 250 bytes, or some 250 embeddings in text.
pub(super) const CACHE_ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// Beside the configuration, where systemd names no folder for state.
pub(super) const STATE_DIRECTORY: &str = "state";

/// The request log, in the folder that the system gives for logs, and where there is none.
pub(super) const REQUEST_LOG_NAME: &str = "requests.log";
pub(super) const REQUEST_LOG_FILE: &str = "logs/requests.log";

/// Some 200,000 lines: small enough to be opened, large enough to hold an hour of a busy gateway.
pub(super) const ROTATE_BYTES: u64 = 100 * 1024 * 1024;
pub(super) const ROTATE_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

/// A week, where they are put aside once a day.
pub(super) const ROTATE_KEEP: u32 = 7;

/// Some 15,000 lines: a disk may stand still for a second of a very busy gateway.
pub(super) const REQUEST_LOG_QUEUE_BYTES_MAX: usize = 8 * 1024 * 1024;

/// A few seconds of a busy gateway, at most some MiB.
pub(super) const TRACES_QUEUE_MAX: u32 = 4096;

pub(super) const LEDGER_FILE: &str = "ledger.db";

/// Twenty seconds of 5,000 exchanges each: as long a disk may stand still.
pub(super) const LEDGER_QUEUE_ROWS_MAX: u32 = 100_000;

/// About three million rows: as long a database may be away.
pub(super) const LEDGER_SPOOL_BYTES_MAX: usize = 1024 * 1024 * 1024;

pub(super) const CURRENCY: &str = "USD";

/// As providers write their prices.
pub(super) const PRICES_PER: u64 = 1_000_000;

pub(super) const LISTEN_HOST: &str = "0.0.0.0";
pub(super) const LISTEN_PORT: u16 = 8000;

/// Browsers and SDK pools keep connections for about a minute; nginx's default is 75 s.
pub(super) const CLIENT_IDLE_TIMEOUT: Duration = Duration::from_secs(75);

/// A head is one packet or two; nginx's default is 60 s, and slow heads are an attack.
pub(super) const CLIENT_HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// Ten minutes bring a gigabyte over 15 Mbit/s.
pub(super) const CLIENT_BODY_DEADLINE: Duration = Duration::from_secs(10 * 60);

/// Slower than any modem: who sends a body like that holds a connection on purpose.
pub(super) const CLIENT_BODY_RATE_MIN: usize = 512;

/// Twice the largest file that OpenAI's API takes.
pub(super) const CLIENT_BODY_BYTES_MAX: usize = 1024 * 1024 * 1024;

/// Each is a descriptor and up to 100 KB; with as many towards backends, half of the unit's limit.
pub(super) const CLIENT_CONNECTIONS_MAX: u32 = 32_768;

/// Behind a load balancer all clients have one address: only an operator can know a bound.
pub(super) const CLIENT_CONNECTIONS_PER_ADDRESS_MAX: u32 = 0;

/// The least that RFC 9113 (section 6.5.2) recommends, and what most servers have.
pub(super) const HTTP2_STREAMS_MAX: u32 = 100;

/// A conversation of 200,000 tokens with a dozen images.
pub(super) const REPLAY_BODY_BYTES_MAX: usize = 32 * 1024 * 1024;

/// 32 of the largest bodies, or 10,000 prompts of 100 KB.
pub(super) const REPLAY_TOTAL_BYTES_MAX: usize = 1024 * 1024 * 1024;

/// Longer than this and a client had better hear of it.
pub(super) const RETRY_AFTER_MAX: Duration = Duration::from_secs(10);

pub(super) const RETRY_STATUSES: [u16; 4] = [429, 502, 503, 504];

/// A 500 that came at once is a server that is not well; a late one may be the request's fault, and
/// costs as long again.
pub(super) const RETRY_FAST_500: Duration = Duration::from_secs(2);

/// So that a pool with little traffic can still fail over.
pub(super) const RETRY_BUDGET_MIN: u32 = 10;

pub(super) const BREAKER_CONSECUTIVE_FAILURES: u32 = 5;
pub(super) const BREAKER_FAILURE_RATE_EXCHANGES: u32 = 10;
pub(super) const BREAKER_WINDOW: Duration = Duration::from_secs(30);

pub(super) const QUEUE_LENGTH_MAX: u32 = 1024;

/// SDKs wait for minutes, people for half of one.
pub(super) const QUEUE_TIMEOUT: Duration = Duration::from_secs(30);

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

/// Letters of a stream that a guard holds back for its patterns: card numbers, keys and addresses are shorter.
pub(super) const GUARD_HOLD_BACK: u32 = 64;
pub(super) const GUARD_REPLACEMENT: &str = "[removed]";

/// About what a log line may have: most prompts and answers.
pub(super) const CAPTURE_BYTES_MAX: usize = 64 * 1024;

/// A million tokens of text.
pub(super) const GUARD_ANSWER_BYTES_MAX: usize = 8 * 1024 * 1024;
