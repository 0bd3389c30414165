//! A gateway with a hook of its own: models are there at certain hours of the day (UTC) only.
//!
//! ```yaml
//! hooks:
//!   - custom: {hours: {from: 8, to: 18}}
//! ```

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use http::StatusCode;
use serde::Deserialize;
use serde_json::Value;
use tollgate::hooks::{At, HookKind, HookKinds, OnRequestHead, RequestHead, Stop};

/// What is written under `custom: hours:`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Hours {
    from: u64,
    to: u64,
}

impl OnRequestHead for Hours {
    fn request_head(&self, head: &mut RequestHead<'_>) -> Result<(), Stop> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let hour = now.as_secs() / 3600 % 24;
        if (self.from..self.to).contains(&hour) {
            return Ok(());
        }
        let (model, Self { from, to }) = (head.request.model, self);
        Err(Stop::Refuse {
            status: StatusCode::FORBIDDEN,
            code: "out_of_hours",
            message: format!("{model} is there from {from} to {to} o'clock"),
        })
    }
}

struct Kind;

impl HookKind for Kind {
    fn name(&self) -> &'static str {
        "hours"
    }

    fn make(&self, written: Value) -> Result<Vec<At>, String> {
        let hours: Hours = serde_json::from_value(written).map_err(|error| error.to_string())?;
        Ok(vec![At::RequestHead(Box::new(hours))])
    }
}

fn main() -> ExitCode {
    tollgate::cli::run_with(HookKinds::new(vec![Arc::new(Kind)]))
}
