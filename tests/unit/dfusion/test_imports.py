import gc

import pytest

from dfusion.imports import without_garbage_collection


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_is_off_within_and_as_it_was_after(was_enabled: bool) -> None:
    if not was_enabled:
        gc.disable()
    before = gc.get_freeze_count()
    try:
        with without_garbage_collection():
            assert not gc.isenabled()
            lists = [[] for _ in range(1000)]  # type: ignore[var-annotated]
        assert (gc.isenabled(), len(lists)) == (was_enabled, 1000)
        assert gc.get_freeze_count() >= before + 1000
        gc.unfreeze()
        with pytest.raises(ImportError), without_garbage_collection():
            raise ImportError
        assert (gc.isenabled(), gc.get_freeze_count()) == (was_enabled, 0)
    finally:
        gc.unfreeze()
        gc.enable()
