//! Tollgate: the edge proxy in front of a fleet of LLM servers. One small daemon, built on Pingora,
//! that decides who may pass, which way, and what it costs.
//!
//! # The way of a request
//!
//! ```text
//! client -> proxy::admit -> routing -> proxy::select -> pool -> proxy::send -> backend
//! client <- proxy::receive <------------------------------------------------- backend
//! ```
//!
//! `/{service}/{model}/{path}` leads to the pool of that service and model, and `/v1/{path}` to the one
//! of the model that the request names; the pool chooses one of its backends; the request goes there as
//! `{url}/{path}` with the backend's credential, and the answer comes back chunk by chunk as it arrives.
//! [`proxy`] tells the life of an exchange.
//!
//! # The code, in the order in which data flows
//!
//! Imports point down this list; modules of one line do not know each other (a test says so).
//!
//! | module | what is in it |
//! |---|---|
//! | [`cli`] | the command line and the exit codes |
//! | [`demo`] | simulated LLM backends behind a gateway, in one process |
//! | [`server`] | the composition root: snapshot -> runtime -> Pingora services; signals, sockets |
//! | [`proxy`], [`admin`] | the data path, a file a step; status pages and dashboard |
//! | [`runtime`] | everything one exchange needs, behind one `Arc` |
//! | [`auth`], [`limits`], [`routing`], [`pool`], [`cache`], [`ledger`] | who may pass, and how much; path to target; backends, balance, health, breakers and queue; answers that are given again; who used what |
//! | [`telemetry`], [`lifecycle`], [`link`] | metrics, logs, traces and history of exchanges; starting to draining; connections to Redis |
//! | [`config`], [`refusal`] | files to snapshot; every "no" |
//! | [`hooks`] | what the configuration has done with exchanges besides passing them on |
//! | [`expression`], [`llm`], [`names`], [`networks`], [`secret`], [`writing`] | conditions and values that are computed; API families and what a body names; names and wildcards; who comes from where; a string that cannot be printed; numbers, times and JSON as text |
//!
//! # Words
//!
//! - **service / model**: the two names that a request is routed by.
//! - **way**: the pools that can serve a name, in the order in which they are asked; the **front door** is
//!   where that name is in the request itself and not in its path.
//! - **backend**: one upstream server with its own URL, weight, credential and health.
//! - **pool**: the backends of one service and model, behind one Pingora `LoadBalancer`.
//! - **exchange**: one request with its response; **attempt**: one try of it on one backend.
//! - **snapshot**: the validated, immutable configuration; **runtime**: the snapshot with the live
//!   state that outlives it (health, exchanges in flight, clients' homes).
//! - **permit**: a place at a backend, held for an attempt; **breaker**: what leaves a failing backend
//!   alone: closed, open, half open.
//! - **usage**: tokens counted; **ledger**: where it is kept, a row an exchange.
//! - **limit**: how much clients may take of something in a time; **reservation**: what an exchange may take of it,
//!   held until it is known what it took.
//! - **hook**: something that the configuration has done with exchanges at a moment of theirs; **chain**: those of a model.
//! - **refusal**: a "no" said to a client. **drain**: finishing without accepting; also of one backend.
//! - **record**: what there is to tell of an exchange at its end; **phase**: what its time goes to; **fault**: what
//!   failed and was not the client's doing.
//!
//! # What can be relied on
//!
//! - An exchange sees one runtime, from its first step to its last, and stays on one thread; so does its connection, and
//!   the backends' connections are that thread's own.
//! - What is taken (a permit, a place in line, bytes held) is given back by `Drop`, so neither a panic nor an abort
//!   leaks it.
//! - File types never meet an exchange, and the snapshot has no "not written".
//! - The request path does not resolve names or read files. A body is held only to be sent again or to find
//!   the model in it, or because a hook looks at it, within a bound of its own and one of all; an answer is held only
//!   where a hook looks at it, within a bound of its own.
//! - A body passes byte for byte, but for the model's name where a backend has another one for it, and for what hooks change.
//! - After the first byte of an answer there is no other attempt, and one that breaks never looks whole.
//! - Paths are decided upon and passed on as the bytes that came.
//! - Routing does not know what a target is, and a pool does not know HTTP exchanges. Configuration,
//!   keys, routing, refusals and pages do not know Pingora.
//! - Secrets are in no log, error, page or `Debug` text; a query is in no log.
//! - Telling costs an exchange no wait: lines and spans beyond a bound are lost, and counted.
//! - There is no global state: what a part needs, it is given.
//! - The network cannot make it panic, and a panic would end one exchange, not the process.

pub mod admin;
pub mod auth;
pub mod cache;
pub mod cli;
pub mod config;
pub mod demo;
pub mod expression;
pub mod hooks;
pub mod ledger;
pub mod lifecycle;
pub mod limits;
pub mod link;
pub mod llm;
pub mod names;
pub mod networks;
pub mod pool;
pub mod proxy;
pub mod refusal;
pub mod routing;
pub mod runtime;
pub mod secret;
pub mod server;
pub mod telemetry;
pub mod writing;
