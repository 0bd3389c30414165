//! Which API family a request speaks, told by its path.

use http::HeaderMap;

/// An API family, as far as its error bodies differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `{"error":{"message","type","param","code"}}`; also for families without a shape of ours.
    OpenAi,
    /// `{"type":"error","error":{"type","message"}}`, on `/v1/messages` and below.
    Anthropic,
}

impl Dialect {
    /// Tells the family by a raw request path (no query) and the headers: some paths are common to all.
    #[must_use]
    pub fn of(path: &[u8], headers: &HeaderMap) -> Self {
        if has_anthropic_version(headers) { Self::Anthropic } else { Self::of_path(path) }
    }

    /// Tells the family by a raw request path (no query).
    #[must_use]
    pub fn of_path(path: &[u8]) -> Self {
        const MESSAGES: &[u8] = b"/v1/messages";
        let here = path.windows(MESSAGES.len()).enumerate().any(|(at, window)| {
            window == MESSAGES && matches!(path.get(at + MESSAGES.len()), None | Some(b'/'))
        });
        if here { Self::Anthropic } else { Self::OpenAi }
    }
}

/// Whether a client of Anthropic's API asks: all of them say which version they mean.
#[must_use]
pub fn has_anthropic_version(headers: &HeaderMap) -> bool {
    headers.contains_key("anthropic-version")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anthropic_is_told_by_its_messages_path() {
        for path in ["/v1/messages", "/a/b/v1/messages", "/a/b/v1/messages/count_tokens"] {
            assert_eq!(Dialect::of_path(path.as_bytes()), Dialect::Anthropic, "{path}");
        }
        for path in ["/v1/chat/completions", "/v1/messagesx", "/messages", "", "/"] {
            assert_eq!(Dialect::of_path(path.as_bytes()), Dialect::OpenAi, "{path}");
        }
    }
}
