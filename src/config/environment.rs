//! The environment as the configuration sees it: process variables over those of `./.env`.

use std::collections::HashMap;
use std::path::Path;

/// Names and values. An empty variable counts as unset.
#[derive(Clone, Default)]
pub struct Environment(HashMap<String, String>);

impl Environment {
    /// Reads the process's variables and, for names they lack, those of `.env` in `folder`.
    ///
    /// # Errors
    /// A line for the operator when `.env` exists and cannot be read; it names no value.
    pub fn of_process(folder: &Path) -> Result<Self, String> {
        let mut variables = HashMap::new();
        let file = folder.join(".env");
        match dotenvy::from_path_iter(&file) {
            Ok(pairs) => {
                for pair in pairs {
                    let (name, value) = pair.map_err(|error| dot_env_problem(&file, &error))?;
                    variables.insert(name, value);
                }
            }
            Err(error) if error.not_found() => {}
            Err(error) => return Err(dot_env_problem(&file, &error)),
        }
        variables.extend(
            // What is not UTF-8 is kept with replacement characters: a key then fails to match,
            // where a missing one would let everybody pass.
            std::env::vars_os()
                .map(|(name, value)| {
                    (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned())
                })
                .filter(|(_, value)| !value.is_empty()),
        );
        Ok(Self(variables))
    }

    /// An environment of exactly these variables.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self(pairs.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    /// The value of `name`, unless it is unset or empty.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }
}

fn dot_env_problem(file: &Path, error: &dotenvy::Error) -> String {
    // The parser's message repeats the line, which may hold a secret: only its kind is shown.
    match error {
        dotenvy::Error::Io(error) => format!("cannot read {}: {error}", file.display()),
        _ => format!("{}: a line is not NAME=value (quote values with spaces)", file.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_variable_counts_as_unset() {
        let environment = Environment::from_pairs([("A", ""), ("B", "x")]);
        assert_eq!((environment.get("A"), environment.get("B")), (None, Some("x")));
    }
}
