"""Deaths and hangs in the middle of IMPALA, with real signals: the others go on, the run ends by itself, and the counts
are right."""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
import psutil
import pytest

from rlx import Callback
from rlx.algorithms.appo import APPOConfig
from rlx.algorithms.impala import IMPALAConfig
from rlx.metrics import read_metrics

pytestmark = pytest.mark.slow

RUNNERS, ENVS, STEPS, UPDATES, MAX_AGE = 3, 2, 8, 5, 4
SAMPLES = ENVS * STEPS
"""One fragment is a batch: each batch comes from one runner."""
DEADLINE_S = 120.0


def sleep_in_c():
    ctypes.CDLL(None).sleep(600)  # no signal handler of Python runs before it returns


ENDS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hangs in C": sleep_in_c,
    "hangs in Python": lambda: time.sleep(600),
}


class Walk(gymnasium.Env):
    """Observations are (process, steps so far, in all episodes); a file ends the process in the middle of a step."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, folder, how="killed"):
        self.folder, self.how, self.count = Path(folder), how, 0

    def reset(self, *, seed=None, options=None):
        return self.observe(), {}

    def observe(self):
        return np.array([os.getpid(), self.count], np.float32)

    def step(self, action):
        strike = self.folder / f"strike-{os.getpid()}"
        if self.count % STEPS == 3 and strike.exists():
            strike.unlink()
            ENDS[self.how]()
        self.count += 1
        return self.observe(), float(action), False, self.count % 50 == 0, {}


class Record(Callback):
    """Keeps of every batch whose it is, where its environments stood and what counts; asks `is_enough` for the end."""

    def __init__(self):
        self.processes, self.counts, self.masks, self.restarts_before = [], [], [], []
        self.is_enough = lambda algo: False

    def on_sample_end(self, algo, sample):
        self.processes.append(int(sample.obs[0, 0, 0]))
        self.counts.append(sample.obs[0, :, 1].astype(int).tolist())
        self.masks.append(int(sample.mask.sum()))
        self.restarts_before.append(algo.runner_restarts)

    def on_train_result(self, algo, metrics):
        if self.is_enough(algo):
            algo.request_stop("seen enough")


@pytest.fixture(autouse=True)
def nothing_is_left():
    memory = set(os.listdir("/dev/shm"))
    yield
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=3)
    for process in alive:
        process.kill()
    assert not alive
    assert set(os.listdir("/dev/shm")) <= memory


@pytest.fixture
def build(tmp_path):
    """Return a function that builds IMPALA on Walk in a run folder, and a Record of it."""

    def build(how="killed", config=IMPALAConfig, num_learners=0, runners=RUNNERS, training=(), **fault_tolerance):
        made = config().environment(Walk, kwargs={"folder": str(tmp_path), "how": how}).callbacks(Record)
        made.env_runners(num_env_runners=runners, num_envs_per_env_runner=ENVS, rollout_fragment_length=STEPS)
        made.training(batch_size=SAMPLES, max_age=MAX_AGE, updates_per_iteration=UPDATES, **dict(training))
        made.learners(num_learners=num_learners).fault_tolerance(**{"env_step_timeout_s": None} | fault_tolerance)
        made.stop(time_s=DEADLINE_S).checkpointing(interval=2).reporting(progress="none")
        algorithm = made.build(run_dir=tmp_path / "run")
        (record,) = algorithm.callbacks._all
        return algorithm, record

    return build


def pid_of(algorithm, name):
    return algorithm._runtime().state()[name].pid


def check_counts(algorithm, record, rows):
    """What was learned from, dropped and failed adds up to what arrived, in which nothing is missing or twice."""
    last = rows[-1]
    assert [row["iteration"] for row in rows] == list(range(1, last["iteration"] + 1))
    assert last["weights_version"] == last["gradient_steps"] == UPDATES * last["iteration"]
    assert last["env_steps"] + last["dropped_env_steps"] == sum(record.masks)
    assert sum(record.masks) + last["env_failures"] == SAMPLES * len(record.masks)
    assert all(0 <= row["age_mean"] <= row["age_max"] <= MAX_AGE for row in rows)
    expected = {}
    for process, counts in zip(record.processes, record.counts, strict=True):
        if last["env_failures"] == 0:
            assert counts == [expected.get(process, 0)] * ENVS
        expected[process] = counts[0] + STEPS


@pytest.mark.parametrize("how", ["killed", "stopped", "hangs in C"])
@pytest.mark.parametrize("victim", range(RUNNERS))
def test_a_runner_that_dies_or_hangs_costs_its_own_share_and_the_run_ends_by_itself(how, victim, build, tmp_path):
    algorithm, record = build(how, sample_timeout_s=2.0)
    with algorithm:
        process = pid_of(algorithm, f"env_runner/{victim}")
        others = {pid_of(algorithm, f"env_runner/{index}") for index in range(RUNNERS)} - {process}

        def is_enough(algo):
            if algo.iteration == 3:
                (tmp_path / f"strike-{process}").touch()
            if not algo.runner_restarts:
                return False
            return pid_of(algo, f"env_runner/{victim}") in record.processes

        record.is_enough = is_enough
        algorithm.fit()
        assert algorithm.stop_reason == "seen enough"
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    check_counts(algorithm, record, rows)
    assert (rows[-1]["runner_restarts"], rows[-1]["learner_restarts"], rows[-1]["env_failures"]) == (1, 0, 0)
    last = len(record.processes) - record.processes[::-1].index(process)  # the batch after its last one
    new = min(i for i, one in enumerate(record.processes) if one not in others | {process})
    meanwhile = record.processes[last:new]
    assert set(meanwhile) <= others
    if how != "killed":  # two seconds: more than had been asked for before
        assert len(meanwhile) > MAX_AGE + 1 and set(meanwhile) == others
    text = (tmp_path / "run" / "logs" / "driver.log").read_text()
    assert ("was killed by SIGKILL in sample()" if how == "killed" else "has not answered within 2 s") in text


def test_a_step_that_hangs_in_python_costs_a_row_and_no_runner(build, tmp_path):
    algorithm, record = build("hangs in Python", env_step_timeout_s=1.0)
    with algorithm:
        process = pid_of(algorithm, "env_runner/1")

        def is_enough(algo):
            if algo.iteration == 3:
                (tmp_path / f"strike-{process}").touch()
            return algo.env_failures and record.processes[-UPDATES:].count(process)

        record.is_enough = is_enough
        algorithm.fit()
        assert algorithm.stop_reason == "seen enough"
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    check_counts(algorithm, record, rows)
    assert (rows[-1]["runner_restarts"], rows[-1]["env_failures"]) == (0, 1)


def test_what_a_runner_that_was_held_up_brings_too_late_is_dropped_and_counted(build, tmp_path):
    algorithm, record = build("stopped")
    with algorithm:
        process = pid_of(algorithm, "env_runner/0")

        def is_enough(algo):
            if algo.iteration == 3:
                (tmp_path / f"strike-{process}").touch()
            is_stopped = psutil.Process(process).status() == psutil.STATUS_STOPPED
            if is_stopped and process not in record.processes[-10 * MAX_AGE :]:
                os.kill(process, signal.SIGCONT)
            return algo.dropped_env_steps and not is_stopped and record.processes[-UPDATES:].count(process)

        record.is_enough = is_enough
        algorithm.fit()
        assert algorithm.stop_reason == "seen enough"
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    check_counts(algorithm, record, rows)
    assert rows[-1]["runner_restarts"] == 0
    # A batch is one fragment here, so it is learned from as a whole or not at all.
    assert rows[-1]["env_steps"] == SAMPLES * rows[-1]["weights_version"]
    assert rows[-1]["dropped_env_steps"] == SAMPLES * (len(record.masks) - rows[-1]["weights_version"]) >= SAMPLES


@pytest.mark.parametrize("config, training", [(IMPALAConfig, {}), (APPOConfig, {"target_update_interval": 2})])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_run_goes_on_from_its_checkpoint_when_a_learner_dies_or_hangs(config, training, number, build, tmp_path):
    algorithm, record = build(config=config, training=training, num_learners=2, runners=2, update_timeout_s=3.0)
    struck = []

    def strike():
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline and not struck:
            state = algorithm._runtime().state()["learner/1"]
            if algorithm.iteration >= 5 and state.method == "update":
                os.kill(state.pid, number)
                struck.append(algorithm.iteration)

    with algorithm:
        thread = threading.Thread(target=strike)
        thread.start()
        record.is_enough = lambda algo: algo.iteration == 12
        algorithm.fit()
        thread.join()
        assert algorithm.stop_reason == "seen enough"
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    last = rows[-1]
    assert struck and [row["iteration"] for row in rows] == list(range(1, 13))
    assert (last["learner_restarts"], last["runner_restarts"]) == (1, 0)
    assert last["weights_version"] == last["gradient_steps"] == 12 * UPDATES
    assert last["env_steps"] == 12 * UPDATES * SAMPLES
    assert all(0 <= row["age_mean"] <= row["age_max"] <= MAX_AGE for row in rows)
    back = struck[0] - struck[0] % 2
    text = (tmp_path / "run" / "logs" / "driver.log").read_text()
    assert f"The learners are started again, and the run goes back to iteration {back}." in text
