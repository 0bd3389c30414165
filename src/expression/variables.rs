//! What expressions can speak of, and how they get it: each name is looked up when it is needed, and nothing is
//! copied but addresses, which are written out.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use cel::common::traits::{Container, Indexer, Sizer};
use cel::common::types::{CelBool, CelInt, CelString, MAP_TYPE, Type};
use cel::common::value::{CowVal, StaticVal, Val};
use cel::{Env, ExecutionError, add_member_overload};
use http::HeaderMap;
use regex::Regex;

use super::check::Kind;

/// When an expression is evaluated: what is known then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// A request may pass, and its model is known.
    Request,
    /// The head of its answer has come.
    Answer,
    /// All is over; the answer's headers are not kept until then.
    End,
}

/// A variable.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    pub(super) kind: Kind,
    /// From when on it is known.
    pub moment: Moment,
    /// What it is, for the documentation.
    pub meaning: &'static str,
}

const fn variable(
    name: &'static str,
    kind: Kind,
    moment: Moment,
    meaning: &'static str,
) -> Variable {
    Variable { name, kind, moment, meaning }
}

/// All of them.
pub const VARIABLES: [Variable; 16] = [
    variable("request.method", Kind::Text, Moment::Request, "its method, as `POST`"),
    variable(
        "request.path",
        Kind::Text,
        Moment::Request,
        "its path, decoded, without the query and without empty segments",
    ),
    variable("request.host", Kind::Text, Moment::Request, "the host that it was sent to"),
    variable(
        "request.headers",
        Kind::Texts,
        Moment::Request,
        "its headers, by their names in any case",
    ),
    variable(
        "request.body_bytes",
        Kind::Number,
        Moment::Request,
        "how long its body is; 0 where it does not say",
    ),
    variable(
        "request.stream",
        Kind::Condition,
        Moment::Request,
        "whether it asks for a stream, or may: its body is too long to tell",
    ),
    variable(
        "client.address",
        Kind::Text,
        Moment::Request,
        "where the client is; empty on a Unix socket",
    ),
    variable(
        "key.id",
        Kind::Text,
        Moment::Request,
        "the id of its key; empty where none is asked for",
    ),
    variable("key.name", Kind::Text, Moment::Request, "who has that key"),
    variable("key.labels", Kind::Texts, Moment::Request, "that key's labels, by name"),
    variable("service", Kind::Text, Moment::Request, "the service that it is for"),
    variable(
        "model",
        Kind::Text,
        Moment::Request,
        "the model, by the name that the configuration has for it",
    ),
    variable(
        "asked",
        Kind::Text,
        Moment::Request,
        "the model, as the client calls it; empty where only the path names it",
    ),
    variable("backend", Kind::Text, Moment::Answer, "the id of the backend that answers"),
    variable("response.status", Kind::Number, Moment::Answer, "the answer's status"),
    variable(
        "response.headers",
        Kind::Texts,
        Moment::Answer,
        "the answer's headers, by their names in any case",
    ),
];

/// What is known of a request besides its headers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    /// The method.
    pub method: &'a str,
    /// The path, without the query.
    pub path: &'a str,
    /// The host that it was sent to.
    pub host: &'a str,
    /// How long its body is, in bytes, where that is known.
    pub body_bytes: Option<usize>,
    /// Whether it asks for a stream.
    pub stream: bool,
    /// Where the client is; none on a Unix socket.
    pub address: Option<IpAddr>,
    /// The id of its key.
    pub key_id: &'a str,
    /// Who has that key.
    pub key_name: &'a str,
    /// What that key is labelled with.
    pub labels: &'a [(String, String)],
    /// The service that it is for.
    pub service: &'a str,
    /// The model, by the name that the configuration has for it.
    pub model: &'a str,
    /// The model, as the client calls it; empty where only the path names it.
    pub asked: &'a str,
}

/// What is known of an exchange.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The request.
    pub request: &'a Request<'a>,
    /// Its headers.
    pub headers: &'a HeaderMap,
    /// The answer, once there is one.
    pub answer: Option<AnswerFacts<'a>>,
}

impl<'a> Facts<'a> {
    /// What is known when all is over: the last backend's id and what the client was sent.
    #[must_use]
    pub fn at_end(
        request: &'a Request<'a>,
        headers: &'a HeaderMap,
        (backend, status): (&'a str, u16),
    ) -> Self {
        static NONE: OnceLock<HeaderMap> = OnceLock::new();
        let none = NONE.get_or_init(HeaderMap::new);
        Self { request, headers, answer: Some(AnswerFacts { backend, status, headers: none }) }
    }
}

/// What is known of an answer.
#[derive(Clone, Copy, Debug)]
pub struct AnswerFacts<'a> {
    /// The id of the backend that gave it.
    pub backend: &'a str,
    /// Its status.
    pub status: u16,
    /// Its headers.
    pub headers: &'a HeaderMap,
}

/// The name of a regular expression, by its number: no name of CEL's can be like it.
pub(super) fn pattern_name(number: usize) -> String {
    format!("@pattern{number}")
}

/// Finds what names stand for.
pub(super) struct Resolver<'a> {
    pub(super) facts: &'a Facts<'a>,
    pub(super) patterns: &'a [Arc<Regex>],
}

impl cel::context::VariableResolver for Resolver<'_> {
    fn resolve<'b>(&'b self, name: &str) -> Option<CowVal<'b, 'b>> {
        let facts = self.facts;
        let text = |text: &'b str| Some(CowVal::owned(CelString::from(text)));
        let number = |number: usize| {
            Some(CowVal::owned(CelInt::from(i64::try_from(number).unwrap_or(i64::MAX))))
        };
        let texts = |texts: Texts<'b>| Some(CowVal::owned(texts));
        match name {
            "request.method" => text(facts.request.method),
            "request.path" => text(facts.request.path),
            "request.host" => text(facts.request.host),
            "request.headers" => texts(Texts::Headers(facts.headers)),
            "request.body_bytes" => number(facts.request.body_bytes.unwrap_or_default()),
            "request.stream" => Some(CowVal::owned(CelBool::from(facts.request.stream))),
            "client.address" => {
                let address =
                    facts.request.address.map(|address| address.to_string()).unwrap_or_default();
                Some(CowVal::owned(CelString::from(address)))
            }
            "key.id" => text(facts.request.key_id),
            "key.name" => text(facts.request.key_name),
            "key.labels" => texts(Texts::Labels(facts.request.labels)),
            "service" => text(facts.request.service),
            "model" => text(facts.request.model),
            "asked" => text(facts.request.asked),
            "backend" => text(facts.answer?.backend),
            "response.status" => number(usize::from(facts.answer?.status)),
            "response.headers" => texts(Texts::Headers(facts.answer?.headers)),
            _ => {
                let number: usize = name.strip_prefix("@pattern")?.parse().ok()?;
                Some(CowVal::owned(Pattern(Arc::clone(self.patterns.get(number)?))))
            }
        }
    }
}

/// Texts by name. What is not there is empty, so that a condition about it holds or not, and never fails.
#[derive(Clone, Copy)]
enum Texts<'a> {
    Headers(&'a HeaderMap),
    Labels(&'a [(String, String)]),
}

/// Values may be secrets.
impl fmt::Debug for Texts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("texts")
    }
}

impl<'a> Texts<'a> {
    fn find(self, name: &str) -> Option<&'a str> {
        match self {
            // One that is not text is taken for none.
            Self::Headers(headers) => headers.get(name).map(|it| it.to_str().unwrap_or_default()),
            Self::Labels(labels) => {
                labels.iter().find(|(known, _)| known == name).map(|(_, label)| label.as_str())
            }
        }
    }

    fn name(value: &dyn Val) -> Result<&str, ExecutionError> {
        let text = value.downcast_ref::<CelString<'_>>().map(CelString::inner);
        text.ok_or_else(|| ExecutionError::UnexpectedType {
            got: value.get_type().name().to_owned(),
            want: "string".to_owned(),
        })
    }
}

impl Val for Texts<'_> {
    fn get_type(&self) -> &Type {
        &MAP_TYPE
    }

    fn cel_type() -> &'static Type {
        &MAP_TYPE
    }

    fn as_container(&self) -> Option<&dyn Container> {
        Some(self)
    }

    fn as_indexer<'b, 'v>(&'b self) -> Option<&'b (dyn Indexer + 'v)>
    where
        Self: 'v,
    {
        Some(self)
    }

    fn into_indexer<'v>(self: Box<Self>) -> Option<Box<dyn Indexer + 'v>>
    where
        Self: 'v,
    {
        Some(self)
    }

    fn as_sizer(&self) -> Option<&dyn Sizer> {
        Some(self)
    }

    fn clone_as_boxed<'v>(&self) -> Box<dyn Val + 'v>
    where
        Self: 'v,
    {
        Box::new(*self)
    }
}

impl Container for Texts<'_> {
    fn contains(&self, value: &dyn Val) -> Result<bool, ExecutionError> {
        Ok(self.find(Self::name(value)?).is_some())
    }
}

impl Indexer for Texts<'_> {
    fn get<'b, 'v>(&'b self, name: &dyn Val) -> Result<CowVal<'b, 'v>, ExecutionError>
    where
        Self: 'v,
    {
        let text = self.find(Self::name(name)?).unwrap_or_default();
        Ok(CowVal::owned(CelString::from(text)))
    }

    fn steal<'v>(self: Box<Self>, name: &dyn Val) -> Result<Box<dyn Val + 'v>, ExecutionError>
    where
        Self: 'v,
    {
        let text = self.find(Self::name(name)?).unwrap_or_default();
        Ok(Box::new(CelString::from(text)))
    }
}

impl Sizer for Texts<'_> {
    fn size(&self) -> CelInt {
        let names = match self {
            Self::Headers(headers) => headers.keys_len(),
            Self::Labels(labels) => labels.len(),
        };
        CelInt::from(i64::try_from(names).unwrap_or(i64::MAX))
    }
}

/// A regular expression that was compiled with the configuration.
#[derive(Clone, Debug)]
struct Pattern(Arc<Regex>);

static PATTERN: Type = Type::new_unspecified_type("pattern");

impl Val for Pattern {
    fn get_type(&self) -> &Type {
        &PATTERN
    }

    fn cel_type() -> &'static Type {
        &PATTERN
    }

    fn clone_as_boxed<'v>(&self) -> Box<dyn Val + 'v>
    where
        Self: 'v,
    {
        Box::new(self.clone())
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }
}

impl StaticVal for Pattern {}

fn matches(text: &CelString<'_>, pattern: &Pattern) -> CelBool {
    CelBool::from(pattern.0.is_match(text.inner()))
}

fn lower_ascii(text: &CelString<'_>) -> CelString<'static> {
    CelString::from(text.inner().to_ascii_lowercase())
}

/// Adds the functions that CEL's own do not have.
pub(super) fn declare(env: &mut Env) {
    let declared = [
        add_member_overload!(env, fn matches: (CelString, Pattern) -> CelBool),
        add_member_overload!(env, fn lower_ascii: (CelString) -> CelString),
    ];
    for declared in declared {
        declared.expect("each has a name of its own");
    }
}
