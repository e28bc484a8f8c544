//! One request to run code once, its states, and its final record. No I/O.
//!
//! ```text
//! queued ──▶ running ──▶ succeeded | failed | timed_out | cancelled
//!    │          │
//!    └──────────┴──────▶ crashed     the agent ended, or the sandbox could not be set up
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::output::Captured;

/// Name of an execution: 1 to 128 of `A-Z a-z 0-9 _ . -`, not starting with a dot. Safe as a file name and in a URL.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct ExecutionId(String);

impl ExecutionId {
    /// Longest id, in bytes.
    pub const MAX_BYTES: usize = 128;

    /// Checks a text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let fits = (1..=Self::MAX_BYTES).contains(&text.len()) && !text.starts_with('.');
        let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'));
        (fits && plain).then(|| Self(text.to_owned()))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ExecutionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the code is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    /// CPython.
    Python,
    /// bash, as a script.
    Shell,
}

impl Language {
    /// Reads the names that the control plane uses, by habit several for one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "python" | "python3" => Some(Self::Python),
            "shell" | "bash" | "sh" => Some(Self::Shell),
            _ => None,
        }
    }
}

/// How the code is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Its function `handler` is called with the event.
    Handler,
    /// As a handler if it defines one, else as a script.
    Auto,
}

impl Mode {
    /// Its name in the bootstrap protocol.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Handler => "handler",
            Self::Auto => "auto",
        }
    }
}

/// One request to run code once. Valid by construction: built by `http::wire` and `cli` only.
#[derive(Debug, Clone)]
pub struct Execution {
    /// Its name.
    pub id: ExecutionId,
    /// The session it belongs to; free text.
    pub session_id: String,
    /// What the code is written in.
    pub language: Language,
    /// How it is entered.
    pub mode: Mode,
    /// The user's code.
    pub code: String,
    /// A JSON object, as text.
    pub event: String,
    /// How long the program may run.
    pub timeout: Duration,
    /// Variables for the program.
    pub environment: BTreeMap<String, String>,
}

/// Where an execution stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Accepted, waiting for its turn.
    Queued,
    /// Its sandbox runs.
    Running,
    /// Exit code 0.
    Succeeded,
    /// The program failed, or was stopped for what it did.
    Failed,
    /// Killed at its deadline.
    TimedOut,
    /// Ended on request.
    Cancelled,
    /// Not the program's doing: the agent ended, or the sandbox could not be set up.
    Crashed,
}

impl State {
    /// Whether it will change no more.
    #[must_use]
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

/// A structured error of user code, as the bootstrap reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnostic {
    /// Name of the exception's type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its message.
    pub message: String,
    /// The user's frames, outermost first.
    #[serde(default)]
    pub stack: Vec<Frame>,
}

/// One frame of a [`Diagnostic`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// File name; the user's code is `main.py`.
    pub file: String,
    /// Line number, from 1.
    pub line: Option<u64>,
    /// Function name.
    pub function: Option<String>,
    /// The line itself.
    pub source: Option<String>,
}

/// What an execution used.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Milliseconds from the program's start until its whole tree was gone.
    pub wall_ms: f64,
    /// Milliseconds of user and system time of the whole tree; a lower bound, see `isolation::Usage`.
    pub cpu_ms: f64,
    /// Bytes.
    pub peak_memory_bytes: u64,
    /// Bytes read from storage.
    pub io_read_bytes: u64,
    /// Bytes written to storage.
    pub io_write_bytes: u64,
}

/// A regular file that an execution made or changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtifactRecord {
    /// Relative to the workspace.
    pub path: String,
    /// Bytes.
    pub size: u64,
}

/// The final record: the document of `GET /v1/executions/{id}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecutionResult {
    /// Its name.
    pub execution_id: String,
    /// Its session.
    pub session_id: String,
    /// Where it stands.
    pub state: State,
    /// Why it is not `succeeded`, in one line.
    pub reason: Option<String>,
    /// Exit code of the program, 128 + n after signal n; absent when there was none.
    pub exit_code: Option<i32>,
    /// The signal that ended the program.
    pub signal: Option<i32>,
    /// Standard output as text, its middle left out above the capture limit.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
    /// The exact bytes when `stdout` is not UTF-8 and nothing was left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdout_base64: Option<String>,
    /// The exact bytes when `stderr` is not UTF-8 and nothing was left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stderr_base64: Option<String>,
    /// Bytes that the program printed in all.
    pub stdout_bytes: u64,
    /// Bytes that the program printed in all.
    pub stderr_bytes: u64,
    /// Whether a part was left out.
    pub stdout_truncated: bool,
    /// Whether a part was left out.
    pub stderr_truncated: bool,
    /// What the handler returned.
    pub return_value: Option<Box<RawValue>>,
    /// The structured error, when the program failed with one.
    pub diagnostic: Option<Diagnostic>,
    /// What it used.
    pub usage: Option<Usage>,
    /// Files that it made or changed in the workspace.
    pub artifacts: Vec<ArtifactRecord>,
    /// Changed files that are not listed, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub artifacts_skipped: BTreeMap<String, u64>,
    /// The layers that held it.
    pub isolation: Option<serde_json::Value>,
    /// RFC 3339.
    pub accepted_at: String,
    /// RFC 3339.
    pub started_at: Option<String>,
    /// RFC 3339.
    pub finished_at: Option<String>,
}

impl ExecutionResult {
    /// A record of something that has not run (yet).
    #[must_use]
    pub fn without_run(id: &str, session_id: &str, state: State, reason: Option<String>, accepted_at: String) -> Self {
        Self {
            execution_id: id.to_owned(),
            session_id: session_id.to_owned(),
            state,
            reason,
            exit_code: None,
            signal: None,
            stdout: String::new(),
            stderr: String::new(),
            stdout_base64: None,
            stderr_base64: None,
            stdout_bytes: 0,
            stderr_bytes: 0,
            stdout_truncated: false,
            stderr_truncated: false,
            return_value: None,
            diagnostic: None,
            usage: None,
            artifacts: Vec::new(),
            artifacts_skipped: BTreeMap::new(),
            isolation: None,
            accepted_at,
            started_at: None,
            finished_at: state.is_final().then(now),
        }
    }
}

impl ExecutionResult {
    /// Takes over what was printed.
    pub fn set_output(&mut self, stdout: &Captured, stderr: &Captured) {
        let exact = |captured: &Captured| captured.exact_bytes().map(|bytes| STANDARD.encode(bytes));
        (self.stdout_bytes, self.stderr_bytes) = (stdout.total(), stderr.total());
        (self.stdout_truncated, self.stderr_truncated) = (stdout.is_truncated(), stderr.is_truncated());
        (self.stdout_base64, self.stderr_base64) = (exact(stdout), exact(stderr));
        (self.stdout, self.stderr) = (stdout.text().into_owned(), stderr.text().into_owned());
    }
}

/// The time of day in UTC as RFC 3339, to the millisecond.
#[must_use]
pub fn now() -> String {
    let now = OffsetDateTime::now_utc();
    let millis = now.nanosecond() / 1_000_000 * 1_000_000;
    // Neither can fail: the nanosecond is in range, and years after 9999 are not at hand.
    now.replace_nanosecond(millis).unwrap_or(now).format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_safe_as_file_names() {
        for good in ["exec_20260101120000_0a1b2c3d", "a", "A.b-c_9", &"x".repeat(128)] {
            assert!(ExecutionId::parse(good).is_some(), "{good}");
        }
        for bad in ["", ".", "..", ".hidden", "a/b", "a b", "a\n", "ä", "a\0", &"x".repeat(129)] {
            assert!(ExecutionId::parse(bad).is_none(), "{bad:?}");
        }
    }
}
