//! Hooks as they are written.

use indexmap::IndexMap;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor, value::MapAccessDeserializer};
use serde_json::Value;

use super::super::units::{Size, Span};
use super::OneOrMany;

/// A hook: what it is called, when it acts, and one thing that it does.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in super::super) struct FileHook {
    pub(in super::super) name: Option<String>,
    pub(in super::super) when: Option<String>,
    pub(in super::super) route: Option<FileRoute>,
    pub(in super::super) mirror: Option<FileRoute>,
    pub(in super::super) request_headers: Option<FileHeaders>,
    pub(in super::super) response_headers: Option<FileHeaders>,
    pub(in super::super) request_fields: Option<FileFields>,
    pub(in super::super) bounds: Option<FileBounds>,
    pub(in super::super) refuse: Option<FileRefuse>,
    pub(in super::super) answer: Option<FileAnswer>,
    pub(in super::super) guard: Option<FileGuard>,
    pub(in super::super) capture: Option<FileCapture>,
    pub(in super::super) custom: Option<IndexMap<String, Value>>,
}

/// Where requests go.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in super::super) struct FileRoute {
    pub(in super::super) to: Option<String>,
    pub(in super::super) percent: Option<f64>,
    pub(in super::super) by: Option<FileBy>,
}

/// Whose requests stay together.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in super::super) enum FileBy {
    Request,
    Key,
}

/// What is done with headers.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in super::super) struct FileHeaders {
    pub(in super::super) set: Option<IndexMap<String, FileText>>,
    pub(in super::super) remove: Option<OneOrMany>,
    pub(in super::super) rename: Option<IndexMap<String, String>>,
}

/// A text, or an expression that gives one.
#[derive(Debug)]
pub(in super::super) enum FileText {
    Plain(String),
    Computed(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileExpression {
    expression: String,
}

impl<'de> Deserialize<'de> for FileText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = FileText;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("text, or a mapping with \"expression\"")
            }

            fn visit_str<E>(self, text: &str) -> Result<FileText, E> {
                Ok(FileText::Plain(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<FileText, A::Error> {
                let written = FileExpression::deserialize(MapAccessDeserializer::new(map))?;
                Ok(FileText::Computed(written.expression))
            }
        }
        deserializer.deserialize_any(TextVisitor)
    }
}

/// What is done with the members of JSON bodies.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in super::super) struct FileFields {
    pub(in super::super) default: Option<IndexMap<String, Value>>,
    pub(in super::super) set: Option<IndexMap<String, Value>>,
    pub(in super::super) max: Option<IndexMap<String, Value>>,
    pub(in super::super) remove: Option<OneOrMany>,
    pub(in super::super) system_prompt: Option<String>,
}

/// How large requests may be.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in super::super) struct FileBounds {
    pub(in super::super) head_bytes_max: Option<Size>,
    pub(in super::super) body_bytes_max: Option<Size>,
}

/// A refusal in the form of the client's API family.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in super::super) struct FileRefuse {
    pub(in super::super) status: Option<u16>,
    pub(in super::super) message: Option<String>,
}

/// An answer as it is.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in super::super) struct FileAnswer {
    pub(in super::super) status: Option<u16>,
    pub(in super::super) content_type: Option<String>,
    pub(in super::super) headers: Option<IndexMap<String, String>>,
    pub(in super::super) retry_after: Option<Span>,
    pub(in super::super) body: Option<String>,
    pub(in super::super) json: Option<Value>,
}

/// Texts that may not pass.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in super::super) struct FileGuard {
    pub(in super::super) words: Option<OneOrMany>,
    pub(in super::super) words_file: Option<String>,
    pub(in super::super) patterns: Option<OneOrMany>,
    pub(in super::super) on: Option<Vec<FileSide>>,
    pub(in super::super) action: Option<FileAction>,
    pub(in super::super) replacement: Option<String>,
    pub(in super::super) hold_back: Option<u32>,
    pub(in super::super) answer_bytes_max: Option<Size>,
}

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in super::super) enum FileSide {
    Request,
    Answer,
}

/// What is done where something is found.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in super::super) enum FileAction {
    Refuse,
    Redact,
    Count,
}

/// What the request log tells of what is asked and said.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in super::super) struct FileCapture {
    pub(in super::super) keys: Option<OneOrMany>,
    pub(in super::super) prompt: Option<bool>,
    pub(in super::super) answer: Option<bool>,
    pub(in super::super) bytes_max: Option<Size>,
    pub(in super::super) redact: Option<FileRedact>,
}

/// What is taken out of it.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in super::super) struct FileRedact {
    pub(in super::super) words: Option<OneOrMany>,
    pub(in super::super) patterns: Option<OneOrMany>,
}
