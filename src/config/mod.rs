//! The configuration: sources, file types, validation, snapshot.
//!
//! A file goes `document` (text to tree) -> `interpolate` (`${NAME}`) -> `decode` (tree to `file`
//! types) -> `overrides` (environment variables) -> `validate` -> [`Snapshot`]. Each step reports
//! all it finds; the first step that finds the tree unreadable ends the way. Nothing outside this
//! module sees what "not written" looks like.

mod beside;
mod cache;
mod clients;
mod decode;
mod defaults;
mod diff;
mod document;
mod environment;
mod file;
mod interpolate;
mod jwt;
mod ledger;
mod limits;
mod listen;
mod naming;
mod observed;
mod overrides;
mod prices;
mod problem;
mod redis;
mod seen;
mod snapshot;
mod source;
mod summary;
mod units;
mod upstream;
mod validate;
mod warnings;

use std::path::Path;

pub use cache::{CacheSpec, CachedPer, CachedRequests, Caching};
pub use clients::{ClientKeys, KeySpec, KeySpecs};
pub use diff::{Fixed, differences};
pub use environment::Environment;
pub use jwt::{JwksSource, JwtAlgorithm, JwtSpec};
pub use ledger::{Database, LedgerSpec};
pub use limits::{Calendar, LimitSpec, MONEY_UNITS, Per, Quantity, Tokens};
pub use listen::{Listen, ListenAt};
pub use naming::{Listed, ModelRef, Naming, by_model};
pub use observed::{LogFormat, LogTarget, Observed, RequestLogSpec, TraceSpec};
pub use prices::{Price, Prices, Tariff, Tier};
pub use problem::ConfigError;
pub use redis::{RedisKind, RedisSpec, WhenDown};
pub use seen::SeenFile;
pub use snapshot::{
    BackendSpec, BackendTls, BackendUrl, Balance, BreakerSpec, Certificate, ClientAuth,
    ClientBounds, CorsOrigins, Credential, Deadlines, DefaultsOf, HealthSpec, Host, ListenerTls,
    PoolSpec, ProbeSpec, Protocol, QueueSpec, ReplayBounds, RetrySpec, Service, Snapshot,
    TlsVersion,
};
pub use source::{Source, find_source};
pub use summary::Summary;
pub use validate::read_expiry;
pub use warnings::warnings;

use beside::Beside;
use document::{Bounds, Node};
use file::FileConfig;
use problem::{Place, Problem, Problems};
use validate::Surroundings;

use crate::hooks::HookKinds;

/// Reads and validates the configuration at `source`, with the variables of `environment`, and hooks of these `kinds`
/// besides the gateway's own.
///
/// # Errors
/// Every problem of the file and the variables, each with its place and what to do.
pub fn load(
    source: &Source,
    environment: &Environment,
    kinds: &HookKinds,
) -> Result<Snapshot, ConfigError> {
    let path = source.path();
    if *source == Source::Upstream {
        return upstream::read(environment);
    }
    let unreadable = |error: std::io::Error| {
        ConfigError::new(vec![format!("{}: cannot read it: {error}", path.display())])
    };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if metadata.is_dir() {
        let message = format!("{}: a folder, not a configuration file", path.display());
        return Err(ConfigError::new(vec![message]));
    }
    // Looked at before it is read: a change in between is seen as one.
    let seen = SeenFile::look(path);
    let bytes = read_bounded(path, document::CONFIGURATION).map_err(unreadable)?;
    let mut snapshot = read_with(&bytes, source, environment, kinds)?;
    snapshot.files.push(seen);
    Ok(snapshot)
}

/// Validates a configuration that is already in memory; `source` says how it is called.
///
/// # Errors
/// As [`load`].
pub fn read(
    bytes: &[u8],
    source: &Source,
    environment: &Environment,
) -> Result<Snapshot, ConfigError> {
    read_with(bytes, source, environment, &HookKinds::default())
}

fn read_with(
    bytes: &[u8],
    source: &Source,
    environment: &Environment,
    kinds: &HookKinds,
) -> Result<Snapshot, ConfigError> {
    let path = source.path();
    let mut problems = Problems::default();
    let mut tree = match document::parse(bytes, document::CONFIGURATION) {
        Ok(tree) => tree,
        Err(problem) => return Err(report(vec![problem], bytes, path)),
    };
    let bare = is_bare_backends_json(&tree, bytes);
    let defaults = match source {
        Source::File(_) if !bare => &defaults::FILE,
        _ => &defaults::ENVIRONMENT,
    };
    interpolate::interpolate(&mut tree, environment, &mut problems);
    let mut file: FileConfig = decode::decode(tree, &mut problems);
    overrides::apply(&mut file, environment, &mut problems);
    let beside = Beside::read(&file, path, environment, &mut problems);
    let surroundings = Surroundings { defaults, path, environment, kinds };
    let snapshot = validate::validate(&file, &beside, &surroundings, &mut problems);
    if problems.is_empty() { Ok(snapshot) } else { Err(report(problems.into_vec(), bytes, path)) }
}

/// One byte more than allowed is read, so that a huge file is refused and not swallowed.
fn read_bounded(path: &Path, bounds: Bounds) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    let limit = bounds.bytes_max as u64 + 1;
    std::fs::File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Whether this is a `backends.json` of the tools that Tollgate replaces: JSON, and nothing but
/// `services` in it.
fn is_bare_backends_json(tree: &Node, bytes: &[u8]) -> bool {
    let is_json = bytes.trim_ascii_start().first() == Some(&b'{');
    let only_services = match tree {
        Node::Map(entries) => entries.iter().all(|(key, _)| key == "services"),
        _ => false,
    };
    is_json && only_services
}

/// Renders problems in the order of the file; variables come last.
fn report(problems: Vec<Problem>, bytes: &[u8], path: &Path) -> ConfigError {
    let text = std::str::from_utf8(bytes).unwrap_or_default();
    let file = path.display();
    let mut lines: Vec<((usize, usize), String)> = problems
        .into_iter()
        .map(|Problem { place, message }| {
            let position = document::locate(text, &place);
            let (line, column) = position.unwrap_or((usize::MAX, 0));
            let rendered = match &place {
                Place::Variable(name) => format!("{name}: {message} (environment variable)"),
                Place::File => format!("{file}: {message}"),
                Place::Elsewhere => message,
                Place::Position { .. } => format!("{file}: {message} ({file}:{line}:{column})"),
                Place::Key(key) | Place::Value(key) if key.steps().is_empty() => {
                    format!("{file}: {message}")
                }
                Place::Key(key) | Place::Value(key) | Place::Inside(key, _) => match position {
                    Some(_) => format!("{key}: {message} ({file}:{line}:{column})"),
                    None => format!("{key}: {message} ({file})"),
                },
            };
            ((line, column), rendered)
        })
        .collect();
    lines.sort_by_key(|(position, _)| *position);
    let mut lines: Vec<String> = lines.into_iter().map(|(_, line)| line).collect();
    lines.dedup();
    ConfigError::new(lines)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn snapshot(text: &str) -> Snapshot {
        let source = Source::File(PathBuf::from("test.yaml"));
        read(text.as_bytes(), &source, &Environment::default()).unwrap()
    }

    const EXAMPLE: &str = include_str!("../../conf/example.yaml");

    #[test]
    fn the_examples_values_are_the_defaults() {
        let bare = "services: {google: {models: {gemma-4-26b: {backends: \
                    [{id: node-1, name: Node 1, url: \"http://10.0.0.10:5000\"}]}}}}";
        assert_eq!(snapshot(EXAMPLE), snapshot(bare));
    }

    /// The example with the keys that stand in comments.
    fn example_with_all_keys() -> Node {
        let is_key_byte = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-\"*".contains(&byte)
        };
        let is_key = |text: &str| {
            text.trim_start()
                .trim_start_matches("- ")
                .split_once(':')
                .is_some_and(|(key, _)| !key.is_empty() && key.bytes().all(is_key_byte))
        };
        let uncomment = |line: &str| match line.split_once("# ") {
            Some((indent, rest)) if indent.trim().is_empty() && is_key(rest) => {
                format!("{indent}{rest}\n")
            }
            _ => format!("{line}\n"),
        };
        let text: String = EXAMPLE.lines().map(uncomment).collect();
        document::parse(text.as_bytes(), document::CONFIGURATION).unwrap()
    }

    fn child<'a>(node: &'a Node, step: &str) -> Option<&'a Node> {
        match node {
            Node::Map(entries) => entries.iter().find(|(key, _)| key == step).map(|(_, node)| node),
            Node::List(list) => list.get(step.parse::<usize>().ok()?),
            _ => None,
        }
    }

    #[test]
    fn the_example_has_every_key() {
        let example = example_with_all_keys();
        let places = [
            "",
            "admin",
            "keys/0",
            "keys/0/addresses",
            "jwt/0",
            "limits/0",
            "request_log",
            "redis",
            "cache",
            "addresses",
            "ledger",
            "prices",
            "prices/models/gpt-4o*",
            "prices/models/gpt-4o*/tiers/0",
            "tls",
            "tls/certificates/0",
            "cors",
            "log",
            "client",
            "upstream",
            "replay",
            "reload",
            "deadlines",
            "retry",
            "breaker",
            "queue",
            "dns",
            "health_check",
            "services/google",
            "services/google/cache",
            "services/google/cors",
            "services/google/models/gemma-4-26b",
            "services/google/models/gemma-4-26b/cache",
            "services/google/models/gemma-4-26b/backends/0",
            "services/google/models/gemma-4-26b/backends/0/tls",
        ];
        for place in places {
            let node = steps(place).try_fold(&example, child);
            let node = node.unwrap_or_else(|| panic!("no {place}"));
            for key in known_at(place) {
                // The other spelling of `models` is for files that have it already.
                let is_there = key == "model" || child(node, &key).is_some();
                assert!(is_there, "conf/example.yaml lacks {place}/{key}");
            }
        }
        // A hook does one thing, so it takes several of them to have every key.
        let Some(Node::List(hooks)) = child(&example, "hooks") else { panic!("no hooks") };
        for part in [
            "",
            "route",
            "mirror",
            "request_headers",
            "request_fields",
            "bounds",
            "refuse",
            "answer",
            "guard",
            "capture",
            "capture/redact",
        ] {
            for key in known_at(&format!("hooks/0/{part}")) {
                let of_part = |hook| steps(part).try_fold(hook, child);
                let is_there = |node| child(node, &key).is_some();
                let is_there = hooks.iter().filter_map(of_part).any(is_there);
                assert!(is_there, "conf/example.yaml lacks hooks/{part}/{key}");
            }
        }
    }

    fn steps(place: &str) -> impl Iterator<Item = &str> {
        place.split('/').filter(|step| !step.is_empty())
    }

    /// The keys that there are at a place.
    fn known_at(place: &str) -> Vec<String> {
        // A key that nobody knows makes the reader tell which ones it knows.
        let mut text = "{zzzzzzzzzz: 1}".to_owned();
        for step in steps(place).collect::<Vec<_>>().into_iter().rev() {
            text = if step == "0" { format!("[{text}]") } else { format!("{{{step}: {text}}}") };
        }
        let source = Source::File(PathBuf::from("test.yaml"));
        let error = read(text.as_bytes(), &source, &Environment::default()).unwrap_err();
        let known = error.lines().iter().find_map(|line| line.split_once("known here: "));
        let known = known.unwrap_or_else(|| panic!("{place}: {error}")).1;
        known.split(" (").next().unwrap_or_default().split(", ").map(str::to_owned).collect()
    }

    #[test]
    fn a_bare_backends_json_has_the_defaults_of_the_tools_it_comes_from() {
        let text = include_str!("../../conf/backends.json");
        let bare = snapshot(text);
        assert_eq!(bare.cors, CorsOrigins::Any);
        assert_eq!(bare.shutdown_timeout.as_secs(), 30);
        let (_, _, pool) = bare.pools().next().unwrap();
        assert_eq!(pool.backends[0].deadlines.silence.as_secs(), 30);
        let own = snapshot(&text.replacen('{', "{\"log\": {\"level\": \"info\"},", 1));
        assert_eq!(own.cors, CorsOrigins::Off);
        assert_eq!(own.shutdown_timeout.as_secs(), 900);
    }

    #[test]
    fn no_text_makes_it_panic() {
        let key = "(services|models|backends|id|url|weight|listen|health_check|interval|api_key)";
        let value =
            "([0-9.-]{1,6}|[a-z:/]{0,9}|\\[\\]|\\{\\}|~|\"\\$\\{[A-Z:-]{0,5}\\}\"|http://h)";
        let line = format!("( {{0,10}}|- ){key}: {value}\n");
        let text = proptest::string::string_regex(&format!("({line}){{0,8}}")).unwrap();
        proptest::proptest!(|(text in text)| {
            let source = Source::File(PathBuf::from("test.yaml"));
            let _ = read(text.as_bytes(), &source, &Environment::default());
        });
    }

    #[test]
    fn no_secret_is_in_the_debug_text_of_a_configuration() {
        let text = "{api_key: sk-one, hooks: [{request_headers: {set: {x-a: sk-four}}}, \
                    {answer: {body: sk-five}}], services: {s: {models: {m: {backends: \
                    [{id: a, url: \"http://u:sk-two@h\"}, {id: b, url: \"http://h\", api_key: sk-three}]}}}}}";
        let shown = format!("{:?}", snapshot(text));
        assert!(!shown.contains("sk-") && shown.contains("[secret]"), "{shown}");
    }
}
