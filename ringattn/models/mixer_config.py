"""Layers with a state in place of attention: the keys of one kind of them, without torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from ringattn.planning.state_exchange import StateBytes
from ringattn.typed import Count, OneOf, settings

if TYPE_CHECKING:
    from ringattn.models.sizes import ModelConfig

LOW_RANK = 16  # of the projections that make a decay for each of key_dim
NAMES = ("linear", "lightning", "ssd", "gla", "delta", "gated_delta", "kda", "scan", "conv")
DELTA = ("delta", "gated_delta", "kda")
_STATE_BYTES = 4  # states, decays and summaries are float32
# What autograd keeps of a layer: tensors of the model's dtype as large as the convolution's and the
# gate's channels; in float32 as large as all keys, all values, all pairs of tokens in a chunk.
_KEPT = {
    "linear": (2, 6, 6, 4, 2.1),
    "lightning": (2, 4, 4, 4, 2.1),
    "ssd": (3, 4, 6, 4, 3.1),
    "gla": (2, 4, 0.2, 4.3, 2.5),
    "delta": (2, 6, 10, 3, 5.2),
    "gated_delta": (2, 6, 11, 3, 7.3),
    "kda": (2, 6, 0.3, 3.3, 4.8),
}


@settings
class Mixer:
    """A kind of layer that carries a state along the sequence, or convolves."""

    mixer: Annotated[Any, OneOf(*NAMES)]
    """linear: no decay, normalised; lightning: a constant decay of each head; ssd: Mamba-2's; gla:
    a decay for each of key_dim; delta, gated_delta, kda: the delta rule without decay, with one of
    each head, with one for each of key_dim; scan: Mamba-1's, a state of key_dim for each of heads x
    value_dim channels; conv: LFM2's gated convolution."""
    heads: Count | None = None
    """States; null: model.heads."""
    key_dim: Count | None = None
    """Rows of a state; null: model.head_dim."""
    value_dim: Count | None = None
    """Its columns; null: model.head_dim."""
    conv: Count = 4
    """Tokens of the short convolution over q, k and v; 1: none."""

    def of(self, model: ModelConfig) -> Mixer:
        """With the model's sizes where nothing is said."""
        return replace(
            self,
            heads=self.heads or model.heads,
            key_dim=self.key_dim or model.head_dim,
            value_dim=self.value_dim or model.head_dim,
        )

    # What follows needs all sizes: see :meth:`of`.

    @property
    def channels(self) -> int:
        """Of the convolution."""
        if self.mixer in ("conv", "scan"):
            return self.heads * self.value_dim
        return self.heads * (2 * self.key_dim + self.value_dim)

    @property
    def per_token(self) -> int:
        """Scalars of each head and token that the layer makes beside q, k, v and the gate."""
        return {"ssd": 1, "delta": 1, "gated_delta": 2, "kda": 1}.get(self.mixer, 0)

    @property
    def decays_vectors(self) -> bool:
        """Whether each of key_dim has a decay of its own."""
        return self.mixer in ("gla", "kda")

    def matmul_parameters(self, dim: int) -> int:
        """Parameters that multiply every token, in a model of this width."""
        values = self.heads * self.value_dim
        if self.mixer == "conv":
            return 4 * dim * values
        if self.mixer == "scan":
            return 3 * dim * values + values * (2 * LOW_RANK + 2 * self.key_dim)
        count = dim * (self.channels + 2 * values + self.heads * self.per_token)
        if self.decays_vectors:
            count += LOW_RANK * (dim + self.heads * self.key_dim)
        return count

    def parameters(self, dim: int) -> int:
        """All of them."""
        count = self.matmul_parameters(dim)
        if self.mixer == "conv":
            return count + self.channels * self.conv
        if self.mixer == "scan":
            return count + self.channels * (2 + self.key_dim + self.conv * (self.conv > 1))
        count += self.channels * self.conv if self.conv > 1 else 0
        count += self.value_dim  # of the norm
        count += {"ssd": 3, "gated_delta": 2, "kda": 1}.get(self.mixer, 0) * self.heads
        return count + (self.heads * self.key_dim if self.decays_vectors else 0)

    @property
    def flops(self) -> float:
        """Of a token in the forward, as the recurrence has them: a product of key_dim by value_dim
        for each write and read of a state, and one more with the delta rule."""
        if self.mixer == "conv":
            return 0.0
        products = 3 if self.mixer in DELTA else 2
        return 2.0 * products * self.heads * self.key_dim * self.value_dim

    def state_bytes(self, wide: int) -> StateBytes | None:
        """What decides how states are exchanged, for a batch of 1, ``wide`` bytes an element of the
        model; None without a state."""
        if self.mixer == "conv":
            return None
        keys, columns = self.key_dim, self.value_dim
        if self.mixer == "scan":
            state = _STATE_BYTES * self.channels * keys
            given = self.channels * (wide + 4) + 2 * keys * wide  # steps are float32
            return StateBytes(state, state, given, self.channels * wide)
        through = {"gla": keys}.get(self.mixer, keys**2 if self.mixer in DELTA else 1)
        of_keys = of_values = wide
        if self.mixer == "linear" or self.mixer in DELTA:
            of_keys = 4  # features and norms of q and k are float32
        if self.mixer == "linear":
            columns, of_values = columns + 1, 4  # with the normaliser
        scalars = {"ssd": 1, "gla": keys, "delta": 1, "gated_delta": 2, "kda": 1 + keys}
        given = 2 * keys * of_keys + columns * of_values + 4 * scalars.get(self.mixer, 0)
        return StateBytes(
            state=_STATE_BYTES * self.heads * keys * columns,
            transition=_STATE_BYTES * self.heads * through,
            given=self.heads * given,
            returned=self.heads * columns * of_values,
        )

    def chunk_flops(self) -> float:
        """Of a token in the forward, as :mod:`ringattn.mixers` computes it in chunks."""
        if self.mixer == "conv":
            return 0.0
        size = self._chunk
        keys, values = self.key_dim, self.value_dim
        if self.mixer == "scan":  # each token's state, and what it is read by, twice
            return float(8 * self.channels * keys)
        each = 2 * size * (keys + values) + 4 * keys * values
        if self.mixer in DELTA:
            each += size * (2 * keys + keys + values) + 2 * keys * (values + keys)
            each += 2 * keys * keys * values / size
        return float(self.heads * each)

    def kept(self, wide: int) -> int:
        """Bytes of a token that the layer keeps for its backward, ``wide`` an element of the
        model: counted by what autograd saves (tests/test_hybrid.py holds it to that)."""
        values, keys = self.heads * self.value_dim, self.heads * self.key_dim
        if self.mixer == "conv":
            return wide * 6 * values
        if self.mixer == "scan":
            return int(wide * (5 * values + 48) + 4 * values * (5.05 * self.key_dim + 5.9))
        channels, gate, of_keys, of_values, pairs = _KEPT[self.mixer]
        size = self._chunk
        own = channels * self.channels * (self.conv > 1) + gate * values
        pairs *= self.heads * size * (self.key_dim if self.decays_vectors else 1)
        states = keys * (self.value_dim + self.key_dim * (self.mixer in DELTA)) / size
        return int(wide * own + 4 * (of_keys * keys + of_values * values + pairs + states))

    @property
    def _chunk(self) -> int:
        """Tokens of a chunk: those of :mod:`ringattn.mixers.recurrent`."""
        return 16 if self.decays_vectors else 64


@settings
class ModuleMixer(Mixer):
    """That of an unchanged module, which hands Mamba's tensors over in float32."""

    def state_bytes(self, wide: int) -> StateBytes | None:
        """As of any mixer."""
        return Mixer.state_bytes(self, 4 if self.mixer in ("ssd", "scan") else wide)
