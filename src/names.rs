//! Names of models, exact or with a wildcard, and what stands behind them.

use std::collections::HashMap;

/// A name with one `*`, which stands for any text, also for none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    prefix: String,
    suffix: String,
}

impl Pattern {
    /// Reads a name with a `*`; none where it has none, or several.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (prefix, suffix) = text.split_once('*')?;
        let is_one = !suffix.contains('*');
        is_one.then(|| Self { prefix: prefix.to_owned(), suffix: suffix.to_owned() })
    }

    /// Whether a text is a name, with a `*` or without one.
    #[must_use]
    pub fn is_name(text: &str) -> bool {
        !text.trim().is_empty() && (!text.contains('*') || Self::parse(text).is_some())
    }

    /// Whether it stands for `name`.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        name.len() >= self.literal()
            && name.starts_with(&self.prefix)
            && name.ends_with(&self.suffix)
    }

    /// Bytes that are given: of several patterns the one with most of them counts.
    #[must_use]
    pub fn literal(&self) -> usize {
        self.prefix.len() + self.suffix.len()
    }
}

/// Some names, also with a wildcard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameList(Box<[Named]>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Named {
    Exactly(Box<str>),
    By(Pattern),
}

impl NameList {
    /// Those that are written as `names`.
    #[must_use]
    pub fn new<'n>(names: impl IntoIterator<Item = &'n str>) -> Self {
        let read = |name: &str| match Pattern::parse(name) {
            Some(pattern) => Named::By(pattern),
            None => Named::Exactly(name.into()),
        };
        Self(names.into_iter().map(read).collect())
    }

    /// Whether a name is one of them.
    #[must_use]
    pub fn holds(&self, name: &str) -> bool {
        self.0.iter().any(|known| match known {
            Named::Exactly(known) => **known == *name,
            Named::By(pattern) => pattern.matches(name),
        })
    }

    /// Those that stand for none of the names that are known, as they are written.
    pub fn strays<'n, T>(&'n self, known: &'n Names<T>) -> impl Iterator<Item = String> + 'n {
        let is_stray = |named: &&Named| match named {
            Named::Exactly(name) => known.find(name).is_none(),
            Named::By(pattern) => !known.meets(pattern),
        };
        self.0.iter().filter(is_stray).map(|named| match named {
            Named::Exactly(name) => name.to_string(),
            Named::By(Pattern { prefix, suffix }) => format!("{prefix}*{suffix}"),
        })
    }
}

/// What stands behind names.
#[derive(Clone, Debug)]
pub struct Names<T> {
    exact: HashMap<String, T>,
    patterns: Vec<(Pattern, T)>,
}

impl<T> Default for Names<T> {
    fn default() -> Self {
        Self { exact: HashMap::new(), patterns: Vec::new() }
    }
}

impl<T> Names<T> {
    /// Puts something behind a name or a pattern, unless there is something.
    pub fn add(&mut self, name: &str, value: T) {
        let Some(pattern) = Pattern::parse(name) else {
            self.exact.entry(name.to_owned()).or_insert(value);
            return;
        };
        if self.has(name) {
            return;
        }
        let more = |(known, _): &(Pattern, T)| known.literal() >= pattern.literal();
        let at = self.patterns.partition_point(more);
        self.patterns.insert(at, (pattern, value));
    }

    /// Whether something stands behind this name or pattern itself.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        match Pattern::parse(name) {
            None => self.exact.contains_key(name),
            Some(pattern) => self.patterns.iter().any(|(known, _)| *known == pattern),
        }
    }

    /// Whether some name that stands here may be one that the pattern stands for.
    fn meets(&self, pattern: &Pattern) -> bool {
        let one_begins = |one: &str, other: &str| one.starts_with(other) || other.starts_with(one);
        let one_ends = |one: &str, other: &str| one.ends_with(other) || other.ends_with(one);
        self.exact.keys().any(|name| pattern.matches(name))
            || self.patterns.iter().any(|(known, _)| {
                one_begins(&known.prefix, &pattern.prefix)
                    && one_ends(&known.suffix, &pattern.suffix)
            })
    }

    /// What stands behind exactly this name.
    #[must_use]
    pub fn exact(&self, name: &str) -> Option<&T> {
        self.exact.get(name)
    }

    /// What stands behind the most exact pattern that stands for this name.
    #[must_use]
    pub fn pattern(&self, name: &str) -> Option<&T> {
        self.pattern_of_any(&[name])
    }

    /// What stands behind the most exact pattern that stands for one of these names.
    #[must_use]
    pub fn pattern_of_any(&self, names: &[impl AsRef<str>]) -> Option<&T> {
        let matches = |pattern: &Pattern| names.iter().any(|name| pattern.matches(name.as_ref()));
        self.patterns.iter().find(|(pattern, _)| matches(pattern)).map(|(_, value)| value)
    }

    /// What stands behind this name: exactly, else by the most exact pattern.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&T> {
        self.exact(name).or_else(|| self.pattern(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_exact_name_wins() {
        let mut names = Names::default();
        for (name, value) in
            [("*", 0), ("gpt-4*", 1), ("gpt-4o", 2), ("gpt-4*-mini", 3), ("*-mini", 4), ("*", 9)]
        {
            names.add(name, value);
        }
        for (name, value) in [
            ("gpt-4o", 2),
            ("gpt-4", 1),
            ("gpt-4-turbo", 1),
            ("gpt-4o-mini", 3),
            ("gpt-4-mini", 3),
            ("gpt-4-min", 1),
            ("o1-mini", 4),
            ("", 0),
        ] {
            assert_eq!(names.find(name), Some(&value), "{name}");
        }
        assert_eq!(names.exact("gpt-4"), None);
        assert!(
            names.has("gpt-4*") && names.has("gpt-4o") && !names.has("gpt-4") && !names.has("x*")
        );
    }

    #[test]
    fn a_pattern_has_one_star_and_its_ends_do_not_overlap() {
        assert_eq!(Pattern::parse("gpt-4"), None);
        assert_eq!(Pattern::parse("a*b*"), None);
        assert!(!Pattern::parse("ab*ba").unwrap().matches("aba"));
    }
}
