//! Follows an answer as it passes, in whatever pieces it comes.

use memchr::memchr;

use super::reader::{Reader, Seen};
use super::{Counts, Usage};

/// How an answer is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One JSON document.
    Json,
    /// JSON documents, one a line.
    Lines,
    /// Server-sent events, with a JSON document each.
    Events,
}

impl Kind {
    /// By a `Content-Type`; none where there is no usage to be read.
    #[must_use]
    pub fn of(content_type: &[u8]) -> Option<Self> {
        let end = content_type.iter().position(|byte| *byte == b';').unwrap_or(content_type.len());
        let kind = content_type[..end].trim_ascii();
        let is = |known: &str| kind.eq_ignore_ascii_case(known.as_bytes());
        let is_json = kind.last_chunk::<5>().is_some_and(|end| end.eq_ignore_ascii_case(b"+json"));
        if is("text/event-stream") {
            Some(Self::Events)
        } else if is("application/x-ndjson") || is("application/jsonl") {
            Some(Self::Lines)
        } else if is_json || is("application/json") || is("text/plain") || kind.is_empty() {
            Some(Self::Json)
        } else {
            None
        }
    }
}

/// Reads usage from an answer. Lines end as those of all known servers do, with LF or CRLF. It keeps nothing of it, however long its lines are.
#[derive(Clone, Debug)]
pub struct Meter {
    kind: Kind,
    line: Line,
    reader: Reader,
    counts: Counts,
    outputs: u64,
    /// What the lines of the current event held.
    event: Seen,
    /// Whether a document has begun in the current event, and not ended.
    is_within: bool,
}

/// Where in a line it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// At its beginning: so many bytes of `data:` were there.
    Begins(usize),
    /// Behind a carriage return and nothing else.
    Return,
    /// In the document that it holds.
    Data,
    /// In a line of no interest.
    Other,
}

const DATA: &[u8] = b"data:";

/// An event that has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    /// Behind its last byte in the piece.
    pub(super) end: usize,
    /// Whether it tells usage and is no part of the answer.
    pub(super) is_usage_only: bool,
}

impl Meter {
    /// For an answer that is framed so.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            line: Line::Begins(0),
            reader: Reader::default(),
            counts: Counts::default(),
            outputs: 0,
            event: Seen::default(),
            is_within: false,
        }
    }

    /// A piece of the answer passes.
    pub fn pass(&mut self, piece: &[u8]) {
        self.follow(piece, |_| {});
    }

    /// As [`Meter::pass`]; each event of an event stream is told as it ends.
    pub(super) fn follow(&mut self, piece: &[u8], told: impl FnMut(Event)) {
        match self.kind {
            Kind::Json => self.reader.feed(piece),
            Kind::Lines => self.lines(piece),
            Kind::Events => self.events(piece, told),
        }
    }

    fn lines(&mut self, piece: &[u8]) {
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            self.reader.feed(part);
            if part.ends_with(b"\n") {
                self.document_ends();
                self.reader.begin();
            }
        }
    }

    fn events(&mut self, piece: &[u8], mut told: impl FnMut(Event)) {
        let mut at = 0;
        while at < piece.len() {
            let rest = &piece[at..];
            let end = memchr(b'\n', rest);
            self.line_goes_on(&rest[..end.unwrap_or(rest.len())]);
            let Some(end) = end else { return };
            let is_blank = matches!(self.line, Line::Begins(0) | Line::Return);
            at += end + 1;
            self.line_ends();
            if is_blank {
                self.event_document_ends();
                let Seen { no_choices, usage, output, error, .. } = std::mem::take(&mut self.event);
                let is_usage_only = no_choices && usage && !output && !error;
                told(Event { end: at, is_usage_only });
            }
        }
    }

    fn line_goes_on(&mut self, mut part: &[u8]) {
        match (self.line, part) {
            (_, []) => return,
            (Line::Begins(0), b"\r") => {
                self.line = Line::Return;
                return;
            }
            (Line::Return, _) => self.line = Line::Other,
            _ => {}
        }
        if let Line::Begins(matched) = self.line {
            let more = part.len().min(DATA.len() - matched);
            if part[..more] != DATA[matched..matched + more] {
                self.line = Line::Other;
                return;
            }
            part = &part[more..];
            self.line = if matched + more == DATA.len() {
                if !self.is_within {
                    self.reader.begin();
                    self.is_within = true;
                }
                Line::Data
            } else {
                Line::Begins(matched + more)
            };
        }
        if self.line == Line::Data {
            self.reader.feed(part);
        }
    }

    fn line_ends(&mut self) {
        if self.line == Line::Data {
            if self.reader.is_done() {
                self.event_document_ends();
            } else {
                // It may go on in the next line, which a line break stands before.
                self.reader.feed(b"\n");
            }
        }
        self.line = Line::Begins(0);
    }

    fn event_document_ends(&mut self) {
        if !std::mem::take(&mut self.is_within) {
            return;
        }
        self.document_ends();
        let Seen { output, no_choices, usage, error, .. } = self.reader.seen;
        self.event.output |= output;
        self.event.no_choices |= no_choices;
        self.event.usage |= usage;
        self.event.error |= error;
    }

    fn document_ends(&mut self) {
        self.counts.update(&self.reader.counts);
        let Seen { output, line, .. } = self.reader.seen;
        self.outputs += u64::from(output || line && self.kind == Kind::Lines);
    }

    /// What the answer has told so far: usage, and whether that is of its output too.
    #[must_use]
    pub fn usage(&self) -> (Option<Usage>, bool) {
        let mut counts = self.counts;
        counts.update(&self.reader.counts);
        counts.usage()
    }

    /// Pieces of the answer that have passed: about as many tokens, where each has an event of its own.
    #[must_use]
    pub fn outputs(&self) -> u64 {
        self.outputs
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An answer of each family, as its servers send it, and what it took.
    const ANSWERS: &[(&str, Kind, &str, Usage, u64)] = &[
        (
            "chat",
            Kind::Json,
            r#"{"id":"c","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"say \"usage\":{\"prompt_tokens\":9}"},"finish_reason":"stop"}],"usage":{"prompt_tokens":19,"completion_tokens":10,"total_tokens":29,"prompt_tokens_details":{"cached_tokens":8,"audio_tokens":0,"cache_write_tokens":3},"completion_tokens_details":{"reasoning_tokens":4,"accepted_prediction_tokens":0}},"system_fingerprint":"fp"}"#,
            Usage { input: 19, output: 10, cached: 8, cache_written: 3, reasoning: 4 },
            0,
        ),
        (
            "chat stream",
            Kind::Events,
            "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}],\"usage\":null}\n\n: ping\n\ndata: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"H\\\\\\\"i]}\"}}],\"usage\":null}\n\ndata: {\"id\":\"c\",\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":2,\"total_tokens\":7}}\n\ndata: [DONE]\n\n",
            Usage { input: 5, output: 2, cached: 0, cache_written: 0, reasoning: 0 },
            2,
        ),
        (
            "totals in each event, as vLLM sends them",
            Kind::Events,
            "data: {\"choices\":[{\"delta\":{}}],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":1}}\n\ndata: {\"choices\":[{\"delta\":{}}],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":2}}\n\n",
            Usage { input: 5, output: 2, cached: 0, cache_written: 0, reasoning: 0 },
            2,
        ),
        (
            "completions",
            Kind::Json,
            r#"{"choices":[{"text":"a"}],"usage":{"completion_tokens":3,"prompt_tokens":4,"total_tokens":7}}"#,
            Usage { input: 4, output: 3, cached: 0, cache_written: 0, reasoning: 0 },
            0,
        ),
        (
            "responses",
            Kind::Json,
            r#"{"id":"r","output":[{"content":[{"text":"x"}]}],"usage":{"input_tokens":36,"input_tokens_details":{"cached_tokens":4},"output_tokens":87,"output_tokens_details":{"reasoning_tokens":80},"total_tokens":123}}"#,
            Usage { input: 36, output: 87, cached: 4, cache_written: 0, reasoning: 80 },
            0,
        ),
        (
            "responses stream",
            Kind::Events,
            "event: response.created\ndata: {\"type\":\"response.created\",\"sequence_number\":0,\"response\":{\"id\":\"r\",\"usage\":null}}\n\nevent: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"delta\":\"Hi\"}\n\nevent: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{\"output\":[{\"usage\":{\"input_tokens\":99}}],\"usage\":{\"input_tokens\":36,\"output_tokens\":87,\"output_tokens_details\":{\"reasoning_tokens\":64},\"total_tokens\":123}}}\n\n",
            Usage { input: 36, output: 87, cached: 0, cache_written: 0, reasoning: 64 },
            1,
        ),
        (
            "embeddings",
            Kind::Json,
            r#"{"object":"list","data":[{"object":"embedding","index":0,"embedding":[0.1,-2e-3,3]}],"model":"e","usage":{"prompt_tokens":8,"total_tokens":8}}"#,
            Usage { input: 8, output: 0, cached: 0, cache_written: 0, reasoning: 0 },
            0,
        ),
        (
            "rerank",
            Kind::Json,
            r#"{"results":[{"index":0,"relevance_score":0.9}],"usage":{"total_tokens":12}}"#,
            Usage { input: 12, output: 0, cached: 0, cache_written: 0, reasoning: 0 },
            0,
        ),
        (
            "anthropic",
            Kind::Json,
            r#"{"type":"message","content":[{"type":"text","text":"{"}],"usage":{"input_tokens":10,"cache_creation_input_tokens":3,"cache_read_input_tokens":20,"output_tokens":7,"output_tokens_details":{"thinking_tokens":2},"cache_creation":{"ephemeral_5m_input_tokens":3},"iterations":[{"input_tokens":999}],"server_tool_use":null}}"#,
            Usage { input: 33, output: 7, cached: 20, cache_written: 3, reasoning: 2 },
            0,
        ),
        (
            "anthropic stream",
            Kind::Events,
            "event: message_start\r\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":25,\"cache_read_input_tokens\":5,\"output_tokens\":1}}}\r\n\r\nevent: ping\r\ndata: {\"type\": \"ping\"}\r\n\r\nevent: content_block_delta\r\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"Hi\"}}\r\n\r\nevent: message_delta\r\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"input_tokens\":null,\"output_tokens\":15}}\r\n\r\nevent: message_stop\r\ndata: {\"type\":\"message_stop\"}\r\n\r\n",
            Usage { input: 30, output: 15, cached: 5, cache_written: 0, reasoning: 0 },
            2,
        ),
        (
            "gemini",
            Kind::Json,
            r#"{"candidates":[{"content":{"parts":[{"text":"x"}]}}],"usageMetadata":{"promptTokenCount":10,"cachedContentTokenCount":4,"candidatesTokenCount":5,"thoughtsTokenCount":6,"toolUsePromptTokenCount":2,"totalTokenCount":23,"promptTokensDetails":[{"modality":"TEXT","tokenCount":10}]},"modelVersion":"g"}"#,
            Usage { input: 12, output: 11, cached: 4, cache_written: 0, reasoning: 6 },
            0,
        ),
        (
            "gemini stream",
            Kind::Events,
            "data: {\"candidates\": [{\"content\": {\"parts\": [{\"text\": \"a\"}]}}],\"usageMetadata\": {\"promptTokenCount\": 10,\"totalTokenCount\": 10}}\r\n\r\ndata: {\"candidates\": [{\"finishReason\": \"STOP\"}],\"usageMetadata\": {\"promptTokenCount\": 10,\"candidatesTokenCount\": 7,\"totalTokenCount\": 17}}\r\n\r\n",
            Usage { input: 10, output: 7, cached: 0, cache_written: 0, reasoning: 0 },
            2,
        ),
        (
            "gemini list",
            Kind::Json,
            "[{\"candidates\":[{}],\"usageMetadata\":{\"promptTokenCount\":10}}\n,\r\n{\"candidates\":[{}],\"usageMetadata\":{\"promptTokenCount\":10,\"candidatesTokenCount\":7}}\n]",
            Usage { input: 10, output: 7, cached: 0, cache_written: 0, reasoning: 0 },
            0,
        ),
        (
            "ollama",
            Kind::Lines,
            "{\"model\":\"m\",\"message\":{\"role\":\"assistant\",\"content\":\"Hi\"},\"done\":false}\n{\"model\":\"m\",\"message\":{\"content\":\"\"},\"done\":true,\"prompt_eval_count\":26,\"eval_count\":298,\"eval_duration\":1}\n",
            Usage { input: 26, output: 298, cached: 0, cache_written: 0, reasoning: 0 },
            2,
        ),
        (
            "ollama without a last line break, the prompt cached",
            Kind::Lines,
            "{\"response\":\"a\",\"done\":false}\n{\"response\":\"\",\"done\":true,\"eval_count\":3}",
            Usage { input: 0, output: 3, cached: 0, cache_written: 0, reasoning: 0 },
            1,
        ),
        (
            "a document over several lines",
            Kind::Events,
            "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}],\ndata: \"usage\":\ndata:{\"prompt_tokens\":5,\ndata: \"completion_tokens\":2}}\n\ndata: [DONE]\n\n",
            Usage { input: 5, output: 2, cached: 0, cache_written: 0, reasoning: 0 },
            1,
        ),
        (
            "a prompt that Gemini blocks",
            Kind::Json,
            r#"{"promptFeedback":{"blockReason":"SAFETY"},"usageMetadata":{"promptTokenCount":4,"totalTokenCount":4}}"#,
            Usage { input: 4, output: 0, cached: 0, cache_written: 0, reasoning: 0 },
            0,
        ),
        (
            "llama.cpp's own",
            Kind::Events,
            "data: {\"content\":\"a\",\"stop\":false}\n\ndata: {\"content\":\"\",\"stop\":true,\"tokens_predicted\":4,\"tokens_evaluated\":11,\"timings\":{\"prompt_n\":1}}\n\n",
            Usage { input: 11, output: 4, cached: 0, cache_written: 0, reasoning: 0 },
            2,
        ),
    ];

    #[test]
    fn each_familys_answer_has_the_same_usage_wherever_it_is_cut() {
        for (name, kind, answer, usage, outputs) in ANSWERS {
            let answer = answer.as_bytes();
            for cut in 0..=answer.len() {
                let mut meter = Meter::new(*kind);
                meter.pass(&answer[..cut]);
                meter.pass(&answer[cut..]);
                assert_eq!(
                    (meter.usage().0, meter.outputs()),
                    (Some(*usage), *outputs),
                    "{name} {cut}"
                );
            }
            let mut meter = Meter::new(*kind);
            answer.chunks(1).for_each(|byte| meter.pass(byte));
            assert_eq!((meter.usage().0, meter.outputs()), (Some(*usage), *outputs), "{name}");
        }
    }

    #[test]
    fn an_answer_that_breaks_off_tells_what_it_told() {
        let of = |name: &str| ANSWERS.iter().find(|answer| answer.0 == name).unwrap();
        let (_, kind, answer, ..) = of("anthropic stream");
        let mut meter = Meter::new(*kind);
        meter.pass(&answer.as_bytes()[..answer.find("event: message_delta").unwrap()]);
        let (usage, _) = meter.usage();
        assert_eq!((usage.unwrap().input, meter.outputs()), (30, 1));
        let (_, kind, answer, ..) = of("chat stream");
        let mut meter = Meter::new(*kind);
        meter
            .pass(&answer.as_bytes()[..answer.find("data: {\"id\":\"c\",\"choices\":[]").unwrap()]);
        assert_eq!((meter.usage(), meter.outputs()), ((None, false), 2));
        let mut meter = Meter::new(Kind::Json);
        meter.pass(br#"{"error":{"message":"no","type":"x"}}"#);
        assert_eq!(meter.usage(), (None, false));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_and_pieces_do_not_matter(
            bytes in prop_oneof![
                any::<Vec<u8>>(),
                "(data: ?)?[\\[\\]{}:,\"\\\\ \r\na0.-]{0,40}".prop_map(String::into_bytes),
                "data:\\{(\"(usage|choices|delta)\":([0-9]{1,3}|\\{\"prompt_tokens\":[0-9]{1,2}\\}|\\[\\]),?){0,3}\\}\r?\n\r?\n".prop_map(String::into_bytes),
            ],
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
        ) {
            for kind in [Kind::Json, Kind::Lines, Kind::Events] {
                let mut whole = Meter::new(kind);
                whole.pass(&bytes);
                let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
                cuts.extend([0, bytes.len()]);
                cuts.sort_unstable();
                let mut pieces = Meter::new(kind);
                cuts.windows(2).for_each(|pair| pieces.pass(&bytes[pair[0]..pair[1]]));
                prop_assert_eq!((whole.usage(), whole.outputs()), (pieces.usage(), pieces.outputs()));
            }
        }

        #[test]
        fn it_reads_what_a_parser_reads(
            before in "\\PC{0,20}",
            input in 0..1_000_000_u64,
            output in 0..=crate::llm::TOKENS_MAX,
            spaces in "[ \n\t]{0,3}",
        ) {
            let body = serde_json::json!({
                "a": [before, {"usage": {"prompt_tokens": 1}}],
                "usage": {"prompt_tokens": input, "completion_tokens": output},
                "b": before,
            });
            let text = serde_json::to_string_pretty(&body).unwrap().replace(": ", &format!(":{spaces}"));
            let mut meter = Meter::new(Kind::Json);
            meter.pass(text.as_bytes());
            let usage = meter.usage().0.unwrap();
            prop_assert_eq!((usage.input, usage.output), (input, output));
        }
    }
}
