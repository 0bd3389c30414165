//! The command line: what to do, and how the process ends.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use log::LevelFilter;

use crate::config::{self, ConfigError, Environment, Snapshot, Source};
use crate::server::{Gateway, Reload};

/// Something failed that is not the configuration's fault.
const FAILED: u8 = 1;

/// The configuration is wrong or missing (`EX_CONFIG` of sysexits.h).
const BAD_CONFIGURATION: u8 = 78;

/// Edge proxy in front of LLM fleets: who may pass, which way, and what it costs.
#[derive(Parser)]
#[command(name = "tollgate", version, args_conflicts_with_subcommands = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Serve traffic (also what happens without a command)
    Serve(ConfigArgs),
    /// Validate the configuration and print every problem
    Check(ConfigArgs),
    /// Run a proxy with simulated LLM backends, all in this process
    Demo(DemoArgs),
}

#[derive(Args)]
struct ConfigArgs {
    /// Configuration file, YAML or JSON
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
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
    let command_line = CommandLine::parse();
    let done = match command_line.command.unwrap_or(Command::Serve(command_line.config)) {
        Command::Serve(args) => serve(args.config.as_deref()),
        Command::Check(args) => Ok(check(args.config.as_deref())),
        Command::Demo(args) => demo(args.port),
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

fn find(given: Option<&Path>) -> Result<Found, ConfigError> {
    let environment = environment()?;
    let Some(source) = config::find_source(given, &environment, Path::new("")) else {
        return Err(ConfigError::message(NO_CONFIGURATION));
    };
    let snapshot = config::load(&source, &environment)?;
    Ok(Found { source, snapshot })
}

fn environment() -> Result<Environment, ConfigError> {
    Environment::of_process(Path::new("")).map_err(ConfigError::message)
}

const NO_CONFIGURATION: &str = "\
no configuration: none was given with -c, and there is no tollgate.yaml or config/backends.json here
Write a tollgate.yaml:

  services:
    demo:
      models:
        my-model:
          backends:
            - id: one
              url: http://127.0.0.1:5000

or try it without one: tollgate demo";

fn serve(given: Option<&Path>) -> Result<ExitCode> {
    let Found { source, snapshot } = match find(given) {
        Ok(found) => found,
        Err(error) => return Ok(refuse_configuration(&error)),
    };
    start_log(snapshot.log_level);
    let pools = snapshot.pools().count();
    let backends: usize = snapshot.pools().map(|(_, _, pool)| pool.backends.len()).sum();
    let origin = source.path().display().to_string();
    let gateway = Gateway::bind(snapshot)?;
    let addresses = gateway.addresses();
    let reload: Reload = Arc::new(move || config::load(&source, &environment()?));
    gateway.run(Some(reload), move || {
        let version = env!("CARGO_PKG_VERSION");
        log::info!("tollgate {version} with {origin} (models: {pools}, backends: {backends})");
        for address in &addresses.traffic {
            log::info!("listening on http://{address}");
        }
        for address in &addresses.admin {
            log::info!("status and dashboard on http://{address}");
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

fn check(given: Option<&Path>) -> ExitCode {
    match find(given) {
        Ok(Found { source, snapshot }) => {
            let backends: usize = snapshot.pools().map(|(_, _, pool)| pool.backends.len()).sum();
            println!(
                "{}: fine (services: {}, models: {}, backends: {backends})",
                source.path().display(),
                snapshot.services.len(),
                snapshot.pools().count(),
            );
            ExitCode::SUCCESS
        }
        Err(error) => refuse_configuration(&error),
    }
}

fn refuse_configuration(error: &ConfigError) -> ExitCode {
    eprintln!("{error}");
    ExitCode::from(BAD_CONFIGURATION)
}

fn demo(port: u16) -> Result<ExitCode> {
    start_log(LevelFilter::Warn);
    crate::demo::run(port)?;
    Ok(ExitCode::SUCCESS)
}

/// The application log on standard error. Of Pingora's own lines only those on listening are let
/// through: others repeat request heads, and with them credentials. On exchanges and health we write
/// our own.
fn start_log(level: LevelFilter) {
    env_logger::Builder::new()
        .filter_level(LevelFilter::Off)
        .filter_module("tollgate", LevelFilter::Trace)
        .filter_module("pingora_core::listeners", LevelFilter::Warn)
        .filter_module("pingora_core::services", LevelFilter::Warn)
        .format(|out, record| {
            let time = out.timestamp_millis();
            writeln!(out, "{time} {:<5} {}", record.level(), record.args())
        })
        .init();
    log::set_max_level(level);
}
