"""What runs in the contained process; ``outside.py`` starts it as ``python -c START``.

Three processes. The first enters the namespaces, the second, process 1 there, makes the file system
and watches, and the third gives up every privilege and runs the program. With process 1 goes
everything that the program may have started. They read frames (length, bytes) from standard input
and write lines to the descriptor of ``setup["report"]``; see ``outside.py`` for who says what.
"""

import builtins
import contextlib
import errno
import json
import os
import resource
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from eval.sandbox import kernel

SCRATCH = "/scratch"
DEVICES = ("null", "zero", "full", "random", "urandom")
_INSIDE_USER = 1000
_TICK = 0.01


def main() -> None:
    """Reads the setup, then follows it."""
    kernel.die_with_parent()
    setup = json.loads(_frame_reader(0)())
    try:
        if os.getppid() != setup["parent"] and setup["mechanism"] != "bubblewrap":
            os._exit(1)  # it ended before it could be heard of
        if setup["mechanism"] == "namespaces":
            _enter_namespaces(setup["user"])
        watcher = os.fork()
        if watcher == 0:
            _watch(setup)
        os.waitpid(watcher, 0)
    except OSError as error:
        _trouble(setup, error)


def _say(setup: dict[str, Any], word: str, value: Any) -> None:
    os.write(setup["report"], (json.dumps([word, value]) + "\n").encode())


def _trouble(setup: dict[str, Any], error: OSError) -> None:
    _say(setup, "trouble", f"{error.filename or error.__class__.__name__}: {error.strerror}")


def _enter_namespaces(user: int | None) -> None:
    """New namespaces for all that follows.

    The superuser needs no user namespace, and without one can read a Python that others cannot. One
    without the right to do so (in most containers) becomes another user first: limits on the number
    of processes do not bind the user 0, whatever a user namespace calls him.
    """
    flags = kernel.NEW_MOUNTS | kernel.NEW_PID | kernel.NEW_NET | kernel.NEW_IPC | kernel.NEW_UTS
    if user is not None:
        try:
            kernel.unshare(flags)
            return
        except OSError as error:
            if error.errno != errno.EPERM:
                raise
        _become(user)
        kernel.set_dumpable(allowed=True)  # or the files below belong to user 0
        kernel.die_with_parent()
    outside = os.getuid(), os.getgid()
    kernel.unshare(flags | kernel.NEW_USER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_INSIDE_USER} {outside[0]} 1")
    Path("/proc/self/gid_map").write_text(f"{_INSIDE_USER} {outside[1]} 1")


def _become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _watch(setup: dict[str, Any]) -> NoReturn:
    """Process 1: ends, and with it its namespace, when the program has ended or gone over a limit."""
    try:
        kernel.die_with_parent()
        if setup["mechanism"] == "namespaces":
            _make_root(setup)
        # Not only is nobody to trace this process: nobody is to learn from it what comes next.
        kernel.set_dumpable(allowed=False)
        program = os.fork()
        if program == 0:
            _run(setup)
        os.close(0)
        _say(setup, "end", _watch_until_end(program, setup))
    except OSError as error:
        _trouble(setup, error)
    os._exit(0)


def _make_root(setup: dict[str, Any]) -> None:
    """A root of its own: the system's and Python's libraries, for reading; no home, no data, no secrets."""
    kernel.keep_mounts_private()
    root = setup["folder"]
    kernel.mount_tmpfs(root, 2**20, 1024, "755")
    for path in setup["visible"]:
        target = Path(root + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_symlink():
            target.symlink_to(Path(path).readlink())
            continue
        if Path(path).is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        kernel.bind(path, str(target))
    (Path(root) / "dev").mkdir(exist_ok=True)
    for name in DEVICES:
        (Path(root) / "dev" / name).touch()
        kernel.bind(f"/dev/{name}", f"{root}/dev/{name}")
    for name in ("proc", SCRATCH[1:]):
        (Path(root) / name).mkdir(exist_ok=True)
    kernel.mount_proc(f"{root}/proc")
    kernel.mount_tmpfs(root + SCRATCH, setup["disk"], 1024, "1777")
    kernel.change_root(root)


def _watch_until_end(program: int, setup: dict[str, Any]) -> dict[str, Any]:
    """Waits; kills for time and for the memory and processor time of all processes together."""
    start, reason = time.monotonic(), None
    alone = setup["mechanism"] == "limits"
    while True:
        # The dead of others come to process 1 too.
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == program:
                    code = os.waitstatus_to_exitcode(ended[1])
                    return {"code": code, "reason": reason or _reason_of(code)}
        seconds, memory = _used([program] if alone else _others())
        over_time = time.monotonic() - start > setup["wall_seconds"] or seconds > setup["cpu_seconds"]
        over_memory = memory > setup["memory"]
        if over_time or over_memory:
            reason = reason or ("timed out" if over_time else "out of memory")
            os.kill(program, signal.SIGKILL)
        time.sleep(_TICK)


def _reason_of(code: int) -> str | None:
    return "timed out" if code == -signal.SIGXCPU else None


def _others() -> list[int]:
    me = (os.getpid(), os.getppid())
    numbers = (int(place.name) for place in Path("/proc").iterdir() if place.name.isdigit())
    return [number for number in numbers if number not in me]


def _used(processes: list[int]) -> tuple[float, int]:
    """Processor seconds and bytes of memory of processes; those of their dead children count too."""
    ticks = pages = 0
    for process in processes:
        with contextlib.suppress(OSError):  # one that has just ended
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])
            pages += int(fields[21])
    return ticks / os.sysconf("SC_CLK_TCK"), pages * resource.getpagesize()


def _run(setup: dict[str, Any]) -> NoReturn:
    """The program's process: nothing but itself is left to it."""
    try:
        kernel.die_with_parent()
        _give_up_privileges(setup)
    except OSError as error:
        _trouble(setup, error)
        os._exit(1)
    run_program(setup["report"], setup["channel"])


def _give_up_privileges(setup: dict[str, Any]) -> None:
    alone = setup["mechanism"] == "limits"
    os.chdir(setup["folder"] if alone else SCRATCH)
    silence = os.open("/dev/null", os.O_RDWR)
    channel = setup["channel"] = os.dup(0)
    for standard in (0, 1, 2):
        os.dup2(silence, standard)
    for place in list(Path("/proc/self/fd").iterdir()):
        if int(place.name) not in (0, 1, 2, channel, setup["report"]):
            with contextlib.suppress(OSError):  # that of the listing itself
                os.close(int(place.name))
    if setup["user"] is not None and os.getuid() == 0:
        _become(setup["user"])
    kernel.drop_capabilities()
    kernel.set_dumpable(allowed=True)
    kernel.die_with_parent()
    _set_limits(setup, alone)
    filtered = kernel.filter_system_calls(alone=alone)
    if alone and os.getuid() == 0 and not filtered:
        # Limits on the number of processes do not bind this user.
        raise OSError(errno.EPERM, "nothing bounds the processes of user 0", "run as another user")
    # It was imported for this; the program is not to find it.
    for name in [name for name in sys.modules if name.split(".")[0] == "eval"]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path not in setup["not_on_path"]] + setup["packages"]


def _set_limits(setup: dict[str, Any], alone: bool) -> None:
    # With no process to make (alone), none can outlive the program: there is no namespace to end it.
    processes = 0 if alone else setup["processes"]
    limits = {
        resource.RLIMIT_AS: setup["memory"],
        resource.RLIMIT_CPU: int(setup["cpu_seconds"]) + 2,  # the watcher is earlier, and to the tick
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_NOFILE: setup["open_files"],
        resource.RLIMIT_FSIZE: setup["disk"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def run_program(report: int, channel: int) -> NoReturn:
    """Defines the program, then runs its test.

    A pass is the token, which comes with the test, after ``defined`` has been said: a program that
    leaves early by any door, or prints what it likes, has no token to show. What follows does not
    look up by name anything that the program can replace in ``builtins`` or in a module. That is as
    far as it goes: program and test share this interpreter and its pipes (as everywhere with
    HumanEval), so that code written to cheat can say ``defined`` itself and read the token, find it
    on its stack, or return objects that are equal to everything.
    """
    compile_, exec_, exit_, write, dumps = compile, exec, os._exit, os.write, json.dumps
    frame, type_, text, any_error = _frame_reader(channel), type, str, BaseException
    name = "solution"  # not __main__: what a program does as one is not part of the answer
    module = sys.modules[name] = types.ModuleType(name)
    names = module.__dict__
    names["__builtins__"] = builtins
    try:
        source = frame()
        write(report, b'["started", null]\n')
        exec_(compile_(source, "solution.py", "exec"), names)
        write(report, b'["defined", null]\n')
        token, test = frame(), frame()
        exec_(compile_(test, "test.py", "exec"), names)
        write(report, b'["passed", "' + token + b'"]\n')
    except any_error as error:
        try:
            message = dumps(["error", [type_(error).__name__, text(error)[:200]]]).encode() + b"\n"
        except any_error:  # its text cannot be had, or the program has broken what makes messages
            message = b'["error", ["unknown", ""]]\n'
        write(report, message)
    finally:
        exit_(0)  # no exit handlers of the program


def _frame_reader(channel: int) -> Callable[[], bytes]:
    """Reads frames: the length in eight bytes, then the bytes."""
    # Names of its own, so that it works the same after the program has replaced them.
    read, unpack, size, error = os.read, struct.unpack, len, EOFError

    def exactly(length: int) -> bytes:
        parts = b""
        while missing := length - size(parts):
            part = read(channel, missing)
            if not part:
                raise error
            parts += part
        return parts

    return lambda: exactly(unpack("Q", exactly(8))[0])
