//! What can be seen of a connection from outside.

use std::os::fd::RawFd;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::socket::{MsgFlags, recv};

/// What is to be read from a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peek {
    Bytes,
    Nothing,
    End,
    Gone,
}

/// The record in which TLS says that nothing more comes (RFC 8446, section 6).
const TLS_ALERT: u8 = 21;

/// Looks at what is to be read. With TLS, that is where the other side says that it closes.
pub(super) fn peek(socket: RawFd, is_tls: bool) -> Peek {
    let mut first = [0];
    match recv(socket, &mut first, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(0) => Peek::End,
        Ok(_) if is_tls && first[0] == TLS_ALERT => Peek::End,
        Ok(_) => Peek::Bytes,
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => Peek::Nothing,
        Err(_) => Peek::Gone,
    }
}

/// Whether a connection has room for what is written to it. It costs some system calls, so it is asked
/// only when something is late.
pub(super) fn takes_more(socket: RawFd) -> std::io::Result<bool> {
    let mut poll = Poll::new()?;
    poll.registry().register(&mut SourceFd(&socket), Token(0), Interest::WRITABLE)?;
    let mut events = Events::with_capacity(1);
    poll.poll(&mut events, Some(Duration::ZERO))?;
    Ok(!events.is_empty())
}
