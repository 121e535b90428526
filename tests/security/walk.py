"""Requests to every route of the OpenAPI page, filled with chosen ids.

A route added later is walked without a change here, unless it speaks of a new kind of id: then
``UnknownField`` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx

from tests.e2e.raw import PROTOBUF, request

Ids = Mapping[str, str]
ID_FIELDS = (
    "session_id",
    "model_id",
    "run_id",
    "sampling_session_id",
    "request_id",
    "path",
    "tinker_path",
    "model_path",
    "source_path",
)
_HEX_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}")


class UnknownField(Exception):
    """A parameter that has no id here: add it to ``ID_FIELDS`` or ``FIXED``."""


FIXED: Mapping[str, Any] = {
    "kind": "weights",
    "name": "mine",
    "file": "manifest.json",
    "base_model": "tests/tiny",
    "limit": 5,
    "offset": 0,
    "expires": "9" * 10,
    "signature": "0" * 64,
    "ttl_seconds": 7200,
    "num_samples": 1,
    "timeout": 0,
    "chunks": [{"type": "encoded_text", "tokens": [1, 2]}],
    "sampling_params": {"max_tokens": 1, "temperature": 0.0},
}


@dataclass(frozen=True)
class Route:
    base_url: str
    method: str
    path: str
    parameters: tuple[str, ...]
    body: Mapping[str, Any] | None
    """Its JSON schema; None where there is none."""
    is_protobuf: bool
    wants_key: bool
    schemas: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    def id_fields(self) -> list[str]:
        """The fields of path and body that name something."""
        if self.is_protobuf:
            return ["model_id"]
        return sorted(set(self.parameters) & set(ID_FIELDS) | set(self._body_fields(self.body)))

    def _body_fields(self, schema: Mapping[str, Any] | None) -> Iterator[str]:
        for name, value in self._properties(schema).items():
            if name in ID_FIELDS:
                yield name
            else:
                yield from self._body_fields(value)

    def request(self, ids: Ids, seq: int) -> dict[str, Any]:
        """Arguments of ``httpx.Client.request``; ``seq`` goes wherever a number is wanted."""
        filled = self.path
        for name in re.findall(r"{(\w+)}", self.path):
            if name not in ids and name not in FIXED:
                raise UnknownField(f"{self}: {name}")
            filled = filled.replace(f"{{{name}}}", str(ids.get(name, FIXED.get(name))))
        query = {name: FIXED[name] for name in self.parameters if f"{{{name}}}" not in self.path}
        found: dict[str, Any] = {
            "method": self.method,
            "url": self.base_url + filled,
            "params": query,
        }
        if self.is_protobuf:
            body = request(ids["model_id"], seq).SerializeToString()
            return found | {"content": body, "headers": {"Content-Type": PROTOBUF}}
        if self.body is not None:
            found["json"] = self._example(self.body, ids, seq)
        return found

    def _properties(self, schema: Mapping[str, Any] | None) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._resolved(schema or {}).get("properties", {})
        return found

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        if "$ref" in schema:
            resolved: Mapping[str, Any] = self.schemas[schema["$ref"].rsplit("/", 1)[1]]
            return resolved
        for option in schema.get("anyOf", ()):
            if option.get("type") != "null":
                return self._resolved(option)
        return schema

    def _example(self, schema: Mapping[str, Any], ids: Ids, seq: int) -> dict[str, Any]:
        """Ids where they have a name here, numbers ``seq``, and what is required."""
        required = self._resolved(schema).get("required", ())
        example: dict[str, Any] = {}
        for name, value in self._properties(schema).items():
            resolved = self._resolved(value)
            if name in ids or name in FIXED:
                example[name] = ids.get(name, FIXED.get(name))
            elif name.endswith("seq_id"):
                example[name] = seq
            elif resolved.get("type") == "object" and name in required:
                example[name] = self._example(resolved, ids, seq)
            elif name in required:
                raise UnknownField(f"{self}: {name}")
        return example


def routes(base_url: str) -> list[Route]:
    """Of a server; without the hub mirror's, which know no tenants."""
    openapi = httpx.get(f"{base_url}/openapi.json").json()
    found = []
    for path, operations in openapi["paths"].items():
        if path.startswith("/hf/"):
            continue
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            found.append(
                Route(
                    base_url=base_url,
                    method=method.upper(),
                    path=path,
                    parameters=tuple(
                        item["name"]
                        for item in operation.get("parameters", ())
                        if item["in"] in ("path", "query")
                    ),
                    body=content.get("application/json", {}).get("schema"),
                    is_protobuf=PROTOBUF in content,
                    wants_key="security" in operation,
                    schemas=openapi["components"]["schemas"],
                )
            )
    return found


def ghost(text: str) -> str:
    """An id of the same form that was never given out."""
    turned = str.maketrans("0123456789abcdef", "123456789abcdef0")
    return _HEX_ID.sub(lambda match: match.group().translate(turned), text)


class Said(NamedTuple):
    status: int
    text: str
    headers: list[str]

    def without_new_ids(self) -> Said:
        """What two answers that made something each have in common."""
        return self._replace(text=_HEX_ID.sub("NEW", self.text))


def said(answer: httpx.Response, ids: Ids) -> Said:
    """What an answer tells whoever knows the ids that were sent."""
    text = answer.text
    for value in sorted(ids.values(), key=len, reverse=True):
        text = text.replace(value, "SENT")
    return Said(answer.status_code, text, sorted(answer.headers))
