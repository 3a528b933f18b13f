"""Every command and every block of Python in README.md and docs/ runs, and every other block is what its tag says."""

import http.client
import json
import os
import re
import shlex
import socket
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import InvalidRequirement, Requirement

from support.doc_blocks import ROOT, Block, PageFault, PageRun, Rule, read_blocks

FOLLOWED = "adding-a-kernel.md"  # kernels/test_adding_a_kernel.py follows it in a copy of the repository
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != FOLLOWED)]
# The tags of blocks that are not run, each with what must read them without an error.
READERS: dict[str, Callable[[str], object]] = {
    "json": json.loads,
    "toml": tomllib.loads,
    "yaml": lambda text: list(yaml.safe_load_all(text)),
    **dict.fromkeys(("ini", "nginx", "promql", "text"), str),
}
COMMAND = re.compile(r"^(\$|curl|docker|git|internvl-rt|make|pip|python3?) ", re.MULTILINE)


def as_it_stands(run: PageRun, command: Block) -> None:
    run.shell(command, command.text)


def leave_out(run: PageRun, command: Block) -> None:
    if len(command.text.splitlines()) > 1 or re.search(r"[|;&]", command.text):
        raise command.fault(f"this command is not run, and has more in it: {command.text}")


def words_of(command: Block) -> list[str]:
    return shlex.split(command.text, comments=True)


def check_requirements(run: PageRun, command: Block) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    words = words_of(command)
    for word in words[words.index("install") + 1 :]:
        if word.startswith(("-", "dist/", "$")) or word == ".":
            continue
        try:
            requirement = Requirement(re.sub(r"^\.(?=\[|$)", project["name"], word))
        except InvalidRequirement as error:
            raise command.fault(f"{word}: {error}") from None
        unknown = requirement.extras - set(project["optional-dependencies"])
        if requirement.name == project["name"] and unknown:
            raise command.fault(f"{project['name']} has no extra {', '.join(unknown)}")


def check_target(run: PageRun, command: Block) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    command_line = ["make", "-n", "MAKE=true", *words_of(command)[1:]]
    done = subprocess.run(command_line, cwd=ROOT, env=inherited, capture_output=True, text=True, check=False)
    if done.returncode:
        raise command.fault(f"{command.text}: {done.stderr}")


def check_files(run: PageRun, command: Block) -> None:
    missing = [word for word in words_of(command) if word.startswith("deploy/") and not (ROOT / word).exists()]
    if missing:
        raise command.fault(f"{', '.join(missing)}: no such file")


def small_bench(run: PageRun, command: Block) -> None:
    run.shell(command, re.sub(r"internvl-rt bench \w+", r"\g<0> --quick", command.text))


def small_checkpoint(run: PageRun, command: Block) -> None:
    run.shell(command, re.sub(r"(write-random) InternVL3-\w+", r"\1 internvl_rt/tiny/config.json", command.text))


def script_help(run: PageRun, command: Block) -> None:
    words = words_of(command)
    script = next(word for word in words if word.endswith(".py"))
    described = run.shell(command, f"cd '{ROOT}' && python {script} --help")
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    if unknown := {option for option in options if not re.search(rf"{option}\b", described)}:
        raise command.fault(f"{script} has no option {', '.join(unknown)}")
    if "--plan" in described:
        run.shell(command, f"cd '{ROOT}' && {command.text.partition(' #')[0]} --plan")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_server(run: PageRun, command: Block) -> None:
    """Starts the server at the page's port. Where that is taken, it is another one, also in the rest of the page."""
    text = command.text.partition(" #")[0].rstrip("& ")
    server = run.serve(command, text)
    try:
        server.wait_until(lambda: '"event":"listening"' in server.log)
    except PageFault:
        if "cannot listen on" not in server.log:
            raise
        named, port = re.search(r" --port[ =](\d+)", text), free_port()
        run.replaced[rf"\b(127\.0\.0\.1|localhost):{named[1] if named else 8000}\b"] = rf"\1:{port}"
        text = text.replace(named[0], "") if named else text
        other = run.serve(command, f"{text} --port {port}")
        other.wait_until(lambda: '"event":"listening"' in other.log)


def start_another_server(run: PageRun, command: Block) -> None:
    """Starts a server that would share a taken port without a word, so at a free one, and waits for an answer."""
    port = free_port()
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4})

    def has_answered() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            status = connection.getresponse().status
        except OSError:
            return False  # it does not listen yet
        finally:
            connection.close()
        if status != 200:
            raise command.fault(f"status {status} is answered by {command.text}")
        return True

    run.serve(command, f"{command.text.partition(' #')[0]} --port {port}").wait_until(has_answered)


def refuse(run: PageRun, command: Block) -> None:
    raise command.fault(f"no rule says how this command is run: {command.text}")


VARIABLES = r"(\w+=\S+ )*"
# What is done with a command that begins with a pattern. The first rule that fits is taken.
RULES = (
    Rule(r"(python3? -m )?pip install ", check_requirements, "needs a network; test_wheel.py installs"),
    Rule(r"python3? -m venv ", leave_out, "the tests run in an environment already"),
    Rule(r"(source|\.) \S*/activate", leave_out, "its folder is the first of PATH already"),
    Rule(r"git clone ", leave_out, "needs a network; the tests run in a clone"),
    Rule(r"cd [\w-]+", leave_out, "the folder that was cloned; a reader's folder has links to what is in it"),
    Rule(r"make\b", check_target, "builds and tests for minutes; the target must exist"),
    Rule(r"(docker|kubectl|systemctl|sudo) ", check_files, "needs a daemon; server/test_deploy.py checks the files"),
    Rule(rf"{VARIABLES}internvl-rt serve ", start_server, "serves the rest of the page, and ends at SIGTERM"),
    Rule(r"serve run ", leave_out, "serves until it is stopped; the page does the same from Python, and stops it"),
    Rule(r"(granian|uvicorn) ", start_another_server, "serves one request, and ends at SIGTERM", is_slow=True),
    Rule(rf"{VARIABLES}internvl-rt bench ", small_bench, "with --quick, as more takes minutes", is_slow=True),
    Rule(rf"{VARIABLES}internvl-rt (chat|doctor|info) ", as_it_stands, "other blocks do not need it", is_slow=True),
    Rule(r"TRITON_INTERPRET=1 ", as_it_stands, "the interpreter takes a minute", is_slow=True),
    Rule(r"internvl-rt write-random InternVL3-", small_checkpoint, "a small model's config.json: not gigabytes"),
    Rule(r"python3? -m (lmms_eval|internvl_rt\.harness)", leave_out, "harness/test_real_lmms_eval.py runs the first"),
    Rule(rf"{VARIABLES}python3? (bench|tests)/", script_help, "measures for minutes; options must exist", is_slow=True),
    Rule(rf"{VARIABLES}(internvl-rt|hf|python3?|curl|printf|echo|cat) ", as_it_stands),
    Rule(r"", refuse),
)


def faults_of_form(page: Path) -> list[str]:
    """Returns which blocks have a wrong tag, are not what their tag says, or differ from the file that they show."""
    return [str(block.fault(what)) for block in read_blocks(page) for what in faults_of_block(block)]


def faults_of_block(block: Block) -> Iterator[str]:
    if block.included:
        file = ROOT / block.included
        if not file.is_file():
            yield f"{block.included}: no such file"
        elif file.read_text(encoding="utf-8").rstrip("\n") != block.text:
            yield f"the block differs from {block.included}"
        if block.tag == "python" and file.parent != ROOT / "examples":
            yield f"{block.included} is not in examples/, and would not be run"
    if block.tag in READERS:
        try:
            READERS[block.tag](block.text)
        except (ValueError, yaml.YAMLError) as error:
            yield f"the block is no {block.tag}: {error}"
    elif block.tag not in ("python", "sh"):
        yield f"the tag {block.tag!r} is none of {', '.join(sorted([*READERS, 'python', 'sh']))}"
    if block.tag == "text" and (command := COMMAND.search(block.text)):
        yield f"a block of text holds a command, which would not be run: {command[0]}"


def faults_of(page: Path, folder: Path | None = None, *, with_slow: bool = False) -> list[str]:
    """Returns all that is wrong with a page, run in a folder, perhaps with the commands that take long, or not run."""
    try:
        found = faults_of_form(page)
        return found + (PageRun(page, folder, RULES).go_through(with_slow=with_slow) if folder else [])
    except PageFault as fault:
        return [str(fault)]


of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@of_each_page
def test_the_blocks_of_a_page_are_what_their_tags_say(page: Path) -> None:
    if faults := faults_of(page):
        pytest.fail("\n".join(faults), pytrace=False)


@pytest.mark.slow
def test_the_first_page_runs_without_the_commands_that_take_long(tmp_path: Path) -> None:
    if faults := faults_of(ROOT / "README.md", tmp_path):
        pytest.fail("\n".join(faults), pytrace=False)


@pytest.mark.slow
@of_each_page
def test_all_of_a_page_runs_in_order(page: Path, tmp_path: Path) -> None:
    if faults := faults_of(page, tmp_path, with_slow=True):
        pytest.fail("\n".join(faults), pytrace=False)


WRONG = {  # what a page holds, and what is then told after its name
    "python that raises": ("```python\nx = 1\n\nassert x == 2\n```", "6: AssertionError"),
    "indented": ("- A list\n  ```python\n  x = 1\n  print(await y)\n  ```", "6: NameError: name 'y' is not defined"),
    "syntax": ("```python\n1\n```\n```python\n1 +\n```", "7: SyntaxError: invalid syntax"),
    "python that ends": (
        "```python\nimport os\n\nos._exit(3)\n```",
        "4: no end within 300 s, or of the interpreter (3)",
    ),
    "no end": ("```python\n1", "3: the block that begins here has no end"),
    "no tag": ("```\nmake test\n```", "4: the tag '' is none of"),
    "unknown tag": ("```rust\n1\n```", "4: the tag 'rust' is none of"),
    "json": ("```json\n{\n```", "4: the block is no json"),
    "command as text": (
        "```text\nfirst\n\nmake test\n```",
        "4: a block of text holds a command, which would not be run: make",
    ),
    "no example": ("<!-- examples/nosuch.py -->\n```python\n1\n```", "5: examples/nosuch.py: no such file"),
    "other example": (
        "<!-- examples/read_page.py -->\n```python\n1\n```",
        "5: the block differs from examples/read_page.py",
    ),
    "command that fails": ("```sh\n# works\ncat page.png |\n  wc -c\ncat nosuch\n```", "7: exit code 1: cat nosuch"),
    "pipe that fails": ("```sh\ncat nosuch | wc -c\n```", "4: exit code 1: cat nosuch | wc -c"),
    "open quote": ("```sh\necho 'a\nb\n```", "4: the last command of this block has no end: echo 'a"),
    "unknown command": ("```sh\nfrobnicate it\n```", "4: no rule says how this command is run: frobnicate it"),
    "command behind one that is left out": (
        "```sh\nsource .venv/bin/activate && cat nosuch\n```",
        "4: this command is not run, and has more in it",
    ),
    "unknown extra": ("```sh\npip install 'internvl-rt[server,grammer]'\n```", "4: internvl-rt has no extra grammer"),
    "unknown target": ("```sh\nmake nosuch  # but not this\n```", "4: make nosuch  # but not this: make: *** No rule"),
    "unknown option": ("```sh\npython bench/gpu.py --nosuch 1\n```", "4: bench/gpu.py has no option --nosuch"),
    "unknown file": ("```sh\ndocker build -f deploy/nosuch .\n```", "4: deploy/nosuch: no such file"),
}


@pytest.mark.parametrize(("text", "fault"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_page_is_told_with_its_name_and_line(text: str, fault: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{text}\n")
    (found,) = faults_of(page, tmp_path, with_slow=True)
    assert found.startswith(f"page.md:{fault}")


GOOD_PAGE = """
```python
# lines.py
import asyncio, os
event, loop = asyncio.Event(), asyncio.get_running_loop() if await asyncio.sleep(0) else None
```
```sh
# waits for the file above, as if a reader had written it
cat lines.py | grep \\
  asyncio >found.txt
cat <<END >>found.txt
line of a document
END
cat page.png >/tmp/copy.png
hf download OpenGVLab/InternVL3-1B >/dev/null
```
```python
event.set()
async with asyncio.timeout(1):
    await event.wait()
assert open("found.txt").read().endswith("else None\\nline of a document\\n")
assert os.path.getsize("/tmp/copy.png") == os.path.getsize("copy.png") > 0
```
"""


def test_the_blocks_of_a_page_share_names_files_and_an_event_loop(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(GOOD_PAGE)
    assert faults_of(tmp_path / "page.md", tmp_path) == []


@pytest.mark.slow
def test_a_server_whose_port_is_taken_gets_another_one_in_the_whole_page(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        commands = f"internvl-rt serve tiny --port {port} --no-page  # waits\ncurl http://localhost:{port}/v1/models"
        (tmp_path / "page.md").write_text(f"```sh\n{commands}\ncurl http://localhost:{port}/\n```\n")
        (found,) = faults_of(tmp_path / "page.md", tmp_path)
    assert found.startswith("page.md:4: exit code 22: curl")  # without the page it answers 404
