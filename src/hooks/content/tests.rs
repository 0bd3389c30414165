//! What a guard lets pass, however it comes.

use http::HeaderMap;
use proptest::prelude::*;
use serde_json::json;

use super::super::super::Notes;
use super::*;
use crate::expression::Request;

const REPLACEMENT: &str = "[-]";

fn guard(words: &[&str], patterns: &[&str], action: Action) -> Guard {
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    let spec = GuardSpec {
        words: owned(words),
        patterns: owned(patterns),
        requests: true,
        answers: true,
        action,
        replacement: REPLACEMENT.to_owned(),
        hold_back: 12,
        answer_bytes_max: 1024 * 1024,
    };
    Guard::new(spec).ok().unwrap()
}

fn begin(guard: &Guard, kind: &'static str) -> Box<dyn AnswerBody> {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, http::HeaderValue::from_static(kind));
    let none = HeaderMap::new();
    let head = AnswerHead {
        request: &Request::default(),
        request_headers: &none,
        backend: "",
        status: 200,
        headers: &mut headers,
    };
    guard.begin(&head).unwrap()
}

/// What passes of a stream that comes in these pieces, and whether it was cut.
fn passed(guard: &Guard, kind: &'static str, pieces: &[&[u8]]) -> (String, bool) {
    let mut body = begin(guard, kind);
    let mut all = Vec::new();
    for (at, piece) in pieces.iter().enumerate() {
        let mut piece = Some(Bytes::copy_from_slice(piece));
        if body.pass(&mut piece, at + 1 == pieces.len()).is_err() {
            assert!(body.found().something);
            return (String::from_utf8(all).unwrap(), true);
        }
        all.extend(piece.unwrap_or_default());
    }
    (String::from_utf8(all).unwrap(), false)
}

const EVENTS: &str = "text/event-stream; charset=utf-8";

fn delta(text: &str, index: usize) -> String {
    let event = json!({"id": "x", "choices": [{"index": index, "delta": {"content": text}}]});
    format!("data: {event}\n\n")
}

/// The text of a stream's deltas.
fn said(stream: &str, index: u64) -> String {
    let events = stream.split("\n\n").filter_map(|event| event.strip_prefix("data: {"));
    let events = events.map(|rest| serde_json::from_str::<Value>(&format!("{{{rest}")).unwrap());
    let choices = events.map(|event| event["choices"][0].clone());
    let own = choices.filter(|choice| choice["index"] == index);
    own.map(|choice| choice["delta"]["content"].as_str().unwrap_or_default().to_owned()).collect()
}

#[test]
fn a_word_is_found_wherever_events_and_bytes_are_cut() {
    for (words, text, before, after) in [
        (["secret"], "the SeCrEt is out", "the ", " is out"),
        (["密码"], "我的密码是一", "我的", "是一"),
        (["pass word"], "a ＰＡＳＳ　ＷＯＲＤ b", "a ", " b"),
    ] {
        let letters: Vec<char> = text.chars().collect();
        for at in 0..letters.len() {
            let (one, two) = letters.split_at(at);
            let [one, two] = [one, two].map(|part| part.iter().collect::<String>());
            let stream = format!("{}{}data: [DONE]\n\n", delta(&one, 0), delta(&two, 0));
            // As `\u....`, too.
            for stream in [stream.clone(), escaped(&stream)] {
                for cut in [0, 1, 7, stream.len() / 2, stream.len() - 3] {
                    let pieces = [&stream.as_bytes()[..cut], &stream.as_bytes()[cut..]];
                    let redacts = guard(&words, &[], Action::Redact);
                    let (stream, is_cut) = passed(&redacts, EVENTS, &pieces);
                    assert!(!is_cut && stream.ends_with("data: [DONE]\n\n"), "{stream}");
                    assert_eq!(said(&stream, 0), format!("{before}{REPLACEMENT}{after}"));
                    let refuses = guard(&words, &[], Action::Refuse);
                    let (stream, is_cut) = passed(&refuses, EVENTS, &pieces);
                    assert!(is_cut && before.starts_with(&said(&stream, 0)), "{stream}");
                }
            }
        }
        // Every byte by itself.
        let stream: String = letters.iter().map(|letter| delta(&letter.to_string(), 0)).collect();
        let bytes: Vec<&[u8]> = stream.as_bytes().chunks(1).collect();
        let (stream, _) = passed(&guard(&words, &[], Action::Redact), EVENTS, &bytes);
        assert_eq!(said(&stream, 0), format!("{before}{REPLACEMENT}{after}"));
        let counts = guard(&words, &[], Action::Count);
        let mut body = begin(&counts, EVENTS);
        let mut piece = Some(Bytes::from(delta(text, 0)));
        body.pass(&mut piece, false).unwrap();
        assert_eq!(piece.unwrap(), delta(text, 0), "what is counted does not wait");
        assert_eq!(body.found(), Found { something: true, is_refused: false });
    }
}

/// With escapes for all letters that are not ASCII.
fn escaped(text: &str) -> String {
    let escape = |letter: char| match letter {
        letter if letter.is_ascii() => letter.to_string(),
        letter => {
            let units = letter.encode_utf16(&mut [0; 2]).to_vec();
            units.iter().map(|unit| format!("\\u{unit:04x}")).collect()
        }
    };
    text.chars().map(escape).collect()
}

#[test]
fn what_nothing_can_begin_in_passes_at_once_byte_for_byte() {
    let redacts = guard(&["secret"], &[], Action::Redact);
    let mut body = begin(&redacts, EVENTS);
    let mut pass = |text: &str| {
        let mut piece = Some(Bytes::from(text.to_owned()));
        body.pass(&mut piece, false).unwrap();
        String::from_utf8(piece.unwrap_or_default().to_vec()).unwrap()
    };
    let odd = "event: x\r\nid: 7\r\ndata: { \"a\" :1.50,\"t\": \"fine\"}\r\n\r\n";
    for event in [odd, ": a comment\n\n", &delta("hello", 0), "data: [DONE]\n\n"] {
        assert_eq!(pass(event), event);
    }
    // A word may have begun: that waits, and what comes behind it.
    assert_eq!(pass(&delta("a se", 0)), "");
    assert_eq!(pass(&delta("other", 1)), "");
    let all = pass(&delta("lf", 0));
    assert_eq!(all, [delta("a se", 0), delta("other", 1), delta("lf", 0)].concat());
}

#[test]
fn texts_beside_each_other_are_told_apart() {
    let redacts = guard(&["secret"], &[], Action::Redact);
    let stream =
        [delta("sec", 0), delta("nothing ret", 1), delta("ret", 0), delta(" sec", 1)].concat();
    let (stream, _) = passed(&redacts, EVENTS, &[stream.as_bytes()]);
    assert_eq!((said(&stream, 0), said(&stream, 1)), ("[-]".into(), "nothing ret sec".into()));
    // Anthropic's and Ollama's forms.
    let part = |text| json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}});
    let stream = format!(
        "event: content_block_delta\ndata: {}\n\nevent: content_block_delta\ndata: {}\n\n",
        part("a sec"),
        part("ret!")
    );
    let expected = format!(
        "event: content_block_delta\ndata: {}\n\nevent: content_block_delta\ndata: {}\n\n",
        part("a [-]"),
        part("!")
    );
    assert_eq!(passed(&redacts, EVENTS, &[stream.as_bytes()]).0, expected);
    let lines =
        "{\"message\":{\"content\":\"sec\"}}\n{\"message\":{\"content\":\"ret\"},\"done\":true}\n";
    let expected =
        "{\"message\":{\"content\":\"[-]\"}}\n{\"message\":{\"content\":\"\"},\"done\":true}\n";
    assert_eq!(passed(&redacts, "application/x-ndjson", &[lines.as_bytes()]).0, expected);
}

#[test]
fn a_document_is_held_and_changed_as_a_whole() {
    let document = json!({
        "id": "secret", "model": "secret", "n": 1.5,
        "choices": [{"index": 0, "finish_reason": "stop",
            "logprobs": {"content": [{"token": "secret"}]},
            "message": {"role": "assistant", "content": "a secret"}}],
    });
    let text = document.to_string();
    let pieces: Vec<&[u8]> = text.as_bytes().chunks(10).collect();
    let answer = |action| -> Value {
        let (answer, is_cut) =
            passed(&guard(&["secret"], &[], action), "application/json", &pieces);
        assert!(!is_cut);
        serde_json::from_str(&answer).unwrap()
    };
    let mut expected = document.clone();
    assert_eq!(answer(Action::Count), expected);
    expected["choices"][0]["message"]["content"] = "a [-]".into();
    expected["choices"][0].as_object_mut().unwrap().remove("logprobs");
    assert_eq!(answer(Action::Redact), expected);
    expected["choices"][0]["message"]["content"] = "".into();
    expected["choices"][0]["finish_reason"] = "content_filter".into();
    assert_eq!(answer(Action::Refuse), expected);
}

fn asked(guard: &Guard, body: &str) -> (Result<(), Stop>, String, bool) {
    let mut bytes = Bytes::from(body.to_owned());
    let mut found = false;
    let mut body = RequestBody {
        request: &Request::default(),
        headers: &HeaderMap::new(),
        bytes: &mut bytes,
        found: &mut found,
        notes: &mut Notes::new(),
    };
    let done = guard.request_body(&mut body);
    (done, String::from_utf8(bytes.to_vec()).unwrap(), found)
}

#[test]
fn a_request_is_refused_redacted_or_counted() {
    let body = r#"{"model":"m","messages":[{"role":"user","content":"my \u5bc6码"}]}"#;
    let (done, _, found) = asked(&guard(&["密码"], &[], Action::Refuse), body);
    let Err(Stop::Refuse { status, code, .. }) = done else { panic!("it passes") };
    assert_eq!((status.as_u16(), code, found), (400, "content_filter", true));
    let (done, next, _) = asked(&guard(&["密码"], &[], Action::Redact), body);
    assert_eq!(next, r#"{"model":"m","messages":[{"role":"user","content":"my [-]"}]}"#);
    assert!(done.is_ok());
    let (done, next, found) = asked(&guard(&["密码"], &[], Action::Count), body);
    assert!(done.is_ok() && found && next == body);
    // Of tools, models see the names, too; those cannot be redacted.
    let tools = json!({"tools": [{"type": "function", "function": {"name": "f",
        "parameters": {"type": "object", "properties": {"my_密码": {"type": "string"}}}}}]});
    for action in [Action::Refuse, Action::Redact] {
        assert!(asked(&guard(&["密码"], &[], action), &tools.to_string()).0.is_err());
    }
    let kind = tools.to_string().replace("my_密码", "x").replace("\"string\"", "\"密码\"");
    assert!(asked(&guard(&["密码"], &[], Action::Refuse), &kind).0.is_err());
    // Pictures are not looked at, and what is not JSON does not pass unseen.
    let picture = json!({"messages": [{"content": [{"type": "image_url", "image_url":
        {"url": "https://example.com/a.png"}}]}]});
    let refuses = guard(&["c2vj"], &[], Action::Refuse);
    assert!(asked(&refuses, &picture.to_string()).0.is_ok());
    assert!(asked(&refuses, "{\"a\":").0.is_err());
    for hidden in [
        json!({"messages": [{"content": format!("{} c2vj", "x".repeat(3000))}]}),
        json!({"messages": [{"content": "data:;base64,c2vj"}]}),
        json!({"messages": [{"role": "user\nc2vj", "content": ""}]}),
        json!({"messages": [{"content": [{"source": {"type": "text", "data": "a c2vj"}}]}]}),
        json!({"messages": [{"content": [{"type": "tool_use", "input": {"id": "c2vj"}}]}]}),
        json!({"a": {"$serde_json::private::RawValue": "1"}}),
    ] {
        assert!(asked(&refuses, &hidden.to_string()).0.is_err(), "{hidden}");
    }
    let image = format!("data:image/png;base64,{}c2vj", "A".repeat(300));
    let picture_of_size = json!({"content": [{"image_url": {"url": image}}]});
    assert!(asked(&refuses, &picture_of_size.to_string()).0.is_ok());
    assert!(asked(&refuses, "").0.is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// However a text is cut into events, and those into pieces, what passes is what passes of the text as a whole.
    #[test]
    fn a_stream_is_redacted_as_its_text_is(
        words in prop::collection::vec("[abｃ密ß]{1,5}", 1..5),
        with_pattern: bool,
        text in "[abcABCｃＣ密ßẞ ]{0,40}",
        events in prop::collection::vec(0_usize..40, 0..12),
        bytes in prop::collection::vec(0_usize..2000, 0..12),
    ) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let patterns: &[&str] = if with_pattern { &["b c|aa?b", r"\bab\b", r"c\B"] } else { &[] };
        let redacts = guard(&words, patterns, Action::Redact);
        let letters: Vec<char> = text.chars().collect();
        let mut cuts: Vec<usize> = events.iter().map(|at| at % (letters.len() + 1)).collect();
        cuts.extend([0, letters.len()]);
        cuts.sort_unstable();
        let stream: String = cuts
            .windows(2)
            .map(|pair| delta(&letters[pair[0]..pair[1]].iter().collect::<String>(), 0))
            .collect();
        let mut cuts: Vec<usize> = bytes.iter().map(|at| at % (stream.len() + 1)).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> =
            cuts.windows(2).map(|pair| &stream.as_bytes()[pair[0]..pair[1]]).collect();
        let (next, is_cut) = passed(&redacts, EVENTS, &pieces);
        prop_assert!(!is_cut);
        prop_assert_eq!(said(&next, 0), redacts.0.redacted(&text));
        let refuses = guard(&words, patterns, Action::Refuse);
        let (next, is_cut) = passed(&refuses, EVENTS, &pieces);
        let first = redacts.0.matcher.find(&text).first().map(|range| range.start);
        prop_assert_eq!(is_cut, first.is_some());
        prop_assert!(text[..first.unwrap_or(text.len())].starts_with(&said(&next, 0)));
    }
}
