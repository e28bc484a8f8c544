//! Which execution runs when: admission, idempotency, order, concurrency, the end on shutdown.
//!
//! One task owns all of it. Others talk to it through a bounded mailbox and get their answers by oneshot.
//!
//! ```text
//! submit ─▶ storing ─▶ waiting (first in, first out) ─▶ running ─▶ gone from here, on disk in the outbox
//! ```
//!
//! An id that is known, here or in the outbox, is accepted again and never run again. A full queue is the caller's to wait for:
//! [`Queue::submit`] holds a permit from a semaphore before the task is asked.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use isolation::Stop;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use crate::control_plane::result_body;
use crate::delivery::{Delivery, Heartbeat};
use crate::execution::{Execution, ExecutionId, ExecutionResult, State, now};
use crate::outbox::{Outbox, Unfinished};
use crate::output::Output;
use crate::runner::Runner;

/// Messages that may wait for the task.
const MAILBOX: usize = 256;
/// How long a submit may wait for room.
const ROOM_PATIENCE: Duration = Duration::from_secs(20);

/// The answer to a submit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Submitted {
    /// It will run, or has run: the id is known.
    Accepted,
    /// No room in time.
    Full,
    /// The agent is on its way out.
    Draining,
    /// It could not be stored, so it may not run.
    NotStored(String),
}

/// What is known of an execution that has not ended.
#[derive(Debug, Clone)]
pub struct Live {
    /// Its session.
    pub session_id: String,
    /// Queued or running.
    pub state: State,
    /// When it was accepted.
    pub accepted_at: String,
    /// When it started.
    pub started_at: Option<String>,
    /// What it has printed.
    pub output: Arc<Output>,
}

/// The handle to the owning task. Cheap to clone.
#[derive(Clone)]
pub struct Queue {
    mailbox: mpsc::Sender<Message>,
    room: Arc<Semaphore>,
    outbox: Arc<Outbox>,
    active: watch::Receiver<usize>,
}

enum Message {
    Submit { execution: Box<Execution>, permit: OwnedSemaphorePermit, reply: oneshot::Sender<Submitted> },
    Stored { id: ExecutionId, failure: Option<String> },
    Refuse { id: ExecutionId, session_id: String, reason: String },
    Find { id: ExecutionId, reply: oneshot::Sender<Option<Live>> },
    Ended { id: ExecutionId },
    Drain { reply: oneshot::Sender<()> },
}

/// What a [`Queue`] needs.
pub struct Parts {
    /// Runs executions.
    pub runner: Arc<Runner>,
    /// Keeps them.
    pub outbox: Arc<Outbox>,
    /// Reports them, when there is a control plane.
    pub delivery: Option<Delivery>,
    /// Executions at a time.
    pub concurrency: usize,
    /// Executions that may wait.
    pub capacity: usize,
    /// Bytes of output kept per stream.
    pub capture_bytes: usize,
    /// Bytes of text in a callback.
    pub callback_text_bytes: usize,
}

struct Entry {
    execution: Option<Box<Execution>>,
    phase: Phase,
    live: Live,
    stop: Stop,
    _permit: OwnedSemaphorePermit,
}

enum Phase {
    Storing(Vec<oneshot::Sender<Submitted>>),
    Waiting,
    Running(Option<Heartbeat>),
}

struct Owner {
    parts: Arc<Parts>,
    mailbox: mpsc::Sender<Message>,
    entries: HashMap<ExecutionId, Entry>,
    waiting: VecDeque<ExecutionId>,
    running: usize,
    active: watch::Sender<usize>,
    draining: Option<oneshot::Sender<()>>,
    is_draining: bool,
}

impl Queue {
    /// Starts the owning task.
    #[must_use]
    pub fn start(parts: Parts) -> Self {
        let (mailbox, mut messages) = mpsc::channel(MAILBOX);
        let room = Arc::new(Semaphore::new(parts.concurrency + parts.capacity));
        let (active_sender, active) = watch::channel(0);
        let outbox = parts.outbox.clone();
        let mut owner = Owner {
            parts: Arc::new(parts),
            mailbox: mailbox.clone(),
            entries: HashMap::new(),
            waiting: VecDeque::new(),
            running: 0,
            active: active_sender,
            draining: None,
            is_draining: false,
        };
        tokio::spawn(async move {
            while let Some(message) = messages.recv().await {
                owner.handle(message);
            }
        });
        Self { mailbox, room, outbox, active }
    }

    /// Asks for an execution to be run once, and waits a bounded time for room.
    pub async fn submit(&self, execution: Execution) -> Submitted {
        if self.outbox.is_known(&execution.id) {
            return Submitted::Accepted;
        }
        let permit = match tokio::time::timeout(ROOM_PATIENCE, self.room.clone().acquire_owned()).await {
            Ok(Ok(permit)) => permit,
            // The semaphore is closed when the agent drains.
            Ok(Err(_)) => return Submitted::Draining,
            Err(_) => return Submitted::Full,
        };
        let (reply, answer) = oneshot::channel();
        let message = Message::Submit { execution: Box::new(execution), permit, reply };
        match self.mailbox.send(message).await {
            Ok(()) => answer.await.unwrap_or(Submitted::Draining),
            Err(_) => Submitted::Draining,
        }
    }

    /// Reports an execution that was refused, so that the control plane does not wait for it.
    pub async fn refuse(&self, id: ExecutionId, session_id: String, reason: String) {
        let _ = self.mailbox.send(Message::Refuse { id, session_id, reason }).await;
    }

    /// Looks an execution up that has not ended.
    pub async fn find(&self, id: ExecutionId) -> Option<Live> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.send(Message::Find { id, reply }).await.ok()?;
        answer.await.ok()?
    }

    /// Executions that run now.
    #[must_use]
    pub fn active(&self) -> usize {
        *self.active.borrow()
    }

    /// Admits nothing more, ends what runs, and returns when every execution has its record.
    pub async fn drain(&self) {
        self.room.close();
        let (reply, answer) = oneshot::channel();
        if self.mailbox.send(Message::Drain { reply }).await.is_ok() {
            let _ = answer.await;
        }
    }
}

impl Owner {
    fn handle(&mut self, message: Message) {
        match message {
            Message::Submit { execution, permit, reply } => self.submit(execution, permit, reply),
            Message::Stored { id, failure } => self.stored(id, failure),
            Message::Refuse { id, session_id, reason } => self.refuse(id, session_id, reason),
            Message::Find { id, reply } => {
                let _ = reply.send(self.entries.get(&id).map(|entry| entry.live.clone()));
            }
            Message::Ended { id } => self.ended(&id),
            Message::Drain { reply } => self.drain(reply),
        }
        self.start_waiting();
        self.active.send_if_modified(|active| std::mem::replace(active, self.running) != self.running);
        if self.entries.is_empty()
            && let Some(reply) = self.draining.take()
        {
            let _ = reply.send(());
        }
    }

    fn submit(&mut self, execution: Box<Execution>, permit: OwnedSemaphorePermit, reply: oneshot::Sender<Submitted>) {
        let id = execution.id.clone();
        if let Some(entry) = self.entries.get_mut(&id) {
            match &mut entry.phase {
                Phase::Storing(replies) => replies.push(reply),
                _ => drop(reply.send(Submitted::Accepted)),
            }
            return;
        }
        if self.parts.outbox.is_known(&id) {
            let _ = reply.send(Submitted::Accepted);
            return;
        }
        if self.is_draining {
            let _ = reply.send(Submitted::Draining);
            return;
        }
        let stop = match Stop::new() {
            Ok(stop) => stop,
            Err(error) => {
                let _ = reply.send(Submitted::NotStored(error.to_string()));
                return;
            }
        };
        let live = Live {
            session_id: execution.session_id.clone(),
            state: State::Queued,
            accepted_at: now(),
            started_at: None,
            output: Arc::new(Output::new(self.parts.capture_bytes)),
        };
        let (accepted_at, session_id) = (live.accepted_at.clone(), live.session_id.clone());
        let phase = Phase::Storing(vec![reply]);
        self.entries.insert(id.clone(), Entry { execution: Some(execution), phase, live, stop, _permit: permit });
        let (parts, mailbox) = (self.parts.clone(), self.mailbox.clone());
        tokio::task::spawn_blocking(move || {
            let failure = parts.outbox.accept(&id, &session_id, &accepted_at).err().map(|error| error.to_string());
            let _ = mailbox.blocking_send(Message::Stored { id, failure });
        });
    }

    fn stored(&mut self, id: ExecutionId, failure: Option<String>) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let Phase::Storing(replies) = std::mem::replace(&mut entry.phase, Phase::Waiting) else { return };
        let answer = match &failure {
            None => Submitted::Accepted,
            Some(why) => Submitted::NotStored(why.clone()),
        };
        for reply in replies {
            let _ = reply.send(answer.clone());
        }
        if let Some(why) = failure {
            tracing::error!(execution_id = %id, why, "an execution could not be stored and is refused");
            self.entries.remove(&id);
        } else if self.is_draining {
            self.crash(&id);
        } else {
            self.waiting.push_back(id);
        }
    }

    fn start_waiting(&mut self) {
        while self.running < self.parts.concurrency {
            let Some(id) = self.waiting.pop_front() else { return };
            self.start(&id);
        }
    }

    fn start(&mut self, id: &ExecutionId) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let Some(execution) = entry.execution.take() else { return };
        entry.phase = Phase::Running(self.parts.delivery.as_ref().map(|delivery| delivery.heartbeat(id)));
        entry.live.state = State::Running;
        entry.live.started_at = Some(now());
        self.running += 1;
        let (parts, mailbox) = (self.parts.clone(), self.mailbox.clone());
        let (live, stop) = (entry.live.clone(), entry.stop.clone());
        let work = move || {
            let id = execution.id.clone();
            let begin = Instant::now();
            let mut result = parts.runner.run(&execution, &live.accepted_at, &live.output, &stop, &mut |_| {});
            tracing::info!(
                execution_id = %id,
                session_id = execution.session_id,
                state = ?result.state,
                reason = result.reason,
                milliseconds = begin.elapsed().as_millis() as u64,
                "execution ended"
            );
            keep(&parts, &id, &mut result);
            let _ = mailbox.blocking_send(Message::Ended { id });
        };
        let thread = std::thread::Builder::new().name("sandbox".to_owned());
        if let Err(error) = thread.spawn(work) {
            tracing::error!(execution_id = %id, %error, "no thread for an execution");
            self.running -= 1;
            self.crash(id);
        }
    }

    fn ended(&mut self, id: &ExecutionId) {
        let Some(entry) = self.entries.remove(id) else { return };
        let heartbeat = match entry.phase {
            Phase::Running(heartbeat) => {
                self.running -= 1;
                heartbeat
            }
            _ => None,
        };
        if let Some(delivery) = &self.parts.delivery {
            delivery.submit(id.clone(), heartbeat);
        }
    }

    /// Ends an accepted execution that has not started.
    fn crash(&mut self, id: &ExecutionId) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let reason = "the agent was stopped before the program started".to_owned();
        let live = &entry.live;
        let (session, accepted_at) = (live.session_id.clone(), live.accepted_at.clone());
        self.conclude(id.clone(), session, State::Crashed, reason, accepted_at);
    }

    fn refuse(&mut self, id: ExecutionId, session_id: String, reason: String) {
        // Somebody else's execution of that name stays what it is; and without a control plane nobody waits.
        if self.parts.delivery.is_none() || self.entries.contains_key(&id) || self.parts.outbox.is_known(&id) {
            return;
        }
        self.conclude(id, session_id, State::Failed, reason, now());
    }

    /// Stores the end of an execution that never ran; the message that follows reports it.
    fn conclude(&self, id: ExecutionId, session_id: String, state: State, reason: String, accepted_at: String) {
        let (parts, mailbox) = (self.parts.clone(), self.mailbox.clone());
        let has_entry = self.entries.contains_key(&id);
        tokio::task::spawn_blocking(move || {
            let mut result = ExecutionResult::without_run(id.as_str(), &session_id, state, Some(reason), accepted_at);
            keep(&parts, &id, &mut result);
            if has_entry {
                let _ = mailbox.blocking_send(Message::Ended { id });
            } else if let Some(delivery) = &parts.delivery {
                delivery.submit(id, None);
            }
        });
    }

    fn drain(&mut self, reply: oneshot::Sender<()>) {
        self.is_draining = true;
        self.draining = Some(reply);
        self.parts.runner.is_draining.store(true, Ordering::SeqCst);
        for id in std::mem::take(&mut self.waiting) {
            self.crash(&id);
        }
        for entry in self.entries.values() {
            entry.stop.stop();
        }
    }
}

/// Puts a final record on disk, with its callback where there is a control plane. A full disk gets a record without the
/// long parts; if not even that can be stored, the start after this one reports the execution as crashed.
fn keep(parts: &Parts, id: &ExecutionId, result: &mut ExecutionResult) {
    result.finished_at = Some(now());
    let is_long = result.return_value.as_ref().is_some_and(|value| value.get().len() > parts.callback_text_bytes);
    let kept = if is_long && parts.delivery.is_some() { parts.runner.keep_return_value(result) } else { None };
    let callback = parts.delivery.as_ref().map(|_| result_body(result, kept.as_deref(), parts.callback_text_bytes));
    let Err(error) = parts.outbox.finish(id, callback.as_deref(), result) else { return };
    tracing::error!(execution_id = %id, %error, "a result could not be stored; trying without its long parts");
    (result.stdout, result.stderr) = (String::new(), String::new());
    (result.stdout_base64, result.stderr_base64, result.return_value) = (None, None, None);
    (result.stdout_truncated, result.stderr_truncated) = (true, true);
    if let Err(error) = parts.outbox.finish(id, callback.as_deref(), result) {
        tracing::error!(execution_id = %id, %error, "a result could not be stored");
    }
}

/// Gives executions that an earlier agent began their end: crashed. Before anything is admitted.
///
/// # Errors
/// When a record can't be stored.
pub fn conclude_unfinished(
    outbox: &Outbox,
    unfinished: Vec<Unfinished>,
    callback_text_bytes: Option<usize>,
) -> std::io::Result<()> {
    for Unfinished { id, session_id, accepted_at } in unfinished {
        tracing::warn!(execution_id = %id, "accepted by an agent that is gone; reported as crashed");
        let reason = "the agent ended unexpectedly while this execution was queued or running".to_owned();
        let result = ExecutionResult::without_run(id.as_str(), &session_id, State::Crashed, Some(reason), accepted_at);
        let callback = callback_text_bytes.map(|bytes| result_body(&result, None, bytes));
        outbox.finish(&id, callback.as_deref(), &result)?;
    }
    Ok(())
}
