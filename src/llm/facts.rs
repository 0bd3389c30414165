//! What a request says about the answer that it wants: as a stream, how long at most, with usage or without.

use std::ops::Range;

/// What is longer than this and does not begin as prose is no text: an image, a sound, a file in base64.
const WORD_BYTES_MAX: usize = 2048;

/// As much of a text is looked at to tell.
const BEGINNING_BYTES: usize = 256;

/// The longest number that is read.
const NUMBER_BYTES_MAX: usize = 24;

/// What a picture in a text begins with (RFC 2397).
const DATA_URL: &[u8] = b"data:";

/// What a body says besides the model's name. Where it says a thing twice, the last one counts, as in most
/// servers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Whether the answer is to come as a stream; none: it does not say.
    pub stream: Option<bool>,
    /// The most tokens of one answer, by whatever name.
    pub output_tokens_max: Option<u64>,
    /// How many answers it wants; none: one.
    pub answers: Option<u64>,
    /// Bytes of its texts that have ended, without what is no text.
    text_bytes: u64,
    /// How many of its texts are images and the like.
    pub media: u64,
    /// What it says about usage in a stream.
    pub stream_options: StreamOptions,
    wanted: Option<Wanted>,
    /// The object one level below the body that is read.
    scope: Option<Scope>,
    number: Number,
    string: Text,
}

/// The member `stream_options` of a body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// Where it could be put, behind the body's first brace.
    pub place: usize,
    /// Where it is null.
    pub null: Option<Range<usize>>,
    /// Behind its own first brace.
    pub inside: Option<usize>,
    /// Whether it has members.
    has_members: bool,
    /// Where the value of its `include_usage` is.
    include_usage_at: Option<Range<usize>>,
    /// That value, where it is true or false.
    pub include_usage: Option<bool>,
}

/// A number that is read, as it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Number {
    text: [u8; NUMBER_BYTES_MAX],
    bytes: usize,
}

impl Number {
    /// The whole number that it is, or the nearest that there is.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "what is too large or negative becomes the nearest, and there are no parts of tokens"
    )]
    fn value(&self) -> u64 {
        let text = self.text.get(..self.bytes).and_then(|text| std::str::from_utf8(text).ok());
        // One that is longer than any that is meant.
        let Some(text) = text else { return u64::MAX };
        text.parse().unwrap_or_else(|_| text.parse::<f64>().map_or(0, |number| number as u64))
    }
}

/// A text that is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Text {
    /// Whether it goes on.
    is_open: bool,
    bytes: usize,
    /// Whether it is the value of `stream`, which some servers also take as a text.
    is_stream: bool,
    /// Whether it has a space, an escape or what is not ASCII, as text has and base64 has not.
    is_prose: bool,
    /// So many bytes of `data:` it begins with.
    url_bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    StreamOptions,
    /// Where servers of their own have their bounds.
    Bounds,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Stream,
    OutputMax,
    Answers,
    StreamOptions,
    IncludeUsage,
    Bounds,
}

impl Facts {
    /// Bytes of its texts so far, without what is no text.
    #[must_use]
    pub fn text_bytes(&self) -> u64 {
        let Text { bytes, is_open, .. } = self.string;
        let open = if is_open && !self.string.is_media() { bytes as u64 } else { 0 };
        self.text_bytes + open
    }

    /// Whether keys at this depth are of interest.
    pub(super) fn wants_keys(&self, depth: usize) -> bool {
        depth == 1 || depth == 2 && self.scope.is_some()
    }

    /// A key that is of interest was read.
    pub(super) fn key(&mut self, depth: usize, key: &str) {
        self.wanted = match (depth, self.scope, key) {
            (1, _, "stream") => Some(Wanted::Stream),
            (1, _, "stream_options") => Some(Wanted::StreamOptions),
            (1, _, "n" | "best_of") => Some(Wanted::Answers),
            (1, _, "options" | "generationConfig" | "parameters" | "sampling_params") => {
                Some(Wanted::Bounds)
            }
            (1, _, "max_tokens" | "max_completion_tokens" | "max_output_tokens" | "n_predict") => {
                Some(Wanted::OutputMax)
            }
            (2, Some(Scope::Bounds), "num_predict" | "maxOutputTokens" | "max_new_tokens") => {
                Some(Wanted::OutputMax)
            }
            (2, Some(Scope::Bounds), "candidateCount") => Some(Wanted::Answers),
            (2, Some(Scope::StreamOptions), key) => {
                self.stream_options.has_members = true;
                (key == "include_usage").then_some(Wanted::IncludeUsage)
            }
            _ => None,
        };
    }

    /// An object begins; `inside` is where its first member would be.
    pub(super) fn opens(&mut self, depth: usize, inside: usize) {
        match (depth, self.wanted.take()) {
            (1, _) => self.stream_options.place = inside,
            (2, Some(Wanted::StreamOptions)) => {
                self.scope = Some(Scope::StreamOptions);
                let place = self.stream_options.place;
                let inside = Some(inside);
                self.stream_options = StreamOptions { place, inside, ..Default::default() };
            }
            (2, Some(Wanted::Bounds)) => self.scope = Some(Scope::Bounds),
            _ => {}
        }
    }

    /// An object or list has ended, and this is the depth around it.
    pub(super) fn closes(&mut self, depth: usize) {
        if depth < 2 {
            self.scope = None;
        }
        self.wanted = None;
    }

    /// `true`, `false` or `null` begins here.
    pub(super) fn word(&mut self, first: u8, at: usize) {
        let value = match first {
            b't' => Some(true),
            b'f' => Some(false),
            _ => None,
        };
        let length = if first == b'f' { 5 } else { 4 };
        match self.wanted.take() {
            Some(Wanted::Stream) => self.stream = value,
            Some(Wanted::StreamOptions) if value.is_none() => {
                let (place, null) = (self.stream_options.place, Some(at..at + length));
                self.stream_options = StreamOptions { place, null, ..Default::default() };
            }
            Some(Wanted::IncludeUsage) => {
                self.stream_options.include_usage = value;
                self.stream_options.include_usage_at = Some(at..at + length);
            }
            _ => {}
        }
    }

    pub(super) fn number_begins(&mut self) {
        self.number = Number::default();
    }

    /// More of a number, raw.
    pub(super) fn number(&mut self, piece: &[u8]) {
        if self.wanted.is_none() {
            return;
        }
        let Number { text, bytes } = &mut self.number;
        if let Some(room) = text.get_mut(*bytes..bytes.saturating_add(piece.len())) {
            room.copy_from_slice(piece);
        }
        *bytes = bytes.saturating_add(piece.len());
    }

    pub(super) fn number_ends(&mut self) {
        match self.wanted.take() {
            Some(Wanted::OutputMax) => {
                let known = self.output_tokens_max.unwrap_or_default();
                self.output_tokens_max = Some(known.max(self.number.value()));
            }
            Some(Wanted::Answers) => {
                self.answers = Some(self.answers.unwrap_or_default().max(self.number.value()));
            }
            Some(Wanted::Stream) => self.stream = Some(self.number.value() != 0),
            _ => {}
        }
    }

    pub(super) fn text_begins(&mut self) {
        let is_stream = self.wanted.take() == Some(Wanted::Stream);
        self.string = Text { is_open: true, is_stream, ..Text::default() };
    }

    /// More of a text that is a value, raw.
    pub(super) fn text(&mut self, piece: &[u8]) {
        let text = &mut self.string;
        if text.is_stream && text.bytes == 0 && !piece.is_empty() {
            self.stream = Some(matches!(piece[0], b't' | b'T' | b'1' | b'y' | b'Y'));
        }
        if text.bytes == text.url_bytes && text.bytes < DATA_URL.len() {
            let rest = DATA_URL[text.bytes..].iter();
            text.url_bytes += rest.zip(piece).take_while(|(known, byte)| known == byte).count();
        }
        if text.bytes < BEGINNING_BYTES {
            let beginning = &piece[..piece.len().min(BEGINNING_BYTES - text.bytes)];
            text.is_prose |= beginning.iter().any(|byte| matches!(byte, b' ' | b'\\' | 0x80..));
        }
        text.bytes += piece.len();
    }

    pub(super) fn text_ends(&mut self) {
        self.string.is_open = false;
        if self.string.is_media() {
            self.media += 1;
        } else {
            self.text_bytes += self.string.bytes as u64;
        }
    }
}

impl Text {
    /// Whether it is an image or the like.
    fn is_media(&self) -> bool {
        self.url_bytes == DATA_URL.len() || !self.is_prose && self.bytes > WORD_BYTES_MAX
    }
}

impl StreamOptions {
    /// The change to a body that has usage told in its stream; none where it is told anyway.
    #[must_use]
    pub fn including_usage(&self) -> Option<(Range<usize>, Vec<u8>)> {
        const MEMBER: &str = "\"include_usage\":true";
        if self.include_usage == Some(true) {
            return None;
        }
        if let (Some(inside), Some(at)) = (self.inside, &self.include_usage_at) {
            debug_assert!(at.start >= inside);
            return Some((at.clone(), b"true".to_vec()));
        }
        if let Some(inside) = self.inside {
            let comma = if self.has_members { "," } else { "" };
            return Some((inside..inside, format!("{MEMBER}{comma}").into_bytes()));
        }
        if let Some(null) = &self.null {
            return Some((null.clone(), format!("{{{MEMBER}}}").into_bytes()));
        }
        // A body that wants a stream has at least that member.
        let place = self.place..self.place;
        Some((place, format!("\"stream_options\":{{{MEMBER}}},").into_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::super::json::Scanner;
    use super::super::search::Search;
    use super::super::splice::spliced;
    use super::*;

    fn facts(body: &str, piece: usize) -> Facts {
        let mut scanner = Scanner::with_facts(&["model"]);
        for piece in body.as_bytes().chunks(piece) {
            scanner.feed(piece).unwrap();
        }
        scanner.facts().unwrap().clone()
    }

    fn each_way(body: &str, check: impl Fn(&Facts)) {
        for piece in [1, 2, 7, body.len()] {
            check(&facts(body, piece));
        }
    }

    #[test]
    fn each_familys_bounds_are_read() {
        for (body, tokens, answers) in [
            (r#"{"max_tokens":16,"n":2}"#, Some(16), Some(2)),
            (r#"{"max_tokens":16,"max_completion_tokens":32}"#, Some(32), None),
            (r#"{"input":"x","max_output_tokens":100 }"#, Some(100), None),
            (r#"{"generationConfig":{"maxOutputTokens":8,"candidateCount":3}}"#, Some(8), Some(3)),
            (r#"{"options":{"num_predict":-1}}"#, Some(0), None),
            (r#"{"options":{"num_predict":5},"x":1}"#, Some(5), None),
            (r#"{"n_predict":5,"best_of":4}"#, Some(5), Some(4)),
            (
                r#"{"messages":[{"max_tokens":9}],"tools":{"options":{"num_predict":9}}}"#,
                None,
                None,
            ),
            (r#"{"max_tokens":null,"n":"2"}"#, None, None),
            (r#"{"max_tokens":99999999999999999999999}"#, Some(u64::MAX), None),
            (r#"{"max_tokens":1.5e3,"n":2E0}"#, Some(1500), Some(2)),
            (r#"{"max_tokens":1e400,"n":-7}"#, Some(u64::MAX), Some(0)),
            (r#"{"max_tokens":0.000000000000000000000000000001}"#, Some(u64::MAX), None),
        ] {
            each_way(body, |facts| {
                assert_eq!((facts.output_tokens_max, facts.answers), (tokens, answers), "{body}");
            });
        }
    }

    #[test]
    fn only_text_counts_as_text() {
        let image = format!("data:image/png;base64,{}", "QUJD".repeat(100));
        let file = "QUJD".repeat(1000);
        let wide = "模型".repeat(1000);
        let body = json!({"messages": [{"content": "two words"}, image, file, wide]}).to_string();
        each_way(&body, |facts| {
            assert_eq!((facts.text_bytes(), facts.media), (9 + 6000, 2));
        });
        // What has not ended yet counts as far as it came.
        each_way(r#"{"a":"one two","b":"three fou"#, |facts| assert_eq!(facts.text_bytes(), 16));
    }

    #[test]
    fn usage_is_asked_for_wherever_it_was_not() {
        for (body, expected) in [
            (r#"{"stream":true,"stream_options":{"include_usage":true}}"#, None),
            (r#"{"stream":true}"#, Some(json!({"include_usage": true}))),
            (r#"{"stream":true,"stream_options":null}"#, Some(json!({"include_usage": true}))),
            (r#" { "stream_options" : { } ,"stream":true}"#, Some(json!({"include_usage": true}))),
            (
                r#"{"stream_options":{"include_usage": false,"x":{"include_usage":true}}}"#,
                Some(json!({"include_usage": true, "x": {"include_usage": true}})),
            ),
            (
                r#"{"stream_options":{"include_usage":true},"stream_options":{}}"#,
                Some(json!({"include_usage": true})),
            ),
            (
                r#"{"stream_options":{"include_usage":true},"stream_options":null}"#,
                Some(json!({"include_usage": true})),
            ),
            (r#"{"stream_options":{"include_usage":null}}"#, Some(json!({"include_usage": true}))),
            (
                r#"{"stream_options":{"x":[1]},"a":{"stream_options":{}}}"#,
                Some(json!({"include_usage": true, "x": [1]})),
            ),
        ] {
            each_way(body, |facts| {
                let edit = facts.stream_options.including_usage();
                let options = edit.map(|(at, text)| {
                    let new = spliced(body.as_bytes(), at, &text);
                    let new: Value = serde_json::from_slice(&new).unwrap();
                    new["stream_options"].clone()
                });
                assert_eq!(options, expected, "{body}");
            });
        }
    }

    #[test]
    fn a_stream_is_told_from_none() {
        each_way(r#"{"stream":true,"a":{"stream":false}}"#, |it| assert_eq!(it.stream, Some(true)));
        each_way(r#"{"stream":false}"#, |it| assert_eq!(it.stream, Some(false)));
        // Some servers take these, too.
        each_way(r#"{"stream":"true"}"#, |it| assert_eq!(it.stream, Some(true)));
        each_way(r#"{"stream":1}"#, |it| assert_eq!(it.stream, Some(true)));
        each_way(r#"{"stream":0,"a":"true"}"#, |it| assert_eq!(it.stream, Some(false)));
        each_way(r#"{"stream":null}"#, |it| assert_eq!(it.stream, None));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn nothing_but_the_option_changes(
            others in prop::collection::btree_map("[a-j]{1,4}", "\\PC{0,9}", 0..4),
            options in prop_oneof![
                Just(None),
                Just(Some(Value::Null)),
                prop::collection::btree_map(
                    prop_oneof![Just("include_usage".to_owned()), "[a-c]".prop_map(|key| key)],
                    any::<bool>(),
                    0..3,
                ).prop_map(|it| Some(json!(it))),
            ],
            first: bool,
        ) {
            let mut body = serde_json::Map::new();
            let put = |body: &mut serde_json::Map<String, Value>| {
                if let Some(options) = &options {
                    body.insert("stream_options".to_owned(), options.clone());
                }
            };
            if first { put(&mut body); }
            body.extend(others.into_iter().map(|(key, text)| (key, Value::from(text))));
            body.insert("stream".to_owned(), true.into());
            if !first { put(&mut body); }
            let text = Value::Object(body.clone()).to_string();
            let edit = facts(&text, 5).stream_options.including_usage();
            let text = match edit {
                Some((at, new)) => String::from_utf8(spliced(text.as_bytes(), at, &new)).unwrap(),
                None => text,
            };
            let mut options = body.get("stream_options").cloned().unwrap_or_default();
            if !options.is_object() { options = json!({}); }
            options["include_usage"] = true.into();
            body.insert("stream_options".to_owned(), options);
            let read: Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(read, Value::Object(body));
        }
    }
}
