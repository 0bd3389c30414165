//! An exchange whose answer others wait for, too, goes on when its client leaves.
//!
//! Pingora ends what it does for a client when that is gone. So it is given a client of our own in the place of the real
//! one, which never leaves as long as anybody waits; what it writes to that is passed on to the real client beside it.
//! Before the exchange is over the two change places again.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderValue, Method};
use pingora::http::RequestHeader;
use pingora_core::protocols::http::subrequest::server::{HttpSession as StandIn, SubrequestHandle};
use pingora_core::protocols::http::{HttpTask, ServerSession};
use pingora_core::{Error, Result};
use pingora_proxy::Session;
use tokio::sync::oneshot;

use super::Proxy;
use super::exchange::Exchange;
use crate::cache::{Flight, Listener};
use crate::lifecycle::Lifecycle;

/// As much waits for a slow client while nobody follows; then the backend waits, too.
const WAITING_MAX: usize = 4;

/// The real client of an exchange, while another one stands in.
pub(super) enum Detached {
    Served {
        /// Told that there is no more to pass on than what is on its way.
        ends: oneshot::Sender<()>,
        back: oneshot::Receiver<Returned>,
    },
    /// It is gone. Its connection is the exchange's as long as that goes on: the watch looks at it.
    Gone(#[expect(dead_code, reason = "it is held, and no more")] Box<ServerSession>),
}

/// The client, and why it could not be sent all, if so.
type Returned = (Box<ServerSession>, Option<Box<Error>>);

/// Has an exchange that leads go on without its client, if it comes to that. Its request is here as a whole.
///
/// # Errors
/// When its head cannot be read again; it was read before.
pub(super) async fn detach(
    proxy: &Proxy,
    session: &mut Session,
    exchange: &mut Exchange,
) -> Result<()> {
    let Some((flight, listener)) = exchange.cached.listen() else { return Ok(()) };
    let (stand_in, handle) = stand_in(session).await?;
    let stand_in = Box::new(ServerSession::new_subrequest(stand_in));
    let client = std::mem::replace(&mut session.downstream_session, stand_in);
    let (ends, ended) = oneshot::channel();
    let (returns, back) = oneshot::channel();
    let passing = Passing {
        client,
        handle,
        ended: Some(ended),
        flight,
        lifecycle: Arc::clone(&proxy.lifecycle),
    };
    exchange.watch.beside(async move {
        let _ = returns.send(passing.pass_on(listener).await);
    });
    exchange.detached = Some(Detached::Served { ends, back });
    Ok(())
}

/// Puts the client back in its place, when it has been sent all; why it was not, if so: then nothing more is said to it, an
/// end that it could take for a good one least of all.
pub(super) async fn attach(session: &mut Session, exchange: &mut Exchange) -> Option<Box<Error>> {
    let (ends, back) = match exchange.detached.take() {
        Some(Detached::Served { ends, back }) => (ends, back),
        gone => {
            exchange.detached = gone;
            return None;
        }
    };
    let _ = ends.send(());
    let (client, gone) = back.await.ok()?;
    if gone.is_some() {
        exchange.detached = Some(Detached::Gone(client));
    } else {
        session.downstream_session = client;
    }
    gone
}

/// Who stands in for a client whose request has been read.
async fn stand_in(session: &mut Session) -> Result<(StandIn, SubrequestHandle)> {
    // Pingora has it read the client's head as one of HTTP/1. That of an HTTP/1 client it has read before; that of
    // another one may be too large for it.
    let any = RequestHeader::build(Method::POST, b"/", None)?;
    let head = std::mem::replace(session.req_header_mut(), any);
    let (mut stand_in, handle) = StandIn::new_from_session(&session.downstream_session);
    *session.req_header_mut() = head.clone();
    stand_in.read_request().await?;
    // One byte is all that comes from it: the body is held, and stands in the place of what Pingora has kept.
    let own = stand_in.req_header_mut();
    own.remove_header(&TRANSFER_ENCODING);
    own.insert_header(CONTENT_LENGTH, HeaderValue::from_static("1"))?;
    let body = HttpTask::Body(Some(Bytes::from_static(b"0")), true);
    if handle.tx.try_send(body).is_ok() {
        stand_in.enable_retry_buffering();
        while stand_in.read_body_bytes().await?.is_some() {}
    }
    *stand_in.req_header_mut() = head;
    Ok((stand_in, handle))
}

/// What passes on an answer to a client, as fast as that takes it.
struct Passing {
    client: Box<ServerSession>,
    handle: SubrequestHandle,
    /// None: the end was told.
    ended: Option<oneshot::Receiver<()>>,
    flight: Arc<Flight>,
    lifecycle: Arc<Lifecycle>,
}

impl Passing {
    /// Passes on all that comes. When the client is gone, the exchange goes on as long as others wait.
    async fn pass_on(mut self, listener: Listener) -> Returned {
        let written = self.write_all().await;
        drop(listener);
        let Self { client, mut handle, ended, flight, .. } = self;
        if let (Err(_), Some(ended)) = (&written, ended) {
            tokio::select! {
                () = flight.left() => {}
                _ = ended => {}
                () = async { while handle.rx.recv().await.is_some() {} } => {}
            }
        }
        (client, written.err())
    }

    /// What comes next of the answer; none: that was all.
    async fn next(
        handle: &mut SubrequestHandle,
        ended: &mut Option<oneshot::Receiver<()>>,
    ) -> Option<HttpTask> {
        if let Some(end) = ended {
            tokio::select! {
                biased;
                task = handle.rx.recv() => return task,
                _ = end => *ended = None,
            }
        }
        // What is here now is all that there will be.
        handle.rx.try_recv().ok()
    }

    /// Writes all that comes.
    ///
    /// # Errors
    /// When the client is gone.
    async fn write_all(&mut self) -> Result<()> {
        let Self { client, handle, ended, flight, lifecycle } = self;
        let mut waiting = Vec::new();
        let mut is_over = false;
        loop {
            if waiting.is_empty() {
                if is_over {
                    return Ok(());
                }
                tokio::select! {
                    biased;
                    task = Self::next(handle, ended) => match task {
                        Some(task) => waiting.push(task),
                        None => return Ok(()),
                    },
                    unasked = client.read_body_or_idle(true) => {
                        unasked.map_err(Error::into_down)?;
                    }
                }
                continue;
            }
            if !lifecycle.keeps_connections() {
                client.set_keepalive(None);
            }
            let tasks = std::mem::take(&mut waiting);
            let mut writing = std::pin::pin!(client.response_duplex_vec(tasks));
            loop {
                // Those who follow do not wait for this client.
                let has_room = waiting.len() < WAITING_MAX || flight.has_followers();
                tokio::select! {
                    biased;
                    written = &mut writing => {
                        written.map_err(Error::into_down)?;
                        break;
                    }
                    task = Self::next(handle, ended), if !is_over && has_room => match task {
                        Some(task) => waiting.push(task),
                        None => is_over = true,
                    },
                    () = flight.followed(), if !has_room => {}
                }
            }
        }
    }
}
