//! From a raw request path to a target: `/{service}/{model}/{path...}`; or to what an LLM SDK asks for.
//!
//! Paths are decided upon and passed on as the bytes that came: only a copy is decoded, to compare
//! names. Routing does not know what a target is, nor Pingora.

mod front;

use std::borrow::Cow;
use std::collections::HashMap;

use percent_encoding::percent_decode;

pub use front::{Front, Mention, Reach, answers_only, front, plain_path, reach};

use crate::names::Names;

/// How often a path is decoded to see whether it hides something.
const DECODINGS_MAX: usize = 4;

/// Services and their models, each leading to a `T`.
#[derive(Debug)]
pub struct Router<T> {
    services: HashMap<String, Models<T>>,
}

#[derive(Debug)]
struct Models<T> {
    names: Names<T>,
    /// Segments of the longest name: no longer prefix needs to be tried.
    segments_max: usize,
}

/// Where a path leads.
#[derive(Debug, PartialEq, Eq)]
pub struct Route<'r, 'p, T> {
    /// The target of the longest configured name.
    pub target: &'r T,
    /// What follows the model, raw: empty, or beginning with a slash.
    pub tail: &'p [u8],
}

/// Why a path leads nowhere.
#[derive(Debug, PartialEq, Eq)]
pub enum Miss {
    /// It has not the form `/{service}/{model}...`.
    NoRoute,
    /// No such service.
    NoService(String),
    /// The service has no model of which this, all that follows it, could begin with the name.
    NoModel {
        /// The service's name.
        service: String,
        /// What follows it.
        rest: String,
    },
    /// It could mean something else to a backend than to us.
    Unsafe(&'static str),
}

impl<T> Router<T> {
    /// A router over `(service, model, target)`.
    pub fn new(entries: impl IntoIterator<Item = (String, String, T)>) -> Self {
        let mut services: HashMap<String, Models<T>> = HashMap::new();
        for (service, model, target) in entries {
            let models = services
                .entry(service)
                .or_insert_with(|| Models { names: Names::default(), segments_max: 0 });
            models.segments_max = models.segments_max.max(model.split('/').count());
            models.names.add(&model, target);
        }
        Self { services }
    }

    /// Finds the target of a raw path (no query).
    ///
    /// # Errors
    /// Why there is none.
    pub fn route<'p>(&self, path: &'p [u8]) -> Result<Route<'_, 'p, T>, Miss> {
        check_unambiguous(path)?;
        let rest = path.strip_prefix(b"/").ok_or(Miss::NoRoute)?;
        let service_end = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
        let (service, rest) = rest.split_at(service_end);
        if service.is_empty() {
            return Err(Miss::NoRoute);
        }
        let service = decoded(service);
        let models = self
            .services
            .get(service.as_ref())
            .ok_or_else(|| Miss::NoService(service.clone().into_owned()))?;
        let rest = rest.strip_prefix(b"/").filter(|rest| !rest.is_empty()).ok_or(Miss::NoRoute)?;
        models.longest(rest).ok_or_else(|| Miss::NoModel {
            service: service.into_owned(),
            rest: decoded(rest).into_owned(),
        })
    }
}

impl<T> Models<T> {
    /// The longest name that `rest` begins with, at a segment's end. Without one, the shortest
    /// beginning that a wildcard stands for: a wildcard takes no more segments than it has to.
    fn longest<'p>(&self, rest: &'p [u8]) -> Option<Route<'_, 'p, T>> {
        let ends = rest
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == b'/')
            .map(|(at, _)| at)
            .chain([rest.len()])
            .take(self.segments_max);
        let (mut best, mut by_pattern) = (None, None);
        for end in ends {
            let (name, tail) = rest.split_at(end);
            let name = decoded(name);
            if let Some(target) = self.names.exact(&name) {
                best = Some(Route { target, tail });
            } else if by_pattern.is_none() {
                by_pattern = self.names.pattern(&name).map(|target| Route { target, tail });
            }
        }
        best.or(by_pattern)
    }
}

/// Percent-decodes for comparison. Without an escape nothing is copied.
fn decoded(raw: &[u8]) -> Cow<'_, str> {
    percent_decode(raw).decode_utf8_lossy()
}

/// Refuses what servers are known to read differently: dot segments, also encoded or behind a
/// backslash, could lead a backend out of the base path that it was given; NUL ends a string in C.
///
/// # Errors
/// [`Miss::Unsafe`] with the reason.
pub fn check_unambiguous(path: &[u8]) -> Result<(), Miss> {
    let suspicious = path.windows(2).any(|pair| pair == b"/.") || path.contains(&b'%');
    if !suspicious && !path.contains(&b'\\') {
        return Ok(());
    }
    let mut plain: Cow<'_, [u8]> = percent_decode(path).into();
    if plain.contains(&0) {
        return Err(Miss::Unsafe("the path holds a NUL"));
    }
    // Never in UTF-8 (RFC 3629): an overlong form of a dot or a slash, for decoders that take it.
    if plain.iter().any(|byte| matches!(byte, 0xc0 | 0xc1)) {
        return Err(Miss::Unsafe("the path is not UTF-8"));
    }
    // Some servers decode more than once.
    for _ in 0..DECODINGS_MAX {
        if !plain.contains(&b'%') {
            break;
        }
        plain = percent_decode(&plain).collect::<Vec<u8>>().into();
    }
    // Some take what follows a semicolon for a parameter of the segment.
    let name = |segment: &[u8]| segment.split(|byte| *byte == b';').next().map(<[u8]>::to_vec);
    let has_dots = plain
        .split(|byte| matches!(byte, b'/' | b'\\'))
        .filter_map(name)
        .any(|name| name == b"." || name == b"..");
    if has_dots {
        return Err(Miss::Unsafe("the path holds a \".\" or \"..\" segment"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router() -> Router<u32> {
        let entry = |service: &str, model: &str, target| (service.into(), model.into(), target);
        Router::new([
            entry("google", "gemma", 1),
            entry("hf", "meta-llama", 2),
            entry("hf", "meta-llama/Llama-3-8B", 3),
            entry("hf", "模型", 4),
            entry("hf", "gpt-4*", 5),
            entry("hf", "gpt-4o/x", 6),
            entry("hf", "any/*", 7),
        ])
    }

    fn found(path: &str) -> Option<(u32, String)> {
        let router = router();
        let route = router.route(path.as_bytes()).ok()?;
        Some((*route.target, String::from_utf8_lossy(route.tail).into_owned()))
    }

    #[test]
    fn the_longest_configured_name_wins_and_the_rest_stays_raw() {
        let cases = [
            ("/google/gemma", 1, ""),
            ("/google/gemma/", 1, "/"),
            ("/google/gemma/v1/chat/completions", 1, "/v1/chat/completions"),
            ("/google/gemma/a%2Fb//c%20", 1, "/a%2Fb//c%20"),
            ("/g%6Fogle/gemma/x", 1, "/x"),
            ("/hf/meta-llama/v1/models", 2, "/v1/models"),
            ("/hf/meta-llama/Llama-3-8B/v1", 3, "/v1"),
            ("/hf/meta-llama%2FLlama-3-8B/v1", 3, "/v1"),
            ("/hf/meta-llama%2fLlama-3-8B", 3, ""),
            ("/hf/%E6%A8%A1%E5%9E%8B/v1", 4, "/v1"),
            ("/hf/gpt-4-turbo/v1/models", 5, "/v1/models"),
            ("/hf/gpt-4o/x/v1", 6, "/v1"),
            ("/hf/any/thing/v1", 7, "/v1"),
        ];
        for (path, target, tail) in cases {
            assert_eq!(found(path), Some((target, tail.to_owned())), "{path}");
        }
    }

    #[test]
    fn a_path_that_leads_nowhere_says_why() {
        let router = router();
        let miss = |path: &str| router.route(path.as_bytes()).map(|_| ()).unwrap_err();
        for path in ["", "/", "x", "*", "//google/gemma", "/google", "/google/"] {
            assert_eq!(miss(path), Miss::NoRoute, "{path}");
        }
        assert_eq!(miss("/nope/gemma"), Miss::NoService("nope".into()));
        let expected = Miss::NoModel { service: "google".into(), rest: "gemmax/v1".into() };
        assert_eq!(miss("/google/gemmax/v1"), expected);
    }

    #[test]
    fn paths_that_servers_read_differently_are_refused() {
        for path in [
            "/google/gemma/../x",
            "/google/gemma/./x",
            "/google/gemma/..",
            "/google/..%2fgemma",
            "/google/gemma/%2e%2e/x",
            "/google/gemma/%252e%252e/x",
            "/google/gemma/..\\x",
            "/google/gemma/a%5c..%5cx",
            "/google/gemma/%00",
            "/google/gemma/..;/x",
            "/google/gemma/%2e%2e;a=1/x",
            "/google/gemma/%c0%ae%c0%ae/x",
            "/google/gemma/%25252e%25252e/x",
        ] {
            let router = router();
            assert!(matches!(router.route(path.as_bytes()), Err(Miss::Unsafe(_))), "{path}");
        }
        assert!(found("/google/gemma/v1.5/.hidden/a..b").is_some());
    }

    #[test]
    fn no_path_makes_it_panic_and_a_tail_is_always_a_suffix() {
        proptest::proptest!(|(path in "[/a-zA-Z%.\\\\0-9]{0,40}")| {
            let path = format!("/hf/meta-llama{path}");
            if let Some((_, tail)) = found(&path) {
                proptest::prop_assert!(path.ends_with(&tail));
            }
        });
    }
}
