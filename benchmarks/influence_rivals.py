"""Other ways to influence scores, for benchmarks/influence.py: two libraries and two baselines on the same weights.

What is given to each so that it does its best here:

- kronfluence: a probe is one packed row, so that three probes are three queries of one backward pass and not one query
  for every probe row; per-sample gradients are formed (what `enable_post_process_per_sample_gradient` switches on),
  which costs less than its default, an einsum per layer, as soon as there are several queries.
- bergson: its in-memory collector and scorer, with whole batches; no index on disk.
- baselines: every sample's gradient by autograd; for TRAK and LESS hashed to 2,048 numbers (CountSketch), since
  drawing a dense projection of 28 million parameters costs a CPU many times the gradients themselves.
"""

import copy
import importlib
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from mobilellm_hf.influence import Curvature
from mobilellm_hf.nll import COLUMNS, IGNORED_LABEL, collate, evaluation_batches, summed_nll

INSTALL = {
    "kronfluence": "pip install --no-deps kronfluence && pip install einops einconv opt-einsum",
    "bergson": "pip install bergson",
}
# What the libraries leave out, for `exclude`.
NOT_BLOCK_LINEAR = ["model.embed_tokens.*", "*norm*"]
Scores = torch.Tensor


def missing(library: str) -> str | None:
    """What to print in the place of the library's figures, or None if it can be imported."""
    try:
        importlib.import_module(library)
    except ModuleNotFoundError as error:
        part = "" if error.name == library else f" ({error.name} is missing)"
        return f"not installed{part}: {INSTALL[library]}"
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' log lines and warnings, which would interrupt the table's progress."""
    former = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(former)


def block_linears(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def sample_gradients(model: PreTrainedModel, rows: Dataset) -> Iterator[dict[str, torch.Tensor]]:
    """Every row's own gradient of mean NLL, by autograd."""
    parameters = dict(model.named_parameters())
    for batch, predicted in evaluation_batches(model, rows, batch_size=1):
        gradients = torch.autograd.grad(summed_nll(model, batch) / predicted, list(parameters.values()))
        yield dict(zip(parameters, gradients, strict=True))


def naive_scores(model: PreTrainedModel, rows: Dataset, directions: Mapping[str, torch.Tensor]) -> Scores:
    """The loop that everyone writes first: a sample's gradient, and its inner products with the directions."""
    flat = {name: value.flatten(1) for name, value in directions.items()}
    return torch.stack([
        sum(flat[name] @ value.flatten() for name, value in gradient.items())
        for gradient in sample_gradients(model, rows)
    ])  # fmt: skip


class CountSketch:
    """Gradients to `size` numbers whose inner products are those of the gradients in expectation."""

    def __init__(self, model: PreTrainedModel, size: int = 2048, curvature: Curvature | None = None):
        generator = torch.Generator().manual_seed(0)
        # The lower half of the buckets counts with a plus, the upper half with a minus: a hash and a sign in one.
        self.buckets = {
            name: torch.randint(2 * size, (parameter.numel(),), generator=generator, dtype=torch.int32)
            for name, parameter in model.named_parameters()
        }
        self.model, self.size, self.curvature = model, size, curvature

    def __call__(self, rows: Dataset) -> torch.Tensor:
        """(rows, size), of every row's gradient."""
        return torch.stack([self._sketch(gradient) for gradient in sample_gradients(self.model, rows)])

    def _sketch(self, gradient: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.curvature is not None:
            gradient = self.curvature.precondition(gradient)
        total = torch.zeros(2 * self.size)
        for name, value in gradient.items():
            total.index_add_(0, self.buckets[name], value.flatten())
        return total[: self.size] - total[self.size :]


def trak_scores(model: PreTrainedModel, rows: Dataset, probes: Mapping[str, Dataset], size: int = 2048) -> Scores:
    """TRAK (2303.14186) of one model: the inverse of the sketched gradients' own kernel between sample and probe.

    With fewer samples than numbers the kernel has no inverse: a tenth of its mean eigenvalue is added, as in EK-FAC.
    """
    sketch = CountSketch(model, size)
    features = sketch(rows)
    targets = torch.stack([sketch(probe).mean(0) for probe in probes.values()])
    gram = features @ features.mT
    return torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram)), features @ targets.mT)


def less_scores(
    model: PreTrainedModel, rows: Dataset, probes: Mapping[str, Dataset], adam: Curvature, size: int = 2048
) -> Scores:
    """LESS (2402.04333) of one checkpoint: the cosine of a sample's Adam update and a probe's gradient, sketched."""
    features = CountSketch(model, size, adam)(rows)
    sketch = CountSketch(model, size)
    targets = torch.stack([sketch(probe).mean(0) for probe in probes.values()])
    return F.normalize(features, dim=-1) @ F.normalize(targets, dim=-1).mT


def bergson_scores(
    model: PreTrainedModel, rows: Dataset, directions: Mapping[str, torch.Tensor], batch: int
) -> Scores:
    """bergson's exact products with given directions, over the Linear layers of the blocks."""
    from bergson import Scorer
    from bergson.score.score_writer import InMemorySequenceScoreWriter

    prefix = f"{model.base_model_prefix}."
    queries = {name.removeprefix(prefix): directions[f"{name}.weight"].flatten(1) for name in block_linears(model)}
    writer = InMemorySequenceScoreWriter(len(rows), len(next(iter(queries.values()))))
    scorer = Scorer(queries, list(queries), writer, model.device, torch.float32)
    _bergson_collector(model, rows, batch, scorer=scorer)
    return writer.scores


def bergson_projected_scores(
    model: PreTrainedModel, rows: Dataset, probes: Mapping[str, Dataset], batch: int, size: int = 16
) -> Scores:
    """Inner products of gradients that bergson projects to `size` x `size` numbers a layer, its default."""
    features, *targets = (_bergson_collector(model, data, batch, size).gradients for data in (rows, *probes.values()))
    return torch.stack(
        [sum(features[name].float() @ target[name].float().mean(0) for name in features) for target in targets], 1
    )


def _bergson_collector(model, rows: Dataset, batch: int, projection: int | None = None, scorer=None):
    """Runs bergson over the rows; its progress bars and log lines are left out."""
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from bergson.collector import collector as bars

    rows = rows.select_columns("input_ids").with_format(None)
    batches = [list(range(start, min(start + batch, len(rows)))) for start in range(0, len(rows), batch)]
    progress, bars.tqdm = bars.tqdm, lambda batches, **_: batches
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            config = IndexConfig(run_path=str(Path(folder) / "run"), loss_reduction="mean")
            Path(config.partial_run_path).mkdir(parents=True)
            collector = InMemoryCollector(
                model=model.base_model, cfg=config, data=rows, scorer=scorer,
                processor=GradientProcessor(projection_dim=projection),
            )  # fmt: skip
            CollectorComputer(model, rows, collector=collector, batches=batches, cfg=config).run_with_collector_hooks()
    finally:
        bars.tqdm = progress
    return collector


def kronfluence_scores(
    model: PreTrainedModel,
    rows: Dataset,
    probes: Mapping[str, Dataset],
    strategy: str,
    batch: int,
    parts: list[dict[str, float]] | None = None,
) -> Scores:
    """kronfluence's pairwise scores, "identity" or "ekfac", over the Linear layers of the blocks.

    parts: receives the CPU seconds of fitting, of the probes' gradients and of scoring, an entry a call.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    task = _next_token_task(model)
    started = time.process_time()
    train, queries = _labelled(rows), Dataset.from_list([_packed(probe) for probe in probes.values()])
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        analyzer = Analyzer(
            "benchmark", prepare_model(copy.deepcopy(model).eval(), task), task, cpu=model.device.type == "cpu",
            disable_tqdm=True, output_dir=folder,
        )  # fmt: skip
        analyzer.set_dataloader_kwargs(_collated())
        analyzer.fit_all_factors(
            "factors", train, per_device_batch_size=batch, factor_args=FactorArguments(strategy=strategy)
        )
        fitted, task.scoring_since = time.process_time(), None
        analyzer.compute_pairwise_scores(
            "scores", "factors", queries.with_format("torch"), train, per_device_query_batch_size=len(queries),
            per_device_train_batch_size=batch, score_args=ScoreArguments(damping_factor=None),
        )  # fmt: skip
        scores = analyzer.load_pairwise_scores("scores")["all_modules"].mT
    if parts is not None:
        ended = time.process_time()
        seconds = (fitted - started, task.scoring_since - fitted, ended - task.scoring_since)
        parts.append(dict(zip(("fit", "probes", "score"), seconds, strict=True)))
    return scores / (len(rows[0]["input_ids"]) - 1)


def _next_token_task(model: PreTrainedModel):
    from kronfluence.task import Task

    tracked = block_linears(model)

    class NextToken(Task):
        enable_post_process_per_sample_gradient = True
        scoring_since = None

        def compute_train_loss(self, batch, model, sample=False):
            self.scoring_since = self.scoring_since or time.process_time()
            return _summed_nll(batch, model, sample)

        def compute_measurement(self, batch, model):
            tokens = (batch["labels"][:, 1:] != IGNORED_LABEL).sum(1)[0]  # probes are alike in length
            return _summed_nll(batch, model, False) / tokens

        def get_influence_tracked_modules(self):
            return tracked

    return NextToken()


def _summed_nll(batch, model, sample: bool) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    if sample:  # the true Fisher
        drawn = torch.multinomial(logits.detach().flatten(0, 1).softmax(-1), 1).view(labels.shape)
        labels = torch.where(labels == IGNORED_LABEL, labels, drawn)
    return F.cross_entropy(logits.mT, labels, ignore_index=IGNORED_LABEL, reduction="sum")


def _labelled(rows: Dataset) -> Dataset:
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows["input_ids"]]).with_format("torch")


def _packed(probe: Dataset) -> dict[str, list[int]]:
    """All rows of a probe as one, in which attention and labels stay within each."""
    rows = probe["input_ids"][:]
    return {
        "input_ids": [token for row in rows for token in row],
        "labels": [token for row in rows for token in (IGNORED_LABEL, *row[1:])],
        "position_ids": [position for row in rows for position in range(len(row))],
    }


def _collated():
    from kronfluence.utils.dataset import DataLoaderKwargs

    def to_batch(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return collate({name: [row[name] for row in rows] for name in rows[0] if name in COLUMNS})

    return DataLoaderKwargs(collate_fn=to_batch)
