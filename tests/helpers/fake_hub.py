"""A local server that stands in for the Hugging Face Hub, for the real client `huggingface_hub`.

It has the parts of the Hub's HTTP interface that reading a snapshot and making a commit use. The
client is pointed to it by `HF_ENDPOINT`, or by `use` in a process that has imported it already.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field

LFS_SUFFIXES = (".safetensors",)
TOKEN = "hf_secret"


@dataclass
class Repo:
    """A repository: the files of every commit, and the commit of every branch."""

    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)

    def commit(self, files, branch="main"):
        text = json.dumps([len(self.commits), sorted(files)])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        return sha


class Hub:
    """The repositories, the requests that were made, and the files that are served wrongly."""

    def __init__(self):
        self.repos, self.objects, self.requests = {}, {}, []
        self.served = {}  # path of a file -> the bytes that are sent in its place
        self.stored = {}  # path of a file -> the bytes that a commit stores in its place
        self.url = ""

    def add(self, repo, files, **options):
        return self.repos.setdefault(repo, Repo(**options)).commit(files)

    def add_folder(self, repo, folder, **files):
        paths = (path for path in folder.rglob("*") if path.is_file())
        contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return self.add(repo, {**contents, **files})

    def files(self, repo, branch="main"):
        return self.repos[repo].commits[self.repos[repo].branches[branch]]

    def writes(self):
        return [request for request in self.requests if not request.startswith(("GET", "HEAD"))]


def entry(name, data):
    """Return a file as the Hub describes it."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    info = {"type": "file", "path": name, "rfilename": name, "size": len(data)}
    info |= {"oid": blob, "blobId": blob}
    if name.endswith(LFS_SUFFIXES):
        sha256 = hashlib.sha256(data).hexdigest()
        info["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 130}
    return info


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status, code):
        self.reply(status, {"error": code}, X_Error_Code=code)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def is_authorized(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def handle_request(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        data = self.body()
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                return method(self, data, **match.groupdict())
        return self.fail(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def find(self, repo, revision):
        """Return the repository and the commit of a revision; None after an error was sent."""
        target = self.hub.repos.get(repo)
        if target is None or (target.private and not self.is_authorized()):
            return self.fail(401, "RepoNotFound")
        if target.gated and not self.is_authorized():
            return self.fail(403, "GatedRepo")
        sha = target.branches.get(revision, revision)
        if sha not in target.commits:
            return self.fail(404, "RevisionNotFound")
        return target, sha

    def info(self, data, repo, revision="main"):
        if (result := self.find(repo, revision)) is not None:
            files = [entry(name, data) for name, data in result[0].commits[result[1]].items()]
            self.reply(
                200, {"id": repo, "sha": result[1], "private": result[0].private, "siblings": files}
            )

    def tree(self, data, repo, revision):
        if (result := self.find(repo, revision)) is not None:
            self.reply(200, [entry(n, d) for n, d in result[0].commits[result[1]].items()])

    def resolve(self, data, repo, revision, name):
        if (result := self.find(repo, revision)) is None:
            return
        data = result[0].commits[result[1]].get(name)
        if data is None:
            return self.fail(404, "EntryNotFound")
        info = entry(name, data)
        etag = info["lfs"]["sha256"] if "lfs" in info else info["blobId"]
        contents = self.hub.served.get(name, data)
        self.reply(
            200, contents, ETag=f'"{etag}"', X_Repo_Commit=result[1], X_Linked_Size=len(data)
        )

    def create(self, data):
        if not self.is_authorized():
            return self.fail(401, "Unauthorized")
        request = json.loads(data)
        repo = f"{request.get('organization') or 'user'}/{request['name']}"
        private = request.get("private") or request.get("visibility") == "private"
        new = self.hub.repos.setdefault(repo, Repo(private=bool(private)))
        new.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.reply(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def validate(self, data):
        self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, data, repo, revision):
        files = []
        for file in json.loads(data)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.reply(200, {"files": files})

    def batch(self, data, repo):
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/objects/{item['oid']}"}}}
            for item in json.loads(data)["objects"]
        ]
        self.reply(200, {"transfer": "basic", "objects": objects})

    def upload(self, data, oid):
        self.hub.objects[oid] = data
        self.reply(200)

    def commit(self, data, repo, revision):
        if not self.is_authorized():
            return self.fail(403, "Forbidden")
        target = self.hub.repos[repo]
        files = dict(target.commits.get(target.branches.get(revision), {}))
        for line in data.splitlines():
            row = json.loads(line)
            value, key = row["value"], row["key"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        files |= {name: data for name, data in self.hub.stored.items() if name in files}
        sha = target.commit(files, revision)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url})


_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES = (
    (rf"GET /api/models/{_REPO}", Handler.info),
    (rf"GET /api/models/{_REPO}/revision/{_REVISION}", Handler.info),
    (rf"GET /api/models/{_REPO}/tree/{_REVISION}", Handler.tree),
    (rf"(GET|HEAD) /{_REPO}/resolve/{_REVISION}/(?P<name>.+)", Handler.resolve),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{_REPO}/preupload/{_REVISION}", Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /objects/(?P<oid>\w+)", Handler.upload),
    (rf"POST /api/models/{_REPO}/commit/{_REVISION}", Handler.commit),
)


@contextlib.contextmanager
def serve():
    """Yield a hub that answers on a local port."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub, cache, monkeypatch, *, offline=False):
    """Let the client of this process use a hub, with an empty cache folder."""
    from huggingface_hub import constants

    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))


def environment(hub, cache, **variables):
    """Return the variables by which another process uses a hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        **variables,
    }
