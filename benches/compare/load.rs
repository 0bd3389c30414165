//! The load: keep-alive clients that send requests as fast as they are answered, and streams.

use std::net::SocketAddr;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

const BODY: &str = r#"{"model":"m","messages":[{"role":"user","content":"What is the capital of France?"}],"max_tokens":16}"#;

/// Sends load from a runtime of its own.
pub(crate) struct Load {
    executor: Runtime,
}

impl Load {
    pub(crate) fn new() -> Self {
        Self { executor: Runtime::new().expect("a runtime") }
    }

    /// Sends `count` requests over `connections` connections.
    pub(crate) fn requests(&self, to: SocketAddr, path: &str, count: usize, connections: usize) {
        let request = request(&format!("{path}/v1/chat/completions"));
        self.run(connections, |_| {
            let request = request.clone();
            async move {
                let mut stream = connect(to).await;
                for _ in 0..count / connections {
                    stream
                        .get_mut()
                        .write_all(request.as_bytes())
                        .await
                        .expect("it takes requests");
                    read_answer(&mut stream).await;
                }
            }
        });
    }

    /// Opens `streams` streams at once and reads them to their ends.
    pub(crate) fn streams(
        &self,
        to: SocketAddr,
        path: &str,
        streams: usize,
        events: usize,
        interval_ms: u64,
    ) {
        let request = request(&format!("{path}/stream/{events}/{interval_ms}"));
        self.run(streams, |_| {
            let request = request.clone();
            async move {
                let mut stream = connect(to).await;
                stream.get_mut().write_all(request.as_bytes()).await.expect("it takes requests");
                let bytes = read_answer(&mut stream).await;
                assert!(bytes > events * 100, "the stream was cut");
            }
        });
    }

    fn run<F: Future<Output = ()> + Send + 'static>(
        &self,
        tasks: usize,
        task: impl Fn(usize) -> F,
    ) {
        self.executor.block_on(async {
            let mut set = JoinSet::new();
            for number in 0..tasks {
                set.spawn(task(number));
            }
            while let Some(done) = set.join_next().await {
                done.expect("every client is served");
            }
        });
    }
}

fn request(target: &str) -> String {
    format!(
        "POST {target} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer sk-bench\r\nContent-Type: application/json\r\nAccept: application/json\r\nUser-Agent: OpenAI/Python 2.54.0\r\nContent-Length: {}\r\n\r\n{BODY}",
        BODY.len()
    )
}

async fn connect(to: SocketAddr) -> BufReader<TcpStream> {
    let stream = TcpStream::connect(to).await.expect("the proxy accepts");
    stream.set_nodelay(true).expect("no delay");
    BufReader::new(stream)
}

/// Reads one answer and returns the bytes of its body.
async fn read_answer(stream: &mut BufReader<TcpStream>) -> usize {
    let mut line = String::new();
    stream.read_line(&mut line).await.expect("a status line");
    assert!(line.contains(" 200 "), "{line:?}");
    let (mut length, mut chunked) = (0, false);
    loop {
        line.clear();
        stream.read_line(&mut line).await.expect("a header");
        let header = line.trim_end().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
        chunked |= header.starts_with("transfer-encoding:");
    }
    let mut body = vec![0; length];
    if !chunked {
        stream.read_exact(&mut body).await.expect("a body");
        return length;
    }
    let mut bytes = 0;
    loop {
        line.clear();
        stream.read_line(&mut line).await.expect("a chunk");
        let size = usize::from_str_radix(line.trim(), 16).expect("a chunk's size");
        body.resize(size + 2, 0);
        stream.read_exact(&mut body).await.expect("a chunk");
        bytes += size;
        if size == 0 {
            return bytes;
        }
    }
}
