//! Tokens that others issue (RFC 7519), as they are configured.

use std::sync::Arc;
use std::time::Duration;

use url::Url;

use super::clients::KeySpec;

/// Who issues tokens, and what they are good for.
#[derive(Clone, Debug, PartialEq)]
pub struct JwtSpec {
    /// What it says of itself (`iss`).
    pub issuer: String,
    /// Whom a token must be for (`aud`): one of these; none: anybody.
    pub audiences: Vec<String>,
    /// Where its public keys are.
    pub keys: JwksSource,
    /// How tokens may be signed.
    pub algorithms: Vec<JwtAlgorithm>,
    /// The claim that says who has a token.
    pub name_claim: String,
    /// The claim that lists models, where tokens are for some only.
    pub models_claim: Option<String>,
    /// How far clocks may be off.
    pub leeway: Duration,
    /// What its tokens are good for, as of a key.
    pub grant: Arc<KeySpec>,
}

/// Where public keys are (RFC 7517).
#[derive(Clone, Debug, PartialEq)]
pub enum JwksSource {
    /// In a file: its text.
    Text(String),
    /// At a URL, where they may change.
    Url(Url),
}

/// How a token is signed (RFC 7518, RFC 8037).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JwtAlgorithm {
    /// RSA with SHA-256.
    Rs256,
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// Ed25519.
    EdDsa,
}
