//! The only `unsafe` of the project: `fork` and what happens between it and `execve`, pidfds, and wiping the environment.
//!
//! Rules that every child path here keeps: after `fork` in a process with threads only async-signal-safe calls are made
//! (`signal-safety(7)`), so everything that allocates is prepared before, and the child leaves through `execve` or `_exit`.

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uint};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::sys::resource::Resource;
use thiserror::Error;

/// A user to become before the program starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct User {
    pub uid: u32,
    pub gid: u32,
}

/// A folder that the user of the sandbox can't reach, shown at the same path by a mount namespace of bubblewrap's own.
///
/// `cover` is the first folder on the way that shuts that user out. It is covered by an empty tmpfs in which only the way
/// to `path` exists, so the rest of `cover` is out of reach for bubblewrap itself as well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Veil {
    pub cover: CString,
    pub way: Vec<CString>,
    pub path: CString,
}

/// Everything that the child needs, made before the fork.
pub(crate) struct Launch<'a> {
    /// Absolute path of the executable.
    pub program: &'a CStr,
    pub argv: &'a [CString],
    /// Becomes descriptors 0, 1 and 2.
    pub stdio: [BorrowedFd<'a>; 3],
    /// (descriptor here, number there); all others are closed by the kernel at exec.
    pub descriptors: &'a [(RawFd, RawFd)],
    pub rlimits: &'a [(Resource, u64, u64)],
    /// Written to `/proc/self/oom_score_adj`; best effort.
    pub oom_score_adj: &'a CStr,
    pub user: Option<User>,
    pub veils: &'a [Veil],
}

/// A started process.
#[derive(Debug)]
pub(crate) struct Started {
    pub pid: i32,
    pub pidfd: OwnedFd,
}

/// A step on the way to `execve` that failed.
#[derive(Debug, Error)]
#[error("{step} failed")]
pub(crate) struct LaunchError {
    pub step: &'static str,
    #[source]
    pub source: io::Error,
}

/// Steps that the child reports by number, since it can't allocate a message.
const STEPS: [&str; 10] = [
    "fork",
    "moving descriptors",
    "setting a resource limit",
    "making a mount namespace (needs CAP_SYS_ADMIN)",
    "covering a folder",
    "binding a folder",
    "changing group (needs CAP_SETGID)",
    "changing user (needs CAP_SETUID)",
    "setting the parent-death signal",
    "execve of bubblewrap",
];
const MOVE: usize = 1;
const LIMIT: usize = 2;
const NAMESPACE: usize = 3;
const COVER: usize = 4;
const BIND: usize = 5;
const GROUP: usize = 6;
const USER: usize = 7;
const DEATH: usize = 8;
const EXEC: usize = 9;

/// Priority of sandboxes, below the agent's (`nice(2)`); it costs nothing while the processor is not contended.
const NICENESS: c_int = 10;

/// Descriptors are parked from this number on while the low ones are laid out.
const PARKING: c_int = 64;

/// Forks and executes.
///
/// The calling thread must outlive the child: the parent-death signal follows the thread (`PR_SET_PDEATHSIG(2const)`).
pub(crate) fn launch(launch: &Launch) -> Result<Started, LaunchError> {
    let fail = |step: usize| move |source: io::Error| LaunchError { step: STEPS[step], source };
    let mut argv: Vec<*const c_char> = launch.argv.iter().map(|arg| arg.as_ptr()).collect();
    argv.push(std::ptr::null());
    let (report_read, report_write) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(io::Error::from).map_err(fail(0))?;
    // What the parked descriptors are remembered in: allocated here, written by the child.
    let mut parked = vec![-1; launch.descriptors.len()];
    let parent = std::process::id() as i32;

    // SAFETY: fork itself has no preconditions; the child branch below only runs `child`, which keeps the module's rule.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => return Err(fail(0)(io::Error::last_os_error())),
        0 => {
            let report = report_write.as_raw_fd();
            // SAFETY: we are the forked child; argv is NULL-terminated and its strings live in `launch`.
            unsafe { child(launch, &argv, &mut parked, report, parent) }
        }
        _ => {}
    }
    drop(report_write);
    let pidfd = pidfd_open(pid).map_err(|source| LaunchError { step: "pidfd_open", source })?;
    let mut report = [0_u8; 8];
    let mut filled = 0;
    while filled < report.len() {
        match nix::unistd::read(&report_read, &mut report[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => break,
        }
    }
    if filled < report.len() {
        return Ok(Started { pid, pidfd });
    }
    // The child has reported and is gone; reap it so that no zombie stays.
    let _ = wait(&pidfd);
    let [a, b, c, d, e, f, g, h] = report;
    let step = u32::from_ne_bytes([a, b, c, d]) as usize;
    let errno = i32::from_ne_bytes([e, f, g, h]);
    Err(fail(step.min(EXEC))(io::Error::from_raw_os_error(errno)))
}

/// The child's way to `execve`.
///
/// # Safety
/// Only in a freshly forked child. `argv` must be NULL-terminated with valid strings.
unsafe fn child(launch: &Launch, argv: &[*const c_char], parked: &mut [c_int], report: c_int, parent: i32) -> ! {
    // SAFETY: every call below is a plain system call on values that were prepared before the fork.
    unsafe {
        let report = libc::fcntl(report, libc::F_DUPFD_CLOEXEC, PARKING);
        let give_up = |step: usize| -> ! {
            let errno = *libc::__errno_location();
            let mut message = [0_u8; 8];
            message[..4].copy_from_slice(&(step as u32).to_ne_bytes());
            message[4..].copy_from_slice(&errno.to_ne_bytes());
            libc::write(report, message.as_ptr().cast(), message.len());
            libc::_exit(127)
        };
        let check = |step: usize, result: c_int| {
            if result == -1 {
                give_up(step);
            }
        };

        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
        // Out of the terminal's foreground group: Ctrl-C is the agent's to handle.
        libc::setsid();
        libc::umask(0o022);
        // Hundreds of busy processes must not keep the agent from answering and from ending them in time.
        libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS);
        libc::chdir(c"/".as_ptr());

        for (slot, (from, _)) in parked.iter_mut().zip(launch.descriptors) {
            *slot = libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, PARKING);
            check(MOVE, *slot);
        }
        let mut stdio = [-1; 3];
        for (slot, from) in stdio.iter_mut().zip(&launch.stdio) {
            *slot = libc::fcntl(from.as_raw_fd(), libc::F_DUPFD_CLOEXEC, PARKING);
            check(MOVE, *slot);
        }
        for (number, from) in stdio.iter().enumerate() {
            check(MOVE, libc::dup2(*from, number as c_int));
        }
        let mut highest = 2;
        for (from, (_, to)) in parked.iter().zip(launch.descriptors) {
            check(MOVE, libc::dup2(*from, *to));
            highest = highest.max(*to);
        }
        let rest = libc::syscall(
            libc::SYS_close_range,
            (highest + 1) as c_uint,
            c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC as c_int,
        );
        check(MOVE, rest as c_int);

        // The agent is not dumpable, so its /proc files belong to root; this copy's own must be ours for one write.
        libc::prctl(libc::PR_SET_DUMPABLE, 1);
        let score = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if score >= 0 {
            libc::write(score, launch.oom_score_adj.as_ptr().cast(), launch.oom_score_adj.count_bytes());
            libc::close(score);
        }
        if !launch.veils.is_empty() {
            check(NAMESPACE, libc::unshare(libc::CLONE_NEWNS));
            let flags = libc::MS_REC | libc::MS_PRIVATE;
            check(NAMESPACE, libc::mount(std::ptr::null(), c"/".as_ptr(), std::ptr::null(), flags, std::ptr::null()));
            lay_veils(launch.veils, &check);
        }
        for (resource, soft, hard) in launch.rlimits {
            let mut now: libc::rlimit = std::mem::zeroed();
            libc::getrlimit(*resource as _, &mut now);
            // Nobody may raise a hard limit without privilege: what is already lower stays.
            let hard = (*hard).min(now.rlim_max);
            let wanted = libc::rlimit { rlim_cur: (*soft).min(hard), rlim_max: hard };
            check(LIMIT, libc::setrlimit(*resource as _, &wanted));
        }
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
        if let Some(user) = launch.user {
            check(GROUP, libc::setgroups(0, std::ptr::null()));
            check(GROUP, libc::setresgid(user.gid, user.gid, user.gid));
            check(USER, libc::setresuid(user.uid, user.uid, user.uid));
        }
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        // After the change of user, which clears it. The parent may have died in between.
        check(DEATH, libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL));
        if libc::getppid() != parent {
            libc::_exit(127);
        }
        let nothing: [*const c_char; 1] = [std::ptr::null()];
        libc::execve(launch.program.as_ptr(), argv.as_ptr(), nothing.as_ptr());
        give_up(EXEC)
    }
}

/// Covers the folders and binds the wanted ones back, in two passes, since several veils may share a cover.
///
/// # Safety
/// Only in a forked child that has a mount namespace of its own.
unsafe fn lay_veils(veils: &[Veil], check: &dyn Fn(usize, c_int)) {
    // Kept on the stack: more folders than this are refused before the fork.
    let mut held = [-1; MAX_VEILS];
    // SAFETY: plain system calls on prepared strings.
    unsafe {
        for (slot, veil) in held.iter_mut().zip(veils) {
            *slot = libc::open(veil.path.as_ptr(), libc::O_PATH | libc::O_CLOEXEC | libc::O_DIRECTORY);
            check(BIND, *slot);
        }
        for (index, veil) in veils.iter().enumerate() {
            if veils[..index].iter().all(|earlier| earlier.cover != veil.cover) {
                let (kind, options) = (c"tmpfs", c"mode=0755,size=1m");
                let flags = libc::MS_NOSUID | libc::MS_NODEV;
                let made =
                    libc::mount(kind.as_ptr(), veil.cover.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast());
                check(COVER, made);
            }
            for folder in &veil.way {
                libc::mkdir(folder.as_ptr(), 0o755);
            }
        }
        for (descriptor, veil) in held.iter().zip(veils) {
            let mut source = *b"/proc/self/fd/0000\0";
            let mut number = *descriptor;
            for digit in source[14..18].iter_mut().rev() {
                *digit = b'0' + (number % 10) as u8;
                number /= 10;
            }
            // The kernel's fd names have no leading zeros.
            let zeros = source[14..17].iter().take_while(|digit| **digit == b'0').count();
            source.copy_within(14 + zeros..19, 14);
            let bind = libc::MS_BIND | libc::MS_REC;
            let made =
                libc::mount(source.as_ptr().cast(), veil.path.as_ptr(), std::ptr::null(), bind, std::ptr::null());
            check(BIND, made);
        }
    }
}

/// How many folders can be veiled for one sandbox.
pub(crate) const MAX_VEILS: usize = 8;

/// A descriptor for a process (`pidfd_open(2)`).
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as c_long, 0 as c_long) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sends a signal through a pidfd (`pidfd_send_signal(2)`).
pub(crate) fn pidfd_signal(pidfd: &OwnedFd, signal: c_int) -> io::Result<()> {
    // SAFETY: a null siginfo is allowed and means the default one.
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd() as c_long,
            signal as c_long,
            std::ptr::null::<libc::siginfo_t>(),
            0 as c_long,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the kernel says a reaped process and the children it had reaped used (`getrusage(2)`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Reaped {
    pub cpu: Duration,
    pub peak_memory_bytes: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
}

/// Waits for a process and reaps it. `ECHILD` means that somebody else was its parent and has done so.
pub(crate) fn wait(pidfd: &OwnedFd) -> io::Result<Reaped> {
    // SAFETY: both structures are plain old data for which all zeroes is valid.
    let (mut info, mut usage): (libc::siginfo_t, libc::rusage) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    loop {
        // SAFETY: both pointers are valid for writes for the whole call.
        let done = unsafe {
            libc::syscall(
                libc::SYS_waitid,
                libc::P_PIDFD as c_long,
                pidfd.as_raw_fd() as c_long,
                &raw mut info,
                libc::WEXITED as c_long,
                &raw mut usage,
            )
        };
        if done == 0 {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    let time = |value: libc::timeval| Duration::new(value.tv_sec as u64, value.tv_usec as u32 * 1000);
    // Blocks of 512 bytes, and ru_maxrss in KiB (getrusage(2)).
    Ok(Reaped {
        cpu: time(usage.ru_utime) + time(usage.ru_stime),
        peak_memory_bytes: usage.ru_maxrss as u64 * 1024,
        read_bytes: usage.ru_inblock as u64 * 512,
        written_bytes: usage.ru_oublock as u64 * 512,
    })
}

/// Sets a limit on another process, from a short-lived child that has become the sandbox's user: `prlimit(2)` asks for the
/// same user and group, or for `CAP_SYS_RESOURCE`, which container root lacks.
pub(crate) fn prlimit(user: Option<User>, pid: i32, limit: (Resource, u64, u64)) -> io::Result<()> {
    let (resource, soft, hard) = limit;
    let wanted = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    let set = move || {
        // SAFETY: `wanted` is valid for the call; the old value is not asked for.
        unsafe { libc::prlimit(pid, resource as _, &wanted, std::ptr::null_mut()) }
    };
    let Some(user) = user else {
        return if set() == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    };
    // SAFETY: the child makes system calls only and leaves by _exit.
    let child = unsafe { libc::fork() };
    if child == -1 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        // SAFETY: as above; each result is checked by the one that follows, since prlimit fails for a wrong user.
        unsafe {
            libc::setgroups(0, std::ptr::null());
            libc::setresgid(user.gid, user.gid, user.gid);
            libc::setresuid(user.uid, user.uid, user.uid);
            let failed = set() != 0;
            libc::_exit(if failed { (*libc::__errno_location()).clamp(1, 255) } else { 0 });
        }
    }
    let status = reap(child)?;
    match libc::WEXITSTATUS(status) {
        _ if !libc::WIFEXITED(status) => Err(io::Error::other("the helper process was killed")),
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Waits for a child that this thread has just forked; its pid names nothing else until it is reaped here.
fn reap(child: i32) -> io::Result<c_int> {
    let mut status = 0;
    // SAFETY: `status` is valid for writes.
    while unsafe { libc::waitpid(child, &mut status, 0) } == -1 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(status)
}

unsafe extern "C" {
    /// `environ(7)`.
    static mut environ: *mut *mut c_char;
}

/// Overwrites the values of all environment variables but those named, in place, so that `/proc/self/environ` does not
/// show them.
///
/// # Errors
/// When the process has more than one thread: another one might be reading the environment.
pub fn wipe_environment(keep: &[&str]) -> io::Result<()> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("the environment is wiped before any thread is started, or not at all"));
    }
    // SAFETY: environ is a NULL-terminated array of NUL-terminated strings; with one thread, which is in here, nobody else
    // reads or changes them; only bytes before each terminating NUL are written.
    unsafe {
        let mut entry = environ;
        while !entry.is_null() && !(*entry).is_null() {
            let variable = CStr::from_ptr(*entry).to_bytes();
            let length = variable.len();
            let value = variable.iter().position(|byte| *byte == b'=').map_or(length, |at| at + 1);
            if !keep.iter().any(|name| variable[..value] == *format!("{name}=").as_bytes()) {
                std::ptr::write_bytes((*entry).add(value), 0, length - value);
            }
            entry = entry.add(1);
        }
    }
    Ok(())
}

/// The primitives that bubblewrap is built on, in its order, for [`try_primitives`].
const PRIMITIVES: [&str; 8] = [
    "becoming the sandbox's user",
    "creating a user namespace",
    "mapping user ids",
    "creating the other namespaces",
    "changing mount propagation",
    "mounting a tmpfs",
    "pivot_root",
    "unmounting the old root",
];

/// Tries them in a child of ours, as the user given; the first failure comes back with its errno.
pub(crate) fn try_primitives(user: Option<(u32, u32)>) -> Result<(), (&'static str, nix::errno::Errno)> {
    let (uid, gid) = user.unwrap_or((nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()));
    let map = format!("1000 {uid} 1");
    let unable = |errno| ("making a pipe", errno);
    let (answer_read, answer_write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(unable)?;
    let answer = answer_write.as_raw_fd();
    // SAFETY: the child makes system calls on prepared values and leaves by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above; the steps run in order, and the first that fails ends the child with its number.
        unsafe {
            let mut step = 0;
            let mut check = |ok: bool| {
                if !ok {
                    let errno = *libc::__errno_location();
                    let pair = [step as u8, errno.clamp(0, 255) as u8];
                    libc::write(answer, pair.as_ptr().cast(), 2);
                    libc::_exit(1);
                }
                step += 1;
            };
            libc::prctl(libc::PR_SET_DUMPABLE, 1);
            if user.is_some() {
                libc::setgroups(0, std::ptr::null());
                check(libc::setresgid(gid, gid, gid) == 0 && libc::setresuid(uid, uid, uid) == 0);
                libc::prctl(libc::PR_SET_DUMPABLE, 1);
            } else {
                check(true);
            }
            check(libc::unshare(libc::CLONE_NEWUSER) == 0);
            let file = libc::open(c"/proc/self/uid_map".as_ptr(), libc::O_WRONLY);
            check(file >= 0 && libc::write(file, map.as_ptr().cast(), map.len()) == map.len() as isize);
            let others = libc::CLONE_NEWNS
                | libc::CLONE_NEWPID
                | libc::CLONE_NEWNET
                | libc::CLONE_NEWIPC
                | libc::CLONE_NEWUTS
                | libc::CLONE_NEWCGROUP;
            check(libc::unshare(others) == 0);
            let (root, tmp, kind) = (c"/".as_ptr(), c"/tmp".as_ptr(), c"tmpfs".as_ptr());
            check(
                libc::mount(std::ptr::null(), root, std::ptr::null(), libc::MS_REC | libc::MS_SLAVE, std::ptr::null())
                    == 0,
            );
            check(libc::mount(kind, tmp, kind, libc::MS_NOSUID, std::ptr::null()) == 0);
            libc::mkdir(c"/tmp/old".as_ptr(), 0o755);
            check(libc::syscall(libc::SYS_pivot_root, tmp, c"/tmp/old".as_ptr()) == 0);
            check(libc::umount2(c"/old".as_ptr(), libc::MNT_DETACH) == 0);
            libc::_exit(0);
        }
    }
    if child == -1 {
        return Err(("fork", nix::errno::Errno::last()));
    }
    drop(answer_write);
    let mut pair = [0_u8; 2];
    let count = nix::unistd::read(&answer_read, &mut pair).map_err(unable)?;
    let _ = reap(child);
    match count {
        2 => Err((PRIMITIVES[usize::from(pair[0]).min(7)], nix::errno::Errno::from_raw(i32::from(pair[1])))),
        _ => Ok(()),
    }
}
