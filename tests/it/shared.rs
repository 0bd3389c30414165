//! Limits that several gateways share in a real Redis.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use crate::harness::{
    Answer, Authority, Connection, Gateway, Redis, Reply, Upstream, config, eventually, free_port,
    get, post,
};

const CHAT: &str = "/v1/chat/completions";

/// A gateway that shares these limits of the global key in Redis.
fn gateway(redis: &str, limits: &str, upstream: &Upstream) -> Gateway {
    let top = format!("api_key: sk\nredis: {{{redis}}}\n{limits}");
    connected(Gateway::start(&config(&top, &[upstream])))
}

fn connected(mut gateway: Gateway) -> Gateway {
    gateway.wait_log("Redis answers");
    gateway
}

fn url(redis: &Redis) -> String {
    format!("url: \"{}\"", redis.url())
}

fn ask(gateway: &Gateway, body: &str) -> Answer {
    post(gateway.address(), CHAT, &["X-API-Key: sk"], body)
}

const BODY: &str = r#"{"model":"mdl","max_tokens":50}"#;

fn metric(gateway: &Gateway, name: &str) -> String {
    let text = get(gateway.address(), "/metrics", &[]).text();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    line.rsplit(' ').next().unwrap_or_default().to_owned()
}

/// An upstream that answers as often as it is told to, with 100 tokens of input and 50 of output.
fn held_back() -> (Upstream, mpsc::Sender<()>) {
    let (go, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let upstream = Upstream::start(move |_, reply| {
        wait.lock().unwrap().recv().unwrap();
        let body = br#"{"choices":[{}],"usage":{"prompt_tokens":100,"completion_tokens":50}}"#;
        reply.send(200, &[("Content-Type", "application/json")], body);
    });
    (upstream, go)
}

/// An upstream whose answers end when the client leaves, and word of each that begins.
fn lasting() -> (Upstream, mpsc::Receiver<()>) {
    let (sender, started) = mpsc::channel();
    let upstream = Upstream::start(move |_, reply: &mut Reply| {
        reply.begin("text/plain");
        sender.send(()).unwrap();
        reply.wait_closed();
    });
    (upstream, started)
}

/// A client that waits for all of an answer.
fn open(gateway: &Gateway) -> Connection {
    let mut client = Connection::open(gateway.address());
    client.write(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\nX-API-Key: sk\r\n\r\n").unwrap();
    client
}

#[test]
fn what_one_gateway_takes_the_other_one_counts() {
    let redis = Redis::start();
    let upstream = Upstream::metered();
    let limits = "limits: [{per: key, requests: 4, window: 1h}]";
    let [one, two] = [0, 1].map(|_| gateway(&url(&redis), limits, &upstream));
    let mut remaining = Vec::new();
    for gateway in [&one, &two, &one, &two] {
        let answer = ask(gateway, BODY);
        assert_eq!(answer.status, 200);
        remaining.push(answer.header("x-ratelimit-remaining-requests"));
    }
    assert_eq!(remaining, ["3", "2", "1", "0"]);
    for gateway in [&one, &two] {
        let refused = ask(gateway, BODY);
        assert_eq!(refused.status, 429);
        let wait: u64 = refused.header("retry-after").parse().unwrap();
        assert!((3590..=3616).contains(&wait), "{wait}");
    }
}

#[test]
fn tokens_places_and_money_are_shared_too() {
    let redis = Redis::start();
    let upstream = Upstream::metered();
    // Each takes 150, and may take 50 and a few.
    let tokens = "limits: [{per: key, tokens: 501, window: 1h}]";
    let [one, two] = [0, 1].map(|_| gateway(&url(&redis), tokens, &upstream));
    let settled = |used: u64| {
        eventually("it is settled", || {
            redis
                .ask(&["--scan"])
                .lines()
                .any(|key| redis.ask(&["HGET", key, "s"]).trim() == used.to_string())
        });
    };
    for (gateway, used) in [(&one, 150), (&two, 300), (&one, 450)] {
        assert_eq!(ask(gateway, BODY).status, 200);
        settled(used);
    }
    assert_eq!(ask(&two, r#"{"model":"mdl","max_tokens":51}"#).status, 429);
    assert_eq!(ask(&one, BODY).status, 200);
    settled(600);
    assert_eq!(ask(&two, r#"{"model":"mdl","max_tokens":1}"#).status, 429);

    let money = "prices: {per: 1, models: {mdl: {input: 0.01, output: 0.02}}}\nlimits: [{per: key, budget_daily: 5.01}]";
    let other = format!("{}, prefix: other", url(&redis));
    let [one, two] = [0, 1].map(|_| gateway(&other, money, &upstream));
    for gateway in [&one, &two] {
        assert_eq!(ask(gateway, BODY).status, 200);
    }
    let spent = || {
        let keys = redis.ask(&["--scan", "--pattern", "{other}:limit:*"]);
        let key = keys.lines().next().unwrap_or_default();
        redis.ask(&["HGET", key, "spent"]).trim().to_owned()
    };
    eventually("both are settled", || spent() == "4000000000");
    assert_eq!(ask(&one, r#"{"model":"mdl","max_tokens":51}"#).status, 429);
    assert_eq!(ask(&two, BODY).status, 200);
    eventually("all is spent", || spent() == "6000000000");
    assert_eq!(
        ask(&one, r#"{"model":"mdl","max_tokens":1}"#).json()["error"]["code"],
        "insufficient_quota"
    );
}

#[test]
fn places_are_shared_and_free_when_an_exchange_ends() {
    let redis = Redis::start();
    let (upstream, started) = lasting();
    let limits = "limits: [{per: key, concurrent: 1}]";
    let [one, two] = [0, 1].map(|_| gateway(&url(&redis), limits, &upstream));
    let first = open(&one);
    started.recv().unwrap();
    assert_eq!(get(two.address(), "/svc/mdl/x", &["X-API-Key: sk"]).status, 429);
    drop(first);
    eventually("the place is free", || {
        redis.ask(&["--scan", "--pattern", "*limit*"]).trim().is_empty()
    });
    let second = open(&two);
    started.recv().unwrap();
    assert_eq!(get(one.address(), "/svc/mdl/x", &["X-API-Key: sk"]).status, 429);
    drop(second);
}

#[test]
fn while_redis_is_away_each_gateway_gives_its_share_and_afterwards_all_is_counted() {
    let mut redis = Redis::start();
    let upstream = Upstream::metered();
    let limits = "limits: [{per: key, requests: 10, window: 1h}]";
    let [one, mut two] = [0, 1].map(|_| gateway(&url(&redis), limits, &upstream));
    eventually("they know of each other", || metric(&one, "proxy_gateways") == "2");
    let count = |gateway: &Gateway, most: usize| {
        (0..most).take_while(|_| ask(gateway, BODY).status == 200).count()
    };
    assert_eq!((count(&one, 2), count(&two, 1)), (2, 1));
    redis.kill();
    // Five for each, what it has taken before included.
    assert_eq!(count(&one, 9), 3);
    let line = two.wait_log("Redis gives no answer");
    assert!(line.contains("each of 2 gateways gives its share of the limits"), "{line}");
    assert_eq!(metric(&one, "proxy_redis_up"), "0");
    assert_eq!(count(&two, 1), 1);
    // It comes back with an empty memory, and is told.
    redis.restart();
    for gateway in [&one, &two] {
        eventually("it answers again", || metric(gateway, "proxy_redis_up") == "1");
    }
    assert_eq!(count(&one, 9), 3);
    assert_eq!(count(&two, 9), 0);
}

#[test]
fn a_redis_that_is_not_there_from_the_start_is_told_of() {
    let upstream = Upstream::metered();
    let redis = format!("url: \"redis://127.0.0.1:{}\"", free_port());
    let top = format!("api_key: sk\nredis: {{{redis}}}\nlimits: [{{per: key, requests: 2}}]");
    let mut gateway = Gateway::start(&config(&top, &[&upstream]));
    gateway.wait_log("Redis gives no answer");
    assert_eq!([ask(&gateway, BODY).status, ask(&gateway, BODY).status], [200, 200]);
    assert_eq!(ask(&gateway, BODY).status, 429);
    assert_ne!(metric(&gateway, "proxy_redis_failures_total"), "0");
}

#[test]
fn what_one_limit_refuses_does_not_wear_out_another() {
    let redis = Redis::start();
    let upstream = Upstream::metered();
    let limits = "limits: [{per: key, requests: 5, window: 2s}, {name: t, per: key, tokens_output: 100, window: 1h, models: [mdl]}]";
    let gateway = gateway(&url(&redis), limits, &upstream);
    // What is asked for beyond the tokens is refused, when parts of the other window have just gone.
    let fine = r#"{"model":"mdl","max_tokens":1}"#;
    let status = |body: &str| ask(&gateway, body).status;
    assert_eq!([status(fine), status(fine)], [200, 200]);
    eventually("the tokens are settled", || status(fine) == 429);
    std::thread::park_timeout(Duration::from_millis(2100));
    assert_eq!(ask(&gateway, fine).status, 429);
    let keys = redis.ask(&["--scan", "--pattern", "*:limit:*"]);
    for key in keys.lines() {
        let sum: i64 = redis.ask(&["HGET", key, "s"]).trim().parse().unwrap_or(0);
        let fields = redis.ask(&["HGETALL", key]);
        let fields: Vec<&str> = fields.lines().collect();
        let parts = fields.chunks(2).filter(|it| it[0].parse::<i64>().is_ok());
        let parts: i64 = parts.map(|it| it[1].parse::<i64>().unwrap()).sum();
        assert_eq!(sum, parts, "{fields:?}");
    }
}

const MONEY: &str = "prices: {per: 1, models: {mdl: {input: 0.01, output: 0.02}}}\nlimits: [{per: key, budget_monthly: 100}]";

/// What is spent by what Redis knows.
fn spent(redis: &Redis) -> Vec<String> {
    let keys = redis.ask(&["--scan", "--pattern", "*:limit:*"]);
    keys.lines().map(|key| redis.ask(&["HGET", key, "spent"]).trim().to_owned()).collect()
}

/// What exchanges hold by what Redis knows.
fn held(redis: &Redis) -> usize {
    let keys = redis.ask(&["--scan", "--pattern", "*:limit:*"]);
    let held = |key| redis.ask(&["HKEYS", key]).lines().filter(|it| it.starts_with("g:")).count();
    keys.lines().map(held).sum()
}

#[test]
fn a_redis_that_has_forgotten_what_was_spent_is_told_by_all() {
    let redis = Redis::start();
    let upstream = Upstream::metered();
    let [one, two] = [0, 1].map(|_| gateway(&url(&redis), MONEY, &upstream));
    for gateway in [&one, &two, &one, &two] {
        assert_eq!(ask(gateway, BODY).status, 200);
    }
    eventually("all is settled", || spent(&redis) == ["8000000000"] && held(&redis) == 0);
    redis.ask(&["FLUSHALL"]);
    eventually("both have told it", || spent(&redis) == ["8000000000"]);
    for gateway in [&one, &two] {
        assert_eq!(ask(gateway, BODY).status, 200);
    }
    eventually("it goes on from there", || spent(&redis) == ["12000000000"]);
}

#[test]
fn what_ends_while_redis_is_away_is_settled_when_it_is_back() {
    let redis = Redis::start();
    let (upstream, go) = held_back();
    let limits =
        format!("{MONEY}\n- {{per: key, concurrent: 3}}").replace("limits: [", "limits:\n- ");
    let limits = limits.replace("100}]", "100}");
    let gateway = gateway(&url(&redis), &limits, &upstream);
    let to = gateway.address();
    let before = std::thread::spawn(move || post(to, CHAT, &["X-API-Key: sk"], BODY).status);
    eventually("it is reserved", || held(&redis) == 2);
    redis.ask(&["CLIENT", "PAUSE", "600000", "WRITE"]);
    let meanwhile = std::thread::spawn(move || post(to, CHAT, &["X-API-Key: sk"], BODY).status);
    eventually("it is noticed", || metric(&gateway, "proxy_redis_up") == "0");
    go.send(()).unwrap();
    go.send(()).unwrap();
    assert_eq!((before.join().unwrap(), meanwhile.join().unwrap()), (200, 200));
    assert_eq!(metric(&gateway, "proxy_redis_up"), "0");
    redis.ask(&["CLIENT", "UNPAUSE"]);
    eventually("all is settled", || {
        spent(&redis).contains(&"4000000000".to_owned()) && held(&redis) == 0
    });
}

#[test]
fn what_was_reserved_while_redis_was_away_is_given_back_when_it_is_there_again() {
    let redis = Redis::start();
    let (upstream, go) = held_back();
    let gateway =
        gateway(&url(&redis), "limits: [{per: key, tokens: 1000, window: 1h}]", &upstream);
    let to = gateway.address();
    redis.ask(&["CLIENT", "PAUSE", "600000", "WRITE"]);
    let body = r#"{"model":"mdl","max_tokens":800}"#;
    let client = std::thread::spawn(move || post(to, CHAT, &["X-API-Key: sk"], body).status);
    eventually("it is noticed", || metric(&gateway, "proxy_redis_up") == "0");
    redis.ask(&["CLIENT", "UNPAUSE"]);
    let sum = || {
        let key = redis.ask(&["--scan", "--pattern", "*:limit:*"]);
        redis.ask(&["HGET", key.trim(), "s"]).trim().to_owned()
    };
    eventually("it is told", || sum() == "801");
    go.send(()).unwrap();
    assert_eq!(client.join().unwrap(), 200);
    // It took 150 of them.
    eventually("the rest is given back", || sum() == "150");
}

#[test]
fn a_redis_that_has_forgotten_what_goes_on_is_told() {
    let redis = Redis::start();
    let (upstream, started) = lasting();
    let gateway = gateway(&url(&redis), "limits: [{per: key, concurrent: 2}]", &upstream);
    let status = || get(gateway.address(), "/svc/mdl/x", &["X-API-Key: sk"]).status;
    let first = open(&gateway);
    started.recv().unwrap();
    redis.ask(&["FLUSHALL"]);
    eventually("it is told", || held(&redis) == 1);
    let second = open(&gateway);
    started.recv().unwrap();
    assert_eq!(status(), 429);
    drop(first);
    eventually("its end is told", || {
        let key = redis.ask(&["--scan", "--pattern", "*:limit:*"]);
        redis.ask(&["HVALS", key.trim()]).starts_with("1\n")
    });
    drop(second);
    eventually("all have ended", || held(&redis) == 0);
}

#[test]
fn connections_that_end_or_hang_leave_nothing_held_and_lose_no_money() {
    let redis = Redis::start();
    let upstream = Upstream::metered();
    let limits = "prices: {per: 1, models: {mdl: {input: 0.01, output: 0.02}}}\n\
                  limits: [{per: key, budget_monthly: 100000, concurrent: 4}]";
    let gateways = [0, 1].map(|_| gateway(&url(&redis), limits, &upstream));
    let ends = AtomicBool::new(false);
    let admitted: u64 = std::thread::scope(|scope| {
        let client = |at: usize| {
            let (gateway, ends) = (&gateways[at % 2], &ends);
            scope.spawn(move || {
                let mut admitted = 0;
                while !ends.load(Ordering::SeqCst) {
                    admitted += u64::from(ask(gateway, BODY).status == 200);
                }
                admitted
            })
        };
        let clients: Vec<_> = (0..6).map(client).collect();
        for _ in 0..10 {
            std::thread::park_timeout(Duration::from_millis(150));
            redis.ask(&["CLIENT", "KILL", "TYPE", "normal"]);
            // Longer than an answer is waited for.
            std::thread::park_timeout(Duration::from_millis(150));
            redis.ask(&["CLIENT", "PAUSE", "300", "WRITE"]);
        }
        ends.store(true, Ordering::SeqCst);
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    // Each costs 2.
    let all = format!("{}000000000", 2 * admitted);
    eventually("all is settled", || held(&redis) == 0 && spent(&redis).contains(&all));
}

#[test]
fn a_reload_of_its_settings_counts_nothing_twice() {
    let redis = Redis::start();
    let upstream = Upstream::metered();
    let limits = "limits: [{per: key, requests: 10, window: 1h}]";
    let mut gateway = gateway(&url(&redis), limits, &upstream);
    for _ in 0..3 {
        assert_eq!(ask(&gateway, BODY).status, 200);
    }
    let new = format!("{}, timeout: 300ms, connections: 1", url(&redis));
    let top = format!("api_key: sk\nredis: {{{new}}}\n{limits}");
    std::fs::write(gateway.folder().join("tollgate.yaml"), config(&top, &[&upstream])).unwrap();
    gateway.signal(nix::sys::signal::Signal::SIGHUP);
    gateway.wait_log("the new configuration is at work");
    eventually("it is asked again", || {
        gateway.log().iter().filter(|line| line.contains("Redis answers")).count() == 2
    });
    assert_eq!(ask(&gateway, BODY).header("x-ratelimit-remaining-requests"), "6");
}

#[test]
fn with_refuse_nobody_passes_while_redis_is_away() {
    let mut redis = Redis::start();
    let upstream = Upstream::metered();
    let settings = format!("{}, when_down: refuse", url(&redis));
    let gateway = gateway(&settings, "limits: [{per: key, requests: 1000}]", &upstream);
    assert_eq!(ask(&gateway, BODY).status, 200);
    redis.kill();
    let refused = ask(&gateway, BODY);
    assert_eq!((refused.status, refused.header("retry-after").as_str()), (503, "1"));
    assert_eq!(refused.json()["error"]["code"], "limits_unavailable");
    redis.restart();
    eventually("it answers again", || ask(&gateway, BODY).status == 200);
}

#[test]
fn a_redis_that_hangs_costs_one_deadline_and_no_more() {
    let redis = Redis::start();
    let upstream = Upstream::metered();
    let settings = format!("{}, timeout: 100ms, connections: 1", url(&redis));
    let mut gateway = gateway(&settings, "limits: [{per: key, requests: 1000}]", &upstream);
    redis.ask(&["CLIENT", "PAUSE", "1500", "ALL"]);
    assert_eq!(ask(&gateway, BODY).status, 200);
    gateway.wait_log("Redis gives no answer");
    let before = std::time::Instant::now();
    assert!((0..5).all(|_| ask(&gateway, BODY).status == 200));
    assert!(before.elapsed().as_millis() < 1000, "each waited: {:?}", before.elapsed());
}

#[test]
fn without_a_limit_nobody_is_asked() {
    let redis = Redis::start();
    let upstream = Upstream::metered();
    let top = format!("redis: {{{}}}", url(&redis));
    let gateway = Gateway::start(&config(&top, &[&upstream]));
    assert_eq!(ask(&gateway, BODY).status, 200);
    let received = redis.ask(&["INFO", "stats"]);
    assert!(received.contains("total_connections_received:2\r\n"), "{received}");
    assert_eq!(metric(&gateway, "proxy_redis_up"), "");
}

#[test]
fn it_is_spoken_to_over_tls_with_a_password_and_in_a_cluster() {
    let upstream = Upstream::metered();
    let limits = "limits: [{per: key, requests: 1, window: 1h}]";
    // TLS and a password, by the variable.
    let authority = Authority::new();
    let pair = authority.sign(&["localhost"]);
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        std::fs::write(files.path().join(name), text).unwrap();
        files.path().join(name).to_string_lossy().into_owned()
    };
    let (ca, cert, key) =
        (file("ca", authority.pem()), file("cert", &pair.cert), file("key", &pair.key));
    let port = free_port().to_string();
    let arguments = [
        "--port",
        "0",
        "--tls-port",
        &port,
        "--tls-cert-file",
        &cert,
        "--tls-key-file",
        &key,
        "--tls-ca-cert-file",
        &ca,
        "--tls-auth-clients",
        "no",
        "--requirepass",
        "hunter2",
    ];
    let _redis = Redis::at(port.parse().unwrap(), &arguments);
    let url = format!("rediss://:hunter2@localhost:{port}");
    let variables = [("REDIS_URL", url.as_str()), ("SSL_CERT_FILE", ca.as_str())];
    let top = format!("api_key: sk\n{limits}");
    let gateway = connected(Gateway::start_with(&config(&top, &[&upstream]), &variables, &[]));
    assert_eq!([ask(&gateway, BODY).status, ask(&gateway, BODY).status], [200, 429]);
    let outputs = gateway.log().join("\n") + &get(gateway.address(), "/metrics", &[]).text();
    assert!(!outputs.contains("hunter2"), "{outputs}");

    let cluster = Redis::start_with(&["--cluster-enabled", "yes"]);
    eventually("it has its slots", || {
        cluster.ask(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]);
        cluster.ask(&["CLUSTER", "INFO"]).contains("cluster_state:ok")
    });
    let settings = format!("url: \"{}\", cluster: true", cluster.url());
    let gateway = super::shared::gateway(&settings, limits, &upstream);
    assert_eq!([ask(&gateway, BODY).status, ask(&gateway, BODY).status], [200, 429]);
}

#[test]
fn sentinels_tell_where_the_server_is() {
    let upstream = Upstream::metered();
    let master = Redis::start();
    let port = free_port();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sentinel.conf");
    let text =
        format!("port {port}\nsentinel monitor tg 127.0.0.1 {} 1\n", master.address().port());
    std::fs::write(&file, text).unwrap();
    let mut sentinel = std::process::Command::new("redis-server")
        .args([file.to_str().unwrap(), "--sentinel"])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    eventually("the sentinel listens", || {
        std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    let settings = format!("url: \"redis://127.0.0.1:{port}\", sentinel_master: tg");
    let gateway = gateway(&settings, "limits: [{per: key, requests: 1, window: 1h}]", &upstream);
    assert_eq!([ask(&gateway, BODY).status, ask(&gateway, BODY).status], [200, 429]);
    assert!(master.ask(&["--scan"]).contains("limit"));
    sentinel.kill().unwrap();
    sentinel.wait().unwrap();
}
