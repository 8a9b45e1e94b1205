"""Files from the hub: listed first, announced with their size, fetched with resume, used from its cache.

huggingface_hub keeps the cache and makes the requests. Its version 2 starts an interrupted file again from
nothing, so the transfer is done here: into ``blobs/ETAG.incomplete``, where the next run resumes.
HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN mean what they mean there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub import try_to_load_from_cache as cached_path
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import are_symlinks_supported, http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]
from huggingface_hub.utils import tqdm as HubBar  # type: ignore[attr-defined]
from rich.filesize import decimal

from std_rt.core.errors import ExportError, counted
from std_rt.core.files import disk_is_full, file_digest
from std_rt.core.machine import free_disk_gb

__all__ = [
    "Fetch",
    "HubFile",
    "HubRef",
    "Listing",
    "choose_configs",
    "choose_file",
    "choose_model",
    "choose_weights",
    "fetch_all",
    "list_files",
    "parse_ref",
    "read_small",
]

Say = Callable[[str], None]

MODEL_ROLES = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")
_CONFIG_FOLDERS = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
_BAR_BYTES = 8_000_000  # larger files get a progress bar
_SPARE_BYTES = 200_000_000  # left free on the disk
_TRANSPORT: Any = HfHubHTTPError.__mro__[1]  # the client's own errors: httpx's, under whatever name

_NAME = r"[A-Za-z0-9][\w.-]*"
_REF = re.compile(rf"({_NAME}/{_NAME})(?:@([^\s:]+))?(?::(.+))?")
_PAGE = re.compile(
    rf"https://(?:huggingface\.co|hf\.co)/({_NAME}/{_NAME})(?:/(?:blob|resolve|tree)/([^/]+)(?:/(.*))?)?"
)
_REF_PATH = re.compile(rf"({_NAME}/{_NAME})/(.+\.(?:safetensors|bin))")


@dataclass(frozen=True)
class HubRef:
    """A repository at a revision (branch, tag or commit), and a file or folder in it ("" for all)."""

    repo: str
    revision: str = constants.DEFAULT_REVISION
    path: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == constants.DEFAULT_REVISION else f"@{self.revision}"
        return f"{self.repo}{revision}" + (f":{self.path}" if self.path else "")


@dataclass(frozen=True)
class HubFile:
    """``sha256`` is known for large files only."""

    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit; ``online`` False: what the cache holds of it."""

    ref: HubRef
    commit: str
    files: Mapping[str, HubFile]
    online: bool = True

    @property
    def folder(self) -> Path:
        """Where the files lie once fetched."""
        return _storage(self.ref.repo) / "snapshots" / self.commit

    def is_cached(self, name: str) -> bool:
        """Whether a file is here already."""
        return isinstance(cached_path(self.ref.repo, name, revision=self.commit), str)


@dataclass(frozen=True)
class Fetch:
    """Files wanted of one repository."""

    listing: Listing
    names: tuple[str, ...]

    @property
    def missing(self) -> list[HubFile]:
        """Those that are not in the cache."""
        return [self.listing.files[name] for name in self.names if not self.listing.is_cached(name)]


def parse_ref(text: str) -> HubRef | None:
    """``owner/name[@revision][:path]``, ``owner/name/file.safetensors`` or the page of one; else None."""
    if (page := _PAGE.fullmatch(text.partition("?")[0].rstrip("/"))) is not None:
        text = f"{page[1]}@{page[2] or constants.DEFAULT_REVISION}" + (f":{page[3]}" if page[3] else "")
    match = _REF.fullmatch(text)
    if match is not None and not match[1].endswith(".safetensors"):
        found = HubRef(match[1], match[2] or constants.DEFAULT_REVISION, match[3] or "")
    elif (match := _REF_PATH.fullmatch(text)) is not None:
        found = HubRef(match[1], path=match[2])
    else:
        return None
    if ".." in PurePosixPath(found.path).parts or found.path.startswith("/"):
        raise ExportError(f"{text} names a file outside its repository")
    return found


def list_files(ref: HubRef, say: Say) -> Listing:
    """What the repository holds; if the hub cannot be reached, what the cache holds, with a line about it.

    Raises ExportError if there is no such repository or revision, or neither hub nor cache has it.
    """
    cached = _cached_listing(ref)
    if constants.is_offline_mode():
        if cached is None:
            raise ExportError(f"{ref.repo} is not in the cache, and HF_HUB_OFFLINE is set; {_by_hand(ref)}")
        return cached
    try:
        with _explained(ref):
            info = HfApi().model_info(
                ref.repo, revision=ref.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
    except HubDownError as error:
        if cached is None:
            raise
        say(f"{error.args[0].partition(';')[0]}: using {ref.repo} as cached ({cached.commit[:12]})")
        return cached
    files = [
        HubFile(item.rfilename, item.size or 0, item.lfs.sha256 if item.lfs else None)
        for item in info.siblings or ()
    ]
    return Listing(ref, str(info.sha), {file.name: file for file in files})


def read_small(listing: Listing, name: str) -> Path:
    """Fetch one small file at once, without an announcement: it is needed to choose the others."""
    _check_there(listing, name)
    _fetch_file(listing, listing.files[name])
    return listing.folder / name


def choose_configs(listing: Listing) -> tuple[str, ...]:
    """Everything but weights: configs, tokenizers, licence. Raises ExportError if it is not a pipeline."""
    if "model_index.json" not in listing.files:
        checkpoints = [name for name in listing.files if "/" not in name and name.endswith(".safetensors")]
        hint = f"; give one of its files, such as {listing.ref.repo}:{checkpoints[0]}" if checkpoints else ""
        raise ExportError(f"{listing.ref} has no model_index.json, so it is not a diffusers pipeline{hint}")
    wanted = {"model_index.json", "README.md", *(f"{role}/config.json" for role in MODEL_ROLES)}
    wanted.add("image_encoder/preprocessor_config.json")
    texts = (".json", ".txt")
    return tuple(
        name
        for name in listing.files
        if name in wanted or (name.partition("/")[0] in _CONFIG_FOLDERS and name.endswith(texts))
    )


def choose_file(listing: Listing, name: str) -> tuple[str, ...]:
    """One file, and the licence. Raises ExportError if it is not there, naming files that are."""
    _check_there(listing, name)
    return (name, *_readme(listing))


def choose_model(listing: Listing, folder: str = "") -> tuple[str, ...]:
    """One model's folder: its config, its weights, the licence."""
    prefix = f"{folder}/" if folder else ""
    _check_there(listing, f"{prefix}config.json")
    extra = [name for name in (f"{prefix}preprocessor_config.json",) if name in listing.files]
    return (f"{prefix}config.json", *extra, *_readme(listing), *choose_weights(listing, folder))


def choose_weights(listing: Listing, folder: str) -> tuple[str, ...]:
    """One complete set of weights: a cached one before others, fp16 before fp32. Raises ExportError."""
    prefix = f"{folder}/" if folder else ""
    found = [names for variant in (".fp16", "") for names in _complete_sets(listing, prefix, variant)]
    if not found:
        raise ExportError(
            f"{listing.ref.repo} has no .safetensors weights in {folder or 'its root'}; "
            "std-rt does not read .bin or .ckpt: use another repository, or convert it with save_pretrained"
        )
    return next((names for names in found if all(map(listing.is_cached, names))), found[0])


def fetch_all(wanted: Sequence[Fetch], say: Say, confirm: Callable[[str], bool]) -> None:
    """Announce files and sizes, check the disk, ask, and fetch what is not in the cache."""
    missing = [file for fetch in wanted for file in fetch.missing]
    for fetch in wanted:
        listing, left = fetch.listing, sum(file.size for file in fetch.missing)
        size = sum(listing.files[name].size for name in fetch.names)
        state = f"{_size(left)} to fetch" if fetch.missing else "cached"
        files = counted(len(fetch.names), "file")
        say(f"{listing.ref} ({listing.commit[:12]}): {files}, {_size(size)}, {state}")
    if missing:
        _announce(wanted, missing, say, confirm)
    for fetch in wanted:
        for file in fetch.missing:
            _fetch_file(fetch.listing, file, say)
        # Remember which commit a branch stood at, as the hub's client does: offline use starts there.
        ref, commit = fetch.listing.ref, fetch.listing.commit
        note = _storage(ref.repo) / "refs" / ref.revision
        if ref.revision != commit and fetch.listing.online:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(commit, encoding="utf-8")


class HubDownError(ExportError):
    """The hub cannot be reached; what the cache has may do."""


def _announce(
    wanted: Sequence[Fetch], missing: Sequence[HubFile], say: Say, confirm: Callable[[str], bool]
) -> None:
    """Say how much is to be fetched, and ask. Raises ExportError if it cannot or shall not be."""
    total = sum(file.size for file in missing)
    summary = f"to fetch: {counted(len(missing), 'file')}, {_size(total)}, into {constants.HF_HUB_CACHE}"
    say(summary)
    offline = next((fetch for fetch in wanted if fetch.missing and not fetch.listing.online), None)
    if offline is not None:
        raise ExportError(
            f"{offline.listing.ref.repo} is cached without {offline.missing[0].name}, and the hub cannot be "
            f"reached; {_by_hand(offline.listing.ref)}"
        )
    free = int(free_disk_gb(Path(constants.HF_HUB_CACHE)) * 2**30)
    if free < total + _SPARE_BYTES:
        raise ExportError(
            f"the download is {_size(total)} and {constants.HF_HUB_CACHE} has {_size(free)} free; "
            "make room, or set HF_HOME to a folder on another disk"
        )
    if not confirm(summary):
        raise ExportError("download declined; nothing was fetched")


def _size(count: int) -> str:
    """As the hub's pages count: 1 GB is 10**9 bytes."""
    return decimal(count, precision=2)


def _storage(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _cached_listing(ref: HubRef) -> Listing | None:
    """What the cache has of the repository at this revision; None for nothing."""
    storage = _storage(ref.repo)
    note = storage / "refs" / ref.revision
    commit = note.read_text(encoding="utf-8").strip() if note.is_file() else ref.revision
    folder = storage / "snapshots" / commit
    paths = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    if not paths:
        return None
    files = [HubFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]
    return Listing(ref, commit, {file.name: file for file in files}, online=False)


def _readme(listing: Listing) -> list[str]:
    """It names the licence."""
    return [name for name in ("README.md",) if name in listing.files]


def _check_there(listing: Listing, name: str) -> None:
    if name in listing.files:
        return
    where = "" if listing.online else " in the cache, and the hub cannot be reached"
    kind = PurePosixPath(name).suffix
    near = [other for other in listing.files if other.endswith(kind)][:5]
    hint = f"; it has {', '.join(near)}" if near else ""
    raise ExportError(f"{listing.ref.repo} has no file {name}{where}{hint}")


def _complete_sets(listing: Listing, prefix: str, variant: str) -> Iterator[tuple[str, ...]]:
    """File sets of one precision in which no shard is missing."""
    for stem in ("diffusion_pytorch_model", "model"):
        single = f"{prefix}{stem}{variant}.safetensors"
        if single in listing.files:
            yield (single,)
        pattern = re.compile(re.escape(f"{prefix}{stem}{variant}") + r"-\d{5}-of-(\d{5})\.safetensors")
        shards = {name: match for name in listing.files if (match := pattern.fullmatch(name))}
        index = f"{prefix}{stem}.safetensors.index{variant}.json"
        if shards and index in listing.files and len(shards) == int(next(iter(shards.values()))[1]):
            yield (index, *sorted(shards))


def _fetch_file(listing: Listing, file: HubFile, say: Say = lambda line: None) -> None:
    """Bring one file into the cache, under the names and links that huggingface_hub gives it."""
    if listing.is_cached(file.name):
        return
    with _explained(listing.ref, file.name):
        _bring_blob(listing, file, say)
        hf_hub_download(listing.ref.repo, file.name, revision=listing.commit)


def _bring_blob(listing: Listing, file: HubFile, say: Say) -> None:
    """The content, from where an earlier attempt stopped; checked before it gets its name."""
    url = hf_hub_url(listing.ref.repo, file.name, revision=listing.commit)
    found = get_hf_file_metadata(url)
    if found.etag is None:
        raise ExportError(f"{url} has no ETag; HF_ENDPOINT ({constants.ENDPOINT}) is not a model hub")
    storage = _storage(listing.ref.repo)
    blob = storage / "blobs" / found.etag
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / storage.name / f"{found.etag}.lock"
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        partial = blob.with_name(f"{blob.name}.incomplete")
        _transfer(url, partial, file, found.size, say)
        _check_digest(partial, file)
        partial.replace(blob)
        if not are_symlinks_supported(constants.HF_HUB_CACHE):  # or the hub's client would copy it
            place = listing.folder / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            blob.replace(place)


def _transfer(url: str, partial: Path, file: HubFile, size: int | None, say: Say) -> None:
    """Append what is missing to ``partial``; it stays where the transfer breaks off."""
    if partial.exists() and size is not None and partial.stat().st_size > size:
        partial.unlink()
    with partial.open("ab") as stream:
        start = stream.tell()
        if start:
            say(f"{file.name}: resuming after {_size(start)} of {_size(file.size)}")
        headers = build_hf_headers()
        bar = HubBar if file.size >= _BAR_BYTES else _NoBar
        try:
            http_get(url, stream, resume_size=start, headers=headers, expected_size=size,
                     displayed_filename=file.name, tqdm_class=bar)  # fmt: skip
        except KeyboardInterrupt:
            say(
                f"interrupted; {_size(stream.tell())} of {file.name} are kept: the same command resumes there"
            )
            raise
        except _TRANSPORT as error:
            if isinstance(error, HfHubHTTPError):
                raise
            raise ExportError(
                f"the transfer of {file.name} broke off after {_size(stream.tell())} of {_size(file.size)} "
                f"({_reason(error)}); run the same command again, and it resumes there"
            ) from error


def _check_digest(partial: Path, file: HubFile) -> None:
    if file.sha256 is not None and file_digest(partial) != file.sha256:
        partial.unlink()
        raise ExportError(f"{file.name} is damaged (its sha256 is not the hub's); run the same command again")


class _NoBar(HubBar):
    """For files that are here before a bar is drawn."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})


@contextmanager
def _explained(ref: HubRef, name: str = "") -> Iterator[None]:
    """Turn what the hub's client raises into one line that says what to type."""
    try:
        yield
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OfflineModeIsEnabled) as error:
        raise _explain(error, ref, name) from error
    except _TRANSPORT as error:
        raise HubDownError(
            f"cannot reach {constants.ENDPOINT} ({_reason(error)}); {_by_hand(ref)}"
        ) from error
    except OSError as error:
        if disk_is_full(error):
            raise ExportError(
                f"the disk of {constants.HF_HUB_CACHE} is full; make room and run the same command again"
            ) from error
        raise ExportError(f"{name or ref} cannot be fetched: {_reason(error)}") from error


def _explain(error: Exception, ref: HubRef, name: str) -> ExportError:
    page = f"{constants.ENDPOINT}/{ref.repo}"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    match error:
        case GatedRepoError():
            text = (
                f"{ref.repo} is gated: accept its licence at {page}, "
                "then type: hf auth login (or set HF_TOKEN)"
            )
        case RepositoryNotFoundError():
            text = (
                f"there is no {ref.repo} on the hub, and no such file or folder here; check the name "
                "(a private repository needs: hf auth login)"
            )
        case RevisionNotFoundError():
            text = f"{ref.repo} has no revision {ref.revision!r}; its revisions are at {page}/commits"
        case EntryNotFoundError():
            text = f"{ref.repo} has no file {name or ref.path}; its files are at {page}/tree/main"
        case HFValidationError():
            text = f"{ref.repo!r} is not a hub id ({_reason(error)}); use owner/name"
        case _ if status in (401, 403):
            text = f"{page} refuses access ({status}); type: hf auth login (or set HF_TOKEN to a valid one)"
        case _ if status == 429 or status >= 500:
            return HubDownError(f"{constants.ENDPOINT} answers {status}; try again later, or {_by_hand(ref)}")
        case _:
            text = f"{ref} cannot be fetched: {_reason(error)}"
    return ExportError(text)


def _reason(error: BaseException) -> str:
    """The first line of a message, or the name of an error that has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


def _by_hand(ref: HubRef) -> str:
    """What to type on a machine that is online."""
    revision = "" if ref.revision == constants.DEFAULT_REVISION else f" --revision {ref.revision}"
    what = f" {ref.path}" if PurePosixPath(ref.path).suffix else ""
    if ref.path and not what:
        what = f" --include '{ref.path.rstrip('/')}/*'"
    return f"when online type: hf download {ref.repo}{what}{revision}, or give a local file or folder"
