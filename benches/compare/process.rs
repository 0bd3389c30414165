//! The processes that are compared: started on free ports, measured by `/proc`, ended at the end.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Kernel clock ticks a second; 100 on every Linux that matters (`getconf CLK_TCK`).
const TICKS_PER_SECOND: u64 = 100;

/// A running proxy.
pub(crate) struct Contestant {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    /// What comes before the path of an API.
    pub(crate) path: &'static str,
    child: Child,
    _folder: TempDir,
}

impl Contestant {
    /// CPU time so far of the process and its children, user and system, in microseconds.
    pub(crate) fn cpu_micros(&self) -> u64 {
        self.children().into_iter().chain([self.child.id()]).map(cpu_micros).sum()
    }

    fn children(&self) -> Vec<u32> {
        let own = self.child.id();
        let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children"));
        let children = children.unwrap_or_default();
        children.split_whitespace().filter_map(|id| id.parse().ok()).collect()
    }
}

impl Drop for Contestant {
    fn drop(&mut self) {
        let children = self.children();
        let _ = self.child.kill();
        let _ = self.child.wait();
        // nginx's workers outlive a killed master.
        for child in children {
            let _ = kill(Pid::from_raw(child.cast_signed()), Signal::SIGKILL);
        }
    }
}

/// From the threads' own nanosecond counters: `stat` counts in ticks of 10 ms.
fn cpu_micros(process: u32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let nanos: u64 = threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum();
    if nanos > 0 { nanos / 1000 } else { cpu_micros_in_ticks(process) }
}

fn cpu_micros_in_ticks(process: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<u64> = after_name.split(' ').map(|field| field.parse().unwrap_or(0)).collect();
    let ticks = fields.get(12).unwrap_or(&0) + fields.get(13).unwrap_or(&0);
    ticks * 1_000_000 / TICKS_PER_SECOND
}

pub(crate) fn upstream() -> Contestant {
    let address = free_address();
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.arg("upstream").arg(address.to_string());
    start("upstream", address, "", command, folder())
}

pub(crate) fn bare(upstream: SocketAddr) -> Contestant {
    let address = free_address();
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["bare", &address.to_string(), &upstream.to_string()]);
    start("bare Pingora", address, "", command, folder())
}

pub(crate) const BY_PATH: &str = "Tollgate, by path";
pub(crate) const QUIET: &str = "Tollgate, by path, nothing counted";
pub(crate) const LOGGED: &str = "Tollgate, by path, with a request log";
pub(crate) const METERED: &str = "Tollgate, by path, metered";

/// How Tollgate is asked, and what it does besides.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// By path, and nothing is told of it: neither metrics nor a log.
    Quiet,
    /// By path, as it is where nothing is configured: with metrics.
    Path,
    /// By path, with metrics and a request log.
    Logged,
    /// By path, with a key, a limit, and a ledger: usage is read from each answer, and asked for in streams.
    Metered,
    /// At the front door, where it has to look for the model in the body.
    FrontDoor,
}

pub(crate) fn tollgate(upstream: SocketAddr, mode: Mode) -> Contestant {
    let address = free_address();
    let folder = folder();
    let more = match mode {
        Mode::Path | Mode::FrontDoor => "",
        Mode::Quiet => "metrics: {enabled: false}\n",
        Mode::Logged => "request_log: {file: requests.log}\n",
        Mode::Metered => {
            "api_key: sk-bench\nledger: {}\nprices: {models: {m: {input: 1, output: 2}}}\n\
             limits: [{per: key, requests: 1000000000, tokens: 1000000000000}]\n"
        }
    };
    let config = format!(
        "listen: {address}\n{more}services: {{bench: {{models: {{m: {{backends: [{{id: a, url: \"http://{upstream}\"}}]}}}}}}}}\n"
    );
    let file = folder.path().join("tollgate.yaml");
    fs::write(&file, config).expect("a file");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
    command.arg("-c").arg(file);
    let (name, path) = match mode {
        Mode::Quiet => (QUIET, "/bench/m"),
        Mode::Path => (BY_PATH, "/bench/m"),
        Mode::Logged => (LOGGED, "/bench/m"),
        Mode::Metered => (METERED, "/bench/m"),
        Mode::FrontDoor => ("Tollgate, front door", ""),
    };
    start(name, address, path, command, folder)
}

/// nginx as one would set it up for streaming; none where it is not installed.
pub(crate) fn nginx(upstream: SocketAddr) -> Option<Contestant> {
    let program = ["/usr/sbin/nginx", "/usr/bin/nginx"].map(PathBuf::from);
    let program = program.into_iter().find(|path| path.exists())?;
    let address = free_address();
    let folder = folder();
    let config = nginx_config(address, upstream, folder.path());
    let file = folder.path().join("nginx.conf");
    fs::write(&file, config).expect("a file");
    let mut command = Command::new(program);
    command.arg("-p").arg(folder.path()).arg("-c").arg(file).args(["-e", "error.log"]);
    Some(start("nginx", address, "", command, folder))
}

fn nginx_config(address: SocketAddr, upstream: SocketAddr, folder: &Path) -> String {
    let folder = folder.display();
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    format!(
        "daemon off; master_process on; worker_processes {workers}; pid {folder}/pid;
events {{ worker_connections 4096; }}
http {{
  access_log off; error_log {folder}/error.log;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  keepalive_requests 1000000;
  upstream llm {{ server {upstream}; keepalive 512; keepalive_requests 1000000; }}
  server {{
    listen {address};
    location / {{
      proxy_pass http://llm; proxy_http_version 1.1; proxy_set_header Connection \"\";
      proxy_buffering off; proxy_request_buffering off;
    }}
  }}
}}
"
    )
}

fn start(
    name: &'static str,
    address: SocketAddr,
    path: &'static str,
    mut command: Command,
    folder: TempDir,
) -> Contestant {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
    let contestant = Contestant { name, address, path, child, _folder: folder };
    let begun = Instant::now();
    while TcpStream::connect(address).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(10), "{name} does not listen");
        std::thread::park_timeout(Duration::from_millis(10));
    }
    contestant
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address")
}
