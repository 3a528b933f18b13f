"""Small runs of `internvl-rt bench`: every part prints what it should, however it ends; its speed is not tested."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from internvl_rt import Engine, SamplingParams
from internvl_rt.bench import vision
from internvl_rt.bench.arguments import PARTS
from internvl_rt.bench.decode import room_for, sweep_decode
from internvl_rt.bench.document import parse_last_line
from internvl_rt.bench.prompts import Prompter
from internvl_rt.bench.record import Pace, Record, environment, shares
from internvl_rt.checkpoint.find import random_config
from internvl_rt.cli import main
from internvl_rt.errors import CheckpointError, ConfigError
from internvl_rt.model.internvl import named_parameters
from internvl_rt.model.random_checkpoint import random_weights, write_random_checkpoint
from internvl_rt.model.work import Roof, Work, decoder_work, vision_work
from support.configs import ORIGINAL, changed
from support.recorder import Recorder
from support.result_schema import valid

CPU = torch.device("cpu")
CASES = {
    "vision": ["1_tiles", "3_tiles"],
    "prefill": ["128_tokens", "256_tokens", "2_tiles"],
    "decode": ["1x256", "4x256"],
    "serve": ["8_per_s"],
}
SMALL = changed(
    ORIGINAL,
    {
        "force_image_size": 28,
        "vision_config.image_size": 28,
        "vision_config.patch_size": 7,
        "vision_config.hidden_size": 16,
        "vision_config.num_attention_heads": 2,
        "vision_config.num_hidden_layers": 2,
        "vision_config.intermediate_size": 24,
        "llm_config.hidden_size": 32,
        "llm_config.num_attention_heads": 4,
        "llm_config.num_key_value_heads": 2,
        "llm_config.num_hidden_layers": 2,
        "llm_config.intermediate_size": 48,
        "llm_config.vocab_size": 300,
    },
)


@pytest.fixture
def small(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return f"random:{tmp_path / 'config.json'}"


def bench(capsys, *arguments):
    """Returns the lines that a bench printed, and its document, which is valid by bench/results/schema.json."""
    assert main(["bench", *arguments, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, valid(parse_last_line(lines))


def rows_by_case(document):
    return {row["name"].split("/")[2]: row for row in document["rows"]}


@pytest.mark.fast("vision", "decode")
@pytest.mark.parametrize("part", PARTS)
def test_a_part_prints_the_card_a_table_and_one_line_of_json(capsys, part):
    lines, document = bench(capsys, part, "tiny", "--quick")
    assert lines[0].startswith("model") and "tiny" in lines[0]  # noqa: PT018
    assert any(line.startswith("floors") and "computed from NVIDIA H200" in line for line in lines)
    table = lines[next(index for index, line in enumerate(lines) if line.startswith(f"{part}  ")) :]
    assert [line.split()[0] for line in table[1:-1]] == CASES[part]
    assert (document["part"], document["environment"]["device_kind"]) == (part, "cpu")
    assert [row["name"] for row in document["rows"]] == [
        f"{part}/tiny/{case}/float32" for case in ["load", *CASES[part]]
    ]
    for row in document["rows"][1:]:
        assert row["peak_memory_bytes"] > 0
        assert not [key for key in row if key.startswith("sheet_")], "a CPU has no data sheet here"


def test_rows_are_named_after_what_is_turned_off(capsys):
    off = ["--no-cuda-graphs", "--no-programmatic-launch"]
    for switches, variant in ((off[:1], "-no_cuda_graphs"), (off, "-no_cuda_graphs-no_programmatic_launch")):
        _, document = bench(capsys, "decode", "tiny", "--quick", "--batch", "1", *switches)
        names = [row["name"] for row in document["rows"]]
        assert names == [f"decode/tiny/{case}{variant}/float32" for case in ("load", "1x256")]
        assert "cuda_graphs" not in document["rows"][1], "on a CPU there is nothing to turn off"


def test_rows_are_named_after_experiments_which_the_references_do_not_have(capsys):
    on = ["--experiment", "early_trigger", "--experiment=prefetch_keys", "--experiment=early_trigger"]
    _, document = bench(capsys, "decode", "tiny", "--quick", "--batch", "1", *on)
    names = [row["name"] for row in document["rows"]]
    assert names == [f"decode/tiny/{case}-early_trigger-prefetch_keys/float32" for case in ("load", "1x256")]
    assert "early_trigger" not in document["rows"][1], "on a CPU there is nothing to turn on"


def test_on_a_gpu_every_row_says_which_switches_were_on():
    switches = {"cuda_graphs": True, "programmatic_launch": False}
    record = Record("decode", "decode/1b", "bfloat16", torch.device("cuda"), None, (), switches)
    record.add("1x2048", {"median_us": 1.0})
    assert record.rows == [{"name": "decode/1b/1x2048-no_programmatic_launch/bfloat16", **switches, "median_us": 1.0}]
    record = Record("decode", "decode/1b", "bfloat16", torch.device("cuda"), None, (), switches, ("early_trigger",))
    record.add("1x2048", {"median_us": 1.0})
    (row,) = record.rows
    assert row["name"] == "decode/1b/1x2048-no_programmatic_launch-early_trigger/bfloat16"
    assert row["early_trigger"] is True


def test_what_vision_says_fits_together(capsys):
    _, document = bench(capsys, "vision", "tiny", "--quick", "--tiles", "2,17")
    rows = rows_by_case(document)
    row, config = rows["2_tiles"], random_config(Path(vision.__file__).parents[1] / "tiny")
    work = vision_work(config, torch.float32, 2)
    assert (row["flops"], row["bytes"]) == (work.flops, work.bytes)
    assert 0 < row["low_us"] <= row["median_us"] <= row["high_us"] <= row["p99_us"]
    assert row["num_samples"] == 3
    assert row["tiles_per_s"] == pytest.approx(2e6 / row["median_us"], rel=1e-4)
    assert row["tflops"] == pytest.approx(work.flops / row["median_us"] / 1e6, rel=1e-4)
    assert rows["17_tiles"]["left_out"] == "a pass has at most 16 tiles"


def test_what_prefill_says_fits_together(capsys):
    _, document = bench(capsys, "prefill", "tiny", "--quick", "--tokens", "100,40000", "--tiles", "13")
    rows = rows_by_case(document)
    text, picture = rows["100_tokens"], rows["13_tiles"]
    assert (text["prompt_tokens"], picture["prompt_tokens"]) == (100, 64 + 13 * 4)
    assert "vision_median_us" not in text
    assert picture["median_us"] > picture["vision_median_us"] > 0
    assert text["tokens_per_s"] == pytest.approx(1e8 / text["median_us"], rel=1e-4)
    assert "do not fit 32768" in rows["40000_tokens"]["left_out"]


@pytest.mark.slow
def test_sequences_have_room_until_the_prompts_behind_long_contexts_are_computed(capsys):
    """On a CPU the steps of a long prompt become shorter towards its end."""
    _, document = bench(capsys, "decode", "tiny", "--batch", "8", "--context", "2048", "--tokens", "2")
    row = rows_by_case(document)["8x2048"]
    assert (row["batch"], row["num_samples"]) == (8, 2)


@pytest.mark.fast("graphs, a step ahead")
@pytest.mark.parametrize("like_a_gpu", [False, True], ids=["", "graphs, a step ahead"])
def test_a_decode_step_that_is_timed_is_one_of_the_whole_batch_and_nothing_else(like_a_gpu):
    num_steps, batch, context, step = 6, 5, 130, 70  # the prompts take ten steps; the first ones decode meanwhile
    length = context + room_for(batch, context, num_steps, step)
    options = {"max_tokens_per_step": step, "max_num_seqs": batch, "max_model_len": length, "block_size": 16}
    options["backend"] = "torch" if like_a_gpu else "auto"
    with Engine.from_pretrained("tiny", device="cpu", prefix_cache=False, visual_cache_bytes=0, **options) as engine:
        if like_a_gpu:
            engine.runner.capture(
                max_num_seqs=batch, max_model_len=length, max_tokens_per_step=step, capture=Recorder()
            )
            engine.loop.run_ahead = True
        record = Record("decode", "decode/tiny", "float32", CPU, None, ())
        cases = [(batch, context), (9, context // 2), (2, 9 * context)]
        sweep_decode(engine, record, cases, num_steps, seed=0)
        row, too_many, too_long = record.rows
        least, most = (
            decoder_work(engine.config.decoder, torch.float32, [1] * batch, [seen] * batch, batch)
            for seen in (context, length)
        )
        assert least.bytes < row["bytes"] < most.bytes
        assert row["num_samples"] == num_steps
        assert 0 < row["low_us"] <= row["median_us"] <= row["high_us"] <= row["p99_us"]
        assert "blocks of KV cache" in too_many["left_out"]
        assert "more than a sequence may have" in too_long["left_out"]
        stats = engine.stats()
        assert (stats["running"], stats["waiting"], stats["preemptions"], stats["kv_blocks_used"]) == (0, 0, 0, 0)


def test_prompts_have_exactly_the_tokens_that_are_asked_for_and_share_nothing():
    with Engine.from_pretrained("tiny", device="cpu") as engine:
        prompter = Prompter(engine, seed=3)
        picture = prompter.picture(2)
        prompts = [prompter.prompt(40, picture), prompter.prompt(40)]
        context_id = engine.tokenizer.token_id("<IMG_CONTEXT>")
        assert [len(each.prompt.token_ids) for each in prompts] == [40, 40]
        assert [index for index, id_ in enumerate(prompts[0].prompt.token_ids) if id_ == context_id] == [*range(1, 9)]
        assert context_id not in prompts[1].prompt.token_ids
        replies = engine.generate_prepared(iter(prompts), [SamplingParams(max_tokens=1)] * 2)
        assert [reply.usage.image_tokens for reply in replies] == [8, 0]
        assert picture.digest != prompter.picture(2).digest


def test_a_budget_stops_the_sweep_behind_the_first_case_and_says_so(capsys):
    lines, document = bench(capsys, "vision", "tiny", "--quick", "--tiles", "1,2,3", "--budget-s", "0.001")
    first, *others = document["rows"][1:]
    assert first["median_us"] > 0
    assert [re.sub(r"^\d+", "0", row["left_out"]) for row in others] == ["0 s of the budget of 0.001 s were spent"] * 2
    assert [line.split()[0] for line in lines if "left out: " in line] == ["2_tiles", "3_tiles"]


@pytest.mark.fast("vision")
@pytest.mark.parametrize(
    ("part", "first", "options"),
    [("vision", "1_tiles", ["--tiles", "1," * 500 + "1"]), ("serve", "9_per_s", ["--rates", "9,60", "--seconds", "1"])],
    ids=["vision", "serve"],
)
def test_ctrl_c_ends_with_130_and_what_was_measured(part, first, options):
    arguments = [sys.executable, "-m", "internvl_rt", "bench", part, "tiny", *options, "--device", "cpu"]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore SIGINT
    )
    assert process.stdout is not None
    assert any(line.startswith(first) for line in process.stdout)  # `any` reads up to the first row
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "\ninterrupted\n")
    rows = json.loads(output.splitlines()[-1])["rows"]
    assert (rows[1]["name"].rpartition("/")[0], rows[1].keys() & {"left_out"}) == (f"{part}/tiny/{first}", set())
    assert rows[-1].pop("name").startswith(f"{part}/tiny/the rest/")
    assert rows[-1] == {"left_out": "interrupted"}


def test_a_bench_that_fails_keeps_what_it_has(capsys, monkeypatch):
    def fail_at_three(config, dtype, num_tiles, layer_bytes):
        if num_tiles == 3:
            raise RuntimeError("CUDA error: an illegal memory access\nand more")
        return vision_work(config, dtype, num_tiles, layer_bytes)

    monkeypatch.setattr(vision, "vision_work", fail_at_three)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        main(["bench", "vision", "tiny", "--quick", "--device", "cpu"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows[1]["median_us"] > 0
    assert rows[-1]["left_out"] == "failed: CUDA error: an illegal memory access"


def test_shares_are_of_the_data_sheet():
    row = shares(Work(flops=3_000, bytes=100), 2.0, Roof(flops_per_s=3_000.0, bytes_per_s=200.0, name="a device"))
    assert (row["sheet_floor_us"], row["sheet_floor_percent"]) == (1e6, 50)
    assert (row["sheet_peak_percent"], row["sheet_bandwidth_percent"]) == (50, 25)


def test_a_case_is_repeated_within_its_limits():
    pace = Pace(seconds=1.0, least=5, most=50)
    assert [pace.repeats(each_s) for each_s in (10.0, 0.1, 0.001, 0.0)] == [5, 10, 50, 50]


def test_the_environment_says_what_the_other_benches_say():
    known = {"device", "device_kind", "num_sms", "memory_bytes", "driver", "sm_clock_mhz", "python", "torch", "triton"}
    assert environment(CPU).keys() == known | {"commit", "date", "num_threads"}


def test_every_part_runs_with_random_weights_of_a_shape(capsys, small):
    for part in PARTS:
        _, document = bench(capsys, part, small, "--quick")
        assert len(document["rows"]) == 1 + len(CASES[part])
        assert not [row for row in document["rows"] if "left_out" in row]


def test_random_weights_are_those_of_a_written_checkpoint_in_kind_and_depend_on_the_seed_alone(small):
    config = random_config(small.removeprefix("random:"))
    one, same, other = (
        named_parameters(random_weights(config, dtype=torch.bfloat16, device="cpu", seed=seed)) for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[path], same[path]) for path in one)
    random = [path for path in one if not path.endswith("weight_D")]
    assert not [path for path in random if torch.equal(one[path], other[path])]
    for path, tensor in one.items():
        if path.endswith("weight_D"):
            assert (tensor == 1).all(), path
        elif "scale" in path:
            assert 0.1 <= tensor.min() < tensor.max() <= 1, path
        else:
            assert 0 < tensor.float().std() < 0.04, path


def test_an_engine_of_a_random_model_answers_as_its_seed_says(small):
    messages, params = [{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=8, ignore_eos=True)
    answers = []
    for seed in (None, 0, 1):
        with Engine.from_pretrained(small, device="cpu", seed=seed) as engine:
            answers.append(engine.chat(messages, params).token_ids)
    assert answers[0] == answers[1] != answers[2]


def test_a_random_model_has_the_tokenizer_of_the_checkpoint_that_would_be_written(small, tmp_path):
    write_random_checkpoint(SMALL, tmp_path / "written")
    with (
        Engine.from_pretrained(small, device="cpu") as random,
        Engine.from_pretrained(tmp_path / "written", device="cpu") as written,
    ):
        text = "Any text: 你好\n"
        assert random.tokenizer.encode(text) == written.tokenizer.encode(text)
        assert random.tokenizer.token_bytes == written.tokenizer.token_bytes


def test_a_random_model_that_cannot_be_made_is_refused(small):
    with pytest.raises(ConfigError, match="InternVL3-5B: no such file, and none of the known models"):
        Engine.from_pretrained("random:InternVL3-5B", device="cpu")
    with pytest.raises(CheckpointError, match=r"revision 'main' was given, but random:.* has none; leave it out"):
        Engine.from_pretrained(small, device="cpu", revision="main")


@pytest.mark.parametrize("part", [*PARTS, "kernels"])
def test_help_explains_and_does_not_load_torch(part):
    program = "import sys; from internvl_rt.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    arguments = [sys.executable, "-c", program, "bench", part, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: internvl-rt bench {part}" in done.stdout
