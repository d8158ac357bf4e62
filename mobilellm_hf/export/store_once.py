"""What a .pte holds twice, a tied embedding above all, is stored once.

    store_once(Path("model.pte"))       # in place: shorter by the bytes of the head

ExecuTorch's own kernel reads the embedding, a constant of the program; XNNPACK reads the head, its own named data. The
serializer keeps a segment for each. But a segment is an offset and a length in the file, and the runtime asks no more
of it: that of the head can lie within that of the constants. What is behind the bytes that fall away moves to the
front, by a multiple of the 128 bytes that segments are aligned to. Of the program itself offsets change, nothing else.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER = slice(8, 8 + 64)  # after the root's offset and the magic of a flatbuffer; more than it takes
OFFSET_FIELD = 4  # of a DataSegment, in its vtable
WORD = 8  # bytes of an offset
Span = tuple[int, int]  # of bytes, from the first segment on


@dataclass(frozen=True)
class Segment:
    """`start` and `size` in bytes, from the first segment on; `place`: where in the file `start` is written."""

    start: int
    size: int
    place: int

    @property
    def end(self) -> int:
        return self.start + self.size


def store_once(path: Path) -> int:
    """Shortens a .pte in which delegates have data that are constants too; returns by how many bytes.

    It is done in place, so that the disk need not hold both: what is interrupted is no program any more.

    Raises:
        ValueError: it is no .pte with segments.
    """
    from executorch.exir._serialize._program import _get_extended_header

    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        header = _get_extended_header(data[: HEADER.stop])
        if header is None:
            raise ValueError(f"{path} is not an ExecuTorch program with segments")
        base, total = header.segment_base_offset, header.segment_data_size
        segments, twins = _segments_and_twins(data, base)
        gone = _spans(segments, twins, total)
        removed = sum(end - start for start, end in gone)
        if not removed:
            return 0
        for index, segment in enumerate(segments):
            start = twins.get(index, segment.start)
            if segment.start:  # zero is the default, and not written
                data[segment.place : segment.place + WORD] = (start - _before(gone, start)).to_bytes(WORD, "little")
        header.segment_data_size -= removed
        written = header.to_bytes()
        data[HEADER.start : HEADER.start + len(written)] = written
        for (_, start), (end, _) in zip(gone, [*gone[1:], (total, total)], strict=True):
            data.move(base + start - _before(gone, start), base + start, end - start)
    os.truncate(path, base + total - removed)
    return removed


def _segments_and_twins(data: mmap.mmap, base: int) -> tuple[list[Segment], dict[int, int]]:
    """All segments; and of named data that are constants too: segment -> where the constant begins."""
    from executorch.exir._serialize._flatbuffer_program import _patch_generated_flatbuffer_aliases
    from executorch.exir._serialize.generated.executorch_flatbuffer.Program import Program

    _patch_generated_flatbuffer_aliases()  # the generated modules mistake each other for their classes
    program = Program.GetRootAs(data[:base])
    segments = [_segment(program.Segments(index)) for index in range(program.SegmentsLength())]
    constants = program.ConstantSegment()
    if constants is None:
        return segments, {}
    home = segments[constants.SegmentIndex()]
    places = [home.start + constants.Offsets(index) for index in range(constants.OffsetsLength())]
    named = {program.NamedData(index).SegmentIndex() for index in range(program.NamedDataLength())}
    twins = {}
    with memoryview(data) as everything, everything[base:] as view:
        for index in named:
            segment = segments[index]
            if not segment.size or home.start <= segment.start < home.end:  # it is stored once already
                continue
            within = (place for place in places if place + segment.size <= home.end)
            found = next((place for place in within if _are_equal(view, segment, place)), None)
            if found is not None:
                twins[index] = found
    return segments, twins


def _segment(found: Any) -> Segment:
    return Segment(found.Offset(), found.Size(), found._tab.Pos + found._tab.Offset(OFFSET_FIELD))


def _are_equal(view: memoryview, segment: Segment, place: int) -> bool:
    with view[segment.start : segment.end] as one, view[place : place + segment.size] as other:
        return one == other


def _spans(segments: list[Segment], twins: Mapping[int, int], total: int) -> list[Span]:
    """What falls away, in order: each twin up to where the next segment begins."""
    starts = sorted({segment.start for segment in segments} | {total})
    return sorted({(segments[index].start, starts[starts.index(segments[index].start) + 1]) for index in twins})


def _before(gone: list[Span], place: int) -> int:
    """How many bytes fall away in front of a place."""
    return sum(end - start for start, end in gone if end <= place)
