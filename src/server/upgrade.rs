//! Handing over to a new process: it is started with the listening sockets, and once it serves, this
//! one takes no more connections and ends when its exchanges do. No connection is refused meanwhile.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{MsgFlags, send};
use tokio::io::AsyncReadExt;

use super::listen::Bound;

/// Tells the new process which descriptors it has been given.
const VARIABLE: &str = "TOLLGATE_UPGRADE";

/// Longest wait for the new process to serve.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// What a process that takes over has been given.
#[derive(Debug, Default)]
pub(super) struct TakeOver {
    pub(super) sockets: Vec<Bound>,
    /// Where the old process waits for word.
    word: Option<RawFd>,
}

impl TakeOver {
    /// Reads what the old process left, if there is one.
    pub(super) fn of_process() -> Result<Self> {
        match std::env::var(VARIABLE) {
            Ok(text) => {
                Self::parse(&text).with_context(|| format!("{VARIABLE} is not one of ours"))
            }
            Err(_) => Ok(Self::default()),
        }
    }

    /// `word;wanted=address=descriptor;...`
    fn parse(text: &str) -> Result<Self> {
        let mut parts = text.split(';');
        let word = parts.next().context("it is empty")?.parse()?;
        let socket = |part: &str| -> Result<Bound> {
            let mut parts = part.split('=');
            let mut next = || parts.next().context("a part is missing");
            let (wanted, address) = (next()?.parse()?, next()?.parse()?);
            Ok(Bound { wanted, address, socket: next()?.parse()?, is_systemds: false })
        };
        Ok(Self { sockets: parts.map(socket).collect::<Result<_>>()?, word: Some(word) })
    }

    /// Serving: the old process may go.
    pub(super) fn tell_ready(&self) {
        if let Some(word) = self.word {
            if let Err(error) = send(word, b"ready", MsgFlags::MSG_NOSIGNAL) {
                log::error!("the old process does not hear that this one serves: {error}");
            }
            let _ = nix::unistd::close(word);
        }
    }
}

/// Starts the program anew and returns its process id when it serves.
///
/// # Errors
/// When it does not come to serve; it has ended then, and nothing has changed.
pub(super) async fn hand_over(sockets: &[Bound]) -> Result<u32> {
    if sockets.iter().any(|socket| socket.is_systemds) {
        bail!("systemd holds the sockets: restart the unit, no connection is refused meanwhile");
    }
    let (mut child, word) = start(sockets)?;
    let mut word = tokio::net::UnixStream::from_std(word)?;
    let mut told = [0; 5];
    let told = tokio::time::timeout(START_TIMEOUT, word.read_exact(&mut told)).await;
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

/// The new process, and where it gives word.
fn start(sockets: &[Bound]) -> Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair().context("no pair of sockets")?;
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
    ours.set_nonblocking(true)?;
    let mut variable = theirs.as_raw_fd().to_string();
    for Bound { wanted, address, socket, .. } in sockets {
        variable.push_str(&format!(";{wanted}={address}={socket}"));
    }
    let mut arguments = std::env::args_os();
    let program = program(arguments.next())?;
    let child = Command::new(&program)
        .args(arguments)
        .env(VARIABLE, variable)
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
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn what_is_handed_over_is_read_back() {
        let taken = TakeOver::parse("7;0.0.0.0:0=0.0.0.0:4711=5;[::1]:80=[::1]:80=6").unwrap();
        assert_eq!(taken.word, Some(7));
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(taken.sockets.len(), 2);
        assert_eq!(taken.sockets[0].wanted, address("0.0.0.0:0"));
        assert_eq!(taken.sockets[0].address, address("0.0.0.0:4711"));
        assert_eq!(taken.sockets[1].socket, 6);
        proptest::proptest!(|(text: String)| {
            let _ = TakeOver::parse(&text);
        });
        for wrong in ["", "x", "7;", "7;a=b=c", "7;0.0.0.0:0=5"] {
            assert!(TakeOver::parse(wrong).is_err(), "{wrong}");
        }
    }
}
