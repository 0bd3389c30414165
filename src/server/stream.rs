//! A client's connection, as Pingora reads from it and writes to it.
//!
//! Nothing is held for reading: heads and bodies are read into buffers of their own.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use async_trait::async_trait;
use bytes::BytesMut;
use pingora_core::protocols::l4::socket::SocketAddr as PeerAddress;
use pingora_core::protocols::raw_connect::ProxyDigest;
use pingora_core::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl,
    TimingDigest, UniqueID, UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};

use super::sending::{Sending, WriteHalf};

/// A connection that was accepted; calls on it do not wait.
#[derive(Debug)]
pub(super) enum Accepted {
    Tcp(std::net::TcpStream, SocketAddr),
    Unix(std::os::unix::net::UnixStream),
}

/// It, at work. It belongs to the runtime in which it was made.
#[derive(Debug)]
pub(super) struct ClientStream {
    socket: ReadHalf,
    /// What was looked at and is still to be read.
    seen: BytesMut,
    sending: Arc<Sending>,
    digest: Arc<SocketDigest>,
}

#[derive(Debug)]
enum ReadHalf {
    Tcp(tcp::OwnedReadHalf),
    Unix(unix::OwnedReadHalf),
}

impl ClientStream {
    /// # Errors
    /// When the system has no more room to watch it, or it is broken already.
    pub(super) fn new(accepted: Accepted) -> io::Result<Self> {
        let (socket, sending, address) = match accepted {
            Accepted::Tcp(stream, address) => {
                stream.set_nodelay(true)?;
                let (read, write) = TcpStream::from_std(stream)?.into_split();
                (ReadHalf::Tcp(read), WriteHalf::Tcp(write), Some(PeerAddress::Inet(address)))
            }
            Accepted::Unix(stream) => {
                let (read, write) = UnixStream::from_std(stream)?.into_split();
                (ReadHalf::Unix(read), WriteHalf::Unix(write), None)
            }
        };
        let digest = SocketDigest::from_raw_fd(socket.as_raw_fd());
        // Set once: it is new.
        let _ = digest.peer_addr.set(address);
        let sending = Arc::new(Sending::over(sending));
        Ok(Self { socket, seen: BytesMut::new(), sending, digest: Arc::new(digest) })
    }

    /// What is written to it, for whoever polls the task that it is served in.
    pub(super) fn sending(&self) -> Arc<Sending> {
        Arc::clone(&self.sending)
    }

    /// The address that the client has connected to.
    pub(super) fn local_address(&self) -> Option<SocketAddr> {
        self.digest.local_addr().and_then(|address| address.as_inet().copied())
    }

    /// The client's address; none on a Unix socket.
    pub(super) fn peer_address(&self) -> Option<SocketAddr> {
        self.digest.peer_addr().and_then(|address| address.as_inet().copied())
    }

    /// Waits for as many bytes as `buffer` holds and shows them; they are read again.
    ///
    /// # Errors
    /// When the connection ends before.
    pub(super) async fn look(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        while self.seen.len() < buffer.len() {
            let mut more = [0; 64];
            let room = (buffer.len() - self.seen.len()).min(more.len());
            let mut more = ReadBuf::new(&mut more[..room]);
            let socket = &mut self.socket;
            std::future::poll_fn(|context| socket.poll_read(context, &mut more)).await?;
            if more.filled().is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.seen.extend_from_slice(more.filled());
        }
        buffer.copy_from_slice(&self.seen[..buffer.len()]);
        Ok(())
    }
}

impl ReadHalf {
    fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(half) => Pin::new(half).poll_read(context, buffer),
            Self::Unix(half) => Pin::new(half).poll_read(context, buffer),
        }
    }
}

impl AsRawFd for ReadHalf {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Tcp(half) => half.as_ref().as_raw_fd(),
            Self::Unix(half) => half.as_ref().as_raw_fd(),
        }
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.seen.is_empty() {
            return self.socket.poll_read(context, buffer);
        }
        let taken = self.seen.len().min(buffer.remaining());
        buffer.put_slice(&self.seen.split_to(taken));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.sending.poll_write(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.sending.poll_write(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.sending.poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.sending.poll_shutdown(context)
    }
}

/// What was written is sent also where the answer ends before it is flushed.
impl Drop for ClientStream {
    fn drop(&mut self) {
        self.sending.end();
    }
}

impl UniqueID for ClientStream {
    fn id(&self) -> UniqueIDType {
        self.socket.as_raw_fd()
    }
}

impl Ssl for ClientStream {}

#[async_trait]
impl Peek for ClientStream {
    async fn try_peek(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        self.look(buffer).await.map(|()| true)
    }
}

#[async_trait]
impl Shutdown for ClientStream {
    async fn shutdown(&mut self) {
        if let Err(error) = AsyncWriteExt::shutdown(self).await {
            log::debug!("a connection did not end well: {error}");
        }
    }
}

impl GetTimingDigest for ClientStream {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for ClientStream {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for ClientStream {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        Some(Arc::clone(&self.digest))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn what_was_looked_at_is_read_again() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        for end in [&ours, &theirs] {
            end.set_nonblocking(true).unwrap();
        }
        let mut ours = ClientStream::new(Accepted::Unix(ours)).unwrap();
        let mut theirs = UnixStream::from_std(theirs).unwrap();
        theirs.write_all(b"PRI *").await.unwrap();
        let (mut one, mut all) = ([0; 3], [0; 5]);
        ours.look(&mut one).await.unwrap();
        ours.look(&mut all).await.unwrap();
        assert_eq!((&one, &all), (b"PRI", b"PRI *"));
        theirs.write_all(b" HTTP").await.unwrap();
        let mut read = [0; 10];
        ours.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"PRI * HTTP");
        drop(theirs);
        assert!(ours.look(&mut one).await.is_err());
    }
}
