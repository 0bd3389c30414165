//! Answers that are given again: a request is answered by one that is kept, or by one that is on its way for another
//! request; or its own is kept for others.

mod serve;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{
    AGE, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, PRAGMA, PROXY_AUTHORIZATION, VARY,
};
use http::response::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use pingora_core::Result;
use pingora_proxy::Session;

pub(super) use serve::serve;

use super::exchange::{Admitted, Events, Exchange};
use super::hooks::Halt;
use super::select::gone;
use super::{body, meter};
use crate::auth::CREDENTIAL_HEADERS;
use crate::cache::{
    self, Answer, Asked, Cache, End, Flight, Head, Lead, Listener, Of, Turn, Wanted,
};
use crate::config::{CachedPer, Caching, ClientKeys};
use crate::ledger;
use crate::llm::{Kind, Usage};
use crate::telemetry::{Phase, Saved};

/// What came of the cache.
const X_CACHE: HeaderName = HeaderName::from_static("x-cache");

/// What an exchange has to do with the cache.
#[derive(Default)]
pub(super) struct Cached {
    /// None: answers of its model are not kept, or it asks for none.
    pub(super) outcome: Option<Outcome>,
    /// What its answer is kept by, and others are given it.
    lead: Option<Box<Lead>>,
    /// What a backend took for the answer that it was given.
    saved: Option<Usage>,
}

/// What came of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was answered without a backend, by an answer of this age.
    Hit(Duration),
    /// A backend is asked, and the answer may be kept.
    Miss,
    /// The cache is passed over: that is for the client, or for the request as it is.
    Bypass,
}

impl Outcome {
    /// As clients, metrics and the request log are told of it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Hit(_) => "hit",
            Self::Miss => "miss",
            Self::Bypass => "bypass",
        }
    }
}

impl Cached {
    /// Whether it is answered without a backend.
    pub(super) fn is_hit(&self) -> bool {
        matches!(self.outcome, Some(Outcome::Hit(_)))
    }

    /// Whether others may have its answer, which then has to be readable.
    pub(super) fn leads(&self) -> bool {
        self.lead.is_some()
    }

    /// Where others may have its answer: its client waits for it, too.
    pub(super) fn listen(&mut self) -> Option<(Arc<Flight>, Listener)> {
        self.lead.as_mut()?.listen()
    }

    /// Its answer is none for others, who ask for themselves.
    pub(super) fn unfit(&mut self) {
        if let Some(mut lead) = self.lead.take() {
            lead.unfit();
        }
    }

    /// It asks for nothing any more; another one may ask for all.
    pub(super) fn give_up(&mut self) {
        self.lead = None;
    }
}

/// An answer that a request is given.
pub(super) enum Served {
    /// It is kept.
    Kept(Arc<Answer>),
    /// It is on its way.
    Coming(Arc<Flight>, Listener, Head),
}

/// What a client asks of a cache (RFC 9111, section 5.2.1).
#[derive(Debug, PartialEq, Eq)]
struct Wishes {
    no_store: bool,
    no_cache: bool,
    age_max: Duration,
}

impl Wishes {
    fn of(headers: &HeaderMap) -> Self {
        let mut wishes = Self { no_store: false, no_cache: false, age_max: Duration::MAX };
        let texts = headers.get_all(CACHE_CONTROL).iter();
        let texts = texts.map(|value| value.to_str().unwrap_or("no-store"));
        for wish in texts.flat_map(|text| text.split(',')) {
            let (name, value) = wish.split_once('=').unwrap_or((wish, ""));
            match name.trim().to_ascii_lowercase().as_str() {
                "no-store" => wishes.no_store = true,
                "no-cache" => wishes.no_cache = true,
                "max-age" => {
                    // What cannot be read takes nothing that is old.
                    let seconds = value.trim().trim_matches('"').parse().unwrap_or(0);
                    wishes.age_max = wishes.age_max.min(Duration::from_secs(seconds));
                }
                _ => {}
            }
        }
        let is_old = !headers.contains_key(CACHE_CONTROL);
        let pragma = headers.get(PRAGMA).filter(|_| is_old);
        wishes.no_cache |= pragma.is_some_and(|it| it.as_bytes().eq_ignore_ascii_case(b"no-cache"));
        wishes.no_cache |= wishes.age_max.is_zero();
        wishes
    }
}

/// What tells a request from others, where it may be answered by the answer to another one.
fn wanted(
    session: &Session,
    exchange: &Exchange,
    (admitted, caching): (&Admitted, &Caching),
    age_max: Duration,
) -> Option<Wanted> {
    let headers = &session.req_header().headers;
    let snapshot = &exchange.arrived.runtime.snapshot;
    let coding = headers.get(CONTENT_ENCODING);
    let coding = coding.map(HeaderValue::as_bytes).unwrap_or_default();
    let body = exchange.body.decoded(coding, &snapshot.replay).ok()??;
    let tenant = match caching.per {
        CachedPer::Key => Arc::clone(&admitted.rights.grant.key_id),
        CachedPer::All => Arc::from(""),
    };
    // Where they say who a client is to its backend.
    let credentials = match snapshot.clients {
        ClientKeys::Untouched => [&CREDENTIAL_HEADERS[..], &[PROXY_AUTHORIZATION]].concat(),
        ClientKeys::Required(_) | ClientKeys::Dropped => Vec::new(),
    };
    let asked = Asked {
        tenant: &tenant,
        pool: admitted.pool().name(),
        target: &admitted.target,
        headers,
        besides: &credentials,
        called: admitted.asked.as_ref().map_or("", |asked| asked.name.as_str()),
        body: &body,
    };
    let key = cache::key(&asked, caching)?;
    let of = Of { pool: admitted.pool().name().into(), tenant };
    Some(Wanted { key, of, ttl: caching.ttl, age_max })
}

/// Whether a request is one whose answer can be kept, as far as its head tells: one that asks a model for an answer, and
/// for nothing else (`answers_only`).
pub(super) fn concerns(session: &Session, target: &[u8], answers_only: bool) -> bool {
    answers_only && session.req_header().method == Method::POST && cache::may_be_kept(target)
}

/// Looks for an answer to a request that may pass; or has its own kept.
///
/// # Errors
/// When the client takes it back while it waits for one.
pub(super) async fn turn(
    session: &mut Session,
    exchange: &mut Exchange,
) -> Result<Result<Option<Served>, Halt>> {
    let runtime = Arc::clone(&exchange.arrived.runtime);
    let Some(admitted) = &exchange.admitted else { return Ok(Ok(None)) };
    let (Some(caching), Some(cache)) = (admitted.to().caching.clone(), &runtime.cache) else {
        return Ok(Ok(None));
    };
    if !concerns(session, &admitted.target, admitted.may_fall_back) {
        return Ok(Ok(None));
    }
    let wishes = Wishes::of(&session.req_header().headers);
    // HTTP/1.0 says too little about connections that end.
    let is_any = !wishes.no_store && !exchange.arrived.is_http_10;
    let wanted = || wanted(session, exchange, (admitted, &caching), wishes.age_max);
    let wanted = is_any.then(wanted).flatten();
    // A hook may end the answer for one client and not for another one.
    let looks = admitted.to().hooks.as_ref().is_some_and(|hooks| hooks.wants_answer_body());
    let joins = caching.per == CachedPer::Key || !looks;
    exchange.cached.outcome = Some(Outcome::Bypass);
    let Some(wanted) = wanted else { return Ok(Ok(None)) };
    if cache.is_shared() {
        exchange.turn(Phase::Cache);
    }
    let found = if wishes.no_cache {
        exchange.cached.lead = Some(cache.refresh(&wanted).await);
        Ok(Ok(None))
    } else {
        exchange.cached.outcome = Some(Outcome::Miss);
        find(session, exchange, cache, &wanted, joins).await
    };
    if exchange.phases.now() == Phase::Cache {
        exchange.turn(Phase::Own);
    }
    found
}

/// Finds an answer; or there is none, and the request's own is kept.
async fn find(
    session: &mut Session,
    exchange: &mut Exchange,
    cache: &Arc<Cache>,
    wanted: &Wanted,
    joins: bool,
) -> Result<Result<Option<Served>, Halt>> {
    loop {
        let served = match cache.turn(wanted, joins).await {
            Turn::Hit(answer) => Served::Kept(answer),
            Turn::Lead(lead) => {
                exchange.cached.lead = Some(lead);
                return Ok(Ok(None));
            }
            Turn::Follow(flight, listener) => {
                if exchange.phases.now() != Phase::Cache {
                    exchange.turn(Phase::Cache);
                }
                let joined = tokio::select! {
                    biased;
                    joined = join(&flight, wanted) => joined,
                    stop = exchange.watch.ended() => {
                        return Ok(Err(exchange.stop_refusal(stop).into()));
                    }
                    () = body::taken_back(session) => return gone(),
                };
                match joined {
                    Ok(Joined::Whole(answer)) => Served::Kept(answer),
                    Ok(Joined::Stream(head)) => Served::Coming(flight, listener, head),
                    Err(End::Lost) => continue,
                    // Each for itself.
                    Err(_) => return Ok(Ok(None)),
                }
            }
        };
        let now = SystemTime::now();
        let age = match &served {
            Served::Kept(answer) => answer.age(now),
            Served::Coming(_, _, head) => now.duration_since(head.at).unwrap_or_default(),
        };
        exchange.cached.outcome = Some(Outcome::Hit(age));
        return Ok(Ok(Some(served)));
    }
}

/// An answer that was waited for.
enum Joined {
    Whole(Arc<Answer>),
    Stream(Head),
}

/// Waits until there is enough of an answer that it can be passed on: the beginning of a stream, all of a document.
async fn join(flight: &Flight, wanted: &Wanted) -> Result<Joined, End> {
    let head = flight.head().await?;
    let age = SystemTime::now().duration_since(head.at).unwrap_or_default();
    if age > wanted.age_max || age >= wanted.ttl {
        return Err(End::Unfit);
    }
    match Kind::of(head.content_type.as_bytes()) {
        Some(Kind::Events | Kind::Lines) => Ok(Joined::Stream(head)),
        Some(Kind::Json) | None => flight.whole().await.map(Joined::Whole),
    }
}

/// Tells the client what came of the cache.
pub(super) fn tell(headers: &mut HeaderMap, exchange: &Exchange) {
    let Some(outcome) = exchange.cached.outcome else { return };
    headers.insert(X_CACHE, HeaderValue::from_static(outcome.name()));
    // What caches before the backend say of theirs.
    headers.remove(AGE);
    if let Outcome::Hit(age) = outcome {
        headers.insert(AGE, HeaderValue::from(age.as_secs()));
    }
}

/// The head of a backend's answer has come, as the backend sent it: whether others may have it.
pub(super) fn begin(exchange: &mut Exchange, answer: &Parts) {
    let Some(lead) = &mut exchange.cached.lead else { return };
    let headers = &answer.headers;
    let coding = headers.get(CONTENT_ENCODING).map(HeaderValue::as_bytes).unwrap_or_default();
    let own = exchange.admitted.as_ref().is_some_and(|it| it.pool().name() == lead.pool());
    let content_type = headers.get(CONTENT_TYPE);
    let is_fit = answer.status == StatusCode::OK
        && own
        && body::is_plain(coding)
        && content_type.is_some_and(|it| Kind::of(it.as_bytes()).is_some())
        && !varies(headers);
    match content_type.filter(|_| is_fit) {
        Some(content_type) => lead.begin(content_type),
        None => exchange.cached.unfit(),
    }
}

/// Whether an answer depends on more than what requests are told apart by (RFC 9110, section 12.5.5).
fn varies(headers: &HeaderMap) -> bool {
    let known = ["accept", "accept-encoding", "origin"];
    let is_credential = |name: &str| CREDENTIAL_HEADERS.iter().any(|it| it.as_str() == name);
    headers.get_all(VARY).iter().any(|value| {
        let names = value.to_str().unwrap_or("*").split(',').map(str::trim);
        names.filter(|name| !name.is_empty()).any(|name| {
            let name = name.to_ascii_lowercase();
            !known.contains(&name.as_str()) && !is_credential(&name)
        })
    })
}

/// A piece of a backend's answer has come.
pub(super) fn piece(exchange: &mut Exchange, piece: Option<&Bytes>) {
    if let (Some(lead), Some(piece)) = (&mut exchange.cached.lead, piece)
        && !piece.is_empty()
    {
        lead.piece(piece);
    }
}

/// A backend's answer has come to its end.
pub(super) fn whole(exchange: &mut Exchange) {
    let Some(lead) = exchange.cached.lead.take() else { return };
    // A stream that its backend did not end is cut for all.
    if exchange.observed.events.as_ref().is_some_and(Events::is_cut) {
        return;
    }
    lead.whole(meter::usage_told(exchange));
}

/// What was saved, once it is known.
pub(super) fn saved(exchange: &Exchange) -> Option<Saved> {
    let (usage, admitted) = (exchange.cached.saved?, exchange.admitted.as_ref()?);
    let runtime = &exchange.arrived.runtime;
    let pool = admitted.pool();
    let of_model = runtime.tariff(pool.name(), meter::model(admitted).1);
    // Which backend gave it is not known.
    let own = || pool.backends().iter().find_map(|backend| backend.spec.tariff.as_deref());
    let cost =
        of_model.or_else(own).map(|tariff| ledger::cost(&ledger::price_after(tariff, 0), usage));
    let currency = Arc::clone(&runtime.snapshot.prices.currency);
    Some(Saved { input: usage.input, output: usage.output, cost, currency })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let header = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        pairs.iter().map(header).collect()
    }

    #[test]
    fn clients_say_what_they_take() {
        let wishes = |pairs: &[_]| {
            let Wishes { no_store, no_cache, age_max } = Wishes::of(&headers(pairs));
            (no_store, no_cache, (age_max < Duration::MAX).then_some(age_max.as_secs()))
        };
        assert_eq!(wishes(&[]), (false, false, None));
        assert_eq!(wishes(&[("cache-control", "no-store")]), (true, false, None));
        assert_eq!(wishes(&[("cache-control", "No-Cache , x=1")]), (false, true, None));
        assert_eq!(wishes(&[("cache-control", "max-age=60")]), (false, false, Some(60)));
        assert_eq!(
            wishes(&[("cache-control", "max-age=\"60\", max-age=7")]),
            (false, false, Some(7))
        );
        assert_eq!(wishes(&[("cache-control", "max-age=0")]), (false, true, Some(0)));
        assert_eq!(wishes(&[("cache-control", "max-age=soon")]), (false, true, Some(0)));
        assert_eq!(wishes(&[("pragma", "no-cache")]), (false, true, None));
        let both = [("pragma", "no-cache"), ("cache-control", "max-age=5")];
        assert_eq!(wishes(&both), (false, false, Some(5)));
    }

    #[test]
    fn what_depends_on_something_else_is_told() {
        for (value, expected) in [
            ("Accept-Encoding, Origin", false),
            ("accept-encoding", false),
            ("Authorization", false),
            ("*", true),
            ("Origin, X-Mood", true),
            ("", false),
        ] {
            assert_eq!(varies(&headers(&[("vary", value)])), expected, "{value}");
        }
    }
}
