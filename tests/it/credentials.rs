//! Who may pass, and which credential a backend gets.

use crate::harness::{Gateway, Upstream, get, post};

const CLIENT: [&str; 2] = ["Authorization: Bearer client-key", "X-Goog-Api-Key: client-key"];

/// A gateway with one backend a line, each its own model `m0`, `m1`, ...
fn gateway(top: &str, upstream: &Upstream, backends: &[&str]) -> Gateway {
    let url = upstream.url();
    let mut config = format!("listen: 127.0.0.1:0\n{top}\nservices:\n  svc:\n    models:\n");
    for (number, settings) in backends.iter().enumerate() {
        config.push_str(&format!(
            "      m{number}: {{backends: [{{id: a, url: \"{url}\", {settings}}}]}}\n"
        ));
    }
    Gateway::start(&config)
}

/// The credentials that the upstream got, as `header: value` lines.
fn got(upstream: &Upstream) -> Vec<String> {
    let credentials = ["authorization", "x-api-key", "api-key", "x-goog-api-key"];
    let headers = upstream.last().headers;
    let named = |name: &str| credentials.iter().any(|known| name.eq_ignore_ascii_case(known));
    let mut lines: Vec<String> = headers
        .into_iter()
        .filter(|(name, _)| named(name))
        .map(|(name, value)| format!("{}: {value}", name.to_lowercase()))
        .collect();
    lines.sort();
    lines
}

#[test]
fn without_any_key_the_clients_credential_passes_untouched() {
    let upstream = Upstream::named("x");
    let gateway = gateway("", &upstream, &["weight: 1"]);
    assert_eq!(get(gateway.address(), "/svc/m0/x", &CLIENT).status, 200);
    assert_eq!(got(&upstream), ["authorization: Bearer client-key", "x-goog-api-key: client-key"]);
}

#[test]
fn a_backends_key_replaces_the_clients_in_each_mode() {
    let upstream = Upstream::named("x");
    let gateway = gateway(
        "",
        &upstream,
        &[
            "api_key: sk-b",
            "api_key: sk-b, auth_mode: x-api-key",
            "api_key: sk-b, auth_mode: api-key",
            "api_key: sk-b, auth_mode: x-goog-api-key",
            "api_key: sk-b, auth_mode: none",
            "weight: 1",
        ],
    );
    let expected: [&[&str]; 6] = [
        &["authorization: Bearer sk-b"],
        &["x-api-key: sk-b"],
        &["api-key: sk-b"],
        &["x-goog-api-key: sk-b"],
        &[],
        // No key for this one, but the gateway has keys: the client's own goes no further.
        &[],
    ];
    for (number, expected) in expected.iter().enumerate() {
        assert_eq!(get(gateway.address(), &format!("/svc/m{number}/x"), &CLIENT).status, 200);
        assert_eq!(got(&upstream), *expected, "m{number}");
    }
}

#[test]
fn the_global_key_is_asked_of_clients_and_given_to_backends_without_one() {
    let upstream = Upstream::named("x");
    let variables = [("BACKEND_API_KEY", "sk-global"), ("BACKEND_AUTH_MODE", "x-api-key")];
    let url = upstream.url();
    let config = format!(
        "listen: 127.0.0.1:0\nservices: {{svc: {{models: {{m0: {{backends: [{{id: a, url: \"{url}\"}}]}}, m1: {{backends: [{{id: a, url: \"{url}\", api_key: sk-own, auth_mode: Authorization}}]}}}}}}}}"
    );
    let gateway = Gateway::start_with(&config, &variables, &[]);
    let good = [
        "Authorization: Bearer sk-global",
        "X-API-Key: sk-global",
        "api-key: sk-global",
        "x-goog-api-key: sk-global",
    ];
    for header in good {
        assert_eq!(get(gateway.address(), "/svc/m0/x", &[header]).status, 200, "{header}");
        assert_eq!(got(&upstream), ["x-api-key: sk-global"]);
        assert_eq!(get(gateway.address(), "/svc/m1/x", &[header]).status, 200, "{header}");
        assert_eq!(got(&upstream), ["authorization: Bearer sk-own"]);
    }
}

#[test]
fn a_credential_that_some_backends_would_read_behind_underscores_is_dropped_too() {
    let upstream = Upstream::named("x");
    let gateway = gateway("api_key: sk-right", &upstream, &["weight: 1"]);
    let headers = ["X-API-Key: sk-right", "X_API_KEY: sk-client", "x_forwarded_for: 1.2.3.4"];
    assert_eq!(get(gateway.address(), "/svc/m0/x", &headers).status, 200);
    let seen = upstream.last();
    assert!(!seen.has("x_api_key") && !seen.has("x_forwarded_for"), "{seen:?}");
}

#[test]
fn a_missing_or_wrong_key_is_a_401_in_the_clients_dialect() {
    let upstream = Upstream::named("x");
    let gateway = gateway("api_key: sk-right", &upstream, &["weight: 1"]);
    let cases: [(&[&str], &str); 8] = [
        (&[], "missing_api_key"),
        (&["Authorization: Bearer "], "missing_api_key"),
        (&["X-API-Key: "], "missing_api_key"),
        (&["Authorization: Bearer SK-RIGHT"], "invalid_api_key"),
        (&["Authorization: sk-wrong"], "invalid_api_key"),
        (&["Authorization: Basic c2stcmlnaHQ="], "invalid_api_key"),
        (&["Authorization: Bearer sk-right", "X-API-Key: sk-other"], "invalid_api_key"),
        (&["X-API-Key: sk-right", "X-API-Key: sk-other"], "invalid_api_key"),
    ];
    for (headers, code) in cases {
        // Whether a service exists is not told to those who may not ask.
        for path in ["/svc/m0/v1/x", "/nope/nope/x"] {
            let answer = post(gateway.address(), path, headers, "{}");
            assert_eq!(answer.status, 401, "{headers:?}");
            assert_eq!(answer.json()["error"]["code"], code, "{headers:?}");
            assert_eq!(answer.header("www-authenticate"), "Bearer");
        }
        let answer = post(gateway.address(), "/svc/m0/v1/messages", headers, "{}");
        assert_eq!(answer.json()["error"]["type"], "authentication_error", "{headers:?}");
    }
    assert!(upstream.seen().is_empty(), "a refused request reached the backend");
}

#[test]
fn user_and_password_in_a_backends_url_become_its_basic_credential_and_are_never_shown() {
    let upstream = Upstream::named("x");
    let url = format!("http://user:hunter2@{}", upstream.address());
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\nlog: {{level: debug}}\nservices: {{svc: {{models: {{m0: {{backends: [{{id: a, url: \"{url}\"}}]}}}}}}}}"
    ));
    assert_eq!(get(gateway.address(), "/svc/m0/x", &CLIENT).status, 200);
    assert_eq!(got(&upstream), ["authorization: Basic dXNlcjpodW50ZXIy"]);
    let status = get(gateway.address(), "/api/health/status", &[]).text();
    assert!(status.contains(&upstream.url()) && !status.contains("hunter2"), "{status}");
    assert!(!gateway.log().join("\n").contains("hunter2"));
}

#[test]
fn keys_can_come_from_files_and_variables_and_are_in_no_output() {
    let upstream = Upstream::named("x");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("key"), "sk-from-file\n").unwrap();
    std::fs::write(folder.path().join(".env"), "BACKEND_KEY=sk-from-dotenv\nOTHER=x\n").unwrap();
    let url = upstream.url();
    let config = format!(
        "listen: 127.0.0.1:0\nlog: {{level: debug}}\napi_key_file: key\nservices: {{svc: {{models: {{m0: {{backends: [{{id: a, url: \"{url}\", api_key: \"${{BACKEND_KEY}}\"}}]}}}}}}}}"
    );
    std::fs::write(folder.path().join("tollgate.yaml"), config).unwrap();
    let mut gateway = Gateway::start_in(folder, &[], &[]);
    let path = "/svc/m0/x?key=sk-in-query";
    assert_eq!(get(gateway.address(), path, &["X-API-Key: sk-from-file"]).status, 200);
    assert_eq!(got(&upstream), ["authorization: Bearer sk-from-dotenv"]);
    assert_eq!(get(gateway.address(), path, &["X-API-Key: sk-wrong"]).status, 401);
    gateway.wait_log("401 (invalid_api_key)");
    let output =
        gateway.log().join("\n") + &get(gateway.address(), "/api/health/status", &[]).text();
    assert!(output.contains("/svc/m0/x"), "the exchange is not in the log: {output}");
    for secret in ["sk-from", "sk-wrong", "sk-in-query"] {
        assert!(!output.contains(secret), "{secret} is in {output}");
    }
}
