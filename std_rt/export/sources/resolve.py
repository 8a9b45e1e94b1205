"""What a user names -> local paths: hub ids, folders, single files and short names, fetched where need be.

Everything that is to be fetched is listed, added up and announced before the first large file is touched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from std_rt.core.base_model import licence
from std_rt.core.errors import ExportError
from std_rt.export.components import read_json
from std_rt.export.ip_adapter import check_encoder, projection_reads
from std_rt.export.profiles import PROFILES, find_profile
from std_rt.export.sources.hub import (
    MODEL_ROLES,
    Fetch,
    HubRef,
    Listing,
    choose_configs,
    choose_file,
    choose_model,
    choose_pipeline,
    fetch_all,
    list_files,
    parse_ref,
    read_small,
)
from std_rt.export.sources.single_file import check_single_file, convert_single_file
from std_rt.export.sources.weight_files import check_weights

__all__ = ["Origin", "Sources", "resolve_sources"]

Say = Callable[[str], None]
Confirm = Callable[[str], bool]

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
DEFAULT_ETA = 0.75
VAES = {"fp16-fix": "madebyollin/sdxl-vae-fp16-fix", "tiny": "madebyollin/taesdxl"}
_VIT_H = "h94/IP-Adapter:models/image_encoder"
_BIG_G = "h94/IP-Adapter:sdxl_models/image_encoder"
# Short name -> (adapter, the picture encoder it was trained with).
IP_ADAPTERS = {
    "plus": ("h94/IP-Adapter:sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors", _VIT_H),
    "base": ("h94/IP-Adapter:sdxl_models/ip-adapter_sdxl_vit-h.safetensors", _VIT_H),
    "base-bigg": ("h94/IP-Adapter:sdxl_models/ip-adapter_sdxl.safetensors", _BIG_G),
}
# What an adapter reads (see `projection_reads`) -> the encoder that gives it.
_ENCODERS = {
    ("hidden", 1280): _VIT_H,
    ("hidden", 1664): _BIG_G,
    ("pooled", 1024): _VIT_H,
    ("pooled", 1280): _BIG_G,
}

_SCALE = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Origin:
    """Where a file or folder came from, for the manifest. ``revision`` is a commit; "" for local files."""

    id: str
    revision: str = ""
    licence: str = ""

    def entry(self) -> dict[str, str]:
        """What is known, by the manifest's names."""
        known = {"id": self.id, "revision": self.revision, "licence": self.licence}
        return {key: value for key, value in known.items() if value}


@dataclass(frozen=True)
class Sources:
    """Local paths for ExportOptions, and where each came from; ``lora`` are (file, scale) pairs."""

    folder: Path
    lora: tuple[tuple[Path, float], ...] = ()
    ip_adapter: Path | None = None
    image_encoder: Path | None = None
    vae: Path | None = None
    profile: str = ""
    eta: float | None = None
    origins: Mapping[Path, Origin] = field(default_factory=dict)


def resolve_sources(
    base: str | None,
    *,
    loras: Sequence[str] = (),
    ip_adapter: str | None = None,
    image_encoder: str | None = None,
    vae: str | None = None,
    eta: float | None = None,
    profile: str = "",
    config: str | None = None,
    say: Say = lambda line: None,
    confirm: Confirm = lambda summary: True,
) -> Sources:
    """Local paths of everything that an export reads; what is on the hub is fetched into its cache.

    ``base`` is a hub id (``owner/name[@revision]``), a diffusers folder or a ``.safetensors`` checkpoint;
    None is the published recipe, in which every flag given replaces its part. ``loras`` are files or
    ``owner/name:file``, each with ``:scale`` or without. ``config`` is the pipeline whose configs a
    checkpoint takes. ``say`` is told what is fetched, ``confirm`` asked once before (False ends it).
    Raises ExportError with one line.
    """
    if profile:
        find_profile(profile)  # a wrong name is said before anything is fetched
    asked = _Asked(base, tuple(map(_split_scale, loras)), ip_adapter, image_encoder, vae, eta, profile)
    asked = _published_recipe(asked) if base is None else asked
    return _Resolver(asked, config, say, confirm).run()


@dataclass(frozen=True)
class _Asked:
    base: str | None
    loras: tuple[tuple[str, float], ...]
    ip_adapter: str | None
    image_encoder: str | None
    vae: str | None
    eta: float | None
    profile: str


def _published_recipe(asked: _Asked) -> _Asked:
    """SDXL base, the STD LoRA of this eta, IP-Adapter Plus and the VAE that stays in fp16's range."""
    loras, profile = asked.loras, asked.profile
    if not loras:
        profile = profile or _std_profile(asked.eta)
        loras = ((_published_file(profile, asked.eta), 1.0),)
    return _Asked(
        BASE,
        loras,
        asked.ip_adapter or "plus",
        asked.image_encoder,
        asked.vae or "fp16-fix",
        asked.eta,
        profile,
    )


def _std_profile(eta: float | None) -> str:
    name = f"std-{DEFAULT_ETA if eta is None else eta:g}"
    if name not in PROFILES:
        known = ", ".join(key.removeprefix("std-") for key in PROFILES if key.startswith("std-"))
        raise ExportError(
            f"--eta {eta:g}: the published STD LoRAs are for {known}; "
            "give one of these, or --lora with a file trained for yours"
        )
    return name


def _published_file(profile: str, eta: float | None) -> str:
    """Where the weights of a profile are published, as a ``--lora`` would name them."""
    found = find_profile(profile)
    if found.fixed and eta is not None and eta != found.eta:
        raise ExportError(
            f"--eta {eta:g} was asked, and profile {profile} is for {found.eta:g}; leave one out"
        )
    return found.file.replace(": ", ":")


def _split_scale(text: str) -> tuple[str, float]:
    """``FILE:0.8`` -> (FILE, 0.8). Only a number behind the last colon counts, unless a file is named so."""
    head, colon, tail = text.rpartition(":")
    if not colon or not head or not _SCALE.fullmatch(tail) or Path(text).exists():
        return text, 1.0
    if not math.isfinite(float(tail)):
        raise ExportError(f"--lora {text}: the scale must be a finite number")
    return head, float(tail)


@dataclass(frozen=True)
class _Place:
    """Where one thing is, or will be once its repository's files are fetched."""

    path: Path
    listing: Listing | None = None


class _Resolver:
    """One resolution: every repository is listed once, and all files are fetched together."""

    def __init__(self, asked: _Asked, config: str | None, say: Say, confirm: Confirm) -> None:
        self.asked, self.config, self.say, self.confirm = asked, config, say, confirm
        self.listings: dict[tuple[str, str], Listing] = {}
        self.wanted: list[Fetch] = []

    def run(self) -> Sources:
        asked = self.asked
        base, configs = self._base()
        loras = [self._file(text, "--lora") for text, _ in asked.loras]
        short = IP_ADAPTERS.get(asked.ip_adapter or "")
        adapter = self._optional(self._file, short[0] if short else asked.ip_adapter, "--ip-adapter")
        named = asked.image_encoder or (short[1] if short else None)
        encoder = self._optional(self._folder, named, "--image-encoder")
        vae = self._optional(self._folder, VAES.get(asked.vae or "", asked.vae), "--vae")
        self._fetch()
        encoder = encoder or self._fitting_encoder(base, adapter)
        folder = base.path
        if configs is not None:
            folder = convert_single_file(base.path, configs.path, self.say, own_vae=asked.vae is None)
        _check_all(folder, adapter, encoder, vae)
        return Sources(
            folder,
            tuple((place.path, scale) for place, (_, scale) in zip(loras, asked.loras, strict=True)),
            adapter.path if adapter else None,
            encoder.path if encoder else None,
            vae.path if vae else None,
            asked.profile,
            asked.eta,
            {folder: _origin(base)}
            | {place.path: _origin(place) for place in (*loras, adapter, encoder, vae) if place},
        )

    def _base(self) -> tuple[_Place, _Place | None]:
        """(base, None), or for a checkpoint (its file, the pipeline whose configs it takes)."""
        text = str(self.asked.base)
        path, ref = Path(text), parse_ref(text)
        if path.is_dir():
            self._refuse_config(text)
            self._check_adapter(text, (path / "ip_adapter.safetensors").is_file())
            return _Place(path), None
        if path.is_file() or (ref is not None and ref.path):
            self._check_adapter(text, has_own=False)
            base = self._file(text, "BASE")
            if base.listing is None:
                check_single_file(base.path)
            return base, self._configs()
        if ref is None:
            raise ExportError(
                f"{text} is no folder or file here, and no hub id (owner/name); "
                "BASE is one of these three, or nothing for the published recipe"
            )
        return self._hub_pipeline(ref), None

    def _refuse_config(self, base: str) -> None:
        if self.config is not None:
            raise ExportError(f"--config is for single-file checkpoints, and {base} has configs of its own")

    def _check_adapter(self, base: str, has_own: bool) -> None:
        if not has_own and self.asked.ip_adapter is None:
            raise ExportError(
                f"{base} has no IP-Adapter of its own, and a style needs one; "
                f"add --ip-adapter {' or '.join(IP_ADAPTERS)}, or a file"
            )

    def _hub_pipeline(self, ref: HubRef) -> _Place:
        self._refuse_config(str(ref))
        listing = self._list(ref)
        self._check_adapter(str(ref), "ip_adapter.safetensors" in listing.files)
        names = choose_configs(listing)  # is it a pipeline at all?
        index = read_json(read_small(listing, "model_index.json"))
        _check_pipeline(ref, index)
        asked = self.asked
        replaced = {"vae": asked.vae, "image_encoder": asked.image_encoder or asked.ip_adapter}
        roles = [role for role in MODEL_ROLES if _has(index, role) and not replaced.get(role)]
        own = () if asked.ip_adapter else ("ip_adapter.safetensors",)
        self.wanted.append(Fetch(listing, (*names, *choose_pipeline(listing, roles), *own)))
        return _Place(listing.folder, listing)

    def _configs(self) -> _Place:
        """The pipeline whose configs, tokenizers and scheduler a checkpoint takes."""
        text = self.config or BASE
        if Path(text).is_dir():
            return _Place(Path(text))
        ref = parse_ref(text)
        if ref is None or ref.path:
            raise ExportError(f"--config {text} is no folder here and no hub id (owner/name)")
        listing = self._list(ref)
        self.wanted.append(Fetch(listing, choose_configs(listing)))
        return _Place(listing.folder, listing)

    def _optional(self, find: Callable[[str, str], _Place], text: str | None, flag: str) -> _Place | None:
        return None if text is None else find(text, flag)

    def _file(self, text: str, flag: str) -> _Place:
        """A file here or on the hub; a repository alone, where it has only one that will do."""
        path, ref = Path(text), parse_ref(text)
        if path.is_file():
            return _Place(path)
        if path.is_dir():
            raise ExportError(f"{flag} {text} is a folder; give the file in it")
        if ref is None:
            raise ExportError(f"{flag} {text} does not exist here, and is no hub name (owner/name:file)")
        listing = self._list(ref)
        name = ref.path or _only_weights(listing, flag)
        self.wanted.append(choose_file(listing, name))
        return _Place(listing.folder / name, listing)

    def _folder(self, text: str, flag: str) -> _Place:
        """One model's folder here or on the hub."""
        path, ref = Path(text), parse_ref(text)
        if path.is_dir():
            return _Place(path)
        if ref is None or path.is_file():
            names = f", or {' or '.join(VAES)}" if flag == "--vae" else ""
            raise ExportError(f"{flag} {text} is no folder here and no hub id (owner/name[:folder]){names}")
        listing = self._list(ref)
        inside = ref.path.rstrip("/")
        self.wanted.append(Fetch(listing, choose_model(listing, inside)))
        return _Place(listing.folder / inside, listing)

    def _list(self, ref: HubRef) -> Listing:
        """As it was listed before, at the same commit, whatever file of it is asked for."""
        key = (ref.repo, ref.revision)
        if key not in self.listings:
            self.listings[key] = list_files(HubRef(ref.repo, ref.revision), self.say)
        return self.listings[key]

    def _fetch(self) -> None:
        """Everything wanted so far: one line a repository, one sum."""
        names: dict[str, list[str]] = {}
        listings = {fetch.listing.folder.as_posix(): fetch.listing for fetch in self.wanted}
        for fetch in self.wanted:
            names.setdefault(fetch.listing.folder.as_posix(), []).extend(fetch.names)
        merged = [Fetch(listings[key], tuple(dict.fromkeys(listed))) for key, listed in names.items()]
        fetch_all(merged, self.say, self.confirm)
        self.wanted = []

    def _fitting_encoder(self, base: _Place, adapter: _Place | None) -> _Place | None:
        """The published encoder that an adapter reads, where none was named and none lies in the base, nor
        beside an adapter of the user's. None where there is one, or nobody knows which."""
        if adapter is None or (base.path / "image_encoder" / "config.json").is_file():
            return None
        if adapter.listing is None and (adapter.path.parent / "image_encoder" / "config.json").is_file():
            return None
        reads = projection_reads(adapter.path)
        name = _ENCODERS.get(reads) if reads else None
        if name is None:
            return None
        self.say(f"{adapter.path.name} was trained with the image encoder {name}")
        place = self._folder(name, "--image-encoder")
        self._fetch()
        return place


def _has(index: Mapping[str, Any], role: str) -> bool:
    """Whether a ``model_index.json`` has a part that is not null."""
    entry = index.get(role)
    return isinstance(entry, list) and bool(entry) and entry[0] is not None


def _check_pipeline(ref: HubRef, index: Mapping[str, Any]) -> None:
    """Before gigabytes are fetched: SDXL pipelines have a second text encoder, or none as ours do."""
    name = str(index.get("_class_name"))
    if "StableDiffusionXL" not in name:
        raise ExportError(f"{ref} is a {name}; std-rt exports StableDiffusionXLPipeline and its kin")


def _only_weights(listing: Listing, flag: str) -> str:
    found = [name for name in listing.files if name.endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ExportError(f"{flag} {listing.ref.repo} has no .safetensors file")
    raise ExportError(
        f"{flag} {listing.ref.repo} has {len(found)} files; give one as {listing.ref.repo}:{found[0]}"
    )


def _check_all(folder: Path, adapter: _Place | None, encoder: _Place | None, vae: _Place | None) -> None:
    """Whole files, in their place; and an encoder that the adapter can read."""
    models = [folder / role for role in MODEL_ROLES] + [place.path for place in (encoder, vae) if place]
    for model in models:
        check_weights(model)
    if adapter is None:
        return
    for place in (
        encoder.path if encoder else None,
        folder / "image_encoder",
        adapter.path.parent / "image_encoder",
    ):
        if place is not None and (place / "config.json").is_file():
            check_encoder(adapter.path, place)
            return


def _origin(place: _Place) -> Origin:
    if place.listing is None:
        return Origin(place.path.resolve().name)
    inside = place.path.relative_to(place.listing.folder).as_posix()
    name = place.listing.ref.repo + ("" if inside == "." else f":{inside}")
    return Origin(name, place.listing.commit, licence(place.listing.folder))
