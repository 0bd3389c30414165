//! What LLM clients and servers speak: pure functions over bytes, no sockets and no clock.

mod dialect;
mod pause;
mod stream;

pub use dialect::Dialect;
pub use pause::pause;
pub use stream::{EndMarker, Tail};
