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

/// Looks at what is to be read.
pub(super) fn peek(socket: RawFd) -> Peek {
    match recv(socket, &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(0) => Peek::End,
        Ok(_) => Peek::Bytes,
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => Peek::Nothing,
        Err(_) => Peek::Gone,
    }
}

/// Whether the other side has closed, also behind bytes that were not read: with TLS it says so in bytes of
/// its own before.
pub(super) fn has_closed(socket: RawFd) -> std::io::Result<bool> {
    let mut poll = Poll::new()?;
    poll.registry().register(&mut SourceFd(&socket), Token(0), Interest::READABLE)?;
    let mut events = Events::with_capacity(1);
    poll.poll(&mut events, Some(Duration::ZERO))?;
    Ok(events.iter().any(|event| event.is_read_closed() || event.is_error()))
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
