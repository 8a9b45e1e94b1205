"""Local paths of what a user names: hub ids, folders, single files and short names, fetched if needed.

Everything that is to be fetched is listed, added up and announced before the first large file is touched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from std_rt.core.base_model import licence
from std_rt.core.errors import ExportError
from std_rt.core.files import missing
from std_rt.export.export_options import check_pipeline_folder
from std_rt.export.profiles import PROFILES, find_profile
from std_rt.export.sources.hub import (
    MODEL_ROLES,
    Fetch,
    HubRef,
    Listing,
    choose_configs,
    choose_file,
    choose_model,
    fetch_all,
    list_files,
    parse_ref,
    read_small,
)
from std_rt.export.sources.single_file import check_single_file, convert_single_file
from std_rt.models.components import read_json
from std_rt.models.ip_adapter import projection_reads

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
    tiny_vae: Path | None = None
    motion_adapter: Path | None = None
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
    tiny_vae: str | None = None,
    motion_adapter: str | None = None,
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
    checkpoint takes. ``say`` gets a line on what is fetched, ``confirm`` is asked once before (False ends
    it). What is in the files is checked by the export itself. Raises ExportError with one line.
    """
    if profile:
        find_profile(profile)  # a wrong name is said before anything is fetched
    scaled = tuple(map(_split_scale, loras))
    asked = _Asked(base, scaled, ip_adapter, image_encoder, vae, tiny_vae, eta, profile, motion_adapter)
    asked = _published_recipe(asked) if base is None else asked
    return _Resolver(asked, config, say, confirm).run()


@dataclass(frozen=True)
class _Asked:
    base: str | None
    loras: tuple[tuple[str, float], ...]
    ip_adapter: str | None
    image_encoder: str | None
    vae: str | None
    tiny_vae: str | None
    eta: float | None
    profile: str
    motion_adapter: str | None = None


def _published_recipe(asked: _Asked) -> _Asked:
    """SDXL base, the STD LoRA of this eta, IP-Adapter Plus and the VAE that stays in fp16's range."""
    asked = replace(asked, base=BASE, ip_adapter=asked.ip_adapter or "plus", vae=asked.vae or "fp16-fix")
    if asked.loras:
        return asked
    profile = asked.profile or f"std-{DEFAULT_ETA if asked.eta is None else asked.eta:g}"
    if profile not in PROFILES and not asked.profile:
        known = ", ".join(key.removeprefix("std-") for key in PROFILES if key.startswith("std-"))
        raise ExportError(
            f"--eta {asked.eta:g}: the published STD LoRAs are for {known}; "
            "give one of these, or --lora with a file trained for yours"
        )
    return replace(asked, profile=profile, loras=((_published_file(profile, asked.eta), 1.0),))


def _published_file(profile: str, eta: float | None) -> str:
    """Where the weights of a profile are published, as a ``--lora`` would name them."""
    found = find_profile(profile)
    if found.fixed and eta is not None and eta != found.eta:
        raise ExportError(
            f"--eta {eta:g} conflicts with --profile {profile}, which is for {found.eta:g}; omit one of them"
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
        file = short[0] if short else asked.ip_adapter
        adapter = self._file(file, "--ip-adapter") if file else None
        named = asked.image_encoder or (short[1] if short else None)
        encoder = self._folder(named, "--image-encoder") if named else None
        named = VAES.get(asked.vae or "", asked.vae)
        vae = self._folder(named, "--vae") if named else None
        named = VAES.get(asked.tiny_vae or "", asked.tiny_vae)
        tiny = self._folder(named, "--tiny-vae") if named else None
        motion = self._folder(asked.motion_adapter, "--motion-adapter") if asked.motion_adapter else None
        self._fetch()
        encoder = encoder or self._fitting_encoder(base, adapter)
        folder = base.path
        if configs is not None:
            folder = convert_single_file(base.path, configs.path, self.say, own_vae=asked.vae is None)
        return Sources(
            folder,
            tuple((place.path, scale) for place, (_, scale) in zip(loras, asked.loras, strict=True)),
            adapter.path if adapter else None,
            encoder.path if encoder else None,
            vae.path if vae else None,
            tiny.path if tiny else None,
            motion.path if motion else None,
            asked.profile,
            asked.eta,
            {folder: _origin(base)}
            | {
                place.path: _origin(place) for place in (*loras, adapter, encoder, vae, tiny, motion) if place
            },
        )

    def _base(self) -> tuple[_Place, _Place | None]:
        """(base, None), or for a checkpoint (its file, the pipeline whose configs it takes)."""
        text = str(self.asked.base)
        path, ref = Path(text), parse_ref(text)
        if path.is_dir():
            check_pipeline_folder(path)
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
            raise _unknown(
                text,
                f"{text} is neither a folder or file here nor a hub id (owner/name); "
                "give one of these, or omit BASE for the published SDXL recipe",
            )
        return self._hub_pipeline(ref), None

    def _refuse_config(self, base: str) -> None:
        if self.config is not None:
            raise ExportError(f"--config is for single-file checkpoints, and {base} has its own configs")

    def _check_adapter(self, base: str, has_own: bool) -> None:
        if not has_own and self.asked.ip_adapter is None:
            raise ExportError(
                f"{base} has no IP-Adapter in it, and a style needs one; "
                f"add --ip-adapter {' or '.join(IP_ADAPTERS)}, or a file"
            )

    def _hub_pipeline(self, ref: HubRef) -> _Place:
        self._refuse_config(str(ref))
        listing = self._list(ref)
        self._check_adapter(str(ref), "ip_adapter.safetensors" in listing.files)
        names = [*choose_configs(listing)]  # raises if it is not a pipeline
        index = read_json(read_small(listing, "model_index.json"))
        # Before gigabytes are fetched: SDXL pipelines have a second text encoder, or none as ours do.
        if "StableDiffusionXL" not in str(index.get("_class_name")):
            raise ExportError(
                f"{ref} is a {index.get('_class_name')}; std-rt exports StableDiffusionXL pipelines"
            )
        asked = self.asked
        replaced = {"vae": asked.vae, "image_encoder": asked.image_encoder or asked.ip_adapter}
        for role in MODEL_ROLES:
            if (index.get(role) or [None])[0] is not None and not replaced.get(role):
                names += choose_model(listing, role)
        names += [] if asked.ip_adapter else ["ip_adapter.safetensors"]
        self.wanted.append(Fetch(listing, tuple(names)))
        return _Place(listing.folder, listing)

    def _configs(self) -> _Place:
        """The pipeline whose configs, tokenizers and scheduler a checkpoint takes."""
        text = self.config or BASE
        if Path(text).is_dir():
            return _Place(Path(text))
        ref = parse_ref(text)
        if ref is None or ref.path:
            raise _unknown(text, f"--config {text} is neither a folder here nor a hub id (owner/name)")
        listing = self._list(ref)
        self.wanted.append(Fetch(listing, choose_configs(listing)))
        return _Place(listing.folder, listing)

    def _file(self, text: str, flag: str) -> _Place:
        """A file here or on the hub; a repository alone, if it has only one that fits."""
        path, ref = Path(text), parse_ref(text)
        if path.is_file():
            return _Place(path)
        if path.is_dir():
            raise ExportError(f"{flag} {text} is a folder; give the file in it")
        if ref is None:
            raise _unknown(
                text, f"{flag} {text} does not exist here, and is not a hub name (owner/name:file)"
            )
        listing = self._list(ref)
        name = ref.path or _only_weights(listing, flag)
        _check_suffix(listing, name, flag)
        self.wanted.append(Fetch(listing, choose_file(listing, name)))
        return _Place(listing.folder / name, listing)

    def _folder(self, text: str, flag: str) -> _Place:
        """One model's folder here or on the hub."""
        path, ref = Path(text), parse_ref(text)
        if path.is_dir():
            return _Place(path)
        if ref is None or path.is_file():
            names = f", or {' or '.join(VAES)}" if flag.endswith("vae") else ""
            raise _unknown(
                text, f"{flag} {text} is neither a folder here nor a hub id (owner/name[:folder]){names}"
            )
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
        merged: dict[Path, Fetch] = {}
        for fetch in self.wanted:
            before = merged.get(fetch.listing.folder, Fetch(fetch.listing, ()))
            merged[fetch.listing.folder] = replace(
                before, names=tuple(dict.fromkeys(before.names + fetch.names))
            )
        fetch_all([*merged.values()], self.say, self.confirm)
        self.wanted = []

    def _fitting_encoder(self, base: _Place, adapter: _Place | None) -> _Place | None:
        """The published encoder that an adapter reads, if none was named and none is in the base or beside
        the user's own adapter. None if there is one, or where it is not known which it needs."""
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


def _unknown(text: str, usual: str) -> ExportError:
    """The error for a name that is neither here nor on the hub: ``usual``, or what else the name is."""
    path = Path(text)
    if text == "-" or (path.exists() and not path.is_file() and not path.is_dir()):
        return ExportError(
            f"{text} is a pipe or a device, and weights are read from files; save it to one first"
        )
    return ExportError(missing(text) if "://" in text else usual)


def _check_suffix(listing: Listing, name: str, flag: str) -> None:
    """Raise ExportError before a file is fetched that would be refused afterwards."""
    if name.endswith(".safetensors") or (flag == "--ip-adapter" and name.endswith(".bin")):
        return
    others = [other for other in listing.files if other.endswith(".safetensors")]
    instead = f"give {listing.ref.repo}:{others[0]}" if others else "choose another repository"
    raise ExportError(f"{flag} {listing.ref.repo}:{name} is not a .safetensors file; {instead}")


def _only_weights(listing: Listing, flag: str) -> str:
    found = [name for name in listing.files if name.endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ExportError(f"{flag} {listing.ref.repo} has no .safetensors file")
    raise ExportError(
        f"{flag} {listing.ref.repo} has {len(found)} files; give one as {listing.ref.repo}:{found[0]}"
    )


def _origin(place: _Place) -> Origin:
    if place.listing is None:
        return Origin(place.path.resolve().name)
    inside = place.path.relative_to(place.listing.folder).as_posix()
    name = place.listing.ref.repo + ("" if inside == "." else f":{inside}")
    return Origin(name, place.listing.commit, licence(place.listing.folder))
