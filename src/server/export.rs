//! Sends spans to who keeps traces, some seconds' worth at a time.

use std::sync::Arc;
use std::time::Duration;

use pingora_core::connectors::http::Connector;
use url::Position;

use super::fetch;
use crate::runtime::Current;
use crate::telemetry::Telemetry;

/// How often what waits is sent, though it is not much.
const SEND_EVERY: Duration = Duration::from_secs(2);

/// Sends what waits before the process ends, within this time. On a thread of its own: who ends the process may be inside
/// an executor.
pub(super) fn send_last(current: &Arc<Current>, telemetry: &Arc<Telemetry>, longest: Duration) {
    let (current, telemetry) = (Arc::clone(current), Arc::clone(telemetry));
    let sending = std::thread::spawn(move || {
        let runtime = current.load();
        let Some(spec) = &runtime.snapshot.observed.traces else { return };
        let Ok(executor) = tokio::runtime::Builder::new_current_thread().enable_all().build()
        else {
            return;
        };
        let all = async {
            let connector = Connector::new(None);
            while let Some((body, count)) = telemetry.spans.take(spec) {
                let sent = fetch::post(&connector, &spec.url, &spec.headers, body).await;
                match sent {
                    Ok(()) => telemetry.spans.sent(count),
                    Err(why) => return log::warn!("the last spans are lost: {why}"),
                }
            }
        };
        if executor.block_on(async { tokio::time::timeout(longest, all).await }).is_err() {
            log::warn!("the last spans are lost: there was no time for them");
        }
    });
    // Had it panicked, it would have said so.
    let _ = sending.join();
}

/// Sends what waits, again and again. What is not taken is lost, and counted: who keeps traces may be away for long. A
/// failure is logged when it begins and when it ends.
pub(super) async fn keep_sending(current: Arc<Current>, telemetry: Arc<Telemetry>) {
    let connector = Connector::new(None);
    let mut failing = false;
    loop {
        tokio::select! {
            () = tokio::time::sleep(SEND_EVERY) => {}
            () = telemetry.spans.many() => {}
        }
        let runtime = current.load_full();
        let Some(spec) = &runtime.snapshot.observed.traces else { continue };
        while let Some((body, count)) = telemetry.spans.take(spec) {
            // Without a query, which may hold a key.
            let url = &spec.url[..Position::AfterPath];
            match fetch::post(&connector, &spec.url, &spec.headers, body).await {
                Ok(()) => {
                    telemetry.spans.sent(count);
                    if failing {
                        log::info!("{url}: takes spans again");
                    }
                    failing = false;
                }
                Err(why) => {
                    telemetry.spans.dropped(count);
                    if !failing {
                        log::error!("{url}: takes no spans, they are lost: {why}");
                    }
                    failing = true;
                    break;
                }
            }
        }
    }
}
