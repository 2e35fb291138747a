"""Write trl_1.13.json or trl_1.10.json: losses and gradients of TRL on random ragged tensors, in float64.

TRL pins other versions than rlx, and PPO left it after 1.12, so each file is made in an environment of its own:

    python -m venv /tmp/trl113 && /tmp/trl113/bin/pip install torch==2.13.0 trl==1.13.0 requests
    /tmp/trl113/bin/python tests/goldens/make_trl_goldens.py
    python -m venv /tmp/trl110 && /tmp/trl110/bin/pip install torch==2.13.0 trl==1.10.0
    /tmp/trl110/bin/python tests/goldens/make_trl_goldens.py

It needs neither a GPU nor the network. Where TRL has a function of tensors, it is called. Where the formulas stand in
the middle of a trainer's method, those lines of the installed TRL are run on tensors, as they are (see `run_lines`).
tests/functional/test_trl_goldens.py reads the files. Axes: S sequences, L tokens, P pairs.
"""

import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor

FOLDER = Path(__file__).parent
SEEDS = (0, 1, 2)
S, L, P = 7, 9, 5

GRPO_CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 12},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    "gspo_dapo": {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon_low": 0.1},
    "asymmetric": {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.4},
    "dual_clip": {"loss_type": "dapo", "delta": 1.5},
    "dual_clip_asymmetric": {"loss_type": "bnpo", "epsilon_low": 0.1, "epsilon_high": 0.3, "delta": 1.7},
    "kl": {"loss_type": "grpo", "beta": 0.04},
    "kl_dapo": {"loss_type": "dapo", "beta": 0.5},
    "kl_dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 12, "beta": 0.04},
    "kl_gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1},
    "kl_cispo": {"loss_type": "cispo", "epsilon_high": 1.3, "beta": 0.1},
}


def run_lines(function: Callable[..., Any], first: str, last: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the lines of `function` from the one that begins with `first` to the next that begins with `last`.

    They see the names of their module and then `names`, which is returned with what they assigned.
    """
    lines = inspect.getsource(function).splitlines()
    begin = next(number for number, line in enumerate(lines) if line.strip().startswith(first))
    end = next(number for number in range(begin, len(lines)) if lines[number].strip().startswith(last))
    scope = {**inspect.unwrap(function).__globals__, **names}
    exec(compile(textwrap.dedent("\n".join(lines[begin : end + 1])), function.__qualname__, "exec"), scope)
    return scope


def random_tensors(seed: int) -> tuple[Callable[..., Tensor], torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64), generator


def ragged_mask(rows: int, generator: torch.Generator) -> Tensor:
    """Return [rows, L] bool: a prompt of 0 to 2, a completion of 1 to 6 tokens, padding."""
    prompt = torch.randint(0, 3, (rows, 1), generator=generator)
    completion = torch.randint(1, 7, (rows, 1), generator=generator)
    position = torch.arange(L)
    return (position >= prompt) & (position < prompt + completion)


def grpo(seed: int, empty_row: bool) -> dict[str, Any]:
    from trl.losses.grpo_loss import FusedLinearGRPOFunction

    normal, generator = random_tensors(seed)
    mask = ragged_mask(S, generator)
    if empty_row:
        mask[2] = False
    logp = -normal(S, L).abs()
    inputs = {
        "mask": mask,
        "logp": logp,
        "new_logp": logp + 0.4 * normal(S, L),
        "ref_logp": logp + 0.4 * normal(S, L),
        "advantage": normal(S),
    }
    cases = {}
    for name, settings in GRPO_CASES.items():
        new_logp = inputs["new_logp"].clone().requires_grad_()
        counted = mask.to(torch.float64)
        loss, _ = FusedLinearGRPOFunction.ppo_loss_fn(
            new_logp,
            counted,
            inputs["advantage"],
            counted,
            ref_per_token_logps=inputs["ref_logp"],
            old_per_token_logps=logp,
            **{"beta": 0.0} | settings,
        )
        loss.backward()
        cases[name] = {"settings": settings, "loss": loss, "by_new_logp": new_logp.grad}
    return {"inputs": inputs, "cases": cases}


def preference(seed: int) -> dict[str, Any]:
    from trl import DPOTrainer, RewardTrainer
    from trl.losses.dpo_loss import FusedLinearDPOFunction

    normal, generator = random_tensors(100 + seed)
    mask = ragged_mask(2 * P, generator)  # the chosen sequences, then the rejected ones
    ref_logp = -normal(2 * P, L).abs()
    inputs = {"mask": mask, "logp": ref_logp + 0.5 * normal(2 * P, L), "ref_logp": ref_logp}
    ref_chosen, ref_rejected = (ref_logp * mask).sum(1).chunk(2)

    cases = {}
    for loss_type, beta in (("sigmoid", 0.1), ("sigmoid", 0.5), ("ipo", 0.1), ("ipo", 0.5)):
        logp = inputs["logp"].clone().requires_grad_()
        scope = run_lines(
            DPOTrainer._compute_loss,
            "per_token_logps[shift_completion_mask == 0] = 0.0",
            "per_sequence_loss = (ipo_delta",
            {
                "self": SimpleNamespace(
                    ld_alpha=None,
                    precompute_ref_logps=True,
                    f_divergence_type="reverse_kl",
                    loss_types=[loss_type],
                    loss_weights=[1.0],
                    beta=beta,
                ),
                "inputs": {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected},
                "per_token_logps": logp.clone(),
                "completion_mask": mask,
                "shift_completion_mask": mask,
            },
        )
        loss = scope["per_sequence_loss"]
        if loss_type == "sigmoid":
            chosen, rejected = (logp * mask).sum(1).chunk(2)
            fused = FusedLinearDPOFunction.preference_loss_fn(
                chosen, rejected, torch.zeros(2 * P), ref_chosen, ref_rejected, beta=beta
            )
            torch.testing.assert_close(fused[0] if isinstance(fused, tuple) else fused, loss.mean())
        loss.mean().backward()
        cases[f"{loss_type}_{beta}"] = {"loss": loss, "by_logp": logp.grad}

    score, margin = normal(2 * P), normal(P).abs()
    for name, given in (("reward", {}), ("reward_margin", {"margin": margin})):
        leaf = score.clone().requires_grad_()
        chosen, rejected = leaf.chunk(2)
        loss = run_lines(
            RewardTrainer.compute_loss,
            'if "margin" in inputs:',
            "loss = -nn.functional.logsigmoid(rewards_chosen - rewards_rejected).mean()",
            {"inputs": given, "rewards_chosen": chosen, "rewards_rejected": rejected},
        )["loss"]
        loss.backward()
        cases[name] = {"loss": loss, "by_score": leaf.grad}
    return {"inputs": inputs | {"score": score, "margin": margin}, "cases": cases}


def groups(seed: int) -> dict[str, Any]:
    """Advantages of 5 groups of 4: two whole ones, one all equal, one with two scores missing, one with three."""
    from trl import GRPOTrainer, RLOOTrainer

    normal, _ = random_tensors(200 + seed)
    score = normal(20)
    score[8:12] = 0.1
    score[[13, 14, 16, 17, 19]] = torch.nan
    zeroed = ("advantages = torch.nan_to_num", "advantages = torch.nan_to_num")
    cases = {}
    for scale in ("group", "batch", "none"):
        scope = {"self": SimpleNamespace(scale_rewards=scale), "rewards": score, "num_generations": 4}
        first, last = "mean_grouped_rewards = torch.nanmean", "advantages = advantages / (std_rewards"
        scope = run_lines(GRPOTrainer._generate_and_score_completions, first, last, scope)
        scope = run_lines(GRPOTrainer._generate_and_score_completions, *zeroed, {"advantages": scope["advantages"]})
        cases[f"grpo_{scale}"] = {"advantage": scope["advantages"]}
    scope = {"self": SimpleNamespace(normalize_advantages=False), "rewards": score, "num_generations": 4}
    first, last = "grouped_rewards = rewards.view", "advantages = torch.nan_to_num"
    scope = run_lines(RLOOTrainer._generate_and_score_completions, first, last, scope)
    cases["rloo"] = {"advantage": scope["advantages"]}
    return {"inputs": {"score": score.nan_to_num(0), "mask": ~score.isnan()}, "cases": cases}


def ppo(seed: int, kl_estimator: str) -> dict[str, Any]:
    from trl.experimental.ppo.ppo_trainer import PPOTrainer

    normal, generator = random_tensors(300 + seed)
    length = torch.randint(1, L + 1, (S,), generator=generator)
    length[0] = L
    logp = -normal(S, L).abs()
    inputs = {
        "length": length,
        "logp": logp,
        "ref_logp": logp + 0.3 * normal(S, L),
        "value": normal(S, L),
        "score": normal(S),
        "new_logp": logp + 0.3 * normal(S, L),
        "new_value": normal(S, L),
    }
    settings = {"kl_coef": 0.05, "gamma": 0.98, "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.3, "vf_coef": 0.1}
    scope = run_lines(
        PPOTrainer.train,
        "response_idxs = torch.arange",
        "advantages = torch.masked_fill(advantages, padding_mask, 0)",
        {
            "args": SimpleNamespace(kl_estimator=kl_estimator, whiten_rewards=False, **settings),
            "responses": torch.zeros(S, L),
            "sequence_lengths": length - 1,
            "logprobs": logp.clone(),
            "ref_logprobs": inputs["ref_logp"].clone(),
            "values": inputs["value"].clone(),
            "scores": inputs["score"],
        },
    )
    advantage = {name: scope[name].clone() for name in ("rewards", "advantages", "returns")}
    new_logp = inputs["new_logp"].clone().requires_grad_()
    new_value = inputs["new_value"].clone().requires_grad_()
    everything = torch.arange(S)
    scope |= {"micro_batch_inds": everything, "mb_advantage": scope["advantages"], "mb_logprobs": scope["logprobs"]}
    scope |= {"mb_return": scope["returns"], "mb_values": scope["values"], "new_logprobs": new_logp, "vpred": new_value}
    scope = run_lines(PPOTrainer.train, "new_logprobs = torch.masked_fill(", ")", scope)
    scope = run_lines(PPOTrainer.train, "vpred = torch.masked_fill(", "loss = pg_loss", scope)
    scope["loss"].backward()
    losses = {"loss": scope["loss"], "policy_loss": scope["pg_loss"], "value_loss": scope["vf_loss"]}
    gradients = {"by_new_logp": new_logp.grad, "by_new_value": new_value.grad}
    return {"inputs": inputs, "settings": settings | {"kl_estimator": kl_estimator}, **advantage, **losses, **gradients}


def plain(value: Any) -> Any:
    """Return `value` as JSON knows it; a float64 written by `repr` is read back bit for bit."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    if trl.__version__.startswith("1.10."):
        goldens = {"ppo": [ppo(seed, estimator) for seed in SEEDS for estimator in ("k1", "k3")]}
    else:
        goldens = {
            "grpo": [grpo(seed, empty_row=seed == 2) for seed in SEEDS],
            "preference": [preference(seed) for seed in SEEDS],
            "groups": [groups(seed) for seed in SEEDS],
        }
    path = FOLDER / f"trl_{'.'.join(trl.__version__.split('.')[:2])}.json"
    versions = {"trl": trl.__version__, "torch": torch.__version__}
    path.write_text(json.dumps({"versions": versions} | plain(goldens), separators=(",", ":")) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
