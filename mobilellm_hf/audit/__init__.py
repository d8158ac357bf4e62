"""The audit: does a mixture, or a rejection, help against baselines, placebos and rivals, with seeds and intervals?

proxy.py        what every arm trains: small models, shared among processes, resumable
arms.py         the mixture, baselines, placebos and rivals, of equal tokens once curation is charged
statistics.py   paired differences, exact sign flips, Holm, seeds that a test needs, partial rank correlation
verdict.py      the verdict in words; report.py a table and results.json; plots.py the forest plot
settings.py     which folder is of another audit: data, tokenizer and teacher by their content
rivals/         RegMix, MixMin, DoReMi, DoGE and similarity from their formulas
"""
