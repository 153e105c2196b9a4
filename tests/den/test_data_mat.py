"""MATLAB files are walked before scipy reads them, which ends the process at some damages."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import loadmat, savemat

from den.data.mat import check


def saved(values: dict, compressed: bool = False) -> bytes:
    file = io.BytesIO()
    savemat(file, values, do_compression=compressed)
    return file.getvalue()


PARTS = {"anno": {"class": "person", "parts": [{"part_name": "head", "mask": np.eye(3, dtype=np.uint8)}] * 2}}
WHOLE = {
    "map": {"LabelMap": np.arange(48, dtype=np.uint16).reshape(6, 8)},
    "structures": PARTS,
    "empty": {"parts": np.empty((0, 0)), "cell": np.array([[], [1.0]], object)},
    "text": {"names": np.array(["aeroplane", "bird"], object), "word": "größe"},
    "kinds": {"truth": np.ones((2, 3), bool), "waves": np.ones((2, 2), complex), "small": np.uint8(3), "d": np.ones(3)},
}
MAP = saved(WHOLE["map"])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_pass(name, compressed):
    content = saved(WHOLE[name], compressed)
    check(content)
    assert set(WHOLE[name]) <= set(loadmat(io.BytesIO(content)))


@pytest.mark.parametrize(
    ("place", "value"),
    [(185, 128), (184, 214), (184, 255), (188, 255), (152, 3), (156, 9), (168, 255), (171, 255)],
)
def test_damages_that_ended_the_process_are_told(place, value):
    content = bytearray(MAP)
    assert content[place] != value
    content[place] = value
    with pytest.raises(ValueError, match=r"element|array|structure|file"):
        check(bytes(content))


@given(
    name=st.sampled_from(sorted(WHOLE)),
    compressed=st.booleans(),
    changes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
def test_any_damage_is_a_value_error_or_none(name, compressed, changes, cut):
    content = bytearray(saved(WHOLE[name], compressed))
    for place, value in changes:
        content[place % len(content)] = value
    with contextlib.suppress(ValueError):
        check(bytes(content[: len(content) - cut]))


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"MATLAB 7.3", MAP[:127], MAP[:-3], MAP + b"\1"], ids=len)
def test_other_files_are_told(content):
    with pytest.raises(ValueError, match=r"no MATLAB file|element|array"):
        check(content)
