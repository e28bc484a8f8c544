"""Starts bootstrap.py with plain pipes, as the agent does but without a sandbox, and checks ../CONTRACT.md.

    python3 runner-images/python/test_bootstrap.py            the interpreters found here
    BOOTSTRAP_PYTHONS=/path/a:/path/b python3 ...             these
"""
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest

BOOTSTRAP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bootstrap.py")
FOUND = ["/usr/bin/python3", "/root/.pyenv/versions/3.11.7/bin/python3"]
PYTHONS = [path for path in os.environ.get("BOOTSTRAP_PYTHONS", ":".join(FOUND)).split(":") if os.path.exists(path)]


def frame(kind, payload=b""):
    return kind + len(payload).to_bytes(4, "big") + payload


class Run:
    """One program, run to its end: exit code, stdout, stderr, frames."""

    def __init__(self, python, code, event=None, mode="handler", argv=(), limit=1 << 20, raw_event=None,
                 request=None, files=None, slow=False, env=None, hold_stdout=True, parked=0):
        self.folder = tempfile.mkdtemp()
        cwd = os.path.join(self.folder, "workspace")
        os.mkdir(cwd)
        for name, text in (files or {}).items():
            with open(os.path.join(cwd, name), "w") as file:
                file.write(textwrap.dedent(text))
        header = {"version": 1, "mode": mode, "execution_id": "exec_1", "session_id": "sess_1", "timeout_ms": 10000,
                  "argv": list(argv), "max_return_bytes": limit, "code_dir": os.path.join(self.folder, "code")}
        if isinstance(code, str):
            code = textwrap.dedent(code).encode("utf-8")
        if request is None:
            raw_event = raw_event if raw_event is not None else json.dumps({} if event is None else event).encode()
            request = (frame(b"H", json.dumps(header).encode()) + frame(b"C", code) + frame(b"E", raw_event)
                       + frame(b"G"))
        theirs, ours = os.pipe()
        result, their_result = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in (theirs, their_result)]
        os.close(theirs)
        os.close(their_result)

        def descriptors():
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        process = subprocess.Popen([python, "-u", "-B", BOOTSTRAP], cwd=cwd, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=descriptors,
                                   pass_fds=(3, 4), env=dict(os.environ, **(env or {})))
        for fd in high:
            os.close(fd)
        parts = {}

        def read(name, stream):
            chunks = []
            while True:
                if slow:
                    time.sleep(0.0002)
                chunk = os.read(stream, 60000)
                if not chunk:
                    break
                chunks.append(chunk)
            parts[name] = b"".join(chunks)

        if not hold_stdout:
            process.stdout.close()
        readers = [threading.Thread(target=read, args=(name, fd)) for name, fd in (
            [("stdout", process.stdout.fileno())] if hold_stdout else []) + [
            ("stderr", process.stderr.fileno()), ("result", result)]]
        for reader in readers:
            reader.start()
        time.sleep(parked)
        try:
            with open(ours, "wb", 0) as file:
                while request:
                    request = request[file.write(request):]
        except BrokenPipeError:
            pass
        for reader in readers:
            reader.join(60)
        self.exit = process.wait(60)
        os.close(result)
        for stream in (process.stdout, process.stderr):
            stream.close()
        self.out = parts.get("stdout")
        self.err = parts["stderr"].decode("utf-8", "replace")
        self.frames, data = [], parts["result"]
        while len(data) >= 5:
            size = int.from_bytes(data[1:5], "big")
            self.frames.append((data[:1].decode("latin-1"), data[5:5 + size]))
            data = data[5 + size:]
        self.kinds = "".join(kind for kind, _ in self.frames)
        frames = dict(self.frames)
        self.raw = frames.get("R")
        self.value = json.loads(self.raw.decode("utf-8"), parse_constant=None) if "R" in frames else None
        self.diagnostic = json.loads(frames["D"].decode("utf-8")) if "D" in frames else None
        self.code = int(frames["X"]) if "X" in frames else None
        shutil.rmtree(self.folder, ignore_errors=True)


class Programs:
    python = None

    def run_code(self, code, *args, **named):
        return Run(self.python, code, *args, **named)

    def returns(self, code, value, *args, **named):
        run = self.run_code(code, *args, **named)
        self.assertEqual((run.err, run.exit, run.kinds, run.code), ("", 0, "RX", 0))
        self.assertEqual(run.value, value)
        return run

    def fails(self, code, last_line, *args, **named):
        exit_code = named.pop("exit_code", 1)
        run = self.run_code(code, *args, **named)
        self.assertEqual((run.exit, run.code, run.kinds), (exit_code, exit_code, "DX"), run.err[-2000:])
        self.assertEqual(run.err.rstrip("\n").split("\n")[-1], last_line)
        self.assertNotIn("bootstrap", run.err)
        return run

    # -- values

    def test_value_and_event(self):
        self.returns("def handler(event):\n    return {'got': event['a'], 'x': [1, 2.5, None, True, 'é']}",
                     {"got": [1, {"b": None}], "x": [1, 2.5, None, True, "é"]}, {"a": [1, {"b": None}]})

    def test_every_scalar(self):
        for text, value in (("None", None), ("True", True), ("-7", -7), ("1e300", 1e300), ("''", ""), ("[]", []), ("{}", {})):
            self.returns("def handler(event): return " + text, value)

    def test_text_is_not_escaped(self):
        self.assertEqual(self.returns("def handler(e): return 'é\\n\"\\\\\\x00😀'", 'é\n"\\\x00😀').raw,
                         '"é\\n\\"\\\\\\u0000😀"'.encode())

    def test_not_a_number_is_null(self):
        self.returns("""
            class F(float): pass
            def handler(e):
                i = float('inf')
                return [float('nan'), i, -i, {'a': F('nan')}, F(1.5), -0.0, (1, F('inf'))]
            """, [None, None, None, {"a": None}, 1.5, -0.0, [1, None]])

    def test_lone_surrogates(self):
        run = self.returns(r"def handler(e): return ['a\ud800b', {'\udc00': 1}, '\ud83d\ude00', float('nan')]",
                           ["a\ufffdb", {"\ufffd": 1}, "\U0001f600", None])
        run.raw.decode("utf-8")
        self.returns("def handler(e): return e['x']", "\ufffd", raw_event=b'{"x":"\\ud800"}')

    def test_keys(self):
        self.returns("def handler(e): return {1: 'a', None: 'b', False: 'c', 2.5: 'd', 's': 'e'}",
                     {"1": "a", "null": "b", "false": "c", "2.5": "d", "s": "e"})
        self.returns("def handler(e): return {1: 'a', None: 'b', True: 'c', 2.5: float('nan'), float('nan'): 1}",
                     {"1": "c", "null": "b", "2.5": None, "NaN": 1})

    def test_subclasses(self):
        self.returns("""
            import collections, enum
            class E(enum.IntEnum): A = 3
            class S(str, enum.Enum): B = 'b'
            class T(str): pass
            P = collections.namedtuple('P', 'x y')
            def handler(e):
                d = collections.OrderedDict(z=1); d.update(collections.Counter('aa'))
                return [E.A, S.B, T('t'), P(1, 2), d, collections.defaultdict(list, k=[float('nan'), E.A, S.B, T('u')]), {E.A: S.B}]
            """, [3, "b", "t", [1, 2], {"z": 1, "a": 2}, {"k": [None, 3, "b", "u"]}, {"3": "b"}])

    def test_what_is_not_json_is_named_with_its_place(self):
        self.fails("""
            import datetime
            def handler(e):
                return {'items': [1, 2, 3, {'when': datetime.datetime(2020, 1, 1)}]}
            """, "TypeError: return value is not JSON: datetime at $.items[3].when")
        self.fails("def handler(e): return {'a b': {'c': {1}}}", 'TypeError: return value is not JSON: set at $["a b"].c')
        self.fails("def handler(e): return {'a': {(1, 2): 3}}", "TypeError: return value is not JSON: key of type tuple at $.a")
        self.fails("def handler(e): return b'x'", "TypeError: return value is not JSON: bytes at $")
        self.fails("def handler(e): yield 1", "TypeError: return value is not JSON: generator at $")

    def test_failing_value_points_at_the_handler(self):
        run = self.fails("x = 1\ndef handler(e):\n    return {1}\n", "TypeError: return value is not JSON: set at $")
        self.assertIn('  File "main.py", line 2, in handler\n    def handler(e):\n', run.err)
        self.assertEqual(run.diagnostic["stack"], [{"file": "main.py", "line": 2, "function": "handler", "source": "def handler(e):"}])

    def test_circles(self):
        self.fails("def handler(e):\n    a = {'b': []}\n    a['b'].append(a)\n    return [a]",
                   "ValueError: return value is not JSON: circular reference at $[0].b[0]")
        self.returns("def handler(e):\n    a = [1]\n    return [a, a, {'x': a}]", [[1], [1], {"x": [1]}])

    def test_depth(self):
        nest = "def handler(e):\n    v = %s\n    for _ in range(%d): v = [v]\n    return v"
        value = 1
        for _ in range(500):
            value = [value]
        self.assertEqual(self.run_code(nest % ("1", 500)).raw, json.dumps(value).encode())
        self.assertEqual(self.run_code(nest % ("float('nan')", 500)).kinds, "RX")
        for depth in (501, 900, 100000):
            run = self.run_code(nest % ("1", depth))
            self.assertEqual((run.exit, run.kinds), (1, "DX"))
            self.assertIn("ValueError: return value is nested deeper than 500 levels at $[0][0]", run.err)
        self.assertEqual(self.run_code("def handler(e): return [[[i]] for i in range(5000)]").kinds, "RX")
        run = self.run_code("def handler(e):\n    v = 1\n    for _ in range(700): v = {'k': v}\n    return v")
        self.assertIn("nested deeper than 500", run.err)

    def test_endless_integers(self):
        run = self.run_code("def handler(e): return {'n': [10 ** 5000]}")
        if run.kinds == "DX":  # Pythons without the limit print it
            self.assertIn("ValueError: return value is not JSON: int with too many digits at $.n[0]", run.err)

    def test_size(self):
        self.returns("def handler(e): return 'x' * 98", "x" * 98, limit=100)
        self.fails("def handler(e): return 'x' * 99", "ValueError: return value is 101 bytes of JSON, more than the limit of 100",
                   limit=100)
        self.assertEqual(len(self.run_code("def handler(e): return 'é' * 5000000", limit=16 << 20).raw), 10000002)

    def test_hostile_subclasses(self):
        for body in ("class H(dict):\n    def items(self): raise KeyError('mine')",
                     "class H(dict):\n    def items(self): return 7",
                     "class H(dict):\n    def items(self): return [1, 2]",
                     "class H(list):\n    def __iter__(self): raise KeyError('mine')\n    def __len__(self): return 5",
                     "class H(dict):\n    __class__ = property(lambda s: 1 / 0)",
                     "class H:\n    __class__ = dict",
                     "class H:\n    def __getattribute__(self, n): raise RuntimeError(n)"):
            run = self.run_code(body + "\ndef handler(e): return [H(), {'a': H()}, float('nan')]\n")
            self.assertIn(run.kinds, ("DX", "RX"), body)
            self.assertNotIn("bootstrap", run.err)
            self.assertEqual(run.exit, 1 if run.kinds == "DX" else 0, run.err)
        run = self.fails("class H(dict):\n    def items(self):\n        raise KeyError('mine')\ndef handler(e):\n    x = H()\n    x[1] = 2\n    return x",
                         "KeyError: 'mine'")
        self.assertIn('  File "main.py", line 3, in items\n    raise KeyError(\'mine\')\n', run.err)

    # -- events

    def test_events(self):
        self.returns("def handler(e): return e", [1, "é", {"b": [0.5, True]}], [1, "é", {"b": [0.5, True]}])
        self.returns("def handler(e): return e", 3, raw_event=b" 3\n")
        big = {"k": "y" * (15 << 20)}
        self.assertEqual(self.run_code("def handler(e): return len(e['k'])", big).value, 15 << 20)

    def test_events_that_cannot_be_loaded(self):
        deep = b"[" * 200000 + b"]" * 200000
        self.fails("def handler(e): return 1", "ValueError: the event can't be loaded: nested too deep", raw_event=deep)
        for raw in (b"{", b"", b"[1,]", b"1 2", b"\xff", b"nul"):
            run = self.run_code("def handler(e): return 1", raw_event=raw)
            self.assertEqual((run.exit, run.kinds), (1, "DX"), raw)
            self.assertIn("ValueError: the event can't be loaded", run.err)

    # -- handlers

    def test_signatures(self):
        for code in ("def handler(event, context): return context.execution_id",
                     "def handler(event, context=None): return context.execution_id",
                     "def handler(*args): return args[1].execution_id",
                     "class C:\n    def m(self, e, c): return c.execution_id\nhandler = C().m",
                     "class C:\n    def __call__(self, e, c): return c.execution_id\nhandler = C()",
                     "import functools\ndef f(x, e, c): return c.execution_id\nhandler = functools.partial(f, 1)",
                     "import functools\ndef d(f):\n    @functools.wraps(f)\n    def w(*a, **k): return f(*a, **k)\n    return w\n@d\ndef handler(e, c): return c.execution_id"):
            self.returns(code, "exec_1")
        for code in ("def handler(event): return 'exec_1'", "def handler(event, *, flag=1): return 'exec_1'",
                     "handler = lambda event: 'exec_1'",
                     "class C:\n    def m(self, e): return 'exec_1'\nhandler = C().m",
                     "class C:\n    @classmethod\n    def m(cls, e): return 'exec_1'\nhandler = C.m",
                     "import functools\ndef d(f):\n    @functools.wraps(f)\n    def w(*a, **k): return f(*a, **k)\n    return w\n@d\ndef handler(e): return 'exec_1'"):
            self.returns(code, "exec_1")

    def test_context(self):
        run = self.run_code("""
            import time
            def handler(event, context):
                return [context.execution_id, context.session_id, context.timeout_ms,
                        8 < context.deadline - time.time() <= 10, 8000 < context.remaining_ms() <= 10000,
                        hasattr(context, 'nothing'), repr(context)]
            """)
        self.assertEqual(run.value[:6], ["exec_1", "sess_1", 10000, True, True, False])
        self.fails("def handler(e, c): c.nothing", "AttributeError: 'Context' object has no attribute 'nothing'")

    def test_async(self):
        self.returns("import asyncio\nasync def handler(e):\n    await asyncio.sleep(0.01)\n    return await asyncio.gather(*[asyncio.sleep(0, i) for i in range(3)])", [0, 1, 2])
        self.returns("class A:\n    def __await__(self):\n        yield\n        return 5\ndef handler(e): return A()", 5)
        run = self.fails("import asyncio\nasync def inner():\n    raise KeyError('x')\nasync def handler(e):\n    await asyncio.gather(inner())", "KeyError: 'x'")
        self.assertNotIn("asyncio/", run.err.split("main.py")[0])
        self.assertEqual([f["function"] for f in run.diagnostic["stack"] if f["file"] == "main.py"], ["handler", "inner"])
        run = self.run_code("import sys\nasync def handler(e):\n    sys.exit(4)")
        self.assertEqual((run.exit, run.code, run.kinds, run.err), (4, 4, "X", ""))

    def test_missing_handler(self):
        run = self.fails("x = 1\ny = 2  # last\n\n", "AttributeError: main.py defines no 'handler': write `def handler(event)` or `def handler(event, context)`")
        self.assertIn('Traceback (most recent call last):\n  File "main.py", line 2, in <module>\n    y = 2  # last\n', run.err)
        self.fails("", "AttributeError: main.py defines no 'handler': write `def handler(event)` or `def handler(event, context)`")
        self.fails("handler = 5", "TypeError: 'handler' in main.py is not callable, it is of type int")

    # -- errors

    def test_traceback(self):
        run = self.fails("import os\n\ndef inner(n):\n    return 1 / n  # the line\n\ndef handler(e):\n    return inner(0)\n", "ZeroDivisionError: division by zero")
        self.assertTrue(run.err.startswith('Traceback (most recent call last):\n  File "main.py", line 7, in handler\n    return inner(0)\n'), run.err)
        self.assertEqual(run.diagnostic, {"type": "ZeroDivisionError", "message": "division by zero", "stack": [
            {"file": "main.py", "line": 7, "function": "handler", "source": "return inner(0)"},
            {"file": "main.py", "line": 4, "function": "inner", "source": "return 1 / n  # the line"}]})

    def test_chains(self):
        run = self.fails("""
            def f(): raise KeyError('first')
            def handler(e):
                try:
                    f()
                except KeyError as x:
                    raise ValueError('second') from x
            """, "ValueError: second")
        self.assertIn("KeyError: 'first'", run.err)
        self.assertIn("direct cause", run.err)
        run = self.fails("def handler(e):\n    try: 1/0\n    except Exception: raise ValueError('v')", "ValueError: v")
        self.assertIn("During handling", run.err)

    def test_groups(self):
        run = self.run_code("def handler(e):\n    def f(): raise KeyError(1)\n    try: f()\n    except KeyError as x: raise ExceptionGroup('g', [x, ValueError(2)])")
        self.assertEqual((run.exit, run.kinds), (1, "DX"))
        self.assertNotIn("bootstrap", run.err)

    def test_syntax(self):
        run = self.fails("def handler(e):\n    x = = 2\n", "SyntaxError: invalid syntax", files={"main.py": "wrong\nlines\n"})
        self.assertIn('  File "main.py", line 2\n    x = = 2\n', run.err)
        self.assertEqual(run.diagnostic["stack"][0]["source"], "x = = 2")
        run = self.fails("y = 1\nreturn 5\n", "SyntaxError: 'return' outside function", files={"main.py": "wrong\nlines\n"})
        self.assertIn("    return 5\n", run.err)
        self.assertEqual(self.run_code("def handler(e):\n\tx\n        y\n").kinds, "DX")
        self.assertEqual(self.run_code(b"def handler(e): return '\0'").kinds, "DX")
        self.assertEqual(self.run_code(b"def handler(e): return '\xff'").kinds, "DX")

    def test_source_with_marks(self):
        self.returns(b"\xef\xbb\xbf# -*- coding: latin-1 -*-\r\ndef handler(e):\r\n    return '\xc3\xa9'\r\n", "é")

    def test_the_workspace_does_not_lend_source_lines(self):
        run = self.fails("def handler(e):\n    raise KeyError  # mine\n", "KeyError", files={"main.py": "a\nb\nc\n"})
        self.assertIn("raise KeyError  # mine", run.err)
        run = self.run_code("import traceback\ndef handler(e):\n    try: 1/0  # here\n    except Exception: return traceback.format_exc()", files={"main.py": "a\nb\nc\n"})
        self.assertIn("1/0  # here", run.value)

    def test_shadowed_modules(self):
        files = {name + ".py": "raise RuntimeError('shadow')" for name in ("traceback", "linecache", "asyncio", "inspect", "json", "re")}
        self.fails("def handler(e): 1/0", "ZeroDivisionError: division by zero", files=files)
        self.returns("async def handler(e): return 1", 1, files=files)
        self.returns("import helper\ndef handler(e): return helper.x", 5, files={"helper.py": "x = 5"})

    def test_hostile_exceptions(self):
        for body in ("def __str__(self): raise SystemExit(3)", "def __str__(self): return 5", "__module__ = 5",
                     "__cause__ = property(lambda s: 1 / 0)", "__notes__ = 7", "__traceback__ = property(lambda s: 1/0)",
                     "__class__ = property(lambda s: 1/0)", "def __str__(self): raise ValueError\n    __repr__ = __str__"):
            run = self.run_code("class H(Exception):\n    %s\ndef handler(e):\n    raise H('m')\n" % body)
            self.assertEqual((run.exit, run.kinds), (1, "DX"), (body, run.err))
            self.assertIn("H", run.err)
            self.assertNotIn("bootstrap", run.err)

    def test_huge_message(self):
        run = self.run_code("def handler(e): raise ValueError('x' * 30000000)")
        self.assertEqual(run.kinds, "DX")
        self.assertGreater(len(run.err), 30000000)
        self.assertLessEqual(len(run.frames[0][1]), 65536)
        run = self.run_code("def handler(e): raise type('T' * 100000, (Exception,), {})(chr(1) * 100000 + '\\ud800')")
        self.assertLessEqual(len(run.frames[0][1]), 65536)

    def test_recursion(self):
        run = self.run_code("def handler(e): return handler(e)")
        self.assertEqual((run.exit, run.kinds), (1, "DX"))
        self.assertIn("RecursionError: maximum recursion depth exceeded", run.err)
        self.assertLess(len(run.err), 5000)
        run = self.run_code("import sys\nsys.setrecursionlimit(60)\ndef handler(e): return handler(e)")
        self.assertEqual(run.diagnostic["type"], "RecursionError")
        run = self.run_code("".join("def f%d(e):\n    # %s\n    return f%d(e)\n" % (i, "x" * 150, (i + 1) % 700) for i in range(700)) + "handler = f0")
        self.assertLessEqual(len(run.frames[0][1]), 65536)

    def test_memory(self):
        run = self.fails("""
            import resource
            resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))
            def handler(e):
                hog = []
                while True:
                    hog.append(bytearray(1000))
            """, "MemoryError")
        self.assertIn("hog.append", run.err)
        run = self.run_code("""
            import resource
            resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))
            hog = []
            def handler(e):
                while True:
                    hog.append(object())
            """)
        self.assertIn("MemoryError", run.err)
        self.assertEqual((run.exit, run.code, run.kinds), (1, 1, "DX"))

    def test_errors_from_c(self):
        run = self.fails("import json\ndef handler(e): return json.loads('{')", "json.decoder.JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)")
        self.assertEqual(run.diagnostic["type"], "json.decoder.JSONDecodeError")
        self.fails("handler = int", "TypeError: int() argument must be a string, a bytes-like object or a real number, not 'dict'" if self.real_number() else "TypeError: int() argument must be a string, a bytes-like object or a number, not 'dict'")
        self.fails("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'")

    def real_number(self):
        return subprocess.call([self.python, "-c", "import sys; sys.exit(sys.version_info < (3, 10))"]) == 0

    def test_own_excepthook(self):
        run = self.run_code("import sys\nsys.excepthook = lambda t, v, tb: print('HOOK', t.__name__, tb.tb_frame.f_code.co_name)\ndef handler(e): 1/0")
        self.assertEqual((run.out, run.err, run.exit, run.kinds), (b"HOOK ZeroDivisionError handler\n", "", 1, "DX"))

    def test_stderr_replaced_closed_or_gone(self):
        for way in ("sys.stderr = None", "sys.stderr.close()", "sys.stderr = open('/dev/null')", "del sys.stderr",
                    "sys.stdout.close(); sys.stderr.close()", "sys.__stderr__ = sys.stderr = 5"):
            run = self.run_code("import sys\ndef handler(e):\n    print('before', file=sys.stderr)\n    %s\n    1/0" % way)
            self.assertEqual((run.exit, run.kinds), (1, "DX"), way)
            self.assertTrue(run.err.startswith("before\nTraceback"), (way, run.err))
            self.assertTrue(run.err.endswith("ZeroDivisionError: division by zero\n"))
        run = self.run_code("import os\ndef handler(e):\n    os.close(2)\n    1/0")
        self.assertEqual((run.exit, run.kinds), (1, "DX"))

    # -- exits

    def test_sys_exit(self):
        for argument, code, err in (("", 0, ""), ("None", 0, ""), ("0", 0, ""), ("3", 3, ""), ("-1", 255, ""), ("256", 0, ""),
                                    ("True", 1, ""), ("10 ** 30", 255, ""), ("'why'", 1, "why\n"), ("[1]", 1, "[1]\n"), ("137", 137, "")):
            run = self.run_code("import sys\ndef handler(e): sys.exit(%s)" % argument)
            self.assertEqual((run.exit, run.code, run.kinds, run.err), (code, code, "X", err), argument)
        run = self.run_code("class S(SystemExit): code = property(lambda s: 1/0)\ndef handler(e): raise S(6)")
        self.assertEqual((run.exit, run.kinds, run.err), (6, "X", ""))
        run = self.run_code("import sys\nsys.exit(7)")
        self.assertEqual((run.exit, run.kinds), (7, "X"))

    def test_interrupt(self):
        self.fails("def handler(e):\n    raise KeyboardInterrupt", "KeyboardInterrupt", exit_code=130)
        self.fails("import os, signal, time\ndef handler(e):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)", "KeyboardInterrupt", exit_code=130)

    def test_hard_ends(self):
        run = self.run_code("import os\ndef handler(e):\n    print('a', end='')\n    os._exit(9)")
        self.assertEqual((run.exit, run.kinds, run.out), (9, "", b"a"))
        run = self.run_code("import os, signal\ndef handler(e):\n    print('a', end='')\n    os.kill(os.getpid(), signal.SIGKILL)")
        self.assertEqual((run.exit, run.kinds, run.out), (-9, "", b"a"))

    def test_atexit_and_threads(self):
        run = self.returns("""
            import atexit, threading, time
            def late():
                time.sleep(0.2); print('thread')
            atexit.register(lambda: print('atexit'))
            def handler(e):
                threading.Thread(target=late).start()
                threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
                return 1
            """, 1)
        self.assertEqual(run.out, b"thread\natexit\n")

    def test_objects_of_a_failed_handler_are_freed(self):
        run = self.run_code("class T:\n    def __del__(self): print('freed')\ndef handler(e):\n    t = T()\n    1/0")
        self.assertEqual(run.out, b"freed\n")

    # -- output

    def test_huge_output(self):
        for write in ("sys.stdout.write('é' * 50000000)", "sys.stdout.buffer.write(b'\\xc3\\xa9' * 50000000)", "print('é' * 50000000, end='')"):
            run = self.run_code("import sys\ndef handler(e):\n    n = %s\n    return n" % write, slow=True)
            self.assertEqual((run.exit, len(run.out), run.out[:2], run.out[-2:]), (0, 100000000, "é".encode(), "é".encode()))

    def test_output_cut_short_by_signals_and_nonblocking_pipes(self):
        run = self.run_code("""
            import signal, sys, os, array
            signal.signal(signal.SIGALRM, lambda *a: None)
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            def handler(e):
                a = sys.stdout.write('x' * 20000000)
                b = sys.stdout.buffer.write(array.array('i', [0x79797979]) * 5000000)
                signal.setitimer(signal.ITIMER_REAL, 0)
                os.set_blocking(1, False)
                c = sys.stdout.write('z' * 20000000)
                return [a, b, c]
            """, slow=True)
        self.assertEqual((run.err, run.value), ("", [20000000] * 3))
        self.assertEqual([run.out.count(c) for c in (b"x", b"y", b"z")], [20000000] * 3)

    def test_bytes_and_surrogates(self):
        run = self.returns("import sys\ndef handler(e):\n    sys.stdout.buffer.write(bytes(range(256)))\n    print('\\ud800é')\n    print('\\udcff', file=sys.stderr.__class__(sys.stdout.buffer, 'utf-8', 'backslashreplace', write_through=True))", None)
        self.assertEqual(run.out, bytes(range(256)) + "\\ud800é\n\\udcff\n".encode())
        run = self.returns("def handler(e): print('é')", None, env={"LC_ALL": "C", "LANG": "C"})
        self.assertEqual(run.out, "é\n".encode())

    def test_prints_come_before_the_traceback(self):
        run = self.run_code("import sys\nprint('1', file=sys.stderr, end='')\ndef handler(e):\n    sys.stderr = open(2, 'w', closefd=False)\n    sys.stderr.write('2')\n    1/0")
        self.assertTrue(run.err.startswith("12Traceback"), run.err)

    def test_stdout_gone(self):
        for way in ("os.close(1)", "sys.stdout.close()", "sys.stdout = None", "del sys.stdout", "sys.stdout = 5",
                    "sys.stdout = open('/dev/full', 'w'); print('x')", "sys.stdout.detach()", "os.closerange(0, 3)"):
            run = self.run_code("import os, sys\ndef handler(e):\n    %s\n    return 1" % way)
            self.assertEqual((run.exit, run.code, run.value), (0, 0, 1), (way, run.err))
        run = self.run_code("import sys, io\ndef handler(e):\n    sys.stdout = open(1, 'w', closefd=False)\n    print('x')\n    return 1", hold_stdout=False)
        self.assertEqual((run.exit, run.code, run.value), (0, 0, 1), run.err)
        run = self.fails("def handler(e):\n    print('x' * 100000)", "BrokenPipeError: [Errno 32] Broken pipe", hold_stdout=False)

    # -- descriptors and processes

    def test_closed_descriptors(self):
        self.returns("import os\ndef handler(e):\n    os.closerange(3, 256)\n    return 1", 1)
        run = self.run_code("import os\ndef handler(e):\n    os.closerange(3, 2000)\n    return 1")
        self.assertEqual((run.exit, run.kinds, run.err), (0, "", ""))
        run = self.run_code("import os\ndef handler(e):\n    os.closerange(3, 2000)\n    os.dup2(os.open('mine', os.O_RDWR | os.O_CREAT), 1000)\n    os.write(1000, b'data')\n    import atexit; atexit.register(lambda: print(open('mine').read()))\n    return 1")
        self.assertEqual((run.exit, run.kinds, run.out), (0, "", b"data\n"))

    def test_descriptors_are_not_inherited(self):
        self.returns("import subprocess, sys\ndef handler(e):\n    return subprocess.run(['ls', '/proc/self/fd'], stdout=subprocess.PIPE, close_fds=False).stdout.decode().split()", ["0", "1", "2", "3"])

    def test_reading_and_writing_the_old_numbers(self):
        run = self.run_code("""
            import os
            def handler(e):
                for call in (lambda: os.read(3, 10), lambda: os.write(4, b'garbage')):
                    try: call()
                    except OSError: pass
                return 1
            """)
        self.assertEqual((run.exit, run.kinds), (0, "RX"))

    def test_fork(self):
        run = self.returns("import os\ndef handler(e):\n    pid = os.fork()\n    if pid == 0:\n        print('child')\n        return 'child'\n    return os.waitpid(pid, 0)[1]", 0)
        self.assertEqual(run.out, b"child\n")
        run = self.run_code("import os\ndef handler(e):\n    pid = os.fork()\n    if pid == 0:\n        1/0\n    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if hasattr(os, 'waitstatus_to_exitcode') else os.waitpid(pid, 0)[1] >> 8")
        self.assertEqual((run.value, run.kinds), (1, "RX"))
        self.assertIn("ZeroDivisionError", run.err)
        self.returns("import os, sys\ndef handler(e):\n    pid = os.fork()\n    if pid == 0:\n        sys.exit(5)\n    return os.waitpid(pid, 0)[1] >> 8", 5)
        run = self.run_code("import os\ndef handler(e):\n    if os.fork() == 0:\n        os.setsid(); os.write(1, b'd')\n    return 1")
        self.assertEqual((run.kinds, run.value), ("RX", 1))

    POOL = """
        import multiprocessing as mp, dataclasses, sys
        @dataclasses.dataclass
        class Point:
            x: int
        def double(p): return Point(p.x * 2)
        def work(how):
            with mp.get_context(how).Pool(2) as pool:
                return [p.x for p in pool.map(double, [Point(i) for i in range(5)])]
"""

    def test_multiprocessing(self):
        for how in ("fork", "spawn", "forkserver"):
            for files in ({}, {"main.py": "x = 1"}):
                self.returns(self.POOL + "        def handler(e): return work(%r)" % how, [0, 2, 4, 6, 8], files=files)
                run = self.run_code(self.POOL + "        if __name__ == '__main__': print(work(%r))" % how, mode="script", files=files)
                self.assertEqual((run.out, run.err, run.kinds), (b"[0, 2, 4, 6, 8]\n", "", "X"))
        self.returns("from concurrent.futures import ProcessPoolExecutor\ndef f(x): return x + 1\ndef handler(e):\n    with ProcessPoolExecutor(2) as p: return list(p.map(f, [1, 2]))", [2, 3])

    # -- the module

    def test_module(self):
        self.returns("""
            import sys, os, inspect, typing, dataclasses, pickle
            @dataclasses.dataclass
            class D:
                x: 'typing.List[int]'
            def handler(e):
                import main, __main__
                return [__name__, os.path.basename(__file__), main is __main__, main.handler is handler, sys.path[0] == os.getcwd(),
                        sys.argv, str(typing.get_type_hints(D)['x']), inspect.getsource(handler).splitlines()[0],
                        'class D:' in inspect.getsource(D), pickle.loads(pickle.dumps(D([1]))) == D([1]), os.path.dirname(__file__) in sys.path,
                        open(__file__).read() == inspect.getsource(main)]
            """, ["main", "main.py", True, True, True, ["main.py", "-a", "b"], "typing.List[int]", "def handler(e):", True, True, True, True],
            argv=["-a", "b"])

    def test_code_folder_is_private(self):
        self.returns("import os\ndef handler(e): return [oct(os.stat(p).st_mode & 0o777) for p in (os.path.dirname(__file__), __file__)]", ["0o700", "0o600"])

    def test_linecache_is_ours_in_a_program_that_uses_it(self):
        self.returns("import linecache  # first\ndef handler(e): return linecache.getline('main.py', 1)", "import linecache  # first\n")
        self.returns("import linecache  # first\nlinecache.clearcache()\nimport inspect\ndef handler(e): return inspect.getsource(handler)[:3]", "def")

    # -- modes

    def test_script(self):
        run = self.run_code("import sys\nprint(__name__, sys.argv, __file__.endswith('/main.py'))\ndef handler(e): print('never')\nif __name__ == '__main__': print('main')", mode="script", argv=["x"], raw_event=b"not read")
        self.assertEqual((run.exit, run.kinds, run.out), (0, "X", b"__main__ ['main.py', 'x'] True\nmain\n"))
        run = self.run_code("import sys\nsys.exit('bye')", mode="script")
        self.assertEqual((run.exit, run.kinds, run.err), (1, "X", "bye\n"))
        self.assertIn("main.py\", line 2, in f", self.run_code("def f():\n    1/0\nf()", mode="script").err)

    def test_auto(self):
        for code in ("def handler(e): return 1", "async def handler(e): return 1", "handler = lambda e: 1", "class handler:\n    def __new__(cls, e): return 1",
                     "if True:\n    def handler(e): return 1", "try:\n    import nothing_x\nexcept ImportError:\n    def handler(e): return 1",
                     "def f(e): return 1\n_, handler = 0, f", "def f(e): return 1\nhandler: object = f", "import helper as handler", "from helper import f as handler"):
            run = self.run_code(code, mode="auto", files={"helper.py": "import sys\ndef f(e): return 1\nclass M(type(sys)):\n    def __call__(self, e): return 1\nsys.modules[__name__].__class__ = M"})
            self.assertEqual((run.kinds, run.value), ("RX", 1), (code, run.err))
        for code in ("print(1)", "def f():\n    def handler(e): return 1", "handler: int", "x = 'handler'", "print('handler')",
                     "handlers = 1", "class A:\n    def handler(self, e): pass", "[handler for handler in [1]]",
                     "if __name__ == '__main__':\n    handler = 5\n    print(handler)"):
            run = self.run_code(code, mode="auto")
            self.assertEqual((run.kinds, run.err), ("X", ""), code)
        self.assertEqual(self.run_code("handler = = 1", mode="auto").kinds, "DX")
        run = self.run_code("x = 'handler' + " + " + ".join(["''"] * 900), mode="auto")
        self.assertEqual((run.kinds, run.err), ("X", ""))
        for code in ("def f(e): return 1\nwith open('/dev/null') as x:\n    handler = f", "def f(e): return 1\nfor handler in [f]: pass",
                     "def f(e): return 1\na, (*b, handler) = 1, (2, f)"):
            self.assertEqual(self.run_code(code, mode="auto").value, 1)

    # -- the protocol

    def test_the_agent_goes_away(self):
        whole = frame(b"H", b'{"max_return_bytes":9}') + frame(b"C", b"print(1)\ndef handler(e): pass") + frame(b"E", b"{}")
        for size in (0, 3, 20, len(whole) - 1, len(whole), len(whole) + 3):
            run = self.run_code("", request=(whole + frame(b"G"))[:size])
            self.assertEqual((run.exit, run.out, run.err, run.kinds), (0, b"", "", ""), size)

    def test_parked(self):
        self.returns("import main\ndef handler(e): return [e, hasattr(main, 'event'), __name__]", [{"a": 1}, False, "main"], {"a": 1}, parked=0.3)
        run = self.run_code("", request=b"", parked=0.3)
        self.assertEqual((run.exit, run.out, run.err, run.kinds), (0, b"", "", ""))

    def test_few_descriptors(self):
        few = os.path.join(tempfile.mkdtemp(), "python")
        with open(few, "w") as file:
            file.write("#!/bin/sh\nulimit -n 64\nexec %s \"$@\"\n" % self.python)
        os.chmod(few, 0o755)
        run = Run(few, "import os\ndef handler(e):\n    os.closerange(3, 50)\n    return 1")
        shutil.rmtree(os.path.dirname(few))
        self.assertEqual((run.exit, run.value), (0, 1))

    def test_not_the_protocol(self):
        for request in (b"GET / HTTP/1.1\r\n\r\n", frame(b"Z", b""), b"C\xff\xff\xff\xff"):
            run = self.run_code("", request=request)
            self.assertEqual((run.exit, run.out, run.kinds), (70, b"", ""))


for number, path in enumerate(PYTHONS):
    version = subprocess.check_output([path, "-c", "import sys; print('%d_%d_%d' % sys.version_info[:3])"]).decode().strip()
    globals()["Python_" + version] = type("Python_" + version, (Programs, unittest.TestCase), {"python": path})

if __name__ == "__main__":
    if not PYTHONS:
        sys.exit("no Python found to test with")
    unittest.main()
