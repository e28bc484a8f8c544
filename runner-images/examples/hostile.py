"""Tries to get out of the sandbox, and says how far it came.

Each attempt runs in a child of its own and is REACHED when it got what it wanted, otherwise denied with the reason.
Two controls run the same way and must succeed, or the denials would prove nothing. Ends with 1 if anything was reached.
"""
import ctypes
import os
import platform
import select
import signal
import socket
import stat
import sys
import time

LIBC = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"
HERE = os.getcwd()
PARENT = os.getppid()
ATTEMPTS, CONTROLS = [], []


class Denied(Exception):
    """Nothing failed, and still nothing was reached."""


def attempt(what):
    return lambda function: ATTEMPTS.append((what, function))


def control(what):
    return lambda function: CONTROLS.append((what, function))


def call(name, *arguments):
    """A libc function or, given (x86-64, arm64) numbers, a system call; raises the errno."""
    ctypes.set_errno(0)
    if isinstance(name, tuple):
        arguments = (ctypes.c_long(name[ARM]),) + tuple(
            ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
        name = "syscall"
    answer = getattr(LIBC, name)(*arguments)
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return "it returned %d" % answer


def connects(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(2)
        connection.connect(address)
        return "connected"


def opens(path, flags):
    os.close(os.open(path, flags))
    return "opened " + path


def first(paths, function):
    """The first path that works, else the most telling failure."""
    failure = None
    for path in paths:
        try:
            return function(path)
        except OSError as error:
            if failure is None or failure.errno == 2:
                failure = error
    raise failure


def creates(path):
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL))
    os.unlink(path)
    return "created " + path


def others():
    """Processes that are neither us, nor our parents, nor the namespace's init."""
    known, pid = {1, os.getpid()}, os.getpid()
    while pid > 1:
        with open("/proc/%d/stat" % pid) as file:
            pid = int(file.read().rsplit(")", 1)[1].split()[1])
        known.add(pid)
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in known]


# ---- controls

@control("write a file in the workspace and read it back")
def _():
    path = os.path.join(HERE, ".hostile-control")
    with open(path, "w") as file:
        file.write("x")
    with open(path) as file:
        assert file.read() == "x"
    os.unlink(path)
    return "it could"


@control("list /usr/lib")
def _():
    return "%d entries" % len(os.listdir("/usr/lib"))


# ---- secrets

@attempt("read the environment of pid 1 and of the parent")
def _():
    def read(path):
        with open(path, "rb") as file:
            data = file.read()
        if not data:
            raise Denied("%s is empty" % path)
        return "%s, %d bytes" % (path, len(data))
    return first(["/proc/1/environ", "/proc/%d/environ" % PARENT], read)


@attempt("find a variable that is not mine in /proc/*/environ")
def _():
    mine, found = set(os.environ), set()
    for pid in [1, PARENT] + others():
        try:
            with open("/proc/%d/environ" % pid, "rb") as file:
                found |= {os.fsdecode(entry.split(b"=")[0]) for entry in file.read().split(b"\0") if entry}
        except OSError:
            pass
    if not found - mine:
        raise Denied("there is none")
    return ", ".join(sorted(found - mine)[:5])


@attempt("read the memory of pid 1")
def _():
    return opens("/proc/1/mem", os.O_RDONLY)


@attempt("read the memory of the parent by process_vm_readv")
def _():
    target = ctypes.create_string_buffer(8)
    local = (ctypes.c_void_p * 2)(ctypes.addressof(target), 8)
    remote = (ctypes.c_void_p * 2)(0x400000, 8)
    try:
        return call((310, 270), PARENT, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    except OSError as error:
        if error.errno == 14:  # EFAULT: let in, only the address was wrong
            return "the parent may be read"
        raise


@attempt("read /etc/shadow")
def _():
    return opens("/etc/shadow", os.O_RDONLY)


@attempt("list /root")
def _():
    # An interpreter that lives below /root brings the way to itself, and nothing else of it.
    entries = set(os.listdir("/root"))
    if sys.base_prefix.startswith("/root/") and entries == {sys.base_prefix.split("/")[2]}:
        raise Denied("only the way to this interpreter")
    return "%d entries" % len(entries)


@attempt("find a folder, file or socket among inherited descriptors")
def _():
    kinds = {stat.S_IFDIR: "folder", stat.S_IFREG: "file", stat.S_IFSOCK: "socket", stat.S_IFBLK: "device"}
    found = []
    for fd in range(3, 4096):
        try:
            kind = kinds.get(stat.S_IFMT(os.fstat(fd).st_mode))
        except OSError:
            continue
        if kind:
            found.append("%d is a %s" % (fd, kind))
    if not found:
        raise Denied("pipes and devices only")
    return ", ".join(found)


@attempt("read the kernel log")
def _():
    return call("klogctl", 3, ctypes.create_string_buffer(64), 64)


# ---- writes

for folder in ("/usr", "/usr/bin", "/etc", "/", "/dev", "/proc/sys/kernel"):
    attempt("create a file in %s" % folder)(lambda folder=folder: creates(os.path.join(folder, ".hostile")))


@attempt("set a kernel parameter in /proc/sys")
def _():
    return first(["/proc/sys/kernel/core_pattern", "/proc/sys/vm/overcommit_memory", "/proc/sys/net/ipv4/ip_forward"],
                 lambda path: opens(path, os.O_WRONLY))


@attempt("open /proc/sysrq-trigger for writing")
def _():
    return opens("/proc/sysrq-trigger", os.O_WRONLY)


@attempt("make a cgroup")
def _():
    os.mkdir("/sys/fs/cgroup/hostile")
    os.rmdir("/sys/fs/cgroup/hostile")
    return "made one"


@attempt("make a file of 64 GiB")
def _():
    path = os.path.join(HERE, ".hostile-big")
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        os.ftruncate(fd, 64 << 30)
        return "%d bytes" % os.fstat(fd).st_size
    finally:
        os.close(fd)
        os.unlink(path)


@attempt("create a device node")
def _():
    path = os.path.join(HERE, ".hostile-device")
    os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(8, 0))
    os.unlink(path)
    return "created one"


@attempt("open the machine's memory or disks")
def _():
    return first(["/dev/mem", "/dev/kmem", "/dev/kmsg", "/dev/sda", "/dev/vda", "/dev/nvme0n1",
                  "/dev/kvm", "/dev/fuse"],
                 lambda path: opens(path, os.O_RDONLY))


# ---- other processes

@attempt("see other processes")
def _():
    found = others()
    if not found:
        raise Denied("only mine and init")
    return "%d of them" % len(found)


@attempt("signal a process that /proc may hide")
def _():
    for pid in range(2, 1 << 15):
        try:
            if pid not in (os.getpid(), os.getppid(), PARENT):
                os.kill(pid, 0)  # tells whether it could, sends nothing
                return "process %d" % pid
        except (ProcessLookupError, PermissionError):
            pass
    raise Denied("there is none")


@attempt("kill pid 1")
def _():
    os.kill(1, signal.SIGKILL)
    time.sleep(0.1)
    os.kill(1, 0)  # had it died, so had we
    raise Denied("it ignores us")


@attempt("trace the parent")
def _():
    return call("ptrace", 0x4206, PARENT, None, None)  # PTRACE_SEIZE stops nothing


# ---- privilege and namespaces

@attempt("become root")
def _():
    if os.getuid() == 0:
        return "am root"
    os.setuid(0)
    return "am root now"


@attempt("hold a capability")
def _():
    with open("/proc/self/status") as file:
        sets = [line.split() for line in file if line.startswith(("CapPrm", "CapEff", "CapAmb", "CapBnd"))]
    held = ["%s %s" % (name, value) for name, value in sets if int(value, 16)]
    if not held:
        raise Denied("all sets are empty")
    return ", ".join(held)


@attempt("enter a new user namespace")
def _():
    return call("unshare", 0x10000000)


@attempt("enter a new mount namespace")
def _():
    return call("unshare", 0x00020000)


@attempt("clone into a new user namespace")
def _():
    pid = LIBC.syscall(ctypes.c_long((56, 220)[ARM]), ctypes.c_long(0x10000000 | signal.SIGCHLD), None, None, None, None)
    if pid == 0:
        os._exit(0)
    if pid < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.waitpid(pid, 0)
    return "a child was in one"


@attempt("join a namespace of pid 1")
def _():
    fd = os.open("/proc/1/ns/mnt", os.O_RDONLY)
    return call("setns", fd, 0)


@attempt("mount a file system")
def _():
    return call("mount", b"none", b"/tmp", b"tmpfs", 0, None)


@attempt("change the root folder")
def _():
    os.chroot(HERE)
    return "changed"


@attempt("open a file by handle")
def _():
    handle = (ctypes.c_uint * 4)(8, 1, 2, 0)
    return call("open_by_handle_at", os.open("/", os.O_RDONLY), ctypes.byref(handle), os.O_RDONLY)


# ---- rarely used doors into the kernel

@attempt("use a kernel keyring")
def _():
    return call((250, 219), 0, -3, 1)  # keyctl(KEYCTL_GET_KEYRING_ID, session, create)


@attempt("make a BPF map")
def _():
    return call((321, 280), 0, ctypes.byref((ctypes.c_uint * 18)(2, 4, 4, 1)), 72)


@attempt("set up an io_uring")
def _():
    return call((425, 425), 1, ctypes.create_string_buffer(120))


@attempt("watch performance events")
def _():
    attributes = (ctypes.c_uint * 28)(1, 112)
    return call((298, 241), ctypes.byref(attributes), 0, -1, -1, 0)


@attempt("handle page faults in user space")
def _():
    return call((323, 282), 1)


@attempt("load a kernel module")
def _():
    return call((175, 105), ctypes.create_string_buffer(8), 8, b"")


# ---- the network

for _what, _family, _kind, _protocol in (
        ("raw", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        ("packet", getattr(socket, "AF_PACKET", 17), socket.SOCK_RAW, 0),
        ("vsock", 40, socket.SOCK_STREAM, 0),
        ("kernel crypto", 38, socket.SOCK_SEQPACKET, 0)):
    attempt("open a %s socket" % _what)(lambda f=_family, k=_kind, p=_protocol: str(socket.socket(f, k, p)))

for _what, _address in (("the internet", ("1.1.1.1", 80)), ("the cloud's metadata service", ("169.254.169.254", 80)),
                        ("the agent's port", ("127.0.0.1", 8080))):
    attempt("connect to %s, %s:%d" % ((_what,) + _address))(lambda a=_address: connects(socket.AF_INET, a))


@attempt("resolve a name")
def _():
    return socket.getaddrinfo("example.com", 80)[0][4][0]


@attempt("connect to a container runtime")
def _():
    return first(["/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/podman/podman.sock",
                  "/run/crio/crio.sock", "/run/dbus/system_bus_socket"],
                 lambda path: connects(socket.AF_UNIX, path))


# ---- staying

SURVIVOR = os.path.join(HERE, ".hostile-survivor")


@attempt("outlive the execution before this one")
def _():
    if not os.path.exists(SURVIVOR):
        raise Denied("no trace of an earlier daemon")
    os.unlink(SURVIVOR)
    return "its daemon wrote " + SURVIVOR


def start_daemon():
    """Forks twice, leaves the session and leaves a file if it is alive 3 seconds later: it should not be."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, 4096)
    time.sleep(3)
    open(SURVIVOR, "w").close()
    os._exit(0)


# ---- the judge

def run(function):
    """Runs one attempt in a child: (reached, reason)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            answer = "+" + str(function())
        except Denied as reason:
            answer = "-%s" % reason
        except OSError as error:
            answer = "-%s" % (error.strerror or error)
        except BaseException as error:
            answer = "?%s: %s" % (type(error).__name__, error)
        os.write(writer, answer[:500].encode("utf-8", "replace"))
        os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], 10)
    answer = os.read(reader, 4096).decode() if ready else ""
    os.close(reader)
    if not answer and not ready:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if answer:
        if answer[0] == "?":
            raise RuntimeError("the attempt itself is broken, " + answer[1:])
        return answer[0] == "+", answer[1:]
    if not ready:
        return False, "no answer in 10 s"
    return False, "killed by signal %d" % (status & 0x7f)


def handler(event):
    for what, function in CONTROLS:
        works, reason = run(function)
        print("%-8s %s: %s" % ("works" if works else "BROKEN", what, reason))
        if not works:
            sys.exit("a control failed: what follows would prove nothing")
    reached = []
    for what, function in ATTEMPTS:
        success, reason = run(function)
        print("%-8s %s: %s" % ("REACHED" if success else "denied", what, reason))
        if success:
            reached.append(what)
    start_daemon()
    print("left a daemon behind; it should die with this execution (the next run tells)")
    summary = {"attempts": len(ATTEMPTS), "denied": len(ATTEMPTS) - len(reached), "reached": reached}
    if reached:
        print(summary)
        sys.exit(1)
    return summary
