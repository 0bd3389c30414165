//! wip
pub mod config;
pub mod llm;
pub mod refusal;
pub mod secret;
