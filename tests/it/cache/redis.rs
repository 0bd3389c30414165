//! Answers that gateways share, in Redis.

use std::sync::Arc;

use super::*;
use crate::harness::Redis;

fn gateway(top: &str, redis: &str, upstream: &Upstream) -> Gateway {
    let top = format!("{top}\nredis: {{{redis}}}");
    let mut gateway = Gateway::start(&config(&top, &[upstream]));
    gateway.wait_log("the cache in Redis answers");
    gateway
}

fn url(redis: &Redis) -> String {
    format!("url: \"{}\"", redis.url())
}

#[test]
fn gateways_share_answers() {
    let redis = Redis::start();
    let upstream = counting();
    let top = format!("{CACHE}\nadmin: {{listen: \"127.0.0.1:0\"}}");
    let [mut one, two] = [0, 1].map(|_| gateway(&top, &url(&redis), &upstream));
    for (number, stream) in [(1, ""), (2, r#","stream":true"#)] {
        let said = format!("answer {number}");
        let body = prompt("a", stream);
        assert_eq!(told(&ask(&one, &body, &[])), pair("miss", &said));
        // It is there a moment after its client has it.
        eventually("the other one has it", || {
            redis.ask(&["--scan", "--pattern", "tollgate:answer:*"]).lines().count() == number
        });
        for gateway in [&two, &one] {
            let again = ask(gateway, &body, &[]);
            assert_eq!(told(&again), pair("hit", &said));
            assert!(again.header("age").parse::<u64>().unwrap() < 60);
        }
    }
    let key = redis.ask(&["--scan", "--pattern", "tollgate:answer:*"]);
    let ttl: i64 = redis.ask(&["PTTL", key.lines().next().unwrap()]).trim().parse().unwrap();
    assert!((1..=300_000).contains(&ttl), "{ttl}");
    // What one forgets the other one has no more.
    let admin = one.admin();
    assert_eq!(post(admin, "/admin/cache/purge?service=svc&model=mdl", &[], "").status, 200);
    assert_eq!(told(&ask(&two, &prompt("a", ""), &[])), pair("miss", "answer 3"));
    let status = get(admin, "/api/health/status", &[]).json();
    assert_eq!(
        status["cache"],
        json!({"store": "redis", "status": "up", "failure": null, "failures": 0})
    );
}

#[test]
fn what_somebody_else_has_written_there_is_no_answer() {
    let redis = Redis::start();
    let upstream = counting();
    let gateway = gateway(CACHE, &url(&redis), &upstream);
    let [one, two] = ["a", "b"].map(|text| prompt(text, ""));
    for body in [&one, &two] {
        assert_eq!(ask(&gateway, body, &[]).header("x-cache"), "miss");
    }
    let keys = || redis.ask(&["--scan", "--pattern", "tollgate:answer:*"]);
    eventually("both are there", || keys().lines().count() == 2);
    let (keys, before) = (keys(), upstream.seen().len());
    let keys: Vec<&str> = keys.lines().collect();
    // One in the place of the other, one cut short, and another kind of thing.
    let script = "redis.call('SET', KEYS[1], redis.call('GET', KEYS[2])); \
                  redis.call('SETRANGE', KEYS[2], 60, 'x'); return 1";
    redis.ask(&["EVAL", script, "2", keys[0], keys[1]]);
    for body in [&one, &two] {
        assert_eq!(ask(&gateway, body, &[]).header("x-cache"), "miss");
    }
    assert_eq!(upstream.seen().len(), before + 2);
    eventually("they are there again", || {
        ask(&gateway, &one, &[]).header("x-cache") == "hit"
            && ask(&gateway, &two, &[]).header("x-cache") == "hit"
    });
    redis.ask(&["DEL", keys[0]]);
    redis.ask(&["LPUSH", keys[0], "x"]);
    let outcomes: Vec<String> =
        [&one, &two].map(|body| ask(&gateway, body, &[]).header("x-cache")).into();
    assert!(outcomes.contains(&"miss".to_owned()), "{outcomes:?}");
}

#[test]
fn without_redis_there_are_only_misses() {
    let mut redis = Redis::start();
    let upstream = counting();
    let top = format!("{CACHE}\nadmin: {{listen: \"127.0.0.1:0\"}}");
    let mut gateway = gateway(&top, &url(&redis), &upstream);
    let admin = gateway.admin();
    let address = gateway.address();
    let stop = Arc::new(AtomicUsize::new(0));
    let hits = Arc::new(AtomicUsize::new(0));
    let load: Vec<_> = (0..4)
        .map(|client| {
            let (stop, hits) = (Arc::clone(&stop), Arc::clone(&hits));
            std::thread::spawn(move || {
                let mut random = fastrand::Rng::with_seed(client);
                while stop.load(Ordering::SeqCst) == 0 {
                    let body = prompt(&random.u32(..5).to_string(), "");
                    let (outcome, said) = told(&post(address, CHAT, &[], body));
                    assert!(said.starts_with("answer "));
                    hits.fetch_add(usize::from(outcome == "hit"), Ordering::SeqCst);
                }
            })
        })
        .collect();
    let more = |before: usize| hits.load(Ordering::SeqCst) > before + 20;
    eventually("there are hits", || more(0));
    let outcome = || ask(&gateway, &prompt("x", ""), &[]).header("x-cache");
    redis.kill();
    eventually("it is noticed", || {
        get(admin, "/api/health/status", &[]).json()["cache"]["status"] == "away"
    });
    assert_eq!([outcome(), outcome()], ["miss", "miss"]);
    let before = hits.load(Ordering::SeqCst);
    assert_eq!(post(admin, "/admin/cache/purge?all=true", &[], "").status, 503);
    assert_eq!(Metrics::of(admin).sum("proxy_redis_up", &[]), 0.0);
    assert!(Metrics::of(admin).sum("proxy_redis_failures_total", &[]) > 0.0);
    redis.restart();
    eventually("there are hits again", || outcome() == "hit" && more(before));
    stop.store(1, Ordering::SeqCst);
    for client in load {
        client.join().expect("each request was answered");
    }
    let log = gateway.log().join("\n");
    assert_eq!(log.matches("the cache in Redis gives no answer").count(), 1, "{log}");
}

#[test]
fn a_cluster_keeps_answers_too() {
    let redis = Redis::start_with(&["--cluster-enabled", "yes"]);
    eventually("it has its slots", || {
        redis.ask(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]);
        redis.ask(&["CLUSTER", "INFO"]).contains("cluster_state:ok")
    });
    let upstream = counting();
    let gateway = gateway(CACHE, &format!("{}, cluster: true", url(&redis)), &upstream);
    for text in ["a", "b", "c"] {
        let outcome = || ask(&gateway, &prompt(text, ""), &[]).header("x-cache");
        assert_eq!(outcome(), "miss");
        eventually("it is kept", || outcome() == "hit");
    }
}

#[test]
fn a_server_that_has_no_room_costs_misses_and_a_line_in_the_log() {
    let redis = Redis::start_with(&["--maxmemory", "1", "--maxmemory-policy", "noeviction"]);
    let upstream = counting();
    let mut gateway = gateway(CACHE, &url(&redis), &upstream);
    // Each of them another one: an answer is also there for who asks while it is brought to Redis.
    for text in ["a", "b", "c", "d", "e"] {
        assert_eq!(ask(&gateway, &prompt(text, ""), &[]).header("x-cache"), "miss");
    }
    gateway.wait_log("the cache in Redis refuses: ");
    let failures = || Metrics::of(gateway.address()).sum("proxy_redis_failures_total", &[]);
    eventually("they are counted", || failures() >= 5.0);
    assert_eq!(Metrics::of(gateway.address()).sum("proxy_redis_up", &[]), 1.0);
    redis.ask(&["CONFIG", "SET", "maxmemory", "0"]);
    eventually("there is room", || ask(&gateway, &prompt("a", ""), &[]).header("x-cache") == "hit");
    let log = gateway.log().join("\n");
    assert_eq!(log.matches("the cache in Redis").count(), 2, "{log}");
}

#[test]
fn who_asks_the_same_of_redis_at_once_asks_once() {
    let redis = Redis::start();
    let (upstream, go, begun) = held_back();
    let gateway = gateway(CACHE, &url(&redis), &upstream);
    let body = prompt("a", "");
    let mut clients: Vec<Connection> = (0..100).map(|_| open(&gateway, &body)).collect();
    begun.recv().unwrap();
    eventually("all have asked", || gateway.inflight() == 100);
    go.send(()).unwrap();
    for client in &mut clients {
        assert_eq!(told(&client.read(false).unwrap()).1, "late");
    }
    assert_eq!(upstream.seen().len(), 1);
    let info = redis.ask(&["INFO", "commandstats"]);
    let calls = info.lines().find_map(|line| line.strip_prefix("cmdstat_get:calls=")).unwrap();
    assert!(calls.starts_with("1,"), "{calls}");
}
