"""What a .pte holds twice, a tied embedding above all, is stored once.

    store_once(Path("model.pte"))       # in place: shorter by the bytes of the head

ExecuTorch's own kernel reads the embedding, a constant of the program; XNNPACK reads the head, its own named data. The
serializer keeps a segment for each. But a segment is an offset and a length in the file, and the runtime asks no more
of it: that of the head can lie within that of the constants. Everything behind the bytes that fall away moves to the
front, by a multiple of what segments are aligned to. Of the program itself offsets change and nothing else.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER_AT = 8  # after the root's offset and the magic of a flatbuffer
OFFSET_FIELD = 4  # of a DataSegment, in its vtable
WORD = 8  # bytes of an offset


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
    """Rewrites a .pte in which delegates have data that are constants too; returns how many bytes shorter it is.

    Raises:
        ValueError: it is no .pte with segments.
    """
    from executorch.exir._serialize._flatbuffer_program import _patch_generated_flatbuffer_aliases
    from executorch.exir._serialize._program import _get_extended_header
    from executorch.exir._serialize.generated.executorch_flatbuffer.Program import Program

    _patch_generated_flatbuffer_aliases()  # the generated modules mistake each other for their classes
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _get_extended_header(data[: HEADER_AT + 64])
        if header is None:
            raise ValueError(f"{path} is not an ExecuTorch program with segments")
        base = header.segment_base_offset
        program = Program.GetRootAs(data[:base])
        segments = [_segment(program.Segments(index)) for index in range(program.SegmentsLength())]
        twins = _twins(data, base, program, segments)
        if not twins:
            return 0
        gone = _spans(segments, twins, header.segment_data_size)
        starts = {
            index: twins.get(index, segment.start - _before(gone, segment.start))
            for index, segment in enumerate(segments)
        }
        removed = sum(end - start for start, end in gone)
        header.segment_data_size -= removed
        front = bytearray(data[:base])
        front[HEADER_AT : HEADER_AT + header.length] = header.to_bytes()
        for index, segment in enumerate(segments):
            if segment.start:
                front[segment.place : segment.place + WORD] = starts[index].to_bytes(WORD, "little")
        shorter = path.with_name(path.name + ".once")
        with open(shorter, "wb") as out:
            out.write(front)
            kept = 0
            for start, end in [*gone, (header.segment_data_size + removed,) * 2]:
                out.write(data[base + kept : base + start])
                kept = end
    os.replace(shorter, path)
    return removed


def _segment(found: Any) -> Segment:
    return Segment(found.Offset(), found.Size(), found._tab.Pos + found._tab.Offset(OFFSET_FIELD))


def _twins(data: mmap.mmap, base: int, program: Any, segments: list[Segment]) -> dict[int, int]:
    """Segment of named data -> where its bytes are among the constants."""
    constants = program.ConstantSegment()
    if constants is None:
        return {}
    home = segments[constants.SegmentIndex()]
    places = [home.start + constants.Offsets(index) for index in range(constants.OffsetsLength())]
    twins = {}
    with memoryview(data) as view:
        for index in {program.NamedData(index).SegmentIndex() for index in range(program.NamedDataLength())}:
            segment = segments[index]
            if home.start <= segment.start < home.end:  # it is stored once already
                continue
            wanted = view[base + segment.start : base + segment.end]
            for place in places:
                if place + segment.size <= home.end and wanted == view[base + place : base + place + segment.size]:
                    twins[index] = place
            wanted.release()
    return twins


def _spans(segments: list[Segment], twins: Mapping[int, int], total: int) -> list[tuple[int, int]]:
    """What falls away, in order: each twin up to where the next segment begins."""
    starts = sorted({segment.start for segment in segments}) + [total]
    return sorted(
        (segment.start, starts[starts.index(segment.start) + 1])
        for index, segment in enumerate(segments)
        if index in twins and segment.size
    )


def _before(gone: list[tuple[int, int]], start: int) -> int:
    return sum(end - begin for begin, end in gone if end <= start)
