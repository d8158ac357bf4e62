"""The pictures are written, and show what they are given."""

import torch

from mobilellm_hf.influence.plots import plot_histograms, plot_influence


def test_the_picture_is_written_and_changes_with_the_scores(tmp_path):
    sources, weights = ["stdlib", "licences"], {"stdlib": 0.9, "licences": 0.1}
    for name, sign in (("a.png", 1.0), ("b.png", -1.0)):
        scores = torch.tensor([[2.0, 1.0], [sign * 0.5, 0.1]])
        plot_influence(scores, sources, ["code", "math"], weights, tmp_path / name)
    first, second = (tmp_path / name for name in ("a.png", "b.png"))
    assert first.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert first.read_bytes() != second.read_bytes()


def test_histograms_bear_scores_that_are_not_finite_and_capabilities_scored_apart(tmp_path):
    early = torch.randn(50, 2, dtype=torch.float64)
    early[0, 0] = float("nan")
    late = 0.1 * torch.randn(50, 2, dtype=torch.float64)
    late[:, 1] = float("nan")  # at this step only the first capability was scored
    for name, scores in (("a.png", {"step 1": early, "step 2": late}), ("b.png", {"step 1": early})):
        plot_histograms(scores, ["code", "math"], tmp_path / name)
    first, second = (tmp_path / name for name in ("a.png", "b.png"))
    assert first.read_bytes()[:4] == b"\x89PNG" and first.read_bytes() != second.read_bytes()
