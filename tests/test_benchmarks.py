"""The benchmarks run, and their figures are computed as the page says."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def load(file: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a benchmark's module, with its neighbours importable as when it runs as a script."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location(f"benchmark_{Path(file).stem}", BENCHMARKS / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_of(steps_per_s: float, version: str) -> dict:
    packages = {"torch": "2"}
    run = {"steps_per_s": steps_per_s, "version": version, "packages": packages, "returns": 20.0}
    return run | {"ready_s": 1.5, "busy_cores_before": 0.1}


def test_a_speed_up_is_the_median_of_the_ratios_within_rounds(monkeypatch):
    """Ratios 2, 4 and 10 have the median 4; the medians 400 and 50 would have made 8."""
    ppo = load("ppo.py", monkeypatch)
    rates = [(100, 50), (400, 100), (500, 50)]
    rounds = [{"rlx": run_of(ours, "1"), "sb3": run_of(theirs, "2")} for ours, theirs in rates]
    conditions = load("report.py", monkeypatch).machine()
    page = ppo.page({"rounds": rounds, "machine": conditions, "job": {"iterations": 7}})
    assert "| rlx, 1 | 400 | 100 to 500 | 1.00 |" in page
    assert "| sb3, 2 | 50 | 50 to 100 | 4.00 | 2.00 to 10.00 | 1.5 | 20 |" in page
    assert "7 iterations a run, 3 rounds." in page


def test_the_clock_leaves_the_first_iteration_out(monkeypatch, capsys):
    measured = load("peers/measured.py", monkeypatch)
    now = iter([100.0, 101.0, 104.0])  # the ends of three iterations
    monkeypatch.setattr(measured.time, "perf_counter", lambda: next(now))
    clock = measured.Clock(SimpleNamespace(iterations=2, work="cartpole"))
    assert [clock.end_iteration(env_steps) for env_steps in (10, 18, 30)] == [False, False, True]
    clock.report("rlx", "1", threads=1, returns=None)
    line = json.loads(capsys.readouterr().out)
    assert (line["env_steps"], line["seconds"], line["steps_per_s"]) == (20, 4.0, 5.0)


def test_a_system_that_ends_early_reports_nothing(monkeypatch):
    clock = load("peers/measured.py", monkeypatch).Clock(SimpleNamespace(iterations=2, work="cartpole"))
    clock.end_iteration(10)
    with pytest.raises(SystemExit, match="rlx ended after 1 iterations, before 2 were measured"):
        clock.report("rlx", "1", threads=1, returns=None)


def test_a_countdown_ends_with_the_first_iteration_after_its_seconds(monkeypatch, capsys):
    """The first iteration is left out here, too: 30 steps in the 6 seconds after it."""
    measured = load("peers/measured.py", monkeypatch)
    now = iter([100.0, 104.5, 106.0])
    monkeypatch.setattr(measured.time, "perf_counter", lambda: next(now))
    clock = measured.clock_of(SimpleNamespace(seconds=5, work="impala"))
    assert [clock.end_iteration(env_steps) for env_steps in (10, 18)] == [False, False]
    with pytest.raises(SystemExit, match="rlx ended after 2 iterations, before 5 s had passed"):
        clock.report("rlx", "1", threads=1, returns=None)
    assert clock.end_iteration(40)
    clock.report("rlx", "1", threads=1, returns=None)
    assert json.loads(capsys.readouterr().out)["steps_per_s"] == 5.0


def test_an_aim_is_judged_by_the_median_of_the_ratios(monkeypatch):
    """Ratios 4, 9 and 20 have the median 9, which meets 8; the best of them would not count, nor the worst."""
    asynchronous = load("asynchronous.py", monkeypatch)
    record = {"machine": load("report.py", monkeypatch).machine(), "job": {"work": "impala", "seconds": 60}}
    ages = {"age_mean": 2.25, "age_max": 5, "max_age": 8, "system": "rlx"}
    rates = [(4000, 1000), (9000, 1000), (20000, 1000)]
    rounds = [{"rlx": run_of(a, "1") | ages, "rllib": run_of(b, "2") | {"system": "rllib"}} for a, b in rates]
    page = asynchronous.page(record | {"rounds": rounds})
    assert "| rlx, 1 | 9,000 | 4,000 to 20,000 |  |  |  | 2.2 | 5 | 8 | 20 to 20 |" in page
    assert "| rllib, 2 | 1,000 | 1,000 to 1,000 | 9.0 | 4.0 to 20.0 | 8 |  |  |  | 20 to 20 |" in page
    page = asynchronous.page(record | {"rounds": rounds[:1]})
    assert "| 4.0 | 4.0 to 4.0 | 8, missed |" in page


def test_what_a_slow_runner_leaves_is_a_share_of_each_algorithms_own_rate(monkeypatch):
    asynchronous = load("asynchronous.py", monkeypatch)
    rates = {"PPO": 1000, "PPO, one slow": 100, "IMPALA": 2000, "IMPALA, one slow": 1400}
    rounds = [{name: run_of(rate, "1") | {"system": "rlx"} for name, rate in rates.items()}]
    record = {"machine": load("report.py", monkeypatch).machine(), "job": {"seconds": 60}, "rounds": rounds}
    page = asynchronous.slow_runner_page(record)
    assert "| PPO | 1,000 | 100 | 0.10 | 0.10 to 0.10 |  |" in page
    assert "| IMPALA | 2,000 | 1,400 | 0.70 | 0.70 to 0.70 | 0.75, missed |" in page


def test_a_run_that_slips_after_its_goal_is_told_from_one_that_stays(monkeypatch):
    stays_solved = load("stays_solved.py", monkeypatch)
    returns = [None, 300.0, 480.0, 410.0, 500.0]
    rows = [
        {"episode_return_mean": value, "time/total_s": 2.0 * n, "env_steps": 10 * n, "dropped_env_steps": 0}
        | {"age_mean": 1.0 + n, "age_max": n}
        for n, value in enumerate(returns)
    ]
    said = stays_solved.summary(rows, 475)
    assert (said["solved_s"], said["solved_env_steps"], said["lowest_after"], said["last"]) == (4.0, 20, 410.0, 500.0)
    assert (said["age_mean"], said["age_max"]) == (3.0, 4)
    missed = stays_solved.summary(rows, 501)
    assert missed["solved_s"] is missed["lowest_after"] is None
    runs = [{"config": "impala", "evaluation": 490.0, "busy_cores_before": 0.1, **one} for one in (said, missed)]
    record = {"machine": load("report.py", monkeypatch).machine(), "seconds": 60, "runs": runs}
    assert "| `impala` | 1 of 2 | 4.0 (4.0 to 4.0) | 20 | 410 | 490 | 40 | 3.0, 4 |" in stays_solved.page(record)


def test_the_limit_is_what_all_cores_could_do_one_thing_after_the_other(monkeypatch):
    """2 cores at 1/1000 + 1/250 s a step: 400 steps/s; with acting at 1/200 s on top of it, 200."""
    asynchronous = load("asynchronous.py", monkeypatch)
    rates = {"emulator": 1000, "arithmetic": 250, "acting": 200, "rlx": 300}
    rounds = [{name: run_of(rate, "1") | {"system": name} for name, rate in rates.items()}]
    record = {"machine": load("report.py", monkeypatch).machine() | {"cores": 2}, "job": {"seconds": 60}}
    page = asynchronous.limit_page(record | {"rounds": rounds})
    assert "| limit: emulator and arithmetic, 2 cores | 400 | 400 to 400 | 0.75 | 0.75 to 0.75 | 0.6 |" in page
    assert "| limit: emulator and arithmetic and acting, 2 cores | 200 | 200 to 200 | 1.50 |" in page


def test_a_section_of_the_page_is_replaced_and_the_others_stay(tmp_path, monkeypatch):
    report = load("report.py", monkeypatch)
    (tmp_path / "benchmarks.md").write_text("# A\n<!-- begin a -->\nold\n<!-- end a -->\n# B\n")
    report.publish(tmp_path, "a", {"x": 1}, "new")
    report.publish(tmp_path, "a", {"x": 2}, "newer")
    assert (tmp_path / "benchmarks.md").read_text() == "# A\n<!-- begin a -->\nnewer\n<!-- end a -->\n# B\n"
    assert json.loads((tmp_path / "benchmarks.json").read_text()) == {"a": {"x": 2}}
    with pytest.raises(SystemExit, match="has no lines <!-- begin b --> and <!-- end b -->"):
        report.publish(tmp_path, "b", {}, "table")


def test_what_some_configs_learn_replaces_their_rows_alone(tmp_path, monkeypatch):
    learning = load("learning.py", monkeypatch)
    page, rows = tmp_path / "learning.md", {name: [f"`{name}`", *"abcdefgh"] for name in ("impala", "ppo", "ppo_b")}
    page.write_text(f"# A\n{learning.BEGIN}\n{learning.END}\n# B\n")
    learning.write_table([rows["ppo"], rows["ppo_b"]], "old facts", page)
    learning.write_table([rows["impala"], [*rows["ppo"][:8], "1 2 3"]], "new facts", page)
    table = page.read_text().splitlines()
    assert table[4:8] == [
        "| `impala` | a | b | c | d | e | f | g | h |",
        "| `ppo` | a | b | c | d | e | f | g | 1 2 3 |",
        "| `ppo_b` | a | b | c | d | e | f | g | h |",
        "",
    ]
    assert (table[0], table[8:]) == ("# A", ["new facts", learning.END, "# B"])


def test_the_page_has_a_section_for_every_workload(monkeypatch):
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    workloads = load("workloads.py", monkeypatch)
    alone = ["time to solved", "stays solved", "env runner", "memory", "soak training", "core", "generation", "decode"]
    alone += ["sync", "end to end", "training", "soak post-training", "speculation", "kept turns"]
    for section in [*workloads.WORK, *workloads.ASYNCHRONOUS, *alone]:
        assert f"<!-- begin {section} -->" in page and f"<!-- end {section} -->" in page


def test_a_command_that_fails_ends_with_its_last_words(tmp_path, monkeypatch):
    processes = load("processes.py", monkeypatch)
    with pytest.raises(SystemExit, match="ended with code 3:\nno such luck"):
        processes.output_of(
            [sys.executable, "-c", "import sys; print('no such luck', file=sys.stderr); sys.exit(3)"], 60, tmp_path
        )


def test_more_rounds_are_those_of_the_same_work(tmp_path, monkeypatch):
    """Only what had the same job and the same systems belongs into one median."""
    turns = load("turns.py", monkeypatch)
    fresh = {"job": {"seconds": 20}, "rounds": []}
    found = {"job": {"seconds": 20}, "rounds": [{"rlx": {}, "sb3": {}}]}
    (tmp_path / "benchmarks.json").write_text(json.dumps({"a": found}))
    alone, more = (SimpleNamespace(out=tmp_path, more=value) for value in (False, True))
    assert turns.recorded("a", fresh, ["rlx", "sb3"], alone) == fresh
    assert turns.recorded("a", fresh, ["rlx", "sb3"], more) == found
    for section, job, systems in (("b", 20, ["rlx", "sb3"]), ("a", 60, ["rlx", "sb3"]), ("a", 20, ["rlx"])):
        with pytest.raises(
            SystemExit, match=f"no rounds of {section} with this job and these systems; leave --more out"
        ):
            turns.recorded(section, {"job": {"seconds": job}}, systems, more)


@pytest.mark.slow
def test_a_tiny_round_of_rlx_fills_the_page_and_the_record(tmp_path):
    shutil.copy(ROOT / "docs" / "benchmarks.md", tmp_path)
    systems, size = ["rlx", "rlx 2 runners"], ["--rounds", "1", "--iterations", "2"]
    command = [sys.executable, str(BENCHMARKS / "ppo.py"), "--work", "cartpole", "--systems", *systems, *size]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, timeout=120)
    (measured,) = json.loads((tmp_path / "benchmarks.json").read_text())["cartpole"]["rounds"]
    assert list(measured) == systems
    for run in measured.values():
        assert run["system"] == "rlx" and run["threads"] == 1
        assert 0.8 * 2 * 2048 < run["env_steps"] < 2 * 2048  # a row in twenty or so is a reset, and is not counted
        assert run["ready_s"] > 0 and run["returns"] > 10
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| rlx 2 runners, " in text and "## HalfCheetah-v5" in text

    subprocess.run([*command, "--more", "--out", str(tmp_path)], check=True, timeout=120)
    first, second = json.loads((tmp_path / "benchmarks.json").read_text())["cartpole"]["rounds"]
    assert first == measured and list(second) == systems and second["rlx"]["seconds"] != first["rlx"]["seconds"]
    assert "2 iterations a run, 2 rounds." in (tmp_path / "benchmarks.md").read_text()


def test_the_bound_of_a_step_is_what_has_to_be_moved_or_multiplied(monkeypatch):
    """Two layers 4 wide, one head, 8 tokens known: 8*4 weights of the embedding, 2*(4*16 + 3*4*8) + norms."""
    end_to_end = load("end_to_end.py", monkeypatch)
    sizes = {"hidden_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
    config = {"model_type": "llama", "vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, **sizes}
    job = {"model": config | {"tie_word_embeddings": True}, "dtype": "bfloat16", "prompts": 2, "samples": 2}
    weights = 8 * 4 + 2 * (4 * 16 + 3 * 4 * 8 + 2 * 4) + 4
    slow_memory = end_to_end.bound(job, 3, {"bandwidth": 1.0, "matrix_rate": 1e30})
    # 3 tokens of 4 rows that see 6, 7 and 8 before them; keys and values of 2 layers are 2 * 2 * 4 numbers of 2 bytes.
    assert slow_memory == {"generate_s": 3 * weights * 2 + 4 * 21 * 32, "train_s": pytest.approx(28 * weights)}
    slow_products = end_to_end.bound(job, 3, {"bandwidth": 1e30, "matrix_rate": 1.0})
    learned = 3 * 4 * (2 * 9 * weights + 4 * 2 * 4 * 9 * 10 / 2)
    assert slow_products == {
        "generate_s": 4 * (2 * 3 * weights + 4 * 21 * 2 * 4),
        "train_s": pytest.approx(learned),
    }


def test_the_flops_of_a_step_are_counted_by_hand(monkeypatch):
    """100 weights, 2 layers of 3 heads 5 wide; rows of 1 and 3 tokens attend to 1 and 6 places."""
    training = load("training.py", monkeypatch)
    config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=3, head_dim=5)
    sizes = [SimpleNamespace(numel=lambda: 60), SimpleNamespace(numel=lambda: 40)]
    model = SimpleNamespace(config=config, parameters=lambda: sizes)
    assert training.flops(model, [1, 3]) == 3 * (2 * 100 * 4 + 4 * 2 * 3 * 5 * 7)
    case, record = {"flops": 60.0, "weights": 10}, {"matrix_rate": 30.0, "bandwidth": 28.0}
    assert training.bound_s(case, record) == 2 + 10


@pytest.mark.slow
def test_a_packed_step_is_measured(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "training.py"), "--tiny", "--rounds", "1", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    cases = json.loads((tmp_path / "benchmarks.json").read_text())["training"]["cases"]
    assert [case["tokens"] for case in cases] == [64, 64]
    assert all(case["seconds"][0] > 0 and case["planned"] > 12 * case["weights"] for case in cases)


@pytest.mark.slow
def test_weights_are_brought_to_runners_and_the_copies_are_counted(tmp_path, monkeypatch):
    command = [sys.executable, str(BENCHMARKS / "sync.py"), "--tiny", "--rounds", "2", "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    record = json.loads((tmp_path / "benchmarks.json").read_text())["sync"]
    assert [case["runners"] for case in record["cases"]] == [1, 4]
    assert all(0 < one["publish_s"] < one["all_s"] for case in record["cases"] for one in case["rounds"])
    sync = load("sync.py", monkeypatch)
    case = {"runners": 3, "bytes": 100}
    assert sync.bounds({"to_host": 50.0, "from_host": 25.0}, case) == (2.0, 14.0)


@pytest.mark.slow
def test_a_step_from_end_to_end_is_measured_beside_its_bound(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "end_to_end.py"), "--systems", "rlx", "--rounds", "1"]
    subprocess.run([*command, "--tiny", "--out", str(tmp_path)], check=True, timeout=300)
    record = json.loads((tmp_path / "benchmarks.json").read_text())["end to end"]
    (step,) = record["cases"][0]["rounds"]
    assert step["rlx"]["tokens"] == 8 and 0 < record["bound"]["train_s"] < step["rlx"]["train_s"]
    assert "| train | " in (tmp_path / "benchmarks.md").read_text()
    no_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True, env=no_gpu).stdout
    assert said.startswith("This benchmark needs a GPU, and torch finds no CUDA device here;") and said.count("\n") == 1


TINY = "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}"


@pytest.mark.slow
def test_the_whole_of_rlhf_runs_in_one_command_and_goes_on_where_it_ended(tmp_path):
    """A model that has learned nothing, two iterations a stage: every stage reads what those before it wrote."""
    settings = {
        "--set-sft": (f"model.config={TINY}", "data.rows_per_iteration=64", "stop.env_steps=null"),
        "--set-ppo": (
            "prompts.prompts_per_iteration=8",
            "training.minibatch_sequences=4",
            "training.lr=0.01",
            "training.lr_warmup=0",
            "training.value_warmup_iterations=0",
            "evaluation.interval=0",
        ),
        "--set": ("stop.iterations=2", "evaluation.interval=2", "evaluation.num_rows=8", "learners.torch_threads=1"),
    }
    command = [sys.executable, str(BENCHMARKS / "rlhf.py"), "--folder", str(tmp_path), "--smallest-gap", "0"]
    command += ["--prompts", "24", "--held-out-prompts", "12"]
    for option, values in settings.items():
        for value in values:
            command += [option, value]
    printed = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True).stdout
    assert sum(line.startswith("rlx train ") for line in printed.splitlines()) == 5
    assert "24 pairs of 24 prompts" in printed and "12 pairs of 12" in printed
    models = ["pre-trained", "PPO, adaptive KL", "PPO without KL", "DPO"]
    lines = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [row[0] for row in rows] == models
    assert float(rows[0][-1]) == 0 and abs(float(rows[1][-1])) > 0  # KL
    assert (tmp_path / "rlhf.png").read_bytes()[:4] == b"\x89PNG"
    lowered = 0.1 * (1 - 0.2 * 8 / 800)  # 8 completions far below kl_target, of a horizon of 800
    for name, coefs in (("ppo", [0.1, lowered]), ("ppo_without_kl", [1e-9, 1e-9])):
        metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [set(row) >= {"custom/gold", "ref_kl_sequence"} for row in metrics] == [True, True]
        assert [row["learner/kl_coef"] for row in metrics] == pytest.approx(coefs)

    (tmp_path / "dpo" / "finished").unlink()
    printed = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True).stdout
    assert [line for line in printed.splitlines() if line.startswith("rlx train ")] == [
        f"rlx train --resume {tmp_path / 'dpo'}"
    ]


def test_a_row_of_addition_has_the_spread_of_accuracy_and_the_lowest_explained_variance(monkeypatch):
    addition = load("addition.py", monkeypatch)
    seeds = [(100, 30.0, 0.5, 0.75, 0.5), (200, 50.0, 1.0, 1.0, 0.25)]
    results = [addition.Result(Path("run"), 10, *numbers) for numbers in seeds]
    cells = ["PPO", "2", "10", "150", "40", "0.750", "0.500", "1.000", "0.875", "0.25"]
    assert addition.table_row("rlhf_ppo", results) == cells
    assert addition.table_row("sft", [results[0]._replace(explained_variance=None)])[-1] == ""
    assert len(cells) == len(addition.HEADER)


def test_addition_ends_where_a_held_out_pair_is_trained_in_the_other_order(monkeypatch):
    addition = load("addition.py", monkeypatch)
    addition.check_held_out()
    prompts = {"eval": "12+34=", "sft": "34+12=", "rl": "12+35="}
    monkeypatch.setattr(addition, "rows", lambda split: [{"prompt": prompts[split]}])
    with pytest.raises(SystemExit, match=r"1 held-out pairs are in the training data, \['12', '34'\] for one"):
        addition.check_held_out()


def test_bounds_count_the_bytes_read_and_written_and_both_halves_of_a_product(monkeypatch):
    """By hand: 32 float32 are copied, 128 bytes each way; a product of 4 x 4 matrices is 64 products and 64 sums."""
    bounds = load("bounds.py", monkeypatch)
    monkeypatch.setattr(bounds, "COPIED_BYTES", {"cpu": 128})
    monkeypatch.setattr(bounds, "MATRIX_SIZE", {"cpu": 4})
    for measured, expected in ((bounds.bandwidth, 2 * 128), (bounds.matrix_rate, 2 * 64)):
        # The first run, which does not count, takes 0 s; those after it 4, 3, 2, then 6 s each.
        ticks = iter([tick for took in (0, 4, 3, 2, *[6] * bounds.REPEATS) for tick in (0.0, float(took))])
        monkeypatch.setattr(bounds.time, "perf_counter", lambda ticks=ticks: next(ticks))
        assert measured("cpu", bounds.torch.float32) == expected / 2


def test_the_bound_of_decoding_by_hand(monkeypatch):
    """Two prompts of 2 and 3 tokens, completions of 2 and 3; a pass takes what is longer, reading or multiplying.

    Prefill multiplies 5 tokens, 2 heads, 3 + 6 pairs: 5 * 10 + 2 * 5 + 9 * 2 = 78, and reads 100. Step 1 reads the
    weights and 3 + 4 tokens, 100 + 7 * 4 = 128, and multiplies 2 * 15 + 7 * 2 = 44; step 2 has one row of 5 tokens: 120
    and 25.
    """
    decode_bound = load("decode_bound.py", monkeypatch)
    costs = decode_bound.Costs(weight_bytes=100, token_bytes=4, token_flops=10, head_flops=5, pair_flops=2)
    reading = decode_bound.bound_of(costs, [2, 3], [2, 3], bandwidth=4.0, rate=100.0)
    assert (reading.prefill_s, reading.decode_s) == (25.0, (128 + 120) / 4)
    assert (reading.steps, reading.step_bytes, reading.seconds) == (2, 124.0, 87.0)
    multiplying = decode_bound.bound_of(costs, [2, 3], [2, 3], bandwidth=100.0, rate=2.0)
    assert (multiplying.prefill_s, multiplying.decode_s) == (39.0, (44 + 25) / 2)
    mixed = decode_bound.bound_of(costs, [2, 3], [2, 3], bandwidth=4.0, rate=1.0)
    assert (mixed.prefill_s, mixed.decode_s) == (78.0, 44.0 + 30.0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_models_costs_are_counted_from_its_shape(monkeypatch, tied):
    """The embedding is read by rows; where it is the head as well, it is read as a whole."""
    decode = load("decode.py", monkeypatch)
    model = decode.Qwen3ForCausalLM(
        decode.AutoConfig.for_model(**decode.QWEN3 | decode.TINY | {"tie_word_embeddings": tied})
    )
    costs = decode.Costs.of(model)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128  # query, key and value, output, and three of the MLP
    norms = 2 * (2 * 64 + 2 * 16) + 64
    assert costs.weight_bytes == 4 * (2 * layer + norms + 2000 * 64)
    assert costs.token_bytes == 4 * 2 * 2 * 2 * 16  # keys and values, layers, heads, size
    assert (costs.token_flops, costs.head_flops) == (2 * 2 * layer, 2 * 2000 * 64)
    assert costs.pair_flops == 2 * 2 * 2 * 4 * 16  # two products of two operations, layers, heads, size


def test_decoding_is_compared_within_rounds_and_with_the_bound_of_its_minute(monkeypatch):
    """Ratios 2, 6 and 4 to the better one of the others; 1/2, 1/4 and 1/3 of the bound."""
    decode = load("decode.py", monkeypatch)
    times = [(2.0, 4.0, 9.0), (4.0, 30.0, 24.0), (3.0, 12.0, 50.0)]
    rates = {"bandwidth": 3e12, "matrix_rate": 7e14}
    bound = {"prefill_s": 0.25, "decode_s": 0.75, "steps": 1023, "step_bytes": 2e9}
    record = {"rounds": [dict(zip(decode.SIDES, one, strict=True)) | rates for one in times], "bounds": [bound] * 3}
    record |= {"command": "x", "device": "a GPU", "dtype": "bfloat16", "requests": 256, "tokens": 6000}
    page = decode.page(record | {"machine": load("report.py", monkeypatch).machine()})
    assert "| rlx | 3.00 | 2.00 to 4.00 | 2,000 | 33.3 % |" in page
    assert "rlx reaches 4.00 of the better one's speed (2.00 to 6.00; aimed at: 3) and 0.33 of the bound" in page
    assert "(0.25 to 0.50; aimed at: 0.5, missed)" in page
    assert "3,000 GB/s, 700.00 TFLOP/s. A step reads 2.000 GB" in page


def test_decoding_runs_small_on_a_cpu_and_leaves_the_page_alone(monkeypatch, capsys, tmp_path):
    decode = load("decode.py", monkeypatch)
    for name, value in {"REPEATS": 1, "COPIED_BYTES": {"cpu": 2**20}, "MATRIX_SIZE": {"cpu": 64}}.items():
        monkeypatch.setattr(sys.modules["bounds"], name, value)
    monkeypatch.setattr(sys.modules["on_gpu"], "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["decode.py", "--tiny", "--rounds", "1"])
    decode.main()
    printed = capsys.readouterr().out
    rows = [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| ")]
    assert rows[2:] == [f"| {name}" for name in decode.SIDES]
    assert "of the bound" in printed and not any(tmp_path.iterdir())


def test_decoding_says_where_there_is_no_gpu(monkeypatch, capsys):
    decode = load("decode.py", monkeypatch)
    monkeypatch.setattr(decode.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["decode.py"])
    decode.main()
    assert "needs a GPU, and torch finds no CUDA device here" in capsys.readouterr().out


def test_a_verifying_step_keeps_proposals_up_to_the_first_wrong_one(monkeypatch):
    """Right, right, wrong, right, right: with 2 proposed steps of 3 and 2 tokens, with 1 steps of 2, 2 and 1."""
    speculation = load("speculation.py", monkeypatch)
    kept = [np.array([True, True, False, True, True])]
    assert [speculation.tokens_a_step(kept, proposed) for proposed in (1, 2)] == [5 / 3, 5 / 2]
    assert speculation.tokens_a_step([*kept, np.array([False, False])], 2) == 7 / 4


def test_proposals_are_drawn_with_the_number_that_the_token_was_drawn_by(monkeypatch):
    """Of shares 1/4 and 3/4 the numbers 0.2 and 0.3 draw tokens 0 and 1; the likeliest is token 1 in both."""
    speculation = load("speculation.py", monkeypatch)
    sample = speculation.Sample([0], [0, 1], np.array([0.2, 0.3]))
    law = np.array([[0.25, 0.75]] * 2)
    assert speculation.kept_of([sample], [law], greedy=False)[0].tolist() == [True, True]
    assert speculation.kept_of([sample], [law], greedy=True)[0].tolist() == [False, True]


def test_ngrams_mix_what_followed_contexts_of_all_lengths(monkeypatch):
    """In "aba" a is 2 of 3 with weight 3/5, and 1/2 with what is left; after a comes b with weight 1/2."""
    ngrams = load("speculation.py", monkeypatch).Ngrams(2)
    ngrams.add([0, 1, 0])
    everywhere = 2 / 5 * 1 / 2 + 3 / 5 * 2 / 3
    assert ngrams.law([]) == pytest.approx([everywhere, 1 - everywhere])
    assert ngrams.law([0]) == pytest.approx([everywhere / 2, 1 - everywhere / 2])


def test_a_draft_models_steps_are_paid_for(monkeypatch):
    """1.5 tokens in 1.2 times a plain step are 1.25; with a draft that takes half a step 1.5 / 1.7."""
    speculation = load("speculation.py", monkeypatch)
    monkeypatch.setattr(speculation, "PROPOSED", (1, 2))
    cost, tokens = {0: 10.0, 1: 12.0, 2: 20.0}, [1.5, 1.9]
    assert speculation.bound(tokens, cost, None) == (pytest.approx(1.25), 1)
    assert speculation.bound(tokens, cost, {0: 5.0}) == (pytest.approx(1.5 / 1.7), 1)


def test_what_a_turn_reads_and_what_of_it_is_new(monkeypatch):
    """Two conversations about one prompt of 3, which is read once; turns of 2 and an answer of 4."""
    kept = load("kept_turns.py", monkeypatch)
    monkeypatch.setattr(kept, "CONVERSATIONS", 2)
    monkeypatch.setattr(kept, "SAMPLES", 2)
    case = kept.Case("", prompt=3, turns=2, drawn=2, said=4)
    assert [case.read(turn) for turn in range(2)] == [3, 9] and [case.new(turn) for turn in range(2)] == [3, 5]
    assert [len(kept.requests_of(case, turn, case.read)) for turn in range(2)] == [1, 2]
    monkeypatch.setattr(kept, "BANDWIDTH", 1.0)
    monkeypatch.setattr(kept, "RATE", 1e9)  # so that only bytes count
    costs = kept.Costs(weight_bytes=100, token_bytes=1, token_flops=1, head_flops=1, pair_flops=1)
    total, read, new = kept.counted(costs, case)
    assert (read, new) == (200, 100 + 100 + 2 * 4)
    assert total - read == (100 + 2 * 4) + (100 + 2 * 10)  # one step a turn: the first token comes from reading


def test_the_time_of_reading_is_part_of_all(monkeypatch):
    kept = load("kept_turns.py", monkeypatch)
    prefill = kept.Slots.prefill
    model = kept.LlamaForCausalLM(kept.LlamaConfig(vocab_size=16, **kept.SIZES | {"num_hidden_layers": 1})).eval()
    monkeypatch.setattr(kept, "CONVERSATIONS", 8)
    total, read, new = kept.measure(kept.Generator(model), kept.Case("", prompt=2, turns=2, drawn=2, said=2))
    assert new > 0 and 0 < read < total and kept.Slots.prefill is prefill
