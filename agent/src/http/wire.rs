//! The one place where untrusted JSON becomes typed. Nothing behind it validates again, and no wire spelling leaks in.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::execution::{Execution, ExecutionId, Language, Mode};

/// Longest body, bytes.
pub const MAX_BODY: usize = 16 << 20;
/// Longest code, bytes.
const MAX_CODE: usize = 1 << 20;
/// Longest session id, bytes.
const MAX_SESSION_ID: usize = 256;
/// Most environment variables.
const MAX_VARIABLES: usize = 1024;
/// Longest `NAME=value`: the kernel's limit for one string at exec, less a little (execve(2), MAX_ARG_STRLEN).
const MAX_VARIABLE: usize = (128 << 10) - 16;
/// All variables together: the kernel gives arguments and environment a quarter of the stack limit, 2 MiB here.
const MAX_ENVIRONMENT: usize = 1 << 20;
/// Seconds.
const TIMEOUTS: std::ops::RangeInclusive<u64> = 1..=3600;
/// Seconds.
const DEFAULT_TIMEOUT: u64 = 300;
/// Most problems named in one answer.
const MAX_ERRORS: usize = 20;

/// Why a body was refused, and what can still be told about it.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    /// The id, if it could be read.
    pub id: Option<ExecutionId>,
    /// The session, if it could be read.
    pub session_id: String,
    /// Everything that is wrong.
    pub errors: Vec<String>,
}

/// The body as it comes: each field by itself, so that one that is wrong does not hide the others.
type Fields<'a> = BTreeMap<String, &'a RawValue>;

/// Reads fields and collects what is wrong with them.
struct Reader<'a> {
    fields: Fields<'a>,
    errors: Vec<String>,
}

impl<'a> Reader<'a> {
    fn raw(&self, name: &str) -> Option<&'a RawValue> {
        self.fields.get(name).copied()
    }

    fn refuse(&mut self, text: impl Into<String>) {
        if self.errors.len() < MAX_ERRORS {
            self.errors.push(text.into());
        }
    }

    /// A required field of some type.
    fn required<T: Deserialize<'a>>(&mut self, name: &str, expected: &str) -> Option<T> {
        match self.raw(name) {
            None => {
                self.refuse(format!("{name}: is required"));
                None
            }
            Some(raw) => self.typed(name, raw, expected),
        }
    }

    fn optional<T: Deserialize<'a>>(&mut self, name: &str, expected: &str) -> Option<T> {
        let raw = self.raw(name)?;
        self.typed(name, raw, expected)
    }

    fn typed<T: Deserialize<'a>>(&mut self, name: &str, raw: &'a RawValue, expected: &str) -> Option<T> {
        match serde_json::from_str(raw.get()) {
            Ok(value) => Some(value),
            Err(_) => {
                self.refuse(format!("{name}: must be {expected}"));
                None
            }
        }
    }
}

/// Reads the body of `POST /execute`.
///
/// # Errors
/// [`Refused`], with everything that is wrong.
pub fn execution(body: &[u8]) -> Result<Execution, Refused> {
    let fields: Fields = match serde_json::from_slice(body) {
        Ok(fields) => fields,
        Err(error) => {
            let errors = vec![format!("body: must be a JSON object ({error})")];
            return Err(Refused { id: None, session_id: String::new(), errors });
        }
    };
    let mut read = Reader { fields, errors: Vec::new() };

    let id_text: Option<String> = read.required("execution_id", "a string");
    let id = id_text.as_deref().and_then(ExecutionId::parse);
    if id_text.is_some() && id.is_none() {
        read.refuse("execution_id: must be 1 to 128 of A-Z a-z 0-9 _ . - and not start with a dot");
    }
    let mut session_id: String = read.required("session_id", "a string").unwrap_or_default();
    if session_id.len() > MAX_SESSION_ID {
        read.refuse(format!("session_id: must be at most {MAX_SESSION_ID} bytes"));
        session_id.truncate(session_id.floor_char_boundary(MAX_SESSION_ID));
    }
    let code: Option<String> = read.required("code", "a string");
    match &code {
        Some(code) if code.len() > MAX_CODE => read.refuse(format!("code: must be at most {MAX_CODE} bytes")),
        Some(code) if code.trim().is_empty() => read.refuse("code: must not be empty"),
        Some(code) if code.contains('\0') => read.refuse("code: must not hold NUL characters"),
        _ => {}
    }
    let language_name: Option<String> = read.required("language", "a string");
    let language = language_name.as_deref().and_then(Language::parse);
    if let (Some(name), None) = (&language_name, language) {
        let name: String = name.chars().take(40).collect();
        read.refuse(format!("language: {name:?} is not supported by this agent; it runs python and shell"));
    }
    let event = event(&mut read);
    let timeout: Option<u64> = read.optional("timeout", "a whole number of seconds");
    let timeout = timeout.unwrap_or(DEFAULT_TIMEOUT);
    if !TIMEOUTS.contains(&timeout) {
        read.refuse(format!("timeout: must be from {} to {} seconds", TIMEOUTS.start(), TIMEOUTS.end()));
    }
    let environment = environment(&mut read);

    match (id, code, language) {
        (Some(id), Some(code), Some(language)) if read.errors.is_empty() => Ok(Execution {
            id,
            session_id,
            language,
            mode: Mode::Handler,
            code,
            event,
            timeout: Duration::from_secs(timeout),
            environment,
        }),
        (id, ..) => Err(Refused { id, session_id, errors: read.errors }),
    }
}

/// The event stays text: it is the program's to read, and may nest deeper than we would.
fn event(read: &mut Reader) -> String {
    match read.raw("event").map(RawValue::get) {
        None => "{}".to_owned(),
        Some(text) if text.starts_with('{') => text.to_owned(),
        Some(_) => {
            read.refuse("event: must be an object");
            String::new()
        }
    }
}

fn environment(read: &mut Reader) -> BTreeMap<String, String> {
    let variables: BTreeMap<String, String> =
        read.optional("env_vars", "an object whose values are strings").unwrap_or_default();
    if variables.len() > MAX_VARIABLES {
        read.refuse(format!("env_vars: must be at most {MAX_VARIABLES} variables"));
    }
    for problem in variables.iter().filter_map(|(name, value)| variable_problem(name, value)).collect::<Vec<_>>() {
        read.refuse(format!("env_vars: {problem}"));
    }
    if variables.iter().map(|(name, value)| name.len() + value.len() + 2).sum::<usize>() > MAX_ENVIRONMENT {
        read.refuse(format!("env_vars: must be at most {MAX_ENVIRONMENT} bytes in all"));
    }
    variables
}

/// Why a variable can't be given to a program; `None` if it can.
#[must_use]
pub fn variable_problem(name: &str, value: &str) -> Option<String> {
    let shown: String = name.chars().take(40).collect();
    if name.is_empty() || name.contains(['=', '\0']) {
        return Some(format!("{shown:?} is not a name"));
    }
    if value.contains('\0') {
        return Some(format!("the value of {shown} holds a NUL character"));
    }
    (name.len() + value.len() > MAX_VARIABLE).then(|| format!("{shown} is longer than {MAX_VARIABLE} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(body: &str) -> Vec<String> {
        execution(body.as_bytes()).map(|_| Vec::new()).unwrap_or_else(|refused| refused.errors)
    }

    #[test]
    fn a_full_request_and_its_defaults() {
        let body = br#"{"execution_id":"exec_1","session_id":"s","code":"x","language":"bash","more":[1]}"#;
        let execution = execution(body).expect("valid");
        assert_eq!(execution.language, Language::Shell);
        assert_eq!(execution.event, "{}");
        assert_eq!(execution.timeout, Duration::from_secs(300));
    }

    #[test]
    fn all_problems_are_named_at_once_and_the_id_survives() {
        let body = r#"{"execution_id":"e","code":7,"language":"cobol","event":[],"timeout":1.5,"env_vars":{"A":1}}"#;
        let refused = execution(body.as_bytes()).expect_err("invalid");
        assert_eq!(refused.id, ExecutionId::parse("e"));
        for name in ["session_id", "code", "language", "event", "timeout", "env_vars"] {
            assert!(refused.errors.iter().any(|error| error.starts_with(name)), "{name}: {:?}", refused.errors);
        }
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in ["", "[]", "null", "\"x\"", "{", "{\"a\":NaN}", "{}x", "\u{feff}{}"] {
            assert!(!errors(body).is_empty(), "{body:?}");
        }
    }
}
