"""The folder of a data set as tensorflow-datasets reads it: array_record shards of tf.train.Example records, features.json and dataset_info.json. No TensorFlow."""

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter

from ptm.data import files
from ptm.prepare import stages
from ptm.prepare.options import Options

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


class Shard(NamedTuple):
    """A shard that was written: name of its file, records, bytes of the records, bytes and sha256 of the file, and the sha256 of its first and last megabyte."""

    file: str
    records: int
    content: int
    size: int
    sha256: str
    ends: str


def name(options: Options, split: str, number: int, count: int) -> str:
    """The name of the file of a shard."""
    return f"{options.name}-{split}.array_record-{number:05d}-of-{count:05d}"


def description(options: Options) -> str:
    """A sentence for dataset_info.json."""
    return f"{options.name} {options.version}, prepared by ptm; card.md says from what and how."


@functools.lru_cache(maxsize=4)
def features(options: Options) -> Any:
    """The features of a record, as features.json has them."""
    import tensorflow_datasets as tfds  # slow, and only who writes needs it

    vocabulary = stages.tokenizer(options.tokenizer)
    columns = {name: tfds.features.Text() for name in (("id", "text") if options.keep_ids else ("text",))}
    if vocabulary is not None:
        columns["tokens"] = tfds.features.Tensor(shape=(None,), dtype=stages.token_type(vocabulary), encoding=tfds.features.Encoding.BYTES)
    return tfds.features.FeaturesDict(columns)


@functools.lru_cache(maxsize=4)
def _serializer(options: Options) -> Any:
    from tensorflow_datasets.core import example_serializer

    return example_serializer.ExampleSerializer(features(options).get_serialized_info())


def serialize(record: Mapping[str, Any], options: Options) -> bytes:
    """A record of `stages.finish` as the bytes of a tf.train.Example, always the same ones."""
    return _serializer(options).get_tf_example(features(options).encode_example(record)).SerializeToString(deterministic=True)


def write_shard(path: Path, records: Iterable[bytes]) -> Shard:
    """Writes serialized records as a shard that is there whole or not at all."""
    partial = f"{path}.{os.getpid()}.partial"
    writer, count, content = ArrayRecordWriter(partial, "group_size:1"), 0, 0
    try:
        for record in records:
            writer.write(record)
            count, content = count + 1, content + len(record)
    finally:
        writer.close()
    digest = sha256(partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    size, ends = files.digest(partial)
    os.replace(partial, path)
    return Shard(path.name, count, content, size, digest, ends)


def sha256(path: str | os.PathLike) -> str:
    """The sha256 of a file, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(folder: Path, shards: Mapping[str, Sequence[Shard]], options: Options) -> None:
    """Writes features.json and dataset_info.json into the folder with the shards of each split."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(data_dir=str(folder), dataset_name=options.name, template=TEMPLATE, filetype_suffix="array_record")
    infos = [
        tfds.core.SplitInfo(
            name=split, shard_lengths=[shard.records for shard in found], num_bytes=sum(shard.content for shard in found), filename_template=template
        )
        for split, found in shards.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder), features=features(options), split_infos=infos, filename_template=template,
        version=options.version, check_data=False, description=description(options),
    )  # fmt: skip
