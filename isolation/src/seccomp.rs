//! Seccomp: turns a profile (our JSON, see `seccomp-profiles/README.md`) into the programs that the kernel runs
//! before every system call.
//!
//! A profile is a stack of filters. They are installed in the order in which they stand, and the kernel asks all of
//! them about every call: the most restrictive answer wins, and among several error numbers that of the filter
//! installed **last** (seccomp(2), "SECCOMP_SET_MODE_FILTER"). So an allow-list comes first and answers `ENOSYS` for
//! whatever it doesn't know, and the filters after it override that number where programs expect another.
//!
//! Invariants of every profile that compiles:
//!
//! - its first filter is an allow-list: only that refuses x32 calls (the number with bit 30 set, same architecture
//!   to the kernel) and the calls of kernels newer than the profile;
//! - a call of a foreign architecture (`int 0x80`) ends the process: each program starts with that check;
//! - every name is known to the table of [`seccompiler`], so a misspelt rule is never silently absent;
//! - the same text and architecture give the same bytes.
//!
//! This module decides as data: it opens no file, makes no system call and installs nothing.

use std::collections::{BTreeMap, BTreeSet};

use seccompiler::{BpfProgram, TargetArch, compile_from_json};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

/// The profile for user code, as shipped.
const EXECUTE: &str = include_str!("../../seccomp-profiles/execute.json");
/// The profile for package installers, as shipped.
const INSTALL: &str = include_str!("../../seccomp-profiles/install.json");

/// What makes a profile unusable. A profile is refused whole: no filter is ever left out.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The text is not JSON, lacks a field, or has one that the format doesn't know.
    #[error("seccomp profile is not in the expected form")]
    Format(#[source] serde_json::Error),
    /// Programs can be made for x86_64 and aarch64 only.
    #[error("no seccomp rules for the architecture {0:?}")]
    Architecture(String),
    /// The profile has no filter, or does not start with one that allows what it names and refuses the rest.
    #[error("seccomp profile {0:?} does not start with an allow-list")]
    NoAllowList(String),
    /// Two filters of one profile have the same name.
    #[error("seccomp filter {0:?} is there twice")]
    RepeatedFilter(String),
    /// A filter is left without any rule on this architecture.
    #[error("seccomp filter {0:?} has no rules")]
    EmptyFilter(String),
    /// A rule contradicts itself or could never match.
    #[error("seccomp filter {filter:?}, rule {rule}: {reason}")]
    Rule {
        /// Name of the filter.
        filter: String,
        /// Position of the rule in the filter, from 0.
        rule: usize,
        /// What is wrong with it.
        reason: RuleFault,
    },
    /// The library that writes the programs refused a filter, for example because it is too long (4,095 instructions).
    #[error("seccomp filter {filter:?} can't be compiled")]
    Compile {
        /// Name of the filter.
        filter: String,
        /// The library's reason.
        #[source]
        source: seccompiler::Error,
    },
}

/// What is wrong with one rule.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleFault {
    /// No such system call on this architecture: misspelt, too new for the table, or in need of an `arch`.
    #[error("unknown system call {0:?}")]
    UnknownName(String),
    /// The name already matches whatever its arguments are, so one of the two rules would have no effect.
    #[error("system call {0:?} is already matched without conditions, or now would be")]
    RepeatedName(String),
    /// The rule names no system call or no architecture.
    #[error("an empty list of names or architectures")]
    NoNames,
    /// `args` is there and empty. A rule for all arguments has no `args`.
    #[error("an empty list of conditions")]
    NoConditions,
    /// System calls have the arguments 0 to 5.
    #[error("argument {0} does not exist")]
    Argument(u8),
    /// The width is in bits, 32 or 64.
    #[error("a width of {0} bits instead of 32 or 64")]
    Width(u8),
    /// The value or mask has bits above the width, which would be dropped without a word.
    #[error("a value wider than {0} bits")]
    Value(u8),
    /// `masked_eq` needs a mask and the other operators must not have one.
    #[error("a mask without masked_eq, or the reverse")]
    Mask,
    /// A value with bits outside its mask; it could never match.
    #[error("a value with bits outside its mask")]
    OutsideMask,
}

/// One BPF program, ready to be handed to the kernel or to `bwrap --add-seccomp-fd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Name of the filter that it came from.
    pub name: String,
    /// `struct sock_filter` after `struct sock_filter` (linux/filter.h), 8 bytes each, in the byte order of this
    /// machine.
    pub bytes: Vec<u8>,
}

/// A profile, compiled for one architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// Name of the profile.
    pub name: String,
    /// The programs, in the order in which they must be installed.
    pub programs: Vec<Program>,
    /// SHA-256 of the bytes of all programs, one after another, in lower-case hexadecimal.
    pub sha256: String,
}

/// The text of a shipped profile: `execute` for user code, `install` for package installers; `None` for other names.
pub fn embedded(name: &str) -> Option<&'static str> {
    match name {
        "execute" => Some(EXECUTE),
        "install" => Some(INSTALL),
        _ => None,
    }
}

/// Compiles a profile for the architecture that this program runs on.
///
/// # Errors
///
/// Every [`SeccompError`]; a profile that is wrong in one rule gives no program at all.
pub fn compile(profile_json: &str) -> Result<Compiled, SeccompError> {
    compile_for(profile_json, std::env::consts::ARCH)
}

/// Compiles a profile for `arch`, `x86_64` or `aarch64` as in [`std::env::consts::ARCH`].
///
/// # Errors
///
/// As [`compile`].
pub fn compile_for(profile_json: &str, arch: &str) -> Result<Compiled, SeccompError> {
    let profile: Profile = serde_json::from_str(profile_json).map_err(SeccompError::Format)?;
    let arch = match arch {
        "x86_64" => Arch::X86_64,
        "aarch64" => Arch::Aarch64,
        other => return Err(SeccompError::Architecture(other.to_owned())),
    };
    match profile.filters.first() {
        Some(first) if first.matched == Action::Allow && first.otherwise != Action::Allow => {}
        _ => return Err(SeccompError::NoAllowList(profile.name)),
    }

    let mut names = BTreeSet::new();
    let mut programs = Vec::with_capacity(profile.filters.len());
    let mut digest = Sha256::new();
    for filter in &profile.filters {
        if !names.insert(filter.name.as_str()) {
            return Err(SeccompError::RepeatedFilter(filter.name.clone()));
        }
        let bytes = serialize(&filter.compile(arch)?);
        digest.update(&bytes);
        programs.push(Program { name: filter.name.clone(), bytes });
    }
    let sha256 = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Compiled { name: profile.name, programs, sha256 })
}

/// A profile file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    name: String,
    #[serde(rename = "description")]
    _description: String,
    filters: Vec<Filter>,
}

/// One filter: what to answer for the calls that a rule matches, and what for all others.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Filter {
    name: String,
    #[serde(rename = "match")]
    matched: Action,
    otherwise: Action,
    rules: Vec<Rule>,
}

/// Some system calls, with conditions that must all hold.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    #[serde(rename = "comment")]
    _comment: String,
    names: Vec<String>,
    arch: Option<Vec<Arch>>,
    args: Option<Vec<Condition>>,
}

/// A comparison with one argument.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Condition {
    index: u8,
    width: u8,
    op: Operator,
    mask: Option<u64>,
    value: u64,
}

/// An architecture that rules can be for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Arch {
    #[serde(rename = "x86_64")]
    X86_64,
    Aarch64,
}

/// An unsigned comparison; `MaskedEq` looks at the bits of the mask only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Operator {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    MaskedEq,
}

/// What a filter answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Action {
    #[serde(rename = "allow")]
    Allow,
    #[serde(rename = "EPERM")]
    NotPermitted,
    #[serde(rename = "ENOSYS")]
    NotImplemented,
    #[serde(rename = "EAFNOSUPPORT")]
    FamilyNotSupported,
    #[serde(rename = "EPROTONOSUPPORT")]
    ProtocolNotSupported,
}

impl Filter {
    /// Translates the filter into the JSON of [`seccompiler`] and has it compiled.
    fn compile(&self, arch: Arch) -> Result<BpfProgram, SeccompError> {
        let mut rules = Vec::new();
        // Whether a name was matched without conditions. The library keeps one list of conditions per name and would
        // let a conditional rule silently narrow an unconditional one.
        let mut seen: BTreeMap<&str, bool> = BTreeMap::new();
        for (index, rule) in self.rules.iter().enumerate() {
            if rule.names.is_empty() || rule.arch.as_ref().is_some_and(Vec::is_empty) {
                return Err(self.fault(index, RuleFault::NoNames));
            }
            let conditions = rule.conditions().map_err(|reason| self.fault(index, reason))?;
            if rule.arch.as_ref().is_some_and(|only| !only.contains(&arch)) {
                continue;
            }
            for name in &rule.names {
                let unconditional = conditions.is_none();
                if seen.insert(name, unconditional).is_some_and(|before| before || unconditional) {
                    return Err(self.fault(index, RuleFault::RepeatedName(name.clone())));
                }
                let mut translated = json!({ "syscall": name });
                if let Some(conditions) = &conditions {
                    translated["args"] = json!(conditions);
                }
                rules.push((index, name, translated));
            }
        }
        if rules.is_empty() {
            return Err(SeccompError::EmptyFilter(self.name.clone()));
        }

        let translated: Vec<_> = rules.iter().map(|(_, _, rule)| rule).collect();
        build(arch, self.matched, self.otherwise, &json!(translated)).map_err(|source| {
            // The library names the system call and not the rule, in an error type that it keeps private.
            let unknown = rules.iter().find(|(_, name, _)| !is_known(arch, name));
            match unknown {
                Some((index, name, _)) => self.fault(*index, RuleFault::UnknownName((*name).clone())),
                None => SeccompError::Compile { filter: self.name.clone(), source },
            }
        })
    }

    fn fault(&self, rule: usize, reason: RuleFault) -> SeccompError {
        SeccompError::Rule { filter: self.name.clone(), rule, reason }
    }
}

impl Rule {
    /// The conditions in the JSON of [`seccompiler`]; `None` if the rule is for all arguments.
    fn conditions(&self) -> Result<Option<Vec<serde_json::Value>>, RuleFault> {
        match &self.args {
            None => Ok(None),
            Some(args) if args.is_empty() => Err(RuleFault::NoConditions),
            Some(args) => args.iter().map(Condition::translate).collect::<Result<_, _>>().map(Some),
        }
    }
}

impl Condition {
    fn translate(&self) -> Result<serde_json::Value, RuleFault> {
        if self.index > 5 {
            return Err(RuleFault::Argument(self.index));
        }
        let (kind, widest) = match self.width {
            32 => ("dword", u64::from(u32::MAX)),
            64 => ("qword", u64::MAX),
            other => return Err(RuleFault::Width(other)),
        };
        if self.value > widest || self.mask.is_some_and(|mask| mask > widest) {
            return Err(RuleFault::Value(self.width));
        }
        let op = match (self.op, self.mask) {
            (Operator::MaskedEq, Some(mask)) if self.value & !mask != 0 => {
                return Err(RuleFault::OutsideMask);
            }
            (Operator::MaskedEq, Some(mask)) => json!({ "masked_eq": mask }),
            (Operator::MaskedEq, None) | (_, Some(_)) => return Err(RuleFault::Mask),
            (other, None) => json!(other),
        };
        Ok(json!({ "index": self.index, "type": kind, "op": op, "val": self.value }))
    }
}

impl Action {
    /// The action in the JSON of [`seccompiler`].
    fn translate(self) -> serde_json::Value {
        let errno = match self {
            Self::Allow => return json!("allow"),
            Self::NotPermitted => libc::EPERM,
            Self::NotImplemented => libc::ENOSYS,
            Self::FamilyNotSupported => libc::EAFNOSUPPORT,
            Self::ProtocolNotSupported => libc::EPROTONOSUPPORT,
        };
        json!({ "errno": errno })
    }
}

/// Has the library write one program.
fn build(
    arch: Arch,
    matched: Action,
    otherwise: Action,
    rules: &serde_json::Value,
) -> Result<BpfProgram, seccompiler::Error> {
    let arch = match arch {
        Arch::X86_64 => TargetArch::x86_64,
        Arch::Aarch64 => TargetArch::aarch64,
    };
    let filter = json!({
        "match_action": matched.translate(),
        "mismatch_action": otherwise.translate(),
        "filter": rules,
    });
    let text = json!({ "filter": filter }).to_string();
    let programs = compile_from_json(text.as_bytes(), arch)?;
    programs.into_values().next().ok_or(seccompiler::Error::EmptyFilter)
}

/// Whether the library's table has the name.
fn is_known(arch: Arch, name: &str) -> bool {
    build(arch, Action::Allow, Action::NotImplemented, &json!([{ "syscall": name }])).is_ok()
}

/// Lays a program out as the kernel reads it.
fn serialize(program: &BpfProgram) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(program.len() * 8);
    for instruction in program {
        bytes.extend_from_slice(&instruction.code.to_ne_bytes());
        bytes.extend_from_slice(&[instruction.jt, instruction.jf]);
        bytes.extend_from_slice(&instruction.k.to_ne_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::ffi::{CString, c_long};

    use seccompiler::{apply_filter, sock_filter};

    use super::*;

    const ARCHES: [&str; 2] = ["x86_64", "aarch64"];
    const PROFILES: [&str; 2] = ["execute", "install"];

    fn shipped(name: &str, arch: &str) -> Compiled {
        compile_for(embedded(name).unwrap(), arch).unwrap()
    }

    fn instructions(program: &Program) -> Vec<sock_filter> {
        let read = |chunk: &[u8]| sock_filter {
            code: u16::from_ne_bytes([chunk[0], chunk[1]]),
            jt: chunk[2],
            jf: chunk[3],
            k: u32::from_ne_bytes([chunk[4], chunk[5], chunk[6], chunk[7]]),
        };
        program.bytes.chunks_exact(8).map(read).collect()
    }

    #[test]
    fn shipped_profiles_compile_everywhere_and_always_to_the_same_bytes() {
        for name in PROFILES {
            for arch in ARCHES {
                let compiled = shipped(name, arch);
                assert_eq!(compiled.name, name);
                let names: Vec<_> = compiled.programs.iter().map(|program| program.name.as_str()).collect();
                assert_eq!(names, ["known", "forbidden", "families", "protocols"]);
                assert!(compiled.programs.iter().all(|program| program.bytes.len().is_multiple_of(8)));
                assert_eq!(compiled.sha256.len(), 64);
                assert_eq!(compiled, shipped(name, arch));
            }
        }
        assert_ne!(shipped("execute", "x86_64").sha256, shipped("execute", "aarch64").sha256);
        assert_eq!(embedded("Execute"), None);
    }

    #[test]
    fn install_differs_from_execute_only_in_knowing_fewer_calls() {
        let [execute, install]: [Profile; 2] =
            PROFILES.map(|name| serde_json::from_str(embedded(name).unwrap()).unwrap());
        let known = |profile: &Profile| -> BTreeSet<String> {
            profile.filters[0].rules.iter().flat_map(|rule| rule.names.clone()).collect()
        };
        assert!(known(&install).is_subset(&known(&execute)));
        for arch in ARCHES {
            assert_eq!(shipped("execute", arch).programs[1..], shipped("install", arch).programs[1..]);
        }
    }

    // The programs, interpreted: this answers for architectures and numbers that this machine doesn't have.

    const ALLOWED: u32 = libc::SECCOMP_RET_ALLOW;
    const KILLED: u32 = libc::SECCOMP_RET_KILL_PROCESS;

    fn errno(number: i32) -> u32 {
        libc::SECCOMP_RET_ERRNO | number as u32
    }

    fn interpret(program: &[sock_filter], data: &[u8; 64]) -> u32 {
        let (mut at, mut accumulator) = (0, 0_u32);
        loop {
            let step = &program[at];
            at += 1;
            let branch = |taken: bool| usize::from(if taken { step.jt } else { step.jf });
            match step.code {
                0x20 => {
                    let offset = step.k as usize;
                    accumulator = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
                }
                0x54 => accumulator &= step.k,
                0x05 => at += step.k as usize,
                0x15 => at += branch(accumulator == step.k),
                0x25 => at += branch(accumulator > step.k),
                0x35 => at += branch(accumulator >= step.k),
                0x06 => return step.k,
                other => panic!("unexpected instruction {other:#x}"),
            }
        }
    }

    /// What the kernel would do: the most restrictive answer, and among equals that of the last filter.
    fn decide(compiled: &Compiled, audit_arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = [0; 64];
        data[..4].copy_from_slice(&number.to_le_bytes());
        data[4..8].copy_from_slice(&audit_arch.to_le_bytes());
        for (slot, arg) in data[16..].chunks_exact_mut(8).zip(args) {
            slot.copy_from_slice(&arg.to_le_bytes());
        }
        let answers = compiled.programs.iter().map(|program| interpret(&instructions(program), &data));
        answers.rev().min_by_key(|answer| (answer & libc::SECCOMP_RET_ACTION_FULL) as i32).unwrap()
    }

    const AUDIT_I386: u32 = 0x4000_0003;
    const AUDIT_X86_64: u32 = 0xc000_003e;
    const AUDIT_AARCH64: u32 = 0xc000_00b7;

    #[test]
    fn both_architectures_answer_alike() {
        // Number on x86_64, number on aarch64, arguments, answer.
        let any = [0; 6];
        let cases: &[(u32, u32, [u64; 6], u32)] = &[
            (0, 63, any, ALLOWED),                                                // read
            (61, 260, any, ALLOWED),                                              // wait4
            (231, 94, any, ALLOWED),                                              // exit_group
            (157, 167, [22, 2, 0, 0, 0, 0], ALLOWED),                             // prctl PR_SET_SECCOMP
            (157, 167, [35, 0, 0, 0, 0, 0], errno(libc::EPERM)),                  // prctl PR_SET_MM
            (157, 167, [0x1_0000_0023, 0, 0, 0, 0, 0], errno(libc::EPERM)),       // high bits set
            (56, 220, [17, 0, 0, 0, 0, 0], ALLOWED),                              // clone as fork
            (56, 220, [0x3d_0f00, 0, 0, 0, 0, 0], ALLOWED),                       // clone as thread
            (56, 220, [0x1000_0011, 0, 0, 0, 0, 0], errno(libc::EPERM)),          // NEWUSER
            (56, 220, [0x0002_0011, 0, 0, 0, 0, 0], errno(libc::EPERM)),          // NEWNS
            (435, 435, any, errno(libc::ENOSYS)),                                 // clone3
            (425, 425, any, errno(libc::ENOSYS)),                                 // io_uring_setup
            (437, 437, any, errno(libc::ENOSYS)),                                 // openat2
            (428, 428, any, errno(libc::ENOSYS)),                                 // open_tree
            (9999, 9999, any, errno(libc::ENOSYS)),                               // of the future
            (272, 97, any, errno(libc::EPERM)),                                   // unshare
            (41, 198, [1, 1, 0, 0, 0, 0], ALLOWED),                               // unix
            (41, 198, [10, 2 | 0o2_000_000, 17, 0, 0, 0], ALLOWED),               // inet6 udp
            (41, 198, [16, 3 | 0o2_000_000, 0, 0, 0, 0], ALLOWED),                // route
            (41, 198, [16, 3, 12, 0, 0, 0], errno(libc::EAFNOSUPPORT)),           // netfilter
            (41, 198, [40, 1, 0, 0, 0, 0], errno(libc::EAFNOSUPPORT)),            // vsock
            (41, 198, [1 << 32 | 40, 1, 0, 0, 0, 0], errno(libc::EAFNOSUPPORT)),  // high bits set
            (41, 198, [17, 3, 0, 0, 0, 0], errno(libc::EAFNOSUPPORT)),            // packet
            (41, 198, [2, 3 | 0o4_000, 1, 0, 0, 0], errno(libc::EPERM)),          // raw
            (41, 198, [2, 1, 132, 0, 0, 0], errno(libc::EPROTONOSUPPORT)),        // sctp
            (41, 198, [10, 1, 262, 0, 0, 0], errno(libc::EPROTONOSUPPORT)),       // mptcp
            (16, 29, [0, 0x5412, 0, 0, 0, 0], errno(libc::EPERM)),                // TIOCSTI
            (16, 29, [0, 0xffff_ffff_0000_5412, 0, 0, 0, 0], errno(libc::EPERM)), // high bits set
            (16, 29, [0, 0x541b, 0, 0, 0, 0], ALLOWED),                           // FIONREAD
            (259, 33, [0, 0, 0o020_666, 0, 0, 0], errno(libc::EPERM)),            // mknodat S_IFCHR
            (259, 33, [0, 0, 0o060_666, 0, 0, 0], errno(libc::EPERM)),            // mknodat S_IFBLK
            (259, 33, [0, 0, 0o010_666, 0, 0, 0], ALLOWED),                       // mknodat S_IFIFO
            (259, 33, [0, 0, 0o140_666, 0, 0, 0], ALLOWED),                       // mknodat S_IFSOCK
            (257, 56, [0, 0, 0x41, 0o4_755, 0, 0], errno(libc::EPERM)),           // openat O_CREAT
            (257, 56, [0, 0, 0, 0o4_755, 0, 0], ALLOWED),                         // mode unused
            (135, 92, [0xffff_ffff, 0, 0, 0, 0, 0], ALLOWED),                     // personality
            (135, 92, [0x0004_0000, 0, 0, 0, 0, 0], errno(libc::EPERM)),          // no ASLR
            (302, 261, [0, 7, 0, 0, 0, 0], ALLOWED),                              // prlimit64 self
            (302, 261, [1, 7, 0, 0, 0, 0], errno(libc::EPERM)),                   // prlimit64 init
        ];
        for name in PROFILES {
            let [x86_64, aarch64] = ARCHES.map(|arch| shipped(name, arch));
            for &(on_x86_64, on_aarch64, args, expected) in cases {
                let answers =
                    [decide(&x86_64, AUDIT_X86_64, on_x86_64, args), decide(&aarch64, AUDIT_AARCH64, on_aarch64, args)];
                assert_eq!(answers, [expected; 2], "{name}: {on_x86_64}/{on_aarch64} {args:x?}");
            }
        }
    }

    #[test]
    fn entries_of_other_architectures_are_closed() {
        let compiled = shipped("execute", "x86_64");
        let x32 = 1 << 30;
        for number in 0..600 {
            assert_eq!(decide(&compiled, AUDIT_I386, number, [0; 6]), KILLED);
            // What `forbidden` refuses needs no mention here: it knows no x32 number, so `known` must refuse all.
            assert_eq!(decide(&compiled, AUDIT_X86_64, x32 | number, [0; 6]), errno(libc::ENOSYS));
        }
        assert_eq!(decide(&shipped("execute", "aarch64"), AUDIT_X86_64, 63, [0; 6]), KILLED);
    }

    // The same in the kernel.

    /// Runs `calls` in a thread of its own, under the profile if one is named. Filters belong to a thread and die
    /// with it.
    fn in_thread<T: Send>(profile: Option<&str>, calls: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                for program in profile.into_iter().flat_map(|name| compile(embedded(name).unwrap()).unwrap().programs) {
                    apply_filter(&instructions(&program)).unwrap();
                }
                calls()
            });
            thread.join().unwrap()
        })
    }

    /// The result of a system call, or minus the error number.
    fn call(number: c_long, args: [u64; 6]) -> i64 {
        // SAFETY: the callers pass null, or pointers to strings that outlive the call.
        let result = unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4], args[5]) };
        match result {
            -1 => -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap()),
            value => value,
        }
    }

    #[test]
    fn the_kernel_refuses_what_the_profile_refuses() {
        let nowhere = u64::MAX;
        let me = u64::from(std::process::id());
        let folder = tempfile_path("refused");
        let path = CString::new(folder.as_str()).unwrap();
        std::fs::write(&folder, "").unwrap();
        let at = path.as_ptr() as u64;
        let cwd = libc::AT_FDCWD as u64;
        // The last column says whether an unfiltered thread gets another answer on every host: the control.
        let cases: &[(&str, c_long, [u64; 6], i32, bool)] = &[
            ("unshare", libc::SYS_unshare, [0; 6], libc::EPERM, true),
            ("setns", libc::SYS_setns, [nowhere, 0, 0, 0, 0, 0], libc::EPERM, true),
            ("clone NEWUSER", libc::SYS_clone, [0x1000_0000, 0, 0, 0, 0, 0], libc::EPERM, false),
            ("mount", libc::SYS_mount, [0; 6], libc::EPERM, false),
            ("ptrace", libc::SYS_ptrace, [0x4206, me, 0, 0, 0, 0], libc::EPERM, false),
            ("process_vm_readv", libc::SYS_process_vm_readv, [me, 0, 0, 0, 0, 0], libc::EPERM, true),
            ("pidfd_getfd", libc::SYS_pidfd_getfd, [nowhere, 0, 0, 0, 0, 0], libc::EPERM, true),
            ("keyctl", libc::SYS_keyctl, [u64::MAX, 0, 0, 0, 0, 0], libc::EPERM, true),
            ("add_key", libc::SYS_add_key, [0, 0, 0, 0, 0, 0], libc::EPERM, true),
            ("bpf", libc::SYS_bpf, [u64::MAX, 0, 0, 0, 0, 0], libc::EPERM, false),
            ("perf_event_open", libc::SYS_perf_event_open, [0; 6], libc::EPERM, false),
            ("userfaultfd", libc::SYS_userfaultfd, [0; 6], libc::EPERM, false),
            ("TIOCSTI", libc::SYS_ioctl, [nowhere, 0x5412, 0, 0, 0, 0], libc::EPERM, true),
            ("personality", libc::SYS_personality, [0x0004_0000, 0, 0, 0, 0, 0], libc::EPERM, true),
            ("prlimit64", libc::SYS_prlimit64, [me, 7, 0, 0, 0, 0], libc::EPERM, true),
            ("chmod suid", libc::SYS_fchmodat, [cwd, at, 0o4_755, 0, 0, 0], libc::EPERM, true),
            ("open suid", libc::SYS_openat, [cwd, at, 0x80042, 0o2_755, 0, 0], libc::EPERM, true),
            ("clone3", libc::SYS_clone3, [0; 6], libc::ENOSYS, true),
            ("io_uring_setup", libc::SYS_io_uring_setup, [0; 6], libc::ENOSYS, true),
            ("openat2", libc::SYS_openat2, [cwd, at, 0, 0, 0, 0], libc::ENOSYS, true),
            ("move_mount", libc::SYS_move_mount, [nowhere, 0, nowhere, 0, 0, 0], libc::ENOSYS, true),
            ("vsock", libc::SYS_socket, [40, 1, 0, 0, 0, 0], libc::EAFNOSUPPORT, false),
            ("netfilter", libc::SYS_socket, [16, 3, 12, 0, 0, 0], libc::EAFNOSUPPORT, false),
            ("raw", libc::SYS_socket, [2, 3, 1, 0, 0, 0], libc::EPERM, false),
            ("sctp", libc::SYS_socket, [2, 1, 132, 0, 0, 0], libc::EPROTONOSUPPORT, false),
        ];
        for &(name, number, args, expected, telling) in cases {
            for profile in PROFILES {
                let answer = in_thread(Some(profile), || call(number, args));
                assert_eq!(answer, -i64::from(expected), "{name} under {profile}");
            }
            if telling {
                let answer = in_thread(None, || call(number, args));
                assert_ne!(answer, -i64::from(expected), "{name} without filters proves nothing");
            }
        }
        std::fs::remove_file(folder).unwrap();
    }

    #[test]
    fn the_kernel_lets_everyday_calls_through() {
        let folder = tempfile_path("allowed");
        let fifo = CString::new(format!("{folder}.fifo")).unwrap();
        let file = CString::new(folder).unwrap();
        let (fifo_at, file_at) = (fifo.as_ptr() as u64, file.as_ptr() as u64);
        let cwd = libc::AT_FDCWD as u64;
        let cases: &[(&str, c_long, [u64; 6])] = &[
            ("create", libc::SYS_openat, [cwd, file_at, 0x80042, 0o644, 0, 0]),
            ("reopen, garbage as mode", libc::SYS_openat, [cwd, file_at, 0x80000, 0o4_755, 0, 0]),
            ("chmod", libc::SYS_fchmodat, [cwd, file_at, 0o600, 0, 0, 0]),
            ("mkfifo", libc::SYS_mknodat, [cwd, fifo_at, 0o010_600, 0, 0, 0]),
            ("unlink", libc::SYS_unlinkat, [cwd, file_at, 0, 0, 0, 0]),
            ("unlink", libc::SYS_unlinkat, [cwd, fifo_at, 0, 0, 0, 0]),
            ("unix", libc::SYS_socket, [1, 1 | 0x80000, 0, 0, 0, 0]),
            ("tcp", libc::SYS_socket, [2, 1 | 0x80000, 6, 0, 0, 0]),
            ("route", libc::SYS_socket, [16, 3 | 0x80000, 0, 0, 0, 0]),
            ("memfd", libc::SYS_memfd_create, [file_at, 1, 0, 0, 0, 0]),
            ("eventfd", libc::SYS_eventfd2, [0, 0x80000, 0, 0, 0, 0]),
            ("personality", libc::SYS_personality, [0xffff_ffff, 0, 0, 0, 0, 0]),
            ("prlimit64", libc::SYS_prlimit64, [0, 7, 0, 0, 0, 0]),
            ("no_new_privs", libc::SYS_prctl, [39, 0, 0, 0, 0, 0]),
        ];
        for profile in PROFILES {
            in_thread(Some(profile), || {
                for &(name, number, args) in cases {
                    let answer = call(number, args);
                    assert!(answer >= 0, "{name} under {profile}: {answer}");
                }
                let thread = std::thread::spawn(|| 41 + 1);
                assert_eq!(thread.join().unwrap(), 42);
                let output = std::process::Command::new("/bin/sh").args(["-c", "(exit 3) || exit 4"]).output();
                assert_eq!(output.unwrap().status.code(), Some(4));
            });
        }
    }

    fn tempfile_path(purpose: &str) -> String {
        let folder = std::env::temp_dir();
        folder.join(format!("seccomp-{}-{purpose}", std::process::id())).display().to_string()
    }

    // Profiles that are refused.

    /// A profile with an allow-list of `read` and a second filter with the given rules.
    fn refused(rules: &str) -> SeccompError {
        let text = format!(
            r#"{{"name":"p","description":"","filters":[
                {{"name":"known","match":"allow","otherwise":"ENOSYS","rules":[{{"comment":"","names":["read"]}}]}},
                {{"name":"second","match":"EPERM","otherwise":"allow","rules":{rules}}}]}}"#
        );
        compile_for(&text, "x86_64").unwrap_err()
    }

    fn fault(rules: &str) -> (usize, RuleFault) {
        match refused(rules) {
            SeccompError::Rule { filter, rule, reason } if filter == "second" => (rule, reason),
            other => panic!("{other:?}"),
        }
    }

    fn condition(fields: &str) -> RuleFault {
        fault(&format!(r#"[{{"comment":"","names":["ioctl"],"args":[{{{fields}}}]}}]"#)).1
    }

    #[test]
    fn faulty_rules_are_refused_by_place_and_name() {
        let unknown = r#"[{"comment":"","names":["read"]},{"comment":"","names":["write","raed"]}]"#;
        assert_eq!(fault(unknown), (1, RuleFault::UnknownName("raed".into())));
        let message = refused(unknown).to_string();
        assert_eq!(message, r#"seccomp filter "second", rule 1: unknown system call "raed""#);

        let twice = RuleFault::RepeatedName("read".into());
        let plain = r#"{"comment":"","names":["read"]}"#;
        let narrow = r#"{"comment":"","names":["read"],"args":[{"index":0,"width":32,"op":"eq","value":1}]}"#;
        assert_eq!(fault(&format!("[{plain},{plain}]")), (1, twice));
        let twice = RuleFault::RepeatedName("read".into());
        assert_eq!(fault(&format!("[{plain},{narrow}]")), (1, twice));
        let twice = RuleFault::RepeatedName("read".into());
        assert_eq!(fault(&format!("[{narrow},{plain}]")), (1, twice));

        assert_eq!(fault(r#"[{"comment":"","names":[]}]"#), (0, RuleFault::NoNames));
        assert_eq!(fault(r#"[{"comment":"","names":["read"],"arch":[]}]"#), (0, RuleFault::NoNames));
        assert_eq!(fault(r#"[{"comment":"","names":["read"],"args":[]}]"#), (0, RuleFault::NoConditions));
        assert_eq!(condition(r#""index":6,"width":32,"op":"eq","value":1"#), RuleFault::Argument(6));
        assert_eq!(condition(r#""index":0,"width":16,"op":"eq","value":1"#), RuleFault::Width(16));
        assert_eq!(condition(r#""index":0,"width":32,"op":"eq","value":4294967296"#), RuleFault::Value(32));
        assert_eq!(condition(r#""index":0,"width":32,"op":"eq","mask":1,"value":1"#), RuleFault::Mask);
        assert_eq!(condition(r#""index":0,"width":32,"op":"masked_eq","value":1"#), RuleFault::Mask);
        assert_eq!(condition(r#""index":0,"width":32,"op":"masked_eq","mask":1,"value":2"#), RuleFault::OutsideMask);
    }

    #[test]
    fn faulty_profiles_are_refused() {
        let good = embedded("execute").unwrap();
        assert!(matches!(compile_for(good, "riscv64"), Err(SeccompError::Architecture(_))));
        let unknown_field = good.replacen(r#""match""#, r#""mach": 1, "match""#, 1);
        assert!(matches!(compile(&unknown_field), Err(SeccompError::Format(_))));
        let unknown_action = good.replace("ENOSYS", "ENOENT");
        assert!(matches!(compile(&unknown_action), Err(SeccompError::Format(_))));
        assert!(matches!(compile(&good[1..]), Err(SeccompError::Format(_))));
        assert!(matches!(compile(&good.replace("forbidden", "known")), Err(SeccompError::RepeatedFilter(_))));
        let no_filters = r#"{"name":"p","description":"","filters":[]}"#;
        assert!(matches!(compile(no_filters), Err(SeccompError::NoAllowList(_))));
        let open = r#"{"name":"p","description":"","filters":[
            {"name":"f","match":"EPERM","otherwise":"allow","rules":[{"comment":"","names":["bpf"]}]}]}"#;
        assert!(matches!(compile(open), Err(SeccompError::NoAllowList(_))));
        assert!(matches!(refused("[]"), SeccompError::EmptyFilter(_)));
        let elsewhere = r#"[{"comment":"","names":["read"],"arch":["aarch64"]}]"#;
        assert!(matches!(refused(elsewhere), SeccompError::EmptyFilter(_)));
    }
}
