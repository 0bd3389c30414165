//! Changes of heads. Pingora keeps what each name was written like in a second table, and each name it is given for a
//! change it copies and parses again. So heads are changed without it, and lose the case of their names: those mean
//! the same in either case (RFC 9110, section 5.1), and are in lower case over HTTP/2 anyway.

use http::header::CONNECTION;
use http::{HeaderMap, HeaderName, Request, Response, request, response};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora_core::Result;

/// So many headers are added to a head at most; or little more.
const ADDED: usize = 12;

/// Lets go of the case of names in a request.
///
/// # Errors
/// When the target is none; it was read as one.
pub(super) fn forget_case(request: &mut RequestHeader) -> Result<()> {
    if request.has_case() { change_request(request, |_| ()) } else { Ok(()) }
}

/// Changes the headers of a request.
///
/// # Errors
/// When the target is none; it was read as one.
pub(super) fn change_request<T>(
    request: &mut RequestHeader,
    change: impl FnOnce(&mut HeaderMap) -> T,
) -> Result<T> {
    // What Pingora has beside the URI would be lost.
    let is_plain = request.raw_path_is_utf8() && request.raw_path().starts_with(b"/");
    let target = (!is_plain).then(|| request.raw_path().to_vec());
    let (empty, ()) = Request::new(()).into_parts();
    let mut parts = request::Parts::from(std::mem::replace(request, empty.into()));
    parts.headers.reserve(ADDED);
    let changed = change(&mut parts.headers);
    *request = parts.into();
    if let Some(target) = target {
        request.set_raw_path(&target)?;
    }
    Ok(changed)
}

/// Headers that speak of one connection alone, as its side says (RFC 9110, section 7.6.1).
pub(super) fn nominated(headers: &HeaderMap) -> Vec<HeaderName> {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let names = values.flat_map(|value| value.split(','));
    names.filter_map(|name| name.trim().parse().ok()).collect()
}

/// Changes an answer.
///
/// # Errors
/// When the reason phrase is none; it was read as one.
pub(super) fn change_answer<T>(
    answer: &mut ResponseHeader,
    change: impl FnOnce(&mut response::Parts) -> T,
) -> Result<T> {
    let own = answer.get_reason_phrase();
    let phrase = own.filter(|_| own != answer.status.canonical_reason()).map(str::to_owned);
    let (empty, ()) = Response::new(()).into_parts();
    let mut parts = response::Parts::from(std::mem::replace(answer, empty.into()));
    parts.headers.reserve(ADDED);
    let changed = change(&mut parts);
    *answer = parts.into();
    if let Some(phrase) = phrase {
        answer.set_reason_phrase(Some(&phrase))?;
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn nothing_else_of_a_head_changes() {
        for target in [&b"/a/b?c=%20d"[..], b"http://h/a?b", b"h:80", b"*", b"/\xff?\xfe", b"?x"] {
            let mut request = RequestHeader::build("POST", target, None).unwrap();
            request.append_header("X-One", "1").unwrap();
            request.append_header("x-one", "2").unwrap();
            let raw = request.raw_path().to_vec();
            forget_case(&mut request).unwrap();
            assert!(!request.has_case());
            let add = |headers: &mut HeaderMap| {
                headers.insert("two", HeaderValue::from_static("3"));
            };
            change_request(&mut request, add).unwrap();
            assert_eq!((request.raw_path(), request.method.as_str()), (&raw[..], "POST"));
            let mut wire = Vec::new();
            request.header_to_h1_wire(&mut wire);
            assert_eq!(wire, b"x-one: 1\r\nx-one: 2\r\ntwo: 3\r\n");
        }
        for phrase in [None, Some("Fine"), Some("")] {
            let mut answer = ResponseHeader::build(203, None).unwrap();
            answer.set_reason_phrase(phrase).unwrap();
            answer.append_header("Content-Type", "a/b").unwrap();
            change_answer(&mut answer, |_| ()).unwrap();
            assert_eq!((answer.status.as_u16(), answer.has_case()), (203, false));
            let expected = phrase.unwrap_or("Non Authoritative Information");
            assert_eq!(answer.get_reason_phrase(), Some(expected));
        }
    }
}
