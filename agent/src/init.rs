//! PID 1 of the container: starts this executable again as the agent, forwards signals to it, reaps what is orphaned,
//! and ends as the agent ended.
//!
//! Why two processes: PID 1 inherits every orphan of the container and must collect it, which takes a wait for *any*
//! child. The agent waits for children of its own, by pid, from its runtime and from the threads that own sandboxes. In
//! one process the first wait would steal the exit statuses of the second. So PID 1 does nothing but this, has one
//! thread, and the agent is an ordinary process with an ordinary parent.
//!
//! Invariants:
//!
//! - All signals are blocked before the agent is started and are taken one by one with sigwait(3). Nothing is handled
//!   asynchronously, and nothing that arrives early is lost. The agent inherits that mask and clears it as its first act.
//! - The agent's pid is signalled only before it is reaped, so it can't belong to another process by then.
//! - When this process ends the kernel kills every other process of its PID namespace; nothing outlives the agent.
//! - It holds no secret that can be read: not dumpable from the start (which closes `/proc/1/{environ,mem,fd,...}` to all
//!   without CAP_SYS_PTRACE), and its environment is wiped as soon as the agent has its copy.
//!
//! This module uses nothing of the agent's other modules.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use nix::errno::Errno;
use nix::sys::prctl::set_dumpable;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What the agent is told about. Job control (SIGTSTP, SIGTTIN, SIGTTOU) stays blocked and so has no effect: a stopped
/// PID 1 would be a stopped container.
const FORWARDED: [Signal; 8] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
    Signal::SIGCONT,
];

/// The exit code if the agent could not be started or was lost sight of: EX_SOFTWARE of sysexits.h.
const EXIT_INTERNAL: u8 = 70;

/// Why PID 1 can't do its work.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error("can't read whether SIGCHLD is ignored from /proc/self/status")]
    Status(#[source] std::io::Error),
    #[error(
        "SIGCHLD is ignored, so the kernel would discard exit statuses; start the container with it at its default"
    )]
    ChildrenIgnored,
    #[error("can't block signals")]
    Block(#[source] Errno),
    #[error("can't make this process undumpable")]
    Dumpable(#[source] Errno),
    #[error("can't start the agent from /proc/self/exe")]
    Start(#[source] std::io::Error),
    #[error("can't wait for signals")]
    Wait(#[source] Errno),
    #[error("can't wait for children")]
    Reap(#[source] Errno),
    #[error("the agent is gone and its exit status with it")]
    Lost,
}

/// Does the work of PID 1 and returns when the agent has ended: with its exit code, or 128 + n if signal n ended it, or
/// 70 and a line on stderr if it could not be started.
///
/// Call it before any thread or runtime exists: only the calling thread's signals get blocked. `wipe_environment` is
/// called once, when the agent has been started, and must overwrite this process's environment in place.
pub fn run(wipe_environment: fn()) -> ExitCode {
    match supervise(wipe_environment) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            eprintln!("init: {error}{}", cause.unwrap_or_default());
            ExitCode::from(EXIT_INTERNAL)
        }
    }
}

fn supervise(wipe_environment: fn()) -> Result<u8, InitError> {
    refuse_ignored_children()?;
    SigSet::all().thread_block().map_err(InitError::Block)?;
    set_dumpable(false).map_err(InitError::Dumpable)?;
    let agent = start_agent()?;
    wipe_environment();

    // The real-time signals stay blocked and unread: nix has no type for them and would panic.
    let awaited: SigSet = FORWARDED.into_iter().chain([Signal::SIGCHLD]).collect();
    loop {
        match awaited.wait().map_err(InitError::Wait)? {
            Signal::SIGCHLD => {
                if let Some(code) = reap(agent)? {
                    return Ok(code);
                }
            }
            // It can only fail if the agent changed its user; then there is nobody to tell.
            signal => {
                let _ = kill(agent, signal);
            }
        }
    }
}

/// With SIGCHLD ignored, which is inherited through exec, no child ever reports: this process would wait for ever. It
/// can't be undone without unsafe code, so it is refused by name.
fn refuse_ignored_children() -> Result<(), InitError> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(InitError::Status)?;
    if ignores(&status, Signal::SIGCHLD) {
        return Err(InitError::ChildrenIgnored);
    }
    Ok(())
}

/// Whether `/proc/PID/status` lists the signal as ignored: bit n-1 of a hexadecimal mask stands for signal n (proc(5)).
fn ignores(status: &str, signal: Signal) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> (signal as i32 - 1) & 1 == 1)
}

/// Starts this executable again, with the same arguments, environment and descriptors.
fn start_agent() -> Result<Pid, InitError> {
    let mut arguments = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    // The handle is dropped: `reap` waits for the agent as for every other child.
    let child = command.args(arguments).spawn().map_err(InitError::Start)?;
    Ok(Pid::from_raw(child.id().cast_signed()))
}

/// Collects every child that has ended; the agent's exit code if it was among them.
fn reap(agent: Pid) -> Result<Option<u8>, InitError> {
    let mut code = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return Ok(code),
            Ok(status) if status.pid() == Some(agent) => code = exit_code(status).or(code),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => return code.ok_or(InitError::Lost).map(Some),
            Err(error) => return Err(InitError::Reap(error)),
        }
    }
}

/// The exit code that stands for how a process ended, as shells have it; `None` if it has not ended.
fn exit_code(status: WaitStatus) -> Option<u8> {
    match status {
        // exit(2) keeps the low 8 bits, and signals end at 64.
        WaitStatus::Exited(_, code) => Some(u8::try_from(code).unwrap_or(u8::MAX)),
        WaitStatus::Signaled(_, signal, _) => Some(128 + signal as i32 as u8),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        let pid = Pid::from_raw(7);
        assert_eq!(exit_code(WaitStatus::Exited(pid, 0)), Some(0));
        assert_eq!(exit_code(WaitStatus::Exited(pid, 255)), Some(255));
        assert_eq!(exit_code(WaitStatus::Signaled(pid, Signal::SIGKILL, false)), Some(137));
        assert_eq!(exit_code(WaitStatus::Signaled(pid, Signal::SIGSEGV, true)), Some(139));
        assert_eq!(exit_code(WaitStatus::Continued(pid)), None);
    }

    #[test]
    fn ignored_signals_are_read_from_the_mask() {
        let status = "Name:\tx\nSigBlk:\tffffffffffffffff\nSigIgn:\t0000000000010000\nSigCgt:\t0\n";
        assert!(ignores(status, Signal::SIGCHLD));
        assert!(!ignores(status, Signal::SIGPIPE));
        assert!(!ignores("SigIgn:\t0000000000001000\n", Signal::SIGCHLD));
        assert!(!ignores("", Signal::SIGCHLD));
    }
}
