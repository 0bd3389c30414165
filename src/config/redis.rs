//! Where gateways share what they count, as it is configured.

use std::time::Duration;

use crate::secret::Secret;

/// A Redis server, or several of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisSpec {
    /// URLs: of one server, of nodes of a cluster, or of sentinels.
    pub urls: Vec<Secret>,
    /// What they are.
    pub kind: RedisKind,
    /// How long an answer is waited for.
    pub timeout: Duration,
    /// Connections, each used by many exchanges at a time.
    pub connections: usize,
    /// What keys begin with.
    pub prefix: String,
    /// What becomes of exchanges with limits while there is no answer.
    pub when_down: WhenDown,
}

/// How Redis is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisKind {
    /// One server.
    Single,
    /// A cluster.
    Cluster,
    /// One server at a time, which sentinels know by this name.
    Sentinel(String),
}

/// What becomes of exchanges with limits while Redis gives no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenDown {
    /// Each gateway gives its share: the limit divided by how many there were.
    Local,
    /// They are refused.
    Refuse,
}
