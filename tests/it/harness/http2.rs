//! An upstream that speaks HTTP/2 without TLS, and does what the path says.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{Request, Response};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// What is counted.
#[derive(Default)]
struct Counts {
    connections: AtomicUsize,
    open: AtomicUsize,
    resets: AtomicUsize,
}

/// The upstream. By the end of the path: `/echo` answers with the body, `/slow` 300 ms later, `/count`
/// with the body's length, `/events` with four events and their end, `/cut` breaks off after one, `/hang` never
/// answers, `/refuse` answers 400 at once and reads no body, `/reset` resets the stream.
pub(crate) struct Http2Upstream {
    address: SocketAddr,
    counts: Arc<Counts>,
    _runtime: Runtime,
}

impl Http2Upstream {
    pub(crate) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let counts = Arc::new(Counts::default());
        let shared = Arc::clone(&counts);
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let counts = Arc::clone(&shared);
                let _ = stream.set_nodelay(true);
                tokio::spawn(async move {
                    counts.connections.fetch_add(1, Ordering::SeqCst);
                    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                    while let Some(Ok((request, respond))) = connection.accept().await {
                        let counts = Arc::clone(&counts);
                        tokio::spawn(async move {
                            counts.open.fetch_add(1, Ordering::SeqCst);
                            if answer(request, respond).await.is_none() {
                                counts.resets.fetch_add(1, Ordering::SeqCst);
                            }
                            counts.open.fetch_sub(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
        Self { address, counts, _runtime: runtime }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn connections(&self) -> usize {
        self.counts.connections.load(Ordering::SeqCst)
    }

    /// Requests that are at work.
    pub(crate) fn open(&self) -> usize {
        self.counts.open.load(Ordering::SeqCst)
    }

    /// Requests that their client took back.
    pub(crate) fn resets(&self) -> usize {
        self.counts.resets.load(Ordering::SeqCst)
    }
}

/// Answers a request; none when its client took it back.
async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Option<()> {
    let (head, mut body) = request.into_parts();
    let path = head.uri.path();
    if path.ends_with("/refuse") {
        let response = Response::builder().status(400).body(()).unwrap();
        respond.send_response(response, false).ok()?.send_data("refused".into(), true).ok()?;
        return Some(());
    }
    if path.ends_with("/reset") {
        respond.send_reset(Reason::INTERNAL_ERROR);
        return Some(());
    }
    let mut bytes = Vec::new();
    let mut length = 0;
    while let Some(chunk) = body.data().await {
        let chunk = chunk.ok()?;
        body.flow_control().release_capacity(chunk.len()).ok()?;
        length += chunk.len();
        bytes.extend_from_slice(&chunk);
    }
    if path.ends_with("/hang") {
        std::future::poll_fn(|context| respond.poll_reset(context)).await.ok()?;
        return None;
    }
    if path.ends_with("/slow") {
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let events = path.ends_with("/events") || path.ends_with("/cut");
    let kind = if events { "text/event-stream" } else { "application/json" };
    let authority = head.uri.authority().map(ToString::to_string).unwrap_or_default();
    let response = Response::builder()
        .header("content-type", kind)
        .header("x-path", path)
        .header("x-authority", authority)
        .body(())
        .unwrap();
    let mut stream = respond.send_response(response, false).ok()?;
    if events {
        for number in 0..4 {
            stream.send_data(format!("data: {number}\n\n").into(), false).ok()?;
            if path.ends_with("/cut") {
                tokio::time::sleep(Duration::from_millis(50)).await;
                stream.send_reset(Reason::INTERNAL_ERROR);
                return Some(());
            }
        }
        stream.send_data("data: [DONE]\n\n".into(), true).ok()?;
        return Some(());
    }
    let text = if path.ends_with("/count") { length.to_string().into_bytes() } else { bytes };
    let mut rest = Bytes::from(text);
    while !rest.is_empty() {
        stream.reserve_capacity(rest.len());
        let room = std::future::poll_fn(|context| stream.poll_capacity(context)).await?.ok()?;
        stream.send_data(rest.split_to(room.min(rest.len())), false).ok()?;
    }
    stream.send_data(Bytes::new(), true).ok()?;
    Some(())
}
