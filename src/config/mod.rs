//! The configuration: sources, file types, validation, snapshot.
//!
//! A file goes `document` (text to tree) -> `interpolate` (`${NAME}`) -> `decode` (tree to `file`
//! types) -> `overrides` (environment variables) -> `validate` -> [`Snapshot`]. Each step reports
//! all it finds; the first step that finds the tree unreadable ends the way. Nothing outside this
//! module sees what "not written" looks like.

mod decode;
mod defaults;
mod document;
mod environment;
mod file;
mod interpolate;
mod overrides;
mod problem;
mod snapshot;
mod source;
mod units;
mod validate;

use std::path::Path;

pub use environment::Environment;
pub use problem::ConfigError;
pub use snapshot::{
    BackendSpec, BackendUrl, Balance, ClientBounds, ClientKeys, CorsOrigins, Credential,
    HealthSpec, Host, PoolSpec, ProbeSpec, Service, Snapshot,
};
pub use source::{Source, find_source};

use document::Node;
use file::FileConfig;
use problem::{Place, Problem, Problems};

/// Reads and validates the configuration at `source`, with the variables of `environment`.
///
/// # Errors
/// Every problem of the file and the variables, each with its place and what to do.
pub fn load(source: &Source, environment: &Environment) -> Result<Snapshot, ConfigError> {
    let path = source.path();
    let unreadable = |error: std::io::Error| {
        ConfigError::new(vec![format!("{}: cannot read it: {error}", path.display())])
    };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if metadata.is_dir() {
        let message = format!("{}: a folder, not a configuration file", path.display());
        return Err(ConfigError::new(vec![message]));
    }
    let bytes = read_bounded(path).map_err(unreadable)?;
    read(&bytes, source, environment)
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
    let path = source.path();
    let mut problems = Problems::default();
    let mut tree = match document::parse(bytes) {
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
    let snapshot = validate::validate(&file, defaults, path, &mut problems);
    if problems.is_empty() { Ok(snapshot) } else { Err(report(problems.into_vec(), bytes, path)) }
}

/// One byte more than allowed is read, so that a huge file is refused and not swallowed.
fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    let limit = document::FILE_BYTES_MAX as u64 + 1;
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
                Place::Position { .. } => format!("{file}: {message} ({file}:{line}:{column})"),
                Place::Key(key) | Place::Value(key) if key.steps().is_empty() => {
                    format!("{file}: {message}")
                }
                Place::Key(key) | Place::Value(key) => match position {
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
