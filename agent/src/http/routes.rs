//! The resources and what they do.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State as Shared};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use http_body_util::channel::Channel;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::answer::Problem;
use super::wire::{self, MAX_BODY};
use crate::execution::{ExecutionId, ExecutionResult, now};
use crate::outbox::Outbox;
use crate::queue::{Live, Queue, Submitted};

/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of each stream in the document of an execution that still runs.
const OUTPUT_SO_FAR: usize = 64 << 10;
/// Longest description of dependencies, bytes.
const MAX_SYNC_BODY: usize = 1 << 20;

/// What the resources need.
#[derive(Clone)]
pub struct Api {
    /// Runs executions.
    pub queue: Queue,
    /// Keeps their results.
    pub outbox: Arc<Outbox>,
    /// Whether code can be run here, or why not; kept up to date by `app`.
    pub health: watch::Receiver<Result<(), String>>,
    /// Token that callers must send.
    pub token: Option<Arc<str>>,
    /// Start of the agent.
    pub started: Instant,
}

/// All resources.
pub fn router(api: Api) -> Router {
    Router::new()
        .route("/execute", post(execute))
        .route("/internal/session-config/sync", post(sync))
        .route("/v1/executions/{id}", get(show))
        .layer(axum::middleware::from_fn_with_state(api.clone(), authorize))
        .route("/health", get(health))
        .fallback(async || Problem::NotFound("there is nothing at this path".to_owned()))
        .method_not_allowed_fallback(async || Problem::MethodNotAllowed)
        .with_state(api)
}

async fn authorize(Shared(api): Shared<Api>, request: Request, next: Next) -> Response {
    let Some(expected) = &api.token else { return next.run(request).await };
    let given = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let given = given.and_then(|value| value.strip_prefix(b"Bearer ")).unwrap_or_default();
    if is_same(given, expected.as_bytes()) { next.run(request).await } else { Problem::Unauthorized.into_response() }
}

/// Compares in a time that depends on the lengths only.
fn is_same(given: &[u8], expected: &[u8]) -> bool {
    let difference = given.iter().zip(expected).fold(0, |difference, (a, b)| difference | (a ^ b));
    std::hint::black_box(difference) == 0 && given.len() == expected.len()
}

/// Reads a whole body within a size and a time.
async fn read_body(request: Request, limit: usize) -> Result<Bytes, Problem> {
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: u64| length > limit as u64) {
        return Err(Problem::TooLarge(limit));
    }
    let mut body = request.into_body();
    let reading = async {
        let mut bytes = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame =
                frame.map_err(|_| Problem::Invalid(vec!["body: broke off or is not framed correctly".to_owned()]))?;
            let Ok(data) = frame.into_data() else { continue };
            if bytes.len() + data.len() > limit {
                return Err(Problem::TooLarge(limit));
            }
            bytes.extend_from_slice(&data);
        }
        Ok(bytes.freeze())
    };
    tokio::time::timeout(BODY_TIMEOUT, reading).await.map_err(|_| Problem::TooSlow)?
}

/// The control plane wants exactly 200 and these fields.
#[derive(Serialize)]
struct Accepted<'a> {
    execution_id: &'a str,
    status: &'a str,
    message: &'a str,
}

async fn execute(Shared(api): Shared<Api>, request: Request) -> Result<Response, Problem> {
    let body = read_body(request, MAX_BODY).await?;
    let execution = match wire::execution(&body) {
        Ok(execution) => execution,
        Err(refused) => {
            if let Some(id) = refused.id {
                let reason = format!("the request was refused: {}", refused.errors.join("; "));
                api.queue.refuse(id, refused.session_id, reason).await;
            }
            return Err(Problem::Invalid(refused.errors));
        }
    };
    drop(body);
    let id = execution.id.clone();
    match api.queue.submit(execution).await {
        Submitted::Accepted => {
            Ok(json(&Accepted { execution_id: id.as_str(), status: "PENDING", message: "Execution submitted" }))
        }
        Submitted::Full => Err(Problem::QueueFull),
        Submitted::Draining => Err(Problem::Draining),
        Submitted::NotStored(why) => Err(Problem::Internal(format!("the execution could not be stored: {why}"))),
    }
}

#[derive(Serialize)]
struct Healthy {
    status: &'static str,
    version: &'static str,
    uptime_seconds: f64,
    active_executions: usize,
}

#[derive(Serialize)]
struct Unhealthy {
    status: &'static str,
    reason: String,
}

async fn health(Shared(api): Shared<Api>) -> Response {
    let health = api.health.borrow().clone();
    match health {
        Ok(()) => json(&Healthy {
            status: "healthy",
            version: env!("CARGO_PKG_VERSION"),
            uptime_seconds: (api.started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
            active_executions: api.queue.active(),
        }),
        Err(reason) => {
            let body = json(&Unhealthy { status: "unhealthy", reason });
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
    }
}

async fn show(Shared(api): Shared<Api>, text: Result<Path<String>, PathRejection>) -> Result<Response, Problem> {
    let missing = || Problem::NotFound("there is no execution with this id".to_owned());
    // A path that is not UTF-8 names nothing either.
    let id = text.ok().and_then(|Path(text)| ExecutionId::parse(&text)).ok_or_else(missing)?;
    if let Some(live) = api.queue.find(id.clone()).await {
        return Ok(json(&so_far(&id, live)));
    }
    let outbox = api.outbox.clone();
    match tokio::task::spawn_blocking(move || outbox.document(&id)).await {
        Ok(Ok(Some((file, length)))) => Ok(stream(file, length)),
        Ok(Ok(None)) => Err(missing()),
        Ok(Err(error)) => Err(Problem::Internal(format!("the result can't be read: {error}"))),
        Err(error) => Err(Problem::Internal(error.to_string())),
    }
}

/// Bytes of a document that are in memory for one reader: one in the file's buffer, a few on the way.
const CHUNK: usize = 64 << 10;

/// Answers with the rest of a file, as fast as the reader reads.
fn stream(mut file: File, length: u64) -> Response {
    let (mut sender, body) = Channel::<Bytes, std::io::Error>::new(2);
    tokio::spawn(async move {
        loop {
            let mut chunk = vec![0; CHUNK];
            match file.read(&mut chunk) {
                Ok(0) => return,
                Ok(count) => chunk.truncate(count),
                Err(error) => return sender.abort(error),
            }
            // The reader has gone.
            if sender.send_data(chunk.into()).await.is_err() {
                return;
            }
        }
    });
    let headers = [(header::CONTENT_TYPE, "application/json".to_owned()), (header::CONTENT_LENGTH, length.to_string())];
    (headers, Body::new(body)).into_response()
}

/// The document of an execution that has not ended.
fn so_far(id: &ExecutionId, live: Live) -> ExecutionResult {
    let mut document = ExecutionResult::without_run(id.as_str(), &live.session_id, live.state, None, live.accepted_at);
    document.started_at = live.started_at;
    let (stdout, stderr) = live.output.so_far(OUTPUT_SO_FAR);
    document.set_output(&stdout, &stderr);
    document
}

/// What the control plane asks for at session start and from its own API.
#[derive(Deserialize)]
struct SyncRequest {
    #[serde(default)]
    dependencies: Vec<String>,
}

#[derive(Serialize)]
struct Synced {
    status: &'static str,
    installed_dependencies: [(); 0],
    error: &'static str,
    started_at: String,
    completed_at: String,
}

/// Sessions without dependencies are in order as they are; installing is not part of this agent yet, and says so.
async fn sync(request: Request) -> Result<Response, Response> {
    let at = now();
    let body = read_body(request, MAX_SYNC_BODY).await.map_err(detailed)?;
    let parsed: SyncRequest =
        serde_json::from_slice(&body).map_err(|error| detailed(Problem::Invalid(vec![format!("body: {error}")])))?;
    if parsed.dependencies.is_empty() {
        let completed_at = now();
        return Ok(json(&Synced {
            status: "completed",
            installed_dependencies: [],
            error: "",
            started_at: at,
            completed_at,
        }));
    }
    let text = format!("this agent does not install packages; {} were asked for", parsed.dependencies.len());
    Err(detailed(Problem::Dependencies(text)))
}

/// The same error body at top level and under `detail`, where this caller looks for it.
fn detailed(problem: Problem) -> Response {
    let (status, body) = problem.render();
    let mut object: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&body).unwrap_or_default();
    object.insert("detail".to_owned(), serde_json::Value::Object(object.clone()));
    (status, json(&object)).into_response()
}

fn json<T: Serialize>(value: &T) -> Response {
    match serde_json::to_vec(value) {
        Ok(bytes) => ([(header::CONTENT_TYPE, "application/json")], bytes).into_response(),
        Err(error) => Problem::Internal(error.to_string()).into_response(),
    }
}
