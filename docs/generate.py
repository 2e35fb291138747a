"""The pages of docs/ that repeat what the code says: written by `python docs/generate.py`, held equal by a test."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

from rlx import cli
from rlx.algorithms.dpo import DPOConfig
from rlx.algorithms.grpo import GRPOConfig
from rlx.algorithms.ppo import PPOConfig
from rlx.algorithms.reward_model import RewardModelConfig
from rlx.algorithms.rlhf_ppo import RLHFPPOConfig
from rlx.algorithms.sft import SFTConfig
from rlx.config import AlgorithmConfig
from rlx.config_document import flow
from rlx.metrics import METRICS, TEXT_METRICS
from rlx.section import allowed
from rlx.settings import FREE_ON_RESUME

FOLDER = Path(__file__).parent


def pages() -> dict[str, str]:
    """Return the text of every generated page by its file name."""
    return {
        "metrics.md": metrics_page(),
        "configuration.md": configuration_page(),
        "text_configuration.md": text_configuration_page(),
        "rayjob.yaml": ray_job(),
    }


def ray_job() -> str:
    """Return what the command in its first line prints: a run on Ray, on three machines."""
    train = "rlx train ppo --set runtime.engine=ray --set runtime.address=auto --set env_runners.num_env_runners=16"
    words = [
        "--rayjob",
        "--nodes",
        "3",
        "--image",
        "registry/rlx-ray:0.1",
        "--ray-version",
        "2.60.0",
        "--cpu",
        "8",
        "--memory",
        "32Gi",
    ]
    words = ["k8s", "render", *words, "--command", train]
    with redirect_stdout(io.StringIO()) as printed:
        cli.main(words)
    return f"# rlx {shlex.join(words)}\n{printed.getvalue()}"


def metrics_page() -> str:
    """Return every metric with its meaning."""
    rows, of_text = (
        [(f"`{name}`", meaning) for name, meaning in metrics.items()] for metrics in (METRICS, TEXT_METRICS)
    )
    return "\n".join(
        [
            "# Metrics",
            "",
            "<!-- Written by `python docs/generate.py` from rlx.metrics.METRICS. -->",
            "",
            "`Algorithm.train()` returns these; a run's `metrics.jsonl` holds a line of them for each iteration.",
            "The x axis of every metric is `env_steps`. Names do not change between releases. An algorithm of your own",
            "may report further `learner/` stats: whatever its loss returns beside the scalar. Callbacks may report",
            "`custom/` metrics: see [callbacks.md](callbacks.md).",
            "",
            *table(("name", "meaning"), rows),
            "",
            "## Of runs on text",
            "",
            "There env_steps counts tokens and an episode is a completion: [language_models.md](language_models.md).",
            "",
            *table(("name", "meaning"), of_text),
            "",
        ]
    )


def configuration_page() -> str:
    """Return every section and setting of PPO with type, default and meaning."""
    lines = [
        "# Configuration",
        "",
        "<!-- Written by `python docs/generate.py` from src/rlx/settings.py and algorithms/ppo.py. -->",
        "",
        "A setting has one name in three places: `training: {gamma: 0.98}` in a YAML file, `--set training.gamma=0.98`",
        "on the command line, `.training(gamma=0.98)` on the builder. `rlx config show ppo --comments` prints all of",
        "them with these meanings, and `rlx config schema ppo` prints the JSON schema for an editor.",
        "",
        "`algorithm` names what is trained: a shipped algorithm (`ppo`), a module (`my_package.my_algorithm`), or a",
        "file next to the YAML (`./my_algorithm.py`). A run that goes on from a checkpoint may change the sections",
        f"{', '.join(f'`{name}`' for name in FREE_ON_RESUME)}; any other change is refused.",
        "",
        "Runs on text have other sections: [text_configuration.md](text_configuration.md).",
        "",
    ]
    return "\n".join([*lines, *sections(PPOConfig())])


def text_configuration_page() -> str:
    """Return every section and setting of GRPO with type, default and meaning."""
    lines = [
        "# Configuration of runs on text",
        "",
        "<!-- Written by `python docs/generate.py` from src/rlx/text_sections.py and algorithms/grpo.py. -->",
        "",
        "How settings are written and changed is said in [configuration.md](configuration.md). These are the sections",
        "of `algorithm: grpo`; `rlhf_ppo`, `sft`, `reward_model` and `dpo` differ in `training` only, which stands at",
        "the end for each. `prompts`, `reward`, `generation` are for reinforcement learning and for evaluations by",
        "completions, `data` for supervised training.",
        "",
    ]
    others = {"rlhf_ppo": RLHFPPOConfig, "sft": SFTConfig, "reward_model": RewardModelConfig, "dpo": DPOConfig}
    of_others = [line for name, config in others.items() for line in sections(config(), "training", f" of {name}")]
    return "\n".join([*lines, *sections(GRPOConfig()), *of_others])


def sections(config: AlgorithmConfig, only: str | None = None, suffix: str = "") -> list[str]:
    """Return the lines of every section of a config, or of one; suffix: of the titles."""
    lines = []
    for name, values in config.to_dict().items():
        if not isinstance(values, dict) or only not in (None, name):
            continue
        section = type(getattr(config.settings, name))
        rows = (
            (f"`{key}`", allowed(field), f"`{flow(values[key])}`", field.description or "")
            for key, field in section.model_fields.items()
        )
        lines += [f"## {name}{suffix}", "", section.__doc__ or "", ""]
        lines += [*table(("setting", "accepts", "default", "meaning"), rows), ""]
    return lines


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return the lines of a markdown table."""
    cells = [header, ("---",) * len(header), *rows]
    return ["| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in row) + " |" for row in cells]


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
