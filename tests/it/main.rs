//! The built program as its users meet it: real processes, real sockets, real clients.

#![allow(clippy::unwrap_used, reason = "a helper that cannot go on fails its test")]

mod harness;

mod architecture;
mod balancing;
mod bodies;
mod bounds;
mod breaker;
mod cache;
mod clients;
mod configuration;
mod credentials;
mod dashboard;
mod deadlines;
mod deploy;
mod exchange;
mod failover;
mod front_door;
mod guard;
mod health;
mod hooks;
mod hostile;
mod http2;
mod keys;
mod ledger;
mod lifecycle;
mod limits;
mod loss;
mod metrics;
mod queue;
mod reports;
mod request_log;
mod retries;
mod shared;
mod smuggling;
mod status;
mod streaming;
mod tls;
mod tokens;
mod traces;
mod unix;
mod websocket;
