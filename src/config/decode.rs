//! From a document's tree to the file types, reporting every problem and not only the first.
//!
//! A serde deserializer stops at its first error. So this one names the exact node, which is then
//! taken out of the tree, and the rest is read again.

use std::fmt;

use serde::de::value::StringDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Expected, IntoDeserializer,
    MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor,
};

use super::document::{Node, Text};
use super::problem::{KeyPath, PROBLEMS_MAX, Place, Problem, Problems, Step};

/// Reads a `T` from the tree. What cannot be read is reported and left out.
pub(super) fn decode<T: DeserializeOwned + Default>(mut tree: Node, problems: &mut Problems) -> T {
    for _ in 0..PROBLEMS_MAX {
        match T::deserialize(NodeReader(&tree)) {
            Ok(value) => return value,
            Err(error) => {
                let removed = remove(&mut tree, &error.steps);
                problems.push(error.into_problem());
                if !removed {
                    break;
                }
            }
        }
    }
    T::default()
}

/// Takes a node out of the tree, keeping the indices of its neighbours.
fn remove(tree: &mut Node, steps: &[Step]) -> bool {
    let mut node = tree;
    for step in steps.iter().rev() {
        let child = match (node, step) {
            (Node::Map(entries), Step::Key(key)) => {
                entries.iter_mut().find(|(name, _)| name == key).map(|(_, child)| child)
            }
            (Node::List(list), Step::Index(index)) => list.get_mut(*index),
            _ => None,
        };
        match child {
            Some(child) => node = child,
            None => return false,
        }
    }
    let gone = !steps.is_empty() && *node != Node::Refused;
    *node = Node::Refused;
    gone
}

/// Why a node cannot be read. Never repeats a value: it may be a secret.
#[derive(Debug)]
pub(super) struct DecodeError {
    message: String,
    /// From the innermost step outwards, filled in while the error travels up.
    steps: Vec<Step>,
    /// Whether the key rather than its value is wrong.
    at_key: bool,
}

impl DecodeError {
    fn plain(message: impl Into<String>) -> Self {
        Self { message: message.into(), steps: Vec::new(), at_key: false }
    }

    fn below(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    fn into_problem(self) -> Problem {
        let path = KeyPath::from_steps(self.steps.into_iter().rev().collect());
        let place = if self.at_key { Place::Key(path) } else { Place::Value(path) };
        Problem::new(place, self.message)
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for DecodeError {}

impl serde::de::Error for DecodeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::plain(message.to_string())
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let found = match unexpected {
            Unexpected::Bool(_) => "true or false",
            Unexpected::Unsigned(_) | Unexpected::Signed(_) | Unexpected::Float(_) => "a number",
            Unexpected::Str(_) => "text",
            Unexpected::Unit => "nothing",
            Unexpected::Seq => "a list",
            Unexpected::Map => "a mapping",
            _ => "something else",
        };
        let expected = in_words(&expected.to_string());
        let is_scalar = matches!(found, "a number" | "true or false");
        let quotes = if expected == "text" && is_scalar { "; put it in quotes" } else { "" };
        Self::plain(format!("expected {expected}, found {found}{quotes}"))
    }

    fn invalid_value(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::plain(format!("expected {}", in_words(&expected.to_string())))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::plain(format!("{variant:?} is not one of {}", expected.join(", ")))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let message = match nearest(field, expected) {
            Some(known) => format!("unknown key, did you mean {known:?}?"),
            None => format!("unknown key; known here: {}", expected.join(", ")),
        };
        Self { at_key: true, ..Self::plain(message) }
    }
}

/// serde's name of a type as a reader of the file would call it.
fn in_words(expected: &str) -> String {
    match expected {
        "a string" => "text".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "a mapping".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "f64" => "a number".to_owned(),
        "u16" | "u32" | "u64" => "a whole number of 0 or more".to_owned(),
        text if text.starts_with("struct ") => "a mapping".to_owned(),
        text => text.to_owned(),
    }
}

/// The known key that a typing mistake was probably meant to be.
fn nearest(field: &str, known: &'static [&'static str]) -> Option<&'static str> {
    known
        .iter()
        .map(|candidate| (strsim::normalized_damerau_levenshtein(field, candidate), *candidate))
        .filter(|(similarity, _)| *similarity > 0.6)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, candidate)| candidate)
}

/// Reads one node.
struct NodeReader<'a>(&'a Node);

impl<'a> NodeReader<'a> {
    fn substituted(&self) -> Option<&'a str> {
        match self.0 {
            Node::Text(Text { text, substituted: true }) => Some(text),
            _ => None,
        }
    }
}

/// Numbers and booleans may come out of `${NAME}`, as text.
macro_rules! substituted_or_any {
    ($($method:ident $visit:ident),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
            match self.substituted().and_then(|text| text.trim().parse().ok()) {
                Some(value) => visitor.$visit(value),
                None => self.deserialize_any(visitor),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for NodeReader<'_> {
    type Error = DecodeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self.0 {
            Node::Null | Node::Refused => visitor.visit_unit(),
            Node::Bool(value) => visitor.visit_bool(*value),
            Node::Integer(value) => visitor.visit_i64(*value),
            Node::Unsigned(value) => visitor.visit_u64(*value),
            Node::Float(value) => visitor.visit_f64(*value),
            Node::Text(text) => visitor.visit_str(&text.text),
            Node::List(list) => visitor.visit_seq(ListReader { list, at: 0 }),
            Node::Map(entries) => visitor.visit_map(MapReader { entries, at: 0 }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self.0 {
            Node::Null | Node::Refused => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        match self.0 {
            Node::Text(text) => visitor.visit_enum(VariantReader(&text.text)),
            _ => Err(DecodeError::plain(format!("expected one of {}", variants.join(", ")))),
        }
    }

    substituted_or_any! {
        deserialize_bool visit_bool, deserialize_u16 visit_u64, deserialize_u32 visit_u64,
        deserialize_u64 visit_u64, deserialize_f64 visit_f64
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u128 f32 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

struct ListReader<'a> {
    list: &'a [Node],
    at: usize,
}

impl<'de> SeqAccess<'de> for ListReader<'_> {
    type Error = DecodeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, DecodeError> {
        let Some(node) = self.list.get(self.at) else { return Ok(None) };
        let index = self.at;
        self.at += 1;
        let value = seed.deserialize(NodeReader(node));
        value.map(Some).map_err(|error| error.below(Step::Index(index)))
    }
}

struct MapReader<'a> {
    entries: &'a [(String, Node)],
    at: usize,
}

impl MapReader<'_> {
    fn here(&self) -> Step {
        Step::Key(self.entries[self.at].0.clone())
    }
}

impl<'de> MapAccess<'de> for MapReader<'_> {
    type Error = DecodeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, DecodeError> {
        while matches!(self.entries.get(self.at), Some((_, Node::Refused))) {
            self.at += 1;
        }
        let Some((key, _)) = self.entries.get(self.at) else { return Ok(None) };
        let deserializer: StringDeserializer<DecodeError> = key.clone().into_deserializer();
        seed.deserialize(deserializer).map(Some).map_err(|error| error.below(self.here()))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, DecodeError> {
        let value = seed.deserialize(NodeReader(&self.entries[self.at].1));
        let value = value.map_err(|error| error.below(self.here()))?;
        self.at += 1;
        Ok(value)
    }
}

/// Reads an enum written as its variant's name.
struct VariantReader<'a>(&'a str);

impl<'de> EnumAccess<'de> for VariantReader<'_> {
    type Error = DecodeError;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(
        self,
        seed: V,
    ) -> Result<(V::Value, Self), DecodeError> {
        let deserializer: StringDeserializer<DecodeError> = self.0.to_owned().into_deserializer();
        Ok((seed.deserialize(deserializer)?, self))
    }
}

impl<'de> VariantAccess<'de> for VariantReader<'_> {
    type Error = DecodeError;

    fn unit_variant(self) -> Result<(), DecodeError> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, DecodeError> {
        Err(DecodeError::plain("expected a name"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, DecodeError> {
        Err(DecodeError::plain("expected a name"))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, DecodeError> {
        Err(DecodeError::plain("expected a name"))
    }
}
