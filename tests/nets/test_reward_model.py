"""A reward model reads a sequence's last token, by lengths and whatever the padding holds."""

import pytest
import torch

from rlx.nets.language_model import load_language_model
from rlx.nets.ragged import parts_by_length
from rlx.nets.reward_model import RewardModel
from rlx.trajectory import Batch


@pytest.fixture
def reward_model(language_model_configs):
    return RewardModel(load_language_model(config=language_model_configs["llama"] | {"pad_token_id": 0}, seed=1))


def sequences(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    length = torch.tensor([9, 1, 4, 7, 4, 12])[:count]
    return torch.randint(0, 40, (count, 12), generator=generator), length


@pytest.mark.parametrize("max_tokens", [1, 20, 4096])
def test_a_score_is_the_head_on_the_last_token_of_the_sequence_alone(reward_model, max_tokens):
    """Also where the last token has the id of the padding."""
    tokens, length = sequences()
    tokens[0, 8] = tokens[3, 6] = 0
    scores = reward_model.score(tokens, length, max_tokens=max_tokens)
    for row in range(6):
        states = reward_model.model.model(input_ids=tokens[row : row + 1, : length[row]]).last_hidden_state
        expected = reward_model.score_head(states[0, -1]).item()
        assert scores[row].item() == pytest.approx(expected, abs=1e-5)
    assert scores.std() > 0.01


def test_padding_has_no_influence(reward_model):
    tokens, length = sequences()
    scores = reward_model.score(tokens, length)
    tokens[torch.arange(12) >= length[:, None]] = 10**9
    assert torch.equal(reward_model.score(tokens, length), scores)


def test_a_row_of_a_batch_is_scored_with_its_last_action_which_obs_does_not_hold(reward_model):
    """Learners blank the actions of a prompt, so only the last one may be read."""
    tokens, length = sequences()
    length = length.clamp(min=2)
    action = tokens[:, 1:].clone()
    action[torch.arange(11) != length[:, None] - 2] = 0
    pairs = Batch(obs=tokens[:, :-1], action=action, length=length - 1).map(lambda t: t.unflatten(0, (3, 2)))
    torch.testing.assert_close(
        reward_model.evaluate(pairs).detach().flatten(), reward_model.score(tokens, length), rtol=1e-5, atol=1e-5
    )


def test_normalised_scores_have_the_mean_and_deviation_that_were_set(reward_model):
    tokens, length = sequences()
    raw = reward_model.score(tokens, length)
    reward_model.normalize(raw.mean().item(), raw.std().item())
    scores = reward_model.score(tokens, length)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5) and scores.std().item() == pytest.approx(1, rel=1e-4)
    assert {"mean", "std"} <= reward_model.state_dict().keys()
    with pytest.raises(ValueError, match="all samples score alike"):
        reward_model.normalize(0.0, 0.0)


def test_parts_by_length_by_hand():
    """Sorted 1 2 2 5 9: three rows of 2 are 6 tokens with padding; 5 alone, as two rows would be 10; 9 is too long."""
    length = torch.tensor([5, 2, 9, 1, 2])
    assert [part.tolist() for part in parts_by_length(length, 6)] == [[3, 1, 4], [0], [2]]
    assert [part.tolist() for part in parts_by_length(length, 10, packs=True)] == [[3, 1, 4, 0], [2]]
    pairs = torch.tensor([[3, 1], [1, 2]])  # two rows of 2 are 4 tokens, two of 3 are 6: together four of 3, 12
    assert [part.tolist() for part in parts_by_length(pairs, 11)] == [[1], [0]]
    assert [part.tolist() for part in parts_by_length(pairs, 12)] == [[1, 0]]
    assert parts_by_length(length[:0], 6) == []
