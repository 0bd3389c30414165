//! Finds words and patterns in text, in time that grows with the text alone.

use std::ops::Range;

use aho_corasick::automaton::{Automaton, OverlappingState};
use aho_corasick::nfa::contiguous::NFA;
use aho_corasick::{Anchored, Input, MatchKind};
use regex::{Regex, RegexBuilder, RegexSet, RegexSetBuilder};

use super::fold::Folding;

/// The memory that all patterns of a guard may take, compiled.
const PATTERNS_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Words and patterns.
pub(super) struct Matcher {
    words: Option<NFA>,
    /// Letters of the longest word.
    longest: usize,
    /// Tells whether any pattern is there, before they are looked for one by one.
    any: RegexSet,
    patterns: Vec<Regex>,
}

impl Matcher {
    /// For these.
    ///
    /// # Errors
    /// The pattern that is none (by its number), and why; or none, when the words are too many.
    pub(super) fn new(
        words: &[String],
        patterns: &[String],
    ) -> Result<Self, (Option<usize>, String)> {
        let folded: Vec<_> = words.iter().map(|word| Folding::WidthAndCase.fold(word)).collect();
        let longest = folded.iter().map(|word| word.chars().count()).max().unwrap_or_default();
        let words = if folded.is_empty() {
            None
        } else {
            let built = NFA::builder()
                .match_kind(MatchKind::Standard)
                .build(folded.iter().map(|word| word.as_bytes()));
            Some(built.map_err(|error| (None, error.to_string()))?)
        };
        let mut compiled = Vec::with_capacity(patterns.len());
        for (number, pattern) in patterns.iter().enumerate() {
            let built = RegexBuilder::new(pattern)
                .case_insensitive(true)
                .size_limit(PATTERNS_BYTES_MAX)
                .build();
            let regex = built.map_err(|error| {
                let error = error.to_string();
                let last = error.lines().last().unwrap_or_default();
                (Some(number), last.trim_start_matches("error: ").to_owned())
            })?;
            if regex.is_match("") {
                return Err((Some(number), "it is found in every text".to_owned()));
            }
            compiled.push(regex);
        }
        let any = RegexSetBuilder::new(patterns)
            .case_insensitive(true)
            .size_limit(PATTERNS_BYTES_MAX)
            .build()
            .map_err(|error| (None, error.to_string()))?;
        Ok(Self { words, longest, any, patterns: compiled })
    }

    /// Letters of the longest word.
    pub(super) fn longest(&self) -> usize {
        self.longest
    }

    pub(super) fn has_patterns(&self) -> bool {
        !self.patterns.is_empty()
    }

    /// Whether anything is there.
    pub(super) fn is_in(&self, text: &str) -> bool {
        let has_word = self.words.as_ref().is_some_and(|words| {
            let folded = Folding::WidthAndCase.fold(text);
            words.try_find(&Input::new(&*folded)).is_ok_and(|found| found.is_some())
        });
        has_word || self.has_patterns() && self.any.is_match(&Folding::Width.fold(text))
    }

    /// Where something is, in order, and nothing twice.
    pub(super) fn find(&self, text: &str) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        if let Some(words) = &self.words {
            let folded = Folding::WidthAndCase.fold(text);
            let (input, mut state) = (Input::new(&*folded), OverlappingState::start());
            let mut in_folds = Vec::new();
            while words.try_find_overlapping(&input, &mut state).is_ok() {
                let Some(one) = state.get_match() else { break };
                in_folds.push(one.range());
            }
            found = Folding::WidthAndCase.unfold(text, &merged(in_folds));
        }
        if self.has_patterns() {
            let folded = Folding::Width.fold(text);
            let mut in_folds = Vec::new();
            for number in self.any.matches(&folded) {
                in_folds.extend(self.patterns[number].find_iter(&folded).map(|one| one.range()));
            }
            found.extend(Folding::Width.unfold(text, &merged(in_folds)));
        }
        merged(found)
    }

    /// Whether a word may have begun at the end of the text that goes on behind it.
    pub(super) fn is_within_word(&self, text: &str) -> bool {
        let Some(words) = &self.words else { return false };
        let Ok(start) = words.start_state(Anchored::No) else { return true };
        let folded = Folding::WidthAndCase.fold(text);
        let state =
            folded.bytes().fold(start, |state, byte| words.next_state(Anchored::No, state, byte));
        state != start
    }
}

/// In order, and what overlaps as one.
fn merged(mut found: Vec<Range<usize>>) -> Vec<Range<usize>> {
    found.sort_unstable_by_key(|range| (range.start, range.end));
    let mut merged: Vec<Range<usize>> = Vec::new();
    for range in found {
        match merged.last_mut() {
            Some(last) if range.start < last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(words: &[&str], patterns: &[&str], text: &str) -> Vec<String> {
        let owned =
            |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let matcher = Matcher::new(&owned(words), &owned(patterns)).ok().unwrap();
        let found = matcher.find(text);
        assert_eq!(matcher.is_in(text), !found.is_empty(), "{text}");
        found.into_iter().map(|range| text[range].to_owned()).collect()
    }

    #[test]
    fn words_and_patterns_are_found_in_any_case_and_width() {
        assert_eq!(found(&["secret"], &[], "a ＳｅCRＥＴ b"), ["ＳｅCRＥＴ"]);
        assert_eq!(found(&["密码"], &[], "我的密码是"), ["密码"]);
        assert_eq!(found(&["he", "she", "hers"], &[], "ushers"), ["shers"]);
        assert_eq!(found(&[], &[r"\b\d{4}-\d{4}\b"], "no １２３４-5678."), ["１２３４-5678"]);
        assert_eq!(found(&["a"], &["b+"], "xabbx"), ["a", "bb"]);
        assert!(found(&["secret"], &["x{3}"], "secre xx").is_empty());
    }

    #[test]
    fn a_pattern_that_is_none_is_refused() {
        for (pattern, why) in [("(", "unclosed group"), ("a*", "it is found in every text")] {
            let refused = Matcher::new(&[], &["b".to_owned(), pattern.to_owned()]).err().unwrap();
            assert_eq!(refused, (Some(1), why.to_owned()));
        }
    }

    #[test]
    fn a_word_that_has_begun_is_known() {
        let matcher = Matcher::new(&["secret".to_owned()], &[]).ok().unwrap();
        for (text, is_within) in [("a sec", true), ("a secx", false), ("S", true), ("", false)] {
            assert_eq!(matcher.is_within_word(text), is_within, "{text}");
        }
    }
}
