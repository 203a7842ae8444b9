"""Takes from this process what a reader of files never needs, by the kernel: connections and other programs.

A filter of system calls (seccomp, kernel.org/doc/html/latest/userspace-api/seccomp_filter.html) that holds for every library
and cannot be taken back. It needs no privilege; a kernel or sandbox without it leaves the process as it was.
"""

import ctypes
import errno
import platform
import struct
from typing import Final

_CALLS: Final = {
    # socket, connect, execve, execveat, io_uring_setup (which has sockets of its own), ptrace, process_vm_readv
    "x86_64": (0xC000003E, (41, 42, 59, 322, 425, 101, 310)),  # arch/x86/entry/syscalls/syscall_64.tbl
    "aarch64": (0xC00000B7, (198, 203, 221, 281, 425, 117, 270)),  # include/uapi/asm-generic/unistd.h
}
"""By machine: how the kernel calls it (linux/audit.h), and the numbers of the calls that are refused."""
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_MODE_FILTER: Final = 2
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # of the classic BPF that seccomp runs
_X32: Final = 0x40000000
"""Calls of the x32 interface have these numbers upward: the same calls by other names."""


def confine() -> bool:
    """Refuse connections and other programs from now on; tell whether the kernel agreed."""
    known = _CALLS.get(platform.machine())
    if known is None:
        return False
    machine, calls = known
    refused = [(_AT_LEAST, len(calls), 0, _X32)]
    refused += [(_EQUAL, len(calls) - index, 0, call) for index, call in enumerate(calls, start=1)]
    program = [
        (_LOAD, 0, 0, 4),  # struct seccomp_data: the machine whose calls they are
        (_EQUAL, 1, 0, machine),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number of the call
        *((code, true + 1, false, value) for code, true, false, value in refused),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    instructions = ctypes.create_string_buffer(packed, len(packed))
    length_and_address = struct.pack("@HP", len(program), ctypes.addressof(instructions))
    libc = ctypes.CDLL(None)
    return bool(
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
        and libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, length_and_address, 0, 0) == 0
    )
