"""GRPO: whole iterations against numbers worked out by torch alone, and what must make no difference."""

import copy

import numpy as np
import pytest
import torch

from rlx.envs import addition
from rlx.errors import ConfigError
from rlx.text_models import stop_tokens
from rlx.trajectory import Batch

LONG = {"max_new_tokens": 12}


# The log-probabilities of who generates and who learns ------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_learner_finds_the_log_probabilities_that_were_drawn_with(temperature, tiny_text, ragged, sharpen):
    made = tiny_text("grpo", generation={**LONG, "temperature": temperature}, prompts={"source": ragged, "kwargs": {}})
    made.prompts(prompts_per_iteration=64, samples_per_prompt=8).training(minibatch_sequences=None)
    made.reward(lambda prompts, completions: [len(text) + text.count("1") for text in completions])
    with made.build() as algorithm:
        sharpen(algorithm)
        batch = algorithm.sample()
        again = algorithm.with_columns(Batch(**batch.tensors), "logp")
        assert batch.mask.shape[0] == 512 and len(batch.length.unique()) > 10
        assert batch.logp[batch.mask].std() > 0.3
        difference = (again.logp - batch.logp).abs().max().item()
        assert difference < 1e-5
        assert (again.logp - batch.logp).exp().sub(1).abs().max().item() < 1e-5
        row = algorithm.train()
    assert abs(row["learner/kl"]) < 1e-9
    assert row["learner/clip_fraction"] == 0


@pytest.mark.parametrize("algorithm", ["grpo", "rlhf_ppo"])
def test_without_a_learning_rate_nothing_moves(algorithm, tiny_text, sharpen):
    with tiny_text(algorithm, training={"lr": 0.0, "kl_coef": 0.1, "epochs": 2}).build() as one:
        before = one.learners.weights()
        for _ in range(3):
            row = one.train()
            assert abs(row["ref_kl_k1"]) < 1e-6 and abs(row["ref_kl_k3"]) < 1e-9
            assert abs(row["learner/kl"]) < 1e-9 and row["learner/clip_fraction"] == 0
            assert row["learner/grad_norm"] > 0
        assert one.learners.weights().tobytes() == before.tobytes()


# One update, by torch alone --------------------------------------------------------------------------------------


def sequence_logp(model, row, batch, temperature=1.0):
    """Return the log-probabilities of a row's completion by the model's own forward pass."""
    length = int(batch.length[row])
    tokens = torch.cat([batch.obs[row, :length], batch.action[row, length - 1 :][:1]])
    logits = model(input_ids=tokens[None]).logits[0, :-1] / temperature
    logp = torch.log_softmax(logits, -1).gather(1, tokens[1:, None]).squeeze(1)
    return logp[batch.mask[row, :length]]


def test_one_update_is_what_the_paper_says(tiny_text):
    """Shao et al. 2024, eq. 3 and 4, with ratios off 1 on both sides of the range; Adam's first step with eps 1."""
    made = tiny_text("grpo", training={"kl_coef": 0.3, "aggregation": "sequence_mean", "lr": 0.5, "adam_eps": 1.0})
    made.training(minibatch_sequences=None, max_grad_norm=0.05, clip_range=0.1).generation(temperature=0.8)
    with made.build() as algorithm:
        policy = algorithm.learners.local_policy
        reference = copy.deepcopy(policy.model)
        draw = algorithm.sample

        def sample_and_move():
            batch = draw()
            noise = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
            return batch

        algorithm.sample = sample_and_move
        twin = copy.deepcopy(policy.model)
        noise = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
        row = algorithm.train()
        batch, score = algorithm._batch, torch.from_numpy(algorithm._rollout.score)

        losses, clipped, counted = [], 0, 0
        for index in range(24):
            group = score[index // 4 * 4 : index // 4 * 4 + 4]
            advantage = (score[index] - group.mean()) / (group.std() + 1e-4)
            new = sequence_logp(twin, index, batch, 0.8)
            with torch.no_grad():
                old = sequence_logp(
                    reference, index, batch, 0.8
                )  # nothing was learned before: who drew is the reference
            ratio = (new - old).exp()
            surrogate = torch.min(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
            log_ratio = old - new
            penalty = log_ratio.exp() - log_ratio - 1
            losses.append((-surrogate + 0.3 * penalty).mean())
            clipped += int(((ratio - 1).abs() > 0.1).sum())
            counted += len(ratio)
        loss = torch.stack(losses).mean()
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in twin.parameters()])
        norm = gradient.norm()
        assert 0 < clipped < counted and norm > 0.05
        assert row["learner/loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert row["learner/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        gradient = gradient * 0.05 / norm
        before = torch.cat([parameter.detach().flatten() for parameter in twin.parameters()])
        expected = before - 0.5 * gradient / (gradient.abs() + 1)
        np.testing.assert_allclose(algorithm.learners.weights(), expected.numpy(), rtol=0, atol=2e-6)


def test_kl_is_paid_by_the_score_and_groups_that_score_alike_are_left_out(tiny_text):
    paid = {"kl_coef": 0.3, "kl_in": "score", "kl_estimator": "k1", "baseline": "leave_one_out", "scale": "none"}
    made = tiny_text("grpo", training=paid | {"drop_flat_groups": True})
    made.reward(
        lambda prompts, completions: [
            float(len(text) > 3 or "5" in prompt) for prompt, text in zip(prompts, completions, strict=True)
        ]
    )
    batches = []
    with made.build() as algorithm:
        algorithm.train()
        update = algorithm.update
        algorithm.update = lambda batch, **options: batches.append(batch) or update(batch, **options)
        for _ in range(3):
            algorithm.train()
    flat = kept = 0
    for batch in batches:
        for start in range(0, len(batch.score), 4):
            score, mask = batch.score[start : start + 4].double(), batch.mask[start : start + 4]
            advantage = batch.advantage[start : start + 4, 0]
            if len(set(score.tolist())) == 1:
                flat += 1
                assert not mask.any() and not advantage.any()
                continue
            kept += 1
            kl = [
                sum((now - then).item() for now, then, counts in zip(*row, strict=True) if counts)
                for row in zip(batch.logp[start : start + 4], batch.ref_logp[start : start + 4], mask, strict=True)
            ]
            owned = [one - 0.3 * cost for one, cost in zip(score.tolist(), kl, strict=True)]
            expected = [one - (sum(owned) - one) / 3 for one in owned]
            np.testing.assert_allclose(advantage, expected, rtol=0, atol=1e-5)
            assert max(map(abs, kl)) > 1e-3
    assert flat and kept


def test_beside_an_adapter_the_reference_is_the_model_without_it(tiny_text):
    adapter = {"lora_rank": 4, "lora_targets": ["q_proj", "v_proj"]}
    made = tiny_text("grpo", model=adapter, training={"kl_coef": 0.1, "lr": 0.05})
    with made.build() as algorithm:
        model = algorithm.learners.local_policy.model
        base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        first, *_, last = (algorithm.train() for _ in range(3))
        assert abs(first["ref_kl_k1"]) < 1e-6 and abs(first["ref_kl_k3"]) < 1e-6
        assert last["ref_kl_k3"] > 1e-4
        assert base and all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


def test_what_is_told_of_an_iteration_is_what_happened(tiny_text):
    made = tiny_text("grpo", training={"kl_coef": 0.1})
    made.reward(
        lambda prompts, completions: [
            float("5" in prompt and len(text)) for prompt, text in zip(prompts, completions, strict=True)
        ]
    )
    with made.build() as algorithm:
        algorithm.train()
        row = algorithm.train()
        rollout = algorithm.rollout
    parts = [row[f"time/{name}_s"] for name in ("generate", "score", "logp", "train", "sync", "other")]
    assert sum(parts) == pytest.approx(row["time/iteration_s"], abs=1e-6) and min(parts) >= 0 and parts[0] > 0
    groups = [rollout.score[start : start + 4].tolist() for start in range(0, 24, 4)]
    assert row["flat_groups_fraction"] == pytest.approx(sum(len(set(group)) == 1 for group in groups) / 6)
    assert 0 < row["flat_groups_fraction"] < 1
    stops = stop_tokens(made.settings, algorithm.tokenizer)
    completions = rollout.completions.split(rollout.completions.tokens)
    cut = [len(tokens) == 5 and int(tokens[-1]) not in stops for tokens in completions]
    assert row["truncated_fraction"] == pytest.approx(sum(cut) / 24)
    assert row["score_mean"] == pytest.approx(rollout.score.mean())


@pytest.mark.parametrize("truncated_score", [None, -7.0])
def test_what_was_cut_gets_the_score_that_is_set_for_it(truncated_score, tiny_text):
    made = tiny_text("grpo", reward={"truncated_score": truncated_score})
    made.reward(lambda prompts, completions: [10.0 + len(text) for text in completions])
    made.evaluation(source="rlx.envs.addition:rows", kwargs={"split": "eval"}, num_rows=20)
    with made.build() as algorithm:
        row = algorithm.train()
        completions, batch = algorithm.rollout.completions, algorithm._batch
        evaluated = algorithm.evaluate()
    cut, expected = 0, []
    for tokens in completions.split(completions.tokens):
        length = len(tokens) - (tokens[-1] == 0)  # token 0 is EOS, the only end, and no part of the text
        is_cut = length == 5
        cut += is_cut
        expected.append(truncated_score if is_cut and truncated_score else 10.0 + length)
    assert 0 < cut < 24 and row["truncated_fraction"] == pytest.approx(cut / 24)
    assert batch.score.tolist() == expected
    assert batch.reward.gather(1, batch.length[:, None] - 1).flatten().tolist() == expected  # at the last token
    assert batch.reward.sum(1).tolist() == expected
    for name in ("score_mean", "episode_return_mean"):
        assert row[name] == pytest.approx(sum(expected) / 24, rel=1e-6)
    assert (row["episode_return_min"], row["episode_return_max"]) == (min(expected), max(expected))
    assert 0 < evaluated["evaluation/truncated_fraction"] < 1
    worst, best = (evaluated[f"evaluation/episode_return_{name}"] for name in ("min", "max"))
    assert (worst == -7 and 10 <= best < 15) if truncated_score else (worst >= 10 and best == 15)


def test_a_run_that_needs_more_than_there_may_be_is_refused_with_figures_and_cures(tiny_text):
    with pytest.raises(
        ConfigError, match=r"the learner and the generator need .* on a device with 100 kB to take, .*set learners\."
    ) as refused:
        tiny_text("grpo", learners={"max_memory_gb": 0.0001, "torch_threads": 1}).build()
    assert "take a smaller model" in str(refused.value)


def test_entropy_is_told_whether_it_is_rewarded_or_not(tiny_text):
    with tiny_text("grpo").build() as algorithm:
        row = algorithm.train()
        batch, policy = algorithm._batch, algorithm.learners.local_policy
    assert 0 < row["learner/entropy"] <= np.log(13) + 1e-6
    with tiny_text("grpo", training={"lr": 0.0}).build() as algorithm:
        row = algorithm.train()
        batch, policy = algorithm._batch, algorithm.learners.local_policy
        law = torch.log_softmax(policy.model(batch.obs).logits, -1)
        entropy = -(law.exp() * law).sum(-1)
    # Every minibatch is weighted by its own tokens.
    assert row["learner/entropy"] == pytest.approx(entropy[batch.mask].mean().item(), rel=0.05)


# What must make no difference ------------------------------------------------------------------------------------

VARIANTS = {
    "grpo": {"kl_coef": 0.1, "entropy_coef": 0.01, "aggregation": "sequence_mean"},
    "dapo": {"clip_range_high": 0.28, "mask_truncated": True, "drop_flat_groups": True},
    "rloo": {
        "aggregation": "sequence_sum",
        "baseline": "leave_one_out",
        "scale": "none",
        "kl_coef": 0.1,
        "kl_in": "score",
        "kl_estimator": "k1",
    },
    "gspo": {"aggregation": "sequence_mean", "ratio": "sequence", "clip_range": 3e-4, "clip_range_high": 4e-4},
    "cispo": {"objective": "cispo", "baseline": "batch_mean", "scale": "batch_std"},
    "dr. grpo": {"aggregation": "constant", "scale": "none"},
}


@pytest.mark.parametrize("training", VARIANTS.values(), ids=VARIANTS)
def test_what_does_not_count_has_no_influence(training, tiny_text, ragged, garbage, computed):
    made = tiny_text("grpo", training={**training, "epochs": 2}, prompts={"source": ragged, "kwargs": {}})
    outcomes = []
    for fill in (lambda batch: batch, garbage):
        with made.copy().build() as algorithm:
            draw = algorithm.sample
            algorithm.sample = lambda draw=draw, fill=fill: fill(draw())
            rows = [computed(algorithm.train()) for _ in range(2)]
            outcomes.append((rows, algorithm.learners.weights().tobytes()))
    assert outcomes[0] == outcomes[1]


def after_two_iterations(made):
    with made.build() as algorithm:
        rows = [algorithm.train() for _ in range(2)]
        return rows, algorithm.learners.weights()


def assert_alike(first, second, tolerance):
    """Stats and weights are equal up to rounding."""
    (rows, weights), (others, other_weights) = first, second
    np.testing.assert_allclose(other_weights, weights, rtol=0, atol=tolerance)
    for row, other in zip(rows, others, strict=True):
        for name in row:
            if name.startswith(("learner/", "ref_kl", "score", "episode")):
                assert other[name] == pytest.approx(row[name], rel=1e-4, abs=tolerance), name


@pytest.mark.parametrize(
    "learners",
    [
        {"max_tokens_per_microbatch": 20},
        {"layout": "padded", "max_tokens_per_microbatch": 100_000},
        {"layout": "packed"},
        {"activation_checkpointing": True},
        pytest.param({"num_learners": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("algorithm", ["grpo", "rlhf_ppo"])
def test_how_it_is_learned_makes_no_difference(learners, algorithm, tiny_text, ragged):
    made = tiny_text(algorithm, training={"kl_coef": 0.1, "epochs": 2, "adam_eps": 1e-3, "lr": 1e-3})
    made.prompts(ragged, kwargs={})
    whole = after_two_iterations(made.copy())
    assert_alike(whole, after_two_iterations(made.learners(**learners)), 2e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_static_steps_make_no_difference(count, tiny_text, ragged):
    made = tiny_text("grpo", training={"adam_eps": 1e-3, "lr": 1e-3}, generation=LONG)
    made.prompts(ragged, kwargs={})
    whole = after_two_iterations(made.copy())
    made.generation(static_step=True).token_runners(num_token_runners=count, torch_threads=1)
    assert_alike(whole, after_two_iterations(made), 2e-6)


@pytest.mark.slow
def test_who_generates_makes_no_difference(tiny_text, ragged, computed):
    """To the bit where completions are exact: one runner in the driver is one or two in processes."""
    histories = []
    for count in (0, 1, 2):
        made = tiny_text("grpo", prompts={"source": ragged, "kwargs": {}}, generation={**LONG, "exact": True})
        made.token_runners(num_token_runners=count, torch_threads=1)
        with made.build() as algorithm:
            rows = [computed(algorithm.train()) for _ in range(2)]
            weights = algorithm.learners.weights()
            assert [row.pop("sync_bytes") for row in rows] == [weights.nbytes if count else 0] * 2
            histories.append((rows, weights.tobytes()))
    assert histories[0] == histories[1] == histories[2]


def test_an_eos_that_is_also_the_padding_is_drawn_and_learned_like_any(tiny_text, ragged, computed, tmp_path):
    """Two tokenizers of the same 14 tokens, of which one pads with EOS and one with a token of its own."""
    outcomes, pads = [], []
    for pad in ("<eos>", "<pad>"):
        tokenizer = addition.tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(tmp_path / pad)
        made = tiny_text("grpo", model={"tokenizer": str(tmp_path / pad)}, prompts={"source": ragged, "kwargs": {}})
        made.reward(lambda prompts, completions: [-float(len(text)) for text in completions]).generation(**LONG)
        made.training(epochs=2, kl_coef=0.1, lr=0.01)
        with made.build() as algorithm:
            pads.append(algorithm.tokenizer.pad_token_id)
            history = []
            for _ in range(2):
                row = algorithm.train()
                batch, completions = algorithm._batch, algorithm.rollout.completions
                ends = batch.mask & (batch.action == 0)
                assert 0 < ends.sum() < 24 and (ends == batch.terminated).all()
                assert ends.any(1).tolist() == completions.stopped.tolist()
                assert int(batch.mask.sum()) == int(completions.length.sum())
                history.append(computed(row))
            likelier = algorithm.with_columns(batch, "logp").logp - batch.logp
            short = ends & (batch.advantage > 0.5)
            assert short.any() and (likelier[short] > 0.02).all()
            outcomes.append((history, algorithm.learners.weights().tobytes()))
    assert pads == [0, 13]
    assert outcomes[0] == outcomes[1]


def test_groups_of_one_are_refused(tiny_text):
    with pytest.raises(ConfigError, match="samples_per_prompt=1 leaves nothing to compare a completion with"):
        tiny_text("grpo", prompts={"samples_per_prompt": 1}).build()
