"""A model's weights in the form that the kernels read, and the struct that points to them."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from training.core.errors import ConfigError
from training.engine.model_config import ModelConfig
from training.engine.native import library
from training.engine.weights import LayerWeights, Linear, ModelWeights

Uint64Array = npt.NDArray[np.uint64]
TILE_SUM = 32
"""Elements of a sum that one tile covers: inputs of every linear are multiples of it."""


class UnsupportedShapeError(ConfigError):
    """A sound model that the kernels do not compute; torch does."""


def check_shape(config: ModelConfig) -> None:
    """Raises ``UnsupportedShapeError`` for a shape that the kernels do not compute."""
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim,
    }
    for name, size in sizes.items():
        if size % TILE_SUM:
            raise UnsupportedShapeError(f"{name} {size} is not a multiple of {TILE_SUM}")
    if config.head_dim > 256:
        raise UnsupportedShapeError(f"head_dim {config.head_dim} is above 256")


class NativeWeights:
    """Owns the packed tensors; ``model`` is what kernels take.

    The transposes that the backward pass multiplies by are made there, layer by layer; only that of
    the head is kept, which every block of rows needs. A tied embedding is read out of the head.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self._tensors: list[torch.Tensor] = []
        self._kernels = library.load()
        self._layers = (library.Layer * config.num_layers)(
            *(
                self._layer(layer, config.windows[index])
                for index, layer in enumerate(weights.layers)
            )
        )
        self.model = library.Model(
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            inner=config.intermediate_size,
            vocab=config.vocab_size,
            norm_eps=config.norm_eps,
            embedding=None if config.tie_word_embeddings else self._keep(weights.embedding),
            layers=ctypes.cast(self._layers, ctypes.POINTER(library.Layer)),
            final_norm=self._keep(weights.final_norm),
            head=self._linear(weights.head, with_transpose=True),
            cos_sin=self._keep(_rotary_table(config)),
        )

    def sums(self) -> Uint64Array:
        """[tensors, 2]: sums of all that the kernels read, of its words modulo 2^64 and of their
        bits modulo 2. A change of one word changes both, those of several could cancel out in both
        only by chance. A hash would take ten times as long."""
        sums = []
        for tensor in self._tensors:
            content = tensor.flatten().view(torch.uint8).numpy()
            rest = content.size % 8
            words = content[: content.size - rest].view(np.uint64)
            last = int.from_bytes(content[content.size - rest :].tobytes(), "little")
            total = int(words.sum()) + last & 2**64 - 1  # numpy's wraps around, Python's would not
            sums.append((total, int(np.bitwise_xor.reduce(words)) ^ last))
        return np.array(sums, np.uint64)

    def _layer(self, layer: LayerWeights, window: int | None) -> library.Layer:
        return library.Layer(
            input_norm=self._keep(layer.input_norm),
            mlp_norm=self._keep(layer.mlp_norm),
            q_norm=None if layer.q_norm is None else self._keep(layer.q_norm),
            k_norm=None if layer.k_norm is None else self._keep(layer.k_norm),
            qkv=self._linear(layer.qkv),
            o=self._linear(layer.o),
            gate_up=self._linear(layer.gate_up),
            down=self._linear(layer.down),
            window=window or 0,
        )

    def _linear(self, linear: Linear, with_transpose: bool = False) -> library.Linear:
        weight = linear.weight.contiguous()
        out_size, in_size = weight.shape
        packed = self._packed(out_size, in_size)
        packed_t = self._packed(in_size, out_size) if with_transpose else None
        self._kernels.tc_pack_linear(
            weight.data_ptr(), out_size, in_size, packed.data_ptr(), library.address(packed_t)
        )
        bias = None if linear.bias is None else self._keep(linear.bias.float())
        return library.Linear(
            w=packed.data_ptr(),
            w_t=library.address(packed_t),
            bias=bias,
            in_size=in_size,
            out_size=out_size,
        )

    def _packed(self, out_size: int, in_size: int) -> torch.Tensor:
        count = self._kernels.tc_packed_elements(out_size, in_size)
        # What pads the last tile of a sum is never written.
        new = torch.empty if in_size % TILE_SUM == 0 else torch.zeros
        tensor = new(count, dtype=torch.bfloat16)
        self._tensors.append(tensor)
        return tensor

    def _keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self._tensors.append(tensor)
        return tensor.data_ptr()


def _rotary_table(config: ModelConfig) -> torch.Tensor:
    """fp32 [positions, D]: cosines of the D/2 frequencies, then sines."""
    positions = torch.arange(config.context_length, dtype=torch.float32)
    angles = positions[:, None] * config.rope.inverse_frequencies(config.head_dim)
    return torch.cat((angles.cos(), angles.sin()), 1)
