//! What an exchange takes: read from its answer as it passes, priced when it is over, and written to the ledger at
//! the end.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use http::response::Parts;
use http::{HeaderValue, Method, StatusCode};
use pingora::http::RequestHeader;
use pingora_core::{Error, ErrorSource};
use pingora_proxy::Session;
use rust_decimal::Decimal;

use super::exchange::{Admitted, Events, Exchange};
use super::{Proxy, account, respond};
use crate::config::Tariff;
use crate::ledger::{self, Month, Months, Row, Taken};
use crate::limits::{Reservation, shares};
use crate::llm::{self, EndMarker, Facts, Kind, Meter, TOKENS_MAX, Trim, Usage};
use crate::runtime::Runtime;
use crate::telemetry;

/// Bytes of text that make a token, about.
const TOKEN_BYTES: u64 = 4;

/// Tokens of an image or the like, about.
const MEDIA_TOKENS: u64 = 1000;

/// The last segments of paths under which nothing is taken.
const TAKES_NOTHING: [&[u8]; 11] = [
    b"cancel",
    b"countTokens",
    b"count_tokens",
    b"input_tokens",
    b"tokenize",
    b"detokenize",
    b"moderations",
    b"files",
    b"batches",
    b"jobs",
    b"uploads",
];

/// The metering of one exchange.
#[derive(Default)]
pub(super) struct Metering {
    /// Whether the answer takes tokens.
    takes: bool,
    /// Whether it is a model's text: then what a backend does not tell of it can be counted.
    generates: bool,
    /// About as many tokens the prompt has.
    input_estimate: u64,
    /// How many answers are asked for, and how long each may get.
    answers: u64,
    output_max: Option<u64>,
    /// Whether somebody pays for it or is held to it: what cannot be read is estimated.
    charges: bool,
    /// Whether the backend is asked to tell usage in its stream.
    pub(super) asks: bool,
    meter: Option<Box<Meter>>,
    /// Takes out the event that the client did not ask for.
    trim: Option<Trim>,
    passed_bytes: u64,
    kind: Option<Kind>,
    /// Whether a backend was sent the request.
    pub(super) is_sent: bool,
    /// What it comes to, once that is known.
    bill: Option<Bill>,
}

/// What an exchange took and what that costs.
struct Bill {
    timestamp: i64,
    usage: Usage,
    /// Whether it was counted here.
    is_estimated: bool,
    /// How many of its tokens were paid for before.
    reserved: u64,
    /// None: nobody knows.
    cost: Option<Decimal>,
    is_priced: bool,
}

/// The request is known.
pub(super) fn begin(session: &Session, exchange: &mut Exchange) {
    let snapshot = &exchange.arrived.runtime.snapshot;
    if !snapshot.meters {
        return;
    }
    if exchange.cached.is_hit() {
        // It takes nothing, and that is what its row says.
        exchange.metering = Some(Metering::default());
        return;
    }
    let head = session.req_header();
    let path = super::admit::split_target(head).0;
    let facts = exchange.body.facts();
    let takes = takes(head);
    let is_stream = facts.is_some_and(|facts| facts.stream == Some(true));
    let can_ask =
        is_stream && EndMarker::of_path(path).is_some() && path.ends_with(b"/completions");
    exchange.metering = Some(Metering {
        takes,
        generates: llm::generates(path),
        input_estimate: facts.map_or(0, |facts| {
            // Of a body that has not all come yet, the rest is taken to be like its beginning.
            let share = match (exchange.body.looked_bytes(), super::body::length(session)) {
                (Some(looked), Some(length)) if looked > 0 && length > looked => (length, looked),
                _ => (1, 1),
            };
            input_estimate(facts).saturating_mul(share.0 as u64) / share.1 as u64
        }),
        answers: facts.and_then(|facts| facts.answers).unwrap_or(1).max(1),
        output_max: facts.and_then(|facts| facts.output_tokens_max),
        asks: takes && can_ask && snapshot.charges && snapshot.include_usage,
        charges: snapshot.charges,
        ..Metering::default()
    });
}

/// About as many tokens a prompt has.
fn input_estimate(facts: &Facts) -> u64 {
    facts.text_bytes() / TOKEN_BYTES + facts.media * MEDIA_TOKENS
}

/// Whether the answer to a request takes tokens, as far as its head tells.
pub(super) fn takes(head: &RequestHeader) -> bool {
    if !matches!(head.method, Method::POST | Method::PUT | Method::PATCH) {
        return false;
    }
    let path = super::admit::split_target(head).0;
    let last = llm::operation(path);
    // What is kept of an answer is asked for by its id, and has been paid.
    let is_kept = || memchr::memmem::find(path, b"/chat/completions/").is_some();
    last == b"completions" || !TAKES_NOTHING.contains(&last) && !is_kept()
}

/// The head of the answer has come.
pub(super) fn answers(exchange: &mut Exchange, answer: &mut Parts) {
    let is_asked = exchange.body.asks_for_usage();
    let metering = exchange.metering.as_mut().filter(|metering| metering.takes);
    let Some(metering) = metering else { return };
    let headers = &mut answer.headers;
    let kind = headers.get(CONTENT_TYPE).map(|kind| kind.as_bytes());
    let kind = Kind::of(kind.unwrap_or_default());
    let is_plain = !headers.contains_key(CONTENT_ENCODING);
    metering.kind = kind.filter(|_| is_plain && answer.status.is_success());
    metering.meter = metering.kind.map(|kind| Box::new(Meter::new(kind)));
    if is_asked && metering.kind == Some(Kind::Events) {
        metering.trim = Some(Trim::default());
        if headers.remove(CONTENT_LENGTH).is_some() {
            headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
    }
}

/// A piece of the answer passes; what the client is not to see is taken out of it.
pub(super) fn pass(exchange: &mut Exchange, chunk: &mut Option<Bytes>, is_end: bool) {
    let bytes = chunk.as_ref().map_or(0, Bytes::len);
    if bytes > 0 {
        let at = exchange.arrived.at;
        exchange.observed.first_piece.get_or_insert_with(|| at.elapsed());
    }
    let Some(metering) = &mut exchange.metering else { return };
    metering.passed_bytes += bytes as u64;
    let Some(meter) = &mut metering.meter else { return };
    match &mut metering.trim {
        None => {
            if let Some(chunk) = chunk {
                meter.pass(chunk);
            }
        }
        Some(trim) => {
            let passes = trim.pass(meter, &chunk.take().unwrap_or_default(), is_end);
            *chunk = (!passes.is_empty()).then_some(passes);
        }
    }
}

/// The answer, of this status, is over: what it took counts from now on, and the rest of what was reserved is given
/// back.
pub(super) fn charge(
    months: &Months,
    session: &Session,
    exchange: &mut Exchange,
    status: u16,
    error: Option<&Error>,
) {
    let metering = exchange.metering.take_if(|it| it.is_sent && it.bill.is_none());
    if let (Some(mut metering), Some(admitted)) = (metering, &exchange.admitted) {
        let is_cut = is_cut(session, exchange, error);
        let usage = usage(&metering, exchange, error, (status, is_cut));
        let bill = bill(months, exchange, admitted, usage);
        let Usage { input, output, .. } = bill.usage;
        exchange.reservation.settle(input, output, bill.cost.map_or(0, shares));
        metering.bill = Some(bill);
        exchange.metering = Some(metering);
    }
    exchange.held = None;
    exchange.reservation = Reservation::default();
}

/// Prices what an exchange took.
fn bill(
    months: &Months,
    exchange: &Exchange,
    admitted: &Admitted,
    (usage, is_estimated): (Usage, bool),
) -> Bill {
    let timestamp = ledger::now();
    let (_, model) = model(admitted);
    let grant = &admitted.rights.grant;
    let backend = exchange.attempts.current.as_ref().map(|attempt| &attempt.backend().spec);
    let runtime = &exchange.arrived.runtime;
    let tariff = backend.and_then(|spec| spec.tariff.as_deref());
    let tariff = tariff.or_else(|| runtime.tariff(admitted.pool().name(), model));
    let has_tiers = tariff.is_some_and(|tariff| tariff.tiers.len() > 1);
    // Of a model that clients may call anything, only where it matters.
    let counted = (admitted.to().names().1 == model || has_tiers).then_some(model);
    let is_month_of_interest = runtime.snapshot.charges || grant.reserved_tokens > 0 || has_tiers;
    let Taken { before, reserved } = if is_month_of_interest {
        let month = Month::of(timestamp);
        months.take(month, &grant.key_id, counted, usage.total(), grant.reserved_tokens)
    } else {
        Taken::default()
    };
    let rest = ledger::without_reserved(usage, reserved);
    let price = |tariff: &Tariff| ledger::cost(&ledger::price_after(tariff, before), rest);
    let is_free = rest.total() == 0;
    let cost = tariff.map(price).or_else(|| is_free.then(Default::default));
    Bill { timestamp, usage, is_estimated, reserved, cost, is_priced: tariff.is_some() }
}

/// Whether an answer did not come to its end.
fn is_cut(session: &Session, exchange: &Exchange, error: Option<&Error>) -> bool {
    error.is_some() && !account::is_complete(exchange) && !session.was_upgraded()
        || exchange.observed.events.as_ref().is_some_and(Events::is_cut)
}

/// The exchange is over: writes its row. What it took, where that was counted.
pub(super) fn settle(
    proxy: &Proxy,
    session: &Session,
    exchange: &mut Exchange,
    error: Option<&Error>,
) -> Option<telemetry::Taken> {
    let status = respond::status(session);
    charge(&proxy.months, session, exchange, status, error);
    let metering = exchange.metering.take()?;
    let (bill, admitted) = (metering.bill?, exchange.admitted.as_ref()?);
    let is_cut = is_cut(session, exchange, error);
    let Bill { timestamp, usage, is_estimated, reserved, cost, is_priced } = bill;
    let (service, model) = model(admitted);
    let grant = &admitted.rights.grant;
    let backend = exchange.attempts.current.as_ref().map(|attempt| &attempt.backend().spec);
    let currency = &exchange.arrived.runtime.snapshot.prices.currency;
    let is_read = metering.charges || metering.kind.is_some();
    let told = (metering.takes && is_read).then(|| telemetry::Taken {
        input: usage.input,
        output: usage.output,
        cached: usage.cached,
        is_estimated,
        cost: cost.filter(|_| is_priced),
        currency: Arc::clone(currency),
        wasted_by: is_cut.then(|| account::ended_by(exchange, error)),
    });
    let Some(book) = &proxy.ledger else { return told };
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let timestamp = timestamp.max(0).cast_unsigned();
    let cost = cost.map(|cost| cost.to_string());
    book.write(&Row {
        id: &ledger::new_id(timestamp),
        timestamp,
        request_id: exchange.request_id(),
        user_id: &grant.name,
        key_id: &grant.key_id,
        service,
        model,
        backend: backend.map_or("", |spec| spec.id.as_str()),
        tokens_input: usage.input,
        tokens_output: usage.output,
        tokens_cached: usage.cached,
        tokens_reasoning: usage.reasoning,
        tokens_reserved: reserved,
        cost: cost.as_deref(),
        currency,
        status,
        aborted: is_cut,
        estimated: is_estimated,
        latency_ms: millis(exchange.arrived.at.elapsed()),
        ttft_ms: exchange.observed.first_piece.map(millis),
    });
    told
}

/// What the exchange took, and whether that was counted here.
fn usage(
    metering: &Metering,
    exchange: &Exchange,
    error: Option<&Error>,
    (status, is_cut): (u16, bool),
) -> (Usage, bool) {
    let is_ours = error.is_some_and(|error| error.esource != ErrorSource::Downstream);
    // For what a backend did not answer, nobody pays.
    if is_ours && !exchange.observed.has_head() {
        return (Usage::default(), metering.takes);
    }
    let input = exchange.body.facts().map_or(0, input_estimate);
    metering.usage(status, is_cut, input)
}

/// What a whole answer has taken, as far as that was told or counted.
pub(super) fn usage_told(exchange: &Exchange) -> Usage {
    let usage = |it| usage(it, exchange, None, (exchange.observed.status, false)).0;
    exchange.metering.as_ref().map(usage).unwrap_or_default()
}

/// What an exchange that may take this much would cost at most, in shares of money. Where no price is known, the
/// smallest share: it takes a budget that is not used up.
pub(super) fn cost_before(
    (months, month): (&Months, Month),
    runtime: &Runtime,
    admitted: &Admitted,
    usage: Usage,
) -> u64 {
    let (pool, model) = (admitted.pool(), model(admitted).1);
    let key = &admitted.rights.grant.key_id;
    let of_model = runtime.tariff(pool.name(), model);
    // Which backend it will be is not known yet.
    let tariffs = pool.backends().iter().map(|backend| backend.spec.tariff.as_deref().or(of_model));
    let costs = tariffs.flatten().map(|tariff| {
        let is_flat = tariff.tiers.len() == 1;
        let before = if is_flat { 0 } else { months.before(month, key, model) };
        shares(ledger::cost(&ledger::price_after(tariff, before), usage))
    });
    let is_free = usage.total() == 0;
    costs.max().unwrap_or(if is_free { 0 } else { 1 })
}

/// The model that was asked, by its own name; where that is a wildcard, as it was called.
pub(super) fn model(admitted: &Admitted) -> (&str, &str) {
    let (service, model) = admitted.to().names();
    let asked = admitted.asked.as_ref().map(|asked| asked.name.as_str());
    let is_wide = model.contains('*') || admitted.way.is_everything;
    let asked = asked.filter(|_| is_wide);
    let own = asked.map(|asked| {
        asked.strip_prefix(service).and_then(|it| it.strip_prefix('/')).unwrap_or(asked)
    });
    (service, own.unwrap_or(model))
}

impl Metering {
    /// Whether the answer is read.
    pub(super) fn reads(&self) -> bool {
        self.takes
    }

    /// About as many tokens the exchange may take, of prompt and answer.
    pub(super) fn estimate(&self, assumed: u64) -> (u64, u64) {
        if !self.takes {
            return (0, 0);
        }
        let output = self.output_max.filter(|max| *max > 0).unwrap_or(assumed);
        let output = output.min(TOKENS_MAX).saturating_mul(self.answers);
        // No prompt is empty, whatever little was seen of it.
        (self.input_estimate.max(1), output.min(TOKENS_MAX))
    }

    /// What was taken, and whether that was counted here. The prompt has about `input` tokens.
    fn usage(&self, status: u16, is_cut: bool, input: u64) -> (Usage, bool) {
        let is_success = StatusCode::from_u16(status).is_ok_and(|status| status.is_success());
        if !self.takes || status != 0 && !is_success {
            return (Usage::default(), false);
        }
        let (told, is_whole) = self.meter.as_ref().map_or((None, false), |meter| meter.usage());
        // Of embeddings, scores and images some tell the input alone.
        if let Some(usage) = told
            && (is_whole || !self.generates)
            && !is_cut
        {
            return (usage, false);
        }
        let outputs = match self.kind {
            // One document, or one that cannot be read: all of it is taken for text.
            Some(Kind::Json) | None if self.generates => self.passed_bytes / TOKEN_BYTES,
            Some(Kind::Json) | None => 0,
            Some(Kind::Lines | Kind::Events) => {
                self.meter.as_ref().map_or(0, |meter| meter.outputs())
            }
        };
        let known = told.unwrap_or_default();
        let input = told.map_or(input, |usage| usage.input);
        (Usage { input, output: known.output.max(outputs), ..known }, true)
    }
}
