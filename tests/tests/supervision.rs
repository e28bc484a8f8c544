//! Promise: a result comes within 250 ms of the deadline and nothing is left, whatever the program does.
//!
//! One program at a time: the bounds are those of an agent that has the machine to itself.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::{Agent, AgentBuilder, Submission, processes, require_sandbox, wait};

/// How late a result may be.
const TOLERANCE: Duration = Duration::from_millis(250);

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A name for processes that fits 15 bytes.
fn marker() -> String {
    let id = tests::submission::fresh_id();
    format!("mark-{}", &id[id.len() - 8..])
}

/// What every hostile program starts with: from here on it and its forks carry the marker.
const PRELUDE: &str = r"
import os, signal, subprocess, sys, threading, time
def mark(event):
    open('/proc/self/comm', 'w').write(event['marker'])
";

/// What came of one hostile program.
struct End {
    document: Value,
    took: Duration,
}

/// Runs a hostile program. It must be seen to run (`seen`: the marker's processes), and nothing of it may be left.
fn run(agent: AgentBuilder, code: &str, deadline: u64, seen: bool) -> End {
    let agent = agent.start();
    let marker = marker();
    let submission =
        Submission::python(&format!("{PRELUDE}{code}")).timeout(deadline).event(json!({ "marker": marker }));
    let start = Instant::now();
    assert_eq!(agent.submit(&submission).status, 200);
    if seen {
        // Control: the marker is one that we can see.
        wait::until("the marked processes", Duration::from_secs(deadline), || {
            !processes::with_marker(&marker).is_empty()
        });
    }
    let document = agent.wait_for_end(submission.execution_id(), Duration::from_secs(deadline + 20));
    let took = start.elapsed();
    wait::until("all processes to be gone", Duration::from_secs(1), || processes::with_marker(&marker).is_empty());
    // The agent is as well as before.
    let next = agent.run(&Submission::python("def handler(event):\n    return 1\n"));
    assert_eq!(next["return_value"], 1, "{next:#}");
    End { document, took }
}

/// A program that only the deadline ends.
fn is_ended_by_its_deadline(code: &str) -> Value {
    let _alone = alone();
    let End { document, took } = run(Agent::builder(), code, 2, true);
    assert_eq!(document["state"], "timed_out", "{document:#}");
    let deadline = Duration::from_secs(2);
    assert!(took >= deadline && took <= deadline + TOLERANCE, "the result came after {took:?}");
    document
}

#[test]
fn one_that_daemonizes_ignores_signals_and_keeps_writing() {
    if !require_sandbox() {
        return;
    }
    let document = is_ended_by_its_deadline(
        r"
def handler(event):
    mark(event)
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                os.write(1, b'still here\n')
                time.sleep(0.001)
        os._exit(0)
    os.write(1, b'before\n')
    while True: time.sleep(1)
",
    );
    let stdout = document["stdout"].as_str().unwrap_or_default();
    assert!(stdout.contains("before\n") && stdout.contains("still here\n"), "what was printed so far is kept");
}

#[test]
fn a_daemon_that_outlives_its_handler() {
    if !require_sandbox() {
        return;
    }
    let _alone = alone();
    let code = r"
def handler(event):
    mark(event)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True: time.sleep(1)
        os._exit(0)
    time.sleep(0.3)
    return 'done'
";
    let End { document, took } = run(Agent::builder(), code, 20, true);
    assert_eq!((&document["state"], &document["return_value"]), (&json!("succeeded"), &json!("done")));
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[test]
fn a_fork_bomb() {
    if !require_sandbox() {
        return;
    }
    is_ended_by_its_deadline(
        r"
def handler(event):
    mark(event)
    while True:
        try: os.fork()
        except OSError: pass
",
    );
}

#[test]
fn a_fork_bomb_of_the_shell() {
    if !require_sandbox() {
        return;
    }
    is_ended_by_its_deadline(
        r"
def handler(event):
    subprocess.run(['bash', '-c', 'bomb() { bomb | bomb & }; bomb; while true; do bomb; sleep 0.01; done', event['marker']], stderr=subprocess.DEVNULL)
    while True: time.sleep(1)
",
    );
}

#[test]
fn one_that_stops_itself() {
    if !require_sandbox() {
        return;
    }
    is_ended_by_its_deadline("def handler(event):\n    mark(event)\n    os.kill(os.getpid(), signal.SIGSTOP)\n");
}

#[test]
fn one_that_stops_everything_it_can_signal() {
    if !require_sandbox() {
        return;
    }
    is_ended_by_its_deadline(
        "def handler(event):\n    mark(event)\n    if os.fork() == 0: time.sleep(60)\n    os.kill(-1, signal.SIGSTOP)\n    os.kill(os.getpid(), signal.SIGSTOP)\n",
    );
}

#[test]
fn an_endless_flood() {
    if !require_sandbox() {
        return;
    }
    let document = is_ended_by_its_deadline(
        r"
def handler(event):
    mark(event)
    block = b'x' * 65536
    if os.fork() == 0:
        while True: os.write(2, block)
    while True: os.write(1, block)
",
    );
    assert_eq!(document["stdout_truncated"], true);
    assert!(document["stdout_bytes"].as_u64() > Some(10 << 20), "{}", document["stdout_bytes"]);
}

#[test]
fn one_that_computes_in_c_and_never_looks_up() {
    if !require_sandbox() {
        return;
    }
    is_ended_by_its_deadline("import re\ndef handler(event):\n    mark(event)\n    re.match('(a*)*b', 'a' * 64)\n");
}

#[test]
fn threads_without_end() {
    if !require_sandbox() {
        return;
    }
    is_ended_by_its_deadline(
        r"
def handler(event):
    mark(event)
    while True:
        try: threading.Thread(target=time.sleep, args=(600,)).start()
        except RuntimeError: time.sleep(0.01)
",
    );
}

#[test]
fn a_grandchild_that_holds_stdout_open_delays_nothing() {
    if !require_sandbox() {
        return;
    }
    let _alone = alone();
    let code = r"
def handler(event):
    subprocess.Popen(['bash', '-c', 'sleep 600; :', event['marker']], start_new_session=True)
    print('printed')
    time.sleep(0.2)
    return 'returned'
";
    let End { document, took } = run(Agent::builder(), code, 20, true);
    assert_eq!(
        (&document["state"], &document["return_value"]),
        (&json!("succeeded"), &json!("returned")),
        "{document:#}"
    );
    assert_eq!(document["stdout"], "printed\n");
    assert!(took < Duration::from_secs(1), "it waited for the pipe: {took:?}");
}

#[test]
fn one_that_closes_every_descriptor_it_finds() {
    if !require_sandbox() {
        return;
    }
    let _alone = alone();
    let End { document, took } =
        run(Agent::builder(), "def handler(event):\n    os.closerange(0, 4096)\n    return 1\n", 20, false);
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert!(["failed", "succeeded"].contains(&document["state"].as_str().unwrap_or_default()), "{document:#}");
    assert!(document["state"] == "succeeded" || document["return_value"].is_null());
}

#[test]
fn one_that_floods_every_descriptor_it_finds() {
    if !require_sandbox() {
        return;
    }
    let _alone = alone();
    let code = r"
def handler(event):
    for number in range(3, 64):
        try:
            os.set_blocking(number, False)
            for _ in range(100): os.write(number, b'{}' * 32768)
        except OSError: pass
    return 1
";
    let End { document, took } = run(Agent::builder(), code, 20, false);
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_ne!(document["state"], "crashed", "the code did this, not the agent: {document:#}");
}

#[test]
fn memory_beyond_the_limit_is_told_as_such() {
    if !require_sandbox() {
        return;
    }
    let _alone = alone();
    let hogs = [
        "def handler(event):\n    mark(event)\n    hog = []\n    while True:\n        hog.append(bytearray(b'x') * (4 << 20))\n        time.sleep(0.01)\n",
        "def handler(event):\n    mark(event)\n    for _ in range(10):\n        if os.fork() == 0: break\n    hog = []\n    while True:\n        hog.append(os.urandom(1 << 20))\n        time.sleep(0.05)\n",
    ];
    for hog in hogs {
        let End { document, took } = run(Agent::builder().env("AGENT_MEMORY_LIMIT_MB", 192), hog, 20, true);
        assert_eq!(document["state"], "failed", "{document:#}");
        assert_eq!(document["reason"], "killed: out of memory, limit 192 MiB");
        assert!(took < Duration::from_secs(15), "{took:?}");
    }
    // Control: as much as is allowed is allowed.
    let modest = "def handler(event):\n    return len(os.urandom(64 << 20))\n";
    let End { document, .. } = run(Agent::builder().env("AGENT_MEMORY_LIMIT_MB", 192), modest, 20, false);
    assert_eq!(document["return_value"], 64 << 20, "{document:#}");
}

#[test]
fn private_folders_have_an_end() {
    if !require_sandbox() {
        return;
    }
    let _alone = alone();
    let code = r"
def fill(folder):
    written = 0
    try:
        with open(folder + '/hog', 'wb', buffering=0) as hog:
            for _ in range(4096): written += hog.write(b'x' * (1 << 20))
        return 'no end'
    except OSError as error:
        os.unlink(folder + '/hog')
        return [error.errno, written > 0]
def handler(event):
    return [fill('/tmp'), fill('/dev/shm')]
";
    let End { document, .. } = run(Agent::builder().env("AGENT_MEMORY_LIMIT_MB", 8192), code, 60, false);
    let expected = [json!([libc::ENOSPC, true]), json!([libc::EFBIG, true])];
    for filled in document["return_value"].as_array().unwrap_or_else(|| panic!("{document:#}")) {
        assert!(expected.contains(filled), "{document:#}");
    }
}

#[test]
fn a_deadline_of_one_second_leaves_quick_ones_alone() {
    if !require_sandbox() {
        return;
    }
    let _alone = alone();
    let End { document, .. } =
        run(Agent::builder(), "def handler(event):\n    time.sleep(0.3)\n    return 1\n", 1, false);
    assert_eq!(document["state"], "succeeded", "{document:#}");
}
