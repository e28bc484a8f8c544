//! Typed limits to kernel resource limits (`getrlimit(2)`).
//!
//! Two groups, because of one rule: `RLIMIT_NPROC` is counted per user *and* user namespace. Set before bubblewrap makes
//! its namespace, it would bound all sandboxes of that user together; set on the sandbox's first process after the
//! namespace exists, it bounds this sandbox alone. The others are inherited from before bubblewrap is started.

use nix::sys::resource::Resource;

use crate::policy::Limits;

/// One resource with its soft and hard value.
pub type Rlimit = (Resource, u64, u64);

/// The limits that are in force from before bubblewrap starts.
#[must_use]
pub fn inherited(limits: &Limits) -> Vec<Rlimit> {
    let both = |resource, value| (resource, value, value);
    vec![
        // A core dump would land in the workspace and hold whatever the program had in memory.
        both(Resource::RLIMIT_CORE, 0),
        both(Resource::RLIMIT_NOFILE, limits.open_files),
        both(Resource::RLIMIT_FSIZE, limits.file_bytes),
        // A hard stop for one process that takes memory faster than the watchdog looks; twice the limit, since it counts
        // what is reserved, not what is resident.
        both(Resource::RLIMIT_DATA, limits.memory_bytes.saturating_mul(2)),
        both(Resource::RLIMIT_MEMLOCK, 8 << 20),
        both(Resource::RLIMIT_MSGQUEUE, 819_200),
        both(Resource::RLIMIT_RTPRIO, 0),
        both(Resource::RLIMIT_NICE, 0),
        both(Resource::RLIMIT_SIGPENDING, 4096),
    ]
}

/// The limit that is put on the sandbox's first process once its user namespace exists.
#[must_use]
pub fn own_namespace(limits: &Limits) -> Rlimit {
    (Resource::RLIMIT_NPROC, limits.processes, limits.processes)
}
