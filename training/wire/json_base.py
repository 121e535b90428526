"""What all JSON requests share: strict types, lenient fields, one parser, tensors and prompts."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from training.core.errors import InvalidRequest, TooLarge
from training.wire.records import OtherChunk, TextChunk, WireChunk, WireTensor

MAX_JSON_BYTES = 32 * 2**20
"""Parsed JSON takes many times its size in memory, so it is held shorter than protobuf bodies."""

MAX_METADATA_BYTES = 64 * 2**10
MAX_ENTRIES = 64
MAX_ID_CHARS = 400
MAX_CHUNKS = 16384
_MAX_PROBLEMS = 5


def _storable(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata as strict JSON has it (no NaN), or ``ValueError``."""
    try:
        text = orjson.dumps(metadata)
    except orjson.JSONEncodeError as error:
        raise ValueError(f"cannot be stored: {error}") from None
    if len(text) > MAX_METADATA_BYTES:
        raise ValueError(f"has {len(text)} bytes; limit {MAX_METADATA_BYTES}")
    if b"\\u0000" in text:
        raise ValueError("contains a NUL character")
    storable: dict[str, Any] = orjson.loads(text)
    return storable


def _all_text(metadata: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("must map text to text")
    return metadata


def _short_together(texts: list[str]) -> list[str]:
    num_bytes = sum(len(text.encode()) for text in texts)
    if num_bytes > MAX_METADATA_BYTES:
        raise ValueError(f"have {num_bytes} bytes together; limit {MAX_METADATA_BYTES}")
    return texts


def _few(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise ValueError(f"has {len(value)} entries; limit {MAX_ENTRIES}")
    return value


# NUL is the one character that a PostgreSQL text column cannot hold.
Text = Annotated[str, StringConstraints(max_length=2000, pattern=r"^[^\x00]*$")]
Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS, pattern=r"^[^\x00]*$")]
Seq = Annotated[int, Field(ge=0, lt=2**63)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Metadata = Annotated[dict[str, Any], AfterValidator(_storable)]
TextMetadata = Annotated[dict[str, Any], AfterValidator(_storable), AfterValidator(_all_text)]

# A wrong body must not cost more than a right one: every problem that pydantic collects takes some
# 500 bytes, so lists stop at their first one, and lists of objects and dicts have a limit.
_T = TypeVar("_T")
ListOf = Annotated[list[_T], Field(fail_fast=True)]
Tags = Annotated[ListOf[Text], Field(max_length=1000), AfterValidator(_short_together)]
FewOf = Annotated[dict[Text, _T], BeforeValidator(_few)]


class WireModel(BaseModel):
    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        populate_by_name=True,
    )


_ModelT = TypeVar("_ModelT", bound=BaseModel)


def parse_json(model: type[_ModelT], body: bytes, max_values: int | None = None) -> _ModelT:
    """An empty body counts as ``{}``. Raises ``InvalidRequest`` naming each bad field."""
    if len(body) > MAX_JSON_BYTES:
        raise TooLarge(f"JSON body has {len(body)} bytes; limit {MAX_JSON_BYTES}")
    if max_values is not None and (count := _num_values(body)) > max_values:
        raise TooLarge(f"JSON body has some {count} values; limit {max_values}")
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise InvalidRequest(_explain(error)) from None


def _num_values(body: bytes) -> int:
    """At least as many as the parser would make, 25 bytes each where two will do here: before every
    value but the first there is one of these. Those within text count too."""
    return 1 + sum(body.count(mark) for mark in (b",", b"[", b"{", b":"))


def _explain(error: ValidationError) -> str:
    problems = error.errors(include_input=False, include_url=False, include_context=False)
    texts = [
        f"{'.'.join(str(part) for part in problem['loc'])[:200] or 'body'}: {problem['msg'][:300]}"
        for problem in problems[:_MAX_PROBLEMS]
    ]
    if len(problems) > _MAX_PROBLEMS:
        texts.append(f"and {len(problems) - _MAX_PROBLEMS} more")
    return "; ".join(texts)


# --------------------------------------------------------------------------- tensors and prompts


class TensorJson(WireModel):
    data: Annotated[ListOf[int] | ListOf[float], Field(union_mode="left_to_right")]
    dtype: Literal["float32", "int64"]
    shape: ListOf[Int64] | None = Field(None, max_length=2)
    sparse_crow_indices: ListOf[int] | None = None
    sparse_col_indices: ListOf[int] | None = None

    def to_wire(self, where: str) -> WireTensor:
        crow, col = self.sparse_crow_indices, self.sparse_col_indices
        if (crow is None) != (col is None):
            raise InvalidRequest(f"{where}: sparse_crow_indices and sparse_col_indices go together")
        return WireTensor(
            values=_array(self.data, np.dtype(self.dtype), where),
            shape=tuple(self.shape or ()),
            crow=None if crow is None else _array(crow, np.dtype(np.int64), where),
            col=None if col is None else _array(col, np.dtype(np.int64), where),
        )


class ChunkJson(WireModel):
    """``type`` is open: what is not text is refused later, by name."""

    type: Text = "encoded_text"
    tokens: ListOf[int] | None = None

    def to_wire(self, where: str) -> WireChunk:
        if self.type != "encoded_text":
            return OtherChunk(self.type[:50])
        if self.tokens is None:
            raise InvalidRequest(f"{where}.tokens is missing")
        return TextChunk(_array(self.tokens, np.dtype(np.int64), where))


class ModelInputJson(WireModel):
    chunks: ListOf[ChunkJson] = Field(max_length=MAX_CHUNKS)

    def to_wire(self, where: str) -> list[WireChunk]:
        return [chunk.to_wire(f"{where}[{index}]") for index, chunk in enumerate(self.chunks)]


def _array(numbers: list[int] | list[float], dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    if dtype.kind == "i" and any(isinstance(number, float) for number in numbers):
        raise InvalidRequest(f"{where}: int64 data must be whole numbers")
    try:
        with np.errstate(over="ignore"):
            return np.asarray(numbers, dtype)
    except OverflowError:
        raise InvalidRequest(f"{where}: a number does not fit into {dtype.name}") from None
