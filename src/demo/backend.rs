//! A simulated LLM server: chat completions, messages and NDJSON, whole or token by token.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE};
use http::{Method, StatusCode};
use pingora::http::ResponseHeader;
use pingora_core::Result;
use pingora_core::apps::{HttpPersistentSettings, HttpServerApp, ReusedHttpStream, ServerApp};
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::l4::stream::Stream;
use pingora_core::server::ShutdownWatch;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::answers::{self, Piece, Question};

/// Largest request body, in bytes.
const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A backend that fails answers each request of this number with a 503.
const FAILURE_EVERY: u64 = 5;

/// It also fails its health checks for this long,
const DOWN_FOR: Duration = Duration::from_secs(10);

/// as often as this.
const DOWN_EVERY: Duration = Duration::from_secs(40);

/// How a backend behaves.
pub(super) struct Behaviour {
    pub(super) name: &'static str,
    pub(super) first_token: Duration,
    pub(super) between_tokens: Duration,
    pub(super) fails: bool,
}

/// One backend.
pub(super) struct SimulatedBackend {
    behaviour: Behaviour,
    started: Instant,
    requests: AtomicU64,
}

/// An answer that is ready to be sent.
enum Answer {
    Whole(StatusCode, Value),
    Stream(&'static str, Vec<Piece>),
}

impl SimulatedBackend {
    pub(super) fn new(behaviour: Behaviour) -> Self {
        Self { behaviour, started: Instant::now(), requests: AtomicU64::new(0) }
    }

    /// Serves connections for as long as the process lives.
    pub(super) async fn serve(self: Arc<Self>, listener: TcpListener) {
        let (_never, shutdown) = tokio::sync::watch::channel(false);
        loop {
            let Ok((socket, _)) = listener.accept().await else { continue };
            let _ = socket.set_nodelay(true);
            let backend = Arc::clone(&self);
            let shutdown = shutdown.clone();
            tokio::spawn(async move {
                let mut stream: Option<pingora_core::protocols::Stream> =
                    Some(Box::new(Stream::from(socket)));
                while let Some(open) = stream.take() {
                    stream = backend.process_new(open, &shutdown).await;
                }
            });
        }
    }

    fn is_down(&self) -> bool {
        let seconds = self.started.elapsed().as_secs() % DOWN_EVERY.as_secs();
        self.behaviour.fails && seconds >= DOWN_EVERY.as_secs() - DOWN_FOR.as_secs()
    }

    fn answer(&self, method: &Method, path: &str, body: &[u8]) -> Answer {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        match (method, path) {
            (&Method::GET, "/health") if self.is_down() => {
                return Answer::Whole(StatusCode::SERVICE_UNAVAILABLE, json!({"status": "down"}));
            }
            (&Method::GET, "/health") => {
                return Answer::Whole(StatusCode::OK, json!({"status": "ok"}));
            }
            (&Method::GET, "/v1/models") => {
                return Answer::Whole(StatusCode::OK, answers::models(created));
            }
            _ => {}
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        if self.behaviour.fails && number.is_multiple_of(FAILURE_EVERY) {
            return error(
                StatusCode::SERVICE_UNAVAILABLE,
                "the simulated backend fails now and then",
            );
        }
        let streams_unasked = path == "/api/chat";
        let Some(question) = Question::read(body, streams_unasked) else {
            return error(StatusCode::BAD_REQUEST, "the body is not JSON");
        };
        let tokens = question.tokens(self.behaviour.name);
        let now = jiff::Timestamp::now().to_string();
        match (method, path, question.stream) {
            (&Method::POST, "/v1/chat/completions", false) => {
                Answer::Whole(StatusCode::OK, answers::chat(&question, &tokens, number, created))
            }
            (&Method::POST, "/v1/chat/completions", true) => {
                let pieces = answers::chat_stream(&question, &tokens, number, created);
                Answer::Stream("text/event-stream", pieces)
            }
            (&Method::POST, "/v1/messages", false) => {
                Answer::Whole(StatusCode::OK, answers::message(&question, &tokens, number))
            }
            (&Method::POST, "/v1/messages", true) => {
                let pieces = answers::message_stream(&question, &tokens, number);
                Answer::Stream("text/event-stream", pieces)
            }
            (&Method::POST, "/api/chat", false) => {
                Answer::Whole(StatusCode::OK, answers::ollama(&question, &tokens, &now))
            }
            (&Method::POST, "/api/chat", true) => {
                let pieces = answers::ollama_stream(&question, &tokens, &now);
                Answer::Stream("application/x-ndjson", pieces)
            }
            _ => error(StatusCode::NOT_FOUND, "the simulated backend has no such path"),
        }
    }

    async fn exchange(&self, session: &mut ServerSession) -> Result<()> {
        let mut body = Vec::new();
        while let Some(chunk) = session.read_request_body().await? {
            body.extend_from_slice(&chunk);
            if body.len() > BODY_BYTES_MAX {
                session.set_keepalive(None);
                let too_large = error(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large");
                return self.send(session, too_large).await;
            }
        }
        let head = session.req_header();
        let answer = self.answer(&head.method.clone(), head.uri.path(), &body);
        self.send(session, answer).await
    }

    async fn send(&self, session: &mut ServerSession, answer: Answer) -> Result<()> {
        match answer {
            Answer::Whole(status, body) => {
                let body = Bytes::from(body.to_string());
                let mut head = ResponseHeader::build(status, Some(4))?;
                head.insert_header(CONTENT_TYPE, "application/json")?;
                head.insert_header(CONTENT_LENGTH, body.len())?;
                session.write_response_header(Box::new(head)).await?;
                session.write_response_body(body, true).await
            }
            Answer::Stream(content_type, pieces) => {
                let mut head = ResponseHeader::build(StatusCode::OK, Some(4))?;
                head.insert_header(CONTENT_TYPE, content_type)?;
                head.insert_header(CACHE_CONTROL, "no-cache")?;
                head.insert_header("Transfer-Encoding", "chunked")?;
                tokio::time::sleep(self.behaviour.first_token).await;
                session.write_response_header(Box::new(head)).await?;
                for piece in pieces {
                    if piece.waits {
                        tokio::time::sleep(self.behaviour.between_tokens).await;
                    }
                    session.write_response_body(Bytes::from(piece.text), false).await?;
                }
                session.write_response_body(Bytes::new(), true).await
            }
        }
    }
}

fn error(status: StatusCode, message: &str) -> Answer {
    let kind = if status.is_server_error() { "server_error" } else { "invalid_request_error" };
    let body = json!({"error": {"message": message, "type": kind, "param": null, "code": null}});
    Answer::Whole(status, body)
}

#[async_trait]
impl HttpServerApp for SimulatedBackend {
    async fn process_new_http(
        self: &Arc<Self>,
        mut session: ServerSession,
        _shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        if !session.read_request().await.ok()? {
            return None;
        }
        self.exchange(&mut session).await.ok()?;
        let settings = HttpPersistentSettings::for_session(&session);
        let stream = session.finish().await.ok()??;
        Some(ReusedHttpStream::from_reusable_stream(stream, settings))
    }
}
