"""
A loopback stand-in for the Hub: the endpoints that huggingface_hub uses for a model repository, over real HTTP.

It stores real bytes: regular files come in commits, large ones by the LFS protocol, whose hash and size it checks.
Metadata of a model card that names a path in place of a repository gets status 400. The name of a repository decides
how the server behaves, so that one client process can meet every behaviour:

- `refusing`: uploads get status 500.
- `forbidden`: uploads get status 403.
- `silent`: uploads get no answer until the client gives up.
- `stalling`: large files get no answer until the client gives up.
- `recovering`: the first upload gets status 503 on all six tries that huggingface_hub makes; later ones pass.
- `gone`: after the first commit, connections are closed without an answer.
- `mute`: what reads gets no answer until the client gives up.
- `moving`: whenever the newest commit was read, another one follows.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".pt", ".bin", ".png")
REPOSITORY_NAME = re.compile(r"([\w-]+/)?[\w.-]+")
METADATA = re.compile(r"---\n(.*?)\n---", re.DOTALL)


class Repository:
    """Commits of one repository, oldest first: `(id, title, {path: content})`."""

    def __init__(self, name: str):
        self.name = name
        self.upload_requests = 0
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []
        self.lock = threading.Lock()
        self.upcoming: list[dict[str, bytes]] = []  # the next commits of `moving`
        self.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, ())

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2]

    @property
    def titles(self) -> list[str]:
        return [title for _, title, _ in self.commits]

    def commit(self, title: str, added: dict[str, bytes], deleted) -> str:
        with self.lock:
            files = {**(self.commits[-1][2] if self.commits else {}), **added}
            files = {path: content for path, content in files.items() if path not in deleted}
            digest = hashlib.sha1(f"{len(self.commits)} {title}".encode())
            for path in sorted(files):
                digest.update(path.encode() + hashlib.sha1(files[path]).digest())
            self.commits.append((digest.hexdigest(), title, files))
            return digest.hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1][0], self.files
        return next(((oid, files) for oid, _, files in self.commits if oid == revision), None)


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def metadata_errors(card: str) -> list[str]:
    """What the Hub finds wrong with the metadata of a card: names that no model and no data set can have."""
    found = METADATA.match(card)
    metadata = yaml.safe_load(found[1]) if found else {}
    errors = []
    for field in ("base_model", "datasets"):
        values = metadata.get(field) or []
        for value in [values] if isinstance(values, str) else values:
            if not REPOSITORY_NAME.fullmatch(value):
                errors.append(f'"{field}" with value "{value}" is not valid.')
    return errors


def blob_id(content: bytes) -> str:
    """The id that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """Use as a context manager. `url` goes into `HF_ENDPOINT`; `repositories` maps names to [`Repository`]."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # LFS objects by their sha256
        self.requests: list[str] = []  # "POST /api/..." in order
        self.release = threading.Event()  # ends the waits of `silent`
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that give up are part of the tests
        port = self._server.server_address[1]
        self.url, self.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def add(self, repository: str, files: dict[str, bytes]) -> Repository:
        """A repository that someone else has pushed to."""
        self.repositories[repository] = Repository(repository)
        self.repositories[repository].commit("files", files, ())
        return self.repositories[repository]

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self):
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {address.path}")
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        match parts:
            case ["api", "repos", "create"]:
                self._create(**json.loads(self.body))
            case ["api", "validate-yaml"]:
                errors = metadata_errors(json.loads(self.body)["content"])
                messages = [{"message": error} for error in errors]
                self._json({"errors": messages, "warnings": []}, 400 if errors else 200)
            case ["api", "models", user, name, "preupload", _]:
                self._uploading(user, name, self._preupload)
            case ["api", "models", user, name, "commit", _]:
                self._uploading(user, name, self._commit)
            case ["api", "models", user, name, "tree", revision, *_]:
                self._reading(user, name, revision, self._tree)
            case ["api", "models", user, name]:
                self._reading(user, name, "main", self._info)
            case ["api", "models", user, name, "revision", revision]:
                self._reading(user, name, revision, self._info)
            case [user, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self._uploading(user, name.removesuffix(".git"), self._lfs_batch)
            case ["lfs", oid]:
                self._lfs_object(oid)
            case ["stalled", _]:
                self._never()
            case [user, name, "resolve", revision, *path]:
                self._reading(user, name, revision, lambda *at: self._resolve(*at, "/".join(path)))
            case _:
                self._json({"error": f"no such endpoint here: {self.command} {self.path}"}, 501)

    # -------------------------------------------------------------------------------------------------------- answers

    def _json(self, value, status: int = 200, **headers: str):
        self._bytes(json.dumps(value).encode(), status, **{"Content-Type": "application/json", **headers})

    def _bytes(self, content: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _never(self):
        self.hub.release.wait()
        self.close_connection = True

    def _uploading(self, user: str, name: str, answer):
        repository = self.hub.repositories.get(f"{user}/{name}")
        if repository is None:
            return self._json({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        repository.upload_requests += 1
        if name.startswith("refusing"):
            self._json({"error": "Internal Error"}, 500)
        elif name.startswith("forbidden"):
            self._json({"error": "You have no write access"}, 403)
        elif name.startswith("silent"):
            self._never()
        elif name.startswith("recovering") and repository.upload_requests <= 6:
            self._json({"error": "Service unavailable"}, 503)
        elif name.startswith("gone") and len(repository.commits) > 2:
            self.close_connection = True
        else:
            answer(repository)

    def _reading(self, user: str, name: str, revision: str, answer):
        repository = self.hub.repositories.get(f"{user}/{name}")
        if repository is None:
            self._json({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        elif (found := repository.at(revision)) is None:
            self._json({"error": "Invalid rev id"}, 404, **{"X-Error-Code": "RevisionNotFound"})
        elif name.startswith("mute"):
            self._never()
        else:
            answer(f"{user}/{name}", *found)
            if name.startswith("moving") and revision == "main" and repository.upcoming:
                repository.commit("and on", repository.upcoming.pop(0), ())

    # ------------------------------------------------------------------------------------------------------ endpoints

    def _create(self, name: str, organization: str | None = None, **_):
        full_name = f"{organization or 'tester'}/{name}"
        status = 409 if full_name in self.hub.repositories else 200
        self.hub.repositories.setdefault(full_name, Repository(full_name))
        self._json({"url": f"{self.hub.url}/{full_name}", "name": full_name}, status)

    def _preupload(self, repository: Repository):
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if is_lfs(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": self._remote_oid(repository, file["path"]),
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    @staticmethod
    def _remote_oid(repository: Repository, path: str) -> str | None:
        content = repository.files.get(path)
        if content is None:
            return None
        return hashlib.sha256(content).hexdigest() if is_lfs(path) else blob_id(content)

    def _lfs_batch(self, repository: Repository):
        stalling = "stalling" in repository.name
        objects = []
        for item in json.loads(self.body)["objects"]:
            if stalling or item["oid"] not in self.hub.blobs:
                href = f"{self.hub.url}/{'stalled' if stalling else 'lfs'}/{item['oid']}"
                item = {**item, "actions": {"upload": {"href": href}, "verify": {"href": href}}}
            objects.append(item)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_object(self, oid: str):
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self._json({"error": "the content is not what its hash says"}, 400)
            self.hub.blobs[oid] = self.body
            return self._json({})
        if self.command == "POST":  # verify
            stored = self.hub.blobs.get(oid)
            complete = stored is not None and len(stored) == json.loads(self.body)["size"]
            return self._json({}, 200 if complete else 404)
        self._bytes(self.hub.blobs[oid])

    def _commit(self, repository: Repository):
        title, added, deleted = "", {}, []
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self._json({"error": f"LFS object {value['oid']} was never uploaded"}, 400)
                added[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                deleted.append(value["path"])
        if errors := metadata_errors(added.get("README.md", b"").decode()):
            return self._json({"error": errors[0]}, 400)
        oid = repository.commit(title, added, deleted)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repository.name}/commit/{oid}"})

    def _info(self, name: str, oid: str, files: dict[str, bytes]):
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._json({"_id": oid, "id": name, "modelId": name, "sha": oid, "tags": [], "siblings": siblings})

    def _tree(self, name: str, oid: str, files: dict[str, bytes]):
        entries = []
        for path, content in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if is_lfs(path):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, name: str, oid: str, files: dict[str, bytes], path: str):
        if path not in files:
            return self._json({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
        content = files[path]
        self.hub.blobs.setdefault(hashlib.sha256(content).hexdigest(), content)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob_id(content)}"'}
        if not is_lfs(path):
            return self._bytes(content, **headers)
        # As the Hub does: on another host (where the client does not follow while it asks for the headers), with the
        # facts about the file in the redirection.
        sha256 = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        self._bytes(b"", 302, Location=f"{self.hub.storage_url}/lfs/{sha256}", **headers)
