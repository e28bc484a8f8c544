//! How each language is started, and the bootstrap protocol (`runner-images/CONTRACT.md`).

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use isolation::bwrap::Program;
use isolation::policy::{DataFile, SUPPLIED_INSIDE, is_too_wide};
use serde::Serialize;
use serde_json::value::RawValue;
use thiserror::Error;

use crate::execution::{Diagnostic, Execution, Language};

/// The program inside that loads user code and speaks the descriptor protocol.
const PYTHON_BOOTSTRAP: &str = include_str!("../../runner-images/python/bootstrap.py");
/// Largest return value, bytes of JSON.
pub const MAX_RETURN_BYTES: usize = 16 << 20;
/// Largest diagnostic, bytes of JSON.
const MAX_DIAGNOSTIC_BYTES: usize = 256 << 10;

/// An interpreter and what must be visible for it to work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interpreter {
    /// Absolute path, the same inside.
    pub executable: PathBuf,
    /// Folders outside of the base system that it lives in.
    pub prefixes: Vec<PathBuf>,
}

/// Why an interpreter can't be used.
#[derive(Debug, Error)]
pub enum InterpreterError {
    /// Nothing there.
    #[error("no interpreter at {0:?}")]
    Missing(PathBuf),
    /// Its folder would show too much.
    #[error("{executable:?} is installed right in {prefix:?}, which can't be shown to a sandbox")]
    TooWide {
        /// The interpreter.
        executable: PathBuf,
        /// Its prefix.
        prefix: PathBuf,
    },
    /// No candidate on the search path.
    #[error("no python3 on PATH; install one or set AGENT_PYTHON")]
    NotFound,
}

/// Folders that every sandbox has already.
const BASE_FOLDERS: [&str; 5] = ["/usr", "/bin", "/sbin", "/lib", "/lib64"];

impl Interpreter {
    /// The Python that was chosen, or else the first usable one on `path`.
    ///
    /// # Errors
    /// [`InterpreterError`].
    pub fn python(chosen: Option<&Path>, path: &str) -> Result<Self, InterpreterError> {
        if let Some(chosen) = chosen {
            return Self::locate(chosen);
        }
        let candidates = path.split(':').filter(|folder| folder.starts_with('/'));
        let found = candidates.map(|folder| Path::new(folder).join("python3")).filter(|candidate| candidate.is_file());
        found.filter_map(|candidate| Self::locate(&candidate).ok()).next().ok_or(InterpreterError::NotFound)
    }

    /// Finds the real executable behind links, virtual environments and version-manager shims, and the folders it needs.
    fn locate(candidate: &Path) -> Result<Self, InterpreterError> {
        let missing = || InterpreterError::Missing(candidate.to_owned());
        if is_script(candidate) {
            let real = behind_shim(candidate).ok_or_else(missing)?;
            return Self::locate(&real);
        }
        let real = fs::canonicalize(candidate).map_err(|_| missing())?;
        let mut prefixes = Vec::new();
        let mut executable = real.clone();
        // A virtual environment is named by its own path, or Python would not know that it is in one.
        if let Some(environment) = prefix_of(candidate).filter(|prefix| prefix.join("pyvenv.cfg").is_file()) {
            prefixes.push(environment.to_owned());
            executable = candidate.to_owned();
        }
        prefixes.extend(prefix_of(&real).map(Path::to_owned));
        prefixes.retain(|prefix| !BASE_FOLDERS.iter().any(|base| prefix.starts_with(base)));
        match prefixes.iter().find(|prefix| is_too_wide(prefix)) {
            Some(prefix) => Err(InterpreterError::TooWide { executable, prefix: prefix.clone() }),
            None => Ok(Self { executable, prefixes }),
        }
    }
}

/// `/opt/python` for `/opt/python/bin/python3`.
fn prefix_of(executable: &Path) -> Option<&Path> {
    executable.parent()?.parent()
}

fn is_script(path: &Path) -> bool {
    let mut start = [0; 2];
    fs::File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == *b"#!"
}

/// A pyenv shim is `ROOT/shims/NAME`; the version in force stands in `ROOT/version`.
fn behind_shim(shim: &Path) -> Option<PathBuf> {
    let folder = shim.parent().filter(|folder| folder.ends_with("shims"))?;
    let root = folder.parent()?;
    let versions = fs::read_to_string(root.join("version")).ok()?;
    let name = shim.file_name()?;
    versions
        .lines()
        .map(|line| root.join("versions").join(line.trim()).join("bin").join(name))
        .find(|path| path.is_file())
}

/// The interpreters of this machine.
#[derive(Debug, Clone)]
pub struct Interpreters {
    /// Python, or why there is none.
    pub python: Result<Interpreter, String>,
    /// The shell, as seen inside.
    pub shell: PathBuf,
    /// Session packages, when the folder exists.
    pub packages: Option<PathBuf>,
}

/// Everything that starting one execution takes.
#[derive(Debug)]
pub struct Prepared {
    /// What to start.
    pub program: Program,
    /// Files to supply.
    pub files: Vec<DataFile>,
    /// Further variables.
    pub environment: Vec<(String, String)>,
    /// Folders to show.
    pub read_only: Vec<PathBuf>,
    /// Folders for the front of `PATH`.
    pub path: Vec<PathBuf>,
    /// What to send on the request descriptor; `None` when the program speaks no protocol.
    pub request: Option<Vec<u8>>,
}

impl Interpreters {
    /// Turns an execution into a program, its files and its request.
    ///
    /// # Errors
    /// A sentence for the operator when the interpreter is missing.
    pub fn prepare(&self, execution: &Execution) -> Result<Prepared, String> {
        match execution.language {
            Language::Python => self.prepare_python(execution),
            Language::Shell => Ok(self.prepare_shell(execution)),
        }
    }

    fn prepare_python(&self, execution: &Execution) -> Result<Prepared, String> {
        let python = self.python.as_ref().map_err(Clone::clone)?;
        let bootstrap = supplied("bootstrap.py");
        let mut read_only = python.prefixes.clone();
        let mut environment = Vec::new();
        if let Some(packages) = &self.packages {
            read_only.push(packages.clone());
            environment.push(("PYTHONPATH".to_owned(), packages.display().to_string()));
        }
        // -u: what was printed before a kill must have left the process. -B: no bytecode among the user's files.
        let argv: Vec<OsString> =
            vec![python.executable.clone().into(), "-u".into(), "-B".into(), bootstrap.clone().into()];
        let header = Header {
            version: 1,
            mode: execution.mode.name(),
            execution_id: execution.id.as_str(),
            session_id: &execution.session_id,
            timeout_ms: execution.timeout.as_millis() as u64,
            argv: &[],
            max_return_bytes: MAX_RETURN_BYTES,
            code_dir: "/tmp/.code",
        };
        let header = serde_json::to_vec(&header).map_err(|error| error.to_string())?;
        let mut request = Vec::with_capacity(header.len() + execution.code.len() + execution.event.len() + 32);
        let frames = [(b'H', header.as_slice()), (b'C', execution.code.as_bytes()), (b'E', execution.event.as_bytes())];
        for (kind, payload) in frames.into_iter().chain([(b'G', [].as_slice())]) {
            request.push(kind);
            request.extend_from_slice(&(payload.len() as u32).to_be_bytes());
            request.extend_from_slice(payload);
        }
        let own_folder = python.executable.parent().filter(|_| !python.prefixes.is_empty());
        Ok(Prepared {
            program: Program { argv },
            files: vec![DataFile { path: bootstrap, bytes: PYTHON_BOOTSTRAP.as_bytes().to_vec() }],
            environment,
            read_only,
            path: own_folder.map(Path::to_owned).into_iter().collect(),
            request: Some(request),
        })
    }

    fn prepare_shell(&self, execution: &Execution) -> Prepared {
        let (script, event) = (supplied("main.sh"), supplied("event.json"));
        Prepared {
            program: Program { argv: vec![self.shell.clone().into(), script.clone().into()] },
            environment: vec![("EVENT_FILE".to_owned(), event.display().to_string())],
            files: vec![
                DataFile { path: script, bytes: execution.code.clone().into_bytes() },
                DataFile { path: event, bytes: execution.event.clone().into_bytes() },
            ],
            read_only: Vec::new(),
            path: Vec::new(),
            request: None,
        }
    }
}

fn supplied(name: &str) -> PathBuf {
    Path::new(SUPPLIED_INSIDE).join(name)
}

/// The first frame of a request.
#[derive(Serialize)]
struct Header<'a> {
    version: u32,
    mode: &'a str,
    execution_id: &'a str,
    session_id: &'a str,
    timeout_ms: u64,
    argv: &'a [&'a str],
    max_return_bytes: usize,
    code_dir: &'a str,
}

/// Reads what comes back on the result descriptor. Any byte of it may be hostile: sizes are bounded before anything is kept.
#[derive(Debug, Default)]
pub struct ResultReader {
    header: Vec<u8>,
    payload: Vec<u8>,
    wanted: Option<(u8, usize)>,
    answer: Answer,
}

/// What a program said about itself.
#[derive(Debug, Default)]
pub struct Answer {
    /// What the handler returned: strict JSON without lone surrogates.
    pub return_value: Option<Box<RawValue>>,
    /// The structured error.
    pub diagnostic: Option<Diagnostic>,
    /// The exit code that it meant to end with.
    pub exit_code: Option<i32>,
    /// The descriptor carried something else than the protocol.
    pub is_broken: bool,
}

const FRAME_HEADER: usize = 5;

impl ResultReader {
    /// Takes the next bytes. After a violation everything is read and dropped, so that the program is not held up.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.answer.is_broken {
            let Some((kind, length)) = self.wanted else {
                let (now, later) = bytes.split_at(bytes.len().min(FRAME_HEADER - self.header.len()));
                self.header.extend_from_slice(now);
                bytes = later;
                if let [kind, a, b, c, d] = *self.header.as_slice() {
                    let length = u32::from_be_bytes([a, b, c, d]) as usize;
                    self.header.clear();
                    let limit = match kind {
                        b'R' => MAX_RETURN_BYTES,
                        b'D' => MAX_DIAGNOSTIC_BYTES,
                        b'X' => 16,
                        _ => 0,
                    };
                    self.answer.is_broken = length == 0 || length > limit;
                    self.wanted = Some((kind, length));
                }
                continue;
            };
            let (now, later) = bytes.split_at(bytes.len().min(length - self.payload.len()));
            self.payload.extend_from_slice(now);
            bytes = later;
            if self.payload.len() == length {
                let payload = std::mem::take(&mut self.payload);
                self.wanted = None;
                self.take_frame(kind, payload);
            }
        }
    }

    /// The end of the program: an unfinished frame counts as a violation.
    #[must_use]
    pub fn finish(mut self) -> Answer {
        self.answer.is_broken |= self.wanted.is_some() || !self.header.is_empty();
        self.answer
    }

    fn take_frame(&mut self, kind: u8, mut payload: Vec<u8>) {
        match kind {
            b'R' => {
                replace_lone_surrogates(&mut payload);
                match String::from_utf8(payload).ok().and_then(|text| RawValue::from_string(text).ok()) {
                    Some(value) => self.answer.return_value = Some(value),
                    None => self.answer.is_broken = true,
                }
            }
            b'D' => match serde_json::from_slice(&payload) {
                Ok(diagnostic) => self.answer.diagnostic = Some(diagnostic),
                Err(_) => self.answer.is_broken = true,
            },
            _ => match std::str::from_utf8(&payload).ok().and_then(|text| text.parse().ok()) {
                Some(code @ 0..=255) => self.answer.exit_code = Some(code),
                _ => self.answer.is_broken = true,
            },
        }
    }
}

/// Turns `\ud800`-like escapes that have no partner into `\ufffd`, in place: JSON allows them, UTF-8 and the control plane
/// do not.
fn replace_lone_surrogates(json: &mut [u8]) {
    fn unit(json: &[u8], at: usize) -> Option<u32> {
        let hex = json.get(at..at + 6)?.strip_prefix(b"\\u")?;
        u32::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()
    }
    let mut at = 0;
    while at < json.len() {
        if json[at] != b'\\' {
            at += 1;
            continue;
        }
        match unit(json, at) {
            Some(0xD800..=0xDBFF) if matches!(unit(json, at + 6), Some(0xDC00..=0xDFFF)) => at += 12,
            Some(0xD800..=0xDFFF) => {
                json[at..at + 6].copy_from_slice(b"\\ufffd");
                at += 6;
            }
            Some(_) => at += 6,
            None => at += 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    fn read(bytes: &[u8], step: usize) -> Answer {
        let mut reader = ResultReader::default();
        bytes.chunks(step).for_each(|chunk| reader.push(chunk));
        reader.finish()
    }

    #[test]
    fn frames_are_read_however_they_are_cut() {
        let bytes = [frame(b'R', br#"{"a":[1,2]}"#), frame(b'X', b"0")].concat();
        for step in 1..bytes.len() {
            let answer = read(&bytes, step);
            assert!(!answer.is_broken);
            assert_eq!(answer.return_value.map(|value| value.get().to_owned()), Some(r#"{"a":[1,2]}"#.to_owned()));
            assert_eq!(answer.exit_code, Some(0));
        }
    }

    #[test]
    fn garbage_is_a_violation_and_bounded() {
        let huge = [b"R".as_slice(), &u32::MAX.to_be_bytes()].concat();
        let hostile: [&[u8]; 7] = [
            b"hello world",
            b"R",
            &frame(b'R', b"NaN"),
            &frame(b'R', b"\"\xFF\""),
            &frame(b'X', b"-1"),
            &frame(b'Z', b"x"),
            &huge,
        ];
        for bytes in hostile {
            assert!(read(bytes, 3).is_broken, "{bytes:?}");
        }
    }

    #[test]
    fn lone_surrogates_become_the_replacement_character() {
        let value =
            |text: &str| read(&frame(b'R', text.as_bytes()), 64).return_value.map(|value| value.get().to_owned());
        assert_eq!(value(r#""\ud83d\ude00""#).as_deref(), Some(r#""\ud83d\ude00""#));
        assert_eq!(value(r#""\ud83dx""#).as_deref(), Some(r#""\ufffdx""#));
        assert_eq!(value(r#""\\ud83d""#).as_deref(), Some(r#""\\ud83d""#));
    }
}
