//! Errors as the control plane knows them: one body for all, one status per kind.

use axum::response::{IntoResponse, Response};
use hyper::{StatusCode, header};
use serde::Serialize;

/// What went wrong with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// Not what the contract allows; all that was found.
    Invalid(Vec<String>),
    /// No token, or a wrong one.
    Unauthorized,
    /// No such resource.
    NotFound(String),
    /// The resource has no such method.
    MethodNotAllowed,
    /// The body is too long; the limit in bytes.
    TooLarge(usize),
    /// The body did not come in time.
    TooSlow,
    /// No room in time.
    QueueFull,
    /// On the way out.
    Draining,
    /// Dependencies can't be installed.
    Dependencies(String),
    /// Our own failure.
    Internal(String),
}

/// The body of every error.
#[derive(Debug, Serialize)]
struct Body {
    error_code: &'static str,
    description: &'static str,
    error_detail: String,
    solution: &'static str,
    request_id: String,
    errors: Vec<String>,
}

impl Problem {
    /// The status and the JSON text of the answer.
    #[must_use]
    pub fn render(&self) -> (StatusCode, String) {
        let (status, error_code, description, solution) = match self {
            Self::Invalid(_) => (
                StatusCode::BAD_REQUEST,
                "Executor.ValidationError",
                "The request is not valid",
                "Correct the named fields",
            ),
            Self::Unauthorized => (
                StatusCode::UNAUTHORIZED,
                "Executor.Unauthorized",
                "The bearer token is missing or wrong",
                "Send 'Authorization: Bearer' with the agent's AGENT_API_TOKEN",
            ),
            Self::NotFound(_) => {
                (StatusCode::NOT_FOUND, "Executor.NotFound", "There is no such resource", "Check the path and the id")
            }
            Self::MethodNotAllowed => (
                StatusCode::METHOD_NOT_ALLOWED,
                "Executor.MethodNotAllowed",
                "The resource has no such method",
                "Use the method that the documentation names",
            ),
            Self::TooLarge(_) => {
                (StatusCode::PAYLOAD_TOO_LARGE, "Executor.PayloadTooLarge", "The request body is too long", "Send less")
            }
            Self::TooSlow => (
                StatusCode::REQUEST_TIMEOUT,
                "Executor.ValidationError",
                "The request body did not arrive in time",
                "Send the request again",
            ),
            Self::QueueFull => (
                StatusCode::SERVICE_UNAVAILABLE,
                "Executor.QueueFull",
                "Too many executions are waiting",
                "Try again later, or raise AGENT_QUEUE or AGENT_CONCURRENCY",
            ),
            Self::Draining => (
                StatusCode::SERVICE_UNAVAILABLE,
                "Executor.Draining",
                "The agent is shutting down",
                "Send the request to another agent",
            ),
            Self::Dependencies(_) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "Executor.SessionConfigSyncError",
                "The session's dependencies can't be installed",
                "Use an image that has them",
            ),
            Self::Internal(_) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "Executor.InternalError", "The agent failed", "See the agent's log")
            }
        };
        let errors = match self {
            Self::Invalid(errors) => errors.clone(),
            Self::NotFound(detail) | Self::Dependencies(detail) | Self::Internal(detail) => vec![detail.clone()],
            Self::TooLarge(limit) => vec![format!("the limit is {limit} bytes")],
            _ => vec![description.to_owned()],
        };
        let error_detail = errors.join("; ");
        let body = Body { error_code, description, error_detail, solution, request_id: request_id(), errors };
        // Strings only: this can't fail.
        (status, serde_json::to_string(&body).unwrap_or_default())
    }
}

/// A number that the log and the caller can both name.
fn request_id() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("req_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, body) = self.render();
        tracing::debug!(status = status.as_u16(), problem = ?self, "request refused");
        (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
    }
}
