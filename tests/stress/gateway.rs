//! The program under chaos, through its upgrades.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

pub(crate) struct Gateway {
    process: Pid,
    child: Child,
    folder: TempDir,
    log: Arc<Mutex<Vec<String>>>,
    address: SocketAddr,
}

/// Longest that a line of the log is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

impl Gateway {
    pub(crate) fn start(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tollgate.yaml"), config).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .current_dir(folder.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = child.stderr.take().unwrap();
        std::thread::spawn({
            let log = Arc::clone(&log);
            // The processes after an upgrade write to the same pipe.
            move || collect(stderr, &log)
        });
        let process = Pid::from_raw(child.id().try_into().unwrap());
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut gateway = Self { process, child, folder, log, address };
        let line = gateway.wait_blocking("listening on http://", 0);
        gateway.address = line.rsplit_once("http://").unwrap().1.trim().parse().unwrap();
        gateway
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Writes another configuration and has it taken up, or refused.
    pub(crate) async fn reload(&self, config: &str) {
        std::fs::write(self.folder.path().join("tollgate.yaml"), config).unwrap();
        let before = self.log.lock().unwrap().len();
        kill(self.process, Signal::SIGHUP).unwrap();
        self.wait("the new configuration is", before).await;
    }

    pub(crate) async fn upgrade(&mut self) {
        let before = self.log.lock().unwrap().len();
        kill(self.process, Signal::SIGUSR2).unwrap();
        let line = self.wait("has taken over", before).await;
        let process = line.split("process ").nth(1).unwrap().split(' ').next().unwrap();
        self.process = Pid::from_raw(process.parse().unwrap());
    }

    /// Ends the last process; whether it drained, and the first one ended well.
    pub(crate) async fn stop(&mut self) -> bool {
        let before = self.log.lock().unwrap().len();
        kill(self.process, Signal::SIGTERM).unwrap();
        self.wait("drained, nothing was cut", before).await;
        let ended = self.child.wait().is_ok_and(|status| status.success());
        if let Ok(path) = std::env::var("STRESS_LOG") {
            std::fs::write(path, self.log.lock().unwrap().join("\n")).unwrap();
        }
        ended
    }

    /// Memory of its own that the process holds, in KiB.
    pub(crate) fn memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process)).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Descriptors that the process has open.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.process)).unwrap().count()
    }

    /// CPU time that its threads have taken, in seconds.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.process)).unwrap();
        let nanos = tasks.filter_map(|task| {
            let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<f64>().ok()
        });
        nanos.sum::<f64>() / 1e9
    }

    async fn wait(&self, text: &str, from: usize) -> String {
        let began = Instant::now();
        loop {
            if let Some(line) = self.find(text, from) {
                return line;
            }
            assert!(began.elapsed() < PATIENCE, "no {text:?} in the log: {:#?}", self.last());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn wait_blocking(&self, text: &str, from: usize) -> String {
        let began = Instant::now();
        loop {
            if let Some(line) = self.find(text, from) {
                return line;
            }
            assert!(began.elapsed() < PATIENCE, "no {text:?} in the log: {:#?}", self.last());
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }

    fn find(&self, text: &str, from: usize) -> Option<String> {
        self.log.lock().unwrap().iter().skip(from).find(|line| line.contains(text)).cloned()
    }

    fn last(&self) -> Vec<String> {
        let log = self.log.lock().unwrap();
        log.iter().rev().take(20).cloned().collect()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = kill(self.process, Signal::SIGKILL);
        let _ = self.child.kill();
    }
}

fn collect(stderr: impl Read, log: &Mutex<Vec<String>>) {
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        log.lock().unwrap().push(line);
    }
}
