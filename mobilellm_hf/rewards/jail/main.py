"""Run by path in a bare interpreter (`python -I -S`). It confines a fork of itself, watches it and says how it ended.

The process that stays outside, the guardian, kills the confined one when its time is over, or when the command pipe
closes, which also happens when the run that asked for it dies.
"""

import builtins
import fcntl
import json
import os
import select
import signal
import sys
import time
import types

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness  # noqa: E402
import kernel  # noqa: E402
import system_calls  # noqa: E402

del sys.path[0]


SYSTEM_PATHS = (
    "/usr/lib /usr/lib64 /usr/local/lib /lib /lib64 /etc/ld.so.cache /usr/share/zoneinfo "
    "/dev/null /dev/zero /dev/random /dev/urandom"
).split()
# Modules that the harness goes on using: the code gets copies of its own when it imports them.
HARNESS_MODULES = ("harness", "kernel", "system_calls", "json", "json.decoder", "json.encoder", "json.scanner")


def readable_paths() -> list[str]:
    """What confined code can read: this interpreter's library, the system's, and some devices."""
    found: list[str] = []
    for path in [*SYSTEM_PATHS, *sys.path, f"{sys.base_exec_prefix}/lib"]:
        if os.path.exists(path) and not any(path == other or path.startswith(other + "/") for other in found):
            found.append(path)
    return found


def confine(config: dict) -> None:
    """Closes the doors, in the order in which none is needed any more by the next."""
    layers, limits, work = config["layers"], dict(config["limits"]), config["work"]
    readable = readable_paths()
    # A group of its own: signals to the group do not reach the guardian.
    os.setsid()
    if "namespaces" in layers:
        inside = "/tmp"
        kernel.enter_root(work, inside, readable, limits["disk"], limits["files"])
        work = inside
    else:
        os.chdir(work)
        # The kernel would count all processes of this user.
        del limits["threads"]
    os.closerange(harness.COMMAND + 1, 4096)
    os.environ.clear()
    kernel.set_limits(limits)
    if layers:
        kernel.drop_privileges(other_user="namespaces" in layers)
    if "landlock" in layers:
        kernel.restrict_files([path for path in readable if os.path.exists(path)], work)
    if "seccomp" in layers:
        system_calls.install(kernel.libc)


def sealed(module: types.ModuleType):
    """The module's `run`, with its functions bound to builtins that the code cannot replace."""
    scope = {**vars(module), "__builtins__": dict(vars(builtins))}
    for name, function in vars(module).items():
        if isinstance(function, types.FunctionType):
            scope[name] = types.FunctionType(function.__code__, scope, name, function.__defaults__)
            scope[name].__kwdefaults__ = function.__kwdefaults__
    return scope["run"]


def run_confined(config: dict) -> None:
    """Becomes the confined process: ends with SystemExit, or at once."""
    try:
        confine(config)
    except BaseException as error:
        harness.report({"refused": f"{type(error).__name__}: {error}"})
        os._exit(1)
    harness.report({"confined": True})
    run = sealed(harness)
    for name in HARNESS_MODULES:
        sys.modules.pop(name, None)
    run(config["code"], with_tests=config["with_tests"])


def watch(child: int, command: int, status: int, seconds: float) -> None:
    """Waits for the child's end, or brings it about; then says how it ended."""
    handle = os.pidfd_open(child)
    started = time.monotonic()
    ready = select.select([handle, command], [], [], seconds)[0]
    if handle not in ready:
        os.kill(child, signal.SIGKILL)
    _, code, usage = os.wait4(child, 0)
    end_orphans()
    figures = {
        "timeout": not ready,
        "code": os.waitstatus_to_exitcode(code),
        "cpu": usage.ru_utime + usage.ru_stime,
        "seconds": time.monotonic() - started,
    }
    os.write(status, json.dumps(figures).encode())


def end_orphans() -> None:
    """Kills what the child left behind: as their subreaper this process is the parent of all of it."""
    while True:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                for pid in children():
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children() -> list[int]:
    """Process ids whose parent is this process."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == os.getpid():
                found.append(int(name))
    return found


def main() -> None:
    # Out of the way of the two descriptors that have fixed numbers.
    config_file, status, command, report, tests = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 20) for fd in sys.argv[1:])
    os.dup2(report, harness.REPORT)
    os.dup2(tests, harness.COMMAND)
    for descriptor in (report, tests, *(int(fd) for fd in sys.argv[1:] if int(fd) > harness.COMMAND)):
        os.close(descriptor)
    with os.fdopen(config_file, "rb") as file:
        config = json.loads(file.read())
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    try:
        if "namespaces" in config["layers"]:
            kernel.enter_namespaces()
    except OSError as error:
        harness.report({"refused": str(error)})
        return
    child = os.fork()
    if child == 0:
        os.close(status)
        os.close(command)
        run_confined(config)
    else:
        for descriptor in (0, 1, 2, harness.REPORT, harness.COMMAND):
            os.close(descriptor)
        watch(child, command, status, config["limits"]["seconds"])
        os._exit(0)


main()
