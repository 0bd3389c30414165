//! Looking for one text in the bytes of a body, whatever the body is.

use std::fmt::Debug;
use std::ops::Range;

use super::facts::Facts;

/// Why a body does not name one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is not what it says it is: not JSON, not an object, not a multipart form.
    Malformed,
    /// It is nested more deeply than is followed.
    TooDeep,
    /// The member stands there twice, also if one is spelled `MODEL`: parsers disagree on which counts.
    Ambiguous,
    /// The member's value is not text.
    NotText,
    /// The member's value is longer than any name is.
    TooLong,
}

/// Text that was found, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The text, without quotes and escapes.
    pub text: String,
    /// Where it stands in the body, raw and with its quotes where it has any.
    pub at: Range<usize>,
}

/// Where a text could stand that a body lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// What is there: nothing, or a JSON null.
    pub at: Range<usize>,
    /// What goes before the text.
    pub before: Vec<u8>,
    /// What goes behind it.
    pub after: &'static [u8],
}

/// Reads a body piece by piece as it comes.
pub trait Search: Debug + Send + Sync {
    /// Reads the next piece.
    ///
    /// # Errors
    /// What is wrong with the body so far; there is no way on from there.
    fn feed(&mut self, piece: &[u8]) -> Result<(), Fault>;

    /// What has been found so far.
    fn found(&self) -> Option<&Found>;

    /// Where the text could stand, if a complete body lacks it and has a place for it.
    fn gap(&self) -> Option<Gap>;

    /// What else the body says, if that was asked for.
    fn facts(&self) -> Option<&Facts> {
        None
    }

    /// Whether the body has begun as one that can be read.
    fn is_begun(&self) -> bool;

    /// Whether the body is complete: nothing that follows counts.
    fn is_done(&self) -> bool;

    /// The body ends here.
    ///
    /// # Errors
    /// When it is not complete.
    fn finish(&self) -> Result<(), Fault> {
        if self.is_done() { Ok(()) } else { Err(Fault::Malformed) }
    }
}
