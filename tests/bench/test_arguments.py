"""Every argument of `internvl-rt bench` is checked before a model is loaded, and told in one line."""

import pytest

from internvl_rt.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "sofmax"], "no case matches 'sofmax'; internvl-rt kernels lists"),
        (["kernels", "swiglu", "--baseline", "sdpa"], "no baseline 'sdpa' here; known are torch eager"),
        (["kernels", "--budget-s", "0"], "expected a number above 0, got '0'"),
        (["kernels", "--device", "cuda:99"], "device"),
        (["kernels", "--plots", "no/such/folder/x"], "no folder 'no/such/folder'; make it first"),
        (["decode", "tiny", "--plots", "no/such/folder/x"], "no folder 'no/such/folder'; make it first"),
        (["roofline", "--device", "tpu"], "device must be"),
        (["vision", "tiny", "--tiles", "0"], "expected a number above 0, got '0'"),
        (["prefill", "tiny", "--tokens", "1,two"], "expected a number above 0, got 'two'"),
        (["serve", "tiny", "--seconds", "-1"], "expected a number above 0, got '-1'"),
        (["decode", "tiny", "--rates", "1"], "unrecognized arguments: --rates 1"),
        (["decode", "tiny", "--device", "tpu"], "device must be"),
        (["decode", "tiny", "--dtype", "int4"], "dtype must be"),
        (["vision", "./no-such-model"], "no-such-model"),
        (["decode", "InternVL3-8B"], "'InternVL3-8B': no such folder"),
        (["vision", "random:InternVL3-5B"], "InternVL3-5B: no such file"),
        (["decode", "tiny", "--batch", "-1"], "expected a number above 0, got '-1'"),
        (["decode", "tiny", "--batch", "1000000000000"], "expected at most 4,096, got '1000000000000'"),
        (["decode", "tiny", "--batch", "9" * 5000], "expected a number above 0, got '999"),
        (["decode", "tiny", "--batch", "1," * 1000], "expected at most 1000 numbers, got '1,1,"),
        (["decode", "tiny", "--batch", ""], "expected a number above 0, got ''"),
        (["decode", "tiny", "--batch", "\x1b[2J\n"], r"got '\x1b[2J\n'"),
        (["decode", "tiny", "--context", "1e3"], "expected a number above 0, got '1e3'"),
        (["decode", "tiny", "--tokens", "nan"], "expected a number above 0, got 'nan'"),
        (["serve", "tiny", "--rates", "nan"], "expected a number above 0, got 'nan'"),
        (["serve", "tiny", "--rates", "inf"], "expected at most 10,000, got 'inf'"),
        (
            ["serve", "tiny", "--rates", "1000", "--seconds", "1000"],
            "more than 100,000; lower --rates or --seconds",
        ),
        (["serve", "tiny", "--budget-s", "1e300"], "expected at most 1,000,000, got '1e300'"),
        (["decode", "tiny", "--seed", "-1"], "expected an integer from 0 to 2**63 - 1, got '-1'"),
        (["decode", "tiny", "--device", "cuda:-1"], "device must be"),
        (["decode", "tiny", "--device", "cuda:999"], "device must be"),
        (["decode", "tiny", "--device", "cuda:01"], "device must be"),
        (["decode", "tiny", "--context", "40000"], "the model's window has 32,768; lower --context or --tokens"),
        (["vision", "tiny", "--tiles", "17,20"], "a pass has at most 16 tiles, got --tiles 17; lower it"),
    ],
)
def test_wrong_input_gives_one_line_and_exit_code_2(arguments, message, capsys):
    try:
        code = main(["bench", *arguments])
    except SystemExit as exit_:  # argparse exits by itself
        code = exit_.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert message in printed.err.splitlines()[-1]
    assert "Traceback" not in printed.err
