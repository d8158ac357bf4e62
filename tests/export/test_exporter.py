"""What an export refuses before it begins, and that nothing half-written has the final name."""

import json
import shutil

import pytest
from export_cases import CONTEXT, export, save_model

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.curation.scoring import model_identity
from mobilellm_hf.export import exporter, size
from mobilellm_hf.export.arguments import ExportArguments
from mobilellm_hf.export.quantization import Quantization
from mobilellm_hf.export.size import shape_of, stored_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": CONTEXT + 1}, "max_seq_len=129 is beyond the 128 positions"),
        ({"max_seq_len": 1}, "max_seq_len=1 must be 2 or more"),
        ({"prefill": 0}, "prefill=0 must be 2 or more"),
        ({"kv_cache": "int8"}, "kv_cache='int8' must be bfloat16 or float32"),
        ({"quantize": "4bit"}, "quantize='4bit' must be one of"),
        ({"group_size": 64}, "group_size=64 does not divide the 96 inputs of .*group_fall_back: true"),
    ],
)
def test_what_does_not_fit_is_refused(model_folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export(model_folder, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a model: it has no config.json"):
        export(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="is no folder here, and could not be had from the Hub"):
        export("no-one/has-this", tmp_path / "out")
    for name in ("config.json", "model.pte"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(ValueError, match="is an exported program: give the model that it was made of"):
        export(tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "bert"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
    ],
)
def test_a_model_that_is_not_ours_is_refused_by_name(model_folder, tmp_path, change, message):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "out")


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    folder = save_model(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="has no tokenizer that loads"):
        export(folder, tmp_path / "out")


def test_an_output_that_holds_something_is_left_alone(model_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(model_folder, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("output", [".", "..", "inner/.."])
def test_the_folder_that_one_is_in_is_no_output(model_folder, tmp_path, monkeypatch, output):
    (tmp_path / "here/inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(exporter.MobileLLMForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=f"output={output} is where you are"):
        export(model_folder, output)


def test_an_output_that_cannot_be_written_is_refused_before_the_weights_are_read(model_folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(exporter.MobileLLMForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match="output=.*file/out cannot be written"):
        export(model_folder, tmp_path / "file/out")


def test_too_little_memory_or_disk_is_told_before_the_weights_are_read(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter.MobileLLMForCausalLM, "from_pretrained", None)
    monkeypatch.setattr(size, "free_memory", lambda: 10**8)
    with pytest.raises(MemoryError, match=r"model=.* takes about .* GB of memory and 0\.1 GB are free.* below 128"):
        export(model_folder, tmp_path / "out")
    monkeypatch.setattr(size, "free_memory", lambda: 10**11)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(size.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"output=.*out: .* take about .* MB, and its disk has 0 MB free"):
        export(model_folder, tmp_path / "out")


def test_the_tokenizer_takes_room_too(tmp_path, monkeypatch):
    config = MobileLLMConfig.for_size("140M")
    quantization = Quantization.for_config("8da4w", config)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(size.shutil, "disk_usage", lambda path: usage._replace(free=138 * 10**6))
    size.check_disk(tmp_path / "out", config, quantization, 10 * 10**6)
    with pytest.raises(OSError, match="take about 14[0-9] MB, and its disk has 138 MB free"):
        size.check_disk(tmp_path / "out", config, quantization, 17 * 10**6)


def test_what_a_container_keeps_of_files_is_free(tmp_path):
    for name, text in (("max", "4000000\n"), ("current", "3000000\n"), ("stat", "anon 5\ninactive_file 9000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert size.free_memory(tmp_path) == 1_009_000
    (tmp_path / "memory.max").write_text("max\n")
    assert size.free_memory(tmp_path) > 10**7
    assert size.free_memory(tmp_path / "none") > 10**7


def test_a_file_that_is_not_what_was_asked_for_does_not_get_the_name(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "lower", lambda graph, constants: None)
    monkeypatch.setattr(exporter, "write_program", lambda program, path: path.write_bytes(b""))
    monkeypatch.setattr(exporter, "read_weights", lambda path: [])
    with pytest.raises(RuntimeError, match="is not what was asked for: it lacks"):
        export(model_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_program_says_which_weights_it_was_made_of(model_folder, monkeypatch):
    model = MobileLLMForCausalLM.from_pretrained(model_folder)
    assert exporter.identity_of(str(model_folder), model) == model_identity(model_folder)
    assert exporter.identity_of("no-one/cached-it", model) == model_identity(model)
    monkeypatch.setattr(exporter, "try_to_load_from_cache", lambda name, file: f"/snapshots/{'c' * 40}/{file}")
    assert exporter.identity_of("org/cached", model) == f"org/cached@{'c' * 40}"


def test_the_140m_fits_the_papers_phone():
    config = MobileLLMConfig.for_size("140M", max_position_embeddings=32_768)
    quantization = Quantization.for_config("8da4w", config)
    assert sum(stored_bytes(shape_of(config), quantization).values()) <= 88.5e6
    of_its_own = Quantization.for_config("8da4w", config, embedding_group_size=0)
    assert 116e6 < sum(stored_bytes(shape_of(config), of_its_own).values()) <= 117e6


def test_the_recipes_arguments_are_checked_without_a_model():
    with pytest.raises(ValueError, match="prefill=1"):
        ExportArguments("model", "out", prefill=1).check()
