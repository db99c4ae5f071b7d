"""Lists of image references in shared memory, for the worker processes of data loaders."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from llm2clip.data.image_refs import ImageRef


class SharedRefs:
    """List of image references that can be sent to worker processes quickly, whatever its length.

    A data loader pickles its data set once for each worker. For millions of references, this takes minutes, and each
    worker gets its own copy. This list is instead serialised once, into tensors. PyTorch sends tensors to other
    processes as shared memory, and each worker unpickles a reference when it needs that reference.
    """

    def __init__(self, refs: Sequence[ImageRef] | SerialisedRefs) -> None:
        self._refs = refs
        self._serialised: SerialisedRefs | None = None

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, index: int) -> ImageRef:
        return self._refs[index]

    def __reduce__(self) -> tuple[type[SharedRefs], tuple[SerialisedRefs]]:
        if self._serialised is None:
            self._serialised = _serialise(self)
        return SharedRefs, (self._serialised,)


class SerialisedRefs:
    """Image references as pickles in a buffer.

    Attributes:
        buffer: The pickles of all references, one after another, uint8.
        ends: End of each pickle in the buffer, int64 (N,).
    """

    def __init__(self, buffer: Tensor, ends: Tensor) -> None:
        self.buffer, self.ends = buffer, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> ImageRef:
        start = int(self.ends[index - 1]) if index else 0
        ref: ImageRef = pickle.loads(self.buffer[start : int(self.ends[index])].numpy().data)
        return ref


def _serialise(refs: SharedRefs) -> SerialisedRefs:
    pickles = [pickle.dumps(refs[n], protocol=pickle.HIGHEST_PROTOCOL) for n in range(len(refs))]
    ends = torch.tensor(list(accumulate(map(len, pickles))), dtype=torch.int64)
    return SerialisedRefs(torch.frombuffer(bytearray(b"".join(pickles)), dtype=torch.uint8), ends)
