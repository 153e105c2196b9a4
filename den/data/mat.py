"""MATLAB files of version 5, walked before scipy reads them: it takes their sizes as they stand, and a damaged one has
ended the process.

The format: MathWorks, "MAT-File Format", chapter 1. After a header of 128 bytes a file is a list of elements, each a
tag (type and size in bytes) and its data, filled up to a multiple of 8 bytes; an array is an element of elements.
"""

import math
import struct
import zlib

HEADER = 128
NUMBERS = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8, 16: 1, 17: 2, 18: 4}  # bytes a value, by type
ARRAY, COMPRESSED = 14, 15
CELL, STRUCT, TEXT, FIRST_NUMBER, LAST_NUMBER = 1, 2, 4, 6, 15  # classes of arrays
INT8, INT32, UINT32 = 1, 5, 6
MOST_BYTES, DEEPEST = 1 << 30, 16


def check(content: bytes) -> None:
    """Raises ValueError for anything but a version 5 file of numbers, text, cells and structures that is whole."""
    order = {b"IM": "<", b"MI": ">"}.get(content[126:HEADER])
    if order is None or content[:1] == b"\0":
        raise ValueError("no MATLAB file of version 5")
    at = HEADER
    while at < len(content):
        kind, data, at = _element(content, at, order)
        if kind == COMPRESSED:
            stream = zlib.decompressobj()
            try:
                whole = stream.decompress(data, MOST_BYTES)
            except zlib.error as error:
                raise ValueError(f"a compressed array that is damaged: {error}") from error
            if not stream.eof:
                raise ValueError("a compressed array that is cut or very large")
            kind, data, end = _element(whole, 0, order)
            if end != len(whole):
                raise ValueError("a compressed element that is no single array")
        if kind != ARRAY:
            raise ValueError(f"an element of type {kind} where an array belongs")
        _check_array(data, order, 0)


def _element(content: bytes, at: int, order: str) -> tuple[int, bytes, int]:
    """Type and data of the element at `at`, and where the next one begins."""
    if at + 8 > len(content):
        raise ValueError("an element that is cut")
    kind, size = struct.unpack_from(order + "II", content, at)
    if kind >> 16:  # a small one: its size and type share the first word, its data is the second
        kind, size = kind & 0xFFFF, kind >> 16
        start, end = at + 4, at + 8
        if size > 4:
            raise ValueError(f"a small element of {size} bytes")
    else:
        start, end = at + 8, at + 8 + size + (0 if kind == COMPRESSED else -size % 8)
    if start + size > len(content) or (kind not in NUMBERS and kind not in (ARRAY, COMPRESSED)):
        raise ValueError(f"an element of type {kind} and {size} bytes that does not fit the file")
    return kind, content[start : start + size], min(end, len(content))


def _check_array(data: bytes, order: str, depth: int) -> None:
    """An array: flags, dimensions, name, then numbers, cells or the fields of structures."""
    if depth > DEEPEST:
        raise ValueError(f"arrays inside each other more than {DEEPEST} deep")
    if not data:
        return  # an empty cell
    flags, at = _part(data, 0, order, UINT32)
    sizes, at = _part(data, at, order, INT32)
    _, at = _part(data, at, order, INT8)  # the name
    if len(flags) != 8 or len(sizes) % 4 or len(sizes) < 8:
        raise ValueError("an array with damaged flags or dimensions")
    kind = struct.unpack(order + "I", flags[:4])[0] & 0xFF
    count = math.prod(shape := struct.unpack(f"{order}{len(sizes) // 4}i", sizes))
    if min(shape) < 0 or count > MOST_BYTES:
        raise ValueError(f"an array of {list(shape)} values")
    if kind == STRUCT:
        length, at = _part(data, at, order, INT32)
        names, at = _part(data, at, order, INT8)
        width = struct.unpack(order + "i", length)[0] if len(length) == 4 else 0
        if width <= 0 or len(names) % width:
            raise ValueError("a structure with damaged field names")
        count *= len(names) // width
    if kind in (CELL, STRUCT):
        for _ in range(count):
            inner, part, at = _element(data, at, order)
            if inner != ARRAY:
                raise ValueError(f"an element of type {inner} in a cell")
            _check_array(part, order, depth + 1)
    elif kind == TEXT or FIRST_NUMBER <= kind <= LAST_NUMBER:
        stored, part, at = _element(data, at, order)
        width = NUMBERS.get(stored)
        if width is None or (len(part) != count * width and stored not in (16, 17, 18)):
            raise ValueError(f"{len(part)} bytes for an array of {list(shape)} values")
    else:
        raise ValueError(f"an array of class {kind}, which is none of numbers, text, cells and structures")


def _part(data: bytes, at: int, order: str, wanted: int) -> tuple[bytes, int]:
    kind, part, at = _element(data, at, order)
    if kind != wanted:
        raise ValueError(f"an element of type {kind} where {wanted} belongs")
    return part, at
