"""Whatever a request says: an answer that the service's own OpenAPI description announces."""

from __future__ import annotations

import hypothesis
import pytest
import schemathesis
from schemathesis import Case, GenerationMode

from tests.serving.conftest import Served

# The checks of schemathesis: no 5xx; status, type and body as described; what fits the description
# is accepted, what does not is refused; other methods are answered with 405.
EXAMPLES = 100


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_requests_of_any_kind(served: Served, mode: GenerationMode) -> None:
    fuzz(f"{served.url}/openapi.json", mode)


def fuzz(url: str, mode: GenerationMode) -> None:
    """Every operation, with requests that fit the description or do not."""
    schema = schemathesis.openapi.from_url(url)
    asked = set()
    for operation in (result.ok() for result in schema.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and operation.method != "post":
            continue  # nothing to get wrong

        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def check(case: Case) -> None:
            case.call_and_validate()

        check()
        asked.add(operation.label)
    assert "POST /generate" in asked
