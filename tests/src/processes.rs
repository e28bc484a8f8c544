//! What `/proc` tells about processes, looked at from outside the sandbox.
//!
//! A hostile program carries a marker: it writes it to `/proc/self/comm`, which its forks inherit, or passes it as
//! an argument to what it executes. Whoever still carries it after the end has outlived the sandbox.

use std::fs;

/// One process as `/proc` shows it.
#[derive(Debug, Clone)]
pub struct Process {
    /// Process id in our namespace.
    pub pid: u32,
    /// Process id of its parent in our namespace.
    pub parent: u32,
    /// Name, at most 15 bytes.
    pub name: String,
    /// Arguments joined by blanks.
    pub arguments: String,
    /// `R`, `S`, `Z`, ...
    pub state: char,
}

/// All processes at this moment; those that vanish while they are read are left out.
pub fn all() -> Vec<Process> {
    let entries = fs::read_dir("/proc").expect("read /proc");
    entries.flatten().filter_map(|entry| read(entry.file_name().to_str()?.parse().ok()?)).collect()
}

/// Those that carry `marker` as their name or among their arguments, the dead but unreaped included.
pub fn with_marker(marker: &str) -> Vec<Process> {
    all().into_iter().filter(|process| process.name == marker || process.arguments.contains(marker)).collect()
}

/// The direct children of `pid`.
pub fn children(pid: u32) -> Vec<Process> {
    all().into_iter().filter(|process| process.parent == pid).collect()
}

/// A field of `/proc/PID/status` that is told in kB, in bytes (`VmRSS`, `VmHWM`).
pub fn memory(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("read status of the process");
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kilobytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or_else(|| panic!("no field {field} in the status of process {pid}")) * 1024
}

fn read(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in brackets and may itself hold brackets and blanks.
    let (front, rest) = stat.rsplit_once(')')?;
    let name = front.split_once('(')?.1.to_owned();
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
    Some(Process { pid, parent, name, arguments, state })
}
