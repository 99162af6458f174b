"""Properties of random cases; tests/stress/properties.py runs any number of them."""

import pytest
from hypothesis import HealthCheck, given, settings
from properties import PROPERTIES

CASES = dict(zip(PROPERTIES, [100, 100, 40, 12, 10], strict=True))


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name, record_property, quick_compiles):
    cases, check = PROPERTIES[name]
    count = 0

    @settings(max_examples=CASES[name], deadline=None, suppress_health_check=[*HealthCheck])
    @given(cases)
    def every(case):
        nonlocal count
        check(case)
        count += 1

    every()
    record_property(name, count)  # conftest.py sums them up at the end of the run
    assert count >= CASES[name]
