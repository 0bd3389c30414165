//! What a pool does about failures: deadlines, further attempts, circuit breaker, queue. Each may be
//! written for the whole file, a service or a model; a key that is not written is the outer one's.

use std::time::Duration;

use super::super::defaults::{self, Defaults};
use super::super::file::{FileBreaker, FileDeadlines, FileQueue, FileRetry};
use super::super::problem::{KeyPath, Problems};
use super::super::snapshot::{BreakerSpec, Deadlines, QueueSpec, RetrySpec};
use super::super::units::Span;
use super::positive;

/// More attempts than this are typing mistakes.
const RETRIES_MAX: u32 = 100;

/// The policies as written at one level.
#[derive(Clone, Copy)]
pub(super) struct Written<'a> {
    pub(super) deadlines: Option<&'a FileDeadlines>,
    pub(super) retry: Option<&'a FileRetry>,
    pub(super) breaker: Option<&'a FileBreaker>,
    pub(super) queue: Option<&'a FileQueue>,
}

/// The policies that hold at one level.
#[derive(Clone, Default)]
pub(super) struct Policies {
    deadlines: FileDeadlines,
    retry: FileRetry,
    breaker: FileBreaker,
    queue: FileQueue,
}

impl Policies {
    /// What holds at `at`, with what is written there over what holds around it.
    pub(super) fn under(
        &self,
        written: Written<'_>,
        at: &KeyPath,
        problems: &mut Problems,
    ) -> Self {
        let mut own = self.clone();
        if let Some(deadlines) = written.deadlines {
            check_deadlines(deadlines, &at.key("deadlines"), problems);
            own.deadlines = merged_deadlines(deadlines, &self.deadlines);
        }
        if let Some(retry) = written.retry {
            check_retry(retry, &at.key("retry"), problems);
            own.retry = merged_retry(retry, &self.retry);
        }
        if let Some(breaker) = written.breaker {
            check_breaker(breaker, &at.key("breaker"), problems);
            own.breaker = merged_breaker(breaker, &self.breaker);
        }
        if let Some(queue) = written.queue {
            positive(queue.timeout, &at.key("queue").key("timeout"), Duration::ZERO, problems);
            own.queue = FileQueue {
                length_max: queue.length_max.or(self.queue.length_max),
                timeout: queue.timeout.or(self.queue.timeout),
            };
        }
        own
    }

    pub(super) fn deadlines(&self, defaults: &Defaults) -> Deadlines {
        let written = &self.deadlines;
        let default = &defaults.deadlines;
        let of = |span: Option<Span>, default| span.map_or(default, |span| span.0);
        Deadlines {
            connect: of(written.connect, default.connect),
            tls: of(written.tls, default.tls),
            first_byte: of(written.first_byte, default.first_byte),
            silence: of(written.silence, default.silence),
            exchange: of(written.exchange, default.exchange),
            websocket_idle: of(written.websocket_idle, default.websocket_idle),
            websocket_total: of(written.websocket_total, default.websocket_total),
        }
    }

    pub(super) fn retry(&self, defaults: &Defaults) -> RetrySpec {
        let written = &self.retry;
        let of = |span: Option<Span>, default| span.map_or(default, |span| span.0);
        RetrySpec {
            retries_max: written.retries_max.unwrap_or(defaults.retries_max) as usize,
            delay: of(written.delay, defaults.retry_delay),
            retry_after_max: of(written.retry_after_max, defaults::RETRY_AFTER_MAX),
            statuses: written
                .statuses
                .as_ref()
                .map_or(defaults::RETRY_STATUSES.to_vec(), |list| list.0.clone()),
            fast_500: of(written.fast_500, defaults::RETRY_FAST_500),
            non_idempotent: written.non_idempotent.unwrap_or(true),
            budget: written.budget.unwrap_or(defaults.retry_budget),
            budget_min: written.budget_min.unwrap_or(defaults::RETRY_BUDGET_MIN) as usize,
        }
    }

    pub(super) fn breaker(&self, defaults: &Defaults) -> BreakerSpec {
        let written = &self.breaker;
        let default = &defaults.breaker;
        let of = |span: Option<Span>, default| span.map_or(default, |span| span.0);
        let open = of(written.open, default.open);
        BreakerSpec {
            enabled: written.enabled.unwrap_or(true),
            consecutive_failures: written
                .consecutive_failures
                .unwrap_or(defaults::BREAKER_CONSECUTIVE_FAILURES),
            failure_rate: written.failure_rate.unwrap_or(default.failure_rate),
            failure_rate_exchanges: written
                .failure_rate_exchanges
                .unwrap_or(defaults::BREAKER_FAILURE_RATE_EXCHANGES),
            window: of(written.window, defaults::BREAKER_WINDOW),
            open,
            open_max: of(written.open_max, default.open_max).max(open),
            slow_start: of(written.slow_start, default.slow_start),
            ejected_max: written.ejected_max.unwrap_or(default.ejected_max),
            fail_open: written.fail_open.unwrap_or(default.fail_open),
        }
    }

    pub(super) fn queue(&self) -> QueueSpec {
        QueueSpec {
            length_max: self.queue.length_max.unwrap_or(defaults::QUEUE_LENGTH_MAX) as usize,
            timeout: self.queue.timeout.map_or(defaults::QUEUE_TIMEOUT, |span| span.0),
        }
    }
}

fn check_deadlines(written: &FileDeadlines, at: &KeyPath, problems: &mut Problems) {
    for (key, span) in [
        ("connect", written.connect),
        ("tls", written.tls),
        ("first_byte", written.first_byte),
        ("silence", written.silence),
        ("exchange", written.exchange),
        ("websocket_idle", written.websocket_idle),
        ("websocket_total", written.websocket_total),
    ] {
        positive(span, &at.key(key), Duration::ZERO, problems);
    }
}

fn check_retry(written: &FileRetry, at: &KeyPath, problems: &mut Problems) {
    if written.retries_max.is_some_and(|retries| retries > RETRIES_MAX) {
        problems.value(&at.key("retries_max"), format!("expected at most {RETRIES_MAX}"));
    }
    let statuses = written.statuses.iter().flat_map(|statuses| &statuses.0);
    if statuses.clone().any(|status| !(400..=599).contains(status)) {
        problems.value(&at.key("statuses"), "expected statuses from 400 to 599");
    }
    check_share(written.budget, &at.key("budget"), problems);
}

fn check_breaker(written: &FileBreaker, at: &KeyPath, problems: &mut Problems) {
    for (key, count) in [
        ("consecutive_failures", written.consecutive_failures),
        ("failure_rate_exchanges", written.failure_rate_exchanges),
    ] {
        if count == Some(0) {
            problems.value(&at.key(key), "must be more than 0");
        }
    }
    if written.failure_rate == Some(0.0) {
        problems.value(&at.key("failure_rate"), "must be more than 0");
    }
    for (key, share) in
        [("failure_rate", written.failure_rate), ("ejected_max", written.ejected_max)]
    {
        check_share(share, &at.key(key), problems);
    }
    for (key, span) in
        [("window", written.window), ("open", written.open), ("open_max", written.open_max)]
    {
        positive(span, &at.key(key), Duration::ZERO, problems);
    }
}

fn check_share(share: Option<f64>, at: &KeyPath, problems: &mut Problems) {
    if share.is_some_and(|share| !(0.0..=1.0).contains(&share)) {
        problems.value(at, "expected a share from 0 to 1");
    }
}

fn merged_deadlines(own: &FileDeadlines, outer: &FileDeadlines) -> FileDeadlines {
    FileDeadlines {
        connect: own.connect.or(outer.connect),
        tls: own.tls.or(outer.tls),
        first_byte: own.first_byte.or(outer.first_byte),
        silence: own.silence.or(outer.silence),
        exchange: own.exchange.or(outer.exchange),
        websocket_idle: own.websocket_idle.or(outer.websocket_idle),
        websocket_total: own.websocket_total.or(outer.websocket_total),
    }
}

fn merged_retry(own: &FileRetry, outer: &FileRetry) -> FileRetry {
    FileRetry {
        retries_max: own.retries_max.or(outer.retries_max),
        delay: own.delay.or(outer.delay),
        retry_after_max: own.retry_after_max.or(outer.retry_after_max),
        statuses: own.statuses.clone().or_else(|| outer.statuses.clone()),
        fast_500: own.fast_500.or(outer.fast_500),
        non_idempotent: own.non_idempotent.or(outer.non_idempotent),
        budget: own.budget.or(outer.budget),
        budget_min: own.budget_min.or(outer.budget_min),
    }
}

fn merged_breaker(own: &FileBreaker, outer: &FileBreaker) -> FileBreaker {
    FileBreaker {
        enabled: own.enabled.or(outer.enabled),
        consecutive_failures: own.consecutive_failures.or(outer.consecutive_failures),
        failure_rate: own.failure_rate.or(outer.failure_rate),
        failure_rate_exchanges: own.failure_rate_exchanges.or(outer.failure_rate_exchanges),
        window: own.window.or(outer.window),
        open: own.open.or(outer.open),
        open_max: own.open_max.or(outer.open_max),
        slow_start: own.slow_start.or(outer.slow_start),
        ejected_max: own.ejected_max.or(outer.ejected_max),
        fail_open: own.fail_open.or(outer.fail_open),
    }
}
