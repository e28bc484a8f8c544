//! A strict mock of the control plane: the callbacks that it accepts, the answers that it was observed to give, and
//! the faults that a network adds.
//!
//! What the contract does not allow is refused as the real one refuses it, and is also kept as a violation: dropping
//! the mock panics when there are any, so that no test can pass over one. It knows the executions that were
//! submitted through it, as the real one knows only those that it sent.
//!
//! One thread accepts, one thread serves each connection, one mutex holds what was seen. Nothing is timed by the
//! mock but its faults.

use std::collections::{HashMap, VecDeque};
use std::fmt::Display;
use std::io::{self, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::agent::Agent;
use crate::http::{Message, Response};
use crate::submission::Submission;
use crate::wait;

/// The longest `stdout`, `stderr` or text of a `return_value` that its database takes.
pub const TEXT_LIMIT: usize = 65_535;

/// A heartbeat that was sent before the result may be read after it, on its own connection. It is late beyond this.
const HEARTBEAT_TOLERANCE: Duration = Duration::from_secs(1);

/// What may happen to a request instead of an answer.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// Answered with this status and not processed.
    Status(u16),
    /// The connection is reset, the request not processed.
    Reset,
    /// Nothing is answered for this long, then the connection is closed; not processed.
    Hang(Duration),
    /// The request is processed, its answer is lost.
    LostAnswer,
}

/// How often which faults happen, in an order that the seed decides.
#[derive(Debug, Clone)]
pub struct Faults {
    rate: f64,
    kinds: Vec<Fault>,
    random: u64,
}

impl Faults {
    /// One request in `1 / rate` meets one of `kinds`, each as likely as the others.
    pub fn new(rate: f64, kinds: &[Fault], seed: u64) -> Self {
        Self { rate, kinds: kinds.to_vec(), random: seed }
    }

    fn draw(&mut self) -> Option<Fault> {
        if self.kinds.is_empty() || self.next() >= self.rate {
            return None;
        }
        let index = (self.next() * self.kinds.len() as f64) as usize;
        Some(self.kinds[index])
    }

    /// A number from 0 up to 1 (splitmix64).
    fn next(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// One report of a result, as it arrived.
#[derive(Debug, Clone)]
pub struct Report {
    /// The body.
    pub body: Value,
    /// What it was answered with, or would have been if the answer had not been lost.
    pub answer: u16,
    /// When it was read.
    pub at: Instant,
}

/// A running mock.
pub struct ControlPlane {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    down: AtomicBool,
    closing: AtomicBool,
    started: Instant,
    session_known_after: Duration,
    token: Option<String>,
}

#[derive(Default)]
struct State {
    executions: HashMap<String, Execution>,
    faults: Option<Faults>,
    /// Faults for the next results, used up before the random ones.
    planned: VecDeque<Fault>,
    /// Results whose stdout is longer than this are answered 500, whatever else holds.
    stdout_refused_above: Option<usize>,
    drop_idle_connections: bool,
    ready: Vec<(Instant, bool)>,
    exited: Vec<Value>,
    violations: Vec<String>,
}

#[derive(Default)]
struct Execution {
    attempts: usize,
    reports: Vec<Report>,
    heartbeats: Vec<Instant>,
    status: Option<String>,
    first_attempt: Option<Instant>,
}

/// Why a body is refused: status, and what is wrong with it.
type Refusal = (u16, String);

impl ControlPlane {
    /// A mock that knows the session from the start and asks for no credential.
    pub fn start() -> Self {
        Self::start_with(Duration::ZERO, None)
    }

    /// A mock that knows the session only `session_known_after` its start, and asks for `token` when one is given.
    pub fn start_with(session_known_after: Duration, token: Option<&str>) -> Self {
        // An address of the loopback network that nobody else takes: the port stays ours while we are down.
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let count = COUNTER.fetch_add(1, Ordering::Relaxed).to_be_bytes()[3];
        let loopback = SocketAddr::from(([127, high | 0x40, low, count.max(1)], 0));
        let listener = TcpListener::bind(loopback).expect("listen on a loopback address");
        let address = listener.local_addr().expect("the mock's address");
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            down: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            started: Instant::now(),
            session_known_after,
            token: token.map(str::to_owned),
        });
        let acceptor = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(listener, address, &shared)
        });
        Self { address, shared, acceptor: Some(acceptor) }
    }

    /// The value of `CONTROL_PLANE_URL`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Makes an execution known, then submits it.
    pub fn submit(&self, agent: &Agent, submission: &Submission) -> io::Result<Response> {
        self.expect(submission.execution_id());
        agent.try_submit(submission)
    }

    /// Makes an execution known without submitting it.
    pub fn expect(&self, id: &str) {
        self.state().executions.entry(id.to_owned()).or_default();
    }

    /// Waits for the report that was recorded, and returns its body.
    #[track_caller]
    pub fn wait_for_report(&self, id: &str, limit: Duration) -> Value {
        wait::for_value(&format!("the report of {id}"), limit, || self.recorded(id).into_iter().next_back()).body
    }

    /// The reports that changed something here, those that were answered 201. More than one is possible only
    /// where a final state replaces `crashed`.
    pub fn recorded(&self, id: &str) -> Vec<Report> {
        self.reports(id).into_iter().filter(|report| report.answer == 201).collect()
    }

    /// All reports that were processed.
    pub fn reports(&self, id: &str) -> Vec<Report> {
        self.state().executions.get(id).map(|execution| execution.reports.clone()).unwrap_or_default()
    }

    /// How often a report was tried, faults included.
    pub fn attempts(&self, id: &str) -> usize {
        self.state().executions.get(id).map_or(0, |execution| execution.attempts)
    }

    /// When heartbeats came.
    pub fn heartbeats(&self, id: &str) -> Vec<Instant> {
        self.state().executions.get(id).map(|execution| execution.heartbeats.clone()).unwrap_or_default()
    }

    /// When `ready` came, and whether the session was known by then.
    pub fn ready_calls(&self) -> Vec<(Instant, bool)> {
        self.state().ready.clone()
    }

    /// The bodies of the `exited` callbacks.
    pub fn exited(&self) -> Vec<Value> {
        self.state().exited.clone()
    }

    /// Lets faults happen from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = Some(faults);
    }

    /// Lets these faults happen to the next results, one each.
    pub fn plan_faults(&self, faults: &[Fault]) {
        self.state().planned.extend(faults);
    }

    /// Answers 500 to every result with a longer stdout.
    pub fn refuse_stdout_above(&self, bytes: usize) {
        self.state().stdout_refused_above = Some(bytes);
    }

    /// Closes every connection after one answer without having said so.
    pub fn drop_idle_connections(&self) {
        self.state().drop_idle_connections = true;
    }

    /// Stops listening, or listens again.
    pub fn set_down(&self, down: bool) {
        self.shared.down.store(down, Ordering::SeqCst);
        if down {
            let refused = || TcpStream::connect(self.address).is_err();
            wait::until("the mock to be down", Duration::from_secs(5), refused);
        }
    }

    /// What broke the contract so far.
    pub fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }

    /// Takes the violations away; only for tests of the mock itself.
    pub fn take_violations(&self) -> Vec<String> {
        std::mem::take(&mut self.state().violations)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().ok();
        }
        let violations = self.violations();
        if std::thread::panicking() {
            eprintln!("violations of the contract: {violations:#?}");
        } else {
            assert!(violations.is_empty(), "violations of the contract: {violations:#?}");
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn accept(listener: TcpListener, address: SocketAddr, shared: &Arc<Shared>) {
    let mut listener = Some(listener);
    while !shared.closing.load(Ordering::SeqCst) {
        if shared.down.load(Ordering::SeqCst) {
            listener = None;
        } else if listener.is_none() {
            listener = TcpListener::bind(address).ok();
        }
        let connection = listener.as_ref().and_then(|listener| {
            listener.set_nonblocking(true).ok()?;
            listener.accept().ok()
        });
        let Some((stream, _)) = connection else {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        let shared = Arc::clone(shared);
        std::thread::spawn(move || serve(stream, &shared));
    }
}

/// Serves one connection until either side is done with it.
fn serve(stream: TcpStream, shared: &Shared) {
    stream.set_nonblocking(false).expect("a blocking stream");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a read timeout");
    let mut reader = BufReader::new(&stream);
    while let Ok(Some(request)) = Message::read(&mut reader) {
        if shared.down.load(Ordering::SeqCst) {
            return reset(&stream);
        }
        let (fault, keep_alive) = {
            let mut state = shared.state();
            (state.arrived(&request), !state.drop_idle_connections)
        };
        match fault {
            Some(Fault::Reset) => return reset(&stream),
            Some(Fault::Hang(span)) => return std::thread::sleep(span),
            Some(Fault::Status(status)) => {
                answer(&stream, status, &json!({"detail": "a fault of the test"}));
                return;
            }
            Some(Fault::LostAnswer) => {
                process(&request, shared);
                return reset(&stream);
            }
            None => {
                let (status, body) = process(&request, shared);
                let answered = answer(&stream, status, &body);
                // It drops idle connections after errors, and says nothing about it beforehand.
                if !answered || status >= 400 || !keep_alive {
                    return;
                }
            }
        }
    }
}

fn answer(mut stream: &TcpStream, status: u16, body: &Value) -> bool {
    let body = body.to_string();
    let head =
        format!("HTTP/1.1 {status} Mock\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all([head, body].concat().as_bytes()).is_ok()
}

/// Closes so that the peer meets ECONNRESET.
fn reset(stream: &TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let size = libc::socklen_t::try_from(size_of::<libc::linger>()).expect("a small size");
    // SAFETY: the descriptor is open for as long as `stream` is borrowed, and the option's value is a live `linger`
    // of exactly the size that is told.
    unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), size);
    }
}

/// The three parts of a request line.
fn target(request: &Message) -> (&str, Vec<&str>) {
    let mut words = request.start_line.split(' ');
    let method = words.next().unwrap_or_default();
    let path = words.next().unwrap_or_default();
    (method, path.trim_start_matches('/').split('/').collect())
}

fn process(request: &Message, shared: &Shared) -> (u16, Value) {
    let mut state = shared.state();
    let answer = state.process(request, shared);
    answer.unwrap_or_else(|(status, reason)| {
        state.violations.push(format!("{}: {reason} (answered {status})", request.start_line));
        (status, json!({ "detail": reason }))
    })
}

impl State {
    /// Notes that a request came, before any fault, and draws the fault that it meets.
    fn arrived(&mut self, request: &Message) -> Option<Fault> {
        let (_, path) = target(request);
        if let ["api", "v1", "internal", "executions", id, "result"] = path[..] {
            if let Some(execution) = self.executions.get_mut(id) {
                execution.attempts += 1;
                execution.first_attempt.get_or_insert_with(Instant::now);
            }
            if let Some(fault) = self.planned.pop_front() {
                return Some(fault);
            }
        }
        self.faults.as_mut().and_then(Faults::draw)
    }

    fn process(&mut self, request: &Message, shared: &Shared) -> Result<(u16, Value), Refusal> {
        let (method, path) = target(request);
        let ["api", "v1", "internal", path @ ..] = &path[..] else {
            return Err((404, "no such path".into()));
        };
        if method != "POST" {
            return Err((405, "every callback is a POST".into()));
        }
        self.check_headers(request, shared)?;
        let body = parse(request)?;
        match path {
            ["containers", "ready"] => self.ready(&body, shared),
            ["containers", "exited"] => self.exit(body),
            ["executions", id, "heartbeat"] => self.heartbeat(id, &body),
            ["executions", id, "result"] => self.result(id, request, body),
            _ => Err((404, "no such path".into())),
        }
    }

    fn check_headers(&mut self, request: &Message, shared: &Shared) -> Result<(), Refusal> {
        let expected = shared.token.as_ref().map(|token| format!("Bearer {token}"));
        let given = request.header("authorization");
        check(given == expected.as_deref(), 401, "the Authorization header is not what the settings ask for")?;
        let media_type = request.header("content-type").unwrap_or_default();
        check(media_type.starts_with("application/json"), 422, "the content type is not application/json")
    }

    fn ready(&mut self, body: &Value, shared: &Shared) -> Result<(u16, Value), Refusal> {
        check_container(body, "ready")?;
        check_time(body, "ready_at")?;
        let known = shared.started.elapsed() >= shared.session_known_after;
        self.ready.push((Instant::now(), known));
        let container = body["container_id"].as_str().unwrap_or_default();
        let outcome = if known { "session updated" } else { "no session found" };
        Ok((200, json!({ "message": format!("Container {container} ready ({outcome})") })))
    }

    fn exit(&mut self, body: Value) -> Result<(u16, Value), Refusal> {
        check_container(&body, "exited")?;
        check_time(&body, "exited_at")?;
        check(is_integer(&body["exit_code"]), 422, "exit_code is no integer")?;
        let reason = body["exit_reason"].as_str().unwrap_or_default();
        let known = ["normal", "sigterm", "sigkill", "oom_killed", "error"].contains(&reason);
        check(known, 422, format!("exit_reason {reason:?}"))?;
        self.exited.push(body);
        Ok((200, json!({ "message": "Container exit recorded" })))
    }

    fn heartbeat(&mut self, id: &str, body: &Value) -> Result<(u16, Value), Refusal> {
        check_time(body, "timestamp")?;
        let progress = &body["progress"];
        check(progress.is_null() || progress.is_object(), 422, "progress is neither an object nor null")?;
        let execution = self.executions.get_mut(id).ok_or((404, format!("a heartbeat of {id}, which is unknown")))?;
        let late = execution.first_attempt.is_some_and(|sent| sent.elapsed() > HEARTBEAT_TOLERANCE);
        check(!late, 200, format!("a heartbeat of {id} after its result"))?;
        execution.heartbeats.push(Instant::now());
        Ok((200, json!({ "message": "Heartbeat recorded" })))
    }

    fn result(&mut self, id: &str, request: &Message, body: Value) -> Result<(u16, Value), Refusal> {
        let execution = self.executions.get_mut(id).ok_or((404, format!("a result of {id}, which is unknown")))?;
        check(request.header("idempotency-key") == Some(id), 400, "the Idempotency-Key is not the execution's id")?;
        check_result(&body)?;
        let length = body["stdout"].as_str().map_or(0, str::len);
        if self.stdout_refused_above.is_some_and(|limit| length > limit) {
            return Ok((500, json!({ "detail": "the database refused it" })));
        }
        let status = body["status"].as_str().unwrap_or_default().to_owned();
        let answer = match (execution.status.as_deref(), status.as_str()) {
            (None, _) | (Some("crashed"), "failed" | "timeout") => 201,
            (Some("crashed"), "success") => {
                return Err((409, format!("{id}: success after crashed")));
            }
            (Some(before), _) if before == status => 200,
            (Some(before), _) => return Err((200, format!("{id}: {status} after {before}"))),
        };
        execution.reports.push(Report { body, answer, at: Instant::now() });
        if answer == 201 {
            execution.status = Some(status);
        }
        Ok((answer, json!({ "message": "Result recorded" })))
    }
}

fn parse(request: &Message) -> Result<Value, Refusal> {
    let body: Value = serde_json::from_slice(&request.body).map_err(|error| {
        let surrogate = error.to_string().contains("surrogate") || error.to_string().contains("hex escape");
        (if surrogate { 409 } else { 422 }, format!("the body is no strict JSON: {error}"))
    })?;
    check(body.is_object(), 422, "the body is no object")?;
    Ok(body)
}

fn check_container(body: &Value, event_type: &str) -> Result<(), Refusal> {
    check(body["event_type"] == event_type, 422, format!("event_type is {}", body["event_type"]))?;
    let container = body["container_id"].as_str().unwrap_or_default();
    check(!container.is_empty(), 422, "container_id is missing or empty")?;
    check(body["pod_name"].is_null() || body["pod_name"].is_string(), 422, "pod_name is no string")?;
    check(body["executor_port"].is_null() || is_integer(&body["executor_port"]), 422, "executor_port is no integer")
}

/// ISO 8601 in UTC: `2025-01-31T12:34:56`, a fraction or none, `Z` or `+00:00`.
fn check_time(body: &Value, field: &str) -> Result<(), Refusal> {
    let text = body[field].as_str().unwrap_or_default();
    let shape: String = text.chars().map(|letter| if letter.is_ascii_digit() { '0' } else { letter }).collect();
    let rest = shape.strip_prefix("0000-00-00T00:00:00");
    let zone = rest.map(|rest| rest.trim_start_matches(['.', '0']));
    let utc = rest.is_some_and(|rest| rest.ends_with('Z')) && zone == Some("Z") || text.ends_with("+00:00");
    check(rest.is_some() && utc, 422, format!("{field} is no ISO 8601 time in UTC: {}", body[field]))
}

fn check_result(body: &Value) -> Result<(), Refusal> {
    let status = body["status"].as_str().ok_or((422, "status is no string".to_owned()))?;
    let known = ["success", "failed", "timeout", "crashed"].contains(&status);
    check(known, 400, format!("status {status:?}"))?;
    check(is_integer(&body["exit_code"]), 422, "exit_code is no integer")?;
    let fits = body["exit_code"].as_i64().is_some_and(|code| i32::try_from(code).is_ok());
    check(fits, 500, "exit_code doesn't fit 32 bits")?;
    check(status != "success" || body["exit_code"] == 0, 422, "success with another exit_code than 0")?;
    check(
        body["execution_time"].as_f64().is_some_and(|time| time >= 0.0),
        422,
        "execution_time is no number of seconds",
    )?;
    for field in ["stdout", "stderr"] {
        let text = body[field].as_str().ok_or((422, format!("{field} is no string")))?;
        check(text.len() <= TEXT_LIMIT, 500, format!("{field} has {} bytes", text.len()))?;
    }
    let length = body["return_value"].to_string().len();
    check(length <= TEXT_LIMIT, 500, format!("return_value has {length} bytes"))?;
    check(status != "failed" || body["stderr"] != "", 422, "failed, and stderr doesn't tell why")?;
    check_metrics(&body["metrics"])?;
    check_artifacts(&body["artifacts"])
}

fn check_metrics(metrics: &Value) -> Result<(), Refusal> {
    if metrics.is_null() {
        return Ok(());
    }
    check(metrics.is_object(), 422, "metrics is neither an object nor null")?;
    check(metrics["duration_ms"].is_number(), 422, "metrics.duration_ms is no number")?;
    for field in ["cpu_time_ms", "peak_memory_mb"] {
        check(metrics[field].is_null() || metrics[field].is_number(), 422, format!("metrics.{field} is no number"))?;
    }
    for field in ["io_read_bytes", "io_write_bytes"] {
        check(metrics[field].is_null() || is_integer(&metrics[field]), 422, format!("metrics.{field} is no integer"))?;
    }
    Ok(())
}

fn check_artifacts(artifacts: &Value) -> Result<(), Refusal> {
    let list = artifacts.as_array().ok_or((422, "artifacts is no list".to_owned()))?;
    for artifact in list {
        let path = artifact.as_str().ok_or((422, "an artifact is no string".to_owned()))?;
        check(!path.is_empty(), 409, "an artifact's name is empty")?;
        let inside = !path.starts_with('/') && path.split('/').all(|part| part != "..");
        check(inside, 422, format!("artifact {path:?} is not relative to the workspace"))?;
    }
    Ok(())
}

fn check(holds: bool, status: u16, reason: impl Display) -> Result<(), Refusal> {
    if holds { Ok(()) } else { Err((status, reason.to_string())) }
}

fn is_integer(value: &Value) -> bool {
    value.is_i64() || value.is_u64()
}

#[cfg(test)]
mod tests {
    //! The mock is a test instrument: what it refuses is shown here, so that a green test means something.

    use super::*;
    use crate::http;

    fn report() -> Value {
        json!({
            "status": "success", "exit_code": 0, "execution_time": 0.1, "stdout": "", "stderr": "",
            "return_value": null, "metrics": {"duration_ms": 1.0}, "artifacts": ["a/b.txt"],
        })
    }

    fn send(mock: &ControlPlane, path: &str, body: &[u8]) -> u16 {
        let headers = [("content-type", "application/json"), ("idempotency-key", "one")];
        http::request(mock.address, "POST", &format!("/api/v1/internal/{path}"), &headers, body)
            .expect("an answer")
            .status
    }

    fn with(field: &str, value: Value) -> Vec<u8> {
        let mut body = report();
        body[field] = value;
        body.to_string().into_bytes()
    }

    #[test]
    fn refuses_what_the_contract_forbids() {
        let mock = ControlPlane::start();
        mock.expect("one");
        let refused = [
            (400, with("status", json!("done"))),
            (422, with("status", json!(1))),
            (422, with("exit_code", json!(null))),
            (422, with("exit_code", json!(0.5))),
            (500, with("exit_code", json!(4_294_967_296_u64))),
            (422, with("execution_time", json!("1"))),
            (422, with("stdout", json!(null))),
            (500, with("stdout", json!("x".repeat(TEXT_LIMIT + 1)))),
            (500, with("stderr", json!("é".repeat(TEXT_LIMIT / 2 + 1)))),
            (500, with("return_value", json!("x".repeat(TEXT_LIMIT - 1)))),
            (422, with("metrics", json!({"cpu_time_ms": 1}))),
            (422, with("metrics", json!({"duration_ms": 1, "io_read_bytes": 1.5}))),
            (409, with("artifacts", json!([""]))),
            (422, with("artifacts", json!(["../a"]))),
            (409, report().to_string().replace(r#""stdout":"""#, r#""stdout":"\ud800""#).into_bytes()),
            (422, report().to_string().replace("0.1", "NaN").into_bytes()),
        ];
        for (status, body) in &refused {
            let text = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
            assert_eq!(send(&mock, "executions/one/result", body), *status, "{text}");
        }
        assert_eq!(send(&mock, "executions/two/result", &with("status", json!("success"))), 404);
        assert_eq!(mock.take_violations().len(), refused.len() + 1);
        assert!(mock.recorded("one").is_empty());
    }

    #[test]
    fn first_report_wins_and_crashed_is_not_final() {
        let mock = ControlPlane::start();
        mock.expect("one");
        let crashed = String::from_utf8(with("status", json!("crashed"))).expect("JSON is UTF-8");
        let crashed = crashed.replace(r#""exit_code":0"#, r#""exit_code":-1"#);
        let failed = crashed.replace("crashed", "failed").replace(r#""stderr":"""#, r#""stderr":"killed""#);
        assert_eq!(send(&mock, "executions/one/result", crashed.as_bytes()), 201);
        assert_eq!(send(&mock, "executions/one/result", crashed.as_bytes()), 200);
        assert_eq!(send(&mock, "executions/one/result", report().to_string().as_bytes()), 409);
        assert_eq!(send(&mock, "executions/one/result", failed.as_bytes()), 201);
        assert_eq!(send(&mock, "executions/one/result", failed.as_bytes()), 200);
        assert_eq!(mock.take_violations().len(), 1);
    }

    #[test]
    fn faults_come_at_their_rate_and_repeat_with_their_seed() {
        let drawn = |seed| {
            let mut faults = Faults::new(0.4, &[Fault::Reset], seed);
            (0..10_000).map(|_| faults.draw().is_some()).collect::<Vec<_>>()
        };
        let count = drawn(7).iter().filter(|fault| **fault).count();
        assert!((3_800..4_200).contains(&count), "{count}");
        assert_eq!(drawn(7), drawn(7));
        assert_ne!(drawn(7), drawn(8));
    }

    #[test]
    fn is_refused_while_down_and_back_afterwards() {
        let mock = ControlPlane::start();
        mock.expect("one");
        mock.set_down(true);
        assert!(TcpStream::connect(mock.address).is_err());
        mock.set_down(false);
        wait::until("the mock to be back", Duration::from_secs(5), || TcpStream::connect(mock.address).is_ok());
        assert_eq!(send(&mock, "executions/one/result", report().to_string().as_bytes()), 201);
    }
}
