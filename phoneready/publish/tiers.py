"""One file of a frontier for each class of devices, as the stores take them.

    stores/tiers.json                        which file for which devices, with size, hash, and why
    stores/device_targeting_config.xml       Google Play's device groups, by RAM
    stores/<pack>#group_<tier>/<file>        what a pack's assets are, so that Play gives each group its own
    stores/background-assets-<tier>.json     the manifest that Apple's ba-package makes an asset pack of

A device gets the file that loses least of those that its RAM holds with a full context, within the share that one
application may count on, and that an asset pack may hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

from cfsp.errors import InputError
from cfsp.files import atomic_directory, remove_directory, sha256_file, write_json, write_text
from cfsp.reading import read_json_object
from cfsp.records import fields_from_json, write_record
from phoneready.evaluation.measured_file import MeasuredFile
from phoneready.figures.stores import PLAY_PACK, STORES
from phoneready.publish.placing import place
from phoneready.settings.schema import StoresConfig, TierConfig
from runtime_bench.devices.model_facts import gguf_facts
from runtime_bench.devices.projection import APP_SHARE, project_memory
from runtime_bench.records.bench_record import FITS

STORES_FOLDER = "stores"
TIERS_FILE, TARGETING_FILE = "tiers.json", "device_targeting_config.xml"
_FRONTIER = "frontier"
_CONFIG = "http://schemas.android.com/apk/config"
_FEATURES = ("dotprod",)
"""Of every processor that a tier may have: llama.cpp keeps a second copy of some types for it."""


@dataclass(frozen=True)
class Tier:
    """A class of devices with its file.

    Attributes:
        name: Of the class.
        min_ram_bytes: Least RAM of its devices.
        max_ram_bytes: What they have less than; None where nothing ends the class.
        file: Of the frontier.
        bytes: Its size.
        sha256: Its hash.
        bits_per_byte: What it loses on the frontier's text.
        needed_bytes: What must be in memory with a full context, projected.
        may_have_bytes: Share of the least RAM that one application may count on.
    """

    name: str
    min_ram_bytes: int
    max_ram_bytes: int | None
    file: str
    bytes: int
    sha256: str
    bits_per_byte: float
    needed_bytes: int
    may_have_bytes: int


@dataclass(frozen=True)
class Tiers:
    """stores/tiers.json.

    Attributes:
        pack: What the asset packs are called.
        n_ctx: Tokens of the context that a device must hold.
        cache_type: Of keys and values.
        pack_limit_bytes: Most that a file may take.
        pack_limit_source: Who says so.
        ba_max_install_size: Largest of the files: `BAMaxInstallSize` of an app that fetches its own at installation.
        tiers: By RAM.
    """

    KIND: ClassVar[str] = "store-tiers"
    SCHEMA_VERSION: ClassVar[int] = 1

    pack: str
    n_ctx: int
    cache_type: str
    pack_limit_bytes: int
    pack_limit_source: str
    ba_max_install_size: int
    tiers: tuple[Tier, ...]


def choose_tiers(stores: StoresConfig, tiers: Sequence[TierConfig]) -> Tiers:
    """The file of each class of devices.

    Raises:
        InputError: No frontier, no file of it in its folder, one that has changed, or a class that nothing fits.
    """
    folder = stores.frontier.parent
    points = [point for point in measured_files(stores.frontier) if (folder / point.file).is_file()]
    if not points:
        raise InputError(f"no file of the frontier lies in {folder}", field="stores.frontier")
    ordered = sorted(tiers, key=lambda tier: tier.ram_bytes)
    ends = [after.ram_bytes for _, after in pairwise(ordered)]
    chosen = [_chosen(stores, tier, end, points) for tier, end in zip(ordered, [*ends, None], strict=True)]
    limit = STORES[PLAY_PACK]
    return Tiers(
        pack=stores.pack,
        n_ctx=stores.n_ctx,
        cache_type=stores.cache_type,
        pack_limit_bytes=limit.bytes,
        pack_limit_source=f"{limit.source}, {limit.date}",
        ba_max_install_size=max(tier.bytes for tier in chosen),
        tiers=tuple(chosen),
    )


def measured_files(path: Path) -> list[MeasuredFile]:
    """What a frontier's record says of its files: names, sizes, and what they lose.

    Raises:
        InputError: No frontier's record, or one that does not validate.
    """
    record = read_json_object(path)
    if record.get("kind") != _FRONTIER or not isinstance(record.get("points"), list):
        raise InputError(f"{path} is no frontier's record", field="stores.frontier")
    names = [field.name for field in fields(MeasuredFile)]
    points = []
    for stored in record["points"]:
        known = {name: stored[name] for name in names if name in stored} if isinstance(stored, dict) else {}
        points.append(fields_from_json(MeasuredFile, known, where=str(path)))
    if strange := [p.file for p in points if Path(p.file).name != p.file or Path(p.file).suffix != ".gguf"]:
        raise InputError(f"{path}: not the name of a GGUF file", field="file", value=strange[0])
    return points


def _chosen(stores: StoresConfig, tier: TierConfig, end: int | None, points: Sequence[MeasuredFile]) -> Tier:
    may_have, folder = int(tier.ram_bytes * APP_SHARE), stores.frontier.parent
    for point in sorted(points, key=lambda point: (point.bits_per_byte, point.file_bytes)):
        facts = gguf_facts(folder / point.file)
        n_ctx = min(stores.n_ctx, facts.context_length)
        memory = project_memory(facts, n_ctx, _FEATURES, cache_type=stores.cache_type)
        if point.file_bytes <= STORES[PLAY_PACK].bytes and memory.verdict(may_have) == FITS:
            if (folder / point.file).stat().st_size != point.file_bytes:
                raise InputError(f"{folder / point.file} is not the file that the frontier has measured")
            digest = sha256_file(folder / point.file)
            figures = (point.file, point.file_bytes, digest, point.bits_per_byte, memory.needed, may_have)
            return Tier(tier.name, tier.ram_bytes, end, *figures)
    raise InputError(
        f"no file of the frontier fits devices of {tier.name}",
        field="tiers",
        value=tier.ram,
        allowed=f"what needs at most {may_have} bytes with {stores.n_ctx} tokens of context",
    )


def write_tiers(stores: StoresConfig, tiers: Tiers, folder: Path) -> None:
    """Write what the stores take into a release folder, in place of what was there."""
    with atomic_directory(folder / STORES_FOLDER, own=True) as root:
        for tier in tiers.tiers:
            assets = root / assets_folder(tiers.pack, tier)
            assets.mkdir()
            place(stores.frontier.parent / tier.file, assets / tier.file)
            write_json(root / f"background-assets-{tier.name}.json", background_manifest(tiers.pack, tier))
        write_text(root / TARGETING_FILE, targeting_text(tiers.tiers))
        write_record(root / TIERS_FILE, tiers)


def remove_tiers(folder: Path) -> None:
    """Remove what an earlier release wrote for stores."""
    if (folder / STORES_FOLDER / TIERS_FILE).is_file():
        remove_directory(folder / STORES_FOLDER)


def assets_folder(pack: str, tier: Tier) -> str:
    """The folder of a tier's file: Play takes what follows the mark for the group that it is for."""
    return f"{pack}#group_{tier.name}"


def targeting_text(tiers: Sequence[Tier]) -> str:
    """Play's device groups: the least RAM is of the group, the most of the next."""
    ElementTree.register_namespace("config", _CONFIG)
    root = ElementTree.Element(f"{{{_CONFIG}}}device-targeting-config")
    for tier in tiers:
        group = ElementTree.SubElement(root, f"{{{_CONFIG}}}device-group", {"name": tier.name})
        bounds = {"ram-min-bytes": str(tier.min_ram_bytes)}
        bounds |= {"ram-max-bytes": str(tier.max_ram_bytes)} if tier.max_ram_bytes is not None else {}
        ElementTree.SubElement(group, f"{{{_CONFIG}}}device-selector", bounds)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def background_manifest(pack: str, tier: Tier) -> dict[str, Any]:
    """Apple's manifest of an asset pack that the app asks for when it has looked at the device's memory."""
    return {
        "assetPackID": f"{pack}-{tier.name}",
        "downloadPolicy": {"onDemand": {}},
        "fileSelectors": [{"file": f"{assets_folder(pack, tier)}/{tier.file}"}],
        "platforms": ["iOS"],
    }
