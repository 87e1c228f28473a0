"""Examples of hypothesis are the same in every run, and may take as long as a busy machine needs; the comparisons that
tests share say what they compared."""

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.steps")
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
