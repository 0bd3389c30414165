//! Tables of what was measured, and the same for programs.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::measure::{CPU, Figures, NAMES, median};

/// What others are compared with.
const COMPARED: [&str; 2] = ["nginx", "bare Pingora"];

/// All rounds of one case.
pub(crate) struct Outcome {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) rows: Vec<(String, Vec<Figures>)>,
}

impl Outcome {
    /// The median of the rounds.
    fn figure(&self, row: usize, name: &str) -> Option<f64> {
        median(&self.of_rounds(row, name))
    }

    fn of_rounds(&self, row: usize, name: &str) -> Vec<f64> {
        self.rows[row].1.iter().filter_map(|figures| figures.get(name).copied()).collect()
    }

    /// The median of the rounds' ratios: each round compares what ran within the same minute.
    fn ratio(&self, row: usize, to: &str) -> Option<f64> {
        let to = self.rows.iter().position(|(name, _)| name == to)?;
        let (own, other) = (self.of_rounds(row, CPU), self.of_rounds(to, CPU));
        let ratios: Vec<f64> = own.iter().zip(&other).map(|(own, other)| own / other).collect();
        median(&ratios).filter(|ratio| ratio.is_finite())
    }
}

/// A case as a table in Markdown.
pub(crate) fn table(outcome: &Outcome) -> String {
    let rows = 0..outcome.rows.len();
    let has = |name: &str| rows.clone().any(|row| outcome.figure(row, name).is_some());
    let shown: Vec<_> = NAMES.iter().filter(|(name, _)| has(name)).collect();
    let compared: Vec<_> = COMPARED
        .into_iter()
        .filter(|other| has(CPU) && outcome.rows.iter().any(|(name, _)| name == other))
        .collect();
    let mut text = format!("### {}\n\nPer {}.\n\n| proxy |", outcome.title, outcome.unit);
    for (name, title) in &shown {
        let _ = write!(text, " {title} |");
        if *name == CPU {
            compared.iter().for_each(|other| text.push_str(&format!(" to {other} |")));
        }
    }
    text.push_str("\n|---|");
    text.push_str(&"--:|".repeat(shown.len() + compared.len()));
    for row in rows {
        let _ = write!(text, "\n| {} |", outcome.rows[row].0);
        for (name, _) in &shown {
            text.push_str(&cell(outcome.figure(row, name), 1));
            if *name == CPU {
                compared.iter().for_each(|to| text.push_str(&cell(outcome.ratio(row, to), 2)));
            }
        }
    }
    text.push('\n');
    text
}

fn cell(value: Option<f64>, decimals: usize) -> String {
    match value {
        Some(value) if decimals < 2 && value >= 100.0 => format!(" {value:.0} |"),
        Some(value) => format!(" {value:.decimals$} |"),
        None => " - |".to_owned(),
    }
}

/// Writes `target/bench/compare.md` and `compare.json`.
pub(crate) fn write(outcomes: &[Outcome], rounds: usize) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
    std::fs::create_dir_all(&folder).expect("the target folder can be written");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut text = format!(
        "# What proxies cost\n\nMedians of {rounds} interleaved rounds on {cores} cores, which the upstream and the \
         clients share; a ratio is the median of the rounds' ratios.\n"
    );
    outcomes.iter().for_each(|outcome| text.push_str(&format!("\n{}", table(outcome))));
    std::fs::write(folder.join("compare.md"), text).expect("it can be written");
    let cases: Vec<Value> = outcomes.iter().map(of_case).collect();
    let all = json!({ "rounds": rounds, "cores": cores, "cases": cases });
    let text = serde_json::to_string_pretty(&all).expect("it is JSON");
    std::fs::write(folder.join("compare.json"), text).expect("it can be written");
}

fn of_case(outcome: &Outcome) -> Value {
    let of_row = |row: usize| {
        let figures = NAMES.iter().filter_map(|(name, _)| {
            let rounds = outcome.of_rounds(row, name);
            let median = median(&rounds)?;
            Some(((*name).to_owned(), json!({ "median": median, "rounds": rounds })))
        });
        let mut figures: Map<String, Value> = figures.collect();
        for to in COMPARED {
            let ratio = outcome.ratio(row, to);
            figures.insert(format!("cpu_to_{}", to.replace(' ', "_")), json!(ratio));
        }
        json!({ "proxy": outcome.rows[row].0, "figures": figures })
    };
    let rows: Vec<Value> = (0..outcome.rows.len()).map(of_row).collect();
    json!({ "case": outcome.name, "title": outcome.title, "unit": outcome.unit, "rows": rows })
}
