//! The file of the request log: appended to, put aside when it is large or old, and opened again when somebody else
//! has put it aside.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Result, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Its owner writes, its group may read: lines name clients.
const MODE: u32 = 0o640;

/// A log file.
pub(super) struct LogFile {
    path: PathBuf,
    rotate_bytes: u64,
    rotate_after: Duration,
    keep: u32,
    open: Option<Open>,
}

struct Open {
    file: File,
    /// Which file it is on its disk.
    id: (u64, u64),
    /// Since when it is written to, as far as is known.
    began: SystemTime,
    /// Whether half a line is at its end.
    is_broken: bool,
}

impl LogFile {
    pub(super) fn new(path: PathBuf, rotate_bytes: u64, rotate_after: Duration, keep: u32) -> Self {
        Self { path, rotate_bytes, rotate_after, keep, open: None }
    }

    /// Opens it, also where it is open.
    pub(super) fn reopen(&mut self) -> Result<()> {
        self.open = None;
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let file = OpenOptions::new().append(true).create(true).mode(MODE).open(&self.path)?;
        let known = file.metadata()?;
        let began = known.created().or_else(|_| known.modified()).unwrap_or(SystemTime::now());
        let began = if known.len() == 0 { SystemTime::now() } else { began };
        self.open = Some(Open { id: (known.dev(), known.ino()), file, began, is_broken: false });
        Ok(())
    }

    /// Appends whole lines, to the file that is at the path now.
    pub(super) fn write(&mut self, lines: &[u8]) -> Result<()> {
        let is_there = self.open.as_ref().is_some_and(|open| id_at(&self.path) == Some(open.id));
        if !is_there {
            self.reopen()?;
        }
        let open = self.open.as_mut().ok_or_else(|| Error::from(ErrorKind::NotFound))?;
        if open.is_broken {
            open.file.write_all(b"\n")?;
            open.is_broken = false;
        }
        let (bytes, written) = append(&mut open.file, lines);
        open.is_broken = !matches!(lines[..bytes].last(), None | Some(b'\n'));
        written?;
        self.rotate();
        Ok(())
    }

    /// Puts it aside when its time has come, also while nothing is written.
    pub(super) fn look(&mut self) {
        self.rotate();
    }

    fn rotate(&mut self) {
        let Some(open) = &self.open else { return };
        // A pipe or a device is neither large nor old.
        let Ok(known) = open.file.metadata() else { return };
        let is_large = self.rotate_bytes > 0 && known.len() >= self.rotate_bytes;
        let is_old = !self.rotate_after.is_zero()
            && open.began.elapsed().is_ok_and(|age| age >= self.rotate_after);
        if !known.is_file() || known.len() == 0 || !is_large && !is_old {
            return;
        }
        // Another process, which takes over or hands over, may have done so.
        if id_at(&self.path) == Some(open.id)
            && let Err(error) = self.put_aside()
        {
            log::error!("the request log {} cannot be put aside: {error}", self.path.display());
            return;
        }
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

/// How many of the bytes are written, and why not all.
fn append(file: &mut File, lines: &[u8]) -> (usize, Result<()>) {
    let mut bytes = 0;
    while bytes < lines.len() {
        match file.write(&lines[bytes..]) {
            Ok(0) => return (bytes, Err(Error::from(ErrorKind::WriteZero))),
            Ok(written) => bytes += written,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return (bytes, Err(error)),
        }
    }
    (bytes, Ok(()))
}

/// Appends whole lines to standard output.
pub(super) fn write_stdout(lines: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(lines)?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(folder: &Path, rotate_bytes: u64, keep: u32) -> LogFile {
        let mut file = LogFile::new(folder.join("deep/log"), rotate_bytes, Duration::ZERO, keep);
        file.reopen().unwrap();
        file
    }

    #[test]
    fn files_are_put_aside_when_they_are_large_and_the_last_one_goes() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = log(folder.path(), 10, 2);
        for number in 0..7 {
            file.write(format!("line {number}\n").as_bytes()).unwrap();
        }
        let read = |name: &str| std::fs::read_to_string(folder.path().join("deep").join(name));
        assert_eq!(read("log").unwrap(), "line 6\n");
        assert_eq!(read("log.1").unwrap(), "line 4\nline 5\n");
        assert_eq!(read("log.2").unwrap(), "line 2\nline 3\n");
        assert!(read("log.3").is_err());
    }

    #[test]
    fn one_that_somebody_else_has_put_aside_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = log(folder.path(), 0, 2);
        file.write(b"one\n").unwrap();
        let path = folder.path().join("deep/log");
        std::fs::rename(&path, folder.path().join("deep/mine")).unwrap();
        file.write(b"two\n").unwrap();
        std::fs::remove_dir_all(folder.path().join("deep")).unwrap();
        file.write(b"three\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three\n");
    }
}
