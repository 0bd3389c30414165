//! A backend that does its work until it is told otherwise.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What a backend does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Well,
    /// Nobody listens, and every connection is cut.
    Dead,
    /// It takes connections and says nothing more.
    Frozen,
    /// It answers 503, and goes on with what it has begun.
    Unavailable,
    /// It resets in the middle of a request's body, and goes on with what it has begun.
    Resetting,
}

impl Mode {
    fn breaks_streams(self) -> bool {
        matches!(self, Self::Dead | Self::Frozen)
    }
}

/// Events of a stream, and the time between two.
pub(crate) const EVENTS: usize = 40;
const GAP: Duration = Duration::from_millis(100);

pub(crate) struct Backend {
    pub(crate) address: SocketAddr,
    mode: watch::Sender<Mode>,
    /// Streams that it is at work on, by request id.
    streaming: Mutex<HashSet<String>>,
    /// Streams that it was at work on when it died or froze.
    broken: Mutex<HashSet<String>>,
}

impl Backend {
    pub(crate) async fn start() -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let backend = Arc::new(Self {
            address,
            mode: watch::Sender::new(Mode::Well),
            streaming: Mutex::default(),
            broken: Mutex::default(),
        });
        tokio::spawn(Arc::clone(&backend).accept(listener));
        backend
    }

    pub(crate) fn set(&self, mode: Mode) {
        // Nobody begins or ends a stream meanwhile.
        let streaming = self.streaming.lock().unwrap();
        self.mode.send_replace(mode);
        if mode.breaks_streams() {
            self.broken.lock().unwrap().extend(streaming.iter().cloned());
        }
    }

    /// Whether the stream of this request was broken here.
    pub(crate) fn broke(&self, request_id: &str) -> bool {
        self.broken.lock().unwrap().contains(request_id)
    }

    async fn accept(self: Arc<Self>, listener: TcpListener) {
        let mut listener = Some(listener);
        let mut mode = self.mode.subscribe();
        loop {
            if *mode.borrow_and_update() == Mode::Dead {
                listener = None;
                mode.changed().await.unwrap();
                continue;
            }
            if listener.is_none() {
                listener = TcpListener::bind(self.address).await.ok();
            }
            let Some(open) = &listener else {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            tokio::select! {
                _ = mode.changed() => {}
                Ok((stream, _)) = open.accept() => {
                    tokio::spawn(Arc::clone(&self).connection(stream));
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream) {
        let mut mode = self.mode.subscribe();
        let serving = Arc::clone(&self).serve(stream);
        tokio::select! {
            _ = serving => {}
            _ = mode.wait_for(|mode| *mode == Mode::Dead) => {}
        }
    }

    fn mode(&self) -> Mode {
        *self.mode.borrow()
    }

    async fn thaw(&self) {
        let _ = self.mode.subscribe().wait_for(|mode| *mode != Mode::Frozen).await;
    }

    async fn serve(self: Arc<Self>, stream: TcpStream) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let mut length = 0;
            let mut request_id = String::new();
            let mut first = String::new();
            if stream.read_line(&mut first).await? == 0 {
                return Ok(());
            }
            loop {
                let mut line = String::new();
                stream.read_line(&mut line).await?;
                let line = line.trim_end().to_ascii_lowercase();
                if line.is_empty() {
                    break;
                }
                if let Some(value) = line.strip_prefix("content-length: ") {
                    length = value.parse().unwrap();
                }
                if let Some(value) = line.strip_prefix("x-request-id: ") {
                    request_id = value.to_owned();
                }
            }
            let mut body = vec![0; length];
            if self.mode() == Mode::Resetting && length > 0 {
                stream.read_exact(&mut body[..length / 2]).await?;
                return Ok(());
            }
            stream.read_exact(&mut body).await?;
            self.thaw().await;
            if self.mode() == Mode::Unavailable {
                let answer = "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n";
                stream.write_all(answer.as_bytes()).await?;
            } else if first.contains("/chat/completions") {
                self.events(&mut stream, &request_id).await?;
            } else if first.contains("/big") {
                let part = vec![0; 1024 * 1024];
                let head =
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 64 * part.len());
                stream.write_all(head.as_bytes()).await?;
                for _ in 0..64 {
                    stream.write_all(&part).await?;
                }
            } else {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
                stream.write_all(&[head.as_bytes(), &body].concat()).await?;
            }
        }
    }

    async fn events(
        &self,
        stream: &mut BufReader<TcpStream>,
        request_id: &str,
    ) -> std::io::Result<()> {
        let _streaming = self.streaming(request_id);
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await?;
        for number in 0..EVENTS {
            let was_frozen = self.mode() == Mode::Frozen;
            self.thaw().await;
            let event = format!("data: {number}\n\n");
            let chunk = format!("{:x}\r\n{event}\r\n", event.len());
            stream.write_all(chunk.as_bytes()).await?;
            if !was_frozen {
                tokio::time::sleep(GAP).await;
            }
        }
        stream.write_all(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n").await?;
        Ok(())
    }

    /// Notes that it is at work on a stream, until dropped.
    fn streaming<'a>(&'a self, request_id: &'a str) -> impl Drop + 'a {
        struct Streaming<'a>(&'a Backend, &'a str);
        impl Drop for Streaming<'_> {
            fn drop(&mut self) {
                self.0.streaming.lock().unwrap().remove(self.1);
            }
        }
        let mut streaming = self.streaming.lock().unwrap();
        streaming.insert(request_id.to_owned());
        if self.mode().breaks_streams() {
            self.broken.lock().unwrap().insert(request_id.to_owned());
        }
        Streaming(self, request_id)
    }
}
