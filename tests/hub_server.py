"""A Hub on this machine: what the real ``huggingface_hub`` client needs of the Hub's HTTP protocol, in one process.

    with HubServer() as hub:
        hub.put("someone/model", {"config.json": b"{}"})
        subprocess.run([...], env={**os.environ, **hub.environment(home)})
        hub.files("someone/model")  # what was pushed: path -> bytes

The client reads ``HF_ENDPOINT`` when it is imported, so it runs in a process of its own.
``hub.faults`` makes requests fail: ``{"lfs": "cut"}`` drops the connection, ``{"commit": 403}`` answers with a status,
``{"commit": "lost"}`` does what was asked and then drops the connection, ``{"preupload": "race"}`` has someone else
commit first. The client's process can set them, and see the state, at ``/test/faults`` and ``/test/state``.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_metadata import metadata_errors

USER, TOKEN = "someone", "hf_tokenOfSomeone"
OTHER_USER, OTHER_TOKEN = "another", "hf_tokenOfAnother"
_LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".pt")


@dataclass
class Commit:
    oid: str
    title: str
    parent: str | None
    files: dict[str, bytes]
    author: str


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "main", other branches, "refs/pr/1"

    def resolve(self, revision: str) -> Commit:
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def add(self, title: str, parent: str | None, files: dict[str, bytes], author: str) -> str:
        content = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
        seed = json.dumps([title, parent, content, len(self.commits)])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, parent, files, author)
        return oid


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Cut(Exception):
    """The connection breaks."""


class HubServer:
    """The server and its state; a context manager. Methods without a token act as the machine's owner."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.users = {TOKEN: USER, OTHER_TOKEN: OTHER_USER}
        self.faults: dict[str, int | str] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def environment(self, home: Path | str, token: str | None = TOKEN) -> dict[str, str]:
        """Variables for a process whose client is to talk to this server, with its cache and token under ``home``."""
        values = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return values

    def put(self, repo_id: str, files: dict[str, bytes | None], private: bool = False, revision: str = "main") -> str:
        """Commit files as they are (None deletes one), in a new repository if need be; returns the commit's id."""
        with self.lock:
            repository = self.repositories.get(repo_id) or self._create(repo_id, private)
            head = repository.resolve(revision)
            kept = {**head.files, **files}
            kept = {path: data for path, data in kept.items() if data is not None}
            repository.refs[revision] = repository.add("put", head.oid, kept, USER)
            return repository.refs[revision]

    def put_folder(self, repo_id: str, folder: Path, **options: Any) -> str:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.put(repo_id, files, **options)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds, without the ``.gitattributes`` that every repository is born with."""
        files = self.repositories[repo_id].resolve(revision).files
        return {path: data for path, data in files.items() if path != ".gitattributes"}

    def log(self, repo_id: str, revision: str = "main") -> list[str]:
        """The titles of a revision's commits, newest first, without the first one."""
        repository, titles = self.repositories[repo_id], []
        commit = repository.resolve(revision)
        while commit.parent is not None:
            titles.append(commit.title)
            commit = repository.commits[commit.parent]
        return titles

    def state(self) -> dict[str, Any]:
        """All that a push may change, for comparisons: visibility and refs of every repository."""
        return {name: (repository.private, dict(repository.refs)) for name, repository in self.repositories.items()}

    def _create(self, repo_id: str, private: bool) -> Repository:
        repository = Repository(private)
        repository.refs["main"] = repository.add(
            "initial commit", None, {".gitattributes": b"*.safetensors lfs\n"}, USER
        )
        self.repositories[repo_id] = repository
        return repository


class _Handler(BaseHTTPRequestHandler):
    """One request: routes it, and turns what is raised into an answer."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # -- plumbing ------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.route, self.query = split.path, {key: values[0] for key, values in parse_qs(split.query).items()}
        self.hub.requests.append(f"{self.command} {self.path}")
        self.commit_header: str | None = None
        try:
            body = self._body()
            for method, pattern, name in _ROUTES:
                match = re.fullmatch(pattern, self.route)
                if match and self.command in method.split():
                    status, headers, data = self._with_faults(name, [unquote(g or "") for g in match.groups()], body)
                    break
            else:
                raise Refused(404, "", f"no such endpoint: {self.command} {self.route}")
        except Refused as refused:
            status, data = refused.status, json.dumps({"error": refused.message}).encode()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            headers = {key: value for key, value in headers.items() if value}
        except Cut:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)
            return
        self._answer(status, headers, data)

    def _with_faults(self, name: str, groups: list[str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        fault = self.hub.faults.get(name)
        if fault == "cut":
            raise Cut
        if isinstance(fault, int):
            raise Refused(fault, "", "refused by the test")
        if fault == "race":
            self.hub.put(groups[0], {"other.txt": b"someone else's"})
        with self.hub.lock:
            answer = getattr(self, f"_{name}")(*groups, body)
        if fault == "lost":
            raise Cut
        return answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        if self.commit_header:
            headers = {"X-Repo-Commit": self.commit_header, **headers}
        for key, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- who may do what -----------------------------------------------------------------------------------------------

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _readable(self, repo_id: str) -> Repository:
        user, repository = self._user(), self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != repo_id.split("/")[0]):
            if user is None:
                raise Refused(401, "RepoNotFound", "Invalid username or password.")
            raise Refused(404, "RepoNotFound", "Repository not found")
        return repository

    def _writable(self, repo_id: str, as_pr: bool = False) -> Repository:
        repository, user = self._readable(repo_id), self._user()
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        if user != repo_id.split("/")[0] and not as_pr:
            raise Refused(403, "", f"You don't have the rights to write to {repo_id}")
        return repository

    # -- for tests -----------------------------------------------------------------------------------------------------

    def _faults(self, body: bytes) -> Any:
        self.hub.faults = json.loads(body)
        return {}

    def _state(self, body: bytes) -> Any:
        return self.hub.state()

    # -- endpoints -----------------------------------------------------------------------------------------------------

    def _whoami(self, body: bytes) -> Any:
        user = self._user()
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        return {"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def _create(self, body: bytes) -> Any:
        user, values = self._user(), json.loads(body)
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        owner = values.get("organization") or user
        repo_id = f"{owner}/{values['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            return 409, {"X-Error-Message": "You already created this model repo"}, json.dumps(url).encode()
        if owner != user:
            raise Refused(403, "", f"You don't have the rights to create a model under the namespace {owner}")
        private = values.get("private") or values.get("visibility") == "private"
        self.hub._create(repo_id, bool(private))
        return url

    def _info(self, repo_id: str, revision: str, body: bytes) -> Any:
        repository = self._readable(repo_id)
        commit = repository.resolve(revision or "main")
        card = _metadata(commit.files.get("README.md", b"").decode())
        return {
            "_id": "0",
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit.oid,
            "private": repository.private,
            "tags": card.get("tags", []),
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def _tree(self, repo_id: str, revision: str, folder: str, body: bytes) -> Any:
        commit = self._readable(repo_id).resolve(revision)
        prefix = f"{folder}/" if folder else ""
        found = [_entry(path, data) for path, data in sorted(commit.files.items()) if path.startswith(prefix)]
        if folder and not found:
            self.commit_header = commit.oid
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        return [entry for entry in found if recursive or "/" not in entry["path"].removeprefix(prefix)]

    def _paths_info(self, repo_id: str, revision: str, body: bytes) -> Any:
        commit = self._readable(repo_id).resolve(revision)
        text = body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        asked = [asked] if isinstance(asked, str) else asked
        return [_entry(path, commit.files[path]) for path in asked if path in commit.files]

    def _refs(self, repo_id: str, body: bytes) -> Any:
        repository = self._readable(repo_id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repository.refs.items()
            if not name.startswith("refs/")
        ]
        return {"branches": branches, "converts": [], "tags": []}

    def _branch(self, repo_id: str, branch: str, body: bytes) -> Any:
        repository = self._writable(repo_id)
        if self.command == "DELETE":
            repository.resolve(branch)
            del repository.refs[branch]
            return {}
        if branch in repository.refs:
            raise Refused(409, "", "Reference already exists")
        start = (json.loads(body) if body else {}).get("startingPoint", "main")
        repository.refs[branch] = repository.resolve(start).oid
        return {}

    def _validate_yaml(self, body: bytes) -> Any:
        try:
            errors = metadata_errors(_metadata(json.loads(body)["content"]))
        except yaml.YAMLError as error:
            errors = [str(error)]
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        return 400 if errors else 200, {}, json.dumps(answer).encode()

    def _preupload(self, repo_id: str, revision: str, body: bytes) -> Any:
        commit = self._writable(repo_id, "create_pr" in self.query).resolve(revision)
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(_LFS_SUFFIXES) or file["size"] > 10_000_000
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in commit.files:
                answer["oid"] = _entry(file["path"], commit.files[file["path"]])["oid"]
            answers.append(answer)
        return {"files": answers}

    def _lfs_batch(self, repo_id: str, body: bytes) -> Any:
        self._readable(repo_id)
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def _lfs(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "", "the content does not have this hash")
        self.hub.blobs[oid] = body
        return {}

    def _commit(self, repo_id: str, revision: str, body: bytes) -> Any:
        as_pr = "create_pr" in self.query
        repository = self._writable(repo_id, as_pr)
        parent = repository.resolve(revision)
        if not as_pr and revision not in repository.refs:
            raise Refused(400, "", f"not a branch: {revision}")
        files, title = dict(parent.files), ""
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit", parent.oid) != parent.oid:
                    raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                raise Refused(400, "", f"unknown operation {item['key']}")
        oid = repository.add(title, parent.oid, files, self._user() or "")
        answer = {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}",
            "hookOutput": "",
        }
        if as_pr:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            repository.refs[f"refs/pr/{number}"] = oid
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        else:
            repository.refs[revision] = oid
        return answer

    def _resolve(self, repo_id: str, revision: str, path: str, body: bytes) -> Any:
        commit = self._readable(repo_id).resolve(revision)
        self.commit_header = commit.oid
        if path not in commit.files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        data = commit.files[path]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Content-Type": "application/octet-stream"}
        return 200, headers, data


def _metadata(card: str) -> Any:
    """What stands between the two lines of dashes at the top of a card."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", card, flags=re.DOTALL)
    return yaml.safe_load(match.group(1)) if match else {}


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as ``tree`` and ``paths-info`` describe it; the id is git's own."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
    if path.endswith(_LFS_SUFFIXES):
        oid = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": len(pointer)}
        # the client compares this with the content's sha256 to leave out what has not changed
        return {**entry, "oid": oid}
    return {**entry, "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}


_ID = r"([^/]+/[^/]+)"
_ROUTES = (
    ("POST", r"/test/faults", "faults"),
    ("GET", r"/test/state", "state"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/models/{_ID}(?:/revision/([^/]+))?", "info"),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)/?(.*)", "tree"),
    ("POST", rf"/api/models/{_ID}/paths-info/([^/]+)", "paths_info"),
    ("GET", rf"/api/models/{_ID}/refs", "refs"),
    ("POST DELETE", rf"/api/models/{_ID}/branch/([^/]+)", "branch"),
    ("POST", rf"/api/models/{_ID}/preupload/([^/]+)", "preupload"),
    ("POST", rf"/api/models/{_ID}/commit/([^/]+)", "commit"),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/([0-9a-f]{64})", "lfs"),
    ("GET HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", "resolve"),
)
