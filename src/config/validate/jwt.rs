//! Tokens that others issue.

use std::sync::Arc;

use jsonwebtoken::jwk::JwkSet;
use url::Url;

use super::super::clients::KeySpec;
use super::super::defaults;
use super::super::file::{FileConfig, FileJwt};
use super::super::jwt::{JwksSource, JwtAlgorithm, JwtSpec};
use super::super::problem::{KeyPath, Problems};
use super::super::seen::SeenFile;
use super::keys::{addresses, names};
use super::{Context, item_path, limits, read_secret};

/// Who issues tokens that are accepted.
pub(super) fn issuers(
    file: &FileConfig,
    context: &Context<'_>,
    problems: &mut Problems,
) -> Vec<JwtSpec> {
    let path = KeyPath::default().key("jwt");
    let mut specs: Vec<JwtSpec> = Vec::new();
    for (index, issuer) in file.jwt.iter().flatten().enumerate() {
        let at = path.index(index);
        let Some(issuer) = issuer else {
            if !problems.has_below(&at) {
                problems.value(&at, "expected an issuer, found nothing");
            }
            continue;
        };
        let Some(spec) = read(issuer, &at, context, problems) else { continue };
        specs.push(spec);
        let Some((last, before)) = specs.split_last() else { continue };
        if before.iter().any(|known| known.grant.id == last.grant.id) {
            problems.value(&at.key("name"), "another issuer has this name");
        }
        if before.iter().any(|known| known.issuer == last.issuer) {
            problems.value(&at.key("issuer"), "it stands here twice");
        }
    }
    specs
}

fn read(
    issuer: &FileJwt,
    at: &KeyPath,
    context: &Context<'_>,
    problems: &mut Problems,
) -> Option<JwtSpec> {
    let mut text = |key: &str, written: &Option<String>| {
        let text = written.clone().filter(|text| !text.trim().is_empty());
        if text.is_none() && !problems.has_below(&at.key(key)) {
            problems.value(at, format!("{key:?} is missing"));
        }
        text
    };
    let (name, issued_by) = (text("name", &issuer.name), text("issuer", &issuer.issuer));
    let keys = source(issuer, at, context, problems);
    let algorithms = algorithms(issuer, at, problems);
    let name: Arc<str> = name.unwrap_or_default().into();
    let grant = KeySpec {
        id: Arc::clone(&name),
        name,
        hashes: Vec::new(),
        enabled: true,
        expires: None,
        is_admin: issuer.admin.unwrap_or(false),
        models: names(issuer.models.as_ref(), &at.key("models"), problems),
        services: names(issuer.services.as_ref(), &at.key("services"), problems),
        addresses: addresses(issuer.addresses.as_ref(), &at.key("addresses"), problems),
        labels: Arc::default(),
        reserved_tokens: 0,
        limits: limits::limits(
            issuer.limits.as_deref().unwrap_or_default(),
            &at.key("limits"),
            true,
            problems,
        ),
    };
    Some(JwtSpec {
        issuer: issued_by?,
        audiences: issuer.audience.as_ref().map(|it| it.items.clone()).unwrap_or_default(),
        keys: keys?,
        algorithms,
        name_claim: issuer.name_claim.clone().unwrap_or_else(|| "sub".to_owned()),
        models_claim: issuer.models_claim.clone(),
        leeway: issuer.leeway.map_or(defaults::JWT_LEEWAY, |span| span.0),
        grant: Arc::new(grant),
    })
}

fn source(
    issuer: &FileJwt,
    at: &KeyPath,
    context: &Context<'_>,
    problems: &mut Problems,
) -> Option<JwksSource> {
    match (&issuer.jwks_url, &issuer.jwks_file) {
        (Some(_), Some(_)) => {
            problems.key(&at.key("jwks_file"), "jwks_url stands here too; keep one of the two");
            None
        }
        (None, None) => {
            let is_told = ["jwks_url", "jwks_file"].map(|key| problems.has_below(&at.key(key)));
            if !is_told.contains(&true) {
                problems.value(at, "\"jwks_url\" or \"jwks_file\" is missing: its public keys");
            }
            None
        }
        (Some(text), None) => match text.parse::<Url>() {
            Ok(url) if !url.username().is_empty() || url.password().is_some() => {
                problems.value(&at.key("jwks_url"), "public keys take no password; leave it out");
                None
            }
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => {
                Some(JwksSource::Url(url))
            }
            _ => {
                problems.value(&at.key("jwks_url"), "expected an https URL");
                None
            }
        },
        (None, Some(name)) => {
            let key = at.key("jwks_file");
            let path = context.files.folder.join(name);
            context.files.read.borrow_mut().push(SeenFile::look(&path));
            match read_secret(&path) {
                Ok(text) => {
                    let set = serde_json::from_str::<JwkSet>(&text);
                    if !set.is_ok_and(|set| !set.keys.is_empty()) {
                        problems.value(&key, "expected a JWKS (RFC 7517) with at least one key");
                    }
                    Some(JwksSource::Text(text))
                }
                Err(error) => {
                    problems.value(&key, format!("cannot read {}: {error}", path.display()));
                    None
                }
            }
        }
    }
}

fn algorithms(issuer: &FileJwt, at: &KeyPath, problems: &mut Problems) -> Vec<JwtAlgorithm> {
    let path = at.key("algorithms");
    let all = vec![JwtAlgorithm::Rs256, JwtAlgorithm::Es256, JwtAlgorithm::EdDsa];
    let Some(written) = &issuer.algorithms else { return all };
    let mut algorithms = Vec::new();
    for (index, name) in written.items.iter().enumerate() {
        algorithms.push(match name.as_str() {
            "RS256" => JwtAlgorithm::Rs256,
            "ES256" => JwtAlgorithm::Es256,
            "EdDSA" => JwtAlgorithm::EdDsa,
            _ => {
                let at = item_path(written, &path, index);
                problems.value(&at, "expected RS256, ES256 or EdDSA");
                continue;
            }
        });
    }
    algorithms
}
