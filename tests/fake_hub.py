"""Model hub on the loopback interface that speaks the HTTP protocol of the Hugging Face Hub, for tests.

The requests and responses were taken from the source of huggingface_hub 2.4.0 (hf_api.py, _commit_api.py, lfs.py,
file_download.py and utils/_http.py) with HF_HUB_DISABLE_XET=1, with which the client uploads large files with Git LFS
and downloads them over HTTP:

POST /api/repos/create                      create a repository with an initial commit
GET  /api/whoami-v2                         user of the token
GET  /api/models/ID[/revision/REVISION]     commit hash, visibility and files
GET  /api/models/ID/tree/REVISION[/FOLDER]  files with sizes and hashes
POST /api/models/ID/branch/NAME, /tag/REVISION
POST /api/validate-yaml                     metadata of a model card
POST /api/models/ID/preupload/REVISION      which files must be uploaded with Git LFS
POST /ID.git/info/lfs/objects/batch         upload URLs of these files; none for files that exist
PUT  STORAGE/upload/SHA256[/PART]           content of a file or part
POST STORAGE/complete/SHA256                the parts of a file are complete
POST /verify                                check an uploaded file
POST /api/models/ID/commit/REVISION         commit, as NDJSON
HEAD, GET /ID/resolve/REVISION/PATH         small files; large files are redirected to STORAGE
GET  STORAGE/SHA256                         content of a large file, with ranges

STORAGE is another host name of the same server, as large files are stored outside the hub, and gets no tokens.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

Files = dict[str, tuple[bytes, bool]]  # path -> content, and whether it is stored with Git LFS
LICENSES = ("apache-2.0", "mit", "gemma", "other")
REJECTED_TOKEN = "Invalid credentials in Authorization header"


@dataclass
class Repository:
    """Commits and refs of a repository. `commits` maps hashes to (title, files)."""

    private: bool
    commits: dict[str, tuple[str, Files]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, files: Files, ref: str = "main") -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {title} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = title, files
        self.refs[ref] = oid
        return oid

    def find_commit(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    def get_files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: content for path, (content, _) in self.commits[self.refs.get(revision, revision)][1].items()}


@dataclass
class Fault:
    """What happens to the next `count` requests that match `pattern`, which is searched in "METHOD PATH".

    `action` is an HTTP status, "reset" (close the connection without a response), "lose" (handle the request, then
    close the connection without a response), "truncate" (close it after half of the content), "html" (a login page with
    status 200), or a function that is called before the request is handled. With a status, the hub sends `message`.
    """

    pattern: str
    action: int | str | Callable[[], object]
    count: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""


class FakeHub:
    """Hub with repositories in memory.

    Attributes:
        tokens: token -> user name and whether the user may write.
        requests: (method, path, authorization, range) of each request so far.
        chunk_size: size of the parts of uploads, or None to upload files as a whole.
        verify: if True, the client must verify each upload.
    """

    def __init__(self) -> None:
        self.tokens = {"hf_me": ("me", True), "hf_reader": ("me", False), "hf_other": ("other", True)}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS objects, keyed by SHA-256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.verified: set[str] = set()
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str, str]] = []
        self.chunk_size: int | None = None
        self.verify = False
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _create_handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage_url = f"http://localhost:{self.port}/storage"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, pattern: str) -> int:
        """Return how many requests match a pattern, which is searched in "METHOD PATH"."""
        return sum(re.search(pattern, f"{method} {path}") is not None for method, path, *_ in self.requests)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.count > 0 and re.search(fault.pattern, f"{method} {path}"):
                    fault.count -= 1
                    return fault
        return None


def _hash_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def _is_large(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".onnx")) or size > 1 << 20


class _HubError(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


def _create_handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub
    fault: Fault | None

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.handle_request()

    do_GET = do_POST = do_PUT = do_HEAD

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        authorization = self.headers.get("Authorization", "")
        self.hub.requests.append((self.command, path, authorization, self.headers.get("Range", "")))
        self.fault = self.hub.take_fault(self.command, path)
        action = self.fault.action if self.fault is not None else None
        if action == "reset":
            self.close()
        elif action == "html":
            self.send(200, b"<html>Log in</html>", {"Content-Type": "text/html"})
        elif self.fault is not None and isinstance(action, int):
            self.send_json({"error": self.fault.message or f"status {action}"}, action, self.fault.headers)
        else:
            if callable(action):
                action()
            self.token = authorization.removeprefix("Bearer ")
            try:
                with self.hub.lock:
                    self.route(path)
            except _HubError as error:
                headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
                self.send_json({"error": error.message}, error.status, headers)

    def close(self) -> None:
        self.close_connection = True
        self.connection.close()

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        if self.fault is not None and self.fault.action == "lose":
            self.close()
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.action == "truncate":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close()
            return
        self.wfile.write(content)

    def send_json(self, values: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(values).encode(), {"Content-Type": "application/json", **(headers or {})})

    # ---- access ------------------------------------------------------------------------------------------------------

    def find_user(self) -> str | None:
        if not self.token:
            return None
        if self.token not in self.hub.tokens:
            raise _HubError(401, REJECTED_TOKEN)
        return self.hub.tokens[self.token][0]

    def check_write(self, repo_id: str) -> None:
        user = self.find_user()
        if user is None:
            raise _HubError(401, "Invalid username or password.")
        if user != repo_id.partition("/")[0] or not self.hub.tokens[self.token][1]:
            raise _HubError(403, f"You don't have the rights to write to {repo_id}")

    def find_repository(self, repo_id: str) -> Repository:
        user, repository = self.find_user(), self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != repo_id.partition("/")[0]):
            # Without a token, the hub does not reveal whether a private repository exists.
            raise _HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def find_commit(self, repo_id: str, revision: str) -> tuple[str, Files]:
        repository = self.find_repository(repo_id)
        oid = repository.find_commit(revision)
        if oid is None:
            raise _HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid][1]

    # ---- endpoints ---------------------------------------------------------------------------------------------------

    def route(self, path: str) -> None:
        routes: list[tuple[str, Callable[..., None]]] = [
            (r"HEAD /", lambda: self.send(200, b"", {})),
            (r"GET /api/whoami-v2", self.get_whoami),
            (r"POST /api/repos/create", self.create_repository),
            (r"POST /api/validate-yaml", self.validate_card),
            (r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.get_info),
            (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", self.get_tree),
            (r"POST /api/models/([^/]+/[^/]+)/(?:branch|tag)/(.+)", self.create_ref),
            (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.start_lfs_uploads),
            (r"PUT /storage/upload/(\w+)(?:/(\d+))?", self.upload),
            (r"POST /storage/complete/(\w+)", self.complete_upload),
            (r"POST /verify", self.verify_upload),
            (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
            (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            (r"GET /storage/(\w+)", self.get_object),
        ]
        for pattern, endpoint in routes:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match is not None:
                endpoint(*(group and unquote(group) for group in match.groups()))
                return
        raise _HubError(404, f"no such endpoint: {self.command} {path}")

    def get_whoami(self) -> None:
        user = self.find_user()
        if user is None:
            raise _HubError(401, "Invalid username or password.")
        self.send_json({"type": "user", "name": user})

    def create_repository(self) -> None:
        values = json.loads(self.body)
        repo_id = f"{values['organization']}/{values['name']}"
        self.check_write(repo_id)
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            self.send_json({"error": "You already created this model repo", **answer}, 409)
            return
        repository = Repository(values.get("visibility") == "private")
        repository.commit("initial commit", {".gitattributes": (b"*.safetensors filter=lfs\n", False)})
        self.hub.repositories[repo_id] = repository
        self.send_json(answer)

    def validate_card(self) -> None:
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match is not None else {}
        errors = []
        if metadata.get("license", "other") not in LICENSES:
            errors = [{"message": f'"license" must be one of [{", ".join(LICENSES)}]'}]
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def get_info(self, repo_id: str, revision: str | None) -> None:
        oid, files = self.find_commit(repo_id, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        private = self.hub.repositories[repo_id].private
        self.send_json({"id": repo_id, "sha": oid, "private": private, "tags": [], "siblings": siblings})

    def get_tree(self, repo_id: str, revision: str, folder: str | None) -> None:
        files = self.find_commit(repo_id, revision)[1]
        if folder is not None:
            files = {path: file for path, file in files.items() if path.startswith(f"{folder}/")}
            if not files:
                raise _HubError(404, f"{folder} does not exist", "EntryNotFound")
        entries = []
        for path, (content, is_lfs) in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _hash_blob(content)}
            if is_lfs:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.send_json(entries)

    def create_ref(self, repo_id: str, name: str) -> None:
        self.check_write(repo_id)
        values, repository = json.loads(self.body or b"{}"), self.hub.repositories[repo_id]
        name, revision = (values["tag"], name) if "tag" in values else (name, values.get("startingPoint", "main"))
        repository.refs[name] = self.find_commit(repo_id, revision)[0]
        self.send_json({})

    def preupload(self, repo_id: str, revision: str) -> None:
        self.check_write(repo_id)
        _, files = self.find_commit(repo_id, revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            path, is_lfs = file["path"], _is_large(file["path"], file["size"])
            entry = {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            if path in files:
                content = files[path][0]
                entry["oid"] = hashlib.sha256(content).hexdigest() if is_lfs else _hash_blob(content)
            answer.append(entry)
        self.send_json({"files": answer})

    def start_lfs_uploads(self, repo_id: str) -> None:
        self.check_write(repo_id)
        values = json.loads(self.body)
        assert values["operation"] == "upload" and "xet" not in values["transfers"]
        objects = []
        for requested in values["objects"]:
            oid, size = requested["oid"], requested["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if not self.has_object(oid):
                upload: dict[str, Any] = {"href": f"{self.hub.storage_url}/upload/{oid}?signature=secret"}
                if self.hub.chunk_size is not None:
                    upload["href"] = f"{self.hub.storage_url}/complete/{oid}"
                    upload["header"] = {"chunk_size": str(self.hub.chunk_size)}
                    for part in range(1, -(-size // self.hub.chunk_size) + 1):
                        upload["header"][str(part)] = f"{self.hub.storage_url}/upload/{oid}/{part}"
                entry["actions"] = {"upload": upload}
                if self.hub.verify:
                    entry["actions"]["verify"] = {"href": f"{self.hub.url}/verify"}
            objects.append(entry)
        transfer = "basic" if self.hub.chunk_size is None else "multipart"
        self.send_json({"transfer": transfer, "objects": objects})

    def has_object(self, oid: str) -> bool:
        return oid in self.hub.objects and (oid in self.hub.verified or not self.hub.verify)

    def upload(self, oid: str, part: str | None) -> None:
        if part is not None:
            self.hub.parts[oid, int(part)] = self.body
        elif hashlib.sha256(self.body).hexdigest() != oid:
            raise _HubError(400, "the content does not match its checksum")
        else:
            self.hub.objects[oid] = self.body
        self.send(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete_upload(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.body = b"".join(self.hub.parts[oid, number] for number in numbers)
        self.upload(oid, None)

    def verify_upload(self) -> None:
        values = json.loads(self.body)
        if len(self.hub.objects.get(values["oid"], b"")) != values["size"]:
            raise _HubError(404, "object not found")
        self.hub.verified.add(values["oid"])
        self.send_json({})

    def commit(self, repo_id: str, revision: str) -> None:
        self.check_write(repo_id)
        head, files = self.find_commit(repo_id, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", head) != head:
            raise _HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                if value["path"] not in files:
                    raise _HubError(404, f"{value['path']}: A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"]), False
            else:
                assert line["key"] == "lfsFile", line
                if not self.has_object(value["oid"]):
                    raise _HubError(400, f"{value['path']}: LFS object is missing")
                files[value["path"]] = self.hub.objects[value["oid"]], True
        oid = self.hub.repositories[repo_id].commit(header["summary"], files, revision)
        self.send_json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        oid, files = self.find_commit(repo_id, revision)
        if path not in files:
            raise _HubError(404, "Entry not found", "EntryNotFound")
        content, is_lfs = files[path]
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if not is_lfs:
            self.send(200, content, {**headers, "ETag": f'"{_hash_blob(content)}"'})
            return
        sha256 = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        self.send(302, b"", {**headers, "Location": f"{self.hub.storage_url}/{sha256}?signature=secret"})

    def get_object(self, oid: str) -> None:
        content = self.hub.objects[oid]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self.send(200, content, {"ETag": f'"{oid}"'})
            return
        start, end = int(match[1]), int(match[2] or len(content) - 1)
        if start >= len(content):
            self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        content_range = f"bytes {start}-{end}/{len(content)}"
        self.send(206, content[start : end + 1], {"ETag": f'"{oid}"', "Content-Range": content_range})


if __name__ == "__main__":
    fake_hub = FakeHub()
    print(f"export HF_ENDPOINT={fake_hub.url} HF_TOKEN=hf_me HF_HUB_DISABLE_XET=1 HF_HUB_OFFLINE=0", flush=True)
    threading.Event().wait()
