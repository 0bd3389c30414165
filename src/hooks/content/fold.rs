//! Text as it is compared: without case, and with wide forms of Latin letters as narrow ones.

use std::borrow::Cow;
use std::ops::Range;

/// What a letter is compared as: full-width forms (U+FF01 to U+FF5E) and the ideographic space are the ASCII that they
/// stand for.
fn narrow(letter: char) -> char {
    match letter {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(letter as u32 - 0xfee0).unwrap_or(letter),
        '\u{3000}' => ' ',
        _ => letter,
    }
}

/// What letters are compared as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Folding {
    /// Wide as narrow.
    Width,
    /// That, and without case.
    WidthAndCase,
}

impl Folding {
    /// The text as it is compared.
    pub(super) fn fold(self, text: &str) -> Cow<'_, str> {
        match self {
            Self::Width if text.is_ascii() => Cow::Borrowed(text),
            Self::WidthAndCase if text.is_ascii() => {
                let is_lower = !text.bytes().any(|byte| byte.is_ascii_uppercase());
                if is_lower { Cow::Borrowed(text) } else { Cow::Owned(text.to_ascii_lowercase()) }
            }
            Self::Width => Cow::Owned(text.chars().map(narrow).collect()),
            Self::WidthAndCase => {
                Cow::Owned(text.chars().map(narrow).flat_map(char::to_lowercase).collect())
            }
        }
    }

    fn length(self, letter: char) -> usize {
        let narrow = narrow(letter);
        match self {
            Self::Width => narrow.len_utf8(),
            Self::WidthAndCase => narrow.to_lowercase().map(char::len_utf8).sum(),
        }
    }

    /// Where in the text things are that were found in what it folds to: all letters that they touch. They come in their
    /// order, and overlap nowhere.
    pub(super) fn unfold(self, text: &str, found: &[Range<usize>]) -> Vec<Range<usize>> {
        let mut unfolded = Vec::with_capacity(found.len());
        let mut letters = text.char_indices();
        let mut folded = 0;
        // The letter that was looked at last: one may be the end of a thing and the beginning of the next.
        let mut last = letters.next();
        for range in found {
            let mut start = None;
            let end = loop {
                let Some((at, letter)) = last else { break text.len() };
                if folded >= range.end {
                    break at;
                }
                let next = folded + self.length(letter);
                if next > range.start && start.is_none() {
                    start = Some(at);
                }
                // Within the folds of one letter.
                if next > range.end {
                    break at + letter.len_utf8();
                }
                folded = next;
                last = letters.next();
            };
            unfolded.push(start.unwrap_or(end)..end);
        }
        unfolded
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn case_and_width_make_no_difference() {
        let fold = |text| Folding::WidthAndCase.fold(text).into_owned();
        assert_eq!(fold("ＳＥＣＲＥＴ　１２３！"), "secret 123!");
        assert_eq!(fold("Größe ÄÖ 密码"), "größe äö 密码");
        assert_eq!(Folding::Width.fold("Ａbc"), "Abc");
        // One letter may become two.
        assert_eq!(Folding::WidthAndCase.unfold("aİb", &[0..2, 2..5]), [0..3, 1..4]);
    }

    proptest! {
        #[test]
        fn what_is_found_is_where_it_was(before in "\\PC{0,8}", word in "\\PC{1,8}", after in "\\PC{0,8}") {
            for folding in [Folding::Width, Folding::WidthAndCase] {
                let text = format!("{before}{word}{after}");
                let start = folding.fold(&before).len();
                let range = start..start + folding.fold(&word).len();
                let found = folding.unfold(&text, &[range]);
                prop_assert_eq!(&text[found[0].clone()], &word);
            }
        }
    }
}
