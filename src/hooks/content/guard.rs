//! Texts that may not pass: words and patterns in what models are asked and what they say.
//!
//! Of a request, and of an answer that is one document, all texts are looked at before anything of it goes on. A stream
//! is looked at event by event: an event goes on when nothing that begins in it can still become something that may not
//! pass, which the events behind it show. So what is looked for is found wherever a stream is cut, and nothing of it
//! has been sent by then.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde_json::Value;

use super::super::{
    AnswerBody, AnswerHead, At, Cut, Found, OnAnswerBody, OnRequestBody, RequestBody, Stop,
};
use super::matcher::Matcher;
use super::stream::Stream;
use super::texts;
use crate::llm::{self, Kind};

/// The code of what is refused.
const CONTENT_FILTER: &str = "content_filter";

/// What a client is told whose request is refused.
const REFUSED: &str = "the request has content that is not allowed here";

/// What a client is told whose answer is cut.
pub(super) const CUT: &str = "the answer has content that is not allowed here";

/// What is done where something is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The request is refused; a stream is cut, and another answer has no text.
    Refuse,
    /// Another text takes its place.
    Redact,
    /// It is counted.
    Count,
}

/// What is looked for, where, and what is done then.
pub struct GuardSpec {
    /// Words, found in any case and width, also within others.
    pub words: Vec<String>,
    /// Regular expressions, in any case and width.
    pub patterns: Vec<String>,
    /// Whether requests are looked at.
    pub requests: bool,
    /// Whether answers are.
    pub answers: bool,
    /// What is done.
    pub action: Action,
    /// What takes the place of what is redacted.
    pub replacement: String,
    /// Letters of a stream that are held back for the sake of patterns: longer ones may be seen too late.
    pub hold_back: usize,
    /// Largest answer that is held as a whole, and largest event of a stream, in bytes.
    pub answer_bytes_max: usize,
}

/// A guard.
#[derive(Clone)]
pub struct Guard(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) matcher: Matcher,
    pub(super) requests: bool,
    pub(super) answers: bool,
    pub(super) action: Action,
    pub(super) replacement: String,
    pub(super) hold_back: usize,
    pub(super) answer_bytes_max: usize,
}

impl Guard {
    /// Makes one.
    ///
    /// # Errors
    /// The pattern that is none (by its number), and why; or none, when the words are too many.
    pub fn new(spec: GuardSpec) -> Result<Self, (Option<usize>, String)> {
        let matcher = Matcher::new(&spec.words, &spec.patterns)?;
        let of_patterns = if matcher.has_patterns() { spec.hold_back } else { 0 };
        Ok(Self(Arc::new(Inner {
            // A word is seen with its last letter.
            hold_back: of_patterns.max(matcher.longest().saturating_sub(1)),
            matcher,
            requests: spec.requests,
            answers: spec.answers,
            action: spec.action,
            replacement: spec.replacement,
            answer_bytes_max: spec.answer_bytes_max,
        })))
    }

    /// A text without what was found in it.
    pub(super) fn redacted(&self, text: &str) -> String {
        self.0.redacted(text)
    }

    /// When it acts.
    #[must_use]
    pub fn moments(self) -> Vec<At> {
        let request = self.0.requests.then(|| At::RequestBody(Box::new(self.clone())));
        let answer = self.0.answers.then(|| At::AnswerBody(Box::new(self)));
        request.into_iter().chain(answer).collect()
    }
}

impl Inner {
    /// Whether anything is in a document.
    fn is_in(&self, document: &[u8]) -> serde_json::Result<bool> {
        let mut is_in = false;
        texts::each(document, &mut |_, text| is_in = is_in || self.matcher.is_in(text))?;
        Ok(is_in)
    }

    /// A text without what was found in it.
    pub(super) fn redacted(&self, text: &str) -> String {
        let mut next = String::with_capacity(text.len());
        let mut from = 0;
        for range in self.matcher.find(text) {
            next.push_str(&text[from..range.start]);
            next.push_str(&self.replacement);
            from = range.end;
        }
        next.push_str(&text[from..]);
        next
    }

    /// A document without what was found in its texts.
    fn redact(&self, document: &[u8]) -> serde_json::Result<Bytes> {
        let mut document: Value = serde_json::from_slice(document)?;
        texts::change(&mut document, &mut |text| *text = self.redacted(text));
        Ok(document.to_string().into())
    }
}

/// A document without any text, which says that there is none because of what it was.
fn emptied(document: &[u8]) -> serde_json::Result<Bytes> {
    fn mark(document: &mut Value) {
        match document {
            Value::Array(list) => list.iter_mut().for_each(mark),
            Value::Object(members) => {
                for (name, value) in members {
                    match name.as_str() {
                        "finish_reason" => *value = CONTENT_FILTER.into(),
                        "stop_reason" => *value = "refusal".into(),
                        "finishReason" => *value = "SAFETY".into(),
                        _ => mark(value),
                    }
                }
            }
            _ => {}
        }
    }
    let mut document: Value = serde_json::from_slice(document)?;
    texts::change(&mut document, &mut String::clear);
    mark(&mut document);
    Ok(document.to_string().into())
}

impl OnRequestBody for Guard {
    fn request_body(&self, body: &mut RequestBody<'_>) -> Result<(), Stop> {
        let own = &self.0;
        let kind = body.headers.get(CONTENT_TYPE).map(|kind| kind.as_bytes()).unwrap_or_default();
        if body.bytes.is_empty() {
            return Ok(());
        }
        let refuse = |code, message: &str| {
            let status = StatusCode::BAD_REQUEST;
            Err(Stop::Refuse { status, code, message: message.to_owned() })
        };
        // A form holds a file, and texts beside it: all that is text in it is one.
        // What says that it is a form and is none may be read as JSON all the same.
        let is_form = llm::is_form(kind) && body.bytes.starts_with(b"--");
        let is_in = if is_form {
            Ok(own.matcher.is_in(&String::from_utf8_lossy(body.bytes)))
        } else {
            own.is_in(body.bytes)
        };
        let Ok(is_in) = is_in else {
            return refuse("invalid_body", "the body is not JSON, or it is not complete");
        };
        if !is_in {
            return Ok(());
        }
        *body.found = true;
        match own.action {
            Action::Refuse => refuse(CONTENT_FILTER, REFUSED),
            // What cannot be taken out of a form does not pass.
            Action::Redact if is_form => refuse(CONTENT_FILTER, REFUSED),
            Action::Redact => match own.redact(body.bytes) {
                Ok(next) if !own.is_in(&next).unwrap_or(true) => {
                    *body.bytes = next;
                    Ok(())
                }
                // It is in a name, or in what takes its place.
                _ => refuse(CONTENT_FILTER, REFUSED),
            },
            Action::Count => Ok(()),
        }
    }
}

impl OnAnswerBody for Guard {
    fn begin(&self, head: &AnswerHead<'_>) -> Option<Box<dyn AnswerBody>> {
        let kind = head.headers.get(CONTENT_TYPE).map(|kind| kind.as_bytes()).unwrap_or_default();
        match form(kind)? {
            Kind::Json => Some(Box::new(Document {
                guard: self.clone(),
                held: BytesMut::new(),
                found: false,
            })),
            kind @ (Kind::Events | Kind::Lines) => {
                Some(Box::new(Stream::new(self.clone(), kind == Kind::Lines)))
            }
        }
    }
}

/// How an answer of this type is read; none: it has no text.
fn form(kind: &[u8]) -> Option<Kind> {
    const BINARY: [&[u8]; 6] = [
        b"audio/",
        b"image/",
        b"video/",
        b"application/octet-stream",
        b"application/pdf",
        b"application/zip",
    ];
    if let Some(known) = Kind::of(kind) {
        return Some(known);
    }
    let kind = kind.trim_ascii().to_ascii_lowercase();
    if kind.windows(5).any(|window| window == b"jsonl") {
        return Some(Kind::Lines);
    }
    // Whatever else it is, it is one text.
    (!BINARY.iter().any(|binary| kind.starts_with(binary))).then_some(Kind::Json)
}

/// An answer that is one document: it is held until its end.
struct Document {
    guard: Guard,
    held: BytesMut,
    found: bool,
}

impl AnswerBody for Document {
    fn pass(&mut self, piece: &mut Option<Bytes>, is_end: bool) -> Result<(), Cut> {
        let own = &self.guard.0;
        if let Some(piece) = piece.take() {
            if self.held.len() + piece.len() > own.answer_bytes_max {
                return Err(cut("the answer is larger than is looked at here"));
            }
            self.held.extend_from_slice(&piece);
        }
        if !is_end || self.held.is_empty() {
            return Ok(());
        }
        let held = std::mem::take(&mut self.held).freeze();
        // What is no JSON, though it says so, is one text.
        let is_in = own.is_in(&held);
        self.found = match &is_in {
            Ok(is_in) => *is_in,
            Err(_) => own.matcher.is_in(&String::from_utf8_lossy(&held)),
        };
        let changed = match own.action {
            _ if !self.found => Ok(held),
            Action::Count => Ok(held),
            Action::Refuse => emptied(&held),
            Action::Redact => own.redact(&held),
        };
        *piece = Some(changed.map_err(|_| cut(CUT))?);
        Ok(())
    }

    fn found(&self) -> Found {
        let is_refused = self.found && self.guard.0.action == Action::Refuse;
        Found { something: self.found, is_refused }
    }

    fn note(&mut self) -> Option<(&'static str, String)> {
        None
    }
}

/// The answer ends here.
pub(super) fn cut(message: &str) -> Cut {
    Cut { code: CONTENT_FILTER, message: message.to_owned() }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
