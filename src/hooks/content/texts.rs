//! The texts of a JSON document that a model sees or says: all but what names and kinds are, and what is no text.

use std::fmt::{self, Write};

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::super::fields::Name;

/// Members whose texts are names and kinds, as long as they look like one: anything else in their place is read.
const NAMES: [&str; 19] = [
    "call_id",
    "created_at",
    "detail",
    "encoding_format",
    "file_id",
    "finishReason",
    "finish_reason",
    "id",
    "item_id",
    "media_type",
    "mimeType",
    "mime_type",
    "model",
    "object",
    "role",
    "service_tier",
    "stop_reason",
    "tool_call_id",
    "type",
];

/// The longest name.
const NAME_BYTES_MAX: usize = 128;

/// Members that hold pictures, sounds and files, and what only servers can read.
const MEDIA: [&str; 8] = [
    "b64_json",
    "data",
    "encrypted_content",
    "file_data",
    "image_url",
    "obfuscation",
    "signature",
    "url",
];

/// What is shorter is read in any case: no picture is.
const MEDIA_BYTES_MIN: usize = 256;

/// What repeats the answer token by token. It is not read, and goes with what is taken out of its text.
const REPEATED: [&str; 6] =
    ["bytes", "context", "logprobs", "prompt_token_ids", "token_ids", "top_logprobs"];

/// Members whose numbers tell which of several texts an event goes on with.
const NUMBERS: [&str; 4] = ["index", "output_index", "content_index", "summary_index"];

/// Where models are told of everything as it is written, the names of members too: tools, and what they are given.
const TOLD: [&str; 7] = [
    ".tools",
    ".functions",
    ".content.input",
    ".functionCall.args",
    ".function_call.args",
    ".functionResponse.response",
    ".function_response.response",
];

/// What the reader of JSON takes for raw text: a document that has it would not be what it looks like.
const RAW: &str = "$serde_json::private";

/// Whether models are told of everything here.
fn is_told(way: &str) -> bool {
    let begins = |told: &&str| way.starts_with(*told);
    TOLD[..2].iter().any(begins) || TOLD[2..].iter().any(|told| way.contains(told))
}

/// Whether the text of this member is none that a model sees or says.
fn is_passed_over(way: &str, name: &str, text: &str) -> bool {
    if is_told(way) {
        return false;
    }
    if NAMES.contains(&name) {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.:/@+".contains(&byte);
        return text.len() <= NAME_BYTES_MAX && text.bytes().all(is_plain);
    }
    MEDIA.contains(&name) && is_media(text)
}

/// Whether a text is a picture or the like: nothing but base64, in a data URL (RFC 2397) or by itself.
fn is_media(text: &str) -> bool {
    let data = match text.split_once(";base64,") {
        Some((head, data)) if head.starts_with("data:") && head.len() <= NAME_BYTES_MAX => data,
        _ => text,
    };
    let is_base64 = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=_-".contains(&byte);
    text.len() >= MEDIA_BYTES_MIN && data.bytes().all(is_base64)
}

/// A text, and which one it is in its document: the way to it.
pub(super) type Seen<'a> = dyn FnMut(&str, &str) + 'a;

/// Shows each text of a document.
///
/// # Errors
/// When it is no JSON.
pub(super) fn each(document: &[u8], seen: &mut Seen<'_>) -> serde_json::Result<()> {
    let mut reader = serde_json::Deserializer::from_slice(document);
    Walk { way: &mut String::new(), name: "", seen }.deserialize(&mut reader)?;
    reader.end()
}

/// Shows each text of a document that may be changed, in the order of [`change`]; of several beside each other, by their
/// numbers.
pub(super) fn each_of(document: &Value, seen: &mut Seen<'_>) {
    walk(document, &mut String::new(), "", seen);
}

fn walk(value: &Value, way: &mut String, name: &str, seen: &mut Seen<'_>) {
    match value {
        Value::String(text) => {
            if !is_passed_over(way, name, text) {
                seen(way, text);
            }
        }
        Value::Array(list) => list.iter().for_each(|item| walk(item, way, name, seen)),
        Value::Object(members) => {
            let outer = way.len();
            for number in NUMBERS.iter().filter_map(|name| members.get(*name)?.as_u64()) {
                let _ = write!(way, "[{number}]");
            }
            let inner = way.len();
            for (name, value) in members.iter().filter(|(name, _)| is_read(name)) {
                let _ = write!(way, ".{name}");
                walk(value, way, name, seen);
                way.truncate(inner);
            }
            way.truncate(outer);
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn is_read(name: &str) -> bool {
    !REPEATED.contains(&name)
}

/// Puts other texts in the place of those that there are, in the order in which [`each_of`] shows them, and takes out what
/// repeats them.
pub(super) fn change(document: &mut Value, next: &mut dyn FnMut(&mut String)) {
    alter(document, &mut String::new(), "", next);
}

fn alter(value: &mut Value, way: &mut String, name: &str, next: &mut dyn FnMut(&mut String)) {
    match value {
        Value::String(text) => {
            if !is_passed_over(way, name, text) {
                next(text);
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|item| alter(item, way, name, next)),
        Value::Object(members) => {
            members.retain(|name, _| is_read(name));
            let outer = way.len();
            for (name, value) in members {
                let _ = write!(way, ".{name}");
                alter(value, way, name, next);
                way.truncate(outer);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

struct Walk<'w, 's> {
    way: &'w mut String,
    /// Of the member that it is in.
    name: &'w str,
    seen: &'w mut Seen<'s>,
}

impl<'de> DeserializeSeed<'de> for Walk<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        if !is_passed_over(self.way, self.name, text) {
            (self.seen)(self.way, text);
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Self { way, name, seen } = self;
        while list.next_element_seed(Walk { way: &mut *way, name, seen: &mut *seen })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { way, seen, .. } = self;
        let outer = way.len();
        let is_told = is_told(way);
        while let Some(Name(name)) = map.next_key::<Name<'de>>()? {
            if name.starts_with(RAW) {
                return Err(A::Error::custom("a name that is not for documents"));
            }
            if is_told {
                seen(way, &name);
            }
            let _ = write!(way, ".{name}");
            let walk = Walk { way: &mut *way, name: &name, seen: &mut *seen };
            map.next_value_seed(walk)?;
            way.truncate(outer);
        }
        Ok(())
    }
}
