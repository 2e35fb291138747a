"""Steps of fixed shape beside the plain ones: in every family, through refills, shared prompts and new weights.

A CUDA graph does the kernels of one run again, on the same memory. `Recording` does that on a CPU, so that what depends
on a number of the run that was captured, or on memory that moved, is found out here.
"""

import numpy as np
import pytest
import torch

from rlx.errors import ConfigError, RlxError
from rlx.generation import generator as generator_module
from rlx.generation import static_step
from rlx.generation.architecture import Architecture
from rlx.generation.attention import NAME
from rlx.generation.generator import Generator
from rlx.generation.graphs import host_read
from rlx.generation.request import Request, Sampling
from rlx.generation.sampler import sample
from rlx.generation.slots import Slots
from rlx.generation.static_step import at_least, doubled
from tests.generation.recording import Recording

FAMILIES = [
    *("gpt2", "llama", "llama, dynamic rope", "qwen2", "qwen2, window", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("mistral", "mistral, window", "phi", "phi3"),
]
SMALL = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LAWS = {
    "plain": Sampling(),
    "cut": Sampling(temperature=0.8, top_k=12, top_p=0.9, min_p=0.02),
    "greedy": Sampling(temperature=0),
}
BOUND = 2e-6
"""Of log-probabilities of float32 in other batches, as without static steps."""


@pytest.fixture(params=["as it is", "recorded"])
def capture(request, monkeypatch):
    """Have steps run as they are, as on a CPU, or be captured; in shapes so small that these tests meet several."""
    monkeypatch.setattr(static_step, "FEWEST_ROWS", 2)
    monkeypatch.setattr("rlx.generation.slots.SHORTEST_EXTENT", 8)
    if request.param == "recorded":
        monkeypatch.setattr(generator_module, "capture_for", lambda device: Recording())
        monkeypatch.setattr(Recording, "captured", 0)
    return request.param


def assert_alike(found, expected, bound=BOUND):
    for a, b in zip(found, expected, strict=True):
        for one, other in zip(a, b, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.logp, other.logp, rtol=0, atol=bound)
            np.testing.assert_array_equal(one.version, other.version)
            assert one.stopped == other.stopped


def both(model, requests, sampling=None, **options):
    """Return what static steps give, and what plain ones do."""
    return [Generator(model, static_step=way, **options).generate(requests, sampling) for way in (True, False)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_what_plain_steps_give(build, ragged, capture, family):
    """Prompts of all lengths, two samples of each, ends at three limits and at stop tokens, refills in 5 slots."""
    requests = [
        Request(prompt, n=2, max_new_tokens=6 + 7 * (i % 3), seed=i, stop_ids=frozenset({3 * i, 50}))
        for i, prompt in enumerate(ragged(9))
    ]
    assert_alike(*both(build(family), requests, max_slots=5))
    assert capture == "as it is" or Recording.captured >= 6


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("vocabulary", [97, 1500])
def test_every_law_is_drawn_from_inside_the_step(build, ragged, capture, law, vocabulary):
    """By one cumulative sum and by two levels of them."""
    model = build("llama", vocab_size=vocabulary)
    requests = [Request(prompt, n=3, max_new_tokens=9, seed=i) for i, prompt in enumerate(ragged(5))]
    assert_alike(*both(model, requests, LAWS[law], max_slots=7))


def test_attention_that_is_eager_has_masks_of_the_step(build, ragged, capture):
    model = build("gemma3_text", "eager")
    assert_alike(*both(model, [Request(prompt, max_new_tokens=12) for prompt in ragged(6)], max_slots=4))


def test_bfloat16_weights_have_float32_laws(build, ragged, capture, monkeypatch):
    """Logits of 8 bits, but laws, log-probabilities and what is summed up of them of float32 and more."""
    seen, model = [], build("qwen3").bfloat16()

    def watched(logits, sampling, row_A, u_A):
        drawn = sample(logits, sampling, row_A, u_A)
        seen.append((logits.dtype, drawn.dtype))
        return drawn

    monkeypatch.setattr(static_step, "sample", watched)
    requests = [Request(prompt, n=2, max_new_tokens=8, seed=i) for i, prompt in enumerate(ragged(4))]
    generator = Generator(model, static_step=True)
    found = generator.generate(requests)
    assert set(seen) == {(torch.bfloat16, torch.float64)}
    keys = generator._slots["generate"][1]._cache.slot_layers[0].keys
    assert keys.dtype == torch.bfloat16
    for request, completions in zip(requests, found, strict=True):
        for one in completions:
            with torch.no_grad():
                logits = model(torch.tensor([[*request.prompt, *one.tokens.tolist()]])).logits
            assert logits.dtype == torch.bfloat16
            law = logits[0, len(request.prompt) - 1 : -1].float().log_softmax(-1)
            expected = law.gather(1, torch.from_numpy(one.tokens)[:, None])[:, 0].numpy()
            np.testing.assert_allclose(one.logp, expected, rtol=0, atol=0.05)
            rounded = torch.from_numpy(one.logp).bfloat16().float().numpy()
            assert (rounded != one.logp).any()  # a law of bfloat16 would have 3 digits


def interrupted(model, way, sampling, change):
    """Return completions of a generation whose weights change after its fifth step, and are refreshed after the 8th."""
    generation = Generator(model, max_slots=9, static_step=way).open(sampling, length=64, limit=14)
    generation.add([Request([1 + i] * (3 * i + 1), n=3, max_new_tokens=14, seed=i) for i in range(5)])
    ended, steps = {}, 0
    while generation.is_busy:
        ended |= {(request, number): completion for request, number, completion in generation.step()}
        steps += 1
        if steps == 5:
            change(model)
            generation.version = 3
        if steps == 8:
            generation.refresh()
    return [[ended[request, number] for number in range(3)] for request in range(5)]


def in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)


def in_a_new_memory(model):
    """As a learner does that lays all parameters out in one flat buffer; the old memory is used for something else."""
    for parameter in model.parameters():
        old, parameter.data = parameter.data, parameter.data * 1.2
        old.fill_(7.0)


@pytest.mark.parametrize("change", [in_place, in_a_new_memory])
def test_weights_that_change_between_steps_are_there_in_the_next(build, capture, change):
    found, expected = (interrupted(build("llama", **SMALL), way, Sampling(1.3), change) for way in (True, False))
    assert_alike(found, expected, 4e-6)
    assert {3} < {int(version) for completions in found for one in completions for version in one.version}


@pytest.mark.parametrize("capture", ["recorded"], indirect=True)
def test_what_is_captured_stays_while_weights_change_in_place_and_ends_when_they_move(build, capture):
    model = build("llama", **SMALL)
    generator, requests = Generator(model, static_step=True), [Request([1, 2, 3], n=4, max_new_tokens=9)]
    counts = []
    for change in (lambda model: None, in_place, in_a_new_memory, lambda model: model.double()):
        change(model)
        before = Recording.captured
        generator.generate(requests)
        counts.append(Recording.captured - before)
    first, in_its_place, moved, other_dtype = counts
    assert in_its_place == 0 and first == moved == other_dtype > 0


def test_longer_slots_are_captured_anew_and_another_law_beside_the_first(build, capture):
    model = build("llama")
    static, plain = (Generator(model, static_step=way) for way in (True, False))
    for prompt, sampling in [([5] * 3, LAWS["plain"]), ([5] * 3, LAWS["cut"]), ([5] * 60, LAWS["plain"])]:
        requests = [Request(prompt, n=5, max_new_tokens=8)]
        assert_alike(static.generate(requests, sampling), plain.generate(requests, sampling))


def test_slots_that_grow_under_what_is_under_way_are_captured_anew(build, capture):
    results = []
    for way, length in ((True, None), (False, 128)):
        generation = Generator(build("llama"), static_step=way).open(Sampling(), length=length, limit=24)
        ended = {}
        for number, size in enumerate((3, 9, 60)):
            generation.add([Request([7 + number] * size, n=2, max_new_tokens=24)], number)
            for _ in range(5):
                assert not generation.step()
        while generation.is_busy:
            ended |= {(request, sample): completion for request, sample, completion in generation.step()}
        results.append([[ended[request, sample] for sample in range(2)] for request in range(3)])
    assert_alike(*results)


def test_a_generation_opened_anew_takes_the_slots_of_the_last_one(build, capture):
    results = []
    for way in (True, False):
        generator = Generator(build("llama", **SMALL), max_slots=6, static_step=way)
        generator.open(Sampling(), length=128, limit=9).add([Request([7] * 9, n=6, max_new_tokens=9)])
        left = generator.open(Sampling(), length=128, limit=9)
        left.add([Request([8] * 30, n=6, max_new_tokens=9, seed=4)])
        for _ in range(4):
            left.step()
        generation = generator.open(Sampling(), length=128, limit=9)
        generation.add([Request([3, 4], n=3, max_new_tokens=9), Request([5], n=3, max_new_tokens=9)])
        ended = {}
        while generation.is_busy:
            ended |= {(request, number): completion for request, number, completion in generation.step()}
        results.append([[ended[request, number] for number in range(3)] for request in range(2)])
    assert_alike(*results)


def test_weights_that_are_not_numbers_are_told_of_by_the_step(build, capture):
    """Only after the first step: the first tokens come from prefill."""
    for sampling in (Sampling(), Sampling(temperature=0)):
        model = build("llama", **SMALL)
        generation = Generator(model, static_step=True).open(sampling, length=64, limit=9)
        generation.add([Request([1, 2], n=2, max_new_tokens=9)])
        generation.step()
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.fill_(torch.nan)
        with pytest.raises(RlxError, match="the model's logits are not finite numbers"):
            generation.step()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text"])
def test_the_step_reads_nothing_on_the_host(build, family, law):
    """On the meta device, where tensors have no values; one that was made on the CPU by mistake is refused there."""
    model, count = build(family).to("meta"), 5
    model.config._attn_implementation = NAME
    slots = Slots(Architecture.of(model, None), model, exact=False, new_capture=lambda: lambda work: work)
    slots.reserve(8, 40)
    row_A, u_A = np.arange(count) // 2, np.linspace(0, 0.9, count)
    with torch.inference_mode():
        assert slots.prefill([[1, 2, 3], [4, 5]], 0).device.type == "meta"
        drawn = slots.step(np.array([3, 4, 5]), np.array([3, 2, 1]), row_A, u_A, LAWS[law])
    assert drawn.device.type == "meta" and drawn.shape == (2, count)


def test_a_model_that_looks_at_what_it_computes_is_not_captured(build):
    """Rotary embeddings of the dynamic kind compare the largest position of a batch with what they have tables for."""
    position = torch.arange(4)[:, None]
    for family, expected in (("llama", None), ("llama, dynamic rope", "_local_scalar_dense"), ("gemma3_text", None)):
        slots = Generator(build(family), static_step=True)._slots["generate"][1]
        with torch.inference_mode():
            read = host_read(lambda slots=slots: slots._decode(position[:2, 0], position[:2, 0], 8))
        assert read is None if expected is None else expected in read


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 1.0),
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
    ],
)
def test_what_a_graph_could_not_repeat_is_named(work):
    x = torch.tensor([1.0, -1.0])
    assert "aten." in host_read(lambda: work(x))
    assert host_read(lambda: x[torch.tensor([0, 0])] + x.sum() + x.where(x > 0, 0.0).sort()[0]) is None


def test_shapes_are_few_and_the_last_one_has_room_for_all():
    assert doubled(8, 100) == [8, 16, 32, 64, 100]
    assert doubled(8, 5) == [5] and doubled(8, 8) == [8]
    assert [at_least([8, 16, 20], wanted) for wanted in (1, 8, 9, 17, 20)] == [8, 8, 16, 20, 20]


def test_exact_and_static_exclude_each_other(build):
    with pytest.raises(ConfigError, match="static_step=True and exact=True exclude each other"):
        Generator(build("llama"), exact=True, static_step=True)
    assert Generator(build("llama"), exact=True, static_step=False)._slots["generate"][1]._new_capture is None


def test_on_a_cpu_steps_are_plain_unless_asked_for(build):
    assert Generator(build("llama"))._slots["generate"][1]._new_capture is None
