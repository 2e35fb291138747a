"""Curves from run folders, written by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlx.algorithms.grpo import GRPOConfig
from rlx.algorithms.sft import SFTConfig
from rlx.errors import CheckpointError, ConfigError
from rlx.plotting import SUPERVISED_METRICS, Curve, group_by_config, load_curve, mean_and_range, plot_runs


def make_run(folder: Path, returns, *, lr=1e-3, seed=0, gamma=0.99, goal: float | None = None) -> Path:
    """A run folder whose iterations took 100 steps each."""
    folder.mkdir()
    goal_text = "null" if goal is None else str(goal)
    (folder / "config.yaml").write_text(
        f"algorithm: ppo\nenvironment: {{id: CartPole-v1}}\ntraining: {{lr: {lr}, gamma: {gamma}}}\n"
        f"runtime: {{seed: {seed}}}\nstop: {{episode_return_mean: {goal_text}}}\n"
    )
    rows = [{"iteration": i, "env_steps": 100 * i, "episode_return_mean": r} for i, r in enumerate(returns, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def curve(env_steps, values) -> Curve:
    return Curve(Path("run"), {}, np.asarray(env_steps, float), np.asarray(values, float))


def test_iterations_without_the_metric_are_left_out(tmp_path):
    loaded = load_curve(make_run(tmp_path / "run", [None, None, 10.0, 20.0]), "episode_return_mean")
    assert loaded.env_steps.tolist() == [300, 400]
    assert loaded.values.tolist() == [10, 20]


def test_runs_that_differ_in_their_seed_are_one_config(tmp_path):
    curves = [
        load_curve(make_run(tmp_path / name, [1.0, 2.0], lr=lr, seed=seed, goal=goal), "episode_return_mean")
        for name, lr, seed, goal in [("a", 1e-3, 0, None), ("b", 1e-4, 0, None), ("c", 1e-3, 1, 475.0)]
    ]
    groups = group_by_config(curves)
    assert {label: [one.run.name for one in members] for label, members in groups.items()} == {
        "lr=0.001": ["a", "c"],
        "lr=0.0001": ["b"],
    }


def test_one_config_goes_by_the_name_of_its_run(tmp_path):
    loaded = load_curve(make_run(tmp_path / "run-7", [1.0, 2.0]), "episode_return_mean")
    assert list(group_by_config([loaded])) == ["run-7"]


def test_the_band_covers_what_all_runs_cover_and_interpolates_between_their_points():
    grid, mean, low, high = mean_and_range([curve([0, 100, 200], [0, 10, 20]), curve([50, 150, 400], [20, 20, 70])])
    assert grid.tolist() == [50, 100, 150, 200]
    assert low.tolist() == [5, 10, 15, 20]
    assert high.tolist() == [20, 20, 20, 30]  # 20 + 50 / 250 * (70 - 20)
    assert mean.tolist() == [12.5, 15, 17.5, 25]


def test_a_long_run_is_thinned():
    steps = np.arange(5000.0)
    grid, mean, _, _ = mean_and_range([curve(steps, 2 * steps), curve(steps, 4 * steps)])
    assert len(grid) == 1000 and grid[-1] == 4999
    np.testing.assert_allclose(mean, 3 * grid)


def test_the_picture_shows_a_line_per_config_with_its_band_and_the_goal(tmp_path):
    runs = [make_run(tmp_path / f"a{seed}", [10, 200, 480], seed=seed, goal=475.0) for seed in range(3)]
    runs += [make_run(tmp_path / "b", [10, 100, 300], lr=1e-4)]
    text = plot_runs(runs, tmp_path / "new" / "curves.svg").read_text()
    for shown in (
        "ppo on CartPole-v1",
        "env_steps (environment steps)",
        "episode_return_mean",
        "lr=0.001: mean of 3 runs, band from min to max",
        "lr=0.0001",
        "solved at 475",
    ):
        assert f"<!-- {shown} -->" in text


def test_a_run_on_text_is_named_by_its_model_and_steps_in_tokens(tmp_path):
    config = GRPOConfig().model("runs/sft/").prompts([{"prompt": "1+1="}]).reward(lambda prompts, completions: [])
    for folder, one in (("path", config), ("weights", config.copy().model(path=None, config={"model_type": "llama"}))):
        make_run(tmp_path / folder, [0.1, 0.2])
        (tmp_path / folder / "config.yaml").write_text(one.to_yaml())
    text = plot_runs([tmp_path / "path", tmp_path / "weights"], tmp_path / "curve.svg").read_text()
    assert "<!-- grpo on llama / grpo on sft -->" in text
    assert "<!-- env_steps (tokens) -->" in text


def test_runs_that_learn_from_rows_are_drawn_by_what_they_have_a_curve_of(tmp_path):
    runs = [make_run(tmp_path / name, []) for name in ("a", "b")]
    config = SFTConfig().model("runs/base").data([{"text": "1"}]).to_yaml()

    def drawn(*columns):
        for run, column in zip(runs, columns, strict=True):
            rows = [{"env_steps": 100, **dict.fromkeys(("learner/loss", *column), 1.0)}] * 2
            rows += [{"env_steps": 200, "learner/loss": 0.5, "evaluation/loss": 0.5}]
            (run / "config.yaml").write_text(config)
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        picture = plot_runs(runs, tmp_path / "curve.svg").read_text()
        return [name for name in SUPERVISED_METRICS if f"<!-- {name} -->" in picture]

    assert drawn((), ()) == ["learner/loss"]  # one point is no curve
    assert drawn(("evaluation/loss",), ("evaluation/loss",)) == ["evaluation/loss"]
    both = ("evaluation/loss", "evaluation/accuracy")
    assert drawn(both, ("evaluation/loss",)) == ["evaluation/loss"]
    assert drawn(both, both) == ["evaluation/accuracy"]


def test_runs_that_share_no_stretch_are_drawn_without_a_mean(tmp_path):
    runs = [make_run(tmp_path / "short", [1.0, 2.0]), make_run(tmp_path / "late", [None] * 5 + [3.0, 4.0], seed=1)]
    assert plot_runs(runs, tmp_path / "curves.png").stat().st_size > 0


def test_a_run_without_finished_episodes_gets_a_sentence(tmp_path):
    run = make_run(tmp_path / "run", [None, None])
    with pytest.raises(CheckpointError) as caught:
        plot_runs([run], tmp_path / "curve.png")
    assert str(caught.value) == (
        f"{run} has no episode_return_mean: no episode has finished in it yet; train longer, or plot another --metric "
        "such as learner/loss."
    )


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        ("evaluation/episode_return_mean", "it never evaluated; train with --set evaluation.interval=10."),
        ("learner/kl", "its algorithm does not report that."),
    ],
)
def test_a_metric_that_is_not_there_gets_a_sentence(tmp_path, metric, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        load_curve(make_run(tmp_path / "run", [1.0]), metric)


def test_a_misspelt_metric_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"Did you mean learner/entropy\?"):
        load_curve(make_run(tmp_path / "run", [1.0]), "entropy")


def test_metrics_of_the_run_alone_are_drawn_and_listed(tmp_path):
    run = make_run(tmp_path / "run", [None, 1.0])
    (run / "metrics.jsonl").write_text('{"env_steps": 100, "my/own": 3.0, "learner/kl": null}\n')
    assert load_curve(run, "my/own").values.tolist() == [3.0]
    assert plot_runs([run], tmp_path / "own.svg", "my/own").exists()
    with pytest.raises(ConfigError, match=r"^zzz is no metric of \S+run. It has env_steps, my/own\.$"):
        load_curve(run, "zzz")


@pytest.mark.parametrize("file", ["/proc/nowhere/curve.png", "/dev/full/curve.png"])
def test_a_picture_that_cannot_be_written_costs_one_sentence(file, tmp_path):
    with pytest.raises(ConfigError, match=f"{file} cannot be written: .*; give another name with -o"):
        plot_runs([make_run(tmp_path / "run", [1.0])], Path(file))


def test_a_run_that_has_just_begun_gets_a_sentence(tmp_path):
    run = make_run(tmp_path / "run", [])
    with pytest.raises(CheckpointError, match="has no metrics yet"):
        load_curve(run, "episode_return_mean")


def test_a_file_that_is_no_picture_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"curve\.doc is no picture; end its name in one of .*\.png"):
        plot_runs([tmp_path / "nowhere"], Path("curve.doc"))
