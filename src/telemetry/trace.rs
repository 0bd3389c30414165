//! Which trace an exchange belongs to (W3C Trace Context, level 1).

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::writing;

/// The header that carries it, in both directions.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// What systems that traces pass through say of their own; it belongs to a traceparent.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Bit of the flags: somebody keeps the trace.
const SAMPLED: u8 = 1;

/// The trace of one exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Its id: never 0.
    pub id: u128,
    /// The span that asked, where a client sent one.
    pub parent: Option<u64>,
    /// The span of the exchange itself.
    pub span: u64,
    /// Whether somebody keeps it.
    pub is_sampled: bool,
}

impl Trace {
    /// Of what has not come yet.
    pub const NONE: Self = Self { id: 0, parent: None, span: 0, is_sampled: false };

    /// The client's, where it sends one that is whole, else a new one, of which `sample` are kept (0 to 1).
    #[must_use]
    pub fn of(headers: &HeaderMap, sample: f64) -> Self {
        let mut values = headers.get_all(TRACEPARENT).iter();
        let sent = values.next().filter(|_| values.next().is_none());
        let span = fastrand::u64(1..);
        if let Some((id, parent, flags)) = sent.and_then(|sent| read(sent.as_bytes())) {
            return Self { id, parent: Some(parent), span, is_sampled: flags & SAMPLED != 0 };
        }
        let is_sampled = sample > 0.0 && fastrand::f64() < sample;
        Self { id: fastrand::u128(1..), parent: None, span, is_sampled }
    }

    /// As a header that names `span` as who asks.
    #[must_use]
    pub fn header(&self, span: u64) -> HeaderValue {
        let mut header = *b"00-................................-................-00";
        header[3..35].copy_from_slice(&writing::hex::<32>(self.id));
        header[36..52].copy_from_slice(&writing::hex::<16>(span.into()));
        header[54] += u8::from(self.is_sampled);
        HeaderValue::from_bytes(&header).expect("hexadecimal digits can stand in a header")
    }
}

/// Trace, span and flags of a header. Versions after this one begin in the same way.
fn read(header: &[u8]) -> Option<(u128, u64, u8)> {
    const LENGTH: usize = 55;
    let is_hex = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    let (head, rest) = header.split_at_checked(LENGTH)?;
    let parts: Vec<&[u8]> = head.split(|byte| *byte == b'-').collect();
    let [version, id, span, flags] = parts[..] else { return None };
    let is_this = version == b"00";
    let is_later = version != b"ff" && (rest.is_empty() || rest[0] == b'-');
    if [version.len(), id.len(), span.len(), flags.len()] != [2, 32, 16, 2]
        || !parts.iter().all(|part| part.iter().all(is_hex))
        || is_this && !rest.is_empty()
        || !is_later
    {
        return None;
    }
    let text = |part| std::str::from_utf8(part).ok();
    let id = u128::from_str_radix(text(id)?, 16).ok().filter(|id| *id != 0)?;
    let span = u64::from_str_radix(text(span)?, 16).ok().filter(|span| *span != 0)?;
    Some((id, span, u8::from_str_radix(text(flags)?, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn of(values: &[&'static str]) -> Trace {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(TRACEPARENT, HeaderValue::from_static(value));
        }
        Trace::of(&headers, 0.0)
    }

    #[test]
    fn a_clients_trace_goes_on() {
        let trace = of(&[SENT]);
        assert_eq!(trace.id, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!((trace.parent, trace.is_sampled), (Some(0x00f0_67aa_0ba9_02b7), true));
        let own = trace.header(0xabc);
        assert_eq!(own, "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000abc-01");
        // Of a later version only the beginning is known.
        let later = of(&["cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-what-else"]);
        assert_eq!((later.id, later.is_sampled), (trace.id, false));
    }

    #[test]
    fn one_that_is_not_whole_is_begun_anew() {
        for wrong in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            let trace = of(&[wrong]);
            assert_eq!(trace.parent, None, "{wrong}");
            assert!(trace.id != 0 && trace.span != 0);
        }
        assert_eq!(of(&[SENT, SENT]).parent, None);
    }

    #[test]
    fn of_new_ones_as_many_are_kept_as_configured() {
        let kept =
            |sample| (0..1000).filter(|_| Trace::of(&HeaderMap::new(), sample).is_sampled).count();
        assert_eq!((kept(0.0), kept(1.0)), (0, 1000));
        assert!((100..300).contains(&kept(0.2)));
    }
}
