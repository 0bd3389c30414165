//! What a new connection speaks: HTTP/1 or, with prior knowledge, HTTP/2.
//!
//! Pingora's own look waits for as many bytes as an HTTP/2 preface has. A short HTTP/1 request has
//! fewer, and a client that sends nothing would be waited for without end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp};
use pingora_core::protocols::Stream;
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::http::v2::server::{H2Options, default_h2_options};
use pingora_core::server::ShutdownWatch;
use pingora_proxy::HttpProxy;
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;

use super::connections::Connections;
use crate::config::ClientBounds;
use crate::lifecycle::Lifecycle;
use crate::proxy::{ClientSide, Proxy, raw_refusal, watched};
use crate::refusal::Refusal;
use crate::runtime::Current;

/// The beginnings of a connection that are looked at, one after the other: each goes on only if the
/// one before it matched, so no HTTP/1 request is waited for longer than its method's second letter.
const PREFACE_STEPS: [&[u8]; 5] =
    [b"P", b"PR", b"PRI *", b"PRI * HTTP/2.0\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"];

/// Longest that a connection which is refused stays open.
const REFUSAL_TIMEOUT: Duration = Duration::from_millis(500);

tokio::task_local! {
    /// Whether the connection of this task has had no request yet.
    static FIRST: AtomicBool;
}

/// Takes connections and hands them to the proxy as what they speak.
pub(super) struct Front {
    http1: Arc<Version>,
    http2: Arc<Version>,
    current: Arc<Current>,
    lifecycle: Arc<Lifecycle>,
    /// In place of Pingora's own signal, which comes after the drain.
    closing: ShutdownWatch,
    /// Counts connections; none where they are not bounded.
    connections: Option<Arc<Connections>>,
}

/// The proxy, told how to read a connection.
struct Version {
    proxy: Arc<HttpProxy<Proxy>>,
    options: HttpServerOptions,
    current: Arc<Current>,
    /// Tells when the drain is over.
    cut: watch::Receiver<bool>,
}

impl Front {
    pub(super) fn new(
        proxy: HttpProxy<Proxy>,
        current: &Arc<Current>,
        lifecycle: Arc<Lifecycle>,
        connections: Option<Arc<Connections>>,
    ) -> Self {
        let idle_timeout = current.load().snapshot.client.idle_timeout;
        let proxy = Arc::new(proxy);
        let mut http2 = HttpServerOptions::default();
        http2.h2c = true;
        http2.h2_idle_timeout = Some(idle_timeout);
        let version = |options| {
            let current = Arc::clone(current);
            let cut = lifecycle.cut_signal();
            Arc::new(Version { proxy: Arc::clone(&proxy), options, current, cut })
        };
        Self {
            http1: version(HttpServerOptions::default()),
            http2: version(http2),
            current: Arc::clone(current),
            closing: lifecycle.closing_signal(),
            lifecycle,
            connections,
        }
    }
}

/// Looks at a connection's first bytes and puts them back. None: it ended before they came.
async fn speaks_http2(stream: &mut Stream) -> Option<bool> {
    let mut buffer = [0; PREFACE_STEPS[4].len()];
    for step in PREFACE_STEPS {
        let seen = &mut buffer[..step.len()];
        if !stream.try_peek(seen).await.ok()? || seen != step {
            return Some(false);
        }
    }
    Some(true)
}

/// Tells one connection too many why it is closed, when it has asked for something: else it would
/// take the answer for one to something else.
async fn refuse(mut stream: Stream, client: &ClientBounds) -> Option<Stream> {
    let refused = async {
        stream.try_peek(&mut [0]).await.ok()?;
        stream.write_all(&raw_refusal(&Refusal::TooManyConnections)).await.ok()?;
        stream.flush().await.ok()
    };
    let _ = tokio::time::timeout(client.head_timeout.min(REFUSAL_TIMEOUT), refused).await;
    None
}

#[async_trait]
impl ServerApp for Front {
    async fn process_new(
        self: &Arc<Self>,
        mut stream: Stream,
        _shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        let client = self.current.load().snapshot.client.clone();
        let address = stream.get_socket_digest().and_then(|digest| {
            digest.peer_addr().and_then(|address| address.as_inet()).map(SocketAddr::ip)
        });
        let _counted = match &self.connections {
            Some(connections) => match connections.enter(address, &client) {
                Some(open) => Some(open),
                None => return refuse(stream, &client).await,
            },
            None => None,
        };
        let _open = self.lifecycle.connections.enter();
        let look = tokio::time::timeout(client.idle_timeout, speaks_http2(&mut stream));
        let speaks_http2 = tokio::select! {
            biased;
            look = look => look.ok()??,
            () = self.lifecycle.parted() => return None,
        };
        if speaks_http2 {
            self.http2.process_new(stream, &self.closing).await
        } else {
            let http1 = self.http1.process_new(stream, &self.closing);
            FIRST.scope(AtomicBool::new(true), http1).await
        }
    }

    async fn cleanup(&self) {
        self.lifecycle.parted().await;
        self.http1.proxy.http_cleanup().await;
    }
}

#[async_trait]
impl HttpServerApp for Version {
    async fn process_new_http(
        self: &Arc<Self>,
        session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        let current = self.current.load();
        let bounds = &current.snapshot.client;
        let is_first = FIRST.try_with(|first| first.swap(false, Ordering::Relaxed));
        let client = ClientSide {
            socket: session.stream().map(|stream| stream.id()),
            half_close: bounds.half_close,
            // A kept connection may be idle before its next head begins.
            head_within: match is_first {
                Ok(false) => bounds.idle_timeout + bounds.head_timeout,
                _ => bounds.head_timeout,
            },
        };
        drop(current);
        let exchange = self.proxy.process_new_http(session, shutdown);
        watched(client, &self.cut, exchange).await.flatten()
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.options)
    }

    fn h2_options(&self) -> Option<H2Options> {
        let mut options = default_h2_options();
        options.max_concurrent_streams(self.current.load().snapshot.client.http2_streams_max);
        Some(options)
    }
}
