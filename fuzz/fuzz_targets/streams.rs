//! The end of an event stream: the pieces in which it comes do not matter.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tollgate::llm::{EndMarker, Tail};

fuzz_target!(|pieces: Vec<Vec<u8>>| {
    let mut in_pieces = Tail::default();
    for piece in &pieces {
        in_pieces.pass(piece);
    }
    let mut at_once = Tail::default();
    at_once.pass(&pieces.concat());
    assert_eq!(in_pieces.is_between_events(), at_once.is_between_events());
    for path in [&b"/v1/messages"[..], b"/v1/chat/completions"] {
        let marker = EndMarker::of_path(path).expect("these APIs have one");
        assert_eq!(in_pieces.is_complete(marker), at_once.is_complete(marker));
    }
});
