//! Constant load while everything that can happen happens: backends are killed, frozen, overloaded
//! and reset, the configuration is reloaded 200 times, some of them broken, and the program is
//! upgraded twice. Nothing may fail but streams whose own backend died after their first byte.
//!
//! It takes two minutes. `SEED` repeats the troubles of another run.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::backend::{Backend, Mode};
use super::client;
use super::gateway::Gateway;

const DURATION: Duration = Duration::from_secs(110);
const RELOADS: u32 = 200;
const BACKENDS: usize = 4;
const SHORT_CLIENTS: usize = 8;
const STREAMS: usize = 64;

/// What came of everything that was sent.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) requests: AtomicUsize,
    pub(crate) streams: AtomicUsize,
    /// Idle connections that were closed as the next request was sent; it went on another one.
    pub(crate) reconnects: AtomicUsize,
    /// Streams whose own backend died after their first byte.
    pub(crate) excused: AtomicUsize,
    failures: Mutex<BTreeMap<String, usize>>,
}

impl Tally {
    pub(crate) fn fail(&self, what: &str, why: &str) {
        *self.failures.lock().unwrap().entry(format!("{what}: {why}")).or_default() += 1;
    }

    /// What failed, and how often.
    pub(crate) fn failures(&self) -> BTreeMap<String, usize> {
        self.failures.lock().unwrap().clone()
    }
}

/// Whether nothing failed that may not.
pub(crate) async fn run() -> bool {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("chaos for {} s, SEED={seed}", DURATION.as_secs());
    let mut backends = Vec::new();
    for _ in 0..BACKENDS {
        backends.push(Backend::start().await);
    }
    let mut gateway = Gateway::start(&config(&backends, 1));
    let tally = Arc::new(Tally::default());
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..SHORT_CLIENTS {
        clients.spawn(client::short(gateway.address(), Arc::clone(&tally), Arc::clone(&stop)));
    }
    for _ in 0..STREAMS {
        let backends = backends.clone();
        clients.spawn(client::streams(
            gateway.address(),
            backends,
            Arc::clone(&tally),
            Arc::clone(&stop),
        ));
    }
    let trouble = tokio::spawn(trouble(backends.clone(), seed));
    let (reloads, upgrades) = operate(&mut gateway, &backends).await;
    trouble.await.unwrap();
    stop.store(true, Ordering::SeqCst);
    while let Some(done) = clients.join_next().await {
        done.unwrap();
    }
    let ended = gateway.stop().await;
    report(&tally, reloads, upgrades, ended)
}

/// Troubles one backend after the other, never more than two of the four at a time.
async fn trouble(backends: Vec<Arc<Backend>>, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let began = Instant::now();
    let mut troubled: Vec<(usize, Instant)> = Vec::new();
    while began.elapsed() < DURATION {
        let now = Instant::now();
        let (over, still): (Vec<_>, Vec<_>) =
            troubled.into_iter().partition(|(_, end)| *end <= now);
        troubled = still;
        for (at, _) in over {
            backends[at].set(Mode::Well);
        }
        if troubled.len() < 2 {
            let at = random.usize(..BACKENDS);
            if troubled.iter().all(|(known, _)| *known != at) {
                let mode = [Mode::Dead, Mode::Frozen, Mode::Unavailable, Mode::Resetting];
                backends[at].set(mode[random.usize(..mode.len())]);
                troubled.push((at, now + Duration::from_millis(random.u64(500..3000))));
            }
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    for backend in &backends {
        backend.set(Mode::Well);
    }
}

/// Reloads and upgrades; how many of each were done.
async fn operate(gateway: &mut Gateway, backends: &[Arc<Backend>]) -> (u32, u32) {
    let began = Instant::now();
    let mut upgrades = 0;
    for number in 1..=RELOADS {
        gateway.reload(&numbered(backends, number)).await;
        if number == RELOADS / 3 || number == RELOADS * 2 / 3 {
            // The file may be one that is broken: no new process would start with it.
            gateway.reload(&numbered(backends, 1)).await;
            gateway.upgrade().await;
            upgrades += 1;
        }
        let next = DURATION.mul_f64(f64::from(number) / f64::from(RELOADS));
        tokio::time::sleep(next.saturating_sub(began.elapsed())).await;
    }
    (RELOADS, upgrades)
}

/// The configuration of this number: every fifth is broken.
fn numbered(backends: &[Arc<Backend>], number: u32) -> String {
    match number % 5 {
        0 => "services: {svc: {modles: {}}}".to_owned(),
        _ => config(backends, number % 3 + 1),
    }
}

fn config(backends: &[Arc<Backend>], weight: u32) -> String {
    let mut text = String::from(
        "listen: 127.0.0.1:0\n\
         reload: {watch: false}\n\
         balance: least_inflight\n\
         health_check: {interval: 1s, timeout: 500ms, path: /v1/health}\n\
         deadlines: {connect: 500ms, first_byte: 1s, silence: 2s}\n\
         retry: {retries_max: 10, budget: 1, budget_min: 100, delay: 100ms}\n\
         breaker: {open: 1s, slow_start: 2s}\n\
         services: {svc: {models: {mdl: {backends: [\n",
    );
    for (number, backend) in backends.iter().enumerate() {
        let weight = if number == 0 { weight } else { 1 };
        text.push_str(&format!(
            "  {{id: b{number}, url: \"http://{}\", weight: {weight}}},\n",
            backend.address
        ));
    }
    text.push_str("]}}}}\n");
    text
}

fn report(tally: &Tally, reloads: u32, upgrades: u32, ended: bool) -> bool {
    let count = |count: &AtomicUsize| count.load(Ordering::SeqCst);
    let failures = tally.failures();
    println!("requests: {}", count(&tally.requests));
    println!("streams: {}", count(&tally.streams));
    println!("streams whose backend died after their first byte: {}", count(&tally.excused));
    println!("reloads: {reloads}, upgrades: {upgrades}");
    println!(
        "requests sent again because their idle connection was closed: {}",
        count(&tally.reconnects)
    );
    println!("failures: {}", failures.values().sum::<usize>());
    for (what, count) in &failures {
        println!("  {count} x {what}");
    }
    if !ended {
        println!("the first process did not end well");
    }
    let enough = count(&tally.requests) >= 1000 && count(&tally.streams) >= 100;
    failures.is_empty() && ended && enough
}
