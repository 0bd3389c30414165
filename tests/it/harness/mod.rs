//! The test kit: a gateway process, scriptable upstreams, and a client of raw bytes.

mod client;
mod gateway;
mod http2;
mod metrics;
mod postgres;
mod prometheus;
mod redis;
mod tls;
mod upstream;

use std::time::{Duration, Instant};

pub(crate) use client::{Answer, Connection, get, http2, post, send, send_from};
pub(crate) use gateway::{Gateway, Model, config, config_of, hash_of, run_program, services};
pub(crate) use http2::Http2Upstream;
pub(crate) use metrics::Metrics;
pub(crate) use postgres::Postgres;
pub(crate) use prometheus::{Prometheus, promtool};
pub(crate) use redis::{Redis, free_port};
pub(crate) use tls::{Authority, Pair, TlsFront};
pub(crate) use upstream::{BlackHole, Reply, Seen, Upstream, raw_upstream, read_head};

/// Longest that any fact is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `fact` holds, and fails the test when it does not in time.
#[track_caller]
pub(crate) fn eventually(what: &str, mut fact: impl FnMut() -> bool) -> Duration {
    let started = Instant::now();
    while !fact() {
        assert!(started.elapsed() < PATIENCE, "it never came true: {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
    started.elapsed()
}

/// All values of a header, joined; empty when it is not there.
fn header(headers: &[(String, String)], name: &str) -> String {
    let is_it = |(known, _): &&(String, String)| known.eq_ignore_ascii_case(name);
    let values: Vec<&str> = headers.iter().filter(is_it).map(|(_, value)| value.as_str()).collect();
    values.join("|")
}
