"""`python -m worker.rank FOLDER RANK`: one additional process of a training (`worker.training_ranks`).

It ends when its standard input closes, that is when the worker that started it has ended.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dfusion.adapter import load_adapter
from dfusion.config import TrainingConfig
from dfusion.distributed import Ranks, process_group
from dfusion.errors import RankLostError
from dfusion.files import write_whole
from dfusion.models import DiffusionModel
from dfusion.shared_examples import load_shared_examples
from dfusion.trainer_state import TrainerState
from dfusion.training import Trainer
from worker.runner import failure_of
from worker.training_ranks import ADAPTER_FILE, EXAMPLES_FILE, GROUP_FILE, JOB_FILE, error_file, ready_file
from worker.workbench import set_up_torch_on


def main() -> None:
    """Take part in all remaining updates of the training."""
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    folder = Path(sys.argv[1])
    rank = int(sys.argv[2])

    job = json.loads((folder / JOB_FILE).read_text("utf-8"))
    ranks = Ranks(rank, 1 + len(job["devices"]))

    # 1. the model with the state of the training
    with _reporting_errors(folder, rank):
        trainer = _trainer(folder, job, ranks)
    ready_file(folder, rank).touch()

    # 2. the updates; an error is reported before the group ends, which the other processes notice
    with process_group(folder / GROUP_FILE, rank, ranks.size, job["timeout_seconds"]), _reporting_errors(folder, rank):
        while trainer.updates_done < trainer.updates_total:
            trainer.step()


def _trainer(folder: Path, job: dict[str, Any], ranks: Ranks) -> Trainer:
    """The trainer of this rank, with the state of rank 0."""
    device = job["devices"][ranks.rank - 1]
    set_up_torch_on(device, job["threads"])
    model = DiffusionModel.load(job["source"], device, job["dtype"])
    model.vae.to("cpu")  # only rank 0 decodes images
    if job["compiled"]:
        model.compile()
    load_adapter(model.unet, folder / ADAPTER_FILE, model.text_encoders)
    examples = load_shared_examples(folder / EXAMPLES_FILE)
    config = TrainingConfig.model_validate(job["config"])
    trainer = Trainer(model, examples, config, job["seed"], None, folder, ranks)
    trainer.load_state(TrainerState.load(folder))
    return trainer


@contextmanager
def _reporting_errors(folder: Path, rank: int) -> Iterator[None]:
    """Write an error to the rank's file and exit, except if another rank was lost, which rank 0 detects itself."""
    try:
        yield
    except RankLostError:
        raise SystemExit(1) from None
    except Exception as error:
        report = json.dumps(asdict(failure_of(error)) | {"traceback": traceback.format_exc()})

        def write(path: Path) -> None:
            path.write_text(report, "utf-8")

        write_whole(error_file(folder, rank), write)
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    # os.read releases the GIL, so the process can end while this thread is blocked in it
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
