//! Tokens that others issue and sign (JWT).

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwapOption;
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, JwkSet};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use ring::digest::{SHA256, digest};
use serde_json::Value;
use tokio::sync::Notify;

use super::grant::Grant;
use crate::config::{JwksSource, JwtAlgorithm, JwtSpec};
use crate::names::NameList;
use crate::refusal::Refusal;

/// Tokens that were found good, and are not verified again for a while.
const KNOWN_MAX: usize = 16 * 1024;

/// How long they are not, in seconds: as long one that its issuer would no longer sign may pass.
const KNOWN_SECONDS: i64 = 60;

/// How soon keys are fetched again because a token names one that is not known, in seconds.
const FETCH_AGAIN_SECONDS: i64 = 30;

/// Longest token that is looked at. Those of large companies have some kilobytes.
const TOKEN_BYTES_MAX: usize = 16 * 1024;

/// The public keys of an issuer, as they were last fetched.
pub struct PublicKeys {
    /// Where they are.
    pub source: JwksSource,
    keys: ArcSwapOption<Vec<PublicKey>>,
    /// When they were last asked for, in seconds since 1970.
    fetched: AtomicI64,
    /// Woken when they should be fetched.
    pub wanted: Notify,
}

struct PublicKey {
    id: Option<String>,
    algorithm: JwtAlgorithm,
    key: DecodingKey,
}

impl std::fmt::Debug for PublicKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[public keys of {:?}]", self.source)
    }
}

impl PublicKeys {
    fn new(source: &JwksSource) -> Self {
        let keys = Self {
            source: source.clone(),
            keys: ArcSwapOption::empty(),
            fetched: AtomicI64::new(0),
            wanted: Notify::new(),
        };
        if let JwksSource::Text(text) = source {
            // The configuration was refused where they cannot be read.
            let _ = keys.take(text);
        }
        keys
    }

    /// Takes up keys (RFC 7517) in place of those that are known.
    ///
    /// # Errors
    /// When there is none among them that tokens can be verified with.
    pub fn take(&self, text: &str) -> Result<usize, String> {
        let keys = read(text)?;
        let count = keys.len();
        self.keys.store(Some(Arc::new(keys)));
        Ok(count)
    }

    /// Whether they may be fetched again because one is missing; then it is noted that they are.
    fn want(&self, now: i64) -> bool {
        let last = self.fetched.load(Ordering::Relaxed);
        let is_due = matches!(self.source, JwksSource::Url(_)) && now - last >= FETCH_AGAIN_SECONDS;
        let is_first = is_due
            && self
                .fetched
                .compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if is_first {
            self.wanted.notify_one();
        }
        is_first
    }
}

/// Reads a set of keys: those that tokens can be verified with here.
fn read(text: &str) -> Result<Vec<PublicKey>, String> {
    let set: JwkSet = serde_json::from_str(text).map_err(|error| format!("no JWKS: {error}"))?;
    let read = |jwk: &jsonwebtoken::jwk::Jwk| {
        let algorithm = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => JwtAlgorithm::Rs256,
            AlgorithmParameters::EllipticCurve(it) if it.curve == EllipticCurve::P256 => {
                JwtAlgorithm::Es256
            }
            AlgorithmParameters::OctetKeyPair(_) => JwtAlgorithm::EdDsa,
            _ => return None,
        };
        let key = DecodingKey::from_jwk(jwk).ok()?;
        Some(PublicKey { id: jwk.common.key_id.clone(), algorithm, key })
    };
    let keys: Vec<PublicKey> = set.keys.iter().filter_map(read).collect();
    if keys.is_empty() {
        return Err("no key of RSA, P-256 or Ed25519 in it".to_owned());
    }
    Ok(keys)
}

/// The longest name of who has a token.
const NAME_BYTES_MAX: usize = 256;

/// Says in the log, and not to the client, what is wrong with a token.
fn wrong(why: impl std::fmt::Display) -> Refusal {
    log::debug!("a token is refused: {why}");
    Refusal::KeyWrong
}

/// All issuers.
#[derive(Debug)]
pub(super) struct Issuers {
    issuers: Vec<Issuer>,
    known: Mutex<HashMap<[u8; 32], Known>>,
}

#[derive(Debug)]
struct Issuer {
    spec: JwtSpec,
    keys: Arc<PublicKeys>,
    template: Grant,
}

#[derive(Debug)]
struct Known {
    grant: Arc<Grant>,
    until: i64,
}

/// A part of a token, as it is written: its head is the first, its claims are the second.
fn part(token: &str, at: usize) -> Option<Value> {
    let part = BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(at)?).ok()?;
    serde_json::from_slice(&part).ok()
}

/// Whether a credential looks like a token: its first part begins as JSON does.
pub(super) fn is_token(credential: &[u8]) -> bool {
    credential.starts_with(b"eyJ") && credential.iter().filter(|byte| **byte == b'.').count() == 2
}

impl Issuers {
    /// As they are configured; keys that `previous` has are kept.
    pub(super) fn new(specs: &[JwtSpec], previous: Option<&Self>) -> Self {
        let issuer = |spec: &JwtSpec| {
            let same = |it: &&Issuer| it.spec.keys == spec.keys;
            let known = previous.and_then(|it| it.issuers.iter().find(same));
            let keys = match known {
                Some(known) => Arc::clone(&known.keys),
                None => Arc::new(PublicKeys::new(&spec.keys)),
            };
            Issuer { spec: spec.clone(), keys, template: Grant::of_key(&spec.grant) }
        };
        Self { issuers: specs.iter().map(issuer).collect(), known: Mutex::default() }
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &Arc<PublicKeys>> {
        self.issuers.iter().map(|issuer| &issuer.keys)
    }

    /// What a token is good for.
    pub(super) fn check(&self, token: &[u8], now: i64) -> Result<Arc<Grant>, Refusal> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(Refusal::KeyWrong);
        }
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, token).as_ref());
        let known = |hash| {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.get(hash).filter(|it| now < it.until).map(|it| Arc::clone(&it.grant))
        };
        if let Some(grant) = known(&hash) {
            return Ok(grant);
        }
        let token = std::str::from_utf8(token).map_err(|_| Refusal::KeyWrong)?;
        let issuer = self.issuer_of(token).ok_or_else(|| wrong("its issuer is not known here"))?;
        let (grant, expires) = issuer.verify(token, now)?;
        let grant = Arc::new(grant);
        let until = (now + KNOWN_SECONDS).min(expires);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= KNOWN_MAX {
            known.retain(|_, it| now < it.until);
            if known.len() >= KNOWN_MAX {
                known.clear();
            }
        }
        known.insert(hash, Known { grant: Arc::clone(&grant), until });
        Ok(grant)
    }

    /// Who issued a token, as it says itself.
    fn issuer_of(&self, token: &str) -> Option<&Issuer> {
        let claims = part(token, 1)?;
        let issuer = claims.get("iss")?.as_str()?;
        self.issuers.iter().find(|known| known.spec.issuer == issuer)
    }
}

impl Issuer {
    fn verify(&self, token: &str, now: i64) -> Result<(Grant, i64), Refusal> {
        let header = jsonwebtoken::decode_header(token).map_err(wrong)?;
        // Extensions that must be understood (RFC 7515, 4.1.11): there are none here.
        if part(token, 0).is_none_or(|head| head.get("crit").is_some()) {
            return Err(wrong("it has a crit"));
        }
        let (algorithm, own) = match header.alg {
            Algorithm::RS256 => (Algorithm::RS256, JwtAlgorithm::Rs256),
            Algorithm::ES256 => (Algorithm::ES256, JwtAlgorithm::Es256),
            Algorithm::EdDSA => (Algorithm::EdDSA, JwtAlgorithm::EdDsa),
            other => return Err(wrong(format_args!("its algorithm is {other:?}"))),
        };
        if !self.spec.algorithms.contains(&own) {
            return Err(wrong(format_args!("its algorithm is {:?}", header.alg)));
        }
        // Until they are fetched for the first time, that is tried again and again.
        let keys = self.keys.keys.load_full().ok_or(Refusal::TokensUnknown)?;
        let mut fitting = keys
            .iter()
            .filter(|key| key.algorithm == own && (header.kid.is_none() || key.id == header.kid));
        let Some(key) = fitting.next() else {
            // It may be a new one: who comes again finds it.
            if self.keys.want(now) {
                return Err(Refusal::TokensUnknown);
            }
            return Err(wrong("its issuer has no such key"));
        };
        let mut validation = Validation::new(algorithm);
        validation.leeway = self.spec.leeway.as_secs();
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.spec.issuer]);
        if self.spec.audiences.is_empty() {
            validation.validate_aud = false;
        } else {
            validation.set_audience(&self.spec.audiences);
            validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        }
        // Without a name of the key each of them may be it.
        let decoded = std::iter::once(key)
            .chain(fitting)
            .map(|key| jsonwebtoken::decode::<Value>(token, &key.key, &validation))
            .reduce(|first, next| first.or(next))
            .ok_or(Refusal::KeyWrong)?;
        let claims = decoded.map_err(|error| match error.kind() {
            jsonwebtoken::errors::ErrorKind::ExpiredSignature => Refusal::KeyExpired,
            _ => wrong(error),
        })?;
        let claims = claims.claims;
        // It is required to be a number; nothing says that it is a small or a whole one.
        #[expect(clippy::cast_possible_truncation, reason = "the cast stops at both ends")]
        let expires = claims.get("exp").and_then(Value::as_f64).map_or(0, |exp| exp as i64);
        if claims.get("nbf").is_some_and(|nbf| !nbf.is_number()) {
            return Err(wrong("its nbf is not a number"));
        }
        let leeway = self.spec.leeway.as_secs().cast_signed();
        Ok((self.grant(&claims)?, expires.saturating_add(leeway)))
    }

    /// What a token with these claims is good for.
    fn grant(&self, claims: &Value) -> Result<Grant, Refusal> {
        let name = claims.get(&self.spec.name_claim).and_then(Value::as_str);
        let is_name = |name: &&str| {
            !name.is_empty() && name.len() <= NAME_BYTES_MAX && !name.contains(char::is_control)
        };
        let name = name.filter(is_name).ok_or_else(|| {
            wrong(format_args!("it has no {:?} that is a name", self.spec.name_claim))
        })?;
        let mut grant = self.template.clone();
        grant.key_id = format!("{}:{name}", self.template.key_id).into();
        grant.name = name.into();
        if let Some(claim) = &self.spec.models_claim {
            let models = match claims.get(claim) {
                Some(Value::Array(list)) => NameList::new(list.iter().filter_map(Value::as_str)),
                Some(Value::String(text)) => NameList::new(text.split_whitespace()),
                _ => NameList::new([]),
            };
            grant.narrow(models);
        }
        Ok(grant)
    }
}
