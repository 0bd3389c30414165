//! A file as it was when it was read, so that a change can be seen later.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A file and what tells one content of it from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenFile {
    /// Where it is.
    pub path: PathBuf,
    /// None: it was not there.
    look: Option<Look>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Look {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl SeenFile {
    /// Looks at a file, through links: where one of them is changed, it is another file.
    #[must_use]
    pub fn look(path: &Path) -> Self {
        let look = path.metadata().ok().map(|metadata| Look {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        });
        Self { path: path.to_owned(), look }
    }
}
