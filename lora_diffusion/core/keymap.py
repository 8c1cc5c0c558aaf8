"""The reversible map between the modules of a base and their names in a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.core.text import suggestion


class KeyMap:
    """A bijection between modules and file names. Names are looked up, never taken apart."""

    def __init__(self, pairs: Iterable[tuple[ModuleKey, str]], aliases: Iterable[tuple[ModuleKey, str]] = ()) -> None:
        """Builds the map.

        Args:
            pairs: each module with the name that is written.
            aliases: other names that are found in files and read, never written.

        Raises:
            ValueError: a module occurs twice, or a name for two modules.
        """
        self._names: dict[ModuleKey, str] = {}
        self._keys: dict[str, ModuleKey] = {}
        for key, name in pairs:
            if key in self._names or name in self._keys:
                raise ValueError(f"{key} and {name} do not form a bijection: one of them occurs twice.")
            self._names[key] = name
            self._keys[name] = key
        for key, name in aliases:
            if self._keys.setdefault(name, key) != key:
                raise ValueError(f"{name} would name both {key} and {self._keys[name]}.")

    def __len__(self) -> int:
        """Returns the number of modules."""
        return len(self._names)

    def __iter__(self) -> Iterator[tuple[ModuleKey, str]]:
        """Yields (module, name), aliases left out."""
        return iter(self._names.items())

    def __contains__(self, name: object) -> bool:
        """Says whether a file name or an alias is known."""
        return name in self._keys

    def all_names(self) -> dict[ModuleKey, tuple[str, ...]]:
        """Returns all names of each module, the one that is written first."""
        names_of = {key: [name] for key, name in self}
        for name, key in self._keys.items():
            if name != self._names.get(key):
                names_of.setdefault(key, []).append(name)
        return {key: tuple(names) for key, names in names_of.items()}

    def name(self, key: ModuleKey) -> str:
        """Returns the file name of a module.

        Raises:
            AdapterFileError: the base has no such module.
        """
        if key not in self._names:
            raise AdapterFileError(
                f"The base has no module {key.part}/{key.path}; was the adapter made for another base?"
            )
        return self._names[key]

    def key(self, name: str) -> ModuleKey:
        """Returns the module of a file name or of an alias.

        Raises:
            AdapterFileError: no module has that name.
        """
        if name not in self._keys:
            raise AdapterFileError(f"The base has no module that a file calls {name}{suggestion(name, self._keys)}.")
        return self._keys[name]

    def require(self, names: Iterable[str], source: str) -> None:
        """Checks that every name is known.

        Args:
            names: module names as a file spells them.
            source: the file, for the message.

        Raises:
            AdapterFileError: lists up to ten names that the base does not have.
        """
        unknown = [name for name in dict.fromkeys(names) if name not in self._keys]
        if unknown:
            raise AdapterFileError(
                f"{source}: {len(unknown)} of its modules do not exist in this base. It was made for another "
                "architecture; load it with the base it was trained on.",
                unknown[:10],
            )


def naming(format_name: str) -> str:
    """Returns the format whose names of modules another one takes, which is all that families know of it."""
    is_format = format_name in registry.available("formats")
    return str(registry.find("formats", format_name).naming) if is_format else format_name


def flat_key_map(paths: Mapping[str, Iterable[str]], prefixes: Mapping[str, str]) -> KeyMap:
    """Maps each module to its prefix and its path with "_" for ".", as kohya spells names.

    Args:
        paths: part -> module paths in it.
        prefixes: part -> say "lora_unet_", or "lora_te_text_model_" where the live text encoder has no `text_model`.

    >>> flat_key_map({"unet": ["mid_block.attn1.to_q"]}, {"unet": "lora_unet_"}).key("lora_unet_mid_block_attn1_to_q")
    ModuleKey(part='unet', path='mid_block.attn1.to_q')
    """
    return KeyMap(
        (ModuleKey(part, path), prefixes[part] + path.replace(".", "_"))
        for part, names in paths.items()
        for path in names
    )


def dotted_key_map(paths: Mapping[str, Iterable[str]], prefixes: Mapping[str, str]) -> KeyMap:
    """Maps each module to its prefix and its path, as diffusers and PEFT spell names.

    >>> dotted_key_map({"unet": ["mid_block.conv"]}, {"unet": "unet."}).name(ModuleKey("unet", "mid_block.conv"))
    'unet.mid_block.conv'
    """
    return KeyMap((ModuleKey(part, path), prefixes[part] + path) for part, names in paths.items() for path in names)
