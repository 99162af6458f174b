"""The properties of tests/test_properties.py over any number of cases.

python tests/stress/properties.py                  # 10,000, 5,000, 2,000, 500 and 500 cases
python tests/stress/properties.py --only spmm --count 5000 --seed 3
"""

import argparse
import pathlib
import sys
import time

import jax
from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from properties import PROPERTIES

COUNTS = dict(zip(PROPERTIES, [10_000, 5_000, 2_000, 500, 500], strict=True))
PER_CACHE = 100  # compiled programs of shapes that do not come again are dropped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="properties whose name holds this")
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)
    for name, (cases, check) in PROPERTIES.items():
        if options.only not in name:
            continue
        count, start = 0, time.monotonic()

        @seed(options.seed)
        @settings(
            max_examples=options.count or COUNTS[name],
            deadline=None,
            database=None,
            suppress_health_check=[*HealthCheck],
            phases=[Phase.generate, Phase.shrink],
        )
        @given(cases)
        def every(case):
            nonlocal count
            check(case)  # noqa: B023
            count += 1
            if count % PER_CACHE == 0:
                jax.clear_caches()

        every()
        print(f"{name}: {count} cases, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
