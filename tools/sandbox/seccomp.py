"""The system calls that code in a sandbox cannot make, as a program for the kernel's filter.

    load architecture ─ another one ──> kill
    load number ─ x32 ──> EPERM
                ─ one of DENIED ──> EPERM
                ─ clone3 ──> ENOSYS (its flags lie in memory, which a filter cannot read;
                             callers fall back on clone)
                ─ clone with a namespace flag ──> EPERM
                ─ socket of another family than the allowed ──> EAFNOSUPPORT
                ─ ioctl that types into terminals ──> EPERM
                ─ else ──> allowed

Numbers are those of the kernel's tables for x86-64 and for arm64. A list of what is denied, not of
what is allowed: numerical libraries use too many calls, and namespaces, an empty set of
capabilities and a user of its own stand in front of the rest.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Sequence

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL = 0x15
_JUMP_AT_LEAST = 0x35
_JUMP_ANY_BIT = 0x45
_RETURN = 0x06
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K

_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_KILL = 0x80000000

_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X32_BIT = 0x40000000
_NEW_NAMESPACES = 0x7E020000 | 0x80
"""All CLONE_NEW… flags, time namespaces included."""
_TYPE_INTO_TERMINAL = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

DENIED: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lookup_dcookie": (212, 18),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "shmget": (29, 194),
    "settimeofday": (164, 170),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}
_CLONE, _CLONE3, _SOCKET, _IOCTL = (56, 220), (435, 435), (41, 198), (16, 29)
_CONNECT, _SOCKETPAIR, _SOCK_STREAM = (42, 203), (53, 199), 1


def denying_program(machine: str | None = None) -> bytes:
    """What a kernel in a namespace of its own gets.

    AF_NETLINK stays: libzmq lists the network's interfaces on bind and aborts where it cannot.

    Args:
        machine: as ``platform.machine()``; this one unless given.
    """
    column, architecture = _ARCHITECTURES[machine or platform.machine()]
    lines = _opening(architecture)
    for numbers in DENIED.values():
        number = numbers[column]
        if number is not None:
            lines += _on(number, [_return(_ERRNO | errno.EPERM)])
    lines += _on(_CLONE3[column], [_return(_ERRNO | errno.ENOSYS)])
    lines += _on(
        _CLONE[column],
        [
            _instruction(_LOAD, _ARGUMENTS),
            _instruction(_JUMP_ANY_BIT, _NEW_NAMESPACES, 0, 1),
            _return(_ERRNO | errno.EPERM),
            _return(_ALLOW),
        ],
    )
    lines += _on(_SOCKET[column], _families((AF_UNIX, AF_INET, AF_INET6, AF_NETLINK)))
    typing = [_instruction(_LOAD, _ARGUMENTS + 8)]
    for request in _TYPE_INTO_TERMINAL:
        typing += [_instruction(_JUMP_EQUAL, request, 0, 1), _return(_ERRNO | errno.EPERM)]
    lines += _on(_IOCTL[column], [*typing, _return(_ALLOW)])
    return b"".join([*lines, _return(_ALLOW)])


def offline_program(machine: str | None = None) -> bytes:
    """What stands in for a network namespace: no socket from now on but pairs of streams.

    No ``connect``, and no sockets of datagrams, which can be sent to any name.
    """
    column, architecture = _ARCHITECTURES[machine or platform.machine()]
    lines = _opening(architecture)
    lines += _on(_SOCKET[column], [_return(_ERRNO | errno.EAFNOSUPPORT)])
    lines += _on(_CONNECT[column], [_return(_ERRNO | errno.EACCES)])
    lines += _on(
        _SOCKETPAIR[column],
        [
            _instruction(_LOAD, _ARGUMENTS + 8),
            _instruction(_AND, 0xF),
            _instruction(_JUMP_EQUAL, _SOCK_STREAM, 1, 0),
            _return(_ERRNO | errno.EAFNOSUPPORT),
            _return(_ALLOW),
        ],
    )
    return b"".join([*lines, _return(_ALLOW)])


def _opening(architecture: int) -> list[bytes]:
    return [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_JUMP_EQUAL, architecture, 1, 0),
        _return(_KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_JUMP_AT_LEAST, _X32_BIT, 0, 1),
        _return(_ERRNO | errno.EPERM),
    ]


def _on(number: int, body: Sequence[bytes]) -> list[bytes]:
    """``body``, which always returns, where the call is ``number``."""
    return [_instruction(_JUMP_EQUAL, number, 0, len(body)), *body]


def _families(allowed: Sequence[int]) -> list[bytes]:
    tests = [
        _instruction(_JUMP_EQUAL, family, len(allowed) - index, 0)
        for index, family in enumerate(allowed)
    ]
    return [
        _instruction(_LOAD, _ARGUMENTS),
        *tests,
        _return(_ERRNO | errno.EAFNOSUPPORT),
        _return(_ALLOW),
    ]


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)


def _return(action: int) -> bytes:
    return _instruction(_RETURN, action)
