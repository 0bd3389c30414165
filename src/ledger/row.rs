//! A row of the ledger: one exchange that a backend was asked for.

use std::borrow::Cow;
use std::time::{SystemTime, UNIX_EPOCH};

use memchr::memchr;
use xxhash_rust::xxh3::xxh3_64;

use crate::writing::{self, Object};

/// One exchange. Names are as in the table `api_usage`.
#[derive(Clone, Debug, PartialEq)]
pub struct Row<'r> {
    /// A UUID of version 7 (RFC 9562): no other row has it, and later ones are greater.
    pub id: &'r str,
    /// When it ended, in milliseconds since 1970.
    pub timestamp: u64,
    /// The `X-Request-ID`.
    pub request_id: &'r str,
    /// Who has the key.
    pub user_id: &'r str,
    /// Which key; empty: none was needed.
    pub key_id: &'r str,
    /// The service.
    pub service: &'r str,
    /// The model.
    pub model: &'r str,
    /// The last backend that was asked.
    pub backend: &'r str,
    /// Tokens of the prompt, cached ones included.
    pub tokens_input: u64,
    /// Tokens of the answer, thought ones included.
    pub tokens_output: u64,
    /// Of those of the prompt, read from a cache.
    pub tokens_cached: u64,
    /// Of those of the answer, thought and not said.
    pub tokens_reasoning: u64,
    /// Tokens that were paid for before.
    pub tokens_reserved: u64,
    /// A decimal number; none: no price is known.
    pub cost: Option<&'r str>,
    /// What the cost is in.
    pub currency: &'r str,
    /// The status that the client was sent; 0: none.
    pub status: u16,
    /// Whether the answer did not come to its end.
    pub aborted: bool,
    /// Whether the tokens were counted here, because the backend did not tell.
    pub estimated: bool,
    /// From the request's head to the exchange's end, in milliseconds.
    pub latency_ms: u64,
    /// From the request's head to the first piece of the answer, in milliseconds.
    pub ttft_ms: Option<u64>,
}

/// An id for a row of this time, in milliseconds since 1970.
#[must_use]
pub fn new_id(timestamp: u64) -> String {
    let time = timestamp & 0xffff_ffff_ffff;
    let (a, b) = (fastrand::u16(..) & 0x0fff, fastrand::u64(..) & 0x3fff_ffff_ffff_ffff);
    let b = b | 0x8000_0000_0000_0000;
    let mut id = String::with_capacity(36);
    writing::push_hex::<8>(&mut id, (time >> 16).into());
    id.push('-');
    writing::push_hex::<4>(&mut id, time.into());
    id.push_str("-7");
    writing::push_hex::<3>(&mut id, a.into());
    id.push('-');
    writing::push_hex::<4>(&mut id, (b >> 48).into());
    id.push('-');
    writing::push_hex::<12>(&mut id, b.into());
    id
}

/// Now, in milliseconds since 1970.
#[must_use]
pub fn now() -> i64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX)
}

/// A text as a row has it: without control characters, which databases refuse or terminals obey, and of bounded length.
fn clean(text: &str) -> Cow<'_, str> {
    // Without a way out, so that many bytes are looked at together.
    let is_plain = text.bytes().fold(true, |all, byte| all & matches!(byte, b' '..=b'~'));
    if text.len() <= TEXT_BYTES_MAX && (is_plain || !text.chars().any(char::is_control)) {
        return Cow::Borrowed(text);
    }
    let fits = |(at, letter): &(usize, char)| at + letter.len_utf8() <= TEXT_BYTES_MAX;
    let letters = text.char_indices().take_while(fits).map(|(_, letter)| letter);
    letters
        .map(|letter| if letter.is_control() { char::REPLACEMENT_CHARACTER } else { letter })
        .collect()
}

impl<'r> Row<'r> {
    /// As a line of the spool: a checksum and all fields, with tabs between them. Texts are cleaned.
    pub fn write_line(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[b' '; CHECKSUM_BYTES]);
        let texts = [
            self.id,
            self.request_id,
            self.user_id,
            self.key_id,
            self.service,
            self.model,
            self.backend,
            self.currency,
            self.cost.unwrap_or_default(),
        ];
        for text in texts {
            out.push(b'\t');
            out.extend_from_slice(clean(text).as_bytes());
        }
        let numbers = [
            self.timestamp,
            self.tokens_input,
            self.tokens_output,
            self.tokens_cached,
            self.tokens_reasoning,
            self.tokens_reserved,
            self.status.into(),
            self.aborted.into(),
            self.estimated.into(),
            self.latency_ms,
        ];
        for number in numbers {
            out.push(b'\t');
            writing::push_decimal(out, number, 1);
        }
        out.push(b'\t');
        if let Some(time) = self.ttft_ms {
            writing::push_decimal(out, time, 1);
        }
        let checksum = xxh3_64(&out[start + CHECKSUM_BYTES..]);
        out[start..start + CHECKSUM_BYTES]
            .copy_from_slice(&writing::hex::<CHECKSUM_BYTES>(checksum.into()));
        out.push(b'\n');
    }

    /// From a line of the spool; none where it is not whole.
    pub(super) fn read_line(line: &'r [u8]) -> Option<Self> {
        let (checksum, fields) = line.split_at_checked(CHECKSUM_BYTES)?;
        if writing::hex::<CHECKSUM_BYTES>(xxh3_64(fields).into()) != *checksum {
            return None;
        }
        let mut rest = std::str::from_utf8(fields).ok()?;
        let mut field = || {
            rest = rest.strip_prefix('\t')?;
            let (field, behind) =
                rest.split_at(memchr(b'\t', rest.as_bytes()).unwrap_or(rest.len()));
            rest = behind;
            Some(field)
        };
        let mut texts = [""; 9];
        for text in &mut texts {
            *text = field()?;
        }
        let mut numbers = [0; 10];
        for number in &mut numbers {
            *number = field()?.parse().ok()?;
        }
        let [id, request_id, user_id, key_id, service, model, backend, currency, cost] = texts;
        let ttft = field()?;
        Some(Self {
            id,
            timestamp: numbers[0],
            request_id,
            user_id,
            key_id,
            service,
            model,
            backend,
            tokens_input: numbers[1],
            tokens_output: numbers[2],
            tokens_cached: numbers[3],
            tokens_reasoning: numbers[4],
            tokens_reserved: numbers[5],
            cost: Some(cost).filter(|cost| !cost.is_empty()),
            currency,
            status: numbers[6].try_into().ok()?,
            aborted: numbers[7] == 1,
            estimated: numbers[8] == 1,
            latency_ms: numbers[9],
            ttft_ms: if ttft.is_empty() { None } else { Some(ttft.parse().ok()?) },
        })
    }

    /// As JSON, for people.
    pub(super) fn write_json(&self, out: &mut Vec<u8>) {
        let mut row = Object::begin(out);
        row.text("id", self.id).number("timestamp", self.timestamp);
        row.text("request_id", self.request_id);
        row.text("user_id", self.user_id).text("key_id", self.key_id);
        row.text("service", self.service).text("model", self.model).text("backend", self.backend);
        row.number("tokens_input", self.tokens_input).number("tokens_output", self.tokens_output);
        row.number("tokens_cached", self.tokens_cached);
        row.number("tokens_reasoning", self.tokens_reasoning);
        row.number("tokens_reserved", self.tokens_reserved);
        match self.cost {
            Some(cost) => row.text("cost", cost),
            None => row.null("cost"),
        };
        row.text("currency", self.currency).number("status", self.status.into());
        row.truth("aborted", self.aborted).truth("estimated", self.estimated);
        row.number("latency_ms", self.latency_ms);
        match self.ttft_ms {
            Some(time) => row.number("ttft_ms", time),
            None => row.null("ttft_ms"),
        };
        row.end();
    }
}

const CHECKSUM_BYTES: usize = 16;

/// The longest text of a row.
const TEXT_BYTES_MAX: usize = 512;

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn row<'r>(id: &'r str, request_id: &'r str) -> Row<'r> {
        Row {
            id,
            timestamp: 1_800_000_000_000,
            request_id,
            user_id: "team",
            key_id: "key-1",
            service: "svc",
            model: "mdl",
            backend: "a",
            tokens_input: 10,
            tokens_output: 5,
            tokens_cached: 2,
            tokens_reasoning: 1,
            tokens_reserved: 0,
            cost: Some("0.000000125"),
            currency: "USD",
            status: 200,
            aborted: false,
            estimated: true,
            latency_ms: 12,
            ttft_ms: Some(3),
        }
    }

    #[test]
    fn ids_are_uuids_in_the_order_of_time() {
        let ids: Vec<String> = (0..100).map(|time| new_id(1_700_000_000_000 + time)).collect();
        assert!(ids.is_sorted());
        for id in ids {
            assert_eq!((id.len(), &id[14..15]), (36, "7"), "{id}");
            assert!("89ab".contains(&id[19..20]) && id.starts_with("018bcfe5-68"), "{id}");
        }
    }

    #[test]
    fn texts_from_outside_are_cleaned() {
        assert_eq!(clean("gpt-\0x\u{1b}[2J\u{85}\té"), "gpt-\u{fffd}x\u{fffd}[2J\u{fffd}\u{fffd}é");
        assert_eq!(clean(&"é".repeat(600)).len(), 512);
        assert_eq!(clean(&format!("x{}", "é".repeat(600))).len(), 511);
        assert!(matches!(clean("é \" x"), Cow::Borrowed("é \" x")));
    }

    #[test]
    fn a_line_is_read_as_it_was_written_or_not_at_all() {
        let full = row("id", "r \"\\\u{1f600}");
        let bare = Row { cost: None, ttft_ms: None, aborted: true, key_id: "", ..full.clone() };
        for row in [bare, full] {
            let mut line = Vec::new();
            row.write_line(&mut line);
            assert_eq!(line.pop(), Some(b'\n'));
            assert!(!line.contains(&b'\n'));
            assert_eq!(Row::read_line(&line).as_ref(), Some(&row));
            for cut in 0..line.len() {
                assert_eq!(Row::read_line(&line[..cut]), None, "{cut}");
                let mut wrong = line.clone();
                wrong[cut] ^= 1;
                assert_eq!(Row::read_line(&wrong), None, "{cut}");
            }
            let mut json = Vec::new();
            row.write_json(&mut json);
            let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
            assert_eq!(json["request_id"], row.request_id);
            assert_eq!(json["cost"].as_str(), row.cost);
        }
    }
}
