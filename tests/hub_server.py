"""
A Hugging Face hub on this machine, of data sets in a folder: tests run the real libraries against it.

    with hub(folder) as server:         # folder/ORG/NAME/...
        server.gated.add("ORG/NAME")    # its files are refused, as before its terms are accepted
        result = server.run("prepare_pile.py", "--source=ORG/NAME")

It speaks the endpoints that huggingface_hub and datasets ask for: information, files, byte ranges.
"""
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPO = pathlib.Path(__file__).resolve().parent.parent
SHA = "0123456789abcdef0123456789abcdef01234567"  # the revision of every data set


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = pathlib.Path(folder)
        self.gated = set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def run(self, *args, url=""):
        """`python ARGS` in the repository, which takes this hub (or the one at url) for Hugging Face's."""
        env = {**os.environ, "HF_ENDPOINT": url or self.url, "HF_HOME": str(self.folder / "cache"),
               "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(REPO)}
        command = [sys.executable, *map(str, args)]
        return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        what = "(?:/(revision|tree|paths-info)/([^/]+)(/.*)?)?"
        about = re.fullmatch(f"/api/datasets/([^/]+/[^/]+){what}", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        repo = (about or file)[1] if about or file else ""
        if not repo or not (self.server.folder / repo).is_dir():
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif file:
            self.send_range(repo, self.server.folder / repo / file[3])
        elif about[2] == "tree":
            self.answer_json(self.entries(repo, (about[4] or "").strip("/")))
        elif about[2] == "paths-info":
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            every = {entry["path"]: entry for entry in self.entries(repo, "")}
            self.answer_json([every[path] for path in form["paths"] if path in every])
        else:
            files = [entry for entry in self.entries(repo, "") if entry["type"] == "file"]
            siblings = [{"rfilename": file["path"], "size": file["size"]} for file in files]
            self.answer_json({"id": repo, "sha": SHA, "siblings": siblings, "private": False, "tags": [],
                              "gated": "manual" if repo in self.server.gated else False})

    do_HEAD = do_POST = do_GET

    def entries(self, repo, below):
        root = self.server.folder / repo
        entries = []
        for path in sorted((root / below).rglob("*")):
            name = path.relative_to(root).as_posix()
            kind = "file" if path.is_file() else "directory"
            entries.append({"type": kind, "path": name, "size": path.stat().st_size, "oid": name})
        return entries

    def send_range(self, repo, path):
        if repo in self.server.gated:
            return self.answer(401, b"", {"X-Error-Code": "GatedRepo"})
        if not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        headers = {"ETag": '"etag"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(200, data, headers)
        start = int(wanted[1])
        stop = min(len(data), int(wanted[2] or len(data) - 1) + 1)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self.answer(206, data[start:stop], headers)

    def answer_json(self, obj):
        self.answer(200, json.dumps(obj).encode(), {"Content-Type": "application/json"})

    def answer(self, status, data, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def hub(folder):
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
