"""EK-FAC (2308.03296) for the probes' gradients: the factors are fitted by kronfluence, the scoring is ours.

    pip install --no-deps kronfluence && pip install einops einconv opt-einsum   # it declares torchvision, needlessly

Kronecker factors exist for the Linear layers of the decoder; embedding, head and norms do not count in these scores.
"""

import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from mobilellm_hf.influence.curvature import Directions
from mobilellm_hf.nll import COLUMNS, IGNORED_LABEL, collate


class EKFACCurvature:
    """Fitted on a sample of the training data, with labels that the model samples (the true Fisher).

    Args:
        model: the model that is to score; a copy of it is fitted.
        dataset: tokenized rows of the training data.
        damping: added to the eigenvalues; by default a tenth of their mean, layer by layer.

    Raises:
        ImportError: kronfluence is not installed; the message has the command.
    """

    def __init__(self, model: PreTrainedModel, dataset: Dataset, batch_size: int = 8, damping: float | None = None):
        self.damping = damping
        self._factors = _fit(model, dataset, batch_size)

    def precondition(self, directions: Directions) -> Directions:
        result = {}
        for module, eigenvalues in self._factors["lambda_matrix"].items():
            value, bias = directions.get(f"{module}.weight"), directions.get(f"{module}.bias")
            if value is None:
                continue
            if bias is not None:  # a bias is one more column of its weight, whose input is 1
                value = torch.cat((value, bias[..., None]), -1)
            inputs, outputs, eigenvalues = (
                factor.to(value.device, value.dtype)
                for factor in (
                    self._factors["activation_eigenvectors"][module],
                    self._factors["gradient_eigenvectors"][module],
                    eigenvalues / self._factors["num_lambda_processed"][module],
                )
            )
            damping = 0.1 * eigenvalues.mean() if self.damping is None else self.damping
            rotated = outputs.mT @ value @ inputs / (eigenvalues + damping)
            value = outputs @ rotated @ inputs.mT
            if bias is not None:
                result[f"{module}.bias"], value = value[..., -1].contiguous(), value[..., :-1].contiguous()
            result[f"{module}.weight"] = value
        return result


def _fit(model: PreTrainedModel, dataset: Dataset, batch_size: int) -> dict[str, dict[str, torch.Tensor]]:
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task
    except ImportError as error:
        raise ImportError(
            "the ekfac curvature needs kronfluence: pip install --no-deps kronfluence && "
            "pip install einops einconv opt-einsum"
        ) from error

    class NextToken(Task):
        def compute_train_loss(self, batch, model, sample=False):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            labels = batch["labels"][:, 1:]
            if sample:
                drawn = torch.multinomial(logits.detach().flatten(0, 1).softmax(-1), 1).view(labels.shape)
                labels = torch.where(labels == IGNORED_LABEL, labels, drawn)
            return F.cross_entropy(logits.mT, labels, ignore_index=IGNORED_LABEL, reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            head = model.get_output_embeddings()
            return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]

        def get_attention_mask(self, batch):
            return batch.get("attention_mask")

    task = NextToken()
    columns = [name for name in COLUMNS if name in dataset.column_names]
    rows = dataset.select_columns(columns).with_format("torch")
    with tempfile.TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng():
        torch.manual_seed(0)
        analyzer = Analyzer(
            "ekfac", prepare_model(copy.deepcopy(model), task), task, cpu=model.device.type == "cpu",
            disable_tqdm=True, output_dir=str(Path(folder)),
        )  # fmt: skip
        analyzer.set_dataloader_kwargs(_collated())
        analyzer.fit_all_factors(
            "factors", rows, per_device_batch_size=batch_size, factor_args=FactorArguments(strategy="ekfac")
        )
        return analyzer.load_all_factors("factors")


def _collated():
    from kronfluence.utils.dataset import DataLoaderKwargs

    def to_batch(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return collate({name: [row[name] for row in rows] for name in rows[0]})

    return DataLoaderKwargs(collate_fn=to_batch)
