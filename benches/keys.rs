//! What do 100,000 keys cost: to read, to hold, and to look one up?
//!
//! `cargo bench --bench keys` writes files with 1, 1,000 and 100,000 keys, reads each as the program does, and looks up
//! keys that are there and keys that are not. Each key has a limit of its own and two models.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use http::{HeaderMap, HeaderValue};
use tollgate::auth::Keys;
use tollgate::config::{Environment, Source, load};
use tollgate::hooks::HookKinds;
use tollgate::secret::KeyHash;

/// Look-ups of each kind.
const LOOKUPS: u32 = 200_000;

fn main() {
    println!("| keys | file | read and checked | held | look-up, there | look-up, not there |");
    println!("|--:|--:|--:|--:|--:|--:|");
    for count in [1, 1_000, 100_000] {
        measure(count);
    }
}

fn key(number: usize) -> String {
    format!("tg-benchmark-key-of-a-length-as-usual-{number:08}")
}

#[allow(clippy::cast_precision_loss, reason = "sizes and times to be shown")]
fn measure(count: usize) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tollgate.yaml");
    std::fs::write(
        &file,
        "keys_file: keys.yaml\nservices: {s: {models: {m: {backends: [{id: a, url: \"http://h\"}]}}}}\n",
    )
    .expect("a file");
    let mut text = String::from("keys:\n");
    for number in 0..count {
        let hash = KeyHash::sha256(key(number).as_bytes()).text();
        text.push_str(&format!(
            "  - {{id: key-{number:08}, name: team-{number}, hash: \"{hash}\", models: [m, \"gpt-*\"], limits: [{{requests: 60}}]}}\n"
        ));
    }
    std::fs::write(folder.path().join("keys.yaml"), &text).expect("a file");
    let source = Source::File(file);
    let before = resident_kib();
    let began = Instant::now();
    let snapshot =
        load(&source, &Environment::default(), &HookKinds::default()).expect("it is well-formed");
    let keys = Keys::new(&snapshot.clients, None);
    let read = began.elapsed();
    let held = resident_kib().saturating_sub(before);
    let headers = |number: usize| {
        let value = HeaderValue::try_from(key(number)).expect("it can stand in a header");
        HeaderMap::from_iter([(http::HeaderName::from_static("x-api-key"), value)])
    };
    let time = |first: usize| {
        let asked: Vec<HeaderMap> =
            (0..1024).map(|at| headers(first + at * count.div_ceil(1024) % count)).collect();
        let began = Instant::now();
        for at in 0..LOOKUPS as usize {
            black_box(keys.check(&asked[at % asked.len()], None, || 0)).ok();
        }
        began.elapsed() / LOOKUPS
    };
    println!(
        "| {count} | {:.1} MB | {:.0} ms | {:.1} MB | {} ns | {} ns |",
        text.len() as f64 / 1e6,
        read.as_secs_f64() * 1e3,
        held as f64 / 1024.0,
        time(0).as_nanos(),
        time(10_000_000).as_nanos(),
    );
}

/// Memory that the process holds.
fn resident_kib() -> usize {
    let status = std::fs::read_to_string(Path::new("/proc/self/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or(0)
}
