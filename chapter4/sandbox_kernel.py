"""Lock up this process as `sandbox_policy.py` says: Linux's calls for it, through ctypes.

https://docs.kernel.org/userspace-api/landlock.html, …/seccomp_filter.html, man 2 capset.
Nothing is imported but Python's library, as the process has nothing else.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterator

from chapter4 import sandbox_policy as policy

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_DUMPABLE = 1, 22, 38, 4
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL = 0x7FFF0000, 0x00050000, 0x80000000
# Of `struct seccomp_data`: the call's number, the machine, and the low half of each argument.
NUMBER, MACHINE, ARGUMENTS = 0, 4, 16
AUDIT_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_CALLS = 0x40000000
LOAD, EQUAL, ANY_BIT, AT_LEAST, AND, RETURN = 0x20, 0x15, 0x45, 0x35, 0x54, 0x06

# landlock_create_ruleset, landlock_add_rule, landlock_restrict_self: the same on all machines.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
CREATE_RULESET_VERSION, RULE_PATH_BENEATH = 1, 1
WRITE_FILE, READ_FILE, READ_DIR, MAKE_REG, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 8, 1 << 14
_RIGHTS_OF_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}  # how many there are; later ones: 16


class Unsupported(Exception):  # noqa: N818
    """What the machine lacks, in words."""


def die_with_parent(parent: int) -> None:
    """Be killed when the process `parent` ends, which started this one.

    Raises:
        Unsupported: it has ended already.
    """
    _check("PR_SET_PDEATHSIG", _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        raise Unsupported("the process that started it has ended")


def lock_up(folder: str) -> None:
    """Give up, for good, all that the policy does not name; `folder` is the one to work in.

    `sys.path` is Python's library and nothing else (its options -I and -S).

    Raises:
        Unsupported: the machine cannot do it; the process must end then.
    """
    version = _landlock_version()
    program = _filter()
    for kind, limit in (
        (resource.RLIMIT_CPU, policy.CPU_S),
        (resource.RLIMIT_AS, policy.MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, policy.FILE_BYTES),
        (resource.RLIMIT_NOFILE, policy.OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        # Above the first one the CPU's sends SIGXCPU, above the second SIGKILL.
        resource.setrlimit(kind, (limit, limit + 1 if kind == resource.RLIMIT_CPU else limit))
    _drop_capabilities()
    _check("PR_SET_DUMPABLE", _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    _check("PR_SET_NO_NEW_PRIVS", _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _restrict_files(folder, version)
    _restrict_calls(program)
    _try_doors()


def _drop_capabilities() -> None:
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _check("capset", _libc.capset(header, struct.pack("6I", *[0] * 6)))


def _landlock_version() -> int:
    version = _libc.syscall(CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
    if version < 1:
        raise Unsupported(
            "Landlock is missing (Linux 5.13 or newer, with `landlock` in the kernel's list of "
            f"security modules): {os.strerror(ctypes.get_errno())}"
        )
    return int(version)


def _restrict_files(folder: str, version: int) -> None:
    handled = (1 << _RIGHTS_OF_VERSION.get(version, 16)) - 1
    attributes = struct.pack("Q", handled)
    if version >= 4:
        attributes += struct.pack("Q", 0b11)  # TCP: bind, connect
    if version >= 6:
        attributes += struct.pack("Q", 0b11)  # abstract UNIX sockets, signals
    rules = _check("Landlock", _libc.syscall(CREATE_RULESET, attributes, len(attributes), 0))
    for path, rights in list(_files(folder)):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights & handled, place)
        _check(path, _libc.syscall(ADD_RULE, rules, RULE_PATH_BENEATH, rule, 0))
        os.close(place)
    _check("Landlock", _libc.syscall(RESTRICT_SELF, rules, 0))
    os.close(rules)


def _files(folder: str) -> Iterator[tuple[str, int]]:
    """What may be reached, and the rights to it."""
    yield folder, READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | TRUNCATE
    for path in policy.READABLE:
        if os.path.isdir(path):
            yield path, READ_FILE | READ_DIR
        elif os.path.exists(path):
            yield path, READ_FILE | (WRITE_FILE if path == os.devnull else 0)
    for library in filter(os.path.isdir, sys.path):
        yield library, READ_DIR  # names alone; the import system lists folders
        with os.scandir(library) as entries:
            for entry in entries:
                if entry.name not in policy.NOT_LIBRARY and os.path.exists(entry.path):
                    yield entry.path, READ_FILE


def _filter() -> bytes:
    """The seccomp program: a list of (code, jump if true, jump if false, value)."""
    name = platform.machine()
    if name not in policy.MACHINES:
        raise Unsupported(f"it knows the system calls of {policy.MACHINES}, not of {name}")
    machine = policy.MACHINES.index(name)
    allow, refuse = (RETURN, 0, 0, SECCOMP_RET_ALLOW), (RETURN, 0, 0, SECCOMP_RET_ERRNO | 1)
    kill = (RETURN, 0, 0, SECCOMP_RET_KILL)
    program = [
        (LOAD, 0, 0, MACHINE),
        (EQUAL, 1, 0, AUDIT_MACHINES[name]),
        kill,
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32_CALLS),
        kill,
    ]
    for numbers in policy.SYSCALLS.values():
        number = numbers[machine]
        if number is not None:
            program += [(EQUAL, 0, 1, number), allow]
    openat = [
        (LOAD, 0, 0, ARGUMENTS + 2 * 8),
        (AND, 0, 0, policy.OPENAT_ACCESS_MASK),
        (EQUAL, 0, 1, policy.OPENAT_REFUSED_ACCESS),
        refuse,
        (LOAD, 0, 0, ARGUMENTS + 2 * 8),
        (ANY_BIT, 2, 0, policy.OPENAT_REFUSED_FLAG),
        (AND, 0, 0, policy.OPENAT_MODE_MASK),
        (EQUAL, 0, 1, policy.OPENAT_REFUSED_MODE),
        refuse,
        allow,
    ]
    fcntl = [(LOAD, 0, 0, ARGUMENTS + 1 * 8)]
    for command in policy.FCNTL_ALLOWED:
        fcntl += [(EQUAL, 0, 1, command), allow]
    fcntl.append(refuse)
    for numbers, steps in ((policy.OPENAT, openat), (policy.FCNTL, fcntl)):
        program += [(EQUAL, 0, len(steps), numbers[machine]), *steps]
    program.append(refuse)
    return b"".join(struct.pack("HBBI", *step) for step in program)


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def _restrict_calls(program: bytes) -> None:
    pointer = ctypes.byref(_Program(len(program) // 8, program))
    _check("seccomp", _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer, 0, 0))


def _try_doors() -> None:
    """A kernel that says yes and does nothing is as bad as none."""
    if _libc.socket(2, 1, 0) >= 0:
        raise Unsupported("seccomp restricts nothing")
    try:
        os.close(os.open("/", os.O_RDONLY))
    except PermissionError:
        return
    raise Unsupported("Landlock restricts nothing")


def _check(what: str, result: int) -> int:
    if result < 0:
        raise Unsupported(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result
