//! A real Prometheus in a folder of its own.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use tempfile::TempDir;

use super::{eventually, free_port, get};

/// A running server. It ends with the test.
pub(crate) struct Prometheus {
    child: Child,
    address: SocketAddr,
    _folder: TempDir,
}

impl Prometheus {
    /// Scrapes `target` every second, and evaluates these rules as often.
    pub(crate) fn start(target: SocketAddr, rules: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [rules.yml]\n\
             scrape_configs: [{{job_name: tollgate, static_configs: [{{targets: [\"{target}\"]}}]}}]\n"
        );
        std::fs::write(folder.path().join("prometheus.yml"), config).expect("a file");
        std::fs::write(folder.path().join("rules.yml"), rules).expect("a file");
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let child = Command::new("prometheus")
            .arg("--config.file=prometheus.yml")
            .arg("--storage.tsdb.path=data")
            .arg(format!("--web.listen-address={address}"))
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("prometheus is installed");
        let is_ready = || {
            std::net::TcpStream::connect(address).is_ok()
                && get(address, "/-/ready", &[]).status == 200
        };
        eventually("Prometheus is ready", is_ready);
        Self { child, address, _folder: folder }
    }

    /// What an expression comes to now.
    #[track_caller]
    pub(crate) fn ask(&self, expression: &str) -> Vec<Value> {
        let query = utf8_percent_encode(expression, NON_ALPHANUMERIC);
        let answer = get(self.address, &format!("/api/v1/query?query={query}"), &[]);
        assert_eq!(answer.status, 200, "{expression}: {}", answer.text());
        answer.json()["data"]["result"].as_array().expect("a list").clone()
    }

    /// The names of alerts that fire.
    pub(crate) fn firing(&self) -> Vec<String> {
        let all = get(self.address, "/api/v1/alerts", &[]).json();
        let all = all["data"]["alerts"].as_array().expect("a list");
        let firing = all.iter().filter(|alert| alert["state"] == "firing");
        firing
            .map(|alert| alert["labels"]["alertname"].as_str().expect("a name").to_owned())
            .collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs promtool in a folder, and expects it to be pleased.
#[track_caller]
pub(crate) fn promtool(folder: &Path, arguments: &[&str]) {
    let told = Command::new("promtool").args(arguments).current_dir(folder).output();
    let told = told.expect("promtool is installed");
    let words = String::from_utf8_lossy(&told.stdout).into_owned();
    let errors = String::from_utf8_lossy(&told.stderr);
    assert!(told.status.success(), "promtool {arguments:?}: {words}{errors}");
}
