//! Promise: what a program writes does not become the agent's memory.

use std::time::Duration;

use serde_json::json;
use tests::{Agent, Submission, require_sandbox, wait};

const MEBIBYTE: u64 = 1 << 20;

/// Peak memory above what was resident at the start, in MiB, while `code` runs to its end.
fn growth(code: &str) -> (u64, serde_json::Value) {
    let agent = Agent::start();
    // Whatever the first execution makes resident is no growth.
    agent.run(&Submission::python("def handler(event): pass\n"));
    let (before, _) = agent.memory();
    let submission = Submission::python(code).timeout(120);
    assert_eq!(agent.submit(&submission).status, 200);
    let active = || agent.get("/health").json()["active_executions"].clone();
    wait::until("it to run", Duration::from_secs(5), || active() == 1);
    // The document holds the output: it is asked for only after the memory has been read.
    wait::until("the end", Duration::from_secs(130), || active() == 0);
    let (_, peak) = agent.memory();
    let document = agent.wait_for_end(submission.execution_id(), Duration::from_secs(5));
    (peak.saturating_sub(before) / MEBIBYTE, document)
}

#[test]
fn one_gibibyte_on_stdout() {
    if !require_sandbox() {
        return;
    }
    let code = "import os\ndef handler(event):\n    block = b'x' * (1 << 20)\n    for _ in range(1024):\n        view = memoryview(block)\n        while view: view = view[os.write(1, view):]\n";
    let (grown, document) = growth(code);
    assert_eq!(document["state"], "succeeded");
    assert_eq!(document["stdout_bytes"], json!(1024 * MEBIBYTE), "all of it was read and counted");
    assert!(grown < 64, "the agent grew by {grown} MiB");
}

#[test]
fn a_quarter_of_it_as_return_value() {
    if !require_sandbox() {
        return;
    }
    let (grown, document) = growth("def handler(event):\n    return 'x' * (1 << 28)\n");
    assert_eq!(document["state"], "failed");
    assert!(grown < 64, "the agent grew by {grown} MiB");
}
