//! Answers that are kept in this process.

use std::sync::Arc;

use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};

use super::answer::Answer;
use super::request::Key;
use super::{Of, Purge};
use crate::config::CacheSpec;

/// So many of the largest answers fit into each part of the memory.
const LARGEST_A_PART: usize = 8;

/// The most parts: each has a lock of its own.
const PARTS_MAX: usize = 64;

/// An answer, and of whom.
struct Kept {
    answer: Arc<Answer>,
    of: Of,
}

#[derive(Clone)]
struct Weight;

impl Weighter<Key, Arc<Kept>> for Weight {
    fn weight(&self, _: &Key, kept: &Arc<Kept>) -> u64 {
        kept.answer.bytes() as u64
    }
}

/// As many answers as there is room for, by bytes; which of them go, S3-FIFO says.
pub(super) struct Memory {
    answers: Cache<Key, Arc<Kept>, Weight>,
}

impl Memory {
    pub(super) fn new(spec: &CacheSpec) -> Self {
        let bytes = spec.memory_bytes_max.max(1);
        let parts = (bytes / (LARGEST_A_PART * spec.answer_bytes_max.max(1))).clamp(1, PARTS_MAX);
        let options = OptionsBuilder::new()
            .estimated_items_capacity(bytes / (8 * 1024))
            .weight_capacity(bytes as u64)
            .shards(parts)
            .build()
            .expect("items and weight were given");
        let hasher = DefaultHashBuilder::default();
        let answers = Cache::with_options(options, Weight, hasher, Default::default());
        Self { answers }
    }

    pub(super) fn get(&self, key: &Key) -> Option<Arc<Answer>> {
        self.answers.get(key).map(|kept| Arc::clone(&kept.answer))
    }

    pub(super) fn put(&self, key: Key, of: &Of, answer: &Arc<Answer>) {
        let kept = Kept { answer: Arc::clone(answer), of: of.clone() };
        self.answers.insert(key, Arc::new(kept));
    }

    pub(super) fn purge(&self, purge: &Purge) {
        self.answers.retain(|_, kept| !purge.concerns(&kept.of));
    }

    /// How many there are, and how many bytes they take.
    pub(super) fn size(&self) -> (u64, u64) {
        (self.answers.len() as u64, self.answers.weight())
    }
}
