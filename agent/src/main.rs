//! `sandbox-agent`: runs untrusted code in single-use sandboxes and reports what happened.
//!
//! The road of one execution, top to bottom: `http::routes` → `http::wire` → `queue` → `runner` → `isolation` → the program;
//! back as an `execution::ExecutionResult` → `outbox` → `delivery` → `control_plane`. `app` puts it together.

#![forbid(unsafe_code)]

mod app;
mod artifacts;
mod cli;
mod config;
mod control_plane;
mod delivery;
mod execution;
mod http;
mod init;
mod language;
mod outbox;
mod output;
mod queue;
mod runner;
mod telemetry;
mod workspace;

use std::process::ExitCode;

/// musl's own allocator makes JSON several times slower.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        return init::run(|| {
            // One thread, always: this process does nothing else.
            let _ = isolation::wipe_environment(&[]);
        });
    }
    // Under init this process starts with every signal blocked.
    if let Err(error) = nix::sys::signal::SigSet::empty().thread_set_mask() {
        eprintln!("sandbox-agent: the signal mask can't be cleared: {error}");
        return ExitCode::FAILURE;
    }
    cli::main()
}
