//! The named policies: the one table that a security reviewer reads, and what the host offers to fill it.
//!
//! | | execute | install |
//! | --- | --- | --- |
//! | runs | user code | a package installer |
//! | network | none | the agent's |
//! | workspace | as asked | read-only |
//! | seccomp | `execute.json` | `install.json` |
//!
//! Everything else is the same in both: fresh namespaces, no capabilities, a read-only system, private `/tmp`,
//! `/dev/shm` and `/proc`, an environment that holds only what is set here and by the caller.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::policy::{DataFile, INSIDE_ID, Limits, Policy, ProcMount, SystemPath, WORKSPACE_INSIDE, WorkspaceMount};

/// What a program finds on `PATH` when nothing else is asked for.
pub const PATH_INSIDE: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The parts of this host that a sandbox is built from, looked up once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// `/usr` and the links or folders beside it.
    pub system: Vec<SystemPath>,
    /// Files of `/etc` that exist here, out of [`ETC`].
    pub etc: Vec<(PathBuf, PathBuf)>,
    /// Files of `/proc` that exist here, out of those that no program needs.
    pub hidden: Vec<PathBuf>,
}

/// The files and folders of `/etc` that programs need; nothing else of it is visible.
pub const ETC: [&str; 9] = [
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/pki/ca-trust/extracted",
    "/etc/pki/tls/certs",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
];

/// Files of `/proc` that describe the host's kernel or other users' keys.
const HIDDEN: [&str; 8] = [
    "/proc/kallsyms",
    "/proc/keys",
    "/proc/key-users",
    "/proc/kmsg",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/timer_list",
    "/proc/vmallocinfo",
];

impl Layout {
    /// Looks at the host.
    #[must_use]
    pub fn discover() -> Self {
        let mut system = vec![SystemPath::Folder("/usr".into())];
        for name in ["bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
            let path = Path::new("/").join(name);
            // After the usr merge these are links into /usr; before it, or on other distributions, folders.
            match fs::symlink_metadata(&path) {
                Ok(found) if found.is_symlink() => {
                    if let Ok(target) = fs::read_link(&path) {
                        system.push(SystemPath::Link(target, path));
                    }
                }
                Ok(found) if found.is_dir() => system.push(SystemPath::Folder(path)),
                _ => {}
            }
        }
        let etc = ETC.iter().map(PathBuf::from).filter(|path| path.exists()).map(|path| (path.clone(), path)).collect();
        let hidden = HIDDEN.iter().map(PathBuf::from).filter(|path| path.exists()).collect();
        Self { system, etc, hidden }
    }
}

/// What an operator chose by name although a layer is missing. Empty by default: then a missing layer stops everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fallbacks {
    /// `proc-host`: the procfs around the agent, read-only, where a fresh one can't be mounted.
    pub host_proc: bool,
    /// `nested-userns`: further user namespaces are refused by seccomp alone, not also by the kernel's counter.
    pub nested_user_namespaces: bool,
}

/// What differs from one execution to the next.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// The session's folder outside.
    pub workspace: PathBuf,
    /// Variables for the program, on top of those that the profile sets.
    pub environment: BTreeMap<String, String>,
    /// Folders that appear read-only at their own path.
    pub read_only: Vec<PathBuf>,
    /// Files that the agent supplies.
    pub files: Vec<DataFile>,
    /// Folders put before [`PATH_INSIDE`].
    pub path: Vec<PathBuf>,
    /// Resource limits.
    pub limits: Limits,
}

/// The policy for user code.
#[must_use]
pub fn execute(layout: &Layout, fallbacks: Fallbacks, request: Request) -> Policy {
    let mut path = request.path.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>();
    path.push(PATH_INSIDE.to_owned());
    let mut environment = BTreeMap::from([
        ("PATH".to_owned(), path.join(":")),
        // Private to the execution, so that no dot file waits for the next one.
        ("HOME".to_owned(), "/tmp".to_owned()),
        ("TMPDIR".to_owned(), "/tmp".to_owned()),
        ("USER".to_owned(), "sandbox".to_owned()),
        ("LOGNAME".to_owned(), "sandbox".to_owned()),
        ("SHELL".to_owned(), "/bin/sh".to_owned()),
        ("LANG".to_owned(), "C.UTF-8".to_owned()),
        ("PWD".to_owned(), WORKSPACE_INSIDE.to_owned()),
    ]);
    environment.extend(request.environment);
    let mut files = identity_files();
    files.extend(request.files);
    Policy {
        profile: "execute",
        system: layout.system.clone(),
        etc: layout.etc.clone(),
        read_only: request.read_only,
        files,
        workspace: WorkspaceMount { host: request.workspace, writable: true },
        proc: if fallbacks.host_proc { ProcMount::HostReadOnly } else { ProcMount::Fresh },
        hidden: layout.hidden.clone(),
        disable_user_namespaces: !fallbacks.nested_user_namespaces,
        share_network: false,
        environment,
        limits: request.limits,
        seccomp: "execute",
    }
}

/// `/etc` files that name the sandbox's user and nobody else, and resolve `localhost`.
fn identity_files() -> Vec<DataFile> {
    let file = |path: &str, text: String| DataFile { path: path.into(), bytes: text.into_bytes() };
    vec![
        file("/etc/passwd", format!("sandbox:x:{INSIDE_ID}:{INSIDE_ID}:sandbox:/tmp:/bin/sh\n")),
        file("/etc/group", format!("sandbox:x:{INSIDE_ID}:\n")),
        file("/etc/hosts", "127.0.0.1 localhost sandbox\n::1 localhost\n".to_owned()),
        file("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n".to_owned()),
    ]
}
