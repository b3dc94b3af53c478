"""Looks at pickles (.ckpt, .pt, .bin) without doing what they say: allowed are the steps by which torch saves tensors.

A pickle is a program. It is read step by step with its stack, so that it is known which name each step calls, however
the name was put together; torch's own restricted reader comes after this look, and its gaps are closed here whatever
its version.

Source: the format of torch.save (torch/serialization.py, caffe2/serialize/inline_container.cc), the steps of
Lib/pickletools.py, and the names that torch's `weights_only` reader and AUTOMATIC1111's modules/safe.py accept.
"""

import functools
import io
import pickletools
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from fastsd_helpers.errors import UnsafeModel
from fastsd_helpers.runtime import version_of

__all__ = ["has_pickle", "is_archive", "is_pickle", "look_at_pickle", "look_at_unknown"]

_PROGRAM_LIMIT = 20_000_000  # the largest list of tensors of a real model has 1 MB
_MEMBER_LIMIT = 50_000
_MEMBER = re.compile(
    r"(?P<root>[^/\\]+)/(data\.pkl|data/[^/\\]+|byteorder|version|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id)"
)
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of a file of torch before 1.6
_SAFE_TORCH = (2, 6)  # before it, torch's own restricted reader can be left (CVE-2025-32434)

_STORAGES = [
    "BFloat16", "Bool", "Byte", "Char", "ComplexDouble", "ComplexFloat", "Double", "Float", "Half", "Int", "Long",
    "QInt32", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4", "Short", "Typed", "Untyped"
]  # fmt: skip
_DTYPES = [
    "bfloat16", "bits16", "bits1x8", "bits2x4", "bits4x2", "bits8", "bool", "cdouble", "cfloat", "chalf", "complex128",
    "complex32", "complex64", "double", "float", "float16", "float32", "float64", "float8_e4m3fn", "float8_e4m3fnuz",
    "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "half", "int", "int16", "int32", "int64", "int8", "long",
    "qint32", "qint8", "quint2x4", "quint4x2", "quint8", "short", "uint16", "uint32", "uint64", "uint8"
]  # fmt: skip
_NAMES = frozenset(
    [
        *(f"{module} {name}Storage" for module in ("torch", "torch.storage", "torch.cuda") for name in _STORAGES),
        "torch.storage TypedStorage",
        *(f"torch {name}" for name in _DTYPES),
        "torch Size",
        "torch device",
        "torch Tensor",
        *(
            f"torch {name}Tensor"
            for name in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
        ),
        *(
            f"torch._utils _rebuild_{name}"
            for name in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state",
                         "device_tensor_from_numpy", "sparse_tensor", "qtensor")
        ),
        "torch.nn.parameter Parameter",
        "torch.nn.modules.container ParameterDict",  # embeddings of the first textual inversion programs
        "torch.serialization _get_layout",
        "collections OrderedDict",
        "collections Counter",
        "_codecs encode",
        *(f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("set", "complex")),
        *(f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        "numpy dtype",
        "numpy ndarray",
    ]
)  # fmt: skip
_DICTS = ("collections OrderedDict", "collections Counter")
# Steps that put data on the stack, or take it off; torch writes no others.
_STEPS = frozenset(
    [
        "PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
        "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING",
        "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET", "FROZENSET",
        "DICT", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS",
        "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ",
        "BUILD", "BINPERSID"
    ]
)  # fmt: skip
_ACTS = frozenset(
    [
        "GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD", "PERSID", "BINPERSID",
        "EXT1", "EXT2", "EXT4"
    ]
)  # fmt: skip
_NAMES_SOMETHING = frozenset(["GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"])
_WRITES = {"SETITEM": "dict", "SETITEMS": "dict", "APPEND": "list", "APPENDS": "list", "ADDITEMS": "set"}
_HINT = "Use the model's .safetensors files, or download the file again from a source you trust."


def is_pickle(head: bytes) -> bool:
    """Whether a file begins as a pickle of protocol 2 or later does."""
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def is_archive(head: bytes) -> bool:
    """Whether a file begins as a zip file does."""
    return head[:4] == b"PK\x03\x04"


def look_at_pickle(path: Path) -> None:
    """Refuse a pickle that is not what torch writes for tensors in plain containers.

    Raises:
        UnsafeModel: says what was found.
    """
    _require_safe_torch(path)
    state = path.stat()
    _follow(path, (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))


@functools.lru_cache(maxsize=64)  # several doors look at one file, one after the other
def _follow(path: Path, _state: tuple[int, ...]) -> None:
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in texts of the oldest kind
            if is_archive(file.read(4)):
                file.seek(0)
                _look_at_archive(path, file)
            else:
                _look_at_old_format(path, file)
    except (UnsafeModel, OSError):
        raise
    except Exception as err:  # zipfile and pickletools raise many things for a damaged file
        raise _refused(path, "it cannot be read as plain tensors") from err


def has_pickle(path: Path) -> bool:
    """Whether a zip file has a pickle in it, as those of torch do; one that cannot be read may have."""
    try:
        with path.open("rb") as file:
            _table_of(path, file)
            with zipfile.ZipFile(file) as archive:
                return any(name.endswith(".pkl") for name in archive.namelist())
    except Exception:  # zipfile raises many things for a damaged file
        return True


def look_at_unknown(path: Path, *, safetensors: bool = False) -> None:
    """Refuse a file that Python would take for a pickle of the oldest kind, which has no mark at its beginning.

    An unpickler does every step up to the first that it does not know, so the beginning alone can run code.

    Args:
        safetensors: it begins as a safetensors file, whose length can look like any step: only one that names
            something to call counts.
    """
    with path.open("rb") as file:
        program = io.BytesIO(file.read(1_000_000))
        if zipfile.is_zipfile(file):
            raise _refused(path, "it ends as a zip file and begins as something else")
    names = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in texts of the oldest kind
            for step, _argument, _place in pickletools.genops(program):
                names.append(step.name)
    except Exception as err:  # not a step, or half of one
        if not (_NAMES_SOMETHING if safetensors else _ACTS).intersection(names):
            return
        raise _refused(path, "it begins as a pickle of a kind that torch does not write") from err
    if safetensors and not _NAMES_SOMETHING.intersection(names):
        return
    raise _refused(path, "it is a pickle of a kind that torch does not write")


def _require_safe_torch(path: Path) -> None:
    version = version_of("torch")
    if version is not None and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _SAFE_TORCH:
        raise UnsafeModel(
            f"{path} is not opened: it is a pickle, and PyTorch {version} can be made to run code by one.",
            "Use the model's .safetensors files, or PyTorch 2.6 or newer.",
        )


# ------------------------------------------------------------------------------------------------ the two formats


def _look_at_archive(path: Path, file: BinaryIO) -> None:
    table = _table_of(path, file)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) > _MEMBER_LIMIT:
            raise _refused(path, f"it has {len(members):,} members")
        # Bytes before it or behind it: Python and torch would read different tables.
        if (
            table != archive.start_dir
            or min((member.header_offset for member in members), default=0)
            or archive.comment
        ):
            raise _refused(path, "its table of contents is not where torch writes it")
        roots, end = set(), 0
        for member in sorted(members, key=lambda member: member.header_offset):
            shown = repr(member.filename[:80])
            # torch never compresses; one small member could otherwise unfold to fill the memory.
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise _refused(path, f"its member {shown} is compressed")
            match = _MEMBER.fullmatch(member.filename)
            if match is None:
                what = "TorchScript, a program" if "/code/" in member.filename else "no part of a list of tensors"
                raise _refused(path, f"its member {shown} is {what}")
            roots.add(match["root"])
            if member.header_offset < end:
                raise _refused(path, f"its member {shown} lies over another one")
            end = member.header_offset + 30 + len(member.filename.encode()) + member.compress_size
        programs = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(roots) != 1 or len(programs) != 1 or len({member.filename for member in members}) != len(members):
            raise _refused(
                path, f"it has {len(programs)} lists of tensors in {len(roots)} folders, where torch has one"
            )
        if programs[0].file_size > _PROGRAM_LIMIT:
            raise _refused(path, f"its list of tensors has {programs[0].file_size:,} bytes")
        program = io.BytesIO(archive.read(programs[0]))
    _look_at_program(path, program)
    if program.read(1):
        raise _refused(path, "something follows its list of tensors")


def _table_of(path: Path, file: BinaryIO) -> int:
    """Where the table of contents begins, as the last bytes of the file say; refuse one of a size no model has."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 98))
    tail = file.read(98)
    end = tail[-22:]
    if len(end) < 22 or end[:4] != b"PK\5\6":
        raise _refused(path, "it does not end as torch ends its files")
    length, place = struct.unpack("<LL", end[12:20])
    if 0xFFFFFFFF in (length, place) and tail[:4] == b"PK\6\6":
        length, place = struct.unpack("<QQ", tail[40:56])
    if length > _PROGRAM_LIMIT:
        raise _refused(path, f"its table of contents has {length:,} bytes")
    file.seek(0)
    return place


def _look_at_old_format(path: Path, file: BinaryIO) -> None:
    """Files of torch before 1.6: five pickles one after the other, then bare numbers."""
    if zipfile.is_zipfile(file):
        raise _refused(path, "it begins as a pickle and ends as a zip file")
    file.seek(0)
    stream = io.BytesIO(file.read(_PROGRAM_LIMIT))
    for wanted in (_MAGIC, _PROTOCOL):
        if _look_at_program(path, stream) != wanted:
            raise _refused(path, "it is a bare pickle and not a file of torch")
    for _rest in ("about the machine", "the tensors", "the order of their numbers"):
        _look_at_program(path, stream)


# ---------------------------------------------------------------------------------------------------- the program


def _look_at_program(path: Path, stream: io.BytesIO) -> Any:
    """Follow one pickle's steps with their stack, doing none; return the last number it pushed."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    last = None
    step: Any
    argument: Any
    for step, argument, _place in pickletools.genops(stream):
        name = step.name
        if name not in _STEPS:
            raise _refused(path, f"it has the step {name}, which torch does not write")
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        if name == "GLOBAL":
            made: Any = _allowed(path, argument)
        elif name == "STACK_GLOBAL":
            module, what = stack[-2:]
            if not (type(module) is _Text and type(what) is _Text):
                raise _refused(path, "it names something whose name is not plain text")
            made = _allowed(path, f"{module} {what}")
        elif name in ("BINGET", "LONG_BINGET"):
            made = memo[argument]
        elif isinstance(argument, str):
            made = _Text(argument)
        else:
            made = step.stack_after[0].name if step.stack_after else None
            last = argument if isinstance(argument, int) and made == "int" else last
        target = _take(stack, step)
        if name in _WRITES:
            if target != _WRITES[name]:
                raise _refused(path, f"it writes into something that is not a {_WRITES[name]}")
            made = target
        elif name in ("REDUCE", "NEWOBJ"):
            if not isinstance(target, _Name):
                raise _refused(path, "it calls something that it does not name")
            made = "dict" if target in _DICTS else "object"
        elif name == "BUILD":
            if target not in ("object", "dict"):
                raise _refused(path, "it changes something that it did not create")
            made = target
        stack += [made] if step.stack_after else []
    return last


class _Text(str):
    """A text on the stack."""

    __slots__ = ()


class _Name(str):
    """An allowed name on the stack."""

    __slots__ = ()


def _allowed(path: Path, name: str) -> _Name:
    if name not in _NAMES:
        raise _refused(path, f"it names {name.replace(' ', '.')[:100]!r}, which is code and no tensor")
    return _Name(name)


def _take(stack: list[Any], step: Any) -> Any:
    """Take off the stack what a step uses up; the lowest of it is what the step acts on."""
    before = step.stack_before
    if not before:
        return None
    if before[-1] is pickletools.stackslice:  # everything down to the last mark
        place = len(stack) - 1 - stack[::-1].index("mark")
        del stack[place:]
        before = [kind for kind in before if kind not in (pickletools.stackslice, pickletools.markobject)]
        if not before:
            return None
    taken = stack[-len(before) :]
    if len(taken) != len(before):
        raise ValueError("the stack is empty")
    del stack[-len(before) :]
    return taken[0]


def _refused(path: Path, reason: str) -> UnsafeModel:
    return UnsafeModel(f"{path} is not opened: {reason}, and such a file could run code or fill the memory.", _HINT)
