//! `tollgate key new`: a new key for a client, and what the configuration has to know of it.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow, bail};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use clap::{Args, Subcommand};
use jiff::Timestamp;
use ring::rand::{SecureRandom, SystemRandom};

use crate::config::{ClientKeys, read_expiry};
use crate::hooks::HookKinds;
use crate::names::Pattern;
use crate::secret::{KeyHash, SecretBytes};

/// What every key begins with, so that scanners for leaked secrets and people know it.
const PREFIX: &str = "tg-";

const SECONDS_A_DAY: i64 = 86_400;

#[derive(Args)]
pub(super) struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Subcommand)]
enum KeyCommand {
    /// Print a new key once, and the entry for it in the configuration
    New(NewArgs),
}

#[derive(Args)]
struct NewArgs {
    /// Who gets the key
    name: String,
    /// Models it is for, separated by commas; * stands for any text [default: all]
    #[arg(long, value_delimiter = ',', value_name = "MODEL,...")]
    models: Vec<String>,
    /// Services it is for [default: all]
    #[arg(long, value_delimiter = ',', value_name = "SERVICE,...")]
    services: Vec<String>,
    /// How long it is good: 90d, 2027-01-31 (all of that day, UTC) or 2027-01-31T12:00:00Z [default: always]
    #[arg(long, value_name = "WHEN")]
    expires: Option<String>,
    /// It may see what concerns all (the dashboard, everybody's usage), drain backends and reload
    #[arg(long)]
    admin: bool,
}

pub(super) fn run(args: KeyArgs, given: Option<&Path>, kinds: &HookKinds) -> Result<()> {
    let KeyCommand::New(args) = args.command;
    if args.name.trim().is_empty() {
        bail!("the key needs a name: who gets it?");
    }
    for name in args.models.iter().chain(&args.services) {
        if !Pattern::is_name(name) {
            bail!("{name:?} is no name with at most one *");
        }
    }
    let expires = args.expires.as_deref().map(expiry).transpose()?;
    let mut random = [0; 32 + 8];
    SystemRandom::new()
        .fill(&mut random)
        .map_err(|_| anyhow!("the system gives no random bytes"))?;
    let (secret, id) = random.split_at(32);
    let key = format!("{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(secret));
    let hash = match server_secret(given, kinds) {
        Some(server) => KeyHash::hmac(&server, key.as_bytes()),
        None => KeyHash::sha256(key.as_bytes()),
    };
    let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let list = |names: &[String]| {
        let names: Vec<String> = names.iter().map(|name| quoted(name)).collect();
        format!("[{}]", names.join(", "))
    };
    println!("{key}\n");
    println!(
        "# The key is shown only now. This goes under \"keys:\" in the configuration or in the file"
    );
    println!("# that \"keys_file\" names:");
    println!("  - id: key-{id}");
    println!("    name: {}", quoted(&args.name));
    println!("    hash: {}", hash.text());
    if args.admin {
        println!("    admin: true");
    }
    if !args.models.is_empty() {
        println!("    models: {}", list(&args.models));
    }
    if !args.services.is_empty() {
        println!("    services: {}", list(&args.services));
    }
    if let Some(expires) = expires {
        println!("    expires: {expires}");
    }
    Ok(())
}

/// As it is written in a configuration.
fn expiry(text: &str) -> Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs().cast_signed();
    if let Some(moment) = read_expiry(text) {
        if moment <= now {
            bail!("--expires {text} is in the past");
        }
        return Ok(text.to_owned());
    }
    let days = text.strip_suffix('d').and_then(|days| days.parse::<u32>().ok());
    let days = days.filter(|days| *days > 0);
    let moment =
        days.and_then(|days| Timestamp::from_second(now + i64::from(days) * SECONDS_A_DAY).ok());
    let moment = moment.ok_or_else(|| {
        anyhow!("--expires takes days such as 90d, a day such as 2027-01-31 or a time such as 2027-01-31T12:00:00Z")
    })?;
    Ok(moment.to_string())
}

/// What the configuration has keys hashed with, if there is one that has.
fn server_secret(given: Option<&Path>, kinds: &HookKinds) -> Option<SecretBytes> {
    match super::find(given, kinds) {
        Ok(found) => match &found.snapshot.clients {
            ClientKeys::Required(keys) => keys.secret.clone(),
            ClientKeys::Untouched | ClientKeys::Dropped => None,
        },
        Err(_) => {
            if super::is_there(given) {
                eprintln!(
                    "tollgate: the configuration has problems (see `tollgate check`); if it has a \
                     keys_secret, that was not used"
                );
            }
            None
        }
    }
}
