"""A run that is killed again and again ends as the run that was left alone; the long version is `tests/kill_resume.py`."""

import pathlib

import pytest
from kill_resume import OBJECTIVES, Training, kill_resume

TEXT = "The {0} river rises in the hills of {1} and flows past {2} towns before it meets the sea near {3}.\n\n"
WORDS = ["northern", "old", "quiet", "stone", "green", "white", "upper", "lower", "seven", "cold"]


@pytest.fixture
def source(tmp_path: pathlib.Path) -> str:
    file = tmp_path / "rivers.txt"
    words = (tuple(WORDS[(index * step + step) % len(WORDS)] for step in (1, 3, 7, 9)) for index in range(400))
    file.write_text("".join(f"{index}. " + TEXT.format(*chosen) for index, chosen in enumerate(words)))
    return f"files:{file}?documents=blank_line"


@pytest.mark.slow
def test_two_kills_change_nothing(tmp_path, source):
    assert len(kill_resume(tmp_path, kills=2, seed=1, training=Training(source))) == 2


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    assert len(kill_resume(tmp_path, kills=20, seed=0, training=Training("builtin:python_docs"))) == 20


@pytest.mark.slow
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "smoke"])
def test_every_objective_learns_and_is_not_changed_by_kills(tmp_path, objective):
    assert len(kill_resume(tmp_path, kills=3, seed=2, training=Training("builtin:python_docs", objective))) == 3
