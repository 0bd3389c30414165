//! What answers that are given again cost and save, who may have them forgotten, and what else is done with them.

use rusqlite::Connection as Database;

use super::*;

#[test]
fn a_hit_costs_nothing_and_what_it_saves_is_shown() {
    let upstream = counting();
    let top = format!(
        "{CACHE}\nledger: {{}}\nprices: {{currency: EUR, per: 1, models: {{mdl: {{input: 2, output: 3}}}}}}\n\
         request_log: {{file: log}}\nadmin: {{listen: \"127.0.0.1:0\"}}\n\
         limits: [{{per: all, tokens: 100000, window: 1h}}, {{per: all, requests: 10, window: 1h}}]"
    );
    let mut gateway = Gateway::start(&config(&top, &[&upstream]));
    let admin = gateway.admin();
    for (stream, outcome) in
        [("", "miss"), ("", "hit"), (r#","stream":true"#, "miss"), (r#","stream":true"#, "hit")]
    {
        let answer = ask(&gateway, &prompt("a", stream), &[]);
        assert_eq!(told(&answer).0, outcome);
    }
    let answer = ask(&gateway, &prompt("a", ""), &[]);
    // Requests are counted, tokens only of those that a model was asked for.
    assert_eq!(answer.header("x-ratelimit-remaining-requests"), "5");
    assert_eq!(answer.header("x-ratelimit-remaining-tokens"), "99700");
    let sum = |name: &str, labels: &[&str]| Metrics::of(admin).sum(name, labels);
    eventually("all is counted", || sum("proxy_cache_requests_total", &[]) == 5.0);
    assert_eq!(sum("proxy_cache_requests_total", &["outcome=\"hit\""]), 3.0);
    assert_eq!(sum("proxy_cache_saved_tokens_total", &["direction=\"input\""]), 300.0);
    assert_eq!(sum("proxy_cache_saved_tokens_total", &["direction=\"output\""]), 150.0);
    assert_eq!(sum("proxy_cache_saved_cost_total", &["currency=\"EUR\""]), 1050.0);
    assert_eq!(sum("proxy_tokens_total", &[]), 300.0);
    assert_eq!(sum("proxy_cost_total", &[]), 700.0);
    assert_eq!(sum("proxy_cache_answers", &[]), 2.0);
    assert!(sum("proxy_cache_bytes", &[]) > 100.0);
    let stats = get(admin, "/stats", &[]).json();
    let own = &stats["services"]["svc"]["mdl"]["cache"];
    for shown in [&stats["cache"], own] {
        let counts = ["hits", "misses", "bypasses", "saved_tokens_input", "saved_tokens_output"];
        let counts = counts.map(|name| shown[name].as_u64().unwrap());
        assert_eq!(counts, [3, 2, 0, 300, 150], "{stats}");
        assert_eq!(shown["saved_cost"], json!({"EUR": "1050"}));
    }
    assert_eq!(stats["cache"]["answers"], 2);
    let file = gateway.folder().join("state/ledger.db");
    let rows = || -> Vec<(i64, i64, String)> {
        let Ok(database) = Database::open(&file) else { return Vec::new() };
        let columns = "SELECT tokens_input, tokens_output, cost FROM api_usage ORDER BY id";
        let Ok(mut select) = database.prepare(columns) else { return Vec::new() };
        let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
        rows.unwrap().map(Result::unwrap).collect()
    };
    eventually("all have a row", || rows().len() == 5);
    let mut rows = rows();
    rows.sort();
    assert_eq!(rows[..3], [const { (0, 0, String::new()) }; 3].map(|_| (0, 0, "0".to_owned())));
    assert_eq!(rows[3..], [350, 350].map(|cost| (100, 50, cost.to_string())));
    let log = gateway.folder().join("log");
    let lines = || -> Vec<Value> {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    };
    eventually("all have a line", || lines().len() == 5);
    for line in lines() {
        let has_saved = line["saved_input"] == 100 && line["saved_cost"] == "350";
        assert_eq!(has_saved, line["cache"] == "hit", "{line}");
        assert_eq!(line.get("tokens_input").is_none(), line["cache"] == "hit", "{line}");
        assert_eq!(line["attempts"] == 0, line["cache"] == "hit", "{line}");
    }
}

#[test]
fn answers_are_forgotten_by_model_by_key_and_all() {
    let upstream = counting();
    let keys = json!([
        {"name": "one", "hash": hash_of("one")},
        {"name": "two", "hash": hash_of("two")},
        {"name": "root", "hash": hash_of("root"), "admin": true},
    ]);
    let top = format!("{CACHE}\nkeys: {keys}\nadmin: {{listen: \"127.0.0.1:0\"}}");
    let models = [Model("m/1", &[&upstream]), Model("m2", &[&upstream])];
    let mut gateway = Gateway::start(&services(&top, &[("svc", &models)]));
    let admin = gateway.admin();
    let (address, purge) = (gateway.address(), |query: &str, key: &str| {
        let path = format!("/admin/cache/purge{query}");
        post(admin, &path, &[&format!("Authorization: Bearer {key}")], "")
    });
    let hits = || -> Vec<String> {
        let mut hits = Vec::new();
        for model in ["m/1", "m2"] {
            for key in ["one", "two"] {
                let path = format!("/svc/{model}/v1/chat/completions");
                let body = r#"{"temperature":0}"#;
                let answer = post(address, &path, &[&format!("Authorization: Bearer {key}")], body);
                if answer.header("x-cache") == "hit" {
                    hits.push(format!("{model} {key}"));
                }
            }
        }
        hits
    };
    assert!(hits().is_empty());
    let all = ["m/1 one", "m/1 two", "m2 one", "m2 two"];
    assert_eq!(hits(), all);
    for (query, left) in [
        ("?service=svc&model=m%2F1", &["m2 one", "m2 two"][..]),
        ("?key=one", &["m/1 two", "m2 two"]),
        ("?all=true", &[]),
        ("?key=nobody", &all),
    ] {
        let purged = purge(query, "root");
        assert_eq!(purged.status, 200, "{}", purged.text());
        assert_eq!(hits(), left, "{query}");
    }
    gateway.wait_log("answers that were kept are purged");
    for (query, key, status) in [
        ("?service=svc&model=none", "root", 400),
        ("", "root", 400),
        ("?all=true", "one", 403),
        ("?all=true", "x", 401),
    ] {
        assert_eq!(purge(query, key).status, status, "{query} {key}");
    }
    assert_eq!(
        get(admin, "/admin/cache/purge?all=true", &["Authorization: Bearer root"]).status,
        405
    );
    assert_ne!(
        post(address, "/admin/cache/purge?all=true", &["Authorization: Bearer root"], "").status,
        200
    );
    let mut bare = Gateway::start(&config("admin: {listen: \"127.0.0.1:0\"}", &[&upstream]));
    assert_eq!(post(bare.admin(), "/admin/cache/purge?all=true", &[], "").status, 400);
}

#[test]
fn what_is_on_its_way_when_its_model_is_purged_is_not_kept() {
    let (upstream, go, begun) = held_back();
    let top = format!("{CACHE}\nadmin: {{listen: \"127.0.0.1:0\"}}");
    let mut gateway = Gateway::start(&config(&top, &[&upstream]));
    let admin = gateway.admin();
    let body = prompt("a", "");
    let mut first = open(&gateway, &body);
    begun.recv().unwrap();
    assert_eq!(post(admin, "/admin/cache/purge?all=true", &[], "").status, 200);
    let mut second = open(&gateway, &body);
    begun.recv().unwrap();
    go.send(()).unwrap();
    go.send(()).unwrap();
    for client in [&mut first, &mut second] {
        assert_eq!(told(&client.read(false).unwrap()), pair("miss", "late"));
    }
    assert_eq!(told(&ask(&gateway, &body, &[])), pair("hit", "late"));
}

#[test]
fn a_guard_looks_at_what_is_given_again_for_each_client() {
    let upstream = counting();
    let folder = tempfile::tempdir().unwrap();
    let keys = json!([
        {"name": "free", "hash": hash_of("free")},
        {"name": "held", "hash": hash_of("held")},
    ]);
    let text = |word: &str| {
        let top = format!(
            "cache: {{enabled: true, per: all}}\nkeys: {keys}\nhooks:\n\
             - {{when: 'key.name == \"held\"', guard: {{words: [{word}], on: [answer], action: redact, replacement: '***'}}}}\n\
             - {{response_headers: {{set: {{x-key: {{expression: key.name}}, x-cached: {{expression: 'backend == \"\" ? \"yes\" : \"no\"'}}}}}}}}"
        );
        config(&top, &[&upstream])
    };
    std::fs::write(folder.path().join("tollgate.yaml"), text("answer")).unwrap();
    let gateway = Gateway::start_in(folder, &[], &[]);
    for stream in ["", r#","stream":true"#] {
        let number = if stream.is_empty() { 1 } else { 2 };
        let ask = |key: &str| {
            let answer =
                ask(&gateway, &prompt("a", stream), &[&format!("Authorization: Bearer {key}")]);
            assert_eq!(answer.header("x-key"), key);
            let is_cached = answer.header("x-cache") == "hit";
            assert_eq!(answer.header("x-cached"), if is_cached { "yes" } else { "no" });
            told(&answer)
        };
        assert_eq!(ask("free"), pair("miss", &format!("answer {number}")));
        assert_eq!(ask("held"), pair("hit", &format!("*** {number}")));
        assert_eq!(ask("free"), pair("hit", &format!("answer {number}")));
    }
}

#[test]
fn a_guard_that_ends_the_answer_of_one_client_ends_it_for_nobody_else() {
    let (upstream, go, begun) = held_back();
    let keys = json!([
        {"name": "free", "hash": hash_of("free")},
        {"name": "held", "hash": hash_of("held")},
    ]);
    let top = format!(
        "cache: {{enabled: true, per: all}}\nkeys: {keys}\nhooks:\n\
         - {{when: 'key.name == \"held\"', guard: {{words: [late], on: [answer]}}}}"
    );
    let gateway = Gateway::start(&config(&top, &[&upstream]));
    let body = prompt("a", r#","stream":true"#);
    let open = |key: &str| {
        let mut client = Connection::open(gateway.address());
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {key}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        client.write(head.as_bytes()).unwrap();
        begun.recv().unwrap();
        client
    };
    let (mut held, mut free) = (open("held"), open("free"));
    // What is refused before its head has gone out is refused with another one.
    for client in [&mut held, &mut free] {
        assert_eq!(client.read_head().unwrap().header("x-cache"), "miss");
    }
    go.send(()).unwrap();
    go.send(()).unwrap();
    let (text, is_whole) = rest(&mut held);
    assert!(!is_whole && text.contains("content_filter"), "{text}");
    let (text, is_whole) = rest(&mut free);
    assert!(is_whole && text.ends_with("[DONE]\n\n"), "{text}");
}

#[test]
fn limits_and_keys_hold_for_answers_that_are_kept() {
    let upstream = counting();
    let top = format!(
        "{CACHE}\nledger: {{}}\napi_key: sk\nlimits: [{{per: key, requests: 3, window: 1h}}]"
    );
    let gateway = Gateway::start(&config(&top, &[&upstream]));
    let ask = |key: &str| {
        let answer = ask(&gateway, &prompt("a", ""), &[&format!("Authorization: Bearer {key}")]);
        (answer.status, answer.header("x-cache"))
    };
    let hit = (200, "hit".to_owned());
    assert_eq!(ask("sk"), (200, "miss".to_owned()));
    assert_eq!([ask("sk"), ask("sk")], [hit.clone(), hit]);
    assert_eq!(ask("sk").0, 429);
    assert_eq!(ask("other").0, 401);
    // Who was refused has no row.
    let file = gateway.folder().join("state/ledger.db");
    let rows = || -> i64 {
        let count = "SELECT COUNT(*) FROM api_usage";
        let Ok(database) = Database::open(&file) else { return 0 };
        database.query_row(count, [], |row| row.get(0)).unwrap_or_default()
    };
    eventually("the others have one", || rows() == 3);
    let hits =
        || Metrics::of(gateway.address()).sum("proxy_cache_requests_total", &["outcome=\"hit\""]);
    eventually("they are counted", || hits() == 2.0);
}

#[test]
fn memory_stays_within_its_bound_whatever_is_asked() {
    let upstream = Upstream::start(|seen, reply| {
        let asked: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
        let bytes = asked["seed"].as_u64().unwrap() as usize;
        let answer = json!({"choices": [{"message": {"content": "x".repeat(bytes)}}]}).to_string();
        reply.send(200, &[("content-type", "application/json")], answer.as_bytes());
    });
    let bytes_max = 2_000_000;
    let top = format!(
        "cache: {{enabled: true, memory_bytes_max: {bytes_max}, answer_bytes_max: 100000}}"
    );
    let gateway = Gateway::start(&config(&top, &[&upstream]));
    let clients: Vec<_> = (0..4)
        .map(|client| {
            let address = gateway.address();
            std::thread::spawn(move || {
                let mut random = fastrand::Rng::with_seed(client);
                for _ in 0..400 {
                    let bytes = {
                        let power = random.u32(4..17);
                        random.usize(..1 << power)
                    };
                    let body =
                        prompt(&random.u32(..100).to_string(), &format!(",\"seed\":{bytes}"));
                    let answer = post(address, CHAT, &[], body);
                    assert_eq!(
                        answer.json()["choices"][0]["message"]["content"].as_str().unwrap().len(),
                        bytes
                    );
                }
            })
        })
        .collect();
    let bytes = || Metrics::of(gateway.address()).sum("proxy_cache_bytes", &[]);
    let mut most: f64 = 0.0;
    while clients.iter().any(|client| !client.is_finished()) {
        most = most.max(bytes());
    }
    for client in clients {
        client.join().unwrap();
    }
    most = most.max(bytes());
    assert!(most <= f64::from(bytes_max) && most > f64::from(bytes_max) / 4.0, "{most}");
}

#[test]
fn memory_that_is_counted_is_what_the_process_takes() {
    let upstream = counting();
    let bytes_max = 8 * 1024 * 1024;
    let top =
        format!("cache: {{enabled: true, memory_bytes_max: {bytes_max}, answer_bytes_max: 64KiB}}");
    let gateway = Gateway::start(&config(&top, &[&upstream]));
    let fill = |from: usize, count: usize| {
        let mut client = Connection::open(gateway.address());
        for number in from..from + count {
            let body = prompt(&number.to_string(), "");
            let head = format!(
                "POST {CHAT} HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            client.write((head + &body).as_bytes()).unwrap();
            assert_eq!(client.read(false).unwrap().header("x-cache"), "miss");
        }
    };
    // What it takes besides.
    fill(0, 500);
    let before = gateway.resident_kib();
    fill(500, 11_500);
    let bytes = Metrics::of(gateway.address()).sum("proxy_cache_bytes", &[]);
    assert!(bytes > f64::from(bytes_max) * 0.8, "{bytes}");
    let grown = gateway.resident_kib().saturating_sub(before);
    assert!(grown < 2 * bytes_max as u64 / 1024, "{grown} KiB for {bytes} bytes");
}

#[test]
fn mistakes_are_named_where_they_are() {
    let upstream = counting();
    let told = |top: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("t.yaml"), config(top, &[&upstream])).unwrap();
        let output = run_program(folder.path(), &[], &["check", "-c", "t.yaml"]);
        assert!(!output.status.success(), "{top}");
        String::from_utf8(output.stderr).unwrap()
    };
    for (top, expected) in [
        (
            "cache: {store: redis}",
            "cache.store: takes \"redis\", which says where that is (t.yaml:2:16)",
        ),
        ("cache: {per: client}", "cache.per: "),
        ("cache: {headers: [x y]}", "cache.headers[0]: expected a header's name (t.yaml:2:19)"),
        (
            "cache: {answer_bytes_max: 64MiB}",
            "cache.answer_bytes_max: memory_bytes_max (67108864) has to be at least 8 times",
        ),
        ("cache: {ttl: soon}", "cache.ttl: "),
        ("cache: {size: 1}", "cache.size: unknown key"),
    ] {
        let told = told(top);
        assert!(told.contains(expected), "{told}");
    }
}
