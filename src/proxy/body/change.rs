//! Other bytes in the place of those that came: another name for the model, what a stream is to tell, all of a body.

use std::ops::Range;

use bytes::Bytes;
use http::HeaderMap;
use smallvec::SmallVec;

use super::super::course::{Look, refusal_of_body};
use super::{Body, Content, Place, Splice, is_plain};
use crate::config::ReplayBounds;
use crate::llm::{self, Found, PeekFault};
use crate::refusal::Refusal;

/// What a change does to the length of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Resized {
    /// Nothing.
    No,
    /// It is this long now, and is not compressed.
    To(usize),
    /// It gets longer by the first and shorter by the second.
    By(usize, usize),
}

impl Body {
    /// All of it, decoded; none where there is none.
    ///
    /// # Errors
    /// With nothing when it is not here as a whole; else why it cannot be decoded.
    pub(in super::super) fn decoded(
        &self,
        coding: &[u8],
        replay: &ReplayBounds,
    ) -> Result<Option<Bytes>, Option<Refusal>> {
        match &self.content {
            Content::Empty => Ok(None),
            Content::Passing { .. } => Err(None),
            Content::Held { bytes, .. } if self.is_edited || is_plain(coding) => {
                Ok(Some(bytes.clone()))
            }
            Content::Held { bytes, .. } => {
                let bytes_max = replay.body_bytes_max;
                let body = llm::decode(coding, bytes, bytes_max);
                let why = |fault| Some(refusal_of_body(PeekFault::Coding(fault), bytes_max));
                body.map(|body| Some(body.into())).map_err(why)
            }
        }
    }

    /// All of it as a backend gets it that has this name for the model, and whether that is not what came; none where it is
    /// not here as a whole.
    pub(in super::super) fn copy(
        &mut self,
        name: Option<&str>,
        coding: &[u8],
        replay: &ReplayBounds,
    ) -> Option<(Bytes, bool)> {
        let resized = self.rewrite(name, false, coding, replay).ok()?;
        let own = match (&self.content, self.splice.take()) {
            (Content::Held { .. }, Some(Splice::Whole { bytes, .. })) => bytes,
            (Content::Held { bytes, .. }, _) => bytes.clone(),
            (Content::Empty, _) => Bytes::new(),
            (Content::Passing { .. }, _) => return None,
        };
        Some((own, resized != Resized::No))
    }

    /// Puts another body, not compressed, in the place of the one that came as a whole, and looks into it again.
    ///
    /// # Errors
    /// When there is no room for it, or it names no model where it has to.
    pub(in super::super) fn edit(
        &mut self,
        edited: Bytes,
        look: Option<Look>,
        headers: &HeaderMap,
        replay: &ReplayBounds,
    ) -> Result<(), Refusal> {
        let Content::Held { bytes, share, .. } = &mut self.content else { return Ok(()) };
        let more = edited.len().saturating_sub(share.bytes());
        if more > 0 && !share.grow(more, replay.total_bytes_max) {
            return Err(Refusal::TooManyBodies);
        }
        share.shrink(edited.len());
        *bytes = edited;
        self.is_edited = true;
        let Some(look) = look else { return Ok(()) };
        let bytes_max = replay.body_bytes_max;
        let mut peek = match look.peek_decoded(headers, bytes_max) {
            Ok(peek) => peek,
            Err(_) if !look.aim.is_strict() => return Ok(()),
            Err(fault) => return Err(refusal_of_body(fault, bytes_max)),
        };
        match peek.feed(bytes) {
            Err(fault) if look.aim.is_strict() => return Err(refusal_of_body(fault, bytes_max)),
            _ => {}
        }
        self.place = Place::of(&peek, look.fills);
        self.facts = peek.facts().cloned().map(Box::new);
        Ok(())
    }

    /// The change that puts `name` in the place of the name that came.
    fn renaming(&self, name: Option<&str>) -> Option<(Range<usize>, Vec<u8>)> {
        let (place, name) = (self.place.as_ref()?, name?);
        let (before, after) = &place.around;
        let raw = || [before, &Found::replacement(name, place.is_form)[..], after].concat();
        (place.name != name).then(|| (place.at.clone(), raw()))
    }

    /// The change that has usage told in a stream. It takes a body that is here as a whole.
    fn asking(&self) -> Option<(Range<usize>, Vec<u8>)> {
        let is_held = matches!(self.content, Content::Held { .. });
        self.facts.as_ref().filter(|_| is_held)?.stream_options.including_usage()
    }

    /// For the attempt that begins, puts `name` in the place of the name that came (none: leaves that), and has
    /// the backend tell usage in its stream if `asks`.
    ///
    /// # Errors
    /// When there is no room for it, or a compressed body cannot be decoded: its end was not looked at before.
    pub(in super::super) fn rewrite(
        &mut self,
        name: Option<&str>,
        asks: bool,
        coding: &[u8],
        replay: &ReplayBounds,
    ) -> Result<Resized, Refusal> {
        self.splice = None;
        let renaming = self.renaming(name);
        let asking = self.asking().filter(|_| asks);
        self.asks_for_usage = asking.is_some();
        let is_coded = !is_plain(coding) && !self.is_edited;
        match (&mut self.content, renaming, asking) {
            (Content::Held { bytes, .. }, None, None) if self.is_edited => {
                Ok(Resized::To(bytes.len()))
            }
            (Content::Empty, ..) | (_, None, None) => Ok(Resized::No),
            (Content::Held { bytes, share, .. }, renaming, asking) => {
                let decoded;
                let bytes = if is_coded {
                    let body = llm::decode(coding, bytes, replay.body_bytes_max);
                    decoded = body.map_err(|fault| {
                        refusal_of_body(PeekFault::Coding(fault), replay.body_bytes_max)
                    })?;
                    &decoded[..]
                } else {
                    &bytes[..]
                };
                let mut edits: SmallVec<[_; 2]> = renaming.into_iter().chain(asking).collect();
                // From the last one on, so that the places of the others stay.
                edits.sort_by_key(|(at, _)| std::cmp::Reverse(at.start));
                let mut whole = Bytes::new();
                for (at, new) in edits {
                    let before = if whole.is_empty() { bytes } else { &whole };
                    whole = llm::spliced(before, at, &new).into();
                }
                let length = whole.len();
                let mut share = share.another();
                if !share.grow(length, replay.total_bytes_max) {
                    return Err(Refusal::TooManyBodies);
                }
                self.splice = Some(Splice::Whole { bytes: whole, _share: share });
                Ok(Resized::To(length))
            }
            (Content::Passing { .. }, Some((at, raw)), _) => {
                let resized = Resized::By(raw.len(), at.len());
                self.splice = Some(Splice::At(at, raw.into()));
                Ok(resized)
            }
            (Content::Passing { .. }, None, _) => Ok(Resized::No),
        }
    }
}
