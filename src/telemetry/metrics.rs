//! The names of all metrics, with their kinds, labels and help texts. The README has the same table.

/// A metric as Prometheus is told of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// Whether it only grows, or what else.
    pub kind: Kind,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it tells.
    pub help: &'static str,
}

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
    /// Counts by size.
    Histogram,
}

const OF_POOL: &[&str] = &["service", "model"];
const OF_BACKEND: &[&str] = &["service", "model", "backend"];

macro_rules! metrics {
    ($($id:ident: $kind:ident $name:literal $labels:expr, $help:literal;)*) => {
        $(#[doc = $help]
        pub const $id: Metric =
            Metric { name: $name, kind: Kind::$kind, labels: $labels, help: $help };)*

        /// All of them, in the order of the README's table.
        pub const ALL: &[Metric] = &[$($id),*];
    };
}

metrics! {
    REQUESTS: Counter "proxy_requests_total" &["service", "model", "method", "status"],
        "Exchanges. The one without labels is all of them.";
    ERRORS: Counter "proxy_errors_total" &["service", "model", "kind"],
        "Exchanges that failed and were not the client's fault. The one without labels is all of them.";
    DURATION: Histogram "proxy_request_duration_seconds" OF_POOL,
        "From the request's head to the end of the answer. Like the next two, of exchanges that a backend answered with a status below 400.";
    FIRST_BYTE: Histogram "proxy_time_to_first_byte_seconds" OF_POOL,
        "From the request's head to the first byte of the answer's body.";
    PER_TOKEN: Histogram "proxy_time_per_output_token_seconds" OF_POOL,
        "Of streams: from the first byte to the end, for each token after the first.";
    OVERHEAD: Histogram "proxy_overhead_seconds" &[],
        "What the gateway itself took of an exchange, without all that it waited for.";
    TOKENS: Counter "proxy_tokens_total" &["service", "model", "direction"],
        "Tokens of prompts (input) and answers (output).";
    CACHED: Counter "proxy_tokens_cached_total" OF_POOL,
        "Tokens of prompts that a backend read from its cache.";
    WASTED: Counter "proxy_tokens_wasted_total" &["service", "model", "reason"],
        "Tokens of answers that nobody got to the end, by what ended them.";
    COST: Counter "proxy_cost_total" &["service", "model", "currency"],
        "What tokens cost.";
    UNPRICED: Counter "proxy_unpriced_total" &[],
        "Exchanges in the ledger whose model has no price.";
    CLIENT_ABORTS: Counter "proxy_client_aborts_total" OF_POOL,
        "Exchanges whose client left before the end.";
    INFLIGHT: Gauge "proxy_inflight" &[],
        "Exchanges in flight.";
    CONNECTIONS: Gauge "proxy_connections" &[],
        "Open connections of clients.";
    CONNECTIONS_REFUSED: Counter "proxy_connections_refused_total" &[],
        "Connections that were refused because there were too many.";
    BUFFERED_BYTES: Gauge "proxy_buffered_bytes" &[],
        "Bytes that are held: of request bodies, to be sent again; of answers, for hooks to look at and for who shares them.";
    QUEUE_LENGTH: Gauge "proxy_queue_length" OF_POOL,
        "Exchanges that wait for a place at a backend.";
    RETRIES: Counter "proxy_retries_total" OF_POOL,
        "Attempts after the first one.";
    FALLBACKS: Counter "proxy_fallbacks_total" OF_POOL,
        "Exchanges for which another model was asked, by the one that could not serve.";
    RATE_LIMITED: Counter "proxy_rate_limited_total" &["limit"],
        "Exchanges that a limit refused.";
    LIMITS_SHADOWED: Counter "proxy_limits_shadowed_total" &["limit"],
        "Exchanges that a limit in shadow mode would have refused.";
    CACHE_REQUESTS: Counter "proxy_cache_requests_total" &["service", "model", "outcome"],
        "Requests to models whose answers are kept: hit (answered without a backend), miss, bypass.";
    CACHE_TOKENS: Counter "proxy_cache_saved_tokens_total" &["service", "model", "direction"],
        "Tokens that backends did not take because of hits: of prompts (input) and answers (output).";
    CACHE_COST: Counter "proxy_cache_saved_cost_total" &["service", "model", "currency"],
        "What those would have cost.";
    CACHE_ANSWERS: Gauge "proxy_cache_answers" &[],
        "Answers that are kept in memory.";
    CACHE_BYTES: Gauge "proxy_cache_bytes" &[],
        "Bytes that those take.";
    HOOK_RUNS: Counter "proxy_hook_runs_total" &["hook", "outcome"],
        "Times that a hook ran, by what became of it: skipped, passed, found, refused, answered or failed.";
    HOOK_SECONDS: Counter "proxy_hook_seconds_total" &["hook"],
        "Time that a hook took.";
    MIRRORED: Counter "proxy_mirrored_total" &["service", "model", "outcome"],
        "Copies of requests that a mirror sends to the model: answered, failed or dropped (no room).";
    BACKEND_REQUESTS: Counter "proxy_backend_requests_total" OF_BACKEND,
        "Attempts at the backend.";
    BACKEND_UP: Gauge "proxy_backend_up" OF_BACKEND,
        "0 when health checks found the backend unhealthy, else 1.";
    BREAKER_STATE: Gauge "proxy_backend_breaker_state" OF_BACKEND,
        "Circuit breaker: 0 closed, 1 half open, 2 open.";
    BACKEND_MISCONFIGURED: Gauge "proxy_backend_misconfigured" OF_BACKEND,
        "1 when the backend refuses the credential that it is sent (401 or 403).";
    BACKEND_DRAINED: Gauge "proxy_backend_drained" OF_BACKEND,
        "1 when an operator has drained the backend.";
    BACKEND_INFLIGHT: Gauge "proxy_backend_inflight" OF_BACKEND,
        "Exchanges in flight towards the backend.";
    BACKEND_RESPONSE_TIME: Gauge "proxy_backend_response_time_seconds" OF_BACKEND,
        "Time to the answer of the last health check that passed.";
    LEDGER_ROWS: Counter "proxy_ledger_rows_total" &["stage"],
        "Rows of the ledger: spooled (safe on disk), stored (in the database), dropped (lost).";
    LEDGER_SPOOL_BYTES: Gauge "proxy_ledger_spool_bytes" &[],
        "Bytes of rows that the ledger's database does not have yet.";
    LEDGER_UP: Gauge "proxy_ledger_up" &["part"],
        "1 while a part of the ledger (spool, database) takes rows.";
    REDIS_UP: Gauge "proxy_redis_up" &[],
        "1 while Redis answers; 0 while limits hold in each gateway by itself, and no answers are kept there.";
    REDIS_FAILURES: Counter "proxy_redis_failures_total" &[],
        "Round trips to Redis without an answer.";
    GATEWAYS: Gauge "proxy_gateways" &[],
        "Gateways that shared limits in Redis when it was last asked.";
    LOG_LINES: Counter "proxy_request_log_lines_total" &["outcome"],
        "Lines of the request log: written, dropped (lost).";
    SPANS: Counter "proxy_spans_total" &["outcome"],
        "Spans of traces: sent, dropped (lost).";
    RELOADS: Counter "proxy_reloads_total" &["outcome"],
        "Reloads of the configuration: ok, failed.";
    GENERATION: Gauge "proxy_config_generation" &[],
        "The configuration at work: 1 at the start, one more with each that is taken up.";
    LAST_RELOAD: Gauge "proxy_config_last_reload_successful" &[],
        "0 when the last reload failed, else 1.";
    CERTIFICATE: Gauge "proxy_certificate_expiry_timestamp_seconds" &["certificate"],
        "When a certificate of ours ends, in seconds since 1970, by its first name.";
    BUILD: Gauge "proxy_build_info" &["version"],
        "Always 1.";
}

/// Of exchanges: as OpenTelemetry has them for generative AI, and beyond, because a reasoning model thinks for a
/// quarter of an hour.
pub const DURATION_BUCKETS: &[f64] = &[
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84,
    327.68, 655.36,
];

/// Of first bytes: as OpenTelemetry has them, and beyond, because a long prompt takes more than 10 s of prefill.
pub const FIRST_BYTE_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
];

/// Of tokens: as OpenTelemetry has them, and below, because small models are faster.
pub const PER_TOKEN_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
];

/// Of our own time: from what an exchange takes at least to what nobody should ever see.
pub const OVERHEAD_BUCKETS: &[f64] = &[
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
    0.1, 0.25,
];
