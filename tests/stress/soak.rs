//! Half an hour at half load with everything on: small requests, streams, streams that clients leave, connections that
//! come and go, and a reload every ten seconds. Memory and descriptors have to stay where they are.
//!
//! `SOAK_SECONDS` gives another time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::backend::Backend;
use super::chaos::Tally;
use super::client;
use super::crowd;
use super::endurance;
use super::gateway::Gateway;

const SECONDS: u64 = 30 * 60;

/// Between two looks at the process.
const LOOK_EVERY: Duration = Duration::from_secs(30);

const RELOAD_EVERY: Duration = Duration::from_secs(10);

/// Clients, and the time between two requests of one.
const CLIENTS: usize = 64;
const PACE: Duration = Duration::from_millis(8);

/// Requests of a client before it connects anew.
const REQUESTS_A_CONNECTION: usize = 1000;

/// Streams at a time, of four seconds each.
const STREAMS: usize = 300;

/// How many of them clients leave at once, every second.
const LEFT: usize = 20;

/// What may come on top. A leak of a hundred bytes a request would be more than ten times as much.
const MEMORY_KIB_MORE: u64 = 24 * 1024;
const DESCRIPTORS_MORE: usize = 50;

/// What the process held at a moment.
#[derive(Clone, Copy, Debug)]
struct Held {
    memory_kib: u64,
    descriptors: usize,
}

/// Whether everything was as it should be.
pub(crate) async fn run() -> bool {
    let seconds = std::env::var("SOAK_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    let time = Duration::from_secs(seconds.unwrap_or(SECONDS));
    let mut backends = Vec::new();
    for _ in 0..2 {
        backends.push(Backend::start().await);
    }
    let mut gateway = Gateway::start(&config(&backends, 1));
    let (tally, stop) = (Arc::new(Tally::default()), Arc::new(AtomicBool::new(false)));
    let small = Arc::new(AtomicUsize::new(0));
    let mut load = JoinSet::new();
    let to = gateway.address();
    for _ in 0..CLIENTS {
        load.spawn(paced(to, Arc::clone(&small), Arc::clone(&tally), Arc::clone(&stop)));
    }
    for _ in 0..STREAMS {
        load.spawn(client::streams(to, backends.clone(), Arc::clone(&tally), Arc::clone(&stop)));
    }
    load.spawn(leave(to, Arc::clone(&stop)));
    let seen = watch(&gateway, &backends, &small, time).await;
    stop.store(true, Ordering::SeqCst);
    while let Some(done) = load.join_next().await {
        done.unwrap();
    }
    report(&tally, &small, &seen) && gateway.stop().await
}

fn config(backends: &[Arc<Backend>], weight: u32) -> String {
    format!(
        "listen: 127.0.0.1:0\n\
         reload: {{watch: false}}\n\
         balance: least_inflight\n\
         ledger: {{}}\n\
         prices: {{models: {{mdl: {{input: 1, output: 2}}}}}}\n\
         limits: [{{per: address, requests: 1000000000}}, {{per: model, tokens: 1000000000000}}]\n\
         request_log: {{file: requests.log, rotate_bytes: 50MiB, keep: 2}}\n\
         services: {{svc: {{models: {{mdl: {{backends: [\n\
         {{id: a, url: \"http://{}\", weight: {weight}}}, {{id: b, url: \"http://{}\"}}\n\
         ]}}}}}}}}\n",
        backends[0].address, backends[1].address
    )
}

/// Small requests at a steady pace, on connections that end now and then.
async fn paced(to: SocketAddr, done: Arc<AtomicUsize>, tally: Arc<Tally>, stop: Arc<AtomicBool>) {
    let mut pace = tokio::time::interval(PACE);
    while !stop.load(Ordering::SeqCst) {
        let mut stream = match tokio::net::TcpStream::connect(to).await {
            Ok(stream) => stream,
            Err(error) => {
                tally.fail("request", &format!("connect: {error}"));
                continue;
            }
        };
        for _ in 0..REQUESTS_A_CONNECTION {
            if stop.load(Ordering::SeqCst) {
                return;
            }
            pace.tick().await;
            if let Err(error) = crowd::small(&mut stream).await {
                tally.fail("request", &error.to_string());
                break;
            }
            done.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Streams whose clients leave after the first event.
async fn leave(to: SocketAddr, stop: Arc<AtomicBool>) {
    let mut pace = tokio::time::interval(Duration::from_secs(1));
    while !stop.load(Ordering::SeqCst) {
        pace.tick().await;
        endurance::aborted(to, LEFT, LEFT).await;
    }
}

/// Reloads, and looks at the process, until the time is over.
async fn watch(
    gateway: &Gateway,
    backends: &[Arc<Backend>],
    small: &AtomicUsize,
    time: Duration,
) -> Vec<Held> {
    let (began, mut looked, mut weight) = (Instant::now(), Instant::now(), 1);
    let mut seen = Vec::new();
    let mut cpu = gateway.cpu_seconds();
    while began.elapsed() < time {
        tokio::time::sleep(RELOAD_EVERY).await;
        weight = weight % 3 + 1;
        gateway.reload(&config(backends, weight)).await;
        if looked.elapsed() < LOOK_EVERY {
            continue;
        }
        let held = Held { memory_kib: gateway.memory_kib(), descriptors: gateway.descriptors() };
        let used = gateway.cpu_seconds();
        println!(
            "{:>5} s: {} KiB, {} descriptors, {} small requests, {:.0} % of a core",
            began.elapsed().as_secs(),
            held.memory_kib,
            held.descriptors,
            small.load(Ordering::Relaxed),
            100.0 * (used - cpu) / looked.elapsed().as_secs_f64(),
        );
        (looked, cpu) = (Instant::now(), used);
        seen.push(held);
    }
    seen
}

/// Whether the second half of the time took no more than the first. The first tenth is warm-up.
fn report(tally: &Tally, small: &AtomicUsize, seen: &[Held]) -> bool {
    let failures = tally.failures();
    println!(
        "small requests: {}, whole streams: {}",
        small.load(Ordering::Relaxed),
        tally.streams.load(Ordering::SeqCst)
    );
    for (what, count) in &failures {
        println!("  failed: {count} x {what}");
    }
    let seen = &seen[seen.len() / 10..];
    let (first, second) = seen.split_at(seen.len() / 2);
    let most = |half: &[Held]| {
        let memory = half.iter().map(|held| held.memory_kib).max().unwrap_or(u64::MAX);
        (memory, half.iter().map(|held| held.descriptors).max().unwrap_or(usize::MAX))
    };
    let ((memory_before, before), (memory_after, after)) = (most(first), most(second));
    println!(
        "at most: {memory_before} KiB and {before} descriptors in the first half, \
         {memory_after} KiB and {after} in the second"
    );
    failures.is_empty()
        && !first.is_empty()
        && memory_after <= memory_before + MEMORY_KIB_MORE
        && after <= before + DESCRIPTORS_MORE
}
