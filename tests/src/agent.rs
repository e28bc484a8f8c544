//! One running `sandbox-agent serve`, with folders of its own that outlive a restart.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::chown;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::http::{self, Response};
use crate::submission::Submission;
use crate::{processes, wait};

/// States that an execution never leaves.
pub const TERMINAL_STATES: [&str; 5] = ["succeeded", "failed", "timed_out", "cancelled", "crashed"];

/// How long the agent may take to listen. Generous: starting is measured elsewhere.
const START_LIMIT: Duration = Duration::from_secs(15);
/// How long an execution may take to end when a test names no bound of its own.
const END_LIMIT: Duration = Duration::from_secs(60);
/// What an ordinary user finds programs with.
const ORDINARY_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// The binary under test: `SANDBOX_AGENT_BIN`, else the release build of the workspace, else its debug build.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("SANDBOX_AGENT_BIN") {
        let path = PathBuf::from(path);
        assert!(path.is_file(), "SANDBOX_AGENT_BIN names no file: {}", path.display());
        return path;
    }
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/x86_64-unknown-linux-musl");
    let builds = ["release", "debug"].map(|profile| target.join(profile).join("sandbox-agent"));
    let found = builds.iter().find(|path| path.is_file());
    found.cloned().unwrap_or_else(|| panic!("no binary to test: build it, or set SANDBOX_AGENT_BIN; tried {builds:?}"))
}

/// What to start, and how.
pub struct AgentBuilder {
    env: BTreeMap<String, String>,
    uid: Option<u32>,
    launcher: Vec<String>,
}

/// A running agent. Dropping it kills it; when the test is failing, the end of its log is printed.
pub struct Agent {
    setup: AgentBuilder,
    folder: TempDir,
    program: PathBuf,
    child: Child,
    exit: Option<ExitStatus>,
    address: SocketAddr,
    bearer: Option<String>,
}

impl AgentBuilder {
    /// Sets a variable of the agent's environment, which is otherwise empty but for `PATH` and `HOME`.
    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.insert(name.into(), value.to_string());
        self
    }

    /// Runs the agent as this user and group, and gives it its folders. Needs root.
    pub fn uid(mut self, uid: u32) -> Self {
        self.uid = Some(uid);
        self
    }

    /// Puts a command in front of the agent's own, such as `unshare --pid --fork`.
    pub fn launcher(mut self, command: &[&str]) -> Self {
        self.launcher = command.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Starts the agent and waits until it listens.
    pub fn start(self) -> Agent {
        let folder = tempfile::Builder::new().prefix("agent-test-").tempdir().expect("create a temporary folder");
        for name in ["state", "workspace"] {
            fs::create_dir(folder.path().join(name)).expect("create a folder of the agent");
        }
        let mut program = binary();
        if let Some(uid) = self.uid {
            // The build folder may be closed to that user.
            let copy = folder.path().join("sandbox-agent");
            fs::copy(&program, &copy).expect("copy the binary");
            program = copy;
            for path in [folder.path().to_owned(), folder.path().join("state"), folder.path().join("workspace")] {
                chown(path, Some(uid), Some(uid)).expect("hand a folder to the user");
            }
        }
        let child = spawn(&self, folder.path(), &program);
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let bearer = self.env.get("AGENT_API_TOKEN").map(|token| format!("Bearer {token}"));
        let mut agent = Agent { setup: self, folder, program, child, exit: None, address, bearer };
        agent.address = agent.wait_for_address();
        agent
    }
}

impl Agent {
    /// An agent with default settings and no control plane.
    pub fn start() -> Self {
        Self::builder().start()
    }

    /// An agent that is yet to be configured.
    pub fn builder() -> AgentBuilder {
        AgentBuilder { env: BTreeMap::new(), uid: None, launcher: Vec::new() }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The process that was started: the agent, or its launcher.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The workspace, seen from the host.
    pub fn workspace(&self) -> PathBuf {
        self.folder.path().join("workspace")
    }

    /// The state folder.
    pub fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// Everything it has written to stdout and stderr, restarts included.
    pub fn log(&self) -> String {
        let log = fs::read(self.folder.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Resident memory now, and its peak, in bytes.
    pub fn memory(&self) -> (u64, u64) {
        (processes::memory(self.pid(), "VmRSS"), processes::memory(self.pid(), "VmHWM"))
    }

    /// `GET path`.
    #[track_caller]
    pub fn get(&self, path: &str) -> Response {
        let answer = http::request(self.address, "GET", path, &self.credentials(), b"");
        answer.unwrap_or_else(|error| panic!("GET {path}: {error}"))
    }

    /// `POST /execute`.
    #[track_caller]
    pub fn submit(&self, submission: &Submission) -> Response {
        self.try_submit(submission).unwrap_or_else(|error| panic!("POST /execute: {error}"))
    }

    /// `POST /execute` to an agent that may be gone.
    pub fn try_submit(&self, submission: &Submission) -> io::Result<Response> {
        let body = submission.body().to_string();
        http::request(self.address, "POST", "/execute", &self.credentials(), body.as_bytes())
    }

    /// The document of one execution; `None` when the agent knows none of that id.
    #[track_caller]
    pub fn execution(&self, id: &str) -> Option<Value> {
        let response = self.get(&format!("/v1/executions/{id}"));
        match response.status {
            200 => Some(response.json()),
            404 => None,
            status => panic!("GET /v1/executions/{id} is answered {status}: {}", response.text()),
        }
    }

    /// Submits, waits for the end, and returns the document.
    #[track_caller]
    pub fn run(&self, submission: &Submission) -> Value {
        let response = self.submit(submission);
        assert_eq!(response.status, 200, "POST /execute is answered {}", response.text());
        self.wait_for_end(submission.execution_id(), END_LIMIT)
    }

    /// Waits until the execution has one of the [`TERMINAL_STATES`].
    #[track_caller]
    pub fn wait_for_end(&self, id: &str, limit: Duration) -> Value {
        wait::for_value(&format!("the end of {id}"), limit, || {
            self.execution(id).filter(|document| TERMINAL_STATES.contains(&state(document)))
        })
    }

    /// Waits until the execution runs; panics when it ends before that was seen.
    #[track_caller]
    pub fn wait_until_running(&self, id: &str) {
        wait::until(&format!("{id} to run"), END_LIMIT, || {
            let document = self.execution(id).unwrap_or_default();
            assert!(!TERMINAL_STATES.contains(&state(&document)), "it is over already: {document:#}");
            state(&document) == "running"
        });
    }

    /// Sends a signal to the process that was started.
    pub fn signal(&self, signal: i32) {
        send_signal(self.pid(), signal);
    }

    /// SIGTERM, then waits for the exit code.
    pub fn stop(&mut self) -> i32 {
        self.signal(libc::SIGTERM);
        self.wait(Duration::from_secs(15))
    }

    /// SIGKILL, then waits until it is gone.
    pub fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        self.wait(Duration::from_secs(10));
    }

    /// Starts it again with the same settings and folders, on a new port. The old process must have ended.
    pub fn restart(&mut self) {
        assert!(self.exit.is_some(), "the agent still runs");
        fs::remove_file(address_file(self.folder.path())).ok();
        self.child = spawn(&self.setup, self.folder.path(), &self.program);
        self.exit = None;
        self.address = self.wait_for_address();
    }

    /// Waits for the exit code; 128 + n when a signal ended it.
    #[track_caller]
    pub fn wait(&mut self, limit: Duration) -> i32 {
        let status = match self.exit {
            Some(status) => status,
            None => wait::for_value("the agent's end", limit, || self.child.try_wait().expect("wait for the agent")),
        };
        self.exit = Some(status);
        exit_code(status)
    }

    fn credentials(&self) -> Vec<(&str, &str)> {
        let mut headers = vec![("content-type", "application/json")];
        headers.extend(self.bearer.as_deref().map(|bearer| ("authorization", bearer)));
        headers
    }

    fn wait_for_address(&mut self) -> SocketAddr {
        let file = address_file(self.folder.path());
        wait::for_value("the agent to listen", START_LIMIT, || {
            if let Some(status) = self.child.try_wait().expect("look at the agent") {
                self.exit = Some(status);
                panic!("the agent ended at its start ({status})");
            }
            fs::read_to_string(&file).ok()?.trim().parse().ok()
        })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("--- the end of the agent's log\n{}\n---", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
        if self.exit.is_none() {
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

/// The state field of an execution's document.
pub fn state(document: &Value) -> &str {
    document["state"].as_str().unwrap_or("")
}

/// Sends a signal to any process.
pub fn send_signal(pid: u32, signal: i32) {
    let pid = i32::try_from(pid).expect("a process id");
    // SAFETY: kill takes two numbers and touches no memory of ours.
    let result = unsafe { libc::kill(pid, signal) };
    assert_eq!(result, 0, "signal {signal} to {pid}: {}", io::Error::last_os_error());
}

/// Exit code as a shell tells it.
pub fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

fn spawn(setup: &AgentBuilder, folder: &Path, program: &Path) -> Child {
    let mut words =
        setup.launcher.iter().map(String::as_str).chain([program.to_str().expect("path in UTF-8"), "serve"]);
    let mut command = Command::new(words.next().expect("a program"));
    command.args(words).env_clear();
    command.env("HOME", std::env::var_os("HOME").unwrap_or_else(|| "/".into()));
    command.env("PATH", std::env::var_os("PATH").unwrap_or_else(|| ORDINARY_PATH.into()));
    if let Some(uid) = setup.uid {
        command.uid(uid).gid(uid).env("HOME", folder).env("PATH", ORDINARY_PATH);
    }
    command.env("AGENT_LISTEN", "127.0.0.1:0");
    command.env("AGENT_ADDRESS_FILE", address_file(folder));
    command.env("STATE_DIR", folder.join("state"));
    command.env("WORKSPACE_PATH", folder.join("workspace"));
    command.envs(&setup.env).current_dir(folder);
    command.stdin(Stdio::null()).stdout(log_file(folder)).stderr(log_file(folder));
    command.spawn().unwrap_or_else(|error| panic!("start {}: {error}", program.display()))
}

fn address_file(folder: &Path) -> PathBuf {
    folder.join("address")
}

fn log_file(folder: &Path) -> File {
    OpenOptions::new().create(true).append(true).open(folder.join("log")).expect("open the log")
}
