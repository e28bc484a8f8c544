//! Promise: what was accepted is reported once and run at most once, whatever breaks.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tests::submission::fresh_id;
use tests::{Agent, ControlPlane, Fault, Faults, Submission, http, require_sandbox, wait};

const SOON: Duration = Duration::from_secs(20);
const EVENTUALLY: Duration = Duration::from_secs(240);
const EXECUTIONS: usize = 200;
const AT_A_TIME: usize = 8;
/// So many accepted executions before the agent is killed.
const KILLS: [usize; 2] = [60, 130];

/// Leaves one byte per run in a file of its own, then does what its event says.
const PROGRAM: &str = r"
import time
def handler(event):
    with open('runs-' + event['id'], 'ab', buffering=0) as runs:
        runs.write(b'x')
    kind = event['kind']
    if kind == 0:
        time.sleep(0.7)
    if kind == 1:
        raise ValueError('expected')
    if kind == 2:
        print('x' * 200000)
    if kind == 3:
        return 'y' * 100000
    return event['id']
";
/// Prints, leaves a byte to show that it did, then sleeps for ever.
const SLEEPS: &str = "import time\ndef handler(event):\n    print('so far', flush=True)\n    open('runs', 'ab').write(b'x')\n    time.sleep(600)\n";
const RETURNS_ONE: &str = "def handler(event):\n    return 1\n";

fn agent_of(mock: &ControlPlane) -> Agent {
    Agent::builder().env("CONTROL_PLANE_URL", mock.url()).env("CONTAINER_ID", "container-of-the-tests").start()
}

/// A program that has printed its line and runs.
fn running(mock: &ControlPlane, agent: &Agent) -> Submission {
    let submission = Submission::python(SLEEPS).timeout(600);
    assert_eq!(mock.submit(agent, &submission).expect("an answer").status, 200);
    wait::until("its side effect", SOON, || agent.workspace().join("runs").exists());
    submission
}

/// Submits as the control plane does, with the same id until it is accepted.
fn submit_until_accepted(address: &Mutex<SocketAddr>, submission: &Submission) {
    wait::until("a submit to be accepted", EVENTUALLY, || {
        let current = *address.lock().expect("the address");
        match http::post(current, "/execute", submission.body()) {
            Ok(response) if response.status == 200 => true,
            Ok(response) if response.status == 503 => false,
            Ok(response) => panic!("a valid submit is answered {}: {}", response.status, response.text()),
            Err(_) => {
                std::thread::sleep(Duration::from_millis(20));
                false
            }
        }
    });
}

#[test]
fn two_hundred_executions_survive_two_kills_and_a_bad_control_plane() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let hang = Fault::Hang(Duration::from_secs(8));
    let kinds = [
        Fault::Status(500),
        Fault::Status(503),
        Fault::Reset,
        Fault::LostAnswer,
        Fault::Status(500),
        Fault::Reset,
        hang,
    ];
    mock.set_faults(Faults::new(0.4, &kinds, 20_250_101));
    let mut agent = agent_of(&mock);
    let address = Mutex::new(agent.address());
    let accepted = AtomicUsize::new(0);
    let next = AtomicUsize::new(0);
    let submissions: Vec<_> = (0..EXECUTIONS)
        .map(|number| {
            let id = fresh_id();
            Submission::python(PROGRAM).id(&id).event(json!({"id": id, "kind": number % 10}))
        })
        .collect();
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while let Some(submission) = submissions.get(next.fetch_add(1, Ordering::SeqCst)) {
                    mock.expect(submission.execution_id());
                    submit_until_accepted(&address, submission);
                    accepted.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for kill in KILLS {
            wait::until("enough executions", EVENTUALLY, || accepted.load(Ordering::SeqCst) >= kill);
            agent.kill();
            agent.restart();
            *address.lock().expect("the address") = agent.address();
        }
        wait::until("the last execution to be accepted", EVENTUALLY, || accepted.load(Ordering::SeqCst) == EXECUTIONS);
        mock.set_down(true);
        std::thread::sleep(Duration::from_secs(3));
        mock.set_down(false);
    });
    let mut statuses = BTreeMap::new();
    for (number, submission) in submissions.iter().enumerate() {
        let id = submission.execution_id();
        let report = mock.wait_for_report(id, EVENTUALLY);
        assert_eq!(mock.recorded(id).len(), 1, "{id} was reported more than once");
        let status = report["status"].as_str().unwrap_or_default().to_owned();
        let runs = fs::read(agent.workspace().join(format!("runs-{id}"))).map_or(0, |file| file.len());
        match status.as_str() {
            "crashed" => assert!(runs <= 1, "{id} crashed and ran {runs} times"),
            _ => assert_eq!(runs, 1, "{id} is {status} and ran {runs} times"),
        }
        let expected = if number % 10 == 1 { "failed" } else { "success" };
        assert!([expected, "crashed"].contains(&status.as_str()), "{report:#}");
        *statuses.entry(status).or_insert(0) += 1;
    }
    eprintln!("{EXECUTIONS} executions: {statuses:?}");
    // What was queued at a kill has crashed; what was submitted after the last one has not.
    assert!(statuses["success"] >= 20, "{statuses:?}");
}

#[test]
fn what_ran_when_the_agent_died_is_reported_crashed_and_never_run_again() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let mut agent = agent_of(&mock);
    let submission = running(&mock, &agent);
    let id = submission.execution_id();
    agent.kill();
    assert!(mock.reports(id).is_empty());
    agent.restart();
    let report = mock.wait_for_report(id, SOON);
    assert_eq!((&report["status"], &report["exit_code"]), (&json!("crashed"), &json!(-1)), "{report:#}");
    assert_ne!(report["stderr"], "", "crashed, and not told why");
    assert_eq!(agent.execution(id).expect("known")["state"], "crashed");
    assert_eq!(mock.submit(&agent, &submission).expect("an answer").status, 200);
    // Control: the same agent does run what is new.
    let other = Submission::python(RETURNS_ONE);
    mock.submit(&agent, &other).expect("an answer");
    assert_eq!(mock.wait_for_report(other.execution_id(), SOON)["status"], "success");
    assert_eq!(fs::read(agent.workspace().join("runs")).expect("the side effect"), b"x");
    assert_eq!(mock.recorded(id).len(), 1);
}

#[test]
fn a_result_that_was_not_taken_survives_a_kill() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let mut agent = agent_of(&mock);
    mock.set_down(true);
    let submission = Submission::python("def handler(event):\n    print('kept')\n    return {'a': 1}\n");
    mock.submit(&agent, &submission).expect("an answer");
    let before = agent.wait_for_end(submission.execution_id(), SOON);
    agent.kill();
    mock.set_down(false);
    agent.restart();
    let report = mock.wait_for_report(submission.execution_id(), SOON);
    assert_eq!(report["status"], "success", "{report:#}");
    assert_eq!(report["stdout"], "kept\n");
    assert_eq!(report["return_value"], json!({"a": 1}));
    let after = agent.execution(submission.execution_id()).expect("known");
    assert_eq!((&after["state"], &after["return_value"]), (&before["state"], &before["return_value"]));
}

#[test]
fn sigterm_reports_what_runs_and_says_goodbye() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let mut agent = agent_of(&mock);
    let submission = running(&mock, &agent);
    assert_eq!(agent.stop(), 143);
    let report = mock.wait_for_report(submission.execution_id(), Duration::ZERO);
    assert_eq!(report["status"], "crashed", "{report:#}");
    assert_eq!(report["stdout"], "so far\n", "with the output that it had");
    let exited = mock.exited();
    assert_eq!(exited.len(), 1, "{exited:?}");
    assert_eq!((&exited[0]["exit_code"], &exited[0]["exit_reason"]), (&json!(143), &json!("sigterm")));
    assert_eq!(exited[0]["container_id"], "container-of-the-tests");
}

#[test]
fn sigterm_without_work_is_quick_and_143() {
    let mock = ControlPlane::start();
    let mut agent = agent_of(&mock);
    wait::until("ready", SOON, || !mock.ready_calls().is_empty());
    let start = Instant::now();
    assert_eq!(agent.stop(), 143);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!(mock.exited().len(), 1);
}

#[test]
fn a_drain_admits_nothing_ends_in_time_and_keeps_what_was_not_taken() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let mut agent = agent_of(&mock);
    let submission = running(&mock, &agent);
    mock.set_down(true);
    let start = Instant::now();
    agent.signal(libc::SIGTERM);
    let late = Submission::python(RETURNS_ONE);
    let refused = wait::for_value("a submit to be refused", Duration::from_secs(3), || {
        match agent.try_submit(&late.clone().id(&fresh_id())) {
            // A signal takes a moment to be heard: until then it is accepted, which this test does not count.
            Ok(response) if response.status == 200 => None,
            other => Some(other),
        }
    });
    if let Ok(response) = refused {
        assert_eq!(response.status, 503, "{}", response.text());
        assert_eq!(response.json()["error_code"], "Executor.Draining");
    }
    assert_eq!(agent.wait(SOON), 143);
    assert!(start.elapsed() < Duration::from_secs(8), "5 s to flush, yet it took {:?}", start.elapsed());
    mock.set_down(false);
    mock.expect(late.execution_id());
    agent.restart();
    assert_eq!(mock.wait_for_report(submission.execution_id(), SOON)["status"], "crashed");
}

#[test]
fn a_second_sigterm_ends_it_at_once() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let mut agent = agent_of(&mock);
    running(&mock, &agent);
    mock.set_down(true);
    agent.signal(libc::SIGTERM);
    wait::holds_for("it tries to flush", Duration::from_millis(700), || {
        fs::exists(format!("/proc/{}/exe", agent.pid())).is_ok()
    });
    let start = Instant::now();
    agent.signal(libc::SIGTERM);
    assert_eq!(agent.wait(SOON), 143);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}
