//! Looking into a body for the model that it names, within what the gateway holds altogether.

use http::HeaderMap;

use super::super::course::{Aim, Look, refusal_of_body};
use crate::config::ReplayBounds;
use crate::lifecycle::HeldShare;
use crate::llm::{Fault, Found, Peek, PeekFault};
use crate::refusal::Refusal;

/// As far a body is read for a name that there is another way without.
const CHOICE_BYTES_MAX: usize = 1024 * 1024;

/// Of a compressed body, this much is looked at before others have their turn.
const CODED_BYTES_AT_ONCE: usize = 4 * 1024;

/// A look into a body, as long as there is something to see.
#[derive(Debug)]
pub(super) struct Looking {
    pub(super) peek: Option<Box<Peek>>,
    pub(super) aim: Aim,
    /// Whether a name is put where none is.
    pub(super) fills: bool,
    /// Whether there may be a name that was not seen.
    pub(super) is_unclear: bool,
    /// Bytes that are looked at, decoded if need be.
    pub(super) bytes_max: usize,
    /// What decoding takes.
    share: HeldShare,
    total_max: usize,
}

/// Whether a piece that begins a body is text of two or four bytes a letter, with which JSON begins for some
/// servers: a null byte or the mark of a byte order comes first.
fn is_wide(piece: &[u8]) -> bool {
    matches!(piece.trim_ascii_start().first(), Some(0 | 0xfe | 0xff))
}

impl Looking {
    /// Begins to look.
    ///
    /// # Errors
    /// When the head says that there is nothing to see, and the way or the name depends on it.
    pub(super) fn new(
        look: Option<Look>,
        headers: &HeaderMap,
        replay: &ReplayBounds,
        share: HeldShare,
    ) -> Result<Self, Refusal> {
        let aim = look.map_or(Aim::Choice, |look| look.aim);
        let bytes_max = match aim {
            Aim::Choice => replay.looked_bytes_max().min(CHOICE_BYTES_MAX),
            Aim::Way | Aim::Name | Aim::Fallback | Aim::Note => replay.looked_bytes_max(),
        };
        let peek = look.map(|look| look.peek(headers, bytes_max)).transpose();
        if let Err(fault) = peek
            && aim.is_strict()
        {
            return Err(refusal_of_body(fault, bytes_max));
        }
        let is_unclear = peek.is_err();
        let peek = peek.unwrap_or_default().map(Box::new);
        let fills = look.is_some_and(|look| look.fills);
        let total_max = replay.total_bytes_max;
        Ok(Self { peek, aim, fills, is_unclear, bytes_max, share, total_max })
    }

    /// As [`Looking::feed`], and others have their turn meanwhile: a compressed piece may decode to a thousand times
    /// its size.
    ///
    /// # Errors
    /// Why the body is refused.
    pub(super) async fn look(&mut self, chunk: &[u8]) -> Result<(), Refusal> {
        if !self.peek.as_deref().is_some_and(Peek::is_coded) {
            return self.feed(chunk);
        }
        for piece in chunk.chunks(CODED_BYTES_AT_ONCE) {
            self.feed(piece)?;
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Looks at the next piece. What cannot be looked into, and need not be, is looked into no more; but no body
    /// may name two models.
    ///
    /// # Errors
    /// Why the body is refused.
    fn feed(&mut self, piece: &[u8]) -> Result<(), Refusal> {
        let Some(peek) = &mut self.peek else { return Ok(()) };
        if let Err(fault) = peek.feed(piece) {
            let has_none = fault == PeekFault::Body(Fault::Malformed)
                && !peek.is_begun()
                && !peek.is_coded()
                && !is_wide(piece);
            let may_pass = match self.aim {
                Aim::Way => false,
                Aim::Name => has_none,
                Aim::Fallback | Aim::Choice => fault != PeekFault::Body(Fault::Ambiguous),
                Aim::Note => true,
            };
            if !may_pass {
                return Err(refusal_of_body(fault, self.bytes_max));
            }
            self.is_unclear |= !has_none;
            self.stop();
            return Ok(());
        }
        let more = peek.held_bytes().saturating_sub(self.share.bytes());
        if more > 0 && !self.share.grow(more, self.total_max) {
            if self.aim.is_strict() {
                return Err(Refusal::TooManyBodies);
            }
            self.is_unclear = true;
            self.stop();
        }
        Ok(())
    }

    /// There is nothing more to see.
    pub(super) fn stop(&mut self) {
        self.peek = None;
        self.share.shrink(0);
    }

    /// What has been found so far.
    pub(super) fn found(&self) -> Option<&Found> {
        self.peek.as_deref().and_then(Peek::found)
    }

    /// Whether there may be something to find yet.
    pub(super) fn is_searching(&self) -> bool {
        self.peek.as_deref().is_some_and(|peek| peek.found().is_none() && !peek.is_done())
    }
}
