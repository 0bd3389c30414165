//! What the configuration has done with exchanges besides passing them on: hooks, in the order in which they are
//! written.
//!
//! A hook acts at one moment or several, each a trait of its own: where a request goes ([`OnRoute`]), its head
//! ([`OnRequestHead`]), its body where that is held ([`OnRequestBody`]), the head of the answer ([`OnAnswerHead`]), its body
//! ([`OnAnswerBody`]), the end ([`OnSettled`]). A hook of the
//! gateway's own and one that another program adds ([`HookKind`]) are the same to whoever runs them. The first one that
//! stops a request has the last word. Nothing here waits: a hook is a computation over what has come.

mod chain;
mod content;
mod fields;
mod headers;
mod kinds;
mod prompt;
mod route;
mod say;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};

use crate::expression::{AnswerFacts, Facts, Moment, Request};

pub use chain::{Bodies, Chain, Hook, Outcome, Run, Runs};
pub use content::{Action, Capture, CaptureSpec, Guard, GuardSpec};
pub use fields::{FieldChanges, FieldPath};
pub use headers::{HeaderChanges, HeaderText, OfAnswers, OfRequests, may_change};
pub use kinds::{HookKind, HookKinds};
pub use route::{By, Route};
pub use say::{Bounds, Say};

/// What a hook does at one moment.
pub enum At {
    /// When the request may pass, and its model is known: whether it goes to another one.
    Route(Box<dyn OnRoute>),
    /// Then: whether another one gets a copy of it, too, whose answer goes nowhere.
    Mirror(Box<dyn OnRoute>),
    /// When the request may pass and its model is known.
    RequestHead(Box<dyn OnRequestHead>),
    /// Then, with its body: such a request is held as a whole before it goes on.
    RequestBody(Box<dyn OnRequestBody>),
    /// When the head of an answer has come that is passed on.
    AnswerHead(Box<dyn OnAnswerHead>),
    /// When the body of such an answer comes: what becomes of it.
    AnswerBody(Box<dyn OnAnswerBody>),
    /// When all is over.
    Settled(Box<dyn OnSettled>),
}

impl At {
    /// When it acts: what its hook's condition may speak of.
    #[must_use]
    pub fn moment(&self) -> Moment {
        match self {
            Self::Route(_) | Self::Mirror(_) | Self::RequestHead(_) | Self::RequestBody(_) => {
                Moment::Request
            }
            Self::AnswerHead(_) | Self::AnswerBody(_) => Moment::Answer,
            Self::Settled(_) => Moment::End,
        }
    }
}

/// Says where a request goes.
pub trait OnRoute: Send + Sync {
    /// A request may pass. The `service/model` that it goes to in the place of its own; of several hooks that name one, the
    /// first. One that the configuration does not have is passed over.
    fn route(&self, head: &RequestHead<'_>) -> Option<Arc<str>>;
}

/// Acts on the head of a request.
pub trait OnRequestHead: Send + Sync {
    /// A request may pass, and a backend is about to be chosen for it.
    ///
    /// # Errors
    /// With what the client is told instead of passing it on.
    fn request_head(&self, head: &mut RequestHead<'_>) -> Result<(), Stop>;
}

/// Acts on the body of a request.
pub trait OnRequestBody: Send + Sync {
    /// A request may pass, and its body is here as a whole, decoded.
    ///
    /// # Errors
    /// With what the client is told instead of passing it on.
    fn request_body(&self, body: &mut RequestBody<'_>) -> Result<(), Stop>;
}

/// Acts on the head of an answer.
pub trait OnAnswerHead: Send + Sync {
    /// The head of an answer has come, and goes to the client next.
    fn answer_head(&self, head: &mut AnswerHead<'_>);
}

/// Acts on the bodies of answers.
pub trait OnAnswerBody: Send + Sync {
    /// The head of an answer has come: what its body goes through. None: it passes as it is.
    fn begin(&self, head: &AnswerHead<'_>) -> Option<Box<dyn AnswerBody>>;
}

/// What the body of one answer goes through.
pub trait AnswerBody: Send + Sync {
    /// A piece of it has come, or its end; what is left in its place is sent on. What is held back until later is held
    /// within bounds.
    ///
    /// # Errors
    /// With why the answer ends here.
    fn pass(&mut self, piece: &mut Option<Bytes>, is_end: bool) -> Result<(), Cut>;

    /// What there was, now that it is over.
    fn found(&self) -> Found;

    /// What the request log is told of it, by the name of its field.
    fn note(&mut self) -> Option<(&'static str, String)>;
}

/// What hooks have the request log told, by the names of its fields.
pub type Notes = Vec<(&'static str, String)>;

/// What a hook that looks for something came upon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Whether it was there.
    pub something: bool,
    /// Whether the client gets nothing of the answer for it.
    pub is_refused: bool,
}

/// Is told of the end.
pub trait OnSettled: Send + Sync {
    /// An exchange is over, however it ended.
    fn settled(&self, end: &Settled<'_>);
}

/// The head of a request, as backends get it: what the gateway itself has to say is put over it later.
pub struct RequestHead<'a> {
    /// What is known of it.
    pub request: &'a Request<'a>,
    /// Its headers.
    pub headers: &'a mut HeaderMap,
}

/// The body of a request.
pub struct RequestBody<'a> {
    /// What is known of the request.
    pub request: &'a Request<'a>,
    /// Its headers.
    pub headers: &'a HeaderMap,
    /// The body, decoded. What takes its place is sent to backends, without a `Content-Encoding`.
    pub bytes: &'a mut Bytes,
    /// Whether a hook that looks for something has come upon it: metrics tell.
    pub found: &'a mut bool,
    /// What the request log is told, by the names of its fields.
    pub notes: &'a mut Notes,
}

/// The head of an answer, as the client gets it.
pub struct AnswerHead<'a> {
    /// What is known of the request.
    pub request: &'a Request<'a>,
    /// The request's headers.
    pub request_headers: &'a HeaderMap,
    /// The id of the backend that gave it.
    pub backend: &'a str,
    /// Its status.
    pub status: u16,
    /// Its headers.
    pub headers: &'a mut HeaderMap,
}

impl AnswerHead<'_> {
    /// What is known now.
    fn facts(&self) -> Facts<'_> {
        let Self { request, request_headers, backend, status, headers } = self;
        let answer = AnswerFacts { backend, status: *status, headers };
        Facts { request, headers: request_headers, answer: Some(answer) }
    }
}

/// An exchange that is over.
pub struct Settled<'a> {
    /// What is known of the request.
    pub request: &'a Request<'a>,
    /// The request's headers.
    pub headers: &'a HeaderMap,
    /// The id of the backend that was asked last; empty: none.
    pub backend: &'a str,
    /// What the client was sent; 0: nothing.
    pub status: u16,
    /// From the request's head to the end.
    pub duration: Duration,
    /// From there to the first byte of the answer's body.
    pub first_byte: Option<Duration>,
    /// Tokens of the prompt and of the answer, where they were counted.
    pub tokens: Option<(u64, u64)>,
    /// Whether the client left before the end.
    pub is_aborted: bool,
}

impl Settled<'_> {
    fn facts(&self) -> Facts<'_> {
        Facts::at_end(self.request, self.headers, (self.backend, self.status))
    }
}

/// Where a request goes besides its own model, as `service/model`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Elsewhere {
    /// In its place.
    pub route: Option<Arc<str>>,
    /// Who gets a copy of it.
    pub mirrors: Vec<Arc<str>>,
}

/// Why an answer ends in the middle. A client that has seen nothing of it is told so with 502.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The machine-readable code.
    pub code: &'static str,
    /// What the client is told.
    pub message: String,
}

/// What a client is told in the place of an answer.
#[derive(Clone, Debug)]
pub enum Stop {
    /// No, in the words of its API family.
    Refuse {
        /// The status: 400 to 599.
        status: StatusCode,
        /// The machine-readable code.
        code: &'static str,
        /// What the client is told.
        message: String,
    },
    /// This.
    Answer(Box<Response<Bytes>>),
}
