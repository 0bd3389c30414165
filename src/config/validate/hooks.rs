//! Hooks: of everything, of services and of models.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use indexmap::IndexMap;
use serde_json::Value;

use super::super::file::{
    FileAnswer, FileBy, FileConfig, FileFields, FileHeaders, FileHook, FileRefuse, FileRoute,
    FileText, OneOrMany,
};
use super::super::problem::{KeyPath, Place, Problem, Problems};
use super::{Context, item_path};
use crate::expression::{Expression, Fault, Gives, Moment};
use crate::hooks::{
    At, Bounds, By, Chain, FieldChanges, FieldPath, HeaderChanges, HeaderText, Hook, OfAnswers,
    OfRequests, Route, Say, may_change,
};

/// The most hooks of one model, with those of everything and of its service.
const HOOKS_MAX: usize = 64;

/// The longest name of a hook, in bytes: it is a label of metrics.
const NAME_BYTES_MAX: usize = 64;

/// The hooks of each model that has any, by `service/model`.
pub(super) fn chains(
    file: &FileConfig,
    context: &Context<'_>,
    problems: &mut Problems,
) -> HashMap<String, Arc<Chain>> {
    let root = KeyPath::default();
    let mut chains = HashMap::new();
    let (names, beside, models) = (HashSet::new(), String::new(), models(file));
    let mut reader = Reader { context, names, models, beside, problems };
    let everywhere = Shared::of(reader.hooks(file.hooks.as_deref(), &root));
    for (service, written) in file.services.iter().flatten() {
        let at = root.key("services").key(service);
        let of_service = everywhere.with(reader.hooks(written.hooks.as_deref(), &at));
        for (key, models) in [("models", &written.models), ("model", &written.model)] {
            for (model, written) in models.iter().flatten() {
                let at = at.key(key).key(model);
                let own = of_service.with(reader.hooks(written.hooks.as_deref(), &at));
                if own.hooks.len() > HOOKS_MAX {
                    let message = format!("a model has at most {HOOKS_MAX} hooks");
                    reader.problems.value(&at, message);
                }
                if !own.hooks.is_empty() {
                    chains.insert(format!("{service}/{model}"), own.chain);
                }
            }
        }
    }
    chains
}

/// All models that the file has, as `service/model`.
fn models(file: &FileConfig) -> HashSet<String> {
    let services = file.services.iter().flatten();
    let models = services.flat_map(|(service, written)| {
        let both = [&written.models, &written.model].into_iter().flatten();
        both.flat_map(|models| models.keys()).map(move |model| format!("{service}/{model}"))
    });
    models.collect()
}

/// Hooks that several models have, in one chain.
struct Shared {
    hooks: Vec<Arc<Hook>>,
    chain: Arc<Chain>,
}

impl Shared {
    fn of(hooks: Vec<Arc<Hook>>) -> Self {
        let chain = Arc::new(Chain::new(hooks.clone()));
        Self { hooks, chain }
    }

    fn with(&self, own: Vec<Arc<Hook>>) -> Self {
        if own.is_empty() {
            return Self { hooks: self.hooks.clone(), chain: Arc::clone(&self.chain) };
        }
        Self::of(self.hooks.iter().cloned().chain(own).collect())
    }
}

/// Reads an expression.
pub(super) fn expression(
    text: &str,
    path: &KeyPath,
    moment: Moment,
    gives: Gives,
    problems: &mut Problems,
) -> Option<Expression> {
    match Expression::read(text, moment, gives) {
        Ok(expression) => Some(expression),
        Err(Fault { message, at }) => {
            problems.push(Problem::new(Place::Inside(path.clone(), at), message));
            None
        }
    }
}

/// Reads hooks, and what is wrong with them.
pub(super) struct Reader<'a> {
    pub(super) context: &'a Context<'a>,
    names: HashSet<String>,
    /// All models, as `service/model`.
    models: HashSet<String>,
    /// What the files say that the hook which is read has beside it.
    pub(super) beside: String,
    pub(super) problems: &'a mut Problems,
}

impl Reader<'_> {
    fn hooks(&mut self, written: Option<&[Option<FileHook>]>, parent: &KeyPath) -> Vec<Arc<Hook>> {
        let path = parent.key("hooks");
        let mut hooks = Vec::new();
        for (index, written) in written.unwrap_or_default().iter().enumerate() {
            let at = path.index(index);
            match written {
                Some(written) => hooks.extend(self.hook(written, &at).map(Arc::new)),
                None if self.problems.has_below(&at) => {}
                None => self.problems.value(&at, "expected a hook, found nothing"),
            }
        }
        hooks
    }

    fn hook(&mut self, written: &FileHook, path: &KeyPath) -> Option<Hook> {
        let before = self.problems.count();
        let (kind, moments) = self.kind(written, path)?;
        let moment = moments.iter().map(At::moment).min().unwrap_or(Moment::Request);
        let when = written.when.as_ref().and_then(|text| {
            expression(text, &path.key("when"), moment, Gives::Condition, self.problems)
        });
        let name = self.name(written.name.as_deref(), &kind, path);
        if self.problems.count() > before {
            return None;
        }
        let beside = std::mem::take(&mut self.beside);
        Some(Hook::new(&name, when, moments, &format!("{written:?}{beside}")))
    }

    /// What a hook is called: as it is written, else as what it does, with a number where there are several.
    fn name(&mut self, written: Option<&str>, kind: &str, path: &KeyPath) -> String {
        if let Some(name) = written {
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
            if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(is_plain) {
                let message =
                    format!("expected at most {NAME_BYTES_MAX} letters, digits and the signs _-.");
                self.problems.value(&path.key("name"), message);
            } else if !self.names.insert(name.to_owned()) {
                let message = format!("{name:?} is the name of another hook");
                self.problems.value(&path.key("name"), message);
            }
            return name.to_owned();
        }
        let mut name = kind.to_owned();
        let mut number = 2;
        while !self.names.insert(name.clone()) {
            name = format!("{kind}-{number}");
            number += 1;
        }
        name
    }

    /// The one thing that a hook does.
    fn kind(&mut self, written: &FileHook, path: &KeyPath) -> Option<(String, Vec<At>)> {
        let FileHook {
            name: _,
            when: _,
            route,
            mirror,
            request_headers,
            response_headers,
            request_fields,
            bounds,
            refuse,
            answer,
            guard,
            capture,
            custom,
        } = written;
        let mut kinds: Vec<(&str, Vec<At>)> = Vec::new();
        if let Some(route) = route {
            let route = self.route(route, &path.key("route"));
            kinds.push(("route", vec![At::Route(Box::new(route))]));
        }
        if let Some(mirror) = mirror {
            let mirror = self.route(mirror, &path.key("mirror"));
            kinds.push(("mirror", vec![At::Mirror(Box::new(mirror))]));
        }
        if let Some(headers) = request_headers {
            let changes = self.headers(headers, &path.key("request_headers"), true);
            kinds.push(("request_headers", vec![At::RequestHead(Box::new(OfRequests(changes)))]));
        }
        if let Some(headers) = response_headers {
            let changes = self.headers(headers, &path.key("response_headers"), false);
            kinds.push(("response_headers", vec![At::AnswerHead(Box::new(OfAnswers(changes)))]));
        }
        if let Some(fields) = request_fields {
            let changes = self.fields(fields, &path.key("request_fields"));
            kinds.push(("request_fields", vec![At::RequestBody(Box::new(changes))]));
        }
        if let Some(bounds) = bounds {
            let bounds = Bounds {
                head_bytes_max: bounds.head_bytes_max.map(|size| size.0),
                body_bytes_max: bounds.body_bytes_max.map(|size| size.0),
            };
            let moments = bounds.moments();
            if moments.is_empty() && !self.problems.has_below(&path.key("bounds")) {
                let message = "bounds nothing; write head_bytes_max, body_bytes_max or both";
                self.problems.value(&path.key("bounds"), message);
            }
            kinds.push(("bounds", moments));
        }
        if let Some(refuse) = refuse {
            let say = self.refusal(refuse, &path.key("refuse"));
            kinds.push(("refuse", vec![At::RequestHead(Box::new(say))]));
        }
        if let Some(answer) = answer {
            let say = self.answer(answer, &path.key("answer"));
            kinds.push(("answer", vec![At::RequestHead(Box::new(say))]));
        }
        if let Some(guard) = guard {
            let moments = self.guard(guard, &path.key("guard"));
            kinds.push(("guard", moments));
        }
        if let Some(capture) = capture {
            let moments = self.capture(capture, &path.key("capture"));
            kinds.push(("capture", moments));
        }
        for (name, written) in custom.iter().flatten() {
            let moments = self.custom(name, written, &path.key("custom").key(name));
            kinds.push((name, moments));
        }
        self.only(kinds, path)
    }

    /// The one of several that there may be.
    fn only(&mut self, kinds: Vec<(&str, Vec<At>)>, path: &KeyPath) -> Option<(String, Vec<At>)> {
        match <[_; 1]>::try_from(kinds) {
            Ok([(kind, moments)]) => Some((kind.to_owned(), moments)),
            Err(kinds) => {
                if !self.problems.has_below(path) {
                    let message = if kinds.is_empty() {
                        "does nothing; write one of route, mirror, request_headers, response_headers, \
                         request_fields, bounds, refuse, answer, guard, capture, custom"
                    } else {
                        "does several things; write a hook for each, in the order in which they act"
                    };
                    self.problems.value(path, message);
                }
                None
            }
        }
    }

    fn custom(&mut self, name: &str, written: &Value, path: &KeyPath) -> Vec<At> {
        let Some(kind) = self.context.kinds.find(name) else {
            let known: Vec<&str> = self.context.kinds.names().collect();
            let message = if known.is_empty() {
                "there is no such hook: this program has none of its own".to_owned()
            } else {
                format!("there is no such hook; this program has {}", known.join(", "))
            };
            self.problems.key(path, message);
            return Vec::new();
        };
        kind.make(written.clone()).unwrap_or_else(|message| {
            self.problems.value(path, message);
            Vec::new()
        })
    }

    fn headers(
        &mut self,
        written: &FileHeaders,
        path: &KeyPath,
        is_of_request: bool,
    ) -> HeaderChanges {
        let moment = if is_of_request { Moment::Request } else { Moment::Answer };
        let mut changes = HeaderChanges::default();
        for (from, to) in written.rename.iter().flatten() {
            let at = path.key("rename").key(from);
            let (from, to) =
                (self.header(from, &at, is_of_request), self.header(to, &at, is_of_request));
            changes.rename.extend(from.zip(to));
        }
        if let Some(names) = &written.remove {
            for (index, name) in names.items.iter().enumerate() {
                let at = item_path(names, &path.key("remove"), index);
                changes.remove.extend(self.header(name, &at, is_of_request));
            }
        }
        for (name, text) in written.set.iter().flatten() {
            let at = path.key("set").key(name);
            let name = self.header(name, &at, is_of_request);
            let text = match text {
                FileText::Plain(text) => self.value(text, &at).map(HeaderText::Fixed),
                FileText::Computed(text) => {
                    expression(text, &at.key("expression"), moment, Gives::Text, self.problems)
                        .map(HeaderText::Computed)
                }
            };
            changes.set.extend(name.zip(text));
        }
        if changes.rename.is_empty()
            && changes.remove.is_empty()
            && changes.set.is_empty()
            && !self.problems.has_below(path)
        {
            self.problems.value(path, "changes nothing; write set, remove or rename");
        }
        changes
    }

    fn header(&mut self, name: &str, at: &KeyPath, is_of_request: bool) -> Option<HeaderName> {
        let Ok(name) = HeaderName::from_bytes(name.as_bytes()) else {
            self.problems.value(at, format!("{name:?} cannot be the name of a header"));
            return None;
        };
        match may_change(&name, is_of_request) {
            Ok(()) => Some(name),
            Err(why) => {
                self.problems.value(at, format!("{name} {why}"));
                None
            }
        }
    }

    fn value(&mut self, text: &str, at: &KeyPath) -> Option<HeaderValue> {
        let value = HeaderValue::from_str(text).ok();
        if value.is_none() {
            self.problems.value(at, "has letters that cannot stand in a header");
        }
        value
    }

    fn fields(&mut self, written: &FileFields, path: &KeyPath) -> FieldChanges {
        let mut changes = FieldChanges::default();
        let none = IndexMap::new();
        for (name, value) in written.default.as_ref().unwrap_or(&none) {
            if let Some(field) = self.field(name, &path.key("default").key(name), &changes) {
                changes.give(&field, value);
            }
        }
        for (name, value) in written.set.as_ref().unwrap_or(&none) {
            if let Some(field) = self.field(name, &path.key("set").key(name), &changes) {
                changes.force(&field, value);
            }
        }
        for (name, value) in written.max.as_ref().unwrap_or(&none) {
            let at = path.key("max").key(name);
            match (self.field(name, &at, &changes), value) {
                (Some(field), Value::Number(max)) => changes.cap(&field, max.clone()),
                (Some(_), _) => self.problems.value(&at, "expected a number"),
                (None, _) => {}
            }
        }
        let none = OneOrMany::default();
        let names = written.remove.as_ref().unwrap_or(&none);
        for (index, name) in names.items.iter().enumerate() {
            let at = item_path(names, &path.key("remove"), index);
            if let Some(field) = self.field(name, &at, &changes) {
                changes.remove(&field);
            }
        }
        match &written.system_prompt {
            Some(prompt) if prompt.trim().is_empty() => {
                self.problems.value(&path.key("system_prompt"), "is empty");
            }
            Some(prompt) => changes.begin_with(prompt.clone()),
            None => {}
        }
        if changes.is_empty() && !self.problems.has_below(path) {
            let message = "changes nothing; write default, set, max, remove or system_prompt";
            self.problems.value(path, message);
        }
        changes
    }

    fn field(&mut self, name: &str, at: &KeyPath, known: &FieldChanges) -> Option<FieldPath> {
        match FieldPath::read(name) {
            Ok(field) if known.knows(&field) => {
                let message =
                    format!("{name:?} is changed by this hook already; write another one");
                self.problems.value(at, message);
                None
            }
            Ok(field) => Some(field),
            Err(message) => {
                self.problems.value(at, message);
                None
            }
        }
    }

    fn route(&mut self, written: &FileRoute, path: &KeyPath) -> Route {
        let to = written.to.as_deref().unwrap_or_default();
        if written.to.is_none() {
            self.problems.value(path, "\"to\" is missing: the service/model that requests go to");
        } else if !self.models.contains(to) {
            let message = format!("there is no model {to:?}; write it as service/model");
            self.problems.value(&path.key("to"), message);
        }
        let percent = written.percent.unwrap_or(100.0);
        if !(0.0..=100.0).contains(&percent) {
            self.problems.value(&path.key("percent"), "expected a number from 0 to 100");
        }
        let by = match written.by {
            None | Some(FileBy::Request) => By::Request,
            Some(FileBy::Key) => By::Key,
        };
        Route { to: to.into(), share: percent / 100.0, by }
    }

    fn refusal(&mut self, written: &FileRefuse, path: &KeyPath) -> Say {
        let status = written.status.unwrap_or(403);
        let status = StatusCode::from_u16(status).ok().filter(|_| (400..600).contains(&status));
        if status.is_none() {
            self.problems.value(&path.key("status"), "expected a status from 400 to 599");
        }
        let message = written.message.clone().unwrap_or_default();
        if message.trim().is_empty() && !self.problems.has_below(&path.key("message")) {
            self.problems.value(path, "\"message\" is missing: what clients are told");
        }
        Say::Refuse { status: status.unwrap_or_default(), message }
    }

    fn answer(&mut self, written: &FileAnswer, path: &KeyPath) -> Say {
        let status = written.status.unwrap_or(200);
        if !(200..600).contains(&status) || matches!(status, 204 | 304) {
            let message = "expected a status from 200 to 599 that has a body";
            self.problems.value(&path.key("status"), message);
        }
        let (body, kind) = match (&written.body, &written.json) {
            (Some(_), Some(_)) => {
                self.problems.value(&path.key("json"), "body stands here too; keep one of the two");
                return Say::Answer(Response::default());
            }
            (Some(body), None) => (body.clone(), "text/plain; charset=utf-8"),
            (None, Some(json)) => (json.to_string(), "application/json"),
            (None, None) => (String::new(), "text/plain; charset=utf-8"),
        };
        let mut answer = Response::new(Bytes::from(body));
        *answer.status_mut() = StatusCode::from_u16(status).unwrap_or_default();
        let kind = written.content_type.as_deref().unwrap_or(kind);
        if let Some(kind) = self.value(kind, &path.key("content_type")) {
            answer.headers_mut().insert(CONTENT_TYPE, kind);
        }
        for (name, text) in written.headers.iter().flatten() {
            let at = path.key("headers").key(name);
            if let Some(name) = self.header(name, &at, false)
                && let Some(value) = self.value(text, &at)
            {
                answer.headers_mut().insert(name, value);
            }
        }
        if let Some(after) = written.retry_after {
            // Rounded up: who comes at that time shall find it true.
            let seconds = after.0.as_secs_f64().ceil() as u64;
            answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        Say::Answer(answer)
    }
}
