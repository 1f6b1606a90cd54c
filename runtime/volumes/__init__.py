"""Volume files, read and written part by part: .npy, .npz, .nii, .nii.gz, .h5, .zarr, .tif; DICOM series are read.

    with open_source("ct.nii") as source:                       # (1, 1, x, y, z), float32
        part = source.read(box)                                 # only these cells leave the disk

    sink = create_sink("labels.nii.gz", [ArraySpec("labels", shape, "uint8")], like=source)
    sink.prepare()                                              # one process
    with open_part(sink.part) as writer:                        # any process, on any host
        writer.write(box, array)
    sink.commit()                                               # one process, when all have written

The target appears when `commit` renames the finished file; until then an older file of that name stays.
A format is one file in `formats/`; the suffix of a path chooses it, or what a folder without one holds.
"""

from runtime.volumes.base import ArraySpec, Meta, Source, Span, VolumeFormat, absolute_place
from runtime.volumes.dispatch import array_names, create_sink, is_volume, known_suffixes, open_source
from runtime.volumes.sinks import PartFile, Sink, Writer, open_part
from runtime.volumes.spool import spooled

__all__ = [
    "ArraySpec",
    "Meta",
    "PartFile",
    "Sink",
    "Source",
    "Span",
    "VolumeFormat",
    "Writer",
    "absolute_place",
    "array_names",
    "create_sink",
    "is_volume",
    "known_suffixes",
    "open_part",
    "open_source",
    "spooled",
]
