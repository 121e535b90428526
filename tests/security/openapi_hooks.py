"""What schemathesis needs to get past the door: bodies of our protobuf route, ids that exist.

Loaded by its command through ``SCHEMATHESIS_HOOKS``; ``KNOWN_IDS`` holds the ids, as JSON.
"""

from __future__ import annotations

import json
import os
from typing import Any

import schemathesis
from schemathesis.generation import GenerationMode

KNOWN_IDS: dict[str, str] = json.loads(os.environ.get("KNOWN_IDS", "{}"))
_SPARED = "/finish"
"""The session and its models are to live until the end."""


@schemathesis.serializer("application/x-protobuf")
def protobuf(context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value, default=str).encode()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Every second well-formed request speaks of things that exist."""
    if case.meta is None or case.meta.generation.mode != GenerationMode.POSITIVE:
        return
    if sum(case.id.encode()) % 2 or case.path.endswith(_SPARED):
        return
    for values in (case.path_parameters, case.body):
        if isinstance(values, dict):
            _replace(values)


def _replace(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _replace(value)
        elif key in KNOWN_IDS and isinstance(value, str):
            values[key] = KNOWN_IDS[key]
