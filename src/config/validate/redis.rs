//! Redis.

use redis::IntoConnectionInfo;

use super::super::defaults;
use super::super::file::{FileConfig, FileWhenDown};
use super::super::problem::{KeyPath, Problems};
use super::super::redis::{RedisKind, RedisSpec, WhenDown};
use super::{Context, positive, secret};
use crate::secret::Secret;

/// Connections beyond this are typing mistakes: each is shared by many exchanges.
const CONNECTIONS_MAX: u32 = 64;

/// What a URL looks like. One may hold a password: it is not repeated.
pub(in super::super) const EXPECTED: &str =
    "expected redis://:password@host:6379/0, rediss:// for TLS";

/// Whether these are URLs, with commas between.
pub(in super::super) fn is_readable(urls: &str) -> bool {
    urls.split(',').all(|url| url.trim().into_connection_info().is_ok())
}

/// Where what is counted is shared, if it is.
pub(super) fn redis(
    file: &FileConfig,
    context: &Context<'_>,
    problems: &mut Problems,
) -> Option<RedisSpec> {
    let written = file.redis.as_ref()?;
    let at = KeyPath::default().key("redis");
    let urls = (written.url.as_ref(), written.url_file.as_deref());
    let Some(urls) = secret("url", urls, &at, context.files, problems) else {
        if !problems.has_below(&at) {
            problems.value(&at, "\"url\" is missing, such as redis://127.0.0.1:6379");
        }
        return None;
    };
    let (is_readable, urls) = (is_readable(urls.expose()), urls.expose().split(',').map(str::trim));
    let urls: Vec<&str> = urls.collect();
    if !is_readable {
        let key = if written.url_file.is_some() { "url_file" } else { "url" };
        problems.value(&at.key(key), EXPECTED);
    }
    let kind = match (&written.sentinel_master, written.cluster) {
        (Some(_), Some(true)) => {
            problems
                .key(&at.key("cluster"), "sentinel_master stands here too; keep one of the two");
            RedisKind::Cluster
        }
        (Some(name), _) => RedisKind::Sentinel(name.clone()),
        (None, Some(true)) => RedisKind::Cluster,
        (None, _) => RedisKind::Single,
    };
    if kind == RedisKind::Single && urls.len() > 1 {
        problems.value(&at.key("url"), "several are for a cluster or for sentinels");
    }
    let prefix = written.prefix.clone().unwrap_or_else(|| defaults::REDIS_PREFIX.to_owned());
    if prefix.is_empty() {
        problems.value(&at.key("prefix"), "cannot be empty: it tells our keys from others");
    }
    let connections = written.connections.unwrap_or(defaults::REDIS_CONNECTIONS);
    if !(1..=CONNECTIONS_MAX).contains(&connections) {
        problems.value(&at.key("connections"), format!("expected 1 to {CONNECTIONS_MAX}"));
    }
    Some(RedisSpec {
        urls: urls.into_iter().map(Secret::new).collect(),
        kind,
        timeout: positive(written.timeout, &at.key("timeout"), defaults::REDIS_TIMEOUT, problems),
        connections: connections as usize,
        prefix,
        when_down: match written.when_down {
            Some(FileWhenDown::Refuse) => WhenDown::Refuse,
            Some(FileWhenDown::Local) | None => WhenDown::Local,
        },
    })
}
