//! What a process tree uses, without a cgroup: looked up in `/proc`, process by process.
//!
//! Memory has two readings, from cheap to exact: the sum of `statm` counts shared pages once per process and so may only ever say
//! "surely below"; the sum of `Pss` counts them once in all, and is taken only when the first one is over the limit.
//!
//! Every walk takes an instant at which it gives up: hundreds of busy processes leave this one little time, and a walk must not
//! keep its caller from a deadline.

use std::fs;
use std::time::{Duration, Instant};

/// More processes than this are not walked; `RLIMIT_NPROC` keeps a sandbox far below.
const MAX_PROCESSES: usize = 4096;
/// Size of a page on both architectures as the kernels we run on are built.
const PAGE_BYTES: u64 = 4096;
/// Length of a clock tick in `/proc/PID/stat`: `USER_HZ` is 100 on both architectures.
const TICK: Duration = Duration::from_millis(10);

/// The processes of the tree below and with `root`, as seen from here; as far as it got by `until`.
pub(crate) fn processes(root: i32, until: Instant) -> Vec<i32> {
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() && found.len() < MAX_PROCESSES && Instant::now() < until {
        let pid = found[next];
        next += 1;
        let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for thread in threads.flatten() {
            let Ok(children) = fs::read_to_string(thread.path().join("children")) else { continue };
            found.extend(children.split_whitespace().filter_map(|child| child.parse::<i32>().ok()));
        }
    }
    found
}

/// Resident bytes of all processes added up: an upper bound.
pub(crate) fn resident(pids: &[i32], until: Instant) -> u64 {
    in_time(pids, until).filter_map(resident_one).sum()
}

/// Resident bytes with shared pages divided among their users. A process whose figure can't be read counts as resident.
pub(crate) fn proportional(pids: &[i32], until: Instant) -> u64 {
    in_time(pids, until).filter_map(|pid| proportional_one(pid).or_else(|| resident_one(pid))).sum()
}

/// User and system time of all processes, with that of the children they have reaped.
pub(crate) fn cpu(pids: &[i32], until: Instant) -> Duration {
    in_time(pids, until).filter_map(ticks_one).map(|ticks| TICK * ticks).sum()
}

fn in_time(pids: &[i32], until: Instant) -> impl Iterator<Item = i32> {
    pids.iter().copied().take_while(move |_| Instant::now() < until)
}

fn resident_one(pid: i32) -> Option<u64> {
    let pages: u64 = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * PAGE_BYTES)
}

fn proportional_one(pid: i32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find(|line| line.starts_with("Pss:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Fields 14 to 17 of `proc_pid_stat(5)`: utime, stime, cutime, cstime. The name before them may hold anything.
fn ticks_one(pid: i32) -> Option<u32> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let after_name = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(&stat[after_name + 1..]).ok()?;
    rest.split_whitespace().skip(11).take(4).map(|field| field.parse::<u32>().ok()).sum()
}
