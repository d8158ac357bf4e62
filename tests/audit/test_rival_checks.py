"""What every rival refuses before it trains, in words that name the field."""

from dataclasses import replace

import pytest
from rival_cases import make_proxy, rows

from mobilellm_hf.audit.rivals import doge, doremi, mixmin, regmix, similarity
from mobilellm_hf.audit.rivals.common import check_proxy, repetition_caps, run_tokens

RIVALS = {
    "regmix": regmix,
    "mixmin": mixmin,
    "doremi": doremi,
    "doge": doge,
    "similarity": lambda proxy, folder: similarity(proxy),
}
ALL = pytest.mark.parametrize("rival", RIVALS)


@ALL
def test_names_that_differ_are_refused(rival, tmp_path):
    proxy = make_proxy(tmp_path)
    other = replace(proxy, proportional={"noise": 0.5, "up": 0.25, "sideways": 0.25})
    with pytest.raises(ValueError, match="proportional names noise, sideways, up; the sources are down, noise, up"):
        RIVALS[rival](other, tmp_path / "out")
    other = replace(proxy, tokens_per_source={"noise": 100})
    with pytest.raises(ValueError, match="tokens_per_source names noise; the sources are down, noise, up"):
        RIVALS[rival](other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@ALL
def test_one_source_is_no_mixture(rival, tmp_path):
    with pytest.raises(ValueError, match="a mixture needs two or more, not up"):
        RIVALS[rival](make_proxy(tmp_path, {"up": 100}), tmp_path / "out")


@pytest.mark.parametrize("rival", ["regmix", "mixmin", "doge", "similarity"])
def test_a_probe_without_rows_is_named(rival, tmp_path):
    proxy = make_proxy(tmp_path)
    for probes, message in (({}, "there is none"), ({"math": rows("up", 2, 1).select([])}, "'math' has no rows")):
        with pytest.raises(ValueError, match=message):
            RIVALS[rival](replace(proxy, tuning_probes=probes), tmp_path / "out")
    short = rows("up", 2, 1).remove_columns(["labels", "position_ids"]).map(lambda row: {"input_ids": [5]})
    with pytest.raises(ValueError, match="'short' has no predicted token"):
        RIVALS[rival](replace(proxy, tuning_probes={"short": short}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rival", ["doremi", "doge"])
def test_batches_in_parts_are_refused_before_anything_is_trained(rival, tmp_path):
    with pytest.raises(ValueError, match="gradient_accumulation_steps: 4, .* need it whole"):
        RIVALS[rival](make_proxy(tmp_path, gradient_accumulation_steps=4), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shares_and_empty_sources_are_named(tmp_path):
    proxy = make_proxy(tmp_path)
    for shares in ({"noise": 0.5, "up": 0.5, "down": 0.5}, {"noise": 1.0, "up": 0.0, "down": 0.0}):
        with pytest.raises(ValueError, match="positive shares that sum to 1"):
            check_proxy(replace(proxy, proportional=shares))
    sources = {**proxy.sources, "up": proxy.sources["up"].select([])}
    with pytest.raises(ValueError, match="the source 'up' has no rows"):
        check_proxy(replace(proxy, sources=sources))


def test_caps_are_what_the_passes_over_a_source_give(tmp_path):
    proxy = make_proxy(tmp_path, {"noise": 200, "up": 50})
    assert run_tokens(proxy) == 30 * 8 * 16
    assert repetition_caps(proxy, 12_800).tolist() == [1.0, 0.25]
    assert repetition_caps(replace(proxy, max_epochs=2), None).tolist() == [6400 / 3840, 1600 / 3840]
    with pytest.raises(ValueError, match="at most 16,000 tokens"):
        repetition_caps(proxy, 16_001)
