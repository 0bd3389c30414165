//! The composition root: a snapshot becomes a runtime, the runtime becomes Pingora's services.

mod background;
mod connections;
mod export;
mod fetch;
mod front;
mod listen;
mod reload;
mod sending;
mod signals;
mod stream;
mod supervisor;
mod upgrade;
mod workers;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use pingora_core::server::configuration::ServerConf;
use pingora_core::server::{ExecutionPhase, RunArgs, Server};
use pingora_proxy::http_proxy;
use tokio::signal::unix::SignalKind;
use tokio::sync::{Notify, broadcast};

use crate::admin::{Admin, Scope, Sources};
use crate::config::{Calendar, ConfigError, Listen, Snapshot};
use crate::ledger::{Known, Ledger, Month, Months};
use crate::lifecycle::Lifecycle;
use crate::proxy::{Proxy, Serves};
use crate::runtime::{Current, Reloads, Runtime};
use crate::telemetry::{self, AppLog, Telemetry};

use front::Front;
use listen::{Bound, Inherited};
use reload::{Reloader, Told};
use signals::Signals;
use upgrade::TakeOver;
use workers::Workers;

/// Most idle connections kept to all backends together: each is a descriptor.
const IDLE_CONNECTIONS_MAX: usize = 16_384;

/// Fewest, so that a single small pool still serves many clients.
const IDLE_CONNECTIONS_MIN: usize = 128;

/// Attempts that Pingora allows one exchange. Ours end by themselves, when every backend was asked.
const ATTEMPTS_MAX: usize = 4096;

/// After a new process has taken over, open connections still get an answer for this long, and close
/// after it. Those that stay idle are closed then: closing one in the moment in which its client sends
/// costs that request.
const PART_WITHIN: Duration = Duration::from_secs(5);

/// Longest wait, after the drain, for connections to send their last bytes and to part; only a client
/// that has stopped to answer takes that long.
const FLUSH_SECONDS_MAX: u64 = 5;

/// How long a start waits for what the ledger's database knows of this month.
const KNOWN_WITHIN: Duration = Duration::from_secs(1);

/// What the ledger's database gets at the end of the process to take the last rows; what it does not take, the
/// next process gives it.
const LAST_ROWS: Duration = Duration::from_secs(5);

/// Of the time that there is at the end, the request log's disk and who takes spans get this part each: one that hangs is not
/// waited for.
const LAST_LINES: u32 = 5;

/// Above this many seconds a deadline runs on tokio's timer: Pingora's own keeps each of them until
/// it ends, also of exchanges that are long over.
const FAST_TIMER_SECONDS_MAX: u64 = 60;

/// Reads the configuration again.
pub type Reload = Arc<dyn Fn() -> Result<Snapshot, ConfigError> + Send + Sync>;

/// Where a started gateway listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Traffic.
    pub traffic: Vec<Listen>,
    /// Status and dashboard; empty where the traffic addresses serve them.
    pub admin: Vec<Listen>,
}

/// A gateway whose sockets are bound.
pub struct Gateway {
    snapshot: Snapshot,
    traffic: Vec<Bound>,
    admin: Vec<Bound>,
    take_over: TakeOver,
}

impl Gateway {
    /// Binds the sockets of `snapshot`, or takes those that the process was started with.
    ///
    /// # Errors
    /// When an address is taken or cannot be used; the message names it.
    pub fn bind(snapshot: Snapshot) -> Result<Self> {
        signals::outlive().context("cannot watch for signals")?;
        check_authorities()?;
        let mut take_over = TakeOver::of_process()?;
        let mut inherited = Inherited::find(std::mem::take(&mut take_over.sockets))?;
        let traffic = inherited.traffic(&snapshot.listen)?;
        let admin = inherited.admin(&snapshot.admin_listen)?;
        if snapshot.tls.is_none()
            && let Some(bound) = traffic.iter().chain(&admin).find(|bound| bound.listen().tls)
        {
            bail!("{} takes certificates; write them under \"tls\"", bound.listen());
        }
        inherited.close_rest();
        Ok(Self { snapshot, traffic, admin, take_over })
    }

    /// Where it listens, with the ports that the system chose for port 0.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        let of = |sockets: &[Bound]| sockets.iter().map(|socket| socket.listen().clone()).collect();
        Addresses { traffic: of(&self.traffic), admin: of(&self.admin) }
    }

    /// Serves until a signal ends it and the drain is over. `started` is called once, when it is
    /// ready.
    ///
    /// # Errors
    /// When the runtime cannot be built.
    pub fn run(
        self,
        reload: Option<(Reload, AppLog)>,
        started: impl Fn() + Send + Sync + 'static,
    ) -> Result<()> {
        let lifecycle = Arc::new(Lifecycle::default());
        let shutdown_timeout = self.snapshot.shutdown_timeout;
        let runtime = Runtime::new(self.snapshot, None).context("cannot build the pools")?;
        self.take_over.take_drained(&runtime);
        let current = Arc::new(Current::from_pointee(runtime));
        background::resolve_at_start(&current.load_full())?;
        let months = Arc::new(Months::default());
        let (telemetry, ledger) = start_telling(&current, &months, &lifecycle)?;
        let threads = current.load().snapshot.threads;
        let configuration = server_configuration(&current.load().snapshot);
        let sockets = [self.traffic.clone(), self.admin.clone()].concat();
        let (reloads, asked) = Reloads::new();
        let reloads = Arc::new(reloads);
        let mut server = Server::new_with_opt_and_conf(None, configuration);
        server.bootstrap();

        let sources = Sources {
            current: Arc::clone(&current),
            lifecycle: Arc::clone(&lifecycle),
            reloads: Arc::clone(&reloads),
            ledger: ledger.clone(),
            telemetry: Arc::clone(&telemetry),
        };
        let workers = |name, count, sockets: Vec<Bound>, scope, serves| {
            let proxy = Proxy {
                current: Arc::clone(&current),
                lifecycle: Arc::clone(&lifecycle),
                ledger: ledger.clone(),
                months: Arc::clone(&months),
                telemetry: Arc::clone(&telemetry),
                mirror: Arc::default(),
                pages: Arc::new(Admin::new(scope, sources.clone())),
                serves,
            };
            // Its own address stays reachable whatever the clients do.
            let connections = (serves == Serves::PagesAndTraffic).then(Arc::default);
            let listens: Vec<Listen> = sockets.iter().map(|it| it.listen().clone()).collect();
            Workers::start(name, count, sockets, &lifecycle, |load| {
                // Its connections belong to the worker's thread.
                let proxy = Proxy { mirror: Arc::default(), ..proxy.clone() };
                let proxy = http_proxy(&server.configuration, proxy);
                let lifecycle = Arc::clone(&lifecycle);
                Front::new(proxy, &current, lifecycle, connections.clone(), &listens, load)
            })
        };
        let scope = if self.admin.is_empty() { Scope::Everything } else { Scope::Probes };
        let mut services =
            vec![workers("traffic", threads, self.traffic, scope, Serves::PagesAndTraffic)?];
        if !self.admin.is_empty() {
            services.push(workers("admin", 1, self.admin, Scope::Admin, Serves::Pages)?);
        }
        services.into_iter().for_each(|service| drop(server.add_service(service)));
        let changed = Arc::new(Notify::new());
        server.add_service(background::service(&current, &changed, sources.clone()));

        let phases = server.watch_execution_phase();
        end_when_flushed(phases, Arc::clone(&lifecycle), shutdown_timeout)?;
        let reloader = reload.map(|(read, app_log)| {
            let told = Told { reloads, telemetry: Arc::clone(&telemetry), app_log };
            Reloader::new(Arc::clone(&current), changed, read, told)
        });
        let signals = Signals {
            lifecycle,
            telemetry,
            current,
            reloader,
            asked: Mutex::new(Some(asked)),
            shutdown_timeout,
            sockets: Mutex::new(sockets),
            take_over: self.take_over,
            started,
        };
        server.run(RunArgs { shutdown_signal: Box::new(signals) });
        Ok(())
    }
}

/// What is told of exchanges. The last lines of the request log are written before the process ends.
fn start_telemetry(current: &Current, lifecycle: &Lifecycle) -> Result<Arc<Telemetry>> {
    let telemetry = Arc::new(Telemetry::start(&current.load().snapshot.observed)?);
    let last = Arc::clone(&telemetry);
    lifecycle.do_at_last(move |longest| last.request_log.finish(longest / LAST_LINES));
    Ok(telemetry)
}

/// What is told of exchanges, and the ledger. At the end of the process spans go out last of all: rows are money.
fn start_telling(
    current: &Arc<Current>,
    months: &Arc<Months>,
    lifecycle: &Lifecycle,
) -> Result<(Arc<Telemetry>, Option<Arc<Ledger>>)> {
    let telemetry = start_telemetry(current, lifecycle)?;
    let ledger = start_ledger(current, months, lifecycle)?;
    let (current, told) = (Arc::clone(current), Arc::clone(&telemetry));
    lifecycle.do_at_last(move |left| export::send_last(&current, &told, left / LAST_LINES));
    Ok((telemetry, ledger))
}

/// The ledger, where there is one; it knows what keys have taken in this month as soon as its database does.
fn start_ledger(
    current: &Arc<Current>,
    months: &Arc<Months>,
    lifecycle: &Lifecycle,
) -> Result<Option<Arc<Ledger>>> {
    let runtime = current.load();
    let Some(spec) = &runtime.snapshot.ledger else { return Ok(None) };
    let (current, months) = (Arc::clone(current), Arc::clone(months));
    let currency = Arc::clone(&runtime.snapshot.prices.currency);
    let (told, is_known) = std::sync::mpsc::channel();
    let counted_in = Arc::clone(&currency);
    let known = move |known: &Known| {
        let runtime = current.load();
        let limits = &runtime.limits;
        let month = Month::of(known.at);
        for line in &known.month {
            let [key, _, _, model] = &line.names[..] else { continue };
            let tokens = line.tokens_input + line.tokens_output;
            months.restore(month, &key.as_str().into(), model, tokens, line.tokens_reserved);
        }
        let sums = [(Calendar::Month, &known.month), (Calendar::Day, &known.day)];
        // Amounts of another currency than a reload has brought meanwhile make no sum.
        let is_same = runtime.snapshot.prices.currency == counted_in;
        for (calendar, lines) in sums.into_iter().filter(|_| is_same) {
            for line in lines {
                let [key, name, service, model] = &line.names[..] else { continue };
                limits.restore(calendar, [key, name, service, model], line.cost);
            }
        }
        let _ = told.send(());
    };
    let ledger = Arc::new(Ledger::start(spec, &currency, known)?);
    let last = Arc::clone(&ledger);
    lifecycle.do_at_last(move |longest| last.finish(longest));
    // So that budgets hold from the first exchange on. A database that is down is not waited for.
    if is_known.recv_timeout(KNOWN_WITHIN).is_err() {
        log::warn!(
            "what the ledger has of this month is not known yet: until it is, budgets, tiers and reserved tokens \
             are counted from zero"
        );
    }
    Ok(Some(ledger))
}

fn server_configuration(snapshot: &Snapshot) -> ServerConf {
    let backends: usize = snapshot.pools().map(|(_, _, pool)| pool.backends.len()).sum();
    let idle_connections = snapshot.idle_connections.saturating_mul(backends);
    let idle_connections = idle_connections.clamp(IDLE_CONNECTIONS_MIN, IDLE_CONNECTIONS_MAX);
    ServerConf {
        // Each worker has a proxy of its own.
        threads: 1,
        upstream_keepalive_pool_size: idle_connections.div_ceil(snapshot.threads),
        max_retries: ATTEMPTS_MAX,
        // The process ends by itself long before, see `end_when_flushed`.
        grace_period_seconds: Some(snapshot.shutdown_timeout.as_secs() + 2 * FLUSH_SECONDS_MAX),
        graceful_shutdown_timeout_seconds: Some(0),
        fast_timeout_to_tokio_threshold_seconds: Some(FAST_TIMER_SECONDS_MAX),
        ..ServerConf::default()
    }
}

/// Pingora reads the system's certificates at its first connection, and panics where that fails.
fn check_authorities() -> Result<()> {
    let mut roots = pingora_core::tls::RootCertStore::empty();
    pingora_core::tls::load_platform_certs_incl_env_into_store(&mut roots).map_err(|error| {
        let why = telemetry::brief(&error);
        anyhow!("cannot read the system's certificates (SSL_CERT_FILE, SSL_CERT_DIR): {why}")
    })
}

/// Ends the process when nothing is in flight and connections have sent what they hold:
/// Pingora would sleep its whole grace period.
fn end_when_flushed(
    mut phases: broadcast::Receiver<ExecutionPhase>,
    lifecycle: Arc<Lifecycle>,
    shutdown_timeout: Duration,
) -> Result<()> {
    let executor = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start watching for the end")?;
    std::thread::Builder::new()
        .name("end".to_owned())
        .spawn(move || {
            while let Ok(phase) = phases.blocking_recv() {
                if matches!(phase, ExecutionPhase::ShutdownGracePeriod) {
                    executor.block_on(last_exchanges(&lifecycle, shutdown_timeout));
                    lifecycle.end(LAST_ROWS);
                    std::process::exit(0);
                }
            }
        })
        .context("cannot start watching for the end")?;
    Ok(())
}

/// Returns when what is in flight is over, or was cut. After a drain nothing is left; after an
/// upgrade it takes as long as a drain may.
async fn last_exchanges(lifecycle: &Lifecycle, shutdown_timeout: Duration) {
    let flush = Duration::from_secs(FLUSH_SECONDS_MAX);
    let last = async {
        if lifecycle.is_leaving() {
            let parted = async {
                lifecycle.listeners.wait_empty().await;
                lifecycle.connections.wait_empty().await;
            };
            let _ = tokio::time::timeout(PART_WITHIN, parted).await;
        }
        lifecycle.part();
        let is_cut = *lifecycle.cut_signal().borrow();
        if !is_cut && tokio::time::timeout(shutdown_timeout, lifecycle.wait_idle()).await.is_err() {
            log::warn!("this took too long; exchanges cut: {}", lifecycle.inflight());
            lifecycle.cut();
        }
        // Those that were cut are told so.
        let _ = tokio::time::timeout(flush, lifecycle.wait_idle()).await;
        let _ = tokio::time::timeout(flush, lifecycle.connections.wait_empty()).await;
    };
    tokio::select! {
        () = last => {}
        () = told_to_end(lifecycle) => signals::end_at_once(lifecycle),
    }
}

/// Returns when the process is to end at once. One that has handed over ends by itself, so that SIGTERM
/// tells it nothing new: systemd sends it to all that is left of a unit, more than once. It does so too
/// when the successor has crashed, and starts the unit anew when nobody is left.
async fn told_to_end(lifecycle: &Lifecycle) {
    let mut terminate = signals::watch(SignalKind::terminate());
    let mut interrupt = signals::watch(SignalKind::interrupt());
    loop {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => return,
        }
        let Some(successor) = lifecycle.successor() else { return };
        let inflight = lifecycle.inflight();
        if upgrade::has_crashed(successor) {
            log::error!("process {successor}, which took over, crashed; exchanges cut: {inflight}");
            lifecycle.cut();
            // What is cut ends by itself, soon; SIGTERM may come again.
            interrupt.recv().await;
            return;
        }
        log::info!("another process serves; exchanges that this one ends with: {inflight}");
    }
}
