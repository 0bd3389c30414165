//! The load: keep-alive clients that send requests as fast as they are answered, and streams.

use std::net::SocketAddr;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

/// Sends load from a runtime of its own.
pub(crate) struct Load {
    executor: Runtime,
    /// A question, and one behind 300 KB of code: as the SDKs for Python send them, the model last.
    small: String,
    stream: String,
    large: String,
}

impl Load {
    pub(crate) fn new() -> Self {
        let body = |content: &str| {
            format!(
                r#"{{"messages":[{{"role":"user","content":"{content}"}}],"max_tokens":16,"model":"m"}}"#
            )
        };
        let code = r#"for line in text.split(\"\n\"):\n    print(line.strip())\n"#.repeat(5_000);
        Self {
            executor: Runtime::new().expect("a runtime"),
            small: body("What is the capital of France?"),
            stream: body("What is the capital of France?").replace("16,", "16,\"stream\":true,"),
            large: body(&code),
        }
    }

    /// Sends `count` small requests over `connections` connections.
    pub(crate) fn requests(&self, to: SocketAddr, path: &str, count: usize, connections: usize) {
        self.send(to, path, &self.small, count, connections);
    }

    /// Sends `count` requests with a long prompt over `connections` connections.
    pub(crate) fn prompts(&self, to: SocketAddr, path: &str, count: usize, connections: usize) {
        self.send(to, path, &self.large, count, connections);
    }

    fn send(&self, to: SocketAddr, path: &str, body: &str, count: usize, connections: usize) {
        let request = request(&format!("{path}/v1/chat/completions"), body);
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
        let target = format!("{path}/v1/stream/{events}/{interval_ms}/chat/completions");
        let request = request(&target, &self.stream);
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

fn request(target: &str, body: &str) -> String {
    format!(
        "POST {target} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer sk-bench\r\nContent-Type: application/json\r\nAccept: application/json\r\nUser-Agent: OpenAI/Python 2.54.0\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
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
