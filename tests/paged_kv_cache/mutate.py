"""Breaks one guard of csrc/ at a time and shows that the soak notices: python tests/paged_kv_cache/mutate.py

All mutations are made in one copy of csrc/, so that only the files that a mutation changes are compiled. Prints the
Markdown table of csrc/README.md, and exits with 1 when the soak passes in spite of a mutation.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import internvl_rt

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc"))
import cmake_build

ROOT = Path(__file__).resolve().parents[2]
SOAK = Path(__file__).parent / "soak.py"


class Mutation(NamedTuple):
    guard: str  # says what is broken, for the table
    file: str
    before: str
    after: str


MUTATIONS = [
    Mutation(
        "a fork takes no reference to the shared blocks",
        "paged_kv_cache.cpp",
        "      if (block >= 0) pool_.ref(block);\n      child.tables[table].push_back(block);",
        "      child.tables[table].push_back(block);",
    ),
    Mutation(
        "a matched block keeps its place on the list of free blocks",
        "paged_kv_cache.cpp",
        "      if (block >= 0) pool_.ref(block);\n      sequence.tables[table].push_back(block);",
        "      if (block >= 0) ++pool_[block].references;\n      sequence.tables[table].push_back(block);",
    ),
    Mutation(
        "released blocks return before their step is complete",
        "paged_kv_cache_step.cpp",
        "frees_.push(std::max(fence, pool_[block].busy_until), version_of(block));",
        "frees_.push(0, version_of(block));",
    ),
    Mutation(
        "blocks are matched before their step is complete",
        "paged_kv_cache.cpp",
        "    if (write.step > num_completed_ && write.first < end)\n",
        "    if (write.step == 0)\n",
    ),
    Mutation(
        "a block waits only for the last step that wrote it",
        "paged_kv_cache.cpp",
        "    if (write.step > num_completed_ && write.first < end)\n",
        "    if (write.step > num_completed_ && write.first < end &&\n"
        "        (&write == &sequence.writes.back() || (&write)[1].first >= end))\n",
    ),
    Mutation(
        "a fork does not know the steps in flight of its parent",
        "paged_kv_cache.cpp",
        "    s.writes = parent.writes;\n",
        "",
    ),
    Mutation(
        "what a failed step wrote counts as computed",
        "paged_kv_cache_step.cpp",
        "    if (lost != sequence.writes.end()) forget_tokens(sequence, lost->first);\n",
        "    if (lost == sequence.writes.end()) continue;\n",
    ),
    Mutation(
        "the blocks that wait for a failed step go on waiting for later ones",
        "paged_kv_cache_step.cpp",
        "    if (publication.step <= last) pool_[publication.block].content = Content::kPrivate;\n",
        "    if (publication.step <= last && publication.is_last)\n"
        "      pool_[publication.block].content = Content::kPrivate;\n",
    ),
    Mutation(
        "a step that computes tokens again leaves them to the step before",
        "paged_kv_cache_step.cpp",
        "return w.step <= num_completed_ || w.first >= first; });",
        "return w.step <= num_completed_; });",
    ),
    Mutation(
        "a rollback keeps the pictures",
        "paged_kv_cache.cpp",
        "pictures.pop_back()) sequence.cut = kNoCut;",
        "pictures.pop_back()) break;",
    ),
    Mutation(
        "text behind a part of a picture is published as that picture",
        "paged_kv_cache.cpp",
        "std::min<std::int64_t>(num_tokens[i], sequence.cut) / block_size();",
        "num_tokens[i] / block_size();",
    ),
    Mutation(
        "a step may compute tokens that came from the cache",
        "paged_kv_cache_step.cpp",
        "CHECK_ARGUMENT(first >= sequence.num_matched",
        "CHECK_ARGUMENT(first >= 0",
    ),
    Mutation(
        "a step may write blocks that are shared or published",
        "paged_kv_cache_step.cpp",
        "CHECK_ARGUMENT(pool_.writable(sequence.tables[table][as_size(i)])",
        "CHECK_ARGUMENT(pool_[sequence.tables[table][as_size(i)]].references > 0",
    ),
    Mutation(
        "a shared last block is written, not copied",
        "paged_kv_cache.cpp",
        "      if (pool_.writable(block)) continue;",
        "      if (pool_[block].content == Content::kPrivate) continue;",
    ),
    Mutation(
        "a published block is written after a rollback",
        "block_pool.h",
        "return (*this)[block].references == 1 && (*this)[block].content == Content::kPrivate;",
        "return (*this)[block].references == 1;",
    ),
    Mutation(
        "a fork leaves its parent in the belief that its last block is its own",
        "paged_kv_cache.cpp",
        "  parent.room = 0;  // its last block is shared now\n",
        "",
    ),
    Mutation(
        "an evicted block stays in the index",
        "paged_kv_cache_step.cpp",
        "    index_.erase(evicted);\n",
        "",
    ),
    Mutation(
        "pictures do not count in a block's digest",
        "prefix_index.cpp",
        "  for (; picture != pictures.end() && picture->start < end; ++picture) {",
        "  for (; picture != picture; ++picture) {",
    ),
    Mutation(
        "a full hit leaves no token to compute",
        "paged_kv_cache.cpp",
        "std::min(std::ssize(prompt.token_ids) - 1, prompt.max_cached)",
        "std::min(std::ssize(prompt.token_ids), prompt.max_cached)",
    ),
    Mutation(
        "max_cached does not bound a match",
        "paged_kv_cache.cpp",
        "std::min(std::ssize(prompt.token_ids) - 1, prompt.max_cached)",
        "std::ssize(prompt.token_ids) - 1",
    ),
    Mutation(
        "a failed admission keeps its sequence",
        "paged_kv_cache.cpp",
        "  if (num_needed > pool_.num_available() - watermark) return std::nullopt;\n",
        "  if (num_needed > pool_.num_available() - watermark) {\n"
        "    start(seq_id, 0, [](Sequence&) {});\n    return std::nullopt;\n  }\n",
    ),
    Mutation(
        "a block is freed of which the window still has a token",
        "paged_kv_cache_step.cpp",
        "std::max<std::int64_t>(0, token - options_.window + 1) / block_size();",
        "std::max<std::int64_t>(0, token - options_.window + 2) / block_size();",
    ),
    Mutation(
        "a block that left the window returns before the steps that read it are complete",
        "paged_kv_cache_step.cpp",
        "[as_size(sequence.num_freed)], -1), num_steps_);",
        "[as_size(sequence.num_freed)], -1), 0);",
    ),
    Mutation(
        "a block that left the window stays",
        "paged_kv_cache_step.cpp",
        "    free_unseen(sequence, first);\n",
        "",
    ),
    Mutation(
        "a match does not ask for the blocks of the window",
        "paged_kv_cache.cpp",
        "      if (num_in_a_row < index + 1 - num_unseen((index + 1) * block_size())) continue;\n",
        "",
    ),
    Mutation(
        "layers with a window find the blocks of the others",
        "prefix_index.h",
        "{ return {hash.low ^ 1, hash.high}; }",
        "{ return hash; }",
    ),
    Mutation(
        "a rollback goes back to a token whose window is freed",
        "paged_kv_cache.cpp",
        "CHECK_ARGUMENT(sequence.length - num_tokens >= first,",
        "CHECK_ARGUMENT(sequence.length - num_tokens >= 0 * first,",
    ),
    Mutation(
        "a step computes tokens whose window is freed",
        "paged_kv_cache_step.cpp",
        "CHECK_ARGUMENT(first >= first_computable(sequence)",
        "CHECK_ARGUMENT(first >= 0",
    ),
    Mutation(
        "a fork does not know what its parent has freed",
        "paged_kv_cache.cpp",
        "  child.num_freed = parent.num_freed;\n",
        "",
    ),
]


def prepare(folder: Path) -> None:
    """Copies csrc/ into the folder and links the package's other files."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    package = folder / "internvl_rt"
    package.mkdir()
    for file in Path(internvl_rt.__file__).parent.iterdir():
        if not file.name.startswith(("_C.cpython", "__pycache__")):
            (package / file.name).symlink_to(file)
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    (package / name).symlink_to(folder / "build" / name)


def survives(folder: Path, mutation: Mutation | None, steps: int) -> tuple[bool, str]:
    """Returns whether the soak passes with the mutation, and the last line that it prints."""
    file = folder / "csrc" / (mutation.file if mutation else "bindings.cpp")
    text = file.read_text()
    if mutation:
        assert text.count(mutation.before) == 1, f"{mutation.guard}: the code has changed"
        file.write_text(text.replace(mutation.before, mutation.after))
    try:
        cmake_build.build(folder / "build", ["_C"], source=folder / "csrc", quiet=True)
    finally:
        file.write_text(text)
    command = [sys.executable, SOAK, "--steps", str(steps), "--seed", "1"]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    return run.returncode == 0, (run.stdout + run.stderr).strip().splitlines()[-1]


def shorten(line: str) -> str:
    """Cuts the error's type and place from the line that the soak prints, and keeps the message."""
    error = re.search(r"(?:Error|Exception)\((.*)\)$", line)
    text = error[1].strip("'\"") if error else line
    if text.startswith("{"):  # the message is a dict: name -> (number of the cache, number of the model)
        text = " and ".join(re.findall(r"'(\w+)':", text)) + " are not the model's"
    return text[:110]


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        sound, line = survives(folder, None, 20_000)
        assert sound, f"the soak fails without a mutation: {line}"
        print("| broken guard | file | what the soak says |\n| --- | --- | --- |")
        survivors = 0
        for mutation in MUTATIONS:
            passed, line = survives(folder, mutation, 50_000)
            survivors += passed
            said = "**survived**" if passed else shorten(line)
            print(f"| {mutation.guard} | `{mutation.file}` | {said} |", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
