//! The client's connection and the body it sends: passed on chunk by chunk, never held.

use bytes::Bytes;
use pingora_proxy::Session;

use super::exchange::Exchange;

/// Bounds a client's silence. Pingora's own are: while a body is sent 60 s, between requests none.
pub(super) fn bound_client(session: &mut Session, exchange: &Exchange) {
    let bounds = &exchange.arrived.runtime.snapshot.client;
    session.set_read_timeout(Some(bounds.body_timeout));
    if session.get_keepalive().is_some() {
        session.set_keepalive(Some(bounds.idle_timeout.as_secs().max(1)));
    }
}

/// An HTTP/2 client may end its body with an empty frame. Passed on as a chunk, Pingora would write
/// the end of a chunked body twice (cloudflare/pingora issue 935).
pub(super) fn pass(chunk: &mut Option<Bytes>, end_of_stream: bool) {
    if end_of_stream && chunk.as_ref().is_some_and(Bytes::is_empty) {
        *chunk = None;
    }
}
