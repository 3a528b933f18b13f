"""What is no dict of tensors in a file of `torch.save` is refused by name: nothing in it is run, imported or grown."""

import os
import re
import time
from collections import OrderedDict
from contextlib import suppress

import pytest
import torch

from support.torch_files import name, plain, read_refusal, state, storage, tensor, text, write_program


def save(folder, value, **options):
    torch.save(value, folder / "pytorch_model.bin", **options)


class Runs:
    """Unpickling one creates a folder."""

    def __init__(self, call, *arguments):
        self.made = call, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda evil: evil,
        lambda evil: {"x": evil},
        lambda evil: {"x": torch.ones(2), "y": {"z": (evil,)}},
        lambda evil: OrderedDict(x=torch.ones(2), y=evil),
        lambda evil: {evil: torch.ones(2)},
    ],
)
def test_a_call_in_a_file_is_refused_by_name_and_not_made(tmp_path, wrap, protocol):
    canary = tmp_path / "canary"
    save(tmp_path, wrap(Runs(os.mkdir, str(canary))), pickle_protocol=protocol)
    assert "holds 'posix.mkdir', which a file of weights does not need; it was not run" in read_refusal(tmp_path)
    assert not canary.exists()
    with suppress(Exception):
        torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert canary.exists()  # so the file was dangerous


def test_a_call_in_the_attributes_of_a_state_dict_is_refused(tmp_path):
    canary = tmp_path / "canary"
    values = torch.nn.Linear(2, 2).state_dict()
    values._metadata[""] = Runs(os.mkdir, str(canary))
    save(tmp_path, values)
    assert "holds 'posix.mkdir'" in read_refusal(tmp_path)
    del values._metadata
    values.evil = 5
    save(tmp_path, values)
    assert "holds the attributes {'evil': 5}" in read_refusal(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch.storage", "_load_from_bytes"),
        ("torch", "load"),
        ("torch", "ComplexFloatStorage"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._utils", "_rebuild_parameter_with_state"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "OrderedDict "),
        ("\x1b[2J", "x" * 100_000),
        ("", ""),
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_any_other_name_is_refused(tmp_path, module, attribute, stacked):
    named = text(module) + text(attribute) + b"\x93" if stacked else name(module, attribute)
    write_program(tmp_path, state(("x", named + b")R")))
    message = read_refusal(tmp_path)
    assert re.search(r"holds .*, which a file of weights does not need; it was not run", message)
    assert f"{module}.{attribute}"[:20] in message or not module.isprintable() or not module


@pytest.mark.parametrize(
    ("operations", "found"),
    [
        (b"2", "the pickle operation DUP"),
        (b"0", "the pickle operation POP"),
        (b"1", "the pickle operation POP_MARK"),
        (b"(ios\nsystem\n", "the pickle operation INST"),
        (b"(o", "the pickle operation OBJ"),
        (b"P1\n", "the pickle operation PERSID"),
        (b"]", "the pickle operation EMPTY_LIST"),
        (b"\x82\1", "the pickle operation EXT1"),
        (b"\x81", "the pickle operation NEWOBJ"),
        (b"\x92", "the pickle operation NEWOBJ_EX"),
        (b"\x97", "the pickle operation NEXT_BUFFER"),
        (b"\x8b\4\0\0\0\1\2\3\4", "the pickle operation LONG4"),
        (b"L" + b"9" * 4000 + b"L\n", "the pickle operation LONG"),
        (b"I12\n", "the pickle operation INT"),
        (b"G" + bytes(8), "the pickle operation BINFLOAT"),
        (b"T\4\0\0\0abcd", "the pickle operation BINSTRING"),
        (b"B\4\0\0\0abcd", "the pickle operation BINBYTES"),
        (b"N", "None"),
        (b"K\1", "1"),
        (plain(((1,), 2)), "((1,), 2)"),
        (tensor(), "a tensor"),
        (storage(), "a storage"),
        (name("torch", "HalfStorage"), "torch.HalfStorage"),
        (b"K\1K\1R", "a call of 1 with 1"),
        (name("torch", "HalfStorage") + b")R", "a call of torch.HalfStorage with ()"),
        (name("collections", "OrderedDict") + b"K\1\x85R", "a call of collections.OrderedDict with (1,)"),
        (
            name("torch._utils", "_rebuild_parameter") + b"K\1\x88}\x87R",
            "a call of torch._utils._rebuild_p",
        ),
        (tensor(b"N"), "a call of torch._utils._rebuild_tensor_v2 with (None, "),
        (tensor(hooks=b"N"), "a call of torch._utils._rebuild_tensor_v2 with (a storage, "),
        (tensor(end=b"}X\3\0\0\0neg\x88s"), "a call of torch._utils._rebuild_tensor_v2 with (a storage, "),
        (tensor(end=b"NN"), "a call of torch._utils._rebuild_tensor_v2 with (a storage, "),
        (tensor(storage(kind="UntypedStorage", module="torch.storage")), "a call of torch._utils._rebuild_tensor_v2"),
        (tensor(call="_rebuild_tensor_v3"), "a call of torch._utils._rebuild_tensor_v3"),
        (
            tensor(call="_rebuild_tensor_v3", end=name("torch", "float8_e5m2")),
            "a call of torch._utils._rebuild_tensor_v3",
        ),
        (b"K\1Q", "the storage 1"),
        (storage(kind="float8_e5m2"), "the storage ('storage', torch.float8_e5m2, "),
        (storage(num_elements=-1), "the storage ('storage', torch.FloatStorage, "),
        (storage(num_elements=None), "the storage ('storage', torch.FloatStorage, "),
        (b"K\1" + text("x") + b"K\1s", "items of 1"),
        (b"}(" + text("x") + b"u", "items of {}"),
        (state((plain(1), tensor())), "the key 1"),
        (state((plain((1,)), tensor())), "the key (1,)"),
        (state((b"}", tensor())), "the key {}"),
        (b"}Nb", "the attributes None"),
        (tensor() + b"}b", "the attributes {}"),
        (b"}}X\1\0\0\0xK\1sb", "the attributes {'x': 1}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_other_program_is_refused_by_what_it_holds(tmp_path, operations, found):
    write_program(tmp_path, operations)
    assert f"pytorch_model.bin holds {found}" in read_refusal(tmp_path)


@pytest.mark.parametrize("value", [5, "text", None, True, {"y": torch.ones(2)}, (torch.ones(2),), torch.float8_e5m2])
def test_a_value_that_is_no_tensor_is_refused_by_name(tmp_path, value):
    save(tmp_path, {"x": torch.ones(2), "step": value})
    assert re.search(r"'step' is .*, expected nothing but tensors; use another checkpoint", read_refusal(tmp_path))


@pytest.mark.parametrize(
    "operations",
    [
        b"",
        b"}}",
        b"R",
        b"\x85",
        b"t",
        b"u",
        b"s",
        b"b",
        b"Q",
        b"q\0",
        b"\x94",
        b"h\7",
        b"}(K\1",
        b"}K\1\x87",
        b"\xff",
        b"X\xff\xff\xff\x7fabc",
        b"X\2\0\0\0\xff\xff",
        b"c\xff\n\n",
        b"cos\n",
        b"K",
        b"}.",
    ],
)
def test_a_program_that_cannot_be_followed_is_refused(tmp_path, operations):
    write_program(tmp_path, operations)
    assert re.search("is damaged: data.pkl cannot be followed: .*; download it again", read_refusal(tmp_path))


# Each of these tuples holds the one before it twice.
DOUBLED = b")" + b"".join(b"q" + bytes([at]) + b"h" + bytes([at]) + b"\x86" for at in range(250))


@pytest.mark.parametrize(
    ("problem", "operations"),
    [
        ("holds (", DOUBLED),
        ("holds (", b")" + b"\x85" * 900_000),
        ("a call of collections.OrderedDict with (", name("collections", "OrderedDict") + DOUBLED + b"R"),
        ("a call of torch._utils._rebuild_tensor_v2 with (", tensor(hooks=DOUBLED)),
        ("a call of a tensor with (", tensor() + DOUBLED + b"R"),
        ("the storage (", DOUBLED + b"Q"),
        ("the key (", state((DOUBLED, tensor()))),
        ("'x' is (", state(("x", DOUBLED))),
        ("the attributes (", b"}" + DOUBLED + b"b"),
        ("'x' has the shape ((", state(("x", tensor(shape=DOUBLED)))),
        ("more than 1,048,576 operations", b"(" * (1 << 21)),
        ("at most 8 sizes", state(("x", tensor(shape=(1,) * 100_000, strides=(1,) * 100_000)))),
        ("holds a number of 2,001 bits", state(("x", tensor(shape=(1 << 2000, 1), strides=(1, 1))))),
        ("elements, which has 6", state(("x", tensor(shape=((1 << 62) - 1,) * 8, strides=(1,) * 8)))),
        ("are missing, expected 24", state(("x", tensor(storage(key="y" * 1_000_000))))),
        ("a tensor is named 'xxx", state(("x" * 1_000_000, tensor()))),
        ("holds a number of 63 bits", state(("x", tensor(offset=1 << 62)))),
        ("are 24, expected 18,4", state(("x", tensor(storage(num_elements=(1 << 62) - 1))))),
    ],
)
def test_a_program_that_grows_is_refused_at_once_in_a_short_line(tmp_path, problem, operations):
    write_program(tmp_path, operations)
    start_s = time.perf_counter()
    assert problem in read_refusal(tmp_path)
    assert time.perf_counter() - start_s < 5


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        ([("x", tensor()), ("x", tensor())], "is damaged: 'x' is there twice"),
        ([("x\ny", tensor())], r"a tensor is named 'x\\ny', expected"),
        ([("\ud800", tensor())], r"a tensor is named '\\ud800', expected"),
        ([("x" * 1001, tensor())], "a tensor is named 'xxx"),
        ([("x", tensor(shape=(2, -3)))], r"'x' has the shape \(2, -3\)"),
        ([("x", tensor(shape=(-2, -3)))], r"'x' has the shape \(-2, -3\)"),
        ([("x", tensor(shape=(True, 3)))], r"'x' has the shape \(True, 3\)"),
        ([("x", tensor(shape=(2, None)))], r"'x' has the shape \(2, None\)"),
        ([("x", tensor(shape=(2, 3), strides=(3,)))], r"the shape \(2, 3\) and strides \(3,\)"),
        ([("x", tensor(shape=(2, 3), strides=(3, 1, 1)))], r"the shape \(2, 3\) and strides \(3, 1, 1\)"),
        ([("x", tensor(shape=(2, 3), strides=(3, None, 1)))], r"the shape \(2, 3\) and strides \(3, None, 1\)"),
        ([("x", tensor(shape=(2, 3), strides=(3, None)))], r"the shape \(2, 3\) and strides \(3, None\)"),
        ([("x", tensor(shape=(1,) * 9, strides=(1,) * 9))], "at most 8 sizes"),
        ([("x", tensor(shape=(2, 4), strides=(4, 1)))], "'x' lies at 0 in 'm/data/0' with 8 elements, which has 6"),
        ([("x", tensor(offset=1))], "'x' lies at 1 in 'm/data/0' with 6 elements, which has 6"),
        ([("x", tensor(offset=-1))], "'x' lies at -1 in 'm/data/0'"),
        (
            [("x", tensor(offset=7, shape=(0,), strides=(1,)))],
            "'x' lies at 7 in 'm/data/0' with 0 elements, which has 6",
        ),
        ([("x", tensor(storage(num_elements=7)))], "the bytes of 'x', 'm/data/0', are 24, expected 28"),
        ([("x", tensor(storage(num_elements=5)))], "the bytes of 'x', 'm/data/0', are 24, expected 20"),
        ([("x", tensor(storage(kind="HalfStorage")))], "the bytes of 'x', 'm/data/0', are 24, expected 12"),
        ([("x", tensor(storage(key="1")))], "the bytes of 'x', 'm/data/1', are missing, expected 24"),
        ([("x", tensor(storage(key="../data/0")))], "the bytes of 'x', 'm/data/../data/0', are missing"),
        ([("x", tensor(strides=(1, 2)))], r"'x' of shape \(2, 3\) has the strides \(1, 2\), expected \(3, 1\)"),
        ([("x", tensor(strides=(0, 0)))], r"'x' of shape \(2, 3\) has the strides \(0, 0\), expected \(3, 1\)"),
        ([("x", tensor(strides=(-3, -1)))], r"'x' of shape \(2, 3\) has the strides \(-3, -1\), expected"),
        ([("a", tensor()), ("x", tensor(strides=(6, 1)))], r"'x' of shape \(2, 3\) has the strides \(6, 1\)"),
    ],
)
def test_a_tensor_that_is_not_one_block_of_its_storage_is_refused_by_name(tmp_path, pairs, problem):
    write_program(tmp_path, state(*pairs))
    assert re.search(problem, read_refusal(tmp_path))


def test_the_bytes_of_a_big_endian_machine_are_refused(tmp_path):
    write_program(tmp_path, state(("x", tensor())), **{"m/byteorder": b"big"})
    assert "byteorder is b'big', expected b'little'; rewrite it" in read_refusal(tmp_path)


@pytest.mark.filterwarnings("error")
def test_a_program_that_makes_python_warn_is_refused_where_warnings_are_errors(tmp_path):
    write_program(tmp_path, rb"S'\u'" + b"\n")
    assert "is damaged: data.pkl cannot be followed" in read_refusal(tmp_path)
