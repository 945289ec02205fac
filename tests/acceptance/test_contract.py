"""The service does what its OpenAPI document says, and withstands hostile requests: the short form of
`make test-contract`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contract.generated import known_ids, run_schemathesis
from tests.contract.site import Siege, contract_site
from tests.deployment import EMBEDDED, Deployment

EXAMPLES = 1
CASES = 1000
"""At least. Almost all of them do not depend on chance."""
NOT_COVERED = ("/rounds",)
"""A fifth of all requests. Most parts of its body are those of other jobs; the rest is in test_bad_input.py."""
EVERY = 47
"""Of the hostile requests, each 47th is sent. A prime, so that each kind of attack is sent to some operations."""


@dataclass(frozen=True)
class Contract:
    """An installation, its ids before all tests, and the attacks on it."""

    installation: Deployment
    known: dict[str, list[str]]
    siege: Siege


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Iterator[Contract]:
    with contract_site(EMBEDDED, tmp_path_factory.mktemp("contract"), pipeline) as started:
        yield Contract(started, known_ids(started), Siege(started, EVERY))


def test_the_service_withstands_hostile_requests(contract: Contract) -> None:
    contract.siege.attack()
    assert contract.siege.failures == []


def test_the_service_does_what_its_openapi_document_says(contract: Contract) -> None:
    generated = run_schemathesis(contract.installation, contract.known, EXAMPLES, not_covered=NOT_COVERED)
    generated.require_success(CASES)


def test_what_was_deleted_cannot_be_used(contract: Contract) -> None:
    """The last test of the module: it deletes everything."""
    contract.siege.use_after_delete()
    assert contract.siege.failures == []
