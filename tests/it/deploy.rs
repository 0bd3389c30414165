//! The monitoring and deployment pack, as far as it can be run: by Prometheus itself, against Kubernetes' schemas, and
//! with what it configures.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tollgate::telemetry::metrics::ALL;

use crate::harness::{
    Gateway, Prometheus, Upstream, config, eventually, get, post, promtool, run_program,
};

fn pack() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy")
}

fn read(file: &str) -> String {
    std::fs::read_to_string(pack().join(file)).unwrap()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn it_names_no_metric_that_there_is_not() {
    let known: BTreeSet<&str> = ALL.iter().map(|metric| metric.name).collect();
    let mut named = BTreeSet::new();
    for path in files(&pack()) {
        let text = std::fs::read_to_string(&path).unwrap();
        for part in text.split("proxy_").skip(1) {
            let rest: String = part
                .chars()
                .take_while(|letter| letter.is_ascii_lowercase() || *letter == '_')
                .collect();
            let name = format!("proxy_{rest}");
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            let base = base.filter(|base| known.contains(base)).unwrap_or(&name);
            assert!(known.contains(base), "{}: {name}", path.display());
            named.insert(base.to_owned());
        }
    }
    let unused: Vec<_> = known.iter().filter(|name| !named.contains(**name)).collect();
    assert!(unused.is_empty(), "neither alert nor panel has {unused:?}");
}

#[test]
fn promtool_is_pleased_with_rules_and_configuration_and_their_tests_pass() {
    let folder = pack().join("prometheus");
    promtool(&folder, &["check", "config", "prometheus.yml"]);
    promtool(&folder, &["check", "rules", "alerts.yml"]);
    promtool(&folder, &["test", "rules", "alerts_test.yml"]);
}

#[test]
fn manifests_are_as_kubernetes_wants_them_and_what_they_configure_is_fine() {
    let folder = tempfile::tempdir().unwrap();
    let told = Command::new(".venv/bin/python")
        .arg("tests/clients/manifests.py")
        .arg(pack())
        .arg(folder.path())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("make clients has been run");
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let configurations = files(folder.path());
    assert_eq!(configurations.len(), 3, "{configurations:?}");
    for path in configurations {
        let checked = run_program(folder.path(), &[], &["check", "-c", path.to_str().unwrap()]);
        let words = String::from_utf8_lossy(&checked.stderr);
        assert!(checked.status.success(), "{}: {words}", path.display());
    }
}

/// A gateway with one backend that fails and one that nobody listens at.
fn failing() -> (Upstream, Gateway) {
    let broken = Upstream::start(|seen, reply| {
        let status = if seen.target().ends_with("broken") { 500 } else { 200 };
        let body = br#"{"choices":[{}],"usage":{"prompt_tokens":100,"completion_tokens":50}}"#;
        reply.send(status, &[("Content-Type", "application/json")], body);
    });
    let (up, down) = (broken.url(), "http://127.0.0.1:9");
    let top = "retry: {fast_500: 0s, retries_max: 0}\nbreaker: {enabled: false}\nledger: {}\n\
               prices: {models: {mdl: {input: 1, output: 2}}}";
    let config = config(top, &[&broken]).replace(
        &format!("{{id: a, url: \"{up}\"}}"),
        &format!("{{id: a, url: \"{up}\"}}, {{id: b, url: \"{down}\", priority: 1}}"),
    );
    (broken, Gateway::start(&config))
}

#[test]
fn a_real_prometheus_scrapes_it_and_its_alerts_fire_on_a_failing_backend() {
    let (_upstream, gateway) = failing();
    // As they stand, but without the wait for a failure that lasts.
    let rules = read("prometheus/alerts.yml");
    let literal = "expr: rate(proxy_errors_total[5m]) / rate(proxy_requests_total[5m]) > 0.05\n";
    assert!(rules.contains(literal), "the rule that everybody writes");
    let lines = rules.lines().map(|line| match line.trim_start().strip_prefix("for: ") {
        Some(_) => format!("{}for: 0s", &line[..line.len() - line.trim_start().len()]),
        None => line.to_owned(),
    });
    let rules: Vec<String> = lines.collect();
    let prometheus = Prometheus::start(gateway.address(), &rules.join("\n"));
    eventually("it is scraped", || !prometheus.ask("proxy_build_info == 1").is_empty());
    assert!(prometheus.firing().iter().all(|name| name != "TollgateErrorRate"));
    let all = ["TollgateErrorRate", "TollgateModelErrorRate", "TollgateBackendDown"];
    eventually("the alerts fire", || {
        for number in 0..10 {
            let path = if number % 2 == 0 { "broken" } else { "v1/chat/completions" };
            post(gateway.address(), &format!("/svc/mdl/{path}"), &[], "{}");
        }
        let firing = prometheus.firing();
        all.iter().all(|name| firing.iter().any(|known| known == name))
    });
    let told = prometheus.ask("rate(proxy_errors_total[5m]) / rate(proxy_requests_total[5m])");
    let value: f64 = told[0]["value"][1].as_str().unwrap().parse().unwrap();
    assert!((value - 0.5).abs() < 0.1, "{value}");
    let sum = prometheus.ask("sum(proxy_requests_total{status!=\"\"}) - proxy_requests_total");
    assert!(sum.is_empty() || sum[0]["value"][1] == "0", "{sum:?}");

    every_panel_has_an_answer(&prometheus);
}

/// The expressions of the dashboard, with a choice of all for each of its variables.
fn every_panel_has_an_answer(prometheus: &Prometheus) {
    let dashboard: Value = serde_json::from_str(&read("grafana/tollgate.json")).unwrap();
    let mut expressions = Vec::new();
    let mut panels: Vec<&Value> = dashboard["panels"].as_array().unwrap().iter().collect();
    while let Some(panel) = panels.pop() {
        panels.extend(panel["panels"].as_array().into_iter().flatten());
        let targets = panel["targets"].as_array().into_iter().flatten();
        expressions.extend(targets.map(|target| target["expr"].as_str().unwrap().to_owned()));
    }
    assert!(expressions.len() > 50, "{}", expressions.len());
    let mut answered = 0;
    for expression in &expressions {
        let mut asked = expression.replace("$__rate_interval", "1m").replace("$__range", "1m");
        for variable in ["$instance", "$service", "$model", "$backend"] {
            asked = asked.replace(variable, ".*");
        }
        answered += usize::from(!prometheus.ask(&asked).is_empty());
    }
    // Without Redis, certificates and limits there is nothing to tell of those.
    assert!(answered * 10 >= expressions.len() * 7, "{answered} of {}", expressions.len());
}

#[test]
fn the_health_check_of_the_image_tells_a_gateway_that_serves_from_none() {
    let dockerfile = read("Dockerfile");
    let line =
        dockerfile.lines().find(|line| line.trim_start().starts_with("CMD [\"bash\"")).unwrap();
    let words: Vec<String> =
        serde_json::from_str(line.trim().strip_prefix("CMD ").unwrap()).unwrap();
    let upstream = Upstream::named("x");
    let mut gateway = Gateway::start(&config("", &[&upstream]));
    let port = gateway.address().port().to_string();
    let check = || {
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env("PORT", &port).stderr(std::process::Stdio::null());
        command.status().expect("bash is installed").success()
    };
    assert!(check());
    assert_eq!(get(gateway.address(), "/health", &[]).status, 200);
    gateway.signal(nix::sys::signal::Signal::SIGTERM);
    gateway.wait_end();
    assert!(!check());
}
