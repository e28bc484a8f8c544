//! The body of `POST /execute`, as the control plane writes it.

use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

/// One request to run code. All seven fields are sent, as the control plane does.
#[derive(Debug, Clone)]
pub struct Submission {
    body: Value,
}

impl Submission {
    /// Python code.
    pub fn python(code: &str) -> Self {
        Self::new("python", code)
    }

    /// Shell code.
    pub fn shell(code: &str) -> Self {
        Self::new("shell", code)
    }

    /// Code in the language that goes by `language` on the wire.
    pub fn new(language: &str, code: &str) -> Self {
        let body = json!({
            "execution_id": fresh_id(),
            "session_id": "session-of-the-tests",
            "code": code,
            "language": language,
            "event": {},
            "timeout": 30,
            "env_vars": {},
        });
        Self { body }
    }

    /// Replaces the generated id.
    pub fn id(self, id: &str) -> Self {
        self.with("execution_id", id)
    }

    /// Sets the event.
    pub fn event(self, event: Value) -> Self {
        self.with("event", event)
    }

    /// Sets the deadline in seconds.
    pub fn timeout(self, seconds: u64) -> Self {
        self.with("timeout", seconds)
    }

    /// Adds one of the session's variables.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.body["env_vars"][name] = value.into();
        self
    }

    /// Replaces any field, also by what is not allowed there.
    pub fn with(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.body[field] = value.into();
        self
    }

    /// Leaves a field out.
    pub fn without(mut self, field: &str) -> Self {
        self.body.as_object_mut().expect("a submission is an object").remove(field);
        self
    }

    /// The id that the body holds.
    pub fn execution_id(&self) -> &str {
        self.body["execution_id"].as_str().expect("the id of this submission is a string")
    }

    /// The JSON that goes over the wire.
    pub fn body(&self) -> &Value {
        &self.body
    }
}

/// An id of the control plane's form: `exec_`, 14 digits, `_`, 8 hexadecimal digits.
pub fn fresh_id() -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("clock after 1970");
    let time = since_epoch.as_millis() % 100_000_000_000_000;
    format!("exec_{time:014}_{:04x}{:04x}", std::process::id() & 0xffff, count & 0xffff)
}
