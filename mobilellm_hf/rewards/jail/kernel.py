"""What Linux offers to confine a process, through the C library: namespaces, a root of its own, Landlock, limits."""

import ctypes
import os
import resource
import struct

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x04000000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 0x2, 0x4, 0x1000, 0x4000, 0x40000, 0x2
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
CAPSET = {"x86_64": 126, "aarch64": 91}
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
ATTR_READ_ONLY, ATTR_NO_SUID = 0x1, 0x2
PR_SET_PDEATHSIG, PR_SET_SECUREBITS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 28, 36, 38
SIGKILL = 9
# Nobody's ids: a user of such a number exists nowhere, so its processes can be counted and own nothing.
FIRST_UNUSED_ID, UNUSED_IDS = 0x60000000, 0x10000000

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
REFER, IOCTL_DEV = 1 << 13, 1 << 15
FIRST_LANDLOCK = (1 << 13) - 1


def check(result: int, what: str) -> int:
    """The result of a C call. Raises an OSError that names it if it is negative."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def prctl(option: int, value: int) -> None:
    check(libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)), "prctl")


def syscall(number: int, *arguments) -> int:
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return check(libc.syscall(ctypes.c_long(number), *values), f"system call {number}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    check(libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def set_read_only(target: str, *, recursive: bool) -> None:
    attributes = ctypes.create_string_buffer(struct.pack("QQQQ", ATTR_READ_ONLY | ATTR_NO_SUID, 0, 0, 0))
    flags = AT_RECURSIVE if recursive else 0
    syscall(MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), flags, attributes, 32)


def enter_namespaces() -> None:
    """Users (unless root), processes to be forked, network, IPC and names of their own."""
    user = os.getuid()
    kinds = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    group = os.getgid()
    check(libc.unshare(kinds | (CLONE_NEWUSER if user else 0)), "unshare")
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def enter_root(base: str, work: str, readable: list[str], disk: int, files: int) -> None:
    """Makes `base` the root: the readable paths, read-only, and an empty `work` in memory of `disk` bytes.

    Everything else of the machine is gone for the process, which must be in its own process namespace.
    """
    check(libc.unshare(CLONE_NEWNS), "unshare")
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("none", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in readable:
        inside = base + path
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        else:
            open(inside, "w").close()
        mount(path, inside, None, MS_BIND | MS_REC)
        set_read_only(inside, recursive=True)
    os.mkdir(base + work)
    mount("none", base + work, "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk},nr_inodes={files},mode=777")
    os.chdir(base)
    syscall(PIVOT_ROOT[os.uname().machine], b".", b".")
    check(libc.umount2(b".", MNT_DETACH), "umount")
    set_read_only("/", recursive=False)
    os.chdir(work)


def restrict_files(readable: list[str], work: str | None = None) -> None:
    """Landlock: only the readable paths can be read, only `work`, if any, written; no TCP, no signals to others.

    Raises:
        OSError: the kernel has no Landlock, or it is switched off.
    """
    version = syscall(LANDLOCK_CREATE, 0, 0, 1)
    files = FIRST_LANDLOCK | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    files |= IOCTL_DEV if version >= 5 else 0
    rules = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = syscall(LANDLOCK_CREATE, ctypes.create_string_buffer(rules), size, 0)
    for path in [*readable, *([work] if work else [])]:
        rights = EXECUTE | READ_FILE | READ_DIR if path != work else files
        if not os.path.isdir(path):
            rights = READ_FILE | (WRITE_FILE if path.startswith("/dev/") else EXECUTE)
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, folder))
        syscall(LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(folder)
    syscall(LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def drop_privileges(*, other_user: bool) -> None:
    """No capabilities, and none to be had. `other_user`: root becomes a user that nobody is."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if os.getuid() == 0 and other_user:
        unused = FIRST_UNUSED_ID + int.from_bytes(os.urandom(4), "big") % UNUSED_IDS
        os.setgroups([])
        os.setresgid(unused, unused, unused)
        os.setresuid(unused, unused, unused)
    elif os.getuid() == 0:
        os.setgroups([])
        prctl(PR_SET_SECUREBITS, 0x2F)  # a root without a root's powers, also in programs it starts
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    syscall(CAPSET[os.uname().machine], header, ctypes.create_string_buffer(24))
    prctl(PR_SET_PDEATHSIG, SIGKILL)


def set_limits(limits: dict) -> None:
    """Resource limits that cannot be raised again."""
    values = {
        "CPU": limits["cpu_seconds"],
        "AS": limits["memory"],
        "FSIZE": limits["disk"],
        "NOFILE": limits["open_files"],
        "NPROC": limits.get("threads", resource.RLIM_INFINITY),
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    for name, value in values.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        if hard != resource.RLIM_INFINITY:
            value = hard if value == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
