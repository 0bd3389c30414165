//! The events of a stream, one by one as they are complete: server-sent events, or lines of JSON.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use memchr::{memchr, memmem};

/// The mark of the byte order, in UTF-8: a stream may begin with it.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// A stream that comes in pieces.
pub(super) struct Frames {
    is_lines: bool,
    /// What has come of an event that is not complete.
    partial: BytesMut,
    /// How much of that has no end in it.
    scanned: usize,
}

impl Frames {
    /// Of lines, or else of server-sent events.
    pub(super) fn new(is_lines: bool) -> Self {
        Self { is_lines, partial: BytesMut::new(), scanned: 0 }
    }

    /// More has come.
    pub(super) fn push(&mut self, piece: &[u8]) {
        self.partial.extend_from_slice(piece);
    }

    /// Bytes of an event that is not complete.
    pub(super) fn waiting(&self) -> usize {
        self.partial.len()
    }

    /// The next event, with what ends it.
    pub(super) fn next(&mut self) -> Option<Bytes> {
        // An end may have begun in what was looked at.
        let from = self.scanned.saturating_sub(3);
        let bytes = &self.partial[from..];
        let end = if self.is_lines {
            memchr(b'\n', bytes).map(|at| at + 1)
        } else {
            // Lines end with LF, CR LF or CR, one after the other however they like.
            let ends = [&b"\n\n"[..], b"\n\r\n", b"\r\r"];
            ends.iter().filter_map(|end| Some(memmem::find(bytes, end)? + end.len())).min()
        };
        let Some(end) = end else {
            self.scanned = self.partial.len();
            return None;
        };
        self.scanned = 0;
        Some(self.partial.split_to(from + end).freeze())
    }

    /// What is left at the end of the stream.
    pub(super) fn rest(&mut self) -> Option<Bytes> {
        self.scanned = 0;
        let rest = std::mem::take(&mut self.partial).freeze();
        (!rest.is_empty()).then_some(rest)
    }

    /// What an event says, without its framing.
    pub(super) fn data(&self, event: &Bytes) -> Bytes {
        let event = &event.slice(if event.starts_with(MARK) { MARK.len() } else { 0 }..);
        if self.is_lines {
            return event.slice_ref(event.trim_ascii());
        }
        let value = |line: &'_ [u8]| -> Option<Range<usize>> {
            let value = line.strip_prefix(b"data:")?;
            let value = value.strip_prefix(b" ").unwrap_or(value);
            let start = value.as_ptr() as usize - event.as_ptr() as usize;
            Some(start..start + value.len())
        };
        let mut values = lines(event).filter_map(value);
        let Some(first) = values.next() else { return Bytes::new() };
        let rest: Vec<Range<usize>> = values.collect();
        if rest.is_empty() {
            return event.slice(first);
        }
        let all: Vec<&[u8]> =
            std::iter::once(first).chain(rest).map(|range| &event[range]).collect();
        all.join(&b"\n"[..]).into()
    }

    /// An event that says something else, with the fields that it had besides.
    pub(super) fn framed(&self, event: &Bytes, data: &str) -> Vec<u8> {
        if self.is_lines {
            return format!("{data}\n").into_bytes();
        }
        let mut next = Vec::with_capacity(event.len() + data.len());
        for line in lines(event).filter(|line| !line.starts_with(b"data:")) {
            next.extend_from_slice(line);
            next.push(b'\n');
        }
        for line in data.split('\n') {
            next.extend_from_slice(b"data: ");
            next.extend_from_slice(line.as_bytes());
            next.push(b'\n');
        }
        next.push(b'\n');
        next
    }
}

/// The lines of an event, each without its end.
fn lines(event: &[u8]) -> impl Iterator<Item = &[u8]> {
    // Of a CR and an LF, an empty line comes out between: it is no field.
    event.split(|byte| matches!(byte, b'\r' | b'\n')).filter(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_end_where_they_end_however_they_come() {
        let stream = b"data: a\n\r\n: x\r\n\r\nid: 1\rdata:b\rdata: c\r\rdata: d\r\n\ndata: e";
        let expected = [
            "data: a\n\r\n",
            ": x\r\n\r\n",
            "id: 1\rdata:b\rdata: c\r\r",
            "data: d\r\n\n",
            "data: e",
        ];
        for size in 1..stream.len() {
            let mut frames = Frames::new(false);
            let mut seen = Vec::new();
            for piece in stream.chunks(size) {
                frames.push(piece);
                while let Some(event) = frames.next() {
                    seen.push(event);
                }
            }
            seen.extend(frames.rest());
            assert_eq!(seen, expected, "{size}");
            assert_eq!((&frames.data(&seen[2])[..], frames.waiting()), (&b"b\nc"[..], 0));
            let next = frames.framed(&seen[2], "x\ny");
            assert_eq!(next, b"id: 1\ndata: x\ndata: y\n\n");
        }
    }
}
