"""Which of several kinds of tensors at one module a client applies, and which tensors it leaves over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_diffusion.formats._client_file import PAIRS, SHARED, FileModule
from lora_diffusion.formats._client_rules import Client

_TRIGGERS: Mapping[str, tuple[frozenset[str], ...]] = {
    **dict.fromkeys(PAIRS, (frozenset({"up"}),)),
    "loha": (frozenset({"w1_a"}),),
    "lokr": tuple(frozenset({role}) for role in ("w1", "w2", "w1_a", "w2_a")),
    "glora": (frozenset({"a1"}),),
    "oft": (frozenset({"oft_blocks"}),),
    "norm": (frozenset({"w_norm"}),),
    "full": (frozenset({"diff"}),),
    "set": (frozenset({"set_weight"}),),
}
"""Kind -> the tensors of which one makes ComfyUI and Forge take a module for it, whatever else is there."""
_WHOLE: Mapping[str, tuple[frozenset[str], ...]] = {
    **dict.fromkeys(PAIRS, (frozenset({"down", "up"}),)),
    "loha": (frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}),),
    "ia3": (frozenset({"weight"}),),
    "lokr": tuple(
        frozenset({*first, *second}) for first in (("w1",), ("w1_a", "w1_b")) for second in (("w2",), ("w2_a", "w2_b"))
    ),
    "full": (frozenset({"diff"}),),
    "norm": (frozenset({"w_norm", "b_norm"}),),
    "glora": (frozenset({"a1", "a2", "b1", "b2", "alpha"}),),
    "oft": (frozenset({"oft_blocks"}),),
}
"""Kind -> the tensors without which A1111 does not take a module for it."""


def taken(client: Client, module: FileModule) -> list[str]:
    """Returns the kinds that a client takes a module for, the one that it applies to the weight first."""
    wanted = _TRIGGERS if client.by_trigger else _WHOLE
    kinds = module.kinds
    found = []
    for style in client.order:
        roles = kinds.get(style, {}).keys() | (module.roles.keys() & SHARED)
        if style in kinds and any(choice <= roles for choice in wanted.get(style, ())):
            found.append(style)
    return found


def choose(client: Client, module: FileModule) -> FileModule:
    """Returns a module as a client takes it, with the kind that it applies in front."""
    found = taken(client, module)
    return module.as_style(found[0]) if found else module


def unused(client: Client, module: FileModule) -> dict[str, str]:
    """Returns the tensors of a module that a client does not read, by role, with their style."""
    kinds = module.kinds
    read = taken(client, module)
    left = {role: style for style, roles in kinds.items() for role in roles if not _reads(client, style, role, read)}
    left |= {role: "" for role in module.roles if role in SHARED and not _reads_shared(client, role, read)}
    return {role: style for role, style in left.items() if role != "mid" or "kohya" not in read or not client.reads_mid}


def _reads(client: Client, style: str, role: str, read: Iterable[str]) -> bool:
    if client.by_trigger and style == "lokr" and "lokr" in client.order:
        return True  # every one of its tensors is marked as read by itself
    if style == "full" and role in client.biases:
        return True
    applied = read if client.by_trigger else list(read)[:1]
    return style in applied and role != "mid"


def _reads_shared(client: Client, role: str, read: list[str]) -> bool:
    if role == "reshape":
        return client.reads_reshape and bool(read) and any(style in PAIRS for style in read)
    if role == "scale":
        return client.reads_scale
    if role == "magnitude":
        return client.dora == "own"
    return role == "alpha" or client.dora != "ignored"
