"""Small JSON parts of requests into backend dataclasses, validated."""

from __future__ import annotations

from training.backends.base import AdamParams, Capabilities, LoraSpec
from training.core.errors import InvalidRequest, Unsupported
from training.core.sampling_data import fold_seed
from training.core.validators import checked_float, checked_int
from training.wire.requests import LoraConfigJson, OptimizerConfigJson, OptimizerParamsJson


def to_optimizer_family(config: OptimizerConfigJson | None, capabilities: Capabilities) -> str:
    """The family a new model trains with for good; raises ``Unsupported``."""
    family = "adamw" if config is None else config.type
    if family not in capabilities.optimizers:
        offered = ", ".join(sorted(capabilities.optimizers))
        raise Unsupported(f"optimizer {family[:50]!r} is not offered; offered: {offered}")
    return family


def to_adam_params(params: OptimizerParamsJson, family: str) -> AdamParams:
    """``family`` is the model's. Raises ``Unsupported`` for another family's parameters."""
    if params.type != family:
        raise Unsupported(
            f"this model trains with {family}; it cannot take a step of {params.type[:50]!r}"
        )
    return AdamParams(
        learning_rate=checked_float(params.learning_rate, "learning_rate", 0),
        beta1=checked_float(params.beta1, "beta1", 0, below=1),
        beta2=checked_float(params.beta2, "beta2", 0, below=1),
        eps=checked_float(params.eps, "eps", 0),
        weight_decay=checked_float(params.weight_decay, "weight_decay", 0),
        grad_clip_norm=checked_float(params.grad_clip_norm, "grad_clip_norm", 0),
    )


def to_lora_spec(config: LoraConfigJson | None, capabilities: Capabilities, seed: int) -> LoraSpec:
    """``seed`` serves where the client gave none. Raises ``InvalidRequest``, ``Unsupported``."""
    if config is None:
        raise Unsupported("lora_config is missing: this server trains LoRA adapters only")
    groups = {
        "attn": config.train_attn,
        "mlp": config.train_mlp,
        "unembed": config.train_unembed,
    }
    if not any(groups.values()):
        raise InvalidRequest("set at least one of train_attn, train_mlp, train_unembed")
    for group, trained in groups.items():
        if trained and group not in capabilities.layer_groups:
            raise Unsupported(f"train_{group} is not offered for {capabilities.base_model}")
    return LoraSpec(
        rank=checked_int(config.rank, "lora_config.rank", 1, capabilities.max_lora_rank),
        seed=fold_seed(seed if config.seed is None else config.seed),
        train_attn=config.train_attn,
        train_mlp=config.train_mlp,
        train_unembed=config.train_unembed,
    )
