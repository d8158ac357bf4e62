"""Rivals of the influence mixture, from their published formulas: each finds weights for the sources of a `Proxy`.

    found = regmix(proxy, Path("runs/audit/rivals/regmix"), seed=0)
    found.weights, found.tokens         # source -> share of the tokens; what finding them cost

regmix.py       a swarm of models on random mixtures, and a law fitted to their losses (RegMix, Olmix)
mixmin.py       a model of each source; the mixture of their predictions that suits the probes best (MixMin)
doremi.py       group DRO against a reference model (DoReMi); it never looks at the probes
doge.py         alignment of the sources' gradients with those of the probes (DoGE)
similarity.py   n-grams that sources share with the probes; no model
reweighting.py  what DoReMi and DoGE have in common: a loss that is weighted by source while a model trains
simplex.py      convex functions of weights, minimised
common.py       what a rival returns, and the checks before it begins
"""

from mobilellm_hf.audit.rivals.common import RivalWeights
from mobilellm_hf.audit.rivals.doge import doge
from mobilellm_hf.audit.rivals.doremi import doremi
from mobilellm_hf.audit.rivals.mixmin import mixmin
from mobilellm_hf.audit.rivals.regmix import regmix
from mobilellm_hf.audit.rivals.similarity import similarity

__all__ = ["RivalWeights", "doge", "doremi", "mixmin", "regmix", "similarity"]
