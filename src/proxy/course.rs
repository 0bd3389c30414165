//! Which way a request goes: by its path, or by the model that it names in its path, its query, its
//! body or a header.

use std::ops::Range;
use std::sync::Arc;

use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, Method};
use pingora::http::RequestHeader;

use super::admit::split_target;
use crate::llm::{self, Fault, Found, Goal, Peek, PeekFault};
use crate::refusal::Refusal;
use crate::routing::{self, Front, Mention, Miss};
use crate::runtime::{Runtime, Way};

/// Names the model of a request that does not do it itself; in an answer, the one that gave it.
pub(super) const X_TOLLGATE_MODEL: HeaderName = HeaderName::from_static("x-tollgate-model");

/// Where nearly all bodies name their model.
const MODEL: &[&str] = &["model"];

/// A request's way, as far as its head tells.
pub(super) struct Course {
    /// The request target for a backend without a base path, raw.
    pub(super) target: Box<[u8]>,
    /// The client's raw path up to the target: what stands for the backend's base path.
    pub(super) prefix: Box<[u8]>,
    /// Whether the target is a whole path as SDKs send it, with its version.
    pub(super) is_front: bool,
    /// Whether another model may be asked in its place: only to answer, not where something is kept.
    pub(super) may_fall_back: bool,
    pub(super) leads: Leads,
    /// Where its body names the model, if that is of interest.
    pub(super) look: Option<Look>,
    /// Where else it may name a model.
    pub(super) names: Names,
    /// Whether it is about a model, and not about what belongs to none.
    pub(super) is_for_model: bool,
}

/// Where a request may name a model, whatever its way is by: a backend may go by it.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// In its target.
    pub(super) target: Option<String>,
    /// In its body, at this path of keys.
    pub(super) body: Option<&'static [&'static str]>,
    /// Whether servers may read different names in its target.
    pub(super) is_ambiguous: bool,
}

impl Names {
    fn of(front: Option<&Front<'_>>) -> Self {
        let mut names = Self::default();
        match front {
            Some(Front::Exchange(Mention::Target { name, .. })) => {
                names.target = Some(name.clone())
            }
            Some(Front::Exchange(Mention::Body(keys))) => names.body = Some(keys),
            // Of an account's, or an API of the backend's own, such as Ollama's.
            Some(Front::Exchange(Mention::Form)) | None => names.body = Some(MODEL),
            Some(Front::Ambiguous) => names.is_ambiguous = true,
            Some(Front::Exchange(Mention::Nowhere) | Front::List | Front::One(_)) => {}
        }
        names
    }
}

/// Where a [`Course`] leads.
pub(super) enum Leads {
    /// There.
    To(Arc<Way>, Option<Asked>),
    /// To the model that the body names; if it names none, there.
    ByBody(Option<Arc<Way>>),
}

impl Leads {
    /// Where it leads whatever the body says.
    pub(super) fn to(&self) -> Option<&Arc<Way>> {
        match self {
            Self::To(way, _) => Some(way),
            Self::ByBody(_) => None,
        }
    }

    /// As [`Leads::to`].
    pub(super) fn way(&self) -> Option<&Way> {
        self.to().map(Arc::as_ref)
    }

    /// What the client asks for, as far as the head tells.
    pub(super) fn asked(&self) -> Option<&str> {
        match self {
            Self::To(_, asked) => asked.as_ref().map(|asked| asked.name.as_str()),
            Self::ByBody(_) => None,
        }
    }
}

/// The model that a client asks for.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) name: String,
    /// Where its name stands in the target, if it is there.
    pub(super) at: Option<Range<usize>>,
}

/// What is looked for in a body.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    keys: &'static [&'static str],
    pub(super) aim: Aim,
    /// Whether a name is put where none is.
    pub(super) fills: bool,
    /// Whether what else a body says is of interest.
    pub(super) with_facts: bool,
}

/// What a name is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aim {
    /// The way depends on it.
    Way,
    /// It has to be changed, if there is one: a body that is no JSON object and no form has none.
    Name,
    /// It has to be changed if another model is asked in place of the first.
    Fallback,
    /// There is another way without it.
    Choice,
    /// It is good to know.
    Note,
}

impl Look {
    fn new(keys: &'static [&'static str], aim: Aim) -> Self {
        Self { keys, aim, fills: false, with_facts: false }
    }

    /// For an answer that is charged for: what else the body says tells how long it may get.
    pub(super) fn metered(look: Option<Self>) -> Self {
        Self { with_facts: true, ..look.unwrap_or(Self::new(MODEL, Aim::Note)) }
    }

    /// For a body that may not name a model unseen.
    pub(super) fn strict(look: Option<Self>, keys: &'static [&'static str]) -> Self {
        match look {
            Some(look) if look.aim.is_strict() => look,
            Some(look) => Self { aim: Aim::Name, ..look },
            None => Self::new(keys, Aim::Name),
        }
    }

    /// For a request whose way is known; none where no name has to be changed.
    fn along(way: &Way, keys: &'static [&'static str]) -> Option<Self> {
        let first = &way.targets[0];
        let aim = if first.renames { Aim::Name } else { Aim::Fallback };
        let may_change = way.renames || first.hooks.as_ref().is_some_and(|it| it.routes());
        may_change.then(|| Self::new(keys, aim))
    }

    /// Begins to look.
    pub(super) fn peek(
        &self,
        headers: &HeaderMap,
        decoded_bytes_max: usize,
    ) -> Result<Peek, PeekFault> {
        let mut codings = headers.get_all(CONTENT_ENCODING).iter();
        let coding = codings.next().map(|coding| coding.as_bytes());
        if codings.next().is_some() {
            return Err(PeekFault::UnknownCoding);
        }
        self.peek_into(headers, coding, decoded_bytes_max)
    }

    /// Begins to look into a body that is not compressed, whatever its head says.
    pub(super) fn peek_decoded(
        &self,
        headers: &HeaderMap,
        bytes_max: usize,
    ) -> Result<Peek, PeekFault> {
        self.peek_into(headers, None, bytes_max)
    }

    fn peek_into(
        &self,
        headers: &HeaderMap,
        coding: Option<&[u8]>,
        decoded_bytes_max: usize,
    ) -> Result<Peek, PeekFault> {
        let kind = headers.get(CONTENT_TYPE).map(|kind| kind.as_bytes()).unwrap_or_default();
        if headers.get_all(CONTENT_TYPE).iter().count() > 1 {
            return Err(PeekFault::Body(Fault::Malformed));
        }
        let goal = Goal { keys: self.keys, with_facts: self.with_facts };
        Peek::new(goal, kind, coding, decoded_bytes_max)
    }
}

impl Aim {
    /// Whether a body is refused in which a name can be neither seen nor ruled out.
    pub(super) fn is_strict(self) -> bool {
        matches!(self, Self::Way | Self::Name)
    }
}

/// Finds the way of a request.
///
/// # Errors
/// Why there is none.
pub(super) fn find(runtime: &Runtime, head: &RequestHeader) -> Result<Course, Refusal> {
    let (path, query) = split_target(head);
    let is_v1 = path.starts_with(b"/v1/");
    // Azure's paths, also where a service is called `openai`.
    let is_azure = path.starts_with(b"/openai/v1/") || path.starts_with(b"/openai/deployments/");
    let miss = if is_v1 || is_azure {
        routing::check_unambiguous(path).map_err(|miss| refusal_of(miss, path))?;
        if let Some(way) = runtime.catalog.everything.as_ref().filter(|_| is_v1) {
            return Ok(Course {
                target: [path, query].concat().into_boxed_slice(),
                prefix: Box::default(),
                is_front: true,
                may_fall_back: false,
                leads: Leads::To(Arc::clone(way), None),
                look: None,
                names: Names::of(routing::front(&head.method, path, query).as_ref()),
                is_for_model: true,
            });
        }
        Miss::NoRoute
    } else {
        match runtime.router.route(path) {
            Ok(route) => return Ok(by_path(head, route.target, path, route.tail, query)),
            Err(miss @ Miss::Unsafe(_)) => return Err(refusal_of(miss, path)),
            Err(miss) => miss,
        }
    };
    let plain = routing::plain_path(path);
    let front = routing::front(&head.method, plain, query);
    let front = front.filter(|_| runtime.catalog.everything.is_none());
    let front = front.ok_or_else(|| refusal_of(miss, path))?;
    let may_fall_back = answers_only(&head.method, plain, Some(&front));
    let names = Names::of(Some(&front));
    let (leads, look) = at_front_door(runtime, head, front, path)?;
    Ok(Course {
        target: [plain, query].concat().into_boxed_slice(),
        prefix: path[..path.len() - plain.len()].into(),
        is_front: true,
        may_fall_back,
        leads,
        look,
        names,
        is_for_model: true,
    })
}

fn by_path(head: &RequestHeader, way: &Arc<Way>, path: &[u8], tail: &[u8], query: &[u8]) -> Course {
    let mut look = None;
    let mut asked = None;
    let front = routing::front(&head.method, tail, query);
    let may_fall_back = answers_only(&head.method, tail, front.as_ref());
    let names = Names::of(front.as_ref());
    let may_change = way.renames || way.targets[0].hooks.as_ref().is_some_and(|it| it.routes());
    match front {
        Some(Front::Exchange(Mention::Target { name, at })) if may_change => {
            asked = Some(Asked { name, at: Some(at) });
        }
        Some(Front::Exchange(Mention::Body(keys))) => look = Look::along(way, keys),
        Some(_) => {}
        // An API of the backend's own, such as Ollama's.
        None => look = Look::along(way, MODEL),
    }
    Course {
        target: [tail, query].concat().into_boxed_slice(),
        prefix: path[..path.len() - tail.len()].into(),
        is_front: false,
        may_fall_back,
        leads: Leads::To(Arc::clone(way), asked),
        look,
        names,
        is_for_model: true,
    }
}

/// Whether a request asks a model for an answer: then any model will do that may stand in for it. Not so where
/// something is kept or removed, or what was kept is asked for by a path that names no model.
fn answers_only(method: &Method, path: &[u8], front: Option<&Front<'_>>) -> bool {
    let asks = match front {
        Some(Front::Exchange(Mention::Body(_))) | None => *method == Method::POST,
        Some(Front::Exchange(Mention::Target { .. })) => {
            matches!(*method, Method::POST | Method::GET)
        }
        _ => false,
    };
    asks && routing::answers_only(path)
}

fn at_front_door(
    runtime: &Runtime,
    head: &RequestHeader,
    front: Front<'_>,
    path: &[u8],
) -> Result<(Leads, Option<Look>), Refusal> {
    let catalog = &runtime.catalog;
    let to = |name: &str, at| {
        let way = catalog.find(name).ok_or_else(|| no_model(name))?;
        Ok(Leads::To(Arc::clone(way), Some(Asked { name: name.to_owned(), at })))
    };
    let mention = match front {
        Front::List | Front::One(_) => return Err(refusal_of(Miss::NoRoute, path)),
        Front::Ambiguous => return Err(Refusal::ModelAmbiguous),
        Front::Exchange(mention) => mention,
    };
    let mut headers = head.headers.get_all(X_TOLLGATE_MODEL).iter();
    if let Some(name) = headers.next() {
        let is_other =
            matches!(&mention, Mention::Target { name: own, .. } if own.as_bytes() != name);
        if headers.next().is_some() || is_other {
            return Err(Refusal::ModelAmbiguous);
        }
        let name = std::str::from_utf8(name.as_bytes()).unwrap_or_default();
        let at = match &mention {
            Mention::Target { at, .. } => Some(at.clone()),
            _ => None,
        };
        let leads = to(name, at)?;
        let look = match (&leads, mention) {
            (Leads::To(way, _), Mention::Body(keys)) => Look::along(way, keys),
            _ => None,
        };
        return Ok((leads, look));
    }
    let default_service = catalog.default_service.as_ref();
    match mention {
        Mention::Target { name, at } => Ok((to(&name, Some(at))?, None)),
        Mention::Body(keys) => {
            let default = catalog.default_model.as_ref().or(default_service);
            let look = Look { fills: catalog.default_model.is_some(), ..Look::new(keys, Aim::Way) };
            Ok((Leads::ByBody(default.cloned()), Some(look)))
        }
        Mention::Form | Mention::Nowhere => {
            let kind = head.headers.get(CONTENT_TYPE);
            let is_form =
                mention == Mention::Form && kind.is_some_and(|kind| llm::is_form(kind.as_bytes()));
            let aim = if default_service.is_none() { Aim::Way } else { Aim::Choice };
            let look = is_form.then(|| Look::new(MODEL, aim));
            match default_service {
                None if !is_form => Err(Refusal::ModelMissing),
                _ => Ok((Leads::ByBody(default_service.cloned()), look)),
            }
        }
    }
}

impl Leads {
    /// The way, now that the body was looked into; and whether it is that of a model, and not of what belongs
    /// to none.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) fn resolve(
        self,
        runtime: &Runtime,
        found: Option<Found>,
    ) -> Result<(Arc<Way>, Option<Asked>, bool), Refusal> {
        match (self, found) {
            (Self::To(way, asked), found) => {
                let asked = asked.or(found.map(|found| Asked { name: found.text, at: None }));
                Ok((way, asked, true))
            }
            (Self::ByBody(default), found) => match found.filter(|found| !found.text.is_empty()) {
                Some(Found { text: name, .. }) => {
                    let way = runtime.catalog.find(&name).ok_or_else(|| no_model(&name))?;
                    Ok((Arc::clone(way), Some(Asked { name, at: None }), true))
                }
                None => {
                    let way = default.ok_or(Refusal::ModelMissing)?;
                    let of_model = runtime.catalog.default_model.as_ref();
                    let is_for_model = of_model.is_some_and(|model| Arc::ptr_eq(model, &way));
                    Ok((way, None, is_for_model))
                }
            },
        }
    }
}

fn no_model(name: &str) -> Refusal {
    Refusal::ModelUnknown { model: name.to_owned() }
}

pub(super) fn refusal_of(miss: Miss, path: &[u8]) -> Refusal {
    match miss {
        Miss::NoRoute => Refusal::NoRoute { path: String::from_utf8_lossy(path).into_owned() },
        Miss::NoService(service) => Refusal::NoService { service },
        Miss::NoModel { service, rest } => Refusal::NoModel { service, model: rest },
        Miss::Unsafe(reason) => Refusal::BadRequest { reason },
    }
}

/// What a client is told whose body cannot be looked into.
pub(super) fn refusal_of_body(fault: PeekFault, decoded_bytes_max: usize) -> Refusal {
    match fault {
        PeekFault::Body(Fault::Malformed) => Refusal::BodyMalformed {
            reason: "the body is neither a JSON object nor a form, or it is not complete",
        },
        PeekFault::Body(Fault::TooDeep) => {
            Refusal::BodyMalformed { reason: "the body is nested too deeply" }
        }
        PeekFault::Body(Fault::NotText) => {
            Refusal::BodyMalformed { reason: "\"model\" is not a string" }
        }
        PeekFault::Body(Fault::TooLong) => {
            Refusal::BodyMalformed { reason: "\"model\" is too long for a name" }
        }
        PeekFault::Body(Fault::Ambiguous) => Refusal::ModelAmbiguous,
        PeekFault::Coding(llm::CodingFault::Malformed) => {
            Refusal::BodyMalformed { reason: "the body is not in its Content-Encoding" }
        }
        PeekFault::Coding(llm::CodingFault::TooLarge) => {
            Refusal::BodyTooLarge { bytes_max: decoded_bytes_max }
        }
        PeekFault::Coding(llm::CodingFault::TooDense) => Refusal::BodyMalformed {
            reason: "the body decodes to very much more than it is: send it without Content-Encoding",
        },
        PeekFault::UnknownCoding => Refusal::CodingUnknown,
    }
}
