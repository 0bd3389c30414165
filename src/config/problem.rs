//! What is wrong with a configuration, where, and in which words.

use std::fmt;

/// One step into a document: a mapping's key or a sequence's index (from 0).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Key(String),
    Index(usize),
}

/// The way to a node of the document, such as `services.google.models["a/b"].backends[1].url`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct KeyPath(Vec<Step>);

impl KeyPath {
    pub(super) fn key(&self, key: &str) -> Self {
        self.with(Step::Key(key.to_owned()))
    }

    pub(super) fn index(&self, index: usize) -> Self {
        self.with(Step::Index(index))
    }

    pub(super) fn steps(&self) -> &[Step] {
        &self.0
    }

    pub(super) fn from_steps(steps: Vec<Step>) -> Self {
        Self(steps)
    }

    fn with(&self, step: Step) -> Self {
        let mut steps = self.0.clone();
        steps.push(step);
        Self(steps)
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, step) in self.0.iter().enumerate() {
            match step {
                Step::Index(index) => write!(f, "[{index}]")?,
                Step::Key(key) if is_plain(key) && at == 0 => write!(f, "{key}")?,
                Step::Key(key) if is_plain(key) => write!(f, ".{key}")?,
                Step::Key(key) => write!(f, "[{key:?}]")?,
            }
        }
        Ok(())
    }
}

/// Whether a key reads well between dots.
fn is_plain(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
}

/// Where a problem is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The file as a whole.
    File,
    /// A line and column of the file, both from 1, where no key can be named.
    Position { line: usize, column: usize },
    /// The key itself.
    Key(KeyPath),
    /// The value under a key.
    Value(KeyPath),
    /// In the text under a key, this many letters behind its beginning.
    Inside(KeyPath, usize),
    /// An environment variable.
    Variable(String),
    /// Another file, with its own words for the place in the message.
    Elsewhere,
}

/// One thing that is wrong. Never holds a secret's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) place: Place,
    pub(super) message: String,
}

impl Problem {
    pub(super) fn new(place: Place, message: impl Into<String>) -> Self {
        Self { place, message: message.into() }
    }
}

/// All that is wrong with a configuration, ready to be read: one line a problem, in the order of
/// the file, each `key path: what is wrong (file:line:column)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    lines: Vec<String>,
}

impl ConfigError {
    pub(super) fn new(lines: Vec<String>) -> Self {
        Self { lines }
    }

    /// A single problem that has no place in a file.
    pub fn message(message: impl Into<String>) -> Self {
        Self { lines: vec![message.into()] }
    }

    /// The problems, one line each.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        &self.lines
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines.join("\n"))
    }
}

impl std::error::Error for ConfigError {}

/// Most problems that are collected. Who has mended fifty runs the check again.
pub(super) const PROBLEMS_MAX: usize = 50;

/// The problems found so far.
#[derive(Debug, Default)]
pub(super) struct Problems(Vec<Problem>);

impl Problems {
    /// Notes that the value at `path` is wrong.
    pub(super) fn value(&mut self, path: &KeyPath, message: impl Into<String>) {
        self.push(Problem::new(Place::Value(path.clone()), message));
    }

    /// Notes that the key at `path` should not be there.
    pub(super) fn key(&mut self, path: &KeyPath, message: impl Into<String>) {
        self.push(Problem::new(Place::Key(path.clone()), message));
    }

    /// Notes that an environment variable is wrong.
    pub(super) fn variable(&mut self, name: &str, message: impl Into<String>) {
        self.push(Problem::new(Place::Variable(name.to_owned()), message));
    }

    /// Notes what is wrong with another file.
    pub(super) fn elsewhere(&mut self, error: &ConfigError) {
        for line in &error.lines {
            self.push(Problem::new(Place::Elsewhere, line));
        }
    }

    /// Notes a problem, up to a bound: a templated mistake is in every line of a file.
    pub(super) fn push(&mut self, problem: Problem) {
        if self.0.len() < PROBLEMS_MAX {
            self.0.push(problem);
        }
    }

    /// Whether the value at `path` was found wrong already, so that more words would confuse.
    pub(super) fn has(&self, path: &KeyPath) -> bool {
        self.0.iter().any(|problem| matches!(&problem.place, Place::Value(at) if at == path))
    }

    /// Whether something at or below `path` was found wrong.
    pub(super) fn has_below(&self, path: &KeyPath) -> bool {
        self.0.iter().any(|problem| match &problem.place {
            Place::Key(at) | Place::Value(at) | Place::Inside(at, _) => {
                at.steps().starts_with(path.steps())
            }
            Place::File | Place::Position { .. } | Place::Variable(_) | Place::Elsewhere => false,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    pub(super) fn into_vec(self) -> Vec<Problem> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_reads_like_the_configuration() {
        let path = KeyPath::default().key("services").key("google").key("models");
        let path = path.key("meta-llama/Llama-3.1").key("backends").index(1).key("url");
        assert_eq!(
            path.to_string(),
            r#"services.google.models["meta-llama/Llama-3.1"].backends[1].url"#
        );
    }
}
