"""The hub mirror, asked by the real huggingface_hub and transformers over a real socket."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tokenizers import Tokenizer

from tests.models.test_client_cache import load_as_client
from tests.servers import REPOSITORY, clean_environment
from training.cli.serve import listening_socket
from training.config import EMBEDDED_MODEL, HubConfig, ModelConfig, TrainingConfig
from training.models.hub import LLAMA_3_TOKENIZER, HubMirror
from training.routers.hub import hub_router

TINY = "tests/tiny"
TINY_CONFIG = {
    "architectures": ["TinyForCausalLM"],
    "vocab_size": 8,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG))
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def mirror(embedded_model: Path, tiny_model: Path, serve_weights: bool) -> HubMirror:
    models = (
        ModelConfig(name=EMBEDDED_MODEL, path=embedded_model),
        ModelConfig(name="meta-llama/Llama-3.2-1B", path=embedded_model),
        ModelConfig(name=TINY, path=tiny_model),
        ModelConfig(name="tests/absent"),
        ModelConfig(name="tests/fake", backend="fake"),
    )
    hub = HubConfig(serve_weights=serve_weights)
    return HubMirror(TrainingConfig(supported_models=models, hub=hub))


@pytest.fixture(scope="module")
def base_url(embedded_model: Path, tiny_model: Path) -> Iterator[str]:
    """A server of the mirror alone, and of one with weights below ``/weights``."""
    app, with_weights = FastAPI(), FastAPI()
    app.include_router(hub_router(mirror(embedded_model, tiny_model, serve_weights=False)))
    with_weights.include_router(hub_router(mirror(embedded_model, tiny_model, serve_weights=True)))
    app.mount("/weights", with_weights)
    with listening_socket("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{base_url}/hf") as client:
        yield client


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own process is offline; these requests go to loopback."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_a_client_with_an_empty_cache_gets_tokenizer_and_config(
    base_url: str, embedded_model: Path, tmp_path: Path
) -> None:
    loaded = load_as_client(tmp_path, {"HF_ENDPOINT": f"{base_url}/hf"})
    tokenizer = Tokenizer.from_file(str(embedded_model / "tokenizer.json"))
    assert loaded["tokens"] == tokenizer.encode("in 2024, <|im_end|>").ids
    assert (loaded["model_type"], loaded["eos"]) == ("llama", 2)
    assert not list(tmp_path.rglob("*.safetensors"))
    # Everything is now in the client's cache, what is absent included.
    assert load_as_client(tmp_path, {"HF_HUB_OFFLINE": "1"}) == loaded


@pytest.mark.usefixtures("online")
def test_the_hub_client_lists_and_describes(base_url: str, embedded_model: Path) -> None:
    api = HfApi(endpoint=f"{base_url}/hf", token=False)
    info = api.model_info(EMBEDDED_MODEL)
    assert info.id == EMBEDDED_MODEL
    assert api.model_info(EMBEDDED_MODEL, revision=info.sha).sha == info.sha
    files = api.list_repo_files(EMBEDDED_MODEL)
    assert "tokenizer.json" in files
    assert "prepared.json" not in files
    found = api.get_paths_info(EMBEDDED_MODEL, ["config.json", "nothing.json"])
    assert [entry.path for entry in found] == ["config.json"]
    assert api.file_exists(EMBEDDED_MODEL, "config.json")
    assert not api.file_exists(EMBEDDED_MODEL, "nothing.json")


@pytest.mark.usefixtures("online")
def test_errors_are_the_ones_clients_know(base_url: str, tmp_path: Path) -> None:
    def download(name: str, file: str, revision: str | None = None) -> None:
        endpoint = f"{base_url}/hf"
        hf_hub_download(name, file, revision=revision, endpoint=endpoint, cache_dir=tmp_path)

    with pytest.raises(RemoteEntryNotFoundError):
        download(EMBEDDED_MODEL, "nothing.json")
    with pytest.raises(RevisionNotFoundError):
        download(EMBEDDED_MODEL, "config.json", revision="refs/pr/1")
    for name in ("tests/unknown", "tests/absent", "tests/fake"):
        with pytest.raises(RepositoryNotFoundError):
            download(name, "config.json")


@pytest.mark.usefixtures("online")
def test_weights_only_where_configured(base_url: str, embedded_model: Path, tmp_path: Path) -> None:
    name = "model.safetensors"
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(EMBEDDED_MODEL, name, endpoint=f"{base_url}/hf", cache_dir=tmp_path)
    endpoint = f"{base_url}/weights/hf"
    path = hf_hub_download(EMBEDDED_MODEL, name, endpoint=endpoint, cache_dir=tmp_path)
    assert Path(path).stat().st_size == (embedded_model / name).stat().st_size


def test_another_server_prepares_its_model_from_here(base_url: str, tmp_path: Path) -> None:
    environment = clean_environment() | {
        "HF_ENDPOINT": f"{base_url}/weights/hf",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(REPOSITORY),
    }

    def tinkercloud(*arguments: str) -> str:
        command = [sys.executable, "-m", "training.cli", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert f"{TINY}: ready in {tmp_path}" in tinkercloud("models", "prepare", TINY)
    assert "TinyForCausalLM, vocabulary of 8, 16 tokens" in tinkercloud(
        "models", "list", "--model", TINY
    )


def test_head_and_get_agree(client: httpx.Client, embedded_model: Path) -> None:
    url = f"{EMBEDDED_MODEL}/resolve/main/tokenizer.json"
    head, got = client.head(url), client.get(url)
    content = (embedded_model / "tokenizer.json").read_bytes()
    assert (head.status_code, head.content) == (200, b"")
    assert got.content == content
    assert head.headers["content-length"] == str(len(content))
    for header in ("etag", "x-repo-commit"):
        assert head.headers[header] == got.headers[header]


def test_llama_3_tokenizers_are_where_the_sdk_looks(client: httpx.Client) -> None:
    found = client.get(f"{LLAMA_3_TOKENIZER}/resolve/main/tokenizer.json")
    assert found.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "../SmolLM2-135M-Instruct/config.json",
        "..%2F..%2F..%2Fpyproject.toml",
        "%2Fetc%2Fpasswd",
        "prepared.json",
        "model.safetensors",
        "config.json/",
        ".",
        "%0DX-Injected:%20yes",
        "%E6%97%A5.json",
    ],
)
def test_nothing_else_can_be_reached(base_url: str, path: str) -> None:
    # Sent raw: an HTTP library would tidy the path up first.
    host, port = base_url.removeprefix("http://").split(":")
    target = f"/hf/{EMBEDDED_MODEL}/resolve/main/{path}"
    with httpx.Client() as client:
        request = client.build_request("GET", f"http://{host}:{port}/")
        request.extensions["target"] = target.encode()
        response = client.send(request)
    assert response.status_code == 404
    assert response.headers["x-error-code"] == "EntryNotFound"
    assert "x-injected" not in response.headers


def test_folders_are_listed_like_the_hub_does(tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    templates = tmp_path / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ messages }}")
    config = {"vocab_size": 8, "max_position_embeddings": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    app = FastAPI()
    model = ModelConfig(name="tests/model", path=tmp_path)
    app.include_router(hub_router(HubMirror(TrainingConfig(supported_models=(model,)))))
    client = TestClient(app)
    tree = "/hf/api/models/tests/model/tree/main"
    assert [(e["type"], e["path"]) for e in client.get(tree).json()] == [
        ("directory", "additional_chat_templates"),
        ("file", "config.json"),
    ]
    inside = client.get(f"{tree}/additional_chat_templates").json()
    assert [e["path"] for e in inside] == ["additional_chat_templates/tools.jinja"]
    everything = client.get(tree, params={"recursive": "true"}).json()
    assert {e["path"] for e in everything if e["type"] == "file"} == {
        "config.json",
        "additional_chat_templates/tools.jinja",
    }
    missing = client.get(f"{tree}/nothing")
    assert missing.headers["x-error-code"] == "EntryNotFound"
    assert missing.headers["x-repo-commit"]
