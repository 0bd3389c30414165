//! How much there is in a configuration, in a line.

use std::fmt;

use super::clients::ClientKeys;
use super::snapshot::Snapshot;

/// How much there is in a configuration.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// Models of all services.
    pub models: usize,
    /// Backends of all models.
    pub backends: usize,
    /// Keys of clients; none: they need none.
    pub keys: Option<usize>,
    /// Limits, without those of keys.
    pub limits: usize,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "models: {}, backends: {}", self.models, self.backends)?;
        if let Some(keys) = self.keys {
            write!(f, ", keys: {keys}")?;
        }
        if self.limits > 0 {
            write!(f, ", limits: {}", self.limits)?;
        }
        Ok(())
    }
}

impl Snapshot {
    /// How much there is in it.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary {
            models: self.pools().count(),
            backends: self.pools().map(|(_, _, pool)| pool.backends.len()).sum(),
            keys: match &self.clients {
                ClientKeys::Required(specs) => Some(specs.keys.len()),
                ClientKeys::Untouched | ClientKeys::Dropped => None,
            },
            limits: self.limits.len(),
        }
    }
}
