//! More than usual: a thousand streams through reload and upgrade, what a million requests and ten
//! thousand streams that clients leave do to memory, and crowds that mean no good.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::backend::Backend;
use super::client;
use super::crowd::{self, Crowd};
use super::gateway::Gateway;

const STREAMS: usize = 1000;
const REQUESTS: usize = 1_000_000;
const ABORTED: usize = 10_000;
const ABORTED_AT_ONCE: usize = 100;

/// Growth that is no leak: what the allocator keeps goes up and down by 20 MiB. A leak of one small
/// object a request, or of one buffer a stream, is several times as much.
const GROWTH_KIB_MAX: u64 = 32 * 1024;

/// Whether everything was as it should be. `all`: not only the streams, which take half a minute.
pub(crate) async fn run(all: bool) -> bool {
    let mut backends = Vec::new();
    for _ in 0..2 {
        backends.push(Backend::start().await);
    }
    let mut gateway = Gateway::start(&config(&backends, 1));
    let mut passed = streams(&mut gateway, &backends).await;
    if all {
        // Before the crowds, which leave an allocator with holes.
        passed &= memory(&gateway).await;
        passed &= crowds(&gateway).await;
    }
    gateway.stop().await && passed
}

fn config(backends: &[Arc<Backend>], weight: u32) -> String {
    format!(
        "listen: 127.0.0.1:0\n\
         reload: {{watch: false}}\n\
         balance: least_inflight\n\
         services: {{svc: {{models: {{mdl: {{backends: [\n\
         {{id: a, url: \"http://{}\", weight: {weight}}}, {{id: b, url: \"http://{}\"}}\n\
         ]}}}}}}}}\n",
        backends[0].address, backends[1].address
    )
}

/// Streams that are open at the same time while `happens` happens. How many were not whole.
async fn open_streams(to: SocketAddr, happens: impl Future<Output = ()>) -> usize {
    let mut streams = JoinSet::new();
    for number in 0..STREAMS {
        streams.spawn(async move { client::stream(to, &format!("stream-{number}")).await });
    }
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let open = streams.len();
    happens.await;
    let mut broken = STREAMS - open;
    while let Some(done) = streams.join_next().await {
        if let Err(why) = done.unwrap() {
            println!("    {}", why.why);
            broken += 1;
        }
    }
    broken
}

async fn streams(gateway: &mut Gateway, backends: &[Arc<Backend>]) -> bool {
    let to = gateway.address();
    let mut broken = open_streams(to, async {}).await;
    let before = settled(gateway).await;
    broken += open_streams(to, gateway.reload(&config(backends, 3))).await;
    let reloaded = settled(gateway).await;
    broken += open_streams(to, gateway.upgrade()).await;
    broken += open_streams(to, async {}).await;
    let upgraded = settled(gateway).await;
    println!(
        "{STREAMS} open streams each through a reload and an upgrade: not whole: {broken}\n  \
         memory: {before} KiB before, {reloaded} KiB after the reload, {upgraded} KiB of the new process"
    );
    broken == 0 && is_level(before, reloaded) && is_level(before, upgraded)
}

/// Memory once the allocator has given back what is free, which it does while there is work.
async fn settled(gateway: &Gateway) -> u64 {
    crowd::service(gateway.address(), Duration::from_secs(4)).await;
    gateway.memory_kib()
}

fn is_level(before: u64, after: u64) -> bool {
    after <= before + GROWTH_KIB_MAX
}

async fn crowds(gateway: &Gateway) -> bool {
    const TIME: Duration = Duration::from_secs(5);
    let to = gateway.address();
    let alone = crowd::service(to, TIME).await;
    println!("service alone: {alone:?}, {} KiB", gateway.memory_kib());
    let mut passed = alone.failures == 0;
    for (kind, count) in [
        (Crowd::Idle, 10_000),
        (Crowd::SlowHeads, 2_000),
        (Crowd::SlowBodies, 2_000),
        (Crowd::SlowReaders, 500),
        (Crowd::LargeHeads, 16),
        (Crowd::TooLargeHeads, 16),
        (Crowd::RapidReset, 8),
    ] {
        let crowd = kind.gather(to, count).await;
        let service = crowd::service(to, TIME).await;
        let memory = gateway.memory_kib();
        drop(crowd);
        tokio::time::sleep(Duration::from_secs(2)).await;
        println!(
            "{count} x {kind:?}: {service:?}, {memory} KiB, {} KiB after",
            gateway.memory_kib()
        );
        passed &= service.failures == 0 && service.requests > 100;
    }
    passed
}

async fn memory(gateway: &Gateway) -> bool {
    let to = gateway.address();
    requests(to, REQUESTS / 10).await;
    aborted(to, ABORTED / 2, ABORTED_AT_ONCE).await;
    let before = settled(gateway).await;
    let began = Instant::now();
    requests(to, REQUESTS).await;
    let after_requests = settled(gateway).await;
    aborted(to, ABORTED, ABORTED_AT_ONCE).await;
    let after_aborted = settled(gateway).await;
    println!(
        "memory: {before} KiB, {after_requests} KiB after {REQUESTS} requests, {after_aborted} KiB after \
         {ABORTED} streams that clients left; {:.0} s",
        began.elapsed().as_secs_f64()
    );
    is_level(before, after_requests) && is_level(before, after_aborted)
}

async fn requests(to: SocketAddr, count: usize) {
    const CLIENTS: usize = 16;
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(async move {
            let mut stream = TcpStream::connect(to).await.unwrap();
            for _ in 0..count / CLIENTS {
                crowd::small(&mut stream).await.unwrap();
            }
        });
    }
    while let Some(done) = clients.join_next().await {
        done.unwrap();
    }
}

/// Streams whose clients leave after the first event, so many at once.
pub(crate) async fn aborted(to: SocketAddr, count: usize, at_once: usize) {
    const REQUEST: &[u8] =
        b"POST /svc/mdl/v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n\r\n{}";
    for _ in 0..count / at_once {
        let mut clients = JoinSet::new();
        for _ in 0..at_once {
            clients.spawn(async move {
                let mut stream = TcpStream::connect(to).await.unwrap();
                stream.write_all(REQUEST).await.unwrap();
                let mut seen = Vec::new();
                while !seen.windows(7).any(|window| window == b"data: 0") {
                    assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
                }
            });
        }
        while let Some(done) = clients.join_next().await {
            done.unwrap();
        }
    }
}
