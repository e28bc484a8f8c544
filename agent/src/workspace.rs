//! The session's folder, seen from outside the sandbox: whatever lies in it was put there by hostile code.
//!
//! The folder is opened once and held by descriptor, so that renaming it or putting a link in its place changes nothing.
//! Everything else is opened from that descriptor by openat2(2), which refuses, in one step that can't be raced:
//!
//! - what is not beneath the folder (`RESOLVE_BENEATH`);
//! - symbolic links in any component, and the links of /proc (`RESOLVE_NO_SYMLINKS`, `RESOLVE_NO_MAGICLINKS`);
//! - other mounts, bind mounts of the same file system among them (`RESOLVE_NO_XDEV`).
//!
//! A relative path is a sequence of names joined by single slashes; none of them is empty, `.` or `..`. What the folder
//! holds is the business of [`crate::artifacts`].

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, unlinkat};

/// How often a free temporary name is looked for. The names are random, so a second try is already unlikely.
const TEMPORARY_NAME_TRIES: usize = 8;
/// Permissions of a stored file and of the folders made for it.
const FILE_MODE: Mode = Mode::from_bits_truncate(0o644);
const DIRECTORY_MODE: Mode = Mode::from_bits_truncate(0o755);

/// What went wrong with the workspace. Paths are quoted: they are chosen by hostile code.
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceError {
    /// The configured folder is not there, is not a folder, or may not be entered.
    #[error("can't open the workspace {path:?}")]
    Root {
        /// The folder as configured.
        path: PathBuf,
        /// ENOENT, ENOTDIR, EACCES, ...
        #[source]
        source: Errno,
    },
    /// Absolute, empty, or with a component that is empty, `.` or `..`, or with a NUL.
    #[error("{0:?} is not a path inside the workspace")]
    Path(String),
    /// No such entry, or one behind a symbolic link (ELOOP) or another mount (EXDEV).
    #[error("can't open {path:?} in the workspace")]
    Open {
        /// Relative to the workspace.
        path: String,
        /// ENOENT, ELOOP, EXDEV, EACCES, ENOSYS before Linux 5.6, ...
        #[source]
        source: Errno,
    },
    /// A folder can't be listed, for a reason other than that it vanished.
    #[error("can't list {path:?} in the workspace")]
    List {
        /// Relative to the workspace.
        path: String,
        /// EMFILE, EIO, ...
        #[source]
        source: Errno,
    },
    /// A folder for a stored file can't be made.
    #[error("can't make the folder {path:?} in the workspace")]
    MakeDirectory {
        /// Relative to the workspace.
        path: String,
        /// EACCES, ENOSPC, EROFS, ...
        #[source]
        source: Errno,
    },
    /// A stored file can't be written. Nothing of it is left, and what had its name before is untouched.
    #[error("can't store {path:?} in the workspace")]
    Store {
        /// Relative to the workspace.
        path: String,
        /// ENOSPC, EDQUOT, EISDIR, ...
        #[source]
        source: std::io::Error,
    },
}

/// The session's folder, held open.
#[derive(Debug)]
pub struct Workspace {
    path: PathBuf,
    root: OwnedFd,
}

/// Whom a stored file shall belong to. Needed if the sandbox runs as another user than the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User on the agent's side.
    pub uid: u32,
    /// Group on the agent's side.
    pub gid: u32,
}

impl Workspace {
    /// Opens the folder. `path` comes from the operator and may be or contain a symbolic link, which is followed now
    /// and never again.
    ///
    /// # Errors
    ///
    /// [`WorkspaceError::Root`].
    pub fn open(path: &Path) -> Result<Self, WorkspaceError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let failed = |source| WorkspaceError::Root { path: path.to_owned(), source };
        let root = open(path, flags, Mode::empty()).map_err(failed)?;
        Ok(Self { path: path.to_owned(), root })
    }

    /// The folder as it was configured, for messages and mounts. Nothing may be opened by joining names to it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a directory for listing; the empty path stands for the workspace itself.
    pub(crate) fn open_directory(&self, relative: &str) -> Result<OwnedFd, Errno> {
        let relative = if relative.is_empty() { "." } else { relative };
        self.open_beneath(relative, OFlag::O_RDONLY | OFlag::O_DIRECTORY)
    }

    /// Stores a file under the given path, whole or not at all, and makes the folders that are missing. A file, link,
    /// FIFO or the like that has the name is replaced, never written to or through.
    ///
    /// With an `owner` the file and the new folders are given to it, which takes CAP_CHOWN unless it is the agent's own
    /// user. The file is not synced to disk.
    ///
    /// # Errors
    ///
    /// [`WorkspaceError::Path`], [`WorkspaceError::Open`] and [`WorkspaceError::MakeDirectory`] for the folders, and
    /// [`WorkspaceError::Store`].
    pub fn store_file(&self, relative: &str, bytes: &[u8], owner: Option<Owner>) -> Result<(), WorkspaceError> {
        let (folder, name) = match components(relative)? {
            (Some(folder), name) => (self.make_directories(folder, owner)?, name),
            (None, name) => {
                let failed = |source| WorkspaceError::Open { path: String::new(), source };
                (self.open_directory("").map_err(failed)?, name)
            }
        };

        let failed = |source| WorkspaceError::Store { path: relative.to_owned(), source };
        let (temporary, file) = create_temporary(&folder).map_err(|errno| failed(errno.into()))?;
        write_whole(file, bytes, owner)
            .and_then(|()| Ok(renameat(&folder, temporary.as_str(), &folder, name)?))
            .map_err(|error| {
                // The first error is the one to tell. If this fails too, a hidden file stays, which is no artifact.
                let _ = unlinkat(&folder, temporary.as_str(), UnlinkatFlags::NoRemoveDir);
                failed(error)
            })
    }

    /// Makes the directory and those above it, where they are missing, and opens it.
    fn make_directories(&self, relative: &str, owner: Option<Owner>) -> Result<OwnedFd, WorkspaceError> {
        let ends = relative.match_indices('/').map(|(at, _)| at).chain([relative.len()]);
        let open = |path: &str| {
            let failed = |source| WorkspaceError::Open { path: path.to_owned(), source };
            self.open_directory(path).map_err(failed)
        };
        let mut parent = open("")?;
        let mut start = 0;
        for end in ends {
            let path = &relative[..end];
            let failed = |source| WorkspaceError::MakeDirectory { path: path.to_owned(), source };
            let made = match mkdirat(&parent, &relative[start..end], DIRECTORY_MODE) {
                Ok(()) => true,
                Err(Errno::EEXIST) => false,
                Err(error) => return Err(failed(error)),
            };
            parent = open(path)?;
            if let (true, Some(owner)) = (made, owner) {
                give(&parent, owner).map_err(failed)?;
            }
            start = end + 1;
        }
        Ok(parent)
    }

    fn open_beneath(&self, relative: &str, flags: OFlag) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS
            | ResolveFlag::RESOLVE_NO_XDEV;
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat2(&self.root, relative, OpenHow::new().flags(flags).resolve(resolve))
    }
}

/// What kind of thing an entry is, as one of the `S_IF*` constants.
pub(crate) fn kind(status: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT
}

/// Checks a relative path and splits it into its folder, if it has one, and its name.
fn components(relative: &str) -> Result<(Option<&str>, &str), WorkspaceError> {
    let is_name = |name: &str| !matches!(name, "" | "." | "..");
    if relative.contains('\0') || !relative.split('/').all(is_name) {
        return Err(WorkspaceError::Path(relative.to_owned()));
    }
    Ok(match relative.rsplit_once('/') {
        Some((folder, name)) => (Some(folder), name),
        None => (None, relative),
    })
}

/// Creates a file with a hidden name that was free.
fn create_temporary(folder: &OwnedFd) -> Result<(String, OwnedFd), Errno> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    for _ in 0..TEMPORARY_NAME_TRIES {
        // Each RandomState has keys of its own.
        let name = format!(".store-{:016x}", RandomState::new().hash_one(()));
        match openat(folder, name.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR) {
            Ok(file) => return Ok((name, file)),
            Err(Errno::EEXIST) => {}
            Err(error) => return Err(error),
        }
    }
    Err(Errno::EEXIST)
}

fn write_whole(file: OwnedFd, bytes: &[u8], owner: Option<Owner>) -> std::io::Result<()> {
    let mut file = File::from(file);
    file.write_all(bytes)?;
    fchmod(&file, FILE_MODE)?;
    if let Some(owner) = owner {
        give(&file, owner)?;
    }
    Ok(())
}

fn give(entry: impl std::os::fd::AsFd, owner: Owner) -> Result<(), Errno> {
    fchown(entry, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use nix::unistd::{getegid, geteuid, mkfifo};

    use super::*;

    fn workspace() -> (tempfile::TempDir, Workspace) {
        let folder = tempfile::tempdir().unwrap();
        let workspace = Workspace::open(folder.path()).unwrap();
        (folder, workspace)
    }

    /// Opens a file the way everything beneath the workspace is opened.
    fn open_file(workspace: &Workspace, relative: &str) -> Result<File, WorkspaceError> {
        components(relative)?;
        let failed = |source| WorkspaceError::Open { path: relative.to_owned(), source };
        workspace.open_beneath(relative, OFlag::O_RDONLY | OFlag::O_NONBLOCK).map(File::from).map_err(failed)
    }

    fn content(workspace: &Workspace, relative: &str) -> String {
        let mut text = String::new();
        open_file(workspace, relative).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    fn open_errno(workspace: &Workspace, relative: &str) -> Errno {
        match open_file(workspace, relative) {
            Err(WorkspaceError::Open { source, .. }) => source,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn files_are_read_beneath_and_nowhere_else() {
        let (folder, workspace) = workspace();
        fs::create_dir(folder.path().join("d")).unwrap();
        fs::write(folder.path().join("d/f"), "inside").unwrap();
        assert_eq!(content(&workspace, "d/f"), "inside");

        for path in ["", "/etc/passwd", "..", "d/../d/f", "./d/f", "d//f", "d/f/", "d\0"] {
            let answer = open_file(&workspace, path);
            assert!(matches!(answer, Err(WorkspaceError::Path(_))), "{path:?}: {answer:?}");
        }
        assert_eq!(open_errno(&workspace, "missing"), Errno::ENOENT);
    }

    #[test]
    fn links_are_not_followed_wherever_they_stand() {
        let (folder, workspace) = workspace();
        fs::write(folder.path().join("f"), "inside").unwrap();
        for (name, target) in
            [("etc", "/etc"), ("up", ".."), ("f-link", "f"), ("loop", "loop"), ("self", "/proc/self/root")]
        {
            symlink(target, folder.path().join(name)).unwrap();
        }
        for path in ["etc", "etc/passwd", "up", "f-link", "loop", "loop/x", "self", "self/etc/passwd"] {
            assert_eq!(open_errno(&workspace, path), Errno::ELOOP, "{path}");
        }
        // The control: std follows them.
        assert_eq!(fs::read_to_string(folder.path().join("f-link")).unwrap(), "inside");
        assert!(fs::read(folder.path().join("etc/passwd")).is_ok());
    }

    #[test]
    fn the_folder_is_resolved_once() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().join("real");
        let link = folder.path().join("link");
        fs::create_dir(&real).unwrap();
        fs::write(real.join("f"), "first").unwrap();
        symlink(&real, &link).unwrap();
        let workspace = Workspace::open(&link).unwrap();

        fs::remove_file(&link).unwrap();
        symlink("/etc", &link).unwrap();
        fs::rename(&real, folder.path().join("moved")).unwrap();
        assert_eq!(content(&workspace, "f"), "first");
        assert_eq!(open_errno(&workspace, "passwd"), Errno::ENOENT);

        let missing = Workspace::open(&folder.path().join("missing"));
        assert!(matches!(missing, Err(WorkspaceError::Root { source: Errno::ENOENT, .. })));
        let file = Workspace::open(&folder.path().join("moved/f"));
        assert!(matches!(file, Err(WorkspaceError::Root { source: Errno::ENOTDIR, .. })));
    }

    #[test]
    fn stored_files_are_whole_and_alone() {
        let (folder, workspace) = workspace();
        let owner = Owner { uid: geteuid().as_raw(), gid: getegid().as_raw() };
        workspace.store_file("a/b/value.json", b"first", Some(owner)).unwrap();
        workspace.store_file("a/b/value.json", b"second", None).unwrap();
        workspace.store_file("top", b"", None).unwrap();
        assert_eq!(content(&workspace, "a/b/value.json"), "second");
        assert_eq!(content(&workspace, "top"), "");
        let status = fs::metadata(folder.path().join("a/b/value.json")).unwrap();
        assert_eq!((status.permissions().mode() & 0o7777, status.nlink()), (0o644, 1));
        assert_eq!(fs::read_dir(folder.path().join("a/b")).unwrap().count(), 1);
    }

    #[test]
    fn storing_replaces_links_and_fifos_and_goes_through_none() {
        let (folder, workspace) = workspace();
        let outside = tempfile::tempdir().unwrap();
        let victim = outside.path().join("victim");
        fs::write(&victim, "untouched").unwrap();
        symlink(&victim, folder.path().join("value")).unwrap();
        mkfifo(&folder.path().join("fifo"), Mode::S_IRWXU).unwrap();
        symlink(outside.path(), folder.path().join("folder")).unwrap();
        fs::create_dir(folder.path().join("d")).unwrap();
        fs::write(folder.path().join("file"), "").unwrap();

        workspace.store_file("value", b"new", None).unwrap();
        workspace.store_file("fifo", b"new", None).unwrap();
        assert_eq!(content(&workspace, "value") + &content(&workspace, "fifo"), "newnew");
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");

        // O_DIRECTORY makes the kernel say ENOTDIR for a link in the last place.
        let through_link = workspace.store_file("folder/value", b"x", None);
        assert!(matches!(through_link, Err(WorkspaceError::Open { .. })), "{through_link:?}");
        assert!(workspace.store_file("folder/new/value", b"x", None).is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
        assert!(matches!(workspace.store_file("d", b"x", None), Err(WorkspaceError::Store { .. })));
        assert!(matches!(workspace.store_file("file/x", b"x", None), Err(WorkspaceError::Open { .. })));
        assert!(matches!(workspace.store_file("../x", b"x", None), Err(WorkspaceError::Path(_))));
        let long = "n".repeat(256);
        assert!(matches!(workspace.store_file(&long, b"x", None), Err(WorkspaceError::Store { .. })));
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().starts_with('.')), "{left:?}");
    }
}
