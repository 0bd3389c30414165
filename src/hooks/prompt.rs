//! A text that every chat begins with, in the form of each API.

use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::fields::{Members, read, write};

/// Stands between our text and the client's.
const BETWEEN: &str = "\n\n";

/// What a chat begins with.
#[derive(Clone, Debug)]
pub(super) struct SystemPrompt(String);

impl SystemPrompt {
    pub(super) fn new(text: String) -> Self {
        Self(text)
    }

    /// Puts it before all that the client sends as a system's or a developer's; whether the path is one of chats.
    ///
    /// # Errors
    /// When what stands in its place is not what the API has there.
    pub(super) fn put(&self, path: &str, body: &mut Members<'_, '_>) -> serde_json::Result<bool> {
        let last = path.rsplit('/').next().unwrap_or_default();
        let name = match last {
            "completions" if path.ends_with("/chat/completions") => "messages",
            "chat" => "messages",
            "messages" => "system",
            "responses" => "instructions",
            _ if last.ends_with(":generateContent") || last.ends_with(":streamGenerateContent") => {
                let is_snake = body.find("system_instruction").is_some();
                if is_snake { "system_instruction" } else { "systemInstruction" }
            }
            _ => return Ok(false),
        };
        let own = body.find(name).filter(|own| *own != "null");
        let next = match (name, own) {
            ("messages", Some(own)) => {
                first_of(own, &json!({"role": "system", "content": self.0}))?
            }
            // There is nothing to begin: the backend says what is wrong.
            ("messages", None) => return Ok(false),
            ("system" | "instructions", None) => Value::from(&*self.0).to_string(),
            ("system", Some(own)) if own.starts_with('[') => {
                first_of(own, &json!({"type": "text", "text": self.0}))?
            }
            ("system" | "instructions", Some(own)) => {
                let own: String = serde_json::from_str(own)?;
                Value::from([&self.0, BETWEEN, &own].concat()).to_string()
            }
            (_, None) => json!({"parts": [{"text": self.0}]}).to_string(),
            (_, Some(own)) => with_first_part(own, &json!({"text": self.0}))?,
        };
        body.put(name, next);
        Ok(true)
    }
}

/// A list with something before all that is in it, which keeps its bytes.
fn first_of(list: &str, first: &Value) -> serde_json::Result<String> {
    let others: Vec<&RawValue> = serde_json::from_str(list)?;
    let rest = list.trim_start().strip_prefix('[').unwrap_or_default();
    let between = if others.is_empty() { "" } else { "," };
    Ok(format!("[{first}{between}{rest}"))
}

/// Gemini's content with another part before all others; one may stand there without a list.
fn with_first_part(content: &str, first: &Value) -> serde_json::Result<String> {
    let mut members = read(content)?;
    let mut members = Members(&mut members);
    let parts = match members.find("parts").filter(|parts| *parts != "null") {
        None => format!("[{first}]"),
        Some(parts) if parts.starts_with('[') => first_of(parts, first)?,
        Some(part) => format!("[{first},{part}]"),
    };
    members.put("parts", parts);
    Ok(write(members.0))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::HeaderMap;

    use super::super::{FieldChanges, Notes, OnRequestBody, RequestBody};
    use super::*;
    use crate::expression::Request;

    fn begun(path: &str, body: &Value) -> Value {
        let mut changes = FieldChanges::default();
        changes.begin_with("Be kind.".to_owned());
        let request = Request { path, ..Request::default() };
        let mut bytes = Bytes::from(body.to_string());
        let mut body = RequestBody {
            request: &request,
            headers: &HeaderMap::new(),
            bytes: &mut bytes,
            found: &mut false,
            notes: &mut Notes::new(),
        };
        changes.request_body(&mut body).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    #[test]
    fn each_api_has_it_in_its_own_place() {
        let user = json!({"role": "user", "content": "hi"});
        let ours = json!({"role": "system", "content": "Be kind."});
        let theirs = json!({"role": "developer", "content": "Be brief."});
        for (path, body, expected) in [
            (
                "/v1/chat/completions",
                json!({"messages": [user]}),
                json!({"messages": [ours, user]}),
            ),
            ("/v1/chat/completions", json!({"messages": []}), json!({"messages": [ours]})),
            (
                "/a/b/v1/chat/completions",
                json!({"messages": [theirs, user]}),
                json!({"messages": [ours, theirs, user]}),
            ),
            ("/v1/messages", json!({"x": 1}), json!({"x": 1, "system": "Be kind."})),
            ("/v1/messages", json!({"system": "S"}), json!({"system": "Be kind.\n\nS"})),
            (
                "/v1/messages",
                json!({"system": [{"type": "text", "text": "S"}]}),
                json!({"system": [{"type": "text", "text": "Be kind."}, {"type": "text", "text": "S"}]}),
            ),
            ("/v1/responses", json!({"instructions": null}), json!({"instructions": "Be kind."})),
            (
                "/v1/responses",
                json!({"instructions": "I"}),
                json!({"instructions": "Be kind.\n\nI"}),
            ),
            (
                "/v1beta/models/m:generateContent",
                json!({}),
                json!({"systemInstruction": {"parts": [{"text": "Be kind."}]}}),
            ),
            (
                "/v1beta/models/m:streamGenerateContent",
                json!({"system_instruction": {"parts": {"text": "S"}}}),
                json!({"system_instruction": {"parts": [{"text": "Be kind."}, {"text": "S"}]}}),
            ),
            // No chat has anything to begin with here.
            ("/v1/embeddings", json!({"input": "x"}), json!({"input": "x"})),
            ("/v1/completions", json!({"prompt": "x"}), json!({"prompt": "x"})),
            ("/v1/chat/completions", json!({"prompt": "x"}), json!({"prompt": "x"})),
        ] {
            assert_eq!(begun(path, &body), expected, "{path} {body}");
        }
    }
}
