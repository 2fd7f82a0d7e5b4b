"""Builds a level around the process that calls it: the first thing a forked kernel does.

    join the cgroup ─> leave the namespaces ─> own root, read-only ─> limits ─> no rights ─> seccomp

    /            tmpfs, read-only          /usr, Python's folders, mounts   read-only binds
    /home/agent  /tmp  /dev/shm  /run/k    folders of one tmpfs with a cap on bytes and files
    /input       the task's files, read-only                     /proc      shows this kernel only

Runs in a process of one thread, forked from the zygote: pid 1 of its own pid namespace at L2 and
up. Whatever fails raises, and the kernel does not start.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from swarm_sdk.tools.sandbox import linux, seccomp

HOME = "/home/agent"
INPUT = "/input"
SOCKETS = "/run/k"
PROXY_PORT = 3128
USER_ID = 1000
_WRITABLE = {"home": HOME, "tmp": "/tmp", "shm": "/dev/shm", "run": SOCKETS}  # noqa: S108
_COVERING = tuple(f"{path}/" for path in _WRITABLE.values())
_LINKS = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_ETC = {
    "passwd": f"agent:x:{USER_ID}:{USER_ID}::{HOME}:/bin/sh\n",
    "group": f"agent:x:{USER_ID}:\n",
    "hosts": "127.0.0.1 localhost\n",
    "nsswitch.conf": "hosts: files\n",
}
_ETC_OF_THE_MACHINE = ("/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives", "/etc/ssl/certs")

_STACK_BYTES = 8 * 2**20
_ARENA_BYTES = 2**30
_READ_RIGHTS = 1 | 4 | 8  # execute, read a file, list a folder
_LANDLOCK_SCOPES = 3  # abstract Unix sockets, signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is built around one kernel."""

    level: int
    root: str
    """An empty folder to build the new root on."""
    store: str
    """Holds ``home``, ``tmp``, ``shm`` and ``run``: what the kernel can write."""
    inputs: str
    mounts: tuple[str, ...]
    cgroups: tuple[str, ...]
    user_id: int | None
    """Of the machine, to become; ``None`` stays the user that it is."""
    is_nested: bool
    """Whether a user namespace gives the rights to build the rest."""
    memory_mb: int
    file_mb: int
    num_processes: int
    cpu_s: int | None
    has_proxy: bool

    @property
    def home(self) -> str:
        """The working directory, as the kernel sees it."""
        return HOME if self.level >= 2 else f"{self.store}/home"

    @property
    def input_folder(self) -> str:
        """The task's files, as the kernel sees them."""
        return INPUT if self.level >= 2 else self.inputs

    @property
    def socket_folder(self) -> str:
        """Where the kernel binds its sockets."""
        return SOCKETS if self.level >= 2 else f"{self.store}/run"


def isolate(plan: Plan) -> socket.socket | None:
    """Build everything of ``plan`` that can be built before the kernel makes its sockets.

    Returns:
        A socket that listens inside the network namespace, for the proxy, where one is wanted.

    Raises:
        OSError: the system refuses a step; its text names the step.
    """
    for folder in plan.cgroups:
        Path(folder, "cgroup.procs").write_text("0")
    listener = None
    if plan.level >= 2:
        kinds = linux.CLONE_NEWNS | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC | linux.CLONE_NEWNET
        linux.unshare(kinds, "mount, network, ipc and uts namespaces")
        _enter_root(plan)
        linux.bring_loopback_up()
        linux.set_host_name("sandbox")
        if plan.has_proxy:
            listener = socket.create_server(("127.0.0.1", PROXY_PORT), backlog=32)
        if plan.is_nested:  # the namespaces stay the zygote's: no right to change them is left
            user_id, group_id = os.getuid(), os.getgid()
            linux.unshare(linux.CLONE_NEWUSER, "user namespace")
            become(user_id, group_id, USER_ID)
    _limit(plan)
    if plan.level >= 1:
        _drop(plan)
    os.chdir(plan.home)
    os.umask(0o077)
    return listener


def close_network() -> None:
    """At L1, once the kernel has its sockets: no further one, and no way to another address.

    Those of the machine's services are Unix sockets, too, and no rule of Landlock keeps them away.
    """
    linux.install_filter(seccomp.offline_program(), all_threads=True)


def system_folders() -> list[str]:
    """What Python needs to run: the system's programs and libraries, and its own folders."""
    found = ["/usr"]
    for one in (sys.base_prefix, sys.prefix, str(Path(sys.executable).resolve().parents[1])):
        path = str(Path(one).resolve())
        if path != "/" and not any(path == top or path.startswith(f"{top}/") for top in found):
            found.append(path)
    if sys.prefix not in found and not sys.prefix.startswith("/usr"):
        found.append(sys.prefix)
    return found


def become(outer_user: int, outer_group: int, inner: int) -> None:
    """Name this user ``inner`` in the user namespace just entered."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{inner} {outer_user} 1")
    Path("/proc/self/gid_map").write_text(f"{inner} {outer_group} 1")


def build_base(root: str, mounts: Iterable[str] = ()) -> None:
    """Mount at ``root`` what all kernels see alike: sealed, with places for what is their own.

    In the fork-server, once: the mount namespace of a kernel begins as a copy of the server's.
    """
    hard = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("tmpfs", root, "tmpfs", hard, "size=1m,nr_inodes=1k,mode=755")
    for name in ("etc", "dev/pts", "proc"):
        os.makedirs(f"{root}/{name}")
    for path in (*_WRITABLE.values(), INPUT):
        os.makedirs(root + path)
    for name in _LINKS:
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
        elif os.path.isdir(f"/{name}"):
            _show(root, f"/{name}", f"/{name}")
    for name, text in _ETC.items():
        Path(root, "etc", name).write_text(text)
    for path in _ETC_OF_THE_MACHINE:
        if os.path.exists(path):
            _show(root, path, path)
    for folder in (*system_folders(), *mounts):
        _show(root, folder, folder)
    for name in _DEVICES:
        Path(root, "dev", name).touch()
        linux.mount(f"/dev/{name}", f"{root}/dev/{name}", None, linux.MS_BIND)
        linux.seal(f"{root}/dev/{name}")  # can be written to; its times and owner stay
    os.symlink("pts/ptmx", f"{root}/dev/ptmx")
    os.symlink("/proc/self/fd", f"{root}/dev/fd")
    linux.seal(root)


def _enter_root(plan: Plan) -> None:
    """Put what is this kernel's own in its places, and leave the machine's files."""
    root = plan.root
    if plan.mounts:  # over the base that all share: nobody else is to see their names
        build_base(root, plan.mounts)
    for name, path in _WRITABLE.items():
        linux.mount(f"{plan.store}/{name}", root + path, None, linux.MS_BIND)
    covered = [one for one in system_folders() if one.startswith(_COVERING)]
    for folder in (*covered, *plan.mounts):  # again: below a place that can be written to
        _show(root, folder, folder)
    _show(root, plan.inputs, INPUT)
    linux.mount(
        "devpts",
        f"{root}/dev/pts",
        "devpts",
        linux.MS_NOSUID | linux.MS_NOEXEC,
        "newinstance,ptmxmode=0666,mode=600",
    )
    flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("proc", f"{root}/proc", "proc", flags)
    os.chdir(root)
    linux.pivot_root(".", ".")  # the old root lies over the new one, until it is unmounted
    linux.unmount(".")
    os.chdir("/")


def _show(root: str, source: str, target: str) -> None:
    """Bind ``source`` read-only."""
    place = root + target
    if not os.path.exists(place):
        os.makedirs(place if os.path.isdir(source) else os.path.dirname(place), exist_ok=True)
        if not os.path.isdir(source):
            Path(place).touch()
    linux.mount(source, place, None, linux.MS_BIND | linux.MS_REC)
    linux.make_read_only(place)


def _limit(plan: Plan) -> None:
    def cap(kind: int, value: int) -> None:
        hardest = resource.getrlimit(kind)[1]
        if hardest != resource.RLIM_INFINITY:
            value = min(value, hardest)
        resource.setrlimit(kind, (value, value))

    cap(resource.RLIMIT_CORE, 0)
    cap(resource.RLIMIT_NOFILE, 512)
    cap(resource.RLIMIT_FSIZE, plan.file_mb << 20)
    if plan.cpu_s is not None:
        cap(resource.RLIMIT_CPU, plan.cpu_s)
    if plan.level in (1, 2):
        cap(resource.RLIMIT_DATA, plan.memory_mb << 20)
        # What is mapped shared is no "data"; stacks and arenas reserve more than they use.
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        reserved = plan.num_processes * _STACK_BYTES + _ARENA_BYTES
        cap(resource.RLIMIT_AS, mapped + reserved + (plan.memory_mb << 20))
    if plan.level == 2 or (plan.level == 1 and plan.user_id is not None):
        cap(resource.RLIMIT_NPROC, plan.num_processes)


def _drop(plan: Plan) -> None:
    linux.drop_bounding_set()  # which needs a right that the next lines give up
    if plan.user_id is not None:
        os.setgroups([])
        os.setresgid(plan.user_id, plan.user_id, plan.user_id)
        os.setresuid(plan.user_id, plan.user_id, plan.user_id)
    linux.forbid_new_privileges()
    linux.drop_capabilities()
    linux.set_dumpable()
    if plan.level == 1:
        _restrict_files(plan)
    linux.install_filter(seccomp.denying_program())


def _restrict_files(plan: Plan) -> None:
    version = linux.landlock_version()
    if not version:
        raise OSError("landlock: this system does not offer it")
    everything = (1 << (13 if version == 1 else 14 if version == 2 else 15)) - 1
    rules = linux.Landlock(handled=everything, scoped=_LANDLOCK_SCOPES if version >= 6 else 0)
    for path in _readable(plan):
        if os.path.isdir(path):
            rules.allow(path, _READ_RIGHTS)
        elif os.path.exists(path):
            rules.allow(path, 1 | 4)
    for name in ("null", "zero", "full", "random", "urandom"):
        rules.allow(f"/dev/{name}", 2 | 4)
    for name in _WRITABLE:  # and not what holds them: a folder that moves away leaves a link
        rules.allow(f"{plan.store}/{name}", everything)
    rules.restrict()


def _readable(plan: Plan) -> Iterator[str]:
    yield from system_folders()
    yield from (f"/{name}" for name in _LINKS if os.path.isdir(f"/{name}"))
    yield from _ETC_OF_THE_MACHINE
    yield from ("/etc/passwd", "/etc/group", "/etc/hosts", "/etc/nsswitch.conf", "/proc/self")
    yield plan.inputs
    yield from plan.mounts
