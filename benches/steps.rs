//! What does each step of an exchange cost by itself: to find its way, to know its key, to reserve its limits, to choose a
//! backend, to put another name into a body, to look at an event that passes, and to tell of it at the end?
//!
//! `cargo bench --bench steps`: nanoseconds each, with 1 and with 10,000 pools, 1 and 100,000 keys where those could
//! matter. The step that finds the model in a body has a benchmark of its own (`scanner`).

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use criterion::Criterion;
use http::{HeaderMap, HeaderName, HeaderValue};
use rust_decimal::Decimal;
use tollgate::config::{Environment, Source, load};
use tollgate::hooks::{HookKinds, Notes, Runs};
use tollgate::ledger::{self, Row};
use tollgate::limits::{Ask, Shown};
use tollgate::llm::{EndMarker, Kind, Meter, Tail, spliced};
use tollgate::pool::{Choice, Outcome};
use tollgate::runtime::Runtime;
use tollgate::secret::KeyHash;
use tollgate::telemetry::{Counters, Phases, Record, Taken, Trace};

const EVENT: &[u8] = b"data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"finish_reason\":null}]}\n\n";

const PATH: &[u8] = b"/s/m0/v1/chat/completions";

/// A configuration with so many pools of three backends, and so many keys with limits.
fn runtime(folder: &Path, pools: usize, keys: usize) -> Runtime {
    let key = |number: usize| {
        let hash = KeyHash::sha256(format!("tg-benchmark-{number:040}").as_bytes()).text();
        format!(
            "  - {{id: key-{number}, name: team-{number}, hash: \"{hash}\", limits: [{{requests: 1000000000}}]}}\n"
        )
    };
    let keys: String = (0..keys).map(key).collect();
    std::fs::write(folder.join("keys.yaml"), format!("keys:\n{keys}")).expect("a file");
    let backends: String =
        (0..3).map(|at| format!("{{id: b{at}, url: \"http://127.0.0.1:{}\"}}, ", at + 1)).collect();
    let models: String =
        (0..pools).map(|number| format!("    m{number}: {{backends: [{backends}]}}\n")).collect();
    let file = folder.join("tollgate.yaml");
    let text = format!(
        "keys_file: keys.yaml\nlimits: [{{per: key, requests: 1000000000, tokens: 1000000000000}}]\n\
         services:\n  s:\n   models:\n{models}"
    );
    std::fs::write(&file, text).expect("a file");
    let snapshot = load(&Source::File(file), &Environment::default(), &HookKinds::default())
        .expect("it is well-formed");
    Runtime::new(snapshot, None).expect("the pools can be built")
}

fn steps(criterion: &mut Criterion) {
    for (name, pools, keys) in
        [("1 pool, 1 key", 1, 1), ("10,000 pools, 100,000 keys", 10_000, 100_000)]
    {
        let folder = tempfile::tempdir().expect("a folder");
        let runtime = runtime(folder.path(), pools, keys);
        let mut group = criterion.benchmark_group(name);
        group.bench_function("route by path", |bench| {
            bench.iter(|| runtime.router.route(black_box(PATH)).is_ok());
        });
        group.bench_function("route by model", |bench| {
            bench.iter(|| runtime.catalog.find(black_box("m0")).is_some());
        });
        let mut headers = HeaderMap::new();
        let key = HeaderValue::try_from(format!("Bearer tg-benchmark-{:040}", keys - 1));
        headers.insert(HeaderName::from_static("authorization"), key.expect("it is one"));
        assert!(runtime.grant(&headers, None).is_ok());
        group.bench_function("know a key", |bench| {
            bench.iter(|| runtime.grant(black_box(&headers), None).is_ok());
        });
        reserve(&runtime, &mut group);
        choose(&runtime, &mut group);
        group.finish();
    }
    let mut group = criterion.benchmark_group("any configuration");
    splice(&mut group);
    pass(&mut group);
    tell(&mut group);
    settle(&mut group);
    group.finish();
}

type Group<'a> = criterion::BenchmarkGroup<'a, criterion::measurement::WallTime>;

fn reserve(runtime: &Runtime, group: &mut Group<'_>) {
    let executor = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let ask = Ask {
        key: "key-0",
        limits_of: "key-0",
        name: "team-0",
        is_shared: false,
        address: None,
        service: "s",
        model: "m0",
        own_model: "m0",
        input: 10,
        output: 100,
        cost: &|| 0,
        holds: &|_| true,
    };
    group.bench_function("reserve three limits and settle", |bench| {
        bench.iter(|| {
            let mut shown = Shown::default();
            let reserved = executor.block_on(runtime.limits.reserve(black_box(&ask), &mut shown));
            let mut reserved = reserved.unwrap_or_else(|_| panic!("there is room"));
            reserved.settle(10, 20, 0);
            shown
        });
    });
}

fn choose(runtime: &Runtime, group: &mut Group<'_>) {
    let pool = runtime.pool("s", "m0").expect("it is there");
    group.bench_function("choose one of three backends", |bench| {
        bench.iter(|| {
            let Choice::Taken(mut permit) = pool.choose(black_box(b"client"), false, |_| true)
            else {
                panic!("one is free");
            };
            pool.tell(&mut permit, Outcome::Success);
        });
    });
}

fn splice(group: &mut Group<'_>) {
    for (name, bytes) in [("100 bytes", 100), ("300 KB", 300_000)] {
        let body = format!(r#"{{"prompt":"{}","model":"m"}}"#, "x".repeat(bytes));
        let at = body.len() - 4..body.len() - 1;
        group.bench_function(format!("put another name into {name}"), |bench| {
            bench.iter(|| spliced(black_box(body.as_bytes()), at.clone(), b"\"other\""));
        });
    }
}

fn pass(group: &mut Group<'_>) {
    let end = EndMarker::of_path(b"/v1/chat/completions").expect("it has one");
    group.bench_function("an event passes", |bench| {
        let mut tail = Tail::default();
        bench.iter(|| {
            tail.pass(black_box(EVENT));
            tail.is_complete(end)
        });
    });
    group.bench_function("an event passes, metered", |bench| {
        let mut meter = Meter::new(Kind::Events);
        bench.iter(|| meter.pass(black_box(EVENT)));
    });
}

fn tell(group: &mut Group<'_>) {
    let counters = Counters::new().expect("the names are good");
    let series = counters.series("s", "m", false);
    let (id, name, currency): (Arc<str>, Arc<str>, Arc<str>) =
        ("k".into(), "n".into(), "USD".into());
    let phases = Phases::begin(Instant::now());
    let record = Record {
        began: SystemTime::now(),
        request_id: "0123456789abcdef0123456789abcdef",
        trace: &Trace::NONE,
        key: Some((&id, &name)),
        address: None,
        method: "POST",
        path: b"/v1/chat/completions",
        service: "s",
        model: "m",
        backend: "a",
        attempts: 1,
        status: 200,
        refusal: None,
        limit: None,
        fault: None,
        why: None,
        bytes_in: 100,
        bytes_out: 200,
        taken: Some(Taken {
            input: 10,
            output: 20,
            cached: 0,
            is_estimated: false,
            cost: None,
            currency,
            wasted_by: None,
        }),
        phases: &phases,
        first_byte: Some(Duration::from_millis(10)),
        is_stream: false,
        is_tunnel: false,
        is_aborted: false,
        is_logged: true,
        cache: None,
        saved: None,
        hooks: &Runs::new(),
        notes: &Notes::new(),
    };
    group.bench_function("count an exchange", |bench| {
        bench.iter(|| counters.count(&series, black_box(&record)));
    });
}

/// What the thread of the exchange does for the ledger.
fn settle(group: &mut Group<'_>) {
    let price: Decimal = "0.0000025".parse().expect("a price");
    let mut line = Vec::new();
    group.bench_function("price an exchange and write its row", |bench| {
        bench.iter(|| {
            line.clear();
            let cost = (price * Decimal::from(black_box(120))).to_string();
            let timestamp = ledger::now().cast_unsigned();
            let row = Row {
                id: &ledger::new_id(timestamp),
                timestamp,
                request_id: "0123456789abcdef0123456789abcdef",
                user_id: "team",
                key_id: "key-1",
                service: "s",
                model: "m",
                backend: "a",
                tokens_input: 100,
                tokens_output: 20,
                tokens_cached: 0,
                tokens_reasoning: 0,
                tokens_reserved: 0,
                cost: Some(&cost),
                currency: "USD",
                status: 200,
                aborted: false,
                estimated: false,
                latency_ms: 812,
                ttft_ms: Some(95),
            };
            row.write_line(&mut line);
            line.len()
        });
    });
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    steps(&mut criterion);
    criterion.final_summary();
}
