//! Hooks that other programs add.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use super::At;

/// A kind of hook that the configuration can have under `custom:`, by its name.
pub trait HookKind: Send + Sync {
    /// Its name in the configuration.
    fn name(&self) -> &'static str;

    /// Makes a hook of what is written under that name, and says at which moments it acts.
    ///
    /// # Errors
    /// What is wrong with what is written; it is shown with its place.
    fn make(&self, written: Value) -> Result<Vec<At>, String>;
}

/// The kinds that there are besides the gateway's own.
#[derive(Clone, Default)]
pub struct HookKinds(Vec<Arc<dyn HookKind>>);

impl HookKinds {
    /// These.
    #[must_use]
    pub fn new(kinds: Vec<Arc<dyn HookKind>>) -> Self {
        Self(kinds)
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|kind| kind.name())
    }

    /// The kind of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&dyn HookKind> {
        self.0.iter().find(|kind| kind.name() == name).map(Arc::as_ref)
    }
}

impl fmt::Debug for HookKinds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}
