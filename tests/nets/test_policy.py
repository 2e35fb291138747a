"""How a policy starts, which shapes it takes, and which it refuses."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from rlx.errors import ConfigError
from rlx.nets.convolutions import CNN_FEATURES, ImageEncoder
from rlx.nets.encoders import build_encoder
from rlx.nets.observation import ObservationLayout
from rlx.nets.policy import Policy, build_policy
from rlx.trajectory import Batch

VECTOR = spaces.Box(-1, 1, (6,), np.float32)
DISCRETE = spaces.Discrete(3)


def image_space(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def image_encoder(*shape: int) -> ImageEncoder:
    height, width, channels = shape
    return ImageEncoder((height, width, channels), torch.Generator().manual_seed(0))


def assert_orthogonal(weight: torch.Tensor, gain: float) -> None:
    """The shorter side's vectors are orthogonal and all have length `gain`."""
    matrix = weight.detach().flatten(1)
    matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    torch.testing.assert_close(matrix @ matrix.T, gain**2 * torch.eye(len(matrix)), atol=1e-5, rtol=0)


def layers_of(module: nn.Module | None) -> list[nn.Linear | nn.Conv2d]:
    assert module is not None
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("space", [VECTOR, image_space(9, 9, 2)])
def test_weights_start_orthogonal_with_the_reference_gains_and_biases_at_zero(space):
    policy = build_policy(space, DISCRETE, hidden=(8, 5), share_encoder=False)
    hidden = layers_of(policy.encoder) + layers_of(policy.value_encoder)
    assert len(hidden) == (4 if space is VECTOR else 6)
    for layer in hidden:
        assert_orthogonal(layer.weight, math.sqrt(2))
    assert_orthogonal(policy.action_head.weight, 0.01)
    assert_orthogonal(policy.value_head.weight, 1.0)
    for layer in [*hidden, policy.action_head, policy.value_head]:
        assert layer.bias is not None and not layer.bias.any()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = (build_policy(VECTOR, DISCRETE, seed=seed) for seed in (1, 1, 2))
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(first.action_head.weight, other.action_head.weight)


@pytest.mark.parametrize("space, memory", [(VECTOR, "none"), (VECTOR, "lstm"), (image_space(42, 42, 2), "none")])
def test_how_many_threads_torch_has_leaves_the_weights_alone(space, memory):
    """Orthogonal weights are factorised, which rounds in another way on two threads than on one."""
    before, weights = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            weights.append(build_policy(space, DISCRETE, memory=memory, seed=3).state_dict())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in weights[1:]:
        for name, weight in weights[0].items():
            assert torch.equal(weight, other[name]), name


def test_building_a_policy_neither_reads_nor_moves_torch_s_global_generator():
    torch.manual_seed(3)
    expected_next = torch.rand(4)
    torch.manual_seed(3)
    policy = build_policy(VECTOR, DISCRETE, seed=5)
    assert torch.equal(torch.rand(4), expected_next)
    assert torch.equal(policy.value_head.weight, build_policy(VECTOR, DISCRETE, seed=5).value_head.weight)


def test_the_value_net_is_separate_unless_the_encoder_is_shared():
    separate, shared = build_policy(VECTOR, DISCRETE), build_policy(VECTOR, DISCRETE, share_encoder=True)
    for policy, actor_moves_value in ((separate, False), (shared, True)):
        _, value = policy(torch.ones(2, 6))
        gradient = torch.autograd.grad(value.sum(), layers_of(policy.encoder)[0].weight, allow_unused=True)[0]
        assert (gradient is not None) is actor_moves_value
    assert not torch.equal(layers_of(separate.encoder)[0].weight, layers_of(separate.value_encoder)[0].weight)


def test_a_policy_evaluates_actions_with_gradients_to_every_parameter():
    policy = build_policy(VECTOR, spaces.Box(-1, 1, (2, 2), np.float32), log_std_init=-0.5)
    logp, entropy, value = policy.evaluate(Batch(obs=torch.ones(5, 6), action=torch.ones(5, 4)))
    assert logp.shape == entropy.shape == value.shape == (5,)
    gradients = torch.autograd.grad((logp + entropy + value).sum(), list(policy.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert policy.get_parameter("distribution.log_std").tolist() == [-0.5] * 4


def test_no_hidden_layers_give_a_linear_policy():
    policy = build_policy(VECTOR, DISCRETE, hidden=())
    head, value = policy(torch.ones(2, 6))
    torch.testing.assert_close(head, torch.ones(2, 6) @ policy.action_head.weight.T)
    assert value.shape == (2,)


def test_an_image_too_small_for_convolutions_is_flattened_and_its_pixels_are_scaled():
    layout = ObservationLayout(image_space(3, 3, 2))
    encoder, features = build_encoder(layout, "auto", (4,), "tanh", torch.Generator().manual_seed(0))
    pixels = torch.randint(0, 256, (5, 3, 3, 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert features == 4
    torch.testing.assert_close(encoder(pixels), encoder(pixels.float() / 255))


@pytest.mark.parametrize("shape", [(84, 84, 4), (36, 36, 1), (35, 50, 3), (7, 7, 3), (5, 5, 1)])
def test_an_image_encoder_gives_512_features_for_images_large_and_small(shape):
    assert image_encoder(*shape)(torch.zeros(2, *shape, dtype=torch.uint8)).shape == (2, CNN_FEATURES)


def test_an_image_encoder_takes_channels_last_and_channels_first():
    pixels = torch.randint(0, 256, (2, 12, 10, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    last = ImageEncoder((12, 10, 3), torch.Generator().manual_seed(0))
    first = ImageEncoder((3, 12, 10), torch.Generator().manual_seed(0))
    torch.testing.assert_close(last(pixels), first(pixels.permute(0, 3, 1, 2)))


def test_uint8_pixels_are_scaled_to_one_and_float_ones_are_left_alone():
    encoder, pixels = image_encoder(9, 9, 3), torch.full((1, 9, 9, 3), 255, dtype=torch.uint8)
    torch.testing.assert_close(encoder(pixels), encoder(torch.ones(1, 9, 9, 3)))


def test_shapes_that_no_encoder_takes_are_refused_with_the_cure():
    with pytest.raises(ConfigError, match=r"shape \(4, 4, 3\) is too small .* model.encoder=mlp"):
        build_policy(image_space(4, 4, 3), DISCRETE, encoder="cnn")
    with pytest.raises(ConfigError, match=r"3 axes, not \(6,\).* model.encoder=mlp"):
        build_policy(VECTOR, DISCRETE, encoder="cnn")


def test_the_cure_works():
    policy = build_policy(image_space(4, 4, 3), DISCRETE, encoder="mlp", hidden=(8,))
    assert isinstance(policy, Policy)
    assert policy(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))[0].shape == (2, 3)


@pytest.mark.parametrize("shape", [(84, 84, 4), (9, 8, 3), (5, 5, 1)])
def test_the_deep_encoder_gives_256_features_and_has_15_convolutions(shape):
    policy = build_policy(image_space(*shape), DISCRETE, encoder="impala_cnn")
    layers = layers_of(policy.encoder)
    assert [isinstance(layer, nn.Conv2d) for layer in layers] == [True] * 15 + [False]
    pixels = torch.randint(0, 256, (2, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = policy.encoder(pixels)
    assert features.shape == (2, 256) and (features > 0).any() and features.isfinite().all()


def test_policy_and_value_share_the_encoder_of_images_only():
    pixels, both = image_space(9, 9, 1), spaces.Dict({"image": image_space(9, 9, 1), "x": VECTOR})
    assert [build_policy(space, DISCRETE).value_encoder is None for space in (VECTOR, pixels, both)] == [
        False,
        True,
        True,
    ]
    assert build_policy(pixels, DISCRETE, share_encoder=False).value_encoder is not None


def test_images_beside_numbers_are_joined_by_hidden_layers():
    """512 features of the large image, 12 pixels of the small one, 6 numbers and 3 columns of the Discrete."""
    parts = {"large": image_space(9, 9, 1), "small": image_space(2, 2, 3), "x": VECTOR, "goal": spaces.Discrete(3)}
    space = spaces.Dict(parts)
    policy = build_policy(space, DISCRETE, hidden=(7,), seed=1)
    assert layers_of(policy.encoder)[-1].in_features == 512 + 12 + 6 + 3 and policy.action_head.in_features == 7
    layout = ObservationLayout(space)
    for name in parts:
        first, second = (space.sample() for _ in range(2))
        second = {**first, name: second[name]}
        rows = np.stack([layout.encode(obs, np.empty(layout.shape, layout.dtype)) for obs in (first, second)])
        heads = [policy(torch.from_numpy(row[None]))[0] for row in rows]
        assert np.array_equal(*rows) == torch.equal(*heads)  # every part is looked at


@pytest.mark.parametrize("shape", [(9, 10), (4, 9, 10, 3), (4, 3, 9, 10)])
def test_pictures_without_channels_and_stacks_of_pictures_are_seen_as_planes(shape):
    encoder = ImageEncoder(shape, torch.Generator().manual_seed(0))
    pixels = torch.randint(0, 256, (2, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    planes = pixels[:, None] if len(shape) == 2 else pixels.movedim(2 if shape[1] == 3 else -1, 2).flatten(1, 2)
    expected = encoder.layers(planes.float() / 255)
    torch.testing.assert_close(encoder(pixels), expected)


@pytest.mark.parametrize("encoder", ["cnn", "impala_cnn"])
def test_bfloat16_is_near_float32_forwards_and_backwards_and_leaves_float32(encoder):
    pixels = torch.randint(0, 256, (6, 40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    outputs, gradients = [], []
    for precision in ("float32", "bfloat16"):
        policy = build_policy(image_space(40, 40, 3), DISCRETE, encoder=encoder, precision=precision, seed=2)
        features = policy.encoder(pixels)
        assert features.dtype == torch.float32
        outputs.append(features)
        first = layers_of(policy.encoder)[0].weight
        gradients.append(torch.autograd.grad(features.sum(), first)[0])
    assert not torch.equal(*outputs)
    for exact, near in (outputs, gradients):
        assert (near - exact).norm() < 0.05 * exact.norm()  # 15 layers of rounding to 3 digits


def test_the_first_convolution_scales_pixels_by_its_weights():
    encoder = image_encoder(9, 9, 3)
    pixels = torch.randint(0, 256, (2, 9, 9, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    convolution = encoder.layers[0]
    plain = nn.functional.conv2d(pixels.permute(0, 3, 1, 2).float() / 255, convolution.weight, convolution.bias)
    torch.testing.assert_close(convolution(pixels.permute(0, 3, 1, 2)), plain)
