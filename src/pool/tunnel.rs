//! A connection for a WebSocket, from which nothing is read before the request is known to be complete.
//!
//! Pingora tells the half of an exchange that talks to the backend that the request is complete, and
//! takes that for the end of the tunnel where the backend has agreed to one by then. So the answer is let
//! through only after that half has heard it.

use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::task::{Context, Poll};

use pingora_core::protocols::l4::stream::Stream as L4Stream;
use pingora_core::protocols::l4::virt::{VirtualSockOpt, VirtualSocket, VirtualSocketStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// Whether a connection is read from. Open at first, for the handshake of TLS.
#[derive(Debug, Default)]
pub struct Gate {
    state: AtomicU8,
    /// The connection's descriptor, plus 1; 0: there is none yet.
    socket: AtomicI32,
}

const OPEN: u8 = 0;
const CLOSED: u8 = 1;
/// It is told, in this poll of the exchange, that the request is complete.
const TOLD: u8 = 2;
/// It hears it before the next read.
const HEARD: u8 = 3;

impl Gate {
    /// The request is about to be sent.
    pub fn close(&self) {
        self.state.store(CLOSED, Ordering::Relaxed);
    }

    /// The request is complete: the half that reads is told so at once.
    pub fn request_ended(&self) {
        let _ = self.state.compare_exchange(CLOSED, TOLD, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The connection's descriptor; below 0: there is none.
    #[must_use]
    pub fn socket(&self) -> RawFd {
        self.socket.load(Ordering::Relaxed) - 1
    }

    /// Whether it may be read now. Where it is not, the task is woken if nobody else will do it.
    fn lets(&self, context: &Context<'_>) -> bool {
        match self.state.load(Ordering::Relaxed) {
            CLOSED => false,
            TOLD => {
                // What it was told is there, and is taken before the next poll.
                self.state.store(HEARD, Ordering::Relaxed);
                context.waker().wake_by_ref();
                false
            }
            _ => {
                self.state.store(OPEN, Ordering::Relaxed);
                true
            }
        }
    }
}

/// A socket behind a gate.
#[derive(Debug)]
struct Gated<S> {
    socket: S,
    gate: Arc<Gate>,
}

/// A connection behind a gate.
pub(super) fn gated<S: Socket>(socket: S, gate: &Arc<Gate>) -> L4Stream {
    gate.socket.store(socket.as_raw_fd() + 1, Ordering::Relaxed);
    let gated = Gated { socket, gate: Arc::clone(gate) };
    VirtualSocketStream::new(Box::new(gated)).into()
}

/// What can be behind a gate.
pub(super) trait Socket:
    AsyncRead + AsyncWrite + AsRawFd + Unpin + Send + Sync + std::fmt::Debug + 'static
{
    /// Has small writes sent at once.
    fn set_no_delay(&self) -> std::io::Result<()>;
}

impl Socket for TcpStream {
    fn set_no_delay(&self) -> std::io::Result<()> {
        self.set_nodelay(true)
    }
}

impl Socket for UnixStream {
    fn set_no_delay(&self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<S: Socket> VirtualSocket for Gated<S> {
    fn set_socket_option(&self, option: VirtualSockOpt) -> std::io::Result<()> {
        match option {
            VirtualSockOpt::NoDelay => self.socket.set_no_delay(),
            _ => Ok(()),
        }
    }
}

impl<S: Socket> AsyncRead for Gated<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.gate.lets(context) {
            Pin::new(&mut self.socket).poll_read(context, buffer)
        } else {
            Poll::Pending
        }
    }
}

impl<S: Socket> AsyncWrite for Gated<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn nothing_is_read_between_the_beginning_of_a_request_and_the_poll_after_its_end() {
        let (socket, mut other) = UnixStream::pair().unwrap();
        let gate = Arc::new(Gate::default());
        let mut gated = Gated { socket, gate: Arc::clone(&gate) };
        let mut buffer = [0; 8];
        other.write_all(b"tls").await.unwrap();
        assert_eq!(gated.read(&mut buffer).await.unwrap(), 3);
        gate.close();
        other.write_all(b"agreed").await.unwrap();
        gated.socket.readable().await.unwrap();
        let mut bytes = ReadBuf::new(&mut buffer);
        let mut read = |gated: &mut Gated<UnixStream>| {
            Pin::new(gated).poll_read(&mut Context::from_waker(Waker::noop()), &mut bytes)
        };
        assert!(read(&mut gated).is_pending());
        assert!(read(&mut gated).is_pending());
        gate.request_ended();
        assert!(read(&mut gated).is_pending());
        assert!(read(&mut gated).is_ready());
        assert_eq!(bytes.filled(), b"agreed");
        // A tunnel has an end of its own, which stops nobody.
        gate.request_ended();
        other.write_all(b"x").await.unwrap();
        assert_eq!(gated.read(&mut buffer).await.unwrap(), 1);
    }
}
