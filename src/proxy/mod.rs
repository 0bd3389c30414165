//! The data path: the life of an exchange.
//!
//! 1. The head has been read. [`admit`] notes who asks and gives it a request id; it answers the
//!    gateway's own pages, refuses what may not pass, and [`course`] finds the pools that can serve it.
//!    [`body`] reads the body where it can be held, so that it can be sent more than once, and where
//!    it names the model. [`hooks`] do with the request what the configuration has done with it. [`cached`] may have an
//!    answer that another request was given; else others may be given the one to this, which [`detached`] has go on
//!    when its own client leaves.
//! 2. [`select`] asks the pool for a backend, and waits in line when all are full; Pingora connects.
//! 3. [`send`] rewrites the request head: target, `Host`, credential, forwarded headers. The body
//!    follows: all of it, or the chunks in which it comes.
//! 4. [`retry`] judges the response head: one that another backend may do better is not passed on.
//!    [`receive`] rewrites it, and [`hooks`] have their say. The body passes as it is, each chunk at once.
//! 5. When an attempt fails, [`retry`] says whether there is another one: back to 2, and there, when the
//!    pool cannot serve, to the next one.
//! 6. [`settle`]: before the client hears the end of its answer, what was taken of limits and backends is given back; a
//!    failure becomes a refusal. After it the log gets its line, [`meter`] writes what was taken to the ledger, and
//!    [`account`] tells metrics, request log and traces. Dropping the [`Exchange`] gives back whatever is left.
//!
//! An exchange takes the runtime once, at 1, and uses it to its end. Its [`watch`] ends it when a
//! deadline is over. A client that goes away ends the work at the backend, as long as nobody else waits for it: Pingora
//! sees it while it waits for either side, the watch while it does not.

mod account;
mod admit;
mod body;
mod cached;
mod course;
mod detached;
mod exchange;
mod heads;
mod hooks;
mod limit;
mod meter;
mod mirror;
mod receive;
mod respond;
mod retry;
mod rights;
mod select;
mod send;
mod settle;
mod watch;

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::HeaderName;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora_core::protocols::Digest;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, Result};
use pingora_proxy::{FailToProxy, ProxyHttp, Session};

pub use admit::forwarded_client;
pub use exchange::Exchange;
pub use mirror::Mirror;
pub use respond::raw_refusal;
pub use watch::{ClientSide, watched};

use crate::ledger::{Ledger, Months};
use crate::lifecycle::Lifecycle;
use crate::runtime::{Current, Pages};
use crate::telemetry::{Phase, Telemetry};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// The proxy for all traffic.
#[derive(Clone)]
pub struct Proxy {
    /// The runtime that new exchanges take.
    pub current: Arc<Current>,
    /// Says when to refuse, and counts.
    pub lifecycle: Arc<Lifecycle>,
    /// Where usage is kept, if it is.
    pub ledger: Option<Arc<Ledger>>,
    /// What keys have taken in this month.
    pub months: Arc<Months>,
    /// Who is told of exchanges.
    pub telemetry: Arc<Telemetry>,
    /// What sends copies of requests.
    pub mirror: Arc<Mirror>,
    /// The gateway's own pages.
    pub pages: Arc<dyn Pages>,
    /// Whether there is traffic here, or just pages.
    pub serves: Serves,
}

/// What an address is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serves {
    /// The gateway's own pages, and everything else is traffic.
    PagesAndTraffic,
    /// The gateway's own pages only.
    Pages,
}

#[async_trait]
impl ProxyHttp for Proxy {
    /// Behind a pointer: Pingora's futures hold it by value, in several places, and are moved.
    type CTX = Box<Exchange>;

    fn new_ctx(&self) -> Box<Exchange> {
        Box::new(Exchange::new(self.current.load_full()))
    }

    /// None: Pingora's default would ask each response whether to compress it.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn early_request_filter(
        &self,
        session: &mut Session,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        heads::forget_case(session.req_header_mut())?;
        body::bound_client(session, exchange);
        if !self.lifecycle.keeps_connections() {
            session.set_keepalive(None);
        }
        Ok(())
    }

    async fn request_filter(
        &self,
        session: &mut Session,
        exchange: &mut Box<Exchange>,
    ) -> Result<bool> {
        admit::admit(self, session, exchange).await
    }

    async fn upstream_peer(
        &self,
        session: &mut Session,
        exchange: &mut Box<Exchange>,
    ) -> Result<Box<HttpPeer>> {
        select::select(session, exchange).await
    }

    async fn connected_to_upstream(
        &self,
        _session: &mut Session,
        _reused: bool,
        _peer: &HttpPeer,
        socket: RawFd,
        _digest: Option<&Digest>,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        exchange.turn(Phase::Own);
        send::connected(exchange, socket)
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        send::send(session, request, exchange)?;
        exchange.turn(Phase::Backend);
        Ok(())
    }

    async fn request_body_filter(
        &self,
        session: &mut Session,
        chunk: &mut Option<Bytes>,
        end_of_stream: bool,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        body::send(exchange, chunk, end_of_stream, session.was_upgraded()).await
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        receive::check_switch(session, response)?;
        if response.status.is_informational() {
            return Ok(());
        }
        exchange.turn(Phase::Own);
        receive::note_framing(response, exchange);
        retry::judge(session, response, exchange)
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        exchange: &mut Box<Exchange>,
    ) -> Result<()> {
        receive::receive(self, session, response, exchange)?;
        if exchange.observed.has_head() {
            exchange.turn(Phase::Answer);
        }
        if exchange.watch.is_answered() {
            settle::answered(self, session, exchange);
        }
        Ok(())
    }

    fn response_body_filter(
        &self,
        session: &mut Session,
        chunk: &mut Option<Bytes>,
        end_of_stream: bool,
        exchange: &mut Box<Exchange>,
    ) -> Result<Option<Duration>> {
        meter::pass(exchange, chunk, end_of_stream);
        cached::piece(exchange, chunk.as_ref());
        hooks::pass(self, exchange, chunk, end_of_stream)?;
        receive::pass(session, exchange, chunk.as_ref(), end_of_stream)?;
        if end_of_stream {
            settle::answered(self, session, exchange);
            cached::whole(exchange);
        }
        Ok(None)
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        exchange: &mut Box<Exchange>,
        error: Box<Error>,
    ) -> Box<Error> {
        retry::after_connect_failure(exchange, error)
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        exchange: &mut Box<Exchange>,
        client_reused: bool,
    ) -> Box<Error> {
        retry::after_broken_exchange(session, exchange, error, client_reused)
    }

    async fn fail_to_proxy(
        &self,
        session: &mut Session,
        error: &Error,
        exchange: &mut Box<Exchange>,
    ) -> FailToProxy {
        settle::fail(self, session, exchange, error).await
    }

    async fn logging(
        &self,
        session: &mut Session,
        error: Option<&Error>,
        exchange: &mut Box<Exchange>,
    ) {
        let gone = detached::attach(session, exchange).await;
        exchange.watch.attempt_over();
        if error.is_none() {
            // Where the end has no sign of its own.
            cached::whole(exchange);
        }
        exchange.observed.client_left = gone.is_some();
        let error = error.or(gone.as_deref());
        settle::judge(exchange, error);
        settle::log(session, exchange, error);
        let taken = meter::settle(self, session, exchange, error);
        account::tell(session, exchange, error, taken);
    }

    /// Ours says more, and says it without the query.
    fn suppress_error_log(&self, _: &Session, _: &Box<Exchange>, _: &Error) -> bool {
        true
    }

    fn request_summary(&self, _session: &Session, exchange: &Box<Exchange>) -> String {
        format!("request {}", exchange.request_id())
    }
}
