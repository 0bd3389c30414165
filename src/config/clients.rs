//! Who may pass, as it is configured.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use super::jwt::JwtSpec;
use super::limits::LimitSpec;
use crate::names::NameList;
use crate::networks::AddressRules;
use crate::secret::{KeyHash, SecretBytes};

/// Whose credentials are accepted.
#[derive(Clone, Debug, PartialEq)]
pub enum ClientKeys {
    /// No key is configured anywhere: everybody passes, with the credential they brought.
    Untouched,
    /// Only backends have keys: everybody passes, and their credential goes no further.
    Dropped,
    /// One of these is needed.
    Required(Arc<KeySpecs>),
}

impl ClientKeys {
    /// The labels of keys that have some, by their ids.
    #[must_use]
    pub fn labels(&self) -> HashMap<&str, &[(String, String)]> {
        let Self::Required(specs) = self else { return HashMap::new() };
        let labelled = specs.keys.iter().filter(|key| !key.labels.is_empty());
        labelled.map(|key| (&*key.id, &key.labels[..])).collect()
    }
}

/// All keys of clients.
#[derive(Clone, PartialEq)]
pub struct KeySpecs {
    /// Ids and hashes are there once.
    pub keys: Vec<KeySpec>,
    /// What HMACs are made with.
    pub secret: Option<SecretBytes>,
    /// Whose tokens are as good as keys.
    pub issuers: Vec<JwtSpec>,
}

/// There may be a hundred thousand.
impl fmt::Debug for KeySpecs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} keys]", self.keys.len())
    }
}

/// A client's key: what is known by it, and what whoever shows it may do.
#[derive(Clone, Debug, PartialEq)]
pub struct KeySpec {
    /// Names it in logs and in the ledger.
    pub id: Arc<str>,
    /// Who has it.
    pub name: Arc<str>,
    /// Any of them is good: the next one is handed out while the last one is still in use.
    pub hashes: Vec<KeyHash>,
    /// Whether it is good at all.
    pub enabled: bool,
    /// Until when, in seconds since 1970.
    pub expires: Option<i64>,
    /// Whether it may see what concerns all, and change the gateway.
    pub is_admin: bool,
    /// Models that may be asked; none: all.
    pub models: Option<NameList>,
    /// Services whose models those are; none: all.
    pub services: Option<NameList>,
    /// Where it may be used from.
    pub addresses: AddressRules,
    /// What the operator noted.
    pub labels: Arc<[(String, String)]>,
    /// Tokens of a month that are paid for already.
    pub reserved_tokens: u64,
    /// Limits of its own.
    pub limits: Vec<LimitSpec>,
}

impl KeySpec {
    /// The name of the one key that `api_key` is.
    pub const GLOBAL: &'static str = "global";

    /// The key that `api_key` is: it may do everything.
    pub(super) fn global(hash: KeyHash) -> Self {
        Self {
            id: Self::GLOBAL.into(),
            name: Self::GLOBAL.into(),
            hashes: vec![hash],
            enabled: true,
            expires: None,
            is_admin: true,
            models: None,
            services: None,
            addresses: AddressRules::default(),
            labels: Arc::default(),
            reserved_tokens: 0,
            limits: Vec::new(),
        }
    }
}
