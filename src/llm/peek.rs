//! Looks for the model's name in a body, whatever the body is: JSON or a form, plain or compressed.

use std::io::{self, Write};

use super::coding::{CodingFault, Decoder};
use super::facts::Facts;
use super::json::Scanner;
use super::multipart::Form;
use super::search::{Fault, Found, Gap, Search};

/// What is looked for in a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Goal {
    /// The keys that lead to the name.
    pub keys: &'static [&'static str],
    /// Whether what else it says is of interest, too.
    pub with_facts: bool,
}

/// Looks for a name in a body that comes piece by piece.
#[derive(Debug)]
pub struct Peek {
    body: Body,
    is_form: bool,
}

#[derive(Debug)]
enum Body {
    Plain(Box<dyn Search>),
    Coded(Box<Decoder<Tap>>),
}

/// What reads a body that was decoded, and what was wrong with it.
#[derive(Debug)]
struct Tap {
    reader: Box<dyn Search>,
    fault: Option<Fault>,
}

impl Write for Tap {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.reader.feed(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(fault) => {
                self.fault = Some(fault);
                Err(io::Error::other("it cannot be read"))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why nothing can be found in a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeekFault {
    /// What is wrong in it.
    Body(Fault),
    /// It cannot be decoded.
    Coding(CodingFault),
    /// Its `Content-Encoding` is none that is known.
    UnknownCoding,
}

impl From<Fault> for PeekFault {
    fn from(fault: Fault) -> Self {
        Self::Body(fault)
    }
}

impl Peek {
    /// Looks for the JSON string at the goal's keys; in a form, for the field that the last key names.
    /// `kind` and `coding` are the request's `Content-Type` and `Content-Encoding`; a compressed body
    /// is decoded up to `decoded_bytes_max`.
    ///
    /// # Errors
    /// When type or coding say that there is nothing to find.
    pub fn new(
        goal: Goal,
        kind: &[u8],
        coding: Option<&[u8]>,
        decoded_bytes_max: usize,
    ) -> Result<Self, PeekFault> {
        let Goal { keys, with_facts } = goal;
        let coding = coding.map(<[u8]>::trim_ascii);
        let coding = coding.filter(|coding| !coding.eq_ignore_ascii_case(b"identity"));
        let is_form = is_form(kind);
        let reader: Box<dyn Search> = if is_form {
            Box::new(Form::new(kind, keys.last().copied().unwrap_or_default())?)
        } else {
            Box::new(if with_facts { Scanner::with_facts(keys) } else { Scanner::new(keys) })
        };
        let body = match coding {
            None => Body::Plain(reader),
            Some(coding) => {
                let coding = std::str::from_utf8(coding).unwrap_or_default();
                let tap = Tap { reader, fault: None };
                let decoder = Decoder::new(coding, tap, decoded_bytes_max);
                Body::Coded(Box::new(decoder.ok_or(PeekFault::UnknownCoding)?))
            }
        };
        Ok(Self { body, is_form })
    }

    /// Reads the next piece.
    ///
    /// # Errors
    /// What is wrong with the body so far; there is no way on from there.
    pub fn feed(&mut self, piece: &[u8]) -> Result<(), PeekFault> {
        match &mut self.body {
            Body::Plain(reader) => Ok(reader.feed(piece)?),
            Body::Coded(decoder) => decoder.feed(piece).map_err(|fault| {
                let own = decoder.sink().fault.map(PeekFault::Body);
                own.unwrap_or(PeekFault::Coding(fault))
            }),
        }
    }

    fn reader(&self) -> &dyn Search {
        match &self.body {
            Body::Plain(reader) => reader.as_ref(),
            Body::Coded(decoder) => decoder.sink_ref().reader.as_ref(),
        }
    }

    /// The body ends here.
    ///
    /// # Errors
    /// When it is not complete.
    pub fn finish(&self) -> Result<(), PeekFault> {
        Ok(self.reader().finish()?)
    }

    /// What has been found so far. Its place is one in the decoded body.
    #[must_use]
    pub fn found(&self) -> Option<&Found> {
        self.reader().found()
    }

    /// What else the body says so far, if that was asked for.
    #[must_use]
    pub fn facts(&self) -> Option<&Facts> {
        self.reader().facts()
    }

    /// Where the name could stand that a complete body lacks, in the decoded body.
    #[must_use]
    pub fn gap(&self) -> Option<Gap> {
        self.reader().gap()
    }

    /// Whether all is known that can be: nothing that follows counts.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.reader().is_done()
    }

    /// About how much memory decoding takes.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        match &self.body {
            Body::Plain(_) => 0,
            Body::Coded(decoder) => decoder.held_bytes(),
        }
    }

    /// Whether the body has begun as what it is read as, be it complete or not.
    #[must_use]
    pub fn is_begun(&self) -> bool {
        self.reader().is_begun()
    }

    /// Whether the body is a form.
    #[must_use]
    pub fn is_form(&self) -> bool {
        self.is_form
    }

    /// Whether the body is compressed.
    #[must_use]
    pub fn is_coded(&self) -> bool {
        matches!(self.body, Body::Coded(_))
    }
}

/// Whether a `Content-Type` is that of a form.
#[must_use]
pub fn is_form(kind: &[u8]) -> bool {
    const FORM: &[u8] = b"multipart/form-data";
    let kind = kind.trim_ascii_start();
    kind.len() >= FORM.len() && kind[..FORM.len()].eq_ignore_ascii_case(FORM)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const MODEL: Goal = Goal { keys: &["model"], with_facts: false };
    const BODY: &str = r#"{"messages":[{"content":"0123456789abcdef"}],"model":"m"}"#;

    fn encoded(coding: &str, body: &[u8]) -> Vec<u8> {
        match coding {
            "gzip" => {
                let mut writer = flate2::write::GzEncoder::new(Vec::new(), Default::default());
                writer.write_all(body).unwrap();
                writer.finish().unwrap()
            }
            "deflate" => {
                let mut writer = flate2::write::ZlibEncoder::new(Vec::new(), Default::default());
                writer.write_all(body).unwrap();
                writer.finish().unwrap()
            }
            "br" => {
                let mut out = Vec::new();
                brotli::BrotliCompress(&mut &body[..], &mut out, &Default::default()).unwrap();
                out
            }
            _ => zstd::encode_all(body, 3).unwrap(),
        }
    }

    fn model(coding: &str, body: &[u8], piece: usize) -> Result<Option<String>, PeekFault> {
        let mut peek = Peek::new(MODEL, b"application/json", Some(coding.as_bytes()), 1 << 20)?;
        for piece in body.chunks(piece) {
            peek.feed(piece)?;
        }
        peek.finish()?;
        Ok(peek.found().map(|found| found.text.clone()))
    }

    #[test]
    fn a_compressed_body_is_looked_into() {
        for coding in ["gzip", "deflate", "br", "zstd", "ZSTD"] {
            let body = encoded(&coding.to_lowercase(), BODY.as_bytes());
            for piece in [1, 7, body.len()] {
                assert_eq!(model(coding, &body, piece), Ok(Some("m".into())), "{coding} {piece}");
            }
            let cut = &body[..body.len() / 2];
            assert_eq!(model(coding, cut, 9), Err(PeekFault::Body(Fault::Malformed)), "{coding}");
            let broken = model(coding, BODY.as_bytes(), 9);
            assert_eq!(broken, Err(PeekFault::Coding(CodingFault::Malformed)), "{coding}");
        }
        assert_eq!(model("identity", BODY.as_bytes(), 5), Ok(Some("m".into())));
        for coding in ["compress", "gzip, zstd", "", "\u{7f}"] {
            assert_eq!(model(coding, b"", 1), Err(PeekFault::UnknownCoding), "{coding:?}");
        }
    }

    #[test]
    fn what_is_wrong_in_a_compressed_body_is_told_as_in_a_plain_one() {
        for coding in ["gzip", "deflate", "br", "zstd"] {
            let body = encoded(coding, br#"{"model":"a","model":"b"}"#);
            let fault = model(coding, &body, body.len());
            assert_eq!(fault, Err(PeekFault::Body(Fault::Ambiguous)), "{coding}");
        }
    }

    #[test]
    fn a_window_larger_than_the_format_has_is_refused_with_its_first_byte() {
        // Of 2^30 bytes, in the form that decoders know and RFC 7932 does not.
        assert_eq!(model("br", &[0x11, 0x1e], 1), Err(PeekFault::Coding(CodingFault::Malformed)));
        let mut peek = Peek::new(MODEL, b"", Some(b"br"), 1 << 20).unwrap();
        assert_eq!(peek.feed(&[0x11]), Err(PeekFault::Coding(CodingFault::Malformed)));
        let mut peek = Peek::new(MODEL, b"", Some(b"br"), 1 << 20).unwrap();
        peek.feed(&[0x0f]).unwrap();
        assert!(peek.held_bytes() > 16 << 20, "{}", peek.held_bytes());
    }

    #[test]
    fn what_decodes_to_too_much_is_given_up() {
        let bomb = format!("{{\"a\":\"{}\"}}", "0".repeat(4 << 20));
        for coding in ["gzip", "deflate", "br", "zstd"] {
            let body = encoded(coding, bomb.as_bytes());
            assert!(body.len() < 20_000, "{coding}: {}", body.len());
            let fault = model(coding, &body, body.len());
            assert_eq!(fault, Err(PeekFault::Coding(CodingFault::TooLarge)), "{coding}");
        }
    }
}
