//! Logs. Lines carry ids, never code, output or tokens.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Starts logging to stderr: JSON unless a person is watching, or as chosen.
pub fn start(level: &str, format: Option<LogFormat>) {
    let on_terminal = std::io::stderr().is_terminal();
    let filter = EnvFilter::new(format!("{level},hyper=warn,hyper_util=warn,rustls=warn"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // An error means that a subscriber exists already; that one then serves as well.
    let _ = match format.unwrap_or(if on_terminal { LogFormat::Text } else { LogFormat::Json }) {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).try_init(),
        LogFormat::Text => builder.with_ansi(on_terminal).try_init(),
    };
}
