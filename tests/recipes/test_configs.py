"""Every YAML file beside the recipes: read by the recipe's own parser, and held to Tables 3 to 6."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer
from trl import TrlParser

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.curation.arguments import CurateArguments
from mobilellm_hf.data.catalog import mixture, printed
from mobilellm_hf.data.catalog_sources import BENCHMARK_ROWS
from mobilellm_hf.data.source_weights import source_weights
from mobilellm_hf.evaluation.arguments import EvaluationArguments
from mobilellm_hf.training.arguments import StageArguments, StageTrainingArguments
from mobilellm_hf.training.grpo_arguments import GRPOArguments, GRPOTrainingArguments
from mobilellm_hf.training.sft_arguments import SFTArguments, SFTTrainingArguments

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
CONFIGS = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "accelerate")
ACCELERATE = sorted((RECIPES / "accelerate").glob("*.yaml"))
SIZES = ["140M", "360M", "950M"]
GPUS = 128
# Table 4: tokens of a stage, rows of a GPU, length, steps, peak learning rate, warm-up, and where it ends.
PRETRAINING = (2e12, 16, 2048, 500_000, 4e-3, 2_000, 0.1)
MIDTRAINING = (1e11, 4, 4096, 50_000, 3.6e-4, 0, 0.0)
TABLE_4 = {
    "pretrain_phase1": (*PRETRAINING, ("pretraining", 1)),
    "pretrain_phase2": (*PRETRAINING, ("pretraining", 2)),
    "midtrain_phase1": (*MIDTRAINING, ("midtraining", 1)),
    "midtrain_phase2": (*MIDTRAINING, ("midtraining", 2)),
}
SIZED = [RECIPES / size / f"{name}.yaml" for size in SIZES for name in TABLE_4]


def load_recipe(name: str):
    if f"recipe_{name}" not in sys.modules:
        spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
        sys.modules[f"recipe_{name}"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[f"recipe_{name}"])
    return sys.modules[f"recipe_{name}"]


def classes_of(config: Path) -> tuple[type, ...]:
    if config.stem.startswith("evaluate"):
        return (EvaluationArguments,)
    if config.stem.startswith("sft_") or config.parent.name == "ablations":
        return SFTArguments, SFTTrainingArguments
    if config.stem == "grpo":
        return GRPOArguments, GRPOTrainingArguments
    recipe = config.stem.partition("_phase")[0].removesuffix("_sft")
    module = load_recipe(recipe)
    if recipe == "midtrain":
        return module.MidtrainArguments, module.MidtrainTrainingArguments
    if recipe == "leave_one_out":
        return module.LeaveOneOutArguments, module.LeaveOneOutTrainingArguments
    if recipe == "audit":
        return module.AuditArguments, module.AuditTrainingArguments
    if recipe == "pretrain":
        return StageArguments, StageTrainingArguments
    return (module.CurateArguments if recipe == "curate" else module.ScoreInfluenceArguments,)


def parse(config: Path, *options: str) -> tuple:
    """What the recipe gets; on a machine without a GPU."""
    classes = classes_of(config)
    on_cpu = ["--use_cpu", "true"] if len(classes) == 2 else []
    return TrlParser(classes).parse_args_and_config(["--config", str(config), *on_cpu, *options])


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working directory in which what earlier commands leave is there, by name only."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/quickstart/rows").mkdir(parents=True)
    shares = {"weights": {"stdlib": 0.5, "sympy_docs": 0.5}}
    for file in ("runs/quickstart/influence/mixture.yaml", "runs/tiny-midtrain-phase1/mixture.yaml"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(yaml.safe_dump(shares))
    return tmp_path


def test_each_size_has_the_same_four_files():
    assert set(CONFIGS) >= set(SIZED)
    for name in TABLE_4:
        first = (RECIPES / "140M" / f"{name}.yaml").read_text()
        assert first.count("140M") > 3
        for size in SIZES[1:]:
            assert (RECIPES / size / f"{name}.yaml").read_text() == first.replace("140M", size)


@pytest.mark.parametrize("config", [*CONFIGS, *ACCELERATE], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_begins_with_what_it_is_for(config):
    lines = config.read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines[0]) > 30
    assert max(map(len, lines)) <= 119
    assert sum("#" in line for line in lines) >= 3


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_takes_its_file(config, elsewhere):
    arguments = parse(config)[0]
    if isinstance(arguments, StageArguments | CurateArguments | SFTArguments | GRPOArguments | EvaluationArguments):
        arguments.check()
    given = yaml.safe_load(config.read_text())
    for value in parse(config):
        for name in vars(value).keys() & given.keys():
            assert getattr(value, name) == given[name], name


def test_a_field_that_no_recipe_has_is_refused(elsewhere):
    text = (RECIPES / "tiny/pretrain.yaml").read_text()
    Path("pretrain.yaml").write_text(text.replace("seq_length:", "sequence_length:"))
    with pytest.raises(ValueError, match="sequence_length"):
        parse(Path("pretrain.yaml"))


@pytest.mark.parametrize("config", SIZED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_sizes_are_trained_as_the_tables_say(config, elsewhere):
    arguments, training = parse(config)
    tokens, rows, length, steps, peak, warmup, end, phase = TABLE_4[config.stem]
    assert (training.per_device_train_batch_size, arguments.seq_length, training.max_steps) == (rows, length, steps)
    assert training.gradient_accumulation_steps == 1
    assert steps * rows * length * GPUS == pytest.approx(tokens, rel=0.05)  # which the table rounds
    assert (training.learning_rate, training.warmup_steps, training.final_learning_rate) == (peak, warmup, end)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.95, 1e-8)
    assert training.weight_decay == 0.1 and training.bf16
    assert (arguments.teacher == "meta-llama/Llama-3.1-8B-Instruct") == (phase[0] == "midtraining")
    assert (arguments.temperature, arguments.alpha, arguments.vocabulary) == (1.0, 1.0, "same")

    weights = source_weights(arguments.sources, arguments.weights)
    assert weights == mixture(*phase) and sum(weights.values()) == 1
    assert {entry["catalog"] for entry in arguments.sources} == set(weights)
    for name, percent in printed(*phase).items():
        if name in weights:
            assert 100 * weights[name] == pytest.approx(percent, rel=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_each_stage_goes_on_from_the_folder_of_the_one_before(size, elsewhere):
    folder = None
    for name in TABLE_4:
        arguments, training = parse(RECIPES / size / f"{name}.yaml")
        assert arguments.model == folder
        folder = f"{training.output_dir}/{arguments.released_name()}"
    assert folder == f"runs/{size}/midtrain/MobileLLM-R1-{size}-base"


def test_the_model_of_a_size_has_the_context_of_mid_training(elsewhere):
    arguments = parse(SIZED[0])[0]
    config = MobileLLMConfig.for_size(arguments.model_size, **arguments.model_config)
    assert config.max_position_embeddings == parse(RECIPES / "140M/midtrain_phase1.yaml")[0].seq_length


def test_mid_training_does_not_probe_what_it_reads(elsewhere):
    for phase in (1, 2):
        arguments = parse(RECIPES / f"140M/midtrain_phase{phase}.yaml")[0]
        probed = {entry["catalog"] for entries in arguments.probes.values() for entry in entries}
        assert not probed & {entry["catalog"] for entry in arguments.sources}
        # Influence scores rows on disk: none of the sources may stream.
        assert all(
            entry.get("streaming") is False or entry["catalog"] in BENCHMARK_ROWS for entry in arguments.sources
        )


@pytest.mark.parametrize("config", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_takes_its_file(config):
    loaded = load_config_from_file(str(config))
    expected = {"single": DistributedType.NO, "fsdp2": DistributedType.FSDP}
    assert loaded.distributed_type == expected.get(config.stem, DistributedType.MULTI_GPU)
    command = ["--config_file", str(config), "--num_processes", "4", "recipes/pretrain.py", "--config", "some.yaml"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert args.num_processes == 4
    assert args.mixed_precision == ("no" if config.stem == "single" else "bf16")
    if config.stem == "fsdp2":
        assert args.use_fsdp and args.fsdp_version == 2 and args.fsdp_state_dict_type == "FULL_STATE_DICT"
        assert args.fsdp_transformer_layer_cls_to_wrap in MobileLLMForCausalLM._no_split_modules


@pytest.mark.parametrize("recipe", ["pretrain", "midtrain"])
def test_help_names_the_fields(recipe):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "COLUMNS": "140"}
    command = [sys.executable, str(RECIPES / f"{recipe}.py"), "--help"]
    run = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for field in ("--config", "--seq_length", "--resample_every", "--teacher", "--final_learning_rate", "--max_steps"):
        assert field in run.stdout


# What a stage refuses before anything is loaded

NEW = {"model_size": "140M", "tokenizer": "tokenizer", "sources": [{"name": "embedded:stdlib", "weight": 1.0}]}
PROBES = {"code": [{"name": "embedded:stdlib", "split": "probe"}]}


def test_a_stage_may_be_new_or_go_on():
    new = StageArguments(**NEW, probes=PROBES, resample_every=10, reject_rule="code")
    later = StageArguments(model="runs/before", sources=NEW["sources"])
    assert new.check() is None and new.resamples() and new.released_name() == "MobileLLM-R1-140M-pretrain-stage1"
    assert later.check() is None and not later.resamples() and not later.distils()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_size": None}, "give model .* or model_size or model_config"),
        ({"model": "runs/before"}, "leave out model_size and model_config"),
        ({"model_size": "1B"}, "model_size='1B' must be one of 140M"),
        ({"tokenizer": None}, "a new model needs a tokenizer"),
        ({"sources": []}, "sources must be a list of sources"),
        ({"sources": [{"name": "embedded:stdlib", "share": 1}]}, r"sources\[0\] has the field 'share'"),
        ({"sources": [{"rows": "nowhere"}]}, r"sources\[0\]: there is no folder nowhere"),
        ({"sources": [{"catalog": "arxiv", "weight": 1}]}, r"sources\[0\]: arxiv cannot be loaded by its name"),
        ({"sources": [{"name": "embedded:stdlib"}]}, r"sources\[0\] has no weight"),
        ({"sources": [{"name": "embedded:stdlib", "weight": 0.5}]}, "weights must sum to 1"),
        ({"weights": {"stdlib": 1}}, r"sources\[0\] has weight, and there are weights for all"),
        ({"probes": [PROBES]}, "probes is .* capability -> list of sources"),
        ({"probes": {"code": [{"name": "embedded:stdlib", "weight": 1}]}}, r"probes.code\[0\] has the field 'weight'"),
        ({"seq_length": 0}, "seq_length=0 must be positive"),
        ({"block_size": 0}, "block_size=0 must be positive"),
        ({"rows_per_probe": 0}, "rows_per_probe=0 must be positive"),
        ({"monitor_every": 0}, "monitor_every=0 must be positive"),
        ({"teacher_top_k": 0}, "teacher_top_k=0 must be positive"),
        ({"resample_every": 0, "probes": PROBES}, "resample_every=0 must be positive"),
        ({"candidates_per_source": 0}, "candidates_per_source=0 must be positive"),
        ({"delay_steps": 0}, "delay_steps=0 must be positive"),
        ({"alpha": 1.5}, "alpha=1.5 must be between 0 and 1"),
        ({"temperature": 0.0}, "temperature=0.0 positive"),
        ({"floor": 1.0}, "floor=1.0 at least 0 and below 1"),
        ({"resample_every": 10}, "influence resampling .*resample_every.* needs probes"),
        ({"resample_at_start": True}, "influence resampling .*resample_at_start.* needs probes"),
        ({"reject_rule": "code"}, "reject_rule='code' must be mean, any"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_refusal_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        StageArguments(**(NEW | changes)).check()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": None, "model_size": "140M"}, "model: mid-training goes on"),
        ({"stage": "pretrain"}, "stage='pretrain'"),
    ],
)
def test_mid_training_refuses_what_is_not_its_own(changes, message):
    given = {"model": "runs/before", "tokenizer": "tokenizer", "sources": NEW["sources"]} | changes
    with pytest.raises(ValueError, match=message):
        load_recipe("midtrain").MidtrainArguments(**given).check()


# The optimizer of Table 4


def build_trainer(tmp_path, training: type, **options) -> Trainer:
    config = MobileLLMConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    arguments = training(str(tmp_path), max_steps=100, use_cpu=True, **options)
    trainer = Trainer(MobileLLMForCausalLM(config), arguments)
    trainer.create_optimizer_and_scheduler(num_training_steps=100)
    return trainer


def learning_rates(trainer: Trainer) -> list[float]:
    """By step: entry n is what step n + 1 trains with."""
    rates = []
    for _ in range(101):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return rates


def test_adamw_decays_matrices_and_not_norms(tmp_path):
    trainer = build_trainer(tmp_path, StageTrainingArguments)
    optimizer = trainer.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["eps"] == 1e-8
    decayed, plain = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    modules = trainer.model.named_modules()
    matrices = {id(m.weight) for _, m in modules if isinstance(m, nn.Linear | nn.Embedding)}
    norms = {id(p) for name, p in trainer.model.named_parameters() if "norm" in name}
    assert (decayed, plain) == (matrices, norms) and len(norms) == 5


def test_pretraining_warms_up_and_falls_to_a_tenth(tmp_path):
    rates = learning_rates(build_trainer(tmp_path, StageTrainingArguments, learning_rate=4e-3, warmup_steps=20))
    assert rates[0] == 0 and rates[10] == pytest.approx(2e-3)
    assert rates[20] == max(rates) == pytest.approx(4e-3)
    assert rates[60] == pytest.approx((4e-3 + 4e-4) / 2)  # half-way down
    assert rates[100] == pytest.approx(4e-4)


def test_mid_training_falls_to_zero(tmp_path):
    training = load_recipe("midtrain").MidtrainTrainingArguments
    rates = learning_rates(build_trainer(tmp_path, training, learning_rate=3.6e-4))
    assert rates[0] == max(rates) == 3.6e-4
    assert rates[50] == pytest.approx(1.8e-4) and rates[100] == pytest.approx(0, abs=1e-12)


def test_arguments_refuse_what_a_mixture_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="max_steps must be given"):
        StageTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="final_learning_rate=1.5"):
        StageTrainingArguments(str(tmp_path), max_steps=1, final_learning_rate=1.5, use_cpu=True)
