//! The values of headers that we read: clients' and backends'.

#![no_main]

use std::net::IpAddr;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;
use tollgate::{llm, proxy, telemetry};

const NAMES: [&str; 11] = [
    "x-request-id",
    "x-forwarded-for",
    "retry-after",
    "retry-after-ms",
    "x-ms-retry-after-ms",
    "x-ratelimit-reset",
    "x-ratelimit-reset-requests",
    "x-ratelimit-reset-tokens",
    "x-ratelimit-reset-requests-day",
    "x-ratelimit-reset-tokens-minute",
    "traceparent",
];

fuzz_target!(|input: (u32, Vec<(u8, Vec<u8>)>)| {
    let (seconds, lines) = input;
    let mut headers = HeaderMap::new();
    for (name, value) in lines.into_iter().take(64) {
        let name = HeaderName::from_static(NAMES[usize::from(name) % NAMES.len()]);
        if let Ok(value) = HeaderValue::from_bytes(&value) {
            headers.append(name, value);
        }
    }
    let id = telemetry::request_id(&headers);
    assert!(!id.is_empty() && id.to_str().is_ok(), "{id:?} cannot be logged");
    let trace = telemetry::Trace::of(&headers, 1.0);
    assert!(trace.id != 0 && trace.span != 0, "a trace that is none");
    assert_eq!(trace.header(trace.span).len(), 55);
    let _ = llm::pause(&headers, seconds % 2 == 0, Duration::from_secs(u64::from(seconds)));
    let trusted =
        ["10.0.0.0/8".parse().expect("a network"), "fd00::/8".parse().expect("a network")];
    if let Some(address) = proxy::forwarded_client(&headers, &trusted) {
        assert_eq!(address, IpAddr::to_canonical(&address), "two forms of one address");
    }
});
