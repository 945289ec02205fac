import os
import signal
import subprocess
import sys
from pathlib import Path

from service.storage.scratch import remove_dead, scratch_folder

ROOT = Path(__file__).parents[4]
HOLDER = """
import sys
from pathlib import Path
from service.storage.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "file").write_bytes(b"half of")
    sys.stdout.write(f"{folder}\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""


def test_the_folder_of_a_killed_process_is_removed_after_the_minimum_age(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().decode().strip())
        os.utime(folder.parent, (0, 0))
        assert remove_dead(tmp_path, 60) == 0  # old, but in use

        process.send_signal(signal.SIGKILL)
        process.wait()

    with scratch_folder(tmp_path) as alive:
        os.utime(folder.parent)
        assert remove_dead(tmp_path, 60) == 0  # dead, but young
        os.utime(folder.parent, (0, 0))
        assert remove_dead(tmp_path, 60) == 1
        assert [alive.parent] == list(tmp_path.iterdir())
