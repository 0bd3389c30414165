//! The dashboard: one embedded page without outside assets.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::header::{
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderValue, Response};
use ring::digest::{SHA256, digest};

const PAGE: &str = include_str!("dashboard/page.html");
const STYLE: &str = include_str!("dashboard/style.css");

/// The parts of its one script: what stands in a later one is used by those before only when all are there.
const SCRIPT: &[&str] = &[
    "\"use strict\";\n",
    include_str!("dashboard/texts.js"),
    include_str!("dashboard/base.js"),
    include_str!("dashboard/summary.js"),
    include_str!("dashboard/plots.js"),
    include_str!("dashboard/pools.js"),
    include_str!("dashboard/tables.js"),
    include_str!("dashboard/link.js"),
    include_str!("dashboard/actions.js"),
];

/// The page and the policy under which a browser runs it.
pub(super) struct Dashboard {
    page: Bytes,
    policy: HeaderValue,
}

impl Dashboard {
    pub(super) fn new() -> Self {
        let script = SCRIPT.concat();
        let page = PAGE.replacen("STYLE", STYLE, 1).replacen("SCRIPT", &script, 1);
        // Only the page's own script and style run, told by their hashes.
        let policy = format!(
            "default-src 'none'; script-src '{}'; style-src '{}'; connect-src 'self'; \
             img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            hash(&script),
            hash(STYLE),
        );
        let policy = HeaderValue::try_from(policy).expect("hashes and words can stand in a header");
        Self { page: page.into(), policy }
    }

    pub(super) fn page(&self) -> Response<Bytes> {
        let mut page = Response::new(self.page.clone());
        let headers = page.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
        headers.insert(CONTENT_SECURITY_POLICY, self.policy.clone());
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        page
    }
}

/// The hash of an inline element's text as a policy names it.
fn hash(text: &str) -> String {
    format!("sha256-{}", BASE64_STANDARD.encode(digest(&SHA256, text.as_bytes())))
}
