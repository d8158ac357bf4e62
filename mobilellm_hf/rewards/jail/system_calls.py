"""The seccomp filter: which system calls confined code may make. All others fail with EPERM.

What is not in the list does not exist for the code: sockets, starting processes and programs, signals to others,
ptrace, mounts, keys, io_uring, changing modes and owners, reading other processes' memory, namespaces. `clone` makes
threads only, `socketpair` streams only, and `kill` and its siblings reach the process itself only.
"""

import ctypes
import os
import struct

# name=x86-64/aarch64, "-" where the machine has no such call.
ALLOWED = """
read=0/63 write=1/64 close=3/57 fstat=5/80 lseek=8/62 mmap=9/222 mprotect=10/226 munmap=11/215 brk=12/214
rt_sigaction=13/134 rt_sigprocmask=14/135 rt_sigreturn=15/139 rt_sigsuspend=130/133 rt_sigtimedwait=128/137
rt_sigpending=127/136 sigaltstack=131/132 pread64=17/67 pwrite64=18/68 readv=19/65 writev=20/66 preadv=295/69
pwritev=296/70 preadv2=327/286 pwritev2=328/287 pipe2=293/59 dup=32/23 dup3=292/24 flock=73/32 fsync=74/82
fdatasync=75/83 ftruncate=77/46 fallocate=285/47 fadvise64=221/223 sendfile=40/71 copy_file_range=326/285
splice=275/76 tee=276/77 openat=257/56 openat2=437/437 newfstatat=262/79 statx=332/291 statfs=137/43 fstatfs=138/44
faccessat=269/48 faccessat2=439/439 readlinkat=267/78 getdents64=217/61 getcwd=79/17 chdir=80/49 fchdir=81/50
mkdirat=258/34 unlinkat=263/35 renameat=264/38 renameat2=316/276 linkat=265/37 symlinkat=266/36 umask=95/166
ppoll=271/73 pselect6=270/72 epoll_create1=291/20 epoll_ctl=233/21 epoll_pwait=281/22 epoll_pwait2=441/441
eventfd2=290/19 timerfd_create=283/85 timerfd_settime=286/86 timerfd_gettime=287/87 signalfd4=289/74 sendto=44/206
recvfrom=45/207 sendmsg=46/211 recvmsg=47/212 shutdown=48/210 getsockopt=55/209 setsockopt=54/208
getsockname=51/204 getpeername=52/205 futex=202/98 futex_waitv=449/449 set_robust_list=273/99
get_robust_list=274/100 set_tid_address=218/96 rseq=334/293 membarrier=324/283 sched_yield=24/124
sched_getaffinity=204/123 sched_getparam=143/121 sched_getscheduler=145/120 sched_get_priority_max=146/125
sched_get_priority_min=147/126 nanosleep=35/101 clock_nanosleep=230/115 clock_gettime=228/113 clock_getres=229/114
gettimeofday=96/169 getitimer=36/102 setitimer=38/103 timer_create=222/107 timer_settime=223/110
timer_gettime=224/108 timer_delete=226/111 timer_getoverrun=225/109 times=100/153 getpid=39/172 gettid=186/178
getppid=110/173 getuid=102/174 geteuid=107/175 getgid=104/176 getegid=108/177 getgroups=115/158 getpgid=121/155
getsid=124/156 getresuid=118/148 getresgid=120/150 getrusage=98/165 getpriority=140/141 getcpu=309/168 uname=63/160
sysinfo=99/179 getrandom=318/278 madvise=28/233 mremap=25/216 mincore=27/232 msync=26/227 restart_syscall=219/128
exit=60/93 exit_group=231/94 open=2/- stat=4/- lstat=6/- access=21/- readlink=89/- getdents=78/- mkdir=83/-
rmdir=84/- unlink=87/- rename=82/- link=86/- symlink=88/- creat=85/- poll=7/- select=23/- epoll_create=213/-
epoll_wait=232/- eventfd=284/- signalfd=282/- pipe=22/- dup2=33/- getpgrp=111/- alarm=37/- pause=34/- time=201/-
arch_prctl=158/-
"""

# Machine -> column of ALLOWED, AUDIT_ARCH constant.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# What depends on arguments, by number on both machines.
CLONE, CLONE3, PRCTL, PRLIMIT = (56, 220), (435, 435), (157, 167), (302, 261)
KILL_CALLS = ((62, 129), (200, 130), (234, 131))
FCNTL, IOCTL, SOCKETPAIR = (72, 25), (16, 29), (53, 199)

CLONE_THREAD, NEW_NAMESPACES = 0x00010000, 0x7E020080
AF_UNIX, SOCK_STREAM, SOCKET_KIND = 1, 1, 0xF
PR_SET_NAME, PR_GET_NAME, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 15, 16, 22, 2
# They make the kernel send signals to any process of the user: F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP.
# TIOCSTI types into a terminal.
OWNER_COMMANDS, OWNER_REQUESTS = (8, 10, 15), (0x8901, 0x8902, 0x5412)

ALLOW, KILL, FAIL_EPERM, FAIL_ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
LOAD, EQUAL, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x45, 0x54, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16

Instruction = tuple[int, int, int, int]


def allowed_numbers(machine: str) -> list[int]:
    """The system calls of the list by number on a machine."""
    columns = [entry.split("=")[1].split("/")[MACHINES[machine][0]] for entry in ALLOWED.split()]
    return sorted({int(number) for number in columns if number != "-"})


def argument_is(index: int, values: tuple[int, ...], *, mask: int = 0xFFFFFFFF) -> list[Instruction]:
    """Goes on if the argument, masked, is one of the values; else the call fails."""
    tests = [(EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [(LOAD, 0, 0, ARGUMENTS + 8 * index), (AND, 0, 0, mask), *tests, (RETURN, 0, 0, FAIL_EPERM)]


def argument_is_not(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Goes on if the argument is none of the values; else the call fails."""
    tests = [(EQUAL, 0, 1, value) for value in values]
    fail = (RETURN, 0, 0, FAIL_EPERM)
    return [(LOAD, 0, 0, ARGUMENTS + 8 * index), *(step for test in tests for step in (test, fail))]


def instructions(machine: str, own_pid: int) -> list[Instruction]:
    """The filter as (code, jump if true, jump if false, operand) for a process of that id."""
    side, architecture = MACHINES[machine]
    program = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    for number in allowed_numbers(machine):
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    # The C library falls back to clone, whose flags can be seen; those of clone3 lie in memory.
    program += [(EQUAL, 0, 1, CLONE3[side]), (RETURN, 0, 0, FAIL_ENOSYS)]
    unix_stream = argument_is(0, (AF_UNIX,)) + argument_is(1, (SOCK_STREAM,), mask=SOCKET_KIND)
    rules = [
        (CLONE, argument_is(0, (CLONE_THREAD,), mask=CLONE_THREAD) + argument_is(0, (0,), mask=NEW_NAMESPACES)),
        (PRCTL, argument_is(0, (PR_SET_NAME, PR_GET_NAME))),
        (PRLIMIT, argument_is(0, (0, own_pid))),
        # A socket of datagrams could be sent to any address.
        (SOCKETPAIR, unix_stream),
        (FCNTL, argument_is_not(1, OWNER_COMMANDS)),
        (IOCTL, argument_is_not(1, OWNER_REQUESTS)),
        *((call, argument_is(0, (own_pid,))) for call in KILL_CALLS),
    ]
    for call, steps in rules:
        program += [(EQUAL, 0, len(steps) + 1, call[side]), *steps, (RETURN, 0, 0, ALLOW)]
    return [*program, (RETURN, 0, 0, FAIL_EPERM)]


def install(libc: ctypes.CDLL) -> None:
    """Puts the calling process under the filter, for good. NO_NEW_PRIVS must be set.

    Raises:
        OSError: the kernel has no seccomp filters, or the machine is none of `MACHINES`.
    """
    machine = os.uname().machine
    if machine not in MACHINES or struct.calcsize("P") != 8:
        raise OSError(f"no list of system calls for {machine}")
    program = instructions(machine, os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")
