//! How fast is the model found in a body? Throughput of the scanner over prompts as clients send them, beside a
//! JSON parser that skips all values, and beside just looking at every byte (memchr).
//!
//! `cargo bench --bench scanner`; divide: 10 GB/s is 100 us a megabyte.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use serde::de::IgnoredAny;
use tollgate::llm::{Scanner, Search};

fn bodies() -> Vec<(&'static str, String)> {
    let chat = |content: &str| {
        format!(
            r#"{{"messages":[{{"role":"user","content":"{content}"}}],"model":"m","stream":true}}"#
        )
    };
    let prose = r#"The quick brown fox jumps over the lazy dog, \"again and again\", and every time the dog opens an eye, looks where it went, and sleeps on, for all that anybody knows until today.\n\n"#.repeat(1_700);
    let code = r#"for line in text.split(\"\n\"):\n    print(line.strip())\n"#.repeat(5_000);
    let picture = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ".repeat(70_000);
    let turns =
        r#"{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello!"},"#.repeat(4_000);
    let tokens = "12345, ".repeat(40_000);
    vec![
        ("question of 100 B", chat("What is the capital of France?")),
        ("prose of 300 KB", chat(&prose)),
        ("code of 300 KB, escaped", chat(&code)),
        ("picture of 3 MB", chat(&picture)),
        ("4,000 turns", format!(r#"{{"messages":[{}{{}}],"model":"m"}}"#, turns)),
        ("40,000 numbers", format!(r#"{{"input":[{tokens}1],"model":"m"}}"#)),
    ]
}

fn scan(body: &[u8]) -> bool {
    let mut scanner = Scanner::new(&["model"]);
    scanner.feed(body).is_ok() && scanner.found().is_some()
}

fn compare(criterion: &mut Criterion) {
    for (name, body) in bodies() {
        assert!(scan(body.as_bytes()), "{name}");
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.sample_size(20);
        group.bench_function("scanner", |bench| bench.iter(|| scan(black_box(body.as_bytes()))));
        group.bench_function("serde_json, all skipped", |bench| {
            bench.iter(|| serde_json::from_slice::<IgnoredAny>(black_box(body.as_bytes())).is_ok());
        });
        group.bench_function("memchr of a byte that is not there", |bench| {
            bench.iter(|| memchr::memchr(0, black_box(body.as_bytes())));
        });
        group.finish();
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    compare(&mut criterion);
    criterion.final_summary();
}
