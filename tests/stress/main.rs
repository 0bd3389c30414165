//! The program under stress, for minutes: `chaos`, where everything fails that can, and `endurance`,
//! where there is more of everything than usual (`streams` is its first part);
//! `limits`, where clients ask for more than they may have; `soak`, which is half an hour of everyday load. Each prints what it saw, and ends with 1 if that is
//! not as it should be. `STRESS_LOG` names a file for the program's log.

#![allow(clippy::unwrap_used, reason = "a run that cannot go on has failed")]

mod backend;
mod chaos;
mod client;
mod crowd;
mod endurance;
mod gateway;
mod limits;
mod soak;

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    // Every connection has two ends here.
    let (_, most) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, most, most).unwrap();
    let passed = match std::env::args().nth(1).as_deref() {
        Some("chaos") => chaos::run().await,
        Some("endurance") => endurance::run(true).await,
        Some("streams") => endurance::run(false).await,
        Some("limits") => limits::run().await,
        Some("soak") => soak::run().await,
        _ => {
            println!("usage: stress chaos|endurance|streams|limits|soak");
            false
        }
    };
    println!("{}", if passed { "passed" } else { "FAILED" });
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
