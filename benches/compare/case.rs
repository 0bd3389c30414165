//! What is compared.

use super::client;
use super::contestant::{Contestant, Speaks, Who};
use super::measure::Figures;
use super::wrk;

/// A kind of load, and who is given it.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    /// What CPU time is counted for.
    pub(crate) unit: &'static str,
    pub(crate) who: &'static [Who],
    pub(crate) speaks: Speaks,
    pub(crate) work: Work,
}

/// How much of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    WarmUp,
    Whole,
}

impl Size {
    fn seconds(self, whole: u64) -> u64 {
        if self == Self::WarmUp { 1 } else { whole }
    }
}

const ALL: &[Who] =
    &[Who::Direct, Who::Nginx, Who::Haproxy, Who::Bare, Who::Default, Who::FrontDoor, Who::Full];
const PROXIES: &[Who] = &[Who::Nginx, Who::Haproxy, Who::Bare, Who::Default, Who::Full];
const POOLS: &[Who] = &[Who::Bare, Who::Default, Who::Pools(100), Who::Pools(10_000)];
const KEYS: &[Who] = &[Who::Bare, Who::Full, Who::Keys(100_000)];

const CHAT: &str = "/v1/chat/completions";

/// All cases, in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    let plain = |name, title, unit, who, work| {
        let speaks = Speaks::Http1;
        Case { name, title, unit, who, speaks, work }
    };
    vec![
        plain("small-32", "Small JSON over 32 connections", "request", ALL, requests(0, 32)),
        plain("small-1", "Small JSON over 1 connection", "request", ALL, requests(0, 1)),
        plain("small-256", "Small JSON over 256 connections", "request", ALL, requests(0, 256)),
        plain(
            "paced",
            "Small JSON, 5,000 requests a second over 64 connections",
            "request",
            ALL,
            Box::new(|it, size| client::paced(it, CHAT, 64, 5_000, size.seconds(4))),
        ),
        plain("prompt-300k", "Prompts of 300 KB", "request", ALL, requests(300_000, 16)),
        plain("prompt-3m", "Prompts of 3 MB", "request", ALL, requests(3_000_000, 8)),
        plain("embeddings", "Answers of 1 MB", "request", ALL, {
            Box::new(|it, size| wrk::run(it, "/v1/embeddings", &wrk::body(0), 16, size.seconds(2)))
        }),
        plain(
            "stream-200",
            "200 streams, an event every 20 ms",
            "event",
            ALL,
            streams(200, 150, 20),
        ),
        plain("stream-4000", "4,000 streams, an event every 500 ms", "event", ALL, {
            streams(4_000, 12, 500)
        }),
        plain("burst", "64 streams, 500 events as fast as they come", "event", ALL, {
            streams(64, 500, 0)
        }),
        plain(
            "flaky",
            "One backend in a hundred answers 503, and another one is asked",
            "request",
            PROXIES,
            {
                Box::new(|it, size| {
                    wrk::run(it, "/flaky/chat/completions", &wrk::body(0), 32, size.seconds(2))
                })
            },
        ),
        Case {
            speaks: Speaks::Tls,
            ..plain("tls", "Small JSON over 32 connections with TLS", "request", PROXIES, {
                requests(0, 32)
            })
        },
        Case {
            speaks: Speaks::Http2,
            ..plain(
                "http2",
                "Small JSON, 8 connections of HTTP/2 with 16 requests each at once",
                "request",
                PROXIES,
                Box::new(|it, size| client::http2(it, CHAT, 8, 16, size.seconds(2))),
            )
        },
        plain("pools", "Small JSON, 1, 100 and 10,000 pools", "request", POOLS, requests(0, 32)),
        plain("keys", "Small JSON, 1 and 100,000 keys", "request", KEYS, requests(0, 32)),
    ]
}

type Work = Box<dyn Fn(&Contestant, Size) -> Figures>;

/// Requests of so many bytes over so many connections, as fast as they are answered.
fn requests(bytes: usize, connections: usize) -> Work {
    let body = wrk::body(bytes);
    Box::new(move |it, size| wrk::run(it, CHAT, &body, connections, size.seconds(2)))
}

fn streams(count: usize, events: usize, interval_ms: u64) -> Work {
    Box::new(move |it, size| {
        let is_warm_up = size == Size::WarmUp;
        let (count, events) = if is_warm_up { (count / 10, 10) } else { (count, events) };
        let path = format!("/v1/stream/{events}/{interval_ms}/chat/completions");
        client::streams(it, &path, count, events)
    })
}
