//! What LLM clients and servers speak: pure functions over bytes, no sockets and no clock.

mod dialect;

pub use dialect::Dialect;
