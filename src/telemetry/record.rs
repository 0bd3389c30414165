//! What there is to tell of one exchange when it is over. Counters, request log and traces are made of it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rust_decimal::Decimal;

use super::phases::Phases;
use super::trace::Trace;
use crate::hooks::{Notes, Runs};

/// One exchange. Nothing in it is a credential or a query, nor a prompt but in its notes.
#[derive(Debug)]
pub struct Record<'a> {
    /// When its head had come.
    pub began: SystemTime,
    /// The `X-Request-ID`.
    pub request_id: &'a str,
    /// Which trace it belongs to.
    pub trace: &'a Trace,
    /// Whose key it came with: its id and its name.
    pub key: Option<(&'a Arc<str>, &'a Arc<str>)>,
    /// The client.
    pub address: Option<IpAddr>,
    /// The method, where it is one that is known, else `other`.
    pub method: &'static str,
    /// The raw path, without the query.
    pub path: &'a [u8],
    /// The service; empty where it was refused before that was known.
    pub service: &'a str,
    /// The model, by its own name.
    pub model: &'a str,
    /// The last backend that was asked; empty: none.
    pub backend: &'a str,
    /// How often backends were asked.
    pub attempts: u32,
    /// What the client was sent; 0: nothing.
    pub status: u16,
    /// The code of what it was refused with, for what its client did.
    pub refusal: Option<&'static str>,
    /// Which limit refused it.
    pub limit: Option<&'a str>,
    /// What failed, where it was not the client's fault.
    pub fault: Option<&'static str>,
    /// Why, for an operator.
    pub why: Option<String>,
    /// Bytes of the request's body.
    pub bytes_in: u64,
    /// Bytes of the answer's body.
    pub bytes_out: u64,
    /// What was taken, where that was counted.
    pub taken: Option<Taken>,
    /// Where its time went.
    pub phases: &'a Phases,
    /// From the head to the answer's first byte.
    pub first_byte: Option<Duration>,
    /// Whether the answer was a stream.
    pub is_stream: bool,
    /// Whether it was a WebSocket: its time is not that of an answer.
    pub is_tunnel: bool,
    /// Whether the client left before the end.
    pub is_aborted: bool,
    /// Whether it has a line in the request log, if it can.
    pub is_logged: bool,
    /// What came of the cache, where answers of its model are kept: hit, miss or bypass.
    pub cache: Option<&'static str>,
    /// What a backend took for the answer, where that was not asked for this one.
    pub saved: Option<Saved>,
    /// The hooks that ran.
    pub hooks: &'a Runs,
    /// What else the request log is told, by the names of its fields: prompts and answers, where the configuration has them
    /// kept.
    pub notes: &'a Notes,
}

/// What an exchange did not take, because its answer was there.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// Tokens of the prompt.
    pub input: u64,
    /// Tokens of the answer.
    pub output: u64,
    /// What they would have cost, if that is known.
    pub cost: Option<Decimal>,
    /// What that is in.
    pub currency: Arc<str>,
}

/// What an exchange took.
#[derive(Clone, Debug, PartialEq)]
pub struct Taken {
    /// Tokens of the prompt, cached ones included.
    pub input: u64,
    /// Tokens of the answer.
    pub output: u64,
    /// Of those of the prompt, read from a cache.
    pub cached: u64,
    /// Whether they were counted here, because the backend did not tell.
    pub is_estimated: bool,
    /// What they cost, if that is known.
    pub cost: Option<Decimal>,
    /// What the cost is in.
    pub currency: Arc<str>,
    /// What ended the answer before nobody got all of it.
    pub wasted_by: Option<&'static str>,
}

impl Record<'_> {
    /// The id of the key; empty: none was needed, or none came.
    #[must_use]
    pub fn key_id(&self) -> &str {
        self.key.map_or("", |(id, _)| id)
    }

    /// Whether a backend answered it, and well: then its times are those of an answer.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        let is_well = (200..400).contains(&self.status);
        is_well && self.attempts > 0 && self.fault.is_none() && !self.is_tunnel
    }

    /// Its whole time.
    #[must_use]
    pub fn duration(&self) -> Duration {
        self.phases.total()
    }

    /// Of a stream: the time of each token after the first.
    #[must_use]
    pub fn time_per_output_token(&self) -> Option<Duration> {
        let output = self.taken.as_ref()?.output;
        let after = u32::try_from(output.checked_sub(1)?).ok().filter(|after| *after > 0)?;
        let stream = self.duration().checked_sub(self.first_byte?)?;
        self.is_stream.then(|| stream / after)
    }
}
