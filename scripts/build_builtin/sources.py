"""The icon packages of the built-in models and sample sets: pinned, verified, licence-checked."""

import base64
import hashlib
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class SourceError(RuntimeError):
    """A downloaded package is not the one this recipe was made with."""


@dataclass(frozen=True)
class IconPackage:
    """One npm package of icons.

    `style` is the word captions use for its look; `integrity` is the sha512 of the packed file
    in the spelling of package-lock files; `licence` is the SPDX identifier its info.json must state.
    """

    style: str
    name: str
    version: str
    integrity: str
    licence: str
    author: str

    @property
    def archive_name(self) -> str:
        """File name that `npm pack` gives the package."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    IconPackage(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Google, Noto Emoji",
    ),
    IconPackage(
        "blob",
        "@iconify-json/noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Google, Noto Emoji before 2017",
    ),
    IconPackage(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twitter and contributors, Twemoji",
    ),
    IconPackage(
        "fluent",
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "MIT",
        "Microsoft, Fluent Emoji",
    ),
    IconPackage(
        "flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Microsoft, Fluent Emoji Flat",
    ),
    IconPackage(
        "fxemoji",
        "@iconify-json/fxemoji",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Apache-2.0",
        "Mozilla, FxEmoji",
    ),
    IconPackage(
        "emojione",
        "@iconify-json/emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "Emoji One, EmojiTwo",
    ),
)

# No model is trained on these. Their styles have made-up names, of which the base knows nothing.
SAMPLE_SET_PACKAGES = (
    IconPackage(
        "quendle",
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "sha512-iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        "CC-BY-4.0",
        "Streamline, Streamline Emojis",
    ),
    IconPackage(
        "mavrok",
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        "MIT",
        "Microsoft, Fluent Emoji High Contrast",
    ),
)

UNSEEN_STYLE = "blob"
TRAINING_STYLES = tuple(p.style for p in PACKAGES if p.style != UNSEEN_STYLE)


def verify_integrity(path: Path, integrity: str) -> None:
    """Raise SourceError unless the file has exactly the pinned sha512 digest."""
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if f"sha512-{digest}" != integrity:
        raise SourceError(
            f"{path.name}: sha512-{digest} is not the pinned {integrity}; delete the file and fetch it again."
        )


def fetch(package: IconPackage, folder: Path) -> Path:
    """Path of the verified package archive in `folder`, packed by npm if it is not there yet."""
    path = folder / package.archive_name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", f"{package.name}@{package.version}"], cwd=folder, check=True)
    verify_integrity(path, package.integrity)
    return path


def read_member(archive: Path, member: str) -> dict[str, Any]:
    """JSON of one file of an npm archive (`package/<member>`)."""
    with tarfile.open(archive) as tar:
        stream = tar.extractfile(f"package/{member}")
        if stream is None:
            raise SourceError(f"{archive.name} has no file {member}.")
        loaded: dict[str, Any] = json.load(stream)
    return loaded


def check_licence(package: IconPackage, info: dict[str, Any]) -> None:
    """Raise SourceError unless info.json states the licence that NOTICE and the model cards name."""
    stated = info["license"]["spdx"]
    if stated != package.licence:
        raise SourceError(
            f"{package.name}@{package.version} states licence {stated}, not {package.licence}; do not train on it."
        )


class IconSet:
    """Pictures of one package as SVG text, looked up by icon name or alias."""

    def __init__(self, package: IconPackage, archive: Path) -> None:
        check_licence(package, read_member(archive, "info.json"))
        self.package = package
        self._data = read_member(archive, "icons.json")

    def svg(self, name: str, pixels: int) -> str | None:
        """SVG document of the icon, `pixels` wide and high; None where the package lacks it."""
        icon = self._data["icons"].get(name)
        if icon is None:
            alias = self._data.get("aliases", {}).get(name)
            # an alias with a transform is another picture, not another name
            if alias is None or set(alias) != {"parent"}:
                return None
            icon = self._data["icons"].get(alias["parent"])
            if icon is None:
                return None
        width = icon.get("width", self._data.get("width", 16))
        height = icon.get("height", self._data.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{pixels}" height="{pixels}">{icon["body"]}</svg>'
        )
