//! The client's connection and the body it sends: passed on chunk by chunk, never held.

use bytes::Bytes;
use pingora_proxy::Session;

use super::exchange::Exchange;
use crate::config::{BackendSpec, ClientBounds};

/// Bounds how long a client may send or take nothing, and lets it send its next request while this one is answered.
/// Pingora's own bounds are: while a body is sent 60 s, between requests and on writing none.
pub(super) fn bound_client(session: &mut Session, exchange: &Exchange) {
    let bounds = &exchange.arrived.runtime.snapshot.client;
    session.set_read_timeout(Some(bounds.body_timeout));
    session.set_write_timeout(Some(bounds.write_timeout));
    session.set_pipelining_enabled(true);
    if session.get_keepalive().is_some() {
        keep_alive(session, bounds);
    }
}

/// Keeps the connection for another request.
pub(super) fn keep_alive(session: &mut Session, bounds: &ClientBounds) {
    session.set_keepalive(Some(bounds.idle_timeout.as_secs().max(1)));
}

/// A backend is silent while a client does not send: the client's time must be up first, or the
/// backend would be blamed.
pub(super) fn bound_upload(session: &mut Session, bounds: &ClientBounds, backend: &BackendSpec) {
    let before_the_backend = backend.silence_deadline.mul_f64(0.9);
    session.set_read_timeout(Some(bounds.body_timeout.min(before_the_backend)));
}

/// An HTTP/2 client may end its body with an empty frame. Passed on as a chunk, Pingora would write
/// the end of a chunked body twice (cloudflare/pingora issue 935).
pub(super) fn pass(chunk: &mut Option<Bytes>, end_of_stream: bool) {
    if end_of_stream && chunk.as_ref().is_some_and(Bytes::is_empty) {
        *chunk = None;
    }
}
