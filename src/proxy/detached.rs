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
use tokio::sync::mpsc::Receiver;
use tokio::sync::oneshot;

use super::Proxy;
use super::exchange::Exchange;
use crate::cache::{Flight, Listener};
use crate::lifecycle::Lifecycle;

/// As much waits for a slow client while nobody follows; then the backend waits, too.
const WAITING_MAX: usize = 4;

/// The real client of an exchange, while another one stands in.
pub(super) struct Detached(oneshot::Receiver<Returned>);

/// The client, and why it was not sent all, if so.
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
    let lifecycle = Arc::clone(&proxy.lifecycle);
    let (back, passing) = oneshot::channel();
    exchange.watch.beside(async move {
        let _ = back.send(pass_on(client, handle, (flight, listener), lifecycle).await);
    });
    exchange.detached = Some(Detached(passing));
    Ok(())
}

/// Puts the client back in its place, when it has been sent all; why it was not, if so.
pub(super) async fn attach(session: &mut Session, exchange: &mut Exchange) -> Option<Box<Error>> {
    let Detached(passing) = exchange.detached.take()?;
    // It has no more to say.
    session.downstream_session.as_subrequest_mut()?.shutdown();
    let (client, gone) = passing.await.ok()?;
    session.downstream_session = client;
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

/// Passes on what an answer is made of as fast as its client takes it. When that is gone, the exchange goes on as long as
/// others wait.
async fn pass_on(
    mut client: Box<ServerSession>,
    mut handle: SubrequestHandle,
    (flight, listener): (Arc<Flight>, Listener),
    lifecycle: Arc<Lifecycle>,
) -> Returned {
    let gone = write_all(&mut client, &mut handle.rx, &flight, &lifecycle).await.err();
    drop(listener);
    if gone.is_some() {
        tokio::select! {
            () = flight.left() => {}
            () = async { while handle.rx.recv().await.is_some() {} } => {}
        }
    }
    (client, gone)
}

/// Writes all that comes.
///
/// # Errors
/// When the client is gone.
async fn write_all(
    client: &mut ServerSession,
    tasks: &mut Receiver<HttpTask>,
    flight: &Flight,
    lifecycle: &Lifecycle,
) -> Result<()> {
    let mut waiting = Vec::new();
    let mut is_over = false;
    loop {
        if waiting.is_empty() {
            if is_over {
                return Ok(());
            }
            tokio::select! {
                biased;
                task = tasks.recv() => match task {
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
        let mut writing = std::pin::pin!(client.response_duplex_vec(std::mem::take(&mut waiting)));
        loop {
            // Those who follow do not wait for this client.
            let takes_more = !is_over && (waiting.len() < WAITING_MAX || flight.has_followers());
            tokio::select! {
                biased;
                written = &mut writing => {
                    written.map_err(Error::into_down)?;
                    break;
                }
                task = tasks.recv(), if takes_more => match task {
                    Some(task) => waiting.push(task),
                    None => is_over = true,
                },
            }
        }
    }
}
