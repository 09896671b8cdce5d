"""A builder of tensorflow-datasets whose generation is the pipeline of `beam`: array_record shards, no TensorFlow.

    Corpus(options).download_and_prepare(download_config=tfds.download.DownloadConfig(beam_options=PipelineOptions([...])))

The pipeline writes into OUTPUT/NAME/.VERSION.beam; a shard that is finished there is not made again by the next one. OUTPUT is a folder that all workers see, or
a URL of a store (gs://, s3://, az://).
"""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions
from tensorflow_datasets.core.constants import INCOMPLETE_PREFIX
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from ptm import lock, untrusted
from ptm.fields import ConfigError, StorageError
from ptm.prepare import beam, card, dataset, manifest, sketch, stages, trial
from ptm.prepare.dataset import Shard
from ptm.prepare.options import Options

Path = tfds.core.Path  # of this machine or of a store


class Corpus(tfds.core.DatasetBuilder, skip_registration=True):
    """The data set of a preparation. `found` is its manifest, once it is prepared."""

    url_infos: dict[str, Any] = {}  # nothing is downloaded

    def __init__(self, options: Options):
        self.name, self.VERSION, self._options = options.name, tfds.core.Version(options.version), options
        self.found: dict[str, Any] | None = None
        super().__init__(data_dir=os.path.expanduser(options.output), version=options.version)
        self.info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)

    def _info(self) -> tfds.core.DatasetInfo:
        # An identity without module: who reads the data set needs no builder.
        identity = DatasetIdentity(name=self.name, version=self.version, data_dir=self.data_dir, module_name="")
        return tfds.core.DatasetInfo(builder=identity, features=dataset.features(self._options), description=dataset.description(self._options))

    def _as_dataset(self, *args: Any, **keys: Any) -> Any:
        raise NotImplementedError("array_record is read by as_data_source()")

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        options, target = self._options, self.data_path  # the folder that download_and_prepare renames at the end
        folder = target.parent / f".{options.version}.beam"
        made_from = manifest.identity(options)
        with _alone(folder):
            _require_begun(folder, made_from)
            for left in target.parent.glob(f"{INCOMPLETE_PREFIX}*_{options.version}"):  # of a process that was killed
                if left.name != target.name:
                    left.rmtree()
            for name in (beam.SHARDS, beam.NOTES):
                (folder / name).mkdir(parents=True, exist_ok=True)
            index = trial.index(options)
            beam.save_index(index, os.fspath(folder))
            result = _run(options, folder, download_config)
            shards: dict[str, list[Shard]] = {split: [Shard(*entry) for of, entry in result["shards"] if of == split] for split in stages.SPLITS}
            shards = {split: entries for split, entries in shards.items() if entries}
            short = index.too_short() if index else {}
            self.found = manifest.content(made_from, counts=result["counts"], short=short, bad=result["bad"], shards=shards)
            with tempfile.TemporaryDirectory(prefix="ptm-") as scratch:
                card.write(Path(scratch), self.found)
                manifest.write(Path(scratch), self.found)
                for path in Path(scratch).iterdir():
                    path.copy(target / path.name)
            for found in shards.values():
                for shard in found:
                    (folder / beam.SHARDS / shard.file).rename(target / shard.file)
        folder.rmtree()
        self.info.set_splits(
            tfds.core.SplitDict(
                [
                    tfds.core.SplitInfo(
                        name=split,
                        shard_lengths=[shard.records for shard in found],
                        num_bytes=sum(shard.content for shard in found),
                        filename_template=self._get_filename_template(split),
                    )
                    for split, found in shards.items()
                ]
            )
        )


def prepare(options: Options, flags: Sequence[str]) -> dict[str, Any]:
    """Makes the data set by the runner that Beam's `flags` name; returns its manifest. Raises ConfigError, also where the folder was begun with other options."""
    if options.near:
        sketch.require()
    builder = Corpus(options)
    if builder.data_path.exists():
        found = _held(builder.data_path)
        manifest.require_same(found, manifest.identity(options), where=builder.data_dir)
        if not beam.remote(builder.data_dir):
            manifest.check(Path(builder.data_dir), found)
        return found
    # A folder for downloads is made all the same, and what is printed tells of them.
    with tempfile.TemporaryDirectory(prefix="ptm-") as scratch, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=scratch, download_config=tfds.download.DownloadConfig(beam_options=PipelineOptions(list(flags))))
    assert builder.found is not None
    return builder.found


def _held(folder: Path) -> dict[str, Any]:
    """The manifest in a folder of this machine or of a store."""
    with tempfile.TemporaryDirectory(prefix="ptm-") as scratch:
        if (folder / manifest.FILE).exists():
            (folder / manifest.FILE).copy(Path(scratch) / manifest.FILE)
        return manifest.read(Path(scratch), where=os.fspath(folder))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The body while no other process of this machine prepares the same; stores have no locks."""
    with contextlib.nullcontext() if beam.remote(os.fspath(folder)) else lock.hold(Path(folder)):
        yield


def _require_begun(folder: Path, made_from: dict[str, Any]) -> None:
    path = folder / manifest.BEGUN
    with tempfile.TemporaryDirectory(prefix="ptm-") as scratch:
        copy = Path(scratch) / manifest.BEGUN
        if path.exists():
            path.copy(copy)
        manifest.require_begun(copy, made_from, where=os.fspath(folder))
        beam.put(path, copy.read_bytes())


def _run(options: Options, folder: Path, download_config: Any) -> dict[str, Any]:
    """Runs the pipeline; what it found."""
    place = os.fspath(folder)
    try:
        with apache_beam.Pipeline(runner=download_config.beam_runner, options=download_config.beam_options) as root:
            beam.build(root, options, place)
    except Exception as error:  # each runner has its own; what a stage raised is in its text, if anywhere
        text = re.sub(r" \[while running '[^']*'\]", "", str(error))
        told = [text] if isinstance(error, ConfigError) else re.findall(r"ConfigError: (.+?)(?:\\n|\n|$)", text)
        if told:
            raise ConfigError(told[-1]) from None
        last = next((line for line in reversed(text.splitlines()) if line.strip()), type(error).__name__)
        raise StorageError(f"the pipeline failed: {last[:500]}. Finished shards are kept: start the same command again.") from error
    result = untrusted.json_of((folder / beam.RESULT).read_text())
    stages.require_few(result["bad"], options)
    if not result["shards"]:
        raise ConfigError(stages.NOTHING_LEFT)
    return result
