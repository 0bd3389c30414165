//! Which requests may be answered by an answer that is kept, and when two of them are the same.

use std::borrow::Cow;

use http::header::{ACCEPT, COOKIE};
use http::{HeaderMap, HeaderName};
use ring::digest::{Context, SHA256};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::config::{CachedRequests, Caching};
use crate::llm;

/// The largest body that is looked at, in bytes: a prompt of a million words.
const REQUEST_BYTES_MAX: usize = 8 * 1024 * 1024;

/// How deep objects and lists may be in each other: that of tools' schemas is 20.
const DEPTH_MAX: usize = 64;

/// So many times the bytes of a body are put in another order at most, as it takes where unsorted objects are in each
/// other.
const SORTED_TIMES: usize = 16;

/// Headers of the known APIs that make another request of one begin so.
const PREFIXES: [&str; 2] = ["anthropic-", "openai-"];

/// What tells requests apart: the same for two of them that have to be answered alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    pub(super) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// What of a request its answer depends on.
pub struct Asked<'a> {
    /// Whose answers these are; empty: of all.
    pub tenant: &'a str,
    /// `service/model`.
    pub pool: &'a str,
    /// Path and query, as a backend gets them.
    pub target: &'a [u8],
    /// The client's.
    pub headers: &'a HeaderMap,
    /// Those that count besides: credentials, where backends get the client's own.
    pub besides: &'a [HeaderName],
    /// What the client calls the model, where it has told; a backend may be told so.
    pub called: &'a str,
    /// All of it, not compressed.
    pub body: &'a [u8],
}

/// Parts of a body that say whether its answer may be kept. A name that stands twice is an error.
#[derive(Deserialize)]
struct Parts<'a> {
    #[serde(borrow, default)]
    temperature: Option<&'a RawValue>,
    #[serde(borrow, default, alias = "generation_config", rename = "generationConfig")]
    generation_config: Option<Sampling<'a>>,
    #[serde(borrow, default)]
    options: Option<Sampling<'a>>,
    #[serde(borrow, default)]
    parameters: Option<Sampling<'a>>,
    #[serde(borrow, default)]
    store: Option<&'a RawValue>,
    #[serde(borrow, default)]
    previous_response_id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    conversation: Option<&'a RawValue>,
    #[serde(borrow, default)]
    background: Option<&'a RawValue>,
    #[serde(borrow, default)]
    container: Option<&'a RawValue>,
}

/// Where servers of their own have their parameters.
#[derive(Deserialize)]
struct Sampling<'a> {
    #[serde(borrow, default)]
    temperature: Option<&'a RawValue>,
}

impl Parts<'_> {
    /// Whether the most likely answer is asked for, wherever it says so.
    fn is_coldest(&self) -> bool {
        let nested = [&self.generation_config, &self.options, &self.parameters];
        let nested = nested.into_iter().filter_map(|it| it.as_ref()?.temperature);
        let mut all = self.temperature.into_iter().chain(nested).peekable();
        let is_zero = |number: &RawValue| number.get().parse::<f64>().is_ok_and(|it| it == 0.0);
        all.peek().is_some() && all.all(is_zero)
    }

    /// Whether the backend keeps something for it, or goes on with what it has kept.
    fn has_memory(&self, path: &[u8]) -> bool {
        let is_said =
            |part: Option<&RawValue>| part.is_some_and(|it| !matches!(it.get(), "null" | "false"));
        let parts = [self.previous_response_id, self.conversation, self.background, self.container];
        // This API keeps its answers unless it is told not to.
        let is_kept = llm::operation(path) == b"responses" && self.store.is_none();
        is_kept || is_said(self.store) || parts.into_iter().any(is_said)
    }
}

/// The path of a target, without its query.
fn path(target: &[u8]) -> &[u8] {
    target.split(|byte| *byte == b'?').next().unwrap_or_default()
}

/// Whether requests for this target may be answered so at all, as far as it tells.
#[must_use]
pub fn may_be_kept(target: &[u8]) -> bool {
    let path = path(target);
    llm::generates(path) || llm::measures(path)
}

/// The key of a request that may be answered by an answer that is kept; none: it may not.
#[must_use]
pub fn key(asked: &Asked<'_>, caching: &Caching) -> Option<Key> {
    let path = path(asked.target);
    if asked.body.len() > REQUEST_BYTES_MAX || !may_be_kept(path) {
        return None;
    }
    let text = std::str::from_utf8(asked.body).ok()?;
    if !text.trim_ascii_start().starts_with('{') {
        return None;
    }
    // Reading it checks all of it: from here on it is JSON.
    let parts: Parts<'_> = serde_json::from_str(text).ok()?;
    let is_fixed = llm::measures(path) || parts.is_coldest();
    if parts.has_memory(path) || caching.requests == CachedRequests::Deterministic && !is_fixed {
        return None;
    }
    let mut plain = Vec::with_capacity(text.len() + 256);
    let [tenant, pool, called] = [asked.tenant, asked.pool, asked.called].map(str::as_bytes);
    for part in [tenant, pool, called, asked.target] {
        push(&mut plain, part);
    }
    push_headers(&mut plain, asked, caching);
    let sortable = SORTED_TIMES * text.len();
    Canonical { text, at: 0, plain: &mut plain, sortable }.value(0)?;
    let mut digest = Context::new(&SHA256);
    digest.update(&plain);
    Some(Key(digest.finish().as_ref().try_into().ok()?))
}

/// Adds a part in such a way that its end is clear.
fn push(plain: &mut Vec<u8>, part: &[u8]) {
    plain.extend_from_slice(&(part.len() as u64).to_le_bytes());
    plain.extend_from_slice(part);
}

fn push_headers(plain: &mut Vec<u8>, asked: &Asked<'_>, caching: &Caching) {
    let counts = |name: &HeaderName| {
        // Some servers take one for the other.
        let name = &name.as_str().replace('_', "-");
        let is_one = |known: &HeaderName| known.as_str() == name;
        [ACCEPT, COOKIE].iter().any(is_one)
            || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
            || caching.headers.iter().any(is_one)
            || asked.besides.iter().any(is_one)
    };
    let headers = asked.headers.iter().filter(|(name, _)| counts(name));
    let mut headers: Vec<_> =
        headers.map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
    // Values of one name keep their order.
    headers.sort_by_key(|(name, _)| *name);
    plain.extend_from_slice(&(headers.len() as u64).to_le_bytes());
    for (name, value) in headers {
        push(plain, name.as_bytes());
        push(plain, value);
    }
}

/// Writes JSON so that two texts become the same if they say the same: members sorted by their names, strings without
/// escapes. Numbers stay as they are written.
struct Canonical<'a, 'p> {
    /// JSON.
    text: &'a str,
    at: usize,
    plain: &'p mut Vec<u8>,
    /// So many bytes may be put in another order yet.
    sortable: usize,
}

impl<'a> Canonical<'a, '_> {
    /// None: it is not clear what it says, or it is too deep.
    fn value(&mut self, depth: usize) -> Option<()> {
        if depth > DEPTH_MAX {
            return None;
        }
        match self.next()? {
            b'{' => self.object(depth),
            b'[' => self.list(depth),
            b'"' => {
                let string = self.string()?;
                self.plain.push(b's');
                push(self.plain, string.as_bytes());
                Some(())
            }
            _ => {
                let rest = &self.text[self.at..];
                let end =
                    rest.find(|it: char| matches!(it, ',' | ']' | '}') || it.is_ascii_whitespace());
                let word = &rest[..end.unwrap_or(rest.len())];
                self.at += word.len();
                self.plain.push(b'w');
                push(self.plain, word.as_bytes());
                Some(())
            }
        }
    }

    /// The next byte that is not space.
    fn next(&mut self) -> Option<u8> {
        let bytes = self.text.as_bytes();
        while bytes.get(self.at)?.is_ascii_whitespace() {
            self.at += 1;
        }
        bytes.get(self.at).copied()
    }

    fn list(&mut self, depth: usize) -> Option<()> {
        self.plain.push(b'[');
        self.at += 1;
        while self.next()? != b']' {
            if self.next()? == b',' {
                self.at += 1;
            }
            self.value(depth + 1)?;
        }
        self.at += 1;
        self.plain.push(b']');
        Some(())
    }

    fn object(&mut self, depth: usize) -> Option<()> {
        self.plain.push(b'{');
        self.at += 1;
        let begin = self.plain.len();
        let mut members: Vec<(Cow<'a, str>, std::ops::Range<usize>)> = Vec::new();
        while self.next()? != b'}' {
            if self.next()? == b',' {
                self.at += 1;
                self.next()?;
            }
            let start = self.plain.len();
            let name = self.string()?;
            push(self.plain, name.as_bytes());
            self.next()?;
            // The colon.
            self.at += 1;
            self.value(depth + 1)?;
            members.push((name, start..self.plain.len()));
        }
        self.at += 1;
        if !members.is_sorted_by(|one, other| one.0 < other.0) {
            members.sort_by(|one, other| one.0.cmp(&other.0));
            if members.windows(2).any(|pair| pair[0].0 == pair[1].0) {
                return None;
            }
            self.sortable = self.sortable.checked_sub(self.plain.len() - begin)?;
            let mut sorted = Vec::with_capacity(self.plain.len() - begin);
            for (_, range) in members {
                sorted.extend_from_slice(&self.plain[range]);
            }
            self.plain.truncate(begin);
            self.plain.extend_from_slice(&sorted);
        }
        self.plain.push(b'}');
        Some(())
    }

    /// The string that begins here.
    fn string(&mut self) -> Option<Cow<'a, str>> {
        let text = self.text;
        let bytes = text.as_bytes();
        let begin = self.at;
        let mut at = begin + 1;
        let mut is_plain = true;
        loop {
            at += memchr::memchr2(b'"', b'\\', bytes.get(at..)?)?;
            if bytes[at] == b'"' {
                break;
            }
            is_plain = false;
            at += 2;
        }
        self.at = at + 1;
        if is_plain {
            return Some(Cow::Borrowed(&text[begin + 1..at]));
        }
        serde_json::from_str(&text[begin..=at]).ok().map(Cow::Owned)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::header::AUTHORIZATION;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::config::CachedPer;

    const CHAT: &[u8] = b"/v1/chat/completions";

    fn caching(requests: CachedRequests) -> Caching {
        let ttl = Duration::from_secs(1);
        Caching { ttl, per: CachedPer::Key, requests, headers: vec!["x-mine".parse().unwrap()] }
    }

    fn of(target: &[u8], body: &str) -> Option<Key> {
        with(target, body, &HeaderMap::new(), CachedRequests::All)
    }

    fn with(
        target: &[u8],
        body: &str,
        headers: &HeaderMap,
        requests: CachedRequests,
    ) -> Option<Key> {
        let (tenant, pool, body) = ("a", "s/m", body.as_bytes());
        let asked = Asked { tenant, pool, target, headers, besides: &[], called: "", body };
        key(&asked, &caching(requests))
    }

    #[test]
    fn the_same_in_other_words_is_the_same() {
        let one =
            of(CHAT, r#"{"model":"m","messages":[{"role":"user","content":"h\u00e9 \/"}],"n":1}"#);
        let same = "{ \"n\" : 1, \"messages\":[ {\"content\":\"hé /\",\n\"role\":\"user\"} ], \"model\":\"m\"}\n";
        assert!(one.is_some());
        assert_eq!(one, of(CHAT, same));
        for other in [
            r#"{"model":"m","messages":[{"role":"user","content":"hé  /"}],"n":1}"#,
            r#"{"model":"m","messages":[{"role":"user","content":"hé /"}],"n":"1"}"#,
            r#"{"model":"m","messages":[{"role":"user","content":"hé /"}],"n":1,"x":null}"#,
            r#"{"model":"m","messages":{"role":"user","content":"hé /"},"n":1}"#,
            // Numbers that are one and the same to some readers.
            r#"{"model":"m","messages":[{"role":"user","content":"hé /"}],"n":1.0}"#,
        ] {
            assert_ne!(one, of(CHAT, other), "{other}");
        }
        let [a, b] = ["18446744073709551616", "18446744073709551617"]
            .map(|seed| of(CHAT, &format!("{{\"seed\":{seed}}}")));
        assert_ne!(a, b);
    }

    #[test]
    fn what_is_unclear_has_no_key() {
        for body in [
            r#"{"a":1,"a":2}"#,
            r#"{"a":1,"\u0061":1}"#,
            r#"{"x":{"a":1,"b":2,"a":1}}"#,
            r#"{"temperature":0,"temperature":0}"#,
            r#"{"a":"\ud800"}"#,
            r#"{"a":1"#,
            r#"{"a":1} x"#,
            "[1]",
            "",
            "null",
        ] {
            assert_eq!(of(CHAT, body), None, "{body}");
        }
        assert_eq!(of(CHAT, &format!("{{\"a\":{}}}", "[".repeat(100_000))), None);
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100), "]".repeat(100));
        assert_eq!(of(CHAT, &deep), None);
        assert_eq!(of(b"/v1/files", "{}"), None);
        // A small one that would take long.
        let nested = |levels: usize| {
            let inner = format!("[{}1]", "1,".repeat(10_000));
            (0..levels).fold(inner, |inner, _| format!("{{\"b\":{inner},\"a\":0}}"))
        };
        assert!(of(CHAT, &nested(2)).is_some());
        assert_eq!(of(CHAT, &nested(60)), None);
    }

    #[test]
    fn what_has_to_be_the_same_each_time_is_told_from_the_rest() {
        let is_kept = |target: &str, body: &str| {
            let requests = CachedRequests::Deterministic;
            with(target.as_bytes(), body, &HeaderMap::new(), requests).is_some()
        };
        let chat = "/v1/chat/completions";
        for (target, body, expected) in [
            (chat, r#"{"temperature":0}"#, true),
            (chat, r#"{"temperature":0.0}"#, true),
            (chat, r#"{"temperature":-0e5}"#, true),
            (chat, r#"{"temperature":1e-9}"#, false),
            (chat, r#"{"temperature":"0"}"#, false),
            (chat, r#"{"temperature":null}"#, false),
            (chat, r#"{}"#, false),
            (chat, r#"{"seed":1}"#, false),
            ("/v1/embeddings", r#"{"input":"a"}"#, true),
            ("/v1/models/a:generateContent", r#"{"generationConfig":{"temperature":0}}"#, true),
            ("/v1/models/a:generateContent", r#"{"generation_config":{"temperature":0}}"#, true),
            (
                "/v1/models/a:generateContent?alt=sse",
                r#"{"generationConfig":{"temperature":1}}"#,
                false,
            ),
            ("/api/chat", r#"{"options":{"temperature":0}}"#, true),
            ("/api/chat", r#"{"temperature":0,"options":{"temperature":1}}"#, false),
            (chat, r#"{"temperature":0,"store":true}"#, false),
            (chat, r#"{"temperature":0,"store":false}"#, true),
            ("/v1/responses", r#"{"temperature":0}"#, false),
            ("/v1/responses", r#"{"temperature":0,"store":false}"#, true),
            (
                "/v1/responses",
                r#"{"temperature":0,"store":false,"previous_response_id":"r"}"#,
                false,
            ),
        ] {
            assert_eq!(is_kept(target, body), expected, "{target} {body}");
        }
    }

    #[test]
    fn headers_that_change_the_answer_are_of_the_key() {
        let plain = of(CHAT, "{}");
        for (name, value, is_other) in [
            ("anthropic-beta", "a", true),
            ("openai-organization", "a", true),
            ("accept", "text/event-stream", true),
            ("x-mine", "a", true),
            ("user-agent", "a", false),
            ("authorization", "Bearer a", false),
            ("cookie", "a=b", true),
            ("openai_organization", "a", true),
        ] {
            let name: HeaderName = name.parse().unwrap();
            let headers = HeaderMap::from_iter([(name, value.parse().unwrap())]);
            let key = with(CHAT, "{}", &headers, CachedRequests::All);
            assert_eq!(key != plain, is_other, "{headers:?}");
            let (tenant, pool, body) = ("a", "s/m", &b"{}"[..]);
            let asked = Asked {
                tenant,
                pool,
                target: CHAT,
                headers: &headers,
                besides: &[AUTHORIZATION],
                called: "",
                body,
            };
            let is_credential = headers.contains_key("authorization");
            let key = super::key(&asked, &caching(CachedRequests::All));
            assert_eq!(key != plain, is_other || is_credential, "{headers:?}");
        }
    }

    /// Any JSON.
    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "\\PC{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::vec(("[a-c\\\\\"é]{0,3}", inner), 0..6).prop_map(|members| {
                    members.into_iter().collect::<serde_json::Map<_, _>>().into()
                }),
            ]
        })
    }

    /// The same, with members in another order and letters escaped.
    fn reworded(value: &Value, text: &mut String) {
        let string = |string: &str, text: &mut String| {
            text.push('"');
            for unit in string.encode_utf16() {
                text.push_str(&format!("\\u{unit:04x}"));
            }
            text.push('"');
        };
        match value {
            Value::Object(members) => {
                text.push_str("{ ");
                for (at, (name, value)) in members.iter().rev().enumerate() {
                    text.push_str(if at > 0 { " ,\n" } else { "" });
                    string(name, text);
                    text.push_str("\t: ");
                    reworded(value, text);
                }
                text.push('}');
            }
            Value::Array(items) => {
                text.push('[');
                for (at, item) in items.iter().enumerate() {
                    text.push_str(if at > 0 { ", " } else { " " });
                    reworded(item, text);
                }
                text.push(']');
            }
            Value::String(own) => string(own, text),
            other => text.push_str(&other.to_string()),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn keys_are_the_same_if_and_only_if_the_bodies_say_the_same(
            one in any_json(), other in any_json(),
        ) {
            // Objects are the same in any order of their members.
            let [one, other] = [one, other].map(|value| json!({"x": value}));
            let mut text = String::new();
            reworded(&one, &mut text);
            prop_assert!(of(CHAT, &text).is_some());
            prop_assert_eq!(of(CHAT, &one.to_string()), of(CHAT, &text));
            let is_same = of(CHAT, &one.to_string()) == of(CHAT, &other.to_string());
            prop_assert_eq!(is_same, one == other);
        }
    }
}
