//! Takes out of an event stream the event that tells usage and nothing else, for a client that did not ask for it.

use bytes::{Bytes, BytesMut};

use super::meter::Meter;

/// An event that is longer is not held back until its end: one that tells usage has a few hundred bytes.
const HELD_BYTES_MAX: usize = 16 * 1024;

/// An event stream that passes. Of an event that is not complete, what is there waits for the rest: before that no
/// client can make anything of it.
#[derive(Clone, Debug, Default)]
pub struct Trim {
    held: BytesMut,
    /// Whether the event that passes has begun to pass already.
    is_begun: bool,
}

impl Trim {
    /// What passes now of a stream whose next piece is this; the meter reads all of it. At the end, all that is
    /// left passes.
    #[must_use]
    pub fn pass(&mut self, meter: &mut Meter, piece: &Bytes, is_end: bool) -> Bytes {
        let mut passes = BytesMut::new();
        // Up to here everything is decided upon, and from here on nothing is taken out yet.
        let mut decided = 0;
        let mut is_changed = !self.held.is_empty();
        meter.follow(piece, |event| {
            if event.is_usage_only && !self.is_begun {
                if !is_changed {
                    passes.extend_from_slice(&piece[..decided]);
                }
                is_changed = true;
                self.held.clear();
            } else if is_changed {
                passes.extend_from_slice(&std::mem::take(&mut self.held));
                passes.extend_from_slice(&piece[decided..event.end]);
            }
            decided = event.end;
            self.is_begun = false;
        });
        let rest = &piece[decided..];
        if !is_end && !self.is_begun && self.held.len() + rest.len() <= HELD_BYTES_MAX {
            self.held.extend_from_slice(rest);
            return if is_changed { passes.freeze() } else { piece.slice(..decided) };
        }
        self.is_begun |= !rest.is_empty() || !self.held.is_empty();
        if !is_changed {
            return piece.clone();
        }
        passes.extend_from_slice(&std::mem::take(&mut self.held));
        passes.extend_from_slice(rest);
        passes.freeze()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Kind;
    use super::*;

    fn trimmed(stream: &[u8], cuts: &[usize]) -> Vec<u8> {
        let mut trim = Trim::default();
        let mut meter = Meter::new(Kind::Events);
        let mut passed = Vec::new();
        let last = cuts.len() - 2;
        for (at, pair) in cuts.windows(2).enumerate() {
            let piece = Bytes::copy_from_slice(&stream[pair[0]..pair[1]]);
            passed.extend(trim.pass(&mut meter, &piece, at == last));
        }
        passed
    }

    const USAGE: &str = "data: {\"id\":\"x\",\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2}}";

    #[test]
    fn the_event_with_usage_alone_is_taken_out_wherever_the_stream_is_cut() {
        for end in ["\n\n", "\r\n\r\n"] {
            let first = format!("data: {{\"choices\":[{{\"delta\":{{}}}}],\"usage\":null}}{end}");
            let filters = format!("data: {{\"choices\":[],\"prompt_filter_results\":[]}}{end}");
            let done = format!("data: [DONE]{end}");
            let stream = format!("{filters}{first}{USAGE}{end}{done}");
            let expected = format!("{filters}{first}{done}");
            let stream = stream.as_bytes();
            for cut in 0..=stream.len() {
                let passed = trimmed(stream, &[0, cut, stream.len()]);
                assert_eq!(String::from_utf8(passed).unwrap(), expected, "{cut}");
            }
            let all: Vec<usize> = (0..=stream.len()).collect();
            assert_eq!(String::from_utf8(trimmed(stream, &all)).unwrap(), expected);
        }
    }

    #[test]
    fn complete_events_pass_at_once_and_without_a_copy() {
        let mut trim = Trim::default();
        let mut meter = Meter::new(Kind::Events);
        let piece = Bytes::from_static(b"data: {\"choices\":[{}]}\n\ndata: {\"choi");
        let passed = trim.pass(&mut meter, &piece, false);
        assert_eq!(&passed[..], b"data: {\"choices\":[{}]}\n\n");
        assert_eq!(passed.as_ptr(), piece.as_ptr());
        let long = Bytes::from("x".repeat(HELD_BYTES_MAX));
        assert_eq!(trim.pass(&mut meter, &long, false).len(), HELD_BYTES_MAX + 12);
        assert_eq!(trim.pass(&mut meter, &long, false).len(), HELD_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn nothing_else_is_lost_or_moved(
            events in prop::collection::vec("(data: [a-z{}\":\\[\\]]{0,12}|: [a-z]{0,4}|event: x)(\r\n\r\n|\n\n)", 0..6),
            at in 0..7_usize,
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let expected = events.concat();
            let mut with = events.clone();
            with.insert(at.min(events.len()), format!("{USAGE}\n\n"));
            let stream = with.concat();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            prop_assert_eq!(String::from_utf8(trimmed(stream.as_bytes(), &cuts)).unwrap(), expected);
        }
    }
}
