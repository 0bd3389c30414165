//! What is compared.

use super::client;
use super::contestant::{Contestant, Speaks, Who};
use super::measure::Figures;
use super::wrk::{
    self,
    Text::{self, Code, Prose},
};

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

const ALL: &[Who] = &[
    Who::Direct,
    Who::Nginx,
    Who::Haproxy,
    Who::Bare,
    Who::Default,
    Who::FrontDoor,
    Who::Metered,
    Who::Full,
];
const PROXIES: &[Who] = &[Who::Nginx, Who::Haproxy, Who::Bare, Who::Default, Who::Full];
const POOLS: &[Who] = &[Who::Bare, Who::Default, Who::Pools(100), Who::Pools(10_000)];
const KEYS: &[Who] = &[Who::Bare, Who::Full, Who::Keys(100_000)];

const CACHE: &[Who] = &[Who::Bare, Who::Default, Who::Hits, Who::Misses];

const CHAT: &str = "/v1/chat/completions";

/// All cases, in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    [small(), large(), streamed(), others()].into_iter().flatten().collect()
}

fn small() -> Vec<Case> {
    let small = |name, title, connections| {
        case(name, title, "request", ALL, requests(Prose, 0, connections))
    };
    let paced = |it: &Contestant, size: Size| client::paced(it, CHAT, 64, 5_000, size.seconds(4));
    let title = "Small JSON, 5,000 requests a second over 64 connections";
    vec![
        small("small-32", "Small JSON over 32 connections", 32),
        small("small-1", "Small JSON over 1 connection", 1),
        small("small-256", "Small JSON over 256 connections", 256),
        case("paced", title, "request", ALL, Box::new(paced)),
    ]
}

fn large() -> Vec<Case> {
    let large = |name, title, work| case(name, title, "request", ALL, work);
    let answers = |it: &Contestant, size: Size| {
        wrk::run(it, "/v1/embeddings", &wrk::question(), 16, size.seconds(2))
    };
    vec![
        large("prompt-300k", "Prompts of 300 KB", requests(Prose, 300_000, 16)),
        large("code-300k", "Prompts of 300 KB of code", requests(Code, 300_000, 16)),
        large("prompt-3m", "Prompts of 3 MB", requests(Prose, 3_000_000, 8)),
        large("embeddings", "Answers of 1 MB", Box::new(answers)),
    ]
}

fn streamed() -> Vec<Case> {
    let streamed = |name, title, work| case(name, title, "event", ALL, work);
    vec![
        streamed("stream-200", "200 streams, an event every 20 ms", streams(200, 150, 20)),
        streamed("stream-4000", "4,000 streams, an event every 500 ms", streams(4_000, 12, 500)),
        streamed("burst", "64 streams, 500 events as fast as they come", streams(64, 500, 0)),
    ]
}

fn others() -> Vec<Case> {
    let other = |name, title, who, work| case(name, title, "request", who, work);
    let flaky = |it: &Contestant, size: Size| {
        wrk::run(it, "/flaky/chat/completions", &wrk::question(), 32, size.seconds(2))
    };
    let http2 = |it: &Contestant, size: Size| client::http2(it, CHAT, 8, 16, size.seconds(2));
    let small = || requests(Prose, 0, 32);
    let large = || requests(Prose, 300_000, 16);
    let of_flaky = "One answer in a hundred is 503, and another backend is asked";
    let of_http2 = "Small JSON, 8 connections of HTTP/2 with 16 requests each at once";
    vec![
        other("flaky", of_flaky, PROXIES, Box::new(flaky)),
        Case {
            speaks: Speaks::Tls,
            ..other("tls", "Small JSON over 32 connections with TLS", PROXIES, small())
        },
        Case { speaks: Speaks::Http2, ..other("http2", of_http2, PROXIES, Box::new(http2)) },
        other("pools", "Small JSON, 1, 100 and 10,000 pools", POOLS, small()),
        other("keys", "Small JSON, 1 and 100,000 keys", KEYS, small()),
        other("cache", "Small JSON, answers that are kept", CACHE, small()),
        other("cache-300k", "Prompts of 300 KB, answers that are kept", CACHE, large()),
    ]
}

fn case(
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    who: &'static [Who],
    work: Work,
) -> Case {
    Case { name, title, unit, who, speaks: Speaks::Http1, work }
}

type Work = Box<dyn Fn(&Contestant, Size) -> Figures>;

/// Requests of so many bytes over so many connections, as fast as they are answered.
fn requests(text: Text, bytes: usize, connections: usize) -> Work {
    let body = wrk::body(text, bytes);
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
