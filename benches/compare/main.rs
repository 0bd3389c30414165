//! What does an exchange cost in CPU time, compared with nginx and with bare Pingora?
//!
//! `cargo bench --bench compare` runs a fast upstream and, in turn and interleaved over several
//! rounds, nginx (if it is installed), a bare Pingora proxy and Tollgate before it; for each it
//! sends small JSON requests and long prompts and holds SSE streams, and reports the CPU time that the
//! proxy's processes took a request, a prompt and an event. Ratios within one run are the figures to trust: machines
//! that are shared drift. All traffic stays on loopback and is bounded in count.

mod bare;
mod load;
mod process;
mod upstream;

use std::net::SocketAddr;

use load::Load;
use process::{Contestant, Mode};

/// Rounds over all contestants; the median counts.
const ROUNDS: usize = 7;

/// Requests a round, and the connections that send them.
const REQUESTS: usize = 20_000;
const CONNECTIONS: usize = 32;

/// Long prompts a round.
const PROMPTS: usize = 2_000;

/// Streams a round, all at once, and what each of them brings.
const STREAMS: usize = 100;
const EVENTS: usize = 100;
const EVENT_INTERVAL_MS: u64 = 10;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let address = |at: usize| -> SocketAddr {
        arguments.get(at).and_then(|text| text.parse().ok()).expect("an address")
    };
    match arguments.first().map(String::as_str) {
        Some("upstream") => upstream::serve(address(1)),
        Some("bare") => bare::serve(address(1), address(2)),
        _ => compare(),
    }
}

/// CPU microseconds a unit, of each contestant and round.
struct Series {
    name: &'static str,
    requests: Vec<f64>,
    prompts: Vec<f64>,
    events: Vec<f64>,
}

fn compare() {
    let upstream = process::upstream();
    let mut contestants: Vec<Contestant> = process::nginx(upstream.address).into_iter().collect();
    if contestants.is_empty() {
        println!("nginx is not installed; it is left out (apt-get install nginx-light)");
    }
    contestants.push(process::bare(upstream.address));
    for mode in [Mode::Quiet, Mode::Path, Mode::Logged, Mode::Metered, Mode::FrontDoor] {
        contestants.push(process::tollgate(upstream.address, mode));
    }
    let mut series: Vec<Series> = contestants
        .iter()
        .map(|contestant| Series {
            name: contestant.name,
            requests: vec![],
            prompts: vec![],
            events: vec![],
        })
        .collect();
    let load = Load::new();
    for contestant in &contestants {
        load.requests(contestant.address, contestant.path, REQUESTS / 4, CONNECTIONS);
    }
    for round in 1..=ROUNDS {
        for (contestant, series) in contestants.iter().zip(&mut series) {
            let before = contestant.cpu_micros();
            load.requests(contestant.address, contestant.path, REQUESTS, CONNECTIONS);
            let between = contestant.cpu_micros();
            load.prompts(contestant.address, contestant.path, PROMPTS, CONNECTIONS);
            let later = contestant.cpu_micros();
            load.streams(contestant.address, contestant.path, STREAMS, EVENTS, EVENT_INTERVAL_MS);
            let after = contestant.cpu_micros();
            series.requests.push(per(between - before, REQUESTS));
            series.prompts.push(per(later - between, PROMPTS));
            series.events.push(per(after - later, STREAMS * EVENTS));
        }
        eprintln!("round {round} of {ROUNDS} is done");
    }
    report(&series);
}

#[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
fn per(micros: u64, units: usize) -> f64 {
    micros as f64 / units as f64
}

fn report(series: &[Series]) {
    println!("\nCPU time (user and system) of the proxy, median of {ROUNDS} interleaved rounds");
    println!(
        "{REQUESTS} small JSON requests and {PROMPTS} prompts of 300 KB over {CONNECTIONS} connections; {STREAMS} SSE streams of {EVENTS} events every {EVENT_INTERVAL_MS} ms\n"
    );
    let units = ["request", "300 KB prompt", "event"];
    let titles = units.map(|unit| format!("us a {unit} | to nginx | to bare Pingora |"));
    println!("| proxy | {}", titles.join(" "));
    println!("|---|{}", "--:|--:|--:|".repeat(units.len()));
    let nginx = series.iter().find(|series| series.name == "nginx");
    let bare = series.iter().find(|series| series.name == "bare Pingora");
    let measured: [fn(&Series) -> &[f64]; 3] =
        [|one| &one.requests, |one| &one.prompts, |one| &one.events];
    for one in series {
        let cells = measured.map(|of| {
            let ratio = |other: Option<&Series>| match other {
                Some(other) => format!("{:.2}", median_ratio(of(one), of(other))),
                None => "-".to_owned(),
            };
            format!("{:.1} | {} | {} |", median(of(one)), ratio(nginx), ratio(bare))
        });
        println!("| {} | {}", one.name, cells.join(" "));
    }
    println!();
    let named = |name| series.iter().find(|series| series.name == name);
    for (what, with, without) in [
        ("Metrics to nothing counted", process::BY_PATH, process::QUIET),
        ("Metrics and request log to neither", process::LOGGED, process::QUIET),
        ("Metered to not metered", process::METERED, process::BY_PATH),
    ] {
        if let (Some(with), Some(without)) = (named(with), named(without)) {
            let [requests, prompts, events] =
                measured.map(|of| median_ratio(of(with), of(without)));
            println!(
                "{what}: {requests:.2} a request, {prompts:.2} a prompt, {events:.2} an event"
            );
        }
    }
}

/// The median of the rounds' ratios: each round compares what ran within the same minute.
fn median_ratio(own: &[f64], other: &[f64]) -> f64 {
    let ratios: Vec<f64> = own.iter().zip(other).map(|(own, other)| own / other).collect();
    median(&ratios)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
