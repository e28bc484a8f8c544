//! Every setting once: name, default, meaning. The only reader of the environment.
//!
//! A session's own variables reach this process as well (they are meant for user code), so whatever changes isolation is read
//! only under names that start with `AGENT_` or `ISOLATION_`.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use isolation::Limits;
use isolation::profile::Fallbacks;
use thiserror::Error;

/// One setting, for the documentation that `config` prints.
pub struct Setting {
    /// Name of the environment variable.
    pub name: &'static str,
    /// Its default, as text.
    pub default: &'static str,
    /// What it is, with its unit.
    pub doc: &'static str,
    /// Never printed.
    pub secret: bool,
}

const fn setting(name: &'static str, default: &'static str, doc: &'static str) -> Setting {
    Setting { name, default, doc, secret: false }
}

const fn secret(name: &'static str, doc: &'static str) -> Setting {
    Setting { name, default: "", doc, secret: true }
}

/// The table.
pub const SETTINGS: &[Setting] = &[
    setting("CONTROL_PLANE_URL", "", "base URL of the control plane; without it nothing is called"),
    secret("INTERNAL_API_TOKEN", "bearer token for the control plane"),
    secret("AGENT_API_TOKEN", "bearer token that callers must send, on all but /health"),
    setting("AGENT_LISTEN", "", "address and port; 0.0.0.0 with a control plane, else 127.0.0.1, and EXECUTOR_PORT"),
    setting("EXECUTOR_PORT", "8080", "port, when AGENT_LISTEN is not set"),
    setting("AGENT_ADDRESS_FILE", "", "file that gets the address once it is listened on"),
    setting("SESSION_ID", "", "session that this agent serves"),
    setting("CONTAINER_ID", "", "name of the container in callbacks; else POD_NAME, HOSTNAME, the host name"),
    setting("POD_NAME", "", "name of the pod in callbacks"),
    setting("HOSTNAME", "", "see CONTAINER_ID"),
    setting("WORKSPACE_PATH", "/workspace", "the session's folder; when it doesn't exist, one below STATE_DIR"),
    setting("STATE_DIR", "/var/lib/sandbox-agent", "accepted executions and results; else the user's state folder"),
    setting("AGENT_CONCURRENCY", "4", "executions at a time"),
    setting("AGENT_QUEUE", "256", "executions that may wait"),
    setting("AGENT_KEEP_RESULTS", "1000", "delivered results kept for GET /v1/executions/{id}"),
    setting("AGENT_PYTHON", "", "Python interpreter; else the first python3 on PATH that the sandbox can reach"),
    setting("AGENT_SHELL", "/bin/bash", "shell for shell code, as seen inside"),
    setting(
        "AGENT_PACKAGES_PATH",
        "/opt/sandbox-venv",
        "session packages, read-only on Python's path when the folder exists",
    ),
    setting("AGENT_CAPTURE_BYTES", "10485760", "bytes of stdout and of stderr kept per execution, first and last half"),
    setting(
        "AGENT_CALLBACK_TEXT_BYTES",
        "65535",
        "bytes of stdout, stderr and return value that the control plane takes",
    ),
    setting("AGENT_MEMORY_LIMIT_MB", "1024", "MiB of resident memory per sandbox"),
    setting("AGENT_PROCESSES", "256", "processes and threads per sandbox"),
    setting("AGENT_OPEN_FILES", "1024", "open files per process"),
    setting("AGENT_FILE_LIMIT_MB", "1024", "MiB per file"),
    setting("AGENT_TMP_LIMIT_MB", "256", "MiB of /tmp per sandbox"),
    setting("AGENT_SHM_LIMIT_MB", "64", "MiB of /dev/shm per sandbox"),
    setting("AGENT_SANDBOX_USER", "1000:1000", "uid:gid outside when the agent is root and the workspace is root's"),
    setting("AGENT_BWRAP", "", "path of bubblewrap; else bwrap in the system folders"),
    setting("ISOLATION_FALLBACKS", "", "weaker layers accepted by name: proc-host, nested-userns"),
    setting("LOG_LEVEL", "info", "error, warn, info, debug or trace"),
    setting("LOG_FORMAT", "", "json or text; json when serving and not on a terminal"),
    setting("DISABLE_BWRAP", "", "has no effect: code is never run unsandboxed"),
];

/// Variables that stay readable in our own environment after start: libraries ask for them later.
pub const KEPT_VARIABLES: &[&str] = &["PATH", "HOME", "LANG", "TERM", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR"];

/// All settings, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Base URL without a slash at the end.
    pub control_plane_url: Option<String>,
    /// Bearer token for the control plane.
    pub internal_api_token: Option<String>,
    /// Bearer token that callers must send.
    pub api_token: Option<String>,
    /// Where to listen.
    pub listen: SocketAddr,
    /// File that gets the address.
    pub address_file: Option<PathBuf>,
    /// Name of this container for the control plane.
    pub container_id: String,
    /// Name of this pod, when known.
    pub pod_name: Option<String>,
    /// The session's folder.
    pub workspace: PathBuf,
    /// Our own folder.
    pub state_dir: PathBuf,
    /// Executions at a time.
    pub concurrency: usize,
    /// Executions that may wait.
    pub queue: usize,
    /// Delivered results kept.
    pub keep_results: usize,
    /// Python interpreter, when chosen.
    pub python: Option<PathBuf>,
    /// Shell inside.
    pub shell: PathBuf,
    /// Session packages.
    pub packages: PathBuf,
    /// Where interpreters are looked for.
    pub path: String,
    /// Bytes of output kept per stream.
    pub capture_bytes: usize,
    /// Bytes of text in a callback.
    pub callback_text_bytes: usize,
    /// Limits of each sandbox.
    pub limits: Limits,
    /// User outside for an agent that is root.
    pub sandbox_user: (u32, u32),
    /// bubblewrap, when chosen.
    pub bwrap: Option<PathBuf>,
    /// Layers that may be weaker.
    pub fallbacks: Fallbacks,
    /// Log level.
    pub log_level: String,
    /// Log format, when chosen.
    pub log_format: Option<LogFormat>,
    /// Things worth a line in the log, once there is one.
    pub warnings: Vec<String>,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// A value that can't be used.
#[derive(Debug, Error)]
#[error("{name}={value:?}: {problem}")]
pub struct ConfigError {
    name: &'static str,
    value: String,
    problem: String,
}

/// The variables of a process, as given.
pub type Environment = BTreeMap<String, String>;

/// Reads the environment of this process; what is not UTF-8 is left out.
#[must_use]
pub fn environment() -> Environment {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// Reads values and remembers what was wrong with them.
struct Reader<'a> {
    variables: &'a Environment,
    errors: Vec<ConfigError>,
}

impl Reader<'_> {
    /// The value if it is set and not empty.
    fn text(&self, name: &str) -> Option<String> {
        self.variables.get(name).filter(|value| !value.is_empty()).cloned()
    }

    fn refuse(&mut self, name: &'static str, value: String, problem: impl Into<String>) {
        self.errors.push(ConfigError { name, value, problem: problem.into() });
    }

    fn number(&mut self, name: &'static str, least: u64, most: u64) -> u64 {
        let default = SETTINGS.iter().find(|setting| setting.name == name).map_or("", |setting| setting.default);
        let value = self.text(name).unwrap_or_else(|| default.to_owned());
        match value.parse() {
            Ok(number) if (least..=most).contains(&number) => number,
            _ => {
                self.refuse(name, value, format!("not a whole number from {least} to {most}"));
                least
            }
        }
    }
}

impl Config {
    /// Checks all settings. Touches the file system only to choose folders.
    ///
    /// # Errors
    /// Everything that is wrong, not only the first.
    pub fn read(variables: &Environment) -> Result<Self, Vec<ConfigError>> {
        let mut read = Reader { variables, errors: Vec::new() };
        let mut warnings = Vec::new();
        let control_plane_url = read.text("CONTROL_PLANE_URL").filter(|url| url != "None");
        let control_plane_url = control_plane_url.map(|url| url.trim_end_matches('/').to_owned());
        if let Some(url) = &control_plane_url
            && !(url.starts_with("http://") || url.starts_with("https://"))
        {
            read.refuse("CONTROL_PLANE_URL", url.clone(), "not an http:// or https:// URL");
        }
        let port = read.number("EXECUTOR_PORT", 0, u64::from(u16::MAX));
        let host = if control_plane_url.is_some() { "0.0.0.0" } else { "127.0.0.1" };
        let listen_text = read.text("AGENT_LISTEN").unwrap_or_else(|| format!("{host}:{port}"));
        let listen = listen_text.parse().unwrap_or_else(|_| {
            read.refuse("AGENT_LISTEN", listen_text, "not an address with a port, such as 127.0.0.1:8080");
            SocketAddr::from(([127, 0, 0, 1], 0))
        });
        let pod_name = read.text("POD_NAME");
        let host_name = || nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        let container_id = read
            .text("CONTAINER_ID")
            .or_else(|| pod_name.clone())
            .or_else(|| read.text("HOSTNAME"))
            .or_else(host_name)
            .unwrap_or_else(|| "unknown".to_owned());
        let fallbacks = fallbacks(&mut read);
        let user_text = read.text("AGENT_SANDBOX_USER").unwrap_or_else(|| "1000:1000".to_owned());
        let sandbox_user =
            user_text.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
        let sandbox_user = match sandbox_user {
            Some((uid @ 1.., gid @ 1..)) => (uid, gid),
            _ => {
                read.refuse("AGENT_SANDBOX_USER", user_text, "not uid:gid with both above 0");
                (1000, 1000)
            }
        };
        let log_level = read.text("LOG_LEVEL").unwrap_or_else(|| "info".to_owned()).to_lowercase();
        // The platform writes levels the way Python does.
        let log_level = if log_level == "warning" { "warn".to_owned() } else { log_level };
        if !["error", "warn", "info", "debug", "trace"].contains(&log_level.as_str()) {
            read.refuse("LOG_LEVEL", log_level.clone(), "not error, warn, info, debug or trace");
        }
        let log_format = match read.text("LOG_FORMAT").as_deref() {
            None => None,
            Some("json") => Some(LogFormat::Json),
            Some("text" | "console" | "plain") => Some(LogFormat::Text),
            Some(other) => {
                read.refuse("LOG_FORMAT", other.to_owned(), "not json or text");
                None
            }
        };
        if read.text("DISABLE_BWRAP").is_some_and(|value| value != "false" && value != "0") {
            warnings.push(
                "DISABLE_BWRAP is set and has no effect: this agent never runs code without a sandbox".to_owned(),
            );
        }
        let state_dir = state_dir(&mut read, &mut warnings);
        let workspace = workspace(&mut read, &state_dir);
        const MIB: u64 = 1 << 20;
        let limits = Limits {
            processes: read.number("AGENT_PROCESSES", 4, 1 << 20),
            open_files: read.number("AGENT_OPEN_FILES", 64, 1 << 20),
            file_bytes: read.number("AGENT_FILE_LIMIT_MB", 1, 1 << 20) * MIB,
            memory_bytes: read.number("AGENT_MEMORY_LIMIT_MB", 16, 1 << 24) * MIB,
            tmp_bytes: read.number("AGENT_TMP_LIMIT_MB", 1, 1 << 20) * MIB,
            shm_bytes: read.number("AGENT_SHM_LIMIT_MB", 1, 1 << 20) * MIB,
        };
        let config = Self {
            control_plane_url,
            internal_api_token: read.text("INTERNAL_API_TOKEN"),
            api_token: read.text("AGENT_API_TOKEN"),
            listen,
            address_file: read.text("AGENT_ADDRESS_FILE").map(PathBuf::from),
            container_id,
            pod_name,
            workspace,
            state_dir,
            concurrency: read.number("AGENT_CONCURRENCY", 1, 1024) as usize,
            queue: read.number("AGENT_QUEUE", 1, 100_000) as usize,
            keep_results: read.number("AGENT_KEEP_RESULTS", 0, 1_000_000) as usize,
            python: read.text("AGENT_PYTHON").map(PathBuf::from),
            shell: read.text("AGENT_SHELL").map_or_else(|| PathBuf::from("/bin/bash"), PathBuf::from),
            packages: read
                .text("AGENT_PACKAGES_PATH")
                .map_or_else(|| PathBuf::from("/opt/sandbox-venv"), PathBuf::from),
            path: read.text("PATH").unwrap_or_else(|| isolation::profile::PATH_INSIDE.to_owned()),
            capture_bytes: read.number("AGENT_CAPTURE_BYTES", 1024, 1 << 30) as usize,
            callback_text_bytes: read.number("AGENT_CALLBACK_TEXT_BYTES", 1024, 1 << 24) as usize,
            limits,
            sandbox_user,
            bwrap: read.text("AGENT_BWRAP").map(PathBuf::from),
            fallbacks,
            log_level,
            log_format,
            warnings,
        };
        if config.state_dir.starts_with(&config.workspace) {
            let value = config.state_dir.display().to_string();
            read.refuse("STATE_DIR", value, "lies in the workspace, where user code could read it");
        }
        if read.errors.is_empty() { Ok(config) } else { Err(read.errors) }
    }
}

fn fallbacks(read: &mut Reader) -> Fallbacks {
    let mut fallbacks = Fallbacks::default();
    for name in read.text("ISOLATION_FALLBACKS").unwrap_or_default().split(',').filter(|name| !name.trim().is_empty()) {
        match name.trim() {
            "proc-host" => fallbacks.host_proc = true,
            "nested-userns" => fallbacks.nested_user_namespaces = true,
            other => read.refuse("ISOLATION_FALLBACKS", other.to_owned(), "not proc-host or nested-userns"),
        }
    }
    fallbacks
}

/// The folder asked for; else the first that can be had: the system's, the user's, a private one below `/tmp`.
fn state_dir(read: &mut Reader, warnings: &mut Vec<String>) -> PathBuf {
    if let Some(chosen) = read.text("STATE_DIR") {
        let path = PathBuf::from(&chosen);
        if !path.is_absolute() {
            read.refuse("STATE_DIR", chosen, "not an absolute path");
        } else if let Err(error) = private_folder(&path) {
            read.refuse("STATE_DIR", chosen, format!("can't be used: {error}"));
        }
        return path;
    }
    let home = read.text("HOME").map(|home| PathBuf::from(home).join(".local/state/sandbox-agent"));
    let users = read.text("XDG_STATE_HOME").map(|state| PathBuf::from(state).join("sandbox-agent")).or(home);
    let last = std::env::temp_dir().join(format!("sandbox-agent-{}", nix::unistd::geteuid()));
    let candidates = [Some(PathBuf::from("/var/lib/sandbox-agent")), users].into_iter().flatten();
    if let Some(found) = candidates.into_iter().find(|path| path.is_absolute() && private_folder(path).is_ok()) {
        return found;
    }
    match private_folder(&last) {
        Ok(()) => {
            warnings.push(format!("results are kept in {}, which may not outlive this container", last.display()))
        }
        Err(error) => {
            read.refuse("STATE_DIR", last.display().to_string(), format!("no folder for results can be had: {error}"));
        }
    }
    last
}

/// Makes the folder if need be, and makes sure that it is ours, writable and closed to others.
fn private_folder(path: &Path) -> std::io::Result<()> {
    if !path.is_dir() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    }
    let found = fs::symlink_metadata(path)?;
    if !found.is_dir() || found.uid() != nix::unistd::geteuid().as_raw() {
        return Err(std::io::Error::other("it is not a folder of the agent's user"));
    }
    if found.mode() & 0o077 != 0 {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
    }
    tempfile::tempfile_in(path).map(drop)
}

fn workspace(read: &mut Reader, state_dir: &Path) -> PathBuf {
    // The platform sets this name twice, once as an s3:// URL that only its mount script understands.
    let chosen = read.text("WORKSPACE_PATH").filter(|path| !path.starts_with("s3://"));
    if let Some(chosen) = &chosen
        && !Path::new(chosen).is_absolute()
    {
        read.refuse("WORKSPACE_PATH", chosen.clone(), "not an absolute path");
    }
    match chosen {
        Some(chosen) => PathBuf::from(chosen),
        None if Path::new("/workspace").is_dir() => PathBuf::from("/workspace"),
        None => state_dir.join("workspace"),
    }
}

/// The table with values and where they come from, for `config`.
#[must_use]
pub fn describe(variables: &Environment) -> String {
    let mut text = String::new();
    for setting in SETTINGS {
        let given = variables.get(setting.name).filter(|value| !value.is_empty());
        let (value, origin) = match given {
            Some(_) if setting.secret => ("********", "environment"),
            Some(value) => (value.as_str(), "environment"),
            None => (setting.default, "default"),
        };
        text.push_str(&format!("{}={value}  ({origin})  {}\n", setting.name, setting.doc));
    }
    text
}
