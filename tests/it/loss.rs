//! Nothing of the ledger is lost or there twice: killed processes, full disks, databases that are down.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rusqlite::Connection as Database;

use crate::harness::{
    Gateway, Model, Postgres, Upstream, config, eventually, get, post, run_program, services,
};

const CHAT: &str = "/v1/chat/completions";

const PRICES: &str = "prices: {per: 1, models: {mdl: {input: 0.001, output: 0.002}}}";

/// Answers with a usage of its own for each request, and notes which ones it has answered.
fn counting() -> (Upstream, Arc<Mutex<BTreeSet<String>>>) {
    let answered = Arc::new(Mutex::new(BTreeSet::new()));
    let upstream = Upstream::start({
        let answered = Arc::clone(&answered);
        move |seen, reply| {
            let id = seen.header("x-request-id");
            let tokens: u64 = id.rsplit('-').next().unwrap_or_default().parse().unwrap_or(0);
            answered.lock().unwrap().insert(id);
            let body = format!(
                r#"{{"usage":{{"prompt_tokens":{tokens},"completion_tokens":{}}}}}"#,
                2 * tokens
            );
            reply.send(200, &[("Content-Type", "application/json")], body.as_bytes());
        }
    });
    (upstream, answered)
}

/// Clients that ask without a pause, each one thing after the other.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Vec<String>>>,
    done: Arc<AtomicUsize>,
}

impl Load {
    fn start(to: SocketAddr, name: &str, clients: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicUsize::new(0));
        let client = |number: usize| {
            let (stop, done, name) = (Arc::clone(&stop), Arc::clone(&done), name.to_owned());
            std::thread::spawn(move || {
                let mut answered = Vec::new();
                for count in 0.. {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    let id = format!("{name}-{number}-{count}");
                    let header = format!("X-Request-ID: {id}");
                    if std::net::TcpStream::connect(to).is_err() {
                        break;
                    }
                    let body = r#"{"model":"mdl"}"#;
                    if post(to, "/v1/chat/completions", &[&header], body).status != 200 {
                        break;
                    }
                    answered.push(id);
                    done.fetch_add(1, Ordering::SeqCst);
                }
                answered
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { stop, clients, done }
    }

    #[track_caller]
    fn wait(&self, answers: usize) {
        let from = self.done.load(Ordering::SeqCst);
        eventually("the load goes on", || self.done.load(Ordering::SeqCst) >= from + answers);
    }

    /// Ends it. What each client was answered, in order.
    fn end(self) -> Vec<Vec<String>> {
        self.stop.store(true, Ordering::SeqCst);
        self.clients.into_iter().map(|client| client.join().unwrap()).collect()
    }
}

/// Request ids and costs of all rows.
fn rows(file: &Path) -> Vec<(String, String)> {
    let Ok(database) = Database::open(file) else { return Vec::new() };
    let Ok(mut select) = database.prepare("SELECT request_id, cost FROM api_usage") else {
        return Vec::new();
    };
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.map(Result::unwrap).collect()
}

/// Whether each has the cost that its id says: 5 thousandths for each of so many tokens.
#[track_caller]
fn check_costs(rows: &[(String, String)]) {
    for (id, cost) in rows {
        let tokens: u64 = id.rsplit('-').next().unwrap().parse().unwrap();
        let thousandths = 5 * tokens;
        let exact = format!("{}.{:03}", thousandths / 1000, thousandths % 1000);
        let exact = exact.trim_end_matches('0').trim_end_matches('.');
        assert_eq!(cost, exact, "{id}");
    }
}

fn metric(gateway: &Gateway, name: &str) -> u64 {
    let text = get(gateway.address(), "/metrics", &[]).text();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    line.rsplit(' ').next().unwrap_or_default().parse().unwrap_or(0)
}

fn start(folder: &Path, top: &str, upstream: &Upstream) -> Gateway {
    let state = folder.display();
    Gateway::start(&config(&format!("state_directory: {state}\n{top}\n{PRICES}"), &[upstream]))
}

#[test]
fn a_process_that_is_killed_loses_no_row_that_was_acknowledged() {
    let (upstream, answered) = counting();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ledger.db");
    let mut acknowledged = 0;
    for round in 0..4 {
        let gateway = start(folder.path(), "ledger: {}", &upstream);
        let load = Load::start(gateway.address(), &format!("r{round}"), 4);
        load.wait(100 + 50 * round);
        // Whatever a client had an answer for is acknowledged soon.
        let (answers, mut spooled) = (load.done.load(Ordering::SeqCst) as u64, 0);
        eventually("they are acknowledged", || {
            spooled = metric(&gateway, "proxy_ledger_rows_total{stage=\"spooled\"}");
            spooled >= answers
        });
        acknowledged += spooled;
        // SIGKILL.
        drop(gateway);
        load.end();
    }
    // The next process brings the rest into the database.
    let gateway = start(folder.path(), "ledger: {}", &upstream);
    eventually("nothing waits", || metric(&gateway, "proxy_ledger_spool_bytes") == 0);
    let rows = rows(&file);
    let ids: BTreeSet<String> = rows.iter().map(|(id, _)| id.clone()).collect();
    assert_eq!(ids.len(), rows.len(), "a row is there twice");
    check_costs(&rows);
    let answered = answered.lock().unwrap();
    assert!(ids.is_subset(&answered));
    assert!(rows.len() as u64 >= acknowledged, "{} of {acknowledged}", rows.len());
}

#[test]
fn a_database_that_is_down_is_waited_for_and_gets_all_rows_once() {
    let (upstream, answered) = counting();
    let mut postgres = Postgres::start();
    let folder = tempfile::tempdir().unwrap();
    let top = format!("ledger: {{database: \"{}\"}}", postgres.url());
    let mut gateway = start(folder.path(), &top, &upstream);
    let load = Load::start(gateway.address(), "pg", 4);
    load.wait(100);
    eventually("rows come in", || postgres.ask("SELECT count(*) > 0 FROM api_usage") == "t");
    gateway.wait_log("a new ledger begins in the database");
    postgres.stop();
    load.wait(200);
    gateway.wait_log("the ledger's database takes no rows");
    assert_eq!(metric(&gateway, "proxy_ledger_up{part=\"database\"}"), 0);
    // The gateway ends and starts meanwhile, too.
    let in_first: usize = load.end().iter().map(Vec::len).sum();
    gateway.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(gateway.wait_end().success());
    let mut gateway = start(folder.path(), &top, &upstream);
    gateway.wait_log("what the ledger has of this month is not known yet");
    let load = Load::start(gateway.address(), "later", 4);
    load.wait(100);
    postgres.restart();
    load.wait(100);
    let in_second: usize = load.end().iter().map(Vec::len).sum();
    eventually("nothing waits", || {
        metric(&gateway, "proxy_ledger_rows_total{stage=\"spooled\"}") >= in_second as u64
            && postgres.ask("SELECT count(*) FROM api_usage") == (in_first + in_second).to_string()
    });
    assert_eq!(answered.lock().unwrap().len(), in_first + in_second);
    assert_eq!(postgres.ask("SELECT count(DISTINCT request_id) = count(*) FROM api_usage"), "t");
    let wrong = "SELECT count(*) FROM api_usage WHERE cost != tokens_input * 0.005 OR tokens_output != 2 * tokens_input";
    assert_eq!(postgres.ask(wrong), "0");
    let log = gateway.log().join("\n");
    assert!(!log.contains("hunter2"), "{log}");

    // Reports read from there, too.
    let report = get(gateway.address(), "/api/usage?by=model,day,status", &[]).json();
    let total: u64 = postgres.ask("SELECT sum(tokens_input) FROM api_usage").parse().unwrap();
    assert_eq!(report["total"]["tokens_input"], total);
    let cost = postgres.ask("SELECT trim_scale(sum(cost)) FROM api_usage");
    assert_eq!(report["total"]["cost"], cost.as_str());
    assert_eq!(report["data"][0]["status"], "200");
    let usage = run_program(gateway.folder(), &[], &["usage", "--by", "month", "--format", "csv"]);
    let text = String::from_utf8_lossy(&usage.stdout).into_owned();
    assert!(text.contains(&format!(",{total},")), "{text}");
}

#[test]
fn what_a_database_refuses_stands_in_nobodys_way() {
    let (upstream, _) = counting();
    let mut postgres = Postgres::start();
    let folder = tempfile::tempdir().unwrap();
    let top = format!(
        "state_directory: {}\nledger: {{database: \"{}\"}}",
        folder.path().display(),
        postgres.url()
    );
    let mut gateway = Gateway::start(&services(&top, &[("svc", &[Model("*", &[&upstream])])]));
    let to = gateway.address();
    let ask = |model: &str, id: &str| {
        let header = format!("X-Request-ID: {id}");
        let body = format!("{{\"model\":\"{model}\"}}");
        assert_eq!(post(to, CHAT, &[&header], body).status, 200);
    };
    ask("gpt-\\u0000x\\u001b", "a-1");
    let models = "SELECT string_agg(model, ' ' ORDER BY id) FROM api_usage";
    let known = "gpt-\u{fffd}x\u{fffd}";
    eventually("it is there", || postgres.ask(models) == known);
    postgres.ask("ALTER TABLE api_usage ADD CHECK (model <> 'bad')");
    for (at, model) in ["one", "bad", "two", "bad", "three"].into_iter().enumerate() {
        ask(model, &format!("b-{at}"));
    }
    eventually("the others are there", || postgres.ask(models) == format!("{known} one two three"));
    gateway.wait_log("refuses the row of request b-3");
    let aside = std::fs::read_to_string(folder.path().join("spool/refused.jsonl")).unwrap();
    assert_eq!(aside.matches("\"model\":\"bad\"").count(), 2, "{aside}");
    postgres.stop();
}

#[test]
fn old_rows_are_removed() {
    let (upstream, _) = counting();
    let mut postgres = Postgres::start();
    let folder = tempfile::tempdir().unwrap();
    for database in [format!("database: \"{}\", ", postgres.url()), String::new()] {
        let top = format!("ledger: {{{database}enabled: true}}");
        let mut first = start(folder.path(), &top, &upstream);
        post(first.address(), "/v1/chat/completions", &[], r#"{"model":"mdl"}"#);
        eventually("it is there", || {
            metric(&first, "proxy_ledger_rows_total{stage=\"stored\"}") == 1
        });
        first.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(first.wait_end().success());
        if database.is_empty() {
            let file = Database::open(folder.path().join("ledger.db")).unwrap();
            file.execute("UPDATE api_usage SET timestamp = '2020-01-01T00:00:00.000Z'", [])
                .unwrap();
        } else {
            postgres.ask("UPDATE api_usage SET timestamp = '2020-01-01'");
        }
        let top = format!("ledger: {{{database}keep_days: 30}}");
        let _second = start(folder.path(), &top, &upstream);
        eventually("it is gone", || match database.is_empty() {
            true => rows(&folder.path().join("ledger.db")).is_empty(),
            false => postgres.ask("SELECT count(*) FROM api_usage") == "0",
        });
    }
    postgres.stop();
}

/// A file system of its own, so small that it is soon full.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// None: only root may mount one.
    fn mount(folder: &Path) -> Option<Self> {
        let options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs"];
        let done = Command::new("mount").args(options).arg(folder).output().ok()?;
        done.status.success().then(|| Self(folder.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn a_full_disk_delays_rows_and_no_exchange() {
    let (upstream, answered) = counting();
    let folder = tempfile::tempdir().unwrap();
    let Some(_disk) = SmallDisk::mount(folder.path()) else {
        eprintln!("not root: no small disk can be mounted, nothing was tested");
        return;
    };
    let database = tempfile::tempdir().unwrap();
    let top = format!("ledger: {{database: \"sqlite:{}/l.db\"}}", database.path().display());
    let mut gateway = start(folder.path(), &top, &upstream);
    let load = Load::start(gateway.address(), "full", 4);
    load.wait(50);
    let ballast = folder.path().join("ballast");
    let _ = std::fs::write(&ballast, vec![1; 1024 * 1024]);
    load.wait(300);
    gateway.wait_log("the ledger's spool takes no rows: No space left on device");
    let done: usize = load.end().iter().map(Vec::len).sum();
    assert_eq!(metric(&gateway, "proxy_ledger_up{part=\"spool\"}"), 0);
    assert!(rows(&database.path().join("l.db")).len() < done);
    std::fs::remove_file(&ballast).unwrap();
    eventually("all is there", || rows(&database.path().join("l.db")).len() >= done);
    let rows = rows(&database.path().join("l.db"));
    let ids: BTreeSet<String> = rows.iter().map(|(id, _)| id.clone()).collect();
    assert_eq!(ids, *answered.lock().unwrap());
    assert_eq!(ids.len(), rows.len());
    check_costs(&rows);
    assert_eq!(metric(&gateway, "proxy_ledger_rows_total{stage=\"dropped\"}"), 0);
    gateway.wait_log("the ledger's spool takes rows again");
}
