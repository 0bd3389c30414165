//! Headers that are set, removed and renamed, of requests and of answers.

use http::header::{
    CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, EXPECT, HOST, TE, TRAILER, TRANSFER_ENCODING,
    UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::{AnswerHead, OnAnswerHead, OnRequestHead, RequestHead, Stop};
use crate::expression::{AnswerFacts, Expression, Facts};

/// What is done with headers: first those are renamed, then removed, then set.
#[derive(Default)]
pub struct HeaderChanges {
    /// From what to what. Where both are there, the first takes the place of the second.
    pub rename: Vec<(HeaderName, HeaderName)>,
    /// Those that go.
    pub remove: Vec<HeaderName>,
    /// Those that are set, whatever was there.
    pub set: Vec<(HeaderName, HeaderText)>,
}

/// What a header is set to.
pub enum HeaderText {
    /// Always this.
    Fixed(HeaderValue),
    /// What this gives; where that is nothing, the header is removed.
    Computed(Expression),
}

/// Changes of a request's headers.
pub struct OfRequests(pub HeaderChanges);

/// Changes of an answer's headers.
pub struct OfAnswers(pub HeaderChanges);

/// Whether the configuration may change this header; what is wrong with it if not.
///
/// # Errors
/// Whose business the header is.
pub fn may_change(name: &HeaderName, is_of_request: bool) -> Result<(), &'static str> {
    const FRAMING: [HeaderName; 9] = [
        CONNECTION,
        CONTENT_LENGTH,
        CONTENT_ENCODING,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
        UPGRADE,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
    ];
    const CREDENTIALS: [&str; 4] = ["authorization", "x-api-key", "api-key", "x-goog-api-key"];
    if FRAMING.contains(name) {
        return Err("says how the message is framed, and is the gateway's own");
    }
    if name.as_str() == "x-request-id" || name.as_str().starts_with("x-tollgate-") {
        return Err("is the gateway's own");
    }
    if !is_of_request {
        return Ok(());
    }
    if CREDENTIALS.contains(&name.as_str()) {
        return Err("carries the credential; backends get theirs by \"api_key\"");
    }
    if matches!(*name, HOST | EXPECT) || name.as_str().starts_with("x-forwarded-") {
        return Err("is set by the gateway for each backend");
    }
    Ok(())
}

impl HeaderChanges {
    /// Changes headers; `facts` are taken of them once they are renamed and removed.
    fn apply(
        &self,
        headers: &mut HeaderMap,
        facts: impl Fn(&HeaderMap, &Expression) -> Option<String>,
    ) {
        for (from, to) in &self.rename {
            if let Some(value) = headers.remove(from) {
                headers.insert(to.clone(), value);
            }
        }
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, text) in &self.set {
            let value = match text {
                HeaderText::Fixed(value) => Some(value.clone()),
                HeaderText::Computed(expression) => {
                    let text = facts(headers, expression).filter(|text| !text.is_empty());
                    text.and_then(|text| HeaderValue::from_str(&text).ok())
                }
            };
            match value {
                Some(value) => headers.insert(name.clone(), value),
                None => headers.remove(name),
            };
        }
    }
}

impl OnRequestHead for OfRequests {
    fn request_head(&self, head: &mut RequestHead<'_>) -> Result<(), Stop> {
        let request = head.request;
        self.0.apply(head.headers, |headers, expression| {
            expression.gives(&Facts { request, headers, answer: None }).ok()
        });
        Ok(())
    }
}

impl OnAnswerHead for OfAnswers {
    fn answer_head(&self, head: &mut AnswerHead<'_>) {
        let AnswerHead { request, request_headers, backend, status, .. } = *head;
        self.0.apply(head.headers, |headers, expression| {
            let answer = Some(AnswerFacts { backend, status, headers });
            expression.gives(&Facts { request, headers: request_headers, answer }).ok()
        });
    }
}
