"""Starting contained programs, and judging how they ended.

The conversation with ``inside.py``: it is sent the setup and the program; it says ``defined``; it is
sent a token and the test; it says ``passed`` with the token, or ``error``. Its watcher says ``end``,
and any of them ``trouble`` if the container cannot be made. Nothing but the token makes a pass.
The program has the same pipes as the interpreter that it runs in, and can say any of this itself.
"""

import functools
import json
import os
import secrets
import select
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.sandbox.inside import DEVICES, SCRATCH
from lora_one.errors import UserError

Mechanism = Literal["namespaces", "bubblewrap", "limits"]

_ROOT = str(Path(__file__).resolve().parent.parent.parent)
_START = f"import sys; sys.path.insert(0, {_ROOT!r}); from eval.sandbox.inside import main; main()"
# Where the system keeps libraries, and what finds them.
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")
_LONGEST_PROGRAM = 2**18
_LONGEST_REPORT = 2**16
_SECONDS_TO_START = 30
# Above the users of people, below those that few containers have.
_FIRST_USER = 61_184
_SPARE_USERS = 4_000


@dataclass(frozen=True)
class Limits:
    """What one program may use; of memory and time, all its processes together.

    Attributes:
        cpu_seconds: Processor time.
        wall_seconds: Time by the clock, from the program's start; for those that wait.
        memory: Bytes.
        processes: Processes and threads.
        open_files: Open files of a process.
        disk: Bytes of all files together, and of one file where there are no namespaces.
    """

    cpu_seconds: float = 3.0
    wall_seconds: float = 6.0
    memory: int = 2**30
    processes: int = 32
    open_files: int = 64
    disk: int = 2**25


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: Its test ran to the end.
        state: ``passed``, ``timed out``, ``out of memory``, or ``failed: `` and what ended it: the name of
            an error or of a signal, or ``ended early``.
        detail: The error's text.
        seconds: By the clock, the making of the container included.
    """

    passed: bool
    state: str
    detail: str
    seconds: float


class SandboxError(RuntimeError):
    """The container could not be made."""


@dataclass(frozen=True)
class Sandbox:
    """A way to contain programs that works on this machine.

    Attributes:
        mechanism: ``namespaces``, ``bubblewrap``, or ``limits``: then the program can read and write
            what the user can.
        changes_user: As user 0: whether programs run as another user.
    """

    mechanism: Mechanism
    limits: Limits = field(default_factory=Limits)
    changes_user: bool = field(default_factory=lambda: os.geteuid() == 0)

    def __str__(self) -> str:
        return {
            "namespaces": "contained by Linux namespaces",
            "bubblewrap": "contained by bubblewrap",
            "limits": "NOT contained, resource limits only",
        }[self.mechanism]

    def run(self, program: str, test: str) -> Outcome:
        """Runs ``test`` after ``program``, in the same interpreter, in a container of their own.

        Raises:
            SandboxError: If the container could not be made.
        """
        start = time.perf_counter()
        if len(program.encode(errors="replace")) > _LONGEST_PROGRAM:
            return Outcome(False, "failed: too long", f"more than {_LONGEST_PROGRAM} bytes", 0.0)
        user = _FIRST_USER + secrets.randbelow(_SPARE_USERS) if self.changes_user else None
        folder = Path(tempfile.mkdtemp(prefix="sandbox-"))
        try:
            if user is not None:
                _hand_over(folder, user)
            messages, errors, token = self._converse(folder, user, program, test)
        finally:
            remove_tree(folder)
        state, detail = _judge(messages, errors, token)
        return Outcome(state == "passed", state, detail, time.perf_counter() - start)

    def _converse(
        self, folder: Path, user: int | None, program: str, test: str
    ) -> tuple[list[list[Any]], str, str]:
        token = secrets.token_hex(16)
        report, report_end = os.pipe()
        try:
            running = self._start(user, report_end)
        except BaseException:
            os.close(report)
            raise
        finally:
            os.close(report_end)
        talk = _Talk(running, report, time.monotonic() + _SECONDS_TO_START + self.limits.wall_seconds)
        try:
            setup = self._setup(folder, user, report_end)
            talk.send(json.dumps(setup).encode(), program.encode(errors="replace"))
            talk.listen({"defined": (token.encode(), test.encode())})
        finally:
            talk.end()
        return talk.messages, talk.errors, token

    def _setup(self, folder: Path, user: int | None, report_end: int) -> dict[str, Any]:
        return vars(self.limits) | {
            "mechanism": self.mechanism,
            "user": user if self.mechanism != "bubblewrap" else None,
            "folder": str(folder),
            "parent": os.getpid(),
            "report": report_end,
            "visible": visible_paths(),
            "not_on_path": [_ROOT],
            "packages": _packages(),
        }

    def _start(self, user: int | None, report_end: int) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self._command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=_environment(),
            pass_fds=(report_end,),
            start_new_session=True,
            user=user if self.mechanism == "bubblewrap" else None,
            group=user if self.mechanism == "bubblewrap" else None,
            extra_groups=[] if self.mechanism == "bubblewrap" and user is not None else None,
        )

    def _command(self) -> list[str]:
        # What -I does, but that a fixed hash seed is heeded: the rest of the environment is gone anyway.
        python = [sys.executable, "-s", "-P", "-S", "-B", "-c", _START]
        if self.mechanism != "bubblewrap":
            return python
        binds = [part for path in visible_paths() for part in _bubblewrap_bind(path)]
        own = ["--ro-bind", f"{_ROOT}/eval", f"{_ROOT}/eval"]
        apart = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        # Its own /dev would be a place to write to, of any size.
        devices = [part for name in DEVICES for part in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
        places = ["--proc", "/proc", *devices, "--size", str(self.limits.disk), "--tmpfs", SCRATCH]
        return ["bwrap", *apart, *binds, *own, *places, "--remount-ro", "/", "--chdir", SCRATCH, *python]


class _Talk:
    """Both directions at once, and never for longer than the deadline."""

    def __init__(self, process: "subprocess.Popen[bytes]", report: int, deadline: float) -> None:
        assert process.stdin is not None
        self.process, self.report, self.deadline = process, report, deadline
        self.stdin = process.stdin.fileno()
        os.set_blocking(self.stdin, False)
        self.unsent = b""
        self.messages: list[list[Any]] = []
        self.errors = ""

    def send(self, *frames: bytes) -> None:
        self.unsent += b"".join(struct.pack("Q", len(frame)) + frame for frame in frames)

    def listen(self, replies: Mapping[str, tuple[bytes, ...]]) -> None:
        """Reads until all that could write are gone, sending the reply to a word the first time."""
        heard, pending = 0, b""
        replies = dict(replies)
        while (seconds := self.deadline - time.monotonic()) > 0 and heard < _LONGEST_REPORT:
            writable = [self.stdin] if self.unsent else []
            readable, writable, _ = select.select([self.report], writable, [], seconds)
            if writable:
                self._write()
            if not readable:
                continue
            part = os.read(self.report, _LONGEST_REPORT)
            if not part:
                return
            heard += len(part)
            *lines, pending = (pending + part).split(b"\n")
            for line in lines:
                self._take(line)
                self.send(*replies.pop(self.messages[-1][0], ()))
        self.messages.append(["silent", None])

    def _write(self) -> None:
        try:
            self.unsent = self.unsent[os.write(self.stdin, self.unsent) :]
        except BrokenPipeError:
            self.unsent = b""

    def _take(self, line: bytes) -> None:
        try:
            word, value = json.loads(line)
            self.messages.append([str(word), value])
        except (ValueError, TypeError, RecursionError):  # only the program itself writes such
            self.messages.append(["noise", None])

    def end(self) -> None:
        """Nothing is left of the process, and what it complained of is known."""
        with_group = self.process.pid
        if self.process.poll() is None and self.messages[-1:] == [["silent", None]]:
            os.killpg(with_group, signal.SIGKILL)
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(with_group, signal.SIGKILL)
            self.process.wait()
        os.close(self.report)
        assert self.process.stdin is not None
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        self.errors = " ".join((self.process.stderr.read() or b"").decode(errors="replace").split())[-300:]
        self.process.stderr.close()
        self.process.stdin.close()


def _judge(messages: list[list[Any]], errors: str, token: str) -> tuple[str, str]:
    """State and detail. After ``started`` the program itself may have written anything."""
    words = [word for word, _ in messages]
    if "started" not in words:
        trouble = [value for word, value in messages if word == "trouble"]
        raise SandboxError(str(trouble[0]) if trouble else errors or f"no start, only {words}")
    found: dict[str, Any] = dict(map(tuple, reversed(messages)))
    if found.get("passed") == token:
        return "passed", ""
    end = found["end"] if isinstance(found.get("end"), dict) else {}
    if end.get("reason") in ("timed out", "out of memory"):
        return end["reason"], ""
    if "silent" in found:
        return "timed out", "did not answer"
    if isinstance(found.get("error"), list):
        name, text = [*map(_writable, map(str, found["error"])), "", ""][:2]
        if name == "MemoryError":
            return "out of memory", text[:200]
        return f"failed: {name if name.isidentifier() and len(name) < 60 else 'unknown'}", text[:200]
    code = end.get("code")
    killed = [number.name for number in signal.Signals if isinstance(code, int) and number == -code]
    if killed:
        return f"failed: {killed[0]}", "killed by a signal"
    return "failed: ended early", "left before its test was over"


def _writable(text: str) -> str:
    """Half a surrogate pair, which a program may raise, is in no file's encoding."""
    return text.encode("utf-8", "replace").decode()


def _environment() -> dict[str, str]:
    """Nothing of this process's environment but what Python may need to start."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": SCRATCH,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        **single,
        **kept,
    }


def _packages() -> list[str]:
    """Installed packages are there for programs (NumPy), but no code of theirs runs at the start."""
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


@functools.cache
def visible_paths() -> list[str]:
    """What a contained program sees of this machine's files."""
    python = [sys.base_prefix, sys.prefix, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    wanted = [path for path in (*_SYSTEM, *python, *_packages()) if Path(path).exists()]
    chosen: list[str] = []
    for path in dict.fromkeys(wanted):
        if path == "/":
            continue
        if not any(Path(path).is_relative_to(other) for other in chosen if not Path(other).is_symlink()):
            chosen.append(path)
    return chosen


def _bubblewrap_bind(path: str) -> list[str]:
    if Path(path).is_symlink():
        return ["--symlink", str(Path(path).readlink()), path]
    return ["--ro-bind", path, path]


def _hand_over(folder: Path, user: int) -> None:
    try:
        os.chown(folder, user, user)
    except OSError as error:
        raise SandboxError(
            f"no user {user} in this container to run programs as ({error.strerror})"
        ) from error


def remove_tree(folder: Path) -> None:
    """Removes a folder in whatever state a program may have left it."""

    def allow(function: Any, path: str, _: object) -> None:
        os.chmod(Path(path).parent, 0o700)  # noqa: PTH101 of a path that may be anything
        function(path)

    try:
        shutil.rmtree(folder, onerror=allow)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)


def trial(sandbox: Sandbox) -> str | None:
    """Why this way does not work here, or None if it does."""
    if sandbox.mechanism == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    if sys.platform != "linux":
        return f"it needs Linux, this is {sys.platform}"
    try:
        outcome = sandbox.run(
            "import ctypes, decimal, hashlib, random, re, typing", "assert re.match('a', 'a')"
        )
    except (SandboxError, OSError) as error:
        return str(error)
    return None if outcome.passed else f"{outcome.state} {outcome.detail}".strip()


def find_sandbox(limits: Limits, *, unsafe: bool = False) -> Sandbox:
    """The best way that works here.

    Args:
        limits: What a program may use.
        unsafe: If nothing contains programs here, run them with resource limits alone.

    Raises:
        UserError: If programs cannot be contained here, with the reasons; or not even limited.
    """
    reasons = []
    for mechanism in ("namespaces", "bubblewrap"):
        sandbox = Sandbox(mechanism, limits)
        reason = trial(sandbox)
        if reason is None:
            return sandbox
        reasons.append(f"{mechanism}: {reason}")
    why = "; ".join(reasons)
    if not unsafe:
        raise UserError(
            f"generated programs cannot be contained on this machine ({why}); install bubblewrap, allow user "
            "namespaces, or accept the risk with --unsafe_execution"
        )
    for changes_user in dict.fromkeys((os.geteuid() == 0, False)):
        sandbox = Sandbox("limits", limits, changes_user)
        reason = trial(sandbox)
        if reason is None:
            return sandbox
    raise UserError(f"generated programs cannot even be limited here ({reason}); run on another machine")
