//! What models are asked and what they say: looked at, changed and kept.

mod capture;
mod fold;
mod frames;
mod guard;
mod matcher;
mod stream;
mod texts;

pub use capture::{Capture, CaptureSpec};
pub use guard::{Action, Guard, GuardSpec};
