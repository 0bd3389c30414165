//! Reads the numbers of usage from a JSON document that comes piece by piece.
//!
//! It takes what it reads for well-formed: whether it is, is for the client to say. So all that is of no
//! interest is jumped over from bracket to bracket, and of a document of any size nothing is kept.

use memchr::{memchr, memchr3};

use super::{Counts, Field};

/// Longest key that is of interest, in bytes.
const KEY_BYTES_MAX: usize = 32;

/// Objects within each other that are looked into.
const SCOPES_MAX: usize = 5;

/// Reads one document.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    state: State,
    /// The objects that lead to where it is, the innermost last.
    scopes: [Scope; SCOPES_MAX],
    depth: usize,
    key: [u8; KEY_BYTES_MAX],
    /// More than there is room for: a longer one.
    key_bytes: usize,
    wanted: Wanted,
    number: u64,
    pub(super) counts: Counts,
    pub(super) seen: Seen,
}

/// What a document is, as far as it was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Whether it has a piece of an answer.
    pub(super) output: bool,
    /// Whether it has one as a line of Ollama's has.
    pub(super) line: bool,
    /// Whether `choices` is there and empty.
    pub(super) no_choices: bool,
    /// Whether there is an object with usage.
    pub(super) usage: bool,
    /// Whether it tells an error.
    pub(super) error: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before a value.
    Value,
    /// Before a key, or behind the last member.
    Key,
    InKey {
        is_escaped: bool,
    },
    Colon,
    Number,
    /// In the rest of a number or a word.
    Rest,
    Text {
        is_escaped: bool,
    },
    /// In an object or list of no interest: its brackets, and how many are open.
    Within {
        open: u8,
        close: u8,
        depth: u32,
        text: Option<bool>,
    },
    /// Behind the bracket of a list that may be empty.
    FirstOf,
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    /// The list that Gemini streams its answers in.
    List,
    Root,
    /// What has usage in it.
    Wrapper,
    Usage,
    Details,
}

/// What a value is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Nothing,
    Number(Field),
    Object(Scope),
    /// `choices` or `candidates`.
    Choices,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            state: State::Value,
            scopes: [Scope::Root; SCOPES_MAX],
            depth: 0,
            key: [0; KEY_BYTES_MAX],
            key_bytes: 0,
            wanted: Wanted::Object(Scope::Root),
            number: 0,
            counts: Counts::default(),
            seen: Seen::default(),
        }
    }
}

impl Reader {
    /// Another document begins.
    pub(super) fn begin(&mut self) {
        self.state = State::Value;
        self.depth = 0;
        self.wanted = Wanted::Object(Scope::Root);
        self.counts = Counts::default();
        self.seen = Seen::default();
    }

    /// Whether the document has ended.
    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Reads the next piece.
    pub(super) fn feed(&mut self, piece: &[u8]) {
        let mut at = 0;
        while at < piece.len() {
            at = match self.state {
                State::Text { is_escaped } => self.text(piece, at, is_escaped),
                State::InKey { is_escaped } => self.in_key(piece, at, is_escaped),
                State::Within { open, close, depth, text } => {
                    self.within(piece, at, (open, close), depth, text)
                }
                state => self.step(state, piece[at], at),
            };
        }
    }

    /// Reads a byte between and in short values; gives where to go on.
    fn step(&mut self, state: State, byte: u8, at: usize) -> usize {
        match (state, byte) {
            (State::Done, _) => return usize::MAX,
            (State::Number, b'0'..=b'9') => {
                let digit = u64::from(byte - b'0');
                self.number = self.number.saturating_mul(10).saturating_add(digit);
            }
            (State::Number | State::Rest, b',' | b'}' | b']') => {
                self.number_ends(state == State::Number);
                self.value_ends();
                return at;
            }
            // A fraction or an exponent: what came before counts, and there are no parts of tokens.
            (State::Number, b'.') => {
                self.number_ends(true);
                self.state = State::Rest;
            }
            (State::Number, b' ' | b'\t' | b'\n' | b'\r') => self.number_ends(true),
            (State::Number, _) => self.state = State::Rest,
            (State::Rest, _) | (_, b' ' | b'\t' | b'\n' | b'\r') => {}
            (State::Key, b'"') => {
                self.key_bytes = 0;
                self.state = State::InKey { is_escaped: false };
            }
            (State::Key, b'}' | b']') => self.close(),
            // Between the members of Gemini's list.
            (State::Key, b'{') if self.scope() == Some(Scope::List) => self.open(Scope::Root),
            (State::Key, _) => {}
            (State::Colon, b':') => self.state = State::Value,
            (State::FirstOf, b']') => {
                self.seen.no_choices = true;
                self.value_ends();
            }
            (State::FirstOf, _) => {
                self.seen.output = true;
                self.state = State::Within { open: b'[', close: b']', depth: 1, text: None };
                return at;
            }
            (State::Value, _) => self.value(byte),
            (State::Colon | State::Text { .. } | State::InKey { .. } | State::Within { .. }, _) => {
            }
        }
        at + 1
    }

    fn scope(&self) -> Option<Scope> {
        self.scopes.get(self.depth.checked_sub(1)?).copied()
    }

    /// A value begins.
    fn value(&mut self, byte: u8) {
        match (byte, self.wanted) {
            (b'"', _) => self.state = State::Text { is_escaped: false },
            (b'{', Wanted::Object(scope)) => self.open(scope),
            (b'[', Wanted::Object(Scope::Root)) if self.depth == 0 => self.open(Scope::List),
            (b'[', Wanted::Choices) => self.state = State::FirstOf,
            (b'{', _) => {
                self.state = State::Within { open: b'{', close: b'}', depth: 1, text: None };
            }
            (b'[', _) => {
                self.state = State::Within { open: b'[', close: b']', depth: 1, text: None };
            }
            (b'0'..=b'9', Wanted::Number(_)) => {
                self.number = u64::from(byte - b'0');
                self.state = State::Number;
            }
            _ => self.state = State::Rest,
        }
    }

    fn open(&mut self, scope: Scope) {
        if self.depth == SCOPES_MAX {
            self.state = State::Within { open: b'{', close: b'}', depth: 1, text: None };
            return;
        }
        self.seen.usage |= scope == Scope::Usage;
        self.scopes[self.depth] = scope;
        self.depth += 1;
        self.state = State::Key;
    }

    fn close(&mut self) {
        self.depth = self.depth.saturating_sub(1);
        self.value_ends();
    }

    fn value_ends(&mut self) {
        self.wanted = Wanted::Nothing;
        self.state = if self.depth == 0 { State::Done } else { State::Key };
    }

    fn number_ends(&mut self, is_number: bool) {
        if let Wanted::Number(field) = self.wanted
            && is_number
        {
            self.counts.set(field, self.number);
            self.wanted = Wanted::Nothing;
        }
    }

    /// Reads on in a text that is a value.
    fn text(&mut self, piece: &[u8], at: usize, is_escaped: bool) -> usize {
        match text_end(&piece[at..], is_escaped) {
            Ok(end) => {
                self.value_ends();
                at + end + 1
            }
            Err(is_escaped) => {
                self.state = State::Text { is_escaped };
                piece.len()
            }
        }
    }

    fn in_key(&mut self, piece: &[u8], at: usize, is_escaped: bool) -> usize {
        let end = text_end(&piece[at..], is_escaped);
        let part = &piece[at..at + end.unwrap_or(piece.len() - at)];
        if let Some(room) = self.key.get_mut(self.key_bytes..self.key_bytes + part.len()) {
            room.copy_from_slice(part);
        }
        self.key_bytes = (self.key_bytes + part.len()).min(KEY_BYTES_MAX + 1);
        match end {
            Ok(end) => {
                self.key_ends();
                at + end + 1
            }
            Err(is_escaped) => {
                self.state = State::InKey { is_escaped };
                piece.len()
            }
        }
    }

    fn key_ends(&mut self) {
        self.state = State::Colon;
        self.wanted = match (self.scope(), self.key.get(..self.key_bytes)) {
            (Some(scope), Some(key)) => wanted(scope, key),
            _ => Wanted::Nothing,
        };
        if self.scope() == Some(Scope::Root) {
            match self.key.get(..self.key_bytes) {
                // Anthropic and OpenAI's newer APIs; llama.cpp's own; TGI's own.
                Some(b"delta" | b"content" | b"token") => self.seen.output = true,
                Some(b"message" | b"response") => self.seen.line = true,
                Some(b"error") => self.seen.error = true,
                _ => {}
            }
        }
    }

    /// Reads on in an object or list of no interest.
    fn within(
        &mut self,
        piece: &[u8],
        mut at: usize,
        (open, close): (u8, u8),
        mut depth: u32,
        mut text: Option<bool>,
    ) -> usize {
        loop {
            if let Some(is_escaped) = text {
                match text_end(&piece[at..], is_escaped) {
                    Ok(end) => {
                        text = None;
                        at += end + 1;
                    }
                    Err(is_escaped) => {
                        let text = Some(is_escaped);
                        self.state = State::Within { open, close, depth, text };
                        return piece.len();
                    }
                }
            }
            let Some(found) = memchr3(open, close, b'"', &piece[at..]) else {
                self.state = State::Within { open, close, depth, text };
                return piece.len();
            };
            let byte = piece[at + found];
            at += found + 1;
            if byte == b'"' {
                text = Some(false);
            } else if byte == open {
                depth = depth.saturating_add(1);
            } else {
                depth -= 1;
                if depth == 0 {
                    self.value_ends();
                    return at;
                }
            }
        }
    }
}

/// Where a text ends; or whether the next piece begins with the second half of an escape.
fn text_end(piece: &[u8], is_escaped: bool) -> Result<usize, bool> {
    let start = usize::from(is_escaped);
    let mut search = start;
    loop {
        let quote = memchr(b'"', piece.get(search..).unwrap_or_default());
        let end = quote.map_or(piece.len(), |quote| search + quote);
        let before = piece.get(start..end).unwrap_or_default();
        let backslashes = before.iter().rev().take_while(|byte| **byte == b'\\').count();
        let escapes_next = backslashes % 2 == 1;
        match quote {
            None => return Err(escapes_next),
            Some(_) if escapes_next => search = end + 1,
            Some(_) => return Ok(end),
        }
    }
}

/// What the value of a key is to us.
fn wanted(scope: Scope, key: &[u8]) -> Wanted {
    use Field::{
        CacheReadBeside, CacheWritten, CacheWrittenBeside, Cached, Input, Output, Reasoning,
        ThoughtsBeside, ToolPromptBeside, Total,
    };
    match (scope, key) {
        (Scope::Root | Scope::Wrapper, b"usage" | b"usageMetadata") => Wanted::Object(Scope::Usage),
        (Scope::Root, b"response" | b"message" | b"x_groq") => Wanted::Object(Scope::Wrapper),
        (Scope::Root, b"choices" | b"candidates") => Wanted::Choices,
        // Ollama, and llama.cpp's own API.
        (Scope::Root, b"prompt_eval_count" | b"tokens_evaluated") => Wanted::Number(Input),
        (Scope::Root, b"eval_count" | b"tokens_predicted") => Wanted::Number(Output),
        (Scope::Usage, key) => match key {
            b"prompt_tokens" | b"input_tokens" | b"promptTokenCount" => Wanted::Number(Input),
            b"completion_tokens" | b"output_tokens" | b"candidatesTokenCount" => {
                Wanted::Number(Output)
            }
            b"total_tokens" | b"totalTokenCount" => Wanted::Number(Total),
            b"cached_tokens" | b"cachedContentTokenCount" | b"prompt_cache_hit_tokens" => {
                Wanted::Number(Cached)
            }
            b"reasoning_tokens" => Wanted::Number(Reasoning),
            b"cache_read_input_tokens" => Wanted::Number(CacheReadBeside),
            b"cache_creation_input_tokens" => Wanted::Number(CacheWrittenBeside),
            b"thoughtsTokenCount" => Wanted::Number(ThoughtsBeside),
            b"toolUsePromptTokenCount" => Wanted::Number(ToolPromptBeside),
            b"prompt_tokens_details"
            | b"input_tokens_details"
            | b"input_token_details"
            | b"completion_tokens_details"
            | b"output_tokens_details"
            | b"output_token_details" => Wanted::Object(Scope::Details),
            _ => Wanted::Nothing,
        },
        (Scope::Details, b"cached_tokens") => Wanted::Number(Cached),
        (Scope::Details, b"cache_write_tokens") => Wanted::Number(CacheWritten),
        (Scope::Details, b"reasoning_tokens" | b"thinking_tokens") => Wanted::Number(Reasoning),
        _ => Wanted::Nothing,
    }
}
