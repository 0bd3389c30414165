//! Sends spans to who keeps traces, some seconds' worth at a time.

use std::sync::Arc;
use std::time::Duration;

use pingora_core::connectors::http::Connector;

use super::fetch;
use crate::runtime::Current;
use crate::telemetry::Telemetry;

/// How often what waits is sent, and how much of it at once.
const SEND_EVERY: Duration = Duration::from_secs(2);
const SPANS_AT_ONCE: usize = 512;

/// Sends what waits, again and again. What is not taken is lost, and counted: who keeps traces may be away for long. A
/// failure is logged when it begins and when it ends.
pub(super) async fn keep_sending(current: Arc<Current>, telemetry: Arc<Telemetry>) {
    let connector = Connector::new(None);
    let mut failing = false;
    loop {
        tokio::time::sleep(SEND_EVERY).await;
        let runtime = current.load_full();
        let Some(spec) = &runtime.snapshot.observed.traces else { continue };
        while let Some((body, count)) = telemetry.spans.take(SPANS_AT_ONCE, spec) {
            let url = &spec.url;
            match fetch::post(&connector, url, &spec.headers, body).await {
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
