//! `${NAME}` and `${NAME:-default}` in any string of a document, from the environment.

use super::document::Node;
use super::environment::Environment;
use super::problem::{KeyPath, Problems};

/// Replaces every reference in the tree. `$${` stands for a plain `${`.
pub(super) fn interpolate(tree: &mut Node, environment: &Environment, problems: &mut Problems) {
    walk(tree, &KeyPath::default(), environment, problems);
}

fn walk(node: &mut Node, path: &KeyPath, environment: &Environment, problems: &mut Problems) {
    match node {
        Node::Text(text) if text.text.contains("${") => match replaced(&text.text, environment) {
            Ok(new) => {
                text.text = new;
                text.substituted = true;
            }
            Err(message) => {
                problems.value(path, message);
                *node = Node::Refused;
            }
        },
        Node::List(list) => {
            for (index, child) in list.iter_mut().enumerate() {
                walk(child, &path.index(index), environment, problems);
            }
        }
        Node::Map(entries) => {
            for (key, child) in entries {
                walk(child, &path.key(key), environment, problems);
            }
        }
        _ => {}
    }
}

fn replaced(text: &str, environment: &Environment) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if rest[..at].ends_with('$') {
            out.push_str(&rest[..at]);
            out.push('{');
            rest = &rest[at + 2..];
            continue;
        }
        out.push_str(&rest[..at]);
        let inner = &rest[at + 2..];
        let end =
            inner.find('}').ok_or("\"${\" without \"}\"; write \"$${\" for a plain \"${\"")?;
        out.push_str(&value_of(&inner[..end], environment)?);
        rest = &inner[end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

fn value_of(reference: &str, environment: &Environment) -> Result<String, String> {
    let (name, default) = match reference.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (reference, None),
    };
    let is_name = !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && !name.starts_with(|first: char| first.is_ascii_digit());
    if !is_name {
        // Not repeated: somebody may have put the secret itself there.
        return Err("what stands in ${...} is not a variable's name".to_owned());
    }
    match (environment.get(name), default) {
        (Some(value), _) => Ok(value.to_owned()),
        (None, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(format!(
            "the environment variable {name} is not set; set it or write ${{{name}:-default}}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_replaced_and_escapes_kept() {
        let environment = Environment::from_pairs([("KEY", "sk-1"), ("EMPTY", "")]);
        let cases = [
            ("${KEY}", Ok("sk-1")),
            ("a${KEY}b${KEY}", Ok("ask-1bsk-1")),
            ("${NONE:-d}", Ok("d")),
            ("${NONE:-}", Ok("")),
            ("${EMPTY:-d}", Ok("d")),
            ("$${KEY}", Ok("${KEY}")),
            ("pa$$word$", Ok("pa$$word$")),
        ];
        for (text, expected) in cases {
            assert_eq!(replaced(text, &environment).as_deref(), expected, "{text}");
        }
        for text in ["${NONE}", "${KEY", "${}", "${1A}", "${A B}"] {
            assert!(replaced(text, &environment).is_err(), "{text}");
        }
    }
}
