//! What an execution left in the workspace: a manifest before, one after, and the difference.
//!
//! A manifest is taken when no process of a sandbox is left; it still trusts nothing that it meets. The walk keeps a
//! list instead of recursing and opens each directory afresh from the workspace's descriptor, so that depth costs neither
//! stack nor descriptors (three are open at a time). A directory that is replaced by a link, moved or removed in between
//! is not entered. Work and memory are bounded by [`Limits`], whatever lies there.
//!
//! Only regular files with plain names are listed. Everything else is counted in [`Skipped`], so that nothing is missing
//! without a trace. Contents are not read: a file counts as changed if its size, times, inode or device differ. Of these
//! the ctime can't be set by a program, and so no change can hide, short of one within the same tick of the kernel's
//! clock (a few milliseconds) and of the same size.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FileStat, SFlag, fstatat};

use crate::workspace::{Workspace, WorkspaceError, kind};

/// Compiled Python, which appears wherever Python imports a module from the workspace.
const BYTECODE_FOLDER: &str = "__pycache__";

/// How much of a workspace a manifest takes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Directory entries looked at, listed or not.
    pub entries: usize,
    /// Components of a path; files directly in the workspace have 1.
    pub depth: usize,
    /// Bytes of one path relative to the workspace, with the NUL that the kernel counts (PATH_MAX).
    pub path_bytes: usize,
    /// Bytes of all paths together, of files and of directories that wait for their turn.
    pub total_path_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 100_000, depth: 64, path_bytes: 4_096, total_path_bytes: 16 * 1024 * 1024 }
    }
}

/// The regular files of a workspace at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    files: BTreeMap<String, Version>,
    /// What is there and not listed.
    pub skipped: Skipped,
    /// Whether `entries` or `total_path_bytes` ended the walk early.
    pub truncated: bool,
}

/// How many entries were not listed, by the first reason that applied. What lies in a skipped directory is not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Names that are not UTF-8.
    pub not_utf8: usize,
    /// Names with a leading dot.
    pub hidden: usize,
    /// Folders named `__pycache__`.
    pub bytecode: usize,
    /// Paths above [`Limits::path_bytes`].
    pub too_long: usize,
    /// Directories whose entries would be below [`Limits::depth`].
    pub too_deep: usize,
    /// Symbolic links, whatever they point to.
    pub links: usize,
    /// FIFOs.
    pub fifos: usize,
    /// Sockets.
    pub sockets: usize,
    /// Character and block devices.
    pub devices: usize,
    /// Directories on which something else is mounted.
    pub mounts: usize,
    /// Directories that may not be read.
    pub unreadable: usize,
    /// Entries that were gone, or no longer what they had been, when they were looked at.
    pub vanished: usize,
}

/// A regular file that an execution created or changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// Relative to the workspace. May hold anything that UTF-8 can express but NUL, newlines and terminal codes included.
    pub path: String,
    /// Bytes.
    pub size: u64,
}

/// The difference between two manifests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Sorted by path, byte by byte.
    pub artifacts: Vec<Artifact>,
    /// Files that were listed before and are not any more.
    pub deleted: usize,
    /// What the later manifest does not list.
    pub skipped: Skipped,
    /// Whether either manifest is incomplete: changes may be missing, and old files may appear as new or deleted.
    pub truncated: bool,
}

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    size: u64,
    // Nanoseconds since 1970. Programs can set an mtime of any 64-bit second, hence 128 bits.
    modified: i128,
    changed: i128,
    inode: u64,
    device: u64,
}

/// A directory that waits for its turn.
struct Pending {
    path: String,
    /// Components that its entries have.
    depth: usize,
}

impl Workspace {
    /// Lists the regular files.
    ///
    /// # Errors
    ///
    /// [`WorkspaceError::List`] if the workspace itself can't be listed, or a directory for a reason that has nothing to
    /// do with what it is, such as a lack of descriptors: then the list would be wrong without showing it.
    pub fn manifest(&self, limits: &Limits) -> Result<Manifest, WorkspaceError> {
        let mut walk = Walk { limits, manifest: Manifest::default(), pending: Vec::new(), entries: 0, path_bytes: 0 };
        let mut next = Some(Pending { path: String::new(), depth: 1 });
        while let Some(directory) = next {
            if let Err(source) = walk.list(self, &directory) {
                let skipped = &mut walk.manifest.skipped;
                match source {
                    _ if directory.path.is_empty() => {
                        return Err(WorkspaceError::List { path: directory.path, source });
                    }
                    Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ESTALE => skipped.vanished += 1,
                    Errno::EXDEV => skipped.mounts += 1,
                    Errno::EACCES | Errno::EPERM => skipped.unreadable += 1,
                    Errno::ENAMETOOLONG => skipped.too_long += 1,
                    _ => {
                        return Err(WorkspaceError::List { path: directory.path, source });
                    }
                }
            }
            if walk.manifest.truncated {
                break;
            }
            next = walk.pending.pop();
        }
        Ok(walk.manifest)
    }
}

impl Manifest {
    /// What is different in `after`, the later manifest of the same workspace.
    pub fn changes(&self, after: &Self) -> Changes {
        let artifacts = after
            .files
            .iter()
            .filter(|(path, version)| self.files.get(*path) != Some(version))
            .map(|(path, version)| Artifact { path: path.clone(), size: version.size })
            .collect();
        Changes {
            artifacts,
            deleted: self.files.keys().filter(|path| !after.files.contains_key(*path)).count(),
            skipped: after.skipped,
            truncated: self.truncated || after.truncated,
        }
    }
}

/// A manifest that is being taken.
struct Walk<'a> {
    limits: &'a Limits,
    manifest: Manifest,
    pending: Vec<Pending>,
    entries: usize,
    path_bytes: usize,
}

impl Walk<'_> {
    /// Takes in the entries of one directory.
    fn list(&mut self, workspace: &Workspace, directory: &Pending) -> Result<(), Errno> {
        let descriptor = workspace.open_directory(&directory.path)?;
        // The stream owns its descriptor and lends itself to the iterator; the second one is for the entries.
        let mut stream = Dir::from_fd(
            descriptor.try_clone().map_err(|error| error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw))?,
        )?;
        for entry in stream.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if self.entries == self.limits.entries {
                self.manifest.truncated = true;
                return Ok(());
            }
            self.entries += 1;

            let skipped = &mut self.manifest.skipped;
            let Ok(name) = name.to_str() else {
                skipped.not_utf8 += 1;
                continue;
            };
            if name.starts_with('.') {
                skipped.hidden += 1;
            } else if name == BYTECODE_FOLDER {
                skipped.bytecode += 1;
            } else if directory.path.len() + "/".len() + name.len() + "\0".len() > self.limits.path_bytes {
                skipped.too_long += 1;
            } else {
                self.take(descriptor.as_fd(), directory, name)?;
                if self.manifest.truncated {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Lists a file, notes a directory for later, counts anything else.
    fn take(&mut self, parent: impl AsFd, directory: &Pending, name: &str) -> Result<(), Errno> {
        let skipped = &mut self.manifest.skipped;
        let status = match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(status) => status,
            Err(Errno::ENOENT | Errno::ESTALE) => {
                skipped.vanished += 1;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let is_directory = match kind(&status) {
            SFlag::S_IFREG => false,
            SFlag::S_IFDIR if directory.depth >= self.limits.depth => {
                skipped.too_deep += 1;
                return Ok(());
            }
            SFlag::S_IFDIR => true,
            other => {
                *match other {
                    SFlag::S_IFLNK => &mut skipped.links,
                    SFlag::S_IFIFO => &mut skipped.fifos,
                    SFlag::S_IFSOCK => &mut skipped.sockets,
                    _ => &mut skipped.devices,
                } += 1;
                return Ok(());
            }
        };

        let path = match directory.path.as_str() {
            "" => name.to_owned(),
            above => format!("{above}/{name}"),
        };
        if self.path_bytes + path.len() > self.limits.total_path_bytes {
            self.manifest.truncated = true;
            return Ok(());
        }
        self.path_bytes += path.len();
        if is_directory {
            self.pending.push(Pending { path, depth: directory.depth + 1 });
        } else {
            self.manifest.files.insert(path, Version::of(&status));
        }
        Ok(())
    }
}

impl Version {
    fn of(status: &FileStat) -> Self {
        let nanoseconds = |seconds, rest| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        Self {
            // Never negative for a regular file.
            size: u64::try_from(status.st_size).unwrap_or(0),
            modified: nanoseconds(status.st_mtime, status.st_mtime_nsec),
            changed: nanoseconds(status.st_ctime, status.st_ctime_nsec),
            inode: status.st_ino,
            device: status.st_dev,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::process::Command;

    use nix::fcntl::{OFlag, open, openat};
    use nix::sys::stat::{Mode, mkdirat};
    use nix::unistd::mkfifo;

    use super::*;

    fn workspace() -> (tempfile::TempDir, Workspace) {
        let folder = tempfile::tempdir().unwrap();
        let workspace = Workspace::open(folder.path()).unwrap();
        (folder, workspace)
    }

    fn manifest(workspace: &Workspace) -> Manifest {
        workspace.manifest(&Limits::default()).unwrap()
    }

    fn write(folder: &Path, relative: &str, text: &str) {
        let path = folder.join(relative);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn paths(changes: &Changes) -> Vec<&str> {
        changes.artifacts.iter().map(|artifact| artifact.path.as_str()).collect()
    }

    #[test]
    fn new_and_changed_files_are_artifacts_and_others_are_not() {
        let (folder, workspace) = workspace();
        for name in ["kept", "rewritten", "removed", "d/replaced", "touched"] {
            write(folder.path(), name, "one");
        }
        let before = manifest(&workspace);
        assert_eq!(before.files.len(), 5);
        assert_eq!(before.changes(&manifest(&workspace)), Changes::default());

        // Beyond a tick of the kernel's clock, so that a rewrite of the same size shows.
        std::thread::sleep(std::time::Duration::from_millis(20));
        write(folder.path(), "rewritten", "two");
        write(folder.path(), "d/new name\n.txt", "12345");
        write(folder.path(), "d/e/f", "");
        write(folder.path(), "d/fresh", "three");
        fs::rename(folder.path().join("d/fresh"), folder.path().join("d/replaced")).unwrap();
        fs::remove_file(folder.path().join("removed")).unwrap();
        // A program that sets the mtime back can't hide its change: the ctime stays.
        write(folder.path(), "touched", "2");
        write(folder.path(), "touched", "two");
        let time = fs::metadata(folder.path().join("kept")).unwrap().modified().unwrap();
        fs::File::options().write(true).open(folder.path().join("touched")).unwrap().set_modified(time).unwrap();

        let changes = before.changes(&manifest(&workspace));
        assert_eq!(paths(&changes), ["d/e/f", "d/new name\n.txt", "d/replaced", "rewritten", "touched"]);
        assert_eq!(changes.artifacts[1].size, 5);
        assert_eq!((changes.deleted, changes.truncated), (1, false));
    }

    #[test]
    fn what_is_no_plain_file_is_counted_by_reason() {
        let (folder, workspace) = workspace();
        let at = |name: &str| folder.path().join(name);
        symlink("/etc", at("etc")).unwrap();
        symlink("loop", at("loop")).unwrap();
        symlink(folder.path(), at("up")).unwrap();
        mkfifo(&at("fifo"), Mode::S_IRWXU).unwrap();
        let _listener = UnixListener::bind(at("socket")).unwrap();
        write(folder.path(), ".hidden/file", "");
        write(folder.path(), ".env", "");
        write(folder.path(), "package/__pycache__/m.pyc", "");
        fs::write(folder.path().join(OsStr::from_bytes(b"\xff\xfe")), "").unwrap();
        fs::create_dir(folder.path().join(OsStr::from_bytes(b"d\x80"))).unwrap();
        write(folder.path(), &"n".repeat(255), "long");

        let found = manifest(&workspace);
        let expected =
            Skipped { links: 3, fifos: 1, sockets: 1, hidden: 2, bytecode: 1, not_utf8: 2, ..Skipped::default() };
        assert_eq!(found.skipped, expected);
        assert_eq!(paths(&Manifest::default().changes(&found)), ["n".repeat(255)]);
    }

    #[test]
    fn a_tree_of_2000_levels_is_cut_at_the_limit() {
        let (folder, workspace) = workspace();
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let mut here = open(folder.path(), flags, Mode::empty()).unwrap();
        for _ in 0..2_000 {
            openat(&here, "file", OFlag::O_CREAT | OFlag::O_WRONLY, Mode::S_IRWXU).unwrap();
            mkdirat(&here, "d", Mode::S_IRWXU).unwrap();
            here = openat(&here, "d", flags, Mode::empty()).unwrap();
        }
        let found = manifest(&workspace);
        assert_eq!((found.files.len(), found.skipped.too_deep, found.truncated), (64, 1, false));

        // Without a bound on depth the length of paths is the bound: "d/" repeated, then "file".
        let deep = Limits { depth: usize::MAX, ..Limits::default() };
        let found = workspace.manifest(&deep).unwrap();
        assert_eq!((found.files.len(), found.truncated), (2_000, false));
        let deep = Limits { path_bytes: 1_000, ..deep };
        let found = workspace.manifest(&deep).unwrap();
        assert!((480..500).contains(&found.files.len()), "{}", found.files.len());
        assert!(found.skipped.too_long > 0);
        // std's recursive removal needs a descriptor per level.
        assert!(Command::new("rm").arg("-rf").arg(folder.path().join("d")).status().unwrap().success());
    }

    #[test]
    fn entries_and_memory_are_bounded() {
        let (folder, workspace) = workspace();
        for number in 0..50 {
            write(folder.path(), &format!("f{number:02}"), "");
            write(folder.path(), &format!(".h{number:02}"), "");
        }
        let found = workspace.manifest(&Limits { entries: 100, ..Limits::default() }).unwrap();
        assert_eq!((found.files.len(), found.skipped.hidden, found.truncated), (50, 50, false));
        let found = workspace.manifest(&Limits { entries: 99, ..Limits::default() }).unwrap();
        assert_eq!((found.files.len() + found.skipped.hidden, found.truncated), (99, true));
        let found = workspace.manifest(&Limits { total_path_bytes: 32, ..Limits::default() }).unwrap();
        assert_eq!((found.files.len(), found.truncated), (10, true));
        assert!(found.changes(&manifest(&workspace)).truncated);
    }

    #[test]
    fn replacing_directories_by_links_while_they_are_walked_leads_nowhere() {
        let (folder, workspace) = workspace();
        let outside = tempfile::tempdir().unwrap();
        write(outside.path(), "secret", "");
        for number in 0..200 {
            write(folder.path(), &format!("d{number}/file"), "");
        }
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let swapper = scope.spawn(|| {
                let (link, aside) = (folder.path().join("link"), folder.path().join("aside"));
                symlink(outside.path(), &link).unwrap();
                let mut rounds = 0;
                for number in (0..200).cycle() {
                    if stop.load(std::sync::atomic::Ordering::Relaxed) {
                        return rounds;
                    }
                    let directory = folder.path().join(format!("d{number}"));
                    fs::rename(&directory, &aside).unwrap();
                    fs::rename(&link, &directory).unwrap();
                    fs::rename(&directory, &link).unwrap();
                    fs::rename(&aside, &directory).unwrap();
                    rounds += 1;
                }
                rounds
            });
            for _ in 0..100 {
                let found = manifest(&workspace);
                assert!(found.files.keys().all(|path| path.ends_with("/file")), "{:?}", found.files.keys());
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(swapper.join().unwrap() > 0);
        });
    }

    #[test]
    fn a_workspace_that_was_removed_is_an_error() {
        let (folder, workspace) = workspace();
        drop(folder);
        let found = workspace.manifest(&Limits::default());
        assert!(found.is_err() || found.unwrap().files.is_empty());
    }
}
