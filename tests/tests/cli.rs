//! Promise: the commands of `sandbox-agent` do what their help says, and their exit codes can be relied on.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use tests::agent::{binary, exit_code};
use tests::require_sandbox;

const SECRET: &str = "planted-token-of-the-cli-19d4";

/// What a command left behind.
struct Done {
    code: i32,
    stdout: String,
    stderr: String,
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: exit_code(output.status), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

/// A command of the binary, in a folder of its own.
fn command(folder: &TempDir, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command
        .args(arguments)
        .current_dir(folder.path())
        .env("STATE_DIR", folder.path().join("state"))
        .stdin(Stdio::null());
    command
}

fn agent(arguments: &[&str]) -> Done {
    let folder = TempDir::new().expect("a folder");
    command(&folder, arguments).output().expect("start the binary").into()
}

/// `run` of a file that holds `code`.
fn run(code: &str, arguments: &[&str]) -> Done {
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("program.py"), code).expect("write the program");
    command(&folder, &[&["run", "program.py"], arguments].concat()).output().expect("start the binary").into()
}

fn run_stdin(code: &str, arguments: &[&str]) -> Done {
    let folder = TempDir::new().expect("a folder");
    let mut child = command(&folder, &[&["run", "-"], arguments].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start the binary");
    child.stdin.take().expect("its stdin").write_all(code.as_bytes()).expect("write the program");
    child.wait_with_output().expect("its output").into()
}

#[test]
fn version_and_help() {
    let version = agent(&["--version"]);
    assert_eq!(version.code, 0);
    assert!(version.stdout.starts_with("sandbox-agent "), "{}", version.stdout);
    let help = agent(&["--help"]);
    assert_eq!(help.code, 0);
    for command in ["serve", "run", "doctor", "policy", "config"] {
        assert!(help.stdout.contains(command), "{command} in {}", help.stdout);
        assert_eq!(agent(&[command, "--help"]).code, 0);
    }
    let unknown = agent(&["fly"]);
    assert_eq!(unknown.code, 2);
    assert!(unknown.stderr.contains("fly"), "{}", unknown.stderr);
}

#[test]
fn run_prints_output_then_the_return_value() {
    if !require_sandbox() {
        return;
    }
    let code = "import sys\ndef handler(event):\n    print('hello', event['name'])\n    print('aside', file=sys.stderr)\n    return {'greeted': event['name']}\n";
    let done = run(code, &["--event", r#"{"name":"Ada"}"#]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    let lines: Vec<_> = done.stdout.lines().collect();
    assert_eq!(lines.len(), 2, "{}", done.stdout);
    assert_eq!(lines[0], "hello Ada");
    assert_eq!(serde_json::from_str::<Value>(lines[1]).expect("JSON"), json!({"greeted": "Ada"}));
    assert!(done.stderr.contains("aside\n"), "{}", done.stderr);
}

#[test]
fn run_reads_code_from_stdin() {
    if !require_sandbox() {
        return;
    }
    let done = run_stdin("def handler(event):\n    return [1, event]\n", &["--event", "{}"]);
    assert_eq!((done.code, done.stdout.trim()), (0, "[1,{}]"), "{}", done.stderr);
}

#[test]
fn run_json_prints_the_document_and_nothing_else() {
    if !require_sandbox() {
        return;
    }
    let done = run("def handler(event):\n    print('out')\n    return 7\n", &["--json"]);
    let document: Value = serde_json::from_str(&done.stdout).expect("one JSON document");
    assert_eq!(document["state"], "succeeded");
    assert_eq!(document["stdout"], "out\n");
    assert_eq!(document["return_value"], 7);
    assert!(document["isolation"].is_object() && document["usage"].is_object());
    let failed = run("def handler(event):\n    raise ValueError('boom')\n", &["--json"]);
    assert_eq!(failed.code, 1);
    let document: Value = serde_json::from_str(&failed.stdout).expect("one JSON document");
    assert_eq!((&document["state"], &document["diagnostic"]["type"]), (&json!("failed"), &json!("ValueError")));
}

#[test]
fn run_exits_as_the_program_did() {
    if !require_sandbox() {
        return;
    }
    assert_eq!(run("import sys\ndef handler(event):\n    sys.exit(3)\n", &[]).code, 3);
    assert_eq!(run("import os\nos._exit(9)\n", &[]).code, 9);
    assert_eq!(run("import os\nos.kill(os.getpid(), 9)\n", &[]).code, 137);
    let raised = run("def handler(event):\n    raise ValueError('boom')\n", &[]);
    assert_eq!(raised.code, 1);
    assert!(raised.stderr.contains("ValueError: boom"), "{}", raised.stderr);
    assert_eq!(run("x = (\n", &[]).code, 1);
}

#[test]
fn run_ends_at_its_timeout_with_124() {
    if !require_sandbox() {
        return;
    }
    let start = Instant::now();
    let done = run(
        "import time\ndef handler(event):\n    print('so far', flush=True)\n    time.sleep(60)\n",
        &["--timeout", "1"],
    );
    assert_eq!(done.code, 124, "{}", done.stderr);
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert_eq!(done.stdout, "so far\n");
}

#[test]
fn run_is_live() {
    if !require_sandbox() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("p.py"), "import time\nprint('first', flush=True)\ntime.sleep(30)\n")
        .expect("write the program");
    let mut child = command(&folder, &["run", "p.py"]).stdout(Stdio::piped()).spawn().expect("start the binary");
    let mut line = String::new();
    let start = Instant::now();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().expect("stdout")), &mut line)
        .expect("a line");
    assert_eq!(line, "first\n");
    assert!(start.elapsed() < Duration::from_secs(10), "held back until the end");
    child.kill().expect("end it");
    child.wait().expect("its end");
}

#[test]
fn run_without_a_sandbox_exits_125_and_runs_nothing() {
    if !require_sandbox() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    fs::create_dir(folder.path().join("files")).expect("a workspace");
    fs::write(folder.path().join("p.py"), "open('ran', 'w')\n").expect("write the program");
    let without = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$@\"";
    let in_a_place_without_namespaces = |arguments: &[&str]| -> Done {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "sh", "-c", without, "sh"]).arg(binary()).args(arguments);
        command.current_dir(folder.path()).env("STATE_DIR", folder.path().join("state"));
        command.output().expect("start unshare").into()
    };
    let done = in_a_place_without_namespaces(&["run", "p.py", "--workspace", "files"]);
    assert_eq!(done.code, 125, "{}{}", done.stdout, done.stderr);
    assert!(!done.stderr.is_empty(), "and doesn't say why");
    assert!(!folder.path().join("files/ran").exists(), "code ran without a sandbox");
    // The doctor says so as well.
    let doctor = in_a_place_without_namespaces(&["doctor"]);
    assert_ne!(doctor.code, 0, "{}", doctor.stdout);
    assert!(doctor.stdout.contains("max_user_namespaces"), "no remedy in {}", doctor.stdout);
}

#[test]
fn run_takes_variables_and_a_workspace() {
    if !require_sandbox() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    fs::create_dir(folder.path().join("files")).expect("a workspace");
    fs::write(folder.path().join("files/given.txt"), "given").expect("a file");
    let code = "import os\ndef handler(event):\n    open('made.txt', 'w').write('made')\n    return [os.environ['A'], os.environ['B'], open('given.txt').read(), os.environ.get('STATE_DIR')]\n";
    fs::write(folder.path().join("p.py"), code).expect("write the program");
    let mut run = command(&folder, &["run", "p.py", "--env", "A=1", "--env", "B=x=y", "--workspace", "files"]);
    let done: Done = run.output().expect("start the binary").into();
    assert_eq!((done.code, done.stdout.trim()), (0, r#"["1","x=y","given",null]"#), "{}", done.stderr);
    assert_eq!(fs::read_to_string(folder.path().join("files/made.txt")).expect("the file"), "made");
    let left: Vec<_> =
        fs::read_dir(folder.path()).expect("the folder").flatten().map(|entry| entry.file_name()).collect();
    assert!(!left.iter().any(|name| name == "made.txt"), "{left:?}");
}

#[test]
fn a_file_without_a_handler_runs_as_a_script() {
    if !require_sandbox() {
        return;
    }
    let done = run("print('script', __name__)\n", &[]);
    assert_eq!((done.code, done.stdout.lines().next()), (0, Some("script __main__")), "{}", done.stderr);
    let folder = TempDir::new().expect("a folder");
    fs::write(folder.path().join("p.sh"), "echo shell; cat \"$EVENT_FILE\"; exit 4\n").expect("write the program");
    let done: Done =
        command(&folder, &["run", "p.sh", "--event", r#"{"a":1}"#]).output().expect("start the binary").into();
    assert_eq!(done.code, 4, "{}", done.stderr);
    assert!(done.stdout.starts_with("shell\n") && done.stdout.contains(r#""a""#), "{}", done.stdout);
}

#[test]
fn mistakes_of_the_caller_are_told() {
    for arguments in [
        &["run", "missing.py"][..],
        &["run"],
        &["run", "-", "--event", "{"],
        &["run", "-", "--timeout", "0"],
        &["run", "-", "--env", "novalue"],
    ] {
        let done = agent(arguments);
        assert!(done.code != 0 && done.code < 124, "{arguments:?} exits {}", done.code);
        assert!(!done.stderr.trim().is_empty(), "{arguments:?} says nothing");
        assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
    }
}

#[test]
fn policy_shows_the_command_and_the_rules() {
    if !require_sandbox() {
        return;
    }
    let policy = agent(&["policy"]);
    assert_eq!(policy.code, 0, "{}", policy.stderr);
    for part in [
        "bwrap",
        "--unshare-user",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--die-with-parent",
        "--cap-drop",
        "--new-session",
    ] {
        assert!(policy.stdout.contains(part), "{part} in {}", policy.stdout);
    }
}

#[test]
fn doctor_names_every_layer_of_a_machine_that_works() {
    if !require_sandbox() {
        return;
    }
    let doctor = agent(&["doctor"]);
    assert_eq!(doctor.code, 0, "{}{}", doctor.stdout, doctor.stderr);
    let told = doctor.stdout.to_lowercase();
    for layer in ["bubblewrap", "user namespace", "seccomp", "python"] {
        assert!(told.contains(layer), "{layer} in {}", doctor.stdout);
    }
}

#[test]
fn config_tells_origins_and_masks_secrets() {
    let folder = TempDir::new().expect("a folder");
    let mut config = command(&folder, &["config"]);
    for name in ["INTERNAL_API_TOKEN", "AGENT_API_TOKEN", "S3_SECRET_ACCESS_KEY", "S3_ACCESS_KEY_ID"] {
        config.env(name, SECRET);
    }
    let done: Done = config.env("AGENT_CONCURRENCY", "7").output().expect("start the binary").into();
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(!done.stdout.contains(SECRET) && !done.stderr.contains(SECRET), "{}", done.stdout);
    let line = done.stdout.lines().find(|line| line.contains("AGENT_CONCURRENCY")).expect("the setting");
    assert!(line.contains('7') && line.to_lowercase().contains("env"), "value and origin in {line:?}");
    for name in ["INTERNAL_API_TOKEN", "STATE_DIR", "AGENT_QUEUE", "AGENT_MEMORY_LIMIT_MB", "AGENT_CAPTURE_BYTES"] {
        assert!(done.stdout.contains(name), "{name} in {}", done.stdout);
    }
    let invalid = command(&folder, &["config"]).env("AGENT_CONCURRENCY", "many").output().expect("start the binary");
    let invalid = Done::from(invalid);
    assert!(invalid.code != 0 && invalid.stderr.contains("AGENT_CONCURRENCY"), "{}", invalid.stderr);
}
