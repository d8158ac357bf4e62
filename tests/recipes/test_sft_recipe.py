"""The YAML files of SFT, held to Tables 2, 4 and 7, and what a stage refuses before anything is loaded."""

from pathlib import Path

import pytest
from test_configs import RECIPES, SIZES, parse

from mobilellm_hf.data.catalog import mixture
from mobilellm_hf.data.chat_sources import as_weighted
from mobilellm_hf.data.source_weights import source_weights
from mobilellm_hf.training.sft import run_sft
from mobilellm_hf.training.sft_arguments import SFTArguments, SFTTrainingArguments

# Table 4: rows of a GPU, length, epochs, peak learning rate, share of warm-up; and the sets of Table 7.
TABLE_4 = {"general": (4, 4096, 2, 5e-6, 0.03), "reasoning": (8, 32_768, 4, 8e-5, 0.1)}
# Table 2: what the first stage was, and what of math, science and code the second read.
TULU, BASE = "runs/950M/sft-general/MobileLLM-R1-950M-tulu3", "runs/950M/midtrain/MobileLLM-R1-950M-base"
MATH, SCIENCE, CODE = "open_math_reasoning", "open_science_reasoning", "open_code_reasoning"
TABLE_2 = {
    "without_tulu": (BASE, {MATH, CODE, SCIENCE}),
    "only_math": (TULU, {MATH}),
    "only_code": (TULU, {CODE}),
    "only_science": (TULU, {SCIENCE}),
    "without_science": (TULU, {MATH, CODE}),
    "without_code": (TULU, {MATH, SCIENCE}),
    "without_math": (TULU, {CODE, SCIENCE}),
    "joint": (BASE, {"tulu3", MATH, CODE, SCIENCE}),
    "staged": (TULU, {MATH, CODE, SCIENCE}),
}


def names(arguments: SFTArguments) -> set[str]:
    return {entry["catalog"] for entry in arguments.sources}


@pytest.mark.parametrize("stage", TABLE_4)
@pytest.mark.parametrize("size", SIZES)
def test_the_sizes_are_fine_tuned_as_the_tables_say(size, stage):
    config = RECIPES / size / f"sft_{stage}.yaml"
    assert config.read_text() == (RECIPES / f"140M/sft_{stage}.yaml").read_text().replace("140M", size)
    arguments, training = parse(config)
    rows, length, epochs, peak, warmup = TABLE_4[stage]
    assert (training.per_device_train_batch_size, training.max_length) == (rows, length)
    assert (training.num_train_epochs, training.learning_rate, training.warmup_steps) == (epochs, peak, warmup)
    assert (training.lr_scheduler_type, training.weight_decay, training.bf16) == ("linear", 0.0, True)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.95, 1e-8)
    assert training.packing and training.packing_strategy == "bfd" and training.assistant_only_loss
    assert training.eos_token == "<|eot_id|>" and training.max_steps < 0
    # Whole sets: Table 7 prints no shares.
    assert names(arguments) == set(mixture("posttraining", stage)) and not arguments.is_weighted()
    grown = (arguments.max_position_embeddings, arguments.rope_theta_factor)
    assert grown == ((32_768, 8.0) if stage == "reasoning" else (None, None))


@pytest.mark.parametrize("size", SIZES)
def test_each_stage_goes_on_from_the_folder_of_the_one_before(size):
    folder = f"runs/{size}/midtrain/MobileLLM-R1-{size}-base"
    for stage, name in (("general", f"MobileLLM-R1-{size}-tulu3"), ("reasoning", f"MobileLLM-R1-{size}")):
        arguments, training = parse(RECIPES / size / f"sft_{stage}.yaml")
        assert arguments.model == folder and arguments.released_name() == name
        folder = f"{training.output_dir}/{name}"


def test_every_line_of_table_2_has_its_file():
    assert {path.stem for path in (RECIPES / "ablations").glob("*.yaml")} == set(TABLE_2)
    whole, training = parse(RECIPES / "950M/sft_reasoning.yaml")
    folders = set()
    for name, (model, sets) in TABLE_2.items():
        arguments, settings = parse(RECIPES / "ablations" / f"{name}.yaml")
        assert (arguments.model, names(arguments)) == (model, sets)
        assert arguments.released_name() == f"MobileLLM-R1-950M-{name.replace('_', '-')}"
        # Nothing else differs.
        own = {"sources", "model", "model_name"}
        assert {k: v for k, v in vars(arguments).items() if k not in own} == {
            k: v for k, v in vars(whole).items() if k not in own
        }
        assert settings.learning_rate == training.learning_rate and settings.max_length == training.max_length
        assert settings.num_train_epochs == training.num_train_epochs
        folders.add(settings.output_dir)
    assert len(folders) == len(TABLE_2)


def test_the_tiny_stages_follow_each_other():
    general, training = parse(RECIPES / "tiny/sft_general.yaml")
    reasoning, _ = parse(RECIPES / "tiny/sft_reasoning.yaml")
    assert reasoning.model == f"{training.output_dir}/{general.released_name()}"
    for arguments in (general, reasoning):
        weights = source_weights([as_weighted(entry) for entry in arguments.sources], arguments.weights)
        assert sum(weights.values()) == pytest.approx(1) and len(weights) == 4


TINY = {"model": "m", "sources": [{"synthetic": ["sorting"]}]}
STREAM = {"name": "chats.jsonl", "streaming": True}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": None}, "model: name the model"),
        ({"sources": []}, "sources must be a list of sets"),
        ({"sources": [{"catalog": "wiki"}]}, r"sources\[0\]: wiki is text"),
        ({"sources": [{"synthetic": ["sorting"], "weight": 0.5}]}, "weights must sum to 1"),
        ({"weights": {"sorting": 0.5, "chess": 0.5}}, "'chess' is to have a share of 0.5"),
        ({"probes": [1]}, "probes is .* name -> list of sets"),
        ({"probes": {"a": [{"synthetic": ["sorting"], "weight": 1}]}}, r"probes.a\[0\] has the field 'weight'"),
        ({"rope_theta_factor": 8.0}, "give max_position_embeddings"),
        ({"max_position_embeddings": -1}, "max_position_embeddings=-1 must be positive"),
        ({"sources": [STREAM]}, "max_steps must be given: a stream has no length"),
        ({"model": "nowhere"}, "none could be loaded from nowhere"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_refusal_names_the_field(changes, message, tmp_path, monkeypatch):
    from rich.console import Console

    monkeypatch.chdir(tmp_path)
    training = SFTTrainingArguments("run", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=message):
        run_sft(SFTArguments(**(TINY | changes)), training, Console(quiet=True))
    assert not Path("run/rows").exists()


def test_streams_that_are_mixed_need_weights(tmp_path):
    from rich.console import Console

    training = SFTTrainingArguments(str(tmp_path), use_cpu=True, bf16=False, max_steps=3)
    arguments = SFTArguments(model="m", sources=[STREAM, {**STREAM, "source": "other"}])
    with pytest.raises(ValueError, match="streams are mixed by weights"):
        run_sft(arguments, training, Console(quiet=True))


def test_max_length_is_needed(tmp_path):
    with pytest.raises(ValueError, match="max_length must be given"):
        SFTTrainingArguments(str(tmp_path), use_cpu=True, bf16=False, max_length=None)
