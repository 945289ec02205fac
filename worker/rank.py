"""`python -m worker.rank FOLDER RANK`: one further process of a training (`worker.training_ranks`).

It ends when its standard input closes, that is when the worker that started it has ended.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from dfusion.adapter import load_adapter
from dfusion.config import TrainingConfig
from dfusion.distributed import Ranks, process_group
from dfusion.models import DiffusionModel
from dfusion.shared_examples import shared_examples
from dfusion.trainer_state import TrainerState
from dfusion.training import Trainer
from worker.training_ranks import ADAPTER_FILE, EXAMPLES_FILE, GROUP_FILE, JOB_FILE, ready_file
from worker.workbench import set_up_torch_on


def main() -> None:
    """Take part in all remaining updates of the training."""
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    folder = Path(sys.argv[1])
    rank = int(sys.argv[2])

    # 1. the model with the state of the training
    job = json.loads((folder / JOB_FILE).read_text("utf-8"))
    device = job["devices"][rank - 1]
    ranks = Ranks(rank, 1 + len(job["devices"]))
    set_up_torch_on(device, job["threads"])
    model = DiffusionModel.load(job["source"], device, job["dtype"])
    if job["compiled"]:
        model.compile()
    load_adapter(model.unet, folder / ADAPTER_FILE, model.text_encoders)
    examples = shared_examples(folder / EXAMPLES_FILE)
    config = TrainingConfig.model_validate(job["config"])
    trainer = Trainer(model, examples, config, job["seed"], None, folder, ranks)
    trainer.load_state(TrainerState.load(folder))

    # 2. the updates
    ready_file(folder, rank).touch()
    with process_group(folder / GROUP_FILE, rank, ranks.size, job["timeout_seconds"]):
        while trainer.updates_done < trainer.updates_total:
            trainer.step()


def _end_with_parent() -> None:
    # os.read releases the GIL, so the process can end while this thread is blocked in it
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
