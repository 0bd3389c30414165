//! Listening sockets: bound before anything starts, so that a busy port is an error at once; or
//! inherited, from systemd or from the process that this one takes over from.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{IntoRawFd, RawFd};

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use nix::sys::socket::{SockaddrStorage, getsockname};
use pingora_core::apps::ServerApp;
use pingora_core::listeners::{L4BufferSettings, ListenerConfig};
use pingora_core::server::{ListenFds, ShutdownWatch};
use pingora_core::services::listening::Service;
use pingora_core::services::{ServiceReadyNotifier, ServiceWithDependents};

/// The name that a socket for status and dashboard has in systemd's unit (`FileDescriptorName=`).
const ADMIN_SOCKET: &str = "admin";

/// A socket that is bound. It stays open until the process ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bound {
    /// As configured; port 0 is one that the system chooses.
    pub(super) wanted: SocketAddr,
    /// As bound.
    pub(super) address: SocketAddr,
    pub(super) socket: RawFd,
    /// The name that systemd gave it, where it was systemd that bound it.
    pub(super) systemds_name: Option<String>,
}

/// The sockets that this process was started with.
#[derive(Debug, Default)]
pub(super) struct Inherited {
    sockets: Vec<Bound>,
    /// systemd's, which take the place of those that are configured.
    activated: Vec<Bound>,
}

impl Bound {
    fn bind(wanted: SocketAddr) -> Result<Self> {
        let listener =
            TcpListener::bind(wanted).with_context(|| format!("cannot listen on {wanted}"))?;
        listener.set_nonblocking(true).context("cannot make the socket non-blocking")?;
        let address = listener.local_addr().context("the socket has no address")?;
        Ok(Self { wanted, address, socket: listener.into_raw_fd(), systemds_name: None })
    }
}

impl Inherited {
    /// From the process that this one takes over from: `sockets`; from systemd, what its protocol
    /// says.
    pub(super) fn find(sockets: Vec<Bound>) -> Result<Self> {
        let of_systemd =
            sd_notify::listen_fds_with_names(true).context("systemd's sockets cannot be read")?;
        let mut activated = Vec::new();
        for (socket, name) in of_systemd {
            let address = local_address(socket)
                .with_context(|| format!("systemd's socket {name} is not one for TCP"))?;
            let systemds_name = Some(name);
            activated.push(Bound { wanted: address, address, socket, systemds_name });
        }
        let (taken_over, sockets): (Vec<_>, _) =
            sockets.into_iter().partition(|bound| bound.systemds_name.is_some());
        activated.extend(taken_over);
        Ok(Self { sockets, activated })
    }

    /// The sockets for traffic.
    pub(super) fn traffic(&mut self, wanted: &[SocketAddr]) -> Result<Vec<Bound>> {
        let activated = self.activated(|name| name != ADMIN_SOCKET);
        if activated.is_empty() { self.bound(wanted) } else { Ok(activated) }
    }

    /// The sockets for status and dashboard.
    pub(super) fn admin(&mut self, wanted: &[SocketAddr]) -> Result<Vec<Bound>> {
        let activated = self.activated(|name| name == ADMIN_SOCKET);
        if activated.is_empty() { self.bound(wanted) } else { Ok(activated) }
    }

    fn bound(&mut self, wanted: &[SocketAddr]) -> Result<Vec<Bound>> {
        let mut one =
            |wanted: &SocketAddr| match self.sockets.iter().position(|it| it.wanted == *wanted) {
                Some(at) => Ok(self.sockets.swap_remove(at)),
                None => Bound::bind(*wanted),
            };
        wanted.iter().map(&mut one).collect()
    }

    fn activated(&self, is_wanted: impl Fn(&str) -> bool) -> Vec<Bound> {
        let is_wanted = |bound: &&Bound| bound.systemds_name.as_deref().is_some_and(&is_wanted);
        self.activated.iter().filter(is_wanted).cloned().collect()
    }

    /// Closes what the configuration has no use for.
    pub(super) fn close_rest(self) {
        for Bound { address, socket, .. } in self.sockets {
            log::info!("no longer listening on {address}");
            let _ = nix::unistd::close(socket);
        }
    }
}

fn local_address(socket: RawFd) -> Result<SocketAddr> {
    let address: SockaddrStorage = getsockname(socket)?;
    if let Some(address) = address.as_sockaddr_in() {
        return Ok(SocketAddr::from((address.ip(), address.port())));
    }
    match address.as_sockaddr_in6() {
        Some(address) => Ok(SocketAddr::from((address.ip(), address.port()))),
        None => bail!("it has no Internet address"),
    }
}

/// A service that finds its sockets in Pingora's table of listening descriptors, under the address
/// that it listens on.
pub(super) struct PreBound<A> {
    service: Service<A>,
    sockets: Vec<Bound>,
}

impl<A> PreBound<A> {
    /// Connections get no buffer for reading: heads and bodies are read into buffers of their own, and
    /// Pingora's 64 KiB would be the most that an idle connection costs.
    pub(super) fn new(mut service: Service<A>, sockets: Vec<Bound>) -> Self {
        for socket in &sockets {
            let listener = ListenerConfig::tcp(socket.address.to_string());
            service.add_listener(listener.l4_buffer(L4BufferSettings::default().read(0)));
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
            for Bound { address, socket, .. } in self.sockets.drain(..) {
                // The table owns the descriptor from here on.
                table.add(address.to_string(), socket);
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
