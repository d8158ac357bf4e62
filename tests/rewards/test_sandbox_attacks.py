"""Every attack, behind each wall alone and behind both, as root and as an ordinary user: none does harm or stalls."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mobilellm_hf.rewards.sandbox import available_layers

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "mobilellm_hf"
WALLS = {"namespaces": ["namespaces"], "landlock,seccomp": ["landlock", "seccomp"]}
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
# What comes of any of them on a busy machine; most take a tenth of it.
DEADLINE = 40
OUTSIDE = [Path("/dev/shm/evil"), Path("/var/tmp/evil")]


@pytest.fixture(scope="module")
def script():
    """sandbox_attacks.py with the rewards alone, for an interpreter that has no packages, where anyone can read it."""
    with tempfile.TemporaryDirectory() as folder:
        rewards = Path(folder) / "mobilellm_hf" / "rewards"
        shutil.copytree(PACKAGE / "rewards", rewards, ignore=shutil.ignore_patterns("__pycache__"))
        for init in (rewards.parent / "__init__.py", rewards / "__init__.py"):
            init.write_text("")
        shutil.copy(HERE / "sandbox_attacks.py", folder)
        for path in [Path(folder), *Path(folder).rglob("*")]:
            path.chmod(0o755)
        yield Path(folder) / "sandbox_attacks.py"


def interpreter_of_anyone() -> str | None:
    """An interpreter that an ordinary user can run: setpriv itself still starts programs that root alone can reach."""
    probe = "import ctypes, subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"
    for python in (sys._base_executable, "/usr/bin/python3"):
        try:
            subprocess.run([*NOBODY, python, "-c", probe], check=True, capture_output=True)
            return python
        except (OSError, subprocess.CalledProcessError):
            continue
    return None


def run_script(script: Path, prefix: list[str], python: str, layers: str, *names: str) -> dict:
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*prefix, python, str(script), layers, *names]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("layers", WALLS)
@pytest.mark.parametrize("user", ["this user", "nobody"])
def test_no_attack_gets_out_or_stalls(script, user, layers):
    if not available_layers() >= set(WALLS[layers]):
        pytest.skip(f"this machine has no {layers}")
    prefix, python = [], sys._base_executable
    if user == "nobody":
        python = interpreter_of_anyone() if os.getuid() == 0 else None
        prefix = NOBODY
        if python is None:
            pytest.skip("only root can become another user, with an interpreter that this one can run")
    results = run_script(script, prefix, python, layers)
    peak = results.pop("peak of memory")["bytes"]
    assert len(results) > 35
    for name, result in results.items():
        assert not result["harm"], (name, result)
        assert result["expected"] == "any" or result["status"] in result["expected"].split(), (name, result)
        assert result["seconds"] < DEADLINE and result["length"] <= 100_000, name
    assert peak < 600 * 2**20


def test_the_observer_sees_the_harm_that_unconfined_code_does(script):
    names = ["kill one", "token file", "write outside", "connect"]
    before = [path.exists() for path in OUTSIDE]
    try:
        results = run_script(script, [], sys._base_executable, "none", *names)
    finally:
        for path, existed in zip(OUTSIDE, before):
            if not existed:
                path.unlink(missing_ok=True)
    assert all(results[name]["harm"] for name in names), results
    assert "the victim was killed" in results["kill one"]["harm"]
    assert any("reached" in harm for harm in results["connect"]["harm"])
