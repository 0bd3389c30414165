//! An upstream that does what the test says, on a real socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use xxhash_rust::xxh3::Xxh3;

use super::{PATIENCE, free_port};

/// A request as the upstream saw it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) method: String,
    /// The request target, raw.
    pub(crate) target: Vec<u8>,
    /// Names as they came, in order.
    pub(crate) headers: Vec<(String, String)>,
    /// The beginning of the body.
    pub(crate) body: Vec<u8>,
    pub(crate) body_bytes: usize,
    /// XXH3 of the whole body.
    pub(crate) hash: u64,
}

/// How much of a body is kept.
const KEPT_BYTES_MAX: usize = 4 * 1024 * 1024;

impl Seen {
    pub(crate) fn target(&self) -> String {
        String::from_utf8_lossy(&self.target).into_owned()
    }

    /// All values of a header, joined; empty when it is not there.
    pub(crate) fn header(&self, name: &str) -> String {
        super::header(&self.headers, name)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.headers.iter().any(|(known, _)| known.eq_ignore_ascii_case(name))
    }
}

/// The way back to the client of one request.
pub(crate) struct Reply {
    stream: TcpStream,
    /// Set while a script is at work; it ends with the first bytes of the answer.
    at_once: Option<Arc<Shared>>,
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.answered();
    }
}

impl Reply {
    /// Sends a whole response; the connection is kept.
    pub(crate) fn send(&mut self, status: u16, headers: &[(&str, &str)], body: &[u8]) {
        let mut head = format!("HTTP/1.1 {status} Scripted\r\nContent-Length: {}\r\n", body.len());
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        self.raw(&[head.as_bytes(), body].concat());
    }

    pub(crate) fn text(&mut self, body: &str) {
        self.send(200, &[("Content-Type", "text/plain")], body.as_bytes());
    }

    /// Begins a chunked response.
    pub(crate) fn begin(&mut self, content_type: &str) {
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        self.raw(head.as_bytes());
    }

    /// Sends one chunk; false when the other side is gone.
    pub(crate) fn chunk(&mut self, data: &[u8]) -> bool {
        let framed = [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat();
        self.stream.write_all(&framed).is_ok()
    }

    pub(crate) fn end(&mut self) {
        self.raw(b"0\r\n\r\n");
    }

    fn answered(&mut self) {
        if let Some(shared) = self.at_once.take() {
            shared.at_once.fetch_sub(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.answered();
        let _ = self.stream.write_all(bytes);
    }

    /// Cuts the connection.
    pub(crate) fn cut(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Waits until the other side closes the connection.
    pub(crate) fn wait_closed(&mut self) -> bool {
        let _ = self.stream.set_read_timeout(Some(PATIENCE));
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => {
                    use std::io::ErrorKind::{TimedOut, WouldBlock};
                    return !matches!(error.kind(), TimedOut | WouldBlock);
                }
            }
        }
    }
}

type Handler = dyn Fn(&Seen, &mut Reply) + Send + Sync;

struct Shared {
    handler: Box<Handler>,
    seen: Mutex<Vec<Seen>>,
    checks: AtomicUsize,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
    healthy: AtomicBool,
    down: AtomicBool,
    connections: Mutex<Vec<TcpStream>>,
}

/// The upstream. It answers health checks at `.../health` itself and gives every other request to the script.
pub(crate) struct Upstream {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Upstream {
    /// An upstream that answers every request with `name`.
    pub(crate) fn named(name: &'static str) -> Self {
        Self::start(move |_, reply| reply.text(name))
    }

    /// One whose answers tell their usage: 100 tokens of input and 50 of output.
    pub(crate) fn metered() -> Self {
        Self::start(|_, reply| {
            let body = br#"{"choices":[{}],"usage":{"prompt_tokens":100,"completion_tokens":50}}"#;
            reply.send(200, &[("Content-Type", "application/json")], body);
        })
    }

    pub(crate) fn start(handler: impl Fn(&Seen, &mut Reply) + Send + Sync + 'static) -> Self {
        // One of its own also while it is down: nobody else is to answer in its place.
        let listener = TcpListener::bind(("127.0.0.1", free_port())).expect("a free port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            handler: Box::new(handler),
            seen: Mutex::default(),
            checks: AtomicUsize::new(0),
            at_once: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
            healthy: AtomicBool::new(true),
            down: AtomicBool::new(false),
            connections: Mutex::default(),
        });
        let accepting = Some(accept(listener, Arc::clone(&shared)));
        Self { address, shared, accepting }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Requests seen so far, health checks left out.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().expect("no test panicked with it").clone()
    }

    #[track_caller]
    pub(crate) fn last(&self) -> Seen {
        self.seen().pop().expect("the upstream saw a request")
    }

    /// Health checks seen so far.
    pub(crate) fn checks(&self) -> usize {
        self.shared.checks.load(Ordering::SeqCst)
    }

    /// The most requests that were at work at one time.
    pub(crate) fn most_at_once(&self) -> usize {
        self.shared.most_at_once.load(Ordering::SeqCst)
    }

    pub(crate) fn set_healthy(&self, healthy: bool) {
        self.shared.healthy.store(healthy, Ordering::SeqCst);
    }

    /// Closes the listening socket and cuts every connection, as a crash would.
    pub(crate) fn kill(&mut self) {
        self.shared.down.store(true, Ordering::SeqCst);
        // Wakes the accept loop.
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            accepting.join().expect("the accept loop ends");
        }
        for connection in
            self.shared.connections.lock().expect("no test panicked with it").drain(..)
        {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Listens on the same port again.
    pub(crate) fn restart(&mut self) {
        let listener = TcpListener::bind(self.address).expect("the port is still free");
        self.shared.down.store(false, Ordering::SeqCst);
        self.accepting = Some(accept(listener, Arc::clone(&self.shared)));
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.kill();
    }
}

fn accept(listener: TcpListener, shared: Arc<Shared>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            if shared.down.load(Ordering::SeqCst) {
                return;
            }
            let Ok(stream) = stream else { continue };
            let _ = stream.set_nodelay(true);
            let _ = stream.set_read_timeout(Some(Duration::from_secs(60)));
            if let Ok(copy) = stream.try_clone() {
                shared.connections.lock().expect("no test panicked with it").push(copy);
            }
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || serve(stream, &shared));
        }
    })
}

fn serve(stream: TcpStream, shared: &Arc<Shared>) {
    let mut reader = BufReader::new(stream.try_clone().expect("a socket can be cloned"));
    while let Some(seen) = read_request(&mut reader) {
        let Ok(stream) = stream.try_clone() else { return };
        let mut reply = Reply { stream, at_once: None };
        let is_check = seen.header("user-agent").starts_with("tollgate/");
        if is_check {
            shared.checks.fetch_add(1, Ordering::SeqCst);
        }
        if is_check && seen.target.ends_with(b"/health") {
            let status = if shared.healthy.load(Ordering::SeqCst) { 200 } else { 503 };
            reply.send(status, &[], b"{}");
            continue;
        }
        shared.seen.lock().expect("no test panicked with it").push(seen.clone());
        let at_once = shared.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        shared.most_at_once.fetch_max(at_once, Ordering::SeqCst);
        reply.at_once = Some(Arc::clone(shared));
        (shared.handler)(&seen, &mut reply);
    }
}

fn read_request(reader: &mut BufReader<TcpStream>) -> Option<Seen> {
    let mut line = Vec::new();
    reader.read_until(b'\n', &mut line).ok().filter(|bytes| *bytes > 0)?;
    let mut parts = line.split(|byte| *byte == b' ');
    let method = String::from_utf8_lossy(parts.next()?).into_owned();
    let mut seen = Seen { method, target: parts.next()?.to_vec(), ..Seen::default() };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|bytes| *bytes > 0)?;
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        seen.headers.push((name.to_owned(), value.trim().to_owned()));
    }
    let mut hasher = Xxh3::new();
    if seen.header("transfer-encoding").eq_ignore_ascii_case("chunked") {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).ok()?;
            let size = usize::from_str_radix(size.trim(), 16).ok()?;
            read_body(reader, size, &mut seen, &mut hasher)?;
            let mut end = String::new();
            reader.read_line(&mut end).ok()?;
            if size == 0 {
                break;
            }
        }
    } else if let Ok(length) = seen.header("content-length").parse() {
        read_body(reader, length, &mut seen, &mut hasher)?;
    }
    seen.hash = hasher.digest();
    Some(seen)
}

fn read_body(
    reader: &mut BufReader<TcpStream>,
    bytes: usize,
    seen: &mut Seen,
    hasher: &mut Xxh3,
) -> Option<()> {
    let mut left = bytes;
    let mut buffer = vec![0; 64 * 1024];
    while left > 0 {
        let want = left.min(buffer.len());
        let read = reader.read(&mut buffer[..want]).ok().filter(|read| *read > 0)?;
        let keep = KEPT_BYTES_MAX.saturating_sub(seen.body.len()).min(read);
        seen.body.extend_from_slice(&buffer[..keep]);
        hasher.update(&buffer[..read]);
        seen.body_bytes += read;
        left -= read;
    }
    Some(())
}

/// Gives each connection to a script, without reading anything; returns the URL.
pub(crate) fn raw_upstream(script: impl Fn(TcpStream) + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    let script = Arc::new(script);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.set_nodelay(true);
            let script = Arc::clone(&script);
            std::thread::spawn(move || script(stream));
        }
    });
    format!("http://{address}")
}

/// Reads a request head and returns it, with what came of the body.
pub(crate) fn read_head(stream: &mut TcpStream) -> Vec<u8> {
    let mut head = Vec::new();
    let mut buffer = [0; 4096];
    while !head.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        match stream.read(&mut buffer) {
            Ok(read @ 1..) => head.extend_from_slice(&buffer[..read]),
            _ => break,
        }
    }
    head
}

/// A port where connections are neither taken nor refused: the system answers no SYN.
pub(crate) struct BlackHole {
    pub(crate) address: SocketAddr,
    _listening: socket2::Socket,
    _waiting: Vec<TcpStream>,
}

impl BlackHole {
    pub(crate) fn open() -> Self {
        use socket2::{Domain, Socket, Type};
        let listening = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        listening.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a free port");
        // A backlog of one, which is filled.
        listening.listen(0).expect("it listens");
        let address = listening.local_addr().expect("an address").as_socket().expect("of TCP");
        let mut waiting = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
            waiting.push(stream);
        }
        Self { address, _listening: listening, _waiting: waiting }
    }
}
