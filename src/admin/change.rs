//! What an operator may change from outside: the configuration is read again, a backend is taken out of service.

use std::net::IpAddr;
use std::sync::Arc;

use http::header::ORIGIN;
use http::{HeaderMap, Method};
use percent_encoding::percent_decode_str;
use serde_json::json;

use super::{json_text, refusal_page};
use crate::config::ClientKeys;
use crate::pool::Backend;
use crate::refusal::Refusal;
use crate::runtime::{PageAnswer, PageRequest, Runtime};

/// Takes a backend out of service, and back into it.
pub(super) const DRAIN: &str = "/admin/drain";
pub(super) const UNDRAIN: &str = "/admin/undrain";

/// Whether this request may change the gateway: an admin's key is needed where there are keys, and a page of another
/// origin cannot make a browser ask.
///
/// # Errors
/// Why it may not; else who asks, for the log.
pub(super) fn check(runtime: &Runtime, request: &PageRequest<'_>) -> Result<String, Refusal> {
    if *request.method != Method::POST {
        return Err(Refusal::MethodNotAllowed { allow: "POST" });
    }
    let grant = runtime.grant(request.headers, request.client)?;
    if !grant.is_admin {
        return Err(Refusal::NotAllowed);
    }
    let is_open = !matches!(runtime.snapshot.clients, ClientKeys::Required(_));
    if is_foreign(request.headers, request.host, is_open) {
        return Err(Refusal::OtherOrigin);
    }
    let key = if grant.key_id.is_empty() { "-" } else { &*grant.key_id };
    let address = request.client.map_or_else(|| "-".to_owned(), |client| client.to_string());
    Ok(format!("key {key}, from {address}"))
}

/// Whether a browser sends it for a page that is not ours. Where no key is needed, a name that somebody has pointed at
/// our address would make its page one of ours: then only addresses count.
fn is_foreign(headers: &HeaderMap, host: &[u8], is_open: bool) -> bool {
    let Some(origin) = headers.get(ORIGIN) else { return false };
    let origin = origin.as_bytes();
    let origin_host = origin.windows(3).position(|window| window == b"://");
    let is_other = origin_host.is_none_or(|at| &origin[at + 3..] != host);
    is_other || is_open && !is_address(host)
}

/// Whether a `Host` is an address or this machine's own name, and no other name.
fn is_address(host: &[u8]) -> bool {
    let host = std::str::from_utf8(host).unwrap_or_default();
    let without_port = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = without_port.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let bare = bare.unwrap_or(without_port);
    bare.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

/// Takes the backend that the query names (`service`, `model`, `backend`) out of service, or back into it.
pub(super) fn drain(runtime: &Runtime, request: &PageRequest<'_>, is_drained: bool) -> PageAnswer {
    let bad = |reason| Refusal::BadRequest { reason };
    let found = check(runtime, request).and_then(|asker| {
        let named = named(runtime, request.query);
        let named = named.ok_or(bad("the query takes service, model and backend"))?;
        let (pool, backend) =
            named.ok_or(bad("there is no such backend in this service and model"))?;
        Ok((pool, backend, asker))
    });
    let (pool, backend, asker) = match found {
        Ok(found) => found,
        Err(refusal) => return PageAnswer::Now(refusal_page(&refusal)),
    };
    if backend.drain(is_drained) {
        let what = if is_drained { "drained" } else { "no longer drained" };
        log::warn!("backend {} of {pool} is {what}, as asked for by {asker}", backend.spec.id);
    }
    let inflight = backend.inflight();
    let state = json!({"id": backend.spec.id, "drained": is_drained, "in_flight": inflight});
    PageAnswer::Now(json_text(state.to_string()))
}

/// The backend that a query names, with its pool's name; none: it names no backend, or there is none.
fn named(runtime: &Runtime, query: &str) -> Option<Option<(String, Arc<Backend>)>> {
    let mut names: [Option<String>; 3] = Default::default();
    for pair in query.trim_start_matches('?').split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=')?;
        let at = ["service", "model", "backend"].iter().position(|known| *known == name)?;
        let value = percent_decode_str(value).decode_utf8().ok()?;
        names[at] = Some(value.into_owned());
    }
    let [Some(service), Some(model), Some(id)] = names else { return None };
    let found = runtime.pool(&service, &model).and_then(|pool| {
        let backend = pool.backends().iter().find(|backend| backend.spec.id == id)?;
        Some((pool.name().to_owned(), Arc::clone(backend)))
    });
    Some(found)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(origin: &'static str) -> HeaderMap {
        let origins = [origin].into_iter().filter(|origin| !origin.is_empty());
        origins.map(|origin| (ORIGIN, HeaderValue::from_static(origin))).collect()
    }

    #[test]
    fn pages_of_other_origins_are_told_from_ours() {
        for (origin, host, is_foreign_with_keys, is_foreign_without) in [
            ("", "gw.example.com", false, false),
            ("http://127.0.0.1:9000", "127.0.0.1:9000", false, false),
            ("http://[::1]:9000", "[::1]:9000", false, false),
            ("http://localhost:9000", "localhost:9000", false, false),
            ("https://gw.example.com", "gw.example.com", false, true),
            ("https://evil.example.com", "127.0.0.1:9000", true, true),
            ("http://127.0.0.1:9001", "127.0.0.1:9000", true, true),
            ("null", "127.0.0.1:9000", true, true),
        ] {
            let headers = headers(origin);
            let is_foreign = |is_open| is_foreign(&headers, host.as_bytes(), is_open);
            assert_eq!(is_foreign(false), is_foreign_with_keys, "{origin} at {host}");
            assert_eq!(is_foreign(true), is_foreign_without, "{origin} at {host}");
        }
    }
}
