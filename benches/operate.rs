//! How long do start and reload take with many backends, what does it cost to stand idle, and how large is the program?
//!
//! `cargo bench --bench operate` starts the program with 1, 1,000 and 10,000 backends, has it reload a changed
//! configuration of 10,000 while requests come, and leaves it alone with 100 for ten seconds. All backends are one
//! listener on loopback, which answers each health check.

#[allow(dead_code, reason = "the other program needs more of it")]
#[path = "compare/measure.rs"]
mod measure;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use measure::{Cpu, median, pause, resident_kb};

const ANSWER: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";

/// Rounds of each measurement; the median counts.
const ROUNDS: usize = 5;

/// How long the program is left alone.
const IDLE: Duration = Duration::from_secs(10);

fn main() {
    let backend = backend();
    println!("| what | figure |");
    println!("|---|--:|");
    for count in [1, 1_000, 10_000] {
        let times: Vec<f64> = (0..ROUNDS).map(|_| millis(start(backend, count).1)).collect();
        println!("| start to ready, {count} backends | {:.0} ms |", middle(&times));
    }
    for count in [1_000, 10_000] {
        let (mut reloads, mut quiet, mut during) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let [reload, before, meanwhile] = reload(backend, count);
            reloads.push(millis(reload));
            quiet.push(millis(before));
            during.push(millis(meanwhile));
        }
        println!("| reload, {count} backends | {:.0} ms |", middle(&reloads));
        println!("| longest request of 500 before it | {:.1} ms |", middle(&quiet));
        println!("| longest request during it | {:.1} ms |", middle(&during));
    }
    idle(backend);
    size();
}

/// Answers whatever comes, and never closes.
fn backend() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    let executor = tokio::runtime::Runtime::new().expect("a runtime");
    listener.set_nonblocking(true).expect("a socket");
    std::thread::spawn(move || {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        executor.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            loop {
                let Ok((mut stream, _)) = listener.accept().await else { continue };
                tokio::spawn(async move {
                    let mut buffer = [0; 4096];
                    while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {
                        if stream.write_all(ANSWER.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
    });
    address
}

/// The program at work, ended when dropped.
struct Gateway {
    address: SocketAddr,
    admin: SocketAddr,
    child: Child,
    folder: tempfile::TempDir,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn config(at: [SocketAddr; 2], backend: SocketAddr, count: usize, weight: usize) -> String {
    let [listen, admin] = at;
    let pools = count.div_ceil(10);
    let model = |number: usize| {
        let own = count.min(10);
        let of_pool: Vec<String> = (0..own)
            .map(|at| format!("{{id: b{at}, url: \"http://{backend}\", weight: {weight}}}"))
            .collect();
        format!("      m{number}: {{backends: [{}]}}\n", of_pool.join(", "))
    };
    let models: String = (0..pools).map(model).collect();
    format!(
        "listen: {listen}\nadmin: {{listen: {admin}}}\nreload: {{watch: false}}\nservices:\n  s:\n    models:\n{models}"
    )
}

/// Starts it with so many backends, and how long that took.
fn start(backend: SocketAddr, count: usize) -> (Gateway, Duration) {
    let folder = tempfile::tempdir().expect("a folder");
    let free = || TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a port");
    let (address, admin) = (free(), free());
    let file = folder.path().join("tollgate.yaml");
    fs::write(&file, config([address, admin], backend, count, 1)).expect("a file");
    let log = fs::File::create(folder.path().join("output")).expect("a file");
    let begun = Instant::now();
    let child = Command::new(env!("CARGO_BIN_EXE_tollgate"))
        .arg("-c")
        .arg(&file)
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("it starts");
    let gateway = Gateway { address, admin, child, folder };
    while !ask(address, "GET /ready", "").is_some_and(|answer| answer.starts_with("HTTP/1.1 200")) {
        let log = || fs::read_to_string(gateway.folder.path().join("output")).unwrap_or_default();
        assert!(begun.elapsed() < Duration::from_secs(60), "it is not ready: {}", log());
        std::thread::park_timeout(Duration::from_millis(1));
    }
    (gateway, begun.elapsed())
}

/// One request on a connection of its own.
fn ask(address: SocketAddr, line: &str, headers: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    let request = format!("{line} HTTP/1.1\r\nHost: g\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// The time of a reload in which every backend changes; the longest request of some before it, and during it.
fn reload(backend: SocketAddr, count: usize) -> [Duration; 3] {
    let (gateway, _) = start(backend, count);
    let ended = Arc::new(AtomicBool::new(false));
    let before = longest(gateway.address, 500, &Arc::new(AtomicBool::new(false)));
    let before = before.join().expect("requests are answered");
    let at = [gateway.address, gateway.admin];
    let file = gateway.folder.path().join("tollgate.yaml");
    fs::write(file, config(at, backend, count, 2)).expect("a file");
    let requests = longest(gateway.address, usize::MAX, &ended);
    pause(Duration::from_millis(100));
    let begun = Instant::now();
    let answer =
        ask(gateway.admin, "POST /admin/reload", "Content-Length: 0\r\n").unwrap_or_default();
    let took = begun.elapsed();
    assert!(answer.starts_with("HTTP/1.1 200"), "it does not reload: {answer}");
    pause(Duration::from_millis(100));
    ended.store(true, Ordering::SeqCst);
    [took, before, requests.join().expect("requests are answered")]
}

/// Sends requests over one connection, one after the other, a thousand a second; the longest of them.
fn longest(address: SocketAddr, count: usize, ended: &Arc<AtomicBool>) -> JoinHandle<Duration> {
    let ended = Arc::clone(ended);
    std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address).expect("it accepts");
        stream.set_nodelay(true).expect("a socket");
        let request =
            "POST /s/m0/v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n\r\n{}";
        let (mut longest, mut buffer) = (Duration::ZERO, [0; 4096]);
        for _ in 0..count {
            if ended.load(Ordering::SeqCst) {
                break;
            }
            let begun = Instant::now();
            stream.write_all(request.as_bytes()).expect("it takes requests");
            let read = stream.read(&mut buffer).expect("it answers");
            assert!(buffer[..read].starts_with(b"HTTP/1.1 200"), "{:?}", &buffer[..read.min(60)]);
            longest = longest.max(begun.elapsed());
            std::thread::park_timeout(Duration::from_millis(1));
        }
        longest
    })
}

/// The share of a core that it takes when nobody asks for anything but its own health checks.
fn idle(backend: SocketAddr) {
    let (gateway, _) = start(backend, 100);
    pause(Duration::from_secs(1));
    let processes = [gateway.child.id()];
    let before = Cpu::of(&processes).all;
    pause(IDLE);
    #[allow(clippy::cast_precision_loss, reason = "some milliseconds")]
    let share = (Cpu::of(&processes).all - before) as f64 / IDLE.as_secs_f64() / 1e4;
    println!("| idle, 100 backends | {share:.2} % of a core |");
    println!("| memory then | {} KB |", resident_kb(&processes));
}

/// The program as it is installed.
fn size() {
    let folder = tempfile::tempdir().expect("a folder");
    let stripped = folder.path().join("tollgate");
    let program = Path::new(env!("CARGO_BIN_EXE_tollgate"));
    let strip =
        Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(program).status();
    match strip {
        Ok(status) if status.success() => {
            #[allow(clippy::cast_precision_loss, reason = "some megabytes")]
            let bytes = fs::metadata(stripped).map_or(0, |it| it.len()) as f64;
            println!("| the program, installed | {:.1} MB |", bytes / 1e6);
        }
        _ => eprintln!("strip is not installed; the program's size is left out"),
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn middle(values: &[f64]) -> f64 {
    median(values).expect("there were rounds")
}
