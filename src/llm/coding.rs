//! Bodies that came compressed: looked into within bounds, and never passed on changed.

use std::io::{self, Write};

use flate2::write::{MultiGzDecoder, ZlibDecoder};

/// Largest window of zstd, as a power of two: 8 MiB, which is what RFC 9659 allows on the web.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// What is decoded of a piece before it is handed on.
const BUFFER_BYTES: usize = 64 * 1024;

/// The codings that [`Decoder::new`] knows, for an `Accept-Encoding` header.
pub const CODINGS: &str = "gzip, deflate, br, zstd";

/// Why a body cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodingFault {
    /// It is not in the coding that it says it is in.
    Malformed,
    /// It decodes to more than is allowed.
    TooLarge,
}

/// Decodes a whole body, to at most `bytes_max`.
///
/// # Errors
/// What is wrong with the body.
pub fn decode(coding: &[u8], body: &[u8], bytes_max: usize) -> Result<Vec<u8>, CodingFault> {
    let coding = std::str::from_utf8(coding).unwrap_or_default();
    let mut decoder = Decoder::new(coding, bytes_max).ok_or(CodingFault::Malformed)?;
    let mut decoded = Vec::new();
    decoder.feed(body, |piece| {
        decoded.extend_from_slice(piece);
        Ok::<_, CodingFault>(())
    })?;
    Ok(decoded)
}

/// Decodes a body piece by piece.
pub(super) struct Decoder {
    inner: Inner,
}

enum Inner {
    Gzip(MultiGzDecoder<Sink>),
    Deflate(ZlibDecoder<Sink>),
    Brotli(Box<brotli::DecompressorWriter<Sink>>),
    Zstd(Box<zstd::stream::write::Decoder<'static, Sink>>),
}

/// Where decoded bytes go until they are taken.
struct Sink {
    bytes: Vec<u8>,
    /// Bytes that may still come.
    left: usize,
    is_full: bool,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.left {
            self.is_full = true;
            return Err(io::Error::other("decodes to too much"));
        }
        self.left -= bytes.len();
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Decoder")
    }
}

impl Decoder {
    /// One for a `Content-Encoding`, which decodes to at most `bytes_max`. None: a coding that is not
    /// known, or several of them.
    #[must_use]
    pub(super) fn new(coding: &str, bytes_max: usize) -> Option<Self> {
        let sink = Sink { bytes: Vec::new(), left: bytes_max, is_full: false };
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
        Some(Self { inner })
    }

    /// Decodes a piece. What came out is handed to `take` in parts.
    ///
    /// # Errors
    /// What is wrong with the body, or the error of `take`.
    pub(super) fn feed<E: From<CodingFault>>(
        &mut self,
        piece: &[u8],
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        // In small steps: what a kilobyte decodes to is a megabyte at most.
        for step in piece.chunks(1024) {
            let written = match &mut self.inner {
                Inner::Gzip(decoder) => decoder.write_all(step).and_then(|()| decoder.flush()),
                Inner::Deflate(decoder) => decoder.write_all(step).and_then(|()| decoder.flush()),
                Inner::Brotli(decoder) => decoder.write_all(step).and_then(|()| decoder.flush()),
                Inner::Zstd(decoder) => decoder.write_all(step).and_then(|()| decoder.flush()),
            };
            let sink = self.sink();
            if written.is_err() {
                let is_full = sink.is_full;
                let fault = if is_full { CodingFault::TooLarge } else { CodingFault::Malformed };
                return Err(fault.into());
            }
            take(&sink.bytes)?;
            sink.bytes.clear();
        }
        Ok(())
    }

    fn sink(&mut self) -> &mut Sink {
        match &mut self.inner {
            Inner::Gzip(decoder) => decoder.get_mut(),
            Inner::Deflate(decoder) => decoder.get_mut(),
            Inner::Brotli(decoder) => decoder.get_mut(),
            Inner::Zstd(decoder) => decoder.get_mut(),
        }
    }
}
