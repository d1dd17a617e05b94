"""Image files in one folder per class, in a folder or a zip archive; decoded once into an array that is mapped."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from datamodules.readers.stored_images import StoredImages, require_square

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_MODES = {1: "L", 3: "RGB"}
_DECODED_AT_ONCE = 512
_FORMAT = "1"  # changes when images would be decoded in another way: old caches are then left alone


class ImageFile(NamedTuple):
    """A file below the folder of its class.

    Attributes:
        member: Path below the root, with slashes.
        class_name: The folder.
        stamp: Changes with the content: checksum in an archive, size and time of change in a folder.
    """

    member: str
    class_name: str
    stamp: str


def list_image_files(root: Path, folder: str) -> list[ImageFile]:
    """List the files of a part, sorted by name: a row is the same image on every machine.

    Args:
        root: Folder, or zip archive.
        folder: The part below it that holds the folders of the classes; ``""``: the root itself.

    Raises:
        ValueError: If nothing is found, with what is there instead.
    """
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    if root.is_dir():
        below = sorted(path for path in (root / prefix).rglob("*") if path.is_file())
        members = [(path.relative_to(root).as_posix(), _stamp_of(path)) for path in below if _is_image(path.name)]
    else:
        try:
            with zipfile.ZipFile(root) as archive:
                infos = sorted(archive.infolist(), key=lambda info: info.filename)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{root}: neither a folder nor a readable zip archive ({error})") from None
        members = [(i.filename, f"{i.CRC:08x}") for i in infos if _is_image(i.filename)]
    files = [
        ImageFile(member, member[len(prefix) :].split("/")[0], stamp)
        for member, stamp in members
        if member.startswith(prefix) and "/" in member[len(prefix) :]
    ]
    if not files:
        if root.is_dir():
            folders = [path.relative_to(root).as_posix() for path in [*root.glob("*/"), *root.glob("*/*/")]]
        else:
            folders = ["/".join(member.split("/")[:2]) for member, _ in members]
        found = ", ".join(sorted(set(folders))[:6]) or "nothing"
        raise ValueError(
            f"{root}: no images ({', '.join(SUFFIXES)}) in class folders below {prefix or '.'!r}; it has {found}. Set "
            "data.train_folder and data.test_folder to the folders that hold one folder per class"
        )
    return sorted(files)


def read_image_folder(
    root: Path,
    folder: str,
    *,
    cache_dir: Path,
    class_names: Sequence[str] | None = None,
    num_channels: int | None = None,
    stored_size: int | None = None,
) -> StoredImages:
    """List a part; pixels of chosen rows are decoded when `StoredImages.load` asks for them the first time.

    Args:
        root: Folder, or zip archive.
        folder: The part below it that holds the folders of the classes.
        cache_dir: Folder of the decoded images.
        class_names: Names of the classes in the order of their labels; None: the sorted names of the folders.
        num_channels: 1 grey, 3 colour; None: what the first file has.
        stored_size: Height and width: the shorter side is resized to it and a square cut from the middle. None: files
            are taken as they are and must have one size.

    Raises:
        ValueError: Names the file and the remedy.
    """
    files = list_image_files(root, folder)
    classes = sorted({file.class_name for file in files}) if class_names is None else list(class_names)
    position = {name: label for label, name in enumerate(classes)}
    if strangers := sorted({file.class_name for file in files} - set(position)):
        raise ValueError(
            f"{root}: {folder} has the class {strangers[0]!r}, which the training part has not "
            f"({', '.join(classes[:12])}); remove the folder or correct data.test_folder"
        )

    def load(rows: np.ndarray) -> np.ndarray:
        return _cached(root, [files[i] for i in rows], cache_dir, num_channels, stored_size)

    labels = np.array([position[file.class_name] for file in files], dtype=np.int64)
    return StoredImages(labels, [file.member for file in files], classes, load)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.rsplit("/", 1)[-1].startswith(".")


def _stamp_of(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def _cached(
    root: Path, files: Sequence[ImageFile], cache_dir: Path, num_channels: int | None, stored_size: int | None
) -> np.ndarray:
    """Decoded images, mapped from the cache; whoever comes first writes it, the others wait."""
    key = hashlib.sha256(f"{_FORMAT} {num_channels} {stored_size}".encode())
    for file in files:
        key.update(f"\n{file.member} {file.stamp}".encode())
    path = cache_dir / f"{root.stem}_{key.hexdigest()[:20]}.npy"
    if not path.is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():  # else another process made it while this one waited
                unfinished = path.with_name(f".{path.name}.{os.getpid()}")
                try:
                    _write(unfinished, root, files, num_channels, stored_size)
                    unfinished.replace(path)
                finally:
                    unfinished.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


def _write(
    path: Path, root: Path, files: Sequence[ImageFile], num_channels: int | None, stored_size: int | None
) -> None:
    log.info("decoding %d images of %s, once", len(files), root)
    with _content_of(root) as content:
        first = _decode(files[0].member, content(files[0].member), num_channels, stored_size)
        if stored_size is None:
            require_square(f"{root}: {files[0].member}", first.shape)
        channels = first.shape[2]
        out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(files), *first.shape))

        def pixels(file: ImageFile) -> np.ndarray:
            image = _decode(file.member, content(file.member), channels, stored_size)
            if image.shape != first.shape:
                raise ValueError(
                    f"{root}: {file.member} has {image.shape[0]} x {image.shape[1]} pixels, {files[0].member} has "
                    f"{first.shape[0]} x {first.shape[1]}; set data.stored_size to bring all images to one size"
                )
            return image

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside of the GIL
            for start in range(0, len(files), _DECODED_AT_ONCE):
                for row, image in enumerate(pool.map(pixels, files[start : start + _DECODED_AT_ONCE]), start):
                    out[row] = image
        out.flush()


@contextmanager
def _content_of(root: Path) -> Iterator[Callable[[str], bytes]]:
    """How the bytes of a member are read."""
    if root.is_dir():
        yield lambda member: (root / member).read_bytes()
        return
    with zipfile.ZipFile(root) as archive:
        yield archive.read


def _decode(member: str, content: bytes, num_channels: int | None, stored_size: int | None) -> np.ndarray:
    """Pixels, ``(height, width, channel)`` uint8."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ImportError("reading images needs Pillow: pip install -c constraints.txt pillow") from None
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith("I") or image.mode == "F":
                raise ValueError(f"{member}: more than 8 bits per value; convert the images to 8 bits")
            channels = num_channels or (1 if image.mode in ("1", "L", "LA") else 3)
            decoded = image.convert(_MODES[channels])
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{member}: not a readable image ({error})") from None
    if stored_size is not None:
        short = min(decoded.size)
        if short != stored_size:
            width, height = (max(stored_size, round(side * stored_size / short)) for side in decoded.size)
            decoded = decoded.resize((width, height), Image.Resampling.BICUBIC)
        left, top = ((side - stored_size) // 2 for side in decoded.size)
        decoded = decoded.crop((left, top, left + stored_size, top + stored_size))
    return np.asarray(decoded, dtype=np.uint8).reshape(decoded.height, decoded.width, channels)
