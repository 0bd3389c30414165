//! The built program in a folder of its own.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::{Upstream, eventually, get};

/// A running gateway. It ends with the test.
pub(crate) struct Gateway {
    child: Child,
    /// A process that has taken over, and whether signals go to it.
    successor: Option<u32>,
    is_adopted: bool,
    folder: TempDir,
    log: Arc<Mutex<Vec<String>>>,
    address: SocketAddr,
}

impl Gateway {
    /// Runs the program with this `tollgate.yaml`.
    #[track_caller]
    pub(crate) fn start(config: &str) -> Self {
        Self::start_with(config, &[], &[])
    }

    /// Runs the program with this `tollgate.yaml`, variables and arguments.
    #[track_caller]
    pub(crate) fn start_with(config: &str, variables: &[(&str, &str)], arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        if !config.is_empty() {
            std::fs::write(folder.path().join("tollgate.yaml"), config).expect("a file");
        }
        Self::start_in(folder, variables, arguments)
    }

    /// Runs another program that is a gateway, too, with this `tollgate.yaml`.
    #[track_caller]
    pub(crate) fn start_other(program: &Path, config: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("tollgate.yaml"), config).expect("a file");
        let mut command = Command::new(program);
        command.current_dir(folder.path()).env_clear();
        Self::spawn(folder, command)
    }

    /// Runs the program in a folder that the test has filled.
    #[track_caller]
    pub(crate) fn start_in(
        folder: TempDir,
        variables: &[(&str, &str)],
        arguments: &[&str],
    ) -> Self {
        let command = program(folder.path(), variables, arguments);
        Self::spawn(folder, command)
    }

    /// Runs the program with this `tollgate.yaml`; its standard output goes elsewhere.
    #[track_caller]
    pub(crate) fn start_with_output(
        folder: TempDir,
        config: &str,
        variables: &[(&str, &str)],
        output: Stdio,
    ) -> Self {
        std::fs::write(folder.path().join("tollgate.yaml"), config).expect("a file");
        let mut command = program(folder.path(), variables, &[]);
        command.stdout(output);
        Self::spawn(folder, command)
    }

    #[track_caller]
    fn spawn(folder: TempDir, mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the program starts");
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = child.stderr.take().expect("a pipe");
        std::thread::spawn({
            let log = Arc::clone(&log);
            move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    log.lock().expect("no test panicked with it").push(line);
                }
            }
        });
        let mut gateway = Self {
            child,
            successor: None,
            is_adopted: false,
            folder,
            log,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
        };
        gateway.wait_log("listening on ");
        if let Some(address) = gateway.listens("http") {
            gateway.address = address;
        }
        gateway
    }

    fn listens(&self, scheme: &str) -> Option<SocketAddr> {
        let scheme = format!("listening on {scheme}://");
        let log = self.log();
        log.iter().find_map(|line| line.split_once(&scheme)?.1.trim().parse().ok())
    }

    /// The address where it takes traffic with a scheme.
    #[track_caller]
    pub(crate) fn wait_listens(&self, scheme: &str) -> SocketAddr {
        eventually("it listens", || self.listens(scheme).is_some());
        self.listens(scheme).expect("it listens")
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it has its pages, if that is an address of their own.
    #[track_caller]
    pub(crate) fn admin(&mut self) -> SocketAddr {
        let line = self.wait_log("status and dashboard on http://");
        line.rsplit_once("http://").and_then(|(_, at)| at.trim().parse().ok()).expect("an address")
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Waits for a log line with this text and returns it.
    #[track_caller]
    pub(crate) fn wait_log(&mut self, text: &str) -> String {
        let mut found = None;
        let mut ended = None;
        eventually(&format!("a log line with {text:?}; the log is {:#?}", self.log()), || {
            found = self.log().into_iter().find(|line| line.contains(text));
            ended = self.child.try_wait().expect("the child can be asked");
            found.is_some() || ended.is_some()
        });
        found.unwrap_or_else(|| panic!("ended ({ended:?}) without {text:?}: {:#?}", self.log()))
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().expect("no test panicked with it").clone()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("the process is there");
    }

    /// The process id.
    pub(crate) fn process(&self) -> u32 {
        match self.successor {
            Some(process) if self.is_adopted => process,
            _ => self.child.id(),
        }
    }

    /// Waits until another process has taken over, and returns its id. It ends with the test.
    #[track_caller]
    pub(crate) fn wait_successor(&mut self) -> u32 {
        let line = self.wait_log("has taken over");
        let id = line.split("process ").nth(1).and_then(|rest| rest.split(' ').next());
        let id = id.and_then(|id| id.parse().ok()).expect("a process id in the line");
        self.successor = Some(id);
        id
    }

    /// From now on signals go to the process that has taken over.
    pub(crate) fn adopt_successor(&mut self) {
        self.is_adopted = true;
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.process()).expect("a process id"))
    }

    /// Exchanges in flight.
    #[track_caller]
    pub(crate) fn inflight(&self) -> u64 {
        get(self.address, "/ready", &[]).json()["in_flight"].as_u64().expect("a number")
    }

    /// Waits for the end of the process.
    #[track_caller]
    pub(crate) fn wait_end(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the process ends", || {
            status = self.child.try_wait().expect("the child can be asked");
            status.is_some()
        });
        status.expect("it ended")
    }

    /// The most memory that was ever resident, in MiB, without the pages of the program's file: of
    /// those an unoptimised build has three times as many, and the system drops them when it likes.
    pub(crate) fn peak_memory_mib(&self) -> u64 {
        let [peak, file] = self.memory_kib(["VmHWM:", "RssFile:"]);
        (peak - file) / 1024
    }

    /// The memory that is resident now, in KiB, without pages of files.
    pub(crate) fn resident_kib(&self) -> u64 {
        self.memory_kib(["RssAnon:"])[0]
    }

    fn memory_kib<const N: usize>(&self, names: [&str; N]) -> [u64; N] {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process()))
            .expect("the process is there");
        names.map(|name| {
            let line = status.lines().find(|line| line.starts_with(name)).expect("a line");
            line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
        })
    }

    /// The status of the backend `id` of `service/model`; null where there is none.
    #[track_caller]
    pub(crate) fn backend(&self, pool: &str, id: &str) -> serde_json::Value {
        let status = get(self.address, "/api/health/status", &[]).json();
        let (service, model) = pool.split_once('/').expect("service/model");
        let backends = status["data"][service][model].as_array().expect("a pool").clone();
        backends.into_iter().find(|backend| backend["id"] == id).unwrap_or_default()
    }

    #[track_caller]
    pub(crate) fn wait_backend(&self, pool: &str, id: &str, status: &str) {
        eventually(&format!("{pool} {id} is {status}"), || {
            self.backend(pool, id)["status"] == status
        });
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if let Some(process) = self.successor {
            let _ = kill(Pid::from_raw(process.cast_signed()), Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the gateway's log:\n{}", self.log().join("\n"));
        }
    }
}

/// A configuration with one service and model, `svc/mdl`, over these upstreams (ids `a`, `b`, ...),
/// with more top-level lines before it.
pub(crate) fn config(top: &str, upstreams: &[&Upstream]) -> String {
    let urls: Vec<String> = upstreams.iter().map(|upstream| upstream.url()).collect();
    config_of(top, &urls.iter().map(String::as_str).collect::<Vec<_>>())
}

/// As [`config`], over these URLs.
pub(crate) fn config_of(top: &str, urls: &[&str]) -> String {
    let mut text =
        format!("listen: 127.0.0.1:0\n{top}\nservices: {{svc: {{models: {{mdl: {{backends: [\n");
    for (id, url) in ('a'..).zip(urls) {
        text.push_str(&format!("  {{id: {id}, url: \"{url}\"}},\n"));
    }
    text.push_str("]}}}}\n");
    text
}

/// Runs the program to its end.
pub(crate) fn run_program(folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    program(folder, variables, arguments).output().expect("the program runs")
}

fn program(folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
    command.current_dir(folder).env_clear().args(arguments).stdin(Stdio::null());
    command.envs(variables.iter().copied());
    command
}

/// The hash of a key as a configuration holds it.
pub(crate) fn hash_of(key: &str) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, key.as_bytes());
    let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// A model by its name, over upstreams.
pub(crate) struct Model<'a>(pub(crate) &'a str, pub(crate) &'a [&'a Upstream]);

/// A configuration with these models of each service, with more top-level lines before them.
pub(crate) fn services(top: &str, services: &[(&str, &[Model<'_>])]) -> String {
    let mut text = format!("listen: 127.0.0.1:0\n{top}\nservices:\n");
    for (service, models) in services {
        text.push_str(&format!("  {service}:\n    models:\n"));
        for Model(name, upstreams) in *models {
            text.push_str(&format!("      \"{name}\":\n        backends:\n"));
            for (id, upstream) in ('a'..).zip(*upstreams) {
                let url = upstream.url();
                text.push_str(&format!("        - {{id: {id}, url: \"{url}\"}}\n"));
            }
        }
    }
    text
}
