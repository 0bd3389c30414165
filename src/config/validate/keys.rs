//! Keys of clients, and where clients may come from.

use std::collections::HashMap;
use std::sync::Arc;

use ipnet::IpNet;
use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

use super::super::beside::Beside;
use super::super::clients::{ClientKeys, KeySpec, KeySpecs};
use super::super::file::{FileAddresses, FileConfig, FileKey, OneOrMany};
use super::super::problem::{KeyPath, Problems};
use super::{Context, item_path, jwt, limits, network, secret};
use crate::names::{NameList, Pattern};
use crate::networks::{AddressRules, Networks};
use crate::secret::{Hashing, KeyHash, SecretBytes};

/// The shortest secret for HMACs, in bytes: as long as what it makes (RFC 2104, section 3).
const SECRET_BYTES_MIN: usize = 32;

/// Hashes of one key: that in use, and the next or the last one.
const HASHES_MAX: usize = 2;

/// Who may pass.
pub(super) fn clients(
    file: &FileConfig,
    beside: &Beside,
    context: &Context<'_>,
    any_backend_key: bool,
    problems: &mut Problems,
) -> ClientKeys {
    let root = KeyPath::default();
    let written = (file.keys_secret.as_ref(), file.keys_secret_file.as_deref());
    let secret = secret("keys_secret", written, &root, context.files, problems);
    if secret.as_ref().is_some_and(|secret| secret.expose().len() < SECRET_BYTES_MIN) {
        let key = if written.0.is_some() { "keys_secret" } else { "keys_secret_file" };
        problems.value(&root.key(key), "too short; openssl rand -hex 32 makes a good one");
    }
    let secret = secret.map(|secret| SecretBytes::new(secret.expose().as_bytes().to_vec()));
    let mut keys = Keys { keys: Vec::new(), ids: HashMap::new(), hashes: HashMap::new() };
    if let Some(key) = &context.global_key {
        let key = key.expose().as_bytes();
        let hash = match &secret {
            Some(secret) => KeyHash::hmac(secret, key),
            None => KeyHash::sha256(key),
        };
        keys.add(KeySpec::global(hash), &root.key("api_key"), problems);
    }
    let at = root.key("keys");
    keys.read(file.keys.as_deref().unwrap_or_default(), &at, secret.as_ref(), problems);
    if let Some(part) = &beside.keys {
        let mut own = Problems::default();
        let written = part.content.keys.as_deref();
        keys.read(written.unwrap_or_default(), &at, secret.as_ref(), &mut own);
        part.tell(own, problems);
        // Whoever writes the file may have been cut off: that shuts nobody out.
        if written.is_none() && part.is_sound {
            problems.value(
                &root.key("keys_file"),
                "there are no keys in the file; if nobody has one yet, write keys: [] there",
            );
        }
    }
    let issuers = jwt::issuers(file, context, problems);
    let has_keys = context.global_key.is_some() || file.keys.is_some() || beside.keys.is_some();
    let is_required = has_keys || file.jwt.is_some();
    match (is_required, any_backend_key) {
        (true, _) => ClientKeys::Required(Arc::new(KeySpecs { keys: keys.keys, secret, issuers })),
        (false, true) => ClientKeys::Dropped,
        (false, false) => ClientKeys::Untouched,
    }
}

/// The keys so far.
struct Keys {
    keys: Vec<KeySpec>,
    ids: HashMap<Arc<str>, usize>,
    hashes: HashMap<u128, usize>,
}

impl Keys {
    fn read(
        &mut self,
        written: &[Option<FileKey>],
        at: &KeyPath,
        secret: Option<&SecretBytes>,
        problems: &mut Problems,
    ) {
        for (index, key) in written.iter().enumerate() {
            let at = at.index(index);
            match key {
                Some(key) => {
                    if let Some(key) = read_key(key, &at, secret, problems) {
                        self.add(key, &at, problems);
                    }
                }
                None if problems.has_below(&at) => {}
                None => problems.value(&at, "expected a key, found nothing"),
            }
        }
    }

    fn add(&mut self, key: KeySpec, at: &KeyPath, problems: &mut Problems) {
        let index = self.keys.len();
        if self.ids.insert(Arc::clone(&key.id), index).is_some() {
            problems.value(&at.key("id"), format!("{:?} is the id of another key", key.id));
        }
        for hash in &key.hashes {
            if let Some(other) = self.hashes.insert(hash.half(), index)
                && other != index
            {
                let other = &self.keys[other].id;
                problems.value(&at.key("hash"), format!("the key {other:?} has it too"));
            }
        }
        self.keys.push(key);
    }
}

fn read_key(
    key: &FileKey,
    at: &KeyPath,
    secret: Option<&SecretBytes>,
    problems: &mut Problems,
) -> Option<KeySpec> {
    if key.name.as_deref().unwrap_or_default().trim().is_empty() {
        if !problems.has_below(&at.key("name")) {
            problems.value(at, "\"name\" is missing: who has the key");
        }
        return None;
    }
    let name: Arc<str> = key.name.as_deref()?.into();
    let id = match &key.id {
        Some(id) if id.trim().is_empty() => {
            problems.value(&at.key("id"), "cannot be empty");
            return None;
        }
        Some(id) => id.as_str().into(),
        None => Arc::clone(&name),
    };
    Some(KeySpec {
        id,
        name,
        hashes: hashes(key.hash.as_ref(), at, secret, problems),
        enabled: key.enabled.unwrap_or(true),
        expires: expires(key.expires.as_deref(), &at.key("expires"), problems),
        is_admin: key.admin.unwrap_or(false),
        models: names(key.models.as_ref(), &at.key("models"), problems),
        services: names(key.services.as_ref(), &at.key("services"), problems),
        addresses: addresses(key.addresses.as_ref(), &at.key("addresses"), problems),
        limits: limits::limits(
            key.limits.as_deref().unwrap_or_default(),
            &at.key("limits"),
            true,
            problems,
        ),
        reserved_tokens: key.reserved_tokens.unwrap_or_default(),
        labels: key
            .labels
            .iter()
            .flatten()
            .map(|(name, text)| (name.clone(), text.clone()))
            .collect(),
    })
}

fn hashes(
    written: Option<&OneOrMany>,
    at: &KeyPath,
    secret: Option<&SecretBytes>,
    problems: &mut Problems,
) -> Vec<KeyHash> {
    let path = at.key("hash");
    let Some(written) = written.filter(|written| !written.items.is_empty()) else {
        if !problems.has_below(&path) {
            problems
                .value(at, "\"hash\" is missing; `tollgate key new NAME` makes a key and its hash");
        }
        return Vec::new();
    };
    if written.items.len() > HASHES_MAX {
        problems.value(&path, format!("at most {HASHES_MAX}: that in use, and the next one"));
    }
    let mut hashes = Vec::new();
    for (index, text) in written.items.iter().enumerate() {
        let at = item_path(written, &path, index);
        match KeyHash::parse(text.trim()) {
            Some(hash) if hash.hashing() == Hashing::HmacSha256 && secret.is_none() => {
                problems.value(&at, "an HMAC takes the secret that it was made with: keys_secret_file");
            }
            Some(hash) => hashes.push(hash),
            // The text may be the key itself: it is not repeated.
            None => problems.value(
                &at,
                "expected sha256: or hmac-sha256: and 64 hexadecimal digits, as `tollgate key new` prints",
            ),
        }
    }
    hashes
}

/// The names that are allowed; none: all.
pub(super) fn names(
    written: Option<&OneOrMany>,
    at: &KeyPath,
    problems: &mut Problems,
) -> Option<NameList> {
    let written = written?;
    for (index, name) in written.items.iter().enumerate() {
        if !Pattern::is_name(name) {
            problems.value(&item_path(written, at, index), "expected a name with at most one *");
        }
    }
    Some(NameList::new(written.items.iter().map(String::as_str)))
}

/// The end of a day, or a moment; in seconds since 1970.
fn expires(written: Option<&str>, at: &KeyPath, problems: &mut Problems) -> Option<i64> {
    let text = written?.trim();
    let moment = read_expiry(text);
    if moment.is_none() {
        problems
            .value(at, "expected a day such as 2027-01-31, or a time such as 2027-01-31T12:00:00Z");
    }
    moment
}

/// Reads when something ends: a day is over at its end, in UTC. In seconds since 1970.
#[must_use]
pub fn read_expiry(text: &str) -> Option<i64> {
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Some(moment.as_second());
    }
    let after = text.parse::<Date>().ok()?.tomorrow().ok()?;
    Some(after.to_zoned(TimeZone::UTC).ok()?.timestamp().as_second())
}

/// The networks that clients may come from, and may not.
pub(super) fn addresses(
    written: Option<&FileAddresses>,
    at: &KeyPath,
    problems: &mut Problems,
) -> AddressRules {
    let Some(written) = written else { return AddressRules::default() };
    let mut read = |key: &str, written: Option<&OneOrMany>| {
        let path = at.key(key);
        let mut networks: Vec<IpNet> = Vec::new();
        for (index, item) in written?.items.iter().enumerate() {
            match network(item) {
                Some(network) => networks.push(network),
                None => {
                    let at = item_path(written?, &path, index);
                    problems.value(&at, "expected a network such as 10.0.0.0/8");
                }
            }
        }
        Some(Networks::new(&networks))
    };
    AddressRules {
        allow: read("allow", written.allow.as_ref()),
        deny: read("deny", written.deny.as_ref()).unwrap_or_default(),
    }
}
