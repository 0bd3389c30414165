//! What a body names: the scanner finds what a JSON parser finds, in pieces as at once; another name in
//! its place changes nothing else; and no form or compressed body harms.

#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use tollgate::llm::{Fault, Found, Gap, Peek, Scanner, Search, spliced};

/// Strings of ten megabytes are made of short ones: `R` in the input stands for many of what follows.
const REPEATED: usize = 100_000;

fn scanned<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Result<Option<Found>, Fault> {
    let mut scanner = Scanner::new(&["model"]);
    for piece in pieces {
        scanner.feed(piece)?;
    }
    scanner.finish()?;
    Ok(scanner.found().cloned())
}

/// Puts another name into a body, and looks at what has changed.
fn rename(body: &[u8], mut whole: serde_json::Map<String, Value>, found: &Found, other: &str) {
    let name = Found::replacement(other, false);
    let renamed = spliced(body, found.at.clone(), &name);
    assert_eq!(renamed.len(), body.len() - found.at.len() + name.len());
    assert_eq!(renamed[..found.at.start], body[..found.at.start]);
    assert!(renamed.ends_with(&body[found.at.end..]));
    whole.insert("model".to_owned(), Value::from(other));
    assert_eq!(serde_json::from_slice::<Value>(&renamed).ok(), Some(Value::Object(whole)));
}

/// Puts a name into a body that has none.
fn fill(mut whole: serde_json::Map<String, Value>, name: &str) {
    whole.remove("model");
    let body = Value::Object(whole.clone()).to_string().into_bytes();
    let mut scanner = Scanner::new(&["model"]);
    scanner.feed(&body).expect("it is JSON");
    let Gap { at, before, after } = scanner.gap().expect("it has none");
    let text = [&before[..], &Found::replacement(name, false), after].concat();
    let filled: Value = serde_json::from_slice(&spliced(&body, at, &text)).expect("it is JSON");
    whole.insert("model".to_owned(), Value::from(name));
    assert_eq!(filled, Value::Object(whole));
}

/// A body that is made of members, with a model in it.
fn made(members: Vec<(String, String)>, model: String, other: &str) {
    let at = members.len() / 2;
    let mut whole: serde_json::Map<String, Value> = members
        .into_iter()
        .filter(|(key, _)| !key.eq_ignore_ascii_case("model"))
        .map(|(key, text)| (key, Value::from(text)))
        .collect();
    whole.shift_insert(at.min(whole.len()), "model".to_owned(), Value::from(model.clone()));
    fill(whole.clone(), other);
    let body = Value::Object(whole.clone()).to_string().into_bytes();
    match scanned(std::iter::once(&body[..])) {
        Ok(Some(found)) => {
            assert_eq!(found.text, model);
            rename(&body, whole, &found, other);
        }
        Err(Fault::TooLong) => {}
        other => panic!("{other:?}"),
    }
}

fuzz_target!(|input: (Vec<u8>, u8, String, bool, Vec<(String, String)>, String)| {
    let (mut body, piece, other, is_long, members, model) = input;
    made(members, model, &other);
    if is_long && let Some(at) = body.iter().position(|byte| *byte == b'R') {
        let repeated = vec![body.get(at + 1).copied().unwrap_or(b'x'); REPEATED];
        body.splice(at..=at, repeated);
    }
    let found = scanned(std::iter::once(&body[..]));
    assert_eq!(scanned(body.chunks(usize::from(piece).max(1))), found);
    for (kind, coding) in [
        ("multipart/form-data; boundary=X", None),
        ("", Some("gzip")),
        ("", Some("br")),
        ("", Some("zstd")),
        ("", Some("deflate")),
    ] {
        let coding = coding.map(str::as_bytes);
        let mut peek =
            Peek::new(&["model"], kind.as_bytes(), coding, 1 << 20).expect("it is known");
        let _ = body.chunks(usize::from(piece).max(1)).try_for_each(|piece| peek.feed(piece));
    }
    // What the parser does not take is for the backend to refuse; it is deeper than ours, or its strings are
    // not well-formed.
    let Ok(Value::Object(whole)) = serde_json::from_slice::<Value>(&body) else { return };
    match found {
        Ok(Some(found)) => {
            assert_eq!(whole["model"], found.text.as_str());
            rename(&body, whole, &found, &other);
        }
        Ok(None) => assert!(whole.get("model").is_none_or(Value::is_null)),
        Err(Fault::Malformed) => panic!("a parser takes it"),
        Err(Fault::NotText) => assert!(!whole["model"].is_string()),
        Err(Fault::Ambiguous | Fault::TooDeep | Fault::TooLong) => {}
    }
});
