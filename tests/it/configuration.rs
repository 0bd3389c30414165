//! Configuration files and variables: what is accepted, what is refused, and in which words.

use std::path::{Path, PathBuf};

use crate::harness::{Gateway, Upstream, get, hash_of, run_program, send};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Exit code and both outputs of `tollgate ARGUMENTS`.
fn run(folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> (i32, String) {
    let output = run_program(folder, variables, arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().expect("it was not killed"), text)
}

#[test]
fn each_broken_configuration_is_refused_with_its_message() {
    let folder = root().join("tests/data/broken");
    let mut files = 0;
    let mut wrong = String::new();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let file = entry.unwrap().path();
        if file.extension().is_some_and(|extension| extension == "expected") {
            continue;
        }
        files += 1;
        let name = file.file_name().unwrap().to_str().unwrap();
        let expected = std::fs::read_to_string(file.with_extension("expected"))
            .unwrap_or_else(|_| panic!("{name} has no .expected beside it"));
        let (code, text) = run(&folder, &[], &["check", "-c", name]);
        if (code, text.as_str()) != (78, expected.as_str()) {
            wrong.push_str(&format!("{name}: {code}\n{text}expected:\n{expected}"));
        }
    }
    assert!(files >= 50, "only {files} files");
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn a_huge_file_and_an_unreadable_one_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let huge = format!("# {}\n", "x".repeat(17 * 1024 * 1024));
    std::fs::write(folder.path().join("huge.yaml"), huge).unwrap();
    let (code, text) = run(folder.path(), &[], &["check", "-c", "huge.yaml"]);
    assert!(code == 78 && text.contains("it may have at most"), "{text}");
    let (code, text) = run(folder.path(), &[], &["check", "-c", "none.yaml"]);
    assert!(code == 78 && text.contains("none.yaml: cannot read it: No such file"), "{text}");
    let (code, text) = run(folder.path(), &[], &["check", "-c", "."]);
    assert!(code == 78 && text.contains("a folder"), "{text}");
}

#[test]
fn what_is_allowed_and_does_nothing_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let hash = hash_of("k");
    let text = format!(
        "keys:\n\
           - {{name: a, hash: \"{hash}\", models: [good, \"go*\", bad], services: [svc, other], expires: 2020-01-01,\n\
               limits: [{{budget_daily: 1, models: [\"bad*\"]}}]}}\n\
         jwt: [{{name: sso, issuer: i, jwks_url: \"http://127.0.0.1:1\", models: [bad, nick, svc/good, \"svc/*\", \"*\"]}}]\n\
         limits: [{{per: key, requests: 1, models: [god, \"wild-*\"], services: [\"s*\", \"x*\"], keys: [whoever]}}]\n\
         prices: {{models: {{\"g*\": {{input: 1}}, wrong: {{input: 1}}}}}}\n\
         aliases: {{nick: good}}\n\
         services: {{svc: {{models: {{good: {{backends: [{{id: a, url: \"http://127.0.0.1:1\"}}]}}, \"wild-x*\": {{backends: [{{id: a, url: \"http://127.0.0.1:1\"}}]}}}}}}}}\n"
    );
    std::fs::write(folder.path().join("tollgate.yaml"), text).unwrap();
    let (code, text) = run(folder.path(), &[], &["check"]);
    let lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("warning: ")).collect();
    assert_eq!(
        (code, lines),
        (
            0,
            vec![
                "expired and of no use any more: key a",
                "no price, so nothing of it counts against budgets: svc/wild-x*",
                "there are budgets and no ledger: a restart forgets what was spent",
                "no model is called \"bad\", as in key a and 1 more",
                "no service is called \"other\", as in key a",
                "no model is called \"bad*\", as in key a",
                "no model is called \"god\", as in limit \"per key\"",
                "no service is called \"x*\", as in limit \"per key\"",
            ]
        )
    );
}

#[test]
fn the_shipped_configurations_are_fine() {
    for (file, summary) in [
        ("conf/minimal.yaml", "services: 1, models: 1, backends: 2"),
        ("conf/example.yaml", "services: 1, models: 1, backends: 1"),
        (
            "conf/backends.json",
            "services: 1, models: 1, backends: 2; with the defaults of a backends.json",
        ),
    ] {
        let (code, text) = run(&root(), &[], &["check", "-c", file]);
        assert_eq!((code, text.as_str()), (0, format!("{file}: fine ({summary})\n").as_str()));
    }
    let minimal = std::fs::read_to_string(root().join("conf/minimal.yaml")).unwrap();
    assert_eq!(minimal.lines().count(), 10);
}

#[test]
fn without_a_configuration_it_says_what_to_write_and_that_there_is_a_demo() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [&[][..], &["serve"], &["check"]] {
        let (code, text) = run(folder.path(), &[], arguments);
        assert_eq!(code, 78, "{text}");
        assert!(text.contains("services:") && text.contains("tollgate demo"), "{text}");
    }
}

#[test]
fn help_version_and_wrong_usage_are_as_people_expect() {
    let folder = tempfile::tempdir().unwrap();
    let (code, text) = run(folder.path(), &[], &["--version"]);
    assert_eq!((code, text), (0, format!("tollgate {}\n", env!("CARGO_PKG_VERSION"))));
    let (code, text) = run(folder.path(), &[], &["--help"]);
    assert_eq!(code, 0);
    for command in ["serve", "check", "demo", "-c"] {
        assert!(text.contains(command), "{command} is not in {text}");
    }
    let example = root().join("conf/example.yaml");
    let example = example.to_str().unwrap();
    for arguments in [["check", "-c", example], ["-c", example, "check"]] {
        assert_eq!(run(folder.path(), &[], &arguments).0, 0, "{arguments:?}");
    }
    for wrong in [&["frobnicate"][..], &["check", "--fast"], &["-c"]] {
        assert_eq!(run(folder.path(), &[], wrong).0, 2, "{wrong:?}");
    }
}

/// A folder with `config/backends.json` as its users have it.
fn backends_json(upstream: &Upstream, key: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("config")).unwrap();
    let url = upstream.url();
    let text = format!(
        r#"{{"services": {{"google": {{"{key}": {{"gemma-4-26b": {{"backends": [
  {{"id": "backend-1", "name": "Node 1", "url": "{url}", "weight": 1,
   "api_key": "sk-backend-1", "auth_mode": "Authorization"}},
  {{"id": "backend-2", "url": "{url}", "auth_mode": "x-api-key"}}]}}}}}}}}}}"#
    );
    std::fs::write(folder.path().join("config/backends.json"), text).unwrap();
    folder
}

#[test]
fn a_backends_json_is_found_and_served_with_either_spelling_and_open_cors() {
    let upstream = Upstream::named("served");
    for key in ["models", "model"] {
        let folder = backends_json(&upstream, key);
        let variables = [("HOST", "127.0.0.1"), ("PORT", "0")];
        let gateway = Gateway::start_in(folder, &variables, &[]);
        let preflight = send(
            gateway.address(),
            "OPTIONS /google/gemma-4-26b/v1/x HTTP/1.1\r\nHost: g\r\nOrigin: https://app\r\nAccess-Control-Request-Method: POST\r\nConnection: close\r\n\r\n",
        );
        assert_eq!(
            (preflight.status, preflight.header("access-control-allow-origin").as_str()),
            (204, "*")
        );
        let answer = get(gateway.address(), "/google/gemma-4-26b/v1/x", &["Origin: https://app"]);
        assert_eq!((answer.status, answer.text().as_str()), (200, "served"));
        assert_eq!(answer.header("access-control-allow-origin"), "*");
        assert_eq!(gateway.backend("google/gemma-4-26b", "backend-1")["name"], "Node 1");
    }
}

#[test]
fn a_backends_json_is_found_by_its_variable_also_through_a_dot_env_file() {
    let upstream = Upstream::named("served");
    let file = backends_json(&upstream, "models");
    let path = file.path().join("config/backends.json");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(
        folder.path().join(".env"),
        format!("BACKENDS_CONFIG_PATH={}\nHOST=127.0.0.1\nPORT=1\n", path.display()),
    )
    .unwrap();
    // The real environment wins over the file.
    let gateway = Gateway::start_in(folder, &[("PORT", "0")], &[]);
    assert_eq!(get(gateway.address(), "/google/gemma-4-26b/v1/x", &[]).status, 200);
}

#[test]
fn variables_override_the_file_and_wrong_ones_are_named() {
    let upstream = Upstream::named("x");
    let folder = backends_json(&upstream, "models");
    let wrong = [
        ("PORT", "http"),
        ("HOST", "not an address"),
        ("LOG_LEVEL", "LOUD"),
        ("BACKEND_AUTH_MODE", "basic"),
        ("HEALTH_CHECK_INTERVAL", "0"),
        ("HEALTH_CHECK_TIMEOUT", "soon"),
        ("REQUEST_TIMEOUT", "-1"),
        ("CONNECT_TIMEOUT", "x"),
        ("SHUTDOWN_TIMEOUT", "x"),
        ("MAX_KEEPALIVE_CONNECTIONS", "many"),
        ("RATE_LIMIT_REQUESTS", "0"),
        ("REDIS_URL", "http://:hunter2@127.0.0.1"),
    ];
    for (name, value) in wrong {
        let (code, text) = run(folder.path(), &[(name, value)], &["check"]);
        assert!(code == 78 && text.starts_with(&format!("{name}: ")), "{name}: {text}");
        assert!(!text.contains("hunter2"), "{text}");
        assert_eq!(
            run(folder.path(), &[(name, "")], &["check"]).0,
            0,
            "an empty {name} counts as unset"
        );
    }
    let (code, text) = run(folder.path(), &wrong, &["check"]);
    assert_eq!((code, text.lines().count()), (78, wrong.len() - 1), "all at once: {text}");
}

#[test]
fn the_health_interval_variable_holds_for_a_backends_json() {
    let upstream = Upstream::named("x");
    let folder = backends_json(&upstream, "models");
    let variables = [("HOST", "127.0.0.1"), ("PORT", "0"), ("HEALTH_CHECK_INTERVAL", "0.1")];
    let gateway = Gateway::start_in(folder, &variables, &[]);
    gateway.wait_backend("google/gemma-4-26b", "backend-1", "healthy");
    upstream.set_healthy(false);
    gateway.wait_backend("google/gemma-4-26b", "backend-1", "unhealthy");
    upstream.set_healthy(true);
    gateway.wait_backend("google/gemma-4-26b", "backend-2", "healthy");
}
