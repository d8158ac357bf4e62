"""What is missing is told at once, even where it is needed last."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mobilellm_hf.export.requirements import INSTALL, need_executorch

ROOT = Path(__file__).parents[2]


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    need_executorch()
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError) as error:
        need_executorch()
    assert "needs flatbuffers: " in str(error.value) and INSTALL in str(error.value)


def test_the_quickstart_does_not_begin_what_it_cannot_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output-dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "recipes/quickstart.py"), run_name="__main__")
    assert end.value.code == 2 and "error: running on a device needs flatbuffers" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_what_runs_a_program_loads_nothing_of_what_makes_one():
    """Libraries of data and training would be resident on a device beside the program."""
    code = "import sys; from mobilellm_hf.export import OnDeviceModel; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "mobilellm_hf" in loaded and not loaded & {"datasets", "pandas", "pyarrow", "trl", "peft"}


def test_running_a_program_does_not_load_the_exporter(small):
    code = f"""
import sys
from mobilellm_hf.export import OnDeviceModel
OnDeviceModel({str(small)!r}).generate([1, 2, 3], 2)
assert "executorch.exir" not in sys.modules
from executorch.extension.llm.custom_ops import custom_ops  # what exports loads the same libraries later
from executorch.kernels import quantized
print(OnDeviceModel({str(small)!r}).generate([1, 2, 3], 2).token_ids)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("("), done.stderr[-2000:]
