//! What models are called, and which stand in for which.

use indexmap::IndexMap;

use super::snapshot::Service;

/// Models in the order of the file, each at all services that have it, the default one first.
pub fn by_model<'a>(
    services: &'a IndexMap<String, Service>,
    default_service: Option<&str>,
) -> IndexMap<&'a str, Vec<ModelRef>> {
    let mut by_model: IndexMap<&str, Vec<ModelRef>> = IndexMap::new();
    for (service, models) in services {
        for model in models.models.keys() {
            let refs = by_model.entry(model).or_default();
            let at = if default_service == Some(service) { 0 } else { refs.len() };
            refs.insert(at, ModelRef::new(service, model));
        }
    }
    by_model
}

/// What models are called besides their own names, and where requests go that name none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Naming {
    /// Other names, also with a wildcard, and the models behind them, in the order of preference.
    pub aliases: Vec<(String, Vec<ModelRef>)>,
    /// Which models are asked, in order, when the one of this name (also with a wildcard) cannot serve.
    pub fallbacks: Vec<(String, Vec<ModelRef>)>,
    /// For a body that names no model; empty: it is refused.
    pub default_model: Vec<ModelRef>,
    /// For paths that belong to no model.
    pub default_service: Option<ModelRef>,
    /// For all that is asked for under `/v1`, where there is one upstream and no models are known.
    pub everything: Option<ModelRef>,
    /// What a list of the models has in it.
    pub listed: Listed,
}

/// A model of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelRef {
    /// The service's name.
    pub service: String,
    /// The model's name, also one with a wildcard.
    pub model: String,
    /// What it is called there, where that is not what the client called it.
    pub name: Option<String>,
}

impl ModelRef {
    /// One that is called there what the client called it.
    pub fn new(service: &str, model: &str) -> Self {
        Self { service: service.to_owned(), model: model.to_owned(), name: None }
    }

    /// What it is called there, as far as is known.
    #[must_use]
    pub fn called(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.model)
    }

    /// One that the client called by another name than its own.
    #[must_use]
    pub fn renamed(mut self) -> Self {
        self.name.get_or_insert_with(|| self.model.clone());
        self
    }
}

/// What a list of the models has in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Listed {
    /// Every model.
    #[default]
    All,
    /// Those that a backend can serve now.
    Healthy,
}
