//! The callbacks to the control plane: their bodies, how they are sent, and which answers are retried.

use std::error::Error;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{Request, StatusCode};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use thiserror::Error;

use crate::execution::{ExecutionResult, State, now};
use crate::output::fit;

/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long one callback may take in all.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of an answer that are read.
const MAX_ANSWER: usize = 64 << 10;
/// Text bytes of a reduced body.
const REDUCED_TEXT_BYTES: usize = 16 << 10;

/// The control plane as seen from here.
#[derive(Debug, Clone)]
pub struct ControlPlane {
    base: String,
    authorization: Option<HeaderValue>,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

/// It can't be called at all.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The token has bytes that a header can't hold.
    #[error("INTERNAL_API_TOKEN can't be sent in a header")]
    Token,
    /// The TLS library has no protocol version left.
    #[error("the TLS library supports no protocol version")]
    Protocol,
    /// No trust anchors.
    #[error("no certificates to trust were found; install the package 'ca-certificates' or set SSL_CERT_FILE")]
    Certificates(#[source] std::io::Error),
}

/// A call that got no answer.
#[derive(Debug, Error)]
pub enum CallError {
    /// Nothing in time.
    #[error("no answer in {0:?}")]
    Timeout(Duration),
    /// No connection, or it broke.
    #[error("{0}")]
    Connection(String),
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// The start of its body.
    pub body: Bytes,
}

/// What an answer to a result means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It has the result.
    Accepted,
    /// Ask again later.
    Retry,
    /// It will never take it.
    Refused,
}

/// Which answers are retried (protocol: 401, 408, 429 and 5xx; everything else in 4xx is final).
#[must_use]
pub fn verdict(status: StatusCode) -> Verdict {
    match status.as_u16() {
        200..=299 => Verdict::Accepted,
        401 | 408 | 429 => Verdict::Retry,
        400..=499 => Verdict::Refused,
        _ => Verdict::Retry,
    }
}

impl ControlPlane {
    /// Prepares calls to the control plane at this base URL.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn new(base: &str, token: Option<&str>) -> Result<Self, ClientError> {
        let authorization = match token {
            Some(token) => {
                let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| ClientError::Token)?;
                value.set_sensitive(true);
                Some(value)
            }
            None => None,
        };
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let builder = hyper_rustls::HttpsConnectorBuilder::new();
        // Trust anchors take longer to load than the rest of the start; plain HTTP needs none.
        let builder = if base.starts_with("https:") {
            builder.with_native_roots().map_err(ClientError::Certificates)?
        } else {
            let config = rustls::ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into());
            let config = config.with_safe_default_protocol_versions().map_err(|_| ClientError::Protocol)?;
            builder.with_tls_config(config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth())
        };
        let connector = builder.https_or_http().enable_http1().wrap_connector(tcp);
        // The server drops idle connections after errors; hyper retries a request that a stale connection never carried.
        let client = Client::builder(TokioExecutor::new()).pool_idle_timeout(Duration::from_secs(30)).build(connector);
        Ok(Self { base: base.to_owned(), authorization, client })
    }

    /// Sends one callback. A connection that breaks is tried once more at once.
    ///
    /// # Errors
    /// [`CallError`] when no answer came.
    pub async fn post(
        &self,
        path: &str,
        body: Bytes,
        idempotency_key: Option<&str>,
        timeout: Duration,
    ) -> Result<Reply, CallError> {
        let both = async {
            match self.post_once(path, body.clone(), idempotency_key).await {
                Err(_) => self.post_once(path, body, idempotency_key).await,
                answer => answer,
            }
        };
        tokio::time::timeout(timeout, both).await.map_err(|_| CallError::Timeout(timeout))?
    }

    async fn post_once(&self, path: &str, body: Bytes, key: Option<&str>) -> Result<Reply, CallError> {
        let mut request = Request::post(format!("{}{path}", self.base)).header(CONTENT_TYPE, "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        let request = request.body(Full::new(body)).map_err(|error| CallError::Connection(error.to_string()))?;
        let answer = self.client.request(request).await.map_err(|error| CallError::Connection(innermost(&error)))?;
        let status = answer.status();
        // An answer whose body is too long or breaks off has still been given.
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        Ok(Reply { status, body: body.map(http_body_util::Collected::to_bytes).unwrap_or_default() })
    }

    /// Proof of life of one execution.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn heartbeat(&self, execution_id: &str, timeout: Duration) -> Result<Reply, CallError> {
        let body = json!({"timestamp": now(), "progress": null});
        let path = format!("/api/v1/internal/executions/{execution_id}/heartbeat");
        self.post(&path, body.to_string().into(), None, timeout).await
    }

    /// Reports a result; `body` comes from [`result_body`].
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn result(&self, execution_id: &str, body: &RawValue) -> Result<Reply, CallError> {
        let path = format!("/api/v1/internal/executions/{execution_id}/result");
        let body = Bytes::copy_from_slice(body.get().as_bytes());
        self.post(&path, body, Some(execution_id), CALL_TIMEOUT).await
    }

    /// Tells that this container is up or down.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn container(&self, event: &str, body: &Value, timeout: Duration) -> Result<Reply, CallError> {
        let path = format!("/api/v1/internal/containers/{event}");
        self.post(&path, body.to_string().into(), None, timeout).await
    }
}

/// The last cause of an error: what a reader of the log wants.
fn innermost(error: &dyn Error) -> String {
    let mut last = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    last.to_string()
}

/// The body of the result callback, within the control plane's limits.
///
/// `kept` is where a return value above the limit was stored, if it was.
#[must_use]
pub fn result_body(result: &ExecutionResult, kept: Option<&str>, text_bytes: usize) -> Box<RawValue> {
    let status = match result.state {
        State::Succeeded => "success",
        State::TimedOut => "timeout",
        State::Failed | State::Cancelled => "failed",
        State::Crashed | State::Queued | State::Running => "crashed",
    };
    let exit_code = match result.state {
        State::TimedOut | State::Crashed => -1,
        _ => result.exit_code.unwrap_or(-1),
    };
    let return_value: Option<Box<RawValue>> = match &result.return_value {
        Some(value) if value.get().len() > text_bytes => {
            let note = json!({"truncated": true, "bytes": value.get().len(), "artifact": kept});
            to_raw_value(&note).ok()
        }
        value => value.clone(),
    };
    let usage = result.usage.as_ref();
    let metrics = usage.map(|usage| {
        json!({
            "duration_ms": usage.wall_ms,
            "cpu_time_ms": usage.cpu_ms,
            "peak_memory_mb": (usage.peak_memory_bytes as f64 / 1_048_576.0 * 1000.0).round() / 1000.0,
            "io_read_bytes": usage.io_read_bytes,
            "io_write_bytes": usage.io_write_bytes,
        })
    });
    let stderr = explained(result);
    let body = CallbackBody {
        status,
        exit_code,
        execution_time: usage.map_or(0.0, |usage| usage.wall_ms / 1000.0),
        stdout: &fit(&result.stdout, result.stdout_bytes, text_bytes),
        stderr: &fit(&stderr, result.stderr_bytes, text_bytes),
        return_value,
        metrics,
        artifacts: result.artifacts.iter().map(|artifact| artifact.path.as_str()).collect(),
    };
    // A struct of strings, numbers and checked JSON always serialises.
    to_raw_value(&body).unwrap_or_else(|_| RawValue::NULL.to_owned())
}

#[derive(serde::Serialize)]
struct CallbackBody<'a> {
    status: &'a str,
    exit_code: i32,
    execution_time: f64,
    stdout: &'a str,
    stderr: &'a str,
    return_value: Option<Box<RawValue>>,
    metrics: Option<Value>,
    artifacts: Vec<&'a str>,
}

/// Standard error as the reader of a failure needs it: with the reason, unless the program itself has said it.
fn explained(result: &ExecutionResult) -> String {
    let reason = match (&result.reason, result.state) {
        (Some(reason), State::Failed | State::TimedOut | State::Cancelled | State::Crashed) => reason,
        _ => return result.stderr.clone(),
    };
    let has_spoken = !result.stderr.trim().is_empty();
    let own_words =
        result.state == State::Failed && (result.diagnostic.is_some() || reason.starts_with("exited with code"));
    if has_spoken && own_words {
        return result.stderr.clone();
    }
    let line_break = if has_spoken && !result.stderr.ends_with('\n') { "\n" } else { "" };
    format!("{}{line_break}{reason}\n", result.stderr)
}

/// A body with less in it, for a control plane that keeps failing over the full one.
#[must_use]
pub fn reduced(body: &RawValue) -> Option<Box<RawValue>> {
    let mut fields: serde_json::Map<String, Value> = serde_json::from_str(body.get()).ok()?;
    for name in ["stdout", "stderr"] {
        if let Some(Value::String(text)) = fields.get_mut(name) {
            let cut = fit(text, text.len() as u64, REDUCED_TEXT_BYTES).into_owned();
            *text = cut;
        }
    }
    let value = fields.get("return_value").map(Value::to_string).unwrap_or_default();
    if value.len() > REDUCED_TEXT_BYTES {
        fields.insert("return_value".to_owned(), json!({"truncated": true, "bytes": value.len(), "artifact": null}));
    }
    to_raw_value(&fields).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(state: State, reason: &str, stderr: &str) -> ExecutionResult {
        let mut result = ExecutionResult::without_run("e", "s", state, Some(reason.to_owned()), now());
        result.stderr = stderr.to_owned();
        result
    }

    #[test]
    fn stderr_always_says_what_happened() {
        assert_eq!(explained(&result(State::TimedOut, "timed out after 1 s", "")), "timed out after 1 s\n");
        assert_eq!(explained(&result(State::TimedOut, "timed out after 1 s", "x")), "x\ntimed out after 1 s\n");
        assert_eq!(explained(&result(State::Failed, "exited with code 3", "boom\n")), "boom\n");
        assert_eq!(explained(&result(State::Failed, "exited with code 3", "")), "exited with code 3\n");
        assert_eq!(explained(&result(State::Succeeded, "note", "warning\n")), "warning\n");
    }

    #[test]
    fn texts_keep_within_the_control_planes_limit() {
        let mut long = result(State::Failed, "killed: out of memory, limit 1 MiB", &"é".repeat(100_000));
        long.stdout = "x".repeat(200_000);
        long.return_value = RawValue::from_string(format!("\"{}\"", "y".repeat(70_000))).ok();
        let body: Value = serde_json::from_str(result_body(&long, Some("kept.json"), 65_535).get()).expect("JSON");
        for name in ["stdout", "stderr"] {
            assert!(body[name].as_str().is_some_and(|text| text.len() <= 65_535), "{name}");
        }
        assert!(body["stderr"].as_str().is_some_and(|text| text.ends_with("limit 1 MiB\n")));
        assert_eq!(body["return_value"], json!({"truncated": true, "bytes": 70_002, "artifact": "kept.json"}));
    }
}
