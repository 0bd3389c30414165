//! What models are called besides their own names: aliases, fallbacks, defaults.

use indexmap::IndexMap;

use super::super::file::{FileConfig, FileListed, OneOrMany};
use super::super::naming::{Listed, ModelRef, Naming, by_model};
use super::super::problem::{KeyPath, Problems};
use super::super::snapshot::Service;
use super::item_path;
use crate::names::{Names, Pattern};

/// How much alike two names are that are taken for the same one, mistyped.
const SIMILAR: f64 = 0.7;

/// The models by all that they can be called.
struct Models {
    names: Names<Vec<ModelRef>>,
    known: Vec<String>,
}

impl Models {
    fn of(services: &IndexMap<String, Service>, default_service: Option<&str>) -> Self {
        let by_model = by_model(services, default_service);
        let mut models = Self { names: Names::default(), known: Vec::new() };
        for (model, refs) in &by_model {
            models.known.push((*model).to_owned());
            models.names.add(model, refs.clone());
        }
        // A model's own name goes before one that is put together.
        for one in by_model.values().flatten() {
            models.names.add(&format!("{}/{}", one.service, one.model), vec![one.clone()]);
        }
        models
    }

    /// Where a name leads, with the name that is sent where that is a model with a wildcard.
    fn find(&self, name: &str) -> Option<Vec<ModelRef>> {
        let mut refs = self.names.find(name)?.clone();
        for one in &mut refs {
            if Pattern::parse(&one.model).is_some() {
                let whole = format!("{}/", one.service);
                let own = name.strip_prefix(&whole).unwrap_or(name);
                one.name = Some(own.to_owned());
            }
        }
        Some(refs)
    }

    /// The models of a name that stands in the place of another one.
    fn find_or_tell(&self, name: &str, at: &KeyPath, problems: &mut Problems) -> Vec<ModelRef> {
        if name.contains('*') {
            problems.value(at, "a wildcard leads nowhere; name one model");
            return Vec::new();
        }
        let refs = self.find(name).unwrap_or_else(|| {
            let alike = |known: &&String| strsim::normalized_damerau_levenshtein(name, known);
            let nearest = self.known.iter().max_by(|a, b| alike(a).total_cmp(&alike(b)));
            let hint = match nearest.filter(|known| alike(known) > SIMILAR) {
                Some(nearest) => format!(", did you mean {nearest:?}?"),
                None => String::new(),
            };
            problems.value(at, format!("there is no model {name:?}{hint}"));
            Vec::new()
        });
        refs.into_iter().map(ModelRef::renamed).collect()
    }
}

/// Resolves all names. `default_service` is checked against the services.
pub(super) fn naming(
    file: &FileConfig,
    services: &IndexMap<String, Service>,
    problems: &mut Problems,
) -> Naming {
    let root = KeyPath::default();
    let default_service = file.default_service.as_deref();
    let service = default_service.and_then(|name| services.get(name));
    if default_service.is_some() && service.is_none() {
        problems.value(&root.key("default_service"), "there is no service of this name");
    }
    let mut models = Models::of(services, default_service);
    let aliases = aliases(file, &mut models, problems);
    let default_model = match &file.default_model {
        Some(name) => models.find_or_tell(name, &root.key("default_model"), problems),
        None => Vec::new(),
    };
    Naming {
        fallbacks: fallbacks(file, &models, problems),
        aliases,
        default_model,
        default_service: default_service.zip(service).and_then(|(name, service)| {
            let (model, _) = service.models.first()?;
            Some(ModelRef::new(name, model))
        }),
        everything: None,
        listed: match file.models_listed {
            Some(FileListed::Healthy) => Listed::Healthy,
            Some(FileListed::All) | None => Listed::All,
        },
    }
}

fn aliases(
    file: &FileConfig,
    models: &mut Models,
    problems: &mut Problems,
) -> Vec<(String, Vec<ModelRef>)> {
    let path = KeyPath::default().key("aliases");
    let mut aliases = Vec::new();
    for (alias, target) in file.aliases.iter().flatten() {
        let at = path.key(alias);
        check_name(alias, &at, problems);
        if models.names.has(alias) {
            problems.key(&at, "a model has this name already");
        }
        if models.find(target).is_none()
            && file.aliases.iter().flatten().any(|(it, _)| it == target)
        {
            problems.value(&at, "an alias stands for a model, not for another alias");
            continue;
        }
        aliases.push((alias.clone(), models.find_or_tell(target, &at, problems)));
    }
    // Not before: an alias of an alias would depend on their order.
    for (alias, refs) in &aliases {
        models.names.add(alias, refs.clone());
        models.known.push(alias.clone());
    }
    aliases
}

fn fallbacks(
    file: &FileConfig,
    models: &Models,
    problems: &mut Problems,
) -> Vec<(String, Vec<ModelRef>)> {
    let path = KeyPath::default().key("fallbacks");
    let mut fallbacks = Vec::new();
    let none = OneOrMany::default();
    for (name, targets) in file.fallbacks.iter().flatten() {
        let at = path.key(name);
        let targets = targets.as_ref().unwrap_or(&none);
        if !name.contains('*') && models.find(name).is_none() {
            models.find_or_tell(name, &at, problems);
        }
        check_name(name, &at, problems);
        let mut refs = Vec::new();
        for (index, target) in targets.items.iter().enumerate() {
            let at = item_path(targets, &at, index);
            if target == name {
                problems.value(&at, "a model is no fallback of itself");
            }
            for one in models.find_or_tell(target, &at, problems) {
                if !refs.contains(&one) {
                    refs.push(one);
                }
            }
        }
        fallbacks.push((name.clone(), refs));
    }
    fallbacks
}

/// Checks the name of a model or alias.
pub(super) fn check_name(name: &str, at: &KeyPath, problems: &mut Problems) {
    if name.matches('*').count() > 1 {
        problems.key(at, "a name has one * at most");
    } else if name.contains(char::is_control) {
        problems.key(at, "a name cannot hold control characters");
    } else if name.is_empty() || name.trim_matches('/') != name {
        problems.key(at, "a model's name cannot be empty or begin or end with a slash");
    } else if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        problems.key(at, "a model's name cannot hold an empty or a dot segment");
    }
}
