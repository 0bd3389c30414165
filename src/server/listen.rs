//! Listening sockets: bound before anything starts, so that a busy port is an error at once; or
//! inherited, from systemd or from the process that this one takes over from.

use std::fs::Permissions;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{IntoRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use nix::sys::socket::{SockaddrStorage, UnixAddr, getsockname};
use pingora_core::apps::ServerApp;
use pingora_core::listeners::{L4BufferSettings, ListenerConfig};
use pingora_core::server::{ListenFds, ShutdownWatch};
use pingora_core::services::listening::Service;
use pingora_core::services::{ServiceReadyNotifier, ServiceWithDependents};

use crate::config::{Listen, ListenAt};

/// How the name of a socket for status and dashboard begins in systemd's unit
/// (`FileDescriptorName=`).
const ADMIN_SOCKET: &str = "admin";

/// How the name of a socket ends there on which TLS is spoken.
const TLS_SOCKET: &str = "tls";

/// Who may connect to a Unix socket: our own user and group.
const UNIX_MODE: u32 = 0o660;

/// A socket that is bound. It stays open until the process ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bound {
    /// As configured; port 0 is one that the system chooses.
    pub(super) wanted: Listen,
    /// As bound.
    pub(super) listen: Listen,
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
    fn bind(wanted: &Listen) -> Result<Self> {
        let (at, socket) = match &wanted.at {
            ListenAt::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                (ListenAt::Tcp(listener.local_addr()?), listener.into_raw_fd())
            }
            ListenAt::Unix(path) => (wanted.at.clone(), bind_unix(path)?.into_raw_fd()),
        };
        let listen = Listen { at, tls: wanted.tls };
        Ok(Self { wanted: wanted.clone(), listen, socket, systemds_name: None })
    }

    /// Pingora sets the mode of a Unix socket, and cannot go on where that fails.
    ///
    /// # Errors
    /// When the socket's file is gone, or another user's.
    pub(super) fn check(&self) -> Result<()> {
        let ListenAt::Unix(path) = &self.listen.at else { return Ok(()) };
        let metadata = path.symlink_metadata();
        let metadata = metadata.with_context(|| format!("the file of {} is gone", self.listen))?;
        let own = nix::unistd::geteuid();
        if !own.is_root() && metadata.uid() != own.as_raw() {
            bail!("{} is another user's: set SocketUser= in its unit", self.listen);
        }
        Ok(())
    }

    /// What it is called in Pingora's table of listening descriptors.
    fn key(&self) -> String {
        match &self.listen.at {
            ListenAt::Tcp(address) => address.to_string(),
            ListenAt::Unix(path) => path.to_string_lossy().into_owned(),
        }
    }
}

/// Binds a Unix socket in the place of one that nobody listens on any more.
fn bind_unix(path: &Path) -> Result<UnixListener> {
    let is_socket = path.symlink_metadata().is_ok_and(|it| it.file_type().is_socket());
    if is_socket {
        match UnixStream::connect(path) {
            Ok(_) => bail!("another process listens there"),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error).context("cannot tell whether another process listens"),
        }
        std::fs::remove_file(path).context("cannot remove the old socket")?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(UNIX_MODE))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

impl Inherited {
    /// From the process that this one takes over from: `sockets`; from systemd, what its protocol
    /// says.
    pub(super) fn find(sockets: Vec<Bound>) -> Result<Self> {
        let of_systemd =
            sd_notify::listen_fds_with_names(true).context("systemd's sockets cannot be read")?;
        let mut activated = Vec::new();
        for (socket, name) in of_systemd {
            let at = local_address(socket)
                .with_context(|| format!("systemd's socket {name} has no address of ours"))?;
            // Without FileDescriptorName= the name is that of the unit.
            let tls = name.trim_end_matches(".socket").ends_with(TLS_SOCKET);
            if let (ListenAt::Unix(_), true) = (&at, tls) {
                bail!("systemd's socket {name} is a Unix socket, where no TLS is spoken");
            }
            let listen = Listen { at, tls };
            let systemds_name = Some(name);
            activated.push(Bound { wanted: listen.clone(), listen, socket, systemds_name });
        }
        let (taken_over, sockets): (Vec<_>, _) =
            sockets.into_iter().partition(|bound| bound.systemds_name.is_some());
        activated.extend(taken_over);
        Ok(Self { sockets, activated })
    }

    /// The sockets for traffic.
    pub(super) fn traffic(&mut self, wanted: &[Listen]) -> Result<Vec<Bound>> {
        let activated = self.activated(|name| !name.starts_with(ADMIN_SOCKET));
        if activated.is_empty() { self.bound(wanted) } else { Ok(activated) }
    }

    /// The sockets for status and dashboard.
    pub(super) fn admin(&mut self, wanted: &[Listen]) -> Result<Vec<Bound>> {
        let activated = self.activated(|name| name.starts_with(ADMIN_SOCKET));
        if activated.is_empty() { self.bound(wanted) } else { Ok(activated) }
    }

    fn bound(&mut self, wanted: &[Listen]) -> Result<Vec<Bound>> {
        let mut one =
            |wanted: &Listen| match self.sockets.iter().position(|it| it.wanted.at == wanted.at) {
                Some(at) => {
                    let mut bound = self.sockets.swap_remove(at);
                    bound.listen.tls = wanted.tls;
                    bound.wanted = wanted.clone();
                    Ok(bound)
                }
                None => {
                    Bound::bind(wanted).with_context(|| format!("cannot listen on {}", wanted.at))
                }
            };
        wanted.iter().map(&mut one).collect()
    }

    fn activated(&self, is_wanted: impl Fn(&str) -> bool) -> Vec<Bound> {
        let is_wanted = |bound: &&Bound| bound.systemds_name.as_deref().is_some_and(&is_wanted);
        self.activated.iter().filter(is_wanted).cloned().collect()
    }

    /// Closes what the configuration has no use for.
    pub(super) fn close_rest(self) {
        for Bound { listen, socket, .. } in self.sockets {
            log::info!("no longer listening on {listen}");
            let _ = nix::unistd::close(socket);
        }
    }
}

fn local_address(socket: RawFd) -> Result<ListenAt> {
    let address: SockaddrStorage = getsockname(socket)?;
    if let Some(address) = address.as_sockaddr_in() {
        return Ok(ListenAt::Tcp(SocketAddr::from((address.ip(), address.port()))));
    }
    if let Some(path) = address.as_unix_addr().and_then(UnixAddr::path) {
        return Ok(ListenAt::Unix(path.to_owned()));
    }
    match address.as_sockaddr_in6() {
        Some(address) => Ok(ListenAt::Tcp(SocketAddr::from((address.ip(), address.port())))),
        None => bail!("it is neither one for TCP nor a Unix socket with a path"),
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
            let listener = match &socket.listen.at {
                ListenAt::Tcp(_) => ListenerConfig::tcp(socket.key()),
                ListenAt::Unix(path) => {
                    // Pingora sets the mode again: it stays what it is.
                    let mode = path.metadata().map_or(UNIX_MODE, |it| it.permissions().mode());
                    let permissions = Permissions::from_mode(mode & 0o777);
                    ListenerConfig::uds(socket.key()).permissions(permissions)
                }
            };
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
            for bound in self.sockets.drain(..) {
                // The table owns the descriptor from here on.
                table.add(bound.key(), bound.socket);
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
