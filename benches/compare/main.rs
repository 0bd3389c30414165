//! What does an exchange cost, and how long does it take, compared with nothing in between, with nginx, HAProxy and
//! bare Pingora?
//!
//! `cargo bench --bench compare [-- CASE ...]` runs a fast upstream and, in turn and interleaved over several rounds,
//! each proxy before it; `ROUNDS=N` for another number of rounds, `-- list` to see the names of the cases. For each it reports
//! the CPU time (user and system) of the proxy's processes per request or event, requests a second, latencies, and
//! memory, as a table with ratios, and writes the same as `target/bench/compare.md` and `compare.json`. Ratios within
//! one run are the figures to trust: machines that are shared drift. All traffic stays on loopback and is bounded.

mod bare;
mod case;
mod client;
mod contestant;
mod measure;
mod report;
mod upstream;
mod wrk;

use std::net::SocketAddr;

use case::Case;
use contestant::Contestant;
use measure::Figures;
use report::Outcome;

/// Rounds over all contestants; the median counts.
const ROUNDS: usize = 5;

fn main() {
    // Every stream has two ends here.
    let limit = nix::sys::resource::Resource::RLIMIT_NOFILE;
    if let Ok((_, most)) = nix::sys::resource::getrlimit(limit) {
        let _ = nix::sys::resource::setrlimit(limit, most, most);
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let address = |at: usize| -> SocketAddr {
        arguments.get(at).and_then(|text| text.parse().ok()).expect("an address")
    };
    match arguments.first().map(String::as_str) {
        Some("upstream") => upstream::serve(address(1)),
        Some("bare") => bare::serve(address(1), address(2), arguments.get(3).map(String::as_str)),
        _ => compare(arguments.iter().filter(|text| !text.starts_with("--")).map(String::as_str)),
    }
}

fn compare<'a>(wanted: impl Iterator<Item = &'a str>) {
    let wanted: Vec<&str> = wanted.collect();
    let is_wanted =
        |case: &&Case| wanted.is_empty() || wanted.iter().any(|wanted| case.name.contains(wanted));
    let cases = case::all();
    if wanted == ["list"] {
        cases.iter().for_each(|case| println!("{:24} {}", case.name, case.title));
        return;
    }
    let rounds = std::env::var("ROUNDS").ok().and_then(|text| text.parse().ok());
    let rounds = rounds.unwrap_or(ROUNDS).max(1);
    let mut outcomes = Vec::new();
    for case in cases.iter().filter(is_wanted) {
        eprintln!("{}", case.title);
        let outcome = run(case, rounds);
        println!("\n{}", report::table(&outcome));
        outcomes.push(outcome);
        report::write(&outcomes, rounds);
    }
}

/// All rounds of one case. The contestants live as long as the case does.
fn run(case: &Case, rounds: usize) -> Outcome {
    let upstream = contestant::upstream();
    let contestants: Vec<Contestant> =
        case.who.iter().filter_map(|who| contestant::start(*who, upstream.address, case)).collect();
    let mut figures: Vec<Vec<Figures>> = contestants.iter().map(|_| Vec::new()).collect();
    for contestant in &contestants {
        (case.work)(contestant, case::Size::WarmUp);
    }
    for round in 1..=rounds {
        for (contestant, figures) in contestants.iter().zip(&mut figures) {
            figures.push((case.work)(contestant, case::Size::Whole));
        }
        eprintln!("  round {round} of {rounds}");
    }
    let rows = contestants.iter().zip(figures).map(|(it, figures)| (it.name.clone(), figures));
    Outcome { name: case.name, title: case.title, unit: case.unit, rows: rows.collect() }
}
