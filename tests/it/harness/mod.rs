//! The test kit: a gateway process, scriptable upstreams, and a client of raw bytes.

mod client;
mod gateway;
mod upstream;

use std::time::{Duration, Instant};

pub(crate) use client::{Connection, get, post, send, send_from};
pub(crate) use gateway::{Gateway, config, run_program};
pub(crate) use upstream::{Reply, Upstream};

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
