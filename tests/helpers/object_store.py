"""A local object store that stands in for Google Cloud Storage: `gs://` paths without a network.

Objects appear complete or not at all, have no folders, and cannot be renamed or appended to; such
attempts raise an error. One folder of files has two interfaces: `Files`, the fsspec file system
that etils uses, and `serve`, the part of the HTTP JSON API that TensorStore's driver uses.
"""

import http.server
import io
import json
import os
import pathlib
import re
import tempfile
import threading
import urllib.parse

import fsspec


class Store:
    """Objects by name, each a file of one folder."""

    def __init__(self, root):
        self.root = pathlib.Path(root)
        self.lock = threading.Lock()

    def path(self, name):
        return self.root / urllib.parse.quote(name, safe="")

    def names(self, prefix=""):
        names = (urllib.parse.unquote(p.name) for p in self.root.iterdir() if p.name[0] != ".")
        return sorted(name for name in names if name.startswith(prefix))

    def get(self, name):
        """Return (contents, generation), or None if there is no such object."""
        try:
            with open(self.path(name), "rb") as file:
                return file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def put(self, name, data):
        with tempfile.NamedTemporaryFile(dir=self.root, prefix=".", delete=False) as file:
            file.write(data)
        os.replace(file.name, self.path(name))
        return os.stat(self.path(name)).st_mtime_ns

    def delete(self, name):
        self.path(name).unlink()


class _Writer(io.BytesIO):
    """A file whose contents become an object when it is closed."""

    def __init__(self, store, name):
        super().__init__()
        self.store, self.name = store, name

    def close(self):
        if not self.closed:
            self.store.put(self.name, self.getvalue())
        super().close()


class Files(fsspec.AbstractFileSystem):
    """The objects under OBJECT_STORE as files; a folder exists if an object lies in it."""

    protocol = ("gs", "gcs")
    cachable = False

    def __init__(self, *args, **kwargs):
        super().__init__()

    @property
    def store(self):
        # Read each time: etils keeps one file system for all tests of a process.
        return Store(os.environ["OBJECT_STORE"])

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path).rstrip("/")
        entries = {}
        for name in self.store.names(path):
            rest = name[len(path) :]
            if not rest:
                entries[name] = self.info(name)
            elif rest[0] == "/":
                child = f"{path}/{rest[1:].split('/')[0]}"
                is_file = child == name
                entries[child] = self.info(name) if is_file else self._folder(child)
        if not entries:
            raise FileNotFoundError(path)
        return list(entries.values()) if detail else list(entries)

    def info(self, path, **kwargs):
        path = self._strip_protocol(path).rstrip("/")
        stored = self.store.get(path)
        if stored:
            about = {"name": path, "type": "file", "size": len(stored[0])}
            return about | {"mtime": stored[1] / 1e9}
        if self.store.names(f"{path}/"):
            return self._folder(path)
        raise FileNotFoundError(path)

    @staticmethod
    def _folder(name):
        return {"name": name, "type": "directory", "size": 0}

    def _open(self, path, mode="rb", **kwargs):
        if mode == "wb":
            return _Writer(self.store, path)
        if mode != "rb":
            raise PermissionError(f"{path}: an object cannot be opened with mode {mode!r}")
        stored = self.store.get(path)
        if stored is None:
            raise FileNotFoundError(path)
        return io.BytesIO(stored[0])

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass

    def rm_file(self, path):
        if self.store.get(self._strip_protocol(path)) is not None:
            self.store.delete(self._strip_protocol(path))

    def mv(self, path1, path2, **kwargs):
        raise PermissionError(f"{path1}: an object cannot be renamed")

    rename = mv

    def cp_file(self, path1, path2, **kwargs):
        raise PermissionError(f"{path1}: an object is not copied in place")


def register():
    """Direct the gs:// paths of this process to the store OBJECT_STORE, for etils."""
    fsspec.register_implementation("gs", Files, clobber=True)
    fsspec.register_implementation("gcs", Files, clobber=True)


def use():
    """Direct the gs:// paths of this process to the store OBJECT_STORE, for etils and Orbax."""
    from orbax.checkpoint._src.path import gcs_utils

    register()
    # Orbax asks Google's client whether the bucket has folders; this one has none.
    gcs_utils.get_bucket = lambda name: None


def serve(root):
    """Serve the store on a free port of this machine. Return the server and its address."""
    store = Store(root)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", headers=()):
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def about(self, name, generation, size):
            text = {"kind": "storage#object", "name": name, "generation": str(generation)}
            text |= {"size": str(size), "metageneration": "1"}
            self.answer(200, json.dumps(text).encode(), [("Content-Type", "application/json")])

        def parts(self):
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
            match = re.match(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.*))?", url.path)
            return match[1], urllib.parse.unquote(match[2] or ""), query

        def refused(self, name, query):
            """Return True if a condition on the object's generation does not hold."""
            stored = store.get(name)
            generation = str(stored[1]) if stored else "0"
            expected, other = query.get("ifGenerationMatch"), query.get("ifGenerationNotMatch")
            if expected is not None and expected != generation:
                self.answer(412)
            elif other is not None and other == generation:
                self.answer(304)
            else:
                return False
            return True

        def do_GET(self):
            bucket, name, query = self.parts()
            if not name:
                names = store.names(f"{bucket}/{query.get('prefix', '')}")
                about = {"generation": "1", "size": "0"}
                items = [{"name": name.split("/", 1)[1], **about} for name in names]
                return self.answer(200, json.dumps({"items": items}).encode())
            name = f"{bucket}/{name}"
            with store.lock:
                if self.refused(name, query):
                    return None
                stored = store.get(name)
            if stored is None:
                return self.answer(404)
            data, generation = stored
            if query.get("alt") != "media":
                return self.about(name, generation, len(data))
            headers = [("x-goog-generation", str(generation))]
            headers.append(("x-goog-stored-content-length", str(len(data))))
            match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if match is None:
                return self.answer(200, data, headers)
            first, last = match.groups()
            start = int(first) if first else max(len(data) - int(last), 0)
            stop = min(int(last) + 1 if last and first else len(data), len(data))
            if start >= len(data) > 0:
                return self.answer(416)
            headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}"))
            return self.answer(206, data[start:stop], headers)

        def do_POST(self):
            bucket, _, query = self.parts()
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            name = f"{bucket}/{query['name']}"
            with store.lock:
                if not self.refused(name, query):
                    self.about(query["name"], store.put(name, data), len(data))

        def do_DELETE(self):
            bucket, name, query = self.parts()
            name = f"{bucket}/{name}"
            with store.lock:
                if self.refused(name, query):
                    return
                if store.get(name) is None:
                    self.answer(404)
                    return
                store.delete(name)
            self.answer(204)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"
