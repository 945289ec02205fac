"""Starts Python programs as forks of a process that has already imported their modules.

A worker imports torch for seconds. A test that starts many forks them instead: the program is the same, and starts in
a tenth of a second. A forked service forks its embedded worker, too. So are the processes of pytest-xdist.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.forking_preload"])
_SET_NAME, _SET_CHILD_SUBREAPER = 15, 36
"""Options of prctl(2)."""
_POLL_SECONDS = 0.01
_ROOT = Path(__file__).parents[1]
_RUN_SECONDS = 120
"""Of a program that is expected to end."""


class Forked:
    """A forked program, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, target: Callable[..., None], *arguments: Any, may_fork: bool = False) -> None:
        self._process = _CONTEXT.Process(target=target, args=arguments, daemon=not may_fork)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code; None while the program runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the program has ended. Returns its exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, if the program runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(arguments: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> Forked:
    """Run `python -m MODULE ARGUMENT…` in a fork.

    Args:
        arguments: "-m", the module and its arguments.
        folder: The working directory.
        environment: All environment variables.
        log: The file that gets the output.
    """
    return Forked(_run_program, tuple(arguments), str(folder), dict(environment), str(log))


def run(arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENT…` in a fork until it ends. Its whole output counts as standard output.

    Raises subprocess.TimeoutExpired, and kills it, if it does not end.
    """
    with tempfile.NamedTemporaryFile() as log:
        process = fork(arguments, folder, environment, Path(log.name))
        try:
            code = process.wait(_RUN_SECONDS)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, code, stdout=log.read().decode())


def call(function: Callable[..., None], *arguments: Any) -> None:
    """Call an importable function in a fork and wait for it. Raises RuntimeError if it fails."""
    code = Forked(function, *arguments).wait()
    if code != 0:
        raise RuntimeError(f"{function.__qualname__} ended with exit code {code}")


def fork_test_processes() -> None:
    """Let pytest-xdist fork its processes on this machine. They use the fork server of this process."""
    from execnet import gateway_io

    class ForkedGateway(gateway_io.Popen2IO):
        def __init__(self, execmodel: Any) -> None:
            stdin, to_child = _CONTEXT.Pipe(duplex=False)
            from_child, stdout = _CONTEXT.Pipe(duplex=False)
            process = Forked(_run_test_process, stdin, stdout, str(Path.cwd()), _authentication_key(), may_fork=True)
            self.wait, self.kill = process.wait, process.kill
            for connection in (stdin, stdout):
                connection.close()
            super().__init__(_file_of(to_child, "wb"), _file_of(from_child, "rb"), execmodel)

    def create(spec: Any, execmodel: Any) -> Any:
        is_usual = spec.popen and not spec.python and not spec.via
        return ForkedGateway(execmodel) if is_usual else create_other(spec, execmodel)

    create_other = gateway_io.create_io
    gateway_io.create_io = create
    with contextlib.chdir(_ROOT):  # the server imports the modules of this checkout
        forkserver.ensure_running()


def _authentication_key() -> bytes | None:
    """What the fork server expects from its clients, since Python 3.14."""
    return getattr(forkserver._forkserver, "_forkserver_authkey", None)  # type: ignore[attr-defined]


def _file_of(connection: Connection, mode: str) -> Any:
    with connection:
        return os.fdopen(os.dup(connection.fileno()), mode)


def _run_test_process(stdin: Connection, stdout: Connection, folder: str, authentication_key: bytes | None) -> None:
    # use the fork server of the parent
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server.ensure_running = resource_tracker.ensure_running
    server._forkserver_authkey = authentication_key
    _set_name("pytest")
    multiprocessing.set_start_method(None, force=True)  # the default

    for descriptor, connection in enumerate((stdin, stdout)):
        os.dup2(connection.fileno(), descriptor)
        connection.close()
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    os.chdir(folder)
    try:
        exec(eval(sys.stdin.readline()))  # as execnet starts Python
    finally:
        atexit._run_exitfuncs()


def _run_program(arguments: Sequence[str], folder: str, environment: Mapping[str, str], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    os.close(output)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # the default
    if tuple(arguments) == ("-m", "api") and not environment.get("DFUSION_BROKER_URL"):
        _fork_embedded_workers()
    _run_module(arguments, environment)


def _run_module(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    flag, module, *rest = arguments
    assert flag == "-m", arguments
    _set_name(module)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *rest]
    # it is imported already, which can confuse other programs
    warnings.filterwarnings("ignore", "'.*' found in sys.modules after import of package", RuntimeWarning)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _set_name(name: str) -> None:
    """Set the name of this process that `ps` shows."""
    ctypes.CDLL(None).prctl(_SET_NAME, name.encode(), 0, 0, 0)


def _fork_embedded_workers() -> None:
    """Let the service of this process fork its workers instead of starting Python.

    A process with threads must not fork. So a helper does, which is forked before the service starts. It leaves each
    worker without a parent, and Linux makes the worker a child of the service, which is set up to adopt such processes.
    """
    from api import embedded

    requests, helper_side = socket.socketpair(type=socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        requests.close()
        _fork_on_request(helper_side)
    helper_side.close()
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    class ForkedWorker(_ForkedWorker):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(requests, *arguments, **options)

    embedded.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=ForkedWorker, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )


def _fork_on_request(requests: socket.socket) -> None:
    """Fork programs until the service ends."""
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 2)
        if not message:
            os._exit(0)
        pids, pids_side = os.pipe()
        parent = os.fork()
        if parent == 0:
            if worker := os.fork():
                os.write(pids_side, str(worker).encode())
                os._exit(0)
            requests.close()
            _run_worker(json.loads(message), *descriptors)

        os.waitpid(parent, 0)  # from now on the worker is a child of the service
        requests.send(os.read(pids, 100))
        for descriptor in (pids, pids_side, *descriptors):
            os.close(descriptor)


def _run_worker(request: Mapping[str, Any], stdin: int, inherited: int) -> None:
    """Run a program with these open files, and exit like Python."""
    code = 1
    try:
        os.dup2(stdin, 0)
        os.dup2(inherited, request["inherited"])
        sys.stdin = os.fdopen(0, closefd=False)
        _run_module(request["arguments"], request["environment"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _ForkedWorker:
    """A forked program, with those methods of `subprocess.Popen` that `api.embedded` uses."""

    def __init__(
        self,
        requests: socket.socket,
        command: Sequence[str],
        *,
        stdin: int,
        env: Mapping[str, str],
        pass_fds: Sequence[int],
    ) -> None:
        assert stdin == subprocess.PIPE
        (inherited,) = pass_fds
        end, self._stdin = os.pipe()
        request = {"arguments": command[1:], "environment": dict(env), "inherited": inherited}
        socket.send_fds(requests, [json.dumps(request).encode()], [end, inherited])
        os.close(end)
        self.pid = int(requests.recv(100))
        self.returncode: int | None = None
        self._waiting = threading.Lock()

    def poll(self) -> int | None:
        """Return the exit code; None while the program runs."""
        with self._waiting:
            if self.returncode is None:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                if ended:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        """Wait until the program has ended. Returns its exit code. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked worker", timeout)
            time.sleep(_POLL_SECONDS)
        return code

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._stdin)
        self.wait()
