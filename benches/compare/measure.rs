//! What is measured: CPU time and memory of processes, and how times are spread.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// Figures of one round, by name.
pub(crate) type Figures = BTreeMap<&'static str, f64>;

/// Names of figures, in the order in which they are shown, with what they are.
pub(crate) const NAMES: [(&str, &str); 14] = [
    (CPU, "us CPU"),
    ("user_us", "user"),
    (PER_SECOND, "per s"),
    ("p50_us", "p50 us"),
    ("p99_us", "p99 us"),
    ("p999_us", "p99.9 us"),
    ("failed_percent", "failed %"),
    ("first_p50_us", "first byte p50 us"),
    ("first_p99_us", "first byte p99 us"),
    ("delay_p50_us", "event late p50 us"),
    ("delay_p99_us", "event late p99 us"),
    ("delay_max_us", "event late max us"),
    ("kb_a_stream", "KB a stream"),
    ("mb_after", "MB after"),
];

/// CPU time for a unit of work, in microseconds.
pub(crate) const CPU: &str = "cpu_us";

/// Units of work in a second.
pub(crate) const PER_SECOND: &str = "per_second";

/// CPU time that processes have taken so far, in microseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpu {
    pub(crate) all: u64,
    pub(crate) user: u64,
}

/// Kernel clock ticks a second; 100 on every Linux that matters (`getconf CLK_TCK`).
const TICKS_PER_SECOND: u64 = 100;

impl Cpu {
    pub(crate) fn of(processes: &[u32]) -> Self {
        let all = processes.iter().map(|process| cpu_micros(*process)).sum();
        let user = processes.iter().map(|process| ticks(*process)[0]).sum::<u64>();
        Self { all, user: user * 1_000_000 / TICKS_PER_SECOND }
    }

    /// What was taken since `before`, for each of `units`.
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    pub(crate) fn since(self, before: Self, units: u64, figures: &mut Figures) {
        let per = |micros: u64| micros as f64 / units.max(1) as f64;
        figures.insert(CPU, per(self.all - before.all));
        figures.insert("user_us", per(self.user - before.user));
    }
}

/// From the threads' own nanosecond counters: `stat` counts in ticks of 10 ms.
fn cpu_micros(process: u32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let nanos: u64 = threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum();
    let in_ticks = || ticks(process).iter().sum::<u64>() * 1_000_000 / TICKS_PER_SECOND;
    if nanos > 0 { nanos / 1000 } else { in_ticks() }
}

/// User and system time of a process.
fn ticks(process: u32) -> [u64; 2] {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<u64> = after_name.split(' ').map(|field| field.parse().unwrap_or(0)).collect();
    [12, 13].map(|at| fields.get(at).copied().unwrap_or(0))
}

/// Memory that processes hold, in KB.
pub(crate) fn resident_kb(processes: &[u32]) -> u64 {
    let of = |process: &u32| {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    processes.iter().filter_map(of).sum()
}

/// How times are spread, in microseconds.
#[derive(Default)]
pub(crate) struct Times(pub(crate) Vec<u32>);

impl Times {
    /// The time that so large a share of them does not exceed.
    pub(crate) fn at(&mut self, share: f64) -> f64 {
        if self.0.is_empty() {
            return 0.0;
        }
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a place in a list"
        )]
        let at = ((self.0.len() - 1) as f64 * share).round() as usize;
        f64::from(*self.0.select_nth_unstable(at).1)
    }
}

/// Lets the processes go on by themselves.
#[allow(clippy::disallowed_methods, reason = "nothing else runs on this thread")]
pub(crate) fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// The one in the middle.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}
