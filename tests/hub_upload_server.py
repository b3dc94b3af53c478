"""The writing half of a Hugging Face Hub on 127.0.0.1: create a repository, send files, commit; see hub_server.py.

It speaks what huggingface_hub speaks to a Hub without Xet storage: repos/create, validate-yaml, preupload, the LFS
batch, PUT, and a commit as lines of JSON. A card's head is refused where the real Hub refuses it: a base model that is
no repository's name, a licence it does not list.
"""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hub_server import HubServer, _Handler

__all__ = ["TOKEN", "HubUploadServer", "upload_hub"]

_LICENCES = {"apache-2.0", "mit", "creativeml-openrail-m", "openrail", "openrail++", "other"}


TOKEN = "hf_" + "write" * 6


@contextlib.contextmanager
def upload_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["HubUploadServer"]:
    """An empty hub that the client talks to while the block runs, with the token of its owner."""
    # Xet storage cannot be offered here: what it sends is the client's own business.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with HubUploadServer(folder, token=TOKEN, readers=("hf_" + "read" * 6,)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        # The client reads it once, when it is imported, and its older versions take a commit's address apart by it.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


class HubUploadServer(HubServer):
    """A hub that starts empty; what is committed lies in `folder/owner/name` and can be downloaded again.

    Args:
        folder: where repositories are kept.
        owner: whose token it takes.
        token: the one token with write access; `readers` are valid tokens without.
    """

    def __init__(self, folder: Path, *, owner: str = "ada", token: str, readers: tuple[str, ...] = ()) -> None:
        super().__init__({}, members=[token], strangers=readers, page_size=100)
        self.folder, self.owner, self.token = folder, owner, token
        self.commits: list[list[str]] = []
        self.sent: list[str] = []  # sha256 of every large file that arrived
        self._objects = folder / "objects"
        self._objects.mkdir(parents=True)
        self._server.RequestHandlerClass = type("Handler", (_Writing,), {"hub": self})

    def add_repo(self, name: str, *, private: bool) -> Path:
        """Make an empty repository."""
        path = self.folder / name
        path.mkdir(parents=True)
        self.repos[name] = path
        if private:
            self.private.add(name)
        return path


class _Writing(_Handler):
    hub: HubUploadServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.fault = self.hub.take_fault("POST", self.path)
        if self.fault and self.fault.status:
            self._send(self.fault.status, b"", self.fault.headers)
        elif (self.headers.get("Authorization") or "").removeprefix("Bearer ") != self.hub.token:
            self._refuse(403, "", "You don't have the rights to write")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            self._preupload(json.loads(body))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], body)
        else:
            self._refuse(404, "", "Not found")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = self.hub.take_fault("PUT", self.path)
        if self.fault and self.fault.status:
            self._send(self.fault.status, b"", {})
            return
        oid = self.path.rsplit("/", 1)[-1]
        if hashlib.sha256(body).hexdigest() != oid:
            self._refuse(400, "", "hash mismatch")
            return
        (self.hub._objects / oid).write_bytes(body)
        self.hub.sent.append(oid)
        self._send(200, b"", {})

    def _json(self, status: int, data: Any) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or self.hub.owner}/{asked['name']}"
        if not name.startswith(f"{self.hub.owner}/"):
            self._refuse(403, "", "You don't have the rights to create a model under this namespace")
        elif name in self.hub.repos:
            self._json(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        else:
            # Clients before 1.0 say `private`, later ones `visibility`.
            self.hub.add_repo(name, private=bool(asked.get("private")) or asked.get("visibility") == "private")
            self._json(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _validate(self, content: str) -> None:
        head = dict(re.findall(r"^(\w+): \"?([^\"\n]*)\"?$", content.split("---")[1], re.MULTILINE))
        errors = []
        if "base_model" in head and not re.fullmatch(r"[\w.-]+/[\w.-]+", head["base_model"]):
            errors.append({"message": f'"base_model" with value "{head["base_model"]}" is not valid.'})
        if head.get("license") not in _LICENCES:
            errors.append({"message": '"license" must be one of [...]'})
        self._json(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, asked: dict[str, Any]) -> None:
        large = (".safetensors", ".bin", ".png", ".ckpt")  # as a new repository's .gitattributes has them
        files = [
            {
                "path": item["path"],
                "uploadMode": "lfs" if item["path"].endswith(large) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for item in asked["files"]
        ]
        self._json(200, {"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if not (self.hub._objects / item["oid"]).exists():
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(entry)
        self._json(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, body: bytes) -> None:
        names = []
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                data = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                data = (self.hub._objects / value["oid"]).read_bytes()
            else:
                continue
            path = self.hub.repos[repo] / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            names.append(value["path"])
        self.hub.commits.append(names)
        oid = self.hub.commit(repo)
        self._json(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})
