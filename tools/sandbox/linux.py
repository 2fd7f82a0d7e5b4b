"""The system calls that Python has no words for, each raising ``OSError`` with its name.

Nothing here decides anything: ``isolation.py`` does.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import socket
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_FILTER_FLAG_TSYNC = 1
_CAPABILITY_VERSION_3 = 0x20080522
_SIOCSIFFLAGS = 0x8914
_IFF_UP, _IFF_RUNNING = 0x1, 0x40

_NUMBERS = {  # pivot_root, seccomp
    "x86_64": (155, 317),
    "aarch64": (41, 277),
}
_MOUNT_SETATTR, _AT_RECURSIVE = 442, 0x8000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_RULE_PATH = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def is_known_machine() -> bool:
    """Whether the numbers of this processor's system calls are known here."""
    return platform.machine() in _NUMBERS


def _number(index: int) -> int:
    return _NUMBERS[platform.machine()][index]


def unshare(flags: int, what: str) -> None:
    """Leave namespaces for new ones."""
    _check(_libc.unshare(flags), f"unshare({what})")


def setns(descriptor: int, kind: int) -> None:
    """Enter a namespace."""
    _check(_libc.setns(descriptor, kind), "setns")


def mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    """Attach a file system, or a folder a second time."""
    encoded = [None if one is None else os.fsencode(one) for one in (source, kind, options)]
    result = _libc.mount(
        encoded[0], os.fsencode(target), encoded[1], ctypes.c_ulong(flags), encoded[2]
    )
    _check(result, f"mount({target})")


def make_read_only(target: str) -> None:
    """Forbid writing, devices and set-user-ID below ``target``, mounts in it included."""
    attributes = struct.pack("=QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    result = _libc.syscall(
        _MOUNT_SETATTR, -1, os.fsencode(target), _AT_RECURSIVE, attributes, len(attributes)
    )
    _check(result, f"mount_setattr({target})")


def seal(target: str) -> None:
    """Forbid changes to the files of one mount; what is mounted below keeps its rules."""
    attributes = struct.pack("=QQQQ", MS_RDONLY | MS_NOSUID, 0, 0, 0)
    result = _libc.syscall(_MOUNT_SETATTR, -1, os.fsencode(target), 0, attributes, len(attributes))
    _check(result, f"mount_setattr({target})")


def unmount(target: str) -> None:
    """Detach a mount; what is open in it lives on."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), f"umount({target})")


def pivot_root(new_root: str, put_old: str) -> None:
    """Make ``new_root`` the root of this mount namespace."""
    result = _libc.syscall(_number(0), os.fsencode(new_root), os.fsencode(put_old))
    _check(result, "pivot_root")


def set_host_name(name: str) -> None:
    """Name the machine, in this UTS namespace."""
    _check(_libc.sethostname(name.encode(), len(name)), "sethostname")


def bring_loopback_up() -> None:
    """Switch ``lo`` on; a new network namespace has it off."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sH14x", b"lo", _IFF_UP | _IFF_RUNNING)
        fcntl.ioctl(probe, _SIOCSIFFLAGS, request)


def drop_bounding_set() -> None:
    """Let nothing that is executed from here on gain a capability; without CAP_SETPCAP, nothing."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # past the last capability, or no right to drop any: then there is none to have


def drop_capabilities() -> None:
    """Give up every capability."""
    header = struct.pack("II", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


def forbid_new_privileges() -> None:
    """No program that is executed from here on gains rights (set-user-ID, file capabilities)."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(no_new_privs)")


def set_dumpable() -> None:
    """Let our own user look into ``/proc/PID`` again, which a change of user forbids."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl(dumpable)")


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(child_subreaper)")


def die_with_parent(signal_number: int) -> None:
    """Get ``signal_number`` when the parent ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl(pdeathsig)")


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install_filter(program: bytes, *, all_threads: bool = False) -> None:
    """Put a seccomp program (8 bytes an instruction) on this thread, or on all of the process."""
    buffer = ctypes.create_string_buffer(program, len(program))
    described = _FilterProgram(len(program) // 8, ctypes.addressof(buffer))
    if all_threads:
        flags = _SECCOMP_FILTER_FLAG_TSYNC
        result = _libc.syscall(_number(1), 1, flags, ctypes.byref(described))
    else:
        result = _libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(described), 0, 0)
    _check(result, "seccomp")


def landlock_version() -> int:
    """The version of Landlock that this system offers; 0 where there is none."""
    version = _libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    return max(0, int(version))


class Landlock:
    """Restrict this thread to a few folders.

    ``handled`` holds the rights that are refused unless a rule grants them.
    """

    def __init__(self, *, handled: int, scoped: int) -> None:
        attributes = struct.pack("=QQQ", handled, 0, scoped)
        size = 24 if scoped else 8
        self._rules = _check(_libc.syscall(_LANDLOCK_CREATE, attributes, size, 0), "landlock")

    def allow(self, path: str, rights: int) -> None:
        """Grant ``rights`` below ``path``."""
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            rule = struct.pack("=Qi", rights, descriptor)
            result = _libc.syscall(_LANDLOCK_ADD, self._rules, _LANDLOCK_RULE_PATH, rule, 0)
            _check(result, f"landlock({path})")
        finally:
            os.close(descriptor)

    def restrict(self) -> None:
        """Put the rules on this thread and on what it starts."""
        _check(_libc.syscall(_LANDLOCK_RESTRICT, self._rules, 0), "landlock_restrict_self")
        os.close(self._rules)
