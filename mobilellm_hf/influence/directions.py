"""The directions of a checkpoint on disk: its probes' gradients after the curvature's inverse.

Each probe's gradient is one file, taken by one of the processes; the first process applies the curvature. So the
scores are the same for any number of processes, and an interrupted run has lost no gradient that was finished.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mobilellm_hf.influence.curvature import AdamCurvature, Curvature, DataInfCurvature, IdentityCurvature
from mobilellm_hf.influence.gradients import mean_gradient
from mobilellm_hf.influence.scorer import exclude_parameters

CURVATURES = ("identity", "adam", "datainf", "ekfac")


def make_curvature(
    name: str,
    model: PreTrainedModel,
    checkpoint: str | Path,
    rows: Dataset,
    batch_size: int = 8,
    datainf_layers: str = "embedding_and_final",
) -> Curvature:
    """A curvature by name, for a checkpoint.

    Args:
        name: one of `CURVATURES`.
        checkpoint: folder with the `optimizer.pt` that "adam" reads.
        rows: sample of the training data on which "datainf" and "ekfac" are fitted.

    Raises:
        ValueError: the name is unknown, or the curvature cannot be made of this checkpoint or these rows.
    """
    if name == "identity":
        return IdentityCurvature()
    if name == "adam":
        return AdamCurvature.from_checkpoint(checkpoint, model)
    if name == "datainf":
        return DataInfCurvature(model, rows, datainf_layers)
    if name == "ekfac":
        from mobilellm_hf.influence.ekfac import EKFACCurvature

        return EKFACCurvature(model, rows, batch_size)
    raise ValueError(f"curvature={name!r} must be one of {', '.join(CURVATURES)}")


def build_directions(
    folder: Path,
    model: PreTrainedModel,
    probes: Mapping[str, Dataset],
    curvature: Callable[[], Curvature],
    exclude: Sequence[str] = (),
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """parameter name -> (C, *shape) on the model's device, from `folder` as far as it is there.

    To be called by all processes; each keeps its model.

    Raises:
        ValueError: a probe's gradient is not finite or a pattern of `exclude` matches nothing.
    """
    together = write_directions(folder, model, probes, curvature, exclude, batch_size, on_batch)
    return {name: value.to(model.device) for name, value in load_file(together).items()}


def write_directions(
    folder: Path,
    model: PreTrainedModel,
    probes: Mapping[str, Dataset],
    curvature: Callable[[], Curvature],
    exclude: Sequence[str] = (),
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
    label: str | None = None,
) -> Path:
    """The file of the directions, for all processes. label: what its name says, by default the probes."""
    state = PartialState()
    files = [folder / f"gradient-{name}.safetensors" for name in probes]
    together = folder / f"directions-{label or '-'.join(probes)}.safetensors"
    for number, (name, probe) in enumerate(probes.items()):
        if number % state.num_processes == state.process_index and not together.exists():
            once(files[number], lambda name=name, probe=probe: _gradient(model, name, probe, batch_size, on_batch))
    state.wait_for_everyone()

    def precondition() -> dict[str, torch.Tensor]:
        gradients = [load_file(file) for file in files]
        kept = exclude_parameters(gradients[0], exclude)
        stacked = {name: torch.stack([gradient[name] for gradient in gradients]).to(model.device) for name in kept}
        return curvature().precondition(stacked)

    if state.is_main_process:
        once(together, precondition)
    state.wait_for_everyone()
    return together


def _gradient(model, name: str, probe: Dataset, batch_size: int, on_batch) -> dict[str, torch.Tensor]:
    try:
        return mean_gradient(model, probe, batch_size, on_batch, average="samples")
    except ValueError as error:
        raise ValueError(f"probe {name!r}: {error}") from error


def once(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> None:
    """Tensors on disk, computed if they are not there yet; the file is whole or absent."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({name: value.cpu().contiguous() for name, value in make().items()}, partial)
        os.replace(partial, path)
