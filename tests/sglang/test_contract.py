"""The contract suite of engines, run by the real sglang."""

from __future__ import annotations

import pytest

from tests.contract import test_engine as suite
from tests.contract.test_engine import Now, Start, it, now  # noqa: F401 - fixtures
from tests.sglang.engines import SharedEngines

pytestmark = pytest.mark.timeout(400)

globals().update({name: test for name, test in vars(suite).items() if name.startswith("test_")})

NO_ROOM = "its context limit is what its memory holds: too long a context is refused when it comes"
COPIES = "what it computes with is a copy of its own: the page in host memory can be freed at once"
OTHERWISE = {
    "test_noise_is_a_function_of_seed_and_position": "seeds do not work on the CPU",
    "test_a_context_that_never_fits_fails_alone": NO_ROOM,
    "test_what_waits_for_the_pages_of_a_context_that_does_not_fit_goes_on": NO_ROOM,
    "test_a_request_in_answer_to_a_failure_is_served": NO_ROOM,
    "test_pins_survive_pressure_until_they_expire": "the same prompts press on the pool only once: "
    "what its own tiers have still it does not write again",
    "test_pins_yield_to_reservations_and_generations": NO_ROOM,
    "test_what_was_dropped_in_use_is_freed_when_it_is_let_go_of": COPIES,
    "test_what_was_dropped_in_use_stays_if_it_is_asked_for_again": COPIES,
}
"""Test of the suite -> what sglang does otherwise."""


ESSENTIAL = {
    "test_greedy_output_repeats",
    "test_a_prefix_is_reused_and_changes_nothing",
    "test_namespaces_share_nothing",
    "test_stop_ids_end_the_generation_and_are_delivered",
    "test_a_cancelled_generation_delivers_nothing_more",
    "test_exported_pages_continue_identically_elsewhere",
    "test_a_corrupted_page_is_refused_with_all_after_it",
}
"""What is checked always: exactness, and pages that go from one sglang to another."""
for _name in ESSENTIAL:
    globals()[_name] = pytest.mark.essential(globals()[_name])


@pytest.fixture
def start(engines: SharedEngines, now: Now) -> Start:  # noqa: F811
    return lambda size: engines.engine(size, now)


@pytest.fixture(autouse=True)
def _as_sglang_does(request: pytest.FixtureRequest) -> None:
    why = OTHERWISE.get(request.function.__name__)
    if why is not None:
        pytest.skip(why)


def test_every_exception_names_a_test_of_the_suite() -> None:
    assert [name for name in OTHERWISE if not hasattr(suite, name)] == []
