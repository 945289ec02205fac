import pytest
import torch
from sqlalchemy.exc import OperationalError

from dfusion.errors import NonFiniteError, ShapeMismatchError
from service.errors import StorageCorruptError, StorageError
from worker.runner import failure_of, spoils_the_device


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (NonFiniteError("loss"), "non_finite", False),
        (ShapeMismatchError("x", 1, 2), "shape_mismatch", False),
        (torch.cuda.OutOfMemoryError("no"), "out_of_memory", False),
        (StorageError("away"), "storage", True),
        (StorageCorruptError("bad"), "storage_corrupt", False),
        (OperationalError("select secret", {}, Exception("away")), "database", True),
        (OSError(28, "No space left on device"), "input_output", True),
        (ZeroDivisionError("secret"), "internal", False),
    ],
)
def test_every_error_has_a_code(error: Exception, code: str, retryable: bool) -> None:
    failure = failure_of(error)
    assert (failure.code, failure.retryable) == (code, retryable)
    assert "secret" not in failure.message


@pytest.mark.parametrize(
    ("error", "spoiled"),
    [
        (torch.cuda.OutOfMemoryError("no"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("shape"), False),
        (StorageError("away"), False),
    ],
)
def test_a_process_whose_cuda_has_failed_is_not_used_again(error: Exception, spoiled: bool) -> None:
    assert spoils_the_device(error) is spoiled
