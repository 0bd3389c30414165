//! The texts of a JSON document that a model sees or says: all but names, kinds, addresses and what is no text.

use std::fmt::{self, Write};

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::super::fields::Name;

/// Members whose texts no model sees or says.
const NOT_SEEN: [&str; 27] = [
    "b64_json",
    "call_id",
    "created_at",
    "data",
    "detail",
    "encoding_format",
    "encrypted_content",
    "file_data",
    "file_id",
    "finishReason",
    "finish_reason",
    "format",
    "id",
    "item_id",
    "media_type",
    "mimeType",
    "mime_type",
    "model",
    "object",
    "obfuscation",
    "role",
    "service_tier",
    "signature",
    "stop_reason",
    "tool_call_id",
    "type",
    "url",
];

/// Members whose numbers tell which of several texts an event goes on with.
const NUMBERS: [&str; 4] = ["index", "output_index", "content_index", "summary_index"];

/// What is longer than this, without a space, is no text: a picture, a sound, a file.
const WORD_BYTES_MAX: usize = 2048;

/// Whether a text is a picture or the like.
fn is_media(text: &str) -> bool {
    let beginning = &text.as_bytes()[..text.len().min(256)];
    let is_prose = beginning.iter().any(|byte| matches!(byte, b' ' | b'\n' | 0x80..));
    // A picture in a text (RFC 2397) is one only as a whole.
    let is_url = text.starts_with("data:") && text.contains(";base64,");
    !is_prose && (text.len() > WORD_BYTES_MAX || is_url)
}

/// A text, and which one it is in its document: the way to it.
pub(super) type Seen<'a> = dyn FnMut(&str, &str) + 'a;

/// Shows each text of a document.
///
/// # Errors
/// When it is no JSON.
pub(super) fn each(document: &[u8], seen: &mut Seen<'_>) -> serde_json::Result<()> {
    let mut reader = serde_json::Deserializer::from_slice(document);
    Walk { way: &mut String::new(), seen }.deserialize(&mut reader)?;
    reader.end()
}

/// Puts other texts in the place of those that there are, in the order in which [`each`] shows them.
pub(super) fn change(document: &mut Value, next: &mut dyn FnMut(&mut String)) {
    match document {
        Value::String(text) => {
            if !is_media(text) {
                next(text);
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|item| change(item, next)),
        Value::Object(members) => {
            for (name, value) in members {
                if !(value.is_string() && NOT_SEEN.contains(&name.as_str())) {
                    change(value, next);
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

struct Walk<'w, 's> {
    way: &'w mut String,
    seen: &'w mut Seen<'s>,
}

impl<'de> DeserializeSeed<'de> for Walk<'_, '_> {
    type Value = Option<u64>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<u64>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// Gives the number that a value is, if it is one.
impl<'de> Visitor<'de> for Walk<'_, '_> {
    type Value = Option<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Option<u64>, E> {
        Ok(None)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Option<u64>, E> {
        Ok(None)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Option<u64>, E> {
        Ok(None)
    }

    fn visit_u64<E>(self, number: u64) -> Result<Option<u64>, E> {
        Ok(Some(number))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Option<u64>, E> {
        Ok(None)
    }

    fn visit_str<E>(self, text: &str) -> Result<Option<u64>, E> {
        if !is_media(text) {
            (self.seen)(self.way, text);
        }
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Option<u64>, A::Error> {
        while list.next_element_seed(Walk { way: self.way, seen: self.seen })?.is_some() {}
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<u64>, A::Error> {
        let outer = self.way.len();
        // Behind the names: which of several it is. It may stand before or behind the text, so this holds for what
        // comes after it; the APIs have it first.
        let mut numbers = String::new();
        while let Some(Name(name)) = map.next_key::<Name<'de>>()? {
            if NOT_SEEN.contains(&&*name) {
                map.next_value_seed(Unseen { way: self.way, seen: self.seen })?;
                continue;
            }
            let _ = write!(self.way, "{numbers}.{name}");
            let number = map.next_value_seed(Walk { way: self.way, seen: self.seen })?;
            self.way.truncate(outer);
            if let Some(number) = number.filter(|_| NUMBERS.contains(&&*name)) {
                let _ = write!(numbers, "[{number}]");
            }
        }
        Ok(None)
    }
}

/// A member whose text is not seen; what is inside of an object or a list is.
struct Unseen<'w, 's> {
    way: &'w mut String,
    seen: &'w mut Seen<'s>,
}

impl<'de> DeserializeSeed<'de> for Unseen<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unseen<'_, '_> {
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

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<(), A::Error> {
        Walk { way: self.way, seen: self.seen }.visit_seq(list).map(|_| ())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        Walk { way: self.way, seen: self.seen }.visit_map(map).map(|_| ())
    }
}
