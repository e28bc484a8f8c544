//! Promise: a handler's value, output, errors and exit come back as they were.
//!
//! Each table runs on one agent; every program is judged, and all that failed are told together.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::agent::state;
use tests::{Agent, Submission, require_sandbox};

/// What an execution's document must show.
type Check = Box<dyn Fn(&Value) -> Result<(), String>>;

/// One program and what must come of it.
struct Program {
    name: &'static str,
    submission: Submission,
    checks: Vec<Check>,
}

impl Program {
    fn python(name: &'static str, code: &str) -> Self {
        Self { name, submission: Submission::python(code), checks: Vec::new() }
    }

    fn shell(name: &'static str, code: &str) -> Self {
        Self { name, submission: Submission::shell(code), checks: Vec::new() }
    }

    /// A handler of one line that returns an expression.
    fn returning(name: &'static str, expression: &str) -> Self {
        Self::python(name, &format!("def handler(event):\n    return {expression}\n"))
    }

    fn given(mut self, change: impl FnOnce(Submission) -> Submission) -> Self {
        self.submission = change(self.submission);
        self
    }

    fn is(mut self, what: &'static str, check: impl Fn(&Value) -> bool + 'static) -> Self {
        self.checks.push(Box::new(move |document| check(document).then_some(()).ok_or_else(|| what.to_owned())));
        self
    }

    fn field(mut self, field: &'static str, expected: Value) -> Self {
        self.checks.push(Box::new(move |document| {
            if document[field] == expected {
                return Ok(());
            }
            Err(format!("{field} is {}, not {}", shortened(&document[field]), shortened(&expected)))
        }));
        self
    }

    fn returns(self, value: Value) -> Self {
        self.field("state", json!("succeeded")).field("exit_code", json!(0)).field("return_value", value)
    }

    fn succeeds(self) -> Self {
        self.field("state", json!("succeeded")).field("exit_code", json!(0))
    }

    fn prints(self, stdout: &str) -> Self {
        self.field("stdout", json!(stdout))
    }

    fn fails(self) -> Self {
        self.field("state", json!("failed"))
    }

    fn exits(self, code: i32) -> Self {
        self.field("exit_code", json!(code))
    }

    /// stderr holds each of these.
    fn tells(mut self, words: &[&'static str]) -> Self {
        for &word in words {
            self.checks.push(Box::new(move |document| {
                let stderr = document["stderr"].as_str().unwrap_or_default();
                stderr.contains(word).then_some(()).ok_or_else(|| format!("stderr lacks {word:?}: {stderr}"))
            }));
        }
        self
    }

    /// stderr is a traceback of the user's program alone.
    fn tells_traceback(self, words: &[&'static str]) -> Self {
        let clean = |document: &Value| {
            let stderr = document["stderr"].as_str().unwrap_or_default();
            !stderr.contains("bootstrap") && !stderr.contains("importlib") && !stderr.contains("<frozen")
        };
        self.tells(&["main.py"]).tells(words).is("no frame of the bootstrap in the traceback", clean)
    }

    fn diagnosed(mut self, exception: &'static str, message: &'static str) -> Self {
        self.checks.push(Box::new(move |document| {
            let diagnostic = &document["diagnostic"];
            let stack = diagnostic["stack"][0]["file"] == "main.py";
            let told = diagnostic["type"] == exception
                && diagnostic["message"].as_str().is_some_and(|text| text.contains(message));
            (told && stack).then_some(()).ok_or_else(|| format!("diagnostic is {diagnostic}"))
        }));
        self
    }

    /// All that is wrong with the document.
    fn judge(&self, document: &Value) -> Vec<String> {
        self.checks
            .iter()
            .filter_map(|check| check(document).err())
            .map(|error| format!("{}: {error}", self.name))
            .collect()
    }
}

fn shortened(value: &Value) -> String {
    value.to_string().chars().take(400).collect()
}

/// Runs all programs one after the other on one agent.
fn run(programs: impl IntoIterator<Item = Program>) {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::start();
    let mut wrong = Vec::new();
    for program in programs {
        wrong.extend(program.judge(&agent.run(&program.submission)));
    }
    assert!(wrong.is_empty(), "{} findings:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_wrong_expectation_is_found() {
    let program = Program::returning("control", "1").returns(json!(1)).tells(&["x"]);
    let document = json!({"state": "succeeded", "exit_code": 0, "return_value": 2, "stderr": ""});
    assert_eq!(program.judge(&document).len(), 2);
}

#[test]
fn values_come_back_as_json() {
    run([
        Program::returning("object", r#"{"a": [1, 2.5, None, True], "b": {"c": "d"}}"#)
            .returns(json!({"a": [1, 2.5, null, true], "b": {"c": "d"}})),
        Program::returning("none", "None").returns(Value::Null),
        Program::python("no return", "def handler(event):\n    pass\n").returns(Value::Null),
        Program::returning("true", "True").returns(json!(true)),
        Program::returning("integer beyond doubles", "2**53 + 1").returns(json!(9_007_199_254_740_993_u64)),
        Program::returning("integer beyond 64 bits", "10**30").returns(json!(1e30)),
        Program::returning("floats", "[0.1, 1e-7, -0.0, 1.7976931348623157e308]").returns(json!([
            0.1,
            1e-7,
            -0.0,
            f64::MAX
        ])),
        Program::returning("text", r#""héllo ✓ 𝄞 \x00 \n \" \\""#).returns(json!("héllo ✓ 𝄞 \0 \n \" \\")),
        Program::returning("empty ones", r#"["", [], {}]"#).returns(json!(["", [], {}])),
        Program::returning("tuple", "(1, (2, 3))").returns(json!([1, [2, 3]])),
        Program::returning("numbers as keys", r#"{1: "a"}"#).returns(json!({"1": "a"})),
        Program::returning("not numbers", r#"{"a": [float("nan"), float("inf"), -float("inf"), 1]}"#)
            .returns(json!({"a": [null, null, null, 1]})),
        Program::python(
            "a nest of 60",
            "def handler(event):\n    v = 0\n    for _ in range(60): v = [v]\n    return v\n",
        )
        .returns((0..60).fold(json!(0), |inner, _| json!([inner]))),
        Program::returning("the event", "event")
            .given(|it| it.event(json!({"ключ": ["☃", null, {"deep": [[[]]]}], "n": -1.5e-3, "x'; DROP": "$(id)`\\"})))
            .returns(json!({"ключ": ["☃", null, {"deep": [[[]]]}], "n": -1.5e-3, "x'; DROP": "$(id)`\\"})),
        Program::returning("text with a lone surrogate", r#""a\ud800b""#)
            .is("an honest end, whichever", |document| ["succeeded", "failed"].contains(&state(document))),
    ]);
}

#[test]
fn values_that_json_cannot_hold_are_named() {
    run([
        Program::returning("set", r#"{"basket": [1, {2}]}"#).fails().tells(&["set", "basket"]),
        Program::returning("bytes", r#"[b"x"]"#).fails().tells(&["bytes"]),
        Program::python("object", "class Teapot: pass\ndef handler(event):\n    return {'kitchen': Teapot()}\n")
            .fails()
            .tells(&["Teapot", "kitchen"]),
        Program::returning("tuple as key", "{(1, 2): 3}").fails().tells(&["tuple"]),
        Program::python("circle", "def handler(event):\n    v = []\n    v.append(v)\n    return v\n")
            .fails()
            .is("a reason in stderr", |document| document["stderr"] != ""),
        Program::python(
            "a nest of 100,000",
            "def handler(event):\n    v = 0\n    for _ in range(100000): v = [v]\n    return v\n",
        )
        .fails()
        .is("a reason in stderr", |document| document["stderr"] != ""),
        Program::returning("generator", "(n for n in [1])").fails().tells(&["generator"]),
    ]);
}

#[test]
fn errors_are_told_with_the_users_own_lines() {
    run([
        Program::python("exception", "def handler(event):\n    secret_sum = 1\n    raise ValueError('boom ✗')\n")
            .fails()
            .exits(1)
            .tells_traceback(&["line 3", "raise ValueError('boom ✗')", "ValueError: boom ✗", "Traceback"])
            .diagnosed("ValueError", "boom ✗"),
        Program::python("nested frames", "def inner():\n    return 1 / 0\n\ndef handler(event):\n    return inner()\n")
            .fails()
            .tells_traceback(&["return inner()", "return 1 / 0", "ZeroDivisionError"])
            .diagnosed("ZeroDivisionError", "division by zero"),
        Program::python("while it is loaded", "import json\nundefined_name\n")
            .fails()
            .tells_traceback(&["line 2", "undefined_name", "NameError"])
            .diagnosed("NameError", "undefined_name"),
        Program::python("syntax", "def handler(event):\n    return (\n").fails().tells_traceback(&["SyntaxError", "return ("]),
        Program::python("tabs and blanks", "def handler(event):\n\tx = 1\n        return x\n").fails().tells_traceback(&["TabError"]),
        Program::python("no handler", "x = 1\n").fails().tells_traceback(&["handler"]),
        Program::python("a handler that can't be called", "handler = 3\n").fails().tells(&["handler"]),
        Program::python("a handler without parameters", "def handler():\n    return 1\n").fails().tells(&["TypeError"]),
        Program::python("a missing module", "import no_such_module_here\ndef handler(event): pass\n")
            .fails()
            .tells_traceback(&["ModuleNotFoundError", "no_such_module_here"]),
        Program::python("a chain", "def handler(event):\n    try:\n        {}['k']\n    except KeyError as e:\n        raise RuntimeError('outer') from e\n")
            .fails()
            .tells_traceback(&["KeyError", "RuntimeError: outer", "direct cause"]),
        Program::python("recursion", "def handler(event):\n    return handler(event)\n").fails().tells_traceback(&["RecursionError"]),
        Program::python("interrupt", "def handler(event):\n    raise KeyboardInterrupt\n").fails().tells(&["KeyboardInterrupt"]),
        Program::python("async exception", "async def handler(event):\n    raise ValueError('late')\n")
            .fails()
            .tells_traceback(&["ValueError: late"]),
        Program::python("an exception that can't be printed", "class E(Exception):\n    def __str__(self): raise Exception\ndef handler(event):\n    raise E()\n")
            .fails()
            .exits(1),
    ]);
}

#[test]
fn exits_are_honoured() {
    let death = |name, signal| {
        Program::python(
            name,
            &format!(
                "import os\ndef handler(event):\n    print('before', flush=True)\n    os.kill(os.getpid(), {signal})\n"
            ),
        )
        .fails()
        .exits(128 + signal)
        .prints("before\n")
        .is("the reason told in stderr or reason", |document| {
            document["reason"].as_str().is_some_and(|reason| !reason.is_empty())
        })
    };
    run([
        Program::python("sys.exit(3)", "import sys\ndef handler(event):\n    sys.exit(3)\n").fails().exits(3),
        Program::python("sys.exit(0)", "import sys\ndef handler(event):\n    sys.exit(0)\n").succeeds(),
        Program::python("sys.exit()", "import sys\ndef handler(event):\n    sys.exit()\n").succeeds(),
        Program::python("sys.exit(text)", "import sys\ndef handler(event):\n    sys.exit('no luck')\n")
            .fails()
            .exits(1)
            .tells(&["no luck"]),
        Program::python("at load", "import sys\nsys.exit(4)\n").fails().exits(4),
        Program::python("os._exit", "import os\ndef handler(event):\n    os._exit(7)\n").fails().exits(7),
        Program::python("abort", "import os\ndef handler(event):\n    os.abort()\n").fails().exits(134),
        death("SIGKILL", 9),
        death("SIGSEGV", 11),
        death("SIGTERM", 15),
    ]);
}

#[test]
fn output_comes_back_byte_for_byte() {
    run([
        Program::python("no line end", "def handler(event):\n    print('a', end='')\n").succeeds().prints("a"),
        Program::python("line ends of all kinds", r"
import sys
def handler(event):
    sys.stdout.write('a\r\nb\rc\n\n')
    sys.stdout.flush()
    sys.stdout.buffer.write(b'\x00\x1b[31mred\x1b[0m\x7f')
").succeeds().prints("a\r\nb\rc\n\n\0\x1b[31mred\x1b[0m\x7f"),
        Program::python("unicode on both", "import sys\ndef handler(event):\n    print('ünï ✓ 𝄞')\n    print('err ✗', file=sys.stderr)\n")
            .succeeds()
            .prints("ünï ✓ 𝄞\n")
            .field("stderr", json!("err ✗\n")),
        Program::python("not UTF-8", r"
import sys
def handler(event):
    sys.stdout.buffer.write(b'ok\xff\xfeend\n')
    return 'kept'
").returns(json!("kept")).field("stdout_base64", json!("b2v//mVuZAo=")).is("the rest readable", |document| {
            document["stdout"].as_str().is_some_and(|text| text.starts_with("ok") && text.ends_with("end\n"))
        }),
        Program::python("what looks like a result", "def handler(event):\n    print('{\"return_value\": 1, \"status\": \"failed\"}')\n    print('__RESULT__')\n    return 2\n")
            .returns(json!(2)),
        Program::python("raw writes and those of children", "import os, subprocess\ndef handler(event):\n    os.write(1, b'one\\n')\n    subprocess.run(['echo', 'two'])\n    print('three')\n")
            .succeeds()
            .prints("one\ntwo\nthree\n"),
        Program::python("loading prints too", "print('loading')\ndef handler(event):\n    print('running')\n").succeeds().prints("loading\nrunning\n"),
        Program::python("logging", "import logging\ndef handler(event):\n    logging.warning('careful')\n").succeeds().prints("").tells(&["careful"]),
        Program::python("closed stdout", "import os\ndef handler(event):\n    os.close(1)\n    return 5\n")
            .is("the value is not lost", |document| document["return_value"] == 5),
    ]);
}

#[test]
fn sources_of_all_encodings_run() {
    run([
        Program::python("a cookie that lies", "# -*- coding: latin-1 -*-\ndef handler(event):\n    return 'é'\n")
            .returns(json!("é")),
        Program::python("CRLF", "def handler(event):\r\n    x = 1\r\n    return x\r\n").returns(json!(1)),
        Program::python("no line end", "def handler(event): return 'é☃'").returns(json!("é☃")),
        Program::python(
            "future imports",
            "from __future__ import annotations\ndef handler(event: Nothing):\n    return 1\n",
        )
        .returns(json!(1)),
        Program::python(
            "dataclasses and pickles find their module",
            r"
import dataclasses, pickle
@dataclasses.dataclass
class Point:
    x: int
def handler(event):
    return dataclasses.asdict(pickle.loads(pickle.dumps(Point(3))))
",
        )
        .returns(json!({"x": 3})),
    ]);
}

#[test]
fn sizes_up_to_the_limits_pass() {
    static TEXT: LazyLock<String> = LazyLock::new(|| "é".repeat(1 << 19));
    run([
        Program::returning("event of 1 MiB", "len(event['text'].encode())")
            .given(|it| it.event(json!({"text": *TEXT})))
            .returns(json!(1 << 20)),
        Program::returning("event of 12 MiB", "len(event['text'])")
            .given(|it| it.event(json!({"text": "x".repeat(12 << 20)})))
            .returns(json!(12 << 20)),
        Program::returning("return value of 8 MiB", "'x' * (8 << 20)").returns(json!("x".repeat(8 << 20))),
        Program::returning("return value of 17 MiB", "'x' * (17 << 20)")
            .fails()
            .is("a reason in stderr", |document| document["stderr"] != ""),
        Program::python(
            "code of 1 MiB",
            &format!("def handler(event):\n    return 1\n#{}", "x".repeat((1 << 20) - 60)),
        )
        .returns(json!(1)),
        Program::python("stdout of 3 MiB", "def handler(event):\n    print('x' * (3 << 20), end='')\n")
            .succeeds()
            .field("stdout_bytes", json!(3 << 20))
            .field("stdout_truncated", json!(false))
            .is("all of it", |document| document["stdout"].as_str().is_some_and(|text| text.len() == 3 << 20)),
        Program::python(
            "stdout of 12 MiB",
            "import sys\ndef handler(event):\n    sys.stdout.write('HEAD' + 'x' * (12 << 20) + 'TAIL')\n",
        )
        .succeeds()
        .field("stdout_bytes", json!((12 << 20) + 8))
        .field("stdout_truncated", json!(true))
        .field("stderr_truncated", json!(false))
        .is("head and tail", |document| {
            let text = document["stdout"].as_str().unwrap_or_default();
            text.starts_with("HEAD") && text.ends_with("TAIL") && text.len() <= (10 << 20) + 200
        }),
    ]);
}

#[test]
fn the_world_of_a_handler_is_as_promised() {
    run([
        Program::python("async", "import asyncio\nasync def handler(event):\n    await asyncio.sleep(0.01)\n    return 'awaited'\n").returns(json!("awaited")),
        Program::python("event and context", "def handler(event, context):\n    return [event, context is not None]\n").returns(json!([{}, true])),
        Program::python("async with context", "async def handler(event, context):\n    return 1\n").returns(json!(1)),
        Program::python("an object as handler", "class H:\n    def __call__(self, event):\n        return 'called'\nhandler = H()\n").returns(json!("called")),
        Program::returning("stdin is empty", "__import__('sys').stdin.read()").returns(json!("")),
        Program::returning("the folder", "__import__('os').getcwd()").returns(json!("/workspace")),
        Program::returning("the session's variables", "[__import__('os').environ.get('GREETING'), 'STATE_DIR' in __import__('os').environ]")
            .given(|it| it.env("GREETING", "héllo = ✓"))
            .returns(json!(["héllo = ✓", false])),
        Program::returning("not root", "[__import__('os').getuid() != 0, __import__('os').geteuid() != 0]").returns(json!([true, true])),
        Program::returning("a name for the user", "bool(__import__('getpass').getuser())").returns(json!(true)),
        Program::python("artifacts", "import os\ndef handler(event):\n    os.makedirs('out', exist_ok=True)\n    open('out/a.txt', 'w').write('12345')\n    os.symlink('/etc/passwd', 'out/link')\n    os.mkfifo('out/fifo')\n")
            .succeeds()
            .field("artifacts", json!([{"path": "out/a.txt", "size": 5}])),
        Program::python("temporary files", "import tempfile\ndef handler(event):\n    with tempfile.TemporaryFile() as f:\n        f.write(b'x' * 1000)\n        return f.tell()\n").returns(json!(1000)),
        Program::python("processes", "import multiprocessing\ndef double(n): return n * 2\ndef handler(event):\n    with multiprocessing.get_context('fork').Pool(2) as pool:\n        return pool.map(double, [1, 2])\n")
            .returns(json!([2, 4])),
        Program::python("usage", "def handler(event):\n    return sum(n for n in range(2_000_000)) > 0\n").returns(json!(true)).is("usage from the kernel", |document| {
            let usage = &document["usage"];
            usage["wall_ms"].as_f64() > Some(0.0) && usage["cpu_ms"].as_f64() > Some(10.0) && usage["peak_memory_bytes"].as_f64() > Some(1e6)
        }),
        Program::returning("the layers in force are told", "1")
            .is("isolation is an object that is not empty", |document| document["isolation"].as_object().is_some_and(|layers| !layers.is_empty())),
    ]);
}

#[test]
fn a_thread_left_over_does_not_hold_the_value_back() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::start();
    let code = "import threading, time\ndef handler(event):\n    threading.Thread(target=time.sleep, args=(60,)).start()\n    return 'value'\n";
    let start = Instant::now();
    let document = agent.run(&Submission::python(code).timeout(2));
    assert!(start.elapsed() < Duration::from_millis(2250), "it took {:?}", start.elapsed());
    assert_eq!(document["return_value"], "value", "{document:#}");
}

#[test]
fn shell_runs_as_a_script() {
    run([
        Program::shell("prints", "echo out; echo err >&2\n").succeeds().prints("out\n").field("stderr", json!("err\n")),
        Program::shell("the event", "cat \"$EVENT_FILE\"\n")
            .given(|it| it.event(json!({"name": "Ada ✓"})))
            .succeeds()
            .is("the event as JSON", |document| {
                let stdout = document["stdout"].as_str().unwrap_or_default();
                serde_json::from_str::<Value>(stdout).is_ok_and(|event| event == json!({"name": "Ada ✓"}))
            }),
        Program::shell("exit code", "exit 3\n").fails().exits(3),
        Program::shell("the last command's", "false\n").fails().exits(1),
        Program::shell("an error of syntax", "if then\n").fails().exits(2).tells(&["syntax error"]),
        Program::shell("a command that is missing", "no_such_command_here\n")
            .fails()
            .exits(127)
            .tells(&["no_such_command_here"]),
        Program::shell("bash, not sh", "a=(1 2 3); echo ${#a[@]}; [[ x == x ]] && echo yes\n")
            .succeeds()
            .prints("3\nyes\n"),
        Program::shell("variables and folder", "echo \"$GREETING\"; pwd\n")
            .given(|it| it.env("GREETING", "hi there"))
            .succeeds()
            .prints("hi there\n/workspace\n"),
        Program::shell("death by signal", "kill -9 $$\n").fails().exits(137),
        Program::shell("artifacts", "echo hi > made.txt\n")
            .succeeds()
            .field("artifacts", json!([{"path": "made.txt", "size": 3}])),
        Program::shell("a long script", &format!("echo start\n{}echo end\n", ": padding\n".repeat(50_000)))
            .succeeds()
            .prints("start\nend\n"),
        Program::shell("under its long name", "echo $BASH_VERSION | grep -c .\n")
            .given(|it| it.with("language", "bash"))
            .succeeds()
            .prints("1\n"),
    ]);
}
