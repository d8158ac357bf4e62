# /// script
# dependencies = ["mobilellm_hf[plots]"]
# ///
"""Scores every row of a data set for its influence on capability probes, and makes a mixture of its sources.

    accelerate launch recipes/score_influence.py --config recipes/tiny/score_influence.yaml
    accelerate launch recipes/score_influence.py --config mine.yaml --curvature adam --output_dir runs/adam

Any number of processes shares the work (one GPU each; on CPUs `torchrun --nproc_per_node 2 recipes/...`), with equal
results. What a killed run has scored stays; the same command goes on. The output folder gets

    scores/CHECKPOINT/shard-*.parquet   a row's influence on each capability (equations 2 and 3)
    influence.parquet                   the checkpoints together (equation 4)
    mixture.yaml                        a weight for each source (equation 5) with its 95% interval, shrunk towards the
                                        proportional mix as far as resampling says; with figures and settings
    bootstrap.npz                       what resampling does to each source's influence, for a mixture of several seeds
    histograms.png, heat_map.png        Figure 5, and source x capability
    samples.md                          the most and the least helpful samples, to read
"""

from mobilellm_hf.influence.scoring_arguments import ScoreInfluenceArguments
from mobilellm_hf.influence.scoring_run import run_scoring
from mobilellm_hf.launch import launch

if __name__ == "__main__":
    launch(__doc__, (ScoreInfluenceArguments,), run_scoring)
