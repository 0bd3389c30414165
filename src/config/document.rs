//! The text of a configuration file as a tree, within bounds, and where in the text a node stands.
//!
//! The only file that knows `serde_yaml`: YAML and JSON (a subset of it) are read by the same parser.

use std::collections::HashSet;
use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::problem::{Place, Problem, Step};

/// How large a file may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Its text, in bytes.
    pub(super) bytes_max: usize,
    /// Its nodes, so that anchors and aliases cannot blow up a small file.
    pub(super) nodes_max: usize,
    /// The key that there has to be; none: it may be empty.
    pub(super) needs: Option<&'static str>,
}

/// Of a configuration. 10,000 backends with long names take about 3 MB.
pub(super) const CONFIGURATION: Bounds =
    Bounds { bytes_max: 16 * 1024 * 1024, nodes_max: 1_000_000, needs: Some("services") };

/// Of a file of keys: 100,000 of them take about 20 MB and a million nodes.
pub(super) const PART: Bounds =
    Bounds { bytes_max: 64 * 1024 * 1024, nodes_max: 4_000_000, needs: None };

/// A node of the document. Mappings keep the order of the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Node {
    Null,
    Bool(bool),
    Integer(i64),
    Unsigned(u64),
    Float(f64),
    Text(Text),
    List(Vec<Node>),
    Map(Vec<(String, Node)>),
    /// A part that was reported as wrong and is passed over from then on.
    Refused,
}

/// A string of the document.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Text {
    pub(super) text: String,
    /// Whether the text came from the environment, so that `${WEIGHT}` may stand for a number.
    pub(super) substituted: bool,
}

/// Reads a document.
pub(super) fn parse(bytes: &[u8], bounds: Bounds) -> Result<Node, Problem> {
    let Bounds { bytes_max, nodes_max, needs } = bounds;
    let file = |message: String| Problem::new(Place::File, message);
    if bytes.len() > bytes_max {
        let size = bytes.len();
        return Err(file(format!("{size} bytes; it may have at most {bytes_max}")));
    }
    if bytes.contains(&0) {
        return Err(file("a binary file, not YAML or JSON text".into()));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let (line, column) = position(bytes, error.valid_up_to());
        Problem::new(Place::Position { line, column }, "not UTF-8 text")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim().is_empty() {
        return match needs {
            Some(_) => {
                Err(file("empty; write at least one service, or try `tollgate demo`".into()))
            }
            None => Ok(Node::Map(Vec::new())),
        };
    }
    let mut nodes_left = nodes_max;
    let tree = NodeSeed { nodes_left: &mut nodes_left, nodes_max }
        .deserialize(serde_yaml::Deserializer::from_str(text))
        .map_err(|error| syntax_problem(&error))?;
    match tree {
        Node::Map(_) => Ok(tree),
        Node::Null if needs.is_none() => Ok(Node::Map(Vec::new())),
        Node::Null => Err(file("nothing but comments; write at least one service".into())),
        _ => Err(file(format!("must be a mapping with the key {:?}", needs.unwrap_or("keys")))),
    }
}

/// The line and column, both from 1, of the node that `place` names. A way that leads nowhere in
/// the text (a missing key) gives the nearest node above it.
pub(super) fn locate(text: &str, place: &Place) -> Option<(usize, usize)> {
    let (path, target) = match place {
        Place::Position { line, column } => return Some((*line, *column)),
        Place::Key(path) => (path, Target::Key),
        Place::Value(path) => (path, Target::Value),
        Place::Inside(path, letters) => {
            let (line, column) = locate(text, &Place::Value(path.clone()))?;
            return Some(inside(text, (line, column), *letters));
        }
        Place::File | Place::Variable(_) | Place::Elsewhere => return None,
    };
    let mut steps = path.steps();
    loop {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let seek = Seek { steps, target };
        if let Err(error) = seek.deserialize(serde_yaml::Deserializer::from_str(text)) {
            return error.location().map(|location| (location.line(), location.column()));
        }
        steps = &steps[..steps.len().checked_sub(1)?];
    }
}

/// The line and column of what stands this many letters behind the beginning of a text that is written here.
fn inside(text: &str, (line, column): (usize, usize), letters: usize) -> (usize, usize) {
    let mut lines = text.lines().skip(line - 1);
    let written = lines.next().unwrap_or_default();
    let mut rest = written.chars().skip(column - 1).peekable();
    let quote = rest.next_if(|letter| matches!(letter, '"' | '\''));
    if quote.is_none() && matches!(rest.peek(), Some('|' | '>')) {
        // A block: its lines follow, each behind the indentation of the first.
        let mut left = letters;
        let mut indent = None;
        for (below, written) in lines.enumerate() {
            let own = written.len() - written.trim_start_matches(' ').len();
            let indent = *indent.get_or_insert(own);
            let length = written.chars().count().saturating_sub(indent);
            if left <= length {
                return (line + 1 + below, indent + left + 1);
            }
            left -= length + 1;
        }
        return (line, column);
    }
    let mut at = column + usize::from(quote.is_some());
    for _ in 0..letters {
        let letter = rest.next();
        // What takes two letters to be written.
        let is_double = match quote {
            Some('"') => letter == Some('\\'),
            Some('\'') => letter == Some('\''),
            _ => false,
        };
        at += 1 + usize::from(is_double && rest.next().is_some());
    }
    (line, at)
}

/// Turns a parser's error into a problem with a position.
fn syntax_problem(error: &serde_yaml::Error) -> Problem {
    let message = error.to_string();
    // The position is shown with the file's name; the parser's own mention of it goes.
    let message = message.split(" at line ").next().unwrap_or(&message).to_owned();
    let message = match message.as_str() {
        "repetition limit exceeded" => "aliases expand to too much; write the parts out".to_owned(),
        "recursion limit exceeded" => "nested too deeply".to_owned(),
        "found character that cannot start any token" => {
            "a character that cannot stand here; YAML is indented with spaces, not tabs".to_owned()
        }
        "did not find expected node content" => "expected a value here".to_owned(),
        _ => message,
    };
    match error.location() {
        Some(location) => {
            let place = Place::Position { line: location.line(), column: location.column() };
            Problem::new(place, message)
        }
        None => Problem::new(Place::File, message),
    }
}

/// Line and column, both from 1, of a byte offset.
fn position(bytes: &[u8], offset: usize) -> (usize, usize) {
    let before = &bytes[..offset];
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    (line, offset - start + 1)
}

/// Builds a [`Node`], counting.
struct NodeSeed<'a> {
    nodes_left: &'a mut usize,
    nodes_max: usize,
}

impl<'de> DeserializeSeed<'de> for NodeSeed<'_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        *self.nodes_left = self
            .nodes_left
            .checked_sub(1)
            .ok_or_else(|| D::Error::custom(format!("more than {} values", self.nodes_max)))?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for NodeSeed<'_> {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a plain value")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Integer(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(i64::try_from(value).map_or(Node::Unsigned(value), Node::Integer))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Text(Text { text: value.to_owned(), substituted: false }))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(node) = seq.next_element_seed(NodeSeed {
            nodes_left: self.nodes_left,
            nodes_max: self.nodes_max,
        })? {
            list.push(node);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut entries: Vec<(String, Node)> = Vec::new();
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key_seed(KeySeed { seen: &mut seen })? {
            let node = map.next_value_seed(NodeSeed {
                nodes_left: self.nodes_left,
                nodes_max: self.nodes_max,
            })?;
            entries.push((key, node));
        }
        Ok(Node::Map(entries))
    }
}

/// Reads a mapping's key, which may stand there once.
struct KeySeed<'a> {
    seen: &'a mut HashSet<String>,
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        // Not `any`: a key that looks like a number or a boolean is text, as it is in JSON.
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<String, E> {
        if self.seen.insert(key.to_owned()) {
            Ok(key.to_owned())
        } else {
            Err(E::custom(format!("the key {key:?} stands here twice")))
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Target {
    Key,
    Value,
}

/// Walks to a node and fails there on purpose: the parser then says where it was.
struct Seek<'a> {
    steps: &'a [Step],
    target: Target,
}

impl<'de> DeserializeSeed<'de> for Seek<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// The error by which [`Seek`] arrives.
fn arrived<E: serde::de::Error>() -> Result<(), E> {
    Err(E::custom("here"))
}

impl Seek<'_> {
    /// What a leaf means: the goal where no step is left, a dead end elsewhere.
    fn leaf<E: serde::de::Error>(&self) -> Result<(), E> {
        if self.steps.is_empty() { arrived() } else { Ok(()) }
    }
}

impl<'de> Visitor<'de> for Seek<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a plain value")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.leaf()
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<(), E> {
        self.leaf()
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
        self.leaf()
    }

    fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<(), E> {
        self.leaf()
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        self.leaf()
    }

    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<(), E> {
        self.leaf()
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let Some((first, rest)) = self.steps.split_first() else { return arrived() };
        let mut at = 0;
        loop {
            let next = if *first == Step::Index(at) {
                seq.next_element_seed(Seek { steps: rest, target: self.target })?
            } else {
                seq.next_element::<IgnoredAny>()?.map(|_| ())
            };
            if next.is_none() {
                return Ok(());
            }
            at += 1;
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Some((Step::Key(wanted), rest)) = self.steps.split_first() else { return arrived() };
        let stop_at_key = rest.is_empty() && self.target == Target::Key;
        while let Some(found) = map.next_key_seed(SeekKey { wanted, stop: stop_at_key })? {
            if found {
                map.next_value_seed(Seek { steps: rest, target: self.target })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

/// Tells whether a key is the wanted one, and fails on it where the key itself is the goal.
struct SeekKey<'a> {
    wanted: &'a str,
    stop: bool,
}

impl<'de> DeserializeSeed<'de> for SeekKey<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for SeekKey<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<bool, E> {
        if value == self.wanted && self.stop {
            Err(E::custom("here"))
        } else {
            Ok(value == self.wanted)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::problem::KeyPath;
    use super::*;

    fn path(steps: &[&str]) -> KeyPath {
        steps.iter().fold(KeyPath::default(), |path, step| match step.parse() {
            Ok(index) => path.index(index),
            Err(_) => path.key(step),
        })
    }

    #[test]
    fn yaml_and_json_give_the_same_tree() {
        let yaml = parse(b"a:\n  - 1\n  - x: true\n    y: null\n", CONFIGURATION).unwrap();
        let json = parse(br#"{"a": [1, {"x": true, "y": null}]}"#, PART).unwrap();
        assert_eq!(yaml, json);
    }

    #[test]
    fn a_node_is_found_by_line_and_column() {
        let text = "services:\n  g:\n    models:\n      m:\n        backends:\n          - id: a\n            wieght: 1\n";
        let wieght = path(&["services", "g", "models", "m", "backends", "0", "wieght"]);
        assert_eq!(locate(text, &Place::Key(wieght.clone())), Some((7, 13)));
        assert_eq!(locate(text, &Place::Value(wieght)), Some((7, 21)));
        let missing = path(&["services", "g", "models", "m", "backends", "0", "url"]);
        assert_eq!(locate(text, &Place::Value(missing)), Some((6, 13)));
    }

    #[test]
    fn anchors_that_explode_are_refused() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..10 {
            let before = level - 1;
            let aliases = vec![format!("*a{before}"); 10].join(", ");
            text.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
        }
        let problem = parse(text.as_bytes(), CONFIGURATION).unwrap_err();
        assert!(problem.message.contains("aliases expand"), "{problem:?}");
    }

    #[test]
    fn no_bytes_make_it_panic() {
        proptest::proptest!(|(bytes: Vec<u8>)| { let _ = parse(&bytes, CONFIGURATION); });
        proptest::proptest!(|(text in "[-\\[\\]{}:,&*a0\" \n]{0,60}")| { let _ = parse(text.as_bytes(), PART); });
    }
}
