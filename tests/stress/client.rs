//! Clients that check every byte of their answers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::backend::{Backend, EVENTS};
use super::chaos::Tally;

/// Longer than anything may take.
const PATIENCE: Duration = Duration::from_secs(30);

type Connection = BufReader<TcpStream>;

async fn connect(to: SocketAddr) -> std::io::Result<Connection> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(BufReader::new(stream))
}

/// What came back: the status, the headers, and the body as far as it came.
struct Answer {
    status: u16,
    length: Option<usize>,
    keeps: bool,
}

async fn read_head(connection: &mut Connection) -> std::io::Result<Option<Answer>> {
    let mut line = String::new();
    if connection.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let mut answer = Answer { status, length: None, keeps: true };
    loop {
        line.clear();
        if connection.read_line(&mut line).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            return Ok(Some(answer));
        }
        if let Some(length) = line.strip_prefix("content-length: ") {
            answer.length = length.parse().ok();
        }
        answer.keeps &= line != "connection: close";
    }
}

/// Short requests one after the other, twenty to a connection.
pub(crate) async fn short(to: SocketAddr, tally: Arc<Tally>, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::SeqCst) {
        let mut connection = match connect(to).await {
            Ok(connection) => connection,
            Err(error) => {
                tally.fail("request", &format!("connect: {error}"));
                continue;
            }
        };
        for number in 0..20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let exchange = tokio::time::timeout(PATIENCE, one(&mut connection));
            match exchange.await {
                Ok(Ok(Some(keeps))) => {
                    tally.requests.fetch_add(1, Ordering::SeqCst);
                    if !keeps {
                        break;
                    }
                }
                // As every HTTP client does: a kept connection may have been closed meanwhile.
                Ok(Ok(None)) if number > 0 => {
                    tally.reconnects.fetch_add(1, Ordering::SeqCst);
                    break;
                }
                Ok(Ok(None)) => {
                    tally.fail("request", "closed without an answer");
                    break;
                }
                Ok(Err(why)) => {
                    tally.fail("request", &why);
                    break;
                }
                Err(_) => {
                    tally.fail("request", "no answer in time");
                    break;
                }
            }
        }
    }
}

/// One request whose answer is its own body. None: closed before the first byte.
async fn one(connection: &mut Connection) -> Result<Option<bool>, String> {
    let body: Vec<u8> = (0..fastrand::usize(1..40_000)).map(|_| fastrand::u8(..)).collect();
    let head = format!(
        "POST /svc/mdl/v1/echo HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let sent = connection.write_all(&[head.as_bytes(), &body].concat()).await;
    let answer = match read_head(connection).await {
        Ok(Some(answer)) => answer,
        Ok(None) => return Ok(None),
        Err(_) if sent.is_err() => return Ok(None),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let mut back = vec![0; answer.length.unwrap_or(0)];
    connection.read_exact(&mut back).await.map_err(|error| format!("body: {error}"))?;
    if answer.status != 200 {
        return Err(format!("status {}: {}", answer.status, String::from_utf8_lossy(&back)));
    }
    if back == body { Ok(Some(answer.keeps)) } else { Err("another body came back".to_owned()) }
}

/// Streams one after the other.
pub(crate) async fn streams(
    to: SocketAddr,
    backends: Vec<Arc<Backend>>,
    tally: Arc<Tally>,
    stop: Arc<AtomicBool>,
) {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    while !stop.load(Ordering::SeqCst) {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(..200))).await;
        let id = format!("stream-{}", NUMBER.fetch_add(1, Ordering::SeqCst));
        match tokio::time::timeout(PATIENCE, stream(to, &id)).await {
            Ok(Ok(())) => {
                tally.streams.fetch_add(1, Ordering::SeqCst);
            }
            Ok(Err(Broken { after_first_byte: true, is_told: true, .. }))
                if backends.iter().any(|backend| backend.broke(&id)) =>
            {
                tally.excused.fetch_add(1, Ordering::SeqCst);
            }
            Ok(Err(broken)) => tally.fail("stream", &broken.why),
            Err(_) => tally.fail("stream", "no end in time"),
        }
    }
}

/// A stream that is not whole.
pub(crate) struct Broken {
    after_first_byte: bool,
    /// Whether the stream ended with an error event and uncleanly.
    is_told: bool,
    pub(crate) why: String,
}

/// One stream, which is whole and in order.
pub(crate) async fn stream(to: SocketAddr, id: &str) -> Result<(), Broken> {
    let before = |why: String| Broken { after_first_byte: false, is_told: false, why };
    let failed = |error: std::io::Error| before(error.to_string());
    let mut connection = connect(to).await.map_err(failed)?;
    let request = format!(
        "POST /svc/mdl/v1/chat/completions HTTP/1.1\r\nHost: g\r\nX-Request-ID: {id}\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}"
    );
    connection.write_all(request.as_bytes()).await.map_err(failed)?;
    let head = read_head(&mut connection).await.map_err(failed)?;
    let head = head.ok_or_else(|| before("closed without an answer".to_owned()))?;
    if head.status != 200 {
        return Err(before(format!("status {}", head.status)));
    }
    let mut text = String::new();
    let read = connection.read_to_string(&mut text).await;
    let data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let numbers = data.iter().map_while(|data| data.parse::<usize>().ok());
    let in_order = numbers.clone().eq(0..numbers.clone().count());
    let is_whole = numbers.count() == EVENTS && data.last() == Some(&"[DONE]");
    let ends = text.ends_with("0\r\n\r\n");
    if read.is_ok() && in_order && is_whole && ends {
        return Ok(());
    }
    let is_told = in_order && !ends && text.contains("stream_interrupted");
    let why = format!("broken after {} events, in order: {in_order}, told: {is_told}", data.len());
    Err(Broken { after_first_byte: true, is_told, why })
}
