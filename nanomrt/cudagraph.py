"""Repeating a step with one launch. Decoding a token takes hundreds of kernels, most of them shorter than their launch; recorded
as a CUDA graph they are launched together. On a CPU a step is called, and that is all.

    step = Recording(lambda: decode(...), device)
    with own_stream(device):
        for _ in range(n):
            step()                  # the same work on the same tensors
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

the_stream = functools.cache(torch.cuda.Stream)  # one per device, for good: libraries keep a workspace for each


class Recording:
    """A step without arguments and without a look at the device's results. On a GPU its first call launches kernel by kernel,
    which compiles them; the second one is captured as a graph; all later ones replay that.

    A graph works on the addresses and shapes of its capture: `restart` when they change.
    """

    latest: "torch.cuda.CUDAGraph | None" = None  # kept: while one graph lives, the next one takes over its memory

    def __init__(self, step: Callable[[], None], device: torch.device):
        self.step, self.on_gpu = step, device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        self.ran, self.graph = False, None

    def __call__(self) -> None:
        if self.on_gpu and self.ran and self.graph is None:
            self.graph = self.capture()
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
        self.ran = True

    def capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(*([Recording.latest.pool()] if Recording.latest else []))
        try:
            self.step()
        finally:  # an interrupted run still has a checkpoint to save, which a stream that captures can't
            graph.capture_end()
        Recording.latest = graph
        return graph


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """The default stream can't be captured: on a GPU, what stands inside runs on another one, after all that came before it and
    before all that follows."""
    if device.type != "cuda":
        yield
        return
    mine, outer = the_stream(device), torch.cuda.current_stream(device)
    mine.wait_stream(outer)
    with torch.cuda.stream(mine):
        yield
    outer.wait_stream(mine)
