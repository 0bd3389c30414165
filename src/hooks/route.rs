//! Requests that go to another model than the one that they name, or to another one, too: a canary, a trial, or the better
//! one for whoever asks.

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::{OnRoute, RequestHead};

/// Sends a share of requests to another model.
pub struct Route {
    /// `service/model`.
    pub to: Arc<str>,
    /// The share, 0 to 1.
    pub share: f64,
    /// Who stays together.
    pub by: By,
}

/// Whose requests are all sent the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// Each is on its own.
    Request,
    /// Those of a key; without one, those of an address.
    Key,
}

impl OnRoute for Route {
    fn route(&self, head: &RequestHead<'_>) -> Option<Arc<str>> {
        let place = match self.by {
            By::Request => fastrand::f64(),
            By::Key => {
                let request = head.request;
                let address = request.address.map(|address| address.to_string());
                let of_address = || address.unwrap_or_default();
                let key = Some(request.key_id.to_owned()).filter(|key| !key.is_empty());
                let key = key.unwrap_or_else(of_address);
                // With the model: who is among the first of one is not among the first of all.
                place(xxh3_64(format!("{key} {}", self.to).as_bytes()))
            }
        };
        (place < self.share).then(|| Arc::clone(&self.to))
    }
}

/// A hash as a number from 0 to 1.
#[allow(clippy::cast_precision_loss, reason = "53 bits tell shares apart")]
fn place(hash: u64) -> f64 {
    (hash >> 11) as f64 / (1_u64 << 53) as f64
}
