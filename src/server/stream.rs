//! A client's connection, as Pingora reads from it and writes to it.
//!
//! Small pieces that are written are gathered until they are flushed, so that a head and a short answer, or
//! an event in its chunk, are one system call and one packet; a larger piece goes out together with what was
//! gathered before it. Nothing is held for reading: heads and bodies are read into buffers of their own.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use pingora_core::protocols::l4::socket::SocketAddr as PeerAddress;
use pingora_core::protocols::raw_connect::ProxyDigest;
use pingora_core::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl,
    TimingDigest, UniqueID, UniqueIDType,
};
use smallvec::SmallVec;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// As much is gathered as fits in a packet (an Ethernet frame's 1,500 bytes, less TCP's and IP's heads).
const GATHERED_BYTES_MAX: usize = 1460;

/// Pieces that are written at once at the most: a chunk has three, and one is what was gathered.
const PIECES: usize = 8;

/// A connection that was accepted; calls on it do not wait.
#[derive(Debug)]
pub(super) enum Accepted {
    Tcp(std::net::TcpStream, SocketAddr),
    Unix(std::os::unix::net::UnixStream),
}

/// It, at work. It belongs to the runtime in which it was made.
#[derive(Debug)]
pub(super) struct ClientStream {
    socket: Socket,
    /// What was looked at and is still to be read.
    seen: BytesMut,
    /// What was written and not sent.
    gathered: BytesMut,
    digest: Arc<SocketDigest>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl ClientStream {
    /// # Errors
    /// When the system has no more room to watch it, or it is broken already.
    pub(super) fn new(accepted: Accepted) -> io::Result<Self> {
        let (socket, address) = match accepted {
            Accepted::Tcp(stream, address) => {
                stream.set_nodelay(true)?;
                (Socket::Tcp(TcpStream::from_std(stream)?), Some(PeerAddress::Inet(address)))
            }
            Accepted::Unix(stream) => (Socket::Unix(UnixStream::from_std(stream)?), None),
        };
        let digest = SocketDigest::from_raw_fd(socket.as_raw_fd());
        // Set once: it is new.
        let _ = digest.peer_addr.set(address);
        let (seen, gathered) = (BytesMut::new(), BytesMut::new());
        Ok(Self { socket, seen, gathered, digest: Arc::new(digest) })
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

    /// Sends what was gathered.
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.gathered.is_empty() {
            let sent = ready!(self.socket.poll_write(context, &[IoSlice::new(&self.gathered)]))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.gathered.advance(sent);
        }
        // A connection that is idle holds no memory for what it may write.
        self.gathered = BytesMut::new();
        Poll::Ready(Ok(()))
    }

    /// Sends these pieces behind what was gathered; returns how many of their bytes were taken.
    fn poll_send_with(
        &mut self,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            let before = self.gathered.len();
            let mut all = SmallVec::<[IoSlice<'_>; PIECES]>::new();
            if before > 0 {
                all.push(IoSlice::new(&self.gathered));
            }
            all.extend(pieces.iter().take(PIECES - 1).copied());
            let sent = ready!(self.socket.poll_write(context, &all))?;
            drop(all);
            self.gathered.advance(sent.min(before));
            if sent > before || before == 0 {
                return Poll::Ready(Ok(sent - before));
            }
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
        }
    }
}

impl Socket {
    fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }

    fn poll_write(
        &mut self,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // The system takes one piece at less cost than a list of one.
        match (self, pieces) {
            (Self::Tcp(stream), [piece]) => Pin::new(stream).poll_write(context, piece),
            (Self::Tcp(stream), _) => Pin::new(stream).poll_write_vectored(context, pieces),
            (Self::Unix(stream), _) => Pin::new(stream).poll_write_vectored(context, pieces),
        }
    }

    fn poll_shutdown(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_write(bytes),
            Self::Unix(stream) => stream.try_write(bytes),
        }
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Tcp(stream) => stream.as_raw_fd(),
            Self::Unix(stream) => stream.as_raw_fd(),
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
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
        if self.gathered.len() + bytes > GATHERED_BYTES_MAX {
            return self.poll_send_with(context, pieces);
        }
        for piece in pieces {
            self.gathered.extend_from_slice(piece);
        }
        Poll::Ready(Ok(bytes))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(context))?;
        self.socket.poll_shutdown(context)
    }
}

/// What was written is sent also where the answer ends before it is flushed, as far as there is room for it.
impl Drop for ClientStream {
    fn drop(&mut self) {
        if !self.gathered.is_empty() {
            let _ = self.socket.try_write(&self.gathered);
        }
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
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;

    use super::*;

    fn pair() -> (ClientStream, UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        for end in [&ours, &theirs] {
            end.set_nonblocking(true).unwrap();
        }
        let ours = ClientStream::new(Accepted::Unix(ours)).unwrap();
        (ours, UnixStream::from_std(theirs).unwrap())
    }

    #[tokio::test]
    async fn small_pieces_are_sent_together_when_they_are_flushed() {
        let (mut ours, mut theirs) = pair();
        ours.write_all(b"head ").await.unwrap();
        ours.write_all(b"body").await.unwrap();
        let mut seen = [0; 64];
        let early = tokio::time::timeout(std::time::Duration::ZERO, theirs.read(&mut seen)).await;
        assert!(early.is_err(), "nothing is sent before");
        ours.flush().await.unwrap();
        let read = theirs.read(&mut seen).await.unwrap();
        assert_eq!(&seen[..read], b"head body");
        assert_eq!(ours.gathered.capacity(), 0);
        // What is not flushed is sent when the connection ends.
        ours.write_all(b"end").await.unwrap();
        drop(ours);
        let read = theirs.read(&mut seen).await.unwrap();
        assert_eq!(&seen[..read], b"end");
    }

    #[tokio::test]
    async fn what_was_looked_at_is_read_again() {
        let (mut ours, mut theirs) = pair();
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Also where the other side takes little at a time.
        #[test]
        fn whatever_is_written_comes_in_its_order(
            pieces in prop::collection::vec((0_usize..200_000, any::<bool>()), 1..20),
        ) {
            let executor = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            executor.block_on(async {
                let (mut ours, mut theirs) = pair();
                let mut next = 0_u8;
                let mut expected = Vec::new();
                let pieces: Vec<(Vec<u8>, bool)> = pieces
                    .into_iter()
                    .map(|(length, is_flushed)| {
                        let length = if is_flushed { length % 700 } else { length };
                        let piece: Vec<u8> = (0..length)
                            .map(|_| {
                                next = next.wrapping_mul(31).wrapping_add(7);
                                next
                            })
                            .collect();
                        expected.extend_from_slice(&piece);
                        (piece, is_flushed)
                    })
                    .collect();
                let reading = async {
                    let mut all = Vec::new();
                    let mut buffer = [0; 5_000];
                    loop {
                        let read = theirs.read(&mut buffer).await.unwrap();
                        if read == 0 {
                            return all;
                        }
                        all.extend_from_slice(&buffer[..read]);
                    }
                };
                let writing = async move {
                    for (piece, is_flushed) in pieces {
                        let (one, two) = piece.split_at(piece.len() / 3);
                        let written =
                            ours.write_vectored(&[IoSlice::new(one), IoSlice::new(two)]).await.unwrap();
                        ours.write_all(&piece[written..]).await.unwrap();
                        if is_flushed {
                            ours.flush().await.unwrap();
                        }
                    }
                    ours.flush().await.unwrap();
                };
                let ((), all) = tokio::join!(writing, reading);
                assert!(all == expected);
            });
        }
    }
}
