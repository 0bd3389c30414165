//! Connections to Redis: to one server, to a cluster, or to the server that sentinels name.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::sentinel::{SentinelClient, SentinelServerType};
use redis::{AsyncConnectionConfig, Client, Cmd, FromRedisValue, RedisError, ScriptInvocation};

use crate::config::{RedisKind, RedisSpec};

/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Why there is no answer to a command, in the words of the server, which know no secret of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The connection is of no use, or nobody answers in time.
    Away(String),
    /// It is answered with an error.
    Refused(String),
}

/// A connection that many use at a time.
pub enum Link {
    /// To one server.
    One(MultiplexedConnection),
    /// To all of a cluster.
    Cluster(ClusterConnection),
}

impl Link {
    /// Connects, from a task of the runtime that then serves the connection.
    ///
    /// # Errors
    /// When nobody answers, or not to us.
    pub async fn open(spec: &RedisSpec) -> Result<Self, RedisError> {
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

    /// Runs a script.
    ///
    /// # Errors
    /// Why not, in the words of the server, which know no secret of ours.
    pub async fn call<T: FromRedisValue>(
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
            Ok(answer) => answer.map_err(|error: RedisError| error.to_string()),
            Err(_) => Err(late(timeout)),
        }
    }

    /// Runs a command.
    ///
    /// # Errors
    /// Why there is no answer.
    pub async fn ask<T: FromRedisValue>(&self, ask: &Cmd, timeout: Duration) -> Result<T, Trouble> {
        let answer = async {
            match self {
                Self::One(link) => ask.query_async(&mut link.clone()).await,
                Self::Cluster(link) => ask.query_async(&mut link.clone()).await,
            }
        };
        let trouble = |error: RedisError| {
            let is_away =
                error.is_io_error() || error.is_connection_dropped() || error.is_timeout();
            if is_away {
                Trouble::Away(error.to_string())
            } else {
                Trouble::Refused(error.to_string())
            }
        };
        match tokio::time::timeout(timeout, answer).await {
            Ok(answer) => answer.map_err(trouble),
            Err(_) => Err(Trouble::Away(late(timeout))),
        }
    }
}

fn late(timeout: Duration) -> String {
    format!("no answer in {} ms", timeout.as_millis())
}
