//! Who may pass: the credential a client presents, and whether it is good.

mod grant;
mod token;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use http::header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL};
use http::{HeaderMap, HeaderName};
use percent_encoding::percent_decode;

pub use grant::{Grant, Wish};
pub use token::PublicKeys;

use token::Issuers;

use crate::config::{ClientKeys, KeySpecs};
use crate::refusal::Refusal;
use crate::secret::{Hashing, KeyHash, SecretBytes};

/// Headers that carry a client's credential: OpenAI's, Anthropic's, Azure's, Gemini's. Once the
/// gateway has keys, none of them goes to a backend.
pub const CREDENTIAL_HEADERS: [HeaderName; 4] = [
    AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-goog-api-key"),
];

/// Who may pass.
#[derive(Debug)]
pub struct Keys {
    /// None: everybody.
    required: Option<Required>,
    everybody: Arc<Grant>,
}

/// The keys of which one is needed, by their hashes: one hash and one look are enough, however many there are.
#[derive(Debug)]
struct Required {
    by_half: HashMap<u128, (KeyHash, Arc<Grant>)>,
    secret: Option<SecretBytes>,
    has: [bool; 2],
    issuers: Issuers,
}

impl Keys {
    /// As they are configured. Public keys that were fetched are kept.
    #[must_use]
    pub fn new(clients: &ClientKeys, previous: Option<&Self>) -> Self {
        let issuers = previous.and_then(|it| it.required.as_ref()).map(|it| &it.issuers);
        let required = match clients {
            ClientKeys::Untouched | ClientKeys::Dropped => None,
            ClientKeys::Required(specs) => Some(Required::new(specs, issuers)),
        };
        Self { required, everybody: Arc::new(Grant::of_everybody()) }
    }

    /// What the client may do that sent these headers from this address, `now` seconds after 1970.
    ///
    /// # Errors
    /// A 401 refusal: no key, a wrong one, one that is no longer good, or several that differ (servers
    /// disagree on which counts); or 403, when it is not good from there.
    pub fn check(
        &self,
        headers: &HeaderMap,
        address: Option<IpAddr>,
        now: impl FnOnce() -> i64,
    ) -> Result<Arc<Grant>, Refusal> {
        let Some(required) = &self.required else { return Ok(Arc::clone(&self.everybody)) };
        let presented = presented(headers)?.ok_or(Refusal::KeyMissing)?;
        let now = now();
        if let Some(grant) = required.find(presented) {
            grant.check(address, now)?;
            return Ok(Arc::clone(grant));
        }
        if !token::is_token(presented) {
            return Err(Refusal::KeyWrong);
        }
        let grant = required.issuers.check(presented, now)?;
        grant.check(address, now)?;
        Ok(grant)
    }

    /// The public keys of those who issue tokens.
    pub fn public_keys(&self) -> impl Iterator<Item = &Arc<PublicKeys>> {
        self.required.iter().flat_map(|required| required.issuers.keys())
    }
}

impl Required {
    fn new(specs: &KeySpecs, previous: Option<&Issuers>) -> Self {
        let mut by_half = HashMap::with_capacity(specs.keys.len());
        let mut has = [false; 2];
        for key in &specs.keys {
            let grant = Arc::new(Grant::of_key(key));
            for hash in &key.hashes {
                has[usize::from(hash.hashing() == Hashing::HmacSha256)] = true;
                by_half.insert(hash.half(), (hash.clone(), Arc::clone(&grant)));
            }
        }
        let issuers = Issuers::new(&specs.issuers, previous);
        Self { by_half, secret: specs.secret.clone(), has, issuers }
    }

    fn find(&self, key: &[u8]) -> Option<&Arc<Grant>> {
        let [has_plain, has_hmac] = self.has;
        let secret = self.secret.as_ref().filter(|_| has_hmac);
        let hmac = secret.and_then(|secret| self.with_hash(&KeyHash::hmac(secret, key)));
        // Both kinds are there while keys are moved from one to the other.
        hmac.or_else(|| has_plain.then(|| self.with_hash(&KeyHash::sha256(key)))?)
    }

    /// What is found by half of a hash tells nothing of the key: nobody can choose its hash. The other half is
    /// compared in constant time all the same.
    fn with_hash(&self, hash: &KeyHash) -> Option<&Arc<Grant>> {
        let (known, grant) = self.by_half.get(&hash.half())?;
        known.matches(hash).then_some(grant)
    }
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
    // Once through all of them: that is less than to look each name up.
    for (name, value) in headers {
        let bytes = value.as_bytes();
        if *name == AUTHORIZATION {
            take(bearer(bytes))?;
        } else if *name == SEC_WEBSOCKET_PROTOCOL {
            for entry in bytes.split(|byte| *byte == b',') {
                take(entry.trim_ascii().strip_prefix(SUBPROTOCOL).unwrap_or_default())?;
            }
        } else if CREDENTIAL_HEADERS.contains(name) {
            take(bytes.trim_ascii())?;
        }
    }
    Ok(found)
}

/// Whether a URL has the key, too, that a request presents: Gemini's clients can send it so (`key=`), and a backend and
/// every log would see it there. In a path, only keys that are none by chance.
#[must_use]
pub fn is_in_url(headers: &HeaderMap, path: &[u8], query: &[u8]) -> bool {
    const BYTES_MIN: usize = 16;
    let Ok(Some(key)) = presented(headers) else { return false };
    let values =
        query.split(|byte| b"?&".contains(byte)).filter_map(|pair| pair.strip_prefix(b"key="));
    let mut values = values.map(|value| percent_decode(value).collect::<Vec<u8>>());
    values.any(|value| value == key)
        || key.len() >= BYTES_MIN && memchr::memmem::find(path, key).is_some()
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
    use crate::config::{Environment, Source, read};

    /// What happens with these keys (lines of a configuration) to who sends these headers.
    fn verdict(keys: &str, pairs: &[(&'static str, &'static str)]) -> Result<Arc<str>, Refusal> {
        let text = format!(
            "{{{keys}services: {{s: {{models: {{m: {{backends: [{{id: a, url: \"http://h\"}}]}}}}}}}}}}"
        );
        let source = Source::File("test.yaml".into());
        let snapshot = read(text.as_bytes(), &source, &Environment::default()).unwrap();
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        let grant = Keys::new(&snapshot.clients, None).check(&headers, None, || 0)?;
        Ok(Arc::clone(&grant.name))
    }

    const GLOBAL: &str = "api_key: sk-right, ";

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
            assert_eq!(verdict(GLOBAL, &[pair]).as_deref(), Ok("global"), "{pair:?}");
        }
        let both = [("x-api-key", "sk-right"), ("api-key", "sk-right")];
        assert_eq!(verdict(GLOBAL, &both).as_deref(), Ok("global"));
    }

    #[test]
    fn everything_else_is_refused_with_its_reason() {
        let refusal = |pairs: &[_]| verdict(GLOBAL, pairs).unwrap_err();
        assert_eq!(refusal(&[]), Refusal::KeyMissing);
        for empty in ["", "Bearer", "Bearer "] {
            assert_eq!(refusal(&[("authorization", empty)]), Refusal::KeyMissing, "{empty:?}");
        }
        for wrong in ["Bearer SK-RIGHT", "Bearer sk-right1", "Basic sk-right", "Bearersk-right"] {
            assert_eq!(refusal(&[("authorization", wrong)]), Refusal::KeyWrong, "{wrong:?}");
        }
        let two = [("authorization", "Bearer sk-right"), ("x-api-key", "sk-other")];
        assert_eq!(refusal(&two), Refusal::KeysDiffer);
        let twice = [("x-api-key", "sk-right"), ("x-api-key", "sk-other")];
        assert_eq!(refusal(&twice), Refusal::KeysDiffer);
    }

    #[test]
    fn a_key_is_found_by_any_of_its_hashes_whatever_their_kind() {
        let secret = "0123456789abcdef0123456789abcdef";
        let hmac = KeyHash::hmac(&SecretBytes::new(secret.into()), b"tg-b").text();
        let [a, c] = [b"tg-a", b"tg-c"].map(|key| KeyHash::sha256(key).text());
        let keys = format!(
            "keys_secret: {secret}, keys: [{{name: one, hash: \"{a}\"}}, {{name: two, hash: [\"{hmac}\", \"{c}\"]}}], "
        );
        let name = |key: &'static str| verdict(&keys, &[("x-api-key", key)]);
        assert_eq!(name("tg-a").as_deref(), Ok("one"));
        assert_eq!(name("tg-b").as_deref(), Ok("two"));
        assert_eq!(name("tg-c").as_deref(), Ok("two"));
        assert_eq!(name("tg-d"), Err(Refusal::KeyWrong));
        assert_eq!(verdict("keys: [], ", &[("x-api-key", "tg-a")]), Err(Refusal::KeyWrong));
    }

    #[test]
    fn without_a_key_of_ours_everybody_passes() {
        assert_eq!(verdict("", &[]).as_deref(), Ok("anonymous"));
    }
}
