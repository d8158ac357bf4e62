"""Pictures of training runs: which panels there are, what they show, and that labels do not overlap."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mobilellm_hf.training import plots
from mobilellm_hf.training.plots import plot_probe_nll, plot_training


def log(steps: int = 100, **figures) -> list[dict]:
    """Entries of which every figure is a function of the step."""
    return [{"step": step, **{key: value(step) for key, value in figures.items()}} for step in range(0, steps + 1, 10)]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """drawn(logs, ...) -> title -> panel, of the figure that is saved."""
    saved = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (savefig(self, *a, **k), saved.append(self)))

    def draw(*args, **options):
        plot_training(args[0], tmp_path / "picture.png", *args[1:], **options)
        assert (tmp_path / "picture.png").stat().st_size > 5_000
        return {cell.get_title("left"): cell for cell in saved[-1].axes}

    return draw


def labels(cell) -> list[str]:
    return [text.get_text() for text in cell.texts]


def test_there_is_a_panel_for_what_is_there_and_no_other(drawn):
    both = {"loss": lambda s: 5 - s / 50, "learning_rate": lambda s: 1e-3}
    assert list(drawn(log(**both))) == ["training loss (nats per token)", "learning rate"]
    everything = both | {key: lambda s: 0.5 for key in (
        "distillation/kl", "distillation/nll", "loss/wiki", "probe_nll/code", "rank_me", "tokens_per_second", "mfu",
        "grad_norm", "mixture/wiki", "influence/positive", "influence/positive/code",
    )}  # fmt: skip
    cells = drawn(log(**everything))
    assert len(cells) == len(plots.PANELS)
    assert sorted(labels(cells["training loss (nats per token)"])) == ["KL to teacher", "NLL", "loss"]
    assert sorted(labels(cells["positive influence (share)"])) == ["code", "mean"]
    with pytest.raises(ValueError, match="nothing to draw"):
        drawn([{"step": 1, "epoch": 1.0}])


def test_lines_are_the_figures_over_steps_or_tokens(drawn):
    entries = log(rank_me=lambda s: 10 + s)
    line = drawn(entries)["RankMe of the last hidden states"].lines[0]
    assert line.get_xdata().tolist() == list(range(0, 101, 10)) and line.get_ydata()[-1] == 110
    cell = drawn(entries, tokens_per_step=20_000)["RankMe of the last hidden states"]
    assert cell.lines[0].get_xdata()[-1] == pytest.approx(2.0)
    assert cell.get_xlabel() == "training tokens (millions)" and labels(cell) == ["110"]


def test_a_long_curve_is_smoothed_over_what_was_logged(drawn):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 2_001)
    cell = drawn(log(20_000, loss=lambda s: 3 + noise[s // 10]))["training loss (nats per token)"]
    raw, smooth = (line.get_ydata() for line in cell.lines)
    assert raw.std() > 0.9 and smooth.std() < 0.2 and smooth[0] == pytest.approx(raw[:41].mean())


def test_the_first_steps_do_not_flatten_the_rest(drawn):
    cell = drawn(log(2_000, loss=lambda s: 2 + 9 * np.exp(-s / 30)))["training loss (nats per token)"]
    assert 2 < cell.get_ylim()[1] < 4


def test_a_mixture_is_stacked_and_held_until_the_next(drawn):
    entries = [{"step": 0, "mixture/a": 0.5, "mixture/b": 0.5}, {"step": 60, "mixture/a": 0.9, "mixture/b": 0.1}]
    cell = drawn([*entries, {"step": 100, "loss": 1.0}])["mixture (share of tokens)"]
    assert labels(cell) == ["a 90%", "b 10%"]
    corners = cell.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in corners} >= {(0, 0.5), (60, 0.5), (60, 0.9)} and cell.get_xlim()[1] == 100


def test_runs_are_told_apart_by_colour_or_style_and_mixtures_by_panel(drawn):
    probes = {"probe_nll/code": lambda s: 2.0, "probe_nll/math": lambda s: 1.0}
    first = log(loss=lambda s: 3.0, **probes, **{"mixture/a": lambda s: 1.0})
    cells = drawn({"one": first, "two": first})
    lines = cells["held-out NLL (nats per token)"].lines
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--", "--"]
    assert [line.get_color() for line in lines[:2]] == [line.get_color() for line in lines[2:]]
    lines = cells["training loss (nats per token)"].lines
    assert len({line.get_color() for line in lines}) == 2
    assert {"mixture (share of tokens), one", "mixture (share of tokens), two"} < set(cells)


def test_fourteen_labels_do_not_overlap(drawn):
    ends = {f"loss/source {n}": (lambda s, n=n: 2 + n * 1e-3) for n in range(14)}
    cell = drawn(log(**ends))["training loss by source (nats per token)"]
    figure = cell.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in cell.texts]
    assert len(boxes) == 14 and len({text.get_color() for text in cell.texts}) == 14
    assert labels(cell) == [f"source {n}" for n in range(14)]
    assert not any(left.overlaps(right) for left in boxes for right in boxes if left is not right)
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)


def test_labels_move_as_little_as_they_must():
    assert plots._spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert plots._spread([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    assert plots._spread([1.0, 1.0], 0.1) == pytest.approx([0.94, 1.04])
    assert plots._spread([], 0.1) == []


def test_the_picture_of_probe_nll_changes_with_the_curves(tmp_path):
    for name, value in (("a.png", 2.0), ("b.png", 1.0)):
        curves = {"code": [(0, 9.0), (5, 3.0), (10, value)]}
        plot_probe_nll({"influence mix": curves, "uniform mix": curves}, tmp_path / name, tokens_per_step=4096)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
