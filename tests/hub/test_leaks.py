"""What must not be published is found, in every kind of file, and never repeated."""

import json
import secrets
import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from mobilellm_hf.hub import Target, package_model
from mobilellm_hf.hub.files import ReleaseFile
from mobilellm_hf.hub.leaks import CHUNK, LONGEST, scan

TOKEN = "hf_" + "Qz7" * 12
ALPHABET = string.ascii_letters + string.digits


def random_text(length: int, alphabet: str = ALPHABET) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(length))


SECRETS = {
    "a Hugging Face token": lambda: "hf_" + random_text(34),
    "a GitHub token": lambda: "ghp_" + random_text(36),
    "a GitLab token": lambda: "glpat-" + random_text(20),
    "an AWS access key": lambda: "AKIA" + random_text(16, string.ascii_uppercase),
    "a Google API key": lambda: "AIza" + random_text(35),
    "an OpenAI or Anthropic key": lambda: "sk-ant-" + random_text(40),
    "a Slack token": lambda: "xoxb-" + random_text(30),
    "a W&B key": lambda: "WANDB_API_KEY=" + random_text(40, "0123456789abcdef"),
    "a password in a URL": lambda: f"postgres://me:{random_text(12)}@db.example.org/x",
    "a private key": lambda: "-----BEGIN OPENSSH PRIVATE KEY-----",
}


def kinds(path: str, content: bytes, token: str | None = None) -> dict[str, int]:
    return {finding.what: finding.line for finding in scan([ReleaseFile(path, content)], token)}


@pytest.mark.parametrize("what", SECRETS)
def test_each_kind_is_found_with_its_line_and_not_repeated(what):
    secret = SECRETS[what]()
    (finding,) = scan([ReleaseFile("notes.txt", f"one\ntwo\nkey: {secret}\n".encode())])
    assert (finding.what, finding.line) == (what, 3)
    assert str(finding) == f"notes.txt:3: {what}" and secret not in str(finding)


@pytest.mark.parametrize("prefix", ["hf_jwt_", "hf_oauth__"])
def test_tokens_of_other_kinds_are_found(prefix):
    assert kinds("notes.txt", f"{prefix}eyJ{random_text(20)}.{random_text(30)}".encode()) == {
        "a Hugging Face token": 1
    }


def test_an_escaped_line_break_hides_nothing():
    assert kinds("config.json", json.dumps({"a": f"key:\n{TOKEN}"}).encode()) == {"a Hugging Face token": 1}


@pytest.mark.parametrize("text", [
    "hf_hub_download(hf_transfer_is_no_longer_used)", "sk-learn and task-oriented-dialogue-systems-with-memory",
    "https://huggingface.co/org/name@main", "http://user@host/", "AKIA", "BEGIN PUBLIC KEY", "a" * 40,
    "see /usr/bin/env and https://example.org/home/someone/x", "runs/quickstart/rows", "and/or/data", "1/2",
])  # fmt: skip
def test_what_is_none_is_let_be(text):
    assert kinds("config.json", text.encode()) == {}


@pytest.mark.parametrize("path", [
    "/home/me/runs", "/Users/me/x", "/mnt/data/x", "~/m/x", "C:\\Users", "C:\\\\Users", "math:/tmp/x", "file:///home/me/x",
    "first\\n/home/me",
])  # fmt: skip
def test_paths_of_this_machine_are_found_in_configs_and_cards(path):
    for name in ("config.json", "README.md", "training/settings.yaml", "training/log.jsonl", "tokenizer_config.json"):
        (what,) = kinds(name, f'a\n"_name_or_path": "{path}"'.encode())
        assert what.startswith("a path of this machine, ")
    assert kinds("tokenizer.json", path.encode()) == kinds("modeling.py", path.encode()) == {}


def test_the_home_and_the_current_folder_are_found_wherever_they_are(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/u/alice")
    assert kinds("config.json", b"/u/alice/runs") == {"a path of this machine, /u/alice...": 1}
    monkeypatch.setenv("HOME", "/root")
    assert kinds("config.json", b"/u/alice/runs") == {}


def test_the_token_of_the_session_is_found_anywhere_as_it_is():
    odd = "not-like-any-token"
    assert kinds("weights.pte", b"\0\1" + odd.encode() + b"\2", odd) == {"the token of this session": 1}
    assert kinds("weights.pte", odd.encode()) == {}


def test_a_secret_across_the_border_of_two_chunks_is_found():
    text = b"x\n" * (CHUNK // 2 - 9) + TOKEN.encode() + b"\n" + b"y\n" * LONGEST
    assert kinds("long.txt", text) == {"a Hugging Face token": CHUNK // 2 - 8}


def test_headers_of_weights_are_read_and_weights_are_not(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "m.safetensors", metadata={"by": TOKEN})
    data = (tmp_path / "m.safetensors").read_bytes()
    assert kinds("m.safetensors", data) == {"a Hugging Face token": 1}
    save_file({"w": torch.zeros(3)}, tmp_path / "m.safetensors")
    assert kinds("m.safetensors", (tmp_path / "m.safetensors").read_bytes() + TOKEN.encode()) == {}


def test_every_string_of_a_parquet_file_is_read(tmp_path):
    rows = {"n": [1, 2, 3], "text": ["a", "b", "c"], "chat": [[{"content": "x"}], [{"content": f"is\n{TOKEN}"}], []]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet", compression="zstd")
    assert kinds("t.parquet", (tmp_path / "t.parquet").read_bytes()) == {"a Hugging Face token": 2}
    raw = pa.table({"raw": [b"a", b"b", TOKEN.encode()]})
    pq.write_table(raw, tmp_path / "t.parquet", compression="zstd")
    assert kinds("t.parquet", (tmp_path / "t.parquet").read_bytes()) == {"a Hugging Face token": 3}
    pq.write_table(pa.table({"n": [1]}).replace_schema_metadata({"by": TOKEN}), tmp_path / "t.parquet")
    assert kinds("t.parquet", (tmp_path / "t.parquet").read_bytes()) == {"a Hugging Face token": 1}


def test_a_release_with_a_leak_is_refused_until_it_is_accepted(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/me/secret-project"}))
    (model / "notes.py").write_text(f"TOKEN = '{TOKEN}'")
    release = package_model(model, Target("org/name", "pretrain"))
    with pytest.raises(ValueError, match="must not be published") as error:
        release.refuse_leaks(None)
    assert "config.json:1: a path of this machine, /home/me" in str(error.value) and "notes.py:1:" in str(error.value)
    assert TOKEN not in str(error.value)
    with pytest.raises(ValueError, match=r"notes\.py"):
        release.refuse_leaks(None, ["config.json"])
    release.refuse_leaks(None, ["config.json", "notes.py"])
