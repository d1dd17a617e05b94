"""Where images come from: the files of a reader, found and read as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from datamodules.readers.digits import read_digits
from datamodules.readers.idx import read_idx_pair
from datamodules.readers.image_folder import read_image_folder
from datamodules.readers.image_npz import read_image_npz
from datamodules.readers.stored_images import StoredImages, require_md5

FilePart = Literal["train", "val", "test"]

NUM_FILES: dict[str, int] = {"digits": 0, "idx": 4, "image_folder": 1, "npz": 1, "synthetic": 0}
"""How many files a reader takes."""


@dataclass(frozen=True)
class ImageFiles:
    """The images of a data set as they are stored; which of them are wanted is not asked here.

    Attributes:
        reader: A name of `NUM_FILES`.
        data_dir: Folder of the files.
        files: Below it, as many as the reader takes.
        source: Where they can be obtained; shown when they are missing.
        md5: Expected checksums, one per file; None: not checked.
        cache_dir: Where ``image_folder`` keeps decoded images.
        train_folder: Its training part.
        val_folder: Its validation part; None: validation takes some of the training images.
        test_folder: Its test part; None: there is none.
        stored_size: Height and width that it resizes and cuts images to; None: they have one size already.
        num_channels: That images are decoded with; None: as they are.
        num_classes: That labels are checked against; None: they are not.

    Raises:
        ValueError: Names the argument of the data configuration and the remedy.
    """

    reader: str
    data_dir: Path
    files: Sequence[str]
    source: str | None
    md5: Sequence[str] | None
    cache_dir: Path
    train_folder: str
    val_folder: str | None
    test_folder: str | None
    stored_size: int | None
    num_channels: int | None
    num_classes: int | None

    def __post_init__(self) -> None:
        wanted = NUM_FILES[self.reader]
        if len(self.files) != wanted:
            raise ValueError(f"data.file={self.files or None}: data.reader={self.reader} needs {wanted} file(s)")
        if self.md5 is not None and len(self.md5) != wanted:
            raise ValueError(f"data.md5 has {len(self.md5)} checksums for {wanted} file(s); give one for each, or null")
        if self.val_folder is not None and self.reader != "image_folder":
            raise ValueError(
                f"data.val_folder={self.val_folder}: data.reader={self.reader} has no folders; set it to null"
            )
        if self.stored_size is not None and self.stored_size < 1:
            raise ValueError(f"data.stored_size={self.stored_size}: must be at least 1")

    @property
    def name(self) -> str:
        """What error messages call the source."""
        if self.reader in ("digits", "synthetic"):
            return {"digits": "the embedded digits", "synthetic": "synthetic images"}[self.reader]
        return str(self.data_dir / self.files[0])

    def require(self) -> None:
        """Refuse to go on without a file.

        Raises:
            FileNotFoundError: Names the file, the folder, and where the data can be obtained.
        """
        for file in self.files:
            if not self._path(file).exists():
                obtain = f" It can be obtained from: {self.source}" if self.source else ""
                raise FileNotFoundError(
                    f"no file {self.data_dir / file} (data.data_dir={self.data_dir}, data.file={file}): set "
                    f"data.data_dir to the folder that holds it.{obtain}"
                )

    def _path(self, file: str) -> Path:
        """The file, compressed or not, whichever there is."""
        path = self.data_dir / file
        other = path.with_suffix("") if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")
        return other if self.reader == "idx" and not path.exists() and other.is_file() else path

    def read(self, part: FilePart) -> StoredImages | None:
        """A part as the files have it; None: they have no such part. Not of ``synthetic``, which has no files."""
        if part == "val" and self.val_folder is None:
            return None
        paths = [self._path(file) for file in self.files]
        if self.reader == "digits":
            return read_digits() if part == "train" else None
        if self.reader == "idx":
            pair = slice(0, 2) if part == "train" else slice(2, 4)
            md5 = None if self.md5 is None else tuple(self.md5[pair])
            return read_idx_pair(*paths[pair], part=part, num_classes=self.num_classes, md5=md5)
        if self.reader == "npz":
            return read_image_npz(paths[0], part, num_classes=self.num_classes, md5=self.md5 and self.md5[0])
        return self._read_folder(paths[0], part)

    def _read_folder(self, root: Path, part: FilePart) -> StoredImages | None:
        if self.md5 is not None and part == "train":
            if root.is_dir():
                raise ValueError(f"data.md5: {root} is a folder, which has no checksum; set data.md5=null")
            require_md5(root, None, self.md5[0])
        folder = {"train": self.train_folder, "val": self.val_folder, "test": self.test_folder}[part]
        if folder is None:
            return None
        read = partial(
            read_image_folder,
            root,
            cache_dir=self.cache_dir,
            num_channels=self.num_channels,
            stored_size=self.stored_size,
        )
        train = read(self.train_folder)
        return train if part == "train" else read(folder, class_names=train.class_names)
