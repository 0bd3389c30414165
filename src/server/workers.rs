//! The threads that serve connections, and who gives connections to them.
//!
//! A worker is a thread with a runtime of its own, and with connections of its own to the backends: whatever an
//! exchange waits for wakes the thread that it is on, and no other. (Threads that share their work wake each
//! other several times an exchange, and an idle connection that another thread has opened makes it a part of
//! each event: together a third of the CPU time of a small request.) A connection stays with its worker to its
//! end; it is given to the one with the fewest exchanges in flight, and of those to the one with the fewest
//! connections, so that long streams spread over the cores as they come.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use async_trait::async_trait;
use nix::errno::Errno;
use nix::sys::socket::{Backlog, listen};
use pingora_core::server::{ListenFds, ShutdownWatch};
use pingora_core::services::{ServiceReadyNotifier, ServiceWithDependents};
use tokio::runtime::{Builder, Handle};
use tokio::task::JoinSet;

use super::front::Front;
use super::listen::Bound;
use super::stream::{Accepted, ClientStream};
use crate::lifecycle::{Counted, Gauge, Lifecycle};

/// How long nobody is accepted after the system had no room for another connection.
const PAUSE: Duration = Duration::from_secs(1);

/// Threads beside a worker for what would keep it waiting: its own pages and reports. More of them wait for one another.
const BLOCKING_MAX: usize = 64;

/// A socket that connections are accepted from.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// It, watched by the runtime that this is called on. As many connections wait for it as the system allows
    /// (`net.core.somaxconn`): of a crowd that comes at once, those beyond would try again only after a second.
    fn watched(&self) -> io::Result<Watched> {
        listen(self, Backlog::MAXALLOWABLE)?;
        Ok(match self {
            Self::Tcp(listener) => Watched::Tcp(listener.try_clone()?.try_into()?),
            Self::Unix(listener) => Watched::Unix(listener.try_clone()?.try_into()?),
        })
    }
}

enum Watched {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

impl Watched {
    async fn accept(&self) -> io::Result<Accepted> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                Accepted::Tcp(stream.into_std()?, address)
            }
            Self::Unix(listener) => Accepted::Unix(listener.accept().await?.0.into_std()?),
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// What a worker has to do.
#[derive(Debug, Default)]
pub(super) struct Load {
    /// Its exchanges in flight.
    pub(super) exchanges: Arc<Gauge>,
    connections: Arc<Gauge>,
}

/// The one that has least to do: exchanges take time, connections may.
fn lightest<T>(all: &[T], load: impl Fn(&T) -> &Load) -> Option<&T> {
    all.iter().min_by_key(|one| (load(one).exchanges.count(), load(one).connections.count()))
}

/// One of the threads.
struct Worker {
    executor: Handle,
    front: Arc<Front>,
    load: Arc<Load>,
}

/// The workers of some addresses, as a service of Pingora's: it accepts as long as that runs.
pub(super) struct Workers {
    name: &'static str,
    workers: Arc<[Worker]>,
    sockets: Vec<Bound>,
    lifecycle: Arc<Lifecycle>,
    /// As long as connections are accepted.
    accepts: Option<Counted>,
}

impl Workers {
    /// Starts `count` threads; `front` makes what serves on one of them.
    ///
    /// # Errors
    /// When the system has no room for another thread.
    pub(super) fn start(
        name: &'static str,
        count: usize,
        sockets: Vec<Bound>,
        lifecycle: &Arc<Lifecycle>,
        front: impl Fn(&Arc<Load>) -> Front,
    ) -> Result<Self> {
        let worker = |number: usize| {
            let executor = start_thread(format!("{name}-{number}"))
                .with_context(|| format!("cannot start thread {number} of {count}"))?;
            let load = Arc::new(Load::default());
            Ok(Worker { executor, front: Arc::new(front(&load)), load })
        };
        let workers = (0..count).map(worker).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            name,
            workers: workers.into(),
            sockets,
            lifecycle: Arc::clone(lifecycle),
            accepts: Some(lifecycle.listeners.enter()),
        })
    }
}

/// A thread that does what is spawned on it, to the end of the process.
fn start_thread(name: String) -> io::Result<Handle> {
    let executor =
        Builder::new_current_thread().enable_all().max_blocking_threads(BLOCKING_MAX).build()?;
    let handle = executor.handle().clone();
    std::thread::Builder::new()
        .name(name)
        .spawn(move || executor.block_on(std::future::pending::<()>()))?;
    Ok(handle)
}

/// Accepts connections to the end.
async fn accept(
    listener: Arc<Listener>,
    workers: Arc<[Worker]>,
    lifecycle: Arc<Lifecycle>,
) -> io::Result<()> {
    let listener = listener.watched()?;
    loop {
        match listener.accept().await {
            Ok(accepted) => give(accepted, &workers, &lifecycle),
            Err(error) if is_of_client(&error) => log::debug!("a connection was lost: {error}"),
            Err(error) => {
                log::error!("a connection cannot be accepted: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Whether it is one connection that failed, and not the listening: Linux tells with the next `accept` what has become of one
/// that waited (accept(2), "Error handling"). Nobody else waits for it.
fn is_of_client(error: &io::Error) -> bool {
    use Errno::{
        ECONNABORTED, ECONNRESET, EHOSTDOWN, EHOSTUNREACH, EINTR, ENETDOWN, ENETUNREACH, ENONET,
        ENOPROTOOPT, EOPNOTSUPP, EPERM, EPROTO, ETIMEDOUT,
    };
    let of_client = [
        ECONNABORTED,
        ECONNRESET,
        EHOSTDOWN,
        EHOSTUNREACH,
        EINTR,
        ENETDOWN,
        ENETUNREACH,
        ENONET,
        ENOPROTOOPT,
        EOPNOTSUPP,
        EPERM,
        EPROTO,
        ETIMEDOUT,
    ];
    error.raw_os_error().is_some_and(|number| of_client.contains(&Errno::from_raw(number)))
}

/// Gives a connection to the worker that has least to do.
fn give(accepted: Accepted, workers: &[Worker], lifecycle: &Lifecycle) {
    let Some(worker) = lightest(workers, |worker| &worker.load) else { return };
    let counted = (worker.load.connections.enter(), lifecycle.connections.enter());
    let front = Arc::clone(&worker.front);
    worker.executor.spawn(async move {
        let _counted = counted;
        match ClientStream::new(accepted) {
            Ok(stream) => {
                let (sending, within) = (stream.sending(), front.write_timeout());
                sending.in_turns(within, front.serve(stream)).await;
            }
            Err(error) => log::debug!("a connection was lost as it began: {error}"),
        }
    });
}

#[async_trait]
impl ServiceWithDependents for Workers {
    async fn start_service(
        &mut self,
        _table: Option<ListenFds>,
        mut shutdown: ShutdownWatch,
        _listeners_per_socket: usize,
        ready: ServiceReadyNotifier,
    ) {
        let mut loops = JoinSet::new();
        for bound in self.sockets.drain(..) {
            let (workers, lifecycle) = (Arc::clone(&self.workers), Arc::clone(&self.lifecycle));
            let Bound { place, listener } = bound;
            loops.spawn(async move {
                if let Err(error) = accept(listener, workers, lifecycle).await {
                    log::error!("no connection can be accepted on {}: {error}", place.listen);
                }
            });
        }
        ready.notify_ready();
        // Its sender lives as long as Pingora's server does.
        let _ = shutdown.wait_for(|is_shutdown| *is_shutdown).await;
        loops.shutdown().await;
        self.accepts = None;
        self.lifecycle.parted().await;
        for worker in self.workers.iter() {
            worker.front.part().await;
        }
    }

    fn name(&self) -> &str {
        self.name
    }

    fn threads(&self) -> Option<usize> {
        Some(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_goes_where_fewest_exchanges_are_and_then_where_fewest_connections_are() {
        let loads = [(); 3].map(|()| Load::default());
        let lightest = || {
            let lightest = lightest(&loads, |load| load).unwrap();
            loads.iter().position(|load| std::ptr::eq(load, lightest)).unwrap()
        };
        let mut held = Vec::new();
        // A crowd that has not asked for anything yet is spread.
        for expected in [0, 1, 2, 0, 1, 2] {
            assert_eq!(lightest(), expected);
            held.push(loads[expected].connections.enter());
        }
        let streams = [0, 1].map(|at| loads[at].exchanges.enter());
        held.extend((0..100).map(|_| loads[2].connections.enter()));
        assert_eq!(lightest(), 2, "idle connections weigh less than a stream");
        drop(streams);
        assert_eq!(lightest(), 0);
    }

    #[test]
    fn what_becomes_of_one_connection_keeps_nobody_else_waiting() {
        for (number, is_of_one) in [(104, true), (71, true), (103, true), (24, false), (22, false)]
        {
            let error = io::Error::from_raw_os_error(number);
            assert_eq!(is_of_client(&error), is_of_one, "{error}");
        }
        assert!(!is_of_client(&io::Error::other("?")));
    }
}
