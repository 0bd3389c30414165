//! A request path: it leads nowhere, or to a model whose name it begins with.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tollgate::llm::{Dialect, EndMarker};
use tollgate::routing::Router;

fuzz_target!(|path: &[u8]| {
    let models = ["m", "a/b", "a", "meta-llama/Llama-3-8B", "é"];
    let router = Router::new(models.map(|model| ("s".to_owned(), model.to_owned(), model)));
    if let Ok(route) = router.route(path) {
        assert!(path.ends_with(route.tail), "the tail is none of {path:?}");
        assert!(route.tail.is_empty() || route.tail[0] == b'/', "a name was cut in {path:?}");
        for step in route.tail.split(|byte| *byte == b'/') {
            assert!(step != b".." && step != b".", "a way up in {path:?}");
        }
    }
    let _ = Dialect::of_path(path);
    let _ = EndMarker::of_path(path);
});
