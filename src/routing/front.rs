//! The front door: paths as LLM SDKs send them, and where such a request names its model.

use std::borrow::Cow;
use std::ops::Range;

use http::Method;
use smallvec::SmallVec;

use super::decoded;

/// What a request at the front door is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Front<'p> {
    /// The list of all models.
    List,
    /// What is known about one model.
    One(Cow<'p, str>),
    /// An exchange with a backend.
    Exchange(Mention),
    /// It names several models.
    Ambiguous,
}

/// Where a request names its model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mention {
    /// In its target: the name, and where it stands there, raw.
    Target {
        /// The name, decoded.
        name: String,
        /// Its bytes in path and query.
        at: Range<usize>,
    },
    /// In its body: as JSON at this path of keys, or as the form field that the last key names.
    Body(&'static [&'static str]),
    /// In its body if that is a form.
    Form,
    /// Nowhere: what it is about belongs to an account and not to a model.
    Nowhere,
}

/// Versions that begin a path.
const VERSIONS: [&[u8]; 4] = [b"v1", b"v1beta", b"v1alpha", b"v2"];

/// What belongs to an account, and the requests for it name no model.
const OF_ACCOUNT: [&str; 11] = [
    "assistants",
    "batches",
    "containers",
    "conversations",
    "evals",
    "organization",
    "skills",
    "threads",
    "uploads",
    "vector_stores",
    "webhooks",
];

/// The path that stands for this one at a server that is no Azure: `/openai/v1/...` is `/v1/...`.
#[must_use]
pub fn plain_path(path: &[u8]) -> &[u8] {
    path.strip_prefix(b"/openai").filter(|rest| rest.starts_with(b"/v1/")).unwrap_or(path)
}

/// What a backend keeps something of, or removes something by, besides giving an answer: first segments behind the
/// version, or Ollama's behind `api`.
const KEEPS: [&str; 8] =
    ["fine_tuning", "videos", "blobs", "copy", "create", "delete", "pull", "push"];

/// Whether a request by POST to this raw path asks for an answer only, as far as the path tells.
#[must_use]
pub fn answers_only(path: &[u8]) -> bool {
    let plain = decoded(path);
    let mut segments = plain.split('/').filter(|segment| !segment.is_empty());
    let is_prefix = |segment: &str| {
        segment == "api" || segment == "openai" || VERSIONS.contains(&segment.as_bytes())
    };
    let first = segments.find(|segment| !is_prefix(segment));
    !first.is_some_and(|first| KEEPS.contains(&first))
}

/// Tells what a request is for by its raw path, as [`plain_path`] gives it, and its raw query with the
/// question mark. None: the path is none of an LLM API.
#[must_use]
pub fn front<'p>(method: &Method, path: &'p [u8], query: &[u8]) -> Option<Front<'p>> {
    let (first, rest) = first_segment(path.strip_prefix(b"/")?);
    let operation = if VERSIONS.contains(&first) {
        rest?
    } else if first == b"openai" {
        let rest = rest?;
        if let (b"deployments", Some(rest)) = first_segment(rest) {
            let (name, operation) = first_segment(rest);
            operation?;
            return Some(in_path(path, rest, name.len()));
        }
        rest
    } else {
        return None;
    };
    let takes_body = matches!(*method, Method::POST | Method::PUT | Method::PATCH);
    let is_read = matches!(*method, Method::GET | Method::HEAD);
    let body =
        |keys| Front::Exchange(if takes_body { Mention::Body(keys) } else { Mention::Nowhere });
    let nowhere = Front::Exchange(Mention::Nowhere);
    // As servers read it that pass over empty segments and decode the others.
    let plain = decoded(operation);
    let segments: SmallVec<[&str; 6]> =
        plain.split('/').filter(|segment| !segment.is_empty()).collect();
    let (first, rest) = segments.split_first()?;
    let raw = first_segment(operation);
    Some(match (*first, rest) {
        // A name stands in the path as it came, or not at all.
        ("models" | "tunedModels" | "deployments", _) if raw.0 != first.as_bytes() => {
            Front::Ambiguous
        }
        ("models", []) if is_read => Front::List,
        ("models", _) if is_read => Front::One(decoded(raw.1.unwrap_or_default())),
        ("models" | "tunedModels", [_, ..]) => {
            let name = raw.1.unwrap_or_default();
            let length = if *method == Method::POST { before_verb(name) } else { name.len() };
            in_path(path, name, length)
        }
        ("realtime", ["client_secrets"]) => body(&["session", "model"]),
        ("realtime", ["sessions" | "transcription_sessions"]) => body(&["model"]),
        ("realtime", _) => in_query(path, query),
        ("responses", [] | ["compact" | "input_tokens"])
        | ("chat", ["completions"] | ["completions", "batch" | "render"])
        | ("messages", [] | ["count_tokens"])
        | ("fine_tuning", ["jobs"])
        | ("videos", []) => body(&["model"]),
        ("responses" | "chat" | "messages" | "fine_tuning" | "videos", _) => nowhere,
        ("files", []) if takes_body => Front::Exchange(Mention::Form),
        ("files", _) => nowhere,
        (first, _) if OF_ACCOUNT.contains(&first) => nowhere,
        _ => body(&["model"]),
    })
}

/// What a path reaches at a backend, as the most lenient of servers may read it: whatever its case, escapes, empty
/// segments and version are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// The model that it names.
    pub name: Option<String>,
    /// Whether it is about what belongs to an account, or to the whole backend, and not to a model.
    pub is_of_account: bool,
}

/// Behind these segments a path names a model.
const BEFORE_NAMES: [&str; 5] = ["models", "model", "tunedmodels", "deployments", "engines"];

/// What Ollama has under `api` for all of its models.
const OF_OLLAMA: [&str; 9] =
    ["blobs", "copy", "create", "delete", "ps", "pull", "push", "show", "tags"];

/// What a request to this raw path reaches.
#[must_use]
pub fn reach(method: &Method, path: &[u8]) -> Reach {
    let plain = decoded(path);
    let lower = plain.to_lowercase();
    let split = |text: &'_ str| -> Vec<String> {
        text.split('/').filter(|segment| !segment.is_empty()).map(str::to_owned).collect()
    };
    let (segments, lower) = (split(&plain), split(&lower));
    let is_read = matches!(*method, Method::GET | Method::HEAD);
    let mut reach = Reach::default();
    for (at, segment) in lower.iter().enumerate() {
        let next = lower.get(at + 1).map(String::as_str);
        let is_named = BEFORE_NAMES.contains(&segment.as_str());
        if is_named && let Some(name) = segments.get(at + 1) {
            let length = if is_read { name.len() } else { before_verb(name.as_bytes()) };
            reach.name.get_or_insert_with(|| {
                let rest = if is_read { &segments[at + 2..] } else { &[] };
                std::iter::once(&name[..length])
                    .chain(rest.iter().map(String::as_str))
                    .collect::<Vec<_>>()
                    .join("/")
            });
        }
        reach.is_of_account |= match segment.as_str() {
            "models" => next.is_none(),
            "files" | "tunedmodels" => true,
            "fine_tuning" => *method != Method::POST || lower.len() > at + 2,
            "messages" => next == Some("batches"),
            "api" => next.is_some_and(|next| OF_OLLAMA.contains(&next)),
            segment => OF_ACCOUNT.contains(&segment),
        };
    }
    reach
}

/// The first segment, and what follows its slash.
fn first_segment(path: &[u8]) -> (&[u8], Option<&[u8]>) {
    match path.iter().position(|byte| *byte == b'/') {
        Some(at) => (&path[..at], Some(&path[at + 1..])),
        None => (path, None),
    }
}

/// The length of the name in Gemini's `{name}:{verb}`: a name may hold a colon itself.
fn before_verb(name: &[u8]) -> usize {
    let colon = name.iter().rposition(|byte| *byte == b':');
    let escaped = name.windows(3).rposition(|window| window.eq_ignore_ascii_case(b"%3a"));
    colon.max(escaped).unwrap_or(name.len())
}

/// A name of `length` bytes with which `rest`, the end of `path`, begins.
fn in_path<'p>(path: &[u8], rest: &[u8], length: usize) -> Front<'p> {
    let start = path.len() - rest.len();
    let name = decoded(&rest[..length]).into_owned();
    Front::Exchange(Mention::Target { name, at: start..start + length })
}

/// A name in the query: `model`, or what Azure calls `deployment`.
fn in_query<'p>(path: &[u8], query: &[u8]) -> Front<'p> {
    let mut mention = Mention::Nowhere;
    let mut start = path.len() + 1;
    for pair in query.get(1..).unwrap_or_default().split(|byte| *byte == b'&') {
        let end = start + pair.len();
        let equals = pair.iter().position(|byte| *byte == b'=');
        if let Some(equals) = equals
            && matches!(decoded(&pair[..equals]).as_ref(), "model" | "deployment")
        {
            if mention != Mention::Nowhere {
                return Front::Ambiguous;
            }
            let at = start + equals + 1..end;
            let value = &pair[equals + 1..];
            // In a query a plus stands for a space; no name has either.
            mention = Mention::Target { name: decoded(value).into_owned(), at };
        }
        start = end + 1;
    }
    Front::Exchange(mention)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of<'p>(method: &Method, target: &'p str) -> Option<Front<'p>> {
        let (path, query) = target.split_at(target.find('?').unwrap_or(target.len()));
        front(method, path.as_bytes(), query.as_bytes())
    }

    fn named(method: &Method, target: &str) -> Option<(String, String)> {
        match of(method, target) {
            Some(Front::Exchange(Mention::Target { name, at })) => {
                Some((name, target[at].to_owned()))
            }
            _ => None,
        }
    }

    #[test]
    fn a_name_in_the_target_is_found_with_its_place() {
        for (method, target, name, raw) in [
            (
                Method::POST,
                "/openai/deployments/gpt%204/chat/completions?api-version=1",
                "gpt 4",
                "gpt%204",
            ),
            (
                Method::POST,
                "/v1beta/models/gemini-2:streamGenerateContent?alt=sse",
                "gemini-2",
                "gemini-2",
            ),
            (Method::POST, "/v1/models/a:b%3AcountTokens", "a:b", "a:b"),
            (Method::POST, "/v1beta/tunedModels/x:generateContent", "x", "x"),
            (Method::DELETE, "/v1/models/ft:gpt", "ft:gpt", "ft:gpt"),
            (Method::GET, "/v1/realtime?x=1&model=gpt%2Drt&y", "gpt-rt", "gpt%2Drt"),
            (Method::GET, "/openai/realtime?deployment=rt", "rt", "rt"),
        ] {
            let expected = Some((name.to_owned(), raw.to_owned()));
            assert_eq!(named(&method, target), expected, "{target}");
        }
        for target in [
            "/v1/realtime?model=a&mod%65l=b",
            "/v1beta//models/m:generateContent",
            "/v1/mod%65ls/m",
            "/openai/deployments%2fm/chat/completions",
        ] {
            assert_eq!(of(&Method::GET, target), Some(Front::Ambiguous), "{target}");
        }
    }

    #[test]
    fn a_body_is_asked_where_its_api_has_a_model() {
        let keys = |target: &str| match of(&Method::POST, target) {
            Some(Front::Exchange(Mention::Body(keys))) => keys.join("."),
            other => format!("{other:?}"),
        };
        for path in [
            "/v1/chat/completions",
            "/v1/chat/completions/",
            "/v1//chat//completion%73",
            "/v1/messages/count_tokens/",
            "/v1/completions",
            "/v1/responses",
            "/v1/responses/compact",
            "/v1/embeddings",
            "/v1/audio/transcriptions",
            "/v1/images/edits",
            "/v1/moderations",
            "/v1/rerank",
            "/v2/rerank",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/v1/fine_tuning/jobs",
            "/openai/responses?api-version=1",
            "/v1/something/new",
        ] {
            assert_eq!(keys(path), "model", "{path}");
        }
        assert_eq!(keys("/v1/realtime/client_secrets"), "session.model");
    }

    #[test]
    fn what_belongs_to_an_account_names_no_model() {
        let nowhere = Some(Front::Exchange(Mention::Nowhere));
        for (method, path) in [
            (Method::POST, "/v1/responses/r1/cancel"),
            (Method::GET, "/v1/responses/r1"),
            (Method::GET, "/v1/responses"),
            (Method::DELETE, "/v1/chat/completions/c1"),
            (Method::POST, "/v1/messages/batches"),
            (Method::GET, "/v1/files"),
            (Method::POST, "/v1/batches"),
            (Method::POST, "/v1/uploads/u1/parts"),
            (Method::POST, "/v1/fine_tuning/jobs/j1/cancel"),
            (Method::GET, "/v1/realtime"),
            (Method::GET, "/v1/realtime?model"),
        ] {
            assert_eq!(of(&method, path), nowhere, "{method} {path}");
        }
        assert_eq!(of(&Method::POST, "/v1/files"), Some(Front::Exchange(Mention::Form)));
    }

    #[test]
    fn models_are_listed_and_described() {
        assert_eq!(of(&Method::GET, "/v1/models"), Some(Front::List));
        assert_eq!(of(&Method::GET, "/v1beta/models"), Some(Front::List));
        assert_eq!(of(&Method::GET, "/v1/models/a%2Fb:c"), Some(Front::One("a/b:c".into())));
        assert_eq!(of(&Method::GET, "/v1/models/a/b"), Some(Front::One("a/b".into())));
    }

    #[test]
    fn what_keeps_something_is_told_from_what_answers() {
        for path in ["/v1/videos", "/v1/fine%5Ftuning/jobs", "/api/pull", "//api/blobs/sha256:1"] {
            assert!(!answers_only(path.as_bytes()), "{path}");
        }
        for path in ["/v1/chat/completions", "/api/chat", "/openai/v1/responses", "/generate", ""] {
            assert!(answers_only(path.as_bytes()), "{path}");
        }
    }

    #[test]
    fn what_a_path_reaches_is_seen_however_it_is_written() {
        let reach = |method: &Method, path: &str| reach(method, path.as_bytes());
        for path in [
            "/v1beta/models/m:generateContent",
            "/v1beta/%6dodels/m:generateContent",
            "/v1beta//models/m%3agenerateContent",
            "//v1beta/models//m",
            "/v3/Models/m/generate",
            "/openai/%64eployments/m/chat/completions",
            "/OpenAI/Deployments%2fm/chat/completions",
            "/v1/engines/m/completions",
            "/model/m/invoke",
        ] {
            assert_eq!(reach(&Method::POST, path).name.as_deref(), Some("m"), "{path}");
            assert!(!reach(&Method::POST, path).is_of_account, "{path}");
        }
        assert_eq!(reach(&Method::GET, "/v1/models/a/b:c").name.as_deref(), Some("a/b:c"));
        for path in [
            "/v1/models",
            "/v1beta/models/",
            "/v1/files",
            "/V1/Batches/b1",
            "/openai/v1/%66iles/f1/content",
            "/v1/messages/batches",
            "/v1/fine_tuning/jobs/j1",
            "/api/tags",
            "//api/show",
        ] {
            assert!(reach(&Method::GET, path).is_of_account, "{path}");
        }
        for path in
            ["/v1/chat/completions", "/v1/responses/r1", "/api/chat", "/v1/fine_tuning/jobs"]
        {
            assert_eq!(reach(&Method::POST, path), Reach::default(), "{path}");
        }
    }

    #[test]
    fn other_paths_are_not_at_the_front_door() {
        for path in
            ["/v1", "/v3/x", "/google/gemma/v1", "/openai", "/openai/deployments/x", "v1/x", ""]
        {
            assert_eq!(of(&Method::POST, path), None, "{path}");
        }
        assert_eq!(plain_path(b"/openai/v1/chat/completions"), b"/v1/chat/completions");
        assert_eq!(plain_path(b"/openai/v1x"), b"/openai/v1x");
    }
}
