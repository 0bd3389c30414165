//! The cache as it is written.

use serde::Deserialize;

use super::super::units::{Size, Span};
use super::OneOrMany;

/// Where answers are kept; and how, where services and models do not say otherwise.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in super::super) struct FileCache {
    pub(in super::super) store: Option<FileStore>,
    pub(in super::super) memory_bytes_max: Option<Size>,
    pub(in super::super) answer_bytes_max: Option<Size>,
    pub(in super::super) enabled: Option<bool>,
    pub(in super::super) ttl: Option<Span>,
    pub(in super::super) per: Option<FileCachedPer>,
    pub(in super::super) requests: Option<FileCachedRequests>,
    pub(in super::super) headers: Option<OneOrMany>,
}

impl FileCache {
    /// How answers are kept.
    pub(in super::super) fn caching(&self) -> FileCaching {
        FileCaching {
            enabled: self.enabled,
            ttl: self.ttl,
            per: self.per,
            requests: self.requests,
            headers: self.headers.clone(),
        }
    }
}

/// How the answers of a service's models, or of one, are kept.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in super::super) struct FileCaching {
    pub(in super::super) enabled: Option<bool>,
    pub(in super::super) ttl: Option<Span>,
    pub(in super::super) per: Option<FileCachedPer>,
    pub(in super::super) requests: Option<FileCachedRequests>,
    pub(in super::super) headers: Option<OneOrMany>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in super::super) enum FileStore {
    Memory,
    Redis,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in super::super) enum FileCachedPer {
    Key,
    All,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in super::super) enum FileCachedRequests {
    Deterministic,
    All,
}
