"""Examples of hypothesis are the same in every run, and may take as long as a busy machine needs; the comparisons that
tests share say what they compared. The table of the parallel layouts is printed at the end, from whichever process ran
its tests."""

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.steps")
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    rows = [value for report in reports for name, value in report.user_properties if name == "layouts"]
    if rows:
        terminalreporter.section("(TP, PP, VPP, CP, DP) against one process, fp32, real text, draft 1 / 0.5")
        for row in rows:
            terminalreporter.write_line(row)
