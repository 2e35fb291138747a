"""What comes back from generate(): the law, the ends, and that nobody depends on anybody else."""

import numpy as np
import pytest
import torch

from rlx.errors import ConfigError, RlxError
from rlx.generation.generator import Generator
from rlx.generation.request import Request, Sampling

SMALL = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def requests_of(prompts, **options):
    return [Request(prompt, seed=100 + i, **options) for i, prompt in enumerate(prompts)]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_512_ragged_samples_have_the_logp_of_the_full_forward_pass(build, forward_logp, ragged, temperature):
    """Each at its own limit, in 100 slots; 1e-4 is asked for, 1e-5 is held."""
    model = build("llama", **SMALL)
    limits = np.random.default_rng(1).integers(1, 40, 128)
    requests = [
        Request(prompt, n=4, max_new_tokens=int(limit), seed=i)
        for i, (prompt, limit) in enumerate(zip(ragged(128, vocabulary=16), limits, strict=True))
    ]
    found = Generator(model, max_slots=100).generate(requests, Sampling(temperature))
    for request, completions in zip(requests, found, strict=True):
        assert len(completions) == 4
        for completion in completions:
            assert completion.tokens.dtype == np.int64 and completion.logp.dtype == np.float32
            assert len(completion.tokens) == request.max_new_tokens and not completion.stopped
            expected = forward_logp(model, request.prompt, completion.tokens, temperature)
            np.testing.assert_allclose(completion.logp, expected, rtol=0, atol=1e-5)


def test_frequencies_of_first_and_second_tokens_follow_the_forward_pass(build):
    """6,000 samples of one prompt: chi-square of the 25 pairs below its 0.999 quantile (24 degrees: 51.2)."""
    model, count = build("llama", **SMALL | {"vocab_size": 5}), 6000
    (completions,) = Generator(model).generate([Request([1, 2], n=count, max_new_tokens=2)])
    with torch.no_grad():
        first = model(torch.tensor([[1, 2]])).logits[0, -1].double().softmax(-1)
        second = model(torch.tensor([[1, 2, token] for token in range(5)])).logits[:, -1].double().softmax(-1)
    expected = count * (first[:, None] * second).numpy()
    drawn = np.zeros((5, 5))
    for completion in completions:
        drawn[tuple(completion.tokens)] += 1
    assert ((drawn - expected) ** 2 / expected).sum() < 51.2


@pytest.mark.parametrize("sampling", [Sampling(top_k=3), Sampling(top_p=0.7), Sampling(min_p=0.3)])
def test_a_cut_law_is_renormalised_over_what_is_left(build, sampling):
    """The first tokens' probabilities, each once, add up to 1."""
    (completions,) = Generator(build("llama", **SMALL)).generate([Request([4], n=800, max_new_tokens=1)], sampling)
    probability = {int(one.tokens[0]): float(np.exp(one.logp[0])) for one in completions}
    assert 1 < len(probability) < 16
    assert sum(probability.values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral, window"])
def test_exact_mode_gives_the_same_bits_whatever_else_is_in_the_batch(build, ragged, same, family):
    """Alone, among others, in another order, in few slots and in many."""
    model = build(family)
    requests = requests_of(ragged(12, longest=30), n=2, max_new_tokens=12)
    generator = Generator(model, exact=True)
    together = generator.generate(requests)
    assert same(together[::-1], generator.generate(requests[::-1]))
    assert same(together, Generator(model, exact=True, max_slots=5).generate(requests))
    assert same(together, Generator(model, exact=True, max_length=60).generate(requests))
    for index in (0, 11):
        assert same([together[index]], generator.generate([requests[index]]))


def test_without_exact_mode_the_bound_is_held(build, ragged):
    model = build("llama")
    requests = requests_of(ragged(16), n=2, max_new_tokens=12)
    wide, narrow = (Generator(model, max_slots=slots).generate(requests) for slots in (256, 5))
    for one, other in zip(wide, narrow, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_allclose(a.logp, b.logp, rtol=0, atol=2e-6)


def test_samples_that_share_a_prompt_are_those_of_requests_alone(build, same):
    """Sample i of n is what it would be in a larger n; and n samples take one prefill and one row until they part."""
    model = build("llama")
    generator = Generator(model, exact=True)
    request = Request([5, 6, 7], n=8, max_new_tokens=15, seed=9)
    (eight,) = generator.generate([request])
    (three,) = generator.generate([Request([5, 6, 7], n=3, max_new_tokens=15, seed=9)])
    assert same([eight[:3]], [three])
    assert len({tuple(one.tokens) for one in eight}) == 8
    (split,) = Generator(model, exact=True, max_slots=3).generate([request])  # three prefills, of 3, 3 and 2 samples
    assert same([eight], [split])


def rows_of_each_step(generator, requests, sampling):
    """Return how many rows each forward pass of decoding had."""
    rows = []
    head = generator._twin.model().get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    generator.generate(requests, sampling)
    handle.remove()
    return rows


def test_samples_share_a_row_for_as_long_as_they_draw_the_same(build, greedy):
    generator = Generator(build("llama"))
    request = Request([5, 6, 7], n=8, max_new_tokens=5)
    assert rows_of_each_step(generator, [request], greedy) == [1] * 5
    sampled = rows_of_each_step(generator, [request], Sampling())
    assert sampled[:1] == [1] and sampled[-1] == 8 and sampled == sorted(sampled)


def test_slots_are_filled_again_as_sequences_end(build):
    """Two slots: the long sequence goes on while four short ones take turns beside it."""
    generator = Generator(build("llama"), max_slots=2)
    requests = [Request([1] * n, max_new_tokens=limit) for n, limit in [(1, 14), (2, 3), (3, 3), (4, 3), (5, 3)]]
    finished = []
    generator.generate(requests, on_finished=lambda request, sample, completion: finished.append(request))
    assert finished[-1] == 0 and sorted(finished[:-1]) == [1, 2, 3, 4]


def stop_at(model, prompt, seed, position):
    """Return the token that a sample draws first at this position, and at no earlier one."""
    ((free,),) = Generator(model).generate([Request(prompt, max_new_tokens=30, seed=seed)])
    tokens = free.tokens.tolist()
    return next((token, at) for at, token in enumerate(tokens) if at >= position and token not in tokens[:at])


@pytest.mark.parametrize("position", [0, 4])
def test_a_stop_token_ends_a_completion_and_is_its_last(build, position):
    model = build("llama", **SMALL)
    token, at = stop_at(model, [3, 1], 7, position)
    generator = Generator(model)
    free, stopped = (
        generator.generate([Request([3, 1], max_new_tokens=30, seed=7, stop_ids=frozenset(ids))])[0][0]
        for ids in ((), (token,))
    )
    assert stopped.stopped and stopped.tokens.tolist() == free.tokens[: at + 1].tolist()
    np.testing.assert_array_equal(stopped.logp, free.logp[: at + 1])
    assert not free.stopped and len(free.tokens) == 30


def test_the_first_of_several_stop_tokens_ends_each_sample(build):
    model, stop_ids = build("llama", **SMALL), frozenset({2, 9, 11})
    requests = [
        Request([3], n=20, max_new_tokens=12, seed=1, stop_ids=stop_ids),
        Request([4], n=20, max_new_tokens=12, seed=2, stop_ids=frozenset({0})),
        Request([5], n=20, max_new_tokens=12, seed=3),
    ]
    found = Generator(model).generate(requests)
    for request, completions in zip(requests, found, strict=True):
        for one in completions:
            *before, last = one.tokens.tolist()
            assert request.stop_ids.isdisjoint(before)
            assert one.stopped == (last in request.stop_ids)
            assert one.stopped or len(one.tokens) == 12
    assert any(len(one.tokens) == 1 for one in found[0]) and not all(one.stopped for one in found[1])
    assert not any(one.stopped for one in found[2])


def test_a_limit_on_the_stop_token_itself_is_a_stop(build):
    model = build("llama", **SMALL)
    token, at = stop_at(model, [3, 1], 7, 4)
    request = Request([3, 1], max_new_tokens=at + 1, seed=7, stop_ids=frozenset({token}))
    ((completion,),) = Generator(model).generate([request])
    assert completion.stopped and len(completion.tokens) == at + 1


def test_the_pad_token_is_a_token_like_any_other(build, forward_logp):
    """pad = eos = 0 in the config; a prompt full of it, in a batch of longer ones, and as the stop token."""
    model = build("llama", **SMALL, pad_token_id=0, eos_token_id=0)
    requests = [Request([0, 0, 3, 0], n=30, max_new_tokens=8), Request([5] * 20, max_new_tokens=8)]
    found = Generator(model).generate(requests)
    assert any(0 in one.tokens[:-1] for one in found[0])  # nothing stops where nothing was told to
    for request, completions in zip(requests, found, strict=True):
        for one in completions:
            expected = forward_logp(model, request.prompt, one.tokens)
            np.testing.assert_allclose(one.logp, expected, rtol=0, atol=4e-6)
    (stopped,) = Generator(model).generate([Request([0, 0, 3, 0], n=30, max_new_tokens=8, stop_ids=frozenset({0}))])
    for one, free in zip(stopped, found[0], strict=True):
        tokens = free.tokens.tolist()
        end = tokens.index(0) + 1 if 0 in tokens else 8
        assert one.tokens.tolist() == tokens[:end] and one.stopped == (0 in tokens)


def test_max_length_cuts_completions_and_refuses_prompts(build):
    generator = Generator(build("llama"), max_length=10)
    ((completion,),) = generator.generate([Request([1] * 6, max_new_tokens=50)])
    assert len(completion.tokens) == 4 and not completion.stopped
    with pytest.raises(ConfigError, match=r"request 0: the prompt has 10 tokens, but .* have 10 at most"):
        generator.generate([Request([1] * 10)])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": [1, 97]}, "request 0: prompt has the token id 97, but the model's vocabulary has ids from 0 to 96"),
        ({"prompt": [-1]}, "request 0: prompt has the token id -1"),
        ({"prompt": [1], "stop_ids": frozenset({3, 200})}, "request 0: stop_ids has the token id 200"),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(build, request_, message):
    with pytest.raises(ConfigError, match=message):
        Generator(build("llama")).generate([Request(**request_)])


@pytest.mark.parametrize("wrong", [{"prompt": []}, {"prompt": [1], "n": 0}, {"prompt": [1], "max_new_tokens": 0}])
def test_a_request_for_nothing_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"it must be (1 or more|one token id at least)"):
        Request(**wrong)


@pytest.mark.parametrize(("options", "message"), [({"max_slots": 0}, "max_slots is 0"), ({"max_length": 1}, "is 1; ")])
def test_a_generator_without_room_is_refused(build, options, message):
    with pytest.raises(ConfigError, match=message):
        Generator(build("llama"), **options)
    with pytest.raises(ConfigError, match=r"max_length is 129, but .* has a context of 128 tokens"):
        Generator(build("llama"), max_length=129)


def test_nothing_is_made_of_nothing(build):
    assert Generator(build("llama")).generate([]) == []


def test_every_completion_is_told_once_and_as_returned(build, ragged):
    told = {}
    requests = requests_of(ragged(10), n=3, max_new_tokens=6)
    found = Generator(build("llama"), max_slots=4).generate(
        requests, on_finished=lambda request, sample, completion: told.__setitem__((request, sample), completion)
    )
    assert len(told) == 30
    assert all(told[i, j] is one for i, completions in enumerate(found) for j, one in enumerate(completions))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_a_generator_that_was_stopped_half_way_can_be_used_again(build, ragged, same, stop):
    generator = Generator(build("llama"), max_slots=6)
    requests = requests_of(ragged(12), n=2, max_new_tokens=8)
    before, told = generator.generate(requests), []

    def interrupt(request, sample, completion):
        told.append(request)
        if len(told) == 9:
            raise stop("enough")

    with pytest.raises(stop, match="enough"):
        generator.generate(requests, on_finished=interrupt)
    assert len(told) == 9
    assert same(before, generator.generate(requests))


def test_a_generator_does_one_thing_at_a_time(build):
    generator, request = Generator(build("llama")), Request([1, 2], max_new_tokens=2)
    with pytest.raises(RlxError, match="generating already"):
        generator.generate([request], on_finished=lambda *_: generator.generate([request]))
    assert len(generator.generate([request])) == 1


def test_weights_that_are_not_numbers_are_named_and_leave_no_trace(build, same):
    model = build("llama")
    generator, requests = Generator(model), [Request([1, 2], n=4, max_new_tokens=9)]
    before = generator.generate(requests)
    weight = model.model.layers[0].self_attn.v_proj.weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    for sampling in (Sampling(), Sampling(temperature=0)):
        with pytest.raises(RlxError, match="the model's logits are not finite numbers"):
            generator.generate(requests, sampling)
    with torch.no_grad():
        weight.copy_(good)
    assert same(before, generator.generate(requests))


def test_low_precision_weights_generate_as_well(build, forward_logp):
    """bfloat16 has 3 digits: logp within 0.05 of the full forward pass in the same precision."""
    model = build("qwen3").bfloat16()
    request = Request([1, 2, 3], n=4, max_new_tokens=12)
    (completions,) = Generator(model).generate([request])
    for one in completions:
        expected = forward_logp(model, request.prompt, one.tokens)
        np.testing.assert_allclose(one.logp, expected, rtol=0, atol=0.05)
