//! How many tokens an answer took, read from it as it passes.

mod meter;
mod reader;
mod trim;

pub use meter::{Kind, Meter};
pub use trim::Trim;

/// Tokens, as the backend counted them. Input and output are whole: what is cached or thought is in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt, what was read from a cache and what was written to one included.
    pub input: u64,
    /// Of the answer, what was thought included.
    pub output: u64,
    /// Of the input, what was read from a cache.
    pub cached: u64,
    /// Of the input, what was written to a cache.
    pub cache_written: u64,
    /// Of the output, what was thought and not said.
    pub reasoning: u64,
}

/// More tokens than any prompt or answer has: a count beyond it is not believed.
pub const TOKENS_MAX: u64 = 1_000_000_000;

impl Usage {
    /// Input and output.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.input.saturating_add(self.output)
    }
}

/// What the families of APIs call them, as far as they were read. A later number goes before an earlier one:
/// in a stream all of them are totals so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    numbers: [Option<u64>; Field::COUNT],
}

/// A number that is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    /// `prompt_tokens`, `input_tokens`, `promptTokenCount`, `prompt_eval_count`, `tokens_evaluated`.
    Input,
    /// `completion_tokens`, `output_tokens`, `candidatesTokenCount`, `eval_count`, `tokens_predicted`.
    Output,
    /// `total_tokens`: all there is where nothing else is said.
    Total,
    /// `cached_tokens`, `cachedContentTokenCount`, `prompt_cache_hit_tokens`: a part of the input.
    Cached,
    /// `cache_write_tokens`: a part of the input.
    CacheWritten,
    /// `cache_read_input_tokens`: besides the input.
    CacheReadBeside,
    /// `cache_creation_input_tokens`: besides the input.
    CacheWrittenBeside,
    /// `reasoning_tokens`, `thinking_tokens`: a part of the output.
    Reasoning,
    /// `thoughtsTokenCount`: besides the output.
    ThoughtsBeside,
    /// `toolUsePromptTokenCount`: besides the input.
    ToolPromptBeside,
}

impl Field {
    const COUNT: usize = 10;
}

impl Counts {
    fn get(&self, field: Field) -> Option<u64> {
        self.numbers[field as usize]
    }

    fn set(&mut self, field: Field, number: u64) {
        if number <= TOKENS_MAX {
            self.numbers[field as usize] = Some(number);
        }
    }

    /// Takes over what is told by `newer`.
    fn update(&mut self, newer: &Self) {
        for (known, new) in self.numbers.iter_mut().zip(newer.numbers) {
            *known = new.or(*known);
        }
    }

    /// What is told of the input; and of all, if anything is.
    pub(super) fn usage(&self) -> (Option<Usage>, bool) {
        let of = |field| self.get(field).unwrap_or_default();
        let read = of(Field::CacheReadBeside);
        let written = of(Field::CacheWrittenBeside);
        let beside = read.saturating_add(written).saturating_add(of(Field::ToolPromptBeside));
        let thoughts = of(Field::ThoughtsBeside);
        let has_input = self.get(Field::Input).is_some() || beside > 0;
        let has_output = self.get(Field::Output).is_some() || thoughts > 0;
        if !has_input && !has_output {
            // Rerankers tell a total only.
            let total = self.get(Field::Total);
            return (total.map(|input| Usage { input, ..Usage::default() }), total.is_some());
        }
        let usage = Usage {
            input: of(Field::Input).saturating_add(beside),
            output: of(Field::Output).saturating_add(thoughts),
            cached: of(Field::Cached).saturating_add(read),
            cache_written: of(Field::CacheWritten).saturating_add(written),
            reasoning: of(Field::Reasoning).saturating_add(thoughts),
        };
        // Embeddings have no output, and tell a total.
        (Some(usage), has_output || self.get(Field::Total).is_some())
    }
}
