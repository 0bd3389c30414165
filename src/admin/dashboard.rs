//! The dashboard: one embedded page without outside assets.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::header::{
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderValue, Response};
use ring::digest::{SHA256, digest};

const PAGE: &str = include_str!("dashboard.html");

/// The page and the policy under which a browser runs it.
pub(super) struct Dashboard {
    policy: HeaderValue,
}

impl Dashboard {
    pub(super) fn new() -> Self {
        // Only the page's own script and style run, told by their hashes.
        let policy = format!(
            "default-src 'none'; script-src '{}'; style-src '{}'; connect-src 'self'; \
             img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            source_hash("script"),
            source_hash("style"),
        );
        let policy = HeaderValue::try_from(policy).expect("hashes and words can stand in a header");
        Self { policy }
    }

    pub(super) fn page(&self) -> Response<Bytes> {
        let mut page = Response::new(Bytes::from_static(PAGE.as_bytes()));
        let headers = page.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
        headers.insert(CONTENT_SECURITY_POLICY, self.policy.clone());
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        page
    }
}

/// The hash of an inline element's text as a policy names it.
fn source_hash(element: &str) -> String {
    let text = PAGE
        .split_once(&format!("<{element}>"))
        .and_then(|(_, rest)| rest.split_once(&format!("</{element}>")))
        .map(|(text, _)| text)
        .expect("the embedded page has the element");
    format!("sha256-{}", BASE64_STANDARD.encode(digest(&SHA256, text.as_bytes())))
}
