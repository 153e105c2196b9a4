"""How many cases hypothesis draws: in the suite each test's own number, in the profile "ci" at least CI for an op's
tests, in the profile "long" LONG.

scripts/fuzz.py        or        pytest --hypothesis-profile long tests/kernels/test_plan.py
"""

from typing import Any

from hypothesis import Phase, settings

CI, LONG = 200, 2000


def register_profiles() -> None:
    """Make the profiles: "suite", which is used unless another is asked for, "ci", "long", and "mutants", whose failing
    cases are not made small."""
    settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
    settings.register_profile("ci", settings.get_profile("suite"))
    settings.register_profile("long", deadline=None, database=None, print_blob=True, max_examples=LONG)
    settings.register_profile("mutants", settings.get_profile("suite"), phases=[Phase.explicit, Phase.generate])
    settings.load_profile("suite")


def examples(count: int, **more: Any) -> settings:
    """Settings of a test that draws so many cases in the suite."""
    drawn = {"ci": max(count, CI), "long": LONG}.get(settings.get_current_profile_name(), count)
    return settings(max_examples=drawn, **more)
