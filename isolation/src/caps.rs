//! Capability sets of this process: what start-up decisions and `doctor` need to know of them.

use caps::{CapSet, Capability};

/// True when the effective set of this process holds the capability.
fn holds(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

/// Whether a process of ours may become another user: both halves are needed.
#[must_use]
pub fn can_change_user() -> bool {
    holds(Capability::CAP_SETUID) && holds(Capability::CAP_SETGID)
}

/// Whether this process may make mounts in a mount namespace of its own.
#[must_use]
pub fn can_mount() -> bool {
    holds(Capability::CAP_SYS_ADMIN)
}

/// Whether this process may give files to another user.
#[must_use]
pub fn can_change_owner() -> bool {
    holds(Capability::CAP_CHOWN)
}
