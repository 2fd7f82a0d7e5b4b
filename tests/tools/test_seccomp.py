"""The filter's program, run by a small interpreter of its own: no system call is made."""

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.tools.sandbox import seccomp

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def decide(program, machine, number, *arguments, architecture=None):
    """What the system does with a call."""
    column, own = MACHINES[machine]
    del column
    padded = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("=IIQ6Q", number, own if architecture is None else architecture, 0, *padded)
    place, value = 0, 0
    while True:
        code, if_true, if_false, operand = struct.unpack_from("=HBBI", program, 8 * place)
        place += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
        elif code == 0x54:
            value &= operand
        elif code == 0x06:
            return operand
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}
            place += if_true if holds[code] else if_false


@pytest.mark.parametrize("machine", MACHINES)
def test_every_denied_call_is_refused_and_no_other(machine):
    column = MACHINES[machine][0]
    program = seccomp.denying_program(machine)
    denied = {numbers[column] for numbers in seccomp.DENIED.values()} - {None}
    special = {pair[column] for pair in ((56, 220), (435, 435), (41, 198), (16, 29))}
    for number in range(500):
        action = decide(program, machine, number)
        if number in denied:
            assert action == ERRNO | errno.EPERM
        elif number not in special:
            assert action == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_new_namespaces_other_sockets_and_typing_into_terminals_are_refused(machine):
    column = MACHINES[machine][0]
    program = seccomp.denying_program(machine)
    clone, clone3, socket, ioctl = ((56, 220)[column], 435, (41, 198)[column], (16, 29)[column])
    assert decide(program, machine, clone, 0x003D0F00) == ALLOW  # a thread
    for flag in (0x10000000, 0x20000000, 0x40000000, 0x00020000, 0x04000000, 0x08000000):
        assert decide(program, machine, clone, 0x11 | flag) == ERRNO | errno.EPERM
    assert decide(program, machine, clone3) == ERRNO | errno.ENOSYS
    for family in range(50):
        expected = ALLOW if family in (1, 2, 10, 16) else ERRNO | errno.EAFNOSUPPORT
        assert decide(program, machine, socket, family) == expected
    assert decide(program, machine, ioctl, 0, 0x5412) == ERRNO | errno.EPERM
    assert decide(program, machine, ioctl, 0, 0x5401) == ALLOW
    offline = seccomp.offline_program(machine)
    connect, pair = (42, 203)[column], (53, 199)[column]
    for family in range(50):
        assert decide(offline, machine, socket, family) == ERRNO | errno.EAFNOSUPPORT
    assert decide(offline, machine, connect, 3) == ERRNO | errno.EACCES
    for kind in range(16):  # of datagrams none: those can be sent to any name
        expected = ALLOW if kind == 1 else ERRNO | errno.EAFNOSUPPORT
        assert decide(offline, machine, pair, 1, kind | 0x80800) == expected
    assert decide(offline, machine, 0) == ALLOW


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_calls_of_another_architecture_kill(number, architecture):
    program = seccomp.denying_program("x86_64")
    action = decide(program, "x86_64", number, architecture=architecture)
    if architecture != 0xC000003E:
        assert action == KILL
    elif number >= 0x40000000:  # the x32 numbers name the same calls
        assert action == ERRNO | errno.EPERM
