//! Which answers are kept: of everything, of services and of models.

use std::collections::HashMap;
use std::sync::Arc;

use http::HeaderName;

use super::super::cache::{CacheSpec, CachedPer, CachedRequests, Caching};
use super::super::defaults;
use super::super::file::{
    FileCache, FileCachedPer, FileCachedRequests, FileCaching, FileConfig, FileStore, OneOrMany,
};
use super::super::problem::{KeyPath, Problems};
use super::super::units::Size;
use super::item_path;

/// The least of what is kept that one answer may be: otherwise one would drive out most others.
const ANSWERS_MIN: usize = 8;

/// Where answers are kept.
pub(super) fn cache(file: &FileConfig, problems: &mut Problems) -> CacheSpec {
    let at = KeyPath::default().key("cache");
    let none = FileCache::default();
    let written = file.cache.as_ref().unwrap_or(&none);
    let bytes = |size: Option<Size>, default| size.map_or(default, |size| size.0);
    let spec = CacheSpec {
        is_shared: match written.store {
            Some(FileStore::Memory) => false,
            Some(FileStore::Redis) => true,
            None => file.redis.is_some(),
        },
        memory_bytes_max: bytes(written.memory_bytes_max, defaults::CACHE_MEMORY_BYTES_MAX),
        answer_bytes_max: bytes(written.answer_bytes_max, defaults::CACHE_ANSWER_BYTES_MAX),
    };
    if spec.is_shared && file.redis.is_none() {
        problems.value(&at.key("store"), "takes \"redis\", which says where that is");
    }
    if spec.answer_bytes_max > spec.memory_bytes_max / ANSWERS_MIN {
        let key = if written.answer_bytes_max.is_some() {
            "answer_bytes_max"
        } else {
            "memory_bytes_max"
        };
        let message = format!(
            "memory_bytes_max ({}) has to be at least {ANSWERS_MIN} times answer_bytes_max ({})",
            spec.memory_bytes_max, spec.answer_bytes_max
        );
        problems.value(&at.key(key), message);
    }
    spec
}

/// How the answers of each model are kept whose answers are, by `service/model`.
pub(super) fn caching(file: &FileConfig, problems: &mut Problems) -> HashMap<String, Arc<Caching>> {
    let root = KeyPath::default();
    let all = file.cache.as_ref().map(FileCache::caching);
    let all = Inherited::default().under(all.as_ref(), &root, problems);
    let mut found = HashMap::new();
    for (service, written) in file.services.iter().flatten() {
        let at = root.key("services").key(service);
        let of_service = all.under(written.cache.as_ref(), &at, problems);
        for (key, models) in [("models", &written.models), ("model", &written.model)] {
            for (model, written) in models.iter().flatten() {
                let at = at.key(key).key(model);
                let own = of_service.under(written.cache.as_ref(), &at, problems);
                if own.is_enabled && !own.caching.ttl.is_zero() {
                    found.insert(format!("{service}/{model}"), Arc::new(own.caching));
                }
            }
        }
    }
    found
}

/// What a service or model leaves to its models.
struct Inherited {
    is_enabled: bool,
    caching: Caching,
}

impl Default for Inherited {
    fn default() -> Self {
        let caching = Caching {
            ttl: defaults::CACHE_TTL,
            per: CachedPer::Key,
            requests: CachedRequests::Deterministic,
            headers: Vec::new(),
        };
        Self { is_enabled: false, caching }
    }
}

impl Inherited {
    fn under(&self, own: Option<&FileCaching>, at: &KeyPath, problems: &mut Problems) -> Self {
        let outer = &self.caching;
        let Some(own) = own else {
            return Self { is_enabled: self.is_enabled, caching: outer.clone() };
        };
        let at = at.key("cache").key("headers");
        Self {
            is_enabled: own.enabled.unwrap_or(self.is_enabled),
            caching: Caching {
                ttl: own.ttl.map_or(outer.ttl, |ttl| ttl.0),
                per: match own.per {
                    Some(FileCachedPer::Key) => CachedPer::Key,
                    Some(FileCachedPer::All) => CachedPer::All,
                    None => outer.per,
                },
                requests: match own.requests {
                    Some(FileCachedRequests::Deterministic) => CachedRequests::Deterministic,
                    Some(FileCachedRequests::All) => CachedRequests::All,
                    None => outer.requests,
                },
                headers: match &own.headers {
                    Some(names) => headers(names, &at, problems),
                    None => outer.headers.clone(),
                },
            },
        }
    }
}

fn headers(names: &OneOrMany, at: &KeyPath, problems: &mut Problems) -> Vec<HeaderName> {
    let mut headers = Vec::new();
    for (index, name) in names.items.iter().enumerate() {
        match HeaderName::from_bytes(name.as_bytes()) {
            Ok(name) => headers.push(name),
            Err(_) => problems.value(&item_path(names, at, index), "expected a header's name"),
        }
    }
    headers
}
