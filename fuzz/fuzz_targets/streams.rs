//! An event stream, its end, its usage and what is taken out of it: the pieces in which it comes do not matter.

#![no_main]

use libfuzzer_sys::fuzz_target;
use bytes::Bytes;
use tollgate::llm::{EndMarker, Kind, Meter, Tail, Trim};

/// What is read from a stream, and what passes of it.
fn metered(kind: Kind, pieces: &[Vec<u8>]) -> (Meter, Vec<u8>) {
    let (mut meter, mut trim, mut passed) = (Meter::new(kind), Trim::default(), Vec::new());
    for (at, piece) in pieces.iter().enumerate() {
        let is_end = at + 1 == pieces.len();
        passed.extend(trim.pass(&mut meter, &Bytes::from(piece.clone()), is_end));
    }
    (meter, passed)
}

fuzz_target!(|pieces: Vec<Vec<u8>>| {
    let mut in_pieces = Tail::default();
    for piece in &pieces {
        in_pieces.pass(piece);
    }
    let mut at_once = Tail::default();
    at_once.pass(&pieces.concat());
    assert_eq!(in_pieces.is_between_events(), at_once.is_between_events());
    let whole = [pieces.concat()];
    for kind in [Kind::Json, Kind::Lines, Kind::Events] {
        let ((one, in_pieces), (other, at_once)) = (metered(kind, &pieces), metered(kind, &whole));
        assert_eq!((one.usage(), one.outputs()), (other.usage(), other.outputs()));
        // An event that is too long to be held back is passed where it is cut.
        if !pieces.is_empty() && whole[0].len() < 16 * 1024 {
            assert_eq!(in_pieces, at_once);
        }
    }
    for path in [&b"/v1/messages"[..], b"/v1/chat/completions"] {
        let marker = EndMarker::of_path(path).expect("these APIs have one");
        assert_eq!(in_pieces.is_complete(marker), at_once.is_complete(marker));
    }
});
