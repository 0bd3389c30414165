//! The `tollgate` binary; all of it is in the library.

use std::process::ExitCode;

/// glibc's allocator keeps the memory of finished streams; mimalloc gives it back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    tollgate::cli::run()
}
