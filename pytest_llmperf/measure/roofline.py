"""How much of the memory's bandwidth decoding uses: the roofline of a single request.

A model that decodes one token at a time computes little with each byte that it reads, so the memory
sets its pace: no build can be faster than bandwidth over bytes (Williams, Waterman, Patterson 2009,
"Roofline: An Insightful Visual Performance Model"). The share of the bandwidth that a build gets
out of it says how far it could still go, on any card and with any model.

It means something only where one request decodes alone (``parallel`` is 1), nothing is drafted, and
all weights and the cache are in the one memory whose bandwidth is told. Whoever asks sees to that.
llama-server and llama-bench are alike in it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models.tensors import BYTES, ModelTensors, Tensor
from pytest_llmperf.plan.config import Workload

_GIGA = 1e9

_STATE_VALUE = 4
"""Bytes of a value of a recurrent state: llama.cpp keeps it in F32, whatever the cache's type."""

_LOOKED_UP = frozenset(
    {"token_embd.weight", "per_layer_token_embd.weight", "position_embd.weight"}
    | {"token_types.weight"}
)
"""Tables of which a token takes one row."""

_BLOCK = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>[^.]+)")
_EXPERTS = re.compile(r"_(?:ch)?exps\.")
_QUERIES = frozenset({"attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa"})

_PERIODS: Mapping[str, tuple[int, bool]] = MappingProxyType(
    {
        "afmoe": (4, False),
        "cohere2": (4, False),
        "cohere2moe": (4, True),
        "exaone-moe": (4, False),
        "exaone4": (4, False),
        "gemma-embedding": (6, False),
        "gemma2": (2, False),
        "gemma3": (6, False),
        "gemma3n": (5, False),
        "gpt-oss": (2, False),
        "laguna": (4, True),
        "llama4": (4, False),
        "mellum": (4, False),
        "olmo2": (4, False),
        "plamo3": (8, False),
        "smallthinker": (4, True),
    }
)
"""Of so many layers one attends to all positions, the others to a window; and whether that one is
the first of them rather than the last. What llama.cpp assumes of an architecture whose file does
not say: ``load_swa_pattern`` in its ``src/models``."""

_WINDOWS: Mapping[str, int] = MappingProxyType({"gemma2": 4096, "llama4": 8192})
"""Windows in tokens where the file does not say, from the same place."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Bytes that the memory moves for one token.

    Attributes:
        weights: Of the weights, each read once.
        cache: Of the KV cache, read.
        state: Of the recurrent state, read and written.
        notes: What is left out or taken for granted of this model, a sentence each.
    """

    weights: float
    cache: float
    state: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.cache + self.state


@dataclass(frozen=True, slots=True)
class Roofline:
    """What the memory allows.

    Attributes:
        bytes_per_token: :attr:`Reading.total` of the model at the depth of the workload.
        bandwidth_gbs: Of the memory, in GB/s (1e9 bytes a second).
        source: Where the bandwidth comes from, for people.

    Raises:
        ValueError: If one of the figures is not above 0.
    """

    bytes_per_token: float
    bandwidth_gbs: float
    source: str

    def __post_init__(self) -> None:
        for name in ("bytes_per_token", "bandwidth_gbs"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")

    @property
    def most_tps(self) -> float:
        """Tokens per second if the whole bandwidth were used."""
        return self.bandwidth_gbs * _GIGA / self.bytes_per_token

    def share(self, tps: float) -> float:
        """Return the share of the bandwidth that so many tokens per second use: 0.5 is half."""
        return tps / self.most_tps

    def facts(self, new: float | None, base: float | None = None) -> dict[str, object]:
        """Return what a report shows of decode speeds in tokens per second, None if unmeasured."""
        return {
            "gb_per_token": self.bytes_per_token / _GIGA,
            "bandwidth_gbs": self.bandwidth_gbs,
            "source": self.source,
            "new": None if new is None else self.share(new),
            "base": None if base is None else self.share(base),
        }


def mean_depth(workload: Workload, *, prompts: bool = True) -> float:
    """Return the mean position, in tokens, at which a workload generates.

    Of each turn it is what lies before its answer and half of the answer; turns weigh as much as
    they generate. Tokens that a chat template or a picture adds are unknown here and not counted.
    A workload that generates nothing is at the end of its prompts.

    Args:
        workload: Its turns.
        prompts: Whether answers follow their prompts; those of llama-bench begin at the depth.
    """
    before, generated, weighted = 0, 0, 0.0
    for turn in workload.turns:
        before += turn.depth + (turn.prompt if prompts else 0)
        weighted += turn.generate * (before + turn.generate / 2)
        before += turn.generate
        generated += turn.generate
    return weighted / generated if generated else float(before)


def bytes_per_token(
    model: ModelTensors, depth: float, cache_types: tuple[str, str] = ("f16", "f16")
) -> Reading:
    """Return what decoding one token moves at the least.

    Weights: each tensor of the blocks and of what comes after them, once. Of experts the share
    that works on a token, ``expert_used_count`` of those in the tensor; shared ones, routers and
    norms wholly. The output matrix wholly, which is that of the embeddings where there is no
    other; of embeddings that are only looked up one row. Blocks that draft (``nextn``) and an
    encoder are not read. Scales of quantized types are in the size of their blocks.

    Cache: of each layer with attention, keys and values of each position: ``head_count_kv`` times
    ``key_length`` and ``value_length``, in the bytes of the cache's types. With latent attention
    (``key_length_mla``) ``kv_lora_rank`` and the rotated dimensions, once for both. A layer with
    a window reads the window at most, as llama.cpp does without ``--swa-full``.

    State: of each recurrent layer, as ``n_embd_r`` and ``n_embd_s`` in ``llama-hparams.cpp`` have
    it, ``(conv_kernel - 1) (inner_size + 2 group_count state_size) + state_size inner_size``
    values of 32 bits, read and written.

    Left out, all of it small beside the rest in a decoding step: activations and logits, the row
    that a token adds to the cache, the positions by which llama.cpp rounds a cache's length up
    (to 256), masks, and whatever a kernel reads twice.

    Args:
        model: Header of the model's file.
        depth: Position of the token, in tokens before it.
        cache_types: Of keys and of values, as ``--cache-type-k`` and ``--cache-type-v`` name them.

    Raises:
        ModelError: If a cache type is not known.
        ValueError: If the depth is negative.
    """
    if depth < 0:
        raise ValueError(f"a depth is 0 at least, not {depth}")
    keys = _Keys(model)
    notes: list[str] = []
    weights = sum(_read_of(tensor, keys, notes) for tensor in model.tensors if keys.reads(tensor))
    cache, state = 0.0, 0
    costs = (_cost(cache_types[0]), _cost(cache_types[1]))
    for layer, found in sorted(keys.layers().items()):
        if keys.attends(layer, found):
            cache += keys.position(layer, costs, notes) * keys.seen(layer, depth, notes)
        if keys.recurs(layer, found):
            state += keys.state(notes)
    if keys.whole("attention.indexer.head_count"):
        notes.append("sparse attention is counted as if it read the whole cache, without its index")
    return Reading(weights, cache, float(2 * _STATE_VALUE * state), tuple(dict.fromkeys(notes)))


def _cost(kind: str) -> float:
    """Return the bytes of one value in a cache of a type."""
    cost = BYTES.get(kind.upper())
    if cost is None:
        raise ModelError(f"no cache type `{kind}` is known: use f16, q8_0 or another of llama.cpp")
    return cost


def _read_of(tensor: Tensor, keys: _Keys, notes: list[str]) -> float:
    """Return how many bytes of a tensor a token reads."""
    if tensor.name in _LOOKED_UP and not keys.is_output(tensor):
        return tensor.row
    # One value for each expert, such as a scale, is read whole.
    if _EXPERTS.search(tensor.name) and len(tensor.shape) > 1:
        used = keys.at("expert_used_count", keys.layer(tensor.name))
        if used is None:
            notes.append("the file does not say how many experts work on a token: all are counted")
            return tensor.size
        return tensor.size * min(used / max(tensor.shape[0], 1), 1.0)
    return tensor.size


class _Keys:
    """What the metadata of a model says of its layers.

    Args:
        model: Its header.
    """

    def __init__(self, model: ModelTensors) -> None:
        self._model = model
        # `block_count` has the layers that draft among it, as the last ones.
        count = self.whole("block_count")
        self._trunk = None if count is None else count - (self.whole("nextn_predict_layers") or 0)
        self._tied = not any(tensor.name == "output.weight" for tensor in model.tensors)

    def whole(self, key: str) -> int | None:
        """Return a whole number, None where the file has none under that key."""
        return _count(self._model.value(key))

    def at(self, key: str, layer: int) -> int | None:
        """Return a whole number that may differ from layer to layer."""
        value = self._model.value(key)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return _count(value[layer]) if 0 <= layer < len(value) else None
        return _count(value)

    @staticmethod
    def layer(name: str) -> int:
        """Return the layer of a tensor, -1 for one of none."""
        found = _BLOCK.match(name)
        return -1 if found is None else int(found["layer"])

    def is_output(self, tensor: Tensor) -> bool:
        """Tell whether logits come from the matrix of the embeddings."""
        return self._tied and tensor.name == "token_embd.weight"

    def reads(self, tensor: Tensor) -> bool:
        """Tell whether decoding a token reads a tensor at all."""
        drafts = self._trunk is not None and self.layer(tensor.name) >= self._trunk
        return not (drafts or ".nextn." in tensor.name or tensor.name.startswith("enc."))

    def layers(self) -> dict[int, set[str]]:
        """Return the layers that are computed, each with the parts that it has."""
        found: defaultdict[int, set[str]] = defaultdict(set)
        for tensor in self._model.tensors:
            block = _BLOCK.match(tensor.name)
            if block is not None and self.reads(tensor):
                found[int(block["layer"])].add(block["part"])
        return found

    def attends(self, layer: int, found: set[str]) -> bool:
        """Tell whether a layer has a KV cache to read."""
        if self._recurrent(layer) or self._heads(layer) == 0:
            return False
        # A delta rule has queries, keys and values in one matrix, too.
        return bool(found & _QUERIES) or ("attn_qkv" in found and not self.recurs(layer, found))

    def recurs(self, layer: int, found: set[str]) -> bool:
        """Tell whether a layer has a recurrent state."""
        marks = ("ssm_", "time_mix_", "shortconv")
        return self._recurrent(layer) or any(part.startswith(marks) for part in found)

    def _recurrent(self, layer: int) -> bool:
        """Tell whether the file says that a layer has a state instead of a cache."""
        told = self.at("attention.recurrent_layers", layer)
        if told is not None:
            return bool(told)
        interval = self.whole("full_attention_interval")
        return bool(interval) and (layer + 1) % (interval or 1) != 0

    def _heads(self, layer: int) -> int | None:
        heads = self.at("attention.head_count_kv", layer)
        return self.at("attention.head_count", layer) if heads is None else heads

    def position(self, layer: int, costs: tuple[float, float], notes: list[str]) -> float:
        """Return the bytes of one position in the cache of a layer."""
        if self.whole("attention.key_length_mla") and self.whole("attention.value_length_mla"):
            latent = self.whole("attention.kv_lora_rank") or 0
            return (latent + (self.whole("rope.dimension_count") or 0)) * costs[0]
        even = (self.whole("embedding_length") or 0) // (
            self.at("attention.head_count", layer) or 1
        )
        keys, values = self._length("key", layer, even), self._length("value", layer, even)
        size = (self._heads(layer) or 0) * (keys * costs[0] + values * costs[1])
        if not size:
            notes.append("the file does not say how large the cache is: it is not counted")
        return size

    def _length(self, side: str, layer: int, even: int) -> int:
        """Return the width of one head of keys or values, `even` where the file does not say."""
        length = self.whole(f"attention.{side}_length")
        narrow = self.whole(f"attention.{side}_length_swa") if self._slides(layer) else None
        told = length if narrow is None else narrow
        return even if told is None else told

    def seen(self, layer: int, depth: float, notes: list[str]) -> float:
        """Return how many positions a layer reads at a depth."""
        slides = self._slides(layer)
        if slides is None:
            notes.append(
                f"llama.cpp knows no pattern of windows for {self._model.architecture}: every "
                "layer is counted as reading the whole cache"
            )
        return min(depth, self._window()) if slides else depth

    def _window(self) -> int:
        told = self.whole("attention.sliding_window")
        return _WINDOWS.get(self._model.architecture, 0) if told is None else told

    def _slides(self, layer: int) -> bool | None:
        """Tell whether a layer attends to a window, as ``load_swa_pattern`` of llama.cpp does.

        Returns:
            None where there is a window and nobody says which layers have it.
        """
        if not self._window():
            return False
        told = self._model.value("attention.sliding_window_pattern")
        if isinstance(told, tuple):
            return layer < len(told) and bool(told[layer])
        period, first = _PERIODS.get(self._model.architecture, (None, False))
        told = _count(told)
        if told is not None:
            period = told
        if period is None:
            return None
        return not period or layer % period != (0 if first else period - 1)

    def state(self, notes: list[str]) -> int:
        """Return the values of the recurrent state of a layer, 0 where the file does not say."""
        inner, size = self.whole("ssm.inner_size"), self.whole("ssm.state_size")
        if not inner or not size:
            notes.append("the file does not say how large the recurrent state is: not counted")
            return 0
        kernel = self.whole("ssm.conv_kernel") or 1
        mixed = inner + 2 * (self.whole("ssm.group_count") or 0) * size
        return (kernel - 1) * mixed + size * inner


def _count(value: object) -> int | None:
    """Return a whole number that is not negative, or None."""
    if isinstance(value, int) and value >= 0:
        return int(value)
    return None
