# /// script
# dependencies = ["mobilellm_hf[plots]"]
# ///
"""Trains small models on a mixture, on baselines, placebos and rivals, and says whether the mixture helps.

    python recipes/audit.py --mixture mine.yaml --config recipes/tiny/audit.yaml --dry_run
    accelerate launch recipes/audit.py --mixture mine.yaml --config recipes/tiny/audit.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/audit.py --mixture mine.json --config mine.yaml

A mixture is any YAML or JSON file of source: weight, or one with a key `weights`, whichever tool wrote it. All arms
start alike seed by seed, cost equally many tokens once the finding of their weights is charged, read no source more
than four times, and are trained at two learning rates. What decides are bits per byte on probes that neither the
mixture nor a rival was tuned on. `--dry_run` measures the speed and says how long it would take, rivals and teacher
included. With several processes (on CPUs `torchrun --nproc_per_node 2 recipes/...`) each trains whole models,
whichever are not done. A killed run goes on with the same command; another mixture in the same folder costs only what
its arms do not share, more seeds or arms only their own; other data or another tokenizer at the same path are refused.
The output folder gets

    rows/                         tokenized rows of the sources and the probes
    rivals/NAME/                  what a rival has trained to find its weights
    arms/ARM-DIGEST-SEED-RATE/    result.json: NLL on every probe, rows and tokens
    results/MIXTURE-DIGEST/       of every mixture that was audited here
        results.json              the verdict, every comparison, and every figure of every seed
        forest.png                the mixture minus every other arm, with intervals
    results.json, forest.png      those of the latest
"""

from mobilellm_hf.audit.arguments import AuditArguments, AuditTrainingArguments, check
from mobilellm_hf.audit.experiment import run_audit
from mobilellm_hf.independent import launch_each

if __name__ == "__main__":
    launch_each(__doc__, (AuditArguments, AuditTrainingArguments), check, run_audit)
