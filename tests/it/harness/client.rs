//! A client that sends exactly the bytes it is given.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};

use bytes::Bytes;

use super::PATIENCE;

/// A response.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answer {
    pub(crate) version: String,
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Whether the body ended as its framing says.
    pub(crate) complete: bool,
}

impl Answer {
    /// All values of a header, joined; empty when it is not there.
    pub(crate) fn header(&self, name: &str) -> String {
        super::header(&self.headers, name)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {:?}", self.text()))
    }
}

/// A connection.
pub(crate) struct Connection {
    reader: BufReader<TcpStream>,
}

impl Connection {
    pub(crate) fn open(to: SocketAddr) -> Self {
        Self::of(TcpStream::connect(to).expect("the gateway accepts"))
    }

    /// Opens a connection from a given loopback address.
    pub(crate) fn open_from(from: IpAddr, to: SocketAddr) -> Self {
        use socket2::{Domain, Socket, Type};
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::new(from, 0).into()).expect("a loopback address can be bound");
        socket.connect(&to.into()).expect("the gateway accepts");
        Self::of(socket.into())
    }

    fn of(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_nodelay(true).expect("no delay");
        Self { reader: BufReader::new(stream) }
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.reader.get_mut().write_all(bytes)
    }

    /// Says that nothing more will be sent.
    pub(crate) fn close_sending(&self) {
        self.reader.get_ref().shutdown(std::net::Shutdown::Write).expect("it is open");
    }

    /// Reads a response head.
    pub(crate) fn read_head(&mut self) -> Option<Answer> {
        let line = self.read_line()?;
        let mut parts = line.split(' ');
        let version = parts.next()?.to_owned();
        let status = parts.next()?.parse().ok()?;
        let mut answer = Answer { version, status, ..Answer::default() };
        loop {
            let line = self.read_line()?;
            if line.is_empty() {
                return Some(answer);
            }
            let (name, value) = line.split_once(':')?;
            answer.headers.push((name.to_owned(), value.trim().to_owned()));
        }
    }

    /// Reads a whole response; `head_only` for those that have no body.
    pub(crate) fn read(&mut self, head_only: bool) -> Option<Answer> {
        let mut answer = self.read_head()?;
        answer.complete = true;
        if head_only || matches!(answer.status, 100..=199 | 204 | 304) {
            return Some(answer);
        }
        if answer.header("transfer-encoding").eq_ignore_ascii_case("chunked") {
            answer.complete = false;
            while let Some(chunk) = self.read_chunk() {
                if chunk.is_empty() {
                    answer.complete = true;
                    break;
                }
                answer.body.extend(chunk);
            }
        } else if let Ok(length) = answer.header("content-length").parse::<u64>() {
            let mut body = Vec::new();
            let read = self.reader.by_ref().take(length).read_to_end(&mut body);
            answer.complete = read.is_ok_and(|read| read as u64 == length);
            answer.body = body;
        } else {
            answer.complete = self.reader.read_to_end(&mut answer.body).is_ok();
        }
        Some(answer)
    }

    /// Reads one chunk; empty is the last one, none a broken stream.
    pub(crate) fn read_chunk(&mut self) -> Option<Vec<u8>> {
        let size = usize::from_str_radix(self.read_line()?.trim(), 16).ok()?;
        let mut data = vec![0; size];
        self.reader.read_exact(&mut data).ok()?;
        self.read_line().filter(String::is_empty)?;
        Some(data)
    }

    /// The rest of the connection's bytes.
    /// Reads so many bytes.
    #[track_caller]
    pub(crate) fn read_bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.reader.read_exact(&mut bytes).expect("as many bytes come");
        bytes
    }

    pub(crate) fn into_body(self) -> impl Read {
        self.reader
    }

    /// Whether the other side closes without another byte.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.reader.read_to_end(&mut rest) {
            Ok(_) => rest.is_empty(),
            Err(error) => {
                use std::io::ErrorKind::{TimedOut, WouldBlock};
                !matches!(error.kind(), TimedOut | WouldBlock)
            }
        }
    }

    fn read_line(&mut self) -> Option<String> {
        let mut line = Vec::new();
        self.reader.read_until(b'\n', &mut line).ok().filter(|bytes| *bytes > 0)?;
        Some(String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned())
    }
}

/// Sends raw bytes on a new connection and reads one response.
#[track_caller]
pub(crate) fn send(to: SocketAddr, request: impl AsRef<[u8]>) -> Answer {
    exchange(Connection::open(to), request.as_ref())
}

/// As [`send`], from a given loopback address.
#[track_caller]
pub(crate) fn send_from(from: IpAddr, to: SocketAddr, request: impl AsRef<[u8]>) -> Answer {
    exchange(Connection::open_from(from, to), request.as_ref())
}

#[track_caller]
fn exchange(mut connection: Connection, request: &[u8]) -> Answer {
    // The gateway may answer and close before it has read everything.
    let _ = connection.write(request);
    let head_only = request.starts_with(b"HEAD ");
    connection.read(head_only).unwrap_or_default()
}

/// `GET path`, with extra header lines.
#[track_caller]
pub(crate) fn get(to: SocketAddr, path: &str, headers: &[&str]) -> Answer {
    let lines: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    send(to, format!("GET {path} HTTP/1.1\r\nHost: gateway\r\n{lines}Connection: close\r\n\r\n"))
}

/// `POST path` with a sized body, with extra header lines.
#[track_caller]
pub(crate) fn post(to: SocketAddr, path: &str, headers: &[&str], body: impl AsRef<[u8]>) -> Answer {
    let lines: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    let body = body.as_ref();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: gateway\r\n{lines}Content-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    send(to, [head.as_bytes(), body].concat())
}

/// An HTTP/2 connection without TLS, on which requests can be sent. It closes when the runtime ends.
pub(crate) async fn http2(to: SocketAddr) -> h2::client::SendRequest<Bytes> {
    let socket = tokio::net::TcpStream::connect(to).await.expect("the gateway accepts");
    socket.set_nodelay(true).expect("no delay");
    let (client, connection) = h2::client::handshake(socket).await.expect("it speaks HTTP/2");
    tokio::spawn(connection);
    client.ready().await.expect("it takes requests")
}
