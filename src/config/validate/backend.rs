//! One backend: its credential, its weight and how it is checked.

use std::sync::Arc;

use http::{HeaderName, HeaderValue, Method};
use indexmap::IndexMap;

use super::super::defaults;
use super::super::file::{FileBackend, FileHealthCheck, FileProbe, FileProtocol, Statuses};
use super::super::problem::{KeyPath, Problems};
use super::super::snapshot::{BackendSpec, Credential, Deadlines, ProbeSpec, Protocol};
use super::{Context, auth_mode, ledger, positive, secret, tls, url};

/// What a backend has from its pool.
pub(super) struct OfPool<'a> {
    pub(super) health: &'a FileHealthCheck,
    pub(super) deadlines: Deadlines,
}

/// Validates a backend; with it, whether it has a key of its own.
pub(super) fn backend(
    file: &FileBackend,
    at: &KeyPath,
    pool: &OfPool<'_>,
    context: &Context<'_>,
    problems: &mut Problems,
) -> (Option<BackendSpec>, bool) {
    let id = match file.id.as_deref() {
        Some(id) if !id.trim().is_empty() => id.to_owned(),
        Some(_) => {
            problems.value(&at.key("id"), "cannot be empty");
            String::new()
        }
        None => {
            if !problems.has(&at.key("id")) {
                problems.value(&at.key("id"), "is missing; every backend needs an id");
            }
            String::new()
        }
    };
    let weight = file.weight.unwrap_or(defaults::WEIGHT);
    if !(0.0..=defaults::WEIGHT_MAX).contains(&weight) {
        problems.value(
            &at.key("weight"),
            format!("expected a weight from 0 (drained) to {}", defaults::WEIGHT_MAX),
        );
    }
    let url = match file.url.as_deref() {
        Some(text) => url::parse(text),
        None => Err("is missing; it says where the backend is".to_owned()),
    };
    let url = match url {
        Ok(url) => Some(url),
        Err(message) => {
            if !problems.has(&at.key("url")) {
                problems.value(&at.key("url"), message);
            }
            None
        }
    };
    let (credential, has_key) = credential(file, url.as_ref(), at, context, problems);
    let probe = probe(file.health_check.as_ref(), pool.health, at, problems);
    if file.tls.is_some() && url.as_ref().is_some_and(|url| !url.url.tls) {
        problems.key(&at.key("tls"), "is for backends with an https URL");
    }
    let price = file.price.as_ref();
    let tariff = price
        .and_then(|price| ledger::tariff(price, &at.key("price"), context.prices_per, problems));
    let spec = url.map(|url| BackendSpec {
        tariff: tariff.map(Arc::new),
        name: file.name.clone().unwrap_or_else(|| id.clone()),
        id,
        protocol: match file.protocol {
            Some(FileProtocol::Http2) => Protocol::Http2,
            Some(FileProtocol::Auto) => Protocol::Auto,
            Some(FileProtocol::Http1) | None => Protocol::Http1,
        },
        tls: tls::backend(file.tls.as_ref(), &url.url, &at.key("tls"), context.files, problems),
        url: url.url,
        weight,
        priority: file.priority.unwrap_or(0),
        model: file.model.clone().filter(|name| !name.is_empty()),
        credential,
        probe,
        inflight_max: file.inflight_max.unwrap_or(context.inflight_max) as usize,
        deadlines: pool.deadlines,
        idle_timeout: context.idle_timeout,
    });
    (spec, has_key)
}

/// What a backend is sent as credential, and whether that is its own.
fn credential(
    file: &FileBackend,
    url: Option<&url::ParsedUrl>,
    at: &KeyPath,
    context: &Context<'_>,
    problems: &mut Problems,
) -> (Option<Credential>, bool) {
    let own_key = secret(
        "api_key",
        (file.api_key.as_ref(), file.api_key_file.as_deref()),
        at,
        context.files,
        problems,
    );
    let basic = url.and_then(|url| url.basic.as_ref());
    let credential = match (own_key.as_ref(), basic, context.global_key.as_ref()) {
        (None, Some(basic), _) => {
            Credential::raw(http::header::AUTHORIZATION, &format!("Basic {basic}")).map(Some)
        }
        (Some(key), _, _) | (None, None, Some(key)) => {
            Credential::new(file.auth_mode.map_or(context.auth_mode, auth_mode), key)
        }
        (None, None, None) => Ok(None),
    };
    let credential = credential.unwrap_or_else(|message| {
        problems.value(&at.key("api_key"), message);
        None
    });
    (credential, own_key.is_some() || basic.is_some())
}

fn probe(
    own: Option<&FileProbe>,
    pool: &FileHealthCheck,
    at: &KeyPath,
    problems: &mut Problems,
) -> ProbeSpec {
    let at = at.key("health_check");
    let none = FileProbe::default();
    let own = own.unwrap_or(&none);
    check_probe(
        (own.method.as_deref(), own.path.as_deref(), own.expect_status.as_ref()),
        own.headers.as_ref(),
        &at,
        problems,
    );
    let timeout = own.timeout.or(pool.timeout);
    let method =
        own.method.as_deref().or(pool.method.as_deref()).unwrap_or(defaults::HEALTH_METHOD);
    let path = own.path.as_deref().or(pool.path.as_deref()).unwrap_or(defaults::HEALTH_PATH);
    let statuses = own.expect_status.as_ref().or(pool.expect_status.as_ref());
    let headers = own.headers.as_ref().or(pool.headers.as_ref());
    ProbeSpec {
        timeout: match own.timeout {
            Some(_) => positive(timeout, &at.key("timeout"), defaults::HEALTH_TIMEOUT, problems),
            None => timeout.map_or(defaults::HEALTH_TIMEOUT, |span| span.0),
        },
        method: read_method(method).unwrap_or(Method::GET),
        path: path.to_owned(),
        expect_status: statuses.map_or(vec![defaults::HEALTH_STATUS], |list| list.0.clone()),
        headers: headers
            .iter()
            .flat_map(|headers| headers.iter())
            .filter_map(read_header)
            .collect(),
    }
}

/// Checks the parts of a probe where they are written.
pub(super) fn check_probe(
    (method, path, statuses): (Option<&str>, Option<&str>, Option<&Statuses>),
    headers: Option<&IndexMap<String, String>>,
    at: &KeyPath,
    problems: &mut Problems,
) {
    if method.is_some_and(|method| read_method(method).is_none()) {
        problems.value(&at.key("method"), "expected GET, HEAD, POST or OPTIONS");
    }
    let is_path = |path: &str| {
        path.starts_with('/')
            && path.bytes().all(|byte| byte.is_ascii_graphic())
            && !path.contains('#')
    };
    if path.is_some_and(|path| !is_path(path)) {
        problems.value(&at.key("path"), "expected a path such as /health");
    }
    if statuses.is_some_and(|statuses| statuses.0.is_empty()) {
        problems.value(&at.key("expect_status"), "needs at least one status");
    }
    for header in headers.into_iter().flatten() {
        if read_header(header).is_none() {
            problems.value(&at.key("headers").key(header.0), "cannot stand in a header");
        }
    }
}

fn read_method(text: &str) -> Option<Method> {
    [Method::GET, Method::HEAD, Method::POST, Method::OPTIONS]
        .into_iter()
        .find(|method| method.as_str().eq_ignore_ascii_case(text))
}

fn read_header((name, value): (&String, &String)) -> Option<(HeaderName, HeaderValue)> {
    Some((name.parse().ok()?, HeaderValue::from_str(value).ok()?))
}
