"""The system calls that Python has no names for: namespaces, mounts, capabilities, a system call filter.

Raises OSError like the ``os`` module, with what was tried in place of a file's name.
"""

import ctypes
import os
import platform
import struct

NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_BIND, _RECURSIVE, _PRIVATE = 0x1000, 0x4000, 0x40000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT = 0x1, 0x2, 0x4, 0x20
_AT_RECURSIVE, _DETACH = 0x8000, 2
_MOUNT_SETATTR = 442  # the same number on every architecture, as all system calls since Linux 5.1

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def unshare(flags: int) -> None:
    """Moves this process (for ``NEW_PID``: its children) to new namespaces."""
    _check(_libc.unshare(flags), "unshare")


def prctl(option: int, value: int, what: str) -> None:
    """``prctl(2)`` with one argument."""
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), what)


def die_with_parent() -> None:
    """This process is killed when the thread that started it ends. A change of user undoes it."""
    prctl(1, 9, "prctl PDEATHSIG")


def set_dumpable(*, allowed: bool) -> None:
    """Whether processes of the same user may trace this one and read its memory."""
    prctl(4, int(allowed), "prctl DUMPABLE")


def mount_tmpfs(place: str, size: int, files: int, mode: str) -> None:
    """An empty file system in memory, of at most ``size`` bytes and ``files`` files."""
    options = f"size={size},nr_inodes={files},mode={mode}".encode()
    flags = ctypes.c_ulong(_NO_SUID | _NO_DEVICES)
    _check(_libc.mount(b"tmpfs", place.encode(), b"tmpfs", flags, options), f"mount tmpfs {place}")


def mount_proc(place: str) -> None:
    """The processes of this process's own namespace."""
    flags = ctypes.c_ulong(_NO_SUID | _NO_DEVICES | 0x8)
    _check(_libc.mount(b"proc", place.encode(), b"proc", flags, None), "mount proc")


def keep_mounts_private() -> None:
    """What is mounted from here on is seen in this namespace only."""
    _check(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_RECURSIVE | _PRIVATE), None), "mount private")


def bind(source: str, target: str) -> None:
    """Shows ``source``, and what is mounted below it, at ``target``: for reading only."""
    flags = ctypes.c_ulong(_BIND | _RECURSIVE)
    _check(_libc.mount(source.encode(), target.encode(), None, flags, None), f"bind {source}")
    # The old way, a remount, does not reach the mounts below. Linux 5.12.
    attributes = struct.pack("QQQQ", _READ_ONLY | _NO_SUID, 0, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(-100),
        target.encode(),
        ctypes.c_uint(_AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )
    _check(result, f"mount_setattr {source}")


def change_root(place: str) -> None:
    """``place``, a mount, becomes the root, for reading only; the old root is not there any more."""
    os.chdir(place)
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _DETACH), "umount of the old root")
    os.chdir("/")
    flags = ctypes.c_ulong(_REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEVICES)
    _check(_libc.mount(None, b"/", None, flags, None), "mount / for reading only")


def drop_capabilities() -> None:
    """No privileges, and none to come by a setuid program."""
    prctl(38, 1, "prctl NO_NEW_PRIVS")
    header = struct.pack("Ii", 0x20080522, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


# x86-64 (the kernel's syscall_64.tbl) and ARM64 (its asm-generic/unistd.h).
_DENIED = {
    "socket": (41, 198),  # all families: also those that network namespaces do not hold, such as vsock
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    # Memory that no limit of a process counts.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # Wide doors to the kernel.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
}
# Where there is no namespace of processes: nothing that reaches another process, or makes one.
_DENIED_ALONE = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "fork": (57, None),
    "vfork": (58, None),
}
_CLONE, _CLONE3 = (56, 220), 435
_THREAD = 0x10000
_NEW_NAMESPACES = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_USER | NEW_PID | NEW_NET | 0x2000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x50000
_EPERM, _ENOSYS = 1, 38


def filter_system_calls(*, alone: bool) -> bool:
    """Refuses system calls that no exercise needs, for this process and its children, for ever.

    Args:
        alone: Also whatever makes another process, or reaches one.

    Returns:
        Whether this architecture's numbers are known; nothing is filtered otherwise.
    """
    column = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
    if column is None or struct.calcsize("P") != 8:
        return False
    program = _filter_program(column, alone)
    prctl(38, 1, "prctl NO_NEW_PRIVS")
    code = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _check(_libc.prctl(22, ctypes.c_ulong(2), header, 0, 0), "prctl SECCOMP")
    return True


def _filter_program(column: int, alone: bool) -> list[bytes]:
    """Classic BPF over ``seccomp_data``: number at 0, architecture at 4, low half of argument 0 at 16."""

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    denied = list(_DENIED.values()) + (list(_DENIED_ALONE.values()) if alone else [])
    numbers = [number for row in denied if (number := row[column]) is not None]
    program = [
        step(_LOAD, 4),
        step(_EQUAL, (0xC000003E, 0xC00000B7)[column], 1, 0),
        step(_RETURN, _KILL),
        step(_LOAD, 0),
    ]
    if column == 0:  # the x32 numbers of the same calls
        program += [step(_AT_LEAST, 0x40000000, 0, 1), step(_RETURN, _KILL)]
    for number in numbers:
        program += [step(_EQUAL, number, 0, 1), step(_RETURN, _ERROR | _EPERM)]
    # Its arguments lie in memory, where a filter cannot look; the C library then takes clone.
    program += [step(_EQUAL, _CLONE3, 0, 1), step(_RETURN, _ERROR | _ENOSYS)]
    program += [step(_EQUAL, _CLONE[column], 1, 0), step(_RETURN, _ALLOW), step(_LOAD, 16)]
    program += [step(_ANY_BIT, _NEW_NAMESPACES, 0, 1), step(_RETURN, _ERROR | _EPERM)]
    if alone:
        program += [step(_ANY_BIT, _THREAD, 1, 0), step(_RETURN, _ERROR | _EPERM)]
    return [*program, step(_RETURN, _ALLOW)]
