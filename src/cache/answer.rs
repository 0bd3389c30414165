//! Answers that are kept. There is no other than a whole one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::HeaderValue;
use memchr::memmem;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use serde_json::value::RawValue;
use xxhash_rust::xxh3::xxh3_64;

use super::request::Key;
use crate::llm::{Kind, Usage};

/// What an answer takes besides its body, about, in bytes.
const OVERHEAD_BYTES: usize = 512;

/// The form in which answers are written. One that was written otherwise is none.
const FORM: u8 = 1;

/// How much effort is made to write them small: as fast as it goes.
const EFFORT: i32 = 1;

/// Numbers of [`Usage`].
const COUNTS: usize = 5;

/// A whole answer with status 200.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    content_type: HeaderValue,
    kind: Kind,
    body: Bytes,
    usage: Usage,
    /// In milliseconds since 1970.
    at: u64,
}

/// What may be wrong in a JSON document that looks well.
#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    error: Option<IgnoredAny>,
}

/// What the last event of a stream says, in each API its own way.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Last {
    r#type: Option<String>,
    done: Option<bool>,
    /// Of llama.cpp's own API.
    stop: Option<Value>,
    /// Of TGI's.
    generated_text: Option<Value>,
    candidates: Option<Vec<Candidate>>,
}

#[derive(Deserialize)]
struct Candidate {
    #[serde(default, rename = "finishReason")]
    finish_reason: Option<String>,
}

impl Last {
    /// Whether that is the end.
    fn is_end(&self) -> bool {
        let kind = self.r#type.as_deref();
        let candidates = self.candidates.as_deref().unwrap_or_default();
        matches!(kind, Some("message_stop" | "response.completed"))
            || self.done == Some(true)
            || self.stop == Some(Value::Bool(true))
            || self.generated_text.as_ref().is_some_and(Value::is_string)
            || candidates.iter().any(|it| it.finish_reason.is_some())
    }
}

/// Whether a text is a JSON document that tells no error.
fn is_sound(text: &str) -> bool {
    let text = text.trim_ascii();
    if text.starts_with('[') {
        // Of embeddings, or of the pieces of an answer.
        let items: Result<Vec<&RawValue>, _> = serde_json::from_str(text);
        let is_sound = |item: &&RawValue| !item.get().starts_with('{') || is_document(item.get());
        return items.is_ok_and(|items| items.iter().all(is_sound));
    }
    text.starts_with('{') && is_document(text)
}

/// Whether an object tells no error.
fn is_document(text: &str) -> bool {
    serde_json::from_str::<Document>(text).is_ok_and(|document| document.error.is_none())
}

/// What the events of a stream hold, one after the other.
fn events(text: &str, kind: Kind) -> impl DoubleEndedIterator<Item = &str> {
    let lines = text.split(['\n', '\r']).map(str::trim_ascii).filter(|line| !line.is_empty());
    lines.filter_map(move |line| match kind {
        Kind::Events => line.strip_prefix("data:").map(str::trim_ascii),
        Kind::Lines | Kind::Json => Some(line),
    })
}

/// Whether a body is all of an answer, as its API ends them, and tells no error.
fn is_whole(kind: Kind, body: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(body) else { return false };
    if kind == Kind::Json {
        return is_sound(text);
    }
    let is_mark = |event: &str| event == "[DONE]";
    let has_end = match events(text, kind).next_back() {
        Some(last) if kind == Kind::Events && is_mark(last) => true,
        Some(last) => serde_json::from_str::<Last>(last).is_ok_and(|last| last.is_end()),
        None => false,
    };
    // Only what speaks of one is read for it.
    let is_bad = |event: &str| {
        memmem::find(event.as_bytes(), b"error").is_some() && !is_mark(event) && !is_sound(event)
    };
    let says_so =
        |line: &str| line.strip_prefix("event:").is_some_and(|name| name.trim_ascii() == "error");
    has_end && !text.split(['\n', '\r']).any(says_so) && !events(text, kind).any(is_bad)
}

/// A time as it is written.
fn millis(at: SystemTime) -> u64 {
    let since_1970 = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX)
}

impl Answer {
    /// An answer with status 200, this content type and body, that took this much; none where it is not whole, or tells
    /// an error.
    #[must_use]
    pub fn new(
        content_type: HeaderValue,
        body: Bytes,
        usage: Usage,
        at: SystemTime,
    ) -> Option<Self> {
        let kind = Kind::of(content_type.as_bytes())?;
        // As it came, it may hold all of the head that it was a part of.
        let content_type = HeaderValue::from_bytes(content_type.as_bytes()).ok()?;
        is_whole(kind, &body).then(|| Self { content_type, kind, body, usage, at: millis(at) })
    }

    /// Its `Content-Type`.
    #[must_use]
    pub fn content_type(&self) -> &HeaderValue {
        &self.content_type
    }

    /// Whether it is a document or a stream.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// All of it.
    #[must_use]
    pub fn body(&self) -> &Bytes {
        &self.body
    }

    /// What it took when a backend gave it.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// How old it is.
    #[must_use]
    pub fn age(&self, now: SystemTime) -> Duration {
        Duration::from_millis(millis(now).saturating_sub(self.at))
    }

    /// What it takes of memory, about, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.body.len() + OVERHEAD_BYTES
    }

    /// As it is written for [`Answer::read`]: compressed, with a checksum, and the key that it is for.
    pub(super) fn write(&self, key: &Key) -> std::io::Result<Vec<u8>> {
        let Usage { input, output, cached, cache_written, reasoning } = self.usage;
        let kind = self.content_type.as_bytes();
        let mut plain = Vec::with_capacity(self.body.len() + kind.len() + 128);
        plain.extend_from_slice(key.bytes());
        for number in [self.at, input, output, cached, cache_written, reasoning, kind.len() as u64]
        {
            plain.extend_from_slice(&number.to_le_bytes());
        }
        plain.extend_from_slice(kind);
        plain.extend_from_slice(&self.body);
        let mut written = vec![FORM];
        written.extend_from_slice(&xxh3_64(&plain).to_le_bytes());
        written.extend_from_slice(&zstd::bulk::compress(&plain, EFFORT)?);
        Ok(written)
    }

    /// Reads what was written for this key; none where that is anything else, damaged, or larger than allowed.
    pub(super) fn read(written: &[u8], key: &Key, bytes_max: usize) -> Option<Self> {
        let (&FORM, rest) = written.split_first()? else { return None };
        let (checksum, packed) = rest.split_first_chunk::<8>()?;
        // Its content type and numbers take little more.
        let plain = zstd::bulk::decompress(packed, bytes_max + 64 * 1024).ok()?;
        if xxh3_64(&plain).to_le_bytes() != *checksum {
            return None;
        }
        let mut rest = plain.strip_prefix(&key.bytes()[..])?;
        let mut numbers = [0; 2 + COUNTS];
        for number in &mut numbers {
            let (bytes, others) = rest.split_first_chunk::<8>()?;
            (*number, rest) = (u64::from_le_bytes(*bytes), others);
        }
        let [at, input, output, cached, cache_written, reasoning, kind_bytes] = numbers;
        let (content_type, body) = rest.split_at_checked(usize::try_from(kind_bytes).ok()?)?;
        let content_type = HeaderValue::from_bytes(content_type).ok()?;
        let kind = Kind::of(content_type.as_bytes())?;
        let body = Bytes::copy_from_slice(body);
        let usage = Usage { input, output, cached, cache_written, reasoning };
        is_whole(kind, &body).then_some(Self { content_type, kind, body, usage, at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::request;

    fn answer(kind: &'static str, body: &str) -> Option<Answer> {
        let body = Bytes::copy_from_slice(body.as_bytes());
        let usage = Usage { input: 7, output: 5, cached: 3, cache_written: 2, reasoning: 1 };
        let at = UNIX_EPOCH + Duration::from_secs(1000);
        Answer::new(HeaderValue::from_static(kind), body, usage, at)
    }

    const SSE: &str = "text/event-stream; charset=utf-8";
    const NDJSON: &str = "application/x-ndjson";
    const JSON: &str = "application/json";

    const CHAT: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"no error\"}}]}\n\ndata: {\"error\":null}\n\n: ping\n\ndata: [DONE]\n\n";
    const MESSAGES: &str = "event: message_start\r\ndata: {\"type\":\"message_start\"}\r\n\r\nevent: message_stop\r\ndata: {\"type\": \"message_stop\"}\r\n\r\n";
    const GEMINI: &str = "data: {\"candidates\":[{\"content\":{}}]}\n\ndata: {\"candidates\":[{\"finishReason\":\"STOP\"}],\"usageMetadata\":{}}\n\n";
    const OLLAMA: &str = "{\"message\":{\"content\":\"a\"},\"done\":false}\n{\"done\":true}\n";
    const RESPONSES: &str = "event: response.created\ndata: {\"type\":\"response.created\",\"error\":null}\n\nevent: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{\"error\":null}}\n\n";

    #[test]
    fn a_whole_answer_is_told_from_any_beginning_of_one() {
        for (kind, body) in [
            (SSE, CHAT),
            (SSE, MESSAGES),
            (SSE, GEMINI),
            (SSE, RESPONSES),
            (NDJSON, OLLAMA),
            (JSON, r#"{"choices":[{"message":{"content":"an error"}}],"error":null}"#),
            (JSON, "[[0.1,0.2]]"),
            (JSON, r#"[{"candidates":[]},{"candidates":[{"finishReason":"STOP"}]}]"#),
            (
                SSE,
                "data: {\"content\":\"a\",\"stop\":false}\n\ndata: {\"content\":\"\",\"stop\":true}\n\n",
            ),
            (
                SSE,
                "data:{\"token\":{},\"generated_text\":null}\n\ndata:{\"token\":{},\"generated_text\":\"a\"}\n\n",
            ),
        ] {
            assert!(answer(kind, body).is_some(), "{body}");
            let end = body.trim_end().len();
            for cut in 0..end {
                assert!(answer(kind, &body[..cut]).is_none(), "{:?}", &body[..cut]);
            }
        }
    }

    #[test]
    fn what_tells_an_error_is_not_kept() {
        for (kind, body) in [
            (JSON, r#"{"error":{"message":"x"}}"#),
            (JSON, r#"{"choices":[],"err\u006fr":"x"}"#),
            (JSON, r#"[{"candidates":[]},{"error":{"code":503}}]"#),
            (JSON, ""),
            (JSON, "\"text\""),
            (JSON, "{}{}"),
            (SSE, "data: {\"error\":{\"message\":\"x\"}}\n\ndata: [DONE]\n\n"),
            (SSE, "event: error\ndata: {}\n\ndata: [DONE]\n\n"),
            (
                SSE,
                "event:error\r\ndata: {}\r\n\r\nevent: message_stop\r\ndata: {\"type\":\"message_stop\"}\r\n\r\n",
            ),
            (SSE, ": [DONE]\n\n"),
            (SSE, "data: {\"content\":\"[DONE]\"}\n\n"),
            (NDJSON, "{\"error\":\"x\"}\n{\"done\":true}\n"),
            (NDJSON, "[DONE]\n"),
            ("audio/mpeg", "{}"),
        ] {
            assert!(answer(kind, body).is_none(), "{body}");
        }
        let no_text = Bytes::from_static(b"{\"a\":\"\xff\"}");
        let json = HeaderValue::from_static(JSON);
        assert!(Answer::new(json, no_text, Usage::default(), UNIX_EPOCH).is_none());
    }

    #[test]
    fn what_is_written_is_read_for_its_key_and_undamaged_only() {
        let [key, other] = ["{}", "{\"a\":1}"].map(|body| {
            let headers = http::HeaderMap::new();
            let asked = request::Asked {
                tenant: "",
                pool: "",
                target: b"/v1/embeddings",
                headers: &headers,
                besides: &[],
                called: "",
                body: body.as_bytes(),
            };
            let caching = crate::config::Caching {
                ttl: Duration::from_secs(1),
                per: crate::config::CachedPer::All,
                requests: crate::config::CachedRequests::All,
                headers: Vec::new(),
            };
            request::key(&asked, &caching).unwrap()
        });
        let answer = answer(SSE, CHAT).unwrap();
        let written = answer.write(&key).unwrap();
        assert_eq!(Answer::read(&written, &key, CHAT.len()).as_ref(), Some(&answer));
        assert_eq!(Answer::read(&written, &other, CHAT.len()), None);
        for cut in 0..written.len() {
            assert_eq!(Answer::read(&written[..cut], &key, CHAT.len()), None);
            let mut damaged = written.clone();
            damaged[cut] ^= 1;
            let read = Answer::read(&damaged, &key, CHAT.len());
            assert!(read.is_none_or(|read| read == answer), "{cut}");
        }
        // What unpacks to more than any answer is none.
        let bomb = zstd::bulk::compress(&vec![0; 10_000_000], 1).unwrap();
        let bomb = [&[FORM][..], &[0; 8], &bomb].concat();
        assert_eq!(Answer::read(&bomb, &key, 1024), None);
        assert_eq!(answer.age(UNIX_EPOCH + Duration::from_millis(1_002_500)).as_millis(), 2500);
        assert_eq!(answer.age(UNIX_EPOCH), Duration::ZERO);
    }
}
