"""The stages of `recipes/quickstart.py`, from the text that a Python installation holds to a small mid-trained model.

    settings.py   what decides the result
    data.py       corpus, judge, curation, tokenized rows
    training.py   training, influence, mid-training, samples

Each stage leaves a folder that a person can open, and is skipped by a run that finds it there. They are ordinary uses
of this package, in the order in which a project of one's own would use it.
"""
