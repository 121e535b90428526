"""What can be adapted in a model of transformers whose architecture we have no code for.

Linears are found by their names: attention is what lies in a module named like attention, MLP what
lies in one named like an MLP or experts. Routers are left alone, and so is what has neither name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from training.core.errors import ConfigError
from training.engine.projections import UNEMBED_LAYER, AdaptedGroup, Part, Projection
from training.models.registry import CONTEXT_LENGTH_KEYS

ATTENTION_NAMES = re.compile(r"attn|attention")
MLP_NAMES = re.compile(r"mlp|feed_forward|ffn|(^|\.)fc_?\d|(^|\.)fc_(in|out)$|expert|moe")
ROUTER_NAMES = re.compile(r"(^|\.)(gate|[a-z_]*router[a-z_]*|shared_expert_gate)(\.|$)")


@dataclass(frozen=True)
class ForeignShape:
    """See ``projections.ModelShape``."""

    model_type: str
    hidden_size: int
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    adapted_groups: tuple[AdaptedGroup, ...]
    unadaptable: Mapping[Part, str]

    @property
    def has_fused_experts(self) -> bool:
        return any(each.is_parameter for group in self.adapted_groups for each in group.projections)


class Stack(NamedTuple):
    """The decoder layers of a model and the path of their list."""

    path: str
    layers: nn.ModuleList


class ExpertParameters(NamedTuple):
    """Names of an experts module's 3-D parameters that take the hidden states in and out."""

    first: str
    last: str


def find_stack(model: PreTrainedModel, config: PretrainedConfig) -> Stack:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return Stack(path, module)
    raise ConfigError(f"{type(model).__name__} has no list of decoder layers that we recognise")


def find_head(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """The head and its path."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for path, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            return path, module
    raise ConfigError(f"{type(model).__name__} has no head that we recognise")


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):  # GPT-2's linear, whose weight is [in, out]
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def expert_parameters(module: nn.Module) -> ExpertParameters | None:
    """For modules that follow transformers' interface of fused experts; None for all others."""
    if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
        return None
    first = "gate_up_proj" if module.has_gate else "up_proj"
    shapes = [getattr(module, name, None) for name in (first, "down_proj")]
    if any(not isinstance(each, nn.Parameter) or each.ndim != 3 for each in shapes):
        return None
    return ExpertParameters(first, "down_proj")


def find_shape(model: PreTrainedModel) -> ForeignShape:
    """Raises ``ConfigError`` where nothing can be adapted or the context length is unknown."""
    config: PretrainedConfig = model.config.get_text_config()
    stack = find_stack(model, config)
    groups = [
        group
        for index, layer in enumerate(stack.layers)
        for group in _layer_groups(index, f"{stack.path}.{index}", layer)
    ]
    groups = _told_from_experts(groups)
    unadaptable = _unadaptable(stack, groups)
    if not groups:
        raise ConfigError(f"{type(model).__name__} has no linears that we know how to adapt")
    path, head = find_head(model)
    member = Projection(path, path, head.in_features, head.out_features)
    groups.append(AdaptedGroup(UNEMBED_LAYER, path, Part.UNEMBED, (member,)))
    return ForeignShape(
        model_type=str(config.model_type),
        hidden_size=head.in_features,
        vocab_size=int(config.vocab_size),
        context_length=_context_length(config),
        eos_token_ids=_eos_token_ids(config, model.generation_config),
        adapted_groups=tuple(groups),
        unadaptable=unadaptable,
    )


def _layer_groups(index: int, prefix: str, layer: nn.Module) -> Iterator[AdaptedGroup]:
    """Attention first."""
    found: dict[Part, list[AdaptedGroup]] = {Part.ATTN: [], Part.MLP: []}
    for path, module in layer.named_modules():
        part = _part(path)
        if part is None:
            continue
        if (sizes := linear_sizes(module)) is not None:
            member = Projection(f"{prefix}.{path}", path, *sizes)
            found[part].append(AdaptedGroup(index, path, part, (member,)))
        elif (names := expert_parameters(module)) is not None:
            found[part] += _expert_groups(index, prefix, path, module, names)
    yield from found[Part.ATTN]
    yield from found[Part.MLP]


def _expert_groups(
    index: int, prefix: str, path: str, module: nn.Module, names: ExpertParameters
) -> Iterator[AdaptedGroup]:
    """Every expert is a group of its own: it sees rows of its own.

    PEFT wraps one parameter of a module in the wrapper of the other, hence ``base_layer``.
    """
    for name, place in ((names.first, f"{path}.base_layer"), (names.last, path)):
        num_experts, *sizes = getattr(module, name).shape
        in_size, out_size = sizes if module.is_transposed else reversed(sizes)
        for expert in range(num_experts):
            target = f"{path}.{name}"
            member = Projection(f"{prefix}.{place}", target, in_size, out_size, is_parameter=True)
            yield AdaptedGroup(index, f"{target}.{expert}", Part.MLP, (member,))


def _told_from_experts(groups: list[AdaptedGroup]) -> list[AdaptedGroup]:
    """In a model with fused experts, PEFT (0.21) takes module names such as ``gate_proj`` for old
    names of those experts; linears beside them are named as parameters, which it takes as said."""
    if not any(each.is_parameter for group in groups for each in group.projections):
        return groups
    told = []
    for group in groups:
        (member,) = group.projections
        if group.part is Part.MLP and not member.is_parameter:
            member = member._replace(target=f"{member.target}.weight", is_parameter=True)
        told.append(group._replace(projections=(member,)))
    return told


def _part(path: str) -> Part | None:
    if ROUTER_NAMES.search(path):
        return None
    if ATTENTION_NAMES.search(path):
        return Part.ATTN
    return Part.MLP if MLP_NAMES.search(path) else None


def _unadaptable(stack: Stack, groups: list[AdaptedGroup]) -> dict[Part, str]:
    """A part is adapted whole or not at all."""
    reasons = {}
    for part in (Part.ATTN, Part.MLP):
        if all(group.part is not part for group in groups):
            reasons[part] = f"no linear of it is named like one of its {part}"
    for path, module in stack.layers.named_modules():
        if _part(path) is not Part.MLP or linear_sizes(module) is not None:
            continue
        matrices = [each for each in module.parameters(recurse=False) if each.ndim > 1]
        if matrices and expert_parameters(module) is None:
            reasons[Part.MLP] = f"the matrices of {type(module).__name__} are no linears"
    return reasons


def _context_length(config: PretrainedConfig) -> int:
    values: dict[str, Any] = config.to_dict()
    for key in CONTEXT_LENGTH_KEYS:
        if isinstance(values.get(key), int):
            return int(values[key])
    raise ConfigError(f"the model's config.json has none of {CONTEXT_LENGTH_KEYS}")


def _eos_token_ids(
    config: PretrainedConfig, generation: GenerationConfig | None
) -> tuple[int, ...]:
    eos = None if generation is None else generation.eos_token_id
    if eos is None:
        eos = config.to_dict().get("eos_token_id")
    if eos is None:
        return ()
    return tuple(map(int, eos)) if isinstance(eos, list | tuple) else (int(eos),)
