//! `tollgate demo`: the proxy and three simulated LLM backends in one process, on loopback.

mod answers;
mod backend;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::TcpListener;

use crate::config::{self, Environment, Listen, Source};
use crate::server::Gateway;

use backend::{Behaviour, SimulatedBackend};

/// Runs the demo until a signal ends it.
///
/// # Errors
/// When a port cannot be had.
pub fn run(port: u16) -> Result<()> {
    let executor = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start the simulated backends")?;
    let addresses = executor.block_on(start_backends())?;
    let text = configuration(port, addresses);
    let source = Source::File(PathBuf::from("demo.yaml"));
    let snapshot = config::read(text.as_bytes(), &source, &Environment::default())?;
    let gateway = Gateway::bind(snapshot).context("choose another port with --port")?;
    let address = gateway.addresses().traffic[0].clone();
    gateway.run(None, move || print!("{}", greeting(&address)))
}

async fn start_backends() -> Result<[SocketAddr; 3]> {
    let quick = Duration::from_millis(20);
    let behaviours = [
        Behaviour { name: "fast", first_token: quick, between_tokens: quick, fails: false },
        Behaviour {
            name: "slow",
            first_token: Duration::from_millis(600),
            between_tokens: Duration::from_millis(120),
            fails: false,
        },
        Behaviour { name: "flaky", first_token: quick, between_tokens: quick, fails: true },
    ];
    let mut addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); 3];
    for (address, behaviour) in addresses.iter_mut().zip(behaviours) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        *address = listener.local_addr()?;
        tokio::spawn(Arc::new(SimulatedBackend::new(behaviour)).serve(listener));
    }
    Ok(addresses)
}

fn configuration(port: u16, [fast, slow, flaky]: [SocketAddr; 3]) -> String {
    format!(
        "
listen: 127.0.0.1:{port}
shutdown_timeout: 5s
balance: round_robin
health_check: {{ interval: 2s, jitter: 0 }}
services:
  demo:
    models:
      chat:
        backends:
          - {{ id: fast, name: Fast, url: \"http://{fast}\", weight: 2 }}
          - {{ id: slow, name: Slow, url: \"http://{slow}\" }}
      flaky:
        backends:
          - {{ id: flaky, name: Fails now and then, url: \"http://{flaky}\" }}
          - {{ id: spare, name: Spare, url: \"http://{fast}\", priority: 1 }}
"
    )
}

fn greeting(address: &Listen) -> String {
    let json = "-H 'Content-Type: application/json'";
    let chat = r#"{"model":"chat","messages":[{"role":"user","content":"Hello"}]}"#;
    let chat_stream =
        r#"{"model":"chat","stream":true,"messages":[{"role":"user","content":"Hello"}]}"#;
    let message =
        r#"{"model":"chat","max_tokens":64,"messages":[{"role":"user","content":"Hello"}]}"#;
    format!(
        "
Tollgate demo: one proxy, three simulated LLM backends, all in this process.

  Dashboard    {address}/
  Status       {address}/api/health/status
  Metrics      {address}/metrics

Paste into another terminal:

  # which models there are
  curl {address}/v1/models

  # OpenAI chat completion, whole and streamed; run it twice: two backends take turns
  curl {address}/v1/chat/completions {json} -d '{chat}'
  curl -N {address}/v1/chat/completions {json} -d '{chat_stream}'

  # Anthropic messages
  curl {address}/v1/messages {json} -d '{message}'

  # Ollama chat, newline-delimited JSON, by service and model
  curl -N {address}/demo/chat/api/chat {json} -d '{chat}'

  # a backend that fails now and then: watch it go down and come back on the dashboard
  curl -i {address}/demo/flaky/v1/chat/completions {json} -d '{chat}'

Ctrl-C ends it.
"
    )
}
