//! How much memory a process tree has resident, without a cgroup.
//!
//! Two readings, from cheap to exact: the sum of `statm` counts shared pages once per process and so may only ever say
//! "surely below"; the sum of `Pss` counts them once in all, and is taken only when the first one is over the limit.

use std::fs;

/// More processes than this are not walked; `RLIMIT_NPROC` keeps a sandbox far below.
const MAX_PROCESSES: usize = 4096;
/// Size of a page on both architectures as the kernels we run on are built.
const PAGE_BYTES: u64 = 4096;

/// The processes of the tree below and with `root`, as seen from here.
pub(crate) fn tree(root: i32) -> Vec<i32> {
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() && found.len() < MAX_PROCESSES {
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
pub(crate) fn resident(pids: &[i32]) -> u64 {
    pids.iter().filter_map(|pid| resident_pages(*pid)).sum::<u64>() * PAGE_BYTES
}

fn resident_pages(pid: i32) -> Option<u64> {
    fs::read_to_string(format!("/proc/{pid}/statm")).ok()?.split_whitespace().nth(1)?.parse().ok()
}

/// Resident bytes with shared pages divided among their users. A process whose figure can't be read counts as resident.
pub(crate) fn proportional(pids: &[i32]) -> u64 {
    pids.iter()
        .map(|pid| proportional_one(*pid).or_else(|| Some(resident_pages(*pid)? * PAGE_BYTES)).unwrap_or(0))
        .sum()
}

fn proportional_one(pid: i32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find(|line| line.starts_with("Pss:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
