"""A generation that goes on: requests that come later, weights that change under it, and what is told of both."""

import numpy as np
import pytest
import torch

from rlx.errors import ConfigError
from rlx.generation.generator import Generator
from rlx.generation.request import Request, Sampling

SMALL = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
NEW = 12


def requests_of(prompts, n=3):
    return [Request(prompt, n=n, max_new_tokens=NEW, seed=50 + i) for i, prompt in enumerate(prompts)]


def finish(generation):
    """Return completions by (request, sample), in the order in which they end."""
    ended = {}
    while generation.is_busy:
        ended |= {(request, sample): completion for request, sample, completion in generation.step()}
    return ended


def grouped(ended):
    """Return completions as generate() does."""
    return [[ended[request, sample] for sample in range(3)] for request in range(1 + max(ended)[0])]


def shift(model):
    """Change the weights in place, as a learner does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())), alpha=0.3
            )


def test_requests_that_come_later_get_what_they_would_get_alone(build, ragged, same):
    generator = Generator(build("llama", **SMALL), max_slots=8, exact=True)
    requests = requests_of(ragged(6, vocabulary=16))
    expected = generator.generate(requests)
    generation = generator.open(Sampling(), length=128, limit=NEW)
    ended = {}
    for number, request in enumerate(requests):
        generation.add([request], first=number)
        for _ in range(4):
            ended |= {(request, sample): completion for request, sample, completion in generation.step()}
    ended |= finish(generation)
    assert sorted(ended) == [(request, sample) for request in range(6) for sample in range(3)]
    assert same(grouped(ended), expected)


def test_slots_that_grow_keep_what_stands_in_them(build, ragged, same):
    """Of ever longer requests, each is added while those before it are under way."""
    generator = Generator(build("llama", **SMALL), max_slots=18, exact=True)
    requests = requests_of(sorted(ragged(6, vocabulary=16), key=len))
    expected = generator.generate(requests)
    generation = generator.open(Sampling(), length=None, limit=NEW)
    ended, lengths = {}, set()
    for number, request in enumerate(requests):
        generation.add([request], first=number)
        lengths.add(generation._slots._cache.length)
        ended |= {(request, sample): completion for request, sample, completion in generation.step()}
    assert len(lengths) > 1 and generation.has_begun
    ended |= finish(generation)
    assert same(grouped(ended), expected)


def test_a_generation_of_its_own_is_left_alone_by_generate(build, ragged, same):
    """As of an evaluation in between."""
    generator = Generator(build("llama", **SMALL), exact=True)
    requests = requests_of(ragged(4, vocabulary=16))
    expected = generator.generate(requests)
    generation = generator.open(Sampling(), length=128, limit=NEW)
    generation.add(requests)
    generation.step()
    generator.generate(requests_of(ragged(9, vocabulary=16)))
    assert same(grouped(finish(generation)), expected)


def test_waiting_requests_wait_while_they_are_told_to(build):
    generation = Generator(build("llama", **SMALL)).open(Sampling(), length=128, limit=NEW)
    generation.add(requests_of([[1, 2]]))
    assert generation.step(begin=False) == []
    assert (generation.is_busy, generation.has_begun) == (True, False)
    generation.step()
    assert generation.has_begun


@pytest.mark.parametrize("refreshed", [True, False])
def test_weights_that_change_in_mid_sequence(build, forward_logp, refreshed):
    """With the caches computed again the logp are those of the new weights' own forward pass; else they are not."""
    model = build("llama", **SMALL)
    generation = Generator(model).open(Sampling(1.3), length=128, limit=NEW)
    requests = requests_of([[1, 2, 3], [4], [5, 6, 7, 8, 9]])
    generation.add(requests)
    for _ in range(5):
        assert generation.step() == []
    before = [parameter.clone() for parameter in model.parameters()]
    shift(model)
    generation.version = 7
    if refreshed:
        generation.refresh()
    ended = finish(generation)
    assert len(ended) == 9
    apart = []
    for (request, _), completion in ended.items():
        assert completion.version.tolist() == [0] * 5 + [7] * (NEW - 5)
        new = forward_logp(model, requests[request].prompt, completion.tokens, 1.3)
        apart.append(np.abs(completion.logp - new)[5:].max())
    assert max(apart) < 1e-5 if refreshed else min(apart) > 1e-3
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    for (request, _), completion in ended.items():
        old = forward_logp(model, requests[request].prompt, completion.tokens, 1.3)
        np.testing.assert_allclose(completion.logp[:5], old[:5], rtol=0, atol=1e-5)


def test_what_does_not_fit_into_its_slots_is_refused(build):
    generation = Generator(build("llama", **SMALL)).open(Sampling(), length=14, limit=NEW)
    generation.add(requests_of([[1, 2]]))
    with pytest.raises(ConfigError, match="may have 15 tokens, and the slots have room for 14"):
        generation.add(requests_of([[1, 2, 3]]))


def test_what_has_ended_is_forgotten(build):
    """A runner's generation lives as long as the run."""
    generation = Generator(build("llama", **SMALL), max_slots=6).open(Sampling(), length=128, limit=NEW)
    for turn in range(5):
        generation.add(requests_of([[1, 2], [3]]), first=2 * turn)
        assert len(finish(generation)) == 6
    live = generation._live
    assert (live._shares, live._unfinished, sorted(live._free)) == ({}, {}, list(range(6)))


def test_a_generation_that_is_opened_anew_keeps_no_slots_of_the_last_one(build):
    """As after an interrupt, of which a run may have many."""
    model = build("llama", **SMALL)
    generator = Generator(model, max_slots=4)
    hooks = generator._twin.model().get_output_embeddings()._forward_pre_hooks
    generator.open(Sampling(), length=128, limit=NEW).add(requests_of([[1, 2]], n=1))
    count = len(hooks)
    for _ in range(3):
        generation = generator.open(Sampling(), length=128, limit=NEW)
        generation.add(requests_of([[1, 2]], n=1))
        assert len(finish(generation)) == 1
    assert len(hooks) == count
