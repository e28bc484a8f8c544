//! The complete description of one sandbox, as plain data.
//!
//! A [`Policy`] says what a sandbox may see and use; nothing in this module touches the system. `profile` fills one in,
//! `bwrap` turns it into arguments, `rlimits` into resource limits. [`Policy::validate`] is the last check before either.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Serialize;
use thiserror::Error;

/// Where the session's folder appears inside every sandbox.
pub const WORKSPACE_INSIDE: &str = "/workspace";
/// The folder inside that holds what the agent itself supplies (bootstrap, scripts, event files).
pub const SUPPLIED_INSIDE: &str = "/run/sandbox";
/// User and group id inside. Never 0; mapped to an unprivileged user outside.
pub const INSIDE_ID: u32 = 1000;

/// What one sandbox may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Policy {
    /// Name of the profile that this policy was made from (`execute`, `install`).
    pub profile: &'static str,
    /// The base system: `/usr` and what belongs to it, read-only.
    pub system: Vec<SystemPath>,
    /// Single files and folders of `/etc`, read-only: (path outside, path inside).
    pub etc: Vec<(PathBuf, PathBuf)>,
    /// Further folders that appear read-only at their own path (an interpreter's prefix, installed packages).
    pub read_only: Vec<PathBuf>,
    /// Small files made from bytes, read-only, owned by nobody who is inside.
    pub files: Vec<DataFile>,
    /// The session's folder.
    pub workspace: WorkspaceMount,
    /// How `/proc` is made.
    pub proc: ProcMount,
    /// Files of a fresh `/proc` that tell about the host and that no program needs; covered by `/dev/null`.
    pub hidden: Vec<PathBuf>,
    /// Whether the kernel is told to refuse further user namespaces inside (`--disable-userns`).
    pub disable_user_namespaces: bool,
    /// Whether the sandbox keeps the network namespace of the agent. Off for every execution.
    pub share_network: bool,
    /// The whole environment of the program.
    pub environment: BTreeMap<String, String>,
    /// Resource limits.
    pub limits: Limits,
    /// Name of the seccomp profile.
    pub seccomp: &'static str,
}

/// One entry of the base system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum SystemPath {
    /// A folder that is bound read-only at its own path.
    Folder(PathBuf),
    /// A symbolic link that is made anew: (target, path inside), for example (`usr/bin`, `/bin`) after the usr merge.
    Link(PathBuf, PathBuf),
}

/// A file whose contents the agent supplies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DataFile {
    /// Absolute path inside.
    pub path: PathBuf,
    /// Contents; handed over by descriptor.
    #[serde(skip)]
    pub bytes: Vec<u8>,
}

/// The session's folder in the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WorkspaceMount {
    /// The folder outside.
    pub host: PathBuf,
    /// Whether the program may write to it.
    pub writable: bool,
}

/// How `/proc` is made inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProcMount {
    /// A fresh procfs of the sandbox's own process namespace.
    Fresh,
    /// The procfs around the agent, read-only: command lines of all processes there are readable. Only as a named fallback.
    HostReadOnly,
}

/// Resource limits of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Processes and threads (`RLIMIT_NPROC`, counted in the sandbox's own user namespace).
    pub processes: u64,
    /// Open files per process (`RLIMIT_NOFILE`).
    pub open_files: u64,
    /// Size of one file in bytes (`RLIMIT_FSIZE`).
    pub file_bytes: u64,
    /// Resident memory of the whole tree in bytes, held by the watchdog.
    pub memory_bytes: u64,
    /// Size of `/tmp` in bytes.
    pub tmp_bytes: u64,
    /// Size of `/dev/shm` in bytes.
    pub shm_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        const MIB: u64 = 1 << 20;
        Self {
            processes: 256,
            open_files: 1024,
            file_bytes: 1024 * MIB,
            memory_bytes: 1024 * MIB,
            tmp_bytes: 256 * MIB,
            shm_bytes: 64 * MIB,
        }
    }
}

/// Why a policy can't be carried out as written.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PolicyError {
    /// A path is relative, has `..` in it, or holds a NUL byte.
    #[error("{what} path {path:?} is not absolute and plain")]
    Path {
        /// Which field it stands in.
        what: &'static str,
        /// The offending path.
        path: PathBuf,
    },
    /// A folder is too wide to be shown to a program.
    #[error("{path:?} may not be bound into a sandbox: it would show more than an interpreter's prefix")]
    TooWide {
        /// The offending path.
        path: PathBuf,
    },
    /// An environment variable can't be passed to a program.
    #[error("environment variable {name:?} has an empty name, '=' or NUL in its name, or NUL in its value")]
    Variable {
        /// Its name.
        name: String,
    },
    /// A limit of zero would stop every program.
    #[error("limit {name} is zero")]
    ZeroLimit {
        /// Its name.
        name: &'static str,
    },
}

impl Policy {
    /// Checks what the types can't express.
    ///
    /// # Errors
    /// The first [`PolicyError`] found.
    pub fn validate(&self) -> Result<(), PolicyError> {
        for entry in &self.system {
            match entry {
                SystemPath::Folder(path) | SystemPath::Link(_, path) => plain("system", path)?,
            }
        }
        for (outside, inside) in &self.etc {
            plain("etc", outside)?;
            plain("etc", inside)?;
        }
        for path in &self.read_only {
            plain("read-only", path)?;
            if is_too_wide(path) {
                return Err(PolicyError::TooWide { path: path.clone() });
            }
        }
        for file in &self.files {
            plain("file", &file.path)?;
        }
        plain("workspace", &self.workspace.host)?;
        for (name, value) in &self.environment {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                return Err(PolicyError::Variable { name: name.clone() });
            }
        }
        let limits = [
            ("processes", self.limits.processes),
            ("open_files", self.limits.open_files),
            ("file_bytes", self.limits.file_bytes),
            ("memory_bytes", self.limits.memory_bytes),
            ("tmp_bytes", self.limits.tmp_bytes),
            ("shm_bytes", self.limits.shm_bytes),
        ];
        match limits.iter().find(|(_, value)| *value == 0) {
            Some((name, _)) => Err(PolicyError::ZeroLimit { name }),
            None => Ok(()),
        }
    }
}

/// True for folders that hold far more than one interpreter or package set: the root, its children that hold other
/// people's data, and home folders themselves.
#[must_use]
pub fn is_too_wide(path: &Path) -> bool {
    let depth = path.components().count().saturating_sub(1);
    let top = path.components().nth(1).map(|part| part.as_os_str().to_owned());
    match top.as_deref().and_then(|name| name.to_str()) {
        None => true,
        Some("home" | "mnt" | "media" | "srv") => depth <= 2,
        Some("proc" | "sys" | "dev" | "etc" | "boot" | "run") => true,
        Some("root" | "var" | "tmp" | "opt") => depth <= 1,
        Some(_) => false,
    }
}

fn plain(what: &'static str, path: &Path) -> Result<(), PolicyError> {
    let text = path.as_os_str().as_encoded_bytes();
    let ok = path.is_absolute()
        && !text.contains(&0)
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if ok { Ok(()) } else { Err(PolicyError::Path { what, path: path.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_folders_are_too_wide_but_an_interpreter_below_is_not() {
        for wide in ["/", "/root", "/home", "/home/ada", "/etc", "/etc/python", "/tmp", "/proc/1/root", "/var"] {
            assert!(is_too_wide(Path::new(wide)), "{wide}");
        }
        for fine in ["/root/.pyenv/versions/3.11.7", "/home/ada/.local/share/uv/python/x", "/opt/python", "/usr/local"]
        {
            assert!(!is_too_wide(Path::new(fine)), "{fine}");
        }
    }
}
