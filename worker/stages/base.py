"""The three parts of a stage: load, compute, record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy.orm import Session

from service.db.queries import results
from service.jobs.execution import Claim
from worker.context import StageContext

Inputs = TypeVar("Inputs")
Outputs = TypeVar("Outputs")


@dataclass(frozen=True)
class Stage(Generic[Inputs, Outputs]):
    """The implementation of one kind of stage.

    Attributes:
        load: Reads the inputs in one view of the database. Does not open files.
        compute: Does the work, and loads and stores files. It has no session, so no transaction stays open.
        record: Writes the outputs in the transaction that ends the stage. That transaction may be rolled back and
            retried, so `record` must not change the outputs. The rows of stored files are written before it is called.
    """

    load: Callable[[Session, Claim], Inputs]
    compute: Callable[[StageContext, Inputs], Outputs]
    record: Callable[[Session, Claim, Outputs], None]

    def run(self, context: StageContext) -> Callable[[Session], None]:
        """Load and compute.

        Returns:
            A function that records the outputs, for `service.jobs.execution.finish`.

        Raises:
            LeaseLostError, StageCancelledError, StagePausedError, StageStoppedError: The stage must stop.
        """
        claim = context.claim
        with context.bench.uow.reading() as session:
            inputs = self.load(session, claim)

        outputs = self.compute(context, inputs)

        def record(session: Session) -> None:
            results.add_all(session, context.artifacts)
            self.record(session, claim, outputs)

        return record
