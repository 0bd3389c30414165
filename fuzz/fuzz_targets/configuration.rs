//! A configuration file: it is taken, or each of its problems is named.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tollgate::config::{self, Environment, Source};

fuzz_target!(|data: &[u8]| {
    let environment = Environment::from_pairs([("KEY", "sk-secret"), ("PORT", "8080")]);
    for source in [Source::File("fuzz.yaml".into()), Source::BackendsFile("fuzz.json".into())] {
        match config::read(data, &source, &environment) {
            Ok(snapshot) => {
                let changes = config::differences(&snapshot, &snapshot);
                assert!(changes.is_empty(), "it differs from itself: {changes:?}");
            }
            Err(problems) => assert!(!problems.to_string().is_empty(), "refused without a reason"),
        }
    }
});
