//! Who asks a backend for an answer that others may have, and what becomes of it.

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use http::HeaderValue;

use super::answer::Answer;
use super::flight::{End, Flight, Head, Listener};
use super::{Cache, Purges, Wanted};
use crate::llm::{Kind, Usage};

/// A request that asks a backend for an answer that others may have. Dropped before the end, it is cut for those who
/// follow; or another one asks, if it has not begun.
pub struct Lead {
    cache: Arc<Cache>,
    flight: Arc<Flight>,
    wanted: Wanted,
    /// When the answer began; before that, when it was asked for.
    at: SystemTime,
    head: Option<HeaderValue>,
    /// How often what it is of was purged when it was asked for.
    purged: Purges,
    /// In Redis; none: it gave no answer.
    purged_there: Option<Purges>,
    /// What has it go on as long as its client waits, where others may follow.
    listener: Option<Listener>,
    /// Whether it is larger than what is kept.
    is_too_large: bool,
    /// Whether its end is known.
    is_over: bool,
}

impl Lead {
    pub(super) fn new(cache: &Arc<Cache>, flight: Arc<Flight>, wanted: &Wanted) -> Box<Self> {
        Box::new(Self {
            flight,
            wanted: wanted.clone(),
            at: SystemTime::now(),
            head: None,
            purged: cache.purged(&wanted.of),
            purged_there: None,
            listener: None,
            is_too_large: false,
            is_over: false,
            cache: Arc::clone(cache),
        })
    }

    /// How often Redis says that what it is of was purged.
    pub(super) fn is_of(&mut self, purges: Option<Purges>) {
        self.purged_there = purges;
    }

    /// Redis had it.
    pub(super) fn found(mut self: Box<Self>, answer: &Arc<Answer>) {
        let at = SystemTime::now().checked_sub(answer.age(SystemTime::now()));
        let head = Head { content_type: answer.content_type().clone(), at: at.unwrap_or(self.at) };
        self.flight.begin(head);
        self.flight.is_whole(answer);
        // There is no more of it than what is held already.
        let is_held = self.flight.push(answer.body(), usize::MAX).is_some();
        self.end(if is_held { End::Whole(answer.usage()) } else { End::Unfit });
    }

    /// Others may follow from now on.
    pub(super) fn is_public(&mut self) {
        self.listener = Some(self.flight.lead());
    }

    /// Who waits for the answer, and what it waits for: it goes on as long as anybody does. None: nobody can follow.
    #[must_use]
    pub fn listen(&mut self) -> Option<(Arc<Flight>, Listener)> {
        Some((Arc::clone(&self.flight), self.listener.take()?))
    }

    /// `service/model` whose answer it is.
    #[must_use]
    pub fn pool(&self) -> &str {
        &self.wanted.of.pool
    }

    /// The answer begins, with status 200 and this `Content-Type`.
    pub fn begin(&mut self, content_type: &HeaderValue) {
        self.head = Some(content_type.clone());
        self.at = SystemTime::now();
        self.flight.begin(Head { content_type: content_type.clone(), at: self.at });
    }

    /// A piece of it has come.
    pub fn piece(&mut self, piece: &Bytes) {
        if self.is_over || self.head.is_none() {
            return;
        }
        let is_followed = self.flight.has_followers();
        // Of all answers on their way. There is room left for those that are followed.
        let total_max = self.cache.spec.memory_bytes_max;
        let total_max = if is_followed { total_max } else { total_max / 2 };
        let bytes = self.flight.push(piece, total_max);
        self.is_too_large |= bytes.is_some_and(|bytes| bytes > self.cache.spec.answer_bytes_max);
        match bytes {
            None if is_followed => self.end(End::Cut),
            None => self.end(End::Unfit),
            // Those who follow get it to its end; nobody joins them.
            Some(_) if self.is_too_large => {
                self.cache.forget(&self.wanted.key, &self.flight);
                if !self.flight.has_followers() {
                    self.end(End::Unfit);
                }
            }
            Some(_) => {}
        }
    }

    /// It is none for others.
    pub fn unfit(&mut self) {
        self.end(End::Unfit);
    }

    /// It has come to its end, as it seems, and took this much. It is kept if that is so.
    pub fn whole(mut self: Box<Self>, usage: Usage) {
        let content_type = self.head.take().filter(|_| !self.is_over);
        let Some(content_type) = content_type else { return };
        let is_stream = Kind::of(content_type.as_bytes()) != Some(Kind::Json);
        let answer = (!self.is_too_large)
            .then(|| Answer::new(content_type, self.flight.body(), usage, self.at))
            .flatten();
        match answer.map(Arc::new) {
            Some(answer) => {
                self.flight.is_whole(&answer);
                self.keep(&answer);
                self.end(End::Whole(usage));
            }
            // They have had all that there is, whether or not it is known how it ends.
            None if is_stream => self.end(End::Whole(usage)),
            None => self.end(End::Unfit),
        }
    }

    fn keep(&mut self, answer: &Arc<Answer>) {
        let Some(remote) = self.cache.remote.clone() else {
            return self.cache.put(&self.wanted, answer, self.purged);
        };
        let Some(purges) = self.purged_there else { return };
        let Wanted { key, ttl, .. } = self.wanted;
        let (cache, flight, answer) =
            (Arc::clone(&self.cache), Arc::clone(&self.flight), Arc::clone(answer));
        // Until it is there, who asks for it follows.
        self.is_over = true;
        self.flight.end(End::Whole(answer.usage()));
        tokio::spawn(async move {
            remote.put(key, answer, purges, ttl).await;
            cache.forget(&key, &flight);
        });
    }

    fn end(&mut self, end: End) {
        if !std::mem::replace(&mut self.is_over, true) {
            self.flight.end(end);
            self.cache.forget(&self.wanted.key, &self.flight);
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        let end = if self.flight.has_begun() { End::Cut } else { End::Lost };
        self.end(end);
    }
}
