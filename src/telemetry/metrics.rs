//! The names of all metrics, with their help texts.

/// Name and help text.
pub type Metric = (&'static str, &'static str);

/// Exchanges in flight.
pub const INFLIGHT: Metric = ("proxy_inflight", "Exchanges in flight.");

/// Request bodies that are held.
pub const BUFFERED_BYTES: Metric =
    ("proxy_buffered_bytes", "Bytes of request bodies that are held to be sent again.");

/// Reloads by outcome.
pub const RELOADS: Metric =
    ("proxy_reloads_total", "Reloads of the configuration since the start, by outcome.");

/// Exchanges refused by limits.
pub const RATE_LIMITED: Metric =
    ("proxy_rate_limited_total", "Exchanges that a limit refused, by its name.");

/// Exchanges that limits would have refused.
pub const LIMITS_SHADOWED: Metric = (
    "proxy_limits_shadowed_total",
    "Exchanges that a limit in shadow mode would have refused, by its name.",
);

/// Whether Redis answers.
pub const REDIS_UP: Metric =
    ("proxy_redis_up", "1 while Redis answers, 0 while limits hold in each gateway by itself.");

/// Failed round trips.
pub const REDIS_FAILURES: Metric =
    ("proxy_redis_failures_total", "Round trips to Redis without an answer.");

/// Gateways.
pub const GATEWAYS: Metric =
    ("proxy_gateways", "Gateways that shared limits in Redis when it was last asked.");

/// Rows of the ledger.
pub const LEDGER_ROWS: Metric = (
    "proxy_ledger_rows_total",
    "Rows of the ledger since the start: spooled (safe on disk), stored (in the database), dropped (lost).",
);

/// Rows that wait.
pub const LEDGER_SPOOL_BYTES: Metric =
    ("proxy_ledger_spool_bytes", "Bytes of rows that the ledger's database does not have yet.");

/// Whether the ledger's parts take rows.
pub const LEDGER_UP: Metric =
    ("proxy_ledger_up", "1 while a part of the ledger (spool, database) takes rows.");

/// Exchanges without a price.
pub const UNPRICED: Metric =
    ("proxy_unpriced_total", "Metered exchanges whose model has no price.");

/// Exchanges that wait.
pub const QUEUE_LENGTH: Metric =
    ("proxy_queue_length", "Exchanges that wait for a place at a backend.");

/// Further attempts.
pub const RETRIES: Metric = ("proxy_retries_total", "Attempts after the first one.");

/// Health by its checks.
pub const BACKEND_UP: Metric =
    ("proxy_backend_up", "0 when health checks found the backend unhealthy, else 1.");

/// Circuit breakers.
pub const BREAKER_STATE: Metric =
    ("proxy_backend_breaker_state", "Circuit breaker: 0 closed, 1 half open, 2 open.");

/// Credentials that are refused.
pub const BACKEND_MISCONFIGURED: Metric = (
    "proxy_backend_misconfigured",
    "1 when the backend refuses the credential that it is sent (401 or 403).",
);

/// Exchanges in flight towards a backend.
pub const BACKEND_INFLIGHT: Metric =
    ("proxy_backend_inflight", "Exchanges in flight towards the backend.");

/// The last check's time.
pub const BACKEND_RESPONSE_TIME: Metric = (
    "proxy_backend_response_time_seconds",
    "Time to the answer of the last health check that passed.",
);
