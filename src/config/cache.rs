//! Which answers are kept, for whom and for how long, as it is configured.

use std::time::Duration;

use http::HeaderName;

/// Where kept answers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSpec {
    /// Whether gateways share them, in Redis.
    pub is_shared: bool,
    /// Most that they take of this process's memory, in bytes.
    pub memory_bytes_max: usize,
    /// The largest answer that is kept, in bytes.
    pub answer_bytes_max: usize,
}

/// How the answers of one model are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caching {
    /// How long; above 0.
    pub ttl: Duration,
    /// Whose requests they answer.
    pub per: CachedPer,
    /// To which requests.
    pub requests: CachedRequests,
    /// Headers that make another request of one, besides those of the known APIs.
    pub headers: Vec<HeaderName>,
}

/// Whose requests a kept answer answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CachedPer {
    /// Those of the key that it was asked for with.
    Key,
    /// Those of all who may ask the model.
    All,
}

/// Which requests a kept answer may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CachedRequests {
    /// Those whose answer is always the same, as far as it is meant to: of temperature 0, and for embeddings.
    Deterministic,
    /// All that ask for nothing but an answer.
    All,
}
