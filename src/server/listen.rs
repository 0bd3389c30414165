//! Listening sockets: bound before anything starts, so that a busy port is an error at once.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{IntoRawFd, OwnedFd};

use anyhow::{Context, Result};
use async_trait::async_trait;
use pingora_core::apps::ServerApp;
use pingora_core::server::{ListenFds, ShutdownWatch};
use pingora_core::services::listening::Service;
use pingora_core::services::{ServiceReadyNotifier, ServiceWithDependents};

/// A socket that is bound.
pub(super) struct Bound {
    address: SocketAddr,
    socket: OwnedFd,
}

impl Bound {
    pub(super) fn bind(address: SocketAddr) -> Result<Self> {
        let listener =
            TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
        listener.set_nonblocking(true).context("cannot make the socket non-blocking")?;
        let address = listener.local_addr().context("the socket has no address")?;
        Ok(Self { address, socket: listener.into() })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

/// A service that finds its sockets in Pingora's table of listening descriptors, under the address
/// that it listens on, as it would after an upgrade.
pub(super) struct PreBound<A> {
    service: Service<A>,
    sockets: Vec<Bound>,
}

impl<A> PreBound<A> {
    pub(super) fn new(mut service: Service<A>, sockets: Vec<Bound>) -> Self {
        for socket in &sockets {
            service.add_tcp(&socket.address.to_string());
        }
        Self { service, sockets }
    }
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> ServiceWithDependents for PreBound<A> {
    async fn start_service(
        &mut self,
        fds: Option<ListenFds>,
        shutdown: ShutdownWatch,
        listeners_per_fd: usize,
        ready: ServiceReadyNotifier,
    ) {
        if let Some(table) = &fds {
            let mut table = table.lock();
            for Bound { address, socket } in self.sockets.drain(..) {
                // The table owns the descriptor from here on.
                table.add(address.to_string(), socket.into_raw_fd());
            }
        }
        self.service.start_service(fds, shutdown, listeners_per_fd, ready).await;
    }

    fn name(&self) -> &str {
        ServiceWithDependents::name(&self.service)
    }

    fn threads(&self) -> Option<usize> {
        ServiceWithDependents::threads(&self.service)
    }
}
