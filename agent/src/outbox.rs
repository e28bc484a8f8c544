//! The durable spool: what was accepted, what must still reach the control plane, and what is kept. No network.
//!
//! # Invariants
//! 1. An id that was ever accepted is known for good: it is in one of the folders or in `forgotten`.
//! 2. A result is on disk, complete, before anybody is told of it; it leaves `pending` only when it was accepted or refused for
//!    good.
//! 3. Every file appears whole: written in `tmp`, synced, renamed.
//!
//! # Format
//! ```text
//! accepted/ID.json    {"session_id", "accepted_at"}: may run, or has run without an end yet
//! pending/ID.json     two lines: the callback's body (or null), the document of GET /v1/executions/ID
//! delivered/ID.json   the same; the oldest leave first, their ids go to `forgotten`
//! dead/ID.json        the same, refused by the control plane; dead/ID.reason says why
//! forgotten           one id a line
//! lock                held while an agent uses the folder
//! ```
//!
//! # Recovery
//! [`Outbox::open`] empties `tmp`, drops accepted entries that have a result, and returns the others: their executions began
//! in an agent that is gone. What is pending is for `delivery` to send.

use std::collections::{HashSet, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::execution::{ExecutionId, ExecutionResult};

/// How long an earlier agent may hold the lock while it dies.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// Most bytes of delivered results kept.
const KEEP_BYTES: u64 = 1 << 30;
/// Longest reason in `dead`.
const MAX_REASON: usize = 4096;

/// An accepted execution without an end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfinished {
    /// Its name.
    pub id: ExecutionId,
    /// Its session.
    pub session_id: String,
    /// When it was accepted.
    pub accepted_at: String,
}

#[derive(Serialize, Deserialize)]
struct Accepted {
    session_id: String,
    accepted_at: String,
}

/// The spool of one state folder.
#[derive(Debug)]
pub struct Outbox {
    folder: PathBuf,
    keep: usize,
    index: Mutex<Index>,
    _lock: Flock<File>,
}

#[derive(Debug, Default)]
struct Index {
    known: HashSet<ExecutionId>,
    /// Oldest first, with sizes.
    delivered: VecDeque<(ExecutionId, u64)>,
    delivered_bytes: u64,
}

const PENDING: &str = "pending";
const DELIVERED: &str = "delivered";
const DEAD: &str = "dead";
const ACCEPTED: &str = "accepted";
const TMP: &str = "tmp";

impl Outbox {
    /// Opens the spool, and takes stock: (spool, executions without an end).
    ///
    /// # Errors
    /// When the folder can't be used, or another agent uses it.
    pub fn open(folder: &Path, keep: usize) -> io::Result<(Self, Vec<Unfinished>)> {
        for name in [PENDING, DELIVERED, DEAD, ACCEPTED, TMP] {
            fs::create_dir_all(folder.join(name))?;
        }
        let lock = lock(&folder.join("lock"))?;
        for leftover in fs::read_dir(folder.join(TMP))?.flatten() {
            let _ = fs::remove_file(leftover.path());
        }
        let mut index = Index::default();
        if let Ok(forgotten) = File::open(folder.join("forgotten")) {
            let lines = BufReader::new(forgotten).lines().map_while(Result::ok);
            index.known.extend(lines.filter_map(|line| ExecutionId::parse(&line)));
        }
        let mut delivered = entries(&folder.join(DELIVERED))?;
        delivered.sort_by_key(|entry| entry.modified);
        for entry in delivered {
            index.known.insert(entry.id.clone());
            index.delivered_bytes += entry.size;
            index.delivered.push_back((entry.id, entry.size));
        }
        for name in [PENDING, DEAD] {
            index.known.extend(entries(&folder.join(name))?.into_iter().map(|entry| entry.id));
        }
        let mut unfinished = Vec::new();
        for entry in entries(&folder.join(ACCEPTED))? {
            let path = folder.join(ACCEPTED).join(file_name(&entry.id));
            if !index.known.insert(entry.id.clone()) {
                fs::remove_file(path)?;
                continue;
            }
            let record = serde_json::from_slice(&fs::read(path)?);
            let record = record.unwrap_or_else(|_| Accepted { session_id: String::new(), accepted_at: String::new() });
            let Accepted { session_id, accepted_at } = record;
            unfinished.push(Unfinished { id: entry.id, session_id, accepted_at });
        }
        Ok((Self { folder: folder.to_owned(), keep, index: Mutex::new(index), _lock: lock }, unfinished))
    }

    /// Whether this id was ever accepted here.
    #[must_use]
    pub fn is_known(&self, id: &ExecutionId) -> bool {
        self.lock_index().known.contains(id)
    }

    /// Remembers that an execution may run, before anybody is told that it was accepted.
    ///
    /// # Errors
    /// When it can't be stored; then it must not run.
    pub fn accept(&self, id: &ExecutionId, session_id: &str, accepted_at: &str) -> io::Result<()> {
        let record = Accepted { session_id: session_id.to_owned(), accepted_at: accepted_at.to_owned() };
        self.store(ACCEPTED, id, |file| Ok(serde_json::to_writer(file, &record)?))?;
        self.lock_index().known.insert(id.clone());
        Ok(())
    }

    /// Stores the end of an execution. With a callback it becomes pending, else it is done with.
    ///
    /// # Errors
    /// When it can't be stored.
    pub fn finish(&self, id: &ExecutionId, callback: Option<&RawValue>, document: &ExecutionResult) -> io::Result<()> {
        let folder = if callback.is_some() { PENDING } else { DELIVERED };
        self.store(folder, id, |file| {
            serde_json::to_writer(&mut *file, &callback)?;
            file.write_all(b"\n")?;
            serde_json::to_writer(&mut *file, document)?;
            file.write_all(b"\n")
        })?;
        self.lock_index().known.insert(id.clone());
        match fs::remove_file(self.path(ACCEPTED, id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if callback.is_none() {
            self.retain(id)?;
        }
        Ok(())
    }

    /// All that is still to be sent, oldest first.
    ///
    /// # Errors
    /// When the folder can't be read.
    pub fn pending(&self) -> io::Result<Vec<ExecutionId>> {
        let mut found = entries(&self.folder.join(PENDING))?;
        found.sort_by_key(|entry| entry.modified);
        Ok(found.into_iter().map(|entry| entry.id).collect())
    }

    /// The body to send for a pending result.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn callback(&self, id: &ExecutionId) -> io::Result<Box<RawValue>> {
        let mut line = String::new();
        BufReader::new(File::open(self.path(PENDING, id))?).read_line(&mut line)?;
        Ok(RawValue::from_string(line.trim_end().to_owned())?)
    }

    /// Marks a pending result as accepted by the control plane.
    ///
    /// # Errors
    /// When the file can't be moved; it is sent again later then, which the control plane answers with 200.
    pub fn delivered(&self, id: &ExecutionId) -> io::Result<()> {
        fs::rename(self.path(PENDING, id), self.path(DELIVERED, id))?;
        self.retain(id)
    }

    /// Sets a pending result aside: it will never be accepted.
    ///
    /// # Errors
    /// When the file can't be moved.
    pub fn set_aside(&self, id: &ExecutionId, reason: &str) -> io::Result<()> {
        let reason = &reason[..reason.floor_char_boundary(MAX_REASON)];
        fs::write(self.folder.join(DEAD).join(format!("{id}.reason")), reason)?;
        fs::rename(self.path(PENDING, id), self.path(DEAD, id))
    }

    /// The document of a finished execution: a file that stands at its start, and its length in bytes.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn document(&self, id: &ExecutionId) -> io::Result<Option<(File, u64)>> {
        // A result moves from pending to one of the others, so in this order it is not missed.
        for folder in [PENDING, DELIVERED, DEAD] {
            let mut file = match File::open(self.path(folder, id)) {
                Ok(file) => BufReader::new(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let start = file.skip_until(b'\n')? as u64;
            let mut file = file.into_inner();
            let length = file.metadata()?.len() - start;
            file.seek(io::SeekFrom::Start(start))?;
            return Ok(Some((file, length)));
        }
        Ok(None)
    }

    /// Puts a new result among the delivered, and lets the oldest go.
    fn retain(&self, id: &ExecutionId) -> io::Result<()> {
        let size = fs::metadata(self.path(DELIVERED, id))?.len();
        let mut index = self.lock_index();
        index.delivered.push_back((id.clone(), size));
        index.delivered_bytes += size;
        while index.delivered.len() > self.keep || index.delivered_bytes > KEEP_BYTES {
            let Some((oldest, size)) = index.delivered.pop_front() else { break };
            index.delivered_bytes -= size;
            // First remember the id, then let the result go, or it could run again.
            let mut forgotten = OpenOptions::new().create(true).append(true).open(self.folder.join("forgotten"))?;
            writeln!(forgotten, "{oldest}")?;
            forgotten.sync_data()?;
            fs::remove_file(self.path(DELIVERED, &oldest))?;
        }
        Ok(())
    }

    fn store(
        &self,
        folder: &str,
        id: &ExecutionId,
        write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> io::Result<()> {
        let temporary = self.path(TMP, id);
        let stored = (|| {
            let mut file = BufWriter::with_capacity(64 << 10, File::create(&temporary)?);
            write(&mut file)?;
            file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
            fs::rename(&temporary, self.path(folder, id))?;
            File::open(self.folder.join(folder))?.sync_all()
        })();
        if stored.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        stored
    }

    fn path(&self, folder: &str, id: &ExecutionId) -> PathBuf {
        self.folder.join(folder).join(file_name(id))
    }

    fn lock_index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn file_name(id: &ExecutionId) -> String {
    format!("{id}.json")
}

struct Entry {
    id: ExecutionId,
    modified: SystemTime,
    size: u64,
}

fn entries(folder: &Path) -> io::Result<Vec<Entry>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".json")).and_then(ExecutionId::parse) else {
            continue;
        };
        let metadata = entry.metadata()?;
        found.push(Entry { id, modified: metadata.modified()?, size: metadata.len() });
    }
    Ok(found)
}

fn lock(path: &Path) -> io::Result<Flock<File>> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, errno)) if Instant::now() >= deadline => {
                let text = format!("{} is in use by another agent ({errno})", path.display());
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
            }
            Err((returned, _)) => {
                file = returned;
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::execution::State;
    use std::collections::BTreeMap;

    fn id(number: u32) -> ExecutionId {
        ExecutionId::parse(&format!("exec_{number}")).expect("a plain id")
    }

    fn result(id: &ExecutionId) -> ExecutionResult {
        ExecutionResult::without_run(id.as_str(), "s", State::Crashed, None, "now".to_owned())
    }

    fn body() -> Box<RawValue> {
        RawValue::from_string("{\"status\":\"success\"}".to_owned()).expect("JSON")
    }

    /// Random actions and re-openings on the real spool and on a map; both must agree at each step.
    #[test]
    fn it_behaves_like_a_map_that_survives_restarts() {
        #[derive(Clone, Copy, PartialEq, Debug)]
        enum Place {
            Accepted,
            Pending,
            Delivered,
            Dead,
        }
        let folder = tempfile::tempdir().expect("a folder");
        let mut model: BTreeMap<u32, Place> = BTreeMap::new();
        let mut seed = 12345_u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        let mut outbox = Outbox::open(folder.path(), 1000).expect("open").0;
        for _ in 0..400 {
            let number = random(40) as u32;
            let name = id(number);
            match (random(6), model.get(&number).copied()) {
                (0..2, None) => {
                    outbox.accept(&name, "s", "now").expect("accept");
                    model.insert(number, Place::Accepted);
                }
                (0..3, Some(Place::Accepted)) => {
                    outbox.finish(&name, Some(&body()), &result(&name)).expect("finish");
                    model.insert(number, Place::Pending);
                }
                (3, Some(Place::Pending)) => {
                    outbox.delivered(&name).expect("deliver");
                    model.insert(number, Place::Delivered);
                }
                (4, Some(Place::Pending)) => {
                    outbox.set_aside(&name, "refused").expect("set aside");
                    model.insert(number, Place::Dead);
                }
                (5, _) => {
                    drop(outbox);
                    let (opened, unfinished) = Outbox::open(folder.path(), 1000).expect("open");
                    let mut found: Vec<_> = unfinished.into_iter().map(|entry| entry.id).collect();
                    let mut expected: Vec<_> =
                        model.iter().filter(|(_, place)| **place == Place::Accepted).map(|(n, _)| id(*n)).collect();
                    found.sort();
                    expected.sort();
                    assert_eq!(found, expected);
                    outbox = opened;
                }
                _ => {}
            }
            for number in 0..40 {
                assert_eq!(outbox.is_known(&id(number)), model.contains_key(&number));
                let has_document = outbox.document(&id(number)).expect("document").is_some();
                let expected = model.get(&number).is_some_and(|place| *place != Place::Accepted);
                assert_eq!(has_document, expected);
            }
            let pending = model.values().filter(|place| **place == Place::Pending).count();
            assert_eq!(outbox.pending().expect("pending").len(), pending);
        }
    }

    #[test]
    fn the_oldest_results_leave_but_their_ids_stay_known() {
        let folder = tempfile::tempdir().expect("a folder");
        let (outbox, _) = Outbox::open(folder.path(), 2).expect("open");
        for number in 0..5 {
            outbox.finish(&id(number), None, &result(&id(number))).expect("finish");
        }
        assert!(outbox.document(&id(2)).expect("document").is_none());
        assert!(outbox.document(&id(3)).expect("document").is_some());
        drop(outbox);
        let (outbox, _) = Outbox::open(folder.path(), 2).expect("open");
        assert!((0..5).all(|number| outbox.is_known(&id(number))));
    }

    #[test]
    fn two_agents_never_share_a_folder() {
        let folder = tempfile::tempdir().expect("a folder");
        let _first = Outbox::open(folder.path(), 2).expect("open");
        assert!(Outbox::open(folder.path(), 2).is_err());
    }
}
