//! A row of the ledger: one exchange that a backend was asked for.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::digits;

/// One exchange. Names are as in the table `api_usage`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Row {
    /// A UUID of version 7 (RFC 9562): no other row has it, and later ones are greater.
    pub id: String,
    /// When it ended, in milliseconds since 1970.
    pub timestamp: i64,
    /// The `X-Request-ID`.
    pub request_id: String,
    /// Who has the key.
    pub user_id: Arc<str>,
    /// Which key; empty: none was needed.
    pub key_id: Arc<str>,
    /// The service.
    pub service: String,
    /// The model.
    pub model: String,
    /// The last backend that was asked.
    pub backend: String,
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
    /// None: no price is known.
    pub cost: Option<Decimal>,
    /// What the cost is in.
    pub currency: Arc<str>,
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

impl Row {
    /// An id for a row of this time.
    #[must_use]
    pub fn new_id(timestamp: i64) -> String {
        let time = timestamp.cast_unsigned() & 0xffff_ffff_ffff;
        let (a, b) = (fastrand::u16(..) & 0x0fff, fastrand::u64(..) & 0x3fff_ffff_ffff_ffff);
        let b = b | 0x8000_0000_0000_0000;
        let mut id = String::with_capacity(36);
        digits::push_hex::<8>(&mut id, (time >> 16).into());
        id.push('-');
        digits::push_hex::<4>(&mut id, time.into());
        id.push_str("-7");
        digits::push_hex::<3>(&mut id, a.into());
        id.push('-');
        digits::push_hex::<4>(&mut id, (b >> 48).into());
        id.push('-');
        digits::push_hex::<12>(&mut id, b.into());
        id
    }

    /// A text from outside, as a row may hold it: without control characters, which databases refuse or terminals obey,
    /// and of bounded length.
    #[must_use]
    pub fn text(text: &str) -> String {
        let fits = |(at, letter): &(usize, char)| at + letter.len_utf8() <= TEXT_BYTES_MAX;
        let letters = text.char_indices().take_while(fits).map(|(_, letter)| letter);
        letters
            .map(|letter| if letter.is_control() { char::REPLACEMENT_CHARACTER } else { letter })
            .collect()
    }

    /// Now, in milliseconds since 1970.
    #[must_use]
    pub fn now() -> i64 {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX)
    }

    /// As a line of the spool: a checksum and JSON.
    pub(super) fn write_line(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[b' '; CHECKSUM_BYTES + 1]);
        serde_json::to_writer(&mut *out, self).expect("a row is made of texts and numbers");
        let checksum = xxh3_64(&out[start + CHECKSUM_BYTES + 1..]);
        out[start..start + CHECKSUM_BYTES]
            .copy_from_slice(&digits::hex::<CHECKSUM_BYTES>(checksum.into()));
        out.push(b'\n');
    }

    /// From a line of the spool; none where it is not whole.
    pub(super) fn read_line(line: &[u8]) -> Option<Self> {
        let (checksum, json) = line.split_at_checked(CHECKSUM_BYTES)?;
        let json = json.strip_prefix(b" ")?;
        let is_whole = digits::hex::<CHECKSUM_BYTES>(xxh3_64(json).into()) == *checksum;
        serde_json::from_slice(json).ok().filter(|_| is_whole)
    }
}

const CHECKSUM_BYTES: usize = 16;

/// The longest text of a row.
const TEXT_BYTES_MAX: usize = 512;

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn row(request_id: &str) -> Row {
        let timestamp = Row::now();
        Row {
            id: Row::new_id(timestamp),
            timestamp,
            request_id: request_id.to_owned(),
            user_id: "team".into(),
            key_id: "key-1".into(),
            service: "svc".to_owned(),
            model: "mdl".to_owned(),
            backend: "a".to_owned(),
            tokens_input: 10,
            tokens_output: 5,
            tokens_cached: 2,
            tokens_reasoning: 1,
            tokens_reserved: 0,
            cost: Some("0.000000125".parse().unwrap()),
            currency: "USD".into(),
            status: 200,
            aborted: false,
            estimated: false,
            latency_ms: 12,
            ttft_ms: Some(3),
        }
    }

    #[test]
    fn ids_are_uuids_in_the_order_of_time() {
        let ids: Vec<String> = (0..100).map(|time| Row::new_id(1_700_000_000_000 + time)).collect();
        assert!(ids.is_sorted());
        for id in ids {
            assert_eq!((id.len(), &id[14..15]), (36, "7"), "{id}");
            assert!("89ab".contains(&id[19..20]) && id.starts_with("018bcfe5-68"), "{id}");
        }
    }

    #[test]
    fn texts_from_outside_are_cleaned() {
        assert_eq!(Row::text("gpt-\0x\u{1b}[2J\u{85}é"), "gpt-\u{fffd}x\u{fffd}[2J\u{fffd}é");
        assert_eq!(Row::text(&"é".repeat(600)).len(), 512);
        assert_eq!(Row::text(&format!("x{}", "é".repeat(600))).len(), 511);
    }

    #[test]
    fn a_line_is_read_as_it_was_written_or_not_at_all() {
        let row = row("r \"\n\u{1f600}");
        let mut line = Vec::new();
        row.write_line(&mut line);
        assert_eq!(line.pop(), Some(b'\n'));
        assert!(!line.contains(&b'\n'));
        assert_eq!(Row::read_line(&line), Some(row));
        for cut in 0..line.len() {
            assert_eq!(Row::read_line(&line[..cut]), None, "{cut}");
            let mut wrong = line.clone();
            wrong[cut] ^= 1;
            assert_eq!(Row::read_line(&wrong), None, "{cut}");
        }
    }
}
