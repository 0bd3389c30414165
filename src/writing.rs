//! Numbers, times and JSON for what every exchange writes: `format!` and serde take several times as long.

use std::fmt::Display;
use std::io::Write;
use std::net::IpAddr;

use jiff::Timestamp;

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// The last `N` hexadecimal digits of a number.
#[must_use]
pub fn hex<const N: usize>(number: u128) -> [u8; N] {
    let mut text = [0; N];
    let mut rest = number;
    for digit in text.iter_mut().rev() {
        *digit = DIGITS[(rest & 0xf) as usize];
        rest >>= 4;
    }
    text
}

/// The same behind a text.
pub fn push_hex<const N: usize>(text: &mut String, number: u128) {
    text.extend(hex::<N>(number).map(char::from));
}

/// A number in decimal digits, at least `least` of them, behind a text.
pub fn push_decimal(text: &mut impl Extend<u8>, number: u64, least: usize) {
    // 2^64 has twenty.
    let mut digits = [b'0'; 20];
    let (mut rest, mut begin) = (number, digits.len());
    while rest > 0 {
        begin -= 1;
        digits[begin] = DIGITS[(rest % 10) as usize];
        rest /= 10;
    }
    text.extend(digits[begin.min(digits.len() - least)..].iter().copied());
}

/// An address behind a text.
pub fn push_address(text: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(address) => {
            for (at, octet) in address.octets().into_iter().enumerate() {
                if at > 0 {
                    text.push(b'.');
                }
                push_decimal(text, octet.into(), 1);
            }
        }
        IpAddr::V6(address) => write!(text, "{address}").expect("memory takes it"),
    }
}

/// Times in UTC as RFC 3339 has them. Most are of the same second as the one before.
#[derive(Debug, Default)]
pub struct Times {
    second: Option<i64>,
    /// Up to the second.
    text: String,
}

impl Times {
    /// A time in microseconds since 1970, to the microsecond, behind a text.
    pub fn push_micros(&mut self, text: &mut impl Extend<u8>, micros: i64) {
        self.push_second(text, micros.div_euclid(1_000_000));
        push_decimal(text, micros.rem_euclid(1_000_000).cast_unsigned(), 6);
        text.extend([b'Z']);
    }

    /// A time in milliseconds since 1970, to the millisecond, behind a text.
    pub fn push_millis(&mut self, text: &mut impl Extend<u8>, millis: i64) {
        self.push_second(text, millis.div_euclid(1000));
        push_decimal(text, millis.rem_euclid(1000).cast_unsigned(), 3);
        text.extend([b'Z']);
    }

    /// With the point of its fraction.
    fn push_second(&mut self, text: &mut impl Extend<u8>, second: i64) {
        if self.second != Some(second) {
            self.second = Some(second);
            let time = Timestamp::from_second(second).unwrap_or_default();
            self.text = time.strftime("%Y-%m-%dT%H:%M:%S.").to_string();
        }
        text.extend(self.text.bytes());
    }
}

/// A JSON object that is written field by field, behind a text.
pub struct Object<'t> {
    text: &'t mut Vec<u8>,
}

impl<'t> Object<'t> {
    /// One without fields so far. It needs its [`end`](Self::end).
    pub fn begin(text: &'t mut Vec<u8>) -> Self {
        text.push(b'{');
        Self { text }
    }

    /// A text of any kind.
    pub fn text(&mut self, name: &str, value: &str) -> &mut Self {
        self.name(name);
        let is_plain = |byte: u8| byte >= b' ' && byte != b'"' && byte != b'\\';
        // Without a way out, so that many bytes are looked at together.
        if value.bytes().fold(true, |all, byte| all & is_plain(byte)) {
            self.text.push(b'"');
            self.text.extend_from_slice(value.as_bytes());
            self.text.push(b'"');
        } else {
            serde_json::to_writer(&mut *self.text, value).expect("a text can be written");
        }
        self
    }

    /// A text without quotes and backslashes.
    pub fn shown(&mut self, name: &str, value: impl Display) -> &mut Self {
        self.name(name);
        write!(self.text, "\"{value}\"").expect("memory takes it");
        self
    }

    /// An address.
    pub fn address(&mut self, name: &str, value: IpAddr) -> &mut Self {
        self.name(name);
        self.text.push(b'"');
        push_address(self.text, value);
        self.text.push(b'"');
        self
    }

    /// A time in microseconds since 1970.
    pub fn time(&mut self, name: &str, micros: i64, times: &mut Times) -> &mut Self {
        self.name(name);
        self.text.push(b'"');
        times.push_micros(self.text, micros);
        self.text.push(b'"');
        self
    }

    /// A number.
    pub fn number(&mut self, name: &str, value: u64) -> &mut Self {
        self.name(name);
        push_decimal(self.text, value, 1);
        self
    }

    /// A number that may have a fraction, in thousandths. It has one always: programs that guess types by the first
    /// number they see would cut off those of others.
    pub fn thousandths(&mut self, name: &str, value: u64) -> &mut Self {
        self.number(name, value / 1000);
        self.text.push(b'.');
        push_decimal(self.text, value % 1000, 3);
        let zeros = self.text.iter().rev().take(2).take_while(|digit| **digit == b'0').count();
        self.text.truncate(self.text.len() - zeros);
        self
    }

    /// True or false.
    pub fn truth(&mut self, name: &str, value: bool) -> &mut Self {
        self.name(name);
        self.text.extend_from_slice(if value { b"true" } else { b"false" });
        self
    }

    /// Nothing.
    pub fn null(&mut self, name: &str) -> &mut Self {
        self.name(name);
        self.text.extend_from_slice(b"null");
        self
    }

    /// An object, which needs its end.
    pub fn object(&mut self, name: &str) -> Object<'_> {
        self.name(name);
        Object::begin(self.text)
    }

    /// There are no more fields.
    pub fn end(self) {
        self.text.push(b'}');
    }

    fn name(&mut self, name: &str) {
        if self.text.last() != Some(&b'{') {
            self.text.push(b',');
        }
        self.text.push(b'"');
        self.text.extend_from_slice(name.as_bytes());
        self.text.extend_from_slice(b"\":");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_those_of_the_standard_library() {
        for number in [0, 1, 0xa, 0x10, 0xdead_beef, u128::MAX, 0x1234_5678_9abc_def0 << 60] {
            assert_eq!(hex::<32>(number), format!("{number:032x}").as_bytes());
            let mut text = "x".to_owned();
            push_hex::<32>(&mut text, number);
            assert_eq!(text, format!("x{number:032x}"));
        }
        assert_eq!(hex::<4>(0xa_bcde), *b"bcde");
        for number in [0, 1, 9, 10, 100, 999, 1000, u64::MAX] {
            let mut text = b"x".to_vec();
            push_decimal(&mut text, number, 1);
            push_decimal(&mut text, number, 3);
            assert_eq!(text, format!("x{number}{number:03}").as_bytes());
        }
    }

    #[test]
    fn addresses_are_those_of_the_standard_library() {
        for address in
            ["0.0.0.0", "127.0.0.1", "255.10.100.9", "::1", "2001:db8::a:1", "::ffff:1.2.3.4"]
        {
            let mut text = Vec::new();
            push_address(&mut text, address.parse().unwrap());
            assert_eq!(text, address.as_bytes());
        }
    }

    #[test]
    fn times_are_written_like_any_other_program_writes_them() {
        let mut times = Times::default();
        for millis in [0, 7, 999, 1_700_000_000_000, 1_700_000_000_042, 1_699_999_999_999, -1] {
            let time = Timestamp::from_millisecond(millis).unwrap();
            let mut text = Vec::new();
            times.push_millis(&mut text, millis);
            assert_eq!(text, format!("{time:.3}").as_bytes());
            text.clear();
            times.push_micros(&mut text, millis * 1000 + 5);
            let time = Timestamp::from_microsecond(millis * 1000 + 5).unwrap();
            assert_eq!(text, format!("{time:.6}").as_bytes());
        }
    }

    #[test]
    fn an_object_reads_as_what_was_written() {
        let hard = "plain é \u{1f600} \u{7f} \"quoted\" \\ \n \u{1}";
        let mut text = b"x".to_vec();
        let mut object = Object::begin(&mut text);
        object.text("plain", "a b").text("", hard).number("n", u64::MAX).null("none");
        object
            .truth("yes", true)
            .truth("no", false)
            .shown("shown", 0.5)
            .address("address", [10, 0, 0, 1].into());
        for (name, value) in [("a", 0), ("b", 7), ("c", 120), ("d", 1000), ("e", 12_345)] {
            object.thousandths(name, value);
        }
        object.object("empty").end();
        let mut inner = object.object("inner");
        inner.time("at", 1_700_000_000_000_001, &mut Times::default()).number("n", 1);
        inner.end();
        object.end();
        let read: serde_json::Value = serde_json::from_slice(&text[1..]).unwrap();
        let expected = serde_json::json!({
            "plain": "a b", "": hard, "n": u64::MAX, "none": null, "yes": true, "no": false, "shown": "0.5", "address": "10.0.0.1",
            "a": 0.0, "b": 0.007, "c": 0.12, "d": 1.0, "e": 12.345, "empty": {},
            "inner": {"at": "2023-11-14T22:13:20.000001Z", "n": 1},
        });
        assert_eq!(read, expected);
    }
}
