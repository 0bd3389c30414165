//! Members of a request's JSON body that are given, bounded, forced and removed. All others keep their bytes.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde::de::{Deserializer as _, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Number, Value};

use super::prompt::SystemPrompt;
use super::{OnRequestBody, RequestBody, Stop};
use crate::llm;

/// The deepest member that can be named.
const DEPTH_MAX: usize = 8;

/// What is done with members.
#[derive(Clone, Debug, Default)]
pub struct FieldChanges {
    members: Vec<Member>,
    prompt: Option<SystemPrompt>,
}

/// What is done with the member of one name, and with those inside of it.
#[derive(Clone, Debug)]
struct Member {
    name: String,
    rule: Option<Rule>,
    inside: Vec<Member>,
}

/// What is done with a member.
#[derive(Clone, Debug, PartialEq)]
enum Rule {
    /// It is this where it is not there, or null.
    Default(String),
    /// It is this.
    Set(String),
    /// It is this at most; what is no number becomes this.
    Max(Number),
    /// It goes.
    Remove,
}

/// The way to a member: its name, or with dots between those of the objects around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldPath(Vec<String>);

impl FieldPath {
    /// Reads a path such as `max_tokens` or `generationConfig.maxOutputTokens`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(text: &str) -> Result<Self, &'static str> {
        let names: Vec<String> = text.split('.').map(str::to_owned).collect();
        if names.iter().any(String::is_empty) {
            return Err("expected a member's name, or several with dots between");
        }
        if names.len() > DEPTH_MAX {
            return Err("names a member that is too deep");
        }
        if names[..] == ["model"] {
            return Err("the model is what a request is routed by; see \"aliases\"");
        }
        Ok(Self(names))
    }
}

/// One member of an object, as it is written.
pub(super) struct Written<'a> {
    name: Cow<'a, str>,
    value: Cow<'a, str>,
}

impl Written<'_> {
    /// Some servers (those in Go) take a name in any case.
    fn is(&self, name: &str) -> bool {
        self.name.eq_ignore_ascii_case(name)
    }
}

impl FieldChanges {
    /// A member is this where it is not there, or null.
    pub fn give(&mut self, path: &FieldPath, value: &Value) {
        self.member(path).rule = Some(Rule::Default(value.to_string()));
    }

    /// A member is this.
    pub fn force(&mut self, path: &FieldPath, value: &Value) {
        self.member(path).rule = Some(Rule::Set(value.to_string()));
    }

    /// A member is this at most.
    pub fn cap(&mut self, path: &FieldPath, max: Number) {
        self.member(path).rule = Some(Rule::Max(max));
    }

    /// A member goes.
    pub fn remove(&mut self, path: &FieldPath) {
        self.member(path).rule = Some(Rule::Remove);
    }

    /// Whether nothing is done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty() && self.prompt.is_none()
    }

    /// Whether something is done with a member already.
    #[must_use]
    pub fn knows(&self, path: &FieldPath) -> bool {
        let mut members = &self.members;
        for (at, name) in path.0.iter().enumerate() {
            let Some(member) = members.iter().find(|member| member.name == *name) else {
                return false;
            };
            let is_last = at + 1 == path.0.len();
            if member.rule.is_some() || is_last && !member.inside.is_empty() {
                return true;
            }
            members = &member.inside;
        }
        false
    }

    /// Chats begin with this.
    pub fn begin_with(&mut self, prompt: String) {
        self.prompt = Some(SystemPrompt::new(prompt));
    }

    fn member(&mut self, path: &FieldPath) -> &mut Member {
        let (last, around) = path.0.split_last().expect("a path has a name");
        let mut members = &mut self.members;
        for name in around {
            members = &mut named(members, name).inside;
        }
        named(members, last)
    }

    /// The body with the changes; none where there are none.
    ///
    /// # Errors
    /// When it is not a JSON object.
    fn apply(&self, path: &str, body: &[u8]) -> serde_json::Result<Option<String>> {
        let text = std::str::from_utf8(body).map_err(serde_json::Error::custom)?;
        let mut members = read(text)?;
        let mut is_changed = change(&mut members, &self.members)?;
        if let Some(prompt) = &self.prompt {
            is_changed |= prompt.put(path, &mut Members(&mut members))?;
        }
        Ok(is_changed.then(|| write(&members)))
    }
}

fn named<'m>(members: &'m mut Vec<Member>, name: &str) -> &'m mut Member {
    let at = members.iter().position(|member| member.name == *name).unwrap_or_else(|| {
        members.push(Member { name: name.to_owned(), rule: None, inside: Vec::new() });
        members.len() - 1
    });
    &mut members[at]
}

/// The members of an object that is being changed, by their names. Of several of one name the last one counts, as for
/// most servers; those before it go when it is changed.
pub(super) struct Members<'m, 'a>(pub(super) &'m mut Vec<Written<'a>>);

impl<'a> Members<'_, 'a> {
    /// As it is written.
    pub(super) fn find(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|member| member.is(name)).map(|member| &*member.value)
    }

    /// As it is written; none where it is null.
    fn find_some(&self, name: &str) -> Option<&str> {
        self.find(name).filter(|value| *value != "null")
    }

    /// Puts another value in its place, or behind all others.
    pub(super) fn put(&mut self, name: &str, value: String) {
        let last = self.0.iter().rposition(|member| member.is(name));
        match last {
            Some(last) => {
                self.0[last].value = value.into();
                let mut at = 0;
                self.0.retain(|member| {
                    at += 1;
                    !member.is(name) || at == last + 1
                });
            }
            None => {
                let name = Cow::Owned(name.to_owned());
                self.0.push(Written { name, value: value.into() });
            }
        }
    }

    fn remove(&mut self, name: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|member| !member.is(name));
        self.0.len() < before
    }

    /// Leaves of several of one name the last one; whether there were several. Servers differ in which one counts.
    fn leave_one(&mut self, name: &str) -> bool {
        let count = self.0.iter().filter(|member| member.is(name)).count();
        let own = self.find(name).filter(|_| count > 1).map(str::to_owned);
        own.map(|own| self.put(name, own)).is_some()
    }
}

/// Changes the members of an object; whether anything changed.
fn change<'a>(members: &mut Vec<Written<'a>>, changes: &[Member]) -> serde_json::Result<bool> {
    let mut is_changed = false;
    for Member { name, rule, inside } in changes {
        let mut all = Members(members);
        is_changed |= all.leave_one(name);
        let next = match rule {
            Some(Rule::Remove) => {
                is_changed |= all.remove(name);
                None
            }
            Some(Rule::Default(value)) => all.find_some(name).is_none().then(|| value.clone()),
            Some(Rule::Set(value)) => (all.find(name) != Some(value)).then(|| value.clone()),
            Some(Rule::Max(max)) => {
                all.find_some(name).filter(|own| !is_at_most(own, max)).map(|_| max.to_string())
            }
            None => changed_inside(&all, name, inside)?,
        };
        if let Some(next) = next {
            all.put(name, next);
            is_changed = true;
        }
    }
    Ok(is_changed)
}

/// An object inside with its changes; none where there are none. One that is not there is made where it takes to.
fn changed_inside(
    all: &Members<'_, '_>,
    name: &str,
    inside: &[Member],
) -> serde_json::Result<Option<String>> {
    let Some(own) = all.find_some(name) else {
        let mut members = Vec::new();
        return Ok(change(&mut members, inside)?.then(|| write(&members)));
    };
    if !own.starts_with('{') {
        return Ok(None);
    }
    let mut members = read(own)?;
    Ok(change(&mut members, inside)?.then(|| write(&members)))
}

fn is_at_most(own: &str, max: &Number) -> bool {
    let own: Option<Number> = serde_json::from_str(own).ok();
    match (own.as_ref().and_then(Number::as_f64), max.as_f64()) {
        // Below 0 is without any bound, for some servers.
        (Some(own), Some(max)) => own <= max && (own >= 0.0 || max < 0.0),
        _ => false,
    }
}

/// The members of an object.
pub(super) fn read(text: &str) -> serde_json::Result<Vec<Written<'_>>> {
    struct Object;
    impl<'a> Visitor<'a> for Object {
        type Value = Vec<Written<'a>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a JSON object")
        }

        fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut members = Vec::with_capacity(16);
            while let Some(name) = map.next_key::<Name<'a>>()? {
                let value: &RawValue = map.next_value()?;
                members.push(Written { name: name.0, value: Cow::Borrowed(value.get()) });
            }
            Ok(members)
        }
    }
    let mut reader = serde_json::Deserializer::from_str(text);
    let members = reader.deserialize_map(Object)?;
    reader.end()?;
    Ok(members)
}

/// A name, borrowed where it has no escapes.
#[derive(serde::Deserialize)]
pub(super) struct Name<'a>(#[serde(borrow)] pub(super) Cow<'a, str>);

pub(super) fn write(members: &[Written<'_>]) -> String {
    let bytes: usize = members.iter().map(|it| it.name.len() + it.value.len() + 4).sum();
    let mut text = String::with_capacity(bytes + 2);
    text.push('{');
    for (at, Written { name, value }) in members.iter().enumerate() {
        if at > 0 {
            text.push(',');
        }
        text.push_str(&Value::from(&**name).to_string());
        text.push(':');
        text.push_str(value);
    }
    text.push('}');
    text
}

impl OnRequestBody for FieldChanges {
    fn request_body(&self, body: &mut RequestBody<'_>) -> Result<(), Stop> {
        let kind = body.headers.get(CONTENT_TYPE).map(|kind| kind.as_bytes()).unwrap_or_default();
        // What says that it is a form and is none may be read as JSON all the same.
        let is_form = llm::is_form(kind) && body.bytes.starts_with(b"--");
        if body.bytes.is_empty() || is_form {
            return Ok(());
        }
        match self.apply(body.request.path, body.bytes) {
            Ok(None) => Ok(()),
            Ok(Some(changed)) => {
                *body.bytes = Bytes::from(changed);
                Ok(())
            }
            Err(_) => Err(Stop::Refuse {
                status: StatusCode::BAD_REQUEST,
                code: "invalid_body",
                message: "the body is not a JSON object, or it is not complete".to_owned(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn path(text: &str) -> FieldPath {
        FieldPath::read(text).unwrap()
    }

    fn changes() -> FieldChanges {
        let mut changes = FieldChanges::default();
        changes.cap(&path("max_tokens"), 100.into());
        changes.cap(&path("generationConfig.maxOutputTokens"), 50.into());
        changes.force(&path("temperature"), &json!(0));
        changes.give(&path("top_p"), &json!(0.5));
        changes.give(&path("extra.a.b"), &json!("c"));
        changes.remove(&path("logit_bias"));
        changes
    }

    fn applied(body: &str) -> String {
        let changed = changes().apply("/v1/chat/completions", body.as_bytes()).unwrap();
        changed.unwrap_or_else(|| "the same".to_owned())
    }

    #[test]
    fn members_are_given_bounded_forced_and_removed() {
        let rest = r#""temperature":0,"top_p":0.5,"extra":{"a":{"b":"c"}}"#;
        for (body, expected) in [
            (r#"{ "max_tokens" : 99 }"#, format!(r#"{{"max_tokens":99,{rest}}}"#)),
            (r#"{"max_tokens":101}"#, format!(r#"{{"max_tokens":100,{rest}}}"#)),
            (r#"{"max_tokens":1e9}"#, format!(r#"{{"max_tokens":100,{rest}}}"#)),
            (r#"{"max_tokens":"9"}"#, format!(r#"{{"max_tokens":100,{rest}}}"#)),
            (r#"{"max_tokens":-1}"#, format!(r#"{{"max_tokens":100,{rest}}}"#)),
            (r#"{"Max_Tokens":101}"#, format!(r#"{{"Max_Tokens":100,{rest}}}"#)),
            (r#"{"max_tokens":999,"max_tokens":1}"#, format!(r#"{{"max_tokens":1,{rest}}}"#)),
            (r#"{"max_tokens":null}"#, format!(r#"{{"max_tokens":null,{rest}}}"#)),
            (r#"{"logit_bias":{"1":2},"a":[1, 2]}"#, format!(r#"{{"a":[1, 2],{rest}}}"#)),
            // Of several the last one counts, for us as for servers.
            (
                r#"{"max_tokens":1,"a":1,"max_tokens":999}"#,
                format!(r#"{{"a":1,"max_tokens":100,{rest}}}"#),
            ),
            (r#"{"max_\u0074okens":999}"#, format!(r#"{{"max_tokens":100,{rest}}}"#)),
        ] {
            assert_eq!(applied(body), expected, "{body}");
        }
        let all = r#"{"temperature":0,"top_p":1,"extra":{"a":{"b":1}},"generationConfig":{"maxOutputTokens":9}}"#;
        assert_eq!(applied(all), "the same");
        let deep = r#"{"temperature":0,"top_p":1,"extra":{"a":{"x":1}},"generationConfig":{"x":[ ],"maxOutputTokens":90}}"#;
        assert_eq!(
            applied(deep),
            r#"{"temperature":0,"top_p":1,"extra":{"a":{"x":1,"b":"c"}},"generationConfig":{"x":[ ],"maxOutputTokens":50}}"#
        );
        // What is no object is not looked into, and not replaced.
        let odd = r#"{"temperature":0,"top_p":1,"extra":7}"#;
        assert_eq!(applied(odd), "the same");
        for body in ["", "[]", "{", "1", "{} x", "{\"a\":\"\\ud800\" ", "\u{feff}"] {
            assert!(changes().apply("/", body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn paths_that_are_none_are_refused() {
        for text in ["", ".", "a..b", "model", "a.b.c.d.e.f.g.h.i"] {
            assert!(FieldPath::read(text).is_err(), "{text}");
        }
        let changes = changes();
        for (text, is_known) in [
            ("max_tokens", true),
            ("max_tokens.x", true),
            ("extra", true),
            ("extra.a.b", true),
            ("extra.a.c", false),
            ("other", false),
        ] {
            assert_eq!(changes.knows(&path(text)), is_known, "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn nothing_else_changes(
            others in prop::collection::btree_map("[a-j\"\\\\é]{1,6}", "\\PC{0,12}", 0..6),
            tokens in prop::option::of(0_u64..300),
        ) {
            let mut body = serde_json::Map::new();
            body.extend(others.into_iter().map(|(key, text)| (key, Value::from(text))));
            if let Some(tokens) = tokens {
                body.insert("max_tokens".to_owned(), tokens.into());
            }
            let text = Value::Object(body.clone()).to_string();
            let mut changes = FieldChanges::default();
            changes.cap(&path("max_tokens"), 100.into());
            let changed = changes.apply("/", text.as_bytes()).unwrap();
            prop_assert_eq!(changed.is_some(), tokens.is_some_and(|tokens| tokens > 100));
            let read: Value = serde_json::from_str(changed.as_deref().unwrap_or(&text)).unwrap();
            if let Some(tokens) = tokens {
                body.insert("max_tokens".to_owned(), tokens.min(100).into());
            }
            prop_assert_eq!(read, Value::Object(body));
        }
    }
}
