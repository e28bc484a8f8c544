//! What this host permits, tried for real.
//!
//! The full policy is started once with a trusted program. If that works, every layer works, and the program's own
//! `/proc/self/status` proves it. If not, one layer after the other is left out until it does, and below that the primitives
//! of bubblewrap are tried one by one; the remedy follows from what failed with which errno. No error text is ever read.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use crate::bwrap::Program;
use crate::outcome::Outcome;
use crate::policy::Policy;
use crate::profile::{self, Fallbacks, Layout, Request};
use crate::sandbox::{Event, Launcher, Run, SetupError, Stop};
use crate::sys;

/// How long the trusted program may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The answer of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The layer that was looked at.
    pub layer: &'static str,
    /// Whether it holds here.
    pub works: bool,
    /// What was seen.
    pub detail: String,
    /// What to change where it doesn't.
    pub remedy: Option<String>,
}

impl Finding {
    fn good(layer: &'static str, detail: impl Into<String>) -> Self {
        Self { layer, works: true, detail: detail.into(), remedy: None }
    }

    fn bad(layer: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { layer, works: false, detail: detail.into(), remedy: Some(remedy.into()) }
    }
}

/// Looks at every layer.
#[must_use]
pub fn examine(launcher: &Result<Launcher, SetupError>, layout: &Layout, fallbacks: Fallbacks) -> Vec<Finding> {
    let launcher = match launcher {
        Ok(launcher) => launcher,
        Err(error) => {
            return vec![Finding::bad(
                "bubblewrap",
                error.to_string(),
                "install bubblewrap 0.8 or later (package bubblewrap)",
            )];
        }
    };
    let mut findings = vec![Finding::good("bubblewrap", format!("release {}", launcher.version()))];
    if let Some(finding) = outside_user(launcher) {
        findings.push(finding);
    }
    match attempt(launcher, layout, fallbacks) {
        Ok(seen) => findings.extend(layers_seen(&seen, fallbacks)),
        Err(failure) => findings.extend(missing_layers(launcher, layout, fallbacks, &failure)),
    }
    findings
}

fn outside_user(launcher: &Launcher) -> Option<Finding> {
    let (uid, _) = launcher.outside_user();
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    Some(if crate::caps::can_change_user() {
        Finding::good("unprivileged user", format!("sandboxes run as uid {uid} outside, not as root"))
    } else {
        Finding::bad(
            "unprivileged user",
            "the agent is root without CAP_SETUID and CAP_SETGID, so it can't give sandboxes another user",
            "run the agent as uid 1000 (docker: --user 1000:1000; Kubernetes: runAsUser: 1000), or add SETUID and SETGID",
        )
    })
}

/// What the trusted program saw of itself.
struct Seen {
    status: String,
    namespaces: Vec<&'static str>,
}

fn attempt(launcher: &Launcher, layout: &Layout, fallbacks: Fallbacks) -> Result<Seen, String> {
    let request = Request { workspace: PathBuf::from("/usr"), ..Request::default() };
    let mut policy: Policy = profile::execute(layout, fallbacks, request);
    policy.workspace.writable = false;
    let program = Program { argv: vec!["/bin/cat".into(), "/proc/self/status".into()] };
    let explain = |error: &dyn std::error::Error| match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    let sandbox = launcher.start(&policy, &program, false).map_err(|error| explain(&error))?;
    let stop = Stop::new().map_err(|error| explain(&error))?;
    let mut status = Vec::new();
    let report = sandbox.supervise(&Run { request: &[], timeout: PATIENCE, stop: &stop }, |event| {
        if let Event::Stdout(bytes) = event {
            status.extend_from_slice(bytes);
        }
    });
    match report.outcome {
        Outcome::Exited { code: 0 } => {
            Ok(Seen { status: String::from_utf8_lossy(&status).into_owned(), namespaces: report.layers.namespaces })
        }
        Outcome::SetupFailed { reason } => Err(reason),
        other => Err(format!("the probe program ended with {other:?}")),
    }
}

fn layers_seen(seen: &Seen, fallbacks: Fallbacks) -> Vec<Finding> {
    let field = |name: &str| {
        let line = seen.status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().trim().to_owned()
    };
    let mut findings = vec![Finding::good("namespaces", seen.namespaces.join(", "))];
    let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(field);
    let empty = sets.iter().all(|set| !set.is_empty() && set.chars().all(|digit| digit == '0'));
    findings.push(expect("capabilities", empty, "all five sets are empty", format!("sets are {sets:?}")));
    let seccomp = field("Seccomp");
    findings.push(expect("seccomp", seccomp == "2", "a filter is in force", format!("Seccomp is {seccomp:?}")));
    let locked = field("NoNewPrivs");
    findings.push(expect("no_new_privs", locked == "1", "set", format!("NoNewPrivs is {locked:?}")));
    let uid = field("Uid");
    findings.push(expect(
        "user inside",
        !uid.starts_with('0') && !uid.is_empty(),
        "not root",
        format!("Uid is {uid:?}"),
    ));
    findings.push(if fallbacks.nested_user_namespaces {
        Finding::good("nested user namespaces", "refused by seccomp alone (fallback nested-userns)")
    } else {
        Finding::good("nested user namespaces", "refused by the kernel and by seccomp")
    });
    findings.push(if fallbacks.host_proc {
        Finding::good("proc", "the agent's /proc, read-only (fallback proc-host): other command lines are readable")
    } else {
        Finding::good("proc", "fresh")
    });
    findings
}

fn expect(layer: &'static str, holds: bool, good: &str, bad: String) -> Finding {
    if holds {
        Finding::good(layer, good)
    } else {
        Finding::bad(layer, bad, "this bubblewrap does not do what it is asked; install an unmodified release")
    }
}

fn missing_layers(launcher: &Launcher, layout: &Layout, asked: Fallbacks, failure: &str) -> Vec<Finding> {
    let with = |host_proc, nested_user_namespaces| {
        let fallbacks = Fallbacks {
            host_proc: asked.host_proc || host_proc,
            nested_user_namespaces: asked.nested_user_namespaces || nested_user_namespaces,
        };
        attempt(launcher, layout, fallbacks).is_ok()
    };
    let proc_missing = || {
        Finding::bad(
            "proc",
            "a fresh /proc can't be mounted: parts of the /proc around the agent are masked",
            "docker: --security-opt systempaths=unconfined; podman: --security-opt unmask=ALL; Kubernetes: hostUsers: false and \
             procMount: Unmasked. Or accept that command lines of other processes are readable: ISOLATION_FALLBACKS=proc-host",
        )
    };
    let nested_missing = || {
        Finding::bad(
            "nested user namespaces",
            "the kernel's counter can't be set to zero: /proc/sys/user is not writable",
            "unmask /proc as for the proc layer. Or rely on seccomp alone: ISOLATION_FALLBACKS=nested-userns",
        )
    };
    if with(true, false) {
        return vec![proc_missing()];
    }
    if with(false, true) {
        return vec![nested_missing()];
    }
    if with(true, true) {
        return vec![proc_missing(), nested_missing()];
    }
    if std::fs::read_to_string("/proc/sys/user/max_user_namespaces").is_ok_and(|most| most.trim() == "0") {
        let detail = "user.max_user_namespaces is 0: nobody may create a user namespace";
        return vec![Finding::bad(
            "namespaces",
            detail,
            remedy("creating a user namespace", nix::errno::Errno::ENOSPC),
        )];
    }
    match sys::try_primitives((nix::unistd::geteuid().is_root()).then(|| launcher.outside_user())) {
        Ok(()) => vec![Finding::bad(
            "sandbox",
            failure,
            "every primitive works by itself; run `sandbox-agent policy` and start the command by hand",
        )],
        Err((step, errno)) => {
            let detail = format!("{step}: {}", errno.desc());
            vec![Finding::bad("namespaces", detail, remedy(step, errno))]
        }
    }
}

/// From the primitive that failed and its errno to what helps.
fn remedy(step: &str, errno: nix::errno::Errno) -> String {
    use nix::errno::Errno;
    let seccomp = "allow clone, unshare, mount, umount2 and pivot_root in the container's seccomp profile (docker: --security-opt \
                   seccomp=container.json; Kubernetes: seccompProfile of type Localhost)";
    let apparmor = "give the container an AppArmor profile with userns, mount and pivot_root (docker: --security-opt \
                    apparmor=unconfined), on Ubuntu 23.10 and later also for /usr/bin/bwrap on the host";
    match (step, errno) {
        (_, Errno::ENOSPC) => {
            "raise user.max_user_namespaces on the host (sysctl -w user.max_user_namespaces=10000)".to_owned()
        }
        (_, Errno::EACCES) => apparmor.to_owned(),
        ("mapping user ids", _) => {
            "run the agent as uid 1000 instead of root, or add the capability SETFCAP; on Ubuntu: ".to_owned()
                + apparmor
        }
        _ if Path::new("/proc/sys/kernel/unprivileged_userns_clone").exists() => {
            format!("{seccomp}; on this kernel also: sysctl -w kernel.unprivileged_userns_clone=1")
        }
        _ => seccomp.to_owned(),
    }
}
