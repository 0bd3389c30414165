//! Counts of exchanges: for Prometheus, and for the gateway's own pages.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::SystemTime;

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{
    CounterVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
};
use rust_decimal::Decimal;
use rust_decimal::prelude::ToPrimitive;

use super::metrics::{self as names, Metric};
use super::phases::Phase;
use super::record::{Record, Saved};
use super::spread::Spread;
use super::takers::Takers;
use crate::hooks::Run;

/// Names of models that clients have made up, at most; further ones are counted under [`OTHER`]. Each takes some 6 KB of
/// the page that Prometheus reads.
const NAMES_MAX: usize = 200;

/// Stands for what is too much to be counted by its name.
pub const OTHER: &str = "other";

/// What may come of the cache.
const OUTCOMES: [&str; 3] = ["hit", "miss", "bypass"];

/// Kinds of failures that are remembered.
const FAULTS_MAX: usize = 100;

/// Counts of all exchanges since the start.
pub struct Counters {
    registry: Registry,
    vectors: Vectors,
    overhead: Histogram,
    series: RwLock<Known>,
    /// Of exchanges that were refused before it was known where they go.
    pub unrouted: Arc<Series>,
    /// Since when it is counted.
    pub started: SystemTime,
    /// How durations are spread, over all exchanges.
    pub duration: Spread,
    /// How times to the first byte are.
    pub first_byte: Spread,
    /// Who took how much.
    pub takers: Takers,
    faults: Mutex<VecDeque<Fault>>,
}

/// What has a count for each service and model.
struct Vectors {
    requests: IntCounterVec,
    errors: IntCounterVec,
    durations: HistogramVec,
    first_bytes: HistogramVec,
    per_token: HistogramVec,
    tokens: IntCounterVec,
    cached: IntCounterVec,
    wasted: IntCounterVec,
    cost: CounterVec,
    aborts: IntCounterVec,
    fallbacks: IntCounterVec,
    mirrored: IntCounterVec,
    cache: IntCounterVec,
    cache_tokens: IntCounterVec,
    cache_cost: CounterVec,
    hook_runs: IntCounterVec,
    hook_seconds: CounterVec,
}

impl Vectors {
    fn series(&self, service: &str, model: &str) -> Series {
        let pool = &[service, model];
        let tokens = |direction| self.tokens.with_label_values(&[service, model, direction]);
        Series {
            service: service.to_owned(),
            model: model.to_owned(),
            duration: self.durations.with_label_values(pool),
            first_byte: self.first_bytes.with_label_values(pool),
            per_token: self.per_token.with_label_values(pool),
            tokens: [tokens("input"), tokens("output")],
            cached: self.cached.with_label_values(pool),
            aborts: self.aborts.with_label_values(pool),
            fallbacks: self.fallbacks.with_label_values(pool),
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            cached_answers: Default::default(),
            saved: Default::default(),
            saved_cost: Mutex::default(),
        }
    }
}

struct Known {
    by_name: HashMap<String, Arc<Series>>,
    /// How many of them clients have made up.
    made_up: usize,
}

/// The counts of one service and model.
#[derive(Debug)]
pub struct Series {
    service: String,
    model: String,
    duration: Histogram,
    first_byte: Histogram,
    per_token: Histogram,
    tokens: [IntCounter; 2],
    cached: IntCounter,
    aborts: IntCounter,
    fallbacks: IntCounter,
    requests: AtomicU64,
    /// Those that failed.
    errors: AtomicU64,
    /// Those that were refused.
    refused: AtomicU64,
    /// Hits, misses and bypasses.
    cached_answers: [AtomicU64; 3],
    /// Tokens of prompts and answers that were not taken because of hits.
    saved: [AtomicU64; 2],
    /// And what they would have cost, by currency.
    saved_cost: Mutex<BTreeMap<String, Decimal>>,
}

/// Exchanges that failed in one way: at the same place, of the same kind, for the same reason.
#[derive(Clone, Debug)]
pub struct Fault {
    /// When the last one began.
    pub at: SystemTime,
    /// When the first one did.
    pub since: SystemTime,
    /// How many there were.
    pub count: u64,
    /// The `X-Request-ID` of the last one.
    pub request_id: String,
    /// The service and the model; empty where they were not known yet.
    pub pool: [String; 2],
    /// The last backend that was asked, if any was.
    pub backend: String,
    /// Whose key the last one came with.
    pub key: String,
    /// What the last one's client was sent; 0: nothing.
    pub status: u16,
    /// What failed.
    pub kind: &'static str,
    /// Why.
    pub why: String,
}

impl Fault {
    /// Whether another one is like these. Numbers make no difference: they count bytes and ports.
    fn is_like(&self, pool: [&str; 2], kind: &str, record: &Record<'_>) -> bool {
        let why = record.why.as_deref().unwrap_or_default();
        let letters = |text: &'_ str| -> String {
            text.chars().filter(|letter| !letter.is_ascii_digit()).collect()
        };
        self.pool == pool
            && self.backend == record.backend
            && self.kind == kind
            && (self.why == why || letters(&self.why) == letters(why))
    }
}

/// Sums over all exchanges since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Exchanges.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// Those that were refused, for what their clients did.
    pub refused: u64,
    /// Those whose client left.
    pub aborts: u64,
    /// Tokens of prompts.
    pub tokens_input: u64,
    /// Tokens of answers.
    pub tokens_output: u64,
}

/// What came of the cache since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheTotals {
    /// Hits, misses and bypasses.
    pub answers: [u64; 3],
    /// Tokens of prompts and of answers that were not taken because of hits.
    pub tokens: [u64; 2],
    /// What they would have cost, by currency.
    pub cost: BTreeMap<String, Decimal>,
}

impl Counters {
    /// All are 0.
    ///
    /// # Errors
    /// When Prometheus' library does not take a name or label; every start would show it.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let counter = |metric: &Metric| {
            kept(&registry, IntCounterVec::new(Opts::new(metric.name, metric.help), metric.labels)?)
        };
        let histogram = |metric: &Metric, buckets: &[f64]| {
            let opts = HistogramOpts::new(metric.name, metric.help).buckets(buckets.to_vec());
            kept(&registry, HistogramVec::new(opts, metric.labels)?)
        };
        let exact = |metric: &Metric| {
            kept(&registry, CounterVec::new(Opts::new(metric.name, metric.help), metric.labels)?)
        };
        let vectors = Vectors {
            requests: counter(&names::REQUESTS)?,
            errors: counter(&names::ERRORS)?,
            durations: histogram(&names::DURATION, names::DURATION_BUCKETS)?,
            first_bytes: histogram(&names::FIRST_BYTE, names::FIRST_BYTE_BUCKETS)?,
            per_token: histogram(&names::PER_TOKEN, names::PER_TOKEN_BUCKETS)?,
            tokens: counter(&names::TOKENS)?,
            cached: counter(&names::CACHED)?,
            wasted: counter(&names::WASTED)?,
            cost: exact(&names::COST)?,
            aborts: counter(&names::CLIENT_ABORTS)?,
            fallbacks: counter(&names::FALLBACKS)?,
            mirrored: counter(&names::MIRRORED)?,
            cache: counter(&names::CACHE_REQUESTS)?,
            cache_tokens: counter(&names::CACHE_TOKENS)?,
            cache_cost: exact(&names::CACHE_COST)?,
            hook_runs: counter(&names::HOOK_RUNS)?,
            hook_seconds: exact(&names::HOOK_SECONDS)?,
        };
        let overhead = histogram(&names::OVERHEAD, names::OVERHEAD_BUCKETS)?;
        let unrouted = Arc::new(vectors.series("", ""));
        let known =
            Known { by_name: HashMap::from([("/".to_owned(), Arc::clone(&unrouted))]), made_up: 0 };
        Ok(Self {
            overhead: overhead.with_label_values::<&str>(&[]),
            registry,
            vectors,
            series: RwLock::new(known),
            unrouted,
            started: SystemTime::now(),
            duration: Spread::default(),
            first_byte: Spread::default(),
            takers: Takers::default(),
            faults: Mutex::default(),
        })
    }

    /// The counts of a service and model; `is_made_up`: the model's name comes from a client.
    #[must_use]
    pub fn series(&self, service: &str, model: &str, is_made_up: bool) -> Arc<Series> {
        let name = format!("{service}/{model}");
        let known = self.series.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(series) = known.by_name.get(&name) {
            return Arc::clone(series);
        }
        let is_too_much = is_made_up && known.made_up >= NAMES_MAX;
        drop(known);
        if is_too_much {
            return self.series(service, OTHER, false);
        }
        let mut known = self.series.write().unwrap_or_else(PoisonError::into_inner);
        let made_up = usize::from(is_made_up && !known.by_name.contains_key(&name));
        known.made_up += made_up;
        let new = || Arc::new(self.vectors.series(service, model));
        Arc::clone(known.by_name.entry(name).or_insert_with(new))
    }

    /// An exchange is over.
    pub fn count(&self, series: &Series, record: &Record<'_>) {
        let pool @ [service, model] = [series.service.as_str(), series.model.as_str()];
        let mut digits = [0; 3];
        let status = status_text(record.status, &mut digits);
        self.vectors.requests.with_label_values(&[service, model, record.method, status]).inc();
        series.requests.fetch_add(1, Ordering::Relaxed);
        // Refusals and failures are fast, and would make all of it look so; a WebSocket lasts as long as it likes.
        if record.is_answered() {
            let duration = record.duration();
            self.duration.count(duration);
            series.duration.observe(duration.as_secs_f64());
        }
        if record.refusal.is_some() {
            series.refused.fetch_add(1, Ordering::Relaxed);
        }
        self.overhead.observe(record.phases.spent(Phase::Own).as_secs_f64());
        if let Some(first_byte) = record.first_byte.filter(|_| record.is_answered()) {
            self.first_byte.count(first_byte);
            series.first_byte.observe(first_byte.as_secs_f64());
        }
        if let Some(time) = record.time_per_output_token() {
            series.per_token.observe(time.as_secs_f64());
        }
        if record.is_aborted {
            series.aborts.inc();
        }
        for Run { hook, outcome, took } in record.hooks {
            self.vectors.hook_runs.with_label_values(&[&**hook, outcome.name()]).inc();
            self.vectors.hook_seconds.with_label_values(&[&**hook]).inc_by(took.as_secs_f64());
        }
        if let Some(kind) = record.fault {
            self.vectors.errors.with_label_values(&[service, model, kind]).inc();
            series.errors.fetch_add(1, Ordering::Relaxed);
            self.remember(pool, kind, record);
        }
        if let Some(outcome) = record.cache {
            self.count_cached(series, outcome, record.saved.as_ref());
        }
        let Some(taken) = &record.taken else { return };
        series.tokens[0].inc_by(taken.input);
        series.tokens[1].inc_by(taken.output);
        if taken.cached > 0 {
            series.cached.inc_by(taken.cached);
        }
        if let Some(reason) = taken.wasted_by.filter(|_| taken.output > 0) {
            self.vectors.wasted.with_label_values(&[service, model, reason]).inc_by(taken.output);
        }
        let cost = taken.cost.and_then(|cost| cost.to_f64()).filter(|cost| *cost > 0.0);
        if let Some(cost) = cost {
            self.vectors.cost.with_label_values(&[service, model, &taken.currency]).inc_by(cost);
        }
        if let Some((id, name)) = record.key.filter(|(id, _)| !id.is_empty()) {
            self.takers.count(id, name, taken);
        }
    }

    /// An answer came from the cache, or could have.
    fn count_cached(&self, series: &Series, outcome: &'static str, saved: Option<&Saved>) {
        let [service, model] = [series.service.as_str(), series.model.as_str()];
        self.vectors.cache.with_label_values(&[service, model, outcome]).inc();
        if let Some(outcome) = OUTCOMES.iter().position(|known| *known == outcome) {
            series.cached_answers[outcome].fetch_add(1, Ordering::Relaxed);
        }
        let Some(saved) = saved else { return };
        for ((direction, tokens), sum) in
            [("input", saved.input), ("output", saved.output)].into_iter().zip(&series.saved)
        {
            self.vectors
                .cache_tokens
                .with_label_values(&[service, model, direction])
                .inc_by(tokens);
            sum.fetch_add(tokens, Ordering::Relaxed);
        }
        let Some(cost) = saved.cost.filter(|cost| !cost.is_zero()) else { return };
        let labels = &[service, model, &saved.currency];
        self.vectors.cache_cost.with_label_values(labels).inc_by(cost.to_f64().unwrap_or_default());
        let mut sums = series.saved_cost.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = sums.entry(saved.currency.to_string()).or_default();
        *sum = sum.saturating_add(cost);
    }

    /// A copy of a request for a service and model has come to this.
    pub fn count_mirrored(&self, (service, model): (&str, &str), outcome: &str) {
        self.vectors.mirrored.with_label_values(&[service, model, outcome]).inc();
    }

    fn remember(&self, pool: [&str; 2], kind: &'static str, record: &Record<'_>) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let known = faults.iter().position(|fault| fault.is_like(pool, kind, record));
        let known = known.and_then(|at| faults.remove(at));
        let (since, count) = known.map_or((record.began, 0), |fault| (fault.since, fault.count));
        faults.truncate(FAULTS_MAX - 1);
        faults.push_front(Fault {
            at: record.began,
            since,
            count: count + 1,
            request_id: record.request_id.to_owned(),
            pool: pool.map(str::to_owned),
            backend: record.backend.to_owned(),
            key: record.key.map(|(_, name)| name.to_string()).unwrap_or_default(),
            status: record.status,
            kind,
            why: record.why.clone().unwrap_or_default(),
        });
    }

    /// The ways in which exchanges failed, the latest first.
    #[must_use]
    pub fn faults(&self) -> Vec<Fault> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Sums over all exchanges.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let known = self.series.read().unwrap_or_else(PoisonError::into_inner);
        let mut totals = Totals::default();
        for series in known.by_name.values() {
            let own = series.totals();
            totals.requests += own.requests;
            totals.errors += own.errors;
            totals.refused += own.refused;
            totals.aborts += own.aborts;
            totals.tokens_input += own.tokens_input;
            totals.tokens_output += own.tokens_output;
        }
        totals
    }

    /// What came of the cache, for each service and model where anything did.
    #[must_use]
    pub fn cached(&self) -> Vec<(String, String, CacheTotals)> {
        let known = self.series.read().unwrap_or_else(PoisonError::into_inner);
        let all =
            known.by_name.values().map(|it| (it.service.clone(), it.model.clone(), it.cached()));
        let mut all: Vec<_> = all.filter(|(.., totals)| totals.answers != [0; 3]).collect();
        all.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
        all
    }

    /// What went to each service and model.
    #[must_use]
    pub fn by_model(&self) -> Vec<(String, String, Totals)> {
        let known = self.series.read().unwrap_or_else(PoisonError::into_inner);
        let all = known.by_name.values().filter(|series| !series.service.is_empty());
        let mut all: Vec<_> = all
            .map(|series| (series.service.clone(), series.model.clone(), series.totals()))
            .collect();
        all.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
        all
    }

    /// Everything, for Prometheus. The two counters of which an error rate is made have a sum over all exchanges too:
    /// their other labels differ, so that nothing but those two could be divided as they are.
    #[must_use]
    pub fn gather(&self) -> Vec<MetricFamily> {
        let totals = self.totals();
        let mut families = self.registry.gather();
        // A counter without any count has no family yet.
        for (counters, total) in
            [(&self.vectors.requests, totals.requests), (&self.vectors.errors, totals.errors)]
        {
            let [mut family]: [MetricFamily; 1] =
                counters.collect().try_into().expect("a counter is one family");
            let mut sum = prometheus::proto::Metric::default();
            let mut counter = prometheus::proto::Counter::default();
            #[allow(clippy::cast_precision_loss, reason = "a count of exchanges")]
            counter.set_value(total as f64);
            sum.set_counter(counter);
            family.mut_metric().push(sum);
            families.retain(|known| known.name() != family.name());
            families.push(family);
        }
        families
    }
}

impl Series {
    /// What was counted here.
    #[must_use]
    pub fn totals(&self) -> Totals {
        Totals {
            requests: self.requests.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            aborts: self.aborts.get(),
            tokens_input: self.tokens[0].get(),
            tokens_output: self.tokens[1].get(),
        }
    }

    /// What came of the cache.
    #[must_use]
    pub fn cached(&self) -> CacheTotals {
        let [hits, misses, bypasses] =
            self.cached_answers.each_ref().map(|count| count.load(Ordering::Relaxed));
        let [input, output] = self.saved.each_ref().map(|sum| sum.load(Ordering::Relaxed));
        let cost = self.saved_cost.lock().unwrap_or_else(PoisonError::into_inner).clone();
        CacheTotals { answers: [hits, misses, bypasses], tokens: [input, output], cost }
    }

    /// Its model could not serve, and another one is asked.
    pub fn count_fallback(&self) {
        self.fallbacks.inc();
    }
}

fn kept<C: Collector + Clone + 'static>(registry: &Registry, counts: C) -> prometheus::Result<C> {
    registry.register(Box::new(counts.clone()))?;
    Ok(counts)
}

/// A status as text, without a copy on the heap.
fn status_text(status: u16, digits: &mut [u8; 3]) -> &str {
    if !(100..1000).contains(&status) {
        return "0";
    }
    for (digit, by) in digits.iter_mut().zip([100, 10, 1]) {
        *digit = b'0' + (status / by % 10) as u8;
    }
    std::str::from_utf8(digits).expect("digits are text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_clients_make_up_are_counted_up_to_a_bound() {
        let counters = Counters::new().unwrap();
        for at in 0..NAMES_MAX + 10 {
            let series = counters.series("up", &format!("m-{at}"), true);
            assert_eq!(series.model == OTHER, at >= NAMES_MAX, "{at}");
        }
        // Those that are known, and those of the configuration, have their own.
        assert_eq!(counters.series("up", "m-1", true).model, "m-1");
        assert_eq!(counters.series("own", "m", false).model, "m");
    }

    #[test]
    fn statuses_are_text() {
        let text = |status| status_text(status, &mut [0; 3]).to_owned();
        assert_eq!([text(0), text(200), text(503), text(7)], ["0", "200", "503", "0"]);
    }
}
