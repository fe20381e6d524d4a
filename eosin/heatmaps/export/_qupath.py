"""A QuPath project: slides with what a model said of them, and their tiles ready to be imported by one script.

The rules are those that QuPath 0.8 reads with (``qupath.lib.projects.DefaultProject``, ``qupath.lib.images.servers``).
Its data files are serialised Java objects, which no other program should write. So the tiles lie beside them as
GeoJSON, and a script in the project imports them. What a user has added to a project stays when it is written again.
"""

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eosin._files import write_text
from eosin._seals import read_json
from eosin.errors import ConfigError
from eosin.heatmaps.export._geojson import write_geojson
from eosin.heatmaps.export._tiles import SlideTiles
from eosin.wsi._openslide_impl import OpenSlideReader
from eosin.wsi._slide import Slide

PROJECT = "project.qpproj"
TILES = "eosin.geojson"
SCRIPT = "scripts/import_eosin.groovy"
VERSION = "0.5.0"  # of QuPath, the first whose projects look so
SERVERS = "qupath.lib.images.servers"
OPENSLIDE, BIOFORMATS = f"{SERVERS}.openslide.OpenslideServerBuilder", f"{SERVERS}.bioformats.BioFormatsServerBuilder"
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "eosin:qupath")

GROOVY = """\
// Imports the tiles that eosin wrote for the open image: Automate > Project scripts > import_eosin, then Run, or
// Run for project. Run it again after a new export: tiles of the export before are replaced, everything else stays.
def sizes = %s
def entry = getProjectEntry()
def file = entry.getEntryPath().resolve('%s')
if (!java.nio.file.Files.exists(file)) {
    println 'eosin has exported no tiles for ' + entry.getImageName()
    return
}
def server = getCurrentServer()
if (sizes[entry.getID()] != [server.getWidth(), server.getHeight()]) {
    println 'QuPath opened another picture of this file than eosin has read, ' + sizes[entry.getID()] + ' pixels'
    return
}
setImageType('BRIGHTFIELD_H_E')
def tiles = PathIO.readObjects(file)
def ids = tiles.collect { it.getID() } as Set
removeObjects(getAllObjects(false).findAll { ids.contains(it.getID()) }, true)
addObjects(tiles)
println entry.getImageName() + ': ' + tiles.size() + ' tiles'
"""


@dataclass(frozen=True)
class Image:
    """A slide of a project.

    Parameters
    ----------
    name : str
        As the list of images shows it.
    uri : str
        The slide file.
    server : str
        The Java class that opens it in QuPath.
    size_px : tuple of int
        Width and height as QuPath opens it: of the scanned box where the file states one.
    prediction : mapping of str to str
        Shown below the name.
    """

    name: str
    uri: str
    server: str
    size_px: tuple[int, int]
    prediction: Mapping[str, str]


def image_of(slide: Slide, tiles: SlideTiles) -> Image:
    """Return a slide as an image of a project."""
    path = slide.path.resolve()
    width, height = slide.bounds_px0[2:] if slide.bounds_px0 else slide.size_px0
    known = OpenSlideReader.takes(path, b"")  # by the library itself; it needs no first bytes
    said = {name: f"{value:.3f}" if isinstance(value, float) else value for name, value in tiles.prediction.items()}
    return Image(tiles.bag.slide_id, path.as_uri(), OPENSLIDE if known else BIOFORMATS, (width, height), said)


@dataclass(frozen=True, eq=False)
class Project:
    """A project folder that is being written.

    Parameters
    ----------
    folder : Path
    content : dict
        What ``project.qpproj`` says; entries of other images, and what else QuPath has written, stay.
    sizes_px : dict of int to tuple of int
        Width and height of the images that were added, by the number of their entry.
    """

    folder: Path
    content: dict[str, Any]
    sizes_px: dict[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Project":
        """Read a project, or begin one.

        Raises
        ------
        ConfigError
            If there is a project file that is not one of QuPath 0.2 or newer.
        """
        path = folder / PROJECT
        now = time.time_ns() // 10**6
        if not path.exists():
            return cls(folder, {"version": VERSION, "createTimestamp": now, "lastID": 0, "images": []})
        try:
            content = read_json(path)
            check_project(content)
        except ValueError as error:
            raise ConfigError(f"{path} is not a project of QuPath ({error}); choose another --out") from error
        return cls(folder, content)

    def add(self, slide: Slide, tiles: SlideTiles) -> Path:
        """Add a slide, or replace what it says, and write its tiles; returns their file."""
        image = image_of(slide, tiles)
        entry = self._entry(image)
        path = self.folder / "data" / str(entry["entryID"]) / TILES
        write_geojson(path, tiles.maps, slide_id=tiles.bag.slide_id, bounds_px0=slide.bounds_px0)
        entry["metadata"] = {**entry.get("metadata", {}), **image.prediction}
        self.sizes_px[entry["entryID"]] = image.size_px
        return path

    def _entry(self, image: Image) -> dict[str, Any]:
        """Return the entry of an image: the number of an entry names the folder of a user's own work, so it stays."""
        for entry in self.content["images"]:
            if entry["serverBuilder"].get("uri") == image.uri:
                return entry  # type: ignore[no-any-return]
        number = 1 + max([self.content["lastID"], *(entry["entryID"] for entry in self.content["images"])])
        server = {"builderType": "uri", "providerClassName": image.server, "uri": image.uri, "args": []}
        hidden = str(uuid.uuid5(NAMESPACE, image.uri))  # the name when names are masked
        entry = {"serverBuilder": server, "entryID": number, "imageName": image.name, "randomizedName": hidden}
        self.content["images"].append(entry)
        self.content["lastID"] = number
        return entry

    def save(self) -> list[Path]:
        """Write the project file and the script that imports the tiles."""
        path, script = self.folder / PROJECT, self.folder / SCRIPT
        self.content.update({"modifyTimestamp": time.time_ns() // 10**6, "uri": path.resolve().as_uri()})
        self.content["images"].sort(key=lambda entry: str(entry["imageName"]))
        check_project(self.content)
        sizes = ", ".join(f"'{number}': [{width}, {height}]" for number, (width, height) in self.sizes_px.items())
        write_text(script, GROOVY % (f"[{sizes or ':'}]", TILES))
        write_text(path, json.dumps(self.content, indent=2, ensure_ascii=False))
        return [path, script]


def check_project(content: Any) -> None:
    """Check the content of ``project.qpproj`` against the rules that QuPath reads it with.

    Raises
    ------
    ValueError
        With the first rule that is broken.
    """
    _rule(isinstance(content, dict), "not an object")
    _rule(type(content.get("createTimestamp")) is int, "createTimestamp is not a whole number")
    _rule(isinstance(content.get("version"), str) and type(content.get("lastID")) is int, "no version and lastID")
    images = content.get("images", [])
    _rule(isinstance(images, list) and all(isinstance(entry, dict) for entry in images), "images is not a list")
    for entry in images:
        number = entry.get("entryID")
        _rule(type(number) is int and number > 0, f"entryID {number} is not a positive number")
        server = entry.get("serverBuilder")
        _rule(isinstance(server, dict) and isinstance(server.get("builderType"), str), f"{number}: no serverBuilder")
        _rule(isinstance(entry.get("imageName"), str), f"{number}: no imageName")
        texts = entry.get("metadata", {})
        _rule(all(isinstance(text, str) for item in texts.items() for text in item), f"{number}: metadata is not text")
    numbers = [entry["entryID"] for entry in images]
    _rule(len(set(numbers)) == len(numbers), "two images have one entryID")


def _rule(holds: object, fault: str) -> None:
    if not holds:
        raise ValueError(fault)
