//! Clients for what `wrk` does not measure: streams event by event, a fixed rate, HTTP/2.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::contestant::Contestant;
use super::measure::{Cpu, Figures, PER_SECOND, Times, pause};
use super::upstream::{STAMP, STAMP_DIGITS, now};
use super::wrk;

/// How long memory is given to come back after the last stream.
const AFTER: Duration = Duration::from_secs(6);

/// So many streams are opened at once, so that none waits for others to be accepted.
const OPENED_AT_ONCE: usize = 100;

/// What clients have seen.
#[derive(Default)]
struct Seen {
    first: Times,
    delays: Times,
    whole: Times,
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.first.0.extend(other.first.0);
        self.delays.0.extend(other.delays.0);
        self.whole.0.extend(other.whole.0);
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// Opens so many streams and reads them to their ends, at once.
#[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
pub(crate) fn streams(
    contestant: &Contestant,
    path: &str,
    streams: usize,
    events: usize,
) -> Figures {
    let body = wrk::question().replace("16,", "16,\"stream\":true,");
    let request: Bytes = request(&contestant.path(path), &body).into();
    let address = contestant.address;
    let seen = Arc::new(Mutex::new(Seen::default()));
    let before = contestant.cpu();
    let begun = Instant::now();
    let most_kb = block_on(async {
        let mut set = JoinSet::new();
        for number in 0..streams {
            let (request, seen) = (request.clone(), Arc::clone(&seen));
            set.spawn(async move {
                let own = read_stream(address, &request, events).await;
                seen.lock().expect("no client panics").add(own);
            });
            if number % OPENED_AT_ONCE == OPENED_AT_ONCE - 1 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        let mut most_kb = 0;
        let mut looks = tokio::time::interval(Duration::from_millis(250));
        loop {
            tokio::select! {
                done = set.join_next() => match done {
                    Some(done) => done.expect("every stream is whole"),
                    None => return most_kb,
                },
                _ = looks.tick() => most_kb = most_kb.max(contestant.resident_kb()),
            }
        }
    });
    let took = begun.elapsed();
    contestant.rest();
    let mut seen = std::mem::take(&mut *seen.lock().expect("no client panics"));
    let mut figures = Figures::new();
    let all = (streams * events) as u64;
    if contestant.is_proxy() {
        Cpu::since(contestant.cpu(), before, all, &mut figures);
        let held = most_kb.saturating_sub(contestant.resident_kb_at_start);
        figures.insert("kb_a_stream", held as f64 / streams as f64);
        pause(AFTER);
        figures.insert("mb_after", contestant.resident_kb() as f64 / 1024.0);
    }
    figures.insert(PER_SECOND, all as f64 / took.as_secs_f64());
    figures.insert("first_p50_us", seen.first.at(0.5));
    figures.insert("first_p99_us", seen.first.at(0.99));
    figures.insert("delay_p50_us", seen.delays.at(0.5));
    figures.insert("delay_p99_us", seen.delays.at(0.99));
    figures.insert("delay_max_us", seen.delays.at(1.0));
    figures
}

async fn read_stream(address: SocketAddr, request: &[u8], events: usize) -> Seen {
    let mut stream = connect(address).await;
    let mut seen = Seen::default();
    let asked = Instant::now();
    stream.write_all(request).await.expect("it takes requests");
    let (mut raw, mut text) = (Vec::with_capacity(8 * 1024), Vec::with_capacity(8 * 1024));
    let mut chunks = Chunks::Head;
    loop {
        raw.clear();
        let read = stream.read_buf(&mut raw).await.expect("it can be read");
        assert!(read > 0, "a stream was cut: {}", String::from_utf8_lossy(&text));
        let came = now();
        chunks = chunks.feed(&raw, &mut text);
        let mut looked = 0;
        while let Some(at) = memchr::memmem::find(&text[looked..], STAMP) {
            let begin = looked + at + STAMP.len();
            let Some(digits) = text.get(begin..begin + STAMP_DIGITS) else { break };
            let sent: u64 =
                std::str::from_utf8(digits).ok().and_then(|it| it.parse().ok()).expect("a time");
            if seen.first.0.is_empty() {
                seen.first.0.push(micros(asked.elapsed()));
            }
            seen.delays.0.push(u32::try_from(came.saturating_sub(sent) / 1000).unwrap_or(u32::MAX));
            looked = begin + STAMP_DIGITS;
        }
        if chunks == Chunks::End {
            assert!(seen.delays.0.len() == events, "events were lost");
            return seen;
        }
        // A mark that was cut in two is kept.
        text.drain(..looked.max(text.len().saturating_sub(STAMP.len() + STAMP_DIGITS)));
    }
}

/// Where the reading of an answer in chunks is: proxies cut them anew, also within a mark.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Chunks {
    /// In the head of the answer.
    Head,
    /// In a line with the size of a chunk, so far.
    Size(usize),
    /// So many bytes before the next such line, with the end of this one's.
    Data(usize),
    End,
}

impl Chunks {
    /// Reads on; what is in chunks goes behind the text.
    fn feed(mut self, mut raw: &[u8], text: &mut Vec<u8>) -> Self {
        const LINE_END: usize = b"\r\n".len();
        if self == Self::Head {
            // Heads are short, and come at once.
            let Some(end) = memchr::memmem::find(raw, b"\r\n\r\n") else { return self };
            raw = &raw[end + 2 * LINE_END..];
            self = Self::Size(0);
        }
        while let Some((first, rest)) = raw.split_first() {
            match self {
                Self::Size(size) => {
                    raw = rest;
                    self = match char::from(*first).to_digit(16) {
                        Some(digit) => Self::Size(size * 16 + digit as usize),
                        None if *first == b'\n' && size == 0 => return Self::End,
                        None if *first == b'\n' => Self::Data(size + LINE_END),
                        None => self,
                    };
                }
                Self::Data(left) => {
                    let taken = left.min(raw.len());
                    let inside = left.saturating_sub(LINE_END).min(taken);
                    text.extend_from_slice(&raw[..inside]);
                    raw = &raw[taken..];
                    self = if taken == left { Self::Size(0) } else { Self::Data(left - taken) };
                }
                Self::Head | Self::End => return self,
            }
        }
        self
    }
}

/// Sends requests at a fixed rate, each when it is due, whether the one before it was slow or not; latency counts from
/// when it was due.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "small numbers")]
pub(crate) fn paced(
    contestant: &Contestant,
    path: &str,
    connections: usize,
    per_second: u32,
    seconds: u64,
) -> Figures {
    let request: Bytes = request(&contestant.path(path), &wrk::question()).into();
    let address = contestant.address;
    let every = Duration::from_secs(1) * connections as u32 / per_second;
    let count = u64::from(per_second) * seconds / connections as u64;
    let before = contestant.cpu();
    let mut seen = block_on(async {
        let mut set = JoinSet::new();
        let begin = Instant::now() + Duration::from_millis(100);
        for number in 0..connections {
            let request = request.clone();
            let first = begin + every * number as u32 / connections as u32;
            set.spawn(async move {
                let mut stream = connect(address).await;
                let mut seen = Seen::default();
                let mut buffer = Vec::with_capacity(4096);
                for at in 0..count {
                    let due = first + every * at as u32;
                    tokio::time::sleep_until(due.into()).await;
                    // The timer is late by up to a millisecond: that is nobody's doing.
                    let due = Instant::now();
                    stream.write_all(&request).await.expect("it takes requests");
                    buffer.clear();
                    while !buffer.ends_with(b"}}") {
                        let read = stream.read_buf(&mut buffer).await.expect("it answers");
                        assert!(read > 0, "no answer");
                    }
                    seen.whole.0.push(micros(due.elapsed()));
                }
                seen
            });
        }
        gathered(set).await
    });
    contestant.rest();
    whole(contestant, before, &mut seen, Duration::from_secs(seconds))
}

/// Sends requests as fast as they are answered, so many at once over each connection.
pub(crate) fn http2(
    contestant: &Contestant,
    path: &str,
    connections: usize,
    at_once: usize,
    seconds: u64,
) -> Figures {
    let (address, body) = (contestant.address, Bytes::from(wrk::question()));
    let url = format!("http://{address}{}", contestant.path(path));
    let before = contestant.cpu();
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut seen = block_on(async {
        let mut set = JoinSet::new();
        for _ in 0..connections {
            let (client, connection) =
                h2::client::handshake(connect(address).await).await.expect("it speaks HTTP/2");
            tokio::spawn(connection);
            for _ in 0..at_once {
                let (client, url, body) = (client.clone(), url.clone(), body.clone());
                set.spawn(async move {
                    let mut seen = Seen::default();
                    while Instant::now() < until {
                        let asked = Instant::now();
                        ask(&client, &url, &body).await;
                        seen.whole.0.push(micros(asked.elapsed()));
                    }
                    seen
                });
            }
        }
        gathered(set).await
    });
    contestant.rest();
    whole(contestant, before, &mut seen, Duration::from_secs(seconds))
}

/// What all of them have seen.
async fn gathered(mut set: JoinSet<Seen>) -> Seen {
    let mut all = Seen::default();
    while let Some(own) = set.join_next().await {
        all.add(own.expect("every client is served"));
    }
    all
}

async fn ask(client: &h2::client::SendRequest<Bytes>, url: &str, body: &Bytes) {
    let request = http::Request::post(url)
        .header("content-type", "application/json")
        .header("authorization", "Bearer sk-bench")
        .body(())
        .expect("a request");
    let mut client = client.clone().ready().await.expect("there is room");
    let (answer, mut stream) = client.send_request(request, false).expect("it takes requests");
    stream.send_data(body.clone(), true).expect("it takes a body");
    let mut answer = answer.await.expect("it answers");
    assert!(answer.status().is_success(), "{}", answer.status());
    while let Some(piece) = answer.body_mut().data().await {
        let bytes = piece.expect("the answer is whole").len();
        let _ = answer.body_mut().flow_control().release_capacity(bytes);
    }
}

#[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
fn whole(contestant: &Contestant, before: Cpu, seen: &mut Seen, took: Duration) -> Figures {
    let mut figures = Figures::new();
    let count = seen.whole.0.len() as u64;
    if contestant.is_proxy() {
        Cpu::since(contestant.cpu(), before, count, &mut figures);
    }
    figures.insert(PER_SECOND, count as f64 / took.as_secs_f64());
    for (name, share) in [("p50_us", 0.5), ("p99_us", 0.99), ("p999_us", 0.999)] {
        figures.insert(name, seen.whole.at(share));
    }
    figures
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().expect("a runtime").block_on(work)
}

fn request(target: &str, body: &str) -> String {
    format!(
        "POST {target} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer sk-bench\r\nContent-Type: application/json\r\nAccept: application/json\r\nUser-Agent: OpenAI/Python 2.54.0\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

async fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(to).await.expect("it accepts");
    stream.set_nodelay(true).expect("no delay");
    stream
}
