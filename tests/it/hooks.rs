//! Hooks: what the configuration does with requests and answers, in the order in which it is written.

use std::process::Command;

use serde_json::{Value, json};

use crate::harness::{
    BlackHole, Gateway, Metrics, Model, Upstream, config, eventually, hash_of, post, run_program,
    services,
};

const CHAT: &str = "/svc/mdl/v1/chat/completions";

fn echo() -> Upstream {
    Upstream::start(|seen, reply| {
        let headers = [("content-type", "application/json"), ("server", "uvicorn"), ("x-old", "1")];
        reply.send(200, &headers, &seen.body);
    })
}

fn body(answer: &crate::harness::Answer) -> Value {
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

#[test]
fn headers_are_set_removed_and_renamed_in_both_directions() {
    let upstream = echo();
    let gateway = Gateway::start(&config(
        r#"
hooks:
  - request_headers:
      rename: {x-from: x-to}
      remove: [x-internal]
      set:
        x-fixed: "always"
        x-model: {expression: 'service + "/" + model + " " + request.method'}
        x-nothing: {expression: 'request.headers["x-none"]'}
  - response_headers:
      remove: server
      rename: {x-old: x-new}
      set: {x-status: {expression: 'string(response.status) + " of " + backend'}}
"#,
        &[&upstream],
    ));
    let headers = ["X-From: a", "X-Internal: b", "X-Nothing: c", "X-Fixed: d"];
    let answer = post(gateway.address(), CHAT, &headers, "{}");
    let seen = upstream.last();
    assert_eq!(seen.header("x-to"), "a");
    assert_eq!(seen.header("x-fixed"), "always");
    assert_eq!(seen.header("x-model"), "svc/mdl POST");
    for gone in ["x-from", "x-internal", "x-nothing"] {
        assert!(!seen.has(gone), "{gone}");
    }
    assert_eq!(answer.header("x-new"), "1");
    assert_eq!(answer.header("x-status"), "200 of a");
    assert_eq!((answer.header("server").as_str(), answer.header("x-old").as_str()), ("", ""));
}

#[test]
fn members_of_the_body_are_given_bounded_and_forced() {
    let upstream = echo();
    let gateway = Gateway::start(&config(
        r#"
hooks:
  - request_fields:
      max: {max_tokens: 100}
      set: {temperature: 0}
      default: {top_p: 0.9}
      remove: [logit_bias]
      system_prompt: Be kind.
"#,
        &[&upstream],
    ));
    let long = "x".repeat(300_000);
    let sent = json!({
        "model": "mdl", "max_tokens": 5000, "logit_bias": {"1": 2}, "seed": 1.5,
        "messages": [{"role": "user", "content": long}],
    });
    let text = sent.to_string().replace("1.5", "1.50");
    let answer = post(gateway.address(), CHAT, &[], text);
    let mut expected = sent.clone();
    expected["max_tokens"] = 100.into();
    expected["temperature"] = 0.into();
    expected["top_p"] = 0.9.into();
    expected.as_object_mut().unwrap().remove("logit_bias");
    expected["messages"] =
        json!([{"role": "system", "content": "Be kind."}, {"role": "user", "content": long}]);
    assert_eq!(body(&answer), expected);
    assert!(
        upstream.last().body.windows(4).any(|bytes| bytes == b"1.50"),
        "others keep their bytes"
    );
    // A body that needs no change passes byte for byte.
    let path = "/svc/mdl/v1/embeddings";
    let fine = r#"{ "max_tokens":1 ,"temperature":0,"top_p":1 }"#;
    assert_eq!(post(gateway.address(), path, &[], fine).text(), fine);
    // What cannot be changed does not pass.
    let refused = post(gateway.address(), path, &[], "{\"max_tokens\":");
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (400, &json!("invalid_body")));
    let chunked = format!(
        "POST {path} HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n15\r\n{{\"max_tokens\":100000}}\r\n0\r\n\r\n"
    );
    let answer = crate::harness::send(gateway.address(), chunked);
    assert_eq!(body(&answer)["max_tokens"], 100);
}

#[test]
fn a_compressed_body_is_changed_and_a_form_is_not() {
    use std::io::Write;
    let upstream = echo();
    let gateway =
        Gateway::start(&config("hooks: [{request_fields: {set: {temperature: 0}}}]", &[&upstream]));
    let mut coder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    coder.write_all(br#"{"model":"mdl","temperature":1}"#).unwrap();
    let coded = coder.finish().unwrap();
    let answer = post(gateway.address(), CHAT, &["Content-Encoding: gzip"], coded);
    assert_eq!(body(&answer), json!({"model": "mdl", "temperature": 0}));
    assert!(!upstream.last().has("content-encoding"));
    let form = "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nmdl\r\n--b--\r\n";
    let kind = ["Content-Type: multipart/form-data; boundary=b"];
    let path = "/svc/mdl/v1/audio/transcriptions";
    assert_eq!(post(gateway.address(), path, &kind, form).text(), form);
}

#[test]
fn the_models_own_name_is_changed_together_with_the_body() {
    let upstream = echo();
    let one = Model("mdl", &[&upstream]);
    let config = services("", &[("svc", &[one])]).replace("id: a", "id: a, model: real-name");
    let hooks = "hooks: [{request_fields: {max: {max_tokens: 7}}}]\n";
    let gateway = Gateway::start(&format!("{hooks}{config}"));
    let sent = r#"{"max_tokens":9,"model":"mdl","stream":false}"#;
    for path in [CHAT, "/v1/chat/completions"] {
        let answer = post(gateway.address(), path, &[], sent);
        assert_eq!(body(&answer), json!({"max_tokens": 7, "model": "real-name", "stream": false}));
    }
}

#[test]
fn the_first_refusal_wins_and_conditions_say_for_whom() {
    let upstream = echo();
    let keys = format!(
        "keys:\n  - {{name: ada, hash: \"{}\", labels: {{tier: gold}}}}\n  - {{name: bob, hash: \"{}\"}}\n",
        hash_of("tg_ada"),
        hash_of("tg_bob"),
    );
    let gateway = Gateway::start(&config(
        &format!(
            r#"
{keys}hooks:
  - {{name: no-streams, when: 'request.stream && key.labels.tier != "gold"', refuse: {{message: no streams}}}}
  - {{name: maintenance, when: 'request.path.endsWith("/embeddings")', answer: {{status: 503, json: {{down: true}}, retry_after: 90s}}}}
  - {{name: large, when: 'key.name == "bob"', bounds: {{body_bytes_max: 64}}}}
  - {{name: late, when: request.stream, refuse: {{status: 418, message: never for bob}}}}
"#
        ),
        &[&upstream],
    ));
    let ask = |key: &str, path: &str, body: &str| {
        post(gateway.address(), path, &[&format!("Authorization: Bearer tg_{key}")], body)
    };
    let stream = r#"{"model":"mdl","stream":true}"#;
    let refused = ask("bob", CHAT, stream);
    assert_eq!(
        (refused.status, refused.json()["error"]["message"].clone()),
        (403, json!("no streams"))
    );
    assert_eq!(refused.json()["error"]["code"], "refused");
    assert_eq!(ask("ada", CHAT, stream).status, 418);
    let down = ask("ada", "/svc/mdl/v1/embeddings", "{}");
    assert_eq!((down.status, down.json()), (503, json!({"down": true})));
    assert_eq!(down.header("retry-after"), "90");
    let long = json!({"model": "mdl", "input": "x".repeat(100)}).to_string();
    assert_eq!(ask("bob", CHAT, &long).status, 413);
    assert_eq!(ask("ada", CHAT, &long).status, 200);
    assert_eq!(upstream.seen().len(), 1, "only what passed went on");
    // In Anthropic's form where that is spoken.
    let refused = ask("bob", "/svc/mdl/v1/messages", stream);
    assert_eq!(refused.json()["error"]["type"], "permission_error");
    let runs = |hook: &str, outcome: &str| {
        let labels = [format!("hook=\"{hook}\""), format!("outcome=\"{outcome}\"")];
        let metrics = Metrics::of(gateway.address());
        metrics.sum("proxy_hook_runs_total", &[&labels[0], &labels[1]])
    };
    // An exchange is told of when its client has its answer already.
    for (hook, outcome, count) in [
        ("no-streams", "refused", 2.0),
        ("no-streams", "skipped", 4.0),
        ("maintenance", "answered", 1.0),
        ("large", "refused", 1.0),
        ("late", "refused", 1.0),
    ] {
        eventually(&format!("{hook} has {outcome}"), || runs(hook, outcome) == count);
    }
    let metrics = Metrics::of(gateway.address());
    assert!(metrics.sum("proxy_hook_seconds_total", &["hook=\"late\""]) > 0.0);
    // What the configuration says is not a failure.
    assert_eq!(metrics.bare("proxy_errors_total"), Some(0.0));
}

#[test]
fn hooks_of_everything_come_before_those_of_a_service_and_of_a_model() {
    let upstream = echo();
    let two = Model("other", &[&upstream]);
    let one = Model("mdl", &[&upstream]);
    let set = |name: &str| {
        let text = format!(r#"request.headers["x-way"] + "{name}""#);
        json!([{"request_headers": {"set": {"x-way": {"expression": text}}}}])
    };
    let text = services("", &[("svc", &[one, two])]);
    let text = text.replacen("models:", &format!("hooks: {}\n    models:", set("b")), 1).replacen(
        "\"mdl\":",
        &format!("\"mdl\":\n        hooks: {}", set("c")),
        1,
    );
    let gateway = Gateway::start(&format!("hooks: {}\n{text}", set("a")));
    for (path, way) in [(CHAT, "abc"), ("/svc/other/v1/chat/completions", "ab")] {
        post(gateway.address(), path, &[], "{}");
        assert_eq!(upstream.last().header("x-way"), way, "{path}");
    }
}

#[test]
fn requests_go_to_another_model() {
    let (old, new) = (echo(), echo());
    let models = [Model("mdl", &[&old]), Model("next", &[&new]), Model("gem*", &[&old])];
    let hooks = r#"
hooks:
  - {name: beta, when: 'request.headers["x-beta"] == "1"', route: {to: svc/next}}
  - {name: none, route: {to: svc/next, percent: 0}}
  - {name: half, when: 'request.headers["x-half"] == "1"', route: {to: svc/next, percent: 50}}
  - {name: keys, when: 'request.headers["x-key"] == "1"', route: {to: svc/next, percent: 50, by: key}}
"#;
    let gateway = Gateway::start(&services(hooks, &[("svc", &models)]));
    let sent = r#"{"model":"mdl","a":1}"#;
    for path in [CHAT, "/v1/chat/completions"] {
        let answer = post(gateway.address(), path, &["X-Beta: 1"], sent);
        assert_eq!(body(&answer), json!({"model": "next", "a": 1}), "{path}");
        assert_eq!(answer.header("x-tollgate-model"), "svc/next");
        assert_eq!(body(&post(gateway.address(), path, &[], sent))["model"], "mdl");
    }
    let gemini = "/svc/gemini/v1beta/models/gemini:generateContent";
    assert_eq!(post(gateway.address(), gemini, &["X-Beta: 1"], "{}").status, 200);
    assert_eq!(new.last().target(), "/v1beta/models/next:generateContent");
    let count = |header: &str| {
        let before = new.seen().len();
        for _ in 0..60 {
            post(gateway.address(), CHAT, &[header], sent);
        }
        new.seen().len() - before
    };
    // One in 10^9 times it is not so.
    assert!((5..=55).contains(&count("X-Half: 1")));
    // From one address, all go the same way.
    assert!([0, 60].contains(&count("X-Key: 1")));
    assert_eq!(count("X-None: 1"), 0);
}

fn mirrored(gateway: &Gateway, model: &str, outcome: &str) -> f64 {
    let labels = [format!("model=\"{model}\""), format!("outcome=\"{outcome}\"")];
    Metrics::of(gateway.address()).sum("proxy_mirrored_total", &[&labels[0], &labels[1]])
}

#[test]
fn another_model_gets_a_copy_and_its_answer_goes_nowhere() {
    let own = echo();
    let trial = Upstream::start(|_, reply| reply.send(500, &[], b"from the trial"));
    let text = services(
        r#"api_key: sk-ours
hooks:
  - request_fields: {max: {max_tokens: 5}}
  - mirror: {to: svc/trial}
limits: [{per: all, requests: 2, window: 1h}]
"#,
        &[("svc", &[Model("mdl", &[&own]), Model("trial", &[&trial])])],
    );
    let text = text.replace(
        &format!("url: \"{}\"", trial.url()),
        &format!("url: \"{}\", api_key: sk-trial", trial.url()),
    );
    let gateway = Gateway::start(&text);
    let headers =
        ["Authorization: Bearer sk-ours", "X-Request-ID: r-1", "Connection: x-hop", "X-Hop: 1"];
    let ask = || {
        post(
            gateway.address(),
            &format!("{CHAT}?a=b"),
            &headers,
            r#"{"model":"mdl","max_tokens":9}"#,
        )
    };
    assert_eq!(body(&ask()), json!({"model": "mdl", "max_tokens": 5}));
    eventually("the copy is answered", || mirrored(&gateway, "trial", "answered") == 1.0);
    let copy = trial.last();
    assert_eq!(copy.target(), "/v1/chat/completions?a=b");
    assert_eq!(
        serde_json::from_slice::<Value>(&copy.body).unwrap(),
        json!({"model": "trial", "max_tokens": 5})
    );
    assert_eq!(copy.header("authorization"), "Bearer sk-trial");
    assert_eq!((copy.header("x-request-id").as_str(), copy.has("x-hop")), ("r-1", false));
    assert_eq!(copy.header("host"), trial.address().to_string());
    // Over a kept connection, and of what is refused there is none.
    assert_eq!(ask().status, 200);
    eventually("so is the next one", || mirrored(&gateway, "trial", "answered") == 2.0);
    assert_eq!(ask().status, 429);
    assert_eq!((own.seen().len(), trial.seen().len()), (2, 2));
    assert_eq!(Metrics::of(gateway.address()).bare("proxy_errors_total"), Some(0.0));
}

#[test]
fn a_mirror_that_hangs_or_is_not_there_changes_nothing() {
    let own = echo();
    let hole = BlackHole::open();
    let url = format!("http://{}", hole.address);
    let text = services(
        "threads: 1\nhooks: [{mirror: {to: svc/trial}}, {mirror: {to: svc/away}}]",
        &[("svc", &[Model("mdl", &[&own]), Model("trial", &[&own]), Model("away", &[&own])])],
    );
    let mut parts: Vec<&str> = text.splitn(2, "\"trial\":").collect();
    let others = parts.pop().unwrap().replacen(&own.url(), &url, 1).replacen(
        &own.url(),
        "http://127.0.0.1:9",
        1,
    );
    let gateway = Gateway::start(&format!("{}\"trial\":{others}", parts[0]));
    let big = json!({"model": "mdl", "input": "x".repeat(100_000)}).to_string();
    for _ in 0..200 {
        assert_eq!(post(gateway.address(), "/svc/mdl/v1/embeddings", &[], &big).status, 200);
    }
    eventually("those that are too many are dropped", || {
        mirrored(&gateway, "trial", "dropped") > 0.0
    });
    eventually("nobody answers", || mirrored(&gateway, "away", "failed") > 0.0);
    // 64 copies at most are on their way.
    let held = Metrics::of(gateway.address()).sum("proxy_buffered_bytes", &[]);
    assert!(held <= 70.0 * 101_000.0, "{held}");
    assert_eq!(own.seen().len(), 200);
}

#[test]
fn what_is_wrong_with_hooks_is_told_with_line_and_column() {
    let folder = tempfile::tempdir().unwrap();
    let text = r#"hooks:
  - when: request.stream == 1
    refuse: {message: no}
  - {when: 'key.nmae == "a"', refuse: {message: no}}
  - name: two things
    refuse: {message: no}
    bounds: {body_bytes_max: 1}
  - when: |
      true
      && backend == "b"
    request_headers: {set: {Host: x, x-a: {expression: 'request.body_bytes'}}}
  - request_header: {}
  - custom: {mine: {}}
  - request_fields: {max: {max_tokens: "1"}, set: {model: x}}
  - {}
  - {route: {to: svc/nothing, percent: 101}}
services: {svc: {models: {mdl: {backends: [{id: b, url: "http://127.0.0.1:1"}]}}}}
"#;
    std::fs::write(folder.path().join("tollgate.yaml"), text).unwrap();
    let output = run_program(folder.path(), &[], &["check"]);
    assert_eq!(output.status.code(), Some(78));
    let told = String::from_utf8(output.stderr).unwrap();
    for line in [
        r#"hooks[0].when: "==" cannot take true or false and a number (tollgate.yaml:2:26)"#,
        r#"hooks[1].when: there is no "key.nmae", did you mean "key.name"? (tollgate.yaml:4:13)"#,
        "hooks[2]: does several things; write a hook for each, in the order in which they act (tollgate.yaml:5:5)",
        "hooks[3].when: backend is not known before the answer has come (tollgate.yaml:10:10)",
        "hooks[3].request_headers.set.Host: host is set by the gateway for each backend (tollgate.yaml:11:35)",
        r#"hooks[3].request_headers.set.x-a.expression: is a number, not text; write string(...) around it (tollgate.yaml:11:57)"#,
        r#"hooks[4].request_header: unknown key, did you mean "request_headers"? (tollgate.yaml:12:5)"#,
        "hooks[5].custom.mine: there is no such hook: this program has none of its own (tollgate.yaml:13:14)",
        "hooks[6].request_fields.max.max_tokens: expected a number (tollgate.yaml:14:40)",
        r#"hooks[6].request_fields.set.model: the model is what a request is routed by; see "aliases" (tollgate.yaml:14:59)"#,
        "hooks[7]: does nothing; write one of route, mirror,",
        "hooks[8].route.to: there is no model \"svc/nothing\"; write it as service/model (tollgate.yaml:16:18)",
        "hooks[8].route.percent: expected a number from 0 to 100",
    ] {
        assert!(told.contains(line), "{line}\nis not in\n{told}");
    }
}

#[test]
fn hooks_change_with_a_reload() {
    let upstream = echo();
    let mut gateway = Gateway::start(&config("", &[&upstream]));
    assert_eq!(post(gateway.address(), CHAT, &[], "{}").status, 200);
    let text = config("hooks: [{refuse: {status: 451, message: gone}}]", &[&upstream]);
    std::fs::write(gateway.folder().join("tollgate.yaml"), text).unwrap();
    gateway.signal(nix::sys::signal::Signal::SIGHUP);
    gateway.wait_log("the new configuration is at work");
    assert_eq!(post(gateway.address(), CHAT, &[], "{}").status, 451);
}

#[test]
fn a_program_can_have_hooks_of_its_own() {
    let built = Command::new(env!("CARGO"))
        .args(["build", "--locked", "--quiet", "--example", "custom_hook"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(built.success());
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_tollgate")).with_file_name("examples");
    let program = program.join("custom_hook");
    let upstream = echo();
    let with =
        |hours: &str| config(&format!("hooks: [{{custom: {{hours: {hours}}}}}]"), &[&upstream]);
    let gateway = Gateway::start_other(&program, &with("{from: 0, to: 0}"));
    let refused = post(gateway.address(), CHAT, &[], "{}");
    assert_eq!(
        (refused.status, refused.json()["error"]["code"].clone()),
        (403, json!("out_of_hours"))
    );
    assert_eq!(refused.json()["error"]["message"], "mdl is there from 0 to 0 o'clock");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tollgate.yaml"), with("{from: 8, until: 18}")).unwrap();
    let check = Command::new(&program).arg("check").current_dir(folder.path()).output().unwrap();
    assert_eq!(check.status.code(), Some(78));
    let told = String::from_utf8(check.stderr).unwrap();
    assert!(told.contains("hooks[0].custom.hours: unknown field `until`"), "{told}");
}
