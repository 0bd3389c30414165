//! Who may pass: the credential a client presents, and whether it is good.

use http::header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL};
use http::{HeaderMap, HeaderName};

use crate::config::ClientKeys;
use crate::refusal::Refusal;
use crate::secret::KeyHash;

/// Headers that carry a client's credential: OpenAI's, Anthropic's, Azure's, Gemini's. Once the
/// gateway has keys, none of them goes to a backend.
pub const CREDENTIAL_HEADERS: [HeaderName; 4] = [
    AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-goog-api-key"),
];

/// Checks the credential in `headers`.
///
/// # Errors
/// A 401 refusal: no key, a wrong one, or several that differ (servers disagree on which counts).
pub fn check(keys: &ClientKeys, headers: &HeaderMap) -> Result<(), Refusal> {
    let ClientKeys::Required(expected) = keys else { return Ok(()) };
    let presented = presented(headers)?.ok_or(Refusal::KeyMissing)?;
    if KeyHash::of(presented).matches(expected) { Ok(()) } else { Err(Refusal::KeyWrong) }
}

/// How browsers, which cannot set headers on a WebSocket, send a key: as one of the subprotocols that
/// they offer. OpenAI's.
const SUBPROTOCOL: &[u8] = b"openai-insecure-api-key.";

/// Whether a subprotocol (an entry of `Sec-WebSocket-Protocol`) is a key.
#[must_use]
pub fn is_key_subprotocol(entry: &[u8]) -> bool {
    entry.starts_with(SUBPROTOCOL)
}

/// The one key that the request presents, if any.
fn presented<'a>(headers: &'a HeaderMap) -> Result<Option<&'a [u8]>, Refusal> {
    let mut found: Option<&[u8]> = None;
    let mut take = |key: &'a [u8]| {
        if !key.is_empty() && *found.get_or_insert(key) != key {
            return Err(Refusal::KeysDiffer);
        }
        Ok(())
    };
    for name in &CREDENTIAL_HEADERS {
        for value in headers.get_all(name) {
            let bytes = value.as_bytes();
            take(if *name == AUTHORIZATION { bearer(bytes) } else { bytes.trim_ascii() })?;
        }
    }
    for value in headers.get_all(SEC_WEBSOCKET_PROTOCOL) {
        for entry in value.as_bytes().split(|byte| *byte == b',') {
            take(entry.trim_ascii().strip_prefix(SUBPROTOCOL).unwrap_or_default())?;
        }
    }
    Ok(found)
}

/// The token of `Bearer TOKEN` (RFC 6750; the scheme's name in any case, RFC 9110 section 11.1).
/// Another scheme's credential is taken whole, so that it is refused rather than overlooked.
fn bearer(value: &[u8]) -> &[u8] {
    const SCHEME: &[u8] = b"bearer";
    let value = value.trim_ascii();
    match value.split_at_checked(SCHEME.len()) {
        Some((scheme, rest))
            if scheme.eq_ignore_ascii_case(SCHEME)
                && matches!(rest.first(), None | Some(b' ' | b'\t')) =>
        {
            rest.trim_ascii()
        }
        _ => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(pairs: &[(&'static str, &'static str)]) -> Result<(), Refusal> {
        let keys = ClientKeys::Required(KeyHash::of(b"sk-right"));
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        check(&keys, &headers)
    }

    #[test]
    fn the_right_key_passes_in_every_header() {
        for pair in [
            ("authorization", "Bearer sk-right"),
            ("authorization", "bearer   sk-right "),
            ("x-api-key", "sk-right"),
            ("api-key", "sk-right"),
            ("x-goog-api-key", "sk-right"),
            ("sec-websocket-protocol", "realtime, openai-insecure-api-key.sk-right"),
        ] {
            assert_eq!(verdict(&[pair]), Ok(()), "{pair:?}");
        }
        assert_eq!(verdict(&[("x-api-key", "sk-right"), ("api-key", "sk-right")]), Ok(()));
    }

    #[test]
    fn everything_else_is_refused_with_its_reason() {
        assert_eq!(verdict(&[]), Err(Refusal::KeyMissing));
        for empty in ["", "Bearer", "Bearer "] {
            assert_eq!(verdict(&[("authorization", empty)]), Err(Refusal::KeyMissing), "{empty:?}");
        }
        for wrong in ["Bearer SK-RIGHT", "Bearer sk-right1", "Basic sk-right", "Bearersk-right"] {
            assert_eq!(verdict(&[("authorization", wrong)]), Err(Refusal::KeyWrong), "{wrong:?}");
        }
        let two = [("authorization", "Bearer sk-right"), ("x-api-key", "sk-other")];
        assert_eq!(verdict(&two), Err(Refusal::KeysDiffer));
        let twice = [("x-api-key", "sk-right"), ("x-api-key", "sk-other")];
        assert_eq!(verdict(&twice), Err(Refusal::KeysDiffer));
    }

    #[test]
    fn without_a_key_of_ours_everybody_passes() {
        for keys in [ClientKeys::Untouched, ClientKeys::Dropped] {
            assert_eq!(check(&keys, &HeaderMap::new()), Ok(()));
        }
    }
}
