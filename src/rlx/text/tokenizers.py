"""Tokenizers: loaded by path, or made of characters; what ends a completion; text to tokens and back.

Nothing here needs a padding token: rows carry their lengths, and no token is ever compared with one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlx.errors import ConfigError, DataError
from rlx.hub import check_hub
from rlx.text.import_path import import_function, is_import_path

EOS = "<eos>"
"""The end token of `character_tokenizer`."""

SHOWN_CHARACTERS = 10
ANCHORS = "\n.0a"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder, a hub id, or an import path pkg.module:function that makes one.

    A hub id is taken from the local cache where it is there. ConfigError where there is none; code of the hub is
    never run.
    """
    name = str(path)
    if is_import_path(name):
        return _made(name)
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ConfigError(f'there is no folder "{name}" (in {Path.cwd()}) to load a tokenizer from.')
    last: Exception | None = None
    for only_local in (True, False):
        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=only_local, trust_remote_code=False)
        except Exception as error:  # whatever a broken file makes of it: OSError, ValueError, KeyError, Exception
            last = error
            if folder.is_dir():
                break
            if only_local:
                check_hub(name, "tokenizer")
    if folder.is_dir():
        raise ConfigError(
            f'no tokenizer can be loaded from the folder "{name}": {_first_sentence(last)} A folder that '
            "tokenizer.save_pretrained(folder) wrote has tokenizer.json and tokenizer_config.json."
        ) from last
    raise ConfigError(
        f'no tokenizer "{name}": it is neither a folder (in {Path.cwd()}) nor a model that the hub gives or the local '
        f"cache holds. {_first_sentence(last)}"
    ) from last


def character_tokenizer(alphabet: str, eos: str = EOS) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character: 0 is EOS, then the alphabet's, in its order.

    save_pretrained and AutoTokenizer.from_pretrained bring it back. A character outside of the alphabet has no token:
    `encode` names it. The text of EOS becomes EOS, as with any tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    doubles = sorted({character for character in alphabet if alphabet.count(character) > 1})
    if doubles or not alphabet:
        raise ConfigError(
            f"the alphabet {alphabet!r} must hold every character once; twice there: {doubles or 'none'}."
        )
    vocabulary = {eos: 0} | {character: number for number, character in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))  # not in it: unknown ones are refused
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, clean_up_tokenization_spaces=False)


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Any = None, given: Collection[int] = ()
) -> frozenset[int]:
    """Return every token that ends a completion: the tokenizer's EOS, those of the model's generation config, `given`.

    generation_config: a model's `generation_config`, a mapping, or None; its eos_token_id is one id, several, or None.
    ConfigError where there is none, or one that the tokenizer does not have.
    """
    get = generation_config.get if isinstance(generation_config, Mapping) else None
    of_model = get("eos_token_id") if get else getattr(generation_config, "eos_token_id", None)
    found = _ids(tokenizer.eos_token_id) | _ids(of_model) | set(given)
    if not found:
        raise ConfigError(
            f"{_name(tokenizer)} has no EOS token, and the model's generation config names none, so nothing would end "
            'a completion; set tokenizer.eos_token = "..." before it is saved, or generation.stop to what ends one.'
        )
    size = _size(tokenizer)
    if foreign := sorted(token for token in given if not 0 <= token < size):
        raise ConfigError(f"stop ids {foreign} are no tokens of {_name(tokenizer)}, which has 0 to {size - 1}.")
    return frozenset(found)


def end_id(tokenizer: PreTrainedTokenizerBase, stops: Collection[int]) -> int:
    """Return the one token that ends an example: the tokenizer's EOS, or the smallest stop id where that is none."""
    return min(_ids(tokenizer.eos_token_id) & set(stops) or stops)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, embedding_rows: int) -> None:
    """Raise ConfigError where the tokenizer has tokens that a model with so many embedding rows does not know.

    More rows than tokens are usual: many models round them up.
    """
    size = _size(tokenizer)
    if size > embedding_rows:
        raise ConfigError(
            f"{_name(tokenizer)} has {size} tokens and the model {embedding_rows} embeddings; take the model's own "
            f"tokenizer, or a model with vocab_size {size} or more."
        )


def check_same_ids(tokenizer: PreTrainedTokenizerBase, of_model: PreTrainedTokenizerBase, path: str) -> None:
    """Raise ConfigError where a token has another id than in the tokenizer that stands with the model in `path`.

    Tokens beside those of the model's, and other names for its added ones, as for reserved tokens, are fine.
    """
    ids, its_ids = tokenizer.get_vocab(), of_model.get_vocab()
    its_tokens = {number: token for token, number in its_ids.items() if number not in of_model.added_tokens_decoder}
    for token, number in sorted(ids.items(), key=lambda item: item[1]):
        if its_ids.get(token, number) != number:
            there = f"it is {its_ids[token]}"
        elif token not in its_ids and number in its_tokens:
            there = f"that is {its_tokens[number]!r}"
        else:
            continue
        raise ConfigError(
            f"{_name(tokenizer)} has the id {number} for {token!r}, and in the tokenizer of {path} {there}, so that "
            "model would read another text; leave model.tokenizer out, or give one with the same ids."
        )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, place: str) -> list[int]:
    """Return the tokens of a text, as it stands: none is put before or after it. DataError names `place`."""
    try:
        tokens = tokenizer.encode(text, add_special_tokens=False, truncation=False, verbose=False)
    except Exception as error:  # the Rust library raises plain Exception
        unknown = sorted({character for character in text if character not in tokenizer.get_vocab()})
        shown = ", ".join(map(repr, unknown[:SHOWN_CHARACTERS])) + (", ..." if len(unknown) > SHOWN_CHARACTERS else "")
        raise DataError(f"{place} has characters that {_name(tokenizer)} has no token for: {shown}.") from error
    return list(tokens)


def encode_start(tokenizer: PreTrainedTokenizerBase, text: str, place: str) -> list[int]:
    """Return the tokens of a text that begins a sequence: behind BOS, where the tokenizer puts one.

    Some tokenizers also put an EOS at the end; it is left out, since more is to follow.
    """
    plain = encode(tokenizer, text, place)
    whole = list(tokenizer.encode(text, add_special_tokens=True, truncation=False, verbose=False))
    for before in range(len(whole) - len(plain) + 1):
        if whole[before : before + len(plain)] == plain:
            return whole[: before + len(plain)] if plain else whole[: _begin(tokenizer, whole)]
    return whole


def encode_continuation(
    tokenizer: PreTrainedTokenizerBase, before: str, tokens_before: Sequence[int], text: str, place: str
) -> list[int]:
    """Return the tokens of `text`, which continues `before`, so that those of `before` stay as they are.

    They are what the tokenizer makes of both together, if that begins with `tokens_before`: so a tokenizer that begins
    every text with a space adds none here. Where a token would reach across the seam the text is encoded without what
    is before it, since whoever generates has `tokens_before` and not the merged token.
    """
    both = encode(tokenizer, before + text, place)
    bare = encode(tokenizer, before, place)
    if both[: len(bare)] == bare and list(tokens_before[len(tokens_before) - len(bare) :]) == bare:
        return both[len(bare) :]
    alone = encode(tokenizer, text, place)
    if _raw(tokenizer, [*tokens_before, *alone]) == _raw(tokenizer, tokens_before) + text:
        return alone
    for anchor in ANCHORS:  # behind something short that does not merge with it: no space is put there
        short, anchored = encode(tokenizer, anchor, place), encode(tokenizer, anchor + text, place)
        if short and anchored[: len(short)] == short:
            return anchored[len(short) :]
    return alone


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int] | np.ndarray, stops: Collection[int] = ()) -> str:
    """Return the text of a completion, exactly: without the stop token at its end and without special tokens."""
    kept = list(map(int, tokens))
    if kept and kept[-1] in stops:
        kept.pop()
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _made(name: str) -> PreTrainedTokenizerBase:
    made = import_function(name, "the tokenizer")()
    if not isinstance(made, PreTrainedTokenizerBase):
        raise ConfigError(f"{name} made a {type(made).__name__}; it must make a tokenizer of transformers.")
    return made


def _ids(tokens: Any) -> set[int]:
    """Return what an eos_token_id holds: one id, several, or None."""
    every = tokens if isinstance(tokens, Iterable) else [tokens]
    return {int(token) for token in every if token is not None}


def _raw(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _begin(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> int:
    """Return how many of an empty text's tokens begin it: BOS, if it is there."""
    return int(bool(tokens) and tokens[0] == tokenizer.bos_token_id)


def _size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest id + 1: `len` is less where ids have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    name = getattr(tokenizer, "name_or_path", "")
    return f'the tokenizer "{name}"' if name else "the tokenizer"


def _first_sentence(error: Exception | None) -> str:
    """Return what transformers says, up to its first line's end."""
    line = str(error).strip().partition("\n")[0].rstrip(".: ")
    return f"{type(error).__name__}: {line}."
