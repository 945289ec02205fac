"""`python -m api.stack`: PostgreSQL, Redis, S3, workers, sweeper and API on 127.0.0.1, until Ctrl-C.

Settings (DFUSION_…) hold for all parts, but for those that say where the servers are. Data, logs and the servers'
passwords are in one folder. Each part is started again when it dies.
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


def main() -> int:
    """Run the stack; exit code 0 if all parts ended well."""
    settings = Settings.or_exit()
    arguments = _arguments(settings)
    folder: Path = (arguments.folder or settings.data_dir / "stack").absolute()
    try:
        with file_lock(folder / "stack.lock") as lock:
            return _run(settings, arguments, folder, lock.fileno())
    except AlreadyRunningError:
        return _fail(f"{_who(folder)}; to start another beside it, choose another --folder (or DFUSION_DATA_DIR)")
    except (StartError, OSError) as error:
        return _fail(str(error))


def _arguments(settings: Settings) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m api.stack", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="data, logs and passwords; else DFUSION_DATA_DIR/stack")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (%(default)s)")
    parser.add_argument("--api-port", type=int, default=settings.port, help="(%(default)s; 0: a free one)")
    for name in ("postgres", "redis", "s3"):
        parser.add_argument(f"--{name}-port", type=int, default=0, help="(a free one)")
    parser.add_argument("--verbose", action="store_true", help="show all lines, not only those for people")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error("expected at least one worker")
    return arguments


def _run(settings: Settings, arguments: argparse.Namespace, folder: Path, lock_file: int) -> int:
    ports = Ports(arguments.api_port, arguments.postgres_port, arguments.redis_port, arguments.s3_port)
    if not ports.api:
        ports = replace(ports, api=free_port())
    layout = Layout(settings, folder, ports, arguments.workers)
    (folder / "stack.json").write_text(json.dumps({"pid": os.getpid(), "url": layout.url}), "utf-8")
    terminal = Terminal(max(map(len, layout.names)), arguments.verbose)
    supervisor = Supervisor(layout.logs, terminal, lock_file)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: _stop(supervisor))
    terminal.show("stack", f"starting in {folder}; Ctrl-C ends all")
    is_well = True
    try:
        _start(layout, supervisor, terminal)
        if not supervisor.stop.is_set():
            terminal.show("stack", _summary(layout))
        supervisor.stop.wait()
    except (StartError, OSError) as error:
        terminal.show("stack", f"cannot start: {error}; logs are in {layout.logs}")
        is_well = False
    finally:
        terminal.show("stack", "stopping; Ctrl-C once more does not wait")
        is_well = supervisor.end() and is_well
    terminal.show("stack", "all parts have ended" if is_well else "all parts have ended, not all of them well")
    return 0 if is_well else 1


def _stop(supervisor: Supervisor) -> None:
    """Stop; at the second time, at once."""
    if supervisor.stop.is_set():
        supervisor.hurry.set()
    supervisor.stop.set()


def _start(layout: Layout, supervisor: Supervisor, terminal: Terminal) -> None:
    """Start what others need first. Returns early once the supervisor is stopped."""

    def start_servers() -> None:
        for server in layout.servers:
            supervisor.start(server.program(), are_ours=False)

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
    """Bring the database up to date. Raises ProgramError."""
    layout.ensure_database()
    program = layout.migrate()
    with (layout.logs / "migrate.log").open("wb") as log:
        done = subprocess.run(
            program.command,
            cwd=program.folder,
            env=dict(program.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            check=False,
        )
    if done.returncode != 0:
        last = (layout.logs / "migrate.log").read_text("utf-8", "replace").strip().splitlines()[-1:]
        raise ProgramError(f"the migration failed: {''.join(last)}")


def _summary(layout: Layout) -> str:
    """What someone who has just started it wants to know."""
    key = " -H 'authorization: Bearer KEY'" if layout.settings.auth else ""
    return f"""
The service is ready.

  API       {layout.url}  (description at {layout.url}/docs)
  a round   curl -s {layout.url}/rounds{key} -H 'content-type: application/json' -d '{{
              "model": "shapes", "prompt_set": "shapes-attribute-train", "rounds": 1, "samples_per_prompt": 4}}'
  jobs      curl -s {layout.url}/jobs{key}
  workers   curl -s {layout.url}/workers{key}

  data      {layout.folder}
  logs      {layout.logs}
  servers   PostgreSQL on port {layout.postgres.port}, Redis on {layout.redis.port}, S3 on {layout.s3.port}; \
their passwords are in secrets.json
"""


def _who(folder: Path) -> str:
    """Who holds the folder."""
    try:
        known = json.loads((folder / "stack.json").read_text("utf-8"))
    except (OSError, ValueError):
        return f"a stack already runs in {folder}"
    return f"a stack already runs in {folder} (process {known['pid']}, {known['url']}), or is still ending"


def _fail(message: str) -> int:
    sys.stderr.write(f"stack: {message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
