//! The environment variables of the tools that Tollgate replaces, laid over what the file says.

use super::defaults;
use super::environment::Environment;
use super::file::{FileAuthMode, FileConfig, FileLimit, FilePer, FileSecret, OneOrMany};
use super::listen::{self, Listen};
use super::problem::Problems;
use super::units::Span;
use crate::secret::Secret;

/// Lays every variable that is set over the file.
pub(super) fn apply(file: &mut FileConfig, environment: &Environment, problems: &mut Problems) {
    let mut reader = Reader { environment, problems };
    listen(file, &mut reader);
    if let Some(level) = environment.get("LOG_LEVEL") {
        if super::validate::log_level(level).is_some() {
            file.log.get_or_insert_default().level = Some(level.to_owned());
        } else {
            reader.wrong("LOG_LEVEL", "expected DEBUG, INFO, WARNING or ERROR");
        }
    }
    if let Some(key) = environment.get("BACKEND_API_KEY") {
        file.api_key = Some(FileSecret(Secret::new(key)));
        file.api_key_file = None;
    }
    if let Some(mode) = environment.get("BACKEND_AUTH_MODE") {
        file.auth_mode = FileAuthMode::parse(mode);
        if file.auth_mode.is_none() {
            reader.wrong(
                "BACKEND_AUTH_MODE",
                "expected Authorization, x-api-key, api-key, x-goog-api-key or none",
            );
        }
    }
    if let Some(span) = reader.positive_seconds("HEALTH_CHECK_INTERVAL") {
        file.health_check.get_or_insert_default().interval = Some(span);
    }
    if let Some(span) = reader.positive_seconds("HEALTH_CHECK_TIMEOUT") {
        file.health_check.get_or_insert_default().timeout = Some(span);
    }
    failures(file, &mut reader);
    rate_limit(file, &mut reader);
    if let Some(url) = environment.get("REDIS_URL") {
        if super::validate::is_redis_url(url) {
            let redis = file.redis.get_or_insert_default();
            redis.url = Some(FileSecret(Secret::new(url)));
            redis.url_file = None;
        } else {
            reader.wrong("REDIS_URL", super::validate::REDIS_URL_EXPECTED);
        }
    }
    if let Some(ttl) = reader.seconds("CACHE_EXPIRE") {
        file.cache.get_or_insert_default().ttl = Some(ttl);
    }
    if let Some(enabled) = reader.switch("METRICS_ENABLED") {
        file.metrics.get_or_insert_default().enabled = Some(enabled);
    }
    if let Some(enabled) = reader.switch("REQUEST_LOG_ENABLED") {
        file.request_log.get_or_insert_default().enabled = Some(enabled);
    }
    if let Some(path) = environment.get("REQUEST_LOG_FILE").map(str::trim) {
        // Of a variable, a relative path begins where the process was started.
        let path = if path == "-" {
            path.into()
        } else {
            std::path::absolute(path).unwrap_or(path.into())
        };
        file.request_log.get_or_insert_default().file = Some(path.to_string_lossy().into_owned());
    }
    if let Some(span) = reader.seconds("SHUTDOWN_TIMEOUT") {
        file.shutdown_timeout = Some(span);
    }
    if let Some(count) = reader.count("MAX_KEEPALIVE_CONNECTIONS") {
        file.upstream.get_or_insert_default().idle_connections = Some(count);
    }
    if let Some(count) = reader.count("MAX_CONNECTIONS") {
        file.upstream.get_or_insert_default().inflight_max = Some(count);
    }
}

/// Deadlines, further attempts and the circuit breaker.
fn failures(file: &mut FileConfig, reader: &mut Reader<'_>) {
    if let Some(span) = reader.positive_seconds("REQUEST_TIMEOUT") {
        let deadlines = file.deadlines.get_or_insert_default();
        deadlines.first_byte = Some(span);
        deadlines.silence = Some(span);
    }
    if let Some(span) = reader.positive_seconds("TIMEOUT") {
        file.deadlines.get_or_insert_default().exchange = Some(span);
    }
    if let Some(span) = reader.positive_seconds("CONNECT_TIMEOUT") {
        let deadlines = file.deadlines.get_or_insert_default();
        deadlines.connect = Some(span);
        deadlines.tls = Some(span);
    }
    if let Some(count) = reader.count("MAX_RETRIES") {
        file.retry.get_or_insert_default().retries_max = Some(count);
    }
    if let Some(span) = reader.seconds("RETRY_DELAY") {
        file.retry.get_or_insert_default().delay = Some(span);
    }
    if let Some(enabled) = reader.switch("CIRCUIT_BREAKER_ENABLED") {
        file.breaker.get_or_insert_default().enabled = Some(enabled);
    }
    match reader.count("CIRCUIT_BREAKER_THRESHOLD") {
        Some(0) => reader.wrong("CIRCUIT_BREAKER_THRESHOLD", "must be more than 0"),
        Some(count) => {
            file.breaker.get_or_insert_default().consecutive_failures = Some(count);
        }
        None => {}
    }
    if let Some(span) = reader.positive_seconds("CIRCUIT_BREAKER_TIMEOUT") {
        let breaker = file.breaker.get_or_insert_default();
        breaker.open = Some(span);
        breaker.open_max = Some(span);
    }
}

/// What the limit is called that the variables are.
const RATE_LIMIT: &str = "RATE_LIMIT";

/// The limit of requests per client. A file may have others, which stay.
fn rate_limit(file: &mut FileConfig, reader: &mut Reader<'_>) {
    let enabled = reader.switch("RATE_LIMIT_ENABLED");
    let requests = reader.count("RATE_LIMIT_REQUESTS");
    let window = reader.positive_seconds("RATE_LIMIT_WINDOW");
    let limits = file.limits.get_or_insert_default();
    let is_it = |limit: &Option<FileLimit>| {
        limit.as_ref().is_some_and(|limit| limit.name.as_deref() == Some(RATE_LIMIT))
    };
    let known = limits.iter().position(is_it);
    let is_asked = enabled == Some(true) || requests.is_some() || window.is_some();
    match (enabled, known) {
        (Some(false), Some(at)) => {
            limits.remove(at);
        }
        (Some(false), None) => {}
        (_, None) if !is_asked => {}
        _ if requests == Some(0) => reader.wrong(
            "RATE_LIMIT_REQUESTS",
            "must be more than 0; without a limit: RATE_LIMIT_ENABLED=false",
        ),
        (_, known) => {
            let at = known.unwrap_or_else(|| {
                limits.push(Some(default_rate_limit()));
                limits.len() - 1
            });
            if let Some(limit) = &mut limits[at] {
                limit.requests = requests.map(u64::from).or(limit.requests);
                limit.window = window.or(limit.window);
            }
        }
    }
}

/// The limit, where no variable says otherwise.
pub(super) fn default_rate_limit() -> FileLimit {
    FileLimit {
        name: Some(RATE_LIMIT.to_owned()),
        per: Some(FilePer::Client),
        requests: Some(defaults::RATE_LIMIT_REQUESTS),
        window: Some(Span(defaults::RATE_LIMIT_WINDOW)),
        ..FileLimit::default()
    }
}

/// `HOST` and `PORT` each replace their half of every listening address.
fn listen(file: &mut FileConfig, reader: &mut Reader<'_>) {
    let host = reader.environment.get("HOST");
    let port = reader.environment.get("PORT");
    let port: Option<u16> = match port.map(|port| port.trim().parse()) {
        Some(Err(_)) => {
            reader.wrong("PORT", "expected a port from 0 to 65535");
            return;
        }
        port => port.and_then(Result::ok),
    };
    if let Some(host) = host
        && listen::host(host).is_none()
    {
        reader.wrong("HOST", "expected an address such as 0.0.0.0, 127.0.0.1 or ::");
        return;
    }
    if host.is_none() && port.is_none() {
        return;
    }
    let host = host.and_then(listen::host);
    let written = file.listen.take().unwrap_or_default();
    // What cannot be read stays as it is and is reported by validation.
    let replaced = |item: &String| match Listen::parse(item) {
        Some(mut listen) => {
            listen.replace(host, port);
            listen.to_string()
        }
        None => item.clone(),
    };
    let mut items: Vec<String> = written.items.iter().map(replaced).collect();
    if items.is_empty() {
        items.push(replaced(&defaults::LISTEN_HOST.to_owned()));
    }
    items.dedup();
    file.listen = Some(OneOrMany { items, list: written.list });
}

struct Reader<'a> {
    environment: &'a Environment,
    problems: &'a mut Problems,
}

impl Reader<'_> {
    fn wrong(&mut self, name: &str, message: &str) {
        self.problems.variable(name, message);
    }

    fn seconds(&mut self, name: &str) -> Option<Span> {
        match Span::parse(self.environment.get(name)?) {
            Ok(span) => Some(span),
            Err(_) => {
                self.wrong(name, "expected a number of seconds");
                None
            }
        }
    }

    fn count(&mut self, name: &str) -> Option<u32> {
        let count = self.environment.get(name)?.trim().parse();
        if count.is_err() {
            self.wrong(name, "expected a whole number");
        }
        count.ok()
    }

    fn switch(&mut self, name: &str) -> Option<bool> {
        match self.environment.get(name)?.trim().to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Some(true),
            "false" | "0" | "no" | "off" => Some(false),
            _ => {
                self.wrong(name, "expected true or false");
                None
            }
        }
    }

    fn positive_seconds(&mut self, name: &str) -> Option<Span> {
        let span = self.seconds(name)?;
        if span.0.is_zero() {
            self.wrong(name, "must be more than 0 seconds");
            return None;
        }
        Some(span)
    }
}
