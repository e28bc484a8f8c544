//! Policy to bubblewrap arguments: pure, in a fixed order of segments, held by golden files.
//!
//! Order matters to bubblewrap, which carries out its mount options one after the other: the base system first, then the
//! private file systems, then what is bound on top, then the files we supply, and last the remounts that close it.
//! Every namespace is named: `--unshare-all` would drop the user and cgroup namespaces silently where they can't be had.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use crate::policy::{INSIDE_ID, Policy, ProcMount, SUPPLIED_INSIDE, SystemPath, WORKSPACE_INSIDE};

/// A bubblewrap release, for options that came later than our floor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

/// The oldest release we drive: the first that has `--disable-userns` (its NEWS), shipped by Debian 12.
pub const FLOOR: Version = Version(0, 8, 0);

impl Version {
    /// Reads the answer of `bwrap --version` (`bubblewrap 0.8.0`).
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split_whitespace().nth(1)?.split('.');
        let mut next = || {
            let part = parts.next()?;
            part.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()
        };
        Some(Self(next()?, next()?, next().unwrap_or(0)))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// The program to start inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Absolute path inside, then its arguments.
    pub argv: Vec<OsString>,
}

/// Descriptor numbers as bubblewrap will find them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptors {
    /// Where bubblewrap writes its JSON status lines.
    pub status: RawFd,
    /// What bubblewrap reads one byte from before it starts the program.
    pub block: RawFd,
    /// One per seccomp program, in the order of loading.
    pub seccomp: Vec<RawFd>,
    /// One per [`Policy::files`], in their order.
    pub files: Vec<RawFd>,
}

/// The arguments after `bwrap` for this policy, up to and without the `--` and the program.
///
/// The version is taken so that options newer than [`FLOOR`] can be used where they exist; none is needed so far.
#[must_use]
pub fn options(policy: &Policy, fds: &Descriptors) -> Vec<OsString> {
    let mut args = Arguments(Vec::new());
    namespaces(&mut args, policy);
    lifetime(&mut args, fds);
    system(&mut args, policy);
    private_file_systems(&mut args, policy);
    bound_on_top(&mut args, policy);
    supplied_files(&mut args, policy, fds);
    closing_remounts(&mut args);
    environment(&mut args, policy);
    for fd in &fds.seccomp {
        args.option("--add-seccomp-fd", [fd.to_string()]);
    }
    args.0
}

fn namespaces(args: &mut Arguments, policy: &Policy) {
    for name in ["user", "pid", "ipc", "uts", "cgroup"] {
        args.flag(&format!("--unshare-{name}"));
    }
    if !policy.share_network {
        args.flag("--unshare-net");
    }
    if policy.disable_user_namespaces {
        args.flag("--disable-userns");
    }
    args.option("--uid", [INSIDE_ID.to_string()]);
    args.option("--gid", [INSIDE_ID.to_string()]);
    args.option("--hostname", ["sandbox"]);
    // Implied for ordinary users, but root would keep its capabilities without it.
    args.option("--cap-drop", ["ALL"]);
}

fn lifetime(args: &mut Arguments, fds: &Descriptors) {
    args.flag("--die-with-parent");
    args.flag("--new-session");
    args.option("--json-status-fd", [fds.status.to_string()]);
    args.option("--block-fd", [fds.block.to_string()]);
}

fn system(args: &mut Arguments, policy: &Policy) {
    for entry in &policy.system {
        match entry {
            SystemPath::Folder(path) => args.bind("--ro-bind", path, path),
            SystemPath::Link(target, path) => args.bind("--symlink", target, path),
        }
    }
    for (outside, inside) in &policy.etc {
        args.bind("--ro-bind", outside, inside);
    }
}

fn private_file_systems(args: &mut Arguments, policy: &Policy) {
    match policy.proc {
        ProcMount::Fresh => {
            args.option("--proc", ["/proc"]);
            // Process 1 inside is a fork of bubblewrap with our user id: its environment, memory and descriptors would be
            // readable, and through its memory the reported exit status could be forged.
            args.option("--tmpfs", ["/proc/1"]);
            args.option("--remount-ro", ["/proc/1"]);
            for path in &policy.hidden {
                args.bind("--ro-bind", Path::new("/dev/null"), path);
            }
        }
        ProcMount::HostReadOnly => args.option("--ro-bind", ["/proc", "/proc"]),
    }
    args.option("--dev", ["/dev"]);
    // bubblewrap applies --size and --perms to the next mount only; without a size a tmpfs may take half of the memory.
    for (path, bytes) in [("/dev/shm", policy.limits.shm_bytes), ("/tmp", policy.limits.tmp_bytes)] {
        args.option("--size", [bytes.to_string()]);
        args.option("--perms", ["1777"]);
        args.option("--tmpfs", [path]);
    }
    args.option("--dir", [SUPPLIED_INSIDE]);
}

fn bound_on_top(args: &mut Arguments, policy: &Policy) {
    for path in &policy.read_only {
        args.bind("--ro-bind", path, path);
    }
    let bind = if policy.workspace.writable { "--bind" } else { "--ro-bind" };
    args.bind(bind, &policy.workspace.host, Path::new(WORKSPACE_INSIDE));
}

fn supplied_files(args: &mut Arguments, policy: &Policy, fds: &Descriptors) {
    for (file, fd) in policy.files.iter().zip(&fds.files) {
        args.option("--perms", ["0444"]);
        args.0.extend([OsString::from("--ro-bind-data"), fd.to_string().into(), file.path.clone().into()]);
    }
}

/// bubblewrap's root and `/dev` are writable and unbounded tmpfs until they are remounted; the remount is not recursive.
fn closing_remounts(args: &mut Arguments) {
    args.option("--remount-ro", ["/dev"]);
    args.option("--remount-ro", ["/"]);
}

fn environment(args: &mut Arguments, policy: &Policy) {
    for (name, value) in &policy.environment {
        args.option("--setenv", [name, value]);
    }
    args.option("--chdir", [WORKSPACE_INSIDE]);
}

/// A growing argument list.
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn option<const N: usize, S: AsRef<OsStr>>(&mut self, name: &str, values: [S; N]) {
        self.0.push(name.into());
        self.0.extend(values.iter().map(|value| value.as_ref().to_owned()));
    }

    fn bind(&mut self, name: &str, outside: &Path, inside: &Path) {
        self.option(name, [outside, inside]);
    }
}

/// Serialises arguments for `--args FD`: each ends in a NUL byte.
#[must_use]
pub fn nul_separated(args: &[OsString]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for arg in args {
        bytes.extend_from_slice(arg.as_encoded_bytes());
        bytes.push(0);
    }
    bytes
}

/// The command as a person would type it, one option a line, for `policy` and for logs.
#[must_use]
pub fn printable(bwrap: &Path, options: &[OsString], program: &Program) -> String {
    let mut text = quoted(bwrap.as_os_str());
    for arg in options {
        let word = quoted(arg);
        text.push_str(if word.starts_with("--") { " \\\n  " } else { " " });
        text.push_str(&word);
    }
    text.push_str(" \\\n  --");
    for arg in &program.argv {
        text.push(' ');
        text.push_str(&quoted(arg));
    }
    text
}

fn quoted(word: &OsStr) -> String {
    let text = word.to_string_lossy();
    let plain = !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c));
    if plain { text.into_owned() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// Finds `bwrap` on a `PATH`-like list.
#[must_use]
pub fn find(path: &str) -> Option<PathBuf> {
    path.split(':').map(|folder| Path::new(folder).join("bwrap")).find(|candidate| candidate.is_file())
}
