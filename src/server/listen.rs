//! Listening sockets: bound before anything starts, so that a busy port is an error at once; or
//! inherited, from systemd or from the process that this one takes over from.

use std::fs::Permissions;
use std::io::{ErrorKind, IoSlice};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, UnixAddr, getsockname, sendmsg};

use super::upgrade;
use super::workers::Listener;
use crate::config::{Listen, ListenAt};

/// How the name of a socket for status and dashboard begins in systemd's unit
/// (`FileDescriptorName=`).
const ADMIN_SOCKET: &str = "admin";

/// How the name of a socket ends there on which TLS is spoken.
const TLS_SOCKET: &str = "tls";

/// Who may connect to a Unix socket: our own user and group.
const UNIX_MODE: u32 = 0o660;

/// A socket that is bound. It stays open until nobody accepts from it, and nobody may have it handed over.
#[derive(Clone, Debug)]
pub(super) struct Bound {
    pub(super) place: Place,
    pub(super) listener: Arc<Listener>,
}

/// Where a socket is bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// As configured; port 0 is one that the system chooses.
    pub(super) wanted: Listen,
    /// As bound.
    pub(super) listen: Listen,
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
        let (at, listener) = match &wanted.at {
            ListenAt::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                (ListenAt::Tcp(listener.local_addr()?), Listener::Tcp(listener))
            }
            ListenAt::Unix(path) => (wanted.at.clone(), Listener::Unix(bind_unix(path)?)),
        };
        let listen = Listen { at, tls: wanted.tls };
        let place = Place { wanted: wanted.clone(), listen, systemds_name: None };
        Ok(Self { place, listener: Arc::new(listener) })
    }

    /// A socket that was bound by somebody else.
    pub(super) fn given(place: Place, socket: OwnedFd) -> Result<Self> {
        let listener = match place.listen.at {
            ListenAt::Tcp(_) => {
                let listener = TcpListener::from(socket);
                listener.set_nonblocking(true)?;
                Listener::Tcp(listener)
            }
            ListenAt::Unix(_) => {
                let listener = UnixListener::from(socket);
                listener.set_nonblocking(true)?;
                Listener::Unix(listener)
            }
        };
        Ok(Self { place, listener: Arc::new(listener) })
    }

    /// Where it listens.
    pub(super) fn listen(&self) -> &Listen {
        &self.place.listen
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
            let place = Place { wanted: listen.clone(), listen, systemds_name: Some(name) };
            activated.push(Bound::given(place, owned(socket)?)?);
        }
        let (taken_over, sockets): (Vec<_>, _) =
            sockets.into_iter().partition(|bound| bound.place.systemds_name.is_some());
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
        let mut one = |wanted: &Listen| match self
            .sockets
            .iter()
            .position(|it| it.place.wanted.at == wanted.at)
        {
            Some(at) => {
                let mut bound = self.sockets.swap_remove(at);
                bound.place.listen.tls = wanted.tls;
                bound.place.wanted = wanted.clone();
                Ok(bound)
            }
            None => Bound::bind(wanted).with_context(|| format!("cannot listen on {}", wanted.at)),
        };
        wanted.iter().map(&mut one).collect()
    }

    fn activated(&self, is_wanted: impl Fn(&str) -> bool) -> Vec<Bound> {
        let is_wanted =
            |bound: &&Bound| bound.place.systemds_name.as_deref().is_some_and(&is_wanted);
        self.activated.iter().filter(is_wanted).cloned().collect()
    }

    /// Closes what the configuration has no use for.
    pub(super) fn close_rest(self) {
        for bound in self.sockets {
            log::info!("no longer listening on {}", bound.listen());
        }
    }
}

/// The socket behind a bare descriptor, which is closed. It is sent to ourselves: what is received is ours, as
/// the types say.
pub(super) fn owned(socket: RawFd) -> Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair().context("no pair of sockets")?;
    let (bytes, rights) = ([IoSlice::new(b"s")], [socket]);
    let rights = [ControlMessage::ScmRights(&rights)];
    sendmsg::<()>(ours.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None)?;
    let received = upgrade::receive(&theirs)?.pop().context("a socket was lost")?;
    let _ = nix::unistd::close(socket);
    Ok(received)
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
