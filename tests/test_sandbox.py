"""Hostile programs end as failed: nothing outside is touched, nobody is left over."""

import functools
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy
import psutil
import pytest
from conftest import ROOT

from eval.sandbox import outside
from eval.sandbox.outside import Limits, Outcome, Sandbox, SandboxError, find_sandbox, trial
from lora_one.errors import UserError

# Those that have to be stopped are stopped soon; the others may take their time on a busy machine.
QUICK = Limits(cpu_seconds=0.25, wall_seconds=0.4, memory=2**28, processes=16, disk=2**23)
PATIENT = replace(QUICK, cpu_seconds=20.0, wall_seconds=60.0)
CHECK = "assert answer() == 42"
RIGHT = "def answer():\n    return 42\n"
MECHANISMS = ("namespaces", "bubblewrap")
MARK = "hostile-program-of-this-test"


@functools.cache
def reason_against(mechanism: str) -> str | None:
    return trial(Sandbox(mechanism))


def without_containment(mechanism: str) -> NoReturn:
    """Skips; but with REQUIRE_SANDBOX=1 fails where nothing else contains programs either."""
    reasons = {name: reason_against(name) for name in MECHANISMS}
    if os.environ.get("REQUIRE_SANDBOX") == "1" and None not in reasons.values():
        pytest.fail(f"REQUIRE_SANDBOX=1, but nothing contains programs on this machine: {reasons}")
    pytest.skip(f"no {mechanism} on this machine: {reasons[mechanism]}")


@pytest.fixture(scope="module", params=MECHANISMS)
def contained(request):
    if reason_against(request.param) is not None:
        without_containment(request.param)
    return Sandbox(request.param, PATIENT)


@pytest.mark.parametrize(
    ("reasons", "required", "ending"),
    [
        (("no", "no"), "1", pytest.fail.Exception),
        (("no", "no"), "0", pytest.skip.Exception),
        (("no", None), "1", pytest.skip.Exception),
    ],
)
def test_containment_can_be_required(monkeypatch, reasons, required, ending):
    monkeypatch.setitem(globals(), "reason_against", dict(zip(MECHANISMS, reasons, strict=True)).get)
    monkeypatch.setenv("REQUIRE_SANDBOX", required)
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception)) as ended:
        without_containment("namespaces")
    assert ended.type is ending


@pytest.fixture(scope="module")
def limited():
    """Resource limits only, whatever else would work here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outside, "trial", lambda s: trial(s) if s.mechanism == "limits" else "not tried")
        return find_sandbox(PATIENT, unsafe=True)


def nobody_stays() -> bool:
    """Those that have been killed may take a moment to go."""
    deadline = time.monotonic() + 5
    while left_over() and time.monotonic() < deadline:
        time.sleep(0.02)
    return left_over() == []


def for_state(sandbox: Sandbox, state: str) -> Sandbox:
    return replace(sandbox, limits=QUICK) if state == "timed out" else sandbox


def left_over() -> list[str]:
    """Living processes that a program of this test has marked with an argument or a name."""
    found = []
    for process in psutil.process_iter(["cmdline", "name", "status"]):
        if process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        if MARK in " ".join(process.info["cmdline"] or []) or process.info["name"] == MARK[:15]:
            found.append(f"{process.pid} {process.info['name']}")
    return found


# Every process that these start bears the name by which it would be found if it stayed.
NAMED = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{MARK[:15]}', 0, 0, 0)\n"

HOSTILE = {
    "wrong": ("def answer(): return 41", "failed: AssertionError"),
    "fork bomb": (
        NAMED + "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "timed out",
    ),
    "orphans": (
        NAMED + "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid()\n"
        "        if os.fork() == 0:\n            time.sleep(60)\n        os._exit(0)\nos._exit(0)",
        "failed: ended early",
    ),
    "threads": (
        "import threading, time\nfor _ in range(1000):\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()",
        "failed: RuntimeError",
    ),
    "memory": ("hoard = []\nwhile True:\n    hoard.append(bytearray(2**20))", "out of memory"),
    "memory of children": (
        NAMED + "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        break\n"
        "hoard = bytearray(100 * 2**20)\nfor i in range(0, len(hoard), 4096):\n    hoard[i] = 1\n"
        "time.sleep(60)",
        "out of memory",
    ),
    "memory of a file": (
        "import ctypes\nassert ctypes.CDLL(None).syscall(319, b'x', 0) == -1\n1 / 0",
        "failed: ZeroDivisionError",
    ),
    "endless loop": ("while True: pass", "timed out"),
    "endless loop in the answer": ("def answer():\n    while True: pass", "timed out"),
    "endless sleep": ("import time\ntime.sleep(1000)", "timed out"),
    "deaf to signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "timed out",
    ),
    "huge integers": ("n = 9 ** 9 ** 9", "timed out"),
    "recursion": ("def answer(): return answer()", "failed: RecursionError"),
    "crash": ("import ctypes\nctypes.string_at(0)", "failed: SIGSEGV"),
    "output": ("import os\nwhile True:\n    print('x' * 65536)\n    os.write(2, b'y' * 65536)", "timed out"),
    "reads input": ("input()", "failed: EOFError"),
    "leaves": ("import sys\nsys.exit(0)", "failed: SystemExit"),
    "leaves at once": ("import os\nos._exit(0)", "failed: ended early"),
    "leaves in the answer": ("import os\ndef answer(): os._exit(0)", "failed: ended early"),
    "kills itself": ("import os\nos.kill(os.getpid(), 9)", "failed: SIGKILL"),
    "success at exit": (
        "import atexit, os\natexit.register(lambda: (print('passed'), os._exit(0)))\nraise ValueError",
        "failed: ValueError",
    ),
    "prints success": (
        "import os, json\nfor fd in range(3, 64):\n    try: os.write(fd, b'[\"passed\", null]\\n')\n"
        "    except OSError: pass\nos._exit(0)",
        "failed: ended early",
    ),
    "noise": (
        "import os\nfor fd in range(3, 64):\n"
        "    try: os.write(fd, b'7\\n{}\\n[[[\\n[\"trouble\", 1]\\n\\xff\\n'"
        ' + b\'["end", {"code": -999}]\\n["error", ["a b", 1]]\\n\')\n    except OSError: pass\nos._exit(0)',
        "failed: unknown",
    ),
    "endless noise": (
        "import os\nwhile True:\n  for fd in range(3, 64):\n    try: os.write(fd, b'[' * 4096)\n"
        "    except OSError: pass",
        "timed out",
    ),
    "closes everything": ("import os\nos.closerange(0, 64)\ndef answer(): return 42", "failed: ended early"),
    "other builtins": (
        "import builtins, json, os\n"
        "for name in ('exec', 'compile', 'len', 'type', 'str'):\n"
        "    setattr(builtins, name, lambda *a, **k: None)\n"
        "json.dumps = os.write = lambda *a, **k: None\nos._exit = lambda *a: None\ndef answer(): return 41",
        "failed: unknown",
    ),
    "other assertion error": (
        "import builtins\nbuiltins.AssertionError = type('Quiet', (Exception,), {})\ndef answer(): return 41",
        "failed: AssertionError",
    ),
    "shadowed module": (
        "open('random.py', 'w').write('1 / 0')\nopen('eval.py', 'w').write('1 / 0')\n"
        "import random, sys\nassert '/scratch' not in sys.path and '' not in sys.path\n1 / len('')",
        "failed: ZeroDivisionError",
    ),
    "error without text": (
        "class Odd(BaseException):\n    def __str__(self): raise SystemExit\nraise Odd",
        "failed: unknown",
    ),
    "many files": ("hoard = [open(f'{i}', 'w') for i in range(10000)]", "failed: OSError"),
    "large file": ("with open('x', 'wb') as f:\n    while True: f.write(bytes(2**20))", "failed: OSError"),
    "not Python": ("def answer(:", "failed: SyntaxError"),
    "null bytes": ("x = '\0'", "failed: SyntaxError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_fail_and_leave_nobody(contained, name, record_property):
    program, state = HOSTILE[name]
    outcome = for_state(contained, state).run(program, CHECK)
    record_property("outcome", f"{outcome.state} {outcome.seconds:.2f}")
    assert (outcome.state, outcome.passed) == (state, False), outcome
    assert nobody_stays()


def test_half_a_surrogate_pair_can_be_written(contained):
    outcome = contained.run("raise ValueError('a' + chr(0xD83D))", CHECK)
    assert (outcome.state, outcome.detail) == ("failed: ValueError", "a?")


def test_what_the_documentation_says_of_cheats(contained):
    """A program that speaks for the interpreter gets the token; whoever ends that corrects the text too."""
    program = textwrap.dedent("""
        import os, struct
        pipes = [fd for fd in range(3, 64) if os.path.exists(f"/proc/self/fd/{fd}")]
        for fd in pipes:
            try: os.write(fd, b'["defined", null]\\n')
            except OSError: channel = fd
        (report,) = set(pipes) - {channel}
        token = os.read(channel, struct.unpack("Q", os.read(channel, 8))[0])
        os.write(report, b'["passed", "' + token + b'"]\\n')
        os._exit(0)
    """)
    assert contained.run(program, "assert False").passed


def test_a_process_that_cannot_be_started_leaves_no_pipe(monkeypatch):
    def refuse(*arguments, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(BlockingIOError):
        Sandbox("limits", QUICK).run(RIGHT, CHECK)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_right_programs_pass(contained):
    assert contained.run(RIGHT, CHECK).state == "passed"
    chatty = "print('x' * 10**6)\nimport sys\nsys.stderr.write('y')\n" + RIGHT
    assert contained.run(chatty, CHECK).state == "passed"
    child = "import subprocess\n" + RIGHT + "assert subprocess.run(['/bin/true']).returncode == 0"
    assert contained.run(child, CHECK).state == "passed"


def test_installed_packages_are_there(contained):
    if not Path(numpy.__file__).is_relative_to(sysconfig.get_path("purelib")):
        pytest.skip("NumPy is not among the packages of this Python")
    ample = replace(contained, limits=replace(PATIENT, memory=2**30))
    assert ample.run("import numpy\n" + RIGHT, CHECK + "\nassert numpy.ones(3).sum() == 3").passed


def test_hashes_are_the_same_every_time(contained):
    first, second = (contained.run("raise ValueError(hash('a'), {'x', 'y', 'z'})", "") for _ in range(2))
    assert first.detail == second.detail


def test_files_outside_are_not_there(contained, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("alive")
    program = textwrap.dedent(f"""
        import os, shutil, pathlib
        seen = []
        attempts = [
            lambda: open({str(canary)!r}).read(),
            lambda: open({str(canary)!r}, "w").write("dead"),
            lambda: os.remove({str(canary)!r}),
            lambda: (os.symlink({str(canary)!r}, "link"), open("link", "w").write("dead")),
            lambda: os.link({str(canary)!r}, "hard"),
            lambda: os.rename({str(canary)!r}, "mine"),
            lambda: open({str(ROOT / "README.md")!r}).read(),
            lambda: open("/new", "w"),
            lambda: open({os.__file__!r}, "a"),
            lambda: os.chmod("/usr", 0o777),
            lambda: os.chroot("/proc/1/root"),
            lambda: open("/proc/1/root" + {str(canary)!r}).read(),
            lambda: open("/dev/new", "w"),
            lambda: open("/dev/shm/new", "w"),
            lambda: open("/proc/1/mem", "r+b").read(),
            lambda: open("/proc/sys/kernel/core_pattern", "w").write("x"),
            lambda: os.mknod("disk", 0o60600, os.makedev(254, 0)),
            lambda: os.setuid(0),
        ]
        for number, attempt in enumerate(attempts):
            try:
                attempt()
                seen.append(number)
            except OSError:
                pass
        for path in ({str(tmp_path)!r}, {str(ROOT)!r}, "/scratch", "/lib", "/dev"):
            shutil.rmtree(path, ignore_errors=True)
        raise ValueError(seen)
    """)
    assert contained.run(program, CHECK).detail == "[]"
    assert canary.read_text() == "alive"
    assert Path(os.__file__).exists()
    assert contained.run(RIGHT, CHECK).passed


def test_scratch_is_a_programs_own(contained):
    program = "import os\nassert os.listdir('.') == []\nopen('x', 'w').write('1')\n" + RIGHT
    for _ in range(2):
        assert contained.run(program + "import shutil\nshutil.rmtree('.', ignore_errors=True)", CHECK).passed


def test_no_network(contained):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.1)
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        assert contained.run(program, CHECK).state == "failed: PermissionError"
        with pytest.raises(TimeoutError):
            server.accept()


def test_there_is_nowhere_to_send_to_even_if_sockets_were_allowed(contained):
    program = "names = [line.split(':')[0].strip() for line in open('/proc/net/dev') if ':' in line]\n"
    program += (
        "raise ValueError(len(open('/proc/net/route').readlines()[1:]), 'lo' in names, 'eth0' in names)"
    )
    assert contained.run(program, CHECK).detail == "(0, True, False)"


def test_signals_do_not_arrive(contained):
    received = []
    handlers = {s: signal.signal(s, lambda *a: received.append(a)) for s in (signal.SIGTERM, signal.SIGUSR1)}
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        program = textwrap.dedent(f"""
            import os, signal, time
            for pid in (os.getppid(), 1, {os.getpid()}, {bystander.pid}, -{os.getpgrp()}, -1):
                for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL):
                    if pid != os.getpid():
                        try: os.kill(pid, number)
                        except OSError: pass
            time.sleep(0.05)
        """)
        outcome = contained.run(program + "def answer(): return 41", CHECK)
        assert outcome.state in ("failed: AssertionError", "failed: ended early"), outcome
        assert bystander.poll() is None
        assert received == []
    finally:
        bystander.kill()
        bystander.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_secrets_of_the_environment_stay_outside(contained, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    program = textwrap.dedent("""
        import os, glob
        texts = [str(dict(os.environ))]
        for name in glob.glob("/proc/*/environ"):
            try: texts.append(open(name).read())
            except OSError: pass
        raise ValueError("hush" in "".join(texts), len(texts) > 0)
    """)
    assert contained.run(program, CHECK).detail == "(False, True)"


def test_others_cannot_be_traced_or_left_by_namespaces(contained):
    program = textwrap.dedent("""
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        done = [libc.ptrace(16, os.getppid(), 0, 0), libc.unshare(0x10000000)]
        done.append(libc.mount(b"a", b"/", b"tmpfs", 0, None))
        raise ValueError(done, os.getuid() == 0)
    """)
    assert contained.run(program, CHECK).detail == "([-1, -1, -1], False)"


def test_a_killed_evaluation_leaves_nobody(contained):
    program = NAMED + "import time\ntime.sleep(60)"
    script = (
        "from eval.sandbox.outside import *\n"
        f"Sandbox({contained.mechanism!r}, Limits(wall_seconds=60)).run({program!r}, '')"
    )
    evaluation = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not left_over() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left_over()
    evaluation.kill()
    evaluation.wait()
    assert nobody_stays()


LIMITED = [
    "wrong",
    "fork bomb",
    "memory",
    "endless loop",
    "endless sleep",
    "leaves at once",
    "output",
    "threads",
]


@pytest.mark.parametrize("name", LIMITED)
def test_limits_alone(limited, name):
    program, state = HOSTILE[name]
    outcome = for_state(limited, state).run(program, CHECK)
    assert (outcome.state, outcome.passed) == (state, False), outcome
    assert nobody_stays()


def test_limits_alone_say_what_they_are(limited):
    assert str(limited) == "NOT contained, resource limits only"
    assert limited.run(RIGHT, CHECK).passed


def test_refused_where_nothing_contains(monkeypatch):
    monkeypatch.setattr(outside, "trial", lambda sandbox: f"no {sandbox.mechanism} today")
    with pytest.raises(UserError) as refused:
        find_sandbox(QUICK)
    for words in ("namespaces: no namespaces today; bubblewrap: no bubblewrap today", "--unsafe_execution"):
        assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="cannot even be limited here"):
        find_sandbox(QUICK, unsafe=True)


def test_a_container_that_cannot_be_made_is_no_failure_of_the_program(monkeypatch):
    monkeypatch.setattr(outside, "_START", "raise SystemExit('no such luck')")
    with pytest.raises(SandboxError, match="no such luck"):
        Sandbox("namespaces", QUICK).run(RIGHT, CHECK)
    assert trial(Sandbox("namespaces", QUICK)) == "no such luck"


def test_too_long_a_program_is_not_started(contained):
    assert contained.run("#" * 2**19, CHECK) == Outcome(
        False, "failed: too long", "more than 262144 bytes", 0.0
    )


def test_a_program_that_fills_the_pipe_does_not_block(contained):
    assert contained.run(RIGHT + "#" * 2**17, CHECK).passed
