"""Files of a Hub repository through the real `hf://` file system, against a Hub on the loopback interface."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from datasets import Dataset

LONG = "This document number {} is long enough to be kept, having more than sixty-four letters in its only sentence."
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISION = f"(?:main|v2|{COMMIT})"
# What a process does in which the Hub is the one on the loopback interface: `cases` is name -> arguments.
WORKER = """
import json, sys
from mobilellm_hf.data.corpora import CorpusError, load_corpus
results = {}
for label, arguments in json.loads(sys.argv[1]).items():
    try:
        results[label] = [list(row.values()) for row in load_corpus(**arguments)]
    except CorpusError as error:
        results[label] = str(error)
print(json.dumps(results))
"""


class Hub(BaseHTTPRequestHandler):
    """Enough of the Hub's protocol to list a data set's files and read ranges of them: `server.files`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def describe(self, path: str) -> dict:
        data = self.server.files.get(path)
        if data is None:
            return {"type": "directory", "path": path, "oid": COMMIT, "size": 0}
        return {"type": "file", "path": path, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        files = self.server.files
        if found := re.fullmatch(rf"/api/datasets/org/data/tree/{REVISION}/?(.*)", path):
            inside = f"{found[1]}/" if found[1] else ""
            below = [file.removeprefix(inside) for file in files if file.startswith(inside)]
            deep = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
            names = {inside + (name if deep else name.split("/")[0]) for name in below}
            self.answer(json.dumps([self.describe(name) for name in sorted(names)]).encode())
        elif re.fullmatch(rf"/api/datasets/org/data/paths-info/{REVISION}", path):
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            there = [name for name in asked if any(fnmatch(file, f"{name}*") for file in files)]
            self.answer(json.dumps([self.describe(name) for name in there]).encode())
        elif re.fullmatch(rf"/api/datasets/org/data(/revision/{REVISION})?", path):
            listed = [{"rfilename": file} for file in files]
            self.answer(json.dumps({"id": "org/data", "sha": COMMIT, "siblings": listed}).encode())
        elif (found := re.fullmatch(rf"/datasets/org/data/resolve/{REVISION}/(.+)", path)) and found[1] in files:
            self.send_file(files[found[1]])
        else:
            self.answer(b"{}", 404, X_Error_Code="RevisionNotFound" if "org/data" in path else "RepoNotFound")

    def send_file(self, data: bytes):
        headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept_Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
            self.answer(data[start : end + 1], 206, **headers)
        else:
            self.answer(data, **headers)

    do_GET = do_HEAD = do_POST = handle_any


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What every case made of the Hub's files, in one process."""
    folder = tmp_path_factory.mktemp("hub")
    wide = [{"text": LONG.format(n), "n": n, "heavy": "x" * 1_000} for n in range(3)]
    Dataset.from_list(wide).to_parquet(folder / "wide.parquet", batch_size=1)
    lines = {name: json.dumps({"text": LONG.format(n)}).encode() + b"\n" for n, name in enumerate("abc")}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {
        "data/v2/train-a.json.gz": gzip.compress(lines["a"]),
        "data/v2/train-b.json.gz": gzip.compress(lines["b"]),
        "data/v2/test-c.json.gz": gzip.compress(lines["c"]),
        "wide/part.parquet": (folder / "wide.parquet").read_bytes(),
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    common = {"name": "org/data", "domain": "math", "data_files": ["data/v2/train-*.json.gz"]}
    cases = {
        "downloaded": common,
        "streamed": common | {"streaming": True},
        "revision": common | {"revision": "v2", "streaming": True},
        "url": common | {"data_files": [f"http://127.0.0.1:{server.server_port}/datasets/org/data/resolve/main/"
                                        "data/v2/test-c.json.gz"], "streaming": True},
        "slice": common | {"split": "train[:1]"},
        "parquet": common | {"data_files": ["wide/*.parquet"], "streaming": True},
        "no such column": common | {"data_files": ["wide/*.parquet"], "text_column": "body"},
        "no such file": common | {"data_files": ["data/v3/*.json.gz"]},
        "no such parquet file": common | {"data_files": ["data/v3/*.parquet"]},
        "no such revision": common | {"revision": "v3"},
    }  # fmt: skip
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
                   "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                   "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    command = [sys.executable, "-c", WORKER, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def expected(*numbers: int) -> list[list[str]]:
    return [[LONG.format(n), "data", "math"] for n in numbers]


@pytest.mark.parametrize(
    ("case", "numbers"),
    [("downloaded", (0, 1)), ("streamed", (0, 1)), ("revision", (0, 1)), ("url", (2,)), ("slice", (0,)),
     ("parquet", (0, 1, 2))],
)  # fmt: skip
def test_files_chosen_by_pattern_are_read(loaded, case, numbers):
    assert loaded[case] == expected(*numbers)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no such column", r"has no column 'body'. Its columns: text, n, heavy. Name the one with the text"),
        (
            "no such file",
            r"No file matches hf://datasets/org/data@main/data/v3/\*.json.gz. Check the name, the revision",
        ),
        (
            "no such parquet file",
            r"No file matches hf://datasets/org/data@main/data/v3/\*.parquet. Check the name, the revision",
        ),
        ("no such revision", r"No file matches hf://datasets/org/data@v3/data/v2/train-"),
    ],
)
def test_what_is_not_there_is_named(loaded, case, message):
    assert re.search(message, loaded[case])
