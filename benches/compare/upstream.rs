//! A fast synthetic LLM server on bare sockets. What it answers is in the path: `/stream/EVENTS/MILLISECONDS/` is SSE,
//! whose events carry the time at which they were sent; `/embeddings` is a megabyte of JSON; `/flaky/` fails once in a
//! hundred times; anything else is a small chat completion.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, TcpStream};

const ANSWER: &str = r#"{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"Hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10}}"#;

const USAGE: &str = "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":100,\"total_tokens\":109}}\n\n";

const DONE: &str = "data: [DONE]\n\n";

/// What stands before the time in an event.
pub(crate) const STAMP: &[u8] = b"\"sent_at\":\"";

/// Digits of the time, in nanoseconds since 1970.
pub(crate) const STAMP_DIGITS: usize = 19;

/// Connections that wait to be accepted.
const WAITING_MAX: u32 = 4096;

/// One request in so many to `/flaky/` fails.
const FLAKY_EVERY: u64 = 100;

/// Serves until the process is ended.
pub(crate) fn serve(address: SocketAddr) {
    let executor = tokio::runtime::Runtime::new().expect("a runtime");
    executor.block_on(async {
        // Proxies open hundreds of connections at once: none of them is to wait for another try.
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("an option");
        socket.bind(address).expect("the port is free");
        let listener = socket.listen(WAITING_MAX).expect("it listens");
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let _ = stream.set_nodelay(true);
            tokio::spawn(connection(stream));
        }
    });
}

/// Now, in nanoseconds since 1970.
pub(crate) fn now() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}

fn event() -> String {
    let stamp = String::from_utf8_lossy(STAMP);
    format!(
        "data: {{\"id\":\"chatcmpl-1\",{stamp}{:019}\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\
         \"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" token\"}},\"finish_reason\":null}}]}}\n\n",
        now()
    )
}

fn embeddings() -> &'static str {
    static ONCE: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| {
        let vector = "-0.012345678,".repeat(1536 * 50);
        let numbers = vector.trim_end_matches(',');
        format!(
            r#"{{"object":"list","data":[{{"object":"embedding","index":0,"embedding":[{numbers}]}}],"model":"m","usage":{{"prompt_tokens":9,"total_tokens":9}}}}"#
        )
    });
    &ONCE
}

async fn connection(stream: TcpStream) -> std::io::Result<()> {
    static FLAKY: AtomicU64 = AtomicU64::new(0);
    let mut stream = BufReader::new(stream);
    let (mut line, mut body) = (String::new(), Vec::new());
    loop {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
        read_body(&mut stream, &mut line, &mut body).await?;
        if let Some((_, shape)) = target.split_once("/stream/") {
            let usage = body.windows(13).any(|window| window == b"include_usage");
            send_stream(stream.get_mut(), shape, usage).await?;
            continue;
        }
        let is_bad = target.contains("/flaky/")
            && FLAKY.fetch_add(1, Ordering::Relaxed).is_multiple_of(FLAKY_EVERY);
        let status = if is_bad { "503 Service Unavailable" } else { "200 OK" };
        let answer = if target.contains("/embeddings") { embeddings() } else { ANSWER };
        let whole = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{answer}",
            answer.len()
        );
        stream.get_mut().write_all(whole.as_bytes()).await?;
    }
}

/// Reads headers and the body behind them: with its length, or in chunks.
async fn read_body(
    stream: &mut BufReader<TcpStream>,
    line: &mut String,
    body: &mut Vec<u8>,
) -> std::io::Result<()> {
    let (mut length, mut is_chunked) = (0, false);
    loop {
        line.clear();
        stream.read_line(line).await?;
        let header = line.trim_end().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        is_chunked |= header.starts_with("transfer-encoding:");
    }
    body.resize(length, 0);
    stream.read_exact(body).await?;
    while is_chunked {
        line.clear();
        stream.read_line(line).await?;
        let size = usize::from_str_radix(line.trim(), 16).unwrap_or(0);
        body.resize(size + 2, 0);
        stream.read_exact(body).await?;
        is_chunked = size > 0;
    }
    Ok(())
}

/// `shape` is `{events}/{milliseconds}/...`.
async fn send_stream(stream: &mut TcpStream, shape: &str, usage: bool) -> std::io::Result<()> {
    let mut numbers = shape.split('/').map(|number| number.parse().unwrap_or(0));
    let (events, interval) = (numbers.next().unwrap_or(1), numbers.next().unwrap_or(0));
    let head =
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    let mut ticks = tokio::time::interval(Duration::from_millis(interval.max(1)));
    for _ in 0..events {
        if interval > 0 {
            ticks.tick().await;
        }
        let event = event();
        stream.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await?;
    }
    let last = if usage { [USAGE, DONE].concat() } else { DONE.to_owned() };
    let last = format!("{:x}\r\n{last}\r\n0\r\n\r\n", last.len());
    stream.write_all(last.as_bytes()).await
}
