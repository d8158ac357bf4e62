"""Releases on the Hub: what a run left, as one commit that somebody else can load, with a card that says no more.

stages.py          branches, tags and cards of the stages
files.py           what of a model's folder is released, and why the rest is not
facts.py           what the files of a run say: the only numbers that a card has; sources.py, of its data;
                   results.py, of an evaluation; programs.py, of an export for ExecuTorch
cards.py           templates and facts to a card, and HTML to look at; blocks.py runs its code
leaks.py           tokens, keys and paths that must not be published
package.py         a model's release before it is sent; data_sets.py, a data set's
access.py          whether the token may
releases.py        one commit and a tag, whatever the network does; ledger.py, what was released from here
verification.py    a release as somebody else finds it
callback.py        releases while a Trainer trains
arguments.py       what command lines say of releases, those of the recipes that train too
collection.py      the sizes of a family together
"""

from mobilellm_hf.hub.access import AccessError, check_access
from mobilellm_hf.hub.callback import ReleaseCallback
from mobilellm_hf.hub.data_sets import package_data_set
from mobilellm_hf.hub.package import Release, package_model
from mobilellm_hf.hub.releases import MovedBranchError, Published, publish
from mobilellm_hf.hub.stages import Target
from mobilellm_hf.hub.verification import verify

__all__ = [
    "AccessError",
    "MovedBranchError",
    "Published",
    "Release",
    "ReleaseCallback",
    "Target",
    "check_access",
    "package_data_set",
    "package_model",
    "publish",
    "verify",
]
