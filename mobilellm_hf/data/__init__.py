"""Text in, training rows out: where documents come from and how they become `input_ids`.

Rooms, in the order data flows through them:

    corpora.py           one name for a source: the embedded corpus, a Hub data set, or local files
    catalog.py           every data set of the paper's by name, and its mixtures; catalog_sources.py holds the data
    embedded.py          the corpus that is already on the machine: no download, nothing redistributed
    embedded_sources.py  what it is read from: one entry per source
    local_files.py       local files: found, and checked before anything long starts
    documents.py         what every source shares: cleaning, cutting, splitting by hash
    tokenization.py      a Llama-3-style tokenizer of any size, trained on any corpus
    packing.py           documents to rows of a fixed length, attention kept inside each document
    streaming.py         the same rows, packed as a stream's documents arrive
    rows.py              rows of a list of sources, as recipes' YAML files write it
    source_weights.py    the shares of a mixture, in the same files
    mixture.py           rows drawn by weights that may change while they are read; what it is made of:
    draws.py             which row a draw takes, a pure function; permutation.py, random orders without memory
    source_rows.py       the rows of its sources, as tensors straight from Arrow: row_table.py
    shared_history.py    what all who read it must agree on
    ngrams.py            texts that two data sets share
    chat.py              conversations as rows with labels; chat_template.jinja, how they are written down
    chat_sources.py      the sets of Table 7, and any other: columns to messages
    synthetic_chat.py    problems with checkable answers, generated

Import the submodule you need: this package imports nothing itself, so `import mobilellm_hf.data` costs nothing.
"""
