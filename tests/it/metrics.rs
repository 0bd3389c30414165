//! What the gateway tells Prometheus, and a real Prometheus.

use std::collections::BTreeSet;
use std::path::Path;

use tollgate::telemetry::metrics::{ALL, Kind, Metric};

use crate::harness::{
    Authority, Connection, Gateway, Metrics, Redis, Reply, Seen, Upstream, config, eventually, get,
    post, send,
};

fn file(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// The rows of the table of metrics: name, kind, labels.
fn documented(readme: &str) -> BTreeSet<(String, String, String)> {
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let name = cells.get(1)?.strip_prefix('`')?.strip_suffix('`')?;
        let is_metric = name.starts_with("proxy_") && cells.len() >= 5;
        let labels = cells.get(3)?.replace('`', "");
        is_metric.then(|| (name.to_owned(), cells[2].to_owned(), labels))
    };
    readme.lines().filter_map(row).collect()
}

#[test]
fn the_readme_has_every_metric_with_its_kind_and_labels() {
    let kind = |metric: &Metric| match metric.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram => "histogram",
    };
    let known = |metric: &Metric| {
        (metric.name.to_owned(), kind(metric).to_owned(), metric.labels.join(", "))
    };
    let known: BTreeSet<_> = ALL.iter().map(known).collect();
    assert_eq!(known.len(), ALL.len(), "a name stands there twice");
    for readme in ["README.md", "README.zh-CN.md"] {
        let documented = documented(&file(readme));
        let missing: Vec<_> = known.difference(&documented).collect();
        let unknown: Vec<_> = documented.difference(&known).collect();
        assert!(missing.is_empty(), "{readme} lacks {missing:?}");
        assert!(unknown.is_empty(), "{readme} has {unknown:?}, which are none");
    }
}

/// What an upstream of [`everything`] does, by the last segment of the path.
fn script(seen: &Seen, reply: &mut Reply) {
    let json = [("Content-Type", "application/json")];
    let usage = r#"{"prompt_tokens":100,"completion_tokens":50,"prompt_tokens_details":{"cached_tokens":40}}"#;
    match seen.target().rsplit('/').next().unwrap() {
        // A stream of three tokens.
        "completions" if seen.body.windows(6).any(|it| it == b"stream") => {
            reply.begin("text/event-stream");
            for _ in 0..3 {
                reply.chunk(b"data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n");
            }
            if seen.body.windows(4).any(|it| it == b"stay") {
                reply.wait_closed();
                return;
            }
            reply.chunk(format!("data: {{\"choices\":[],\"usage\":{usage}}}\n\n").as_bytes());
            reply.chunk(b"data: [DONE]\n\n");
            reply.end();
        }
        "hang" => {
            reply.wait_closed();
        }
        "refuse" => reply.send(401, &json, b"{}"),
        "retry" => reply.send(503, &json, b"{}"),
        _ => reply.send(200, &json, format!(r#"{{"choices":[{{}}],"usage":{usage}}}"#).as_bytes()),
    }
}

/// A gateway with all that has metrics.
struct Everything {
    gateway: Gateway,
    admin: std::net::SocketAddr,
    redis: Redis,
    _upstream: Upstream,
    _collector: Upstream,
}

fn everything() -> Everything {
    let (redis, upstream) = (Redis::start(), Upstream::start(script));
    let collector = Upstream::start(|_, reply| reply.send(200, &[], b"{}"));
    let folder = tempfile::tempdir().unwrap();
    Authority::new().sign(&["gw.test"]).write(folder.path(), "gw");
    let (up, redis_url, otlp) = (upstream.url(), redis.url(), collector.url());
    // Nobody listens there.
    let down = "http://127.0.0.1:9";
    let config = format!(
        r#"
listen: [127.0.0.1:0, "https://127.0.0.1:0"]
admin: {{listen: 127.0.0.1:0}}
tls: {{certificates: [{{cert_file: gw.pem, key_file: gw.key}}]}}
api_key: sk
redis: {{url: "{redis_url}"}}
ledger: {{database: "postgres://u:p@127.0.0.1:9/db"}}
request_log: {{}}
cache: {{store: memory}}
traces: {{otlp_url: "{otlp}/v1/traces"}}
prices: {{models: {{svc/mdl: {{input: 1, output: 2}}}}}}
client: {{connections_max: 32}}
health_check: {{interval: 500ms}}
breaker: {{consecutive_failures: 1}}
fallbacks: {{down: [svc/mdl]}}
hooks: [{{response_headers: {{remove: [server]}}}}, {{mirror: {{to: svc/locked}}, when: 'model == "tight"'}}]
limits:
  - {{name: tight, per: model, models: [tight], requests: 1, window: 1h}}
  - {{name: shadow, per: model, models: [free], requests: 1, window: 1h, shadow: true}}
services:
  svc:
    models:
      mdl: {{cache: {{enabled: true}}, backends: [{{id: a, url: "{up}"}}]}}
      free: {{backends: [{{id: a, url: "{up}"}}]}}
      tight: {{backends: [{{id: a, url: "{up}"}}]}}
      full: {{backends: [{{id: a, url: "{up}", inflight_max: 1}}]}}
      two: {{retry: {{retries_max: 1}}, backends: [{{id: a, url: "{up}"}}, {{id: b, url: "{up}"}}]}}
      locked: {{backends: [{{id: a, url: "{up}", api_key: wrong}}]}}
      down: {{backends: [{{id: a, url: "{down}"}}]}}
"#
    );
    std::fs::write(folder.path().join("tollgate.yaml"), config).unwrap();
    let mut gateway = Gateway::start_in(folder, &[], &[]);
    let admin = gateway.admin();
    gateway.wait_log("Redis answers");
    Everything { gateway, admin, redis, _upstream: upstream, _collector: collector }
}

impl Everything {
    fn ask(&self, model: &str, path: &str, body: &str) -> u16 {
        let headers = ["Authorization: Bearer sk", "Content-Type: application/json"];
        post(self.gateway.address(), &format!("/svc/{model}/{path}"), &headers, body).status
    }

    /// Sends a request and leaves it open.
    fn open(&self, model: &str, path: &str, body: &str) -> Connection {
        let mut connection = Connection::open(self.gateway.address());
        let length = body.len();
        let head = format!(
            "POST /svc/{model}/{path} HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer sk\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        connection.write(head.as_bytes()).unwrap();
        connection
    }

    fn metrics(&self) -> Metrics {
        Metrics::of(self.admin)
    }

    #[track_caller]
    fn wait(&self, name: &str, labels: &[&str], is_it: impl Fn(f64) -> bool) {
        eventually(&format!("{name} {labels:?} moves"), || is_it(self.metrics().sum(name, labels)));
    }
}

/// What has been seen to move.
struct Moved {
    all: Everything,
    before: Metrics,
    names: BTreeSet<&'static str>,
}

impl Moved {
    /// Waits until a metric has come to this value, which it had not before.
    #[track_caller]
    fn to(&mut self, name: &'static str, labels: &[&str], to: f64) {
        self.all.wait(name, labels, |value| (value - to).abs() < 1e-9);
        assert!((self.before.sum(name, labels) - to).abs() > 1e-9 || to == 1.0, "{name}");
        self.names.insert(name);
    }

    /// Waits until a metric is so; of a histogram, its count.
    #[track_caller]
    fn until(&mut self, name: &'static str, labels: &[&str], is_it: impl Fn(f64) -> bool) {
        let is_histogram = ALL.iter().any(|it| it.name == name && it.kind == Kind::Histogram);
        let series = if is_histogram { format!("{name}_count") } else { name.to_owned() };
        self.all.wait(&series, labels, is_it);
        self.names.insert(name);
    }

    fn usual_exchanges(&mut self) {
        let chat = "v1/chat/completions";
        assert_eq!(self.all.ask("mdl", chat, "{}"), 200);
        assert_eq!(self.all.ask("mdl", chat, r#"{"stream":true}"#), 200);
        let mdl = ["model=\"mdl\""];
        let posted = ["model=\"mdl\"", "method=\"POST\"", "status=\"200\""];
        self.to("proxy_requests_total", &posted, 2.0);
        self.to("proxy_backend_requests_total", &mdl, 2.0);
        self.to("proxy_tokens_total", &["model=\"mdl\"", "direction=\"input\""], 200.0);
        self.to("proxy_tokens_total", &["model=\"mdl\"", "direction=\"output\""], 100.0);
        self.to("proxy_tokens_cached_total", &mdl, 80.0);
        self.to("proxy_cost_total", &["model=\"mdl\"", "currency=\"USD\""], 0.0004);
        self.to("proxy_hook_runs_total", &["hook=\"response_headers\"", "outcome=\"passed\""], 2.0);
        self.until("proxy_hook_seconds_total", &["hook=\"response_headers\""], |time| time > 0.0);
        self.until("proxy_request_duration_seconds", &mdl, |count| count == 2.0);
        self.until("proxy_time_to_first_byte_seconds", &mdl, |count| count == 2.0);
        self.until("proxy_time_per_output_token_seconds", &mdl, |count| count == 1.0);
        self.until("proxy_overhead_seconds", &[], |count| count == 2.0);
        assert_eq!(self.all.ask("free", chat, "{}"), 200);
        self.to("proxy_unpriced_total", &[], 1.0);
        self.until("proxy_backend_response_time_seconds", &mdl, |time| time > 0.0);
        // A client that leaves.
        let mut leaving = self.all.open("mdl", chat, r#"{"stream":true,"user":"stay"}"#);
        assert_eq!(leaving.read_head().unwrap().status, 200);
        assert!(leaving.read_chunk().is_some());
        drop(leaving);
        self.to("proxy_client_aborts_total", &mdl, 1.0);
        self.until("proxy_tokens_wasted_total", &["reason=\"client\""], |tokens| tokens > 0.0);
    }

    fn answers_that_are_kept(&mut self) {
        let mdl = ["model=\"mdl\""];
        for _ in 0..2 {
            let body = r#"{"temperature":0}"#;
            assert_eq!(self.all.ask("mdl", "v1/chat/completions", body), 200);
        }
        self.to("proxy_cache_requests_total", &["outcome=\"hit\""], 1.0);
        self.to("proxy_cache_saved_tokens_total", &["direction=\"input\""], 100.0);
        self.to("proxy_cache_saved_cost_total", &mdl, 0.0002);
        self.to("proxy_cache_answers", &[], 1.0);
        self.until("proxy_cache_bytes", &[], |bytes| bytes > 0.0);
    }

    fn what_is_in_flight_held_and_in_line(&mut self) {
        let hanging = self.all.open("full", "hang", r#"{"a":1}"#);
        self.to("proxy_inflight", &[], 1.0);
        self.to("proxy_backend_inflight", &["model=\"full\""], 1.0);
        self.to("proxy_buffered_bytes", &[], 7.0);
        let waiting = self.all.open("full", "hang", "");
        self.to("proxy_queue_length", &["model=\"full\""], 1.0);
        self.until("proxy_connections", &[], |open| open >= 3.0);
        // As many as there may be.
        let more: Vec<Connection> =
            (0..40).map(|_| Connection::open(self.all.gateway.address())).collect();
        self.until("proxy_connections_refused_total", &[], |refused| refused >= 1.0);
        drop((hanging, waiting, more));
        self.until("proxy_connections", &[], |open| open <= 2.0);
    }

    fn limits_and_failures(&mut self) {
        assert_eq!([200, 429], ["", ""].map(|body| self.all.ask("tight", "x", body)));
        assert_eq!(self.all.ask("free", "x", ""), 200);
        self.to("proxy_rate_limited_total", &["limit=\"tight\""], 1.0);
        self.to("proxy_mirrored_total", &["model=\"locked\"", "outcome=\"answered\""], 1.0);
        self.to("proxy_limits_shadowed_total", &["limit=\"shadow\""], 1.0);
        assert_eq!(self.all.ask("two", "retry", ""), 503);
        self.to("proxy_retries_total", &["model=\"two\""], 1.0);
        self.to("proxy_errors_total", &["model=\"two\"", "kind=\"upstream_5xx\""], 1.0);
        self.to("proxy_backend_breaker_state", &["model=\"two\"", "backend=\"a\""], 2.0);
        assert_eq!(self.all.ask("down", "v1/chat/completions", r#"{"model":"down"}"#), 200);
        self.to("proxy_fallbacks_total", &["model=\"down\""], 1.0);
        self.until("proxy_backend_up", &["model=\"down\""], |up| up == 0.0);
        assert_eq!(self.all.ask("locked", "refuse", ""), 401);
        self.to("proxy_backend_misconfigured", &["model=\"locked\""], 1.0);
    }

    /// Nobody listens where the ledger's database should be.
    fn what_is_sent_elsewhere(&mut self) {
        self.until("proxy_ledger_rows_total", &["stage=\"spooled\""], |rows| rows >= 5.0);
        self.until("proxy_ledger_spool_bytes", &[], |bytes| bytes > 100.0);
        self.until("proxy_ledger_up", &["part=\"database\""], |up| up == 0.0);
        let written = ["outcome=\"written\""];
        self.until("proxy_request_log_lines_total", &written, |lines| lines >= 8.0);
        self.until("proxy_spans_total", &["outcome=\"sent\""], |spans| spans >= 16.0);
    }

    fn what_operators_do(&mut self) {
        let (admin, key) = (self.all.admin, ["Authorization: Bearer sk"]);
        let drain = "/admin/drain?service=svc&model=mdl&backend=a";
        assert_eq!(post(admin, drain, &key, "").status, 200);
        self.to("proxy_backend_drained", &["model=\"mdl\""], 1.0);
        assert_eq!(post(admin, "/admin/reload", &key, "").status, 200);
        self.to("proxy_config_generation", &[], 2.0);
        let path = self.all.gateway.folder().join("tollgate.yaml");
        std::fs::write(&path, "nonsense: 1").unwrap();
        assert_eq!(post(admin, "/admin/reload", &key, "").status, 422);
        self.to("proxy_reloads_total", &["outcome=\"ok\""], 1.0);
        self.to("proxy_config_last_reload_successful", &[], 0.0);
        let certificate = "proxy_certificate_expiry_timestamp_seconds";
        self.until(certificate, &["gw.test"], |end| end > 1.7e9);
        self.until("proxy_build_info", &[env!("CARGO_PKG_VERSION")], |info| info == 1.0);
    }

    fn redis_goes(&mut self) {
        self.to("proxy_gateways", &[], 1.0);
        self.until("proxy_redis_up", &[], |up| up == 1.0);
        self.all.redis.kill();
        self.all.ask("tight", "x", "");
        self.until("proxy_redis_up", &[], |up| up == 0.0);
        self.until("proxy_redis_failures_total", &[], |failures| failures >= 1.0);
    }
}

#[test]
fn every_metric_appears_and_moves() {
    let all = everything();
    let mut moved = Moved { before: all.metrics(), all, names: BTreeSet::new() };
    moved.usual_exchanges();
    moved.answers_that_are_kept();
    moved.what_is_in_flight_held_and_in_line();
    moved.limits_and_failures();
    moved.what_is_sent_elsewhere();
    moved.what_operators_do();
    moved.redis_goes();

    let known: BTreeSet<&str> = ALL.iter().map(|metric| metric.name).collect();
    let still: Vec<_> = known.difference(&moved.names).collect();
    assert!(still.is_empty(), "nothing has moved {still:?}");
    let now = moved.all.metrics();
    for process in
        ["process_cpu_seconds_total", "process_open_fds", "process_resident_memory_bytes"]
    {
        assert!(now.names().contains(&process), "{process}");
    }
    // Nothing is told that the table does not have.
    let is_known = |name: &str| {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        known.contains(name) || base.is_some_and(|base| known.contains(base))
    };
    let strange: BTreeSet<&str> =
        now.names().into_iter().filter(|it| !it.starts_with("process_") && !is_known(it)).collect();
    assert!(strange.is_empty(), "{strange:?}");
}

#[test]
fn an_error_rate_can_be_told_by_the_two_counters_as_they_are() {
    let broken = Upstream::start(|_, reply| reply.send(500, &[], b""));
    let gateway = Gateway::start(&config("retry: {fast_500: 0s}", &[&broken]));
    for _ in 0..3 {
        assert_eq!(get(gateway.address(), "/svc/mdl/x", &[]).status, 500);
    }
    assert_eq!(get(gateway.address(), "/svc/nothing/x", &[]).status, 404);
    // An exchange is told of when its client has its answer already.
    eventually("all are counted", || {
        Metrics::of(gateway.address()).bare("proxy_requests_total") == Some(4.0)
    });
    let metrics = Metrics::of(gateway.address());
    assert_eq!(metrics.bare("proxy_errors_total"), Some(3.0));
    // A client's own mistakes are no errors.
    assert_eq!(metrics.sum("proxy_errors_total", &["model=\"mdl\""]), 3.0);
    assert_eq!(metrics.sum("proxy_requests_total", &["status=\"404\""]), 1.0);
}

#[test]
fn who_makes_up_methods_makes_no_series() {
    let upstream = Upstream::metered();
    let gateway = Gateway::start_with(
        "",
        &[("UPSTREAM_URL", &upstream.url()), ("PORT", "0"), ("RATE_LIMIT_ENABLED", "false")],
        &[],
    );
    for at in 0..20 {
        let method = format!("M{at}");
        let request = format!(
            "{method} /v1/chat/completions HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n"
        );
        send(gateway.address(), request);
    }
    let counted =
        || Metrics::of(gateway.address()).sum("proxy_requests_total", &["method=\"other\""]);
    eventually("all are counted", || counted() == 20.0);
    let metrics = Metrics::of(gateway.address());
    let series = metrics.names().into_iter().filter(|name| *name == "proxy_requests_total").count();
    assert!(series <= 3, "{series}");
}

#[test]
fn without_metrics_nothing_is_counted_and_the_pages_say_so() {
    let upstream = Upstream::metered();
    let gateway =
        Gateway::start_with(&config("", &[&upstream]), &[("METRICS_ENABLED", "false")], &[]);
    assert_eq!(post(gateway.address(), "/svc/mdl/v1/chat/completions", &[], "{}").status, 200);
    for page in ["/metrics", "/stats"] {
        let answer = get(gateway.address(), page, &[]);
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (404, &"metrics_off".into()));
        assert!(answer.text().contains("METRICS_ENABLED"));
    }
    let view = get(gateway.address(), "/api/dashboard", &[]).json();
    assert_eq!((&view["metrics"], &view["totals"]["requests"]), (&false.into(), &0.into()));
}
