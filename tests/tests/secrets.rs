//! Promise: code that looks everywhere finds no secret of the agent, whether the agent is root or an ordinary user.
//!
//! The searcher gets the needles spelled backwards and compares backwards: it never holds one itself, so that its own
//! memory and event can't be what it finds.

use std::fs;

use serde_json::{Value, json};
use tests::{Agent, AgentBuilder, ControlPlane, Submission, require_root, require_sandbox};

const SECRETS: [(&str, &str); 4] = [
    ("INTERNAL_API_TOKEN", "planted-callback-token-5d1f"),
    ("AGENT_API_TOKEN", "planted-agent-token-77ab"),
    ("S3_ACCESS_KEY_ID", "PLANTEDKEYID40C2"),
    ("S3_SECRET_ACCESS_KEY", "planted/secret+key/9e31"),
];
/// Two that the searcher must find, or it is blind.
const CANARY_IN_FILE: &str = "canary-in-a-file-2b6e";
const CANARY_IN_ENVIRONMENT: &str = "canary-in-the-environment-8c03";

/// Reads what it can: environment, files, descriptors, and what `/proc` shows of every process.
const SEARCHER: &str = r"
import os, stat

BLOCK = 1 << 20
SKIPPED = ('/usr', '/lib', '/lib64', '/bin', '/sbin', '/sys')

def handler(event):
    needles = [needle.encode() for needle in event['backwards']]
    found, counts = [], {'files': 0, 'processes': 0, 'descriptors': 0}

    def look(where, data):
        backwards = data[::-1]
        for number, needle in enumerate(needles):
            if needle in backwards:
                found.append([number, where])

    def read(path, limit=64 * BLOCK):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            return
        try:
            counts['files'] += 1
            rest = b''
            while limit > 0:
                data = os.read(descriptor, BLOCK)
                if not data: break
                look(path, rest + data)
                rest, limit = data[-100:], limit - len(data)
        except OSError:
            pass
        finally:
            os.close(descriptor)

    def memory(pid):
        try:
            maps = open(f'/proc/{pid}/maps').read().splitlines()
            mem = open(f'/proc/{pid}/mem', 'rb', 0)
        except OSError:
            return
        for line in maps:
            start, end = (int(part, 16) for part in line.split()[0].split('-'))
            for offset in range(start, min(end, start + 64 * BLOCK), BLOCK):
                try:
                    mem.seek(offset)
                    look(f'memory of {pid}', mem.read(min(BLOCK, end - offset)))
                except (OSError, ValueError, OverflowError):
                    break

    for name, value in os.environb.items():
        look('environment', name + b'=' + value)

    for name in os.listdir('/proc/self/fd'):
        counts['descriptors'] += 1
        try:
            look('target of a descriptor', os.readlink(f'/proc/self/fd/{name}').encode())
            info = os.fstat(int(name))
            if stat.S_ISREG(info.st_mode) and int(name) > 2:
                look(f'descriptor {name}', os.pread(int(name), BLOCK, 0))
            if stat.S_ISDIR(info.st_mode):
                for beyond in ('..', '../..', '../../..'):
                    look(f'beyond descriptor {name}', str(os.listdir(f'/proc/self/fd/{name}/{beyond}')).encode())
        except OSError:
            pass

    for pid in ['self', 'thread-self', *filter(str.isdigit, os.listdir('/proc'))]:
        counts['processes'] += 1
        for name in ('environ', 'cmdline', 'comm', 'status', 'mountinfo', 'cgroup', 'stack', 'auxv', 'limits', 'maps'):
            read(f'/proc/{pid}/{name}')
        for link in ('exe', 'cwd', 'root'):
            try: look(f'/proc/{pid}/{link}', os.readlink(f'/proc/{pid}/{link}').encode())
            except OSError: pass
        try: others = os.listdir(f'/proc/{pid}/root/')
        except OSError: others = []
        look(f'root of {pid}', str(others).encode())
        if pid.isdigit() and int(pid) != os.getpid():
            memory(pid)

    for name in ('keys', 'key-users', 'kmsg', 'cmdline', 'mounts', 'config.gz', 'net/unix', 'net/tcp', 'net/tcp6'):
        read(f'/proc/{name}')

    for folder, folders, names in os.walk('/'):
        if folder == '/':
            folders[:] = [name for name in folders if '/' + name not in SKIPPED and name != 'proc']
        prefix = os.path.realpath(os.sys.base_prefix)
        folders[:] = [name for name in folders if os.path.join(folder, name) != prefix]
        for name in names:
            path = os.path.join(folder, name)
            look('name of a file', os.fsencode(path))
            try: mode = os.lstat(path).st_mode
            except OSError: continue
            if stat.S_ISREG(mode): read(path)

    return {
        'found': found,
        'counts': counts,
        'variables': sorted(os.environ),
        'root': sorted(os.listdir('/')),
        'ids': [os.getuid(), os.geteuid(), os.getgid()],
        'status': [line for line in open('/proc/self/status').read().splitlines() if line.startswith(('Cap', 'NoNewPrivs', 'Seccomp:'))],
    }
";

fn backwards(text: &str) -> String {
    text.chars().rev().collect()
}

fn nothing_is_found(agent: AgentBuilder) {
    let mock = ControlPlane::start_with(std::time::Duration::ZERO, Some(SECRETS[0].1));
    let agent = SECRETS.iter().fold(agent, |agent, (name, value)| agent.env(name, value));
    let agent = agent.env("CONTROL_PLANE_URL", mock.url()).start();
    fs::write(agent.workspace().join("canary"), CANARY_IN_FILE).expect("write the canary");
    let needles: Vec<_> =
        SECRETS.iter().map(|(_, value)| *value).chain([CANARY_IN_FILE, CANARY_IN_ENVIRONMENT]).map(backwards).collect();
    let submission = Submission::python(SEARCHER)
        .event(json!({ "backwards": needles }))
        .env("CANARY", CANARY_IN_ENVIRONMENT)
        .timeout(120);
    mock.submit(&agent, &submission).expect("an answer");
    let document = agent.wait_for_end(submission.execution_id(), std::time::Duration::from_secs(130));
    assert_eq!(document["state"], "succeeded", "{document:#}");
    let value = &document["return_value"];
    let found = value["found"].as_array().expect("what was found");
    let of =
        |number: usize| found.iter().filter(move |entry| entry[0] == number).map(|entry| &entry[1]).collect::<Vec<_>>();
    for (number, (name, _)) in SECRETS.iter().enumerate() {
        assert!(of(number).is_empty(), "{name} was found in {:?}", of(number));
    }
    // Controls: it sees what may be seen, and looked at enough.
    assert!(of(4).contains(&&json!("/workspace/canary")), "blind to files: {value:#}");
    assert!(of(5).contains(&&json!("environment")), "blind to the environment: {value:#}");
    assert!(value["counts"]["files"].as_u64() > Some(20), "{}", value["counts"]);

    let variables = value["variables"].as_array().expect("names");
    for name in ["CONTROL_PLANE_URL", "STATE_DIR", "WORKSPACE_PATH", "AGENT_LISTEN"]
        .iter()
        .chain(SECRETS.iter().map(|(name, _)| name))
    {
        assert!(!variables.contains(&json!(name)), "{name} is in the environment");
    }
    assert!(!value["ids"].as_array().expect("ids").contains(&json!(0)), "root inside: {}", value["ids"]);
    for line in value["status"].as_array().expect("lines").iter().filter_map(Value::as_str) {
        let expected = if line.starts_with("Cap") {
            "0000000000000000"
        } else if line.starts_with("Seccomp") {
            "2"
        } else {
            "1"
        };
        assert!(line.ends_with(expected), "{line}");
    }

    // Nor are they where others on the machine could look.
    let environment = fs::read(format!("/proc/{}/environ", agent.pid())).unwrap_or_default();
    let arguments = fs::read(format!("/proc/{}/cmdline", agent.pid())).expect("its arguments");
    let outside =
        [String::from_utf8_lossy(&environment), String::from_utf8_lossy(&arguments), agent.log().into()].concat();
    for (name, secret) in SECRETS {
        assert!(!outside.contains(secret), "{name} is in the agent's environment, arguments or log");
    }
}

#[test]
fn code_finds_none_under_the_user_of_the_tests() {
    if require_sandbox() {
        nothing_is_found(Agent::builder());
    }
}

#[test]
fn code_finds_none_under_an_ordinary_user() {
    if require_sandbox() && require_root() {
        nothing_is_found(Agent::builder().uid(1000));
    }
}

#[test]
fn nothing_of_one_execution_is_left_for_the_next() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::start();
    let places = "['/tmp/left', '/dev/shm/left', '/var/tmp/left', '/workspace/left']";
    let leave = format!(
        "def handler(event):\n    for place in {places}:\n        try: open(place, 'w').write('x')\n        except OSError: pass\n"
    );
    assert_eq!(agent.run(&Submission::python(&leave))["state"], "succeeded");
    let look =
        format!("import os\ndef handler(event):\n    return [place for place in {places} if os.path.exists(place)]\n");
    // Control: the workspace is shared by the session's executions.
    assert_eq!(agent.run(&Submission::python(&look))["return_value"], json!(["/workspace/left"]));
}

#[test]
fn what_is_not_the_programs_own_can_t_be_written() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::start();
    let code = r"
import os
def writable(path):
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
        os.close(descriptor)
        os.unlink(path)
        return True
    except OSError:
        return False
def handler(event):
    return {place: writable(place + '/probe') for place in event['places']}
";
    let denied =
        ["", "/usr", "/usr/bin", "/etc", "/dev", "/proc", "/proc/sys/kernel", "/sys", "/var", "/root", "/home", "/opt"];
    let allowed = ["/workspace", "/tmp", "/dev/shm"];
    let places: Vec<_> = denied.iter().chain(&allowed).collect();
    let document = agent.run(&Submission::python(code).event(json!({ "places": places })));
    for place in denied {
        assert_eq!(document["return_value"][place], false, "{place:?} is writable: {document:#}");
    }
    for place in allowed {
        assert_eq!(document["return_value"][place], true, "{place:?} is not writable: {document:#}");
    }
}

#[test]
fn the_agents_and_the_machines_network_are_out_of_reach() {
    if !require_sandbox() {
        return;
    }
    let agent = Agent::start();
    let code = r"
import socket
def reached(family, address):
    try:
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(2)
            connection.connect(address)
            return True
    except OSError:
        return False
def handler(event):
    with socket.create_server(('127.0.0.1', 0)) as own:
        control = reached(socket.AF_INET, own.getsockname())
    return [control, reached(socket.AF_INET, ('127.0.0.1', event['port'])), reached(socket.AF_INET, ('1.1.1.1', 53)), reached(socket.AF_INET, ('169.254.169.254', 80))]
";
    let document = agent.run(&Submission::python(code).event(json!({"port": agent.address().port()})));
    assert_eq!(document["return_value"], json!([true, false, false, false]), "{document:#}");
}
