//! What a test needs of the machine.
//!
//! A need that is not met prints one loud line and the test returns early; with `SANDBOX_MUST_WORK=1`, as CI sets
//! it, the same is a failure. A skipped test never looks like a passed one by accident.

use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// True when bubblewrap is there and may create user namespaces.
pub fn require_sandbox() -> bool {
    static REASON: OnceLock<Option<String>> = OnceLock::new();
    let reason = REASON.get_or_init(|| {
        let arguments = ["--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "--proc", "/proc", "true"];
        match Command::new("bwrap").args(arguments).stdout(Stdio::null()).output() {
            Err(error) => Some(format!("bubblewrap can't be started: {error}")),
            Ok(output) if output.status.success() => None,
            Ok(output) => Some(format!("no sandbox here: {}", String::from_utf8_lossy(&output.stderr).trim())),
        }
    });
    require(reason.is_none(), reason.as_deref().unwrap_or_default())
}

/// True when the tests run as root, which switching to another user needs.
pub fn require_root() -> bool {
    require(is_root(), "only root can start the agent as another user")
}

/// True when `met`; otherwise says why not, or panics where everything must work.
pub fn require(met: bool, reason: &str) -> bool {
    if !met {
        let must_work = std::env::var("SANDBOX_MUST_WORK").is_ok_and(|value| value == "1");
        assert!(!must_work, "SANDBOX_MUST_WORK=1, yet {reason}");
        eprintln!("\n*** NOT RUN: {reason} ***\n");
    }
    met
}

/// Whether this process is root.
pub fn is_root() -> bool {
    // SAFETY: geteuid has no arguments, touches no memory and can't fail.
    unsafe { libc::geteuid() == 0 }
}
