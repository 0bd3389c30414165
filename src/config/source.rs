//! Where the configuration comes from.

use std::path::{Path, PathBuf};

use super::environment::Environment;

/// The variable that is a whole configuration.
pub(super) const UPSTREAM_URL: &str = "UPSTREAM_URL";

/// A configuration's origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file written for Tollgate, or given by hand.
    File(PathBuf),
    /// A `backends.json` of the tools that Tollgate replaces: their defaults hold.
    BackendsFile(PathBuf),
    /// No file: one upstream, as `UPSTREAM_URL` says.
    Upstream,
}

impl Source {
    /// The file's path; of what is no file, what it is called.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::File(path) | Self::BackendsFile(path) => path,
            Self::Upstream => Path::new(UPSTREAM_URL),
        }
    }
}

/// The first of: the path given by hand, `$TOLLGATE_CONFIG`, `$BACKENDS_CONFIG_PATH`, `$UPSTREAM_URL`,
/// `./tollgate.yaml`, `./config/backends.json`, `/etc/tollgate/tollgate.yaml`, as seen from
/// `folder`.
#[must_use]
pub fn find_source(
    given: Option<&Path>,
    environment: &Environment,
    folder: &Path,
) -> Option<Source> {
    if let Some(path) = given {
        return Some(Source::File(path.to_owned()));
    }
    if let Some(path) = environment.get("TOLLGATE_CONFIG") {
        return Some(Source::File(path.into()));
    }
    if let Some(path) = environment.get("BACKENDS_CONFIG_PATH") {
        return Some(Source::BackendsFile(path.into()));
    }
    if environment.get(UPSTREAM_URL).is_some() {
        return Some(Source::Upstream);
    }
    let beside = |name: &str| {
        let exists = folder.join(name).exists();
        exists.then(|| PathBuf::from(name))
    };
    if let Some(path) = beside("tollgate.yaml") {
        return Some(Source::File(path));
    }
    if let Some(path) = beside("config/backends.json") {
        return Some(Source::BackendsFile(path));
    }
    let system = Path::new("/etc/tollgate/tollgate.yaml");
    system.exists().then(|| Source::File(system.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_source_in_order_wins() {
        let folder = tempfile::tempdir().unwrap();
        let all = Environment::from_pairs([
            ("TOLLGATE_CONFIG", "t.yaml"),
            ("BACKENDS_CONFIG_PATH", "b.json"),
        ]);
        let some = Environment::from_pairs([
            ("UPSTREAM_URL", "http://h"),
            ("BACKENDS_CONFIG_PATH", "b.json"),
        ]);
        let upstream = Environment::from_pairs([("UPSTREAM_URL", "http://h")]);
        let none = Environment::default();
        let find = |given: Option<&str>, environment| {
            find_source(given.map(Path::new), environment, folder.path())
        };
        assert_eq!(find(Some("c.yaml"), &all), Some(Source::File("c.yaml".into())));
        assert_eq!(find(None, &all), Some(Source::File("t.yaml".into())));
        assert_eq!(find(None, &some), Some(Source::BackendsFile("b.json".into())));
        std::fs::create_dir(folder.path().join("config")).unwrap();
        std::fs::write(folder.path().join("config/backends.json"), "{}").unwrap();
        assert_eq!(find(None, &none), Some(Source::BackendsFile("config/backends.json".into())));
        std::fs::write(folder.path().join("tollgate.yaml"), "").unwrap();
        assert_eq!(find(None, &none), Some(Source::File("tollgate.yaml".into())));
        assert_eq!(find(None, &upstream), Some(Source::Upstream));
    }
}
