"""Exported programs as releases: what is sent, a card that says what the export's report says, and code that runs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from hub_cases import LOG, SETTINGS, make_evaluation
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from mobilellm_hf.hub import Target, package_model
from mobilellm_hf.hub.blocks import code_blocks
from mobilellm_hf.hub.context import BARE
from mobilellm_hf.hub.files import ReleaseFile
from mobilellm_hf.hub.ledger import LEDGER, Ledger
from mobilellm_hf.training.grpo_data import prompt_length

sys.path.append(str(Path(__file__).parents[1] / "export"))
from export_cases import export, save_model  # noqa: E402

ALONE = Target("org/tiny-ExecuTorch", "on-device")
BESIDE = Target("org/tiny-base", "midtrain")


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A run's folder with a model, and `device`, exported from it; lowering takes half a minute."""
    run = tmp_path_factory.mktemp("run")
    (run / "settings.json").write_text(json.dumps(SETTINGS))
    save_model(run / "tiny-base")
    export(run / "tiny-base", run / "device", group_size=64, group_fall_back=True, prefill=16)
    return run


@pytest.fixture
def run(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "run"))


def on_device(run: Path, **options):
    return package_model(run / "tiny-base", ALONE, pte=run / "device", **options)


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def forget(path: Path, name: str) -> None:
    document = json.loads(path.read_text())
    del document[name]
    path.write_text(json.dumps(document))


def test_a_program_takes_the_place_of_the_weights(run):
    release = on_device(run)
    paths = {file.path for file in release.files}
    assert {"model.pte", "export.json", "config.json", "tokenizer.json", "chat_template.jinja"} <= paths
    assert not any(path.endswith(".safetensors") for path in paths)
    assert release.folder == run / "device-release"
    data = ModelCard(release.card).data
    assert data.library_name == "executorch" and "executorch" in data.tags
    assert "trust_remote_code" not in release.card and list(code_blocks(release.card)) == ["executorch"]
    for file in release.files:
        assert str(run).encode() not in file.read(), file.path


def test_the_card_says_what_the_report_says(run):
    card = on_device(run).card
    size = (run / "device/model.pte").stat().st_size
    assert f"| file | model.pte, {size / 1000:.1f} kB |" in card
    assert "| Linear layers | 8da4w, groups of 64 |" in card
    assert "| 1 4w/64, 13 8da4w/64, 2 8da8w/96 |" in card
    report = json.loads((run / "device/export.json").read_text())
    assert f"| context, in tokens | {report['context']} |" in card and "| keys and values | bfloat16 |" in card
    assert f"Its context is {report['context']} tokens" in card
    assert f"executorch {report['versions']['executorch']}" in card
    rewrite(
        run / "device/export.json", context=80, prefill=7, kv_cache="float32", layers={"a": "8da8w/96"},
        quantization={"linear": "bf16", "group_size": None}, bytes={"head": 7_654_321},
        versions={"executorch": "7.8.9"},
    )  # fmt: skip
    card = on_device(run).card
    for line in (
        "| context, in tokens | 80 |", "| tokens of a prompt taken at once | 7 |", "| keys and values | float32 |",
        "| Linear layers | bf16 |", "| 1 8da8w/96 |", "| of the file | head 7.7 MB |", "executorch 7.8.9 |",
        "Its context is 80 tokens",
    ):  # fmt: skip
        assert line in card, line
    prompt = prompt_length(AutoTokenizer.from_pretrained(run / "tiny-base"), BARE)
    assert f"max_new_tokens={min(40, 80 - prompt)})" in card and '"content": ""' in card


def test_another_models_program_of_the_same_shape_is_refused(run):
    save_model(run / "other", seed=1)
    with pytest.raises(ValueError, match=r"was exported from .*tiny-base \(tiny-base \w{32}\), and not from .*other"):
        package_model(run / "other", ALONE, pte=run / "device")
    with pytest.raises(ValueError, match="export .*other$"):
        package_model(run / "other", BESIDE, pte=run / "device")
    (run / "tiny-base").rename(run / "moved")
    assert package_model(run / "moved", ALONE, pte=run / "device").files
    rewrite(run / "device/export.json", model="org/tiny", identity="org/tiny@" + "0" * 40)
    with pytest.raises(ValueError, match="exported from org/tiny .org/tiny@0000"):
        package_model(run / "moved", ALONE, pte=run / "device")


def test_the_card_of_a_program_says_which_figures_are_of_the_model(run, tmp_path):
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LOG))
    rate = {"step": 0, "prompts": 64, "rate": 0.25, "low": 0.1606, "high": 0.3681}
    how = {"decoding": "greedy", "max_new_tokens": 12}
    (run / "pass_rate.json").write_text(json.dumps(how | {"before": rate, "after": rate}))
    (run / "tiny-base/README.md").write_text("It solves 40 of 64.")
    said = "Of the model before quantization; "
    parts = ("## About it", "## During training", "## Pass rate")
    card = on_device(run).card
    assert all(f"{part}\n\n{said}the program was not measured.\n\n" in card for part in parts)
    assert "| input and output embeddings tied | yes |" in card
    folder = make_evaluation(tmp_path / "evaluation", run / "tiny-base")
    beside = package_model(run / "tiny-base", BESIDE, pte=run / "device", evaluation=folder).card
    assert said not in beside and "of the weights; the program was not measured." in beside
    assert "| input and output embeddings tied | yes |" in beside
    identity = ReleaseFile("model.pte", run / "device/model.pte").digests[0]
    rewrite(folder / "results.json", model={"name": "device", "identity": identity})
    card = on_device(run, evaluation=folder).card
    assert all(f"{part}\n\n{said}what the program was" in card for part in parts) and "not measured." not in card
    assert "## Evaluation\n\n" + said not in card and "of training is of the model before quantization" in card


def test_its_block_is_run_before_it_is_sent(run):
    release, said = on_device(run), []
    release.rehearse(said.append)
    assert said == ["executorch"]
    assert "from these files, before they were sent: torch " in on_device(run).card
    (run / "device/model.pte").write_bytes((run / "device/model.pte").read_bytes() + b"\0")
    assert "*Not run.*" in on_device(run).card


def test_a_program_beside_the_weights(run):
    release = package_model(run / "tiny-base", BESIDE, pte=run / "device/model.pte")
    paths = [file.path for file in release.files]
    assert {"model.pte", "export.json", "model.safetensors"} <= set(paths) and len(paths) == len(set(paths))
    assert {"with-plugin", "executorch"} <= code_blocks(release.card).keys()
    assert "| Linear layers | 8da4w, groups of 64 |" in release.card
    assert ModelCard(release.card).data.library_name == "transformers" and release.folder == run / "tiny-base-release"


def test_it_is_quantized_from_the_model_that_was_released(run):
    assert any("exported from" in note for note in on_device(run).notes)
    assert ModelCard(on_device(run).card).data.base_model is None  # the stage before is not what was quantized
    ledger = Ledger(run / "tiny-base-release" / LEDGER)
    ledger.record("org/tiny-base", "main", "0" * 40, {})
    ledger.record("org/tiny-base", "main", "1" * 40, {"README.md": ("a", "b")})
    release = on_device(run)
    data = ModelCard(release.card).data
    assert (data.base_model, data.base_model_relation) == ("org/tiny-base", "quantized")
    assert not any("exported from" in note for note in release.notes)


@pytest.mark.parametrize("spoil, said", [
    (lambda run: (run / "device/export.json").unlink(), "has no export.json, beside model.pte"),
    (lambda run: (run / "device/tokenizer.json").unlink(), "has no tokenizer.json"),
    (lambda run: (run / "device/model.pte").unlink(), "is no .pte file"),
    (lambda run: (run / "device/model.pte").write_bytes(b"\0" * 1000), "is no .pte file"),
    (lambda run: (run / "device/export.json").write_text('{"context": 1}'), "does not say prefill: export it again"),
    (lambda run: forget(run / "device/export.json", "identity"), "does not say identity: export it again"),
    (lambda run: rewrite(run / "device/config.json", hidden_size=96), "hidden_size is 96, not 64"),
    (lambda run: rewrite(run / "device/tokenizer.json", model={}), "their tokenizers differ"),
])  # fmt: skip
def test_what_is_no_export_of_the_model_is_refused(run, spoil, said):
    spoil(run)
    with pytest.raises(ValueError, match=said):
        on_device(run)


def test_options_that_do_not_fit_are_refused(run):
    with pytest.raises(ValueError, match="give pte"):
        package_model(run / "tiny-base", ALONE)
    with pytest.raises(ValueError, match="releases no weights"):
        on_device(run, llama4=True)


def test_results_are_of_the_program_or_of_the_weights(run, tmp_path):
    folder = make_evaluation(tmp_path / "evaluation", run / "tiny-base")
    with pytest.raises(ValueError, match="is not of the program .*model.pte: evaluate .*device"):
        on_device(run, evaluation=folder)
    identity = ReleaseFile("model.pte", run / "device/model.pte").digests[0]
    rewrite(folder / "results.json", model={"name": "device", "identity": identity})
    assert "| gsm8k_8shot | exact_match | 16.37 |" in on_device(run, evaluation=folder).card
    with pytest.raises(ValueError, match="is of an exported program and not of"):
        package_model(run / "tiny-base", BESIDE, evaluation=folder)


def test_the_card_of_a_program_with_two_tables_does_not_say_that_they_are_one(run):
    assert "| input and output embeddings tied | yes |" in on_device(run).card
    quantization = json.loads((run / "device/export.json").read_text())["quantization"]
    rewrite(run / "device/export.json", quantization=quantization | {"one_table": False})
    assert "embeddings tied" not in on_device(run).card
