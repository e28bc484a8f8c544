//! Raw facts about how a sandbox ended, and the one place that turns them into an [`Outcome`]. Pure.
//!
//! The rule behind the order: what the supervisor did and saw itself comes before what the sandbox reports, since a program
//! chooses its exit code freely.

use std::time::Duration;

use serde::Serialize;

/// What happened to the process tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Outcome {
    /// The program ended with this code. Codes above 128 may stand for a death by signal: see [`Outcome::Signaled`].
    Exited {
        /// 0..=255.
        code: i32,
    },
    /// The program was ended by a signal; its exit code is 128 + the signal's number, as a shell gives it.
    Signaled {
        /// Signal number.
        signal: i32,
    },
    /// The deadline passed and the tree was killed.
    TimedOut,
    /// The tree used more memory than its limit and was killed.
    OutOfMemory {
        /// The limit in bytes.
        limit_bytes: u64,
    },
    /// It was asked to end before it was done.
    Cancelled,
    /// The sandbox itself broke before or while the program ran; never the program's fault.
    SetupFailed {
        /// What failed, for operators.
        reason: String,
    },
}

/// What the supervisor knows when everything is dead.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The `exit-code` line of bubblewrap's status descriptor; it is only written when the program was really started.
    pub reported_exit: Option<i32>,
    /// The supervisor killed the tree, for this reason.
    pub killed: Option<Killed>,
    /// Memory limit in force, bytes.
    pub memory_limit_bytes: u64,
    /// What bubblewrap printed while setting up, and nothing that the program printed.
    pub setup_message: String,
}

/// Why the supervisor killed a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Killed {
    /// The deadline.
    Deadline,
    /// The memory watchdog.
    Memory,
    /// A request from outside.
    Request,
}

/// Classifies. Total: each combination of facts has one outcome.
#[must_use]
pub fn classify(facts: &Facts) -> Outcome {
    match (facts.killed, facts.reported_exit) {
        (Some(Killed::Deadline), _) => Outcome::TimedOut,
        (Some(Killed::Memory), _) => Outcome::OutOfMemory { limit_bytes: facts.memory_limit_bytes },
        (Some(Killed::Request), _) => Outcome::Cancelled,
        (None, Some(code @ 129..=192)) => Outcome::Signaled { signal: code - 128 },
        (None, Some(code)) => Outcome::Exited { code },
        (None, None) => Outcome::SetupFailed {
            reason: if facts.setup_message.is_empty() {
                "bubblewrap ended without starting the program".to_owned()
            } else {
                facts.setup_message.clone()
            },
        },
    }
}

/// What the tree used.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Usage {
    /// From the moment the program was let go to the moment its whole tree was gone.
    pub wall: Duration,
    /// User and system time of the tree: what was reaped, or what was there before the kill, whichever is more. A lower bound,
    /// since a process that ignores `SIGCHLD` has its children's time dropped by the kernel.
    pub cpu: Duration,
    /// Largest resident memory seen, bytes: the larger of the kernel's figure for the largest process and the watchdog's
    /// samples of the whole tree.
    pub peak_memory_bytes: u64,
    /// Blocks read from storage, bytes.
    pub read_bytes: u64,
    /// Blocks written to storage, bytes.
    pub written_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_supervisor_did_outranks_what_the_program_claims() {
        let facts = Facts { reported_exit: Some(0), killed: Some(Killed::Deadline), ..Facts::default() };
        assert_eq!(classify(&facts), Outcome::TimedOut);
    }

    #[test]
    fn a_missing_exit_line_is_never_the_programs_fault() {
        let facts = Facts { setup_message: "no such interpreter".into(), ..Facts::default() };
        assert_eq!(classify(&facts), Outcome::SetupFailed { reason: "no such interpreter".into() });
    }

    #[test]
    fn exit_codes_above_128_are_read_as_signals_up_to_the_last_signal_number() {
        let outcome = |code| classify(&Facts { reported_exit: Some(code), ..Facts::default() });
        assert_eq!(outcome(137), Outcome::Signaled { signal: 9 });
        assert_eq!(outcome(128), Outcome::Exited { code: 128 });
        assert_eq!(outcome(255), Outcome::Exited { code: 255 });
    }
}
