//! Promise: whatever arrives at the socket is answered with a 4xx and the contract's error body, tells nothing of the
//! inside, runs nothing, and leaves the agent up.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use serde_json::{Value, json};
use tests::http::{self, Response, encode};
use tests::{Agent, Submission, require_sandbox};

const TOKEN: &str = "planted-callback-token";

/// What is wrong with a request, and its bytes.
type Case = (String, Vec<u8>);

fn execute(body: &[u8]) -> Vec<u8> {
    encode("POST", "/execute", &[("content-type", "application/json")], body)
}

fn with(field: &str, value: Value) -> Case {
    let shown: String = value.to_string().chars().take(40).collect();
    (
        format!("{field} = {shown}"),
        execute(Submission::python("x = 1").with(field, value).body().to_string().as_bytes()),
    )
}

fn without(field: &str) -> Case {
    (format!("no {field}"), execute(Submission::python("x = 1").without(field).body().to_string().as_bytes()))
}

fn body(name: &str, bytes: &[u8]) -> Case {
    (name.to_owned(), execute(bytes))
}

fn path(method: &str, path: &str) -> Case {
    (format!("{method} {}", &path[..path.len().min(60)]), encode(method, path, &[], b""))
}

fn raw(name: &str, bytes: impl AsRef<[u8]>) -> Case {
    (name.to_owned(), bytes.as_ref().to_vec())
}

/// A valid body whose text is changed by hand, for what a JSON library would not write.
fn edited(name: &str, from: &str, to: &str) -> Case {
    let text = Submission::python("MARK").body().to_string();
    assert!(text.contains(from), "{from} is not in {text}");
    body(name, text.replace(from, to).as_bytes())
}

fn bodies() -> Vec<Case> {
    let valid = Submission::python("x = 1").body().to_string();
    vec![
        body("empty body", b""),
        body("no JSON", b"execution_id=1&code=x"),
        body("half an object", &valid.as_bytes()[..valid.len() / 2]),
        body("a list", b"[]"),
        body("null", b"null"),
        body("a number", b"42"),
        body("a text", b"\"code\""),
        body("empty object", b"{}"),
        body("more after the end", format!("{valid} {valid}").as_bytes()),
        body("not UTF-8", b"{\"execution_id\": \"\xff\xfe\"}"),
        body("UTF-16", &valid.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>()),
        body("NUL bytes", &[0; 64]),
        body("a deep nest", &[b'['; 200_000]),
        body(
            "a deep nest in the event",
            valid.replace("\"event\":{}", &format!("\"event\":{{\"a\":{}", "[".repeat(100_000))).as_bytes(),
        ),
        body("too large", &vec![b' '; (16 << 20) + 1]),
        edited("NaN", "\"timeout\":30", "\"timeout\":NaN"),
        edited("a lone surrogate in the code", "MARK", "\\ud800"),
        edited("a control character", "MARK", "a\nb"),
        edited("an infinite number", "\"timeout\":30", "\"timeout\":1e999"),
        edited("single quotes", "\"timeout\"", "'timeout'"),
    ]
}

fn fields() -> Vec<Case> {
    let mut cases: Vec<_> = ["execution_id", "session_id", "code", "language"].map(without).into();
    let ids = ["", ".", "..", ".hidden", "a/b", "../../etc/passwd", "a b", "a\nb", "a\0b", "é", "a%2Fb", "a\\b"];
    cases.extend(ids.map(|id| with("execution_id", json!(id))));
    cases.push(with("execution_id", json!("x".repeat(129))));
    cases.extend([json!(1), json!(null), json!(["a"])].map(|id| with("execution_id", id)));
    cases.extend([json!(1), json!(null), json!("x".repeat((1 << 20) + 1))].map(|code| with("code", code)));
    cases.extend(
        [json!("cobol"), json!(""), json!(3), json!("python3.11; id")].map(|language| with("language", language)),
    );
    cases.extend([json!("{}"), json!([]), json!(1)].map(|event| with("event", event)));
    let timeouts = [json!(0), json!(-1), json!(3601), json!(1.5), json!("30"), json!(true), json!(u64::MAX)];
    cases.extend(timeouts.map(|timeout| with("timeout", timeout)));
    let variables =
        [json!([]), json!({"A": 1}), json!({"A": null}), json!({"A=B": "x"}), json!({"": "x"}), json!({"A": "x\0y"})];
    cases.extend(variables.map(|variables| with("env_vars", variables)));
    cases.push(with("session_id", json!(7)));
    cases
}

fn paths() -> Vec<Case> {
    vec![
        path("GET", "/execute"),
        path("PUT", "/execute"),
        path("DELETE", "/execute"),
        path("POST", "/health"),
        path("BREW", "/execute"),
        path("GET", "/"),
        path("GET", "/execute/"),
        path("GET", "//execute"),
        path("GET", "/v1/executions/"),
        path("GET", "/v1/executions/unknown"),
        path("GET", "/v1/executions/..%2f..%2f..%2fetc%2fpasswd"),
        path("GET", "/v1/executions/%00"),
        path("GET", "/v1/executions/%ff%fe"),
        path("GET", &format!("/v1/executions/{}", "x".repeat(10_000))),
        path("POST", "/v1/executions/unknown"),
        path("DELETE", "/v1/executions/unknown"),
    ]
}

/// What is no HTTP, or HTTP that two readers may read in two ways.
fn garbage() -> Vec<Case> {
    let many: String = (0..1000).map(|n| format!("x-{n}: y\r\n")).collect();
    let large = format!("GET /health HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "y".repeat(1 << 20));
    vec![
        raw("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
        raw("zeroes", [0; 256]),
        raw("an empty method", " /health HTTP/1.1\r\n\r\n"),
        raw("no version", "GET\r\n\r\n"),
        raw("version 9.9", "GET /health HTTP/9.9\r\nhost: a\r\n\r\n"),
        raw("a header without a colon", "GET /health HTTP/1.1\r\nhost: a\r\nbroken\r\n\r\n"),
        raw("a blank before the colon", "GET /health HTTP/1.1\r\nhost : a\r\n\r\n"),
        raw("NUL in a header", "GET /health HTTP/1.1\r\nhost: a\0b\r\n\r\n"),
        raw("a length below zero", "POST /execute HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n"),
        raw("a length that is none", "POST /execute HTTP/1.1\r\nhost: a\r\ncontent-length: ten\r\n\r\n"),
        raw(
            "a length beyond 64 bits",
            "POST /execute HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        ),
        raw("two lengths", "POST /execute HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}x"),
        raw("an unknown coding", "POST /execute HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n{}"),
        raw(
            "a broken chunk",
            "POST /execute HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        ),
        raw("1000 headers", format!("GET /health HTTP/1.1\r\nhost: a\r\n{many}\r\n")),
        raw("a header of 1 MiB", large),
    ]
}

/// What is wrong with the answer to a malformed request.
fn judge(agent: &Agent, response: Option<&Response>) -> Result<(), String> {
    let response = response.ok_or("closed without an answer")?;
    if !(400..500).contains(&response.status) {
        return Err(format!("answered {}: {}", response.status, response.text()));
    }
    let told = format!("{:?} {}", response.message.headers, response.text());
    let state_dir = agent.state_dir().display().to_string();
    for inside in [TOKEN, &state_dir, "panicked", ".rs:", "serde", "axum", "RUST_BACKTRACE"] {
        if told.contains(inside) {
            return Err(format!("tells {inside:?}: {told}"));
        }
    }
    let body: Value = serde_json::from_slice(&response.message.body)
        .map_err(|_| format!("{} without the error body", response.status))?;
    let named = body["error_code"].as_str().is_some_and(|code| code.starts_with("Executor."));
    let fields = ["description", "error_detail", "solution", "request_id"].iter().all(|field| body[field].is_string());
    if !named || !fields || !body["errors"].is_array() {
        return Err(format!("not the error body: {body}"));
    }
    Ok(())
}

fn all_are_refused(cases: Vec<Case>) {
    let agent = Agent::builder().env("INTERNAL_API_TOKEN", TOKEN).start();
    let pid = agent.pid();
    let mut wrong = Vec::new();
    for (name, bytes) in &cases {
        match http::send_raw(agent.address(), bytes) {
            Ok(response) => {
                wrong.extend(judge(&agent, response.as_ref()).err().map(|error| format!("{name}: {error}")))
            }
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "{} of {} answered wrongly:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    assert_eq!(agent.pid(), pid);
    assert!(!agent.log().contains("panicked"), "a panic in the log");
    // Control: the same agent takes what is well-formed.
    if require_sandbox() {
        let document = agent.run(&Submission::python("def handler(event):\n    return 1\n"));
        assert_eq!(document["return_value"], 1);
    }
}

#[test]
fn malformed_bodies() {
    all_are_refused(bodies());
}

#[test]
fn malformed_fields() {
    all_are_refused(fields());
}

#[test]
fn wrong_paths_and_methods() {
    all_are_refused(paths());
}

#[test]
fn raw_garbage() {
    all_are_refused(garbage());
}

#[test]
fn two_framings_in_one_request_are_never_two_requests() {
    let agent = Agent::start();
    let smuggled = "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
    let request = format!(
        "POST /execute HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}",
        5 + smuggled.len()
    );
    let mut stream = TcpStream::connect(agent.address()).expect("connect");
    stream.write_all(request.as_bytes()).expect("send");
    stream.shutdown(Shutdown::Write).expect("say that this is all");
    let mut answers = String::new();
    stream.read_to_string(&mut answers).ok();
    assert!(answers.starts_with("HTTP/1.1 4"), "{answers}");
    assert_eq!(answers.matches("HTTP/1.1 ").count(), 1, "{answers}");
}

#[test]
fn requests_that_stop_half_way_leave_the_agent_up() {
    let agent = Agent::start();
    let whole = execute(Submission::python("x = 1").body().to_string().as_bytes());
    for length in [0, 1, 10, 40, whole.len() / 2, whole.len() - 1] {
        let response = http::send_and_close(agent.address(), &whole[..length]).ok().flatten();
        let status = response.map_or(400, |response| response.status);
        assert!((400..500).contains(&status), "{length} bytes are answered {status}");
    }
    assert_ne!(agent.get("/health").text(), "");
}

#[test]
fn two_hundred_silent_connections_don_t_keep_others_out() {
    let agent = Agent::start();
    let silent: Vec<_> = (0..200).map(|_| TcpStream::connect(agent.address()).expect("connect")).collect();
    assert_ne!(agent.get("/health").text(), "");
    drop(silent);
}
