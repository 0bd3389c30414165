//! Connections to Redis, and who keeps them up.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::sentinel::{SentinelClient, SentinelServerType};
use redis::{AsyncConnectionConfig, Client, FromRedisValue, RedisError, ScriptInvocation};
use tokio::sync::mpsc;

use super::super::Clock;
use super::super::local::Counts;
use super::{BEAT, SETTLED_AT_ONCE, Seed, Settlement, Shared};
use crate::config::{RedisKind, RedisSpec};

/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection that many use at a time.
pub(super) enum Link {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Link {
    async fn open(spec: &RedisSpec) -> Result<Self, RedisError> {
        let urls: Vec<&str> = spec.urls.iter().map(|url| url.expose()).collect();
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(spec.timeout));
        Ok(match &spec.kind {
            RedisKind::Single => {
                let client = Client::open(urls.first().copied().unwrap_or_default())?;
                Self::One(client.get_multiplexed_async_connection_with_config(&config).await?)
            }
            RedisKind::Cluster => {
                let client = ClusterClient::builder(urls)
                    .connection_timeout(CONNECT_TIMEOUT)
                    .response_timeout(spec.timeout)
                    .build()?;
                Self::Cluster(client.get_async_connection().await?)
            }
            RedisKind::Sentinel(name) => {
                let urls: Vec<String> = urls.into_iter().map(str::to_owned).collect();
                let mut client =
                    SentinelClient::build(urls, name.clone(), None, SentinelServerType::Master)?;
                Self::One(client.get_async_connection_with_config(&config).await?)
            }
        })
    }

    /// Runs a script; or says why not. It is in the words of the server, which know no secret of ours.
    pub(super) async fn call<T: FromRedisValue>(
        &self,
        call: &ScriptInvocation<'_>,
        timeout: Duration,
    ) -> Result<T, String> {
        let answer = async {
            match self {
                Self::One(link) => call.invoke_async(&mut link.clone()).await,
                Self::Cluster(link) => call.invoke_async(&mut link.clone()).await,
            }
        };
        match tokio::time::timeout(timeout, answer).await {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer in {} ms", timeout.as_millis())),
        }
    }
}

/// Keeps the connections up, and settles what has been taken.
pub(super) struct Keeper {
    shared: Weak<Shared>,
    counts: Arc<Counts>,
    clock: Clock,
    settlements: mpsc::Receiver<Settlement>,
    /// The mark of the memory that the server had when it was last heard of.
    mark: Option<String>,
}

impl Keeper {
    pub(super) fn new(
        shared: Weak<Shared>,
        counts: Arc<Counts>,
        clock: Clock,
        settlements: mpsc::Receiver<Settlement>,
    ) -> Self {
        Self { shared, counts, clock, settlements, mark: None }
    }

    /// Runs until nobody shares anything any more.
    pub(super) fn run(mut self) {
        let executor = tokio::runtime::Builder::new_current_thread().enable_all().build();
        match executor {
            Ok(executor) => executor.block_on(async { while self.step().await {} }),
            Err(error) => log::error!("cannot keep the connection to Redis: {error}"),
        }
    }

    /// Looks after the connections, and settles for a while. False: nobody needs them any more.
    async fn step(&mut self) -> bool {
        let Some(shared) = self.shared.upgrade() else { return false };
        match self.look_after(&shared).await {
            Ok(()) => shared.note(None),
            Err(why) => shared.note(Some(why)),
        }
        let until = tokio::time::Instant::now() + BEAT;
        drop(shared);
        loop {
            let mut batch = Vec::new();
            let failed = async {
                match self.shared.upgrade() {
                    Some(shared) => shared.failed.notified().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                count = self.settlements.recv_many(&mut batch, SETTLED_AT_ONCE) => {
                    if count == 0 {
                        return false;
                    }
                }
                () = failed => return true,
                () = tokio::time::sleep_until(until) => return true,
            }
            let Some(shared) = self.shared.upgrade() else { return false };
            if let Some(link) = shared.link()
                && let Err(why) = shared.send(&link, &batch, self.clock.now().millis).await
            {
                shared.lost(&link, &why);
            }
        }
    }

    /// Connects what is not connected; and says that we are there.
    async fn look_after(&mut self, shared: &Shared) -> Result<(), String> {
        let Some(first) = shared.links.first() else { return Ok(()) };
        let known = first.load_full();
        let (link, is_new) = match known {
            Some(link) => (link, false),
            None => {
                let link = Link::open(&shared.spec).await.map_err(|error| {
                    shared.failures.fetch_add(1, Ordering::Relaxed);
                    error.to_string()
                })?;
                (Arc::new(link), true)
            }
        };
        let mark = match shared.beat(&link).await {
            Ok(mark) => mark,
            Err(why) => {
                shared.lost(&link, &why);
                return Err(why);
            }
        };
        let now = self.clock.now();
        let has_forgotten = self.mark.as_ref() != Some(&mark);
        let seed =
            if has_forgotten { Seed::All(&self.counts) } else { Seed::Missed(&shared.unshared) };
        shared.seed(&link, seed, now).await?;
        if has_forgotten || is_new {
            shared.seed(&link, Seed::Places(&self.counts), now).await?;
        }
        shared.unshared.clear();
        self.mark = Some(mark);
        first.store(Some(link));
        for other in &shared.links[1..] {
            if other.load().is_none() {
                let link = Link::open(&shared.spec).await.map_err(|error| error.to_string())?;
                other.store(Some(Arc::new(link)));
            }
        }
        Ok(())
    }
}
