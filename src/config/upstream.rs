//! The configuration that `UPSTREAM_URL` alone is: one upstream for all that is asked for under `/v1`.

use std::path::Path;

use indexmap::IndexMap;

use super::beside::Beside;
use super::defaults;
use super::environment::Environment;
use super::file::{FileBackend, FileConfig, FileHealthCheck, FileModel, FileService, Statuses};
use super::naming::ModelRef;
use super::problem::{ConfigError, Place, Problem, Problems};
use super::snapshot::Snapshot;
use super::source::UPSTREAM_URL;
use super::validate::Surroundings;
use super::{overrides, report, validate};
use crate::hooks::HookKinds;

/// What service and model are called, in status and log.
const SERVICE: &str = "upstream";
const MODEL: &str = "all";

/// The snapshot, with the other variables laid over it.
pub(super) fn read(environment: &Environment) -> Result<Snapshot, ConfigError> {
    let backend = FileBackend {
        id: Some(SERVICE.to_owned()),
        url: environment.get(UPSTREAM_URL).map(str::to_owned),
        ..FileBackend::default()
    };
    // Whatever it is, it may have no health page, or want a key for it; that it answers is enough.
    let health_check = FileHealthCheck {
        expect_status: Some(Statuses((200..500).collect())),
        ..FileHealthCheck::default()
    };
    let model = FileModel { backends: Some(vec![Some(backend)]), ..FileModel::default() };
    let service = FileService {
        models: Some(IndexMap::from([(MODEL.to_owned(), model)])),
        ..FileService::default()
    };
    let mut file = FileConfig {
        services: Some(IndexMap::from([(SERVICE.to_owned(), service)])),
        health_check: Some(health_check),
        limits: Some(vec![Some(overrides::default_rate_limit())]),
        ..FileConfig::default()
    };
    let mut problems = Problems::default();
    overrides::apply(&mut file, environment, &mut problems);
    let no_file = Path::new("");
    // Without a file there are no hooks.
    let kinds = &HookKinds::default();
    let defaults = &defaults::ENVIRONMENT;
    let surroundings = Surroundings { defaults, path: no_file, environment, kinds };
    let mut snapshot = validate::validate(&file, &Beside::default(), &surroundings, &mut problems);
    snapshot.naming.everything = Some(ModelRef::new(SERVICE, MODEL));
    if problems.is_empty() {
        return Ok(snapshot);
    }
    let of_variable = |problem: Problem| match problem.place {
        Place::Variable(_) => problem,
        _ => Problem { place: Place::Variable(UPSTREAM_URL.to_owned()), ..problem },
    };
    let problems = problems.into_vec().into_iter().map(of_variable).collect();
    Err(report(problems, b"", no_file))
}
