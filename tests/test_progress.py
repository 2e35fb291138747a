"""What a running fit() shows, drawn for real: on a pipe, on a pseudo-terminal, in a Jupyter kernel."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest

from rlx.algorithms.sft import SFTConfig
from rlx.metrics import significant
from rlx.progress import PlainProgress, Progress, RichProgress, Sparkline, duration, panel_lines, progress_display
from rlx.settings import EnvRunnersSection, Settings

SHOW_IN_A_CHILD = """
import logging, sys
from rlx.algorithms.sft import SFTConfig
from rlx.metrics import significant
from rlx.progress import progress_display
from rlx.settings import Settings
settings = Settings(algorithm="ppo", environment={"id": "CartPole-v1"}, stop={"iterations": 4})
with progress_display(settings) as progress:
    for i in range(1, 5):
        if i == 3:
            print("a line in between", file=sys.stderr)
        progress.update({"iteration": i, "env_steps": 100 * i, "episode_return_mean": 20.0 * i,
                         "time/iteration_s": 0.1, "time/learn_s": 0.1, "time/total_s": 0.1 * i})
"""


def settings(progress="none", **stop) -> Settings:
    return Settings.model_validate(
        {"algorithm": "ppo", "environment": {"id": "CartPole-v1"}, "reporting": {"progress": progress}, "stop": stop}
    )


def iteration(number: int, **more) -> dict:
    """Metrics of an iteration that took 0.1 s for 100 steps."""
    return {
        "iteration": number,
        "env_steps": 100 * number,
        "env_steps_per_s": 1000.0,
        "episode_return_mean": None,
        "time/total_s": 0.1 * number,
        "time/iteration_s": 0.1,
        "time/env_s": 0.06,
        "time/learn_s": 0.03,
        "time/other_s": 0.01,
        **more,
    }


def test_the_nearest_limit_is_the_one_with_the_shortest_way_to_go():
    progress = Progress(settings(iterations=100, env_steps=4_000, time_s=1000.0))
    progress.update(iteration(1))
    name, part, _ = progress.nearest_limit()
    assert name == "env_steps"  # 39 iterations to go against 99 and 9999
    assert part == pytest.approx(100 / 4_000)


def test_the_time_to_go_of_a_resumed_run_counts_this_session_only():
    progress = Progress(settings(iterations=120))
    progress._started -= 10.0  # as if 10 s had passed
    for number in range(101, 106):
        progress.update(iteration(number))
    _, part, eta_s = progress.nearest_limit()
    assert part == pytest.approx(105 / 120)
    assert eta_s == pytest.approx(30.0, rel=1e-3)  # 5 iterations in 10 s, 15 to go


def test_a_goal_alone_is_measured_from_the_first_return():
    progress = Progress(settings(episode_return_mean=-200.0))
    assert progress.nearest_limit() == ("episode_return_mean", 0.0, None)
    progress.update(iteration(1, episode_return_mean=-1200.0))
    progress.update(iteration(2, episode_return_mean=-450.0))
    assert progress.nearest_limit() == ("episode_return_mean", 0.75, None)
    progress.update(iteration(3, episode_return_mean=-150.0))
    assert progress.nearest_limit() == ("episode_return_mean", 1.0, None)


def test_time_shares_and_speed_are_those_of_the_latest_iterations():
    progress = Progress(settings(iterations=10))
    for number in range(1, 200):
        progress.update(iteration(number))
    shares = progress.time_shares()
    assert shares["env"] == pytest.approx(0.6) and shares["learn"] == pytest.approx(0.3)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert progress.env_steps_per_s() == pytest.approx(1000.0)
    for number in range(200, 300):
        progress.update(iteration(number, env_steps_per_s=500.0))
    assert progress.env_steps_per_s() == pytest.approx(500.0, rel=1e-3)


def test_a_sparkline_keeps_the_whole_history_by_averaging_neighbours():
    line = Sparkline(width=8)
    for value in range(8):
        line.add(value)
    assert line.bars == [0.5, 2.5, 4.5, 6.5]
    line.add(10)
    assert len(line.bars) == 4  # half a bar is not drawn yet
    line.add(11)
    assert line.bars == [0.5, 2.5, 4.5, 6.5, 10.5]
    assert str(line) == "▁▂▄▅█"
    assert str(Sparkline()) == ""


def test_a_flat_sparkline_is_flat():
    line = Sparkline()
    for _ in range(3):
        line.add(500.0)
    assert str(line) == "▁▁▁"


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (0.4, "0:00:00"), (59.6, "0:01:00"), (36_061, "10:01:01")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_plain_prints_the_first_and_the_last_iteration_and_nothing_in_between(capsys):
    with progress_display(settings("plain", iterations=50)) as progress:
        for number in range(1, 51):
            progress.update(iteration(number, episode_return_mean=9.5))
    first, last = capsys.readouterr().err.splitlines()
    assert "iter     1" in first and "iter    50" in last
    assert last.startswith("100%") and "env_steps       5,000" in last and "return     9.50" in last
    assert "kl      -" in last  # not every algorithm has one
    assert first.index("return") == last.index("return")


def test_where_the_number_of_runners_varies_it_is_shown(capsys):
    made = settings("plain", iterations=2).model_copy(update={"env_runners": EnvRunnersSection(num_env_runners="auto")})
    with progress_display(made) as progress:
        for number in (1, 2):
            progress.update(iteration(number, num_env_runners=8 * number))
    first, last = capsys.readouterr().err.splitlines()
    assert "runners    8" in first and "runners   16" in last
    assert "env runners16" in "".join(line.plain.replace("  ", "") for line in panel_lines(progress)).replace(
        "runners 16", "runners16"
    )
    with progress_display(settings("plain", iterations=1)) as progress:
        progress.update(iteration(1, num_env_runners=8))
    assert "runners" not in capsys.readouterr().err


def test_plain_prints_again_once_two_seconds_have_passed(capsys):
    with PlainProgress(settings("plain", iterations=50)) as progress:
        for number in range(1, 4):
            progress.update(iteration(number))
            progress._started -= 2.1
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_plain_prints_the_last_iteration_even_when_training_fails(capsys):
    with pytest.raises(ZeroDivisionError), progress_display(settings("plain", iterations=50)) as progress:
        for number in range(1, 4):
            progress.update(iteration(number))
        _ = 1 / 0
    assert "iter     3" in capsys.readouterr().err.splitlines()[-1]


def test_none_prints_nothing(capsys):
    with progress_display(settings("none", iterations=50)) as progress:
        progress.update(iteration(1))
    assert capsys.readouterr() == ("", "")


def test_auto_is_plain_where_stderr_is_no_terminal():
    assert type(progress_display(settings("auto", iterations=1))) is PlainProgress


def test_the_panel_shows_what_is_known_and_keeps_the_last_evaluation():
    progress = Progress(settings(iterations=10, episode_return_mean=475.0))
    assert "first iteration" in panel_lines(progress)[0].plain
    progress.update(iteration(4, **{"evaluation/episode_return_mean": 487.25, "evaluation/episode_return_std": 12.0}))
    progress.update(iteration(5, episode_return_mean=21.5, **{"learner/kl": 0.0123, "learner/entropy": 0.69}))
    text = "\n".join(line.plain for line in panel_lines(progress))
    for shown in ("50% of 10 iterations", "21.5", "→ 475", "0.0123", "0.690", "487.2 ± 12.0", "env 60%", "learn 30%"):
        assert shown in text


def test_supervised_training_shows_its_loss_and_what_was_measured(capsys):
    made = SFTConfig().data([{"text": "1"}]).stop(iterations=10).reporting(progress="plain").settings
    parts = ("generate_s", "train_s")
    row = iteration(1, **{"learner/loss": 1.2345, "learner/accuracy": 0.0625, "time/train_s": 0.06})
    with progress_display(made, parts, SFTConfig.is_supervised()) as progress:
        progress.update(row | {"evaluation/loss": 12.5})
        progress.update(row | {"iteration": 2})
    shown = capsys.readouterr().err
    for figure in ("loss     1.23", "accuracy   0.0625", "eval loss     12.5"):
        assert shown.count(figure) == 2  # the evaluation stays
    assert "return" not in shown and "entropy" not in shown
    text = "\n".join(line.plain for line in panel_lines(progress))
    for figure in ("loss       1.23 ", "accuracy   0.0625 ", "eval loss       12.5", "▁▁", "train 86%", "other 14%"):
        assert figure in text


@pytest.mark.parametrize(
    "number, shown", [(0, "0.00"), (0.00625, "0.00625"), (0.5, "0.500"), (-9.5, "-9.50"), (1234.56, "1,234.6")]
)
def test_numbers_keep_three_digits(number, shown):
    assert significant(number) == shown


def test_drawing_and_updating_cost_a_fast_iteration_next_to_nothing():
    progress = RichProgress(settings("rich", iterations=10_000))
    started = time.process_time()
    for number in range(1, 1001):
        progress.update(iteration(number, episode_return_mean=float(number)))
    assert (time.process_time() - started) / 1000 < 0.1e-3  # seconds; some 3e-6 when this was written


def test_the_panel_is_drawn_on_a_terminal_with_other_lines_above_it():
    shown = run_on_a_terminal(SHOW_IN_A_CHILD)
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).strip() for line in shown.split("\r\n")]
    last_panel = lines[max(number for number, line in enumerate(lines) if line.endswith("╮")) :]
    assert "ppo · CartPole-v1" in last_panel[0]
    assert "100% of 4 iterations" in last_panel[1]
    assert "80.0" in last_panel[2] and "▁" in last_panel[2]
    assert any(line == "a line in between" for line in lines)
    assert "a line in between" not in "".join(last_panel)
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines():
    shown = run_on_a_terminal(SHOW_IN_A_CHILD, TERM="dumb")
    assert "\x1b" not in shown and "iter     4" in shown


def test_a_notebook_gets_one_text_that_changes():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SHOW_IN_A_CHILD)])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    texts = [output for output in notebook.cells[0].outputs if output.output_type == "display_data"]
    assert len(texts) == 1
    assert "100% of iterations" in texts[0].data["text/plain"] and "iter     4" in texts[0].data["text/plain"]


def run_on_a_terminal(code: str, **environment: str) -> str:
    """Return what a child writes to a pseudo-terminal of 100 columns that is its stderr."""
    ours, theirs = pty.openpty()
    size = {"COLUMNS": "100", "LINES": "30", "TERM": "xterm-256color"}
    child = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=os.environ | size | environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # EIO: the child's end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert child.wait(timeout=30) == 0, shown.decode()
    return shown.decode()
