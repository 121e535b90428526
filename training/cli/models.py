"""``tinkercloud models``: what is served, and making it ready."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from rich.markup import escape

from training.cli.options import ConfigFile, Models, load_config
from training.cli.output import err, gibibytes, out
from training.config import EMBEDDED_MODEL, ModelConfig, TrainingConfig
from training.core.errors import ConfigError
from training.models.client_cache import Seeding, seed_client_cache
from training.models.files import CHAT_TEMPLATE_DIR, CONFIG_FILES, TOKENIZER_FILES, WEIGHT_SUFFIXES
from training.models.registry import (
    ensure_embedded_model,
    resolve_model_path,
    served_model_info,
)

app = typer.Typer(help="List the served models, or make them ready.", no_args_is_help=True)


@app.command("list")
def list_models(config_file: ConfigFile = None, model: Models = None) -> None:
    """Show every served model and whether it is ready."""
    config = load_config(config_file, models=model)
    for served in config.served_models():
        out.print(f"[bold]{served.name}[/]")
        try:
            info = served_model_info(served, config)
        except ConfigError as error:
            out.print(f"  not ready: {escape(str(error))}")
            continue
        facts = [
            info.architecture,
            f"vocabulary of {info.vocab_size:,}",
            f"{info.context_length:,} tokens of context",
            f"{served.backend} backend",
        ]
        if info.directory:
            weights = info.directory.glob("*.safetensors")
            facts.append(gibibytes(sum(path.stat().st_size for path in weights)))
        out.print(f"  ready: {info.directory or 'needs no files'}\n  {', '.join(facts)}")


@app.command()
def prepare(
    names: Annotated[
        list[str] | None, typer.Argument(help="Hugging Face names; default: every served model.")
    ] = None,
    config_file: ConfigFile = None,
    client_cache: Annotated[
        bool | None,
        typer.Option(
            "--client-cache/--no-client-cache",
            help="Add tokenizers to your Hugging Face cache; default: as configured.",
        ),
    ] = None,
) -> None:
    """Convert the embedded model, or download others from the Hugging Face hub."""
    config = load_config(config_file)
    served = {model.name: model for model in config.served_models()}
    for name in names or served:
        model = served.get(name) or ModelConfig(name=name)
        directory = prepare_model(model, config)
        if directory is not None:
            out.print(f"{name}: ready in {directory}")
        if config.hub.seed_client_cache if client_cache is None else client_cache:
            seed(model.name, directory)


def prepare_model(model: ModelConfig, config: TrainingConfig) -> Path | None:
    """The model's directory, made if need be; None for a fake. Raises ``ConfigError``."""
    if model.backend == "fake":
        return model.path
    try:
        return resolve_model_path(model, config)
    except ConfigError:
        if model.path is not None:
            raise
    if model.name == EMBEDDED_MODEL:
        return ensure_embedded_model(config)
    return _download(model.name)


def seed(name: str, directory: Path | None) -> None:
    """A cache that cannot be written stops nobody from serving, so that is only told."""
    if directory is None:
        return
    try:
        if seed_client_cache(name, directory) is Seeding.SEEDED:
            err.print(f"[dim]{name}: tokenizer added to your Hugging Face cache[/]")
    except OSError as error:
        err.print(f"[yellow]{name}: no tokenizer added to your Hugging Face cache:[/] {error}")


def _download(name: str) -> Path:
    wanted = [*CONFIG_FILES, *TOKENIZER_FILES, f"{CHAT_TEMPLATE_DIR}/*.jinja"]
    wanted += [f"*{suffix}" for suffix in WEIGHT_SUFFIXES]
    err.print(f"{name}: downloading from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{name} cannot be downloaded: {reason}") from error
