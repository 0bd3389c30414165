//! A stream that is looked at as it passes: server-sent events, or lines of JSON.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use serde_json::Value;

use super::super::{AnswerBody, Cut, Found};
use super::frames::Frames;
use super::guard::{Action, CUT, Guard, Inner, cut};
use super::texts;

/// The most texts of one stream.
const TEXTS_MAX: usize = 4096;

/// A text that none of so many events has gone on with, and as many as there are texts four times over, is at its end: what
/// waits for it goes on. (Parts of one text are at most as far from each other as there are answers beside each other.)
const PATIENCE: u64 = 64;

/// The most events that wait for those behind them.
const EVENTS_MAX: usize = 4096;

/// A stream that passes.
pub(super) struct Stream {
    guard: Guard,
    frames: Frames,
    /// Events that wait for those behind them.
    waiting: VecDeque<Event>,
    waiting_bytes: usize,
    texts: Vec<Text>,
    /// How many events have come.
    count: u64,
    found: Found,
}

/// A text that goes on from event to event. Places in it are bytes from its beginning.
struct Text {
    way: String,
    /// The end of it: what something may begin in that goes on behind it, and what stands before that.
    recent: String,
    /// Where that begins.
    from: usize,
    /// Up to here all was looked at.
    seen: usize,
    /// Up to here nothing begins that may still go on.
    settled: usize,
    /// Which event was the last to go on with it.
    last: u64,
    /// What is taken out of it, as far as it has not been sent on.
    taken_out: Vec<Range<usize>>,
}

/// An event that waits.
struct Event {
    bytes: Bytes,
    pieces: Vec<Piece>,
}

/// What an event has of a text.
struct Piece {
    text: usize,
    at: Range<usize>,
}

impl Stream {
    pub(super) fn new(guard: Guard, is_lines: bool) -> Self {
        Self {
            guard,
            frames: Frames::new(is_lines),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            texts: Vec::new(),
            count: 0,
            found: Found::default(),
        }
    }

    /// An event has come.
    fn take(&mut self, bytes: Bytes) -> Result<(), Cut> {
        let data = self.frames.data(&bytes);
        let mut pieces: Vec<Piece> = Vec::new();
        self.count += 1;
        let (known, count) = (&mut self.texts, self.count);
        let mut seen = |way: &str, text: &str| {
            // More of them end the answer.
            if known.len() > TEXTS_MAX {
                return;
            }
            // Those that go on are the last ones.
            let at = known.iter().rposition(|known| known.way == way).unwrap_or_else(|| {
                known.push(Text::new(way));
                known.len() - 1
            });
            let own = &mut known[at];
            let start = own.from + own.recent.len();
            own.recent.push_str(text);
            own.last = count;
            pieces.push(Piece { text: at, at: start..start + text.len() });
        };
        // The end of a stream, or what is no JSON, is one text.
        match serde_json::from_slice(&data) {
            Ok(document) => texts::each_of(&document, &mut seen),
            Err(_) if data.is_empty() => {}
            Err(_) => seen("", &String::from_utf8_lossy(&data)),
        }
        if self.texts.len() > TEXTS_MAX {
            return Err(cut("the answer has more texts at once than are looked at here"));
        }
        for piece in &pieces {
            let found = self.texts[piece.text].look(&self.guard.0, false);
            self.judge(found)?;
        }
        self.waiting_bytes += bytes.len();
        self.waiting.push_back(Event { bytes, pieces });
        Ok(())
    }

    /// Something was found in a text, or nothing.
    fn judge(&mut self, found: bool) -> Result<(), Cut> {
        self.found.something |= found;
        if found && self.guard.0.action == Action::Refuse {
            return Err(cut(CUT));
        }
        Ok(())
    }

    /// Texts that nothing goes on with are at their end.
    fn finish(&mut self, is_end: bool) -> Result<(), Cut> {
        let patience = PATIENCE.max(4 * self.texts.len() as u64);
        for at in 0..self.texts.len() {
            let text = &mut self.texts[at];
            let is_over = is_end || self.count - text.last > patience;
            if is_over && !text.is_settled() {
                let found = text.look(&self.guard.0, true);
                self.judge(found)?;
            }
        }
        Ok(())
    }

    /// Sends on what needs not wait.
    fn release(&mut self, is_end: bool, passes: &mut BytesMut) -> Result<(), Cut> {
        let bytes_max = self.guard.0.answer_bytes_max;
        while let Some(event) = self.waiting.front() {
            let is_settled = |piece: &Piece| self.texts[piece.text].settled >= piece.at.end;
            if !is_end && !event.pieces.iter().all(is_settled) {
                if self.waiting.len() > EVENTS_MAX || self.waiting_bytes > bytes_max {
                    return Err(cut("the answer holds back more than is looked at here"));
                }
                return Ok(());
            }
            let Some(event) = self.waiting.pop_front() else { return Ok(()) };
            self.waiting_bytes -= event.bytes.len();
            let is_hit = |piece: &Piece| {
                let touches =
                    |out: &Range<usize>| out.start < piece.at.end && out.end > piece.at.start;
                self.texts[piece.text].taken_out.iter().any(touches)
            };
            if event.pieces.iter().any(is_hit) {
                let next = self.rewritten(&event).ok_or_else(|| cut(CUT))?;
                passes.extend_from_slice(&next);
            } else {
                passes.extend_from_slice(&event.bytes);
            }
            for piece in &event.pieces {
                let text = &mut self.texts[piece.text];
                text.taken_out.retain(|out| out.end > piece.at.end);
            }
        }
        Ok(())
    }

    /// An event without what is taken out of its texts; none where they cannot be told apart.
    fn rewritten(&self, event: &Event) -> Option<Vec<u8>> {
        let data = self.frames.data(&event.bytes);
        let mut pieces = event.pieces.iter();
        let mut are_all_known = true;
        let mut next = |text: &mut String| match pieces.next() {
            Some(piece) if piece.at.len() == text.len() => {
                *text = self.texts[piece.text].without(piece, text, &self.guard.0.replacement);
            }
            _ => are_all_known = false,
        };
        let data = match serde_json::from_slice::<Value>(&data) {
            Ok(mut document) => {
                texts::change(&mut document, &mut next);
                document.to_string()
            }
            Err(_) => {
                let mut text = String::from_utf8_lossy(&data).into_owned();
                next(&mut text);
                text
            }
        };
        (are_all_known && pieces.next().is_none()).then(|| self.frames.framed(&event.bytes, &data))
    }
}

impl Text {
    fn new(way: &str) -> Self {
        let (way, recent) = (way.to_owned(), String::new());
        Self { way, recent, from: 0, seen: 0, settled: 0, last: 0, taken_out: Vec::new() }
    }

    fn is_settled(&self) -> bool {
        self.settled == self.from + self.recent.len()
    }

    /// Looks at what is new of it, with what stands before it, and whether it ends here; whether there is something.
    fn look(&mut self, own: &Inner, is_end: bool) -> bool {
        let end = self.from + self.recent.len();
        // Whether a pattern ends with the last letter, the next one may have a say in.
        let waits_for_next = own.matcher.has_patterns() && !is_end;
        let judged = end - if waits_for_next { tail(&self.recent, 1) } else { 0 };
        let mut is_found = false;
        if own.matcher.is_in(&self.recent) {
            for range in own.matcher.find(&self.recent) {
                let range = self.from + range.start..self.from + range.end;
                // What ends before what is new was found before.
                if range.end > self.seen && range.end <= judged {
                    is_found = true;
                    self.take_out(own, range);
                }
            }
        }
        self.seen = judged;
        let waits = match own.action {
            _ if is_end => 0,
            // Nobody waits for what is only counted.
            Action::Count => 0,
            _ if !own.matcher.has_patterns() && !own.matcher.is_within_word(&self.recent) => 0,
            Action::Refuse | Action::Redact => tail(&self.recent, own.hold_back),
        };
        self.settled = end - waits;
        let kept = tail(&self.recent, own.hold_back.saturating_mul(2));
        let gone = self.recent.len() - kept;
        self.recent.drain(..gone);
        self.from += gone;
        is_found
    }

    /// Together with what it overlaps.
    fn take_out(&mut self, own: &Inner, mut range: Range<usize>) {
        if own.action != Action::Redact {
            return;
        }
        self.taken_out.retain(|out| {
            let overlaps = out.start < range.end && range.start < out.end;
            if overlaps {
                range = range.start.min(out.start)..range.end.max(out.end);
            }
            !overlaps
        });
        self.taken_out.push(range);
        self.taken_out.sort_unstable_by_key(|out| out.start);
    }

    /// A piece of it without what is taken out. The replacement is where that begins.
    fn without(&self, piece: &Piece, text: &str, replacement: &str) -> String {
        let mut next = String::with_capacity(text.len());
        let mut from = piece.at.start;
        let own = |range: Range<usize>| {
            text.get(range.start - piece.at.start..range.end - piece.at.start).unwrap_or_default()
        };
        for out in &self.taken_out {
            if out.end <= piece.at.start || out.start >= piece.at.end {
                continue;
            }
            if out.start >= piece.at.start {
                next.push_str(own(from..out.start));
                next.push_str(replacement);
            }
            from = out.end.min(piece.at.end);
        }
        next.push_str(own(from..piece.at.end));
        next
    }
}

/// The bytes of so many letters at the end of a text.
fn tail(text: &str, letters: usize) -> usize {
    let first = text.char_indices().rev().take(letters).last();
    first.map_or(0, |(at, _)| text.len() - at)
}

impl AnswerBody for Stream {
    fn pass(&mut self, piece: &mut Option<Bytes>, is_end: bool) -> Result<(), Cut> {
        self.frames.push(&piece.take().unwrap_or_default());
        while let Some(event) = self.frames.next() {
            self.take(event)?;
        }
        if is_end && let Some(rest) = self.frames.rest() {
            self.take(rest)?;
        }
        if self.frames.waiting() > self.guard.0.answer_bytes_max {
            return Err(cut("the answer has a larger event than is looked at here"));
        }
        self.finish(is_end)?;
        let mut passes = BytesMut::new();
        self.release(is_end, &mut passes)?;
        *piece = (!passes.is_empty()).then(|| passes.freeze());
        Ok(())
    }

    fn found(&self) -> Found {
        self.found
    }

    fn note(&mut self) -> Option<(&'static str, String)> {
        None
    }
}
