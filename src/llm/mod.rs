//! What LLM clients and servers speak: pure functions over bytes, no sockets and no clock.

mod coding;
mod dialect;
mod facts;
mod json;
mod multipart;
mod operation;
mod pause;
mod peek;
mod search;
mod splice;
mod stream;
mod usage;

pub use coding::{CODINGS, CodingFault, decode};
pub use dialect::{Dialect, has_anthropic_version};
pub use facts::{Facts, StreamOptions};
pub use json::Scanner;
pub use multipart::Form;
pub use operation::{generates, measures, operation};
pub use pause::pause;
pub use peek::{Goal, Peek, PeekFault, is_form};
pub use search::{Fault, Found, Gap, Search};
pub use splice::spliced;
pub use stream::{EndMarker, Tail};
pub use usage::{Kind, Meter, TOKENS_MAX, Trim, Usage};
