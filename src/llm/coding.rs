//! Bodies that came compressed: looked into, and decoded to be renamed, within bounds.

use std::io::{self, Write};

use flate2::write::{MultiGzDecoder, ZlibDecoder};

/// Largest window of zstd, as a power of two: 8 MiB, which is what RFC 9659 allows on the web.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// What brotli decodes at a time.
const BUFFER_BYTES: usize = 64 * 1024;

/// What a decoder takes besides its window.
const OVERHEAD_BYTES: usize = 256 * 1024;

/// From here on a body is not taken for one that somebody wrote if it decodes to more than
/// [`RATIO_MAX`] times its size. What deflate can do at most is 1,032.
const RATIO_FROM_BYTES: usize = 1024 * 1024;
const RATIO_MAX: usize = 1100;

/// The codings that [`Decoder::new`] knows, for an `Accept-Encoding` header.
pub const CODINGS: &str = "gzip, deflate, br, zstd";

/// Why a body cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodingFault {
    /// It is not in the coding that it says it is in.
    Malformed,
    /// It decodes to more than is allowed.
    TooLarge,
    /// It decodes to very much more than it is.
    TooDense,
}

/// Decodes a whole body, to at most `bytes_max`.
///
/// # Errors
/// What is wrong with the body.
pub fn decode(coding: &[u8], body: &[u8], bytes_max: usize) -> Result<Vec<u8>, CodingFault> {
    let coding = std::str::from_utf8(coding).unwrap_or_default();
    let decoder = Decoder::new(coding, Vec::new(), bytes_max);
    let mut decoder = decoder.ok_or(CodingFault::Malformed)?;
    decoder.feed(body)?;
    decoder.finish()?;
    Ok(std::mem::take(decoder.sink()))
}

/// Decodes a body piece by piece, into a sink that takes what comes out at once: a kilobyte may decode to
/// tens of megabytes.
pub(super) struct Decoder<S: Write> {
    inner: Inner<S>,
    bytes_max: usize,
    fed_bytes: usize,
    /// Of brotli, which takes all of it at once, once known.
    window_bytes: usize,
}

enum Inner<S: Write> {
    Gzip(MultiGzDecoder<Bounded<S>>),
    Deflate(ZlibDecoder<Bounded<S>>),
    Brotli(Box<brotli::DecompressorWriter<Bounded<S>>>),
    Zstd(Box<zstd::stream::write::Decoder<'static, Bounded<S>>>),
}

/// A sink that takes so much.
struct Bounded<S> {
    sink: S,
    taken: usize,
    bytes_max: usize,
    is_full: bool,
}

/// The window of a brotli stream, by its first byte (RFC 7932, section 9.1). None: no such stream begins so, but
/// one that the decoder would take a gigabyte for ("large window").
fn brotli_window(first: u8) -> Option<usize> {
    let bits = match (first & 1, first >> 1 & 7, first >> 4 & 7) {
        (0, _, _) => 16,
        (_, 0, 0) => 17,
        (_, 0, 1) => return None,
        (_, 0, bits) => 8 + usize::from(bits),
        (_, bits, _) => 17 + usize::from(bits),
    };
    Some(1 << bits)
}

impl<S: Write> Write for Bounded<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.bytes_max.saturating_sub(self.taken) {
            self.is_full = true;
            return Err(io::Error::other("decodes to too much"));
        }
        self.taken += bytes.len();
        self.sink.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<S: Write> std::fmt::Debug for Decoder<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Decoder")
    }
}

impl<S: Write> Decoder<S> {
    /// One for a `Content-Encoding`, which decodes to at most `bytes_max`. None: a coding that is not
    /// known, or several of them.
    pub(super) fn new(coding: &str, sink: S, bytes_max: usize) -> Option<Self> {
        let sink = Bounded { sink, taken: 0, bytes_max, is_full: false };
        let inner = match coding.trim().to_ascii_lowercase().as_str() {
            "gzip" | "x-gzip" => Inner::Gzip(MultiGzDecoder::new(sink)),
            "deflate" => Inner::Deflate(ZlibDecoder::new(sink)),
            "br" => Inner::Brotli(Box::new(brotli::DecompressorWriter::new(sink, BUFFER_BYTES))),
            "zstd" => {
                let mut decoder = zstd::stream::write::Decoder::new(sink).ok()?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).ok()?;
                Inner::Zstd(Box::new(decoder))
            }
            _ => return None,
        };
        Some(Self { inner, bytes_max, fed_bytes: 0, window_bytes: 0 })
    }

    /// Decodes a piece.
    ///
    /// # Errors
    /// What is wrong with the body; also when the sink takes no more, which it knows itself.
    pub(super) fn feed(&mut self, piece: &[u8]) -> Result<(), CodingFault> {
        if let (0, Inner::Brotli(_), Some(first)) = (self.fed_bytes, &self.inner, piece.first()) {
            self.window_bytes = brotli_window(*first).ok_or(CodingFault::Malformed)?;
        }
        self.fed_bytes += piece.len();
        let allowed = self.fed_bytes.saturating_mul(RATIO_MAX).max(RATIO_FROM_BYTES);
        let is_dense = allowed < self.bytes_max;
        let bytes_max = allowed.min(self.bytes_max);
        self.bounded().bytes_max = bytes_max;
        let written = match &mut self.inner {
            Inner::Gzip(decoder) => decoder.write_all(piece).and_then(|()| decoder.flush()),
            Inner::Deflate(decoder) => decoder.write_all(piece).and_then(|()| decoder.flush()),
            Inner::Brotli(decoder) => decoder.write_all(piece).and_then(|()| decoder.flush()),
            Inner::Zstd(decoder) => decoder.write_all(piece).and_then(|()| decoder.flush()),
        };
        match written {
            Ok(()) => Ok(()),
            Err(_) if self.bounded().is_full && is_dense => Err(CodingFault::TooDense),
            Err(_) if self.bounded().is_full => Err(CodingFault::TooLarge),
            Err(_) => Err(CodingFault::Malformed),
        }
    }

    /// The body ends here.
    ///
    /// # Errors
    /// When it is not complete, or something follows it.
    fn finish(&mut self) -> Result<(), CodingFault> {
        let finished = match &mut self.inner {
            Inner::Gzip(decoder) => decoder.try_finish(),
            Inner::Deflate(decoder) => decoder.try_finish(),
            Inner::Brotli(decoder) => decoder.close(),
            Inner::Zstd(decoder) => decoder.flush(),
        };
        finished.map_err(|_| CodingFault::Malformed)
    }

    /// About how much memory it takes.
    pub(super) fn held_bytes(&self) -> usize {
        let window = match &self.inner {
            Inner::Gzip(_) | Inner::Deflate(_) => 0,
            Inner::Brotli(_) => self.window_bytes,
            // It takes its window as it fills.
            Inner::Zstd(decoder) => decoder.get_ref().taken.min(1 << ZSTD_WINDOW_LOG_MAX),
        };
        OVERHEAD_BYTES + window
    }

    /// What takes the decoded bytes.
    pub(super) fn sink(&mut self) -> &mut S {
        &mut self.bounded().sink
    }

    /// As [`Decoder::sink`], to look at.
    pub(super) fn sink_ref(&self) -> &S {
        match &self.inner {
            Inner::Gzip(decoder) => &decoder.get_ref().sink,
            Inner::Deflate(decoder) => &decoder.get_ref().sink,
            Inner::Brotli(decoder) => &decoder.get_ref().sink,
            Inner::Zstd(decoder) => &decoder.get_ref().sink,
        }
    }

    fn bounded(&mut self) -> &mut Bounded<S> {
        match &mut self.inner {
            Inner::Gzip(decoder) => decoder.get_mut(),
            Inner::Deflate(decoder) => decoder.get_mut(),
            Inner::Brotli(decoder) => decoder.get_mut(),
            Inner::Zstd(decoder) => decoder.get_mut(),
        }
    }
}
