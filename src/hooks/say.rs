//! What ends a request before a backend sees it: an answer of the operator's, a refusal, a bound.

use bytes::Bytes;
use http::{Response, StatusCode};

use super::{At, OnRequestBody, OnRequestHead, RequestBody, RequestHead, Stop};

/// The code of a refusal that the configuration has words for.
const REFUSED: &str = "refused";

/// Tells each client the same.
pub enum Say {
    /// An answer as it is.
    Answer(Response<Bytes>),
    /// A refusal, in the form of the client's API family.
    Refuse {
        /// Its status, 400 to 599.
        status: StatusCode,
        /// What the client is told.
        message: String,
    },
}

impl OnRequestHead for Say {
    fn request_head(&self, _head: &mut RequestHead<'_>) -> Result<(), Stop> {
        Err(match self {
            Self::Answer(answer) => Stop::Answer(Box::new(answer.clone())),
            Self::Refuse { status, message } => {
                Stop::Refuse { status: *status, code: REFUSED, message: message.clone() }
            }
        })
    }
}

/// How large a request may be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    /// Names and values of all headers, in bytes.
    pub head_bytes_max: Option<usize>,
    /// The body, in bytes, decoded.
    pub body_bytes_max: Option<usize>,
}

impl Bounds {
    /// When it acts: a body that is not bounded is not held for it.
    #[must_use]
    pub fn moments(self) -> Vec<At> {
        let head = self.head_bytes_max.is_some().then(|| At::RequestHead(Box::new(self)));
        let body = self.body_bytes_max.is_some().then(|| At::RequestBody(Box::new(self)));
        head.into_iter().chain(body).collect()
    }
}

impl OnRequestHead for Bounds {
    fn request_head(&self, head: &mut RequestHead<'_>) -> Result<(), Stop> {
        let Some(max) = self.head_bytes_max else { return Ok(()) };
        let bytes: usize =
            head.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
        if bytes <= max {
            return Ok(());
        }
        Err(Stop::Refuse {
            status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            code: "headers_too_large",
            message: format!("the request's headers have more than {max} bytes"),
        })
    }
}

impl OnRequestBody for Bounds {
    fn request_body(&self, body: &mut RequestBody<'_>) -> Result<(), Stop> {
        match self.body_bytes_max {
            Some(max) if body.bytes.len() > max => Err(Stop::Refuse {
                status: StatusCode::PAYLOAD_TOO_LARGE,
                code: "body_too_large",
                message: format!("the request's body has more than {max} bytes"),
            }),
            _ => Ok(()),
        }
    }
}
