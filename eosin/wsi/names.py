"""Which files are slides by their names; light to import, for packages that read no pixels."""

from pathlib import Path

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
SLIDE_SUFFIXES = (
    ".ome.tiff", ".ome.tif", ".ome.btf", ".svs", ".tiff", ".tif", ".btf", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs",
    ".bif", ".svslide", ".qptiff", ".czi", ".avs", ".dcm",
)  # fmt: skip


def is_picture(path: Path) -> bool:
    """Return whether a file is a plain picture, by its name."""
    return path.name.lower().endswith(PICTURE_SUFFIXES)


def is_slide(path: Path) -> bool:
    """Return whether a file may be a slide, by its name."""
    return path.name.lower().endswith(SLIDE_SUFFIXES + PICTURE_SUFFIXES)


def slide_stem(path: Path) -> str:
    """Return the file name without its slide extension; other dots stay."""
    for suffix in SLIDE_SUFFIXES + PICTURE_SUFFIXES:
        if path.name.lower().endswith(suffix) and len(path.name) > len(suffix):
            return path.name[: -len(suffix)]
    return path.name
