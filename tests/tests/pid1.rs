//! Promise: as PID 1 of a container the agent is two processes: an init that reaps and forwards, and the agent.

use std::time::Duration;

use serde_json::json;
use tests::agent::send_signal;
use tests::processes::{self, Process};
use tests::requirements::is_root;
use tests::{Agent, AgentBuilder, ControlPlane, Submission, require_sandbox, wait};

const SOON: Duration = Duration::from_secs(10);

/// The beginning of a command that makes what follows PID 1 of a namespace with its own `/proc`.
fn as_pid_1(more: &[&str]) -> AgentBuilder {
    let mut command = vec!["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL"];
    if !is_root() {
        command.extend(["--user", "--map-current-user"]);
    }
    Agent::builder().launcher(&[&command, more].concat())
}

/// The process that is PID 1 there: the launcher's only child.
fn init_of(agent: &Agent) -> Process {
    processes::children(agent.pid()).into_iter().next().expect("the init")
}

fn worker_of(init: &Process) -> Process {
    let children = processes::children(init.pid);
    children.into_iter().find(|process| process.arguments.contains("serve")).expect("the agent below the init")
}

#[test]
fn executions_run_below_an_init() {
    if !require_sandbox() {
        return;
    }
    let agent = as_pid_1(&[]).start();
    let init = init_of(&agent);
    assert_ne!(worker_of(&init).pid, init.pid);
    assert_eq!(agent.run(&Submission::python("def handler(event):\n    return 1\n"))["return_value"], 1);
}

#[test]
fn sigterm_to_the_init_drains_and_exits_143() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let mut agent = as_pid_1(&[]).env("CONTROL_PLANE_URL", mock.url()).env("CONTAINER_ID", "c").start();
    let submission =
        Submission::python("import time\nprint('so far', flush=True)\nopen('started', 'w')\ntime.sleep(600)\n");
    mock.submit(&agent, &submission).expect("an answer");
    wait::until("it to start", SOON, || agent.workspace().join("started").exists());
    send_signal(init_of(&agent).pid, libc::SIGTERM);
    assert_eq!(agent.wait(SOON), 143);
    assert_eq!(mock.wait_for_report(submission.execution_id(), Duration::ZERO)["stdout"], "so far\n");
    assert_eq!(mock.exited()[0]["exit_reason"], json!("sigterm"));
}

#[test]
fn the_init_exits_as_the_agent_did() {
    let mut agent = as_pid_1(&[]).start();
    send_signal(worker_of(&init_of(&agent)).pid, libc::SIGKILL);
    assert_eq!(agent.wait(SOON), 137);
}

#[test]
fn orphans_are_reaped() {
    // The shell leaves a process behind, becomes the agent, and so is the one that it falls to.
    let script = "(sleep 3.1416 &); (sleep 600.25 &); exec \"$@\"";
    let agent = as_pid_1(&["sh", "-c", script, "sh"]).start();
    let init = init_of(&agent);
    let orphans =
        || processes::children(init.pid).into_iter().filter(|process| process.name == "sleep").collect::<Vec<_>>();
    // Control: they are its children now.
    wait::until("two orphans", SOON, || orphans().len() == 2);
    wait::until("the first one to be reaped", SOON, || orphans().len() == 1);
    send_signal(orphans()[0].pid, libc::SIGKILL);
    wait::until("the second one to be reaped", SOON, || orphans().is_empty());
    assert_ne!(agent.get("/health").text(), "");
}

#[test]
fn what_a_sandbox_leaves_is_reaped_too() {
    if !require_sandbox() {
        return;
    }
    let agent = as_pid_1(&[]).start();
    let init = init_of(&agent);
    let code = "import os, time\ndef handler(event):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(600)\n    return 1\n";
    for _ in 0..5 {
        assert_eq!(agent.run(&Submission::python(code))["return_value"], 1);
    }
    let zombies = || processes::all().into_iter().filter(|process| process.state == 'Z').collect::<Vec<_>>();
    let worker = worker_of(&init).pid;
    wait::until("no zombies below the init", SOON, || {
        !zombies().iter().any(|zombie| zombie.parent == init.pid || zombie.parent == worker)
    });
}
