//! The processes that are compared: started on free ports, measured by `/proc`, ended at the end.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::case::Case;
use super::measure::{Cpu, pause, resident_kb};

/// How long what is done behind an answer may take: rows are on their way to the ledger.
const REST: Duration = Duration::from_millis(300);

/// Longest wait for a process to listen. Ten thousand pools take their time.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Who stands between client and upstream.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Direct,
    Nginx,
    Haproxy,
    Bare,
    /// Tollgate by path, with nothing but a backend configured: it counts.
    Default,
    /// The same, asked at the front door: it looks for the model in the body.
    FrontDoor,
    /// With a key, limits, prices and a request log.
    Metered,
    /// The same, and a ledger: everything.
    Full,
    /// As the default, with so many pools.
    Pools(usize),
    /// As the full one, with so many keys.
    Keys(usize),
    /// As the default, with answers that are kept: all requests are the same.
    Hits,
    /// The same, and no two requests are.
    Misses,
}

/// What clients speak.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Speaks {
    Http1,
    /// HTTP/1.1 over TLS.
    Tls,
    /// Without TLS, known before.
    Http2,
}

/// A running proxy, or none.
pub(crate) struct Contestant {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    speaks: Speaks,
    /// What comes before the path of an API.
    prefix: &'static str,
    /// Whether each request has a number of its own, in a header.
    pub(crate) numbers: bool,
    /// Memory that it holds before it has done anything.
    pub(crate) resident_kb_at_start: u64,
    child: Option<Child>,
    folder: TempDir,
}

impl Contestant {
    /// CPU time so far of the process and its children.
    pub(crate) fn cpu(&self) -> Cpu {
        Cpu::of(&self.processes())
    }

    /// Memory that the process and its children hold.
    pub(crate) fn resident_kb(&self) -> u64 {
        resident_kb(&self.processes())
    }

    /// Waits for what is done behind the answers.
    pub(crate) fn rest(&self) {
        pause(REST);
    }

    pub(crate) fn is_proxy(&self) -> bool {
        self.child.is_some()
    }

    /// The path by which it is asked for an API's.
    pub(crate) fn path(&self, path: &str) -> String {
        format!("{}{path}", self.prefix)
    }

    pub(crate) fn url(&self, path: &str) -> String {
        let scheme = if self.speaks == Speaks::Tls { "https" } else { "http" };
        format!("{scheme}://{}{}", self.address, self.path(path))
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn processes(&self) -> Vec<u32> {
        let Some(own) = self.child.as_ref().map(Child::id) else { return Vec::new() };
        let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children"));
        let children = children.unwrap_or_default();
        let children = children.split_whitespace().filter_map(|id| id.parse().ok());
        children.chain([own]).collect()
    }
}

impl Drop for Contestant {
    fn drop(&mut self) {
        let processes = self.processes();
        let Some(child) = &mut self.child else { return };
        let _ = child.kill();
        let _ = child.wait();
        // nginx's workers outlive a killed master.
        for process in processes.into_iter().filter(|process| *process != child.id()) {
            let _ = kill(Pid::from_raw(process.cast_signed()), Signal::SIGKILL);
        }
    }
}

/// The upstream itself.
pub(crate) fn upstream() -> Contestant {
    let address = free_address();
    let mut command = this_program();
    command.arg("upstream").arg(address.to_string());
    launch("upstream".to_owned(), (address, Speaks::Http1, ""), command, folder())
}

/// Starts one for a case; none where it is not installed.
pub(crate) fn start(who: Who, upstream: SocketAddr, case: &Case) -> Option<Contestant> {
    let (address, folder, speaks) = (free_address(), folder(), case.speaks);
    let path = folder.path();
    if speaks == Speaks::Tls {
        certificate(path);
    }
    let at = (address, speaks, "");
    Some(match who {
        Who::Direct => Contestant {
            name: "none".to_owned(),
            address: upstream,
            speaks,
            prefix: "",
            numbers: false,
            resident_kb_at_start: 0,
            child: None,
            folder,
        },
        Who::Nginx => {
            let program = installed("nginx")?;
            let file = path.join("nginx.conf");
            fs::write(&file, nginx(address, upstream, path, speaks)).expect("a file");
            let mut command = Command::new(program);
            command.arg("-p").arg(path).arg("-c").arg(file).args(["-e", "error.log"]);
            launch("nginx".to_owned(), at, command, folder)
        }
        Who::Haproxy => {
            let program = installed("haproxy")?;
            let file = path.join("haproxy.cfg");
            fs::write(&file, haproxy(address, upstream, path, speaks)).expect("a file");
            let mut command = Command::new(program);
            command.arg("-db").arg("-f").arg(file);
            launch("HAProxy".to_owned(), at, command, folder)
        }
        Who::Bare => {
            let mut command = this_program();
            command.args(["bare", &address.to_string(), &upstream.to_string()]);
            match speaks {
                Speaks::Http1 => {}
                Speaks::Tls => drop(command.arg(path)),
                Speaks::Http2 => drop(command.arg("h2c")),
            }
            launch("bare Pingora".to_owned(), at, command, folder)
        }
        _ => tollgate(who, upstream, at, folder),
    })
}

fn tollgate(
    who: Who,
    upstream: SocketAddr,
    (address, speaks, _): (SocketAddr, Speaks, &'static str),
    folder: TempDir,
) -> Contestant {
    let path = folder.path();
    let name = match who {
        Who::FrontDoor => "Tollgate, front door".to_owned(),
        Who::Metered => "Tollgate, all but the ledger".to_owned(),
        Who::Full => "Tollgate, everything on".to_owned(),
        Who::Pools(count) => format!("Tollgate, {count} pools"),
        Who::Keys(count) => format!("Tollgate, {count} keys"),
        Who::Hits => "Tollgate, kept answers".to_owned(),
        Who::Misses => "Tollgate, none kept yet".to_owned(),
        _ => "Tollgate".to_owned(),
    };
    let listen = match speaks {
        Speaks::Tls => format!(
            "https://{address}\ntls: {{certificates: [{{cert_file: {0}/cert.pem, key_file: {0}/key.pem}}]}}",
            path.display()
        ),
        _ => address.to_string(),
    };
    let models = if let Who::Pools(count) = who { count } else { 1 };
    let backends = |model: usize| {
        let name = if model == 0 { "m".to_owned() } else { format!("m{model}") };
        format!(
            "    {name}: {{backends: [{{id: a, url: \"http://{upstream}\"}}, {{id: b, url: \"http://{upstream}\"}}]}}\n"
        )
    };
    let models: String = (0..models).map(backends).collect();
    let keys = if let Who::Keys(count) = who { count } else { 1 };
    let more = match who {
        Who::Metered | Who::Full | Who::Keys(_) => {
            fs::write(path.join("keys.yaml"), keys_file(keys)).expect("a file");
            let ledger = if who == Who::Metered { "" } else { "ledger: {}\n" };
            format!(
                "keys_file: keys.yaml\n{ledger}prices: {{models: {{m: {{input: 1, output: 2}}}}}}\n\
                 request_log: {{file: requests.log}}\n\
                 limits: [{{per: key, requests: 1000000000, tokens: 1000000000000}}]\n"
            )
        }
        Who::Hits | Who::Misses => {
            "cache: {enabled: true, requests: all, headers: [x-number]}\n".to_owned()
        }
        _ => String::new(),
    };
    // Checks of ten thousand backends are another question.
    let checks = if matches!(who, Who::Pools(_)) { "health_check: {interval: 1h}\n" } else { "" };
    let config = format!(
        "listen: {listen}\n{checks}{more}services:\n  bench: {{models: {{\n{models}  }}}}\n"
    );
    let config = config.replace("}\n    m", "},\n    m");
    let file = path.join("tollgate.yaml");
    fs::write(&file, config).expect("a file");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
    command.arg("-c").arg(file).current_dir(path);
    let prefix = if who == Who::FrontDoor { "" } else { "/bench/m" };
    let mut contestant = launch(name, (address, speaks, prefix), command, folder);
    contestant.numbers = who == Who::Misses;
    contestant
}

/// The first key is the one that clients send.
fn keys_file(count: usize) -> String {
    let line = |number: usize| {
        let key = if number == 0 { "sk-bench".to_owned() } else { format!("tg-{number:040}") };
        let hash = tollgate::secret::KeyHash::sha256(key.as_bytes()).text();
        format!("  - {{id: key-{number}, name: team-{number}, hash: \"{hash}\"}}\n")
    };
    (0..count).fold("keys:\n".to_owned(), |text, number| text + &line(number))
}

/// nginx as one would set it up for streaming.
fn nginx(address: SocketAddr, upstream: SocketAddr, folder: &Path, speaks: Speaks) -> String {
    let folder = folder.display();
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let (listen, tls) = match speaks {
        Speaks::Http1 => ("", String::new()),
        Speaks::Http2 => (" http2", String::new()),
        Speaks::Tls => {
            let tls =
                format!("ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;");
            (" ssl", tls)
        }
    };
    format!(
        "daemon off; master_process on; worker_processes {workers}; worker_rlimit_nofile 20000; pid {folder}/pid;
events {{ worker_connections 10000; }}
http {{
  access_log off; error_log {folder}/error.log;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  keepalive_requests 100000000; client_max_body_size 0; http2_max_requests 100000000;
  upstream llm {{ server {upstream} max_fails=0; server {upstream} max_fails=0; keepalive 512; keepalive_requests 100000000; }}
  server {{
    listen {address}{listen}; {tls}
    location / {{
      proxy_pass http://llm; proxy_http_version 1.1; proxy_set_header Connection \"\";
      proxy_buffering off; proxy_request_buffering off; proxy_next_upstream error timeout http_503 non_idempotent;
    }}
  }}
}}
"
    )
}

/// HAProxy likewise.
fn haproxy(address: SocketAddr, upstream: SocketAddr, folder: &Path, speaks: Speaks) -> String {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let bind = match speaks {
        Speaks::Http1 => String::new(),
        Speaks::Http2 => " proto h2".to_owned(),
        Speaks::Tls => format!(" ssl crt {}/both.pem", folder.display()),
    };
    format!(
        "global
  nbthread {threads}
  maxconn 9000
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  option http-no-delay
  retries 2
  option redispatch
  retry-on conn-failure 503
frontend in
  bind {address}{bind}
  default_backend llm
backend llm
  balance roundrobin
  http-reuse always
  server a {upstream} pool-max-conn 512
  server b {upstream} pool-max-conn 512
"
    )
}

/// A certificate for this machine, its key, and both in one file.
fn certificate(folder: &Path) {
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).expect("a certificate");
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    fs::write(folder.join("both.pem"), format!("{certificate}{key}")).expect("a file");
    fs::write(folder.join("cert.pem"), certificate).expect("a file");
    fs::write(folder.join("key.pem"), key).expect("a file");
}

fn installed(program: &str) -> Option<std::path::PathBuf> {
    let path = ["/usr/sbin", "/usr/bin"].map(|folder| Path::new(folder).join(program));
    let found = path.into_iter().find(|path| path.exists());
    if found.is_none() {
        eprintln!("{program} is not installed; it is left out");
    }
    found
}

fn launch(
    name: String,
    (address, speaks, prefix): (SocketAddr, Speaks, &'static str),
    mut command: Command,
    folder: TempDir,
) -> Contestant {
    let log = fs::File::create(folder.path().join("output")).expect("a file");
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
    let child = Some(child);
    let mut contestant = Contestant {
        name,
        address,
        speaks,
        prefix,
        numbers: false,
        resident_kb_at_start: 0,
        child,
        folder,
    };
    let begun = Instant::now();
    while TcpStream::connect(address).is_err() {
        let has_ended =
            contestant.child.as_mut().is_some_and(|it| !matches!(it.try_wait(), Ok(None)));
        let output = || fs::read_to_string(contestant.folder().join("output")).unwrap_or_default();
        assert!(
            !has_ended && begun.elapsed() < START_TIMEOUT,
            "{} does not listen: {}",
            contestant.name,
            output()
        );
        std::thread::park_timeout(Duration::from_millis(10));
    }
    contestant.rest();
    contestant.resident_kb_at_start = contestant.resident_kb();
    contestant
}

fn this_program() -> Command {
    Command::new(std::env::current_exe().expect("this program"))
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address")
}
