"""`python -m api.stack`: PostgreSQL, Redis, S3, workers, sweeper and API on 127.0.0.1, until Ctrl-C.

Settings (DFUSION_…) apply to all parts, except the addresses of the servers. One folder holds data, logs and the
servers' passwords. Parts that die are restarted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from api.stack.layout import Layout, Ports
from api.stack.program import free_port
from api.stack.supervisor import Supervisor
from api.stack.terminal import Terminal
from service.errors import AlreadyRunningError, ProgramError, StartError
from service.file_lock import file_lock
from service.settings import Settings

_MAX_PORT = 65535


def main() -> int:
    """Run the stack. Returns exit code 0 if all parts ended without errors."""
    settings = Settings.or_exit()
    arguments = _arguments(settings)
    folder: Path = (arguments.folder or settings.data_dir / "stack").absolute()
    try:
        with file_lock(folder / "stack.lock") as lock:
            return _run(settings, arguments, folder, lock.fileno())
    except AlreadyRunningError:
        return _fail(f"{_describe_holder(folder)}; start another one with another --folder (or DFUSION_DATA_DIR)")
    except (StartError, OSError) as error:
        return _fail(str(error))


def _arguments(settings: Settings) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m api.stack", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="folder of data, logs and passwords (DFUSION_DATA_DIR/stack)")
    parser.add_argument("--workers", type=int, default=2, help="number of worker processes (%(default)s)")
    parser.add_argument("--api-port", type=_port, default=settings.port, help="port; 0: any free port (%(default)s)")
    for name in ("postgres", "redis", "s3"):
        parser.add_argument(f"--{name}-port", type=_port, default=0, help="port; 0: any free port (%(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show all log lines, not only important ones")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error("expected at least one worker")
    return arguments


def _port(text: str) -> int:
    """The number of a port. Raises ValueError."""
    port = int(text)
    if not 0 <= port <= _MAX_PORT:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to {_MAX_PORT}, got {port}")
    return port


def _run(settings: Settings, arguments: argparse.Namespace, folder: Path, lock_file: int) -> int:
    # 1. layout and supervisor
    ports = Ports(arguments.api_port, arguments.postgres_port, arguments.redis_port, arguments.s3_port)
    if not ports.api:
        ports = replace(ports, api=free_port())
    layout = Layout(settings, folder, ports, arguments.workers)
    (folder / "stack.json").write_text(json.dumps({"pid": os.getpid(), "url": layout.url}), "utf-8")
    terminal = Terminal(max(map(len, layout.names)), arguments.verbose)
    supervisor = Supervisor(layout.logs, terminal, lock_file)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: _stop(supervisor))

    # 2. run until a signal arrives
    terminal.show("stack", f"starting in {folder}; Ctrl-C stops all parts")
    succeeded = True
    try:
        _start(layout, supervisor, terminal)
        if not supervisor.stop.is_set():
            terminal.show("stack", _summary(layout))
        supervisor.stop.wait()
    except (StartError, OSError) as error:
        terminal.show("stack", f"cannot start: {error}; logs are in {layout.logs}")
        succeeded = False
    finally:
        # 3. stop in reverse order
        terminal.show("stack", "stopping; press Ctrl-C again to kill all parts")
        succeeded = supervisor.shut_down() and succeeded

    terminal.show("stack", "all parts have ended" if succeeded else "all parts have ended, some with errors")
    return 0 if succeeded else 1


def _stop(supervisor: Supervisor) -> None:
    """Stop gracefully; a second call kills all parts."""
    if supervisor.stop.is_set():
        supervisor.kill.set()
    supervisor.stop.set()


def _start(layout: Layout, supervisor: Supervisor, terminal: Terminal) -> None:
    """Start the parts in order of dependency. Returns early when the supervisor is stopped."""

    def start_servers() -> None:
        for server in layout.servers:
            supervisor.start(server.program(), is_ours=False)

    steps: dict[str, Callable[[], None]] = {
        "servers": start_servers,
        "database": lambda: _migrate(layout),
        "workers": lambda: supervisor.start(*layout.workers()),
        "API": lambda: supervisor.start(layout.api()),
    }
    for name, start in steps.items():
        if supervisor.stop.is_set():
            return
        start()
        terminal.show("stack", f"{name}: ready")


def _migrate(layout: Layout) -> None:
    """Migrate the database to the newest schema. Raises ProgramError."""
    layout.ensure_database()
    program = layout.migrate()
    with (layout.logs / "migrate.log").open("wb") as log:
        process = subprocess.run(
            program.command,
            cwd=program.folder,
            env=dict(program.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            check=False,
        )

    if process.returncode != 0:
        lines = (layout.logs / "migrate.log").read_text("utf-8", "replace").strip().splitlines()
        raise ProgramError(f"the migration failed: {''.join(lines[-1:])}")


def _summary(layout: Layout) -> str:
    """The message after a successful start: addresses, first commands, folders and ports."""
    key = " -H 'authorization: Bearer KEY'" if layout.settings.auth else ""
    return f"""
The service is ready.

  API       {layout.url}  (documentation at {layout.url}/docs)
  a round   curl -s {layout.url}/rounds{key} -H 'content-type: application/json' -d '{{
              "model": "shapes", "prompt_set": "shapes-attribute-train", "rounds": 1, "samples_per_prompt": 4}}'
  jobs      curl -s {layout.url}/jobs{key}
  workers   curl -s {layout.url}/workers{key}

  data      {layout.folder}
  logs      {layout.logs}
  servers   PostgreSQL on port {layout.postgres.port}, Redis on {layout.redis.port}, S3 on {layout.s3.port}; \
their passwords are in secrets.json
"""


def _describe_holder(folder: Path) -> str:
    """Describe the stack that holds the folder's lock."""
    try:
        holder = json.loads((folder / "stack.json").read_text("utf-8"))
    except (OSError, ValueError):
        return f"a stack already runs in {folder}"
    return f"a stack already runs in {folder} (process {holder['pid']}, {holder['url']}) or is still stopping"


def _fail(message: str) -> int:
    sys.stderr.write(f"stack: {message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
