"""What a release's command line may say, and what does not fit."""

import pytest

from mobilellm_hf.hub.arguments import ReleaseArguments
from mobilellm_hf.hub.stages import Target


@pytest.mark.parametrize("given, said", [
    ({"verify": "org/name", "repo": "org/name"}, "repo is of a release, and verify is given"),
    ({"verify": "org/name", "dry_run": True}, "dry_run is of a release"),
    ({"verify": "org/name", "collection": "Small"}, "collection is of a release"),
    ({"verify": "org/name", "accept": ["config.json"]}, "accept is of a release"),
    ({"verify": "org/name", "model": "a", "data_set": "b"}, "not both"),
    ({"repo": "org/name", "model": "a", "data_set": "b"}, "not both"),
    ({"repo": "org/name", "data_set": ".", "pte": "."}, "pte is of a model's release"),
    ({"verify": "org/name", "model": "nowhere"}, "model: there is no nowhere"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        ReleaseArguments(**given).check()


def test_a_verification_takes_the_stage_from_what_it_is_asked_for(model):
    args = ReleaseArguments(verify="org/name@pretrain", model=str(model))
    args.check()
    assert args.target("org/name", "pretrain") == Target("org/name", "pretrain")
    assert args.target("org/name") == Target("org/name", "midtrain-stage1")  # of the run's settings
    args.stage = "midtrain"
    assert args.target("org/name", "pretrain").stage == "midtrain"


def test_the_cards_code_is_run_before_it_is_sent_unless_nothing_is():
    assert ReleaseArguments(model="a").rehearses() and not ReleaseArguments(model="a", dry_run=True).rehearses()
    assert ReleaseArguments(model="a", dry_run=True, rehearse="yes").rehearses()
    assert not ReleaseArguments(model="a", rehearse="no").rehearses()
    assert not ReleaseArguments(data_set="a", rehearse="yes").rehearses()
