//! Clients that ask for ten times as much as their key may have, of one gateway and of two that share its limit in
//! Redis, which dies and comes back meanwhile.

use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::backend::Backend;
use super::gateway::Gateway;

const CLIENTS: usize = 64;

/// What the key may have in a second.
const LIMIT: usize = 100;

/// How many times as much is asked for.
const TIMES: usize = 10;

const SECONDS: usize = 30;

pub(crate) async fn run() -> bool {
    let backend = Backend::start().await;
    let one = hammer(&backend, 1, None).await;
    let redis = Redis::start();
    let shared = hammer(&backend, 2, Some((redis, false))).await;
    let redis = Redis::start();
    let killed = hammer(&backend, 2, Some((redis, true))).await;
    let allowed = LIMIT * SECONDS;
    let mut passed = true;
    for (name, admitted) in
        [("one gateway", one), ("two with Redis", shared), ("two, Redis killed", killed)]
    {
        #[allow(clippy::cast_precision_loss, reason = "some thousands")]
        let share = 100.0 * admitted as f64 / allowed as f64;
        println!("{name}: {admitted} of {allowed} allowed were admitted, {share:.2} %");
        passed &= (99.0..=101.0).contains(&share);
    }
    passed
}

/// Exchanges admitted, of many times as many.
async fn hammer(backend: &Arc<Backend>, gateways: usize, redis: Option<(Redis, bool)>) -> usize {
    let shared = redis.as_ref().map(|(redis, _)| format!("redis: {{url: \"{}\"}}\n", redis.url()));
    let config = format!(
        "listen: 127.0.0.1:0\napi_key: sk\n{}limits: [{{per: key, requests: {LIMIT}, window: 1s}}]\n\
         services: {{svc: {{models: {{mdl: {{backends: [{{id: a, url: \"http://{}\"}}]}}}}}}}}\n",
        shared.unwrap_or_default(),
        backend.address
    );
    let gateways: Vec<Gateway> = (0..gateways).map(|_| Gateway::start(&config)).collect();
    // Until they know of each other.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let admitted = Arc::new(AtomicUsize::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let began = Instant::now();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let to = gateways[client % gateways.len()].address();
            let pause = Duration::from_secs(1) * CLIENTS as u32 / (LIMIT * TIMES) as u32;
            // One after the other: what is free is taken at once, by whoever is next.
            let first = began + pause * client as u32 / CLIENTS as u32;
            let pace = tokio::time::interval_at(first.into(), pause);
            tokio::spawn(ask(to, pace, began, Arc::clone(&admitted), Arc::clone(&stop)))
        })
        .collect();
    let until = |seconds: usize| {
        let at = Duration::from_secs(seconds as u64).saturating_sub(began.elapsed());
        tokio::time::sleep(at)
    };
    if let Some((mut redis, true)) = redis {
        until(SECONDS / 3).await;
        redis.kill();
        until(SECONDS * 2 / 3).await;
        redis.start_again();
        until(SECONDS).await;
    } else {
        until(SECONDS).await;
    }
    stop.store(true, Ordering::SeqCst);
    for client in clients {
        client.await.unwrap();
    }
    let admitted = admitted.load(Ordering::SeqCst);
    for mut gateway in gateways {
        gateway.stop().await;
    }
    admitted
}

/// Asks at an even pace, and counts what is admitted before the time is up.
async fn ask(
    to: SocketAddr,
    mut pace: tokio::time::Interval,
    began: Instant,
    admitted: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
) {
    let mut connection: Option<TcpStream> = None;
    let request = b"GET /svc/mdl/short HTTP/1.1\r\nHost: g\r\nX-API-Key: sk\r\n\r\n";
    let mut answer = vec![0; 64 * 1024];
    while !stop.load(Ordering::SeqCst) {
        pace.tick().await;
        let stream = match &mut connection {
            Some(stream) => stream,
            None => connection.insert(TcpStream::connect(to).await.unwrap()),
        };
        if stream.write_all(request).await.is_err() {
            connection = None;
            continue;
        }
        let mut read = 0;
        let status = loop {
            match stream.read(&mut answer[read..]).await {
                Ok(more @ 1..) => read += more,
                _ => break 0,
            }
            if let Some(status) = whole(&answer[..read]) {
                break status;
            }
        };
        if status == 0 {
            connection = None;
        }
        if status == 200 && began.elapsed() < Duration::from_secs(SECONDS as u64) {
            admitted.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// The status of a response that is complete.
fn whole(bytes: &[u8]) -> Option<u16> {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("content-length").then(|| value.parse::<usize>().ok())?
    });
    let is_whole = match length {
        Some(length) => body.len() >= length,
        None => body.ends_with("0\r\n\r\n"),
    };
    is_whole.then(|| head.split(' ').nth(1)?.parse().ok())?
}

/// A real Redis server.
struct Redis {
    child: Child,
    port: u16,
}

impl Redis {
    fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { child: Self::spawn(port), port }
    }

    fn spawn(port: u16) -> Child {
        let port = port.to_string();
        let arguments =
            ["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
        let mut command = Command::new("redis-server");
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn start_again(&mut self) {
        self.child = Self::spawn(self.port);
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
