//! The shape of the source: imports point down, and every file says what it is for.

use std::path::{Path, PathBuf};

/// The ranks of `src/lib.rs`, from the top. Modules of one rank do not know each other.
const RANKS: [&[&str]; 10] = [
    &["main", "cli"],
    &["demo"],
    &["server"],
    &["proxy", "admin"],
    &["runtime"],
    &["auth", "limits", "routing", "pool", "cache", "ledger"],
    &["telemetry", "lifecycle", "link"],
    &["config", "refusal"],
    &["hooks"],
    &["expression", "llm", "names", "networks", "secret", "writing"],
];

fn rank(module: &str) -> usize {
    RANKS
        .iter()
        .position(|rank| rank.contains(&module))
        .unwrap_or_else(|| panic!("{module} has no rank; give it one here and in src/lib.rs"))
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

#[test]
fn imports_point_down() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for file in sources(&root) {
        let relative = file.strip_prefix(&root).unwrap().to_string_lossy().replace(".rs", "");
        let module = relative.split('/').next().unwrap();
        if module == "lib" {
            continue;
        }
        let text = std::fs::read_to_string(&file).unwrap();
        for used in text.split("crate::").skip(1) {
            let used: String = used
                .chars()
                .take_while(|letter| letter.is_alphanumeric() || *letter == '_')
                .collect();
            if used.is_empty() || used == module {
                continue;
            }
            assert!(rank(module) < rank(&used), "{} uses crate::{used}", file.display());
        }
    }
}

#[test]
fn every_file_says_what_it_is_for_in_its_first_line() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for folder in ["src", "tests", "benches"] {
        for file in sources(&root.join(folder)) {
            let text = std::fs::read_to_string(&file).unwrap();
            assert!(text.starts_with("//! "), "{}", file.display());
        }
    }
}
