//! Promise: the control plane hears what it must, in the form that it takes, once, however badly it answers.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tests::control_plane::TEXT_LIMIT;
use tests::{Agent, AgentBuilder, ControlPlane, Fault, Submission, require_sandbox, wait};

const SOON: Duration = Duration::from_secs(15);
const EVENTUALLY: Duration = Duration::from_secs(120);
const RETURNS_ONE: &str = "def handler(event):\n    return 1\n";

fn agent_of(mock: &ControlPlane) -> AgentBuilder {
    Agent::builder().env("CONTROL_PLANE_URL", mock.url()).env("CONTAINER_ID", "container-of-the-tests")
}

/// Submits, waits for the report, returns it.
fn report(mock: &ControlPlane, agent: &Agent, submission: &Submission) -> Value {
    let response = mock.submit(agent, submission).expect("an answer");
    assert_eq!(response.status, 200, "{}", response.text());
    mock.wait_for_report(submission.execution_id(), EVENTUALLY)
}

/// Splits a shortened text: its head, the one line between, its tail.
fn shortened(text: &str) -> (&str, &str, &str) {
    let parts: Vec<_> = text.split('\n').collect();
    let [head, line, tail] = parts[..] else { panic!("not head, one line, tail: {} lines", parts.len()) };
    (head, line, tail)
}

/// The number that is told in a line.
fn number_in(line: &str) -> usize {
    let digits: String = line.chars().filter(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("no number in {line:?}"))
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| if entry.path().is_dir() { files_below(&entry.path()) } else { vec![entry.path()] })
        .collect()
}

#[test]
fn ready_is_repeated_until_the_session_is_known() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start_with(Duration::from_millis(900), Some("callback-token"));
    let agent = agent_of(&mock).env("INTERNAL_API_TOKEN", "callback-token").start();
    wait::until("ready to be heard", SOON, || mock.ready_calls().iter().any(|(_, known)| *known));
    let calls = mock.ready_calls();
    assert!(calls.len() >= 3, "it was too early for the first ones: {}", calls.len());
    // Every 200 ms, rising to 1 s.
    let pauses: Vec<_> = calls.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
    assert!(pauses.iter().all(|pause| *pause < Duration::from_millis(1500)), "{pauses:?}");
    report(&mock, &agent, &Submission::python(RETURNS_ONE));
    wait::holds_for("ready is not said again", Duration::from_millis(1500), || mock.ready_calls().len() == calls.len());
}

#[test]
fn ready_outlives_a_control_plane_that_is_down_at_the_start() {
    let mock = ControlPlane::start();
    mock.set_down(true);
    let _agent = agent_of(&mock).start();
    mock.set_down(false);
    wait::until("ready to be heard", SOON, || !mock.ready_calls().is_empty());
}

#[test]
fn heartbeats_come_at_0_and_5_seconds_and_stop_before_the_result() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let agent = agent_of(&mock).start();
    let submission = Submission::python("import time\ndef handler(event):\n    time.sleep(6)\n");
    report(&mock, &agent, &submission);
    let heartbeats = mock.heartbeats(submission.execution_id());
    assert_eq!(heartbeats.len(), 2, "one at the start, one after 5 s");
    let between = heartbeats[1] - heartbeats[0];
    assert!((Duration::from_millis(4500)..Duration::from_millis(5500)).contains(&between), "{between:?}");
    // A heartbeat after the result would be a violation.
    wait::holds_for("no heartbeat", Duration::from_secs(5), || mock.heartbeats(submission.execution_id()).len() == 2);
}

#[test]
fn results_carry_every_field() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let agent = agent_of(&mock).start();
    let code = "import os\ndef handler(event):\n    print('out')\n    os.write(2, b'err')\n    open('made.txt', 'w').write('x')\n    return {'a': [1, None]}\n";
    let success = report(&mock, &agent, &Submission::python(code));
    assert_eq!(success["status"], "success");
    assert_eq!(success["exit_code"], 0);
    assert_eq!(success["stdout"], "out\n");
    assert_eq!(success["stderr"], "err");
    assert_eq!(success["return_value"], json!({"a": [1, null]}));
    assert_eq!(success["artifacts"], json!(["made.txt"]));
    for field in ["duration_ms", "cpu_time_ms", "peak_memory_mb"] {
        assert!(success["metrics"][field].as_f64() > Some(0.0), "{field} in {}", success["metrics"]);
    }
    let failed = report(&mock, &agent, &Submission::python("def handler(event):\n    raise ValueError('boom')\n"));
    assert_eq!((&failed["status"], &failed["exit_code"]), (&json!("failed"), &json!(1)));
    assert!(failed["stderr"].as_str().is_some_and(|text| text.contains("ValueError: boom")));
    let silent = report(&mock, &agent, &Submission::python("import os\nos._exit(3)\n"));
    assert_eq!((&silent["status"], &silent["exit_code"]), (&json!("failed"), &json!(3)));
    assert_ne!(silent["stderr"], "", "it tells what happened though the program printed nothing");
    let late = Submission::python("import time\nprint('so far', flush=True)\ntime.sleep(60)\n").timeout(1);
    let late = report(&mock, &agent, &late);
    assert_eq!((&late["status"], &late["exit_code"]), (&json!("timeout"), &json!(-1)));
    assert_eq!(late["stdout"], "so far\n");
    let dead = report(&mock, &agent, &Submission::python("import os\nos.kill(os.getpid(), 9)\n"));
    assert_eq!((&dead["status"], &dead["exit_code"]), (&json!("failed"), &json!(137)));
}

#[test]
fn long_output_keeps_head_and_tail_with_one_line_between() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let agent = agent_of(&mock).start();
    let code = "import sys\ndef handler(event):\n    n = 100 << 10\n    sys.stdout.write('a' * n + 'b' * n)\n    sys.stderr.write('é' * n)\n";
    let submission = Submission::python(code);
    let report = report(&mock, &agent, &submission);
    let (head, line, tail) = shortened(report["stdout"].as_str().expect("text"));
    assert!(!head.is_empty() && head.bytes().all(|byte| byte == b'a'), "the head is the program's first output");
    assert!(!tail.is_empty() && tail.bytes().all(|byte| byte == b'b'), "the tail is its last");
    assert_eq!(number_in(line), (200 << 10) - head.len() - tail.len(), "{line}");
    let length = report["stdout"].as_str().map_or(0, str::len);
    assert!((60_000..=TEXT_LIMIT).contains(&length), "{length} bytes: as much as fits");
    // No character is cut in two.
    let (head, line, tail) = shortened(report["stderr"].as_str().expect("text"));
    assert!(head.chars().chain(tail.chars()).all(|letter| letter == 'é'), "{line}");
    assert_eq!(number_in(line), (200 << 10) - head.len() - tail.len(), "{line}");
    // All of it is in our own API.
    let document = agent.execution(submission.execution_id()).expect("known");
    assert_eq!(document["stdout"].as_str().map(str::len), Some(200 << 10));
    assert_eq!(document["stdout_truncated"], false);
}

#[test]
fn text_just_within_the_limit_is_left_alone() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let agent = agent_of(&mock).start();
    let code = format!(
        "import sys\ndef handler(event):\n    sys.stdout.write('x' * {TEXT_LIMIT})\n    return 'y' * {}\n",
        TEXT_LIMIT - 2
    );
    let report = report(&mock, &agent, &Submission::python(&code));
    assert_eq!(report["stdout"].as_str().map(str::len), Some(TEXT_LIMIT));
    assert_eq!(report["return_value"].as_str().map(str::len), Some(TEXT_LIMIT - 2));
}

#[test]
fn output_that_is_no_text_is_reported_as_text() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let agent = agent_of(&mock).start();
    let code = "import os\ndef handler(event):\n    os.write(1, b'\\x00\\x1b[1m ok \\xff\\xfe ' + b'\\xed\\xa0\\x80' + b'\\xf0\\x9f' * 40000)\n    return '\\x00'\n";
    let report = report(&mock, &agent, &Submission::python(code));
    assert!(report["stdout"].as_str().is_some_and(|text| text.starts_with("\0\x1b[1m ok ")));
    assert_eq!(report["return_value"], "\0");
}

#[test]
fn a_long_return_value_becomes_an_artifact() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let agent = agent_of(&mock).start();
    let submission = Submission::python("def handler(event):\n    return {'text': 'x' * (100 << 10)}\n");
    let report = report(&mock, &agent, &submission);
    let whole = json!({"text": "x".repeat(100 << 10)});
    let value = &report["return_value"];
    assert_eq!(value["truncated"], true, "{value}");
    let artifact = value["artifact"].as_str().expect("the artifact's path");
    assert!(
        report["artifacts"].as_array().is_some_and(|list| list.contains(&json!(artifact))),
        "{}",
        report["artifacts"]
    );
    let kept = fs::read(agent.workspace().join(artifact)).expect("the artifact");
    assert_eq!(value["bytes"], kept.len());
    assert_eq!(serde_json::from_slice::<Value>(&kept).expect("JSON"), whole);
    assert_eq!(agent.execution(submission.execution_id()).expect("known")["return_value"], whole);
}

#[test]
fn a_result_is_retried_until_it_is_taken() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let agent = agent_of(&mock).start();
    let faults = [Fault::Status(500), Fault::Reset, Fault::Status(429), Fault::LostAnswer];
    mock.plan_faults(&faults);
    let submission = Submission::python(RETURNS_ONE);
    report(&mock, &agent, &submission);
    let id = submission.execution_id();
    wait::until("the last attempt", EVENTUALLY, || mock.attempts(id) > faults.len());
    let answers: Vec<_> = mock.reports(id).iter().map(|report| report.answer).collect();
    assert_eq!(answers, [201, 200], "the repeated one is answered 200, and that is the end");
    let attempts = mock.attempts(id);
    wait::holds_for("it is not sent again", Duration::from_secs(3), || mock.attempts(id) == attempts);
}

#[test]
fn a_control_plane_that_is_down_hears_it_later() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let agent = agent_of(&mock).start();
    mock.set_down(true);
    let submissions: Vec<_> = (0..5).map(|_| Submission::python(RETURNS_ONE)).collect();
    for submission in &submissions {
        assert_eq!(mock.submit(&agent, submission).expect("an answer").status, 200);
    }
    for submission in &submissions {
        agent.wait_for_end(submission.execution_id(), SOON);
    }
    mock.set_down(false);
    for submission in &submissions {
        assert_eq!(mock.wait_for_report(submission.execution_id(), EVENTUALLY)["status"], "success");
    }
}

#[test]
fn a_connection_that_was_dropped_while_idle_costs_nothing() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    mock.drop_idle_connections();
    let agent = agent_of(&mock).start();
    for _ in 0..10 {
        let submission = Submission::python(RETURNS_ONE);
        mock.submit(&agent, &submission).expect("an answer");
        // A retry in its turn would take a second.
        agent.wait_for_end(submission.execution_id(), SOON);
        mock.wait_for_report(submission.execution_id(), Duration::from_millis(700));
    }
}

#[test]
fn a_refused_result_is_set_aside_with_its_reason() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let mut agent = agent_of(&mock).start();
    mock.plan_faults(&[Fault::Status(422)]);
    let refused = Submission::python(RETURNS_ONE);
    mock.submit(&agent, &refused).expect("an answer");
    let id = refused.execution_id();
    wait::until("the refusal", SOON, || mock.attempts(id) == 1);
    // It holds up nobody else.
    report(&mock, &agent, &Submission::python(RETURNS_ONE));
    let set_aside = || {
        let dead = files_below(&agent.state_dir()).into_iter().filter(|path| path.to_string_lossy().contains("dead"));
        dead.map(|path| format!("{} {}", path.display(), fs::read_to_string(&path).unwrap_or_default()))
            .collect::<String>()
    };
    wait::until("the record among the dead letters", SOON, || set_aside().contains(id));
    assert!(set_aside().contains("422"), "without the reason: {}", set_aside());
    agent.kill();
    agent.restart();
    report(&mock, &agent, &Submission::python(RETURNS_ONE));
    assert_eq!(mock.attempts(id), 1, "a refused result was sent again");
}

#[test]
fn a_body_that_is_refused_again_and_again_is_reduced() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    mock.refuse_stdout_above(17 << 10);
    let agent = agent_of(&mock).start();
    let code = "def handler(event):\n    print('x' * 50000)\n    return 7\n";
    let report = report(&mock, &agent, &Submission::python(code));
    assert_eq!(report["return_value"], 7);
    assert!(report["stdout"].as_str().is_some_and(|text| text.len() > 10_000 && text.len() <= 16 << 10));
}

#[test]
fn the_word_none_means_no_control_plane() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::builder().env("CONTROL_PLANE_URL", "None").start();
    assert_eq!(agent.run(&Submission::python(RETURNS_ONE))["return_value"], 1);
}

#[test]
fn the_sessions_variables_never_configure_the_agent() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let agent = agent_of(&mock)
        .env("PYTHON", "/nonexistent")
        .env("TIMEOUT", "x")
        .env("POLICY", "none")
        .env("CONCURRENCY", "many")
        .start();
    let submission = Submission::python(
        "import os\ndef handler(event):\n    return [os.environ.get('AGENT_CONCURRENCY'), 'CONTROL_PLANE_URL' in os.environ]\n",
    );
    let report = report(&mock, &agent, &submission.env("AGENT_CONCURRENCY", "99"));
    assert_eq!(report["return_value"], json!(["99", false]));
}
