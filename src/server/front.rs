//! What a new connection speaks: HTTP/1 or, with prior knowledge, HTTP/2.
//!
//! Pingora's own look waits for as many bytes as an HTTP/2 preface has. A short HTTP/1 request has
//! fewer, and a client that sends nothing would be waited for without end.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp};
use pingora_core::protocols::Stream;
use pingora_core::protocols::http::ServerSession;
use pingora_core::server::ShutdownWatch;
use pingora_proxy::HttpProxy;

use crate::lifecycle::Lifecycle;
use crate::proxy::Proxy;

/// The beginnings of a connection that are looked at, one after the other: each goes on only if the
/// one before it matched, so no HTTP/1 request is waited for longer than its method's second letter.
const PREFACE_STEPS: [&[u8]; 5] =
    [b"P", b"PR", b"PRI *", b"PRI * HTTP/2.0\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"];

/// Takes connections and hands them to the proxy as what they speak.
pub(super) struct Front {
    http1: Arc<Version>,
    http2: Arc<Version>,
    first_bytes_timeout: Duration,
    lifecycle: Arc<Lifecycle>,
}

/// The proxy, told how to read a connection.
struct Version {
    proxy: Arc<HttpProxy<Proxy>>,
    options: HttpServerOptions,
}

impl Front {
    /// `idle_timeout` bounds the wait for a connection's first bytes, and idle HTTP/2 connections.
    pub(super) fn new(
        proxy: HttpProxy<Proxy>,
        idle_timeout: Duration,
        lifecycle: Arc<Lifecycle>,
    ) -> Self {
        let proxy = Arc::new(proxy);
        let mut http2 = HttpServerOptions::default();
        http2.h2c = true;
        http2.h2_idle_timeout = Some(idle_timeout);
        let version = |options| Arc::new(Version { proxy: Arc::clone(&proxy), options });
        Self {
            http1: version(HttpServerOptions::default()),
            http2: version(http2),
            first_bytes_timeout: idle_timeout,
            lifecycle,
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

#[async_trait]
impl ServerApp for Front {
    async fn process_new(
        self: &Arc<Self>,
        mut stream: Stream,
        shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        let look = tokio::time::timeout(self.first_bytes_timeout, speaks_http2(&mut stream));
        if look.await.ok()?? {
            let _open = self.lifecycle.http2_connections.enter();
            self.http2.process_new(stream, shutdown).await
        } else {
            self.http1.process_new(stream, shutdown).await
        }
    }

    async fn cleanup(&self) {
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
        self.proxy.process_new_http(session, shutdown).await
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.options)
    }
}
