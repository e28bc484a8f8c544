//! Bringing results from the outbox to the control plane: at least once, until they are accepted or refused for good. And
//! heartbeats, which are best effort and end before the result goes out.
//!
//! Each pending result has a task that sleeps between attempts; a semaphore bounds how many calls are under way, so that one result
//! which keeps failing never holds up another.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::StatusCode;
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use tokio::task::JoinHandle;

use crate::control_plane::{ControlPlane, Verdict, reduced, verdict};
use crate::execution::ExecutionId;
use crate::outbox::Outbox;

/// Calls under way at a time.
const CALLS: usize = 32;
/// First and longest pause between two attempts.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// After this many answers of 500 for the same body, each second attempt is made with a reduced one.
const PATIENCE_WITH_500: u32 = 5;
/// Between two heartbeats.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);
/// How long one heartbeat may take.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a result waits for a heartbeat that is under way.
const HEARTBEAT_GRACE: Duration = Duration::from_millis(500);

/// Sends what is pending. Cheap to clone.
#[derive(Clone)]
pub struct Delivery {
    shared: Arc<Shared>,
}

struct Shared {
    control_plane: ControlPlane,
    outbox: Arc<Outbox>,
    calls: Semaphore,
    /// Ends all pauses, when the agent is about to leave.
    hurry: Notify,
    unsent: watch::Sender<usize>,
}

/// The heartbeats of one execution.
#[derive(Debug)]
pub struct Heartbeat {
    end: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Heartbeat {
    /// Ends them: none begins after this call, and one that is under way gets a moment to finish.
    async fn stop(mut self) {
        let _ = self.end.send(());
        if tokio::time::timeout(HEARTBEAT_GRACE, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}

impl Delivery {
    /// Nothing is sent yet.
    #[must_use]
    pub fn new(control_plane: ControlPlane, outbox: Arc<Outbox>) -> Self {
        let calls = Semaphore::new(CALLS);
        let shared = Shared { control_plane, outbox, calls, hurry: Notify::new(), unsent: watch::Sender::new(0) };
        Self { shared: Arc::new(shared) }
    }

    /// Starts to send one result that is pending in the outbox.
    pub fn submit(&self, id: ExecutionId, heartbeat: Option<Heartbeat>) {
        self.shared.unsent.send_modify(|count| *count += 1);
        let shared = self.shared.clone();
        tokio::spawn(async move {
            if let Some(heartbeat) = heartbeat {
                heartbeat.stop().await;
            }
            shared.deliver(&id).await;
            shared.unsent.send_modify(|count| *count -= 1);
        });
    }

    /// Starts heartbeats: now, and then every five seconds.
    #[must_use]
    pub fn heartbeat(&self, id: &ExecutionId) -> Heartbeat {
        let (end, mut ended) = oneshot::channel();
        let (control_plane, id) = (self.shared.control_plane.clone(), id.clone());
        let task = tokio::spawn(async move {
            let mut beat = tokio::time::interval(HEARTBEAT_EVERY);
            loop {
                tokio::select! {
                    biased;
                    _ = &mut ended => return,
                    _ = beat.tick() => {}
                }
                if let Err(error) = control_plane.heartbeat(id.as_str(), HEARTBEAT_TIMEOUT).await {
                    tracing::debug!(execution_id = %id, %error, "a heartbeat was lost");
                }
            }
        });
        Heartbeat { end, task }
    }

    /// Ends all pauses and waits until everything is sent, or for so long; returns how many results are left.
    pub async fn flush(&self, within: Duration) -> usize {
        let mut unsent = self.shared.unsent.subscribe();
        let all_sent = async {
            loop {
                self.shared.hurry.notify_waiters();
                if *unsent.borrow_and_update() == 0 {
                    return;
                }
                let _ = tokio::time::timeout(Duration::from_millis(250), unsent.changed()).await;
            }
        };
        let _ = tokio::time::timeout(within, all_sent).await;
        *self.shared.unsent.borrow()
    }
}

impl Shared {
    async fn deliver(&self, id: &ExecutionId) {
        let mut pause = FIRST_PAUSE;
        let mut refused_with_500 = 0;
        let mut attempt = 0_u32;
        loop {
            attempt += 1;
            let use_reduced =
                refused_with_500 >= PATIENCE_WITH_500 && (refused_with_500 - PATIENCE_WITH_500).is_multiple_of(2);
            match self.attempt(id, use_reduced).await {
                Attempt::Done => return,
                Attempt::Later { is_500, why } => {
                    refused_with_500 = if is_500 { refused_with_500 + 1 } else { 0 };
                    tracing::warn!(execution_id = %id, attempt, why, "the result was not accepted; it is kept and sent again");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(with_jitter(pause)) => {}
                () = self.hurry.notified() => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn attempt(&self, id: &ExecutionId, use_reduced: bool) -> Attempt {
        // The semaphore is never closed.
        let _permit = self.calls.acquire().await;
        let body = match self.outbox.callback(id) {
            Ok(body) => body,
            Err(error) => return Attempt::Later { is_500: false, why: format!("it can't be read: {error}") },
        };
        let body = if use_reduced { reduced(&body).unwrap_or(body) } else { body };
        let answer = match self.control_plane.result(id.as_str(), &body).await {
            Ok(answer) => answer,
            Err(error) => return Attempt::Later { is_500: false, why: error.to_string() },
        };
        let said = String::from_utf8_lossy(&answer.body[..answer.body.len().min(300)]).into_owned();
        let settled = match verdict(answer.status) {
            Verdict::Accepted => {
                tracing::info!(execution_id = %id, status = answer.status.as_u16(), "result delivered");
                self.outbox.delivered(id)
            }
            Verdict::Refused => {
                tracing::error!(execution_id = %id, status = answer.status.as_u16(), said, "result refused; set aside");
                self.outbox.set_aside(id, &format!("{} {said}", answer.status))
            }
            Verdict::Retry => {
                let is_500 = answer.status == StatusCode::INTERNAL_SERVER_ERROR;
                return Attempt::Later { is_500, why: answer.status.to_string() };
            }
        };
        if let Err(error) = settled {
            tracing::error!(execution_id = %id, %error, "the outbox can't be updated; the result may be sent again");
        }
        Attempt::Done
    }
}

enum Attempt {
    Done,
    Later { is_500: bool, why: String },
}

/// Between three and five quarters of the pause, so that agents which failed together don't come back together.
fn with_jitter(pause: Duration) -> Duration {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.subsec_nanos());
    // The low digits of the clock are as good as random for this purpose.
    let share = f64::from(nanos / 100 % 1000) / 1000.0;
    pause.mul_f64(0.75 + share / 2.0)
}
