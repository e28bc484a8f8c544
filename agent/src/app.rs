//! Composition: builds the rooms, starts them, announces the agent, and takes it down in order. The only list of long-lived
//! tasks:
//!
//! | task | ends |
//! | --- | --- |
//! | queue owner | with the process |
//! | one thread per running sandbox | with its execution |
//! | HTTP server | with the process |
//! | health | with the process |
//! | ready announcement | when the control plane knows us, or after a minute |
//! | one delivery per pending result, one heartbeat per running execution | with it |

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use isolation::profile::Layout;
use isolation::sandbox::LauncherOptions;
use isolation::{Launcher, probe};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::config::Config;
use crate::control_plane::ControlPlane;
use crate::delivery::Delivery;
use crate::execution::now;
use crate::http::{routes, server};
use crate::language::{Interpreter, Interpreters};
use crate::outbox::Outbox;
use crate::queue::{self, Queue};
use crate::runner::{Runner, chain, hand_over_workspace, sandbox_user};
use crate::workspace::Workspace;

/// How long the control plane is told that we are ready.
const READY_FOR: Duration = Duration::from_secs(60);
const READY_FIRST_PAUSE: Duration = Duration::from_millis(200);
const READY_LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The parts of a shutdown; together below the 10 s that Docker gives.
const DRAIN_FOR: Duration = Duration::from_millis(2500);
const FLUSH_FOR: Duration = Duration::from_secs(5);
const FAREWELL_FOR: Duration = Duration::from_millis(1500);
/// Between two looks at the workspace.
const HEALTH_EVERY: Duration = Duration::from_secs(5);

/// Builds what executions need. `workspace` is made if it doesn't exist, and handed to the sandbox's user.
///
/// # Errors
/// When the workspace can't be used. A host on which nothing can be isolated is no error here: it is told by `launcher`.
pub fn runner(config: &Config, workspace: &Path) -> Result<Runner> {
    let user = sandbox_user(workspace, config.sandbox_user);
    let launcher = Launcher::new(&LauncherOptions { bwrap: config.bwrap.clone(), user: Some(user) });
    let outside = launcher.as_ref().map_or(user, Launcher::outside_user);
    std::fs::create_dir_all(workspace)
        .with_context(|| format!("the workspace {} can't be made", workspace.display()))?;
    match hand_over_workspace(workspace, outside) {
        Ok(false) => {}
        Ok(true) => {
            tracing::info!(workspace = %workspace.display(), uid = outside.0, "the workspace now belongs to the sandbox's user");
        }
        // Such a host has no second user, which the probes tell with the remedy.
        Err(error) => tracing::error!(workspace = %workspace.display(), %error, "the workspace can't be handed over"),
    }
    Ok(Runner {
        launcher,
        layout: Layout::discover(),
        fallbacks: config.fallbacks,
        interpreters: Interpreters {
            python: Interpreter::python(config.python.as_deref(), &config.path).map_err(|error| chain(&error)),
            shell: config.shell.clone(),
            packages: Some(config.packages.clone()).filter(|path| path.is_dir()),
        },
        workspace: Workspace::open(workspace)?,
        limits: config.limits.clone(),
        is_draining: AtomicBool::new(false),
    })
}

/// Serves until a signal comes; returns the exit code.
///
/// # Errors
/// Whatever keeps the agent from starting.
pub async fn serve(config: Config) -> Result<u8> {
    let started = Instant::now();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    config.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));

    let (outbox, unfinished) = Outbox::open(&config.state_dir, config.keep_results)
        .with_context(|| format!("the state folder {} can't be used", config.state_dir.display()))?;
    let outbox = Arc::new(outbox);
    let runner = Arc::new(runner(&config, &config.workspace)?);
    let isolation = isolation_health(&runner);
    let (health_sender, health) = watch::channel(isolation.clone());

    let control_plane = match &config.control_plane_url {
        Some(url) => Some(ControlPlane::new(url, config.internal_api_token.as_deref())?),
        None => None,
    };
    let text_bytes = control_plane.as_ref().map(|_| config.callback_text_bytes);
    queue::conclude_unfinished(&outbox, unfinished, text_bytes)?;
    let delivery = control_plane.clone().map(|control_plane| Delivery::new(control_plane, outbox.clone()));
    if let Some(delivery) = &delivery {
        outbox.pending()?.into_iter().for_each(|id| delivery.submit(id, None));
    }
    let queue = Queue::start(queue::Parts {
        runner: runner.clone(),
        outbox: outbox.clone(),
        delivery: delivery.clone(),
        concurrency: config.concurrency,
        capacity: config.queue,
        capture_bytes: config.capture_bytes,
        callback_text_bytes: config.callback_text_bytes,
    });
    tokio::spawn(watch_health(runner, isolation, health_sender));

    let listener =
        TcpListener::bind(config.listen).await.with_context(|| format!("can't listen on {}", config.listen))?;
    let address = listener.local_addr()?;
    let token = config.api_token.as_deref().map(Arc::from);
    let api = routes::Api { queue: queue.clone(), outbox, health, token, started };
    tokio::spawn(server::serve(listener, routes::router(api)));
    if let Some(path) = &config.address_file {
        publish(path, &address.to_string()).with_context(|| format!("can't write {}", path.display()))?;
    }
    tracing::info!(%address, milliseconds = started.elapsed().as_millis() as u64, "listening");

    let container = Container { config: &config, port: address.port() };
    if let Some(control_plane) = control_plane.clone() {
        tokio::spawn(announce_ready(control_plane, container.body("ready", json!({"ready_at": now()}))));
    }
    let (code, reason) = tokio::select! {
        _ = terminate.recv() => (143, "sigterm"),
        _ = interrupt.recv() => (130, "normal"),
    };
    tracing::info!(reason, "stopping");
    let orderly = async {
        if tokio::time::timeout(DRAIN_FOR, queue.drain()).await.is_err() {
            tracing::error!("executions did not end in time; the next start reports them as crashed");
        }
        if let Some(delivery) = &delivery {
            let left = delivery.flush(FLUSH_FOR).await;
            if left > 0 {
                tracing::warn!(left, "results are kept for the next start");
            }
        }
        if let Some(control_plane) = &control_plane {
            let body = container.body("exited", json!({"exit_code": code, "exit_reason": reason, "exited_at": now()}));
            if let Err(error) = control_plane.container("exited", &body, FAREWELL_FOR).await {
                tracing::warn!(%error, "the end of this agent could not be reported");
            }
        }
    };
    tokio::select! {
        () = orderly => {}
        () = second(&mut terminate, &mut interrupt) => tracing::warn!("second signal: leaving at once"),
    }
    Ok(code)
}

async fn second(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// What the control plane is told about this container.
struct Container<'a> {
    config: &'a Config,
    port: u16,
}

impl Container<'_> {
    fn body(&self, event: &str, more: serde_json::Value) -> serde_json::Value {
        let mut body = json!({
            "event_type": event,
            "container_id": self.config.container_id,
            "pod_name": self.config.pod_name,
            "executor_port": self.port,
        });
        if let (Some(body), Some(more)) = (body.as_object_mut(), more.as_object()) {
            body.extend(more.clone());
        }
        body
    }
}

/// The control plane learns our container's id only about half a second after our start, and forgets calls before that.
async fn announce_ready(control_plane: ControlPlane, body: serde_json::Value) {
    let mut pause = READY_FIRST_PAUSE;
    let begin = Instant::now();
    while begin.elapsed() < READY_FOR {
        match control_plane.container("ready", &body, Duration::from_secs(5)).await {
            Ok(answer) if String::from_utf8_lossy(&answer.body).contains("session updated") => {
                tracing::info!("the control plane knows that this agent is ready");
                return;
            }
            Ok(answer) => tracing::debug!(status = answer.status.as_u16(), "not known to the control plane yet"),
            Err(error) => tracing::debug!(%error, "the control plane can't be reached yet"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(READY_LONGEST_PAUSE);
    }
    tracing::error!("the control plane never acknowledged that this agent is ready");
}

/// Whether every layer holds on this host, by probe.
fn isolation_health(runner: &Runner) -> Result<(), String> {
    let findings = probe::examine(&runner.launcher, &runner.layout, runner.fallbacks);
    for finding in &findings {
        if finding.works {
            tracing::debug!(layer = finding.layer, finding.detail, "layer holds");
        } else {
            tracing::error!(layer = finding.layer, finding.detail, remedy = finding.remedy, "layer is missing");
        }
    }
    let missing = findings.iter().find(|finding| !finding.works);
    let missing = missing.map(|finding| {
        let remedy = finding.remedy.as_deref().unwrap_or_default();
        format!("isolation layer {:?} is missing: {}; remedy: {remedy}", finding.layer, finding.detail)
    });
    missing.map_or(Ok(()), Err)
}

async fn watch_health(runner: Arc<Runner>, isolation: Result<(), String>, health: watch::Sender<Result<(), String>>) {
    let mut tick = tokio::time::interval(HEALTH_EVERY);
    loop {
        tick.tick().await;
        let path = runner.workspace.path().to_owned();
        // A workspace that hangs (a remote file system) must not hang anything else: this task alone waits.
        let look = tokio::task::spawn_blocking(move || {
            let writable = nix::unistd::access(&path, nix::unistd::AccessFlags::W_OK);
            writable.map_err(|errno| format!("the workspace {} is not writable: {}", path.display(), errno.desc()))
        });
        let workspace = look.await.unwrap_or_else(|error| Err(error.to_string()));
        let now = isolation.clone().and(workspace);
        health.send_if_modified(|before| {
            let changed = *before != now;
            if changed {
                *before = now;
            }
            changed
        });
    }
}

/// Writes a small file that appears whole.
fn publish(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    file.persist(path)?;
    Ok(())
}
