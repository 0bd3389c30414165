//! Parts of a configuration that have files of their own, because other people or programs write them.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::document::{self, PART};
use super::environment::Environment;
use super::file::{FileConfig, FileKeys, FilePrices};
use super::problem::{ConfigError, KeyPath, Problem, Problems};
use super::seen::SeenFile;
use super::{decode, interpolate, read_bounded, report};

/// The parts.
#[derive(Default)]
pub(super) struct Beside {
    pub(super) keys: Option<Part<FileKeys>>,
    pub(super) prices: Option<Part<FilePrices>>,
    /// The files that were read, or would have been.
    pub(super) files: Vec<SeenFile>,
}

/// A part, as it is written.
pub(super) struct Part<T> {
    path: PathBuf,
    bytes: Vec<u8>,
    /// Whether it could be read as it is written; else it is told already why not.
    pub(super) is_sound: bool,
    pub(super) content: T,
}

impl Beside {
    /// Reads the parts that `file` names; relative paths start from its folder.
    pub(super) fn read(
        file: &FileConfig,
        path: &Path,
        environment: &Environment,
        problems: &mut Problems,
    ) -> Self {
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut beside = Self::default();
        if let Some(name) = &file.keys_file {
            let at = KeyPath::default().key("keys_file");
            beside.keys = beside.part(&folder.join(name), &at, environment, problems);
        }
        if let Some(name) = &file.prices_file {
            let at = KeyPath::default().key("prices_file");
            beside.prices = beside.part(&folder.join(name), &at, environment, problems);
        }
        beside
    }

    fn part<T: DeserializeOwned + Default>(
        &mut self,
        path: &Path,
        at: &KeyPath,
        environment: &Environment,
        problems: &mut Problems,
    ) -> Option<Part<T>> {
        // Looked at before it is read: a change in between is seen as one.
        self.files.push(SeenFile::look(path));
        let bytes = match read_bounded(path, PART) {
            Ok(bytes) => bytes,
            Err(error) => {
                problems.value(at, format!("cannot read {}: {error}", path.display()));
                return None;
            }
        };
        let mut own = Problems::default();
        let tree = document::parse(&bytes, PART).map_err(|problem| own.push(problem)).ok();
        let content = tree.map(|mut tree| {
            interpolate::interpolate(&mut tree, environment, &mut own);
            decode::decode(tree, &mut own)
        });
        let is_sound = own.is_empty();
        let content = content.unwrap_or_default();
        let part = Part { path: path.to_owned(), bytes, is_sound, content };
        part.tell(own, problems);
        Some(part)
    }
}

impl<T> Part<T> {
    /// Adds what is wrong with this part to what is wrong with all.
    pub(super) fn tell(&self, own: Problems, problems: &mut Problems) {
        let own: Vec<Problem> = own.into_vec();
        if !own.is_empty() {
            let error: ConfigError = report(own, &self.bytes, &self.path);
            problems.elsewhere(&error);
        }
    }
}
