//! Keys of clients: made, handed out, rotated, and what each is for.

use std::net::IpAddr;
use std::path::Path;

use serde_json::Value;

use crate::harness::{Answer, Gateway, Upstream, eventually, get, post, run_program, send_from};

const CHAT: &str = "/v1/chat/completions";

/// A new key, and its entry for the configuration, as `tollgate key new` prints them.
fn new_key(folder: &Path, arguments: &[&str]) -> (String, String) {
    let output = run_program(folder, &[], &[&["key", "new"], arguments].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (key, entry) = text.split_once("\n\n").unwrap();
    assert!(key.starts_with("tg-") && key.len() == 46 && !entry.contains(key), "{text}");
    (key.to_owned(), entry.to_owned())
}

/// A configuration with the models `one` and `two` of the service `a` and `three` of `b`.
fn config(top: &str, upstream: &Upstream) -> String {
    let url = upstream.url();
    let backends = format!("{{backends: [{{id: a, url: \"{url}\"}}]}}");
    format!(
        "listen: 127.0.0.1:0\n{top}\nservices: {{a: {{models: {{one: {backends}, two: {backends}}}}}, \
         b: {{models: {{three: {backends}}}}}}}\n"
    )
}

fn ask(gateway: &Gateway, key: &str, path: &str, body: &str) -> Answer {
    let authorization = format!("Authorization: Bearer {key}");
    post(gateway.address(), path, &[&authorization, "Content-Type: application/json"], body)
}

fn code(answer: &Answer) -> (u16, String) {
    let code = answer.json()["error"]["code"].as_str().unwrap_or_default().to_owned();
    (answer.status, code)
}

fn models(gateway: &Gateway, key: &str) -> Vec<String> {
    let answer = get(gateway.address(), "/v1/models", &[&format!("X-API-Key: {key}")]);
    let list = answer.json()["data"].as_array().unwrap().clone();
    list.iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_new_key_of_an_admin_opens_the_dashboard_and_another_does_not() {
    let upstream = Upstream::named("x");
    let folder = tempfile::tempdir().unwrap();
    let (admin, admin_entry) = new_key(folder.path(), &["boss", "--admin"]);
    let (user, user_entry) = new_key(folder.path(), &["team a"]);
    let config = config("keys_file: keys.yaml", &upstream);
    std::fs::write(folder.path().join("tollgate.yaml"), config).unwrap();
    let keys = format!("keys:\n{admin_entry}\n{user_entry}");
    std::fs::write(folder.path().join("keys.yaml"), keys).unwrap();
    let gateway = Gateway::start_in(folder, &[], &[]);
    let status = |key: &str| {
        let header = format!("X-API-Key: {key}");
        get(gateway.address(), "/api/dashboard", &[&header]).status
    };
    assert_eq!((status(&admin), status(&user)), (200, 403));
}

#[test]
fn a_new_key_is_good_as_soon_as_its_entry_is_in_the_keys_file_and_until_it_is_taken_out() {
    let upstream = Upstream::named("x");
    let folder = tempfile::tempdir().unwrap();
    let (old, old_entry) = new_key(folder.path(), &["team a"]);
    let (new, new_entry) = new_key(folder.path(), &["team a"]);
    let config = config("keys_file: keys.yaml", &upstream);
    std::fs::write(folder.path().join("tollgate.yaml"), config).unwrap();
    std::fs::write(folder.path().join("keys.yaml"), "keys: []").unwrap();
    let gateway = Gateway::start_in(folder, &[], &[]);
    let status = |key: &str| ask(&gateway, key, "/a/one/x", "{}").status;
    assert_eq!(status(&old), 401);
    let write = |text: &str| std::fs::write(gateway.folder().join("keys.yaml"), text).unwrap();
    write(&format!("keys:\n{old_entry}"));
    eventually("the key is good", || status(&old) == 200);
    assert_eq!(status(&new), 401);
    // Both are good while clients change over.
    let hash =
        |entry: &str| entry.split("hash: ").nth(1).unwrap().lines().next().unwrap().to_owned();
    let both = format!("[{}, {}]", hash(&old_entry), hash(&new_entry));
    write(&format!("keys:\n{}", old_entry.replace(&hash(&old_entry), &both)));
    eventually("the next key is good", || status(&new) == 200);
    assert_eq!(status(&old), 200);
    write(&format!("keys:\n{new_entry}"));
    eventually("the last key is no longer good", || status(&old) == 401);
    assert_eq!(status(&new), 200);
    // What cannot be read changes nothing, nor does a file whose writer was cut off.
    write("");
    eventually("it is told", || {
        gateway.log().iter().any(|line| line.contains("no keys in the file"))
    });
    assert_eq!(status(&new), 200);
    write("keys: [{name: x, hash: nonsense}]");
    eventually("it is told", || gateway.log().iter().any(|line| line.contains("keys[0].hash")));
    assert_eq!(status(&new), 200);
}

#[test]
fn keys_made_with_the_servers_secret_are_good_there_only() {
    let upstream = Upstream::named("x");
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "0123456789abcdef0123456789abcdef\n").unwrap();
    let top = format!("keys_secret_file: {}\nkeys_file: keys.yaml", secret.display());
    std::fs::write(folder.path().join("tollgate.yaml"), config(&top, &upstream)).unwrap();
    std::fs::write(folder.path().join("keys.yaml"), "keys: []").unwrap();
    let (key, entry) = new_key(folder.path(), &["x"]);
    assert!(entry.contains("hash: hmac-sha256:"), "{entry}");
    std::fs::write(folder.path().join("keys.yaml"), format!("keys:\n{entry}")).unwrap();
    let gateway = Gateway::start_in(folder, &[], &[]);
    assert_eq!(ask(&gateway, &key, "/a/one/x", "{}").status, 200);
    std::fs::write(&secret, "0123456789abcdef0123456789abcdeX\n").unwrap();
    eventually("another secret", || ask(&gateway, &key, "/a/one/x", "{}").status == 401);
}

/// A gateway with a key for these lines, and the key.
fn with_key(top: &str, upstream: &Upstream, lines: &str) -> (Gateway, String) {
    let folder = tempfile::tempdir().unwrap();
    let (key, entry) = new_key(folder.path(), &["team"]);
    let entry = entry.trim_end();
    let config = config(&format!("{top}\nkeys:\n{entry}\n    {lines}\n"), upstream);
    (Gateway::start(&config), key)
}

#[test]
fn a_key_lists_calls_and_sees_only_its_own_models() {
    let upstream = Upstream::named("x");
    let top = "aliases: {other: one, hidden: two}\napi_key: sk-global";
    let (gateway, key) = with_key(top, &upstream, "models: [one, \"th*\", other]");
    assert_eq!(models(&gateway, &key), ["one", "three", "other"]);
    assert_eq!(models(&gateway, "sk-global"), ["one", "two", "three", "other", "hidden"]);
    for (path, body) in [
        (CHAT, r#"{"model":"one"}"#),
        (CHAT, r#"{"model":"a/one"}"#),
        (CHAT, r#"{"model":"other"}"#),
        (CHAT, r#"{"model":"three"}"#),
        ("/a/one/v1/chat/completions", r#"{"model":"one"}"#),
        ("/a/one/v1/chat/completions", "{}"),
        ("/b/three/x", "not JSON"),
        ("/v1beta/models/one:generateContent", "{}"),
    ] {
        assert_eq!(ask(&gateway, &key, path, body).status, 200, "{path} {body}");
    }
    let sent = upstream.seen().len();
    let denied = (403, "model_not_allowed".to_owned());
    let refused = (403, "not_allowed".to_owned());
    for (path, body, expected) in [
        (CHAT, r#"{"model":"two"}"#, &denied),
        (CHAT, r#"{"model":"hidden"}"#, &denied),
        (CHAT, r#"{"model":"b/two"}"#, &denied),
        ("/v1beta/models/two:generateContent", "{}", &denied),
        ("/a/two/v1/chat/completions", "{}", &refused),
        // The path is fine; what a backend may go by is not.
        ("/a/one/v1/chat/completions", r#"{"model":"two"}"#, &denied),
        ("/a/one/api/chat", r#"{"messages":[],"model":"two"}"#, &denied),
        ("/a/one/v1/realtime?model=two", "", &denied),
        ("/a/one/v1beta/models/two:generateContent", "{}", &denied),
    ] {
        assert_eq!(code(&ask(&gateway, &key, path, body)), *expected, "{path} {body}");
    }
    let headers = [&format!("X-API-Key: {key}")[..], "X-Tollgate-Model: one"];
    let answer = post(gateway.address(), CHAT, &headers, r#"{"model":"two"}"#);
    assert_eq!(code(&answer), denied);
    assert_eq!(upstream.seen().len(), sent, "a refused request reached the backend");
    assert_eq!(ask(&gateway, "sk-global", CHAT, r#"{"model":"two"}"#).status, 200);
    let status = |path: &str| get(gateway.address(), path, &[&format!("X-API-Key: {key}")]);
    let of_a = status("/api/health/status/a").json();
    let seen: Vec<&String> = of_a["data"]["a"].as_object().unwrap().keys().collect();
    assert_eq!(seen, ["one"]);
    assert_eq!(status("/v1/models/two").status, 404);
    assert_eq!(status("/v1/models/one").status, 200);
}

#[test]
fn no_spelling_reaches_a_model_that_the_key_is_not_for() {
    let upstream = Upstream::named("x");
    let (gateway, key) = with_key("", &upstream, "models: [one]");
    let header = format!("X-API-Key: {key}");
    for path in [
        "/a/one/v1beta/%6dodels/two:generateContent",
        "/a/one/v1beta//models/two:generateContent",
        "/a/one//v1beta/models/two:generateContent",
        "/a/one/%761beta/models/two:generateContent",
        "/a/one/v3/models/two:generateContent",
        "/a/one/openai/%64eployments/two/chat/completions",
        "/a/one/%6fpenai/deployments/two/chat/completions",
        "/a/one/OpenAI/deployments/two/chat/completions",
        "/a/one/v1/realtime?model=one&model=two",
        "/a/one/v1/files",
        "/a/one/v1/batches",
        "/a/one/openai/v1/files",
        "/a/one/v1/messages/batches",
        "/a/one/api/show",
    ] {
        let answer = post(gateway.address(), path, &[&header], "{}");
        assert!(matches!(answer.status, 400 | 403), "{path} {}", answer.text());
    }
    for path in ["/a/one/v1/models", "/a/one/v1/models/two", "/a/one/v1/files/f1"] {
        assert_eq!(get(gateway.address(), path, &[&header]).status, 403, "{path}");
    }
    for path in ["/v1/files", "/v1/batches"] {
        let headers = [&header[..], "X-Tollgate-Model: one"];
        assert_eq!(post(gateway.address(), path, &headers, "{}").status, 403, "{path}");
    }
    let two = r#"{"model":"two"}"#;
    let letters = |letter: fn(u16) -> Vec<u8>| two.encode_utf16().flat_map(letter).collect();
    let bodies: [Vec<u8>; 5] = [
        letters(|letter| letter.to_be_bytes().to_vec()),
        letters(|letter| letter.to_le_bytes().to_vec()),
        [vec![0xff, 0xfe], letters(|letter| letter.to_le_bytes().to_vec())].concat(),
        letters(|letter| u32::from(letter).to_be_bytes().to_vec()),
        [b"\xef\xbb\xbf", two.as_bytes()].concat(),
    ];
    for body in bodies {
        for path in ["/a/one/v1/chat/completions", "/a/one/x"] {
            let answer = post(gateway.address(), path, &[&header], &body);
            assert_eq!(answer.status, 400, "{path} {body:?} {}", answer.text());
        }
    }
    assert_eq!(upstream.seen().len(), 0, "a refused request reached the backend");
    // The same paths are there for who may have them.
    for path in ["/a/one/v1/models", "/a/one/v1/responses/r1", "/a/one/v1/models/one"] {
        let expected = if path.ends_with("/models") { 403 } else { 200 };
        assert_eq!(get(gateway.address(), path, &[&header]).status, expected, "{path}");
    }
    let (gateway, key) = with_key("", &upstream, "models: [\"a/*\"]");
    for path in ["/a/one/v1/models", "/a/one/v1/files", "/a/one/v1/batches"] {
        let status = get(gateway.address(), path, &[&format!("X-API-Key: {key}")]).status;
        assert_eq!(status, 200, "{path}");
    }
}

#[test]
fn what_a_key_is_not_for_cannot_be_told_from_what_is_not_there() {
    let upstream = Upstream::named("x");
    let (gateway, key) = with_key("", &upstream, "services: [a]\n    models: [one]");
    let normal = |path: &str, body: &str, name: &str| {
        let answer = ask(&gateway, &key, path, body);
        (answer.status, answer.text().replace(name, "NAME"))
    };
    let of_body = |name: &str| normal(CHAT, &format!(r#"{{"model":"{name}"}}"#), name);
    assert_eq!(of_body("two"), of_body("nothere"));
    assert_eq!(of_body("three"), of_body("nothere"));
    let of_path = |pool: &str| normal(&format!("/{pool}/v1/chat/completions"), "{}", pool);
    assert_eq!(of_path("a/two"), of_path("a/nothere"));
    assert_eq!(of_path("b/three"), of_path("c/three"));
    let of_status = |service: &str| {
        let path = format!("/api/health/status/{service}");
        let answer = get(gateway.address(), &path, &[&format!("X-API-Key: {key}")]);
        (answer.status, answer.text().replace(&format!("\\\"{service}\\\""), "NAME"))
    };
    assert_eq!(of_status("b"), of_status("c"));
    let of_model = |name: &str| {
        let path = format!("/v1/models/{name}");
        let answer = get(gateway.address(), &path, &[&format!("X-API-Key: {key}")]);
        (answer.status, answer.text().replace(name, "NAME"))
    };
    assert_eq!(of_model("two"), of_model("nothere"));
}

#[test]
fn a_fallback_is_asked_only_for_a_key_that_may_have_it() {
    let mut down = Upstream::named("down");
    let up = Upstream::named("up");
    down.kill();
    let folder = tempfile::tempdir().unwrap();
    let (narrow, narrow_entry) = new_key(folder.path(), &["narrow", "--models", "one"]);
    let (wide, wide_entry) = new_key(folder.path(), &["wide", "--models", "one,two"]);
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\nfallbacks: {{one: [two]}}\nretry: {{retries_max: 0}}\nkeys:\n{narrow_entry}\n{wide_entry}\nservices: {{a: \
         {{models: {{one: {{backends: [{{id: a, url: \"{}\"}}]}}, two: {{backends: [{{id: a, url: \"{}\"}}]}}}}}}}}\n",
        down.url(),
        up.url()
    ));
    assert_eq!(ask(&gateway, &wide, CHAT, r#"{"model":"one"}"#).text(), "up");
    assert_eq!(ask(&gateway, &narrow, CHAT, r#"{"model":"one"}"#).status, 503);
}

#[test]
fn what_belongs_to_no_model_takes_a_key_for_the_whole_service() {
    let upstream = Upstream::named("x");
    let folder = tempfile::tempdir().unwrap();
    let (narrow, narrow_entry) = new_key(folder.path(), &["narrow", "--models", "one"]);
    let (wide, wide_entry) = new_key(folder.path(), &["wide", "--models", "a/*"]);
    let top = format!("default_service: a\nkeys:\n{narrow_entry}\n{wide_entry}");
    let gateway = Gateway::start(&config(&top, &upstream));
    let files = |key: &str| get(gateway.address(), "/v1/files", &[&format!("X-API-Key: {key}")]);
    assert_eq!(code(&files(&narrow)), (403, "not_allowed".to_owned()));
    assert_eq!(files(&wide).status, 200);
}

#[test]
fn a_key_that_is_switched_off_over_or_used_from_elsewhere_is_refused_with_its_reason() {
    let upstream = Upstream::named("x");
    for (lines, expected) in [
        ("enabled: false", (401, "disabled_api_key")),
        ("expires: 2020-01-31", (401, "expired_api_key")),
        ("expires: 2020-01-31T10:00:00Z", (401, "expired_api_key")),
        ("addresses: {allow: [10.0.0.0/8]}", (403, "address_not_allowed")),
        ("addresses: {deny: [127.0.0.0/8]}", (403, "address_not_allowed")),
    ] {
        let (gateway, key) = with_key("", &upstream, lines);
        let (status, code) = code(&ask(&gateway, &key, CHAT, r#"{"model":"one"}"#));
        assert_eq!((status, code.as_str()), expected, "{lines}");
    }
    let fine = "expires: 2999-01-31\n    addresses: {allow: [127.0.0.1]}";
    let (gateway, key) = with_key("", &upstream, fine);
    assert_eq!(ask(&gateway, &key, CHAT, r#"{"model":"one"}"#).status, 200);
}

#[test]
fn addresses_may_be_listed_for_all_and_for_a_service() {
    let upstream = Upstream::named("x");
    let url = upstream.url();
    let gateway = Gateway::start(&format!(
        "listen: 127.0.0.1:0\naddresses: {{deny: [127.0.0.3]}}\nfallbacks: {{m: [s/m]}}\nservices:\n  \
         t: {{addresses: {{allow: [127.0.0.1]}}, models: {{m: {{backends: [{{id: a, url: \"{url}\"}}]}}}}}}\n  \
         s: {{models: {{n: {{backends: [{{id: a, url: \"{url}\"}}]}}, m: {{backends: [{{id: a, url: \"{url}\"}}]}}}}}}\n"
    ));
    let status = |from: u8, path: &str| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n");
        send_from(IpAddr::from([127, 0, 0, from]), gateway.address(), request).status
    };
    assert_eq!([1, 2, 3].map(|from| status(from, "/s/n/x")), [200, 200, 403]);
    assert_eq!([1, 2, 3].map(|from| status(from, "/t/m/x")), [200, 200, 403]);
    assert_eq!(status(3, "/api/health/status"), 403);
    assert_eq!(status(3, "/v1/models"), 403);
    assert_eq!([status(3, "/health"), status(3, "/ready")], [200, 200]);
    // A service that is not for an address is not asked for it: by path there is a fallback.
    assert_eq!(upstream.seen().len(), 4);
}

#[test]
fn only_an_admins_key_reloads() {
    let upstream = Upstream::named("x");
    for (lines, expected) in [("admin: true", 200), ("admin: false", 403)] {
        let (mut gateway, key) = with_key("admin: {listen: 127.0.0.1:0}", &upstream, lines);
        let line = gateway.wait_log("status and dashboard on");
        let admin = line.rsplit("http://").next().unwrap().trim().parse().unwrap();
        let answer = post(admin, "/admin/reload", &[&format!("X-API-Key: {key}")], "");
        assert_eq!(answer.status, expected, "{}", answer.text());
    }
}

/// The system neither writes the memory of such a process to disk when it crashes, nor shows it to its own user.
#[test]
fn what_is_in_memory_stays_there() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};
    let folder = tempfile::tempdir().unwrap();
    let all = |path: &Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    };
    all(folder.path());
    let program = folder.path().join("tollgate");
    std::fs::copy(env!("CARGO_BIN_EXE_tollgate"), &program).unwrap();
    let mut command = Command::new(&program);
    command.current_dir(folder.path()).env_clear().stderr(Stdio::null());
    command.env("UPSTREAM_URL", "http://127.0.0.1:1").envs([("HOST", "127.0.0.1"), ("PORT", "0")]);
    if nix::unistd::geteuid().is_root() {
        command.uid(65_534);
    }
    let mut child = command.spawn().unwrap();
    let process = format!("/proc/{}", child.id());
    // What belongs to such a process belongs to root.
    eventually("it is nobody's but root's", || {
        std::fs::metadata(format!("{process}/environ")).is_ok_and(|it| it.uid() == 0)
            && std::fs::read_to_string(format!("{process}/status"))
                .is_ok_and(|status| !status.contains("Uid:\t0\t"))
    });
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_key_is_in_no_output() {
    let upstream = Upstream::named("x");
    let (gateway, key) = with_key("log: {level: debug}", &upstream, "models: [one]");
    for path in ["/a/one/x", "/a/two/x", CHAT] {
        ask(&gateway, &key, path, r#"{"model":"one"}"#);
        ask(&gateway, &format!("{key}x"), path, "{}");
    }
    let page = |path: &str| get(gateway.address(), path, &[&format!("X-API-Key: {key}")]).text();
    let mut outputs = vec![gateway.log().join("\n")];
    outputs.extend(
        ["/metrics", "/api/health/status", "/api/health/status/a", "/v1/models", "/"].map(page),
    );
    let file = gateway.folder().join("tollgate.yaml");
    let against = file.to_string_lossy().into_owned();
    let check = run_program(gateway.folder(), &[], &["check", "--against", &against]);
    outputs.push(String::from_utf8(check.stdout).unwrap());
    let config = std::fs::read_to_string(&file).unwrap();
    let hash = config.split("sha256:").nth(1).unwrap()[..64].to_owned();
    for output in &outputs {
        assert!(
            !output.is_empty() && !output.contains(&key) && !output.contains(&hash),
            "{output}"
        );
    }
    let seen = upstream.seen();
    assert!(seen.iter().all(|seen| !format!("{seen:?}").contains(&key)), "a backend saw it");
    assert!(page("/v1/models").contains("one"), "{:?}", Value::from(page("/v1/models")));
}

#[test]
fn a_key_in_the_url_reaches_no_backend() {
    let upstream = Upstream::named("x");
    let (gateway, key) = with_key("", &upstream, "");
    for path in [
        format!("/a/one/x?a=b&key={key}"),
        format!("/a/one/x?key=%74{}", &key[1..]),
        format!("/a/one/x/{key}"),
        format!("/a/one/x%3Fkey={key}"),
    ] {
        let answer = ask(&gateway, &key, &path, "{}");
        assert_eq!(code(&answer), (400, "api_key_in_url".to_owned()));
        assert!(!answer.text().contains(&key));
    }
    assert_eq!(upstream.seen().len(), 0);
    assert_eq!(ask(&gateway, &key, "/a/one/x?key=other", "{}").status, 200);
    // Alone it is none.
    assert_eq!(get(gateway.address(), &format!("/a/one/x?key={key}"), &[]).status, 401);
}
