//! One execution, from a valid request to its final record: sandbox, feed, pump, wait, collect.
//!
//! Runs on a thread of its own that lives as long as the sandbox (see `isolation::sandbox`). Three failures are kept apart: the
//! program failed (`failed`, `timed_out`), the sandbox failed (`crashed`), and the request was invalid (never gets here).

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use isolation::policy::Limits;
use isolation::profile::{self, Fallbacks, Layout, Request};
use isolation::sandbox::{Layers, Run};
use isolation::{Event, Launcher, Outcome, Report, SetupError, Stop};

use crate::artifacts::{self, Changes, Manifest, Skipped};
use crate::execution::{ArtifactRecord, Execution, ExecutionResult, State, Usage, now};
use crate::language::{Answer, Interpreters, Prepared, ResultReader};
use crate::output::{Captured, Output};
use crate::workspace::{Owner, Workspace};

/// Longest reason, bytes.
const MAX_REASON: usize = 1024;

/// What all executions of a session share.
#[derive(Debug)]
pub struct Runner {
    /// What was decided about this host; or why nothing can run on it.
    pub launcher: Result<Launcher, SetupError>,
    /// The parts of this host that sandboxes are built from.
    pub layout: Layout,
    /// Layers that may be weaker.
    pub fallbacks: Fallbacks,
    /// Python and the shell.
    pub interpreters: Interpreters,
    /// The session's folder.
    pub workspace: Workspace,
    /// Limits of each sandbox.
    pub limits: Limits,
    /// Set when the agent is on its way out: what is stopped then has crashed, it was not cancelled.
    pub is_draining: AtomicBool,
}

/// What a reader of the terminal gets while a program runs.
pub type Live<'a> = &'a mut dyn FnMut(Event);

impl Runner {
    /// Runs it. Never fails: whatever goes wrong becomes the record.
    pub fn run(
        &self,
        execution: &Execution,
        accepted_at: &str,
        output: &Output,
        stop: &Stop,
        live: Live,
    ) -> ExecutionResult {
        let started_at = now();
        let before = self.manifest();
        let ended = self.supervise(execution, output, stop, live);
        let changes = match (before, self.manifest()) {
            (Some(before), Some(after)) => before.changes(&after),
            _ => Changes::default(),
        };
        let (stdout, stderr) = output.take();
        let mut result = ExecutionResult::without_run(
            execution.id.as_str(),
            &execution.session_id,
            State::Crashed,
            None,
            accepted_at.to_owned(),
        );
        result.started_at = Some(started_at);
        match ended {
            Ok((report, answer)) => self.judge(&mut result, execution, &report, answer, &stderr),
            Err(reason) => result.reason = Some(format!("the sandbox could not be set up: {reason}")),
        }
        result.set_output(&stdout, &stderr);
        set_artifacts(&mut result, changes);
        if let Some(reason) = &mut result.reason {
            reason.truncate(reason.floor_char_boundary(MAX_REASON));
        }
        result
    }

    /// The policy and program of an execution, as it would be started.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn plan(&self, execution: &Execution) -> Result<(isolation::Policy, Prepared), String> {
        let mut prepared = self.interpreters.prepare(execution)?;
        let mut environment: BTreeMap<String, String> = std::mem::take(&mut prepared.environment).into_iter().collect();
        for (name, value) in &execution.environment {
            match environment.get_mut(name) {
                // The session's packages stay reachable behind what the user puts first.
                Some(ours) if name == "PYTHONPATH" => *ours = format!("{value}:{ours}"),
                _ => {
                    environment.insert(name.clone(), value.clone());
                }
            }
        }
        let request = Request {
            workspace: std::fs::canonicalize(self.workspace.path()).map_err(|error| format!("workspace: {error}"))?,
            environment,
            read_only: prepared.read_only.clone(),
            files: std::mem::take(&mut prepared.files),
            path: prepared.path.clone(),
            limits: self.limits.clone(),
        };
        Ok((profile::execute(&self.layout, self.fallbacks, request), prepared))
    }

    fn supervise(
        &self,
        execution: &Execution,
        output: &Output,
        stop: &Stop,
        live: Live,
    ) -> Result<(Report, Answer), String> {
        let launcher = self.launcher.as_ref().map_err(|error| chain(error))?;
        let (policy, prepared) = self.plan(execution)?;
        let request = prepared.request.as_deref();
        let sandbox = launcher.start(&policy, &prepared.program, request.is_some()).map_err(|error| chain(&error))?;
        let mut answer = ResultReader::default();
        let run = Run { request: request.unwrap_or_default(), timeout: execution.timeout, stop };
        let report = sandbox.supervise(&run, |event| {
            match event {
                Event::Stdout(bytes) => output.stdout(bytes),
                Event::Stderr(bytes) => output.stderr(bytes),
                Event::Result(bytes) => answer.push(bytes),
                Event::Started => {}
            }
            live(event);
        });
        Ok((report, answer.finish()))
    }

    /// From what happened to what is reported.
    fn judge(
        &self,
        result: &mut ExecutionResult,
        execution: &Execution,
        report: &Report,
        answer: Answer,
        stderr: &Captured,
    ) {
        result.usage = Some(usage(report));
        result.isolation = layers(&report.layers);
        let has_returned = answer.exit_code == Some(0) && !answer.is_broken;
        let (state, reason) = match &report.outcome {
            Outcome::Exited { code: 0 } if answer.is_broken => (
                State::Failed,
                Some("the result descriptor carried something that is not the bootstrap's protocol".to_owned()),
            ),
            Outcome::Exited { code: 0 } => (State::Succeeded, None),
            Outcome::Exited { code } => (State::Failed, Some(failure(&answer, *code))),
            // Exit codes above 128 that the program announced are its own choice.
            Outcome::Signaled { signal } if answer.exit_code == Some(128 + signal) => {
                (State::Failed, Some(failure(&answer, 128 + signal)))
            }
            Outcome::Signaled { signal } => {
                result.signal = Some(*signal);
                (State::Failed, Some(format!("killed by signal {signal}{}", signal_name(*signal))))
            }
            // The value is there; what kept the process alive were threads that the handler left behind.
            Outcome::TimedOut if has_returned => {
                result.exit_code = Some(0);
                let text = "succeeded; threads or processes left behind by the program were ended at the deadline";
                (State::Succeeded, Some(text.to_owned()))
            }
            Outcome::TimedOut => (State::TimedOut, Some(format!("timed out after {}", seconds(execution.timeout)))),
            Outcome::OutOfMemory { limit_bytes } => {
                (State::Failed, Some(format!("killed: out of memory, limit {} MiB", limit_bytes >> 20)))
            }
            Outcome::Cancelled if self.is_draining.load(Ordering::SeqCst) => {
                (State::Crashed, Some("the agent was stopped while the program ran".to_owned()))
            }
            Outcome::Cancelled => (State::Cancelled, Some("cancelled on request".to_owned())),
            Outcome::SetupFailed { reason } => {
                let said = stderr.text();
                let said = if reason.is_empty() { said.trim() } else { reason };
                (State::Crashed, Some(format!("the sandbox could not be set up: {said}")))
            }
        };
        result.state = state;
        result.reason = reason;
        match &report.outcome {
            Outcome::Exited { code } => result.exit_code = Some(*code),
            Outcome::Signaled { signal } => result.exit_code = Some(128 + signal),
            _ => {}
        }
        if state == State::Succeeded {
            result.return_value = answer.return_value;
        }
        result.diagnostic = answer.diagnostic;
    }

    fn manifest(&self) -> Option<Manifest> {
        match self.workspace.manifest(&artifacts::Limits::default()) {
            Ok(manifest) => Some(manifest),
            Err(error) => {
                tracing::warn!(error = chain(&error), "the workspace can't be listed; no artifacts are reported");
                None
            }
        }
    }

    /// Keeps a return value that is too long for a callback as a file of the workspace.
    #[must_use]
    pub fn keep_return_value(&self, result: &mut ExecutionResult) -> Option<String> {
        let value = result.return_value.as_ref()?;
        let path = format!("return_value_{}.json", result.execution_id);
        let owner = self.launcher.as_ref().ok().filter(|_| isolation::caps::can_change_owner());
        let owner = owner.map(|launcher| launcher.outside_user()).map(|(uid, gid)| Owner { uid, gid });
        if let Err(error) = self.workspace.store_file(&path, value.get().as_bytes(), owner) {
            tracing::warn!(
                execution_id = result.execution_id,
                error = chain(&error),
                "a long return value can't be kept"
            );
            return None;
        }
        result.artifacts.push(ArtifactRecord { path: path.clone(), size: value.get().len() as u64 });
        Some(path)
    }
}

/// An error with its causes, in one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

fn failure(answer: &Answer, code: i32) -> String {
    match &answer.diagnostic {
        Some(diagnostic) => {
            let first_line = diagnostic.message.lines().next().unwrap_or_default();
            format!("{}: {first_line}", diagnostic.kind)
        }
        None => format!("exited with code {code}"),
    }
}

fn signal_name(signal: i32) -> String {
    nix::sys::signal::Signal::try_from(signal).map(|name| format!(" ({name})")).unwrap_or_default()
}

fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs_f64())
}

fn usage(report: &Report) -> Usage {
    let millis = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
    Usage {
        wall_ms: millis(report.usage.wall),
        cpu_ms: millis(report.usage.cpu),
        peak_memory_bytes: report.usage.peak_memory_bytes,
        io_read_bytes: report.usage.read_bytes,
        io_write_bytes: report.usage.written_bytes,
    }
}

fn layers(layers: &Layers) -> Option<serde_json::Value> {
    serde_json::to_value(layers).ok()
}

fn set_artifacts(result: &mut ExecutionResult, changes: Changes) {
    let Changes { artifacts, skipped, truncated, deleted: _ } = changes;
    result.artifacts =
        artifacts.into_iter().map(|artifact| ArtifactRecord { path: artifact.path, size: artifact.size }).collect();
    let Skipped { not_utf8, too_long, too_deep, links, fifos, sockets, devices, mounts, unreadable, vanished, .. } =
        skipped;
    let reasons = [
        ("name_not_utf8", not_utf8),
        ("path_too_long", too_long),
        ("too_deep", too_deep),
        ("symbolic_link", links),
        ("fifo", fifos),
        ("socket", sockets),
        ("device", devices),
        ("other_mount", mounts),
        ("unreadable", unreadable),
        ("vanished", vanished),
        ("limit_reached", usize::from(truncated)),
    ];
    let present = reasons.into_iter().filter(|(_, count)| *count > 0);
    result.artifacts_skipped = present.map(|(reason, count)| (reason.to_owned(), count as u64)).collect();
}

/// Makes the workspace usable for the sandbox's user, where the agent is root and the workspace belongs to root.
///
/// Only what belongs to root is handed over, links are not followed, and files with several names are left alone, since another
/// name of theirs may lie outside.
///
/// # Errors
/// When the folder can't be handed over.
pub fn hand_over_workspace(path: &Path, user: (u32, u32)) -> std::io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root || !isolation::caps::can_change_owner() || std::fs::metadata(path)?.uid() != 0 {
        return Ok(false);
    }
    let mut waiting = vec![std::fs::canonicalize(path)?];
    std::os::unix::fs::chown(&waiting[0], Some(user.0), Some(user.1))?;
    while let Some(folder) = waiting.pop() {
        for entry in std::fs::read_dir(&folder)?.flatten() {
            let Ok(found) = entry.metadata() else { continue };
            if found.uid() != 0 || (!found.is_dir() && found.nlink() > 1) {
                continue;
            }
            let _ = std::os::unix::fs::lchown(entry.path(), Some(user.0), Some(user.1));
            if found.is_dir() {
                waiting.push(entry.path());
            }
        }
    }
    Ok(true)
}

/// The user for sandboxes of an agent that is root: the workspace's owner, or the configured one if that is root.
#[must_use]
pub fn sandbox_user(workspace: &Path, configured: (u32, u32)) -> (u32, u32) {
    use std::os::unix::fs::MetadataExt;
    match std::fs::metadata(workspace) {
        Ok(found) if found.uid() != 0 && found.gid() != 0 => (found.uid(), found.gid()),
        Ok(found) if found.uid() != 0 => (found.uid(), found.uid()),
        _ => configured,
    }
}
