//! The file of the request log: appended to, put aside when it is large or old, and opened again when somebody else
//! has put it aside.

use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::io::{Error, ErrorKind, Result, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Its owner writes, its group may read: lines name clients.
const MODE: u32 = 0o640;

/// A log file.
pub(super) struct LogFile {
    path: PathBuf,
    rotate_bytes: u64,
    rotate_after: Duration,
    keep: u32,
    open: Option<Open>,
    /// When it could not be put aside.
    failed_at: Option<Instant>,
}

/// How soon it is tried again to put it aside.
const ROTATE_AGAIN: Duration = Duration::from_secs(60);

struct Open {
    file: File,
    /// Which file it is on its disk.
    id: (u64, u64),
    /// Since when it is written to, as far as is known.
    began: SystemTime,
    lines: Lines,
}

/// Whole lines, one after the other, also where some were written by half.
#[derive(Clone, Copy, Default)]
pub(super) struct Lines {
    /// Whether half a line is at the end.
    is_broken: bool,
}

impl Lines {
    /// To standard output.
    pub(super) fn write(&mut self, lines: &[u8]) -> (usize, Option<Error>) {
        let mut out = std::io::stdout().lock();
        let written = self.append(&mut out, lines);
        // What cannot be written out is told with the next line.
        let _ = out.flush();
        written
    }

    /// How many of the bytes are written, and why not all.
    fn append(&mut self, out: &mut impl Write, lines: &[u8]) -> (usize, Option<Error>) {
        if self.is_broken
            && let Err(error) = out.write_all(b"\n")
        {
            return (0, Some(error));
        }
        self.is_broken = false;
        let mut bytes = 0;
        let failure = loop {
            match out.write(&lines[bytes..]) {
                _ if bytes == lines.len() => break None,
                Ok(0) => break Some(Error::from(ErrorKind::WriteZero)),
                Ok(written) => bytes += written,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break Some(error),
            }
        };
        self.is_broken = !matches!(lines[..bytes].last(), None | Some(b'\n'));
        (bytes, failure)
    }
}

impl LogFile {
    pub(super) fn new(path: PathBuf, rotate_bytes: u64, rotate_after: Duration, keep: u32) -> Self {
        Self { path, rotate_bytes, rotate_after, keep, open: None, failed_at: None }
    }

    /// Opens it, also where it is open.
    pub(super) fn reopen(&mut self) -> Result<()> {
        let before = self.open.take();
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let file = self.open_or_create()?;
        let known = file.metadata()?;
        let id = (known.dev(), known.ino());
        let began = known.created().or_else(|_| known.modified()).unwrap_or(SystemTime::now());
        let began = if known.len() == 0 { SystemTime::now() } else { began };
        let lines = before.filter(|before| before.id == id).map(|before| before.lines);
        self.open = Some(Open { id, file, began, lines: lines.unwrap_or_default() });
        Ok(())
    }

    fn open_or_create(&self) -> Result<File> {
        let mut append = OpenOptions::new();
        append.append(true);
        match append.open(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            opened => return opened,
        }
        match append.create_new(true).mode(MODE).open(&self.path) {
            // The unit's mask keeps the group out, which here may read.
            Ok(file) => file.set_permissions(Permissions::from_mode(MODE)).map(|()| file),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                // Somebody else was faster, or it is a link to what is not there yet.
                OpenOptions::new().append(true).create(true).mode(MODE).open(&self.path)
            }
            Err(error) => Err(error),
        }
    }

    /// Appends whole lines to the file that is at the path now: how many bytes, and why not all.
    pub(super) fn write(&mut self, lines: &[u8]) -> (usize, Option<Error>) {
        let is_there = self.open.as_ref().is_some_and(|open| id_at(&self.path) == Some(open.id));
        if !is_there && let Err(error) = self.reopen() {
            return (0, Some(error));
        }
        match &mut self.open {
            Some(open) => open.lines.append(&mut open.file, lines),
            None => (0, Some(Error::from(ErrorKind::NotFound))),
        }
    }

    /// Puts it aside if its time has come.
    pub(super) fn rotate(&mut self) {
        let Some(open) = &self.open else { return };
        // A pipe or a device is neither large nor old.
        let Ok(known) = open.file.metadata() else { return };
        let is_large = self.rotate_bytes > 0 && known.len() >= self.rotate_bytes;
        let is_old = !self.rotate_after.is_zero()
            && open.began.elapsed().is_ok_and(|age| age >= self.rotate_after);
        // Nor is a link ours to put aside: it may be the machine's own.
        let is_plain = std::fs::symlink_metadata(&self.path).is_ok_and(|it| it.is_file());
        let is_due = self.failed_at.is_none_or(|at| at.elapsed() >= ROTATE_AGAIN);
        if !known.is_file() || known.len() == 0 || !is_large && !is_old || !is_plain || !is_due {
            return;
        }
        // Another process, which takes over or hands over, may do so now, or have done so.
        if matches!(open.file.try_lock(), Err(TryLockError::WouldBlock)) {
            self.failed_at = Some(Instant::now());
            return;
        }
        let is_ours = id_at(&self.path) == Some(open.id);
        let put_aside = if is_ours { self.put_aside() } else { Ok(()) };
        if let Err(error) = &put_aside {
            log::error!(
                "the request log {} cannot be put aside, and grows: {error}",
                self.path.display()
            );
        }
        self.failed_at = put_aside.is_err().then(Instant::now);
        if let Err(error) = self.reopen() {
            log::error!("the request log {} cannot be opened: {error}", self.path.display());
        }
    }

    /// `log` becomes `log.1`, `log.1` becomes `log.2`, and the last one goes.
    fn put_aside(&self) -> Result<()> {
        let aside = |number: u32| {
            let mut name = self.path.clone().into_os_string();
            name.push(format!(".{number}"));
            PathBuf::from(name)
        };
        if self.keep == 0 {
            return std::fs::remove_file(&self.path);
        }
        for number in (1..self.keep).rev() {
            match std::fs::rename(aside(number), aside(number + 1)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        std::fs::rename(&self.path, aside(1))
    }
}

/// Which file is at a path.
fn id_at(path: &Path) -> Option<(u64, u64)> {
    let known = std::fs::metadata(path).ok()?;
    Some((known.dev(), known.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(folder: &Path, rotate_bytes: u64, keep: u32) -> LogFile {
        let mut file = LogFile::new(folder.join("deep/log"), rotate_bytes, Duration::ZERO, keep);
        file.reopen().unwrap();
        file
    }

    fn write(file: &mut LogFile, lines: &str) {
        let (bytes, failure) = file.write(lines.as_bytes());
        assert!(failure.is_none() && bytes == lines.len(), "{failure:?}");
    }

    /// Takes so many bytes and no more.
    struct Full(Vec<u8>, usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> Result<usize> {
            let room = self.1.min(bytes.len());
            self.1 -= room;
            self.0.extend_from_slice(&bytes[..room]);
            if room == 0 { Err(Error::from(ErrorKind::StorageFull)) } else { Ok(room) }
        }

        fn flush(&mut self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn half_a_line_is_ended_before_the_next_one() {
        let (mut lines, mut disk) = (Lines::default(), Full(Vec::new(), 6));
        let (bytes, failure) = lines.append(&mut disk, b"one\ntwo\n");
        assert_eq!((bytes, failure.map(|it| it.kind())), (6, Some(ErrorKind::StorageFull)));
        assert_eq!(lines.append(&mut disk, b"three\n").0, 0);
        disk.1 = 100;
        assert!(lines.append(&mut disk, b"four\n").1.is_none());
        assert_eq!(disk.0, b"one\ntw\nfour\n");
    }

    #[test]
    fn files_are_put_aside_when_they_are_old() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut file = LogFile::new(path.clone(), 0, Duration::from_secs(60), 2);
        write(&mut file, "one\n");
        file.rotate();
        assert!(!folder.path().join("log.1").exists());
        let began = SystemTime::now().checked_sub(Duration::from_secs(61)).unwrap();
        file.open.as_mut().unwrap().began = began;
        file.rotate();
        write(&mut file, "two\n");
        assert_eq!(std::fs::read_to_string(folder.path().join("log.1")).unwrap(), "one\n");
        assert_eq!(std::fs::read_to_string(path).unwrap(), "two\n");
    }

    #[test]
    fn files_are_put_aside_when_they_are_large_and_the_last_one_goes() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = log(folder.path(), 10, 2);
        for number in 0..7 {
            write(&mut file, &format!("line {number}\n"));
            file.rotate();
        }
        let read = |name: &str| std::fs::read_to_string(folder.path().join("deep").join(name));
        assert_eq!(read("log").unwrap(), "line 6\n");
        assert_eq!(read("log.1").unwrap(), "line 4\nline 5\n");
        assert_eq!(read("log.2").unwrap(), "line 2\nline 3\n");
        assert!(read("log.3").is_err());
    }

    #[test]
    fn a_link_to_what_is_not_there_yet_is_followed_and_never_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let (link, target) = (folder.path().join("log"), folder.path().join("target"));
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let mut file = LogFile::new(link.clone(), 1, Duration::ZERO, 2);
        write(&mut file, "one\n");
        file.rotate();
        assert_eq!(std::fs::read_to_string(target).unwrap(), "one\n");
        assert!(link.is_symlink());
    }

    #[test]
    fn one_that_a_reader_has_locked_is_put_aside_later() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = log(folder.path(), 1, 2);
        write(&mut file, "one\n");
        let reader = File::open(folder.path().join("deep/log")).unwrap();
        reader.lock_shared().unwrap();
        file.rotate();
        assert!(!folder.path().join("deep/log.1").exists());
        reader.unlock().unwrap();
        file.failed_at = None;
        file.rotate();
        assert!(folder.path().join("deep/log.1").exists());
    }

    #[test]
    fn one_that_somebody_else_has_put_aside_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = log(folder.path(), 0, 2);
        write(&mut file, "one\n");
        let path = folder.path().join("deep/log");
        std::fs::rename(&path, folder.path().join("deep/mine")).unwrap();
        write(&mut file, "two\n");
        std::fs::remove_dir_all(folder.path().join("deep")).unwrap();
        write(&mut file, "three\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three\n");
    }
}
