"""A file without its twin bytes, against the same file with them: in the stock runtime, and byte by byte."""

import shutil

import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from export_cases import export, random_tokens, save_model

from mobilellm_hf.export import OnDeviceModel, program
from mobilellm_hf.export.store_once import store_once

TABLE = 352 * 64  # values of the embedding


KINDS = [("8da4w", None, 4), ("8da8w", "8w", 8), ("none", None, 32)]


@pytest.fixture(scope="module", params=KINDS, ids=[kind[0] for kind in KINDS])
def twice(request, tmp_path_factory):
    """(a .pte as ExecuTorch's serializer writes it, bits of a value)."""
    quantize, embedding, bits = request.param
    folder = tmp_path_factory.mktemp("twice")
    model = save_model(folder / "model", num_hidden_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "store_once", lambda path: 10**9)  # says so, and does nothing
        return export(model, folder / "out", quantize=quantize, embedding=embedding, prefill=16) / "model.pte", bits


def logits(path) -> torch.Tensor:
    model = OnDeviceModel(path)
    tokens = random_tokens(30)
    rows = [model.logits(tokens[:20])] + [model.logits(tokens[at : at + 1], at) for at in range(20, 30)]
    return torch.stack(rows)


def test_the_shorter_file_is_the_same_program(twice, tmp_path):
    long, bits = twice
    short = shutil.copytree(long.parent, tmp_path / "out") / "model.pte"
    removed = store_once(short)
    scales = 352 * 4 if bits == 8 else 0  # a scale a row, in fp32 on both sides
    assert 0 <= removed - TABLE * bits // 8 - scales < 256  # and what aligned it
    assert long.stat().st_size - short.stat().st_size == removed
    expected = logits(long)
    assert expected.std() > 0.1 and torch.equal(logits(short), expected)


def test_every_part_has_the_bytes_that_it_had(twice, tmp_path):
    long, _ = twice
    short = shutil.copy(long, tmp_path / "model.pte")
    store_once(short)
    before, after = (deserialize_pte_binary(path.read_bytes()) for path in (long, short))
    assert [buffer.storage for buffer in before.program.constant_buffer] == [
        buffer.storage for buffer in after.program.constant_buffer
    ]
    assert before.program.backend_delegate_data == after.program.backend_delegate_data
    assert before.program.execution_plan == after.program.execution_plan
    named = [
        {name: part.named_data.buffers[entry.buffer_index] for name, entry in part.named_data.pte_data.items()}
        for part in (before, after)
    ]
    assert named[0] == named[1] and len(named[0]) > 5
    assert all(segment.offset % 128 == 0 for segment in _segments(long))
    moved = [segment.offset % 128 for segment in _segments(short)]
    assert sum(map(bool, moved)) <= 2  # the head's, which lie among the constants


def test_what_is_there_once_stays_as_it_is(twice, tmp_path):
    short = shutil.copy(twice[0], tmp_path / "model.pte")
    store_once(short)
    once = short.read_bytes()
    assert store_once(short) == 0 and short.read_bytes() == once


def test_an_export_with_both_does_not_get_its_name(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "store_once", lambda path: 352 * 64 // 2 - 1)
    with pytest.raises(RuntimeError, match="embedding and head, one table, are in it as two"):
        export(model_folder, tmp_path / "out", prefill=16)
    assert not list(tmp_path.iterdir())


def test_what_is_no_program_is_named(tmp_path):
    (tmp_path / "model.pte").write_bytes(bytes(200))
    with pytest.raises(ValueError, match="model.pte is not an ExecuTorch program with segments"):
        store_once(tmp_path / "model.pte")


def _segments(path):
    from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
    from executorch.exir._serialize._program import _get_extended_header

    data = path.read_bytes()
    return _flatbuffer_to_program(data[: _get_extended_header(data).program_size]).segments
