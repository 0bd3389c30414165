//! The end of an event stream: whether it is complete, and how a break in it is told.

/// Bytes of the end that are kept: the longest last event that is looked for is 52.
const KEPT: usize = 96;

/// What the last event of a complete stream holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndMarker(&'static [u8]);

impl EndMarker {
    /// The marker of the API at a raw request path, where that has one.
    #[must_use]
    pub fn of_path(path: &[u8]) -> Option<Self> {
        if super::Dialect::of_path(path) == super::Dialect::Anthropic {
            return Some(Self(b"message_stop"));
        }
        path.ends_with(b"/completions").then_some(Self(b"[DONE]"))
    }
}

/// The last bytes of an event stream that passes.
#[derive(Clone, Debug)]
pub struct Tail {
    bytes: [u8; KEPT],
    length: usize,
}

impl Default for Tail {
    fn default() -> Self {
        Self { bytes: [0; KEPT], length: 0 }
    }
}

impl Tail {
    /// A piece of the stream passes.
    pub fn pass(&mut self, piece: &[u8]) {
        let new = &piece[piece.len().saturating_sub(KEPT)..];
        let kept = self.length.min(KEPT - new.len());
        self.bytes.copy_within(self.length - kept..self.length, 0);
        self.bytes[kept..kept + new.len()].copy_from_slice(new);
        self.length = kept + new.len();
    }

    /// Whether the stream ended as its API says it does.
    #[must_use]
    pub fn is_complete(&self, marker: EndMarker) -> bool {
        let marker = marker.0;
        self.seen().windows(marker.len()).any(|window| window == marker)
    }

    /// Whether an event may begin here: nothing has passed, or an event has just ended.
    #[must_use]
    pub fn is_between_events(&self) -> bool {
        let ends = [&b"\n\n"[..], b"\r\n\r\n", b"\r\r"];
        self.length == 0 || ends.iter().any(|end| self.seen().ends_with(end))
    }

    fn seen(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_api_has_its_own_end() {
        let marker = |path: &str| EndMarker::of_path(path.as_bytes()).map(|marker| marker.0);
        assert_eq!(marker("/svc/mdl/v1/chat/completions"), Some(&b"[DONE]"[..]));
        assert_eq!(marker("/svc/mdl/v1/completions"), Some(&b"[DONE]"[..]));
        assert_eq!(marker("/svc/mdl/v1/messages"), Some(&b"message_stop"[..]));
        assert_eq!(marker("/svc/mdl/v1/responses"), None);
    }

    #[test]
    fn a_stream_is_judged_the_same_wherever_it_is_cut_in_pieces() {
        let done = EndMarker(b"[DONE]");
        let stream = format!("data: {}\n\ndata: [DONE]\n\n", "x".repeat(200));
        proptest::proptest!(|(cuts in proptest::collection::vec(0..stream.len(), 0..8), all: bool)| {
            let stream = if all { &stream[..] } else { &stream[..stream.len() - 8] };
            let mut cuts = cuts.into_iter().filter(|cut| *cut < stream.len()).collect::<Vec<_>>();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let mut tail = Tail::default();
            for pair in cuts.windows(2) {
                tail.pass(&stream.as_bytes()[pair[0]..pair[1]]);
            }
            proptest::prop_assert_eq!(tail.is_complete(done), all);
            proptest::prop_assert_eq!(tail.is_between_events(), all);
        });
        let mut none = Tail::default();
        assert!(none.is_between_events() && !none.is_complete(done));
        none.pass(b"data: x\r\n\r\n");
        assert!(none.is_between_events());
    }
}
