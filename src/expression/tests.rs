//! What expressions can say, and what they are told when they cannot.

use http::HeaderValue;
use proptest::prelude::*;

use super::*;

fn with_facts<T>(read: impl FnOnce(&Facts<'_>) -> T) -> T {
    let mut headers = http::HeaderMap::new();
    headers.insert("x-team", HeaderValue::from_static("web"));
    headers.insert("x-odd", HeaderValue::from_bytes(b"\xff").unwrap());
    let mut answer = http::HeaderMap::new();
    answer.insert("content-type", HeaderValue::from_static("text/event-stream"));
    let labels = [("tier", "gold"), ("team", "web")].map(|(name, text)| (name.into(), text.into()));
    let request = Request {
        method: "POST",
        path: "/v1/chat/completions",
        host: "llm.example.com",
        body_bytes: Some(2048),
        stream: true,
        address: Some([10, 1, 2, 3].into()),
        key_id: "k-1",
        key_name: "Ada",
        labels: &labels,
        service: "google",
        model: "gemma",
        asked: "gemma-latest",
    };
    let answer = AnswerFacts { backend: "b-1", status: 200, headers: &answer };
    read(&Facts { request: &request, headers: &headers, answer: Some(answer) })
}

fn holds(text: &str) -> bool {
    let expression = Expression::read(text, Moment::Answer, Gives::Condition);
    let expression = expression.unwrap_or_else(|fault| panic!("{text}: {fault:?}"));
    with_facts(|facts| expression.holds(facts).unwrap_or_else(|why| panic!("{text}: {why}")))
}

fn gives(text: &str) -> String {
    let expression = Expression::read(text, Moment::Answer, Gives::Text);
    let expression = expression.unwrap_or_else(|fault| panic!("{text}: {fault:?}"));
    with_facts(|facts| expression.gives(facts).unwrap_or_else(|why| panic!("{text}: {why}")))
}

fn fault(text: &str, moment: Moment, gives: Gives) -> (String, usize) {
    let fault = Expression::read(text, moment, gives).expect_err(text);
    (fault.message, fault.at)
}

#[test]
fn each_variable_has_its_value() {
    let expected = [
        ("request.method", "POST"),
        ("request.path", "/v1/chat/completions"),
        ("request.host", "llm.example.com"),
        ("request.headers[\"x-team\"]", "web"),
        ("string(request.body_bytes)", "2048"),
        ("string(request.stream)", "true"),
        ("client.address", "10.1.2.3"),
        ("key.id", "k-1"),
        ("key.name", "Ada"),
        ("key.labels.tier", "gold"),
        ("service", "google"),
        ("model", "gemma"),
        ("asked", "gemma-latest"),
        ("backend", "b-1"),
        ("string(response.status)", "200"),
        ("response.headers[\"content-type\"]", "text/event-stream"),
    ];
    for (text, value) in expected {
        assert_eq!(gives(text), value, "{text}");
    }
    let readme = include_str!("../../README.md");
    for variable in VARIABLES {
        let row = format!("| `{}` |", variable.name);
        assert!(readme.contains(&row) && readme.contains(variable.meaning), "{}", variable.name);
        let is_tested = expected.iter().any(|(text, _)| text.contains(variable.name));
        assert!(is_tested, "{}", variable.name);
    }
}

#[test]
fn conditions_hold_or_not() {
    for text in [
        "true",
        "request.stream && response.status == 200",
        "request.body_bytes > 1024 * 1 && request.body_bytes % 2 == 0",
        "key.labels[\"tier\"] in [\"gold\", \"silver\"]",
        "\"x-team\" in request.headers && !(\"x-other\" in request.headers)",
        "has(key.labels.tier) && !has(key.labels.nothing)",
        "request.path.startsWith(\"/v1/\") && request.path.endsWith(\"s\")",
        "request.path.contains(\"chat\")",
        "model.matches(\"^gem+a$\") && !asked.matches(\"^gemma$\")",
        "[\"/v1/chat\", \"/v1/x\"].exists(path, request.path.startsWith(path))",
        "[1, 2, 3].all(number, number < 4) && [1, 2].exists_one(n, n == 2)",
        "[1, 2, 3].filter(n, n > 1).map(n, n * 2) == [4, 6]",
        "\"a\" + \"b\" == \"ab\" && \"a\" < \"b\" && \"ÄB\".lowerAscii() == \"Äb\"",
        "size(key.labels) == 2 && size(key.name) == 3 && [1].size() == 1",
        "(request.stream ? 1 : 2) == 1 && -1 < 0",
        "['a'] + [] == ['a']",
    ] {
        assert!(holds(text), "{text}");
    }
    assert!(holds("request.headers[\"X-Team\"] == \"web\""));
    // What is not there, or is no text, is empty.
    for name in ["x-none", "x-odd"] {
        assert!(holds(&format!("request.headers[\"{name}\"] == \"\"")), "{name}");
    }
    assert!(holds("key.labels.nothing != \"internal\""));
}

#[test]
fn what_is_wrong_is_told_with_its_place() {
    for (text, message, at) in [
        ("", "is empty", 0),
        ("request.stream &&", "ends too early", 17),
        ("key.name", "is text, not true or false", 0),
        ("request.body_bytes == \"1\"", "\"==\" cannot take a number and text", 19),
        ("true && key.nmae == \"a\"", "there is no \"key.nmae\", did you mean \"key.name\"?", 8),
        ("nobody == \"\"", "there is no \"nobody\"; there are request.method,", 0),
        ("key.name.lenght() == 1", "there is no function \"lenght\"; there are matches,", 15),
        ("key.name.size() == 1u", "numbers are whole here", 19),
        ("model.matches(\"(\")", "not a regular expression: unclosed group", 14),
        ("model.matches(key.name)", "the pattern of matches() is written as text in quotes", 14),
        ("[1, \"a\"] == []", "a list holds things of one type", 4),
        (
            "[1].exists(x, [2].exists(y, x == y))",
            "a list cannot be gone through within another",
            14,
        ),
        (
            "request.headers == request.headers",
            "\"==\" cannot take texts by name and texts by name",
            16,
        ),
        ("request.headers[1] == \"\"", "headers and labels are taken by their names", 15),
        ("key.name.first == \"\"", "text has no parts", 0),
        ("{\"a\": 1}.size() == 1", "there are no maps here", 0),
        ("\"a\" ? true : false", "what stands before \"?\" is text, not true or false", 4),
        ("key.name.contains(1)", "there is no contains() of text and a number", 17),
        ("key.name == null", "nothing is null here", 12),
    ] {
        let (found, place) = fault(text, Moment::Request, Gives::Condition);
        assert!(found.starts_with(message), "{text}: {found}");
        assert_eq!(place, at, "{text}: {found}");
    }
    let (message, _) = fault("response.status == 200", Moment::Request, Gives::Condition);
    assert_eq!(message, "response.status is not known before the answer has come");
    let (message, _) = fault("size(response.headers) == 1", Moment::End, Gives::Condition);
    assert_eq!(message, "response.headers are not kept until the end");
    let (message, _) = fault("request.body_bytes", Moment::Request, Gives::Text);
    assert_eq!(message, "is a number, not text; write string(...) around it");
}

#[test]
fn what_a_parser_would_take_long_for_is_not_parsed() {
    let deep = format!("{}1{}", "[".repeat(DEPTH_MAX + 1), "]".repeat(DEPTH_MAX + 1));
    for (text, message) in [
        ("!!(!!!!!!(!!!!(((((!!(!!(!!!!((".repeat(5), "has more than 3 signs in a row"),
        (deep, "has brackets more than 12 deep"),
        (format!("\"{}\" == \"\"", "a".repeat(BYTES_MAX)), "has more than 2000 bytes"),
        (vec!["true"; 200].join("||"), "is too long"),
    ] {
        let (found, _) = fault(&text, Moment::Request, Gives::Condition);
        assert_eq!(found, message, "{text}");
    }
    assert!(holds("\"((((((((((((((((((\" != \"!!!!!!\""));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever is taken can be evaluated, but for numbers that do not fit and what is divided by 0.
    #[test]
    fn what_was_checked_does_not_fail(
        parts in prop::collection::vec(
            prop_oneof![
                Just("request.stream"), Just("key.name"), Just("key.labels"), Just("1"), Just("\"a\""),
                Just("["), Just("]"), Just("("), Just(")"), Just("&&"), Just("||"), Just("=="), Just("+"),
                Just("in"), Just("?"), Just(":"), Just("!"), Just(".size()"), Just(".x"), Just(","),
                Just(".exists(v, v == 1)"), Just(".map(v, v)"), Just("[\"x\"]"), Just("has(key.labels.x)"),
                Just(".contains(\"a\")"), Just("string(1)"), Just("<"), Just("true"), Just("[]"),
            ],
            1..8,
        ),
    ) {
        let text = parts.join(" ");
        for gives in [Gives::Condition, Gives::Text] {
            if let Ok(expression) = Expression::read(&text, Moment::Request, gives) {
                let result = with_facts(|facts| match gives {
                    Gives::Condition => expression.holds(facts).map(|_| ()),
                    Gives::Text => expression.gives(facts).map(|_| ()),
                });
                prop_assert!(result.is_ok(), "{text}: {result:?}");
            }
        }
    }
}
