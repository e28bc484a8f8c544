//! Policy in, sandbox out, outcome back.
//!
//! # What this crate defends
//! A program in a [`Sandbox`] is hostile and has read this source. It gets a process tree of its own in fresh user, pid,
//! mount, network, ipc, uts and cgroup namespaces, as an unprivileged user inside and outside, with no capabilities, a seccomp
//! filter, a read-only system and bounded resources. Its supervisor trusts nothing that comes out of it.
//!
//! # The pieces
//! [`Policy`] is plain data, made by [`profile`]. [`Launcher`] holds what was decided about this host at start. It turns
//! a policy into a [`Sandbox`], parked right before its program; [`Sandbox::supervise`] lets it go and comes back with a
//! [`Report`] once nothing of it is left. This crate knows no HTTP, no storage, no control plane, and reads no environment
//! variable.

pub mod bwrap;
pub mod caps;
pub mod outcome;
pub mod policy;
pub mod probe;
pub mod profile;
pub mod rlimits;
pub mod sandbox;
pub mod seccomp;
mod sys;
mod tree;

pub use outcome::{Outcome, Usage};
pub use policy::{Limits, Policy};
pub use sandbox::{Event, Launcher, Report, Sandbox, SetupError, Stop};
pub use sys::wipe_environment;
