//! Finds one field of a multipart form (RFC 7578) in the bytes of a body, piece by piece as they
//! come. Files, which may stand before it, are passed over and not kept.

use memchr::memmem;

use super::search::{Fault, Found, Gap, Search};

/// Longest boundary (RFC 2046, section 5.1.1).
const BOUNDARY_BYTES_MAX: usize = 70;

/// Longest head of a part. Those of clients have a hundred bytes.
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// Most parts: OpenAI takes 16 images, Go's own parser 1,000 parts.
const PARTS_MAX: usize = 1000;

/// Longest value that is taken.
const VALUE_BYTES_MAX: usize = 1024;

/// Looks for a field.
#[derive(Debug)]
pub struct Form {
    name: &'static str,
    /// `\r\n--` and the boundary.
    delimiter: Vec<u8>,
    state: State,
    /// What came before and is not decided upon yet: less than a delimiter, or a part's head.
    pending: Vec<u8>,
    /// How much of that holds no end of a head.
    searched: usize,
    /// Where in the body `pending` begins.
    offset: usize,
    /// Where its first delimiter stands.
    start: Option<usize>,
    parts: usize,
    is_seen: bool,
    found: Option<Found>,
}

#[derive(Debug)]
enum State {
    /// At the first byte: a delimiter, also without its line break. Servers disagree about what may stand before it,
    /// and nobody sends anything.
    Start,
    /// Behind a delimiter: a line break or the `--` of the end.
    Delimiter,
    Head,
    /// At the first byte of a part.
    First(Option<(Vec<u8>, usize)>),
    /// In a part; of the field that is looked for, the value so far and where it begins.
    Body(Option<(Vec<u8>, usize)>),
    /// Behind the last delimiter: a line break or nothing.
    End,
    Done,
}

impl Search for Form {
    fn feed(&mut self, piece: &[u8]) -> Result<(), Fault> {
        if self.pending.is_empty() {
            let at = self.steps(piece)?;
            self.pending.extend_from_slice(&piece[at..]);
        } else {
            let mut bytes = std::mem::take(&mut self.pending);
            bytes.extend_from_slice(piece);
            let at = self.steps(&bytes)?;
            bytes.drain(..at);
            self.pending = bytes;
        }
        Ok(())
    }

    fn found(&self) -> Option<&Found> {
        self.found.as_ref()
    }

    fn gap(&self) -> Option<Gap> {
        let start = self.start.filter(|_| !self.is_seen && self.parts > 0)?;
        let name = self.name;
        let head = format!("\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n");
        let before = [&self.delimiter[2..], head.as_bytes()].concat();
        Some(Gap { at: start..start, before, after: b"\r\n" })
    }

    /// Its type says so.
    fn is_begun(&self) -> bool {
        true
    }

    /// What follows means nothing.
    fn is_done(&self) -> bool {
        matches!(self.state, State::End | State::Done)
    }
}

impl Form {
    /// One that looks for the field `name`, by the request's `Content-Type`.
    ///
    /// # Errors
    /// When the type has no boundary that can be one.
    pub fn new(content_type: &[u8], name: &'static str) -> Result<Self, Fault> {
        let text = std::str::from_utf8(content_type).map_err(|_| Fault::Malformed)?;
        let mut boundaries = parameters(text).filter(|(key, _)| key == "boundary");
        // In RFC 2231's form some parsers take it for another one.
        if parameters(text).any(|(key, _)| key.starts_with("boundary*")) {
            return Err(Fault::Malformed);
        }
        let (Some((_, boundary)), None) = (boundaries.next(), boundaries.next()) else {
            return Err(Fault::Malformed);
        };
        // What a backslash in it stands for, parsers disagree about.
        let is_odd = text.contains('\\');
        if is_odd || boundary.is_empty() || boundary.len() > BOUNDARY_BYTES_MAX {
            return Err(Fault::Malformed);
        }
        Ok(Self {
            name,
            delimiter: [b"\r\n--", boundary.as_bytes()].concat(),
            state: State::Start,
            pending: Vec::new(),
            searched: 0,
            offset: 0,
            start: None,
            parts: 0,
            is_seen: false,
            found: None,
        })
    }

    /// Reads as far as is decided; where it has come to.
    fn steps(&mut self, bytes: &[u8]) -> Result<usize, Fault> {
        let mut at = 0;
        while let Some(next) = self.step(bytes, at)? {
            at = next;
            self.searched = 0;
        }
        self.offset += at;
        Ok(at)
    }

    /// Reads on from `at`; where it has come to, or none when it takes more bytes.
    fn step(&mut self, bytes: &[u8], at: usize) -> Result<Option<usize>, Fault> {
        let rest = &bytes[at..];
        match &mut self.state {
            State::End => {
                let Some(two) = rest.get(..2) else { return Ok(None) };
                if two != b"\r\n" {
                    return Err(Fault::Malformed);
                }
                self.state = State::Done;
                Ok(Some(at + 2))
            }
            State::Done => Ok((!rest.is_empty()).then_some(bytes.len())),
            State::Start => {
                let line_break = if rest.starts_with(b"\r") { 0 } else { 2 };
                let first = &self.delimiter[line_break..];
                if rest.len() < first.len() {
                    return Ok(None);
                }
                if !rest.starts_with(first) {
                    return Err(Fault::Malformed);
                }
                self.start = Some(self.offset + at + 2 - line_break);
                self.state = State::Delimiter;
                Ok(Some(at + first.len()))
            }
            State::Delimiter => {
                // Transport padding (RFC 2046) is sent by nobody, and parsers disagree about it.
                let Some(two) = rest.get(..2) else { return Ok(None) };
                self.state = match two {
                    b"\r\n" => State::Head,
                    b"--" => State::End,
                    _ => return Err(Fault::Malformed),
                };
                Ok(Some(at + 2))
            }
            State::Head => {
                let Some(end) = head_end(rest, self.searched) else {
                    self.searched = rest.len();
                    let is_too_long = rest.len() > HEAD_BYTES_MAX;
                    return if is_too_long { Err(Fault::Malformed) } else { Ok(None) };
                };
                self.head(&rest[..end], at + end)?;
                Ok(Some(at + end))
            }
            State::First(value) => {
                let first = &self.delimiter[2..];
                if rest.starts_with(first) {
                    // To some it ends a part without content, to others it is content.
                    return Err(Fault::Malformed);
                }
                if first.starts_with(rest) {
                    return Ok(None);
                }
                self.state = State::Body(value.take());
                Ok(Some(at))
            }
            State::Body(_) => self.content(bytes, at),
        }
    }

    /// Reads on in a part, up to its delimiter or as far as none can begin.
    fn content(&mut self, bytes: &[u8], at: usize) -> Result<Option<usize>, Fault> {
        let rest = &bytes[at..];
        let delimiter = memmem::find(rest, &self.delimiter);
        let decided = delimiter.unwrap_or(rest.len().saturating_sub(self.delimiter.len() - 1));
        if let State::Body(Some((value, _))) = &mut self.state {
            value.extend_from_slice(&rest[..decided.min(VALUE_BYTES_MAX + 1)]);
            if value.len() > VALUE_BYTES_MAX {
                return Err(Fault::TooLong);
            }
        }
        if delimiter.is_none() {
            return Ok((decided > 0).then_some(at + decided));
        }
        if let State::Body(Some((value, start))) = &mut self.state {
            let text = String::from_utf8(std::mem::take(value)).map_err(|_| Fault::Malformed)?;
            let end = *start + text.len();
            self.found = Some(Found { text, at: *start..end });
        }
        self.state = State::Delimiter;
        Ok(Some(at + decided + self.delimiter.len()))
    }

    /// A part's head; its content begins at `start` of what is read now.
    fn head(&mut self, head: &[u8], start: usize) -> Result<(), Fault> {
        self.parts += 1;
        if self.parts > PARTS_MAX {
            return Err(Fault::Malformed);
        }
        let head = String::from_utf8_lossy(head);
        // A line that is folded, or ends otherwise, is another header to some parsers.
        let is_odd = |line: &str| line.starts_with([' ', '\t']) || line.contains(['\r', '\n']);
        if head.split("\r\n").any(is_odd) {
            return Err(Fault::Malformed);
        }
        let mut dispositions = head.split("\r\n").filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.trim().eq_ignore_ascii_case("content-disposition").then_some(value)
        });
        let disposition = dispositions.next().unwrap_or_default();
        if dispositions.next().is_some() {
            return Err(Fault::Malformed);
        }
        if parameters(disposition).any(|(key, _)| key.starts_with("name*")) {
            return Err(Fault::Ambiguous);
        }
        let mut names = parameters(disposition).filter(|(key, _)| key == "name");
        let name = names.next();
        if names.next().is_some() {
            return Err(Fault::Ambiguous);
        }
        if !is_plain(disposition) {
            return Err(Fault::Ambiguous);
        }
        let is_file = parameters(disposition).any(|(key, _)| key.starts_with("filename"));
        let is_it = name.is_some_and(|(_, name)| name.eq_ignore_ascii_case(self.name));
        if is_it && (self.is_seen || is_file) {
            return Err(Fault::Ambiguous);
        }
        self.is_seen |= is_it;
        self.state = State::First(is_it.then(|| (Vec::new(), self.offset + start)));
        Ok(())
    }
}

/// Where a part's content begins: behind the empty line, which stands at once where there is no head. There is
/// none in the first `searched` bytes.
fn head_end(bytes: &[u8], searched: usize) -> Option<usize> {
    if bytes.starts_with(b"\r\n") {
        return Some(2);
    }
    let from = searched.saturating_sub(3);
    memmem::find(&bytes[from..], b"\r\n\r\n").map(|end| from + end + 4)
}

/// Whether all read the name alike: what a backslash stands for, parsers disagree about. In the name of a file, which
/// comes last, it does no harm.
fn is_plain(disposition: &str) -> bool {
    let Some((before, after)) = disposition.split_once('\\') else { return true };
    let has = |text: &str, part| text.to_ascii_lowercase().contains(part);
    has(before, "filename") && !has(after, "name=") && !has(after, "name*=")
}

/// The parameters behind the first semicolon: names in lower case, values without quotes.
fn parameters(text: &str) -> impl Iterator<Item = (String, String)> + '_ {
    let mut rest = text.split_once(';').map_or("", |(_, rest)| rest);
    std::iter::from_fn(move || {
        rest = rest.trim_start_matches([' ', '\t', ';', '\r', '\n']);
        if rest.is_empty() {
            return None;
        }
        let end = rest.find(['=', ';']).unwrap_or(rest.len());
        let name = rest[..end].trim().to_ascii_lowercase();
        let Some(after) = rest[end..].strip_prefix('=') else {
            rest = &rest[end..];
            return Some((name, String::new()));
        };
        let (value, after) = match after.trim_start().strip_prefix('"') {
            Some(quoted) => unquoted(quoted),
            None => {
                let end = after.find(';').unwrap_or(after.len());
                (after[..end].trim().to_owned(), &after[end..])
            }
        };
        rest = after;
        Some((name, value))
    })
}

/// A quoted string without its first quote, and what follows it.
fn unquoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return (value, &text[at + 1..]),
            '\\' => value.extend(letters.next().map(|(_, letter)| letter)),
            _ => value.push(letter),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TYPE: &[u8] = b"multipart/form-data; boundary=XyZ";

    fn found<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Option<Found>, Fault> {
        let mut form = Form::new(TYPE, "model")?;
        for piece in pieces {
            form.feed(piece)?;
        }
        form.finish()?;
        Ok(form.found().cloned())
    }

    fn part(disposition: &str, content: &str) -> String {
        format!("--XyZ\r\nContent-Disposition: form-data; {disposition}\r\n\r\n{content}\r\n")
    }

    #[test]
    fn the_field_is_found_before_and_behind_a_file() {
        let file = part("name=\"file\"; filename=\"a.wav\"", "RIFF\r\n--Xy\r\n\r\nmodel=x");
        let model = part("name=\"model\"", "whisper-1");
        for body in [
            format!("{file}{model}--XyZ--\r\n"),
            format!("{model}{file}--XyZ--"),
            format!("\r\n{file}{model}--XyZ--\r\nan epilogue"),
            format!("{}{model}--XyZ--", part("name=\"a\"", "")),
            format!("{}{model}--XyZ--", part("name=\"f\"; filename=\"C:\\a.wav\"", "--XyY")),
            format!("{file}{}--XyZ--\r\n", part("NAME=model", "whisper-1")),
        ] {
            let found = found([body.as_bytes()]).unwrap().unwrap();
            assert_eq!(found.text, "whisper-1", "{body}");
            assert_eq!(&body[found.at], "whisper-1");
        }
        let none = format!("{file}{}--XyZ--\r\n", part("name=\"mode\"", "m"));
        assert_eq!(found([none.as_bytes()]), Ok(None));
    }

    #[test]
    fn what_parsers_disagree_about_is_refused() {
        let model = part("name=\"model\"", "a");
        let end = "--XyZ--\r\n";
        for (body, fault) in [
            (format!("{model}{model}{end}"), Fault::Ambiguous),
            (format!("{}{end}", part("name=\"x\"; name=\"model\"", "a")), Fault::Ambiguous),
            (format!("{}{end}", part("name=\"model\"; filename=\"x\"", "a")), Fault::Ambiguous),
            (format!("{model}{}{end}", part("name=\"Model\"", "b")), Fault::Ambiguous),
            (format!("{}{end}", part("name=\"model\"", &"x".repeat(2000))), Fault::TooLong),
            (model.clone(), Fault::Malformed),
            (format!("{}{end}", model.replace("\r\n", "\n")), Fault::Malformed),
            ("--XyZx\r\n".to_owned(), Fault::Malformed),
            (String::new(), Fault::Malformed),
            (format!("{}{end}", part("name*=utf-8''model", "b")), Fault::Ambiguous),
            (format!("{}{end}", part("name*0=\"mo\"; name*1=\"del\"", "b")), Fault::Ambiguous),
            (format!("{}{end}", part("x=y;\r\n name=\"model\"", "b")), Fault::Malformed),
            (format!("{}{end}", part("x=y\nA: b", "b")), Fault::Malformed),
            (format!("{model}--XyZ--x\r\n"), Fault::Malformed),
            (format!("a preamble\r\n{model}{end}"), Fault::Malformed),
            (format!("pre\n{}\r\n{model}{end}", model.replace("\r\n", "\n")), Fault::Malformed),
            (format!("{}{end}", part("name=\"x\"", &format!("{model}--XyZ"))), Fault::Malformed),
            (format!("{}{end}", part("name=\"mo\\del\"", "b")), Fault::Ambiguous),
            (
                format!("{}{end}", part("filename=\"a\\\"; name=\"model\"; x=\"", "b")),
                Fault::Ambiguous,
            ),
        ] {
            assert_eq!(found([body.as_bytes()]), Err(fault), "{body}");
        }
        for kind in [
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "m; boundary=a; boundary=b",
            "m; boundary=a; boundary*=utf-8''b",
            "m; boundary=\"a\\b\"",
        ] {
            assert_eq!(Form::new(kind.as_bytes(), "model").err(), Some(Fault::Malformed), "{kind}");
        }
    }

    #[test]
    fn parameters_are_read_with_and_without_quotes() {
        let read = |text: &'static str| parameters(text).collect::<Vec<_>>();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            read("form-data; name=\"a\\\"b;c\" ; X=y"),
            [pair("name", "a\"b;c"), pair("x", "y")]
        );
        assert_eq!(read("form-data"), []);
        assert_eq!(read("x; flag; a=\"b"), [pair("flag", ""), pair("a", "b")]);
    }

    proptest! {
        #[test]
        fn a_form_is_read_the_same_wherever_it_is_cut_in_pieces(
            file in "(\r\n|-|X|--XyZ|\r|[a-z]){0,40}",
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let body = format!(
                "{}{}--XyZ--\r\n",
                part("name=\"file\"; filename=\"f\"", &file),
                part("name=\"model\"", "m-1"),
            );
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(body.len() + 1)).collect();
            cuts.extend([0, body.len()]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|pair| &body.as_bytes()[pair[0]..pair[1]]);
            prop_assert_eq!(found(pieces), found([body.as_bytes()]));
            if !file.contains("\r\n--XyZ") && !file.starts_with("--XyZ") {
                prop_assert_eq!(found([body.as_bytes()]).unwrap().unwrap().text, "m-1");
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, kind: Vec<u8>) {
            let _ = found([&bytes[..]]);
            let _ = Form::new(&kind, "model");
        }
    }
}
