//! What a new connection speaks: TLS where that is spoken, and HTTP/1 or HTTP/2.
//!
//! Pingora's own look waits for as many bytes as an HTTP/2 preface has. A short HTTP/1 request has
//! fewer, and a client that sends nothing would be waited for without end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp};
use pingora_core::listeners::tls::Acceptor;
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::http::v2::server::{H2Options, default_h2_options};
use pingora_core::protocols::{ALPN, Shutdown, Stream};
use pingora_core::server::ShutdownWatch;
use pingora_proxy::HttpProxy;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

use super::connections::{Connections, Open};
use super::stream::ClientStream;
use super::workers::Load;
use crate::config::{ClientBounds, Listen, ListenAt};
use crate::lifecycle::Lifecycle;
use crate::proxy::{ClientSide, Proxy, raw_refusal, watched};
use crate::refusal::Refusal;
use crate::runtime::Current;
use crate::telemetry::brief;

/// The beginnings of a connection that are looked at, one after the other: each goes on only if the
/// one before it matched, so no HTTP/1 request is waited for longer than its method's second letter.
const PREFACE_STEPS: [&[u8]; 5] =
    [b"P", b"PR", b"PRI *", b"PRI * HTTP/2.0\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"];

/// What a TLS connection begins with: a record of the handshake (RFC 8446, section 5.1).
const TLS_HANDSHAKE: u8 = 22;

/// What Pingora waits for a first request, where our own bounds do not end it before.
const KEPT_AT_FIRST: Duration = Duration::from_secs(60);

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
    /// The addresses that TLS is spoken on.
    secure: Vec<SocketAddr>,
}

/// The proxy, told how to read a connection.
struct Version {
    proxy: Arc<HttpProxy<Proxy>>,
    options: HttpServerOptions,
    current: Arc<Current>,
    load: Arc<Load>,
    /// Tells when the drain is over.
    cut: watch::Receiver<bool>,
    /// Whether a request has come on the one connection that this is for.
    begun: Option<AtomicBool>,
}

impl Front {
    pub(super) fn new(
        proxy: HttpProxy<Proxy>,
        current: &Arc<Current>,
        lifecycle: Arc<Lifecycle>,
        connections: Option<Arc<Connections>>,
        listens: &[Listen],
        load: &Arc<Load>,
    ) -> Self {
        let secure = listens.iter().filter(|listen| listen.tls);
        let secure = secure.filter_map(|listen| match listen.at {
            ListenAt::Tcp(address) => Some(address),
            ListenAt::Unix(_) => None,
        });
        let idle_timeout = current.load().snapshot.client.idle_timeout;
        let proxy = Arc::new(proxy);
        let version = |options| {
            let (current, load) = (Arc::clone(current), Arc::clone(load));
            let (proxy, cut) = (Arc::clone(&proxy), lifecycle.cut_signal());
            Arc::new(Version { proxy, options, current, load, cut, begun: None })
        };
        Self {
            http1: version(HttpServerOptions::default()),
            http2: version(http2_options(idle_timeout)),
            current: Arc::clone(current),
            closing: lifecycle.closing_signal(),
            lifecycle,
            connections,
            secure: secure.collect(),
        }
    }

    /// How long a client may take for what it is sent.
    pub(super) fn write_timeout(&self) -> Duration {
        self.current.load().snapshot.client.write_timeout
    }

    /// Serves a connection to its end. What is returned counts it for as long as it is open.
    pub(super) async fn serve(&self, mut stream: ClientStream) -> Option<Open> {
        let client = self.current.load().snapshot.client.clone();
        let address = stream.peer_address().map(|address| address.ip());
        let open = match &self.connections {
            Some(connections) => match connections.enter(address, &client) {
                Some(open) => Some(open),
                None => {
                    self.lifecycle.refused.fetch_add(1, Ordering::Relaxed);
                    let why = Refusal::TooManyConnections;
                    Box::pin(refuse(stream, &client, &why)).await;
                    return None;
                }
            },
            None => None,
        };
        let is_secure = self.is_secure(&stream);
        let look = tokio::time::timeout(client.idle_timeout, look(&mut stream));
        let speaks = tokio::select! {
            biased;
            look = look => look.ok().flatten(),
            () = self.lifecycle.parted() => None,
        };
        // Boxed: a connection that idles does not hold room for what others need.
        match (is_secure, speaks) {
            (_, None) => {}
            (true, Some(Speaks::Tls)) => Box::pin(self.serve_secured(stream, &client)).await,
            (true, Some(_)) => Box::pin(refuse(stream, &client, &Refusal::NeedsTls)).await,
            (false, Some(Speaks::Tls)) => {
                Box::pin(refuse(stream, &client, &Refusal::NeedsPlain)).await;
            }
            (false, Some(Speaks::Http2)) => {
                self.http2.process_new(Box::new(stream), &self.closing).await;
            }
            (false, Some(Speaks::Http1)) => self.serve_http1(Box::new(stream)).await,
        }
        open
    }

    async fn serve_secured(&self, stream: ClientStream, client: &ClientBounds) {
        let Some(stream) = self.secured(stream, client.head_timeout).await else { return };
        if stream.selected_alpn_proto() == Some(ALPN::H2) {
            self.http2_secured(stream, client.idle_timeout).await;
        } else {
            self.serve_http1(stream).await;
        }
    }

    /// One exchange after the other. Pingora's own loop holds room for HTTP/2, too.
    async fn serve_http1(&self, stream: Stream) {
        let exchanges = async {
            let mut session = ServerSession::new_http1(stream);
            let keeps = !*self.closing.borrow();
            session.set_keepalive(keeps.then_some(KEPT_AT_FIRST.as_secs()));
            while let Some(reused) = self.http1.process_new_http(session, &self.closing).await {
                let (stream, settings) = reused.consume();
                session = ServerSession::new_http1(stream);
                if let Some(settings) = settings {
                    settings.apply_to_session(&mut session);
                }
            }
        };
        FIRST.scope(AtomicBool::new(true), exchanges).await;
    }

    /// From now on nobody waits for requests on open connections.
    pub(super) async fn part(&self) {
        self.http1.proxy.http_cleanup().await;
    }

    /// Whether TLS is spoken on the address that a connection came to. The system tells the one that
    /// the client named, also where we listen on all of them.
    fn is_secure(&self, stream: &ClientStream) -> bool {
        if self.secure.is_empty() {
            return false;
        }
        let local = stream.local_address();
        let is_of = |listen: &SocketAddr, local: SocketAddr| {
            let is_any = listen.ip().is_unspecified() && listen.is_ipv4() == local.is_ipv4();
            listen.port() == local.port() && (is_any || *listen == local)
        };
        local.is_some_and(|local| self.secure.iter().any(|listen| is_of(listen, local)))
    }

    /// Speaks HTTP/2 on a connection with TLS. Pingora waits without end for its first bytes, which cannot
    /// be looked at before: a client that sends no request is parted from.
    async fn http2_secured(&self, stream: Stream, idle_timeout: Duration) {
        let Version { proxy, current, load, cut, .. } = &*self.http2;
        let version = Arc::new(Version {
            proxy: Arc::clone(proxy),
            options: http2_options(idle_timeout),
            current: Arc::clone(current),
            load: Arc::clone(load),
            cut: cut.clone(),
            begun: Some(AtomicBool::new(false)),
        });
        let has_begun =
            || version.begun.as_ref().is_some_and(|begun| begun.load(Ordering::Relaxed));
        let silent = async {
            tokio::select! {
                () = tokio::time::sleep(idle_timeout) => {}
                () = self.lifecycle.parted() => {}
            }
            if has_begun() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            _ = version.process_new(stream, &self.closing) => {}
            () = silent => {}
        }
    }

    /// Shakes hands.
    async fn secured(&self, plain: ClientStream, within: Duration) -> Option<Stream> {
        let acceptor = Acceptor::from_server_config(self.current.load().tls.clone()?);
        match tokio::time::timeout(within, acceptor.tls_handshake(plain)).await {
            Ok(Ok(secured)) => Some(Box::new(secured)),
            Ok(Err(error)) => {
                log::debug!("a TLS handshake failed: {}", brief(&error));
                None
            }
            Err(_) => {
                log::debug!("a TLS handshake took longer than {within:?}");
                None
            }
        }
    }
}

fn http2_options(idle_timeout: Duration) -> HttpServerOptions {
    let mut options = HttpServerOptions::default();
    options.h2c = true;
    options.h2_idle_timeout = Some(idle_timeout);
    options
}

/// What a connection begins with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Speaks {
    Http1,
    Http2,
    Tls,
}

/// Looks at a connection's first bytes and puts them back. None: it ended before they came.
async fn look(stream: &mut ClientStream) -> Option<Speaks> {
    let mut buffer = [0; PREFACE_STEPS[4].len()];
    for step in PREFACE_STEPS {
        let seen = &mut buffer[..step.len()];
        stream.look(seen).await.ok()?;
        if seen[0] == TLS_HANDSHAKE {
            return Some(Speaks::Tls);
        }
        if seen != step {
            return Some(Speaks::Http1);
        }
    }
    Some(Speaks::Http2)
}

/// Tells a client why its connection is closed, when it has asked for something: else it would take the
/// answer for one to something else.
async fn refuse(mut stream: ClientStream, client: &ClientBounds, why: &Refusal) {
    let refused = async {
        stream.look(&mut [0]).await.ok()?;
        stream.write_all(&raw_refusal(why)).await.ok()?;
        stream.flush().await.ok()?;
        // What is not read would reset the connection, and the answer could be lost.
        Shutdown::shutdown(&mut stream).await;
        while stream.read(&mut [0; 4096]).await.ok()? > 0 {}
        Some(())
    };
    let _ = tokio::time::timeout(client.head_timeout.min(REFUSAL_TIMEOUT), refused).await;
}

#[async_trait]
impl HttpServerApp for Version {
    async fn process_new_http(
        self: &Arc<Self>,
        session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        if let Some(begun) = &self.begun {
            begun.store(true, Ordering::Relaxed);
        }
        let _counted = self.load.exchanges.enter();
        let current = self.current.load();
        let bounds = &current.snapshot.client;
        let is_first = FIRST.try_with(|first| first.swap(false, Ordering::Relaxed));
        let client = ClientSide {
            socket: session.stream().map(|stream| stream.id()),
            is_tls: session.digest().is_some_and(|digest| digest.ssl_digest.is_some()),
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
