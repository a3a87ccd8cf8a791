"""What code of the tool `python` may do: everything that limits it, and why.

It runs in one process, one thread, without privileges, a network or other programs; it reads
Python's own library and reads and writes one fresh folder. Four things of the kernel see to that,
each of which a normal user may ask for and nobody can take back:

- resource limits (setrlimit) bound what it uses,
- all capabilities go, so that for root the rest holds, too,
- Landlock (Linux 5.13) leaves it the files named here,
- seccomp leaves it the system calls named here: all that acts on other processes, sockets, or
  the kernel is missing, so Landlock's gaps (chmod, truncate, …) are closed as well.

User namespaces would hide paths, too, but many machines forbid them to normal users; without them
the code can ask whether a file exists (stat), but neither read it nor list its folder.
This file imports nothing: the process that locks itself up reads it.
"""

# -- Time, memory, files: enforced by the kernel, except the three of the parent. ----------------

WALL_S = 10.0  # the parent kills it then
CPU_S = 10  # SIGXCPU; holds if the parent is late
MEMORY_BYTES = 512 * 2**20  # of address space; Python itself takes about 30 MiB
FILE_BYTES = 8 * 2**20  # the largest file it may write
OPEN_FILES = 32
# The parent looks every `FOLDER_CHECK_S` and kills it when its files are more than this. As no
# file can be removed, renamed or made without a name, none is hidden from that look.
FOLDER_BYTES = 32 * 2**20
FOLDER_FILES = 256
FOLDER_CHECK_S = 0.05
# The parent kills it when it prints more, so nobody stores a gigabyte.
OUTPUT_BYTES = 64 * 2**10
# So many run at once in one agent; others wait.
AT_ONCE = 4

# -- Files: Landlock. -----------------------------------------------------------------------------

# Besides Python's library without its third-party packages (`site-packages`). In its folder it may
# make plain files, read them and write them, but neither folders, links, sockets nor pipes; and
# remove nothing, as a removed file that is still open counts nowhere.
READABLE = ("/usr/share/zoneinfo", "/dev/null", "/dev/urandom")
NOT_LIBRARY = ("site-packages", "dist-packages")
# Their shared libraries lie elsewhere, so they are loaded before the door closes.
PRELOADED = ("zlib", "bz2", "lzma", "hashlib", "sqlite3", "decimal", "statistics", "zoneinfo")

# -- System calls: seccomp. All others fail with EPERM. -------------------------------------------

# Numbers: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux.
# `None`: this machine has no such call.
MACHINES = ("x86_64", "aarch64")
SYSCALLS: dict[str, tuple[int | None, int | None]] = {
    # Files that are open, and paths: which ones, Landlock says.
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "lseek": (8, 62),
    "ftruncate": (77, 46),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "fadvise64": (221, 223),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "stat": (4, None),
    "lstat": (6, None),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "umask": (95, 166),
    # Its own memory.
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    # Its own signals and end; none of these reaches another process.
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "exit": (60, 93),
    "exit_group": (231, 94),
    # Waiting, the time, and who it is. Python's locks are futexes.
    "futex": (202, 98),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrandom": (318, 278),
    "uname": (63, 160),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
}
# Two more depend on an argument. `openat`: not the access mode 3, to which Landlock gives no right,
# so it opens every file; not O_TMPFILE, a file without a name; and not O_TRUNC without writing, as
# Landlock checks that from Linux 6.2 on only. `open` and `openat2` are missing.
OPENAT = (257, 56)
OPENAT_ACCESS_MASK, OPENAT_REFUSED_ACCESS = 0o3, 0o3  # O_ACCMODE
OPENAT_REFUSED_FLAG = 0o20000000  # __O_TMPFILE
OPENAT_MODE_MASK, OPENAT_REFUSED_MODE = 0o1003, 0o1000  # O_TRUNC | O_ACCMODE, O_TRUNC | O_RDONLY
# `fcntl`: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. With F_SETOWN and F_SETSIG it could
# have the kernel send signals to the parent.
FCNTL = (72, 25)
FCNTL_ALLOWED = (0, 1, 2, 3, 1030)
