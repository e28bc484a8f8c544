//! One sandbox: started, let go, supervised, and ended with nothing left.
//!
//! # Theory of operation
//!
//! ```text
//! agent thread ──fork/exec──▶ bwrap (monitor, our user) ──clone──▶ init = process 1 inside ──fork──▶ the program
//!      │ status  ◀── JSON lines ──────┘                               │  waits at the block descriptor
//!      │ block   ─── one byte ────────────────────────────────────────┘  until we have looked at it
//!      │ stdout, stderr, result ◀──────────────────────────────────────────────────────────────┘
//!      │ request ──────────────────────────────────────────────────────────────────────────────▶
//! ```
//!
//! - **Start.** bubblewrap gets an empty environment and its options by descriptor, so neither shows in any `/proc`. Its first
//!   status line names the init; we hold it by pidfd, check that it is bubblewrap's child and lives in namespaces that differ
//!   from ours, put the process limit on it, and only then write the byte that lets it start the program.
//! - **Descriptors.** The program has 0, 1, 2 and, where it wants them, 3 (request) and 4 (result). bubblewrap closes or
//!   marks all others.
//! - **Who reaps whom.** Init reaps everything inside. The monitor reaps init, unless it left first; then init becomes ours,
//!   because the agent is a subreaper. We reap both by pidfd, so nobody's pid is ever guessed.
//! - **Who reports what.** The monitor writes `exit-code` only if the program was really started. A sandbox without that line
//!   failed, the program did not.
//! - **The end.** Whatever the reason, init is killed: one `SIGKILL`, and the kernel ends everything in its process namespace
//!   before init's pidfd becomes readable. Pipes are then read until they are empty; nobody is left to hold them.
//! - **Which thread.** [`Launcher::start`] and [`Sandbox::supervise`] belong on one thread that lives as long as the sandbox:
//!   the parent-death signal follows the thread that forked.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bwrap::{self, Descriptors, Program, Version};
use crate::outcome::{Facts, Killed, Outcome, Usage, classify};
use crate::policy::{Limits, Policy, PolicyError, ProcMount, SystemPath};
use crate::seccomp::{self, Compiled, SeccompError};
use crate::{rlimits, sys, tree};

/// How long bubblewrap may take from its start to the point where the program could run.
const SETUP_DEADLINE: Duration = Duration::from_secs(10);
/// How long a killed tree may take to be gone before it is left to the kernel (uninterruptible waits).
const END_DEADLINE: Duration = Duration::from_secs(2);
/// How often the memory of the tree is looked at, and how often when it is above half of its limit.
const WATCH_CALM: Duration = Duration::from_millis(100);
const WATCH_CLOSE: Duration = Duration::from_millis(20);
/// How long the last look at a tree may take, before it is killed.
const SAMPLE_PATIENCE: Duration = Duration::from_millis(50);
/// One read from a pipe: the kernel's default pipe size.
const CHUNK: usize = 64 << 10;
/// Reads from one pipe before the others and the clock are looked at again.
const READS_PER_TURN: usize = 8;
/// What is kept of bubblewrap's own words when it fails.
const MESSAGE_BYTES: usize = 2048;
/// Most bytes read from one pipe after the tree is gone: more than a pipe can hold.
const DRAIN_BYTES: usize = 2 << 20;

/// Descriptor of the request inside.
pub const REQUEST_FD: RawFd = 3;
/// Descriptor of the result inside.
pub const RESULT_FD: RawFd = 4;

/// Why a sandbox could not be set up. None of these is the program's fault.
#[derive(Debug, Error)]
pub enum SetupError {
    /// The policy contradicts itself.
    #[error("the policy is not valid")]
    Policy(#[from] PolicyError),
    /// No seccomp program.
    #[error("the seccomp profile could not be compiled")]
    Seccomp(#[from] SeccompError),
    /// bubblewrap isn't there.
    #[error("bubblewrap (bwrap) was not found; install the package 'bubblewrap'")]
    BubblewrapMissing,
    /// bubblewrap is older than what is needed.
    #[error("bubblewrap {found} at {path:?} is too old, {} or later is needed", bwrap::FLOOR)]
    BubblewrapTooOld {
        /// Where it is.
        path: PathBuf,
        /// What it says of itself.
        found: String,
    },
    /// A system call of ours failed.
    #[error("{step} failed")]
    System {
        /// What was attempted.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// bubblewrap ended, or said nothing, before the program could be started.
    #[error("bubblewrap could not set up the sandbox: {message}")]
    Bubblewrap {
        /// Its own words.
        message: String,
    },
    /// A namespace that the policy asks for is not there.
    #[error("the sandbox shares the {namespace} namespace with the agent; refusing to run")]
    NotIsolated {
        /// Which one.
        namespace: String,
    },
    /// The user of the sandbox can't reach a folder, and it can't be shown to it.
    #[error(
        "user {uid} of the sandbox can't reach {path:?} (see the permissions of {cover:?}), and without CAP_SYS_ADMIN it \
         can't be shown to it; move it, or open the way to it (chmod o+x)"
    )]
    OutOfReach {
        /// The folder.
        path: PathBuf,
        /// Where the way ends.
        cover: PathBuf,
        /// The user.
        uid: u32,
    },
}

fn system(step: &'static str) -> impl Fn(io::Error) -> SetupError {
    move |source| SetupError::System { step, source }
}

fn errno(step: &'static str) -> impl Fn(nix::errno::Errno) -> SetupError {
    move |source| SetupError::System { step, source: source.into() }
}

/// What the supervisor tells its caller while the program runs. The bytes are only valid during the call.
#[derive(Debug)]
pub enum Event<'a> {
    /// The program was let go.
    Started,
    /// Bytes from its standard output.
    Stdout(&'a [u8]),
    /// Bytes from its standard error.
    Stderr(&'a [u8]),
    /// Bytes from its result descriptor. Not to be trusted.
    Result(&'a [u8]),
}

/// Ends a sandbox from another thread. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Stop(Arc<EventFd>);

impl Stop {
    /// A handle that nobody has used yet.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?)))
    }

    /// Asks for the end; it may come at any time, also before the start, and more than once.
    pub fn stop(&self) {
        // The only failure is a counter that is already full, which is as good.
        let _ = self.0.write(1);
    }
}

/// The layers that held a sandbox, as looked up, not as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Layers {
    /// Release of bubblewrap.
    pub bubblewrap: String,
    /// Namespaces seen to differ from the agent's.
    pub namespaces: Vec<&'static str>,
    /// `kernel` (the counter is zero and seccomp refuses) or `seccomp` (it alone refuses).
    pub nested_user_namespaces: &'static str,
    /// How `/proc` was made.
    pub proc: ProcMount,
    /// Profile and digest of the seccomp programs in force.
    pub seccomp: SeccompLayer,
    /// Capabilities of the program: bubblewrap drops every set.
    pub capabilities: &'static str,
    /// Always on: set before bubblewrap and by it.
    pub no_new_privileges: bool,
    /// User id outside; never 0.
    pub outside_uid: u32,
    /// Limits in force.
    pub limits: Limits,
    /// What enforces the memory limit and counts the use.
    pub accounting: &'static str,
}

/// The seccomp layer of [`Layers`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SeccompLayer {
    /// Name of the profile.
    pub profile: String,
    /// SHA-256 of the compiled programs, hexadecimal.
    pub sha256: String,
}

/// How a sandbox ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The one classification.
    pub outcome: Outcome,
    /// What it used.
    pub usage: Usage,
    /// What held it.
    pub layers: Layers,
}

/// What was decided about this host at start: which bubblewrap, which user, which filters.
#[derive(Debug)]
pub struct Launcher {
    bwrap: CString,
    version: Version,
    user: Option<sys::User>,
    execute: Compiled,
    own_namespaces: Vec<(&'static str, u64)>,
}

/// What a [`Launcher`] is made from.
#[derive(Debug, Clone, Default)]
pub struct LauncherOptions {
    /// bubblewrap; looked for on [`profile::PATH_INSIDE`](crate::profile::PATH_INSIDE) when absent.
    pub bwrap: Option<PathBuf>,
    /// The user outside for an agent that runs as root: (uid, gid). Ignored otherwise.
    pub user: Option<(u32, u32)>,
}

const NAMESPACES: [&str; 7] = ["user", "pid", "mnt", "net", "ipc", "uts", "cgroup"];

impl Launcher {
    /// Looks for bubblewrap and compiles the filters.
    ///
    /// # Errors
    /// [`SetupError::BubblewrapMissing`], [`SetupError::BubblewrapTooOld`], [`SetupError::Seccomp`].
    pub fn new(options: &LauncherOptions) -> Result<Self, SetupError> {
        let path = match &options.bwrap {
            Some(path) => path.clone(),
            None => bwrap::find(crate::profile::PATH_INSIDE).ok_or(SetupError::BubblewrapMissing)?,
        };
        let answer = std::process::Command::new(&path).arg("--version").env_clear().output();
        let answer = answer.map_err(|_| SetupError::BubblewrapMissing)?;
        let found = String::from_utf8_lossy(&answer.stdout).trim().to_owned();
        let version = match Version::parse(&found) {
            Some(version) if version >= bwrap::FLOOR => version,
            _ => return Err(SetupError::BubblewrapTooOld { path, found }),
        };
        let user = if nix::unistd::geteuid().is_root() {
            let (uid, gid) = options.user.unwrap_or((crate::policy::INSIDE_ID, crate::policy::INSIDE_ID));
            Some(sys::User { uid, gid })
        } else {
            None
        };
        // An init whose monitor left first has to come to us, or what its tree used would be lost.
        nix::sys::prctl::set_child_subreaper(true).map_err(errno("becoming a subreaper"))?;
        let profile = seccomp::embedded("execute").unwrap_or_default();
        Ok(Self {
            bwrap: c_string(path.as_os_str().as_bytes()),
            version,
            user,
            execute: seccomp::compile(profile)?,
            own_namespaces: NAMESPACES
                .into_iter()
                .filter_map(|name| Some((name, namespace_id(Path::new("/proc/self/ns").join(name))?)))
                .collect(),
        })
    }

    /// Release of the bubblewrap in use.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// The user that sandboxes run as outside: (uid, gid).
    #[must_use]
    pub fn outside_user(&self) -> (u32, u32) {
        match self.user {
            Some(user) => (user.uid, user.gid),
            None => (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()),
        }
    }

    /// The exact command for a policy, with the descriptor numbers that a start would use.
    ///
    /// # Errors
    /// When the policy is not valid.
    pub fn describe(&self, policy: &Policy, program: &Program) -> Result<String, SetupError> {
        policy.validate()?;
        let numbers = Numbers::lay_out(self.execute.programs.len(), policy.files.len());
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(self.bwrap.as_bytes()));
        Ok(bwrap::printable(&path, &bwrap::options(policy, &numbers.descriptors), program))
    }

    /// The compiled filters of a profile.
    #[must_use]
    pub fn filters(&self) -> &Compiled {
        &self.execute
    }

    /// Starts a sandbox and leaves it parked right before its program.
    ///
    /// # Errors
    /// Every [`SetupError`]; whatever had been started is gone then.
    pub fn start(&self, policy: &Policy, program: &Program, channels: bool) -> Result<Sandbox, SetupError> {
        policy.validate()?;
        let veils = self.veils(policy)?;
        let numbers = Numbers::lay_out(self.execute.programs.len(), policy.files.len());
        let options = bwrap::options(policy, &numbers.descriptors);
        let mut inputs = vec![sealed(c"bwrap-args", &bwrap::nul_separated(&options))?];
        for filter in &self.execute.programs {
            inputs.push(sealed(c"seccomp", &filter.bytes)?);
        }
        for file in &policy.files {
            inputs.push(sealed(c"file", &file.bytes)?);
        }

        let null = fs::File::open("/dev/null").map_err(system("opening /dev/null"))?;
        let (stdout, stdout_inside) = pipe_from_sandbox()?;
        let (stderr, stderr_inside) = pipe_from_sandbox()?;
        let (result, result_inside) = pipe_from_sandbox()?;
        let (status, status_outside) = pipe_from_sandbox()?;
        let (request_inside, request) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(errno("pipe"))?;
        set_nonblocking(&request)?;
        let (block_inside, block) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(errno("pipe"))?;
        if let Some(user) = self.user {
            // Opening /dev/stdout inside opens the pipe anew, which asks for its owner.
            for pipe in [&stdout_inside, &stderr_inside] {
                let (uid, gid) = (user.uid.into(), user.gid.into());
                nix::unistd::fchown(pipe, Some(uid), Some(gid))
                    .map_err(errno("giving a pipe to the sandbox's user"))?;
            }
        }

        let mut descriptors = vec![
            (status_outside.as_raw_fd(), numbers.descriptors.status),
            (block_inside.as_raw_fd(), numbers.descriptors.block),
            (inputs[0].as_raw_fd(), numbers.args),
        ];
        let data = numbers.descriptors.seccomp.iter().chain(&numbers.descriptors.files);
        descriptors.extend(inputs[1..].iter().map(AsRawFd::as_raw_fd).zip(data.copied()));
        if channels {
            descriptors.push((request_inside.as_raw_fd(), REQUEST_FD));
            descriptors.push((result_inside.as_raw_fd(), RESULT_FD));
        }

        let mut argv = vec![c"bwrap".to_owned(), c"--args".to_owned(), c_string(numbers.args.to_string().as_bytes())];
        argv.push(c"--".to_owned());
        argv.extend(program.argv.iter().map(|arg| c_string(arg.as_bytes())));
        let started = sys::launch(&sys::Launch {
            program: &self.bwrap,
            argv: &argv,
            stdio: [null.as_fd(), stdout_inside.as_fd(), stderr_inside.as_fd()],
            descriptors: &descriptors,
            rlimits: &rlimits::inherited(&policy.limits),
            oom_score_adj: c"900",
            user: self.user,
            veils: &veils,
        })
        .map_err(|error| SetupError::System { step: error.step, source: error.source })?;
        drop((stdout_inside, stderr_inside, result_inside, status_outside, request_inside, block_inside, inputs));

        let mut sandbox = Sandbox {
            monitor: started,
            init: None,
            status: StatusLines { pipe: status, buffer: Vec::new() },
            block: Some(block),
            stdout,
            stderr,
            result: channels.then_some(result),
            request: channels.then_some(request),
            layers: self.attest(policy),
        };
        match self.prepare(&mut sandbox, policy) {
            Ok(()) => Ok(sandbox),
            Err(error) => {
                let message = sandbox.setup_message();
                drop(sandbox);
                Err(match error {
                    SetupError::Bubblewrap { message: plain } => {
                        SetupError::Bubblewrap { message: if message.is_empty() { plain } else { message } }
                    }
                    other => other,
                })
            }
        }
    }

    /// Waits for the init, looks at it, and limits it.
    fn prepare(&self, sandbox: &mut Sandbox, policy: &Policy) -> Result<(), SetupError> {
        let line = sandbox.first_status_line()?;
        let init = Init { pid: line.child_pid, pidfd: sys::pidfd_open(line.child_pid).map_err(system("pidfd_open"))? };
        let pid = init.pid;
        // A pid can have been used again since the line was written; a child of our bubblewrap can't.
        if parent_of(pid) != Some(sandbox.monitor.pid) {
            return Err(SetupError::Bubblewrap { message: "its first process is gone".to_owned() });
        }
        sandbox.init = Some(init);
        for (name, own) in &self.own_namespaces {
            if *name == "net" && policy.share_network {
                continue;
            }
            let theirs = match *name {
                "user" => namespace_id(format!("/proc/{pid}/ns/user").into()),
                other => line.namespace(other),
            };
            let differs = match theirs {
                Some(theirs) => theirs != *own,
                // Not readable from here: then the mapping of ids, which anyone may read, has to differ.
                None if *name == "user" => uid_map(&pid.to_string()) != uid_map("self"),
                None => false,
            };
            if !differs {
                return Err(SetupError::NotIsolated { namespace: (*name).to_owned() });
            }
            sandbox.layers.namespaces.push(name);
        }
        sys::prlimit(self.user, pid, rlimits::own_namespace(&policy.limits))
            .map_err(system("limiting the number of processes"))
    }

    fn attest(&self, policy: &Policy) -> Layers {
        Layers {
            bubblewrap: self.version.to_string(),
            namespaces: Vec::with_capacity(NAMESPACES.len()),
            nested_user_namespaces: if policy.disable_user_namespaces { "kernel" } else { "seccomp" },
            proc: policy.proc,
            seccomp: SeccompLayer { profile: policy.seccomp.to_owned(), sha256: self.execute.sha256.clone() },
            capabilities: "none",
            no_new_privileges: true,
            outside_uid: self.outside_user().0,
            limits: policy.limits.clone(),
            accounting: "rlimits and watchdog",
        }
    }

    /// The folders of a policy that the sandbox's user can't reach by itself.
    fn veils(&self, policy: &Policy) -> Result<Vec<sys::Veil>, SetupError> {
        let Some(user) = self.user else { return Ok(Vec::new()) };
        let system = policy.system.iter().filter_map(|entry| match entry {
            SystemPath::Folder(path) => Some(path),
            SystemPath::Link(..) => None,
        });
        let mut veils = Vec::new();
        for path in system.chain(&policy.read_only).chain([&policy.workspace.host]) {
            let Some(cover) = first_closed_folder(path, user) else { continue };
            let out_of_reach = || SetupError::OutOfReach { path: path.clone(), cover: cover.to_owned(), uid: user.uid };
            if !crate::caps::can_mount() || veils.len() == sys::MAX_VEILS {
                return Err(out_of_reach());
            }
            let below = path.strip_prefix(cover).map_err(|_| out_of_reach())?;
            let mut folder = cover.to_owned();
            let way = below.components().map(|part| {
                folder.push(part);
                c_string(folder.as_os_str().as_bytes())
            });
            veils.push(sys::Veil {
                cover: c_string(cover.as_os_str().as_bytes()),
                way: way.collect(),
                path: c_string(path.as_os_str().as_bytes()),
            });
        }
        Ok(veils)
    }
}

/// The first folder above `path` that `user` may not search. Owner and mode decide; access lists are not looked at.
fn first_closed_folder(path: &Path, user: sys::User) -> Option<&Path> {
    let mut above: Vec<&Path> = path.ancestors().skip(1).collect();
    above.reverse();
    above.into_iter().find(|folder| {
        fs::metadata(folder).is_ok_and(|found| {
            let search = match (found.uid() == user.uid, found.gid() == user.gid) {
                (true, _) => 0o100,
                (false, true) => 0o010,
                (false, false) => 0o001,
            };
            found.mode() & search == 0
        })
    })
}

/// Where each descriptor goes: 3 and 4 are the program's, the rest is bubblewrap's.
struct Numbers {
    args: RawFd,
    descriptors: Descriptors,
}

impl Numbers {
    fn lay_out(filters: usize, files: usize) -> Self {
        let mut next = RESULT_FD;
        let mut take = || {
            next += 1;
            next
        };
        let (args, status, block) = (take(), take(), take());
        let seccomp = (0..filters).map(|_| take()).collect();
        let files = (0..files).map(|_| take()).collect();
        Self { args, descriptors: Descriptors { status, block, seccomp, files } }
    }
}

/// The first process inside.
#[derive(Debug)]
struct Init {
    pid: i32,
    pidfd: OwnedFd,
}

/// A started sandbox. Dropping it ends it.
#[derive(Debug)]
pub struct Sandbox {
    monitor: sys::Started,
    init: Option<Init>,
    status: StatusLines,
    block: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: OwnedFd,
    result: Option<OwnedFd>,
    request: Option<OwnedFd>,
    layers: Layers,
}

/// The first line of `--json-status-fd`.
#[derive(Debug, Deserialize)]
struct FirstLine {
    #[serde(rename = "child-pid")]
    child_pid: i32,
    #[serde(flatten)]
    rest: serde_json::Map<String, serde_json::Value>,
}

impl FirstLine {
    fn namespace(&self, name: &str) -> Option<u64> {
        self.rest.get(&format!("{name}-namespace"))?.as_u64()
    }
}

/// The last line of `--json-status-fd`.
#[derive(Debug, Deserialize)]
struct LastLine {
    #[serde(rename = "exit-code")]
    exit_code: i32,
}

/// bubblewrap's status descriptor, read line by line. Only the monitor can write to it.
#[derive(Debug)]
struct StatusLines {
    pipe: OwnedFd,
    buffer: Vec<u8>,
}

impl StatusLines {
    /// Reads what is there; a complete line that parses is taken out and returned.
    fn next<T: for<'de> Deserialize<'de>>(&mut self) -> Option<T> {
        let mut chunk = [0; 1024];
        while let Ok(count @ 1..) = nix::unistd::read(&self.pipe, &mut chunk) {
            self.buffer.extend_from_slice(&chunk[..count]);
        }
        let end = self.buffer.iter().position(|byte| *byte == b'\n')?;
        let line: Vec<u8> = self.buffer.drain(..=end).collect();
        serde_json::from_slice(&line).ok()
    }
}

/// What a caller decides about one run.
pub struct Run<'a> {
    /// Written to the request descriptor, then closed.
    pub request: &'a [u8],
    /// From the moment the program is let go.
    pub timeout: Duration,
    /// Ends it early.
    pub stop: &'a Stop,
}

impl Sandbox {
    fn first_status_line(&mut self) -> Result<FirstLine, SetupError> {
        let deadline = Instant::now() + SETUP_DEADLINE;
        loop {
            if let Some(line) = self.status.next() {
                return Ok(line);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(SetupError::Bubblewrap { message: format!("no answer in {SETUP_DEADLINE:?}") });
            }
            let mut fds = [readable(&self.status.pipe), readable(&self.monitor.pidfd)];
            poll(&mut fds, left)?;
            let ended = fds[1].any().unwrap_or(false);
            if ended && let Some(line) = self.status.next() {
                return Ok(line);
            }
            if ended {
                return Err(SetupError::Bubblewrap { message: "it ended without a word".to_owned() });
            }
        }
    }

    /// What bubblewrap printed, as long as the program has not been let go.
    fn setup_message(&self) -> String {
        let mut text = vec![0; MESSAGE_BYTES];
        let count = nix::unistd::read(&self.stderr, &mut text).unwrap_or(0);
        String::from_utf8_lossy(&text[..count]).trim().to_owned()
    }

    /// The layers that hold it.
    #[must_use]
    pub fn layers(&self) -> &Layers {
        &self.layers
    }

    /// Lets the program go and stays with it until nothing of it is left.
    ///
    /// `on_event` is called on this thread for everything the program sends; it must not block, since nothing is read
    /// meanwhile.
    pub fn supervise(mut self, run: &Run, mut on_event: impl FnMut(Event)) -> Report {
        let mut pump = Pump {
            streams: [Some(self.stdout.try_clone()), Some(self.stderr.try_clone()), self.result.take().map(Ok)]
                .map(|pipe| pipe.and_then(io::Result::ok)),
            request: self.request.take(),
            unsent: run.request,
            buffer: vec![0; CHUNK],
            message: Vec::new(),
        };
        on_event(Event::Started);
        let started = Instant::now();
        self.let_go();
        let mut watch = Watch { limit: self.layers.limits.memory_bytes, peak: 0, next: started + WATCH_CLOSE };
        let (reported_exit, killed) = self.watch_over(run, started + run.timeout, &mut watch, &mut pump, &mut on_event);
        let cpu_before_the_kill = self.cpu_so_far();
        self.end();
        // Everybody who could write is dead: what is in the pipes is all there will ever be.
        pump.read_all(DRAIN_BYTES, &mut on_event);
        let wall = started.elapsed();

        let used = self.reap();
        let facts = Facts {
            reported_exit,
            killed,
            memory_limit_bytes: self.layers.limits.memory_bytes,
            setup_message: String::from_utf8_lossy(&pump.message).trim().to_owned(),
        };
        let usage = Usage {
            wall,
            // The kernel drops the time of what dies with its namespace; what had been reaped before, /proc rounds down.
            cpu: used.cpu.max(cpu_before_the_kill),
            peak_memory_bytes: used.peak_memory_bytes.max(watch.peak),
            read_bytes: used.read_bytes,
            written_bytes: used.written_bytes,
        };
        Report { outcome: classify(&facts), usage, layers: self.layers.clone() }
    }

    fn let_go(&mut self) {
        if let Some(block) = self.block.take() {
            // It can only fail when init is gone, and that is seen at once by whoever watches.
            let _ = nix::unistd::write(&block, b"x");
        }
    }

    /// Moves bytes until the program has ended or must be ended.
    fn watch_over(
        &mut self,
        run: &Run,
        deadline: Instant,
        watch: &mut Watch,
        pump: &mut Pump,
        on_event: &mut impl FnMut(Event),
    ) -> (Option<i32>, Option<Killed>) {
        loop {
            let wake = deadline.min(watch.next).saturating_duration_since(Instant::now());
            let mut fds = vec![readable(&self.status.pipe), readable(&self.monitor.pidfd), readable(&*run.stop.0)];
            fds.extend(pump.interests());
            // A failed poll is a spurious wake-up: everything below looks for itself.
            let _ = poll(&mut fds, wake);
            let [reported, ended, stopped] = [0, 1, 2].map(|index| fds[index].any().unwrap_or(false));
            drop(fds);
            pump.turn(on_event);
            if reported || ended {
                let exit = self.status.next::<LastLine>().map(|line| line.exit_code);
                if exit.is_some() || ended {
                    return (exit, None);
                }
            }
            let now = Instant::now();
            if stopped {
                return (None, Some(Killed::Request));
            }
            if now >= deadline {
                return (None, Some(Killed::Deadline));
            }
            if now >= watch.next && watch.is_over(&self.init, deadline) {
                return (None, Some(Killed::Memory));
            }
        }
    }

    /// What the processes that are still there have used.
    fn cpu_so_far(&self) -> Duration {
        let until = Instant::now() + SAMPLE_PATIENCE;
        self.init.as_ref().map_or(Duration::ZERO, |init| tree::cpu(&tree::processes(init.pid, until), until))
    }

    /// Kills what is left and waits until it is gone.
    fn end(&mut self) {
        let victim = match &self.init {
            Some(init) => &init.pidfd,
            None => {
                // Still being set up: the init is only known as a child of the monitor, if there is one yet.
                let until = Instant::now() + SAMPLE_PATIENCE;
                for child in tree::processes(self.monitor.pid, until).into_iter().skip(1) {
                    if let Ok(pidfd) = sys::pidfd_open(child) {
                        let _ = sys::pidfd_signal(&pidfd, libc::SIGKILL);
                    }
                }
                let _ = sys::pidfd_signal(&self.monitor.pidfd, libc::SIGKILL);
                &self.monitor.pidfd
            }
        };
        // ESRCH: it is dead already.
        let _ = sys::pidfd_signal(victim, libc::SIGKILL);
        wait_for_end(victim, END_DEADLINE);
    }

    /// Collects the two processes that are ours to reap, and what they and all that they reaped have used.
    fn reap(&mut self) -> sys::Reaped {
        // With init gone the monitor has nothing to wait for.
        if !wait_for_end(&self.monitor.pidfd, END_DEADLINE) {
            let _ = sys::pidfd_signal(&self.monitor.pidfd, libc::SIGKILL);
            wait_for_end(&self.monitor.pidfd, END_DEADLINE);
        }
        let mut used = sys::wait(&self.monitor.pidfd).unwrap_or_default();
        if let Some(init) = &self.init
            && has_ended(&init.pidfd)
            // Only when the monitor left first; otherwise the monitor has reaped it and its use is in the monitor's.
            && let Ok(more) = sys::wait(&init.pidfd)
        {
            used.cpu += more.cpu;
            used.read_bytes += more.read_bytes;
            used.written_bytes += more.written_bytes;
            used.peak_memory_bytes = used.peak_memory_bytes.max(more.peak_memory_bytes);
        }
        self.init = None;
        used
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if self.block.is_some() || self.init.is_some() {
            self.end();
            self.reap();
        }
    }
}

/// The pipes of a running program.
struct Pump<'a> {
    /// stdout, stderr, result; `None` once all writers are gone.
    streams: [Option<OwnedFd>; 3],
    request: Option<OwnedFd>,
    unsent: &'a [u8],
    buffer: Vec<u8>,
    /// The first bytes of stderr: if the program was never started, they are bubblewrap's.
    message: Vec<u8>,
}

impl Pump<'_> {
    fn interests(&self) -> impl Iterator<Item = PollFd<'_>> {
        let sending = self.request.iter().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT));
        self.streams.iter().flatten().map(readable).chain(sending)
    }

    /// Sends and reads what can be without waiting, a bounded amount.
    fn turn(&mut self, on_event: &mut impl FnMut(Event)) {
        if let Some(pipe) = &self.request {
            let done = match nix::unistd::write(pipe, self.unsent) {
                Ok(count) => {
                    self.unsent = &self.unsent[count..];
                    self.unsent.is_empty()
                }
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => false,
                // The program has closed its end; what it didn't read is its own business.
                Err(_) => true,
            };
            if done {
                self.request = None;
            }
        }
        self.read_all(CHUNK * READS_PER_TURN, on_event);
    }

    fn read_all(&mut self, most: usize, on_event: &mut impl FnMut(Event)) {
        for index in 0..self.streams.len() {
            let mut total = 0;
            while let Some(pipe) = &self.streams[index] {
                match nix::unistd::read(pipe, &mut self.buffer) {
                    Ok(0) => self.streams[index] = None,
                    Ok(count) => {
                        let bytes = &self.buffer[..count];
                        if index == 1 && self.message.len() < MESSAGE_BYTES {
                            let room = MESSAGE_BYTES - self.message.len();
                            self.message.extend_from_slice(&bytes[..count.min(room)]);
                        }
                        on_event(match index {
                            0 => Event::Stdout(bytes),
                            1 => Event::Stderr(bytes),
                            _ => Event::Result(bytes),
                        });
                        total += count;
                        if total >= most {
                            break;
                        }
                    }
                    Err(nix::errno::Errno::EINTR) => {}
                    Err(nix::errno::Errno::EAGAIN) => break,
                    Err(_) => self.streams[index] = None,
                }
            }
        }
    }
}

/// The memory watchdog of one run.
struct Watch {
    limit: u64,
    peak: u64,
    next: Instant,
}

impl Watch {
    /// Looks at the memory of the tree; gives up at `deadline`.
    fn is_over(&mut self, init: &Option<Init>, deadline: Instant) -> bool {
        let Some(init) = init else { return false };
        let pids = tree::processes(init.pid, deadline);
        let mut bytes = tree::resident(&pids, deadline);
        if bytes > self.limit {
            bytes = tree::proportional(&pids, deadline);
        }
        self.peak = self.peak.max(bytes);
        self.next = Instant::now() + if bytes > self.limit / 2 { WATCH_CLOSE } else { WATCH_CALM };
        bytes > self.limit
    }
}

fn readable<Fd: AsFd>(fd: &Fd) -> PollFd<'_> {
    PollFd::new(fd.as_fd(), PollFlags::POLLIN)
}

/// Waits, at least until the next full millisecond, so that a deadline is never polled for in a busy loop.
fn poll(fds: &mut [PollFd], wait: Duration) -> Result<(), SetupError> {
    let millis = wait.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
    let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
    match nix::poll::poll(fds, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(errno("poll")(error)),
    }
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [readable(pidfd)];
    nix::poll::poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

fn wait_for_end(pidfd: &OwnedFd, most: Duration) -> bool {
    let deadline = Instant::now() + most;
    loop {
        if has_ended(pidfd) {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || poll(&mut [readable(pidfd)], left).is_err() {
            return false;
        }
    }
}

fn parent_of(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// The number in a namespace link such as `net:[4026531840]`.
fn namespace_id(link: PathBuf) -> Option<u64> {
    let target = fs::read_link(link).ok()?;
    target.to_str()?.split_once('[')?.1.strip_suffix(']')?.parse().ok()
}

fn uid_map(process: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/{process}/uid_map")).ok()
}

/// A pipe whose reading end is ours and never blocks: (ours, the sandbox's).
fn pipe_from_sandbox() -> Result<(OwnedFd, OwnedFd), SetupError> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(errno("pipe"))?;
    set_nonblocking(&read)?;
    Ok((read, write))
}

fn set_nonblocking(fd: &OwnedFd) -> Result<(), SetupError> {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(errno("fcntl"))?;
    Ok(())
}

/// A file in memory that holds the bytes and stands at its start.
fn sealed(name: &std::ffi::CStr, bytes: &[u8]) -> Result<OwnedFd, SetupError> {
    use std::io::{Seek, Write};
    let fd =
        nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC).map_err(errno("memfd_create"))?;
    let mut file = fs::File::from(fd);
    file.write_all(bytes).and_then(|()| file.rewind()).map_err(system("filling a memory file"))?;
    Ok(file.into())
}

/// Callers pass what a validated policy or the kernel gave them, neither of which holds a NUL byte; one would end the string.
fn c_string(bytes: &[u8]) -> CString {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    CString::new(&bytes[..end]).unwrap_or_default()
}
