//! What systemd is told, where it supervises us.

use std::net::SocketAddr;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Serving. The process id is told too: after an upgrade it is another one.
pub(super) fn ready() {
    notify(&[NotifyState::MainPid(std::process::id()), NotifyState::Ready]);
}

/// Taking up a new configuration; [`ready`] ends it.
pub(super) fn reloading() {
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        notify(&[NotifyState::Reloading, now]);
    }
}

/// Draining.
pub(super) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Says again and again that we are alive, as long as we are: an answer has to come from `address`.
/// Returns at once where no watchdog waits.
pub(super) async fn keep_watchdog(address: Option<SocketAddr>) {
    // WATCHDOG_PID is not asked: after an upgrade it is the old process's, and systemd watches ours.
    let microseconds = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
    let Some(microseconds) = microseconds.filter(|microseconds| *microseconds > 0) else { return };
    let every = Duration::from_micros(microseconds) / 3;
    loop {
        let answers = match address {
            Some(address) => tokio::time::timeout(every, answers(address)).await,
            None => Ok(Ok(())),
        };
        match answers {
            Ok(Ok(())) => notify(&[NotifyState::Watchdog]),
            Ok(Err(error)) => log::error!("the watchdog gets no answer of our own: {error}"),
            Err(_) => log::error!("the watchdog gets no answer of our own in {every:?}"),
        }
        tokio::time::sleep(every).await;
    }
}

/// Any answer will do: also one that refuses shows that connections are taken and served.
async fn answers(address: SocketAddr) -> std::io::Result<()> {
    let mut address = address;
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    let mut stream = TcpStream::connect(address).await?;
    stream
        .write_all(b"GET /health HTTP/1.1\r\nHost: watchdog\r\nConnection: close\r\n\r\n")
        .await?;
    stream.read_exact(&mut [0]).await.map(|_| ())
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, state) {
        log::warn!("systemd could not be told about the state: {error}");
    }
}
