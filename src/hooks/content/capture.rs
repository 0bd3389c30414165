//! What models were asked and what they said, for the request log: only where the configuration says so, and without what
//! it has taken out.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_ENCODING, CONTENT_TYPE};

use super::super::{
    AnswerBody, AnswerHead, At, Cut, Found, OnAnswerBody, OnRequestBody, RequestBody, Stop,
};
use super::frames::Frames;
use super::guard::Guard;
use super::texts;
use crate::llm::Kind;
use crate::names::NameList;

/// What a line calls what was asked, and what was said.
const PROMPT: &str = "prompt";
const ANSWER: &str = "answer";

/// As much of a document is held until its texts are read, in bytes: there is more in it than those.
const DOCUMENT_BYTES_MAX: usize = 1024 * 1024;

/// The most texts of one stream that are kept.
const TEXTS_MAX: usize = 256;

/// Longer than what is looked for, as a rule.
const BEHIND_BYTES: usize = 1024;

/// What is kept, and of whom.
pub struct CaptureSpec {
    /// Keys, by name or id.
    pub keys: NameList,
    /// Whether what was asked is kept.
    pub prompt: bool,
    /// Whether what was said is.
    pub answer: bool,
    /// The most of either, in bytes.
    pub bytes_max: usize,
    /// What is taken out.
    pub without: Guard,
}

/// Keeps it.
#[derive(Clone)]
pub struct Capture(Arc<CaptureSpec>);

impl Capture {
    /// Of these.
    #[must_use]
    pub fn new(spec: CaptureSpec) -> Self {
        Self(Arc::new(spec))
    }

    /// When it acts.
    #[must_use]
    pub fn moments(self) -> Vec<At> {
        let prompt = self.0.prompt.then(|| At::RequestBody(Box::new(self.clone())));
        let answer = self.0.answer.then(|| At::AnswerBody(Box::new(self)));
        prompt.into_iter().chain(answer).collect()
    }
}

impl CaptureSpec {
    /// As much is kept until it is redacted: what begins before the end may end behind it.
    fn room(&self) -> usize {
        self.bytes_max.saturating_add(BEHIND_BYTES)
    }

    fn is_of(&self, key_id: &str, key_name: &str) -> bool {
        self.keys.holds(key_id) || self.keys.holds(key_name)
    }

    /// The texts of a document, one a line, without what is taken out, and no more than is kept.
    fn texts(&self, document: &[u8]) -> String {
        let mut all = String::new();
        let mut add = |text: &str| {
            if !all.is_empty() && all.len() < self.bytes_max {
                all.push('\n');
            }
            push(&mut all, &self.without.redacted(text), self.bytes_max);
        };
        // Of a document that is cut, the texts before that.
        let is_json = matches!(document.trim_ascii_start().first(), Some(b'{' | b'['));
        if texts::each(document, &mut |_, text| add(text)).is_err() && !is_json {
            all.clear();
            push(
                &mut all,
                &self.without.redacted(&String::from_utf8_lossy(document)),
                self.bytes_max,
            );
        }
        all
    }
}

/// Adds as much of a text as fits.
fn push(all: &mut String, text: &str, bytes_max: usize) {
    let room = bytes_max.saturating_sub(all.len());
    let mut end = room.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    all.push_str(&text[..end]);
}

impl OnRequestBody for Capture {
    fn request_body(&self, body: &mut RequestBody<'_>) -> Result<(), Stop> {
        let request = body.request;
        if !body.bytes.is_empty() && self.0.is_of(request.key_id, request.key_name) {
            body.notes.push((PROMPT, self.0.texts(body.bytes)));
        }
        Ok(())
    }
}

impl OnAnswerBody for Capture {
    fn begin(&self, head: &AnswerHead<'_>) -> Option<Box<dyn AnswerBody>> {
        let is_of = self.0.is_of(head.request.key_id, head.request.key_name);
        // What is compressed cannot be read; it passes all the same.
        if !is_of || head.headers.contains_key(CONTENT_ENCODING) {
            return None;
        }
        let kind = head.headers.get(CONTENT_TYPE).map(|kind| kind.as_bytes()).unwrap_or_default();
        let frames = match Kind::of(kind)? {
            Kind::Json => None,
            kind @ (Kind::Events | Kind::Lines) => Some(Frames::new(kind == Kind::Lines)),
        };
        let (spec, held) = (Arc::clone(&self.0), BytesMut::new());
        Some(Box::new(Kept { spec, frames, held, texts: Vec::new(), bytes: 0 }))
    }
}

/// An answer that passes, and is kept.
struct Kept {
    spec: Arc<CaptureSpec>,
    /// Of a stream; none: a document.
    frames: Option<Frames>,
    held: BytesMut,
    /// The texts of a stream, by the ways to them.
    texts: Vec<(String, String)>,
    bytes: usize,
}

impl Kept {
    fn take(&mut self, data: &[u8]) {
        let (texts, bytes) = (&mut self.texts, &mut self.bytes);
        let bytes_max = self.spec.room();
        // What is no JSON is the end of a stream.
        let _ = texts::each(data, &mut |way, text| {
            if *bytes >= bytes_max || text.is_empty() || texts.len() > TEXTS_MAX {
                return;
            }
            *bytes += text.len();
            match texts.iter_mut().find(|(known, _)| known == way) {
                Some((_, known)) => known.push_str(text),
                None => texts.push((way.to_owned(), text.to_owned())),
            }
        });
    }
}

impl AnswerBody for Kept {
    fn pass(&mut self, piece: &mut Option<Bytes>, is_end: bool) -> Result<(), Cut> {
        let Some(mut frames) = self.frames.take() else {
            if let Some(piece) = piece {
                let room = DOCUMENT_BYTES_MAX.max(self.spec.bytes_max) - self.held.len();
                self.held.extend_from_slice(&piece[..piece.len().min(room)]);
            }
            return Ok(());
        };
        if self.bytes < self.spec.room() && frames.waiting() <= self.spec.bytes_max {
            frames.push(piece.as_deref().unwrap_or_default());
            while let Some(event) = frames.next() {
                self.take(&frames.data(&event));
            }
            if is_end && let Some(rest) = frames.rest() {
                self.take(&frames.data(&rest));
            }
        }
        self.frames = Some(frames);
        Ok(())
    }

    fn found(&self) -> Found {
        Found::default()
    }

    fn note(&mut self) -> Option<(&'static str, String)> {
        if self.frames.is_none() {
            return Some((ANSWER, self.spec.texts(&self.held)));
        }
        let mut all = String::new();
        for (_, text) in &self.texts {
            if !all.is_empty() {
                all.push('\n');
            }
            push(&mut all, &self.spec.without.redacted(text), self.spec.bytes_max);
        }
        Some((ANSWER, all))
    }
}
