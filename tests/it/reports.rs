//! What the ledger is asked, by the command line and over HTTP.

use serde_json::{Value, json};

use crate::harness::{
    Gateway, Model, Postgres, Upstream, config, eventually, get, hash_of, post, run_program,
    services,
};

const CHAT: &str = "/v1/chat/completions";

const PRICES: &str =
    "prices: {per: 1, currency: EUR, models: {mdl: {input: 0.001, output: 0.002, cached: 0}}}";

/// What `tollgate usage` prints.
#[track_caller]
fn usage(gateway: &Gateway, arguments: &[&str]) -> String {
    let output = run_program(gateway.folder(), &[], &[&["usage"], arguments].concat());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

/// How many exchanges are in the ledger.
fn exchanges(gateway: &Gateway) -> u64 {
    let report: Value = serde_json::from_str(&usage(gateway, &["--format", "json"])).unwrap();
    report["total"]["exchanges"].as_u64().unwrap()
}

/// Two keys, with what each of them asks for.
fn busy_gateway(top: &str) -> (Gateway, Upstream) {
    let upstream = Upstream::start(|_, reply| {
        let body = r#"{"usage":{"prompt_tokens":100,"completion_tokens":50,"prompt_tokens_details":{"cached_tokens":40}}}"#;
        reply.send(200, &[("Content-Type", "application/json")], body.as_bytes());
    });
    let key = |name: &str, more: &str| {
        format!(
            "  - {{id: key-{name}, name: \"{name}, Inc.\", hash: \"{}\"{more}}}\n",
            hash_of(&format!("tg-{name}"))
        )
    };
    let top = format!(
        "{top}ledger: {{}}\n{PRICES}\n\
         limits: [{{name: purse, per: key, budget_monthly: 10}}]\nkeys:\n{}{}{}",
        key("a", ", labels: {department: research}"),
        key("b", ", limits: [{name: day, budget_daily: 1}]"),
        key("root", ", admin: true"),
    );
    let gateway = Gateway::start(&config(&top, &[&upstream]));
    for key in ["a", "a", "b"] {
        let headers = [&format!("X-API-Key: tg-{key}")[..]];
        let answer = post(gateway.address(), CHAT, &headers, r#"{"model":"mdl","max_tokens":50}"#);
        assert_eq!(answer.status, 200);
    }
    eventually("all are in the ledger", || exchanges(&gateway) == 3);
    (gateway, upstream)
}

#[test]
fn the_command_line_sums_the_ledger_up() {
    let (gateway, _upstream) = busy_gateway("");
    let usage = |arguments: &[&str]| usage(&gateway, arguments);
    let table = usage(&["--by", "key,model"]);
    let lines: Vec<Vec<&str>> =
        table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0][..6], ["KEY", "USER", "MODEL", "EXCHANGES", "INPUT", "OUTPUT"]);
    assert_eq!(
        lines[1],
        ["key-a", "a,", "Inc.", "mdl", "2", "200", "100", "80", "0", "0.32", "0", "0"]
    );
    assert_eq!(lines[3], ["total", "3", "300", "150", "120", "0", "0.48", "0", "0"]);
    let csv = usage(&["--by", "user,day", "--since", "24h", "--format", "csv"]);
    assert!(csv.starts_with("user,day,exchanges,input,output,cached,reserved,cost,unpriced,estimated\r\n\"a, Inc.\",20"), "{csv}");
    let json: Value =
        serde_json::from_str(&usage(&["--by", "user", "--key", "key-b", "--format", "json"]))
            .unwrap();
    assert_eq!(json["data"].as_array().unwrap().len(), 1);
    assert_eq!(json["data"][0]["cost"], "0.16");
    let named = usage(&["--by", "user", "--key", "b, Inc.", "--format", "json"]);
    let named: Value = serde_json::from_str(&named).unwrap();
    assert_eq!(named["data"], json["data"]);
    assert_eq!((&json["currency"], &json["total"]["exchanges"]), (&json!("EUR"), &json!(1)));
    let none = usage(&["--since", "2020-01-01", "--until", "2020-02-01", "--format", "csv"]);
    assert_eq!(none.lines().count(), 1);
    let wrong = run_program(gateway.folder(), &[], &["usage", "--by", "colour"]);
    assert_eq!(wrong.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("\"colour\" is none of key, user"));
}

#[test]
fn a_key_sees_its_own_usage_and_an_admins_key_all() {
    let (gateway, _upstream) = busy_gateway("");
    let ask = |key: &str, query: &str| {
        get(gateway.address(), &format!("/api/usage{query}"), &[&format!("X-API-Key: tg-{key}")])
    };
    let own = ask("a", "").json();
    assert_eq!(own["total"]["cost"], "0.32");
    assert_eq!(
        own["budgets"],
        json!([{"name": "purse", "per": "month", "limit": "10", "spent": "0.32", "remaining": "9.68"}])
    );
    let budgets = ask("b", "?by=model").json()["budgets"].clone();
    assert_eq!(
        budgets[1],
        json!({"name": "day", "per": "day", "limit": "1", "spent": "0.16", "remaining": "0.84"})
    );
    assert_eq!(ask("a", "?by=user").json()["data"].as_array().unwrap().len(), 1);
    let answer = ask("a", "?key=key-a&by=key");
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, String::new()));
    assert_eq!(answer.json()["data"][0]["labels"], json!({"department": "research"}));
    for query in ["?key=key-b", "?by=colour", "?since=never", "?x=1"] {
        assert_eq!(ask("a", query).status, 400, "{query}");
    }
    let all = ask("root", "?by=user,model&since=today").json();
    let users: Vec<&str> =
        all["data"].as_array().unwrap().iter().map(|line| line["user"].as_str().unwrap()).collect();
    assert_eq!(users, ["a, Inc.", "b, Inc."]);
    let of_b = ask("root", "?key=key-b").json();
    assert_eq!((&of_b["total"]["exchanges"], &of_b["budgets"]), (&json!(1), &budgets));
    assert_eq!(ask("wrong", "").status, 401);
}

#[test]
fn beside_an_admin_address_the_traffic_address_shows_a_key_its_own_usage_only() {
    let (mut gateway, _upstream) = busy_gateway("admin: {listen: 127.0.0.1:0}\n");
    let line = gateway.wait_log("status and dashboard on");
    let admin = line.rsplit("http://").next().unwrap().trim().parse().unwrap();
    let total = |to| {
        let answer = get(to, "/api/usage?by=user", &["X-API-Key: tg-root"]);
        answer.json()["total"]["exchanges"].as_u64()
    };
    assert_eq!((total(gateway.address()), total(admin)), (Some(0), Some(3)));
}

#[test]
fn a_table_opens_in_a_spreadsheet_as_text() {
    let upstream = Upstream::named("u");
    let config = services("ledger: {}", &[("svc", &[Model("*", &[&upstream])])]);
    let gateway = Gateway::start(&config);
    let body = r#"{"model":"=HYPERLINK(\"http://x\")"}"#;
    assert_eq!(post(gateway.address(), CHAT, &[], body).status, 200);
    eventually("it is in the ledger", || exchanges(&gateway) == 1);
    let csv = usage(&gateway, &["--by", "model", "--format", "csv"]);
    assert_eq!(csv.lines().nth(1).unwrap(), "\"'=HYPERLINK(\"\"http://x\"\")\",1,6,0,0,0,0,1,1");
}

/// Exchanges of 0.1 each, in whatever currency.
fn spend(gateway: &Gateway, count: u64) -> Vec<u16> {
    let headers = ["X-API-Key: tg-a"];
    let ask =
        |_| post(gateway.address(), CHAT, &headers, r#"{"model":"mdl","max_tokens":50}"#).status;
    (0..count).map(ask).collect()
}

#[test]
fn amounts_in_different_currencies_make_no_sum() {
    let upstream = Upstream::metered();
    let postgres = Postgres::start();
    for database in ["", &format!("database: \"{}\"", postgres.url())] {
        let folder = tempfile::tempdir().unwrap();
        let text = |currency: &str| {
            config(
                &format!(
                    "state_directory: {}/state\nledger: {{{database}}}\n\
                     prices: {{per: 1, currency: {currency}, models: {{mdl: {{input: 0, output: 0.002}}}}}}\n\
                     limits: [{{name: purse, per: key, budget_monthly: 0.25}}]\n\
                     keys: [{{id: key-a, name: a, hash: \"{}\"}}]",
                    folder.path().display(),
                    hash_of("tg-a"),
                ),
                &[&upstream],
            )
        };
        let mut first = Gateway::start(&text("EUR"));
        assert_eq!(spend(&first, 3), [200, 200, 429]);
        eventually("both are in the ledger", || exchanges(&first) == 2);
        // A reload takes another currency: what was spent in the first one is none of this one.
        std::fs::write(first.folder().join("tollgate.yaml"), text("USD")).unwrap();
        first.signal(nix::sys::signal::Signal::SIGHUP);
        first.wait_log("the new configuration is at work");
        assert_eq!(spend(&first, 1), [200]);
        eventually("it is in the ledger", || exchanges(&first) == 3);
        let total = |gateway: &Gateway, arguments: &[&str]| {
            let text = usage(gateway, &[&["--format", "json"], arguments].concat());
            let json: Value = serde_json::from_str(&text).unwrap();
            let total = &json["total"];
            json!([json["currency"], total["exchanges"], total["cost"], total["unpriced"]])
        };
        assert_eq!(total(&first, &[]), json!(["USD", 3, "0.1", 2]));
        assert_eq!(total(&first, &["--currency", "EUR"]), json!(["EUR", 3, "0.2", 1]));
        let own = |query: &str| {
            let path = format!("/api/usage{query}");
            get(first.address(), &path, &["X-API-Key: tg-a"]).json()
        };
        assert_eq!(own("?currency=EUR")["total"]["cost"], "0.2");
        assert_eq!(own("")["budgets"][0]["spent"], "0.1");
        first.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(first.wait_end().success());
        // So it is after a restart.
        let second = Gateway::start(&text("USD"));
        assert_eq!(spend(&second, 2), [200, 429]);
    }
}

#[test]
fn whoever_asks_for_a_report_changes_nothing() {
    let postgres = Postgres::start();
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::named("u");
    for (database, code) in [(format!("database: \"{}\"", postgres.url()), 0), (String::new(), 1)] {
        let text = config(&format!("ledger: {{{database}}}"), &[&upstream]);
        std::fs::write(folder.path().join("tollgate.yaml"), text).unwrap();
        let output = run_program(folder.path(), &[], &["usage", "--format", "csv"]);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).lines().count() <= 1, "{output:?}");
    }
    assert_eq!(postgres.ask("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"), "0");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_database_that_is_down_is_told_to_who_asks_for_a_report() {
    let mut postgres = Postgres::start();
    let upstream = Upstream::named("u");
    let gateway = Gateway::start(&config(
        &format!("ledger: {{database: \"{}\"}}", postgres.url()),
        &[&upstream],
    ));
    assert_eq!(get(gateway.address(), "/api/usage", &[]).status, 200);
    postgres.stop();
    let answer = get(gateway.address(), "/api/usage", &[]);
    assert_eq!((answer.status, answer.header("retry-after")), (503, "1".to_owned()));
    assert_eq!(answer.json()["error"]["code"], "ledger_unavailable");
    assert!(!answer.text().contains("hunter2"));
}
