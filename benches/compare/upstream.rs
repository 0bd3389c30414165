//! A fast synthetic LLM server on bare sockets: a small JSON answer, or SSE for `/stream`.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

const ANSWER: &str = r#"{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"Hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10}}"#;

const EVENT: &str = "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"finish_reason\":null}]}\n\n";

const USAGE: &str = "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":100,\"total_tokens\":109}}\n\n";

const DONE: &str = "data: [DONE]\n\n";

/// Serves until the process is ended.
pub(crate) fn serve(address: SocketAddr) {
    let executor = tokio::runtime::Runtime::new().expect("a runtime");
    executor.block_on(async {
        let listener = TcpListener::bind(address).await.expect("the port is free");
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let _ = stream.set_nodelay(true);
            tokio::spawn(connection(stream));
        }
    });
}

async fn connection(stream: TcpStream) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut length = 0;
        loop {
            line.clear();
            stream.read_line(&mut line).await?;
            let header = line.trim_end().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap_or(0);
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        match target.split_once("/stream/") {
            Some((_, shape)) => {
                let usage = body.windows(13).any(|window| window == b"include_usage");
                send_stream(stream.get_mut(), shape, usage).await?;
            }
            None => {
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{ANSWER}",
                    ANSWER.len()
                );
                stream.get_mut().write_all(head.as_bytes()).await?;
            }
        }
    }
}

/// `shape` is `{events}/{milliseconds}/...`.
async fn send_stream(stream: &mut TcpStream, shape: &str, usage: bool) -> std::io::Result<()> {
    let mut numbers = shape.split('/').map(|number| number.parse().unwrap_or(1));
    let (events, interval) = (numbers.next().unwrap_or(1), numbers.next().unwrap_or(1));
    let interval = Duration::from_millis(interval);
    let head =
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    let chunk = format!("{:x}\r\n{EVENT}\r\n", EVENT.len());
    let mut ticks = tokio::time::interval(interval.max(Duration::from_millis(1)));
    for _ in 0..events {
        ticks.tick().await;
        stream.write_all(chunk.as_bytes()).await?;
    }
    let last = if usage { [USAGE, DONE].concat() } else { DONE.to_owned() };
    let last = format!("{:x}\r\n{last}\r\n0\r\n\r\n", last.len());
    stream.write_all(last.as_bytes()).await
}
