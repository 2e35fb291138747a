"""A run folder that is damaged, taken, changed or on a full disk: one sentence, and what was saved stays."""

import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import rlx
from rlx.algorithms.ppo import PPOConfig
from rlx.checkpoint import list_checkpoints, load_checkpoint
from rlx.cli import main
from rlx.errors import CheckpointError
from rlx.metrics import read_metrics

CONFIG = """\
algorithm: ppo
environment: {id: CartPole-v1}
env_runners: {num_envs_per_env_runner: 4, rollout_fragment_length: 32}
training: {epochs: 1, minibatch_size: 64}
checkpointing: {interval: 1}
reporting: {progress: none}
stop: {iterations: 3}
"""


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with checkpoints of iterations 1 to 3; copy it before you break it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(CONFIG)
    assert main(["train", str(folder / "tiny.yaml"), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(finished):
    """A copy of the finished run, to break, as ./run."""
    shutil.copytree(finished, "run")
    return Path("run")


def fails_with(capsys, arguments: list[str], code: int, sentence: str) -> str:
    """Run the command line; check its exit code and sentence; return what it said."""
    __tracebackhide__ = True
    assert main(arguments) == code
    said = capsys.readouterr()
    assert sentence in said.err, said.err
    assert "rlx: error: " in said.err and "Traceback" not in said.err
    assert len(said.err) < 3000
    return said.err


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unchanged(before: dict[Path, bytes], after: dict[Path, bytes]) -> bool:
    """Return whether all is as it was, but for the log and the name of the last holder."""
    return all(path.name in ("driver.log", "lock") for path, _ in before.items() ^ after.items())


@pytest.mark.parametrize("folder, fault", [("tiny.yaml", "is a file"), ("tiny.yaml/run", "is a file")])
def test_a_run_folder_that_cannot_be_made(folder, fault, capsys):
    said = fails_with(capsys, ["train", "tiny.yaml", "--run-dir", folder], 2, f"the run folder {folder} cannot be made")
    assert said.endswith(f"{fault}; choose another --run-dir.\n")
    assert Path("tiny.yaml").read_text() == CONFIG


def test_a_run_folder_that_the_system_refuses(capsys):
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    fails_with(capsys, ["train", "tiny.yaml", "--run-dir", "/proc/run"], 2, "/proc")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_run_folder_without_the_right_to_write(capsys):
    Path("locked").mkdir(mode=0o500)
    fails_with(
        capsys, ["train", "tiny.yaml", "--run-dir", "locked/run"], 2, "is not writable; choose another --run-dir"
    )


def test_a_run_folder_that_is_taken(run, capsys):
    before = contents(run)
    sentence = "run already holds a run; go on with `rlx train --resume run` or choose another --run-dir."
    fails_with(capsys, ["train", "tiny.yaml", "--run-dir", "run"], 2, sentence)
    assert contents(run) == before


def truncate(file: Path, share: float = 0.5) -> None:
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def change_a_number(checkpoint: Path) -> None:
    file = checkpoint / "state.json"
    file.write_text(file.read_text().replace('"iteration": ', '"iteration": 9'))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated state": (lambda one: truncate(one / "state.json"), "state.json is torn or foreign"),
    "empty state": (lambda one: truncate(one / "state.json", 0), "state.json is torn or foreign"),
    "binary state": (lambda one: (one / "state.json").write_bytes(b"\xff\x00" * 999), "state.json is torn or foreign"),
    "foreign state": (lambda one: (one / "state.json").write_text('{"a": 1}'), "state.json is torn or foreign"),
    "a list": (lambda one: (one / "state.json").write_text("[1]"), "state.json is torn or foreign"),
    "changed state": (change_a_number, "its checksum is not the one saved"),
    "of the future": (
        lambda one: (one / "state.json").write_text('{"format": 99, "content": {}}'),
        "state.json has format 99, this rlx reads format 1",
    ),
    "truncated tensors": (lambda one: truncate(one / "tensors.safetensors"), "tensors.safetensors is torn"),
    "empty tensors": (lambda one: truncate(one / "tensors.safetensors", 0), "tensors.safetensors is torn"),
    "no tensors": (lambda one: (one / "tensors.safetensors").unlink(), "it has no tensors.safetensors"),
    "no state": (lambda one: (one / "state.json").unlink(), "it has no state.json"),
}


@pytest.mark.parametrize("damage, sentence", DAMAGE.values(), ids=DAMAGE)
def test_a_checkpoint_that_is_damaged(damage, sentence, run, capsys):
    newest = list_checkpoints(run / "checkpoints")[-1]
    damage(newest)
    with pytest.raises(CheckpointError, match=sentence):
        rlx.load_policy(newest)
    with pytest.raises(CheckpointError, match=sentence), PPOConfig().environment("CartPole-v1").build() as algorithm:
        algorithm.restore(newest)

    # The older ones serve, and the log says so.
    assert main(["eval", "run", "--episodes", "1"]) == 0
    assert sentence in capsys.readouterr().err
    assert main(["train", "--resume", "run"]) == 0
    assert "resuming run from iteration 2" in capsys.readouterr().err

    for one in list_checkpoints(run / "checkpoints"):
        damage(one)
    before = contents(run)
    fails_with(capsys, ["train", "--resume", "run"], 2, sentence)
    fails_with(capsys, ["eval", "run"], 2, sentence)
    assert unchanged(before, contents(run))


MISSING = {
    "no run": (["train", "--resume", "nowhere"], "nowhere is no run folder: it has no config.yaml"),
    "no run to evaluate": (["eval", "nowhere"], "nowhere does not exist; give the folder that `rlx train` printed"),
    "a file": (["eval", "tiny.yaml"], "tiny.yaml is neither a run folder nor a checkpoint"),
    "no run to plot": (["plot", "nowhere"], "nowhere is no run folder"),
    "no config": (["train", "nowhere.yaml"], 'there is no config "nowhere.yaml"'),
    "no input at all": (["train"], "rlx train needs a CONFIG (see `rlx list`), or --resume RUN"),
}


@pytest.mark.parametrize("arguments, sentence", MISSING.values(), ids=MISSING)
def test_something_that_is_not_there(arguments, sentence, capsys):
    fails_with(capsys, arguments, 2, sentence)


def test_a_run_without_a_checkpoint(run, capsys):
    shutil.rmtree(run / "checkpoints")
    sentence = "holds no checkpoint yet; delete the run folder and start afresh."
    fails_with(capsys, ["train", "--resume", "run"], 2, sentence)


def test_a_metrics_file_that_is_damaged(run, capsys):
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n{}\n")
    fails_with(capsys, ["train", "--resume", "run"], 2, "run/metrics.jsonl:1 is no JSON; delete that line")


def test_resuming_with_another_config(run, capsys):
    before = contents(run)
    for change, shown in (
        ("training.epochs=2", "training.epochs was 1 and would be 2"),
        ("environment.id=Acrobot-v1", "environment.id was CartPole-v1 and would be Acrobot-v1"),
        ("runtime.seed=1", "runtime.seed was 0 and would be 1"),
    ):
        fails_with(capsys, ["train", "--resume", "run", "--set", change], 2, f"other settings: {shown}. Only stop")
    assert contents(run) == before
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    with (
        PPOConfig().environment("Acrobot-v1").build() as algorithm,
        pytest.raises(CheckpointError, match=r"Acrobot-v1"),
    ):
        algorithm.restore(checkpoint)


def test_resuming_a_run_that_another_process_holds(run, capsys):
    before = contents(run)
    hold = (
        "from pathlib import Path; from rlx.run import Run; Run.open(Path('run')); print('held', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        sentence = f"run is in use by process {holder.pid}; wait for it to end, or end it, before resuming."
        fails_with(capsys, ["train", "--resume", "run", "--set", "stop.iterations=9"], 2, sentence)
        holder.communicate(b"\n", timeout=10)
    assert unchanged(before, contents(run))
    assert main(["train", "--resume", "run"]) == 0  # an ended holder holds nothing


def test_a_checkpoint_cannot_run_code(run):
    """What is saved is JSON and safetensors; a pickle in its place is refused, not run."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (Path("executed"),))

    newest = list_checkpoints(run / "checkpoints")[-1]
    for name in ("state.json", "tensors.safetensors"):
        shutil.rmtree("copy", ignore_errors=True)
        shutil.copytree(newest, "copy")
        (Path("copy") / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(CheckpointError):
            rlx.load_policy("copy")
    assert not Path("executed").exists()


# A full disk -----------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_while_a_run_is_taken_up_again_loses_nothing(run):
    """No file may grow: config.yaml and metrics.jsonl, both about to be rewritten, must stay whole."""
    before = contents(run)
    process = rlx_with_file_limit(["train", "--resume", "run", "--set", "stop.iterations=9"], size=1)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "could not write run/" in process.stderr
    kept = ("config.yaml", "metrics.jsonl", "state.json", "tensors.safetensors")
    after = contents(run)
    assert all(after[path] == content for path, content in before.items() if path.name in kept)
    assert main(["train", "--resume", "run"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("size, file", [(300_000, "metrics.jsonl"), (100_000, "iter_000000")])
def test_a_disk_that_fills_during_a_run_names_the_file_and_keeps_the_last_checkpoint(size, file):
    """The limit is for each file: metrics.jsonl meets it in the middle of the run, a checkpoint's tensors at once."""
    arguments = ["train", "tiny.yaml", "--run-dir", "run", "--set", "stop.iterations=100000"]
    process = rlx_with_file_limit([*arguments, "--set", "checkpointing.interval=20"], size)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "rlx: error: could not write" in process.stderr and file in process.stderr
    if file == "metrics.jsonl":
        saved = load_checkpoint(list_checkpoints(Path("run/checkpoints"))[-1])["iteration"]
        assert saved >= 20
        assert main(["train", "--resume", "run", "--set", f"stop.iterations={saved + 1}"]) == 0
        rows = read_metrics(Path("run/metrics.jsonl"))
        assert [row["iteration"] for row in rows] == list(range(1, saved + 2))


def rlx_with_file_limit(arguments: list[str], size: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlx.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
