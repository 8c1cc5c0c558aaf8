"""Stage 1: fetch the packages, draw every subject in every style, store pictures and manifest."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from scripts.build_builtin.sources import PACKAGES, SAMPLE_SET_PACKAGES, IconPackage, IconSet, fetch
from scripts.build_builtin.storage import write_atomic, write_json
from scripts.build_builtin.subjects import icon_name, read_fxemoji_names, read_subjects

DRAWN_PIXELS = 128
SAME_PICTURE = 0.2  # mean absolute difference of 8-bit values at 16 pixels; a re-export differs by less


def draw(svg: str) -> np.ndarray:
    """The SVG on white, [DRAWN_PIXELS, DRAWN_PIXELS, 3] uint8."""
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    return np.asarray(Image.alpha_composite(white, drawn).convert("RGB"))


def drop_duplicates(
    rows: list[dict[str, Any]], pictures: list[np.ndarray]
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Rows and pictures without those that equal an earlier picture under another name of the same style."""
    small = [np.asarray(Image.fromarray(p).resize((16, 16), Image.Resampling.BOX), dtype=np.float32) for p in pictures]
    kept: list[int] = []
    for index, row in enumerate(rows):
        rivals = [k for k in kept if rows[k]["style"] == row["style"]]
        if all(np.abs(small[k] - small[index]).mean() > SAME_PICTURE for k in rivals):
            kept.append(index)
    return [rows[k] for k in kept], [pictures[k] for k in kept]


def build(work: Path, packages: Sequence[IconPackage], name: str) -> None:
    """Write work/name.npz ([n, 128, 128, 3] uint8) and work/name.json (one row per picture)."""
    fxemoji = read_fxemoji_names()
    rows: list[dict[str, Any]] = []
    pictures: list[np.ndarray] = []
    for package in packages:
        icons = IconSet(package, fetch(package, work / "npm"))
        for subject in read_subjects():
            svg = icons.svg(icon_name(subject.name, package.style, fxemoji), DRAWN_PIXELS)
            if svg is None:
                continue
            rows.append({"name": subject.name, "group": subject.group, "split": subject.split, "style": package.style})
            pictures.append(draw(svg))
    rows, pictures = drop_duplicates(rows, pictures)

    def write(target: Path) -> None:
        with target.open("wb") as stream:
            np.savez_compressed(stream, pictures=np.stack(pictures))

    write_atomic(work / f"{name}.npz", write)
    write_json(work / f"{name}.json", rows)
    print(f"{name}: {len(rows)} pictures of {len({r['name'] for r in rows})} subjects")


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    work = parser.parse_args().work
    build(work, PACKAGES, "pictures")
    build(work, SAMPLE_SET_PACKAGES, "sample_sets")


if __name__ == "__main__":
    main()
