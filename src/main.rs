//! The `tollgate` binary; all of it is in the library.

use std::process::ExitCode;

/// glibc's allocator keeps the memory of finished streams, and takes an eighth to a fifth more time a request than this one;
/// jemalloc takes 5 % more. Without huge pages: buffers are seldom full, and what is not touched costs nothing then.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    tollgate::cli::run()
}
