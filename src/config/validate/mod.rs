//! From the file types to the snapshot, collecting every problem on the way.

mod backend;
mod cache;
mod content;
mod hooks;
mod jwt;
mod keys;
mod ledger;
mod limits;
mod names;
mod observed;
mod policy;
mod pools;
mod redis;
mod tls;
mod url;

use std::cell::RefCell;
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::HeaderValue;
use ipnet::IpNet;
use log::LevelFilter;

use super::beside::Beside;
use super::clients::ClientKeys;
use super::defaults::{self, Defaults};
use super::environment::Environment;
use super::file::{FileAuthMode, FileClient, FileConfig, FileCors, FileSecret, OneOrMany};
use super::listen::Listen;
use super::prices::Prices;
use super::problem::{KeyPath, Problems};
use super::seen::SeenFile;
use super::snapshot::{AuthMode, ClientBounds, CorsOrigins, ReplayBounds, Snapshot};
use super::units::{Size, Span};
use crate::hooks::HookKinds;
use crate::secret::Secret;

pub use keys::read_expiry;
pub(super) use redis::{EXPECTED as REDIS_URL_EXPECTED, is_readable as is_redis_url};

/// Largest secret file. A key is a line; anything larger is the wrong file.
const SECRET_BYTES_MAX: u64 = 64 * 1024;

/// What every part of the file is validated against.
struct Context<'a> {
    defaults: &'a Defaults,
    /// Hooks that there are besides the gateway's own.
    kinds: &'a HookKinds,
    files: &'a Files,
    /// Where the system has us keep what outlives the process.
    state_directory: Option<PathBuf>,
    /// And logs.
    logs_directory: Option<PathBuf>,
    global_key: Option<Secret>,
    /// How many tokens prices are for.
    prices_per: u64,
    auth_mode: AuthMode,
    inflight_max: u32,
    idle_timeout: Duration,
}

/// What a configuration is read in.
pub(super) struct Surroundings<'a> {
    pub(super) defaults: &'a Defaults,
    /// Its own path.
    pub(super) path: &'a Path,
    pub(super) environment: &'a Environment,
    pub(super) kinds: &'a HookKinds,
}

/// The files beside the configuration.
struct Files {
    /// Folder that relative paths start from.
    folder: PathBuf,
    /// Those that were read.
    read: RefCell<Vec<SeenFile>>,
}

/// Validates the whole file. The snapshot is worth something only if no problem was found.
pub(super) fn validate(
    file: &FileConfig,
    beside: &Beside,
    surroundings: &Surroundings<'_>,
    problems: &mut Problems,
) -> Snapshot {
    let Surroundings { defaults, path, environment, kinds } = surroundings;
    let root = KeyPath::default();
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    let files = Files { folder, read: RefCell::new(beside.files.clone()) };
    let written = (file.api_key.as_ref(), file.api_key_file.as_deref());
    let global_key = secret("api_key", written, &root, &files, problems);
    if file.api_key.is_some() && global_key.is_none() && file.api_key_file.is_none() {
        problems
            .value(&root.key("api_key"), "is empty; set a key, or remove it to let everybody pass");
    }
    let context = Context {
        defaults,
        kinds,
        files: &files,
        // Systemd names several with colons between.
        state_directory: environment
            .get("STATE_DIRECTORY")
            .and_then(|folders| folders.split(':').next())
            .map(PathBuf::from),
        logs_directory: observed::logs_directory(environment.get("LOGS_DIRECTORY")),
        global_key,
        prices_per: file
            .prices
            .as_ref()
            .and_then(|prices| prices.per)
            .filter(|per| *per > 0)
            .unwrap_or(defaults::PRICES_PER),
        auth_mode: file.auth_mode.map_or(AuthMode::Authorization, auth_mode),
        inflight_max: file
            .upstream
            .as_ref()
            .and_then(|upstream| upstream.inflight_max)
            .unwrap_or(defaults.inflight_max),
        idle_timeout: positive(
            file.upstream.as_ref().and_then(|upstream| upstream.idle_timeout),
            &root.key("upstream").key("idle_timeout"),
            defaults::UPSTREAM_IDLE_TIMEOUT,
            problems,
        ),
    };
    let services = pools::services(file, &context, problems);
    let clients = keys::clients(file, beside, &context, services.any_key, problems);
    let prices = ledger::prices(file, beside, problems);
    snapshot(file, &context, (clients, prices), services, problems)
}

fn snapshot(
    file: &FileConfig,
    context: &Context<'_>,
    (clients, prices): (ClientKeys, Prices),
    services: pools::Services,
    problems: &mut Problems,
) -> Snapshot {
    let root = KeyPath::default();
    let admin = file.admin.as_ref().and_then(|admin| admin.listen.as_ref());
    let mut snapshot = Snapshot {
        defaults_of: context.defaults.of,
        listen: match &file.listen {
            Some(written) => addresses(written, &root.key("listen"), problems),
            None => Listen::parse(defaults::LISTEN_HOST).into_iter().collect(),
        },
        admin_listen: admin
            .map(|written| addresses(written, &root.key("admin").key("listen"), problems))
            .unwrap_or_default(),
        tls: tls::listener(file.tls.as_ref(), context.files, problems),
        clients,
        addresses: keys::addresses(file.addresses.as_ref(), &root.key("addresses"), problems),
        ledger: ledger::ledger(file, context, problems),
        prices,
        limits: limits::limits(
            file.limits.as_deref().unwrap_or_default(),
            &root.key("limits"),
            false,
            problems,
        ),
        redis: redis::redis(file, context, problems),
        output_tokens_assumed: file
            .output_tokens_assumed
            .unwrap_or(defaults::OUTPUT_TOKENS_ASSUMED),
        meters: false,
        charges: false,
        include_usage: file.ledger.as_ref().and_then(|ledger| ledger.include_usage).unwrap_or(true),
        trusts_unix: file
            .trusted_proxies
            .as_ref()
            .is_some_and(|proxies| proxies.items.iter().any(|item| item == "unix")),
        trusted_proxies: trusted_proxies(file.trusted_proxies.as_ref(), problems),
        cors: cors(file.cors.as_ref(), &root.key("cors"), problems)
            .unwrap_or(if context.defaults.cors_any { CorsOrigins::Any } else { CorsOrigins::Off }),
        log_level: level(file, problems),
        observed: observed::observed(file, context, problems),
        threads: threads(file, problems),
        shutdown_timeout: file
            .shutdown_timeout
            .map_or(context.defaults.shutdown_timeout, |span| span.0),
        client: client_bounds(file, problems),
        idle_connections: file
            .upstream
            .as_ref()
            .and_then(|upstream| upstream.idle_connections)
            .unwrap_or(context.defaults.idle_connections) as usize,
        replay: replay(file),
        reload_on_change: file.reload.as_ref().and_then(|it| it.watch).unwrap_or(true),
        files: Vec::new(),
        dns_refresh: positive(
            file.dns.as_ref().and_then(|dns| dns.refresh),
            &root.key("dns").key("refresh"),
            defaults::DNS_REFRESH,
            problems,
        ),
        naming: names::naming(file, &services.by_name, problems),
        has_conditions: false,
        hooks: hooks::chains(file, context, problems),
        cache: cache::cache(file, problems),
        caching: cache::caching(file, problems),
        services: services.by_name,
    };
    snapshot.charges = snapshot.ledger.is_some() || snapshot.limits_tokens();
    snapshot.meters = snapshot.charges || snapshot.observed.metrics;
    snapshot.has_conditions = snapshot.asks_for_conditions();
    snapshot.files = context.files.read.borrow().clone();
    check_addresses(file, &snapshot, problems);
    snapshot
}

/// Whether the addresses go together, and with the certificates.
fn check_addresses(file: &FileConfig, snapshot: &Snapshot, problems: &mut Problems) {
    let root = KeyPath::default();
    for (key, listen) in [("listen", &snapshot.listen), ("admin.listen", &snapshot.admin_listen)] {
        if file.tls.is_none() && listen.iter().any(|listen| listen.tls) {
            let at = key.split('.').fold(root.clone(), |path, key| path.key(key));
            problems.value(&at, "https takes certificates; write them under \"tls\"");
        }
    }
    let taken = |own: &&Listen| snapshot.listen.iter().any(|known| known.collides(own));
    if let Some(twice) = snapshot.admin_listen.iter().find(taken) {
        problems
            .value(&root.key("admin").key("listen"), format!("{} takes traffic already", twice.at));
    }
}

fn auth_mode(written: FileAuthMode) -> AuthMode {
    match written {
        FileAuthMode::Authorization => AuthMode::Authorization,
        FileAuthMode::XApiKey => AuthMode::Header("x-api-key"),
        FileAuthMode::ApiKey => AuthMode::Header("api-key"),
        FileAuthMode::XGoogApiKey => AuthMode::Header("x-goog-api-key"),
        FileAuthMode::None => AuthMode::None,
    }
}

/// A secret written in place under `key`, or in a file beside it. An empty one counts as unset.
fn secret(
    key: &str,
    (inline, file): (Option<&FileSecret>, Option<&str>),
    parent: &KeyPath,
    files: &Files,
    problems: &mut Problems,
) -> Option<Secret> {
    let key_path = parent.key(&format!("{key}_file"));
    let text = match (inline, file) {
        (Some(_), Some(_)) => {
            problems.key(&key_path, format!("{key} stands here too; keep one of the two"));
            return None;
        }
        (None, None) => return None,
        (Some(FileSecret(secret)), None) => secret.expose().to_owned(),
        (None, Some(name)) => {
            let path = files.folder.join(name);
            files.read.borrow_mut().push(SeenFile::look(&path));
            match read_secret(&path) {
                Ok(text) => text,
                Err(error) => {
                    problems.value(&key_path, format!("cannot read {}: {error}", path.display()));
                    return None;
                }
            }
        }
    };
    let text = text.trim();
    if text.is_empty() && file.is_some() {
        problems.value(&key_path, "the file is empty");
    }
    (!text.is_empty()).then(|| Secret::new(text))
}

fn read_secret(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(SECRET_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > SECRET_BYTES_MAX {
        return Err(std::io::Error::other("too large for a key"));
    }
    Ok(text)
}

fn positive(
    written: Option<Span>,
    path: &KeyPath,
    default: Duration,
    problems: &mut Problems,
) -> Duration {
    match written {
        Some(Span(duration)) if duration.is_zero() => {
            problems.value(path, "must be more than 0");
            default
        }
        Some(Span(duration)) => duration,
        None => default,
    }
}

fn addresses(written: &OneOrMany, path: &KeyPath, problems: &mut Problems) -> Vec<Listen> {
    let mut addresses: Vec<Listen> = Vec::new();
    for (index, item) in written.items.iter().enumerate() {
        let at = item_path(written, path, index);
        match Listen::parse(item) {
            Some(listen) if addresses.iter().any(|known| known.collides(&listen)) => {
                problems.value(&at, format!("{} stands here twice", listen.at));
            }
            Some(listen) => addresses.push(listen),
            None => problems.value(
                &at,
                "expected an address such as 0.0.0.0:8000, https://0.0.0.0:8443 or unix:/run/t.sock",
            ),
        }
    }
    if written.items.is_empty() {
        problems.value(path, "needs at least one address");
    }
    addresses
}

fn item_path(written: &OneOrMany, path: &KeyPath, index: usize) -> KeyPath {
    if written.list { path.index(index) } else { path.clone() }
}

fn trusted_proxies(written: Option<&OneOrMany>, problems: &mut Problems) -> Vec<IpNet> {
    let path = KeyPath::default().key("trusted_proxies");
    let mut networks = Vec::new();
    for (index, item) in written.iter().flat_map(|written| written.items.iter().enumerate()) {
        if item == "unix" {
            continue;
        }
        match network(item) {
            Some(network) => networks.push(network),
            None => {
                let at = written.map(|written| item_path(written, &path, index));
                problems.value(
                    &at.unwrap_or_default(),
                    "expected a network such as 10.0.0.0/8, or unix",
                );
            }
        }
    }
    networks
}

/// A network, or the one of a single address.
fn network(text: &str) -> Option<IpNet> {
    text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).ok()
}

/// The origins whose browsers may send traffic, where they are written.
fn cors(written: Option<&FileCors>, at: &KeyPath, problems: &mut Problems) -> Option<CorsOrigins> {
    let path = at.key("origins");
    let written = written?.origins.as_ref()?;
    let mut origins = Vec::new();
    for (index, item) in written.items.iter().enumerate() {
        let is_origin = item.split_once("://").is_some_and(|(scheme, host)| {
            !scheme.is_empty() && !host.is_empty() && !host.contains('/')
        });
        match HeaderValue::from_str(item) {
            Ok(_) if item == "*" => return Some(CorsOrigins::Any),
            Ok(origin) if is_origin => origins.push(origin),
            _ => problems.value(
                &item_path(written, &path, index),
                "expected \"*\" or an origin such as https://chat.example.com",
            ),
        }
    }
    Some(if origins.is_empty() { CorsOrigins::Off } else { CorsOrigins::Listed(origins) })
}

/// Reads a log level, in Python's names or Rust's.
pub(super) fn log_level(text: &str) -> Option<LevelFilter> {
    match text.trim().to_ascii_lowercase().as_str() {
        "warning" => Some(LevelFilter::Warn),
        "critical" | "fatal" => Some(LevelFilter::Error),
        name => name.parse().ok(),
    }
}

fn level(file: &FileConfig, problems: &mut Problems) -> LevelFilter {
    let Some(text) = file.log.as_ref().and_then(|log| log.level.as_deref()) else {
        return LevelFilter::Info;
    };
    log_level(text).unwrap_or_else(|| {
        problems.value(
            &KeyPath::default().key("log").key("level"),
            "expected debug, info, warning or error",
        );
        LevelFilter::Info
    })
}

/// 0 or unwritten: one a core.
fn threads(file: &FileConfig, problems: &mut Problems) -> usize {
    const THREADS_MAX: u16 = 1024;
    match file.threads {
        None | Some(0) => std::thread::available_parallelism().map_or(1, usize::from),
        Some(threads) if threads <= THREADS_MAX => usize::from(threads),
        Some(_) => {
            problems.value(
                &KeyPath::default().key("threads"),
                format!("expected at most {THREADS_MAX}"),
            );
            1
        }
    }
}

fn replay(file: &FileConfig) -> ReplayBounds {
    let written = file.replay.as_ref();
    ReplayBounds {
        body_bytes_max: written
            .and_then(|replay| replay.body_bytes_max)
            .map_or(defaults::REPLAY_BODY_BYTES_MAX, |size| size.0),
        total_bytes_max: written
            .and_then(|replay| replay.total_bytes_max)
            .map_or(defaults::REPLAY_TOTAL_BYTES_MAX, |size| size.0),
    }
}

fn client_bounds(file: &FileConfig, problems: &mut Problems) -> ClientBounds {
    let path = KeyPath::default().key("client");
    let none = FileClient::default();
    let client = file.client.as_ref().unwrap_or(&none);
    let bytes = |key: &str, written: Option<Size>, default: usize, problems: &mut Problems| {
        let value = written.map_or(default, |size| size.0);
        if !(256..=1024 * 1024).contains(&value) {
            problems.value(&path.key(key), "expected a size from 256 to 1MiB");
        }
        value
    };
    let [idle_timeout, head_timeout, body_timeout, body_deadline, write_timeout] = [
        ("idle_timeout", client.idle_timeout, defaults::CLIENT_IDLE_TIMEOUT),
        ("head_timeout", client.head_timeout, defaults::CLIENT_HEAD_TIMEOUT),
        ("body_timeout", client.body_timeout, defaults::CLIENT_BODY_TIMEOUT),
        ("body_deadline", client.body_deadline, defaults::CLIENT_BODY_DEADLINE),
        ("write_timeout", client.write_timeout, defaults::CLIENT_WRITE_TIMEOUT),
    ]
    .map(|(key, written, default)| positive(written, &path.key(key), default, problems));
    let size = |written: Option<Size>, default| written.map_or(default, |size| size.0);
    let streams = client.http2_streams_max.unwrap_or(defaults::HTTP2_STREAMS_MAX);
    if streams == 0 {
        problems.value(&path.key("http2_streams_max"), "must be more than 0");
    }
    ClientBounds {
        idle_timeout,
        head_timeout,
        body_timeout,
        body_deadline,
        write_timeout,
        body_rate_min: size(client.body_rate_min, defaults::CLIENT_BODY_RATE_MIN),
        body_bytes_max: size(client.body_bytes_max, defaults::CLIENT_BODY_BYTES_MAX),
        half_close: client.half_close.unwrap_or(false),
        url_bytes_max: bytes(
            "url_bytes_max",
            client.url_bytes_max,
            defaults::URL_BYTES_MAX,
            problems,
        ),
        head_bytes_max: bytes(
            "head_bytes_max",
            client.head_bytes_max,
            defaults::HEAD_BYTES_MAX,
            problems,
        ),
        connections_max: client.connections_max.unwrap_or(defaults::CLIENT_CONNECTIONS_MAX)
            as usize,
        connections_per_address_max: client
            .connections_per_address_max
            .unwrap_or(defaults::CLIENT_CONNECTIONS_PER_ADDRESS_MAX)
            as usize,
        http2_streams_max: streams,
    }
}
