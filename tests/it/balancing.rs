//! Which backend a client gets, and when that changes.

use std::collections::BTreeMap;

use crate::harness::{Gateway, Upstream, eventually, get, send_from};

const CLIENTS: usize = 200;

/// A gateway over named upstreams with weights, which believes `X-Forwarded-For`.
fn gateway(balance: &str, backends: &[(&Upstream, &str)]) -> Gateway {
    let mut config = format!(
        "listen: 127.0.0.1:0\ntrusted_proxies: [127.0.0.0/8]\nbalance: {balance}\nhealth_check: {{interval: 100ms, jitter: 0}}\nservices: {{svc: {{models: {{mdl: {{backends: [\n"
    );
    for (id, (upstream, settings)) in ('a'..).zip(backends) {
        config.push_str(&format!("  {{id: {id}, url: \"{}\", {settings}}},\n", upstream.url()));
    }
    config.push_str("]}}}}\n");
    let gateway = Gateway::start(&config);
    for (id, _) in ('a'..).zip(backends) {
        gateway.wait_backend("svc/mdl", &id.to_string(), "healthy");
    }
    gateway
}

fn client(number: usize) -> String {
    format!("X-Forwarded-For: 203.0.{}.{}", number / 100, number % 100 + 1)
}

/// Who serves each client.
#[track_caller]
fn who_serves(gateway: &Gateway) -> Vec<String> {
    (0..CLIENTS)
        .map(|number| {
            let answer = get(gateway.address(), "/svc/mdl/x", &[&client(number)]);
            assert_eq!(answer.status, 200, "client {number}");
            answer.text()
        })
        .collect()
}

fn shares(served: &[String]) -> BTreeMap<&str, usize> {
    let mut shares = BTreeMap::new();
    for name in served {
        *shares.entry(name.as_str()).or_default() += 1;
    }
    shares
}

#[test]
fn clients_stick_to_their_backend_in_proportion_to_weights_and_only_those_of_a_dead_one_move() {
    let one = Upstream::named("one");
    let two = Upstream::named("two");
    let mut three = Upstream::named("three");
    let weighted = [(&one, "weight: 1"), (&two, "weight: 2"), (&three, "weight: 3")];
    let gateway = gateway("sticky", &weighted);

    let before = who_serves(&gateway);
    println!("200 clients over weights 1:2:3: {:?}", shares(&before));
    for (name, expected) in [("one", 33.3), ("two", 66.7), ("three", 100.0)] {
        #[allow(clippy::cast_precision_loss, reason = "at most 200")]
        let share = shares(&before)[name] as f64;
        assert!((share - expected).abs() <= 6.0, "{name}: {share} of 200, expected {expected}");
    }
    assert_eq!(who_serves(&gateway), before, "a client changed its backend");

    three.kill();
    // No request fails, whether the health check has noticed or not.
    let without = who_serves(&gateway);
    for (number, (before, now)) in before.iter().zip(&without).enumerate() {
        assert_eq!(before != now, before == "three", "client {number}: {before} -> {now}");
    }
    gateway.wait_backend("svc/mdl", "c", "unhealthy");
    assert_eq!(who_serves(&gateway), without);

    three.restart();
    gateway.wait_backend("svc/mdl", "c", "healthy");
    assert_eq!(who_serves(&gateway), before, "its clients come back, the others stay");
}

#[test]
fn a_handful_of_clients_is_spread_evenly_whatever_their_hashes() {
    let upstreams = ["one", "two", "three"].map(Upstream::named);
    let mut config = String::from(
        "listen: 127.0.0.1:0\ntrusted_proxies: [127.0.0.0/8]\nservices: {svc: {models: {\n",
    );
    for model in 0..8 {
        config.push_str(&format!("  m{model}: {{backends: ["));
        for (number, upstream) in upstreams.iter().enumerate() {
            config.push_str(&format!("{{id: b{model}-{number}, url: \"{}\"}}, ", upstream.url()));
        }
        config.push_str("]},\n");
    }
    config.push_str("}}}\n");
    let gateway = Gateway::start(&config);
    for model in 0..8 {
        let served: Vec<String> = (0..24)
            .map(|number| {
                get(gateway.address(), &format!("/svc/m{model}/x"), &[&client(number)]).text()
            })
            .collect();
        // Thrown dice would give some backend ten or more of 24 in most of eight pools.
        assert!(shares(&served).values().all(|count| *count <= 9), "{:?}", shares(&served));
    }
}

#[test]
fn a_client_is_told_by_the_address_of_its_connection() {
    let backends: Vec<Upstream> = ["one", "two", "three"].map(Upstream::named).into();
    let weighted: Vec<(&Upstream, &str)> =
        backends.iter().map(|upstream| (upstream, "weight: 1")).collect();
    let gateway = gateway("sticky", &weighted);
    let ask = |last: u8| {
        let from = std::net::IpAddr::from([127, 0, 7, last]);
        let request = "GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n";
        send_from(from, gateway.address(), request).text()
    };
    let first: Vec<String> = (1..=60).map(ask).collect();
    let second: Vec<String> = (1..=60).map(ask).collect();
    assert_eq!(first, second);
    assert_eq!(shares(&first).len(), 3, "all backends are used: {:?}", shares(&first));
}

#[test]
fn round_robin_is_smooth_and_keeps_proportions_when_one_is_down() {
    let one = Upstream::named("one");
    let two = Upstream::named("two");
    let five = Upstream::named("five");
    let weighted = [(&one, "weight: 1"), (&two, "weight: 1"), (&five, "weight: 5")];
    let gateway = gateway("round_robin", &weighted);
    let served = |count: usize| -> Vec<String> {
        (0..count).map(|_| get(gateway.address(), "/svc/mdl/x", &[]).text()).collect()
    };
    let round = served(7);
    assert_eq!(shares(&round), BTreeMap::from([("five", 5), ("one", 1), ("two", 1)]));
    assert!(!round.windows(4).any(|run| run.iter().all(|name| name == "five")), "{round:?}");
    two.set_healthy(false);
    gateway.wait_backend("svc/mdl", "b", "unhealthy");
    served(6);
    assert_eq!(shares(&served(60)), BTreeMap::from([("five", 50), ("one", 10)]));
}

#[test]
fn least_inflight_passes_over_a_busy_backend() {
    let busy = Upstream::start(|_, reply| {
        reply.begin("text/plain");
        reply.wait_closed();
    });
    let free = Upstream::named("free");
    let gateway = gateway("least_inflight", &[(&busy, "weight: 1"), (&free, "weight: 1")]);
    let mut held = Vec::new();
    while busy.seen().is_empty() {
        let mut connection = crate::harness::Connection::open(gateway.address());
        connection.write(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
        connection.read_head().unwrap();
        held.push(connection);
    }
    for _ in 0..50 {
        // The exchange before may still be in flight when its answer has been read.
        eventually("only the busy one is in flight", || {
            get(gateway.address(), "/ready", &[]).json()["in_flight"] == 1
        });
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).text(), "free");
    }
}

#[test]
fn groups_are_asked_in_the_order_of_their_numbers() {
    let mut upstreams = [Upstream::named("0"), Upstream::named("3"), Upstream::named("7")];
    let [zero, three, seven] = &upstreams;
    // Not in the order of the file, and numbers in between are nobody's.
    let backends = [(seven, "priority: 7"), (zero, "weight: 1"), (three, "priority: 3")];
    let gateway = gateway("round_robin", &backends);
    let serves = || get(gateway.address(), "/svc/mdl/x", &[]).text();
    for (at, id) in [(0, "b"), (1, "c"), (2, "a")] {
        for _ in 0..10 {
            assert_eq!(serves(), ["0", "3", "7"][at]);
        }
        upstreams[at].kill();
        gateway.wait_backend("svc/mdl", id, "unhealthy");
    }
    assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 503);
    upstreams[1].restart();
    gateway.wait_backend("svc/mdl", "c", "healthy");
    assert_eq!(serves(), "3");
    upstreams[0].restart();
    gateway.wait_backend("svc/mdl", "b", "healthy");
    assert_eq!(serves(), "0");
}

#[test]
fn a_drained_backend_gets_nothing_and_a_later_group_only_when_no_other_can_serve() {
    let drained = Upstream::named("drained");
    let mut main = Upstream::named("main");
    let spare = Upstream::named("spare");
    for balance in ["sticky", "round_robin", "least_inflight"] {
        let backends =
            [(&drained, "weight: 0"), (&main, "weight: 1"), (&spare, "weight: 9, priority: 1")];
        let gateway = gateway(balance, &backends);
        for number in 0..30 {
            let answer = get(gateway.address(), "/svc/mdl/x", &[&client(number)]);
            assert_eq!(answer.text(), "main", "{balance}");
        }
        main.kill();
        for number in 0..30 {
            let answer = get(gateway.address(), "/svc/mdl/x", &[&client(number)]);
            assert_eq!((answer.status, answer.text().as_str()), (200, "spare"), "{balance}");
        }
        gateway.wait_backend("svc/mdl", "b", "unhealthy");
        main.restart();
        gateway.wait_backend("svc/mdl", "b", "healthy");
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).text(), "main", "{balance}");
    }
    assert!(drained.seen().is_empty());
    assert!(drained.checks() > 0, "a drained backend is still checked");
}
