//! Another name in the place of one that was found, and nothing else changed.

use super::search::Found;

impl Found {
    /// The bytes that stand for `name` in its place: in JSON with quotes and escapes, in a form as it is.
    #[must_use]
    pub fn replacement(name: &str, is_form: bool) -> Vec<u8> {
        if is_form { name.into() } else { serde_json::Value::from(name).to_string().into() }
    }
}

/// `bytes` with others in one place.
#[must_use]
pub fn spliced(bytes: &[u8], at: std::ops::Range<usize>, others: &[u8]) -> Vec<u8> {
    [&bytes[..at.start], others, &bytes[at.end..]].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value};

    use super::*;
    use crate::llm::{Scanner, Search};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn only_the_models_bytes_change(
            before in prop::collection::vec(("[a-l]{1,6}", "\\PC{0,12}"), 0..4),
            after in prop::collection::vec(("[n-z]{1,6}", "\\PC{0,12}"), 0..4),
            model in "\\PC{0,12}",
            other in "\\PC{0,12}",
        ) {
            let mut body = Map::new();
            let texts = |pairs: Vec<(String, String)>| {
                pairs.into_iter().map(|(key, text)| (key, Value::from(text)))
            };
            body.extend(texts(before));
            body.insert("model".to_owned(), model.into());
            body.extend(texts(after));
            let text = Value::Object(body.clone()).to_string().into_bytes();
            let mut scanner = Scanner::new(&["model"]);
            scanner.feed(&text).unwrap();
            let at = scanner.found().unwrap().at.clone();
            let renamed = spliced(&text, at.clone(), &Found::replacement(&other, false));
            prop_assert_eq!(&renamed[..at.start], &text[..at.start]);
            prop_assert!(renamed.ends_with(&text[at.end..]));
            body.insert("model".to_owned(), other.into());
            let read: Value = serde_json::from_slice(&renamed).unwrap();
            prop_assert_eq!(read, Value::Object(body));
        }
    }
}
