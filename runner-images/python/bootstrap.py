"""Runs one Python program inside the sandbox. ../CONTRACT.md says what passes between it and the agent.

Compiled anew at each start, so: small, and what most programs don't need is imported where it is needed.
"""
import _json
import os
import sys
import time
from io import FileIO, TextIOWrapper

HERE = sys._getframe().f_code.co_filename
STDLIB = os.path.dirname(os.__file__)
MAX_DEPTH = 500
LIMITS = {b"H": 1 << 20, b"C": 1 << 20, b"E": 16 << 20, b"G": 0}
PID = os.getpid()
HOOK = sys.excepthook  # some images bring one; only the program's own is honoured
PATH = []  # sys.path without the workspace
reserve = bytes(4 << 20)  # untouched, so it costs nothing; given back when memory has run out, so that this can still be told
result, identity = -1, None
streams = {}


# ---- descriptors

def write_all(fd, data):
    data = memoryview(data)
    while data:
        try:
            data = data[os.write(fd, data):]
        except BlockingIOError:  # a child process made the shared pipe non-blocking
            os.set_blocking(fd, True)


class Whole(FileIO):
    """An unbuffered stream that never writes only a part (a signal or a non-blocking pipe cut raw writes short)."""

    def write(self, data):
        done = FileIO.write(self, data)
        if type(data) is bytes and done == len(data):
            return done
        rest = memoryview(data).cast("B")
        write_all(self.fileno(), rest[done or 0:])
        return len(rest)


def keep_result(fd):
    """Moves the result descriptor up, out of the reach of os.closerange(3, 256)."""
    global result, identity
    result = fd
    for number in (1000, 500, 250, 60):
        try:
            os.fstat(number)  # taken
        except OSError:
            try:
                result = os.dup2(fd, number, inheritable=False)
            except OSError:  # above the limit
                continue
            os.close(fd)
            break
    stat = os.fstat(result)
    identity = stat.st_dev, stat.st_ino
    os.register_at_fork(after_in_child=drop_result)


def result_is_ours():
    try:
        stat = os.fstat(result)
    except OSError:
        return False
    return (stat.st_dev, stat.st_ino) == identity


def drop_result():
    if result_is_ours():
        os.close(result)


def send(kind, payload):
    if os.getpid() == PID and result_is_ours():
        try:
            write_all(result, kind + len(payload).to_bytes(4, "big") + payload)
        except OSError:
            pass  # the agent went away


def set_streams():
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            continue
        raw = Whole(fd, "w", closefd=False)
        raw.name = "<%s>" % name
        stream = TextIOWrapper(raw, stream.encoding, "backslashreplace", newline="\n", write_through=True)
        stream.mode = "w"
        streams[name] = stream
        setattr(sys, name, stream)
        setattr(sys, "__%s__" % name, stream)


def flush():
    for name in ("stdout", "stderr"):
        for stream in (getattr(sys, name, None), streams.get(name), None):
            try:
                if stream is not None and not getattr(stream, "closed", False):
                    stream.flush()
                setattr(sys, name, stream)
                break
            except BaseException:  # the interpreter would end with 120: the next one takes its place
                pass


def stdlib(name):
    """Imports one of Python's own modules, whatever the workspace holds under the same name."""
    path = sys.path[:]
    sys.path[:] = PATH
    try:
        return __import__(name)
    finally:
        sys.path[:] = path


# ---- JSON: with the C half of the json package only; the package itself costs as much as all the rest here

def load(text):
    class Rules:
        strict = True
        object_hook = object_pairs_hook = None
        parse_float = parse_constant = float
        parse_int = int
        memo = {}

    text = text.strip(" \t\r\n")
    try:
        value, end = _json.make_scanner(Rules)(text, 0)
    except (StopIteration, SystemError, ValueError):
        end = -1
    return value if end == len(text) else stdlib("json").loads(text)  # which says what is wrong, and where


def refuse(value):
    raise TypeError("not JSON")


def dump(value):
    encoder = _json.make_encoder({}, refuse, _json.encode_basestring, None, ":", ",", False, False, False)
    text = "".join(encoder(value, 0))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def too_deep(value):
    level, kinds = [value], (dict, list, tuple)
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, kinds)
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return False
    return any(isinstance(value, kinds) for value in level)


def encode(value, limit):
    """The return value as strict JSON, or an error that says what is wrong and where."""
    data = None
    try:
        data = dump(value)
        if data.count(b"[") + data.count(b"{") > MAX_DEPTH and too_deep(value):
            data = None
    except MemoryError:
        raise
    except Exception:
        pass  # told again below, with the place
    if data is None:
        data = dump(plain(value, [], set()))
    if len(data) > limit:
        raise ValueError("return value is %d bytes of JSON, more than the limit of %d" % (len(data), limit))
    return data


def place(path):
    steps = []
    for step in path:
        if type(step) is int:
            steps.append("[%d]" % step)
        elif step.isidentifier():
            steps.append("." + shorten(step, 80))
        else:
            steps.append("[%s]" % dump(shorten(step, 80)).decode())
    text = "".join(steps)
    return "$" + (text if len(text) <= 400 else text[:200] + "..." + text[-200:])


def plain(value, path, above):
    """A copy made of Python's own JSON types only."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return whole(value, path)
    if isinstance(value, float):
        value = float.__pos__(value)
        return value if value - value == 0 else None
    if not isinstance(value, (dict, list, tuple)):
        raise TypeError("return value is not JSON: %s at %s" % (type(value).__qualname__, place(path)))
    if id(value) in above:
        raise ValueError("return value is not JSON: circular reference at %s" % place(path))
    if len(path) >= MAX_DEPTH:
        raise ValueError("return value is nested deeper than %d levels at %s" % (MAX_DEPTH, place(path)))
    above.add(id(value))
    path.append(0)
    if isinstance(value, dict):
        copy = {}
        for key, inner in value.items():
            name = key_name(key, path)
            path[-1] = name
            copy[name] = plain(inner, path, above)
    else:
        copy = []
        for path[-1], inner in enumerate(value):
            copy.append(plain(inner, path, above))
    path.pop()
    above.remove(id(value))
    return copy


def whole(value, path):
    value = int.__add__(value, 0)
    try:
        int.__repr__(value)
    except ValueError:
        raise ValueError("return value is not JSON: int with too many digits at %s" % place(path)) from None
    return value


def key_name(key, path):
    if isinstance(key, str):
        return str.__str__(key)
    if key is None or key is True or key is False:
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, int):
        return int.__repr__(whole(key, path[:-1]))
    if isinstance(key, float):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(float.__repr__(key), float.__repr__(key))
    raise TypeError("return value is not JSON: key of type %s at %s" % (type(key).__qualname__, place(path[:-1])))


# ---- the program

class Program:
    """The user's source, and the module that it becomes."""

    def __init__(self, header, data):
        self.text = data.decode("utf-8")
        if self.text.startswith("\ufeff"):
            self.text = self.text[1:]
        folder = header.get("code_dir") or ""
        self.file = os.path.join(folder, "main.py")
        if folder:
            try:
                try:
                    os.mkdir(folder, 0o700)
                except FileExistsError:
                    pass
                fd = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
                write_all(fd, data)
                os.close(fd)
            except OSError:
                pass  # only spawned children need it
        cwd = os.getcwd()
        if sys.flags.isolated or getattr(sys.flags, "safe_path", False):
            sys.path.insert(0, cwd)
        else:
            sys.path[0] = cwd
        PATH[:] = sys.path[1:]
        if folder:
            # At the end, unless the workspace has a `main` of its own, which spawned children would import instead.
            ahead = os.path.exists("main.py") or os.path.isdir("main")
            sys.path.insert(0 if ahead else len(sys.path), folder)
        sys.argv = ["main.py"] + list(header.get("argv") or ())
        self.mode = header.get("mode", "auto")
        self.line, self.function = 1, "<module>"  # shown when an error has no place of its own

    def lines(self):
        lines = self.text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return [line + "\n" for line in (lines if lines[-1] else lines[:-1])]

    def compile(self):
        try:
            tree = self.text
            if self.mode == "auto":
                self.mode = "script"
                if "handler" in self.text:
                    tree = compile(self.text, "main.py", "exec", 0x400, True)  # PyCF_ONLY_AST
                    if any(map(binds_handler, tree.body)):
                        self.mode = "handler"
            return compile(tree, "main.py", "exec", 0, True)
        except SyntaxError as error:
            lines = self.lines()  # Python may have looked into another main.py, the one in the workspace
            if error.filename == "main.py" and 0 < (error.lineno or 0) <= len(lines):
                error.text = lines[error.lineno - 1]
            raise

    def module(self):
        text = self.text
        external = sys.modules["_frozen_importlib_external"]

        class Loader(external.SourceFileLoader):
            def get_filename(self, name=None):
                return self.path

            def get_source(self, name=None):
                return text

        name = "main" if self.mode == "handler" else "__main__"
        module = type(sys)(name)
        loader = Loader("__main__", self.file)
        module.__dict__.update(__file__=self.file, __loader__=loader, __cached__=None,
                               __builtins__=sys.modules["builtins"])
        if self.mode == "handler":
            # A spawned child leaves a `__main__` of that name alone and finds our functions by `import main`.
            module.__spec__ = type(os.__spec__)("__main__", loader, origin=self.file)
            module.__package__ = ""
            sys.modules["main"] = module
        sys.modules["__main__"] = module
        return module

    def prime(self, linecache):
        lines = self.lines()
        linecache.cache["main.py"] = len(self.text), None, lines, "main.py"

    def find_spec(self, name, path=None, target=None):
        """A finder that only waits for someone to import linecache, to put our source there."""
        if name != "linecache":
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        try:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                self.prime(module)

            spec.loader.exec_module = exec_module
        except AttributeError:
            pass
        return spec

    def run(self, header, event):
        code = self.compile()
        if self.mode == "handler":
            try:
                event = load(event.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                problem = "nested too deep" if isinstance(error, RecursionError) else error
                raise ValueError("the event can't be loaded: %s" % problem) from None
        if "linecache" in sys.modules:
            self.prime(sys.modules["linecache"])
        else:
            sys.meta_path.insert(0, self)
        module = self.module()
        exec(code, module.__dict__)
        if self.mode != "handler":
            return None
        self.line = self.text.rstrip().replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1
        try:
            handler = module.__dict__["handler"]
        except KeyError:
            handler = None
        if handler is None:
            raise AttributeError("main.py defines no 'handler': write `def handler(event)` or `def handler(event, context)`")
        if not callable(handler):
            raise TypeError("'handler' in main.py is not callable, it is of type %s" % type(handler).__qualname__)
        code = getattr(handler, "__code__", None)
        if code is not None and code.co_filename == "main.py":
            self.line, self.function = code.co_firstlineno, code.co_name
        value = handler(event, Context(header)) if takes_context(handler) else handler(event)
        if hasattr(type(value), "__await__"):
            value = await_value(value)
        return encode(value, header["max_return_bytes"])


def binds_handler(node):
    """Whether a top-level statement can define `handler`."""
    kind = type(node).__name__
    if kind in ("FunctionDef", "AsyncFunctionDef", "ClassDef"):
        return node.name == "handler"
    if kind in ("Import", "ImportFrom"):
        return any((alias.asname or alias.name.split(".")[0]) == "handler" for alias in node.names)
    if kind == "Name":
        return node.id == "handler" and type(node.ctx).__name__ == "Store"
    if kind == "AnnAssign" and node.value is None:
        return False
    if kind == "If":
        test = node.test
        sides = [getattr(side, "id", getattr(side, "value", None))
                 for side in [getattr(test, "left", None)] + getattr(test, "comparators", [])]
        if sorted(map(str, sides)) == ["__main__", "__name__"] and type(test.ops[0]).__name__ == "Eq":
            return any(map(binds_handler, node.orelse))
    if kind == "Starred":
        return binds_handler(node.value)
    for field in ("body", "orelse", "finalbody", "handlers", "cases", "items", "optional_vars", "targets", "target", "elts"):
        inner = getattr(node, field, None)
        if inner is not None and any(map(binds_handler, inner if isinstance(inner, list) else [inner])):
            return True
    return False


def takes_context(handler):
    bound, function = 0, handler
    if hasattr(function, "__func__"):
        bound, function = 1, function.__func__
    code = getattr(function, "__code__", None)
    if code is not None:
        if not code.co_flags & 4:  # no *args
            return code.co_argcount - bound >= 2
        if not hasattr(function, "__wrapped__"):
            return True
    try:
        kinds = [parameter.kind for parameter in stdlib("inspect").signature(handler).parameters.values()]
    except (TypeError, ValueError):
        return False
    return 2 in kinds or kinds.count(0) + kinds.count(1) >= 2


def await_value(value):
    async def wait():
        return await value

    return stdlib("asyncio").run(value if type(value).__name__ == "coroutine" else wait())


class Context:
    """The second argument of a handler."""

    def __init__(self, header):
        self.execution_id = header.get("execution_id")
        self.session_id = header.get("session_id")
        self.timeout_ms = header.get("timeout_ms")
        self.deadline = header["started"] + (self.timeout_ms or 0) / 1000

    def remaining_ms(self):
        return max(0, int((self.deadline - time.time()) * 1000))

    def __repr__(self):
        return "Context(execution_id=%r, session_id=%r, timeout_ms=%r)" % (
            self.execution_id, self.session_id, self.timeout_ms)


# ---- when it fails

def shorten(text, length):
    return text if len(text) <= length else text[:length - 3] + "..."


def type_name(kind):
    if kind.__module__ in ("builtins", "__main__"):
        return kind.__qualname__
    return "%s.%s" % (kind.__module__, kind.__qualname__)


def message_of(error):
    try:
        return str(error)
    except BaseException:
        return "<exception str() failed>"


def traceback_of(error):
    return BaseException.__traceback__.__get__(error)  # a subclass may hide it


def visible(frames):
    """Without our frames, and without asyncio's and importlib's before the program's first."""
    frames = [frame for frame in frames if frame.filename != HERE]
    for index, frame in enumerate(frames):
        if not frame.filename.startswith((STDLIB + "/asyncio/", "<frozen importlib")):
            return frames[index:]
    return frames


def describe(error, program):
    """The traceback as Python prints it, and the frames of the error itself."""
    traceback = stdlib("traceback")
    if program:
        program.prime(stdlib("linecache"))
    top = traceback.TracebackException(type(error), error, traceback_of(error))
    todo = [top]
    while todo:
        one = todo.pop()
        if one.stack:
            one.stack[:] = visible(one.stack)
        todo += [other for other in [one.__cause__, one.__context__] + list(getattr(one, "exceptions", None) or ())
                 if other is not None]
    if issubclass(type(error), SyntaxError) and error.filename == "main.py":
        frames = [(error.filename, error.lineno, "<module>", (error.text or "").strip())]
    else:
        if not top.stack and program:
            top.stack.append(traceback.FrameSummary("main.py", program.line, program.function))
        frames = [(frame.filename, frame.lineno, frame.name, frame.line) for frame in top.stack]
    return "".join(top.format()), frames


def describe_plainly(error):
    """The same with next to nothing: out of memory, or a hostile exception."""
    frames, step = [], traceback_of(error)
    while step is not None:
        code = step.tb_frame.f_code
        if code.co_filename != HERE:
            frames.append((code.co_filename, step.tb_lineno, code.co_name, ""))
        step = step.tb_next
    frames = frames[-50:]
    lines = ["Traceback (most recent call last):"]
    lines += ['  File "%s", line %d, in %s' % frame[:3] for frame in frames]
    message = message_of(error)
    lines.append(type(error).__name__ + (": " + message if message else ""))
    return "\n".join(lines) + "\n", frames


def diagnostic(error, frames):
    stack = [{"file": shorten(str(file), 300), "line": line, "function": shorten(str(name), 200),
              "source": shorten(source or "", 300)} for file, line, name, source in frames]
    stack = stack[:10] + stack[10:][-40:]
    try:
        kind = type_name(type(error))
    except BaseException:
        kind = type(error).__name__
    while True:
        data = dump({"type": shorten(kind, 200), "message": shorten(message_of(error), 4096), "stack": stack})
        if len(data) <= 1 << 16:
            return data
        del stack[len(stack) // 2]


def told_by_hook(error):
    """Whether an excepthook that the program has set took care of the error."""
    hook = getattr(sys, "excepthook", HOOK)
    if hook in (HOOK, sys.__excepthook__):
        return False
    step = traceback_of(error)
    while step is not None and step.tb_frame.f_code.co_filename == HERE:
        step = step.tb_next
    try:
        hook(type(error), error, step)
    except BaseException:
        return False
    return True


def report(error, program):
    global reserve
    reserve = None
    if sys.getrecursionlimit() < 2000:
        sys.setrecursionlimit(2000)
    if issubclass(type(error), MemoryError):
        step = traceback_of(error)
        while step is not None:
            try:
                step.tb_frame.clear()  # what its locals held is free again
            except RuntimeError:
                pass
            step = step.tb_next
    try:
        text, frames = describe(error, program)
        data = text.encode("utf-8", "backslashreplace")
    except BaseException:
        text, frames = describe_plainly(error)
        data = text.encode("utf-8", "backslashreplace")
    flush()
    try:
        if not told_by_hook(error):
            write_all(2, data)
    except OSError:
        pass
    try:
        send(b"D", diagnostic(error, frames))
    except BaseException:
        send(b"D", b'{"type":"MemoryError","message":"","stack":[]}')


def exit_code(stop):
    """What Python makes of sys.exit(code)."""
    code = SystemExit.code.__get__(stop)
    if code is None:
        return 0
    if issubclass(type(code), int):
        code = int.__add__(code, 0)
        return code & 0xff if -1 << 63 <= code < 1 << 63 else 255
    flush()
    try:
        write_all(2, (message_of(code) + "\n").encode("utf-8", "backslashreplace"))
    except OSError:
        pass
    return 1


def rehearse():
    """Touches what a run needs, while there is nothing to do: the pages are in memory when the request comes."""
    code = compile("def handler(event):\n    return event\n", "main.py", "exec", 0, True)
    module = type(sys)("main")
    exec(code, module.__dict__)
    takes_context(module.handler)
    encode(load('{"a": [1, 2.5, "b", null, true]}'), 1 << 20)
    place(["a", 1])
    os.path.exists(os.path.join(os.getcwd(), "main.py"))
    time.time()


def main():
    os.set_inheritable(3, False)
    os.set_inheritable(4, False)
    keep_result(4)
    set_streams()
    frames = {}
    os.set_blocking(3, False)
    with open(3, "rb", 1 << 16) as request:
        parked = not request.peek(1)
        os.set_blocking(3, True)
        if parked:
            rehearse()
        while b"G" not in frames:
            head = request.read(5)
            kind, size = head[:1], int.from_bytes(head[1:], "big")
            if len(head) == 5 and size > LIMITS.get(kind, -1):
                write_all(2, b"bootstrap: the request is not of this protocol\n")
                os._exit(70)
            frames[kind] = request.read(size) if size else b""
            if len(head) < 5 or len(frames[kind]) < size:
                os._exit(0)  # the agent went away
    started = time.time()
    code, program, failure = 0, None, None
    try:
        header = load(frames[b"H"].decode())
        header["started"] = started
        program = Program(header, frames[b"C"])
        data = program.run(header, frames.pop(b"E", b"{}"))
        if data is not None:
            send(b"R", data)
        data = None
    except SystemExit as stop:
        code = exit_code(stop)
    except BaseException as error:
        code, failure = 130 if issubclass(type(error), KeyboardInterrupt) else 1, error
    if failure is not None:
        report(failure, program)
        failure = None
    flush()
    if os.getpid() != PID:  # a forked child came back from the handler
        os._exit(code)
    send(b"X", b"%d" % code)
    raise SystemExit(code)


main()
