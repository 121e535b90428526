"""Links to checkpoint files: what they open, and everything that they do not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

import httpx
import pytest

from tests.e2e.raw import Raw, request
from tests.servers import Server, running_server
from training.core.ids import CheckpointKind, TinkerPath
from training.core.signing import Link, Signer
from training.services.downloads import SIGNING_KEY_FILE

STRANGER = httpx.Client(timeout=60.0)
"""Sends no key, as the SDK's downloads do not."""


class Saved(NamedTuple):
    raw: Raw
    model_id: str
    urls: dict[str, str]

    @property
    def file(self) -> str:
        return max(self.urls)

    @property
    def url(self) -> str:
        return self.urls[self.file]


def save(raw: Raw, model_id: str, seq: int, name: str = "mine", **options: object) -> None:
    body = {"model_id": model_id, "seq_id": seq, "path": name} | options
    saved = raw.retrieve(raw.post("/save_weights", body).json()["request_id"])
    assert "path" in saved.json(), saved.text


def files_of(raw: Raw, model_id: str, name: str = "mine") -> httpx.Response:
    path = f"/training_runs/{model_id}/checkpoints/weights/{name}/files"
    return raw.checked(raw.http.get(path))


@pytest.fixture
def saved(fake_server: Server) -> Iterator[Saved]:
    with Raw(fake_server) as raw:
        model_id = raw.new_model()
        raw.retrieve(raw.forward_backward(request(model_id, 1)))
        save(raw, model_id, 2)
        yield Saved(raw, model_id, files_of(raw, model_id).json()["urls"])


def changed(url: str, path: tuple[str, str] = ("", ""), **query: str | None) -> str:
    parts = urlsplit(url)
    values = {key: found[0] for key, found in parse_qs(parts.query).items()} | query
    kept = {key: value for key, value in values.items() if value is not None}
    return urlunsplit(parts._replace(path=parts.path.replace(*path), query=urlencode(kept)))


def refused(url: str, method: str = "GET") -> int:
    answer = STRANGER.request(method, url)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["detail"]
    return answer.status_code


def test_a_link_needs_no_key_and_works_until_it_expires(saved: Saved, fake_server: Server) -> None:
    on_disk = {
        path.name: path.read_bytes()
        for path in (fake_server.directory / "checkpoints").rglob("*")
        if path.is_file() and path.name in saved.urls
    }
    assert len(saved.urls) >= 1
    assert set(saved.urls) == set(on_disk)
    for url in saved.urls.values():
        assert url.startswith(fake_server.base_url)
        whole = STRANGER.get(url)
        assert whole.status_code == 200
        assert int(whole.headers["content-length"]) == len(whole.content) > 0
        assert whole.headers["cache-control"] == "no-store"
        assert whole.headers["content-disposition"].startswith("attachment")
        part = STRANGER.get(url, headers={"Range": "bytes=1-3"})
        assert (part.status_code, part.content) == (206, whole.content[1:4])
        # Used again within its life it works again: that is what it is for.
        assert STRANGER.get(url).content == whole.content


def test_nothing_about_a_link_can_be_changed(saved: Saved) -> None:
    url = saved.url
    expires, signature = (parse_qs(urlsplit(url).query)[key][0] for key in ("expires", "signature"))
    flipped = signature[:-1] + ("0" if signature[-1] != "0" else "1")
    altered = [
        changed(url, signature=flipped),
        changed(url, signature=signature.upper()),
        changed(url, signature=""),
        changed(url, signature=None),
        changed(url, expires=str(int(expires) + 1)),
        changed(url, expires="9" * 12),
        changed(url, expires="9" * 40),
        changed(url, expires="-1"),
        changed(url, expires="0" + expires + "0"),
        changed(url, expires=None),
        changed(url, (saved.file, "manifest.json")),
        changed(url, (saved.file, "")),
        changed(url, ("/weights/", "/sampler_weights/")),
        changed(url, ("/mine/", "/other/")),
        changed(url, (saved.model_id, "none:train:0")),
        changed(url, (saved.file, "%2e%2e%2f%2e%2e%2ffutures.db")),
        changed(url, (saved.file, "..%2F..%2F..%2Fetc%2Fpasswd")),
        changed(url, (saved.file, "%2Fetc%2Fpasswd")),
        changed(url, (saved.file, saved.file + "%00")),
        changed(url, (saved.file, "x" * 5000)),
    ]
    assert {refused(link) for link in altered} <= {400, 404}
    for method in ("PUT", "POST", "DELETE", "PATCH"):
        assert refused(url, method) == 405
    assert STRANGER.head(url).status_code == 405
    assert STRANGER.get(url).status_code == 200


def test_one_files_signature_opens_no_other(saved: Saved) -> None:
    save(saved.raw, saved.model_id, 3, name="second")
    others = files_of(saved.raw, saved.model_id, "second").json()["urls"]
    for name, url in others.items():
        signature = parse_qs(urlsplit(url).query)["signature"][0]
        assert refused(changed(saved.urls[name], signature=signature)) == 404
    manifest = changed(saved.url, (saved.file, "manifest.json"))
    assert refused(manifest) == 404


def test_a_link_ends_with_its_time(saved: Saved, fake_server: Server) -> None:
    key = (fake_server.directory / "metadata" / SIGNING_KEY_FILE).read_bytes()
    path = TinkerPath(saved.model_id, CheckpointKind.TRAINING, "mine")
    owner = saved.raw.http.get(f"/training_runs/{saved.model_id}").json()["model_owner"]
    (directory,) = [
        file.parent.name
        for file in (fake_server.directory / "checkpoints").glob(f"*/{saved.file}")
        if file.read_bytes() == STRANGER.get(saved.url).content
        and _signs(key, owner, str(path), file.parent.name, saved)
    ]
    for expires_s, status in ((int(time.time()) - 1, 410), (int(time.time()) + 60, 200)):
        link = Link("GET", owner, str(path), directory, saved.file, expires_s)
        signature = Signer(key).sign(link)
        url = changed(saved.url, expires=str(expires_s), signature=signature)
        assert STRANGER.get(url).status_code == status


def _signs(key: bytes, owner: str, path: str, directory: str, saved: Saved) -> bool:
    query = parse_qs(urlsplit(saved.url).query)
    link = Link("GET", owner, path, directory, saved.file, int(query["expires"][0]))
    return Signer(key).is_genuine(link, query["signature"][0])


def test_a_link_dies_with_what_it_led_to(saved: Saved) -> None:
    save(saved.raw, saved.model_id, 3, overwrite=True)
    assert refused(saved.url) == 404
    newer = files_of(saved.raw, saved.model_id).json()["urls"][saved.file]
    assert STRANGER.get(newer).status_code == 200
    path = f"/training_runs/{saved.model_id}/checkpoints/weights/mine"
    assert saved.raw.http.delete(path).status_code == 204
    assert refused(newer) == 404
    save(saved.raw, saved.model_id, 4)  # the same name again
    assert refused(newer) == 404


def test_only_the_owner_gets_links(saved: Saved, fake_server: Server) -> None:
    with Raw(fake_server, fake_server.other_key) as thief:
        missing = files_of(thief, "none:train:0")
        stolen = files_of(thief, saved.model_id)
        assert (stolen.status_code, missing.status_code) == (404, 404)
    path = urlsplit(saved.url).path.rsplit("/", 1)[0]
    assert STRANGER.get(fake_server.base_url + path).status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000"])
def test_a_host_header_fools_nobody_else(saved: Saved, host: str) -> None:
    path = f"/training_runs/{saved.model_id}/checkpoints/weights/mine/files"
    fooled = saved.raw.http.get(path, headers={"Host": host})
    assert set(fooled.json()["urls"]) == set(saved.urls)
    assert fooled.headers["cache-control"] == "no-store"
    again = files_of(saved.raw, saved.model_id).json()["urls"]
    assert all("evil" not in url for url in again.values())


@pytest.mark.parametrize("host", ['evil"><script>', "a b", "a/b?c", "user@evil"])
def test_a_host_header_that_is_no_host_is_ignored(
    saved: Saved, fake_server: Server, host: str
) -> None:
    path = f"/training_runs/{saved.model_id}/checkpoints/weights/mine/files"
    answer = saved.raw.checked(saved.raw.http.get(path, headers={"Host": host})).json()
    assert all(url.startswith(fake_server.base_url) for url in answer["urls"].values())


def test_a_configured_address_wins_over_the_host_header(tmp_path: Path) -> None:
    settings = {"server": {"public_url": "https://tinker.example.org/base/"}}
    with running_server(tmp_path, settings) as server, Raw(server) as raw:
        model_id = raw.new_model()
        save(raw, model_id, 1)
        path = f"/training_runs/{model_id}/checkpoints/weights/mine/files"
        answer = raw.http.get(path, headers={"Host": "evil.example"}).json()
        for url in answer["urls"].values():
            assert url.startswith("https://tinker.example.org/base/api/v1/training_runs/")
            here = url.replace("https://tinker.example.org/base", server.base_url)
            assert STRANGER.get(here).status_code == 200
