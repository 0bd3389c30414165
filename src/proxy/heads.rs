//! Heads without the case of their names. Names mean the same in either case (RFC 9110, section 5.1) and are in
//! lower case over HTTP/2 anyway; Pingora keeps what each was written like in a second table, which every change of
//! a header and every copy of a head has to go through, too.

use http::{Request, Response};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora_core::Result;

/// So many headers are added to a request, and to an answer, at most; or little more.
const ADDED: usize = 8;

/// Lets go of it in a request.
///
/// # Errors
/// When the target is none; it was read as one.
pub(super) fn of_request(request: &mut RequestHeader) -> Result<()> {
    if !request.has_case() {
        return Ok(());
    }
    // What Pingora has beside the URI would be lost.
    let is_plain = request.raw_path_is_utf8() && request.raw_path().starts_with(b"/");
    let target = (!is_plain).then(|| request.raw_path().to_vec());
    let (empty, ()) = Request::new(()).into_parts();
    let mut parts = http::request::Parts::from(std::mem::replace(request, empty.into()));
    parts.headers.reserve(ADDED);
    *request = parts.into();
    target.map_or(Ok(()), |target| request.set_raw_path(&target))
}

/// Lets go of it in an answer.
///
/// # Errors
/// When the reason phrase is none; it was read as one.
pub(super) fn of_answer(answer: &mut ResponseHeader) -> Result<()> {
    if !answer.has_case() {
        return Ok(());
    }
    let own = answer.get_reason_phrase();
    let phrase = own.filter(|_| own != answer.status.canonical_reason()).map(str::to_owned);
    let (empty, ()) = Response::new(()).into_parts();
    let mut parts = http::response::Parts::from(std::mem::replace(answer, empty.into()));
    parts.headers.reserve(ADDED);
    *answer = parts.into();
    phrase.map_or(Ok(()), |phrase| answer.set_reason_phrase(Some(&phrase)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_else_of_a_head_changes() {
        for target in [&b"/a/b?c=%20d"[..], b"http://h/a?b", b"h:80", b"*", b"/\xff?\xfe", b"?x"] {
            let mut request = RequestHeader::build("POST", target, None).unwrap();
            request.append_header("X-One", "1").unwrap();
            request.append_header("x-one", "2").unwrap();
            let raw = request.raw_path().to_vec();
            of_request(&mut request).unwrap();
            assert!(!request.has_case());
            assert_eq!((request.raw_path(), request.method.as_str()), (&raw[..], "POST"));
            let mut wire = Vec::new();
            request.header_to_h1_wire(&mut wire);
            assert_eq!(wire, b"x-one: 1\r\nx-one: 2\r\n");
        }
        for phrase in [None, Some("Fine"), Some("")] {
            let mut answer = ResponseHeader::build(203, None).unwrap();
            answer.set_reason_phrase(phrase).unwrap();
            answer.append_header("Content-Type", "a/b").unwrap();
            of_answer(&mut answer).unwrap();
            assert_eq!((answer.status.as_u16(), answer.has_case()), (203, false));
            let expected = phrase.unwrap_or("Non Authoritative Information");
            assert_eq!(answer.get_reason_phrase(), Some(expected));
        }
    }
}
