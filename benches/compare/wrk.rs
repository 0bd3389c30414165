//! Requests as fast as they are answered, by `wrk`.

use std::fs;
use std::process::Command;

use super::contestant::Contestant;
use super::measure::{Cpu, Figures, PER_SECOND};

/// Tells what it has seen in numbers: wrk's own page rounds them.
const SCRIPT: &str = r#"
local file = io.open(BODY, "rb")
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Accept"] = "application/json"
wrk.headers["User-Agent"] = "OpenAI/Python 2.54.0"
wrk.headers["Authorization"] = "Bearer sk-bench"
NUMBERS
function done(summary, latency, requests)
  io.write(string.format("figures %d %d %d %d %d %d %d\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9), summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
"#;

/// Gives each request a number.
const NUMBERS: &str = r#"
local number = 0
function request()
  number = number + 1
  wrk.headers["X-Number"] = number
  return wrk.format()
end
"#;

/// What a prompt is made of.
#[derive(Clone, Copy)]
pub(crate) enum Text {
    /// Sentences and paragraphs, a quotation in each.
    Prose,
    /// Full of escapes: the worst case for who looks into it.
    Code,
}

/// A body with a prompt of about so many bytes, the model last, as SDKs for Python send it.
pub(crate) fn body(text: Text, bytes: usize) -> String {
    let piece = match text {
        Text::Prose => {
            r#"A proxy stands between those who ask and those who answer, and what it adds should be small. Whoever runs one wants to know what it costs: in time, in memory and in money. \"Measure twice, cut once\", says the carpenter; who builds for machines that are shared measures oftener, and compares what ran within the same minute.\n\n"#
        }
        Text::Code => r#"for line in text.split(\"\n\"):\n    print(line.strip())\n"#,
    };
    let prompt = piece.repeat(bytes / piece.len());
    format!(
        r#"{{"messages":[{{"role":"user","content":"What is the capital of France? {prompt}"}}],"max_tokens":16,"model":"m"}}"#
    )
}

/// The shortest one.
pub(crate) fn question() -> String {
    body(Text::Prose, 0)
}

/// Sends requests over so many connections for so many seconds.
#[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
pub(crate) fn run(
    contestant: &Contestant,
    path: &str,
    body: &str,
    connections: usize,
    seconds: u64,
) -> Figures {
    let folder = contestant.folder();
    let (script, file) = (folder.join("wrk.lua"), folder.join("body.json"));
    fs::write(&file, body).expect("a file");
    let numbers = if contestant.numbers { NUMBERS } else { "" };
    let text = SCRIPT.replace("NUMBERS", numbers);
    let text = text.replace("BODY", &format!("{:?}", file.display().to_string()));
    fs::write(&script, text).expect("a file");
    let before = contestant.cpu();
    let output = Command::new("wrk")
        .args([
            "-t1",
            &format!("-c{connections}"),
            &format!("-d{seconds}"),
            "--timeout",
            "30",
            "-s",
        ])
        .arg(&script)
        .arg(contestant.url(path))
        .output()
        .expect("wrk is installed (apt-get install wrk)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("figures "));
    let numbers: Vec<u64> = line
        .unwrap_or_else(|| panic!("wrk says {text} {}", String::from_utf8_lossy(&output.stderr)))
        .split(' ')
        .filter_map(|number| number.parse().ok())
        .collect();
    let [requests, micros, p50, p99, p999, refused, broken] = numbers[..] else {
        panic!("wrk says {text}");
    };
    assert!(broken == 0, "{}: {broken} requests broke: {text}", contestant.name);
    contestant.rest();
    let mut figures = Figures::new();
    if contestant.is_proxy() {
        Cpu::since(contestant.cpu(), before, requests, &mut figures);
    }
    figures.insert(PER_SECOND, requests as f64 * 1e6 / micros.max(1) as f64);
    for (name, value) in [("p50_us", p50), ("p99_us", p99), ("p999_us", p999)] {
        figures.insert(name, value as f64);
    }
    figures.insert("failed_percent", refused as f64 * 100.0 / requests.max(1) as f64);
    figures
}
