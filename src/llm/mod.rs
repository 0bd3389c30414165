//! What LLM clients and servers speak: pure functions over bytes, no sockets and no clock.

mod coding;
mod dialect;
mod json;
mod multipart;
mod pause;
mod peek;
mod search;
mod splice;
mod stream;

pub use coding::{CODINGS, CodingFault, decode};
pub use dialect::{Dialect, has_anthropic_version};
pub use json::Scanner;
pub use multipart::Form;
pub use pause::pause;
pub use peek::{Peek, PeekFault, is_form};
pub use search::{Fault, Found, Gap, Search};
pub use splice::spliced;
pub use stream::{EndMarker, Tail};
