"""The paper's benchmarks of a model, Tables 8 and 9, through lm-eval and by sampling.

suites.py          the benchmarks as data; documents.py finds theirs, paper_tables.py has the paper's rows
runner.py          suites run from a command; arguments.py, plan.py
lm_eval_runner.py  few-shot tasks: lm_eval_tasks.py builds them, recorded_lm.py shares and keeps what is asked
sampled_tasks.py   tasks of many samples: samplers.py, sampling.py, prompt_cache.py, journal.py, graders.py,
                   estimates.py
live_code_bench.py   its questions and tests
models.py          a model as lm-eval and the sampler want it
records.py         every prompt, completion and verdict; results.py what they come to
perplexity.py      Figure 7: perplexity on HumanEval and GSM8K during training
tables.py, plots.py, metadata.py   what is shown at the end, and what the Hub gets
"""
