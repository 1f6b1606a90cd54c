"""DICOM series as volumes: order, values and places, and whatever is wrong with a folder in one clear line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from partitioner.errors import PartitionError
from runtime.volumes import ArraySpec, array_names, create_sink, open_source
from tests.volumes import check_parts, values, write_whole

SERIES = "1.2.826.0.1.1"
TURNED = [0.8, 0.6, 0, 0, 0, -1]


def refused(pattern: str) -> Any:
    """One clear line that matches."""
    return pytest.raises(PartitionError, match=rf"\A[^\n]*{pattern}[^\n]*\Z")


def save_slice(path: Path, pixels: Any, position: Any, syntax: Any = ExplicitVRLittleEndian,
               kind: Any = CTImageStorage, **more: Any) -> None:
    """One slice; `more` are further attributes, None removes one."""
    about = FileMetaDataset()
    about.TransferSyntaxUID, about.MediaStorageSOPClassUID = syntax, kind
    about.MediaStorageSOPInstanceUID = f"{SERIES}.{abs(hash(path.name)) % 10**8}"
    data = FileDataset(str(path), {}, file_meta=about, preamble=b"\0" * 128, is_implicit_VR=False,
                       is_little_endian=syntax != ExplicitVRBigEndian)
    data.SOPClassUID, data.SOPInstanceUID = kind, about.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.Modality = SERIES, "CT"
    data.ImagePositionPatient, data.ImageOrientationPatient = list(position), [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness = [0.7, 0.5], 2.0
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows, data.Columns = pixels.shape
    data.BitsAllocated = data.BitsStored = pixels.dtype.itemsize * 8
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    data.RescaleSlope, data.RescaleIntercept = 1, 0
    data.PixelData = pixels.astype(pixels.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
    if syntax == RLELossless:
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.compress(RLELossless)
    for name, value in more.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)


def save(folder: Path, array: Any, ending: str = ".dcm", **more: Any) -> Path:
    """A series whose files' names say nothing of their order."""
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(array):
        save_slice(folder / f"{(number * 7) % 10}-{number}{ending}", pixels, (10, 20, 30 + 2 * number), **more)
    return folder


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
@pytest.mark.parametrize("dtype", ["i2", "u2", "u1"])
@pytest.mark.parametrize("ending", [".dcm", ""])
def test_a_series(tmp_path: Path, ending: str, dtype: str, syntax: Any) -> None:
    array = (values((6, 8, 5)) % 200).astype(dtype)
    folder = save(tmp_path / "ct", array, ending, syntax=syntax)
    assert array_names(folder) == ()
    for spelled in (folder, f"{folder}/", f"{folder}:/{SERIES}"):
        with open_source(spelled) as source:
            assert source.random_access
            check_parts(source, array.astype(np.float32)[None, None])
    check_parts(open_source(folder, dtype=np.int32), array.astype(np.int32)[None, None])


def test_values_are_rescaled_slice_by_slice(tmp_path: Path) -> None:
    array = values((3, 8, 5), np.int16)
    (tmp_path / "ct").mkdir()
    for number, pixels in enumerate(array):
        save_slice(tmp_path / "ct" / f"{number}", pixels, (0, 0, number), RescaleSlope=0.25 * (number + 1),
                   RescaleIntercept=-1024)
    exact = array * 0.25 * np.arange(1, 4)[:, None, None] - 1024
    check_parts(open_source(tmp_path / "ct"), exact.astype(np.float32)[None, None])
    check_parts(open_source(tmp_path / "ct", dtype=np.float64), exact[None, None])
    with refused("holds float64 values, but int16 is needed"):
        open_source(tmp_path / "ct", dtype=np.int16)


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], TURNED])
def test_places_go_over_to_nifti(tmp_path: Path, orientation: list[float]) -> None:
    """The patient's position of every voxel is the one that DICOM gives it, with x and y turned round."""
    rows, columns = np.array(orientation[:3]), np.array(orientation[3:])
    step, first = 1.5 * np.cross(rows, columns), np.array([10.0, -20, 30])
    folder = tmp_path / "ct"
    folder.mkdir()
    for number, pixels in enumerate(values((4, 8, 5), np.int16)):
        save_slice(folder / f"{9 - number}.dcm", pixels, first + number * step, ImageOrientationPatient=orientation)
    with open_source(folder) as source:
        np.testing.assert_array_equal(source.read()[0, 0], values((4, 8, 5)))
        write_whole(tmp_path / "a.nii.gz", source.read(), source)
    image = nibabel.load(tmp_path / "a.nii.gz")
    for k, j, i in ((0, 0, 0), (3, 7, 4), (1, 2, 3)):
        patient = first + k * step + j * 0.7 * columns + i * 0.5 * rows
        np.testing.assert_allclose(image.affine @ (k, j, i, 1), [-patient[0], -patient[1], patient[2], 1], atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(image.get_qform(), image.affine, atol=1e-4)


def test_a_single_slice(tmp_path: Path) -> None:
    folder = save(tmp_path / "ct", values((1, 8, 5), np.int16))
    with open_source(folder) as source:
        assert source.shape == (1, 1, 1, 8, 5)
        assert source.meta is not None
        np.testing.assert_allclose(np.linalg.norm(source.meta.affine[:3, 0]), 2.0)
    (file,) = folder.iterdir()
    with refused("a DICOM series is the folder of its files; give that folder"):
        open_source(file)


def test_several_series(tmp_path: Path) -> None:
    folder = save(tmp_path / "ct", values((3, 8, 5), np.int16))
    for number in range(2):
        save_slice(folder / f"other{number}.dcm", values((4, 4), np.int16), (0, 0, number), SeriesInstanceUID="1.2.9",
                   SeriesDescription="thorax")
    save_slice(folder / "screenshot.dcm", values((4, 4), np.int16), (0, 0, 0), SeriesInstanceUID="1.2.10",
               ImagePositionPatient=None)
    save_slice(folder / "report.dcm", values((4, 4), np.int16), (0, 0, 0), kind=BasicTextSRStorage,
               SeriesInstanceUID="1.2.11", PixelData=None)
    (folder / "notes.txt").write_text("no image")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    assert array_names(folder) == (SERIES, "1.2.9")
    held = rf"{SERIES} \(3 slices\); 1\.2\.9 \(2 slices, thorax\)"
    with refused(rf"holds several series: {held}; name one, as .*ct:/{SERIES}"):
        open_source(folder)
    check_parts(open_source(f"{folder}:/1.2.9", dtype=np.int16), np.stack([values((4, 4), np.int16)] * 2)[None, None])
    with refused(rf"holds no series '1\.2\.3'; it has {SERIES}, 1\.2\.9"):
        open_source(f"{folder}:/1.2.3")
    with refused(r"screenshot\.dcm: does not say its ImagePositionPatient"):
        open_source(f"{folder}:/1.2.10")


@pytest.mark.parametrize(("number", "position", "more", "pattern"), [
    (9, (10, 20, 40), {}, r"are 4 mm apart, others 2; slices are missing"),
    (9, (10, 20, 36.5), {}, r"are 0\.5 mm apart, others 2; slices are missing or unevenly spaced"),
    (9, (10, 20, 34), {}, r"lie in the same place"),
    (9, (13, 20, 38), {}, r"does not lie in a line"),
    (9, (10, 20, 38), {"ImageOrientationPatient": [0, 1, 0, 1, 0, 0]}, r"9-9\.dcm: has orientation"),
    (9, (10, 20, 38), {"PixelSpacing": [0.7, 0.6]}, r"9-9\.dcm: has spacing \[0\.7, 0\.6\]"),
    (9, (10, 20, 38), {"NumberOfFrames": 2}, r"9-9\.dcm: holds 2 frames"),
    (9, (10, 20, 38), {"PixelData": None}, r"9-9\.dcm: damaged or cut short \(it holds no pixels\)"),
    (9, (10, 20, 38), {"PixelSpacing": None}, r"9-9\.dcm: does not say its PixelSpacing"),
])
def test_slices_that_do_not_fit(tmp_path: Path, number: int, position: Any, more: dict[str, Any],
                                pattern: str) -> None:
    folder = save(tmp_path / "ct", values((4, 8, 5), np.int16))
    open_source(folder)
    save_slice(folder / f"9-{number}.dcm", values((8, 5), np.int16), position, **more)
    with refused(pattern):
        open_source(folder)


def test_slices_of_other_extents(tmp_path: Path) -> None:
    folder = save(tmp_path / "ct", values((4, 8, 5), np.int16))
    save_slice(folder / "9.dcm", values((8, 6), np.int16), (10, 20, 38))
    with refused(r"9\.dcm: has rows x columns \(8, 6\), .* has \(8, 5\); the slices of a series must be alike"):
        open_source(folder)


def test_positions_that_are_rounded(tmp_path: Path) -> None:
    (tmp_path / "ct").mkdir()
    for number in range(9):
        save_slice(tmp_path / "ct" / str(number), values((8, 5), np.int16), (0, 0, round(0.625 * number, 2)))
    assert open_source(tmp_path / "ct").shape == (1, 1, 9, 8, 5)


# --- damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [1, 100, 0.5, 0.9])
def test_truncated_files_are_refused_when_opened(tmp_path: Path, missing: float) -> None:
    folder = save(tmp_path / "ct", values((3, 40, 50), np.int16))
    path = sorted(folder.iterdir())[1]
    content = path.read_bytes()
    path.write_bytes(content[: -missing if isinstance(missing, int) else round(len(content) * (1 - missing))])
    with refused(r"cut short"):
        open_source(folder)


def test_files_cut_within_their_header(tmp_path: Path) -> None:
    folder = save(tmp_path / "ct", values((3, 40, 50), np.int16))
    path = sorted(folder.iterdir())[1]
    content = path.read_bytes()
    for length in range(132, len(content) - 40 * 50 * 2, 13):
        path.write_bytes(content[:length])
        with refused(r"(cut short|damaged|does not say)"):
            open_source(folder)


def test_damaged_files(tmp_path: Path) -> None:
    folder = save(tmp_path / "ct", values((3, 8, 5), np.int16), syntax=RLELossless)
    path = sorted(folder.iterdir())[1]
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    with refused(r"damaged or cut short"):
        open_source(folder)
    path.write_bytes(b"no image")
    with refused(r"no DICOM file, or a damaged one"):
        open_source(folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    with refused("no Zarr store, TIFF stack or DICOM series"):
        open_source(tmp_path / "empty")
    with refused("no such file"):
        open_source(tmp_path / "none.dcm")


def test_compression_that_nothing_decodes(tmp_path: Path) -> None:
    from pydicom.pixels import get_decoder

    folder = save(tmp_path / "ct", values((3, 8, 5), np.int16))
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = JPEGLSLossless
        data.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9" * 4])
        data["PixelData"].VR = "OB"
        data.save_as(path)
    if get_decoder(JPEGLSLossless).is_available:
        pytest.skip("a decoder is installed")
    with refused("is compressed as JPEG-LS Lossless Image Compression; install gdcm.* with pip, or convert"):
        open_source(folder)


def test_it_is_not_written(tmp_path: Path) -> None:
    with refused(r"a\.dcm: DICOM is read, not written"):
        create_sink(tmp_path / "a.dcm", [ArraySpec("x", (1, 1, 3, 4, 5), "float32")])


def test_without_pydicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "ct", values((3, 8, 5), np.int16))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with refused(r"pip install 'partitioner\[dicom\]'"):
        open_source(folder)


_MEMORY = """
import sys, tracemalloc
from runtime.volumes import open_source
with open_source(sys.argv[1]) as source:
    source.read([(0, 1), (0, 1), (0, 1), (0, 1), (0, 1)])
    tracemalloc.start()
    assert source.read([(0, 1), (0, 1), (0, 40), (100, 110), (0, 512)]).size == 40 * 10 * 512
    print(tracemalloc.get_traced_memory()[1])
"""


def test_reading_holds_its_part_and_no_more(tmp_path: Path) -> None:
    """40 slices of 512 KiB; one of them is held at a time."""
    folder = save(tmp_path / "ct", np.ones((40, 512, 512), np.int16))
    grown = subprocess.run([sys.executable, "-c", _MEMORY, str(folder)], capture_output=True, text=True,
                           check=True).stdout
    assert int(grown) < 6 * 2**20
