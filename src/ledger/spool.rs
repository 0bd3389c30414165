//! Rows on disk, between the moment in which an exchange ends and the one in which the database has it.
//!
//! Rows are appended to files of a folder; each file belongs to the process that writes it, which holds a lock
//! on it. What a process leaves behind that ended in whatever way is taken over by the next one. A file is removed
//! when the database has all of it; the rows of one that was not removed in time come again, with the same ids.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::row::{Row, now};

/// A file that is longer is followed by another one: then it can be removed.
const FILE_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// As much is read at once, some thousand rows: what a database is given together costs it less.
const READ_BYTES: usize = 1024 * 1024;

/// As much is written at once: of many rows, those that fit are not kept back by the others.
const WRITE_BYTES: usize = 1024 * 1024;

/// What a file's name ends with, and what it ends with until its process has the lock.
const EXTENSION: &str = "rows";
const EXTENSION_BEFORE: &str = "new";

/// The files, as both ends see them.
pub(super) struct Spool {
    folder: PathBuf,
    bytes_max: u64,
    files: Mutex<Files>,
    changed: Condvar,
    finished: Condvar,
}

#[derive(Default)]
struct Files {
    /// In the order in which they were written.
    list: Vec<Entry>,
    /// One more with each change.
    changes: u64,
    /// Files that were written to and may not be on the disk yet, and rows in them since the start.
    unsynced: Vec<Arc<File>>,
    rows: u64,
    is_finished: bool,
}

struct Entry {
    path: PathBuf,
    /// Locked, as long as this lives.
    file: Arc<File>,
    /// So much of it is whole.
    written: u64,
    /// So much of it the database has.
    done: u64,
    /// Whether more comes.
    is_open: bool,
    /// Whether it was there at the start.
    is_left: bool,
}

impl Spool {
    /// Opens the folder, and takes over what ended processes left in it.
    ///
    /// # Errors
    /// When it cannot be made or read.
    pub(super) fn open(folder: &Path, bytes_max: u64) -> io::Result<Arc<Self>> {
        std::fs::create_dir_all(folder)?;
        let (changed, finished) = (Condvar::new(), Condvar::new());
        let (folder, files) = (folder.to_owned(), Mutex::default());
        let spool = Self { folder, bytes_max, files, changed, finished };
        spool.take_over(true)?;
        Ok(Arc::new(spool))
    }

    /// Takes over files whose processes have ended.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(super) fn take_over(&self, is_start: bool) -> io::Result<()> {
        let mut paths: Vec<PathBuf> = Vec::new();
        for entry in std::fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let is = |known: &str| path.extension().is_some_and(|extension| extension == known);
            if is(EXTENSION) || is(EXTENSION_BEFORE) {
                paths.push(path);
            }
        }
        // Their names begin with the time.
        paths.sort();
        for path in paths {
            let file = match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(file) => file,
                // It is done, or it has its name by now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if file.try_lock().is_err() {
                continue;
            }
            if path.extension().is_some_and(|extension| extension == EXTENSION_BEFORE) {
                remove(&path)?;
                continue;
            }
            let (written, file) = (file.metadata()?.len(), Arc::new(file));
            let entry = Entry { path, file, written, done: 0, is_open: false, is_left: is_start };
            let mut files = self.files();
            files.list.push(entry);
            files.changes += 1;
        }
        Ok(())
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that the database does not have yet.
    pub(super) fn bytes(&self) -> u64 {
        self.files().list.iter().map(|entry| entry.written - entry.done).sum()
    }

    /// Nothing more is written.
    pub(super) fn finish(&self) {
        let mut files = self.files();
        files.is_finished = true;
        files.changes += 1;
        self.changed.notify_all();
        self.finished.notify_all();
    }

    /// Whether nothing more is written.
    pub(super) fn is_finished(&self) -> bool {
        self.files().is_finished
    }

    /// Waits for rows beyond so many, and sees to it that they outlive the machine. How many there are then; none:
    /// there will be no more.
    ///
    /// # Errors
    /// When the disk does not take them.
    pub(super) fn sync(&self, synced: u64) -> io::Result<Option<u64>> {
        let is_done = |files: &mut Files| files.rows == synced && !files.is_finished;
        let mut files =
            self.changed.wait_while(self.files(), is_done).unwrap_or_else(PoisonError::into_inner);
        if files.rows == synced {
            return Ok(None);
        }
        let (rows, unsynced) = (files.rows, std::mem::take(&mut files.unsynced));
        drop(files);
        if let Err(error) = unsynced.iter().try_for_each(|file| file.sync_data()) {
            self.files().unsynced.extend(unsynced);
            return Err(error);
        }
        Ok(Some(rows))
    }

    /// Waits, at most so long, until there were more changes than that.
    pub(super) fn wait(&self, changes: u64, longest: Duration) {
        let is_same = |files: &mut Files| files.changes == changes;
        drop(self.changed.wait_timeout_while(self.files(), longest, is_same));
    }

    /// Waits, at most so long, until nothing more is written.
    pub(super) fn wait_for_end(&self, longest: Duration) {
        let goes_on = |files: &mut Files| !files.is_finished;
        drop(self.finished.wait_timeout_while(self.files(), longest, goes_on));
    }
}

/// Removes a file, if nobody has: two processes may find the same one.
fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes a row to the end of a file, for whoever finds out what is wrong with it.
///
/// # Errors
/// When the disk does not take it.
pub(super) fn put_aside(path: &Path, row: &Row<'_>) -> io::Result<()> {
    let mut line = Vec::new();
    row.write_json(&mut line);
    line.push(b'\n');
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    file.write_all(&line)?;
    file.sync_data()
}

/// The end at which rows come in.
pub(super) struct SpoolWriter {
    spool: Arc<Spool>,
    current: Option<Arc<File>>,
    written: u64,
}

impl SpoolWriter {
    pub(super) fn new(spool: &Arc<Spool>) -> Self {
        Self { spool: Arc::clone(spool), current: None, written: 0 }
    }

    /// Writes down the first of some rows, a line each, so that they outlive the process; [`Spool::sync`] sees to it that
    /// they outlive the machine. How many bytes of lines those are: about [`WRITE_BYTES`], or all.
    ///
    /// # Errors
    /// When the disk does not take them, or there are as many already as there may be. None of them is written then.
    pub(super) fn append(&mut self, lines: &[u8]) -> io::Result<usize> {
        let end = memchr::memchr(b'\n', lines.get(WRITE_BYTES..).unwrap_or_default());
        let lines = &lines[..end.map_or(lines.len(), |end| WRITE_BYTES + end + 1)];
        if self.spool.bytes() + lines.len() as u64 > self.spool.bytes_max {
            let message =
                format!("it has {} bytes already (ledger.spool_bytes_max)", self.spool.bytes_max);
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, message));
        }
        let file = self.file()?;
        // Not behind what a write left that failed half-way, but over it.
        if let Err(error) = file.write_all_at(lines, self.written) {
            let _ = file.set_len(self.written);
            return Err(error);
        }
        self.written += lines.len() as u64;
        let is_open = self.written < FILE_BYTES_MAX;
        let mut files = self.spool.files();
        if let Some(entry) = files.list.iter_mut().find(|entry| Arc::ptr_eq(&entry.file, &file)) {
            entry.written = self.written;
            entry.is_open = is_open;
        }
        files.changes += 1;
        files.rows += memchr::memchr_iter(b'\n', lines).count() as u64;
        if !files.unsynced.iter().any(|known| Arc::ptr_eq(known, &file)) {
            files.unsynced.push(Arc::clone(&file));
        }
        drop(files);
        if !is_open {
            self.current = None;
        }
        self.spool.changed.notify_all();
        Ok(lines.len())
    }

    /// The file that rows go to.
    fn file(&mut self) -> io::Result<Arc<File>> {
        if let Some(file) = &self.current {
            return Ok(Arc::clone(file));
        }
        let (path, file) = loop {
            let name = format!("{:013}-{:016x}", now(), fastrand::u64(..));
            let path = self.spool.folder.join(name);
            let (before, path) =
                (path.with_extension(EXTENSION_BEFORE), path.with_extension(EXTENSION));
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(&before)?;
            file.lock()?;
            match std::fs::rename(&before, &path) {
                Ok(()) => break (path, file),
                // It was taken for one that was left, before it was locked. Without its folder there is no next one.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        };
        // Its name has to outlive the machine, too.
        File::open(&self.spool.folder)?.sync_all()?;
        let file = Arc::new(file);
        let known = Arc::clone(&file);
        let entry = Entry { path, file: known, written: 0, done: 0, is_open: true, is_left: false };
        self.spool.files().list.push(entry);
        self.written = 0;
        self.current = Some(Arc::clone(&file));
        Ok(file)
    }
}

/// The end at which rows come out.
pub(super) struct SpoolReader {
    spool: Arc<Spool>,
    /// What was read last, and how far.
    read: Option<(Arc<File>, u64)>,
    /// Changes when there was nothing to read.
    pub(super) changes: u64,
}

/// What was read: lines, each a row or broken.
#[derive(Default)]
pub(super) struct Batch {
    text: Vec<u8>,
}

impl Batch {
    /// Its rows, and how many lines are none.
    pub(super) fn rows(&self) -> (Vec<Row<'_>>, usize) {
        let (mut rows, mut broken) = (Vec::new(), 0);
        let text = self.text.strip_suffix(b"\n").unwrap_or(&self.text);
        let lines = text.split(|byte| *byte == b'\n').filter(|_| !self.text.is_empty());
        for line in lines {
            match Row::read_line(line) {
                Some(row) => rows.push(row),
                None => broken += 1,
            }
        }
        (rows, broken)
    }
}

impl SpoolReader {
    pub(super) fn new(spool: &Arc<Spool>) -> Self {
        Self { spool: Arc::clone(spool), read: None, changes: 0 }
    }

    /// Whether all is done that ended processes have left.
    pub(super) fn is_past_left(&self) -> bool {
        !self.spool.files().list.iter().any(|entry| entry.is_left)
    }

    /// The next rows, if there are any now.
    ///
    /// # Errors
    /// When the disk does not give them.
    pub(super) fn read(&mut self) -> io::Result<Option<Batch>> {
        loop {
            let mut files = self.spool.files();
            self.changes = files.changes;
            let ends = |entry: &Entry| !entry.is_open || files.is_finished;
            let at = files.list.iter().position(|it| it.done < it.written || ends(it));
            let Some(at) = at else { return Ok(None) };
            let Entry { written, done, .. } = files.list[at];
            if done >= written {
                let entry = files.list.remove(at);
                let is_last_left = entry.is_left && !files.list.iter().any(|other| other.is_left);
                drop(files);
                remove(&entry.path)?;
                if is_last_left {
                    // What is known of earlier processes is looked up before rows of this one follow.
                    return Ok(Some(Batch::default()));
                }
                continue;
            }
            let file = Arc::clone(&files.list[at].file);
            drop(files);
            let length = usize::try_from(written - done).unwrap_or(usize::MAX).min(READ_BYTES);
            let mut text = vec![0; length];
            file.read_exact_at(&mut text, done)?;
            // A row has some hundred bytes: what has no end is the end of a file whose writer was killed.
            let end = text.iter().rposition(|byte| *byte == b'\n').map_or(length, |at| at + 1);
            text.truncate(end);
            self.read = Some((file, done + end as u64));
            return Ok(Some(Batch { text }));
        }
    }

    /// The database has what was read.
    pub(super) fn done(&mut self) {
        let Some((file, done)) = self.read.take() else { return };
        let mut files = self.spool.files();
        if let Some(entry) = files.list.iter_mut().find(|entry| Arc::ptr_eq(&entry.file, &file)) {
            entry.done = done;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::row::tests::row;
    use super::*;

    /// Writes rows of these names.
    fn append(writer: &mut SpoolWriter, names: &[&str]) -> io::Result<()> {
        let lines = lines(names);
        let mut written = 0;
        while written < lines.len() {
            written += writer.append(&lines[written..])?;
        }
        Ok(())
    }

    fn lines(names: &[&str]) -> Vec<u8> {
        let mut lines = Vec::new();
        for name in names {
            row("id", name).write_line(&mut lines);
        }
        lines
    }

    fn names_of(batch: &Batch) -> Vec<String> {
        batch.rows().0.into_iter().map(|row| row.request_id.to_owned()).collect()
    }

    fn names(reader: &mut SpoolReader) -> Vec<String> {
        let mut names = Vec::new();
        while let Some(batch) = reader.read().unwrap() {
            names.extend(names_of(&batch));
            reader.done();
        }
        names
    }

    fn files(folder: &Path) -> usize {
        std::fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn what_one_process_leaves_the_next_one_takes_over() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(folder.path(), u64::MAX).unwrap();
        let mut writer = SpoolWriter::new(&spool);
        append(&mut writer, &["1", "2"]).unwrap();
        // While it lives, nobody else touches its file.
        let other = Spool::open(folder.path(), u64::MAX).unwrap();
        assert!(names(&mut SpoolReader::new(&other)).is_empty());
        append(&mut writer, &["3"]).unwrap();
        let mut reader = SpoolReader::new(&spool);
        assert_eq!(names_of(&reader.read().unwrap().unwrap()).len(), 3);
        drop((writer, reader, spool));
        // One that has started meanwhile may take it over later, too.
        let mut writer = SpoolWriter::new(&other);
        append(&mut writer, &["own"]).unwrap();
        let mut reader = SpoolReader::new(&other);
        assert_eq!(names(&mut reader), ["own"]);
        other.take_over(false).unwrap();
        assert!(other.bytes() > 0);
        assert_eq!(names_of(&reader.read().unwrap().unwrap()).len(), 3);
        drop((writer, reader, other));
        // What nobody has given its name yet has nothing in it.
        std::fs::write(folder.path().join("0-0.new"), "").unwrap();
        let spool = Spool::open(folder.path(), u64::MAX).unwrap();
        let mut writer = SpoolWriter::new(&spool);
        append(&mut writer, &["4"]).unwrap();
        let mut reader = SpoolReader::new(&spool);
        let mut all = names(&mut reader);
        all.sort();
        assert_eq!(all, ["1", "2", "3", "4", "own"]);
        assert_eq!((files(folder.path()), spool.bytes()), (1, 0));
        spool.finish();
        assert_eq!((names(&mut reader).len(), files(folder.path())), (0, 0));
    }

    #[test]
    fn a_row_that_was_cut_off_is_passed_over() {
        // What has all but its end is whole.
        for (cut, whole) in [(1, &["1", "2"][..]), (2, &["1"]), (40, &["1"]), (90, &["1"])] {
            let folder = tempfile::tempdir().unwrap();
            let spool = Spool::open(folder.path(), u64::MAX).unwrap();
            append(&mut SpoolWriter::new(&spool), &["1", "2"]).unwrap();
            let path = spool.files().list[0].path.clone();
            drop(spool);
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.set_len(file.metadata().unwrap().len() - cut).unwrap();
            drop(file);
            let spool = Spool::open(folder.path(), u64::MAX).unwrap();
            assert_eq!(names(&mut SpoolReader::new(&spool)), whole, "{cut}");
            assert_eq!(files(folder.path()), 0);
        }
    }

    #[test]
    fn long_files_are_followed_by_others_and_there_is_a_bound_on_all() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(folder.path(), 12 * 1024 * 1024).unwrap();
        let mut writer = SpoolWriter::new(&spool);
        let rows = ["x"; 10_000];
        let mut written = 0;
        let error = loop {
            match append(&mut writer, &rows) {
                Ok(()) => written += rows.len(),
                Err(error) => break error,
            }
        };
        assert!(error.to_string().contains("ledger.spool_bytes_max"), "{error}");
        assert_eq!(files(folder.path()), 2);
        let mut reader = SpoolReader::new(&spool);
        assert_eq!(names(&mut reader).len(), written);
        assert_eq!(files(folder.path()), 1);
        append(&mut writer, &rows).unwrap();
        assert_eq!(names(&mut reader).len(), rows.len());
    }

    #[test]
    fn of_many_rows_those_that_fit_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let lines = lines(&["x"; 30_000]);
        assert!(lines.len() > 5 * WRITE_BYTES / 2);
        let spool = Spool::open(folder.path(), 9 * WRITE_BYTES as u64 / 4).unwrap();
        let mut writer = SpoolWriter::new(&spool);
        let first = writer.append(&lines).unwrap();
        let second = first + writer.append(&lines[first..]).unwrap();
        assert!(first > WRITE_BYTES && second < lines.len());
        assert!(writer.append(&lines[second..]).is_err());
        let whole = memchr::memchr_iter(b'\n', &lines[..second]).count();
        assert_eq!(names(&mut SpoolReader::new(&spool)).len(), whole);
    }

    #[test]
    fn rows_come_in_their_order_and_again_when_the_database_did_not_take_them() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(folder.path(), u64::MAX).unwrap();
        let mut writer = SpoolWriter::new(&spool);
        let mut reader = SpoolReader::new(&spool);
        let mut written = Vec::new();
        for round in 0..40 {
            // More than is read at once, too.
            for count in [round * 300, 1] {
                let new: Vec<String> = (0..count).map(|at| format!("{round}-{at}")).collect();
                let new: Vec<&str> = new.iter().map(String::as_str).collect();
                append(&mut writer, &new).unwrap();
                written.extend(new.into_iter().map(str::to_owned));
            }
            if round % 3 == 0 {
                assert!(names(&mut reader) == written);
                written.clear();
            } else if let Some(batch) = reader.read().unwrap() {
                assert_eq!(names_of(&batch)[0], written[0]);
            }
        }
        assert!(names(&mut reader) == written);
    }
}
