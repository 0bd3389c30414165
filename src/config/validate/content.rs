//! Hooks that look at what models are asked and what they say.

use std::io::Read;

use super::super::defaults;
use super::super::file::{FileAction, FileCapture, FileGuard, FileSide};
use super::super::problem::KeyPath;
use super::super::seen::SeenFile;
use super::hooks::Reader;
use super::item_path;
use super::keys::names;
use crate::hooks::{Action, At, Capture, CaptureSpec, Guard, GuardSpec};

/// The longest word of a guard: so much of a stream may be held back for it.
const WORD_LETTERS_MAX: usize = 256;

/// The most letters of a stream that are held back for patterns.
const HOLD_BACK_MAX: usize = 4096;

/// The largest file of words: 100,000 of them take about a megabyte.
const WORDS_BYTES_MAX: u64 = 16 * 1024 * 1024;

impl Reader<'_> {
    pub(super) fn guard(&mut self, written: &FileGuard, path: &KeyPath) -> Vec<At> {
        let mut words = self.words(written, path);
        for (index, word) in words.iter().enumerate() {
            if word.chars().count() > WORD_LETTERS_MAX {
                let message =
                    format!("word {} has more than {WORD_LETTERS_MAX} letters", index + 1);
                self.problems.value(path, message);
            }
        }
        words.retain(|word| !word.is_empty());
        let patterns = written.patterns.as_ref().map(|it| it.items.clone()).unwrap_or_default();
        if words.is_empty() && patterns.is_empty() && !self.problems.has_below(path) {
            self.problems.value(path, "looks for nothing; write words, words_file or patterns");
        }
        let on = written.on.as_deref().unwrap_or(&[FileSide::Request, FileSide::Answer]);
        if on.is_empty() {
            self.problems.value(&path.key("on"), "looks at nothing; write request, answer or both");
        }
        let hold_back = written.hold_back.unwrap_or(defaults::GUARD_HOLD_BACK) as usize;
        if !(1..=HOLD_BACK_MAX).contains(&hold_back) {
            let message = format!("expected a number of letters from 1 to {HOLD_BACK_MAX}");
            self.problems.value(&path.key("hold_back"), message);
        }
        let replacement = written.replacement.as_deref().unwrap_or(defaults::GUARD_REPLACEMENT);
        let spec = GuardSpec {
            words,
            patterns,
            requests: on.contains(&FileSide::Request),
            answers: on.contains(&FileSide::Answer),
            action: match written.action {
                None | Some(FileAction::Refuse) => Action::Refuse,
                Some(FileAction::Redact) => Action::Redact,
                Some(FileAction::Count) => Action::Count,
            },
            replacement: replacement.to_owned(),
            hold_back,
            answer_bytes_max: written
                .answer_bytes_max
                .map_or(defaults::GUARD_ANSWER_BYTES_MAX, |size| size.0),
        };
        match Guard::new(spec) {
            Ok(guard) => guard.moments(),
            Err((pattern, message)) => {
                let patterns = path.key("patterns");
                let at = match (pattern, &written.patterns) {
                    (Some(index), Some(written)) => item_path(written, &patterns, index),
                    _ => path.clone(),
                };
                self.problems.value(&at, format!("cannot be looked for: {message}"));
                Vec::new()
            }
        }
    }

    pub(super) fn capture(&mut self, written: &FileCapture, path: &KeyPath) -> Vec<At> {
        let keys = names(written.keys.as_ref(), &path.key("keys"), self.problems);
        let Some(keys) = keys else {
            if !self.problems.has_below(path) {
                let message =
                    "\"keys\" is missing: whose prompts and answers are kept, by name or id";
                self.problems.value(path, message);
            }
            return Vec::new();
        };
        let (prompt, answer) = (written.prompt.unwrap_or(false), written.answer.unwrap_or(false));
        if !prompt && !answer {
            self.problems.value(path, "keeps nothing; write prompt: true, answer: true or both");
        }
        let without = written.redact.as_ref();
        let words = without.and_then(|it| it.words.as_ref()).map(|it| it.items.clone());
        let patterns = without.and_then(|it| it.patterns.as_ref());
        let guard = Guard::new(GuardSpec {
            words: words.unwrap_or_default(),
            patterns: patterns.map(|it| it.items.clone()).unwrap_or_default(),
            requests: false,
            answers: false,
            action: Action::Redact,
            replacement: defaults::GUARD_REPLACEMENT.to_owned(),
            hold_back: defaults::GUARD_HOLD_BACK as usize,
            answer_bytes_max: defaults::GUARD_ANSWER_BYTES_MAX,
        });
        match guard {
            Ok(without) => Capture::new(CaptureSpec {
                keys,
                prompt,
                answer,
                bytes_max: written.bytes_max.map_or(defaults::CAPTURE_BYTES_MAX, |size| size.0),
                without,
            })
            .moments(),
            Err((pattern, message)) => {
                let redact = path.key("redact").key("patterns");
                let at = match (pattern, patterns) {
                    (Some(index), Some(written)) => item_path(written, &redact, index),
                    _ => path.key("redact"),
                };
                self.problems.value(&at, format!("cannot be looked for: {message}"));
                Vec::new()
            }
        }
    }

    /// The words that are written, and those of the file: one a line.
    fn words(&mut self, written: &FileGuard, path: &KeyPath) -> Vec<String> {
        let mut words: Vec<String> =
            written.words.iter().flat_map(|it| it.items.iter().cloned()).collect();
        let Some(name) = &written.words_file else { return words };
        let file = self.context.files.folder.join(name);
        self.context.files.read.borrow_mut().push(SeenFile::look(&file));
        let mut text = String::new();
        let read = std::fs::File::open(&file)
            .and_then(|file| file.take(WORDS_BYTES_MAX + 1).read_to_string(&mut text));
        match read {
            Ok(_) if text.len() as u64 > WORDS_BYTES_MAX => {
                let message = format!("{} has more than {WORDS_BYTES_MAX} bytes", file.display());
                self.problems.value(&path.key("words_file"), message);
            }
            Ok(_) => {
                let text = text.trim_start_matches('\u{feff}').to_owned();
                words.extend(text.lines().map(|line| line.trim().to_owned()));
                self.beside = text;
            }
            Err(error) => {
                let message = format!("cannot read {}: {error}", file.display());
                self.problems.value(&path.key("words_file"), message);
            }
        }
        words
    }
}
