//! Crowds that mean no good, and one that does.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// What a crowd of clients does, over and over.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Crowd {
    /// They connect and say nothing.
    Idle,
    /// They send a head, a byte now and then.
    SlowHeads,
    /// They send a body, a byte now and then.
    SlowBodies,
    /// They ask for 64 MiB and take none of it.
    SlowReaders,
    /// They send heads as large as they may be, one after the other.
    LargeHeads,
    /// They send heads that are larger than they may be.
    TooLargeHeads,
    /// They begin HTTP/2 streams and reset each at once (CVE-2023-44487).
    RapidReset,
}

const BYTE_GAP: Duration = Duration::from_millis(500);

impl Crowd {
    /// Has `count` clients at it until what is returned is dropped.
    pub(crate) async fn gather(self, to: SocketAddr, count: usize) -> JoinSet<()> {
        let mut crowd = JoinSet::new();
        for number in 0..count {
            crowd.spawn(async move {
                loop {
                    let _ = self.misbehave(to).await;
                    // Who was thrown out comes back.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            });
            if number % 100 == 99 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        crowd
    }

    async fn misbehave(self, to: SocketAddr) -> std::io::Result<()> {
        let mut stream = TcpStream::connect(to).await?;
        match self {
            Self::Idle => std::future::pending().await,
            Self::SlowHeads => {
                stream.write_all(b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\nX: ").await?;
                drip(&mut stream).await
            }
            Self::SlowBodies => {
                let head = "POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: 100000\r\n\r\n";
                stream.write_all(head.as_bytes()).await?;
                drip(&mut stream).await
            }
            Self::SlowReaders => {
                stream.write_all(b"GET /svc/mdl/big HTTP/1.1\r\nHost: g\r\n\r\n").await?;
                std::future::pending().await
            }
            Self::LargeHeads => loop {
                let head = head_of(200, 250);
                stream.write_all(&head).await?;
                if stream.read(&mut [0; 4096]).await? == 0 {
                    return Ok(());
                }
            },
            Self::TooLargeHeads => {
                stream.write_all(&head_of(4000, 250)).await?;
                while stream.read(&mut [0; 4096]).await? > 0 {}
                Ok(())
            }
            Self::RapidReset => rapid_reset(stream).await,
        }
    }
}

async fn drip(stream: &mut TcpStream) -> std::io::Result<()> {
    loop {
        tokio::time::sleep(BYTE_GAP).await;
        stream.write_all(b"x").await?;
    }
}

fn head_of(headers: usize, length: usize) -> Vec<u8> {
    let mut head = b"GET /svc/mdl/v1/x HTTP/1.1\r\nHost: g\r\n".to_vec();
    for number in 0..headers {
        head.extend(format!("X-{number}: {}\r\n", "a".repeat(length)).as_bytes());
    }
    head.extend(b"\r\n");
    head
}

async fn rapid_reset(stream: TcpStream) -> std::io::Result<()> {
    let frame = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    };
    let mut block = Vec::new();
    for (name, value) in
        [(":method", "GET"), (":scheme", "http"), (":path", "/svc/mdl/v1/x"), (":authority", "g")]
    {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend(text.as_bytes());
        }
    }
    let (mut reader, mut writer) = stream.into_split();
    let reading = async {
        let mut part = [0; 16 * 1024];
        while reader.read(&mut part).await? > 0 {}
        Ok::<(), std::io::Error>(())
    };
    let writing = async {
        writer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
        writer.write_all(&frame(4, 0, 0, &[])).await?;
        let mut number = 1;
        loop {
            let mut burst = Vec::new();
            for _ in 0..100 {
                burst.extend(frame(1, 5, number, &block));
                burst.extend(frame(3, 0, number, &8u32.to_be_bytes()));
                number += 2;
            }
            writer.write_all(&burst).await?;
        }
    };
    tokio::select! {
        done = reading => done,
        done = writing => done,
    }
}

/// What clients saw that mean well.
#[derive(Debug, Default)]
pub(crate) struct Service {
    pub(crate) requests: usize,
    pub(crate) failures: usize,
    pub(crate) median: Duration,
    pub(crate) p99: Duration,
}

const REQUEST: &[u8] =
    b"POST /svc/mdl/v1/echo HTTP/1.1\r\nHost: g\r\nContent-Length: 5\r\n\r\nhello";

/// Sends a small request and reads its answer.
pub(crate) async fn small(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(REQUEST).await?;
    let mut answer = [0; 1024];
    let mut length = 0;
    while !answer[..length].ends_with(b"\r\n\r\nhello") {
        let read = stream.read(&mut answer[length..]).await?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        length += read;
    }
    if answer.starts_with(b"HTTP/1.1 200 ") {
        Ok(())
    } else {
        Err(std::io::ErrorKind::Other.into())
    }
}

/// Four clients that send small requests for this long.
pub(crate) async fn service(to: SocketAddr, time: Duration) -> Service {
    let mut clients = JoinSet::new();
    for _ in 0..4 {
        clients.spawn(async move {
            let until = Instant::now() + time;
            let mut times = Vec::new();
            let mut failures = 0;
            let mut stream = TcpStream::connect(to).await.unwrap();
            while Instant::now() < until {
                let began = Instant::now();
                match tokio::time::timeout(Duration::from_secs(5), small(&mut stream)).await {
                    Ok(Ok(())) => times.push(began.elapsed()),
                    _ => {
                        failures += 1;
                        stream = TcpStream::connect(to).await.unwrap();
                    }
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            (times, failures)
        });
    }
    let mut times = Vec::new();
    let mut service = Service::default();
    while let Some(done) = clients.join_next().await {
        let (some, failures) = done.unwrap();
        times.extend(some);
        service.failures += failures;
    }
    times.sort_unstable();
    service.requests = times.len();
    service.median = times.get(times.len() / 2).copied().unwrap_or_default();
    service.p99 = times.get(times.len() * 99 / 100).copied().unwrap_or_default();
    service
}
