//! wip
pub mod admin;
pub mod auth;
pub mod cli;
pub mod config;
pub mod demo;
pub mod lifecycle;
pub mod llm;
pub mod pool;
pub mod proxy;
pub mod refusal;
pub mod routing;
pub mod runtime;
pub mod secret;
pub mod server;
pub mod telemetry;
