//! Handing over to a new process: it is started and given the listening sockets, and once it serves,
//! this one takes no more connections and ends when its exchanges do. No connection is refused
//! meanwhile.
//!
//! The two talk over a pair of sockets. The descriptors go through it (`SCM_RIGHTS`) rather than by
//! inheritance: those that systemd gave us are closed when a program is started.

use std::ffi::OsString;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, send, sendmsg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::json;
use tokio::io::AsyncReadExt;

use super::listen::{self, Bound, Place};
use crate::config::Listen;
use crate::pool::Pool;
use crate::runtime::Runtime;

/// Tells the new process which sockets it is given, and where.
const VARIABLE: &str = "TOLLGATE_UPGRADE";

/// Tells it which backends an operator has taken out of service: pairs of a pool's name and a backend's id, in JSON.
const DRAINED: &str = "TOLLGATE_DRAINED";

/// Linux takes no variable of 128 KiB.
const DRAINED_BYTES_MAX: usize = 120 * 1024;

/// Longest wait for the new process to serve.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// As many descriptors as one message may hold (`SCM_MAX_FD` of Linux).
const SOCKETS_MAX: usize = 253;

/// What a process that takes over has been given.
#[derive(Debug, Default)]
pub(super) struct TakeOver {
    pub(super) sockets: Vec<Bound>,
    /// Where the old process waits for word.
    word: Option<OwnedFd>,
}

impl TakeOver {
    /// Takes what the old process left, if there is one.
    pub(super) fn of_process() -> Result<Self> {
        let Ok(text) = std::env::var(VARIABLE) else { return Ok(Self::default()) };
        let (word, places) =
            parse(&text).with_context(|| format!("{VARIABLE} is not one of ours"))?;
        let word = listen::owned(word).context("the old process gives no sockets")?;
        let given = receive(&word).context("the old process gives no sockets")?;
        if given.len() != places.len() {
            bail!("the old process gives {} sockets and names {}", given.len(), places.len());
        }
        let sockets =
            places.into_iter().zip(given).map(|(place, socket)| Bound::given(place, socket));
        Ok(Self { sockets: sockets.collect::<Result<_>>()?, word: Some(word) })
    }

    /// Takes the backends out of service that the old process had taken out, if there is one.
    pub(super) fn take_drained(&self, runtime: &Runtime) {
        let told = self.word.as_ref().and_then(|_| std::env::var(DRAINED).ok()).unwrap_or_default();
        let drained: Vec<(String, String)> = serde_json::from_str(&told).unwrap_or_default();
        for (pool, id) in drained {
            let (service, model) = pool.split_once('/').unwrap_or_default();
            let backends = runtime.pool(service, model).map(|pool| pool.backends());
            let known = backends.and_then(|all| all.iter().find(|backend| backend.spec.id == id));
            if known.is_some_and(|backend| backend.drain(true)) {
                log::warn!("backend {id} of {pool} is still drained: an operator has asked for it");
            }
        }
    }

    /// Serving: the old process may go.
    pub(super) fn tell_ready(&self) {
        if let Some(word) = &self.word
            && let Err(error) = send(word.as_raw_fd(), b"ready", MsgFlags::MSG_NOSIGNAL)
        {
            log::error!("the old process does not hear that this one serves: {error}");
        }
    }
}

/// What the new process is told in [`DRAINED`].
fn drained(runtime: &Runtime) -> String {
    let of = |pool: &Arc<Pool>| {
        let drained = pool.backends().iter().filter(|backend| backend.is_drained());
        drained.map(|it| (pool.name().to_owned(), it.spec.id.clone())).collect::<Vec<_>>()
    };
    let drained = json!(runtime.pools().flat_map(of).collect::<Vec<_>>()).to_string();
    if drained.len() > DRAINED_BYTES_MAX {
        log::warn!("too many backends are drained to tell the new process: it drains none");
        return String::new();
    }
    drained
}

/// Lines `word`, `wanted=address`, `wanted=address=name of systemd`: where to give word, and the
/// sockets in the order in which they come. A name has no control characters.
fn parse(text: &str) -> Result<(RawFd, Vec<Place>)> {
    let mut parts = text.split('\n');
    let word = parts.next().context("it is empty")?.parse()?;
    let place = |part: &str| -> Result<Place> {
        let mut parts = part.splitn(3, '=');
        let mut address = || -> Result<Listen> {
            let text = parts.next().context("an address is missing")?;
            text.parse().map_err(|why| anyhow!("{text}: {why}"))
        };
        let (wanted, listen) = (address()?, address()?);
        let systemds_name = parts.next().map(ToOwned::to_owned);
        Ok(Place { wanted, listen, systemds_name })
    };
    Ok((word, parts.map(place).collect::<Result<_>>()?))
}

/// What [`parse`] reads.
fn write<'a>(word: RawFd, places: impl IntoIterator<Item = &'a Place>) -> String {
    let mut text = word.to_string();
    for Place { wanted, listen, systemds_name } in places {
        text.push_str(&format!("\n{wanted}={listen}"));
        if let Some(name) = systemds_name {
            text.push_str(&format!("={name}"));
        }
    }
    text
}

/// The descriptors that are sent over `from`, with a byte.
pub(super) fn receive(from: impl AsFd) -> Result<Vec<OwnedFd>> {
    let mut byte = [0];
    let mut byte = [IoSliceMut::new(&mut byte)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut space = RecvAncillaryBuffer::new(&mut space);
    rustix::net::recvmsg(from, &mut byte, &mut space, RecvFlags::CMSG_CLOEXEC)?;
    let mut sockets = Vec::new();
    for part in space.drain() {
        if let RecvAncillaryMessage::ScmRights(given) = part {
            sockets.extend(given);
        }
    }
    Ok(sockets)
}

/// Starts the program anew and returns its process id when it serves. Dropped before, it ends the new
/// process.
///
/// # Errors
/// When it does not come to serve; it has ended then, and nothing has changed.
pub(super) async fn hand_over(sockets: &[Bound], runtime: &Runtime) -> Result<u32> {
    let (mut child, word) = start(sockets, &drained(runtime))?;
    let mut successor = Successor { process: i32::try_from(child.id()).ok() };
    let mut word = tokio::net::UnixStream::from_std(word)?;
    let mut told = [0; 5];
    let told = tokio::time::timeout(START_TIMEOUT, word.read_exact(&mut told)).await;
    successor.process = None;
    if matches!(told, Ok(Ok(_))) {
        return Ok(child.id());
    }
    let _ = child.kill();
    let end = tokio::task::spawn_blocking(move || child.wait()).await;
    match (told, end) {
        (Err(_), _) => bail!("it did not serve within {} s", START_TIMEOUT.as_secs()),
        (_, Ok(Ok(status))) => Err(anyhow!("it ended ({status}); its own lines say why")),
        _ => bail!("it ended"),
    }
}

/// The new process, as long as it is not known to serve.
struct Successor {
    process: Option<i32>,
}

impl Drop for Successor {
    fn drop(&mut self) {
        if let Some(process) = self.process {
            // Not killed: in this moment it may have begun to serve, and drains then.
            let _ = kill(Pid::from_raw(process), Signal::SIGTERM);
        }
    }
}

/// Whether the process that took over from this one ended, and not as it should. True once: it is
/// reaped.
pub(super) fn has_crashed(successor: u32) -> bool {
    let process = Pid::from_raw(i32::try_from(successor).unwrap_or(-1));
    match waitpid(process, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(_, code)) => code != 0,
        Ok(WaitStatus::Signaled(..)) => true,
        _ => false,
    }
}

/// The new process, and where it gives word.
fn start(sockets: &[Bound], drained: &str) -> Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair().context("no pair of sockets")?;
    let descriptors: Vec<RawFd> = sockets.iter().map(|bound| bound.listener.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(b"s")], &rights, MsgFlags::empty(), None)
        .with_context(|| format!("cannot hand over sockets (at most {SOCKETS_MAX})"))?;
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
    ours.set_nonblocking(true)?;
    let mut arguments = std::env::args_os();
    let program = program(arguments.next())?;
    let child = Command::new(&program)
        .args(arguments)
        .env(VARIABLE, write(theirs.as_raw_fd(), sockets.iter().map(|bound| &bound.place)))
        .env(DRAINED, drained)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    Ok((child, ours))
}

/// The program to start: the file that this process was started from, or what is there now.
fn program(zeroth: Option<OsString>) -> Result<PathBuf> {
    let zeroth = PathBuf::from(zeroth.unwrap_or_default());
    if zeroth.is_absolute() {
        return Ok(zeroth);
    }
    let path = std::env::current_exe().context("the program's file is not known")?;
    // A file that was replaced is shown like that.
    let path = path.to_string_lossy();
    Ok(PathBuf::from(path.strip_suffix(" (deleted)").unwrap_or(&path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_handed_over_is_read_back() {
        let bound = |wanted: &str, address: &str, name: Option<&str>| Place {
            wanted: wanted.parse().unwrap(),
            listen: address.parse().unwrap(),
            systemds_name: name.map(ToOwned::to_owned),
        };
        let sockets = [
            bound("0.0.0.0:0", "0.0.0.0:4711", None),
            bound("[::1]:80", "[::1]:80", Some("admin")),
            bound("[::1]:81", "[::1]:81", Some("a=b;c")),
            bound("https://[::1]:82", "https://[::1]:82", None),
            bound("unix:/run/t.sock", "unix:/run/t.sock", None),
        ];
        let (word, read) = parse(&write(7, &sockets)).unwrap();
        assert_eq!((word, &read[..]), (7, &sockets[..]));
        proptest::proptest!(|(text: String)| {
            let _ = parse(&text);
        });
        for wrong in ["", "x", "7\n", "7\na=b", "7\n0.0.0.0:0"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
