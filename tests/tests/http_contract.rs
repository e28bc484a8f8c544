//! Promise: `POST /execute`, `GET /health` and `GET /v1/executions/{id}` answer exactly as the contract says, and an
//! id runs at most once.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::agent::state;
use tests::submission::fresh_id;
use tests::{Agent, ControlPlane, Submission, http, require_sandbox, wait};

/// Leaves one more byte in a file of the workspace each time it runs.
const COUNTS_ITS_RUNS: &str = "def handler(event):\n    open('runs', 'ab').write(b'x')\n    return 'ran'\n";
const SLEEPS: &str = "import time\ndef handler(event):\n    time.sleep(event.get('seconds', 60))\n";

fn runs(agent: &Agent) -> usize {
    fs::read(agent.workspace().join("runs")).map_or(0, |file| file.len())
}

/// The error body of the contract.
#[track_caller]
fn assert_error(response: &http::Response, status: u16, code: &str) {
    assert_eq!(response.status, status, "{}", response.text());
    let body = response.json();
    assert_eq!(body["error_code"], code, "{body:#}");
    for field in ["description", "error_detail", "solution", "request_id"] {
        assert!(body[field].is_string(), "{field} in {body:#}");
    }
    let errors = body["errors"].as_array().expect("errors is a list");
    assert!(!errors.is_empty() && errors.iter().all(Value::is_string), "{body:#}");
}

#[test]
fn a_submit_is_answered_200_at_once() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::start();
    let submission = Submission::python(SLEEPS).event(json!({"seconds": 2}));
    let response = agent.submit(&submission);
    assert_eq!(response.status, 200);
    assert_eq!(response.message.header("content-type"), Some("application/json"));
    let expected =
        json!({"execution_id": submission.execution_id(), "status": "PENDING", "message": "Execution submitted"});
    assert_eq!(response.json(), expected);
    let document = agent.execution(submission.execution_id()).expect("it is known");
    assert!(["queued", "running"].contains(&state(&document)), "answered when it ended, not when it was accepted");
}

#[test]
fn defaults_fill_what_is_absent_and_unknown_fields_are_ignored() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::start();
    let code = "def handler(event):\n    return event\n";
    let bare = Submission::python(code).without("event").without("timeout").without("env_vars");
    assert_eq!(agent.run(&bare)["return_value"], json!({}));
    let more = Submission::python(code).with("priority", 3).with("nested", json!({"a": [1]}));
    assert_eq!(agent.run(&more)["state"], "succeeded");
    for id in ["a", "A.b_c-9", &"x".repeat(128)] {
        assert_eq!(agent.run(&Submission::python(code).id(id))["execution_id"], id);
    }
    let session = agent.run(&Submission::python(code).with("session_id", "s-1"));
    assert_eq!(session["session_id"], "s-1");
}

#[test]
fn the_document_holds_every_field() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::start();
    let document = agent.run(&Submission::python("def handler(event):\n    return 1\n"));
    let fields = [
        "execution_id",
        "session_id",
        "state",
        "reason",
        "exit_code",
        "signal",
        "stdout",
        "stderr",
        "stdout_bytes",
        "stderr_bytes",
        "stdout_truncated",
        "stderr_truncated",
        "return_value",
        "diagnostic",
        "usage",
        "artifacts",
        "isolation",
    ];
    let missing: Vec<_> = fields.iter().filter(|field| document.get(**field).is_none()).collect();
    assert!(missing.is_empty(), "missing {missing:?} in {document:#}");
    assert!(document.get("stdout_base64").is_none(), "output in UTF-8 needs no second form");
}

#[test]
fn health_tells_version_uptime_and_what_runs() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::start();
    let idle = agent.get("/health");
    assert_eq!(idle.status, 200);
    let body = idle.json();
    assert_eq!(body["status"], "healthy");
    assert_eq!(body["active_executions"], 0);
    assert!(body["version"].is_string() && body["uptime_seconds"].is_number(), "{body}");
    let submission = Submission::python(SLEEPS);
    agent.submit(&submission);
    agent.wait_until_running(submission.execution_id());
    assert_eq!(agent.get("/health").json()["active_executions"], 1);
}

#[test]
fn health_answers_within_100_ms_under_load() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::builder().env("AGENT_CONCURRENCY", 4).start();
    let flood = "import os\ndef handler(event):\n    while True: os.write(1, b'x' * 65536)\n";
    let load: Vec<_> = (0..4).map(|_| Submission::python(flood).timeout(60)).collect();
    for submission in &load {
        assert_eq!(agent.submit(submission).status, 200);
    }
    agent.wait_until_running(load[3].execution_id());
    let mut times: Vec<_> = (0..20)
        .map(|_| {
            let start = Instant::now();
            assert_eq!(agent.get("/health").status, 200);
            start.elapsed()
        })
        .collect();
    times.sort();
    assert!(times[10] < Duration::from_millis(100), "{times:?}");
}

#[test]
fn a_repeated_submit_is_answered_200_and_never_runs_twice() {
    if !require_sandbox() {
        return;
    }
    let mut agent = Agent::start();
    let submission = Submission::python(COUNTS_ITS_RUNS);
    assert_eq!(agent.run(&submission)["return_value"], "ran");
    for _ in 0..3 {
        let repeated = agent.submit(&submission);
        assert_eq!(repeated.status, 200);
        assert_eq!(repeated.json()["execution_id"], submission.execution_id());
    }
    // The same id with other code is still the same execution.
    assert_eq!(
        agent
            .submit(&Submission::python("def handler(event):\n    open('other', 'w')\n").id(submission.execution_id()))
            .status,
        200
    );
    agent.kill();
    agent.restart();
    assert_eq!(agent.submit(&submission).status, 200);
    let document = agent.execution(submission.execution_id()).expect("known after a restart");
    assert_eq!(document["state"], "succeeded", "{document:#}");
    // Control: another id does run, and was queued behind the repeated ones.
    assert_eq!(agent.run(&Submission::python(COUNTS_ITS_RUNS))["return_value"], "ran");
    assert_eq!(runs(&agent), 2);
    assert!(!agent.workspace().join("other").exists());
}

#[test]
fn eight_submits_of_one_id_at_the_same_time_run_once() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::start();
    let submission = Submission::python(COUNTS_ITS_RUNS);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(agent.submit(&submission).status, 200));
        }
    });
    assert_eq!(agent.wait_for_end(submission.execution_id(), Duration::from_secs(20))["state"], "succeeded");
    assert_eq!(agent.run(&Submission::python("def handler(event): pass\n"))["state"], "succeeded");
    assert_eq!(runs(&agent), 1);
}

#[test]
fn a_refused_request_with_a_readable_id_is_reported() {
    if !require_sandbox() {
        return;
    }
    let mock = ControlPlane::start();
    let agent = Agent::builder().env("CONTROL_PLANE_URL", mock.url()).start();
    let refused = [
        Submission::python("x").with("timeout", 0),
        Submission::python("x").with("language", "cobol"),
        Submission::python("x").without("code"),
        Submission::python("x").with("event", json!([])),
        Submission::python(&"x".repeat((1 << 20) + 1)),
    ];
    for submission in &refused {
        let response = mock.submit(&agent, submission).expect("an answer");
        assert!((400..500).contains(&response.status), "{}", response.status);
        let report = mock.wait_for_report(submission.execution_id(), Duration::from_secs(10));
        assert_eq!(report["status"], "failed", "{report:#}");
        assert_ne!(report["stderr"], "");
    }
}

#[test]
fn what_is_not_there_is_told_in_the_contracts_body() {
    let agent = Agent::start();
    assert_error(&agent.get("/v1/executions/exec_never_seen"), 404, "Executor.NotFound");
    assert_error(&agent.get("/nowhere"), 404, "Executor.NotFound");
    assert_error(&agent.get("/execute"), 405, "Executor.MethodNotAllowed");
    assert_error(&agent.submit(&Submission::python("x").with("timeout", -1)), 400, "Executor.ValidationError");
    let huge = http::request(agent.address(), "POST", "/execute", &[], &vec![b' '; (16 << 20) + 1]).expect("an answer");
    assert_error(&huge, 413, "Executor.PayloadTooLarge");
}

#[test]
fn a_token_is_required_where_one_is_set() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::builder().env("AGENT_API_TOKEN", "open-sesame").start();
    let submission = Submission::python(COUNTS_ITS_RUNS);
    let body = submission.body().to_string();
    for header in [
        None,
        Some("Bearer wrong"),
        Some("Bearer open-sesam"),
        Some("Bearer "),
        Some("Basic open-sesame"),
        Some("open-sesame"),
    ] {
        let headers: Vec<_> = header.map(|value| ("authorization", value)).into_iter().collect();
        let refused = http::request(agent.address(), "POST", "/execute", &headers, body.as_bytes()).expect("an answer");
        assert_error(&refused, 401, "Executor.Unauthorized");
        let path = format!("/v1/executions/{}", submission.execution_id());
        let refused = http::request(agent.address(), "GET", &path, &headers, b"").expect("an answer");
        assert_error(&refused, 401, "Executor.Unauthorized");
    }
    assert_eq!(http::get(agent.address(), "/health").expect("an answer").status, 200);
    assert_eq!(agent.run(&submission)["return_value"], "ran");
    assert_eq!(runs(&agent), 1);
}

#[test]
fn a_full_queue_waits_for_room_and_is_answered_503_after_20_s() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::builder().env("AGENT_CONCURRENCY", 1).env("AGENT_QUEUE", 1).start();
    let sleeper = |seconds: u64| Submission::python(SLEEPS).event(json!({"seconds": seconds})).timeout(60);
    let first = sleeper(3);
    assert_eq!(agent.submit(&first).status, 200);
    agent.wait_until_running(first.execution_id());
    assert_eq!(agent.submit(&sleeper(40)).status, 200);
    // Room comes when the first one ends.
    let start = Instant::now();
    assert_eq!(agent.submit(&sleeper(1)).status, 200);
    assert!(start.elapsed() > Duration::from_secs(1), "there was room all along");
    // No room comes for the next.
    let refused = sleeper(1);
    let start = Instant::now();
    let response = agent.submit(&refused);
    let waited = start.elapsed();
    assert_error(&response, 503, "Executor.QueueFull");
    assert!((Duration::from_secs(15)..Duration::from_secs(25)).contains(&waited), "answered after {waited:?}");
    assert!(agent.execution(refused.execution_id()).is_none(), "refused, and yet taken");
}

#[test]
fn executions_run_side_by_side_up_to_the_limit() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::builder().env("AGENT_CONCURRENCY", 2).start();
    let submissions: Vec<_> = (0..3).map(|_| Submission::python(SLEEPS)).collect();
    for submission in &submissions {
        assert_eq!(agent.submit(submission).status, 200);
    }
    agent.wait_until_running(submissions[0].execution_id());
    agent.wait_until_running(submissions[1].execution_id());
    assert_eq!(agent.execution(submissions[2].execution_id()).expect("known")["state"], "queued");
    assert_eq!(agent.get("/health").json()["active_executions"], 2);
}

#[test]
fn without_namespaces_health_says_so_and_code_is_not_run() {
    if !require_sandbox() {
        return;
    }
    // A user namespace in which no further one may be created: bubblewrap can't work there.
    let script = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$@\"";
    let launcher = ["unshare", "--user", "--map-root-user", "--kill-child", "--fork", "sh", "-c", script, "sh"];
    let agent = Agent::builder().launcher(&launcher).env("DISABLE_BWRAP", "true").start();
    let health = agent.get("/health");
    assert_eq!(health.status, 503, "{}", health.text());
    assert_eq!(health.json()["status"], "unhealthy");
    assert!(health.json()["reason"].as_str().is_some_and(|reason| !reason.is_empty()));
    let submission = Submission::python(COUNTS_ITS_RUNS).id(&fresh_id());
    if agent.submit(&submission).status == 200 {
        let document = agent.wait_for_end(submission.execution_id(), Duration::from_secs(20));
        assert_eq!(document["state"], "crashed", "the sandbox failed, not the code: {document:#}");
    }
    assert_eq!(runs(&agent), 0, "code ran without a sandbox");
}

#[test]
fn disable_bwrap_never_runs_code_outside() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::builder().env("DISABLE_BWRAP", "true").start();
    let document =
        agent.run(&Submission::python("import os\ndef handler(event):\n    return [os.getcwd(), os.getpid() < 10]\n"));
    assert_eq!(document["return_value"], json!(["/workspace", true]), "{document:#}");
    wait::until("a warning", Duration::from_secs(5), || agent.log().contains("DISABLE_BWRAP"));
}
