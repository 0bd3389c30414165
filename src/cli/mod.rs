//! The command line: what to do, and how the process ends.

mod key;
mod usage;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use log::LevelFilter;

use crate::config::{self, ConfigError, DefaultsOf, Environment, LogFormat, Snapshot, Source};
use crate::hooks::HookKinds;
use crate::server::{Gateway, Reload};
use crate::telemetry::AppLog;

/// Something failed that is not the configuration's fault.
const FAILED: u8 = 1;

/// The configuration is wrong or missing (`EX_CONFIG` of sysexits.h).
const BAD_CONFIGURATION: u8 = 78;

/// Edge proxy in front of LLM fleets.
#[derive(Parser)]
#[command(name = "tollgate", version, after_help = AFTER_HELP)]
struct CommandLine {
    #[command(subcommand)]
    command: Option<Command>,
    /// Configuration file, YAML or JSON
    #[arg(short, long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve traffic (also what happens without a command)
    Serve,
    /// Validate the configuration and print every problem
    Check(CheckArgs),
    /// Run a proxy with simulated LLM backends, all in this process
    Demo(DemoArgs),
    /// Make keys for clients
    Key(key::KeyArgs),
    /// Print who used what, from the ledger
    Usage(usage::UsageArgs),
}

const AFTER_HELP: &str = "\
Without -c the configuration is the first of: $TOLLGATE_CONFIG, $BACKENDS_CONFIG_PATH, $UPSTREAM_URL,
./tollgate.yaml, ./config/backends.json, /etc/tollgate/tollgate.yaml. Variables also come from ./.env.
Exit codes: 0 fine, 1 failed, 2 wrong usage, 78 bad configuration.";

#[derive(Args)]
struct CheckArgs {
    /// Also print what would change if the configuration took the place of this one
    #[arg(long, value_name = "OLD")]
    against: Option<PathBuf>,
}

#[derive(Args)]
struct DemoArgs {
    /// Port of the proxy on 127.0.0.1; 0 lets the system choose
    #[arg(long, value_name = "N", default_value_t = 8000)]
    port: u16,
}

/// Runs the command line of this process.
#[must_use]
pub fn run() -> ExitCode {
    run_with(HookKinds::default())
}

/// As [`run`], with hooks of these kinds besides the gateway's own: for a program that adds some.
#[must_use]
pub fn run_with(kinds: HookKinds) -> ExitCode {
    let command_line = CommandLine::parse();
    let config = command_line.config.as_deref();
    let done = match command_line.command.unwrap_or(Command::Serve) {
        Command::Serve => serve(config, kinds),
        Command::Check(args) => Ok(check(config, args.against.as_deref(), &kinds)),
        Command::Demo(args) => demo(args.port),
        Command::Usage(args) => usage::run(&args, config, &kinds).map(|()| ExitCode::SUCCESS),
        Command::Key(args) => key::run(args, config, &kinds).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("tollgate: {error:#}");
        ExitCode::from(FAILED)
    })
}

/// The configuration that was found, or the words to end with.
struct Found {
    source: Source,
    snapshot: Snapshot,
}

fn find(given: Option<&Path>, kinds: &HookKinds) -> Result<Found, ConfigError> {
    let environment = environment()?;
    let Some(source) = config::find_source(given, &environment, Path::new("")) else {
        return Err(ConfigError::message(NO_CONFIGURATION));
    };
    let snapshot = config::load(&source, &environment, kinds)?;
    Ok(Found { source, snapshot })
}

/// Whether there is a configuration, be it as it may.
fn is_there(given: Option<&Path>) -> bool {
    let found = environment().map(|it| config::find_source(given, &it, Path::new("")).is_some());
    found.unwrap_or(true)
}

fn environment() -> Result<Environment, ConfigError> {
    Environment::of_process(Path::new("")).map_err(ConfigError::message)
}

const NO_CONFIGURATION: &str = "\
no configuration: there is none given with -c or in TOLLGATE_CONFIG or BACKENDS_CONFIG_PATH, no
UPSTREAM_URL, and no tollgate.yaml or config/backends.json here, or /etc/tollgate/tollgate.yaml
Write a tollgate.yaml:

  services:
    demo:
      models:
        my-model:
          backends:
            - id: one
              url: http://127.0.0.1:5000

or try it without one: tollgate demo";

fn serve(given: Option<&Path>, kinds: HookKinds) -> Result<ExitCode> {
    let Found { source, snapshot } = match find(given, &kinds) {
        Ok(found) => found,
        Err(error) => return Ok(refuse_configuration(&error)),
    };
    let app_log = AppLog::start(snapshot.log_level, snapshot.observed.log_format);
    // Memory holds keys and prompts: it is not written to disk when the process crashes, nor shown to others.
    #[cfg(target_os = "linux")]
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        log::warn!("a crash may write memory to disk: {error}");
    }
    let summary = snapshot.summary();
    let origin = source.path().display().to_string();
    let defaults = defaults_note(&snapshot);
    let warnings = config::warnings(&snapshot);
    let places = snapshot.observed.places();
    let gateway = Gateway::bind(snapshot)
        .context("choose another address with \"listen\", \"admin.listen\" or PORT")?;
    let addresses = gateway.addresses();
    let reload: Reload = Arc::new(move || config::load(&source, &environment()?, &kinds));
    gateway.run(Some((reload, app_log)), move || {
        let version = env!("CARGO_PKG_VERSION");
        log::info!("tollgate {version} with {origin} ({summary}{defaults})");
        for warning in &warnings {
            log::warn!("{warning}");
        }
        for address in &addresses.traffic {
            log::info!("listening on {address}");
        }
        for address in &addresses.admin {
            log::info!("status and dashboard on {address}");
        }
        for place in &places {
            log::info!("{place}");
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

fn check(given: Option<&Path>, against: Option<&Path>, kinds: &HookKinds) -> ExitCode {
    let before = match against.map(|old| find(Some(old), kinds)) {
        Some(Err(error)) => return refuse_configuration(&error),
        Some(Ok(before)) => Some(before),
        None => None,
    };
    match find(given, kinds) {
        Ok(Found { source, snapshot }) => {
            println!(
                "{}: fine (services: {}, {}{})",
                source.path().display(),
                snapshot.services.len(),
                snapshot.summary(),
                defaults_note(&snapshot),
            );
            for warning in config::warnings(&snapshot) {
                println!("warning: {warning}");
            }
            if let Some(before) = before {
                let differences = config::differences(&before.snapshot, &snapshot);
                let old = before.source.path().display();
                println!("changes against {old}: {}", differences.len());
                for line in differences {
                    println!("  {line}");
                }
            }
            ExitCode::SUCCESS
        }
        Err(error) => refuse_configuration(&error),
    }
}

/// Says so where the defaults are not those of the documentation.
fn defaults_note(snapshot: &Snapshot) -> &'static str {
    match snapshot.defaults_of {
        DefaultsOf::Tollgate => "",
        DefaultsOf::BackendsJson => "; with the defaults of a backends.json",
    }
}

fn refuse_configuration(error: &ConfigError) -> ExitCode {
    eprintln!("{error}");
    ExitCode::from(BAD_CONFIGURATION)
}

fn demo(port: u16) -> Result<ExitCode> {
    let _ = AppLog::start(LevelFilter::Warn, LogFormat::Text);
    crate::demo::run(port)?;
    Ok(ExitCode::SUCCESS)
}
