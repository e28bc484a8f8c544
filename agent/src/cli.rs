//! The commands.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use isolation::{Event, Stop, probe};
use nix::sys::signal::{SigSet, Signal};
use serde_json::value::RawValue;

use crate::config::{self, Config, KEPT_VARIABLES, LogFormat};
use crate::execution::{Execution, ExecutionId, ExecutionResult, Language, Mode, State, now};
use crate::http::wire::variable_problem;
use crate::output::Output;
use crate::{app, telemetry};

/// Exit codes of our own, beside those of the program that `run` runs.
mod exit {
    /// The deadline passed (as timeout(1) has it).
    pub const TIMEOUT: u8 = 124;
    /// The sandbox could not be set up (as docker run has it).
    pub const SANDBOX: u8 = 125;
    /// Stopped from outside, or killed for its memory: 128 + SIGKILL.
    pub const KILLED: u8 = 137;
    /// Bad arguments or settings.
    pub const USAGE: u8 = 2;
    /// Anything else that went wrong here.
    pub const FAILURE: u8 = 1;
}

/// Runs untrusted code in single-use sandboxes.
#[derive(Debug, Parser)]
#[command(
    name = "sandbox-agent",
    version,
    about,
    after_help = "Settings are environment variables; `sandbox-agent config` \
prints them all with their values."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Take executions over HTTP and report their results
    Serve,
    /// Run one file in a sandbox, here and now
    Run(RunArguments),
    /// Tell which isolation layers work on this machine, and how to mend the others
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the exact bubblewrap command, the limits and the seccomp rules
    Policy,
    /// Print every setting with its value and origin; secrets are masked
    Config,
}

#[derive(Debug, Args)]
struct RunArguments {
    /// The program; `-` reads it from stdin. Without a function `handler` it runs as a script
    file: PathBuf,
    /// JSON object that the handler gets
    #[arg(long, default_value = "{}")]
    event: String,
    /// Folder that appears as /workspace [default: a fresh temporary one]
    #[arg(long, value_name = "DIR")]
    workspace: Option<PathBuf>,
    /// Seconds until the program is killed
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0)]
    timeout: f64,
    /// Variable for the program; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// python or shell [default: by the file's name, else python]
    #[arg(long)]
    language: Option<String>,
    /// Print the whole result as JSON and nothing else
    #[arg(long)]
    json: bool,
}

/// Parses the arguments and does what they say.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Command::Serve => serve(),
        Command::Run(arguments) => run(&arguments),
        Command::Doctor { json } => doctor(json),
        Command::Policy => policy(),
        Command::Config => print_config(),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("sandbox-agent: {error:#}");
            ExitCode::from(error.downcast_ref::<Failure>().map_or(exit::FAILURE, |failure| failure.code))
        }
    }
}

/// An error that brings its exit code.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
struct Failure {
    code: u8,
    text: String,
}

fn usage(text: impl Into<String>) -> anyhow::Error {
    Failure { code: exit::USAGE, text: text.into() }.into()
}

/// Reads the settings, then hides them: from here on this process's environment and memory are nobody else's to read.
fn settle(default_format: Option<LogFormat>, default_level: Option<&str>) -> Result<Config> {
    let variables = config::environment();
    let config = Config::read(&variables).map_err(|errors| {
        let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
        usage(lines.join("\n"))
    })?;
    isolation::wipe_environment(KEPT_VARIABLES).context("the environment could not be wiped")?;
    nix::sys::prctl::set_dumpable(false).context("this process could not be made undumpable")?;
    let level = default_level.filter(|_| !variables.contains_key("LOG_LEVEL")).unwrap_or(&config.log_level);
    telemetry::start(level, config.log_format.or(default_format));
    Ok(config)
}

fn serve() -> Result<u8> {
    let config = settle(None, None)?;
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 4)))
        .enable_all()
        .build()?;
    let code = runtime.block_on(app::serve(config));
    // Blocking work may still wait for a file system that hangs; nothing of it is needed any more.
    runtime.shutdown_background();
    code
}

/// Each running sandbox costs about a dozen descriptors, each connection one.
fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 16), hard);
    }
}

fn run(arguments: &RunArguments) -> Result<u8> {
    let execution = read_execution(arguments)?;
    let config = settle(Some(LogFormat::Text), Some("warn"))?;
    let temporary;
    let workspace = match &arguments.workspace {
        Some(folder) => std::path::absolute(folder)?,
        None => {
            temporary = tempfile::Builder::new().prefix("sandbox-workspace-").tempdir()?;
            temporary.path().to_owned()
        }
    };
    let runner = app::runner(&config, &workspace)?;
    let stop = stop_on_signal()?;
    let output = Output::new(config.capture_bytes);
    let mut terminal = Terminal { is_live: !arguments.json, at_line_start: true };
    let mut result = runner.run(&execution, &now(), &output, &stop, &mut |event| terminal.show(&event));
    result.finished_at = Some(now());
    if arguments.json {
        println!("{}", serde_json::to_string(&result)?);
    } else {
        terminal.conclude(&result);
    }
    Ok(exit_code(&result))
}

fn exit_code(result: &ExecutionResult) -> u8 {
    match (result.state, result.exit_code) {
        (State::TimedOut, _) => exit::TIMEOUT,
        (State::Crashed, _) => exit::SANDBOX,
        (State::Succeeded, _) => 0,
        // The protocol was violated by a program that then ended with 0.
        (_, Some(0)) => exit::FAILURE,
        (_, Some(code)) => u8::try_from(code).unwrap_or(exit::FAILURE),
        (_, None) => exit::KILLED,
    }
}

/// Output as it comes.
struct Terminal {
    is_live: bool,
    at_line_start: bool,
}

impl Terminal {
    fn show(&mut self, event: &Event) {
        if !self.is_live {
            return;
        }
        // A reader who has gone does not stop the program.
        match event {
            Event::Stdout(bytes) => {
                let mut stdout = std::io::stdout().lock();
                let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
                self.at_line_start = bytes.ends_with(b"\n");
            }
            Event::Stderr(bytes) => {
                let _ = std::io::stderr().lock().write_all(bytes);
            }
            Event::Started | Event::Result(_) => {}
        }
    }

    fn conclude(&self, result: &ExecutionResult) {
        let has_explained_itself = result.diagnostic.is_some()
            || result
                .reason
                .as_deref()
                .is_none_or(|reason| result.state == State::Failed && reason.starts_with("exited with code"));
        if let (Some(reason), false) = (&result.reason, has_explained_itself) {
            eprintln!("sandbox-agent: {reason}");
        }
        if let Some(value) = &result.return_value {
            let line_break = if self.at_line_start { "" } else { "\n" };
            // The bootstrap writes no line breaks between tokens, but a hostile program may.
            let one_line = value.get().replace(['\n', '\r'], " ");
            let _ = writeln!(std::io::stdout(), "{line_break}{one_line}");
        }
    }
}

/// Ctrl-C and SIGTERM end the sandbox, not this process, which then reports.
fn stop_on_signal() -> Result<Stop> {
    let stop = Stop::new()?;
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block()?;
    let stopper = stop.clone();
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        while signals.wait().is_ok() {
            stopper.stop();
        }
    })?;
    Ok(stop)
}

fn read_execution(arguments: &RunArguments) -> Result<Execution> {
    let code = if arguments.file == Path::new("-") {
        let mut code = String::new();
        std::io::stdin().read_to_string(&mut code).context("the program can't be read from stdin")?;
        code
    } else {
        std::fs::read_to_string(&arguments.file).with_context(|| format!("can't read {}", arguments.file.display()))?
    };
    let event: Box<RawValue> =
        serde_json::from_str(&arguments.event).map_err(|error| usage(format!("--event is not JSON: {error}")))?;
    if !event.get().starts_with('{') {
        return Err(usage("--event is not a JSON object"));
    }
    let mut environment = BTreeMap::new();
    for variable in &arguments.env {
        let Some((name, value)) = variable.split_once('=') else {
            return Err(usage(format!("--env {variable:?} is not NAME=VALUE")));
        };
        if let Some(problem) = variable_problem(name, value) {
            return Err(usage(format!("--env: {problem}")));
        }
        environment.insert(name.to_owned(), value.to_owned());
    }
    let by_name = match arguments.file.extension().and_then(|extension| extension.to_str()) {
        Some("sh" | "bash") => "shell",
        _ => "python",
    };
    let language = arguments.language.as_deref().unwrap_or(by_name);
    let Some(language) = Language::parse(language) else {
        return Err(usage(format!("--language {language:?} is not python or shell")));
    };
    if !(0.001..=86_400.0).contains(&arguments.timeout) {
        return Err(usage("--timeout is not from 0.001 to 86400 seconds"));
    }
    let Some(id) = ExecutionId::parse(&format!("run_{}", std::process::id())) else { bail!("no id") };
    Ok(Execution {
        id,
        session_id: "local".to_owned(),
        language,
        mode: Mode::Auto,
        code,
        event: event.get().to_owned(),
        timeout: Duration::from_secs_f64(arguments.timeout),
        environment,
    })
}

fn doctor(json: bool) -> Result<u8> {
    let config = settle(Some(LogFormat::Text), Some("error"))?;
    let workspace = tempfile::Builder::new().prefix("sandbox-workspace-").tempdir()?;
    let runner = app::runner(&config, workspace.path())?;
    let mut findings = probe::examine(&runner.launcher, &runner.layout, runner.fallbacks);
    findings.push(match &runner.interpreters.python {
        Ok(python) => probe::Finding {
            layer: "python",
            works: true,
            detail: python.executable.display().to_string(),
            remedy: None,
        },
        Err(why) => probe::Finding {
            layer: "python",
            works: false,
            detail: why.clone(),
            remedy: Some("install python3, or set AGENT_PYTHON".to_owned()),
        },
    });
    let all_work = findings.iter().all(|finding| finding.works);
    if json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        let colour = std::io::stdout().is_terminal();
        for finding in &findings {
            let word = match (finding.works, colour) {
                (true, true) => "\x1b[32mok     \x1b[0m",
                (false, true) => "\x1b[31mmissing\x1b[0m",
                (true, false) => "ok     ",
                (false, false) => "missing",
            };
            println!("{word}  {}: {}", finding.layer, finding.detail);
            if let Some(remedy) = &finding.remedy {
                println!("         remedy: {remedy}");
            }
        }
        println!("{}", if all_work { "Code can run here." } else { "No code will run here until this is mended." });
    }
    Ok(if all_work { 0 } else { exit::FAILURE })
}

fn policy() -> Result<u8> {
    let config = settle(Some(LogFormat::Text), Some("error"))?;
    let workspace = tempfile::Builder::new().prefix("sandbox-workspace-").tempdir()?;
    let runner = app::runner(&config, workspace.path())?;
    let launcher = runner.launcher.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?;
    let example = Execution {
        id: ExecutionId::parse("example").context("no id")?,
        session_id: "local".to_owned(),
        language: Language::Python,
        mode: Mode::Handler,
        code: String::new(),
        event: "{}".to_owned(),
        timeout: Duration::from_secs(300),
        environment: BTreeMap::new(),
    };
    let (policy, prepared) = runner.plan(&example).map_err(anyhow::Error::msg)?;
    println!("# bubblewrap, started with an empty environment; the options travel on a descriptor");
    println!("{}\n", launcher.describe(&policy, &prepared.program)?);
    let (uid, gid) = launcher.outside_user();
    println!("# outside: uid {uid}, gid {gid}, no capabilities, no_new_privs, oom_score_adj 900\n");
    println!("# limits");
    println!("{}\n", serde_json::to_string_pretty(&policy.limits)?);
    let filters = launcher.filters();
    println!("# seccomp profile {:?}, sha256 {}", filters.name, filters.sha256);
    for program in &filters.programs {
        println!("#   {}: {} instructions", program.name, program.bytes.len() / 8);
    }
    println!("{}", isolation::seccomp::embedded("execute").unwrap_or_default());
    Ok(0)
}

fn print_config() -> Result<u8> {
    let variables = config::environment();
    print!("{}", config::describe(&variables));
    match Config::read(&variables) {
        Ok(_) => Ok(0),
        Err(errors) => {
            let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
            Err(usage(lines.join("\n")))
        }
    }
}
