//! What a simulated backend says, in the shapes of the API families.

use serde_json::{Value, json};

/// The parts of a request that an answer depends on.
pub(super) struct Question {
    pub(super) model: String,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    prompt: String,
}

impl Question {
    /// Reads a request body; `stream` is what counts when it does not say.
    pub(super) fn read(body: &[u8], stream: bool) -> Option<Self> {
        let body: Value = serde_json::from_slice(body).ok()?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let last_message = body["messages"].as_array().and_then(|messages| messages.last());
        let prompt = last_message.map_or(&body["prompt"], |message| &message["content"]);
        Some(Self {
            model: text(&body["model"]).unwrap_or_else(|| "chat".to_owned()),
            stream: body["stream"].as_bool().unwrap_or(stream),
            include_usage: body["stream_options"]["include_usage"].as_bool().unwrap_or(false),
            prompt: text(prompt).unwrap_or_default(),
        })
    }

    /// The answer as its tokens, one word each.
    pub(super) fn tokens(&self, backend: &str) -> Vec<String> {
        let heard: String = self.prompt.chars().take(200).collect();
        let text = format!("Hello from the {backend} backend. You said: {heard}");
        text.split_inclusive(' ').map(str::to_owned).collect()
    }

    fn prompt_tokens(&self) -> usize {
        self.prompt.split_whitespace().count().max(1)
    }
}

/// One event or line of a stream, and whether a token's time passes before it.
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) waits: bool,
}

fn at_once(text: String) -> Piece {
    Piece { text, waits: false }
}

fn after_a_token(text: String) -> Piece {
    Piece { text, waits: true }
}

pub(super) fn models(created: u64) -> Value {
    json!({"object": "list", "data": [
        {"id": "chat", "object": "model", "created": created, "owned_by": "tollgate-demo"},
    ]})
}

pub(super) fn chat(question: &Question, tokens: &[String], id: u64, created: u64) -> Value {
    json!({
        "id": format!("chatcmpl-{id}"), "object": "chat.completion", "created": created,
        "model": question.model,
        "choices": [{
            "index": 0, "finish_reason": "stop", "logprobs": null,
            "message": {"role": "assistant", "content": tokens.concat(), "refusal": null},
        }],
        "usage": openai_usage(question, tokens),
    })
}

pub(super) fn chat_stream(
    question: &Question,
    tokens: &[String],
    id: u64,
    created: u64,
) -> Vec<Piece> {
    let chunk = |choices: Value, usage: Value| {
        let mut chunk = json!({
            "id": format!("chatcmpl-{id}"), "object": "chat.completion.chunk", "created": created,
            "model": question.model, "choices": choices,
        });
        if question.include_usage {
            chunk["usage"] = usage;
        }
        format!("data: {chunk}\n\n")
    };
    let delta = |delta: Value, finish: Value| {
        chunk(json!([{"index": 0, "delta": delta, "finish_reason": finish}]), Value::Null)
    };
    let mut pieces = vec![at_once(delta(json!({"role": "assistant", "content": ""}), Value::Null))];
    let deltas = tokens.iter().map(|token| delta(json!({"content": token}), Value::Null));
    pieces.extend(deltas.map(after_a_token));
    pieces.push(at_once(delta(json!({}), json!("stop"))));
    if question.include_usage {
        pieces.push(at_once(chunk(json!([]), openai_usage(question, tokens))));
    }
    pieces.push(at_once("data: [DONE]\n\n".to_owned()));
    pieces
}

fn openai_usage(question: &Question, tokens: &[String]) -> Value {
    let (prompt, completion) = (question.prompt_tokens(), tokens.len());
    json!({
        "prompt_tokens": prompt, "completion_tokens": completion,
        "total_tokens": prompt + completion,
    })
}

pub(super) fn message(question: &Question, tokens: &[String], id: u64) -> Value {
    json!({
        "id": format!("msg_{id}"), "type": "message", "role": "assistant", "model": question.model,
        "content": [{"type": "text", "text": tokens.concat()}],
        "stop_reason": "end_turn", "stop_sequence": null,
        "usage": {"input_tokens": question.prompt_tokens(), "output_tokens": tokens.len()},
    })
}

pub(super) fn message_stream(question: &Question, tokens: &[String], id: u64) -> Vec<Piece> {
    let event = |body: Value| {
        let name = body["type"].as_str().unwrap_or_default().to_owned();
        format!("event: {name}\ndata: {body}\n\n")
    };
    let mut start = message(question, &[], id);
    start["content"] = json!([]);
    start["stop_reason"] = Value::Null;
    let block = json!({"type": "text", "text": ""});
    let mut pieces = vec![
        at_once(event(json!({"type": "message_start", "message": start}))),
        at_once(event(json!({"type": "content_block_start", "index": 0, "content_block": block}))),
    ];
    pieces.extend(tokens.iter().map(|token| {
        let delta = json!({"type": "text_delta", "text": token});
        after_a_token(event(json!({"type": "content_block_delta", "index": 0, "delta": delta})))
    }));
    pieces.push(at_once(event(json!({"type": "content_block_stop", "index": 0}))));
    pieces.push(at_once(event(json!({
        "type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": null},
        "usage": {"output_tokens": tokens.len()},
    }))));
    pieces.push(at_once(event(json!({"type": "message_stop"}))));
    pieces
}

pub(super) fn ollama(question: &Question, tokens: &[String], now: &str) -> Value {
    json!({
        "model": question.model, "created_at": now,
        "message": {"role": "assistant", "content": tokens.concat()},
        "done": true, "done_reason": "stop",
        "prompt_eval_count": question.prompt_tokens(), "eval_count": tokens.len(),
    })
}

pub(super) fn ollama_stream(question: &Question, tokens: &[String], now: &str) -> Vec<Piece> {
    let line = |token: &String| {
        let body = json!({
            "model": question.model, "created_at": now, "done": false,
            "message": {"role": "assistant", "content": token},
        });
        after_a_token(format!("{body}\n"))
    };
    let mut pieces: Vec<Piece> = tokens.iter().map(line).collect();
    let mut last = ollama(question, tokens, now);
    last["message"]["content"] = json!("");
    pieces.push(at_once(format!("{last}\n")));
    pieces
}
