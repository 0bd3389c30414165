//! What a raw request path asks a model for.

/// The last segments of paths whose answers are a model's text.
const GENERATES: [&[u8]; 12] = [
    b"completions",
    b"responses",
    b"messages",
    b"generateContent",
    b"streamGenerateContent",
    b"chat",
    b"generate",
    b"generate_stream",
    b"completion",
    b"infill",
    b"invocations",
    b"invoke",
];

/// And of those whose answers are numbers that the same input always gives.
const MEASURES: [&[u8]; 10] = [
    b"embeddings",
    b"embedding",
    b"embed",
    b"embedContent",
    b"batchEmbedContents",
    b"rerank",
    b"score",
    b"classify",
    b"pooling",
    b"similarity",
];

/// The last segment of a path, or what stands behind the colon in it.
#[must_use]
pub fn operation(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| matches!(byte, b'/' | b':')).next().unwrap_or_default()
}

/// Whether the answer is a model's text.
#[must_use]
pub fn generates(path: &[u8]) -> bool {
    GENERATES.contains(&operation(path))
}

/// Whether the answer is numbers about a text: embeddings, scores.
#[must_use]
pub fn measures(path: &[u8]) -> bool {
    MEASURES.contains(&operation(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_told_by_the_end_of_the_path() {
        for path in ["/v1/chat/completions", "/v1/messages", "/v1beta/models/a:generateContent"] {
            assert!(generates(path.as_bytes()) && !measures(path.as_bytes()), "{path}");
        }
        for path in ["/v1/embeddings", "/api/embed", "/v1beta/models/a:embedContent"] {
            assert!(measures(path.as_bytes()) && !generates(path.as_bytes()), "{path}");
        }
        for path in ["/v1/files", "/v1/models/embed/x", "", "/"] {
            assert!(!measures(path.as_bytes()) && !generates(path.as_bytes()), "{path}");
        }
    }
}
