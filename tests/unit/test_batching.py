"""Batches that run as one are padded on the left."""

from llmpq.runtime.batching import padded_ids, table_of
from llmpq.runtime.request import Request
from llmpq.workload import Batch


def test_padding_is_on_the_left_and_masked():
    requests = [Request("a", 7, (5, 6, 7), 2), Request("b", 9, (8,), 4)]
    batch = Batch((0, 1), 3, 4)
    table = table_of(batch, requests)
    assert padded_ids(batch, requests, pad_id=0).tolist() == [[5, 6, 7], [0, 0, 8]]
    assert table.lengths.tolist() == [[3, 2, 7], [1, 4, 9]]
    assert table.mask(0, 2, 5).tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert table.mask(0, 1, 5) is None  # nothing padded in this slice
    assert table.positions(0, 2, 0, 3).tolist() == [[0, 1, 2], [0, 0, 0]]
    assert table.positions(0, 2, 3, 1).tolist() == [[3], [1]]
