"""TransformerPolicy: a causal language model that learners evaluate, with or without a value net and a reference."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlx.errors import ConfigError, RlxError
from rlx.nets.chunked_head import logp_and_entropy
from rlx.nets.ragged import parts_by_length, positions_within
from rlx.nets.shared_prefix import SharedRows, groups_of, parts_by_group, share, sharing_pays, widths
from rlx.nets.trunk import Layout, Trunk, tolerance, unwrapped
from rlx.trajectory import Batch


class TransformerPolicy(nn.Module):
    """Evaluates rows of tokens: the log-probability of every action, the entropy there, and the value before it.

    One function serves the policy that acted, the one that learns, and the reference. Rows are [S, L], or pairs
    [P, 2, L]: `obs` the tokens, `action` the tokens that follow them, `mask` where an action counts, `length` [S] how
    many positions of a row there are. What stands at any other place has no influence.
    The language model's parameters come first among `parameters()`, those of a value net after them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        value: Literal["none", "shared", "separate"] = "none",
        value_model: nn.Module | None = None,
        reference: nn.Module | None = None,
        layout: Layout | Literal["auto"] = "auto",
        dropout: bool = False,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        """`model`, `value_model`, `reference`: Hugging Face causal language models, or peft models around them.

        temperature: divides the logits, as it did when the tokens were sampled; the same for the reference.
        value: "shared" reads it from the model's last hidden state, "separate" from that of `value_model`.
        reference: what `ref_logp` asks; it is frozen. A peft model needs none, as its adapter can be switched off.
        layout: "auto" packs rows on CUDA; elsewhere it pads them, or runs common prompts once where that costs less.
        dropout: leave the model's own on while there are gradients; off it is always otherwise.
        activation_checkpointing: compute a layer twice rather than keep it.
        compile: run the layers through torch.compile while there are gradients; others than learners see none of it.
        """
        super().__init__()
        if (value == "separate") != (value_model is not None):
            raise ConfigError("a value net of its own needs value='separate' and a value_model: set both or neither.")
        self.model, self.value_model, self.reference = model, value_model, reference
        self.temperature, self.layout, self.dropout = temperature, layout, dropout
        self.trunk, head = Trunk(model), language_head(model)
        check_head(self.trunk, head)
        check_trunk(self.trunk)
        self.value_trunk = None
        if value_model is not None:
            self.value_trunk = Trunk(value_model)
            check_trunk(self.value_trunk)
            freeze_head(value_model)
        if value != "none":
            values_of = self.trunk if self.value_trunk is None else self.value_trunk
            self.value_head = nn.Linear(values_of.hidden_size, 1, device=head.weight.device)
            nn.init.zeros_(self.value_head.weight)  # every value is 0 at first, so that no advantage is made of noise
            nn.init.zeros_(self.value_head.bias)
        self.value = value
        self.reference_trunk = None
        if reference is not None:
            reference.requires_grad_(False)
            self.reference_trunk = Trunk(reference)
        self.activation_checkpointing, self.compile_layers = activation_checkpointing, compile
        self.eval()

    def evaluate(self, minibatch: Batch, *, entropy: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Return new_logp, entropy and value, each shaped like minibatch.action: 0, without gradient, off the mask.

        The log-probability is that of the law with the temperature. `entropy=False` leaves zeros in its place.
        """
        trunks = [trunk for trunk in (self.trunk, self.value_trunk) if trunk is not None]
        with gradient_modes(trunks, self.dropout, self.activation_checkpointing, self.compile_layers):
            rows = self._rows(minibatch)
            hidden = rows.hidden(self.trunk)
            new_logp, entropy_M = self._head(self.trunk, hidden, rows.action)
            if self.value_trunk is not None:
                hidden = rows.hidden(self.value_trunk)
            value = None if self.value == "none" else self._value(hidden)
        return rows.spread(new_logp), rows.spread(entropy_M if entropy else None), rows.spread(value)

    @torch.no_grad()
    def ref_logp(self, minibatch: Batch) -> Tensor:
        """Return the reference's log-probability of every action, shaped like minibatch.action: 0 off the mask."""
        rows = self._rows(minibatch)
        if self.reference_trunk is not None:
            return rows.spread(self._head(self.reference_trunk, rows.hidden(self.reference_trunk), rows.action)[0])
        if not hasattr(self.model, "get_base_model"):
            raise RlxError("this policy has no reference: give TransformerPolicy one, or train an adapter (LoRA).")
        with self.model.disable_adapter():  # type: ignore[operator]
            return rows.spread(self._head(self.trunk, rows.hidden(self.trunk), rows.action)[0])

    def columns(self, minibatch: Batch, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return of "logp", "entropy", "value" and "ref_logp" those that are named, shaped like minibatch.action."""
        found: dict[str, Tensor] = {}
        if {"logp", "entropy", "value"} & set(names):
            outputs = self.evaluate(minibatch, entropy="entropy" in names)
            found |= dict(zip(("logp", "entropy", "value"), outputs, strict=True))
        if "ref_logp" in names:
            found["ref_logp"] = self.ref_logp(minibatch)
        return {name: found[name] for name in names}

    def parts(self, batch: Batch, max_tokens: int) -> list[Tensor]:
        """Return row numbers in parts of at most `max_tokens` tokens, as this policy runs them best."""
        layout = resolved_layout(self.layout, batch.obs.device)
        if layout == "shared" and batch.length.ndim == 1:  # pairs stay together, whatever their prompts
            rows = _Rows(batch, layout, self.trunk, choose=self.layout == "auto")
            if rows.groups and max(rows.widths) <= max_tokens:
                return [part.to(batch.obs.device) for part in parts_by_group(rows.groups, rows.widths, max_tokens)]
        return parts_by_length(batch.length, max_tokens, layout == "packed")

    def _rows(self, minibatch: Batch) -> _Rows:
        layout = resolved_layout(self.layout, minibatch.obs.device)
        return _Rows(minibatch, layout, self.trunk, choose=self.layout == "auto")

    def _head(self, trunk: Trunk, hidden: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        head, transform = language_head(trunk.causal_lm), trunk.transform
        options: dict[str, Any] = {"bias": head.bias, "transform": transform, "temperature": self.temperature}
        return logp_and_entropy(hidden, head.weight, action, **options)

    def _value(self, hidden: Tensor) -> Tensor:
        return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(1)


class _Rows:
    """A minibatch's rows [S, L] and the M positions of them whose actions count."""

    def __init__(self, minibatch: Batch, layout: Layout, trunk: Trunk, choose: bool) -> None:
        """`choose`: rows are shared only where that pays."""
        self.shape, width = minibatch.action.shape, minibatch.action.shape[-1]
        self.length = minibatch.length.reshape(-1)
        obs = minibatch.obs.reshape(-1, width)
        self.obs = torch.where(positions_within(obs, self.length), obs, 0)
        self.index = minibatch.mask.flatten().nonzero().squeeze(1)
        self.action = minibatch.action.flatten().index_select(0, self.index)
        self.layout: Layout = layout
        self.groups: list[list[int]] = []
        self.shared: SharedRows | None = None
        if layout == "shared":
            self._group(minibatch.mask.reshape(-1, width), trunk, choose)

    def hidden(self, trunk: Trunk) -> Tensor:
        if self.groups and self.shared is None:
            self.shared = share(self.obs, self.prefix, self.length, self.groups)
        return trunk.hidden(self.obs, self.length, self.index, self.layout, self.shared)

    def _group(self, mask: Tensor, trunk: Trunk, choose: bool) -> None:
        """Find the rows with the same prompt, the token before the first action included."""
        first = mask.to(torch.uint8).argmax(1) + 1
        self.prefix = torch.where(mask.any(1), first, self.length).minimum(self.length)
        groups = groups_of(self.obs, self.prefix)
        self.widths = widths(groups, self.prefix, self.length)
        pays = len(groups) < len(self.obs) and sharing_pays(self.widths, self.length, trunk.hidden_size, trunk.inner)
        if pays or not choose:
            self.groups = groups
        else:
            self.layout = "padded"

    def spread(self, values: Tensor | None) -> Tensor:
        """Return values [M] in their places, zeros elsewhere."""
        if values is None:
            return torch.zeros(self.shape, device=self.obs.device)
        return values.new_zeros(self.obs.numel()).index_copy(0, self.index, values).view(self.shape)


def resolved_layout(layout: Layout | str, device: torch.device) -> Layout:
    """Return the layout that "auto" means on this device; any other as it is."""
    if layout != "auto":
        return layout  # type: ignore[return-value]
    return "packed" if device.type == "cuda" else "shared"


def language_head(model: nn.Module) -> Any:
    """Return the linear layer (weight [V, H], bias [V] or None) that turns hidden states into logits."""
    head: Any = unwrapped(model).get_output_embeddings()  # type: ignore[operator, union-attr]
    if not isinstance(head, nn.Linear) or type(head).__module__.startswith("peft"):
        raise ConfigError(
            f"the head of this language model is a {type(head).__name__}, and a plain linear layer is needed; where "
            "lora.target_modules or lora.modules_to_save name the head, leave it out there."
        )
    return head


def freeze_head(model: nn.Module) -> None:
    """Leave the language head, which nothing uses here, out of what is learned; not where the embedding is tied to it.

    It would be kept by every optimizer, and weight decay would eat it.
    """
    causal_lm: Any = unwrapped(model)
    head = causal_lm.get_output_embeddings()
    if head is not None and head.weight is not causal_lm.get_input_embeddings().weight:
        head.requires_grad_(False)


@torch.no_grad()
def check_trunk(trunk: Trunk) -> None:
    """Raise ConfigError where a model is not causal: it would be trained wrongly, and nothing else would tell."""
    if not _has_weights(trunk):
        return
    trunk.causal_lm.eval()
    tokens = _few_tokens(trunk)
    changed = torch.cat([tokens[:, :-1], tokens[:, :1]], 1)
    states = [trunk.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, :-1] for ids in (tokens, changed)]
    if not torch.allclose(*states, rtol=tolerance(states[0].dtype), atol=tolerance(states[0].dtype)):
        raise ConfigError(
            f"this {trunk.config.model_type} model is not causal: a token changes what the model makes of those before "
            "it. Choose a decoder-only model, or set is_decoder in its config."
        )


@torch.no_grad()
def check_head(trunk: Trunk, head: nn.Linear) -> None:
    """Raise ConfigError where a model does more with its logits than is known here: its loss would be wrong."""
    if not _has_weights(trunk):
        return
    trunk.causal_lm.eval()
    tokens = _few_tokens(trunk)
    logits = trunk.causal_lm(input_ids=tokens, use_cache=False).logits[0].float()
    hidden = trunk.decoder(input_ids=tokens, use_cache=False).last_hidden_state[0]
    logp, _ = logp_and_entropy(hidden, head.weight, tokens[0], bias=head.bias, transform=trunk.transform)
    expected = logits.log_softmax(-1).gather(1, tokens[0][:, None]).squeeze(1)
    difference = (logp - expected).abs().max().item()
    if not difference <= tolerance(hidden.dtype) * (1 + expected.abs().max().item()):
        raise ConfigError(
            f"a {trunk.config.model_type} model does something of its own with its logits, so that log-probabilities "
            f"made here would be wrong by {difference:.3g}. Choose another model."
        )


def _has_weights(trunk: Trunk) -> bool:
    return trunk.causal_lm.get_input_embeddings().weight.device.type != "meta"


def _few_tokens(trunk: Trunk) -> Tensor:
    rows = trunk.causal_lm.get_input_embeddings().weight
    return torch.arange(4, device=rows.device)[None] % len(rows)


@contextlib.contextmanager
def gradient_modes(trunks: list[Trunk], dropout: bool, activation_checkpointing: bool, compile: bool) -> Iterator[None]:
    """While there are gradients: dropout, and layers compiled or computed again, where they are asked for."""
    with contextlib.ExitStack() as modes:
        for trunk in trunks if torch.is_grad_enabled() else ():
            if dropout:
                trunk.causal_lm.train()
                modes.callback(trunk.causal_lm.eval)
            if activation_checkpointing or compile:
                modes.enter_context(_layers_changed(trunk.decoder, activation_checkpointing, compile))
        yield


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers of every decoder in a module."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]


@contextlib.contextmanager
def _layers_changed(decoder: nn.Module, activation_checkpointing: bool, compile: bool) -> Iterator[None]:
    """Have a decoder's layers run compiled, or keep their input only and compute the rest again going backward.

    The models' own switches would stay on for whoever else uses the model, and that for checkpointing turns on dropout.
    """
    layers: list[Any] = decoder_layers(decoder)
    for layer in layers:
        forward = layer.forward
        if compile:
            forward = functools.partial(_compiled(type(layer).forward), layer)
        layer.forward = (
            functools.partial(checkpoint, forward, use_reentrant=False) if activation_checkpointing else forward
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # of this object; that of the class shows again


@functools.cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward method of a class of layers, compiled once for all layers and all shapes."""
    return torch.compile(forward, dynamic=True)
