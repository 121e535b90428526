"""The sections of the configuration tree, each frozen, with every setting and its default."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

DEVELOPMENT_KEY = "slime-dev-key"
EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
KEY_PREFIX = "tml-"
"""The SDK refuses keys without it, so each secret is one key with and without it."""
MIN_PRODUCTION_KEY_CHARS = 16

_ORIGIN = re.compile(r"https?://(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+)(:\d{1,5})?")
_URL = re.compile(_ORIGIN.pattern + r"(/[\w.~/-]*)?")


def _origin(text: str) -> str:
    if not _ORIGIN.fullmatch(text):
        raise ValueError("expected scheme://host or scheme://host:port, and never a wildcard")
    return text.lower()


def _base_url(text: str) -> str:
    if not _URL.fullmatch(text):
        raise ValueError("expected an http(s) URL without query, like https://tinker.example.org")
    return text.rstrip("/")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ServerConfig(Section):
    """Where the server listens and what it accepts."""

    host: str = "0.0.0.0"
    port: int = Field(8000, ge=0, le=65535)
    max_body_bytes: int = Field(256 * 2**20, gt=0)
    """Limit of a request body, before and after decompression."""
    max_arriving_bytes: int | None = Field(None, gt=0)
    """Of the bodies that are being read, unpacked and checked, of all keys together; what finds no
    room comes again. None: four of the largest bodies."""
    max_compression_ratio: int = Field(200, gt=0)
    long_poll_s: float = Field(25.0, gt=0, le=40)
    """How long retrieve_future waits before it answers 408; the SDK gives up after 45 s."""
    max_header_bytes: int = Field(64 * 2**10, ge=4096)
    """Of one request: its first line and all headers."""
    request_timeout_s: float = Field(30.0, gt=0)
    """How long a request may take to arrive, or a connection wait for its first one. A body has
    another second for each KiB that has come: slow lines pass, a byte now and then does not."""
    max_connections: int = Field(16384, gt=0)
    """More are closed at once. Every waiting poll is a connection: an SDK client may hold 2,000."""
    public_url: Annotated[str, AfterValidator(_base_url)] | None = None
    """Where clients reach this server, for links in answers. None: what the request's own Host
    header says, which is right without a proxy."""
    cors_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    """Web pages of other origins whose scripts may call this server. Never a wildcard."""
    download_url_s: float = Field(3600.0, ge=600, le=7 * 24 * 3600)
    """Life of the links to a checkpoint's files, which work without a key."""

    @model_validator(mode="after")
    def _room_for_one(self) -> Self:
        if self.arriving_bytes() < self.max_body_bytes:
            raise ValueError("max_arriving_bytes is below max_body_bytes: such a body never fits")
        return self

    def arriving_bytes(self) -> int:
        return self.max_arriving_bytes or 4 * self.max_body_bytes

    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class AuthConfig(Section):
    enabled: bool = True
    api_keys: tuple[SecretStr, ...] = (SecretStr(DEVELOPMENT_KEY),)
    """Shared secrets; each is accepted with and without the prefix ``tml-``."""

    @field_validator("api_keys")
    @classmethod
    def _no_empty_key(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        """An empty secret would let in everybody who sends ``tml-``."""
        if not all(key.get_secret_value().removeprefix(KEY_PREFIX).strip() for key in keys):
            raise ValueError("a key is empty")
        return keys

    def secrets(self) -> list[str]:
        """The keys in clear, without prefix."""
        return [key.get_secret_value().removeprefix(KEY_PREFIX) for key in self.api_keys]

    def openness(self) -> str | None:
        """Why strangers could use the server, or None."""
        if not self.enabled:
            return "authentication is off"
        if DEVELOPMENT_KEY in self.secrets():
            return "it accepts the built-in development key, which everybody knows"
        return None

    def weakness(self) -> str | None:
        """What production does not start with, or None."""
        if any(len(secret) < MIN_PRODUCTION_KEY_CHARS for secret in self.secrets()):
            return self.openness() or f"a key has fewer than {MIN_PRODUCTION_KEY_CHARS} characters"
        return self.openness()


class StorageConfig(Section):
    metadata_dir: Path = Path("data/metadata")
    futures_db_name: str = "futures.db"
    database_url: str | None = Field(None, repr=False)
    """SQLAlchemy URL; default: SQLite at ``metadata_dir / futures_db_name``."""
    checkpoint_dir: str = "data/checkpoints"
    """A directory, or a URL: ``s3://bucket/prefix``, ``gs://bucket/prefix``. One server's alone."""
    checkpoint_cache_bytes: int = Field(10 * 2**30, ge=0)
    """Of checkpoints from a URL, kept in ``metadata_dir / "checkpoint-cache"``."""
    snapshot_dir: Path | None = None
    """Where models that train are saved in the background. None: ``metadata_dir / "snapshots"``."""

    @field_validator("checkpoint_dir", mode="before")
    @classmethod
    def _path_as_text(cls, value: object) -> object:
        is_url = isinstance(value, str) and "://" in value
        return str(Path(value)) if isinstance(value, str | Path) and not is_url else value

    def resolved_database_url(self) -> str:
        if self.database_url:
            return self.database_url
        return f"sqlite:///{(self.metadata_dir / self.futures_db_name).absolute()}"

    def local_checkpoint_dir(self) -> Path | None:
        """None: checkpoints are kept elsewhere."""
        return None if "://" in self.checkpoint_dir else Path(self.checkpoint_dir)

    def resolved_snapshot_dir(self) -> Path:
        return (self.snapshot_dir or self.metadata_dir / "snapshots").absolute()


class ModelConfig(Section):
    """A base model to serve: ``name`` is what clients ask for, ``path`` a local directory."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
    path: Path | None = None
    """None: looked up as ``model_dir / name``, then in the Hugging Face cache."""
    context_length: int | None = Field(None, gt=0)
    backend: Literal["local", "fake"] = "local"
    delay_s: float = Field(0.0, ge=0)
    """Of the fake backend alone: how long each of its calls takes, for load tests."""


class EngineConfig(Section):
    """One engine process per base model."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    kernels: Literal["auto", "native", "torch"] = "auto"
    """What computes a Llama-like model on the CPU in bfloat16: our own kernels (they need AVX-512
    and a C++ compiler) or torch's. ``auto`` takes ours where they run, else says why not;
    ``native`` refuses to start without them."""
    num_threads: int | None = Field(None, gt=0)
    max_slots: int = Field(4096, gt=0)
    """Models that may be loaded at once, in memory or on disk."""
    adapter_memory_bytes: int | None = Field(None, gt=0)
    """Of all adapters being trained, with their gradients and moments; those not used for longest
    are put on disk. One adapter is always served, even if it alone is over this. None: a third of
    the device's memory, or of what a container may use of it."""
    idle_spill_s: float = Field(20.0, gt=0)
    """An adapter that was not used for this long is put on disk too, so that it costs no memory;
    an engine without any work for three times as long gives back the memory of its passes."""
    spill_dir: Path | None = None
    """Where adapters are put. None: ``storage.metadata_dir / "spill"``."""
    max_lora_rank: int = Field(256, gt=0)
    micro_batch_tokens: int = Field(1024, gt=0)
    """Tokens whose activations are alive at once, or one longer sequence. A sample in progress
    stands still for one such micro-batch while a model trains."""
    activation_memory_bytes: int | None = Field(None, gt=0)
    """What a sequence longer than a micro-batch may keep for its backward pass, about. Of one that
    needs more only each layer's input is kept, and the layer is computed again: a quarter slower,
    same bits. None: an eighth of the memory."""
    join_operations: bool = False
    """Compute small operations of several models in one pass. Faster where operations are below
    about 256 tokens, but then the last bits of a result depend on what it was computed with, and a
    replay after a crash is no longer bit-identical."""
    kv_cache_tokens: int = Field(32768, ge=32)
    """Shared by all running sequences and cached prefixes, in blocks of 32. A sequence takes them
    as it grows; when there are none left the youngest give way and go on later."""
    max_running_sequences: int = Field(64, gt=0)
    prefill_chunk_tokens: int = Field(1024, gt=0)
    """Prompt tokens of one sampler step, beside the decoding sequences."""
    sampling_adapter_bytes: int = Field(2**30, ge=0)
    """Published snapshots kept in memory, those last used; others are read again when a request
    needs them."""
    sampling_share: float = Field(0.5, gt=0, lt=1)
    """Share of engine time given to sampling while training wants to run too."""
    stall_timeout_s: float = Field(900.0, gt=0)
    """An engine that takes longer for one micro-batch, decode step or other command is ended and
    restarted. Time in which it is stopped, or its machine asleep, does not count."""
    max_restarts: int = Field(5, ge=0)
    """Restarts in a row that came to nothing before health calls the engine failing; it is
    restarted all the same, after 0.1 s, then 0.5 s, doubling to 30 s. One came to nothing where the
    model could not be loaded or the engine died before it had finished any work."""


class SchedulerConfig(Section):
    unit_tokens: int = Field(16384, gt=0)
    """Token budget of one engine unit; a single larger operation runs alone."""
    turn_tokens: int = Field(2048, gt=0)
    """How far one key's models may get ahead of another's within a unit while both train, at most:
    usually no further than the one with the smallest batches needs itself."""
    gap_timeout_s: float = Field(60.0, gt=0)
    """How long later operations of a model wait for a missing seq_id."""
    max_pending_per_model: int = Field(4096, gt=0)
    max_pending_operations: int = Field(65536, gt=0)
    """Of all models, accepted and not yet done. Where several keys are configured, each may fill at
    most as much of this and of the next two as it leaves free."""
    max_pending_samples: int = Field(20000, gt=0)
    max_pending_bytes: int = Field(4 * 2**30, gt=0)
    """Of the bodies of both, which are in memory until they have run."""


class QuotaConfig(Section):
    """What each key may have at once; None: no limit but the server's own. What waits and is over
    its quota gets 429 and comes again; one session, model, sampler or
    checkpoint too many is refused."""

    max_sessions: int | None = Field(20000, gt=0)
    max_models: int | None = Field(None, gt=0)
    max_samplers: int | None = Field(100_000, gt=0)
    """Sampling sessions, of sessions that have not ended: each ``create_sampling_client`` makes
    one, and each save without a name."""
    max_pending_operations: int | None = Field(16384, gt=0)
    max_pending_samples: int | None = Field(None, gt=0)
    max_pending_bytes: int | None = Field(2 * 2**30, gt=0)
    max_arriving_bytes: int | None = Field(2**29, gt=0)
    max_checkpoint_bytes: int | None = Field(None, gt=0)
    """Those saved without a name count until no sampler uses them."""


class DurabilityConfig(Section):
    """How much is done again after a crash, and what it costs to keep that little."""

    snapshot_steps: int = Field(8, gt=0)
    """Optimizer steps after which a model is saved in the background."""
    snapshot_tokens: int = Field(1_000_000, gt=0)
    """Tokens trained on after which it is saved, however few steps they were."""
    snapshot_pause_s: float = Field(5.0, ge=0)
    """Between two snapshots of one model, at least."""
    snapshot_idle_s: float = Field(2.0, ge=0)
    """A model that does nothing for so long is saved whatever it has done since."""
    snapshot_share: float = Field(0.05, gt=0, le=1)
    """Of all time, the most that one engine's snapshots take; models take turns."""
    snapshots_kept: int = Field(2, ge=1)
    """Per model. More than one, and a snapshot that the disk has damaged costs a longer replay."""
    results_kept_s: float = Field(3600.0, ge=0)
    """How long a result can be asked for again after it was fetched."""
    drain_s: float = Field(20.0, ge=0)
    """How long a server that is stopped takes to finish the running unit and to save models."""


class SessionConfig(Section):
    expiry_s: float = Field(1800.0, gt=0)
    """A session without a heartbeat for this long is ended (the SDK beats every 10 s)."""


class ClientConfig(Section):
    """Flags answered to the SDK by ``client/config`` and ``client/dynamic_config``."""

    proto_compress_fwdbwd: bool = False
    parallel_fwdbwd_chunks: bool = True
    fwdbwd_max_chunk_len: int = Field(1024, gt=0)
    fwdbwd_max_chunk_bytes_count: int = Field(5_000_000, gt=0)
    sample_join_sampling_session: bool = True
    sample_use_retrieve_futures: bool = False
    sample_cancel_enabled: bool = True


class HubConfig(Section):
    """How clients get the tokenizers of served models where the hub cannot be reached."""

    serve_weights: bool = False
    """Whether the mirror at ``/hf`` offers weights too, not only configuration and tokenizer."""
    seed_client_cache: bool = True
    """Whether ``serve`` adds served tokenizers to this user's own Hugging Face cache."""
