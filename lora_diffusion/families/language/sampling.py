"""Texts for requests, in batches of what the model can answer at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from lora_diffusion.core.samples import Output, Request


def generate(
    requests: Sequence[Request],
    write: Callable[[Sequence[Request]], Sequence[str]],
    settings: Callable[[Request], Hashable],
    at_once: int,
) -> list[Output]:
    """Returns the output of each request.

    Args:
        requests: any number.
        write: requests of one batch -> their texts.
        settings: what must be equal in a batch besides the weights of adapters.
        at_once: most requests of a batch.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, request in enumerate(requests):
        weights = None if request.weights is None else tuple(sorted(request.weights.items()))
        groups.setdefault((weights, settings(request)), []).append(index)
    texts: dict[int, str] = {}
    for indices in groups.values():
        for start in range(0, len(indices), at_once):
            chunk = indices[start : start + at_once]
            texts.update(zip(chunk, write([requests[index] for index in chunk]), strict=True))
    return [Output(request, text=texts[index]) for index, request in enumerate(requests)]
