//! The list of models, as the SDKs of each API family read it.

use std::time::UNIX_EPOCH;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Response};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::auth::{Grant, Wish};
use crate::llm;
use crate::refusal::Refusal;
use crate::routing::{self, Front};
use crate::runtime::{PageRequest, Runtime, Way};

/// Whose form the list has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    OpenAi,
    Anthropic,
    Gemini,
}

/// The answer to a request for the list or for one model; none when it is for neither.
pub(super) fn answer(
    runtime: &Runtime,
    request: &PageRequest<'_>,
) -> Option<Result<Response<Bytes>, Refusal>> {
    if !matches!(*request.method, Method::GET | Method::HEAD) {
        return None;
    }
    let path = routing::plain_path(request.path.as_bytes());
    let is_front = [&b"/v1"[..], b"/openai/"].iter().any(|it| path.starts_with(it));
    if !is_front || runtime.catalog.everything.is_some() {
        return None;
    }
    let family = if path.starts_with(b"/v1beta") || path.starts_with(b"/v1alpha") {
        Family::Gemini
    } else if llm::has_anthropic_version(request.headers) {
        Family::Anthropic
    } else {
        Family::OpenAi
    };
    Some(match routing::front(request.method, path, b"")? {
        Front::List => list(runtime, request, family),
        Front::One(name) => one(runtime, request, family, &name),
        Front::Exchange(_) | Front::Ambiguous => return None,
    })
}

fn list(
    runtime: &Runtime,
    request: &PageRequest<'_>,
    family: Family,
) -> Result<Response<Bytes>, Refusal> {
    let grant = runtime.grant(request.headers, request.client)?;
    let listed = runtime.catalog.listed();
    let names: Vec<(&str, &str)> =
        listed.filter_map(|(name, way)| Some((name, service(&grant, way, name)?))).collect();
    let models: Vec<Value> =
        names.iter().map(|(name, service)| model(runtime, family, name, service)).collect();
    let end = |name: Option<&(&str, &str)>| name.map(|(name, _)| (*name).to_owned());
    Ok(page(&match family {
        Family::OpenAi => json!({"object": "list", "data": models}),
        Family::Anthropic => json!({
            "data": models,
            "first_id": end(names.first()),
            "last_id": end(names.last()),
            "has_more": false,
        }),
        Family::Gemini => json!({"models": models}),
    }))
}

fn one(
    runtime: &Runtime,
    request: &PageRequest<'_>,
    family: Family,
    name: &str,
) -> Result<Response<Bytes>, Refusal> {
    let grant = runtime.grant(request.headers, request.client)?;
    let service = runtime.catalog.find(name).and_then(|way| service(&grant, way, name));
    let service = service.ok_or_else(|| Refusal::ModelUnknown { model: name.to_owned() })?;
    Ok(page(&model(runtime, family, name, service)))
}

/// The service of the first model behind a name that a client may have.
fn service<'w>(grant: &Grant, way: &'w Way, name: &str) -> Option<&'w str> {
    way.targets.iter().find_map(|target| {
        let (service, model) = target.names();
        let asked = (!target.is_fallback).then_some(name);
        grant.may_have(Wish { service, model: Some(model), asked }).then_some(service)
    })
}

fn model(runtime: &Runtime, family: Family, name: &str, service: &str) -> Value {
    let since = runtime.since.duration_since(UNIX_EPOCH).unwrap_or_default();
    match family {
        Family::OpenAi => json!({
            "id": name, "object": "model", "created": since.as_secs(), "owned_by": service,
        }),
        Family::Anthropic => {
            let since = Timestamp::from_second(i64::try_from(since.as_secs()).unwrap_or_default());
            let since = since.unwrap_or_default().to_string();
            json!({"type": "model", "id": name, "display_name": name, "created_at": since})
        }
        Family::Gemini => json!({"name": format!("models/{name}"), "displayName": name}),
    }
}

fn page(body: &Value) -> Response<Bytes> {
    let mut page = Response::new(Bytes::from(body.to_string()));
    page.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    page
}
